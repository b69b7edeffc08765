"""The checks of Python's sessions that `make gpu` runs on real torch.cuda, here on the fake's streams."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import session_checks
import torch
import torch_engine
from fake_gpu.device import Device, Mode
from fake_gpu.play import play
from session_checks import CHECKS, CheckError
from torch import Tensor
from torch_engine import open_session

import engines.run.session


def view(tensor: Tensor) -> np.ndarray:
    count = tensor.numel() * 4
    return np.frombuffer((ctypes.c_byte * count).from_address(tensor.data_ptr()), np.float32)


def tensor_at(address: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    count = shape[0] * shape[1]
    return torch.frombuffer((ctypes.c_byte * (4 * count)).from_address(address), dtype=torch.float32).view(shape)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """open_session on two GPUs that are none: the kernels are queued on the fake's streams."""
    with play("11.4", Device(others=("8.9",))) as state:
        device: Any = state.device

        def kernels(image: Tensor, twice: Tensor) -> None:
            source, target = view(image), view(twice)

            def work() -> None:
                target[...] = 2 * source

            stream = torch.cuda.current_stream().cuda_stream
            device.launch("run", 1.0, work, stream, [image.data_ptr()], [twice.data_ptr()])

        pool = functools.partial(ThreadPoolExecutor, initializer=lambda: Mode(device).__enter__())
        monkeypatch.setattr(session_checks, "ThreadPoolExecutor", pool)
        yield functools.partial(open_session, tmp_path, kernels=kernels, at=tensor_at)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_sessions_on_cuda(check: Callable[[Any], None], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    check(functools.partial(open_session, tmp_path))


def failed(opened: Any) -> set[str]:
    """The checks that do not hold."""
    found = set()
    for check in CHECKS:
        try:
            check(opened)
        except Exception:
            found.add(check.__name__)
    return found


def test_sound_sessions_pass(opened: Any) -> None:
    assert failed(opened) == set() and len(CHECKS) == 10


def test_sessions_that_do_not_wait_fail(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the order between the caller's stream and the session's is gone."""
    monkeypatch.setattr(engines.run.session, "on_device", lambda stream, device, **_: contextlib.nullcontext())
    assert {"tensors_of_other_streams", "graphs", "pool", "handed_over"} <= failed(opened)


def test_torchs_streams_fail(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "new_stream", lambda device: torch.cuda.Stream(device))
    assert "streams_of_their_own" in failed(opened)


def test_synchronous_streams_fail(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where everything waits by itself nothing is shown."""
    execute = torch_engine.Context.execute_async_v3

    def at_once(self: Any, stream_handle: int) -> bool:
        done = execute(self, stream_handle)
        if not torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize()
        return done

    monkeypatch.setattr(torch_engine.Context, "execute_async_v3", at_once)
    assert "streams_are_asynchronous" in failed(opened)


def test_a_capture_that_leaves_its_stream_fails(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's capture_end fails for a run that was refused, as torch's may, and leaves the stream."""
    execute = torch_engine.Context.execute_async_v3

    def refused(self: Any, stream_handle: int) -> bool:
        done = execute(self, stream_handle)
        graph = torch.cuda.graph.played.capturing  # type: ignore[attr-defined]
        if not done and graph:
            graph.broken = True
        return done

    monkeypatch.setattr(torch_engine.Context, "execute_async_v3", refused)
    session_checks.failed_capture(opened)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    with pytest.raises(CheckError, match="the caller's stream"):
        session_checks.failed_capture(opened)
