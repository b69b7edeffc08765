"""Every way to run the encoder: what it is, whether this machine has it, and how it is opened (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from benchmarks.errors import BenchError
from benchmarks.options import BenchOptions
from export.contract.extras import install
from export.contract.signature import Signature
from neck.config import EncoderConfig

Runtime = Literal["eager", "compile", "compile-max", "ort", "openvino", "plan"]
Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
Device = Literal["cpu", "cuda"]

REFERENCE = "eager-fp32"
"""The plain module in FP32 PyTorch: every other row's errors and ratio are against it."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to run the encoder.

    Attributes:
        id, label: its name in files and on the screen.
        runtime: what runs it.
        device: where.
        precision: what its weights and activations are computed in.
        module: the plain module or the rewritten one.
        provider: ONNX Runtime's execution provider, or the flavor of TensorRT.
    """

    id: str
    label: str
    runtime: Runtime
    device: Device
    precision: Precision
    module: Literal["plain", "rewritten"]
    provider: str = ""

    @property
    def file(self) -> bool:
        """Whether it runs an exported file."""
        return self.runtime in ("ort", "openvino", "plan")


@dataclasses.dataclass(frozen=True)
class RunRequest:
    """What a worker must load.

    Attributes:
        backend: what runs.
        encoder: where its weights are: the options, their checkpoint being one that every backend maps.
        config, signature: the encoder at the size that is measured, and its outputs.
        image: the image, float32 (B, 3, H, W) as .npy.
        onnx, plan: the file, where the backend runs one.
        build_s, file_bytes: what making it took.
    """

    backend: Backend
    encoder: BenchOptions
    config: EncoderConfig
    signature: Signature
    image: Path
    onnx: Path = Path()
    plan: Path = Path()
    build_s: float | None = None
    file_bytes: int | None = None


class Runner(Protocol):
    """A backend in memory, with one input bound; `open_runner` makes it."""

    def load(self) -> float | None:
        """Brings it to where it can run; returns the seconds that building took, None where nothing is built."""

    def run(self) -> None:
        """One run, whose outputs are complete when this returns."""

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs by name, in float32."""

    def device_bytes(self) -> int | None:
        """Peak device memory; None on a CPU or if it is unknown."""
        return None

    def note(self) -> str | None:
        """A note for the backend's row in the report, once it is loaded."""
        return None

    def lower_bound_ms(self) -> float | None:
        """The latency that this GPU cannot beat by its published rates, None where that is not known."""
        return None

    def parts_ms(self) -> dict[str, float] | None:
        """Milliseconds of each part in one more run, None where the runtime does not tell."""
        return None


TENSORRT_PROVIDER = "TensorrtExecutionProvider"
NAMES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "fp8": "FP8, all MatMuls", "int8": "INT8, all MatMuls"}
QUANTIZED = ("fp8", "int8")
"""All products, the fastest that a file of the kind can be: its errors tell whether it may be used as it is."""

RUNTIMES: dict[str, tuple[str, Runtime, Device | None, str]] = {
    "eager": ("PyTorch eager", "eager", None, ""),
    "compile": ("torch.compile", "compile", None, ""),
    "compile-max": ("torch.compile max-autotune, CUDA graphs", "compile-max", None, ""),
    "ort-cpu": ("ONNX Runtime CPU", "ort", "cpu", "CPUExecutionProvider"),
    "ort-cuda": ("ONNX Runtime CUDA", "ort", "cuda", "CUDAExecutionProvider"),
    "ort-tensorrt": ("ONNX Runtime TensorRT", "ort", "cuda", TENSORRT_PROVIDER),
    "openvino": ("OpenVINO CPU", "openvino", "cpu", "CPU"),
    "tensorrt": ("TensorRT", "plan", "cuda", "tensorrt"),
    "rtx": ("TensorRT-RTX", "plan", "cuda", "rtx"),
}
"""What an id begins with -> label, runtime, device (None: the run's), provider; then come module and precision."""

CPU = (
    *("eager-fp32", "eager-rewritten-fp32", "ort-cpu-plain-fp32", "ort-cpu-rewritten-fp32"),
    *("openvino-plain-fp32", "openvino-rewritten-fp32", "compile-fp32", "compile-rewritten-fp32"),
    *("eager-bf16", "eager-rewritten-bf16", "eager-fp16", "eager-rewritten-fp16", "compile-rewritten-bf16"),
    *("openvino-rewritten-bf16", "ort-cpu-rewritten-fp16"),
)
GPU_FILES = (
    *("ort-cuda-plain-fp16", "ort-cuda-rewritten-fp16", "ort-tensorrt-rewritten-fp16", "tensorrt-plain-fp16"),
    *("tensorrt-rewritten-fp16", "tensorrt-rewritten-bf16", "rtx-rewritten-fp16", "tensorrt-rewritten-fp8"),
    *("tensorrt-rewritten-int8", "rtx-rewritten-fp8", "rtx-rewritten-int8"),
)
CUDA = (
    *("eager-fp32", "eager-rewritten-fp32", "eager-fp16", "eager-rewritten-fp16", "eager-bf16", "eager-rewritten-bf16"),
    *("compile-rewritten-fp16", "compile-fp16", "compile-max-rewritten-fp16", *GPU_FILES),
    *("compile-rewritten-bf16", "compile-bf16", "compile-max-rewritten-bf16", "compile-max-fp16"),
)
"""In the order of what is asked most: a run whose time is short leaves out the last."""


def backends_for(device: Device) -> list[Backend]:
    """Every backend of a run on this device; a CPU's list ends with those that a GPU would add."""
    if device == "cuda":
        return [_backend(name, "cuda") for name in CUDA]
    added = [*GPU_FILES, "compile-max-rewritten-fp16"]
    return [*(_backend(name, "cpu") for name in CPU), *(_backend(name, "cuda") for name in added)]


def _backend(name: str, device: Device) -> Backend:
    start, _, precision = name.rpartition("-")
    module = "rewritten" if start.endswith("-rewritten") else "plain"
    title, runtime, own, provider = RUNTIMES[start.removesuffix("-rewritten").removesuffix("-plain")]
    # the engine of ONNX Runtime's TensorRT provider is weakly typed: it need not take FP16
    label = f"{title}, {module}, {NAMES[precision]}{' allowed' * (provider == TENSORRT_PROVIDER)}"
    return Backend(name, label, runtime, own or device, precision, module, provider)  # type: ignore[arg-type]


SWEPT = {
    "cpu": ("ort-cpu-rewritten-fp32", "openvino-rewritten-fp32"),
    "cuda": ("eager-fp16", "eager-rewritten-fp16", "eager-rewritten-bf16"),
}
"""What is swept over image sizes and batches, the reference aside: a compiled module would be built for each point."""

QUICK = {
    "cpu": ("eager-rewritten-fp32", "ort-cpu-plain-fp32", "ort-cpu-rewritten-fp32", "openvino-rewritten-fp32"),
    "cuda": ("eager-fp16", "eager-rewritten-fp16", "eager-rewritten-bf16", "compile-rewritten-fp16"),
}
"""What `--quick` measures, the reference aside."""


def choose_backends(device: Device, asked: Sequence[str]) -> list[Backend]:
    """The requested backends in the table's order, always beginning with the reference; all if none is named.

    Raises:
        BenchError: a name that is none.
    """
    known = backends_for(device)
    names = {backend.id for backend in known}
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise BenchError(
            f"--backend {', '.join(unknown)} does not exist for the device {device}; choose from "
            f"{', '.join(sorted(names))}"
        )
    return [backend for backend in known if not asked or backend.id in asked or backend.id == REFERENCE]


def why_unavailable(backend: Backend, facts: Mapping[str, Any], named: bool = False) -> str | None:
    """Why this machine cannot run a backend, and what would mend it; None where it can.

    Args:
        backend: which.
        facts: what `environment.capabilities` found.
        named: whether the user named it; then what is merely slow is run.
    """
    if backend.device == "cuda" and not facts["cuda"]:
        return "torch finds no usable NVIDIA GPU"
    match backend.runtime:
        case "eager" | "compile" | "compile-max":
            return _torch_lacks(backend, facts, named)
        case "ort":
            return _ort_lacks(backend, facts)
        case "openvino":
            return _openvino_lacks(backend, facts)
        case "plan":
            reason: str | None = facts["plans"][backend.provider]
            return reason


def _torch_lacks(backend: Backend, facts: Mapping[str, Any], named: bool) -> str | None:
    slow = backend.device == "cpu" and backend.precision != "fp32" and not facts["cpu_computes"][backend.precision]
    if slow and not named:
        return (
            f"this CPU has no {NAMES[backend.precision]} matrix instructions, so torch would emulate them, which is "
            f"slower than FP32. To measure this backend nevertheless, add --backend {backend.id} to the command"
        )
    return facts["compilers"][backend.device] if backend.runtime != "eager" else None


def _ort_lacks(backend: Backend, facts: Mapping[str, Any]) -> str | None:
    if facts["providers"] is None:
        return f"onnxruntime is not installed; run {install('cpu' if backend.device == 'cpu' else 'gpu')}"
    if backend.provider not in facts["providers"]:
        return f"the installed onnxruntime does not contain {backend.provider}; run pip install onnxruntime-gpu"
    if backend.device == "cpu" and backend.precision != "fp32":
        return (
            f"ONNX Runtime's CPU provider computes {NAMES[backend.precision]} files in FP32, so this backend would "
            f"measure FP32 instead of {NAMES[backend.precision]}"
        )
    return None


def _openvino_lacks(backend: Backend, facts: Mapping[str, Any]) -> str | None:
    if facts["openvino"] is None:
        return f"openvino is not installed; run {install('bench')}"
    if NAMES[backend.precision] not in facts["openvino"]:
        return (
            f"OpenVINO cannot compute in {NAMES[backend.precision]} on this CPU, only in {', '.join(facts['openvino'])}"
        )
    return None


def open_runner(job: RunRequest) -> Runner:
    """The runner of a job, nothing loaded yet."""
    if not job.backend.file:
        from benchmarks.measure.torch_runner import TorchRunner

        return TorchRunner(job)
    from benchmarks.measure.file_runners import OpenVinoRunner, OrtRunner, PlanRunner

    makers: dict[str, Callable[[RunRequest], Runner]] = {
        "ort": OrtRunner,
        "openvino": OpenVinoRunner,
        "plan": PlanRunner,
    }
    return makers[job.backend.runtime](job)
