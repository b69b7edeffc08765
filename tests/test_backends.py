"""The ways to run the encoder: which are listed, what each computes, and the worker that a backend runs in."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_golden, named_outputs, shared_encoder, tiny_config, traced
from worker_here import WorkerHere

import benchmarks.measure.work_folder
from benchmarks.errors import BenchError
from benchmarks.measure.backends import (
    REFERENCE,
    Backend,
    RunRequest,
    backends_for,
    choose_backends,
    open_runner,
    why_unavailable,
)
from benchmarks.measure.environment import _gpu_compiler
from benchmarks.measure.file_runners import RunnerError
from benchmarks.measure.measure_point import Schedule
from benchmarks.measure.torch_runner import OTHER, TorchRunner, make_module
from benchmarks.measure.work_folder import ArtifactCache
from benchmarks.measure.worker import OUT_OF_MEMORY, peak_bytes
from benchmarks.measure.worker_process import ROOT, Worker, WorkerError
from benchmarks.options import BenchOptions
from benchmarks.results.result import plan_kernels
from export.contract.options import ExportOptions, Rewrites
from export.contract.signature import encoder_signature
from export.pipeline import export_onnx
from export.verification.fidelity import compare
from neck.checkpoint import save_meta_checkpoint

CONFIG = tiny_config()

HANGS_S = 600

NOTHING: dict[str, Any] = {
    "cuda": False,
    "cpu_computes": {"bf16": False, "fp16": False},
    "compilers": {"cpu": "no compiler", "cuda": "no Triton"},
    "providers": None,
    "openvino": None,
    "plans": {"tensorrt": "no GPU", "rtx": "no GPU"},
}
"""A machine with PyTorch alone."""

EVERYTHING: dict[str, Any] = {
    "cuda": True,
    "cpu_computes": {"bf16": True, "fp16": True},
    "compilers": {"cpu": None, "cuda": None},
    "providers": ["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"],
    "openvino": ["FP32", "BF16"],
    "plans": {"tensorrt": None, "rtx": None},
}


PACE = Schedule(1, 1, 1, 0.0, HANGS_S, float("inf"))


def of(job: RunRequest, name: str) -> RunRequest:
    """The same for another backend."""
    return dataclasses.replace(job, backend=named(name))


def named(name: str) -> Backend:
    return next(one for one in (*backends_for("cpu"), *backends_for("cuda")) if one.id == name)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> RunRequest:
    """What every backend of a tiny encoder runs on; the file is the rewritten FP32 one."""
    folder = tmp_path_factory.mktemp("job")
    save_meta_checkpoint(shared_encoder(CONFIG), folder / "weights.pt")
    np.save(folder / "image.npy", torch.randn(1, 3, *CONFIG.image_size, generator=torch.Generator().manual_seed(0)))
    options = ExportOptions(folder / "encoder.onnx", checkpoint=folder / "weights.pt", config=CONFIG, verify=False)
    export_onnx(options)
    encoder = BenchOptions(folder, checkpoint=folder / "weights.pt", config=CONFIG)
    image, onnx = folder / "image.npy", options.output
    return RunRequest(named(REFERENCE), encoder, CONFIG, encoder_signature(CONFIG), image, onnx)


@pytest.fixture(scope="module")
def expected(job: RunRequest) -> dict[str, np.ndarray]:
    """The plain module's outputs."""
    outputs = named_outputs(shared_encoder(CONFIG), torch.from_numpy(np.load(job.image)))
    return {name: value.numpy() for name, value in outputs.items()}


@pytest.mark.parametrize(
    "name",
    [
        "eager-fp32",
        "eager-rewritten-fp32",
        "eager-fp16",
        "eager-rewritten-fp16",
        "eager-bf16",
        "eager-rewritten-bf16",
        "ort-cpu-rewritten-fp32",
        "openvino-rewritten-fp32",
    ],
)
def test_every_backend_computes_the_encoder(name: str, job: RunRequest, expected: dict[str, np.ndarray]) -> None:
    backend = named(name)
    if backend.runtime == "openvino":
        pytest.importorskip("openvino")
    runner = open_runner(dataclasses.replace(job, backend=backend))
    assert runner.load() is None
    runner.run()
    runner.run()
    found = runner.outputs()
    assert list(found) == [spec.name for spec in encoder_signature(CONFIG).outputs]
    assert all(array.dtype == np.float32 for array in found.values())
    verdict = compare(expected, found, backend.precision, name)
    assert verdict.passed
    if backend.precision == "fp32":
        errors = {one.name: one.relative_l2 for one in verdict.comparisons}
        assert errors["sam3_feat_0"] > 0 or name == REFERENCE
    else:  # it was not computed in FP32
        assert not compare(expected, found, "fp32", name).passed
    assert runner.device_bytes() is None
    moved = {one: np.roll(array, 1, axis=-1) for one, array in found.items()}
    assert not compare(expected, moved, backend.precision, name).passed


def test_a_plain_module_has_its_position_tables_before_it_is_compiled(job: RunRequest) -> None:
    """As the rewritten one has them: neither makes them in a run, which flattered the rewritten on a GPU."""
    module = make_module(of(job, "eager-fp32"))
    found: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        found.append(graph)
        return graph

    with torch.no_grad():
        torch.compile(module, backend=keep, fullgraph=True)(torch.zeros(1, 3, *CONFIG.image_size))
    (graph,) = found
    assert "arange" not in graph.code and "conv2d" in graph.code


def test_a_rewritten_module_rewrites_its_weights_once(job: RunRequest) -> None:
    module = make_module(of(job, "eager-rewritten-fp32"))
    layer = module.get_submodule("trunk.blocks.0.attn.qkv")
    assert type(layer) is torch.nn.Linear
    assert not torch.equal(layer.weight, shared_encoder(CONFIG).get_parameter("trunk.blocks.0.attn.qkv.weight"))


def test_the_parts_of_a_run_are_timed(job: RunRequest) -> None:
    runner = TorchRunner(of(job, "eager-fp32"))
    runner.load()
    found = runner.parts_ms()
    assert found is not None
    levels = {f"level {level}" for level in range(4)}
    assert set(found) == {"patch", "windowed", "global", "positions", OTHER, *levels}
    assert all(value > 0 for name, value in found.items() if name != OTHER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in runner.module.modules())


def test_a_precision_that_openvino_does_not_take_is_refused(job: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old CPUs take FP32 for BF16, as this Core does on all of them; what a CPU lists does not tell which do."""
    openvino = pytest.importorskip("openvino")
    hint = pytest.importorskip("openvino.properties.hint")

    class Old(openvino.Core):  # type: ignore[misc, name-defined]
        def compile_model(self, model: str, device: str, settings: dict[Any, Any]) -> Any:
            return super().compile_model(model, device, {**settings, hint.inference_precision: openvino.Type.f32})

    monkeypatch.setattr(openvino, "Core", Old)
    runner = open_runner(of(job, "openvino-rewritten-bf16"))
    with pytest.raises(RunnerError, match="f32, but bf16 was requested"):
        runner.load()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_machine_lacks_is_said(device: Any) -> None:
    backends = backends_for(device)
    assert backends[0].id == REFERENCE and backends[0].device == device
    assert len({one.id for one in backends}) == len(backends)
    reasons = {one.id: why_unavailable(one, NOTHING) for one in backends}
    able = {name for name, reason in reasons.items() if reason is None}
    assert able == ({"eager-fp32", "eager-rewritten-fp32"} if device == "cpu" else set())
    assert all(why_unavailable(one, EVERYTHING) is None for one in backends if one.id != "ort-cpu-rewritten-fp16")


def test_an_fp16_file_on_a_cpu_does_not_pose_as_fp16() -> None:
    reason = why_unavailable(named("ort-cpu-rewritten-fp16"), EVERYTHING, named=True)
    assert reason is not None and "computes FP16 files in FP32" in reason


def test_a_gpu_that_cannot_launch_tritons_kernels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What launches them is compiled against Python.h when it is first needed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in (_gpu_compiler() or "")
    (tmp_path / "Python.h").touch()
    assert _gpu_compiler() is None


def test_what_is_slow_runs_where_it_is_named() -> None:
    backend = next(one for one in backends_for("cpu") if one.id == "eager-bf16")
    reason = why_unavailable(backend, NOTHING)
    assert reason is not None and "--backend " in reason
    assert why_unavailable(backend, NOTHING, named=True) is None


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BenchError, match=r"--backend eager-fp8 .* the device cpu.*eager-bf16"):
        choose_backends("cpu", ["eager-fp8"])
    chosen = choose_backends("cpu", ["ort-cpu-plain-fp32"])
    assert [one.id for one in chosen] == [REFERENCE, "ort-cpu-plain-fp32"]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    with Worker(tmp_path / "worker.log") as made:
        yield made


def test_a_worker_runs_a_backend(worker: Worker, job: RunRequest, expected: dict[str, Any], tmp_path: Path) -> None:
    values = of(job, "ort-cpu-rewritten-fp32")
    assert worker.ask("load", HANGS_S, job=values, most_bytes=None)["load_s"] > 0
    assert len(worker.ask("run", HANGS_S, count=3)) == 3
    names = worker.ask("outputs", HANGS_S, folder=tmp_path / "out")
    found = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in names}
    assert compare(expected, found, "fp32", "worker").passed
    peak = worker.ask("memory", HANGS_S)["peak_host_bytes"]
    assert 20e6 < peak < peak_bytes()  # onnxruntime without torch is less than this process


def test_a_worker_of_another_runtime_does_not_hold_torch(job: RunRequest) -> None:
    """It would be in the host's peak that its row tells; torch's own worker is the control."""
    load = "import pickle, sys, benchmarks.measure.worker, benchmarks.measure.backends as backends\n"
    load += "for name, job in pickle.loads(sys.stdin.buffer.read()):\n"
    load += "    backends.open_runner(job); print(name, 'torch' in sys.modules)"
    names = ("ort-cpu-rewritten-fp32", "openvino-rewritten-fp32", "eager-fp32")
    jobs = pickle.dumps([(name, of(job, name)) for name in names])
    found = subprocess.run([sys.executable, "-c", load], cwd=ROOT, input=jobs, check=True, stdout=subprocess.PIPE)
    assert found.stdout.decode().split() == [names[0], "False", names[1], "False", names[2], "True"]


def test_out_of_memory_is_an_answer(worker: Worker, job: RunRequest, tmp_path: Path) -> None:
    """An image of 8 GB (of holes in the file) where the worker may take 2."""
    huge = np.lib.format.open_memmap(tmp_path / "huge.npy", mode="w+", dtype=np.float32, shape=(2 << 30,))
    del huge
    values = of(job, "ort-cpu-rewritten-fp32")
    with pytest.raises(WorkerError, match="out of memory") as error:
        worker.ask("load", HANGS_S, job=dataclasses.replace(values, image=tmp_path / "huge.npy"), most_bytes=2 << 30)
    assert error.value.memory
    with pytest.raises(WorkerError) as error:
        worker.ask("load", HANGS_S, job=dataclasses.replace(values, image=tmp_path / "nowhere.npy"), most_bytes=2 << 30)
    assert not error.value.memory


@pytest.mark.parametrize(
    "text",
    [
        "OutOfMemoryError CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory",
        "RuntimeException bad allocation: std::bad_alloc",
        "RuntimeException Failed to allocate memory for requested buffer of size 3439853568",
    ],
)
def test_what_runtimes_say_when_memory_is_out(text: str) -> None:
    assert OUT_OF_MEMORY.search(text)
    assert not OUT_OF_MEMORY.search("RuntimeError: mat1 and mat2 shapes cannot be multiplied")


def test_an_exception_costs_one_answer(worker: Worker, job: RunRequest) -> None:
    values = of(job, "ort-cpu-rewritten-fp32")
    with pytest.raises(WorkerError, match="File doesn't exist") as error:
        worker.ask("load", HANGS_S, job=dataclasses.replace(values, onnx=Path("/nowhere.onnx")), most_bytes=None)
    assert not error.value.memory
    assert worker.ask("load", HANGS_S, job=values, most_bytes=None)["load_s"] > 0


def test_a_killed_worker_is_told(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"killed \(SIGKILL\) in its step `facts`, most likely because memory"
    ) as error:
        worker.ask("facts", HANGS_S)
    assert error.value.memory


def test_a_crash_is_told(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGABRT)
    with pytest.raises(WorkerError, match=r"crashed \(SIGABRT\) in its step `facts`"):
        worker.ask("facts", HANGS_S)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('planted')\n")
    with (
        Worker(tmp_path / "log", {"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as broken,
        pytest.raises(WorkerError, match="failed with exit status 1 in its step `facts`: planted"),
    ):
        broken.ask("facts", HANGS_S)


def test_a_worker_that_hangs_is_ended(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"its step `facts` took longer than"):
        worker.ask("facts", 0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_worker_takes_along_what_it_started(tmp_path: Path, job: RunRequest) -> None:
    """A runtime that starts a process, as compilers do; it would else go on when the worker was ended."""
    code = "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    (tmp_path / "onnxruntime.py").write_text(f"{code}raise ImportError(child.pid)\n")
    with (
        Worker(tmp_path / "log", {"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as worker,
        pytest.raises(WorkerError, match="ImportError") as error,
    ):
        worker.ask("load", 60, job=of(job, "ort-cpu-rewritten-fp32"), most_bytes=None)
    stat, ends = Path("/proc", str(error.value).rpartition(" ")[2], "stat"), time.monotonic() + 120
    while _runs(stat) and time.monotonic() < ends:
        time.sleep(0.02)  # a signal is delivered when the child has its turn
    assert not _runs(stat)


def _runs(stat: Path) -> bool:
    """Whether a process is there and no zombie, whose end its parent has yet to read."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_what_libraries_print_is_no_answer(tmp_path: Path, job: RunRequest) -> None:
    """A module that prints when it is imported, as some runtimes do."""
    (tmp_path / "onnxruntime.py").write_text("print('hello')\nraise ImportError('planted')\n")
    with (
        Worker(tmp_path / "log", {"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as worker,
        pytest.raises(WorkerError, match="ImportError: planted"),
    ):
        worker.ask("load", HANGS_S, job=of(job, "ort-cpu-rewritten-fp32"), most_bytes=None)
    assert "hello" in (tmp_path / "log").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactCache]:
    wide = load_golden("meta-dual").config  # TensorRT fuses heads of 16 channels or more
    traced(load_golden("meta-dual").encoder, wide, necks="sam3")  # the worker's own would be a cold one
    work = tmp_path_factory.mktemp("work")
    with ArtifactCache(work, BenchOptions(work, config=wide, necks="sam3")) as made:
        made._worker = WorkerHere(work / "log")  # weights and image without a process; files and plans have their own
        made.prepare()
        image = made.folder / f"image-{made.point(None, 1, PACE).files}.npy"
        made.ask("image", asked=made.asked, signature=made.point(None, 1, PACE).signature, path=image)
        yield made


def test_a_plan_is_built_for_its_backend(place: ArtifactCache, worker: Worker) -> None:
    """TensorRT-RTX builds without a GPU; what runs the plan says that there is none."""
    pytest.importorskip("tensorrt_rtx")
    backend = named("rtx-rewritten-fp16")
    made = place.jobs([backend], place.point(None, 1, PACE))[backend.id]
    assert isinstance(made, RunRequest)
    kernels = plan_kernels(made.plan)
    assert kernels and all(set(one) == {"name", "kind", "ms", "bytes"} for one in kernels)
    assert made.build_s and made.build_s > 0 and made.file_bytes == made.plan.stat().st_size
    if not torch.cuda.is_available():
        with pytest.raises(WorkerError, match=r"SessionError: .*no NVIDIA GPU"):
            worker.ask("load", HANGS_S, job=made, most_bytes=None)


def test_a_file_that_cannot_be_made_is_one_backends_matter(
    place: ArtifactCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = dataclasses.replace(place.prepared.encoder, checkpoint=Path("/nowhere.pt"))
    monkeypatch.setattr(place, "prepared", dataclasses.replace(place.prepared, encoder=nowhere))
    monkeypatch.setattr(benchmarks.measure.work_folder, "Worker", WorkerHere)
    backends = [named("eager-fp32"), named("ort-cpu-plain-fp32")]
    made = place.jobs(backends, place.point(None, 1, PACE))
    assert isinstance(made["ort-cpu-plain-fp32"], WorkerError) and "nowhere.pt" in str(made["ort-cpu-plain-fp32"])
    assert isinstance(made["eager-fp32"], RunRequest)


def test_plain_and_rewritten_differ_by_the_module_alone() -> None:
    plain, rewritten = named("ort-cpu-plain-fp32"), named("ort-cpu-rewritten-fp32")
    same = {"id": "", "label": "", "module": ""}
    assert json.dumps(dataclasses.asdict(plain) | same) == json.dumps(dataclasses.asdict(rewritten) | same)
    assert Rewrites() != Rewrites.none()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager-fp16", "eager-rewritten-bf16", "compile-max-rewritten-fp16"])
def test_backends_on_a_gpu(name: str, job: RunRequest, expected: dict[str, np.ndarray]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    backend = next(one for one in backends_for("cuda") if one.id == name)
    runner = open_runner(dataclasses.replace(job, backend=backend))
    runner.load()
    runner.run()
    assert compare(expected, runner.outputs(), backend.precision, name).passed
    used = runner.device_bytes()
    assert used is not None and used > 0
