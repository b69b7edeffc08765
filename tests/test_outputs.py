"""Outputs in the caller's memory, and handed over by DLPack; the engine is a fake on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu.play import play
from test_session import at, build_convolution, open_fake
from torch import Tensor

from engines.builder.flavor import Flavor, choose_flavor
from engines.run.inputs import Port, SessionError
from engines.run.open_plan import open_plan
from engines.run.outputs import caller_memory
from engines.run.session import Session

TWICE = Port("twice", torch.float16, (-1, 2, 3), (-1, -1))
CPU = torch.device("cpu")


def image(value: float = 1.0, batch: int = 1) -> np.ndarray:
    return np.full((batch, 2, 3), value, np.float32)


def room(batch: int = 3, offset: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    return at(offset, torch.zeros(batch, 2, 3, dtype=dtype))


class Foreign:
    """An array of another library: it speaks DLPack and nothing else."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.data = value, value.data_ptr()

    def __dlpack__(self, **asked: Any) -> Any:
        return self.value.__dlpack__(**asked)

    def __dlpack_device__(self) -> Any:
        return self.value.__dlpack_device__()


@pytest.mark.parametrize("wrap", [lambda value: value, Foreign, lambda value: Foreign(value.flatten())])
def test_an_output_is_written_to_the_callers_memory(tmp_path: Path, wrap: Callable[[Tensor], Any]) -> None:
    with open_fake(tmp_path) as session:
        memory = room()
        session.bind_output("twice", wrap(memory))
        first = session.infer({"image": at(0, torch.ones(2, 2, 3))})["twice"]
        assert first.data_ptr() == memory.data_ptr() == session.context.addresses["twice"]
        assert first.shape == (2, 2, 3) and (memory[:2] == 2).all() and (memory[2] == 0).all()
        found = session.infer({"image": image(5, 3)})["twice"]  # numpy gets a copy
        assert (found == 10).all() and (memory == 10).all()
        session.bind_output("twice", None)
        assert (session.infer({"image": image(7)})["twice"] == 14).all()
        assert (memory == 10).all()  # the control: it is bound no longer


def test_the_callers_memory_is_held_while_it_is_bound(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        session.bind_output("twice", room())
        address = session._callers["twice"].data_ptr()
        assert session.infer({"image": at(0, torch.ones(1, 2, 3))})["twice"].data_ptr() == address
        session.unbind_outputs()
        assert session._callers == {} and session._bound == {}


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("small", lambda: room(2), r"has only 24 bytes\. .* at least 36 bytes, .* largest batch size is 3$"),
    ("type", lambda: room(dtype=torch.float32), r"has the data type float32\. .* float16"),
    ("strided", lambda: room(6)[::2], "has the data type float16 and is not contiguous"),
    ("address", lambda: room(offset=64), "is at an address that is not a multiple of 256 bytes"),
    (
        "device",
        lambda: torch.zeros(3, 2, 3, dtype=torch.float16, device="meta"),
        "is on meta, but the plan runs on cpu",
    ),
    ("pointer", lambda: 0x7F0000000000, "has the type int, which torch cannot read"),
    ("list", lambda: [0.0] * 18, "has the type list, which torch cannot read"),
    ("none of ours", lambda: np.zeros((3, 2, 3), "M8[s]"), "has the type ndarray, which torch cannot read"),
]


@pytest.mark.parametrize(("memory", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_memory_that_an_output_cannot_be_written_to(memory: Callable[[], Any], says: str) -> None:
    caller_memory(Path("x.plan"), TWICE, 3, CPU, room())  # the control
    with pytest.raises(SessionError, match=f"x.plan: the .*for the output twice {says}"):
        caller_memory(Path("x.plan"), TWICE, 3, CPU, memory())


def test_what_is_bound_stays_where_other_memory_is_refused(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        memory = room()
        session.bind_output("twice", memory)
        with pytest.raises(SessionError, match=r"output twice has only .* at least 36 bytes"):
            session.bind_output("twice", room(1))
        with pytest.raises(SessionError, match=r"has no output 'thrice'; .* twice"):
            session.bind_output("thrice", memory)
        session.infer({"image": image()})
        assert (memory[0] == 2).all()
    with pytest.raises(SessionError, match="the session is closed"):
        session.bind_output("twice", memory)


def test_a_run_needs_new_binding_after_the_memory_changed(tmp_path: Path) -> None:
    """Addresses of memory that is held no longer must not be run with."""
    with open_fake(tmp_path) as session:
        session.bind({"image": at(0, torch.ones(1, 2, 3))})
        session.bind_output("twice", room())
        with pytest.raises(
            SessionError, match="no input is bound; call bind before enqueue, and again after each bind_output"
        ):
            session.enqueue()


def test_an_output_is_read_without_a_copy(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        session.infer({"image": image(3, 2)})
        handed = session.to_dlpack("twice")
        for read in (torch.from_dlpack(handed), np.from_dlpack(handed)):
            address = read.data_ptr() if isinstance(read, Tensor) else read.ctypes.data
            assert address == session.context.addresses["twice"]
            assert tuple(read.shape) == (2, 2, 3) and (read == 6).all()
        session.infer({"image": image(4, 2)})  # another run writes elsewhere
        assert (torch.from_dlpack(handed) == 6).all()
        assert (torch.from_dlpack(session.to_dlpack("twice")) == 8).all()
        memory = room()
        session.bind_output("twice", memory)
        session.infer({"image": image(5)})
        taken = torch.from_dlpack(session.to_dlpack("twice"))
        assert taken.data_ptr() == memory.data_ptr()
        session.infer({"image": image(6)})
        assert (taken == 12).all()  # memory that is bound is written by the next run, too
    assert (taken == 12).all() and (torch.from_dlpack(handed) == 6).all()  # also when the session is closed


def test_outputs_that_are_not_there_are_told(tmp_path: Path) -> None:
    session = open_fake(tmp_path)
    with pytest.raises(SessionError, match="first run; call infer"):
        session.to_dlpack("twice")
    session.bind({"image": at(0, torch.ones(1, 2, 3))})
    with pytest.raises(SessionError, match="no outputs before the first run"):
        session.to_dlpack("twice")
    session.enqueue()
    session.to_dlpack("twice")
    with pytest.raises(SessionError, match="has no output 'image'; choose from twice"):
        session.to_dlpack("image")
    session.close()
    with pytest.raises(SessionError, match="the session is closed"):
        session.to_dlpack("twice")


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_targets_wait_for_the_run_on_the_device(tmp_path: Path, cuda_graph: bool) -> None:
    """The order of streams, as calls that a played device notes."""
    with play("11.4") as state:
        assert state.device is not None
        plan = build_convolution(tmp_path, choose_flavor())
        with open_plan(plan, cuda_graph=cuda_graph) as session:
            finished: Any = session.finished
            assert finished.mark is None  # not recorded yet
            ones = torch.ones(2, 3, 8, 8, device="cuda")
            (found,) = session.infer({"image": ones}).values()
            assert finished.mark is not None and math.isnan(finished.at)  # recorded, and not come to pass
            handed = session.to_dlpack("sum")
            assert handed.tensor.data_ptr() == found.data_ptr()
            current = torch.cuda.current_stream()
            assert session.finished not in current.waited
            assert (torch.from_dlpack(handed) == 3).all() and finished.at > 0
            assert current.waited[-1] is session.finished
            memory = torch.zeros(3, 1, 8, 8, device="cuda")
            session.bind_output("sum", memory)
            (bound,) = session.infer({"image": 2 * ones}).values()
            assert bound.data_ptr() == memory.data_ptr() and (memory[:2] == 6).all()
            assert (found == 3).all()
            with pytest.raises(SessionError, match="sum is on cpu, but the plan runs on cuda:0"):
                session.bind_output("sum", torch.zeros(3, 1, 8, 8))
            with pytest.raises(SessionError, match="not a multiple of 256 bytes"):
                session.bind_output("sum", torch.zeros(4, 1, 8, 8, device="cuda").flatten()[16:])


def on_gpu(session: Session) -> Tensor:
    session.infer({"image": torch.ones(2, 3, 8, 8, device="cuda")})
    return torch.from_dlpack(session.to_dlpack("sum"))


@pytest.mark.gpu
def test_outputs_are_handed_over_on_the_gpu(tmp_path: Path, gpu_flavor: Flavor) -> None:
    """PyTorch, and CuPy where it is installed, on a stream of their own, while the session runs on."""
    with open_plan(build_convolution(tmp_path, gpu_flavor), gpu_flavor, use_runtime_cache=False) as session:
        other = torch.cuda.Stream()
        with torch.cuda.stream(other):
            found = on_gpu(session)
            assert found.data_ptr() == session.context.get_tensor_address("sum") and bool((found == 3).all())
        memory = torch.zeros(3, 1, 8, 8, device="cuda")
        session.bind_output("sum", memory)
        assert on_gpu(session).data_ptr() == memory.data_ptr()
        assert session.finished is not None
        other.wait_event(session.finished)
        with torch.cuda.stream(other):
            assert bool((memory[:2] == 3).all()) and bool((memory[2] == 0).all())
        with pytest.raises(SessionError, match="sum is on cpu, but the plan runs on cuda:0"):
            session.bind_output("sum", torch.zeros(3, 1, 8, 8))
        session.unbind_outputs()
        on_gpu(session)
        handed = session.to_dlpack("sum")
    assert bool((torch.from_dlpack(handed) == 3).all())  # the session is closed
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    array = cupy.from_dlpack(handed)
    assert array.data.ptr == handed.tensor.data_ptr() and bool((array == 3).all())
