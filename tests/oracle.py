"""The encoder in float64, written from DESIGN's definition and not from neck/: what every file is compared with.

It takes a state dict by our names and plain numbers, and computes with sums over named axes alone. Slow, and small
enough to be read beside the definition.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

NECKS = {"sam3": "convs", "sam2": "sam2_convs", "interactive": "interactive_convs", "propagation": "propagation_convs"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What no tensor's shape tells: the grid is (rows, columns) in patches."""

    grid: tuple[int, int]
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    eps: float
    theta: float
    scales: tuple[float, ...]


def trunk(weights: Mapping[str, Array], images: Array, facts: Facts) -> Array:
    """images (B, 3, 14 H, 14 W), normalized -> (B, C, H, W)."""
    rows, columns = facts.grid
    taps = weights["trunk.patch_embed.proj.weight"]  # (C, 3, p, p)
    patch = taps.shape[-1]
    cut = images.reshape(len(images), 3, rows, patch, columns, patch)
    x = np.einsum("bcyixj,dcij->byxd", cut, taps, optimize=True)
    embedding = weights["trunk.pos_embed"][0, 1:]  # the class token's row is dropped
    side = math.isqrt(len(embedding))
    tile = embedding.reshape(side, side, -1)
    x = x + tile[np.arange(rows)[:, None] % side, np.arange(columns)[None] % side]
    x = layer_norm(x, weights, "trunk.ln_pre", facts.eps)
    depth = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("trunk.blocks."))
    for index in range(depth):
        name = f"trunk.blocks.{index}"
        normed = layer_norm(x, weights, f"{name}.norm1", facts.eps)
        if index in facts.global_blocks:
            squeezed = [np.arange(length) * facts.window / length for length in facts.grid]
            x = x + attention(normed, weights, f"{name}.attn", facts, squeezed[0], squeezed[1])
        else:
            x = x + windowed(normed, weights, f"{name}.attn", facts)
        hidden = linear(layer_norm(x, weights, f"{name}.norm2", facts.eps), weights, f"{name}.mlp.fc1")
        x = x + linear(gelu(hidden), weights, f"{name}.mlp.fc2")
    return x.transpose(0, 3, 1, 2)


def windowed(x: Array, weights: Mapping[str, Array], name: str, facts: Facts) -> Array:
    """Attention inside each window of tokens (B, H, W, C), padded with zeros at the bottom and right."""
    window = facts.window
    rows, columns = (-(-length // window) for length in facts.grid)
    padded = np.zeros((len(x), rows * window, columns * window, x.shape[-1]))
    padded[:, : x.shape[1], : x.shape[2]] = x
    result = np.empty_like(padded)
    inside = np.arange(window, dtype=np.float64)
    for row in range(rows):
        for column in range(columns):
            part = (slice(None), slice(row * window, (row + 1) * window), slice(column * window, (column + 1) * window))
            result[part] = attention(padded[part], weights, name, facts, inside, inside)
    return result[:, : x.shape[1], : x.shape[2]]


def attention(x: Array, weights: Mapping[str, Array], name: str, facts: Facts, ys: Array, xs: Array) -> Array:
    """Attention of all tokens (B, h, w, C) with all, whose rows lie at `ys` and columns at `xs`."""
    batch, height, width, channels = x.shape
    depth = channels // facts.heads
    qkv = linear(x, weights, f"{name}.qkv").reshape(batch, height * width, 3, facts.heads, depth)
    query, key = (turned(qkv[:, :, part], facts.theta, ys, xs) for part in range(2))
    scores = np.einsum("bnhd,bmhd->bhnm", query, key, optimize=True) / math.sqrt(depth)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("bhnm,bmhd->bnhd", shares, qkv[:, :, 2], optimize=True)
    return linear(mixed.reshape(x.shape), weights, f"{name}.proj")


def turned(x: Array, theta: float, ys: Array, xs: Array) -> Array:
    """Turns the pairs (2i, 2i + 1) of (B, h * w, heads, D): the first half by the column, the second by the row."""
    depth = x.shape[-1]
    frequencies = theta ** (-4 * np.arange(depth // 4) / depth)
    grid = np.meshgrid(ys, xs, indexing="ij")
    angles = np.concatenate([grid[axis].reshape(-1, 1) * frequencies for axis in (1, 0)], axis=1)  # (h * w, D / 2)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack((pairs.real, pairs.imag), axis=-1).reshape(x.shape)


def neck(weights: Mapping[str, Array], x: Array, module: str, level: int, scale: float) -> Array:
    """The trunk's map (B, C, H, W) -> one level of a neck (B, d_model, scale H, scale W)."""
    name = f"{module}.{level}"
    if scale == 4.0:
        x = doubled(gelu(doubled(x, weights, f"{name}.dconv_2x2_0")), weights, f"{name}.dconv_2x2_1")
    elif scale == 2.0:
        x = doubled(x, weights, f"{name}.dconv_2x2")
    elif scale == 0.5:
        height, width = (length // 2 for length in x.shape[2:])
        x = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2).max(axis=(3, 5))
    return convolved(convolved(x, weights, f"{name}.conv_1x1"), weights, f"{name}.conv_3x3")


def doubled(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """A transposed convolution of 2x2 taps and stride 2: every pixel becomes four."""
    taps, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # (C, M, 2, 2)
    spread = np.einsum("bcyx,cmij->bmyixj", x, taps, optimize=True)
    batch, channels, height, _, width, _ = spread.shape
    return spread.reshape(batch, channels, 2 * height, 2 * width) + bias[:, None, None]


def convolved(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """A convolution of 1x1 or 3x3 taps that keeps the size."""
    taps, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]  # (M, C, k, k)
    beyond = taps.shape[-1] // 2
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (beyond, beyond), (beyond, beyond)))
    result = np.zeros((len(x), len(taps), height, width)) + bias[:, None, None]
    for i in range(taps.shape[2]):
        for j in range(taps.shape[3]):
            part = padded[:, :, i : i + height, j : j + width]
            result += np.einsum("bcyx,mc->bmyx", part, taps[:, :, i, j], optimize=True)
    return result


def position(channels: int, height: int, width: int) -> Array:
    """The sine encoding (channels, height, width): half of the channels for the row, half for the column."""
    half = channels // 2
    parts = []
    for length, axis in ((height, 0), (width, 1)):
        coordinate = (np.arange(length) + 1) / (length + 1e-6) * 2 * math.pi
        lines = []
        for channel in range(half):
            angle = coordinate / 10000 ** (2 * (channel // 2) / half)
            lines.append(np.cos(angle) if channel % 2 else np.sin(angle))
        shape = (half, height, 1) if axis == 0 else (half, 1, width)
        parts.append(np.broadcast_to(np.stack(lines).reshape(shape), (half, height, width)))
    return np.concatenate(parts)


def linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """x (..., K) times a weight (N, K), plus a bias."""
    result: Array = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return result


def layer_norm(x: Array, weights: Mapping[str, Array], name: str, eps: float) -> Array:
    """Over the last axis."""
    centered = x - x.mean(axis=-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + eps)
    result: Array = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
    return result


def gelu(x: Array) -> Array:
    """The exact one; NumPy has no erf."""
    result: Array = x * 0.5 * (1 + torch.erf(torch.from_numpy(np.ascontiguousarray(x)) / math.sqrt(2)).numpy())
    return result


def encode(
    state: Mapping[str, torch.Tensor],
    images: Array,
    facts: Facts,
    necks: Sequence[str],
    levels: Sequence[int],
    positions: bool = True,
    head: bool = False,
) -> dict[str, Array]:
    """The outputs of a file by name, each (B, channels, h, w), in the file's order.

    Args:
        state: the encoder's tensors by our names.
        images: (B, 3, 14 H, 14 W), normalized.
        facts: what the tensors do not tell.
        necks, levels: which outputs.
        positions: whether the position encodings are among them.
        head: whether the mask decoder's first convolutions follow on levels 0 and 1 of neck sam2, which then ends at 2.
    """
    weights = {name: tensor.double().numpy() for name, tensor in state.items()}
    x = trunk(weights, images, facts)
    outputs = {}
    for name in necks:
        headed = head and name == "sam2"
        chosen = [level for level in levels if not headed or level < 3]
        features = {level: neck(weights, x, NECKS[name], level, facts.scales[level]) for level in chosen}
        for level, feature in features.items():
            if headed and level < 2:
                outputs[f"sam2_high_res_{level}"] = convolved(feature, weights, f"sam2_head.conv_s{level}")
            else:
                outputs[f"{name}_feat_{level}"] = feature
        for level, feature in features.items() if positions else ():
            batch, channels, height, width = feature.shape
            encoding = position(channels, height, width)
            outputs[f"{name}_pos_{level}"] = np.broadcast_to(encoding, (batch, *encoding.shape))
    return outputs
