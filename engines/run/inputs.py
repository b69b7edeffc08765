"""Inputs and outputs of an engine, and the check of what a run is given (a live encoder's: `live/encoder.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SessionError(RuntimeError):
    """A plan that cannot be loaded or run here, or inputs that it does not take."""


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output of an engine: its shape, -1 for a dynamic batch, and the smallest and largest batch."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    batch: tuple[int, int]

    def __str__(self) -> str:
        low, high = self.batch
        sides = [str(low) if low == high else f"{low} to {high}", *map(str, self.shape[1:])]
        return f"{self.name}: {type_name(self.dtype)} ({', '.join(sides)})"

    def takes(self, value: np.ndarray | Tensor) -> bool:
        """Whether a value has its type, its shape and a batch that it takes."""
        sides, (low, high) = tuple(value.shape), self.batch
        fits = sides[1:] == self.shape[1:] and len(sides) == len(self.shape) and low <= sides[0] <= high
        return fits and type_name(value.dtype) == type_name(self.dtype)


def type_name(dtype: Any) -> str:
    """`float32` for torch's and for numpy's."""
    return str(dtype).removeprefix("torch.")


def check_inputs(
    plan: Path,
    ports: Sequence[Port],
    device: torch.device,
    inputs: Mapping[str, np.ndarray] | Mapping[str, Tensor],
) -> None:
    """Raises SessionError where inputs are not what the engine takes, or torch's not where it reads."""
    expected = ", ".join(map(str, ports))
    if sorted(inputs) != sorted(port.name for port in ports):
        raise SessionError(
            f"{plan}: the names of the given inputs do not match the input names of the plan. Given names: "
            f"{', '.join(inputs) or 'none'}. Pass exactly the following inputs: {expected}"
        )
    if not any(all(isinstance(value, kind) for value in inputs.values()) for kind in (np.ndarray, Tensor)):
        kinds = {type(value).__name__ for value in inputs.values()}
        raise SessionError(
            f"{plan}: inputs of type {', '.join(kinds)} were given; pass either numpy arrays only, or torch "
            f"tensors on {device} only"
        )
    for port in ports:
        value = inputs[port.name]
        if not port.takes(value):
            got = f"{type_name(value.dtype)} {tuple(value.shape)}"
            raise SessionError(f"{plan}: the input {port.name} is {got}; expected {port}")
        if isinstance(value, Tensor) and (value.device != device or not value.is_contiguous()):
            got = f"on {value.device} and {'' if value.is_contiguous() else 'not '}contiguous"
            remedy = f'pass {port.name}.to("{device}").contiguous(), or a numpy array'
            raise SessionError(
                f"{plan}: the tensor for the input {port.name} is {got}, but must be on {device} and contiguous; "
                f"{remedy}"
            )
