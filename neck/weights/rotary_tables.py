"""Rotary tables that a checkpoint carries: compared with the computed ones, since upstream's loaders use the stored."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neck.checkpoint_keys import Layout
from neck.config import EncoderConfig
from neck.rope import axial_angles
from neck.weightfile import CheckpointError

TABLE = re.compile(
    r"(\d+)\.(?:attn\.(freqs_cis)(?:_(real|imag))?|rotary_emb\.(rope_embeddings)_(cos|sin)|"
    r"rotary_emb\.(?:original_)?(inv_freq)|(position_ids))$"
)
"""What follows the blocks' prefix: Meta's `freqs_cis`, transformers 5.0's cosines and sines, 5.24's two buffers."""

TOLERANCE = {torch.float32: 1e-4, torch.complex64: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Absolute, of cosines, sines and frequencies of up to 1: upstream computes angles up to 72 in float32 (error 1e-5)."""


def is_table(layout: Layout, key: str) -> bool:
    """Whether a key names a rotary table of a block, in a form that check_tables reads."""
    return key.startswith(layout.blocks) and TABLE.match(key[len(layout.blocks) :]) is not None


def check_tables(path: Path, layout: Layout, tensors: Mapping[str, Tensor], config: EncoderConfig) -> int | None:
    """Compares every stored table with the one computed from the config.

    Returns:
        The side in pixels of the square images that the tables of the global blocks are for; None without such.

    Raises:
        CheckpointError: a table of another theta, scale, window or a grid that is not square, both named.
    """
    grids: dict[int, str] = {}
    for key, block, kind, part in _stored(layout, tensors):
        table = tensors[key]
        is_global = block in config.global_blocks
        wrong = f"{path}: the rotary table {key} does not match the configuration"
        if kind == "inv_freq":
            ours = axial_angles(1, 2, config.head_dim, theta=config.rope_theta)[1, : config.head_dim // 4]
            if table.shape != ours.shape or _differ(table, ours):
                raise CheckpointError(f"{wrong}: {_thetas(table.flatten(), config)}")
            continue
        side = math.isqrt(table.shape[0]) if table.dim() else 0
        if side < 1 or side * side != table.shape[0] or (not is_global and side != config.window_size):
            what = (
                "one row for each token of a square patch grid is needed"
                if is_global
                else (
                    f"one row for each token of the attention window of {config.window_size}x{config.window_size} "
                    "patches is needed"
                )
            )
            raise CheckpointError(
                f"{path}: the rotary table {key} has the shape {tuple(table.shape)}, but {what}. Check window_size and "
                "global_blocks in the configuration"
            )
        scale = config.window_size / side
        found, wanted = _parts(table, kind, part, _values(side, scale, kind, config))
        if found.shape != wanted.shape:
            raise CheckpointError(
                f"{path}: the rotary table {key} has the shape {tuple(table.shape)} instead of {tuple(wanted.shape)}, "
                "the shape that the configuration requires. Check embed_dim and num_heads in the configuration"
            )
        if _differ(found, wanted):
            raise CheckpointError(f"{wrong}: {_difference(found, wanted, kind, part, config)}")
        if is_global:
            grids.setdefault(side, key)
    if len(grids) > 1:
        named = " and ".join(f"{side}x{side} patches in {key}" for side, key in grids.items())
        raise CheckpointError(
            f"{path}: the rotary tables of the global attention blocks contradict each other, because the tables were "
            f"made for different image sizes: {named}. Use a checkpoint in which all of these rotary tables were made "
            "for the same image size"
        )
    return next(iter(grids)) * config.patch_size if grids else None


def _stored(layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, int, str, str]]:
    """Key, our block, kind and part (cos, sin or both) of each stored table."""
    order = {index: block for block, index in enumerate(layout.indices)}
    for key in tensors:
        match = TABLE.match(key[len(layout.blocks) :]) if key.startswith(layout.blocks) else None
        if match:
            index, meta, part, hf, hf_part, inverse, position = match.groups()
            name = {"real": "cos", "imag": "sin"}.get(part or "", hf_part or "both")
            yield key, order[int(index)], str(meta or hf or inverse or position), name


def _values(side: int, scale: float, kind: str, config: EncoderConfig) -> Tensor:
    """What the table holds by our reckoning: angles (N, D / 2), doubled to (N, D), or coordinates (N, 2)."""
    if kind == "position_ids":
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        return torch.stack((columns.flatten(), rows.flatten()), dim=-1).double() * scale
    angles = axial_angles(side, side, config.head_dim, (scale, scale), config.rope_theta)
    return angles.repeat_interleave(2, dim=-1) if kind == "rope_embeddings" else angles


def _parts(table: Tensor, kind: str, part: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """The stored table and ours, in one form: (N, ...) of real numbers."""
    if kind == "position_ids":
        return table, values
    if part != "both":
        return table, values.cos() if part == "cos" else values.sin()
    if table.is_complex():
        table = torch.view_as_real(table)
    if table.dim() == 2:  # cast to a real type, which drops the imaginary half
        return table, values.cos()
    return table, torch.stack((values.cos(), values.sin()), dim=-1)


def _differ(found: Tensor, wanted: Tensor) -> bool:
    tolerance = TOLERANCE.get(found.dtype, 1e-4) * max(1.0, float(wanted.abs().max()))
    return not bool((found.double() - wanted).abs().max() <= tolerance)


def _difference(found: Tensor, wanted: Tensor, kind: str, part: str, config: EncoderConfig) -> str:
    """What two tables of the same shape say of theta and of a column's step, where they tell it."""
    if kind != "position_ids" and part != "sin" and config.head_dim >= 8 and found.shape[0] > 1:
        angles = [table[1].double().reshape(table.shape[1], -1)[:, 0].clamp(-1, 1).acos() for table in (found, wanted)]
        if kind == "rope_embeddings":
            angles = [angle[::2] for angle in angles]
        steps = [float(angle[0]) for angle in angles]
        if all(steps) and abs(steps[0] - steps[1]) > 0.01 * steps[1]:
            return (
                f"the rotation angle between neighboring patches in a row of the image is {steps[0]:.4g} rad in the "
                f"rotary table, but {steps[1]:.4g} rad according to the configuration. Check window_size in the "
                "configuration"
            )
        if abs(_theta(angles[0] / angles[0][0], config) - config.rope_theta) > 0.01 * config.rope_theta:
            return _thetas(angles[0] / angles[0][0], config)
    return (
        f"the values of the rotary table differ by up to {float((found.double() - wanted).abs().max()):.2g} from the "
        "values that neck-export computed from the configuration. Check window_size, num_heads and rope_theta in the "
        "configuration"
    )


def _thetas(frequencies: Tensor, config: EncoderConfig) -> str:
    """The theta of a table's frequencies beside the config's."""
    return (
        f"the rope_theta of the rotary table is about {_theta(frequencies, config):.4g}, but the rope_theta of the "
        f"configuration is {config.rope_theta:g}.\nIf the rotary table is right, use --config to pass a JSON file with "
        "the encoder's configuration. In the JSON file, set rope_theta to the value of the rotary table. If the "
        "configuration is right, use a checkpoint whose rotary tables match the configuration"
    )


def _theta(frequencies: Tensor, config: EncoderConfig) -> float:
    """The theta of frequencies 1, theta^(-4 / D), ...; NaN where they are none."""
    second = float(frequencies[1]) if len(frequencies) > 1 else 0.0
    return second ** -(config.head_dim / 4) if second > 0 else math.nan
