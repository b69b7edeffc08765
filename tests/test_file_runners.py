"""Exported files as backends of a GPU, the device's part played: what is measured of its memory, and what runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from torch import Tensor

import benchmarks.measure.file_runners
import engines.run.open_plan
from benchmarks.measure.backends import TENSORRT_PROVIDER, RunRequest, backends_for
from benchmarks.measure.file_runners import FP16_ALLOWED, OrtRunner, PlanRunner, RunnerError
from benchmarks.measure.torch_runner import TorchRunner
from benchmarks.measure.worker import Worker
from benchmarks.options import BenchOptions
from engines.run.inputs import SessionError
from export.contract.signature import encoder_signature

GB = 1 << 30
EXACT_CUDA = ("CUDAExecutionProvider", {"use_tf32": "0"})
"""By default ONNX Runtime computes an FP32 file on CUDA in TF32."""


class Card:
    """A GPU's memory as everything on it sees it."""

    def __init__(self) -> None:
        self.free = 80 * GB

    def take(self, count: int) -> None:
        self.free -= count


PROFILE = [
    {"cat": "Session", "name": "model_run"},
    {"cat": "Node", "name": "m", "args": {"op_name": "MatMul", "provider": "CUDAExecutionProvider"}},
    {"cat": "Node", "name": "g", "args": {"op_name": "Gather", "provider": "CPUExecutionProvider"}},
]
"""What ONNX Runtime notes of a first run on a GPU."""


class OrtSession:
    """Two GB to load, three more for the first run, as ONNX Runtime's arena takes them."""

    profile = PROFILE

    def __init__(self, card: Card, providers: list[Any], options: Mapping[str, Any], asked: Any) -> None:
        self.card, self.providers, self.options, self.runs, self.asked = card, providers, options, 0, asked
        card.take(2 * GB)

    def end_profiling(self) -> str:
        assert self.asked.enable_profiling and self.runs == 1
        path = Path(f"{self.asked.profile_file_prefix}.json")
        path.write_text(json.dumps(self.profile))
        return str(path)

    def get_providers(self) -> list[str]:
        return [one if isinstance(one, str) else one[0] for one in self.providers]

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        asked = dict(one for one in self.providers if not isinstance(one, str))
        return {name: {**options, **self.options} for name, options in asked.items()}

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="y")]

    def io_binding(self) -> SimpleNamespace:
        names = ("bind_ortvalue_input", "bind_output", "synchronize_outputs")
        return SimpleNamespace(**{name: lambda *_: None for name in names})

    def run_with_iobinding(self, binding: object) -> None:
        if self.runs == 0:
            self.card.take(3 * GB)
        self.runs += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(benchmarks.measure.file_runners, "_free_device_bytes", lambda: card.free)
    return card


@pytest.fixture
def image(tmp_path: Path) -> Path:
    np.save(tmp_path / "image.npy", np.ones((1, 3, 4, 4), np.float32))
    return tmp_path / "image.npy"


def job_of(runtime: str, image: Path, **changes: str) -> RunRequest:
    """A job of a GPU's backend; no file is there."""
    backend = next(one for one in backends_for("cuda") if one.runtime == runtime)
    config = tiny_config()
    changed = dataclasses.replace(backend, **changes)  # type: ignore[arg-type]
    return RunRequest(changed, BenchOptions(image.parent), config, encoder_signature(config), image)


Ort = Callable[..., OrtRunner]


@pytest.fixture
def ort(card: Card, image: Path, monkeypatch: pytest.MonkeyPatch) -> Ort:
    """An ONNX Runtime of the CUDA provider or another one."""

    def made(provider: str = "CUDAExecutionProvider", precision: str = "fp16", **options: str) -> OrtRunner:
        module = SimpleNamespace(
            __version__="1.24.4",
            SessionOptions=SimpleNamespace,
            InferenceSession=lambda path, asked, providers: OrtSession(card, providers, options, asked),
            OrtValue=SimpleNamespace(ortvalue_from_numpy=lambda *_: None),
        )
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        return OrtRunner(job_of("ort", image, provider=provider, precision=precision))

    return made


def test_a_rows_device_memory_is_its_own(card: Card, ort: Ort) -> None:
    """What other workers load and free afterwards is no part of it."""
    runner = ort()
    runner.load()
    card.take(9 * GB)
    assert runner.device_bytes() == 5 * GB
    card.take(-20 * GB)
    assert runner.device_bytes() == 5 * GB


def test_what_is_small_may_be_on_the_cpu_and_what_is_heavy_may_not(ort: Ort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumers of Shape go to the CPU by design, in every file with a dynamic batch."""
    ort().load()  # the control: Gather is there
    late = {"cat": "Node", "name": "a", "args": {"op_name": "Attention", "provider": "CPUExecutionProvider"}}
    monkeypatch.setattr(OrtSession, "profile", [*PROFILE, late])
    with pytest.raises(RunnerError, match=r"1\.24\.4 would compute Attention \(1 nodes\) on the CPU"):
        ort().load()


def test_device_memory_that_cannot_be_told_is_not_told(card: Card, ort: Ort, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program freed more in the meantime than this one took: less than nothing is no figure."""
    take = OrtSession.run_with_iobinding

    def beside_another(session: OrtSession, binding: object) -> None:
        take(session, binding)
        card.take(-9 * GB)

    monkeypatch.setattr(OrtSession, "run_with_iobinding", beside_another)
    runner = ort()
    runner.load()
    assert runner.device_bytes() is None


def test_an_fp16_file_is_computed_in_fp16_by_tensorrts_provider_or_not_at_all(ort: Ort) -> None:
    runner = ort(TENSORRT_PROVIDER)
    runner.load()
    assert runner.session.providers == [(TENSORRT_PROVIDER, {FP16_ALLOWED: "1"}), EXACT_CUDA]
    assert "weakly typed" in (runner.note() or "")
    with pytest.raises(RunnerError, match="trt_fp16_enable to 0, but 1 was requested"):
        ort(TENSORRT_PROVIDER, **{FP16_ALLOWED: "0"}).load()
    label = next(one.label for one in backends_for("cuda") if one.provider == TENSORRT_PROVIDER)
    assert label.endswith("FP16 allowed")
    plain = ort()
    plain.load()
    assert plain.session.providers == [EXACT_CUDA] and plain.note() is None


class PlanSession:
    """Buffers that a run writes into; like TensorRT it writes where it was bound last, freed or not."""

    def __init__(self, captures: bool) -> None:
        self.device, self.stream, self.loaded_bytes, self.captures = torch.device("cpu"), None, GB, captures
        self.bound: tuple[Tensor, Tensor] | None = None

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = torch.zeros(2)
        self.bound = (inputs["image"], output)
        return {"y": output}

    def enqueue(self) -> None:
        assert self.bound is not None
        self.bound[1].copy_(self.bound[0].sum().expand(2))

    def capture(self, inputs: Mapping[str, Tensor]) -> SimpleNamespace:
        outputs = self.bind(inputs)
        if not self.captures:
            raise SessionError("x.plan: no CUDA graph can be captured (planted); run it without one")
        return SimpleNamespace(outputs=outputs, graph=SimpleNamespace(replay=self.enqueue), inputs=inputs)


@pytest.mark.parametrize("captures", [True, False])
def test_a_plan_runs_on_buffers_that_are_held(captures: bool, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a graph too, whose capture had bound others; the row says that there is none."""
    session = PlanSession(captures)
    monkeypatch.setattr(engines.run.open_plan, "open_plan", lambda plan, **options: session)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    runner = PlanRunner(job_of("plan", image))
    runner.load()
    runner.run()
    assert runner.outputs()["y"].tolist() == [48.0, 48.0]
    assert (runner.note() is None) == captures and (
        captures or "measured without a CUDA graph" in (runner.note() or "")
    )
    assert runner.device_bytes() == GB + 8
    session.loaded_bytes = -5
    assert runner.device_bytes() is None


def test_what_a_compiler_tried_is_no_part_of_a_peak(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's allocator as a number: autotuning takes 40 GB, a run 3."""
    held = {"now": 0, "peak": 0}

    def take(count: int) -> None:
        held["now"] += count
        held["peak"] = max(held.values())

    def run(x: Tensor) -> tuple[Tensor]:
        take(3)
        take(-3)
        return (x,)

    def compiled(module: object, **_: object) -> Callable[[Tensor], tuple[Tensor]]:
        take(40)
        take(-40)
        return run

    monkeypatch.setattr(
        "benchmarks.measure.torch_runner.make_module",
        lambda job: SimpleNamespace(signature=SimpleNamespace(outputs=[SimpleNamespace(name="y")])),
    )
    monkeypatch.setattr(torch, "compile", compiled)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: held["peak"])
    runner = TorchRunner(job_of("compile-max", image, device="cpu", precision="fp32"))
    runner.cuda = True
    assert runner.load() is not None
    assert held["peak"] == 0
    runner.run()
    assert runner.device_bytes() == 3


def test_a_device_peak_that_fails_leaves_the_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> int:
        raise RuntimeError("planted")

    worker = Worker()
    worker.runner = SimpleNamespace(device_bytes=broken)  # type: ignore[assignment]
    found = worker.memory()
    assert found["peak_host_bytes"] > 0 and found["peak_device_bytes"] is None
    assert "planted" in capsys.readouterr().err
