"""Several encoders in one state dict: identical copies are one, of others the prefix chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from neck.checkpoint_keys import Layout
from neck.weights.torchfile import CheckpointError
from neck.weights.wrapper_names import plain_name


def chosen_by_prefix(path: Path, layouts: Sequence[Layout], prefix: str) -> list[Layout]:
    """The encoders whose names begin so; the one with exactly this prefix, where there is one.

    Raises:
        CheckpointError: none begins so; lists the prefixes that there are.
    """
    wanted = plain_name(prefix if not prefix or prefix.endswith(".") else f"{prefix}.")  # as all names are
    exact = [layout for layout in layouts if layout.prefix == wanted]
    chosen = exact or [layout for layout in layouts if layout.prefix.startswith(wanted)]
    if not chosen:
        there = ", ".join(repr(layout.prefix) for layout in layouts) or "none"
        raise CheckpointError(
            f"{path}: the checkpoint contains no encoder with the prefix {prefix!r}; its encoders have these "
            f"prefixes: {there}"
        )
    return chosen


def without_copies(layouts: Sequence[Layout], tensors: Mapping[str, Tensor]) -> list[Layout]:
    """The encoders that differ; of copies the one with the most necks.

    A copy has the same trunk, name by name and bit by bit, and no neck that the other lacks or has otherwise.
    """
    kept: list[Layout] = []
    for layout in sorted(layouts, key=lambda layout: -len(layout.necks)):
        if not any(_is_copy(layout, other, tensors) for other in kept):
            kept.append(layout)
    return kept


def _is_copy(layout: Layout, of: Layout, tensors: Mapping[str, Tensor]) -> bool:
    if layout.source != of.source or not set(layout.necks) <= set(of.necks):
        return False
    parts = [(layout.trunk, of.trunk), *((start, of.necks[neck]) for neck, start in layout.necks.items())]
    for mine, theirs in parts:
        names = [{name.removeprefix(start) for name in tensors if name.startswith(start)} for start in (mine, theirs)]
        if names[0] != names[1]:
            return False
        if not all(is_equal(tensors[mine + name], tensors[theirs + name]) for name in names[0]):
            return False
    return True


def is_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bits, or the same memory."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return (one.data_ptr() == other.data_ptr() and one.stride() == other.stride()) or torch.equal(one, other)
