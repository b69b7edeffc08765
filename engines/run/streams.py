"""Order between the session's stream and the caller's; without a stream, as on a CPU, everything is in order."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
import weakref
from collections.abc import Iterator

import torch

from engines.run.inputs import SessionError

CU_STREAM_NON_BLOCKING = 1
"""cuda.h: the legacy default stream does not wait for it, as for torch's own streams."""

_spare: collections.defaultdict[int, list[int]] = collections.defaultdict(list)
"""By device the streams that nobody has any more. They are given again and never destroyed: torch keeps freed memory by
the stream that used it, and a new stream might get the address of a destroyed one."""

_spare_lock = threading.Lock()


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that nobody else has.

    torch.cuda.Stream() hands out the same 32 streams of a device in turn, so that with more contexts, or streams of the
    caller's own, two of them shared one, and a capture took in the other's work.

    Raises:
        SessionError: CUDA makes none.
    """
    spare = _spare[device.index]
    with _spare_lock:
        handle = spare.pop() if spare else None
    handle = _create(device) if handle is None else handle
    stream = torch.cuda.ExternalStream(handle, device=device)
    weakref.finalize(stream, spare.append, handle).atexit = False
    return stream


def _create(device: torch.device) -> int:
    cuda, handle = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)  # a call of CUDA's runtime: it makes the device's context this thread's current
        code = cuda.cuStreamCreate(ctypes.byref(handle), CU_STREAM_NON_BLOCKING)
    if code or not handle.value:
        raise SessionError(
            f"CUDA cannot create a stream on {device} (error {code}); check with nvidia-smi that the GPU works"
        )
    return handle.value


@contextlib.contextmanager
def on_device(
    stream: torch.cuda.Stream | None, device: torch.device, *, current: bool = False, in_order: bool = False
) -> Iterator[None]:
    """Makes the device this thread's current one: TensorRT runs, and allocates, on that.

    Args:
        stream, device: the session's.
        current: do all work, copies included, on the stream.
        in_order: let the stream wait for the caller's before, and the caller's for it after.
    """
    with contextlib.ExitStack() as stack:
        if stream is not None:
            stack.enter_context(torch.cuda.device(device))
            if current:
                stack.enter_context(torch.cuda.stream(stream))
            if in_order:
                caller = torch.cuda.current_stream()
                stream.wait_stream(caller)
                stack.callback(caller.wait_stream, stream)
        yield


def after_caller(stream: torch.cuda.Stream | None, device: torch.device) -> None:
    """Lets a stream wait for what the caller has queued so far, such as work that reads outputs."""
    if stream is not None:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
