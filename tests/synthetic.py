"""Results of the right form whose figures are made up: for tests of the report, never for a figure that is shown."""

from __future__ import annotations

import copy
import functools
import math
from html.parser import HTMLParser
from typing import Any

import numpy as np

from benchmarks.results.feature_images import feature_images
from benchmarks.results.result_files import Result, check_result
from engines.run.latency import summarize

LABEL = "synthetic figures, not measured"

KNOWN_RATES = {"device": "cpu", "flops_per_s": {"fp32": 1e11, "bf16": 1e9, "fp16": 1e9}, "copy_bytes_per_s": 1e10}
"""For tests of other things than the machine's rates, which take 4 s of processor time."""

BACKENDS = (
    ("eager-fp32", "PyTorch eager, plain, FP32", "fp32", "plain", 100.0, 0.0),
    ("eager-bf16", "PyTorch eager, plain, BF16", "bf16", "plain", 26.0, 1.6e-2),
    ("eager-fp16", "PyTorch eager, plain, FP16", "fp16", "plain", 210.0, 2e-3),
    ("compile-fp32", "torch.compile, rewritten, FP32", "fp32", "rewritten", 71.0, 1.2e-6),
    ("ort-cpu-plain-fp32", "ONNX Runtime CPU, plain, FP32", "fp32", "plain", 54.0, 1.5e-6),
    ("ort-cpu-rewritten-fp32", "ONNX Runtime CPU, rewritten, FP32", "fp32", "rewritten", 51.0, 1.6e-6),
    ("openvino-fp32", "OpenVINO CPU, rewritten, FP32", "fp32", "rewritten", 44.0, 1.4e-6),
    ("openvino-bf16", "OpenVINO CPU, rewritten, BF16", "bf16", "rewritten", 19.0, 8e-2),
)
"""Backend, label, precision, module, median in ms, relative L2."""

MISSING = (
    ("tensorrt-fp16", "TensorRT plan, rewritten, FP16", "unavailable", "no NVIDIA driver on this machine"),
    ("compile-max", "torch.compile max-autotune, rewritten, FP32", "failed", "killed by signal 9: out of memory"),
)
OPERATIONS, LEAST_BYTES = 5.6e9, 1.9e6
LIMITS = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}


def synthetic_result(
    seed: int = 0, gpu: bool = False, sweep: bool = True, scale: float = 1.0, levels: int = 4
) -> Result:
    """A result of one machine; `scale` multiplies every latency. The caller's own to change."""
    return copy.deepcopy(_made(seed, gpu, sweep, scale, levels))


@functools.cache
def _made(seed: int, gpu: bool, sweep: bool, scale: float, levels: int) -> Result:
    generator = np.random.default_rng(seed)
    rows = [_row(generator, *backend, scale=scale) for backend in BACKENDS]
    rows += [_missing(*backend) for backend in MISSING]
    growth = []
    for side, batch, kind in (
        (336, 1, "image_size"),
        (672, 1, "image_size"),
        (1344, 1, "image_size"),
        (1008, 4, "batch"),
    ):
        work = (side / 1008) ** 2.1 * batch
        growth.append(
            {
                "image_size": [side, side],
                "batch": batch,
                "operations": OPERATIONS * work,
                "least_bytes": LEAST_BYTES * work,
            }
        )
        if sweep:
            for name, label, precision, module, ms, error in BACKENDS[:6]:
                row = _row(generator, name, label, precision, module, ms * work, error, scale=scale)
                rows.append(
                    row | {"sweep": kind, "image_size": [side, side], "batch": batch, "errors": [], "passed": None}
                )
    result = {
        "schema": 1,
        "kind": "bench",
        "date": "2026-01-02",
        "command": "neck-export bench --quick --output report",
        "encoder": {
            "checkpoint": f"random (seed 0); {LABEL}",
            "image_size": [1008, 1008],
            "batch": 1,
            "necks": ["sam3"],
            "levels": list(range(levels)),
            "positions": "graph",
            "config": {"embed_dim": 16, "depth": 4},
            "parameters": 454_000_000,
        },
        "machines": [_machine(gpu)],
        "rows": rows,
        "work": _work(),
        "growth": growth,
        "kernels": _kernels(generator) if gpu else None,
        "features": _features(generator, levels),
        "export": None,
    }
    check_result(result, "synthetic")
    return result


def synthetic_features(generator: np.random.Generator, levels: int = 4) -> dict[str, np.ndarray]:
    """Smooth features of 8 channels."""
    features = {}
    for level in range(levels):
        side = 48 >> level
        y, x = np.mgrid[0:side, 0:side] / side
        waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in generator.normal(size=(8, 3))]
        features[f"sam3_feat_{level}"] = np.stack(waves)[None].astype(np.float32)
    return features


def _features(generator: np.random.Generator, levels: int) -> dict[str, Any]:
    reference = synthetic_features(generator, levels)
    noisy = {
        name: array + generator.normal(size=array.shape).astype(np.float32) * 2e-3 for name, array in reference.items()
    }
    return feature_images(reference, noisy, "noise", "ort-cpu-rewritten-fp32")


def _row(
    generator: np.random.Generator,
    backend: str,
    label: str,
    precision: str,
    module: str,
    ms: float,
    error: float,
    scale: float = 1.0,
) -> dict[str, Any]:
    times = [float(time) for time in scale * ms * (1 + 0.02 * np.abs(generator.normal(size=9)))]
    latency = vars(summarize(times))
    floor = 12.0 if precision == "fp32" else 6.0
    names = [f"sam3_{kind}_{level}" for kind in ("feat", "pos") for level in range(4)]
    errors = [_error(name, error, precision) for name in names] if error else None  # the reference is not compared
    return {
        "machine": "m0",
        "backend": backend,
        "label": label,
        "device": "cpu",
        "precision": precision,
        "module": module,
        "image_size": [1008, 1008],
        "batch": 1,
        "sweep": None,
        "status": "measured",
        "reason": None,
        "times_ms": times,
        "warm_up_runs": 1,
        "latency": latency,
        "images_per_s": 1e3 / latency["mean_ms"],
        "load_s": 2.5,
        "build_s": None,
        "file_bytes": 1_820_000_000,
        "peak_host_bytes": 4_100_000_000,
        "peak_device_bytes": None,
        "errors": errors,
        "passed": all(entry["passed"] for entry in errors) if errors else None,
        "ratio": {"to": "eager-fp32", "median": ms / 100, "low": ms / 103, "high": ms / 97},
        "floor_ms": floor,
        "share_of_floor": min(1.0, floor / latency["p50_ms"]),
    }


def _error(name: str, error: float, precision: str) -> dict[str, Any]:
    limit = LIMITS[precision]
    return {
        "name": name,
        "max_abs": error * 4,
        "mean_abs": error / 2,
        "relative_l2": error,
        "cosine": 1 - error**2 / 2,
        "non_finite": 0,
        "tolerance": {"relative_l2": limit, "cosine": 1 - limit**2, "max_abs": None},
        "passed": error <= limit,
    }


def _missing(backend: str, label: str, status: str, reason: str) -> dict[str, Any]:
    figures = (
        "times_ms latency images_per_s load_s build_s file_bytes peak_host_bytes peak_device_bytes passed ratio "
        "warm_up_runs floor_ms share_of_floor"
    )
    return {
        **dict.fromkeys(figures.split()),
        "machine": "m0",
        "backend": backend,
        "label": label,
        "device": "cuda" if status == "unavailable" else "cpu",
        "precision": "fp16" if status == "unavailable" else "fp32",
        "module": "rewritten",
        "image_size": [1008, 1008],
        "batch": 1,
        "sweep": None,
        "status": status,
        "reason": reason,
        "errors": [],
    }


def _machine(gpu: bool) -> dict[str, Any]:
    card = {
        "name": "Imaginary GPU",
        "driver": "1.2.3",
        "compute_capability": "8.9",
        "memory_bytes": 24 << 30,
        "clocks": {"sm_mhz": "2100", "sm_max_mhz": "2520"},
    }
    versions = {"torch": "2.13.0", "onnxruntime": "1.31.1", "openvino": "2026.4.1", "tensorrt": None}
    return {
        "id": "m0",
        "name": f"imaginary machine ({LABEL})",
        "environment": {
            "processor": "Imaginary processor",
            "cores": 2,
            "memory_bytes": 24 << 30,
            "system": "Linux 6.1",
            "python": "3.11.7",
            "gpu": card if gpu else None,
            "versions": versions,
        },
        "roofline": {
            "device": "cpu",
            "flops_per_s": {"fp32": 4.6e11, "bf16": 9.3e11, "fp16": None},
            "copy_bytes_per_s": 1.1e10,
        },
    }


def _work() -> dict[str, Any]:
    shares = {"patch": 0.01, "windowed": 0.7, "global": 0.25, "level 0": 0.02, "level 1": 0.012, "level 2": 0.006}
    shares |= {"level 3": 0.002, "positions": 0.0}
    parts = [
        {"part": name, "operations": share * OPERATIONS, "bytes": LEAST_BYTES / len(shares), "ms": 90 * share + 0.5}
        for name, share in shares.items()
    ]
    return {"operations": OPERATIONS, "least_bytes": LEAST_BYTES, "parts": parts, "parts_of": "eager-fp32"}


def _kernels(generator: np.random.Generator) -> list[dict[str, Any]]:
    kinds = ("gemm", "kgen", "attention", "deconv")
    return [
        {
            "name": f"__myl_MulAddResTraReshTra_0x{index:08x}_trunk/blocks/{index // 4}",
            "kind": kinds[index % 4],
            "ms": float(math.exp(generator.normal() - 3)),
            "bytes": int(1e7 * (1 + index % 7)),
        }
        for index in range(60)
    ]


class Tags(HTMLParser):
    """Counts of tags, every attribute, and tags that were left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
