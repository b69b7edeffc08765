"""Merges a LoRA adapter into a checkpoint's weights, in FP32; what is not merged is refused or listed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from neck.checkpoint_keys import Layout, listing
from neck.weightfile import CheckpointError
from neck.weights.adapters import CONFIG_NAME, Adapter, Scaling

Changes = dict[str, tuple[Tensor, Tensor, float]]
"""A checkpoint's key -> A, B and the factor of B @ A."""

TRUNK_NAME = r"(?:^|\.)(?:trunk\.(?:blocks|patch_embed|pos_embed|ln_pre)|backbone\.(?:layers|embeddings|layer_norm))\b"
TRANSPOSED = re.compile(r"dconv_2x2|scale_layers")


def plan_changes(
    path: Path,
    adapter: Adapter,
    layout: Layout,
    necks: Sequence[str],
    expected: Mapping[str, tuple[int, ...]],
) -> tuple[Changes, list[str]]:
    """Which of a checkpoint's weights an adapter changes, and by what.

    Args:
        path: the checkpoint.
        adapter: the adapter; it may have been made for a model around the encoder, or for a part of it.
        layout: how the checkpoint names things.
        necks: those that are loaded.
        expected: shape of each of the encoder's keys.

    Returns:
        The changes, and the names of the adapter that belong to no part of this encoder.

    Raises:
        CheckpointError: an adapter of another base, one that does not fit, or one that is more than LoRA.
    """
    where = adapter.where
    names = {layout.short(key): key for key in expected}
    starts = [re.escape(layout.short(layout.necks[neck])) for neck in necks]
    ours = re.compile("|".join([TRUNK_NAME, *(rf"(?:^|\.){start}\d" for start in starts)]))
    found = {module: _find(f"{module}.weight", names) for module in adapter.factors}
    lost = [name for name, key in found.items() if key is None and ours.search(name)]
    extra = [name for name in adapter.others if _find(name, names) is not None or ours.search(name)]
    if lost:
        raise CheckpointError(
            f"{where}: the adapter belongs to another base model: {path} does not contain {listing(lost)}; "
            "pass the checkpoint that the adapter was trained on"
        )
    if extra:
        raise CheckpointError(
            f"{where}: neck-export can merge only plain LoRA, but the adapter also contains a bias, DoRA or "
            f"modules_to_save ({listing(extra)}); merge the adapter with PEFT's merge_and_unload and export the result"
        )
    changes: Changes = {}
    for module, key in found.items():
        if key is None:
            continue
        if adapter.scaling is None:
            raise CheckpointError(
                f"{where}: the checkpoint contains an unmerged LoRA adapter ({module} and others) whose "
                f"lora_alpha is unknown;\ncopy the adapter's {CONFIG_NAME} into the same folder, or pass "
                "--adapter-alpha"
            )
        first, second = adapter.factors[module]
        changes[key] = (first, second, _factor(where, module, key, first, second, expected[key], adapter.scaling))
    ignored = [*(name for name, key in found.items() if key is None), *adapter.others]
    if not changes and where != path:
        has = listing(ignored, 3) or "no tensors"
        raise CheckpointError(
            f"{where}: the adapter changes no module of the encoder (the adapter contains {has}); leave out --adapter"
        )
    return changes, ignored


def _find(name: str, names: Mapping[str, str]) -> str | None:
    """The encoder's key of a tensor that a model around the encoder, or inside it, names; None where there is none."""
    for short, key in names.items():
        if name == short or name.endswith(f".{short}"):
            return key
    inside = [key for key in names.values() if key.endswith(f".{name}")]
    return inside[0] if len(inside) == 1 else None


def _factor(
    where: Path, module: str, key: str, first: Tensor, second: Tensor, shape: tuple[int, ...], scaling: Scaling
) -> float:
    """The factor of B @ A, after a look at both."""
    rank = first.shape[0] if first.dim() else 0
    if rank < 1:
        raise CheckpointError(f"{where}: the LoRA tensors of the module {module} have rank 0; save the adapter again")
    fits = first.dim() == second.dim() == len(shape) and second.shape[1] == rank
    fits = fits and math.prod(second.shape[2:]) == 1 and (second.shape[0], *first.shape[1:]) == shape
    if not fits or TRANSPOSED.search(key):  # PEFT has no LoRA of a transposed convolution
        raise CheckpointError(
            f"{where}: the LoRA factors of {module} have the shapes {tuple(first.shape)} and "
            f"{tuple(second.shape)}, which do not fit the weight of shape {shape}; pass the checkpoint that "
            "the adapter was trained on"
        )
    for name, factor in (("A", first), ("B", second)):
        if not factor.is_floating_point():
            raise CheckpointError(
                f"{where}: lora_{name} of {module} has the type {factor.dtype} instead of a float type; save the "
                "adapter with float weights"
            )
        if not torch.isfinite(factor).all():
            raise CheckpointError(
                f"{where}: lora_{name} of {module} contains NaN or infinity; use an adapter with finite weights"
            )
    try:
        return scaling.of(module, rank)
    except ValueError as error:
        raise CheckpointError(f"{where}: {module}: {error}; save the adapter again") from None


def merge(weight: Tensor, change: tuple[Tensor, Tensor, float]) -> Tensor:
    """weight + factor * B @ A in float32; a convolution's A holds the kernel and its B is 1x1."""
    first, second, factor = change
    delta = second.float().flatten(1) @ first.float().flatten(1)
    return weight + delta.view(weight.shape) * factor


def merge_notes(adapter: Adapter, changes: Changes, ignored: Sequence[str]) -> list[str]:
    """Notes for the user: how much was merged, and what was not."""
    if not adapter.factors:
        return [
            (
                f"{adapter.where}: tensor names with base_layer or original_module show that the checkpoint was saved "
                "from a model with an adapter, but the checkpoint does not contain the adapter's weights. Only the "
                "base weights are used. To merge the adapter into the base weights, pass the adapter's folder with "
                "--adapter"
            )
        ]
    told = [f"the adapter {adapter.where} was merged into {len(changes)} weights"] if changes else []
    if ignored:
        told.append(
            f"these tensors of the adapter {adapter.where} do not belong to the encoder and were ignored: "
            f"{listing(ignored)}"
        )
    return told
