"""Order between the session's stream and the caller's; without a stream, as on a CPU, everything is in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Does all work, copies included, on a stream."""
    if stream is None:
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield


@contextlib.contextmanager
def in_order(stream: torch.cuda.Stream | None, device: torch.device) -> Iterator[None]:
    """Lets a stream wait for the caller's before, and the caller's for it after."""
    if stream is None:
        yield
        return
    with torch.cuda.device(device):
        caller = torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            yield
        finally:
            caller.wait_stream(stream)


def after_caller(stream: torch.cuda.Stream | None, device: torch.device) -> None:
    """Lets a stream wait for what the caller has queued so far, such as work that reads outputs."""
    if stream is not None:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
