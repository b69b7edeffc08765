"""`bench` on a GPU from the command line to its end, on a CPU: TensorRT and torch.cuda are fakes.

The workers are in this process, each command in a play of the device but the exports, which no GPU makes.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config
from exporting import neck_export_cli, trace_quickly
from fake_gpu.device import Device
from fake_gpu.play import play
from PIL import Image

import benchmarks.measure.rounds
import benchmarks.measure.work_folder
from benchmarks.measure.worker import Worker, as_answer
from benchmarks.measure.worker_process import WorkerError
from benchmarks.results.result_files import read_result

CONFIG = tiny_config(embed_dim=32, d_model=16, depth=2, global_blocks=(1,))
"""meta-dual's with half of its blocks, so that its trace serves."""
PLAN = "tensorrt-rewritten-fp16"
RATES = {"device": "cuda", "flops_per_s": {"fp32": 1e11, "fp16": 1e11, "bf16": 1e11}, "copy_bytes_per_s": 1e10}


class Played:
    """A worker that is no process of its own."""

    device: Device
    fails: dict[tuple[str, str], Exception] = {}  # noqa: RUF012 - set by a test
    warm_ups: list[float] = []  # noqa: RUF012 - the seconds that were asked for; a fake GPU needs none

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.worker = log.stem, Worker()
        self.pid = 0

    def ask(self, command: str, timeout_s: float, **asked: Any) -> Any:
        try:
            if error := self.fails.get((self.name, command)):
                raise error
            if command == "rates":
                return RATES
            if "least_s" in asked:
                self.warm_ups.append(asked["least_s"])
                asked["least_s"] = 0.0
            with contextlib.nullcontext() if command in ("weights", "image", "file") else play("10.16", self.device):
                given = pickle.loads(pickle.dumps(asked))
                return pickle.loads(pickle.dumps(self.worker.answer(command, **given)))
        except WorkerError:
            raise
        except Exception as error:
            raise as_answer(error) from None

    def resident_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.worker = Worker()

    def __enter__(self) -> Played:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs, so that weights, files and plans are made once; `--fresh` measures anew."""
    return tmp_path_factory.mktemp("played") / "report"


@pytest.fixture
def bench(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs the command and returns its rows by backend."""
    trace_quickly(monkeypatch)
    for module in (benchmarks.measure.rounds, benchmarks.measure.work_folder):
        monkeypatch.setattr(module, "Worker", Played)
    monkeypatch.setattr(Played, "device", Device(), raising=False)
    monkeypatch.setattr(Played, "fails", {})
    monkeypatch.setattr(Played, "warm_ups", [])
    config = tmp_path / "encoder.json"
    config.write_text(json.dumps(CONFIG.to_dict()), encoding="utf-8")

    def run(*backends: str, images: Path | None = None) -> dict[str, dict[str, Any]]:
        named = [word for name in backends for word in ("--backend", name)]
        named += ["--images", str(images)] if images else []
        options = ["--checkpoint", "random", "--config", config, "--device", "cuda", "--no-sweep", "--rounds", "1"]
        ran = neck_export_cli("bench", *options, *named, "--fresh", "--output", report)
        assert ran.code == 0, ran.err
        rows = read_result(report / "report.json")["rows"]
        return {row["backend"]: row for row in rows}

    yield run


def test_a_plan_is_built_run_and_judged(bench: Any, report: Path) -> None:
    rows = bench(PLAN, "eager-rewritten-fp16", "ort-cuda-rewritten-fp16")
    for name in (PLAN, "eager-rewritten-fp16"):
        assert rows[name]["status"] == "measured" and rows[name]["passed"], rows[name]
    assert Played.warm_ups == [1.0] * 3  # of each that runs
    assert rows[PLAN]["note"] is None and rows[PLAN]["build_s"] > 0 and rows[PLAN]["file_bytes"] > 0
    assert rows["eager-fp32"]["peak_device_bytes"] > 0
    assert 0 < rows[PLAN]["lower_bound_ms"] < rows[PLAN]["latency"]["p50_ms"]  # of an L4, the fake GPU
    assert rows["eager-fp32"]["lower_bound_ms"] is None
    assert "Lower bound" in (report / "report.md").read_text()
    assert "does not contain CUDAExecutionProvider" in rows["ort-cuda-rewritten-fp16"]["reason"]


def test_a_plan_without_a_cuda_graph_says_so_and_is_right(bench: Any) -> None:
    Played.device.capture_fails = True
    row = bench(PLAN)[PLAN]
    assert row["status"] == "measured" and row["passed"]
    assert re.search(r"measured without a CUDA graph, .*could be captured \(.*plan", row["note"])


def test_what_fails_costs_its_row_alone(bench: Any) -> None:
    Played.fails[PLAN, "load"] = RuntimeError("CUDA error: an illegal memory access was encountered")
    Played.fails["eager-fp16", "load"] = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    Played.fails["eager-rewritten-fp16", "memory"] = RuntimeError("planted")
    rows = bench(PLAN, "eager-fp16", "eager-rewritten-fp16")
    assert rows[PLAN]["status"] == rows["eager-fp16"]["status"] == "failed"
    assert "illegal memory access" in rows[PLAN]["reason"] and "out of memory" in rows["eager-fp16"]["reason"]
    assert rows["eager-rewritten-fp16"]["status"] == "measured"
    assert rows["eager-rewritten-fp16"]["peak_device_bytes"] is None


def test_quantized_plans_have_rows_and_say_what_they_err(bench: Any, report: Path, tmp_path: Path) -> None:
    """All FP8 products of a tiny encoder err more than the gate allows, as its row says; eight images calibrate."""
    (tmp_path / "images").mkdir()
    for seed in range(8):
        noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{seed}.png")
    fp8, int8 = "tensorrt-rewritten-fp8", "tensorrt-rewritten-int8"
    rows = bench(fp8, int8, images=tmp_path / "images")
    made = json.loads(next(report.rglob("rewritten-int8-*/encoder.json")).read_text())
    assert made["quantization"]["image_count"] == 8
    assert [row["reason"] for row in rows.values()] == [None] * 3
    worst = {name: max(error["relative_l2"] for error in rows[name]["errors"]) for name in (fp8, int8)}
    assert rows[fp8]["label"] == "TensorRT, rewritten, FP8, all MatMuls" and rows[fp8]["precision"] == "fp8"
    assert 5e-2 < worst[fp8] < 0.2 and not rows[fp8]["passed"]
    assert 1e-2 < worst[int8] < 4e-2 and rows[int8]["passed"]
    assert rows[int8]["file_bytes"] > 0 and rows[int8]["floor_ms"] is None  # no rate of INT8 is known there
