"""Outputs on the GPU: in the caller's memory, and handed over without a copy."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.run.inputs import Port, SessionError, type_name

ALIGNMENT = 256
"""Bytes; what NvInferRuntime.h demands of an address. torch allocates at multiples of 512."""


@dataclasses.dataclass(frozen=True)
class HandedOutput:
    """An output where it lies, for whoever reads DLPack: `torch.from_dlpack`, `cupy.from_dlpack`, a second engine.

    Whoever took it reads it after the run, on whichever stream. Memory of the session's own lives until it is given
    back, also after the session is closed; give it back when the work that reads it has ended. Memory that the caller
    bound stays the caller's. What the next run writes: see Session.to_dlpack.

    Attributes:
        tensor: the output.
        finished: what marks the end of the run that wrote it.
    """

    tensor: Tensor
    finished: torch.cuda.Event | None

    def __dlpack_device__(self) -> Any:
        """Where it lies."""
        return self.tensor.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        """The capsule: this thread's current stream waits for the run, and the consumer's `stream` for that (torch)."""
        if self.finished is not None:
            with torch.cuda.device(self.tensor.device):
                torch.cuda.current_stream().wait_event(self.finished)
        return self.tensor.__dlpack__(**asked)


def caller_memory(plan: Path, port: Port, largest: int, device: torch.device, memory: Any) -> Tensor:
    """The caller's memory for an output, as a flat tensor that keeps it alive.

    Args:
        plan, port, device: of the session.
        largest: batch that it must be enough for.
        memory: a torch tensor, or anything that speaks DLPack, such as a CuPy array.

    Raises:
        SessionError: memory that is elsewhere, of another type, not contiguous, not aligned or too little.
    """
    try:
        found = memory if isinstance(memory, Tensor) else torch.from_dlpack(memory)
    except (AttributeError, TypeError, RuntimeError, BufferError) as error:
        raise SessionError(
            f"{plan}: the buffer for the output {port.name} has the type {type(memory).__name__}, which torch cannot "
            f"read: {str(error).splitlines()[0]}; pass a torch tensor or a CuPy array"
        ) from None
    if found.device != device:
        raise SessionError(
            f"{plan}: the memory for the output {port.name} is on {found.device}, but the plan runs on {device}. "
            f"Allocate the memory on {device}"
        )
    if found.dtype != port.dtype or not found.is_contiguous():
        layout = "" if found.is_contiguous() else " and is not contiguous"
        raise SessionError(
            f"{plan}: the tensor that was passed for the output {port.name} has the data type "
            f"{type_name(found.dtype)}{layout}. Pass a contiguous tensor with the data type {type_name(port.dtype)}"
        )
    needed = math.prod(largest if side == -1 else side for side in port.shape)
    if found.numel() < needed:
        size = port.dtype.itemsize
        raise SessionError(
            f"{plan}: the memory for the output {port.name} has only {found.numel() * size} bytes. Allocate "
            f"at least {needed * size} bytes, because the plan's largest batch size is {largest}"
        )
    if found.data_ptr() % ALIGNMENT:
        raise SessionError(
            f"{plan}: the memory for the output {port.name} is at an address that is not a multiple of {ALIGNMENT} "
            "bytes; pass memory that begins at the start of an allocation"
        )
    return found.detach().reshape(-1)


def view_of(memory: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The beginning of the caller's memory in the shape of a run's output."""
    return memory[: math.prod(shape)].view(shape)
