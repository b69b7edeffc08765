"""Streams, CUDA graphs and GPUs of Python's sessions, on a fake whose streams are asynchronous."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exporting import neck_export_cli
from fake_gpu.device import POOLED, Device, DeviceFault, Mode
from fake_gpu.play import play
from fake_gpu.state import State
from test_session import build_convolution

import engines.attach
from engines.attach import AttachError, attach
from engines.builder.flavor import choose_flavor
from engines.live.opening import open_file
from engines.run.inputs import SessionError
from engines.run.open_plan import open_plan
from engines.run.session import Session

GUARD_S = 60.0
"""No test waits so long, unless it would wait for ever."""


@pytest.fixture
def played(tmp_path: Path) -> Iterator[tuple[State, Path]]:
    """A machine with two GPUs alike, and a plan of a dynamic batch."""
    with play("11.4", Device(others=("8.9",))) as state:
        yield state, build_convolution(tmp_path, choose_flavor())


def ones(batch: int = 2, factor: float = 1.0) -> np.ndarray:
    return np.full((batch, 3, 8, 8), factor, np.float32)


def handles(sessions: list[Session]) -> list[int]:
    return [session.stream.cuda_stream for session in sessions if session.stream]


def test_every_context_has_a_stream_of_its_own(played: tuple[State, Path]) -> None:
    """torch hands out 32 in turn, so that more contexts, or the caller's streams, would share them."""
    _, plan = played
    theirs = [torch.cuda.Stream().cuda_stream for _ in range(2 * POOLED)]
    assert len(set(theirs)) == POOLED  # the control
    with open_plan(plan, contexts=POOLED + 8) as pool:
        ours = handles(pool._free)
        assert len(set(ours)) == POOLED + 8 and not set(ours) & set(theirs)
    del pool
    with open_plan(plan) as session:  # streams are kept and given again
        assert handles([session])[0] in ours
        with open_plan(plan) as other:
            assert handles([session]) != handles([other])


def test_a_run_is_seen_by_who_waits_for_it_alone(played: tuple[State, Path]) -> None:
    """The fake's streams: what is read without waiting is what was there before."""
    _, plan = played
    with open_plan(plan) as session:
        image = torch.ones(2, 3, 8, 8, device="cuda")
        torch.cuda.synchronize()
        outputs = session.bind({"image": image})
        outputs["sum"].zero_()
        torch.cuda.synchronize()
        session.enqueue()
        assert not (outputs["sum"] == 3).any()
        assert session.finished is not None
        torch.cuda.current_stream().wait_event(session.finished)
        assert (outputs["sum"] == 3).all()


def test_an_input_that_was_not_waited_for_is_a_fault(played: tuple[State, Path]) -> None:
    """`infer` waits for the caller's stream; `bind` and `enqueue` leave that to the caller."""
    _, plan = played
    with open_plan(plan) as session, torch.cuda.stream(torch.cuda.Stream()):
        image = torch.ones(2, 3, 8, 8, device="cuda")
        session.bind({"image": image})
        with pytest.raises(DeviceFault):
            session.enqueue()
        assert (session.infer({"image": image})["sum"] == 3).all()
        assert session.stream is not None
        session.bind({"image": image})
        session.stream.wait_stream(torch.cuda.current_stream())
        session.enqueue()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tensors_of_any_stream_are_in_order(played: tuple[State, Path], cuda_graph: bool) -> None:
    _, plan = played
    with open_plan(plan, cuda_graph=cuda_graph) as session:
        for turn in range(1, 4):
            with torch.cuda.stream(torch.cuda.Stream()):
                image = torch.ones(2, 3, 8, 8, device="cuda") * float(turn)
                found = session.infer({"image": image})["sum"]
                assert (found == 3 * turn).all()
        assert (session.infer({"image": ones(2, 5)})["sum"] == 15).all()


def test_one_graph_for_each_batch_size(played: tuple[State, Path]) -> None:
    """Each from a context of its own, which must not change; a change of batch size captures nothing again."""
    state, plan = played
    with open_plan(plan, cuda_graph=True) as session:
        addresses: dict[int, int] = {}
        for batch, factor in ((1, 1.0), (2, 2.0), (1, 3.0), (3, 4.0), (2, 5.0), (1, 6.0)):
            image = torch.full((batch, 3, 8, 8), factor, device="cuda")
            found = session.infer({"image": image})["sum"]
            assert found.shape[0] == batch and (found == 3 * factor).all()
            assert addresses.setdefault(batch, found.data_ptr()) == found.data_ptr()
            assert torch.from_dlpack(session.to_dlpack("sum")).data_ptr() == found.data_ptr()
        assert len(session._captured) == 3 and len(state.contexts) == 4
        with pytest.raises(SessionError, match="is bound"):
            session.enqueue()  # what ran is not what this context has bound


@pytest.mark.parametrize("version", ["11.4", "rtx-1.7"])
def test_rtx_and_tensorrt_change_the_batch_size(tmp_path: Path, version: str) -> None:
    options: Any = {"rtx_graphs": True} if version.startswith("rtx") else {"cuda_graph": True}
    with play(version), open_plan(build_convolution(tmp_path, choose_flavor()), **options) as session:
        for batch in (1, 2, 1, 3, 2):
            assert (session.infer({"image": ones(batch, batch)})["sum"] == 3 * batch).all()


class Refusing:
    """A context whose run fails while a graph is captured."""

    def __init__(self, context: Any, state: State) -> None:
        self._context, self._state = context, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def execute_async_v3(self, stream_handle: int) -> bool:
        capturing = self._state.device.capturing if self._state.device else None
        if capturing is None:
            return bool(self._context.execute_async_v3(stream_handle))
        capturing.broken = True
        self._context._engine._logger.log(1, "Error Code 1: planted while capturing")
        return False


@pytest.mark.parametrize("flaw", ["run", "end"])
def test_a_capture_that_fails_tells_its_cause_and_restores_the_stream(played: tuple[State, Path], flaw: str) -> None:
    """torch's own error says only that something failed before, and it leaves its stream the current one."""
    state, plan = played
    assert state.device is not None
    with open_plan(plan) as session:
        image = torch.ones(2, 3, 8, 8, device="cuda")
        torch.cuda.synchronize()
        if flaw == "run":
            session.context = Refusing(session.context, state)
        state.device.capture_fails = flaw == "end"
        own = torch.cuda.Stream()
        with torch.cuda.stream(own):
            with pytest.raises(SessionError) as caught:
                session.capture({"image": image})
            assert torch.cuda.current_stream() is own
        assert ("planted while capturing" in str(caught.value)) == (flaw == "run")
        state.device.capture_fails = False
        session.context = getattr(session.context, "_context", session.context)
        assert (session.infer({"image": image})["sum"] == 3).all()


def test_one_capture_at_a_time_in_a_process(tmp_path: Path) -> None:
    """Of two plans in two threads; torch refuses a second one, and waits for the whole device before it begins."""
    with play("11.4") as state:
        assert state.device is not None
        (tmp_path / "other").mkdir()
        plans = [build_convolution(folder, choose_flavor()) for folder in (tmp_path, tmp_path / "other")]
        inside, tried = threading.Event(), threading.Event()

        def cost(facts: dict[str, Any]) -> float:
            if state.device and state.device.capturing is not None and not inside.is_set():
                inside.set()
                tried.wait(0.5)  # the other thread's capture must wait for this one, and so does not end
            return 1.0

        def capture(session: Session, first: bool) -> float:
            with Mode(state.device):  # type: ignore[arg-type]
                assert first or inside.wait(GUARD_S)
                captured = session.capture({"image": torch.ones(2, 3, 8, 8).to("cuda")})
                tried.set()
                captured.graph.replay()
                torch.cuda.synchronize()
                return float(captured.outputs["sum"].cpu().max())

        with open_plan(plans[0]) as one, open_plan(plans[1]) as two, ThreadPoolExecutor(2) as threads:
            state.faults.cost_ms = cost
            found = [threads.submit(capture, one, True), threads.submit(capture, two, False)]
            assert [each.result(GUARD_S) for each in found] == [3.0, 3.0]


def test_a_second_plan_does_not_warn_of_its_logger(played: tuple[State, Path]) -> None:
    _, plan = played
    with open_plan(plan) as one, open_plan(plan) as two:
        assert one.warnings == two.warnings == []
        import tensorrt as trt

        lines: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, line: str) -> None:
                lines.append(line)

        trt.Runtime(Logger())
        assert "differs" in lines[0]  # the control


def test_a_plan_runs_on_the_gpu_that_is_named(played: tuple[State, Path]) -> None:
    """With the thread's own GPU another one, before and after; a stream or memory of another GPU is an error there."""
    state, plan = played
    for device in (1, "cuda:1", torch.device("cuda", 1)):
        with open_plan(plan, device=device) as session:
            assert session.device == torch.device("cuda", 1) and session.flavor.device == 1
            assert (session.infer({"image": ones()})["sum"] == 3).all()
            found = session.infer({"image": torch.ones(2, 3, 8, 8, device="cuda:1")})["sum"]
            assert found.device == torch.device("cuda", 1) and (found == 3).all()
            captured = session.capture({"image": torch.ones(1, 3, 8, 8).to("cuda:1")})
            assert captured.outputs["sum"].device == torch.device("cuda", 1)
            with pytest.raises(SessionError, match="image is on cuda:0"):
                session.infer({"image": torch.ones(2, 3, 8, 8, device="cuda:0")})
            assert torch.cuda.current_device() == 0
    assert {context._index for context in state.contexts} == {1}
    with open_plan(plan) as session:
        assert session.device.index == 0  # the control
    torch.cuda.set_device(1)  # one process for each GPU
    with open_plan(plan) as session, open_plan(plan, device="cuda") as other:
        assert session.device.index == other.device.index == 1
        assert (session.infer({"image": ones()})["sum"] == 3).all()


def test_a_pool_of_another_gpu_serves_threads(played: tuple[State, Path]) -> None:
    """Every thread begins with GPU 0 as its own."""
    state, plan = played

    def request(number: int) -> float:
        with Mode(state.device), pool.acquire(GUARD_S) as session:  # type: ignore[arg-type]
            return float(session.infer({"image": ones(1, number)})["sum"].max())

    with open_plan(plan, device=1, contexts=2) as pool, ThreadPoolExecutor(1) as threads:
        assert list(threads.map(request, range(1, 5))) == [3.0, 6.0, 9.0, 12.0]
    assert {context._index for context in state.contexts} == {1}


def test_devices_that_are_none(played: tuple[State, Path]) -> None:
    _, plan = played
    for device, says in (
        (2, "there is no GPU 2; the number of GPUs in this machine is 2"),
        ("cpu", "not on device cpu"),
        (-1, "a plan runs on a GPU"),
    ):
        with pytest.raises(SessionError, match=says):
            open_plan(plan, device=device)
    with pytest.raises(SessionError, match="not on device gpu"):
        open_plan(plan, device="gpu")


def test_the_checks_are_of_the_gpu_that_is_named(tmp_path: Path) -> None:
    with play("11.4", Device(others=("9.0",))):
        plan = build_convolution(tmp_path, choose_flavor())
        open_plan(plan, device=0).close()
        with pytest.raises(
            SessionError, match=r"is for compute capability 8\.9, but the GPU is NVIDIA L4 \(compute capability 9\.0\)"
        ):
            open_plan(plan, device=1)
        ran = neck_export_cli("profile", plan, "--device", "1")
        assert ran.code == 1 and "NVIDIA L4 (compute capability 9.0)" in ran.err


def test_profile_and_verify_take_a_gpu(played: tuple[State, Path]) -> None:
    state, plan = played
    ran = neck_export_cli("profile", plan, "--device", "1", "--json")
    assert ran.code == 0, ran.err
    assert state.contexts and {context._index for context in state.contexts} == {1}  # its starts, too
    ran = neck_export_cli("verify", plan, "--device", "2")
    assert ran.code == 1 and "there is no GPU 2; the number of GPUs in this machine is 2" in ran.err
    onnx = plan.with_name("sum.onnx")
    assert neck_export_cli("verify", onnx, "--device", "1").code == 2  # ONNX Runtime verifies on the CPU


def test_a_live_model_has_its_file_on_its_own_gpu(
    played: tuple[State, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan = played
    opened = open_file(plan, "cuda:1", "auto", False)
    assert opened.device == torch.device("cuda", 1)
    opened.close()
    asked: list[Any] = []

    def encoder(path: Path, device: Any, **options: Any) -> SimpleNamespace:
        asked.append(device)
        signature = SimpleNamespace(levels=(0,))
        return SimpleNamespace(device=torch.device("cuda", 0), close=lambda: None, signature=signature)

    home = SimpleNamespace(device=torch.device("cuda", 1))
    live = SimpleNamespace(parameters=lambda: iter([home]), necks=("sam3",), read=(0,), levels=1)
    monkeypatch.setattr(engines.attach, "find_encoder", lambda model: live)
    monkeypatch.setattr(engines.attach, "DeployedEncoder", encoder)
    monkeypatch.setattr(engines.attach, "_check_fit", lambda *given: None)
    with pytest.raises(AttachError, match=r"runs on cuda:0, but the model is on cuda:1"):
        attach(torch.nn.Identity(), plan, check=False)
    assert asked == [torch.device("cuda", 1)]
