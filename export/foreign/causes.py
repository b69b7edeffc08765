"""Why a file is wrong: which variant of the reference gives what the file gives."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from export.foreign.image_input import RGB, VALUES, Encoding, order, recode
from export.foreign.matching import Match, sampled_error
from export.foreign.references import describe, encoder_tensors
from neck.necks import Sam3DualViTDetNeck
from neck.position import PositionEmbeddingSine
from neck.rope import axial_angles
from neck.trunk import Mlp, ViTDetTrunk

FOUND = 2e-2
"""Relative L2 to a variant at which it is the cause; FP16 and BF16 files differ by up to 1e-2 from their reference."""
CLEARER = 0.25
"""A variant must also be so much nearer than the reference itself."""
MAP_LENGTHS = sorted({int(grid * scale) for grid in range(1, 145) for scale in (4, 2, 1, 0.5)} - {0})
"""Sides of the levels at image sides of up to 2016 pixels: what a position encoding may have been made for."""


@dataclasses.dataclass(frozen=True)
class Cause:
    """What is wrong with a file.

    Attributes:
        kind: in a word: normalization, channels, shift, layout, levels, positions, neck, weights, overflow, operator,
            rounding, unknown.
        output: the output that shows it; None where all do.
        sentence: what is to be told.
    """

    kind: str
    output: str | None
    sentence: str


def input_cause(
    given: Mapping[Encoding, np.ndarray],
    embed: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    moved: bool = True,
) -> Cause | None:
    """What a file does to its images before the patch embedding.

    Args:
        given: what its patch embedding gives of the images in each encoding.
        embed: what the encoder's gives of float32 (B, 3, H, W).
        images: the images, normalized for SAM 3.
        moved: whether shifted, mirrored and turned images are tried too, which takes a minute at full size.
    """
    variants = [Encoding(values, channels) for values in VALUES for channels in itertools.permutations(RGB)]
    expected = {variant: embed(recode(images, variant)) for variant in variants}
    for encoding, array in given.items():  # SAM 3's first: most files leave the image as it is
        errors = {one: sampled_error(array, other) for one, other in expected.items() if one != encoding}
        variant = min(errors, key=lambda one: errors[one])
        if errors[variant] > FOUND:
            continue
        told = "" if encoding == Encoding() else f" if the input is {VALUES[encoding.values]}"
        if variant.values == "sam3":
            return Cause(
                "channels",
                None,
                f"the color channels are swapped: the network receives {order(variant.channels)} instead of RGB{told}",
            )
        and_order = "" if variant.channels == RGB else f", and {order(variant.channels)}"
        return Cause(
            "normalization",
            None,
            "the normalization is wrong: the network receives images "
            f"{VALUES[variant.values]}{and_order}{told}, but SAM 3 expects images {VALUES['sam3']}",
        )
    for encoding, array in given.items() if moved else ():
        if encoding.channels == RGB and (shift := _image_shift(array, embed, recode(images, encoding), images)):
            return shift
    return None


def _image_shift(
    array: np.ndarray, embed: Callable[[np.ndarray], np.ndarray], given: np.ndarray, images: np.ndarray
) -> Cause | None:
    """Whether a patch embedding is that of shifted, mirrored or turned images; both as given and normalized."""
    patch = images.shape[-1] // array.shape[-1]
    near = [(y, x) for y in range(-2, 3) for x in range(-2, 3)]
    far = [(s * d, 0) for d in range(3, patch + 1) for s in (1, -1)] + [
        (0, s * d) for d in range(3, patch + 1) for s in (1, -1)
    ]
    for base in (images,) if given is images or np.array_equal(given, images) else (images, given):
        for y, x in [*near, *far]:
            moved = np.roll(base, (y, x), axis=(2, 3))
            if (y, x) != (0, 0) and sampled_error(_inside(array), _inside(embed(moved))) <= FOUND:
                return Cause(
                    "shift",
                    None,
                    f"the network receives the image shifted by {y} pixels down and {x} pixels to the right",
                )
        turned = {
            "mirrored left to right": base[..., ::-1],
            "upside down": base[..., ::-1, :],
            "transposed (rows and columns are swapped)": base.swapaxes(2, 3),
        }
        for words, other in turned.items():
            if other.shape == base.shape and sampled_error(array, embed(np.ascontiguousarray(other))) <= FOUND:
                return Cause("layout", None, f"the network receives an image that is {words}")
    return None


def _inside(array: np.ndarray) -> np.ndarray:
    """Without what a shift may bring in at the edges."""
    return array[..., 1:-1, 1:-1]


def output_cause(match: Match, tensors: Mapping[str, np.ndarray], encoder: Sam3DualViTDetNeck) -> Cause | None:
    """What an output alone can tell of its fault.

    Args:
        match: the output with the tensor that it should be.
        tensors: what the encoder gives.
        encoder: the plain encoder.
    """
    expected = tensors[match.tensor][: len(match.array)]
    name, array = match.output, match.array.astype(np.float32)
    if "_pos_" in match.tensor and match.error <= FOUND:
        most = float(np.abs(array - expected).max())
        return Cause(
            "rounding",
            name,
            f"the position encoding {name} differs by up to {most:.2g} from the reference, because its angles were "
            "computed in a type with too few bits (FP16 stores 2 pi with an error of 1e-3)",
        )

    def explains(found: np.ndarray, other: np.ndarray) -> bool:
        error = sampled_error(found, other)
        return error <= FOUND and error <= CLEARER * match.error

    for y, x in ((y, x) for y in range(-2, 3) for x in range(-2, 3) if (y, x) != (0, 0)):
        if min(expected.shape[-2:]) > 4 and explains(*_overlap(array, expected, y, x)):
            return Cause(
                "shift",
                name,
                f"the output {name} is shifted by {y} pixels down and {x} pixels to the right, compared with "
                f"{describe(match.tensor)}",
            )
    turned = {"mirrored left to right": expected[..., ::-1], "upside down": expected[..., ::-1, :]}
    if expected.shape[-1] == expected.shape[-2]:
        turned["transposed (its rows and columns are swapped)"] = expected.swapaxes(2, 3)
    for words, other in turned.items():
        if explains(array, other):
            return Cause("layout", name, f"the output {name} is {words}")
    if "_pos_" in match.tensor:
        return _position_cause(match, array, encoder)
    difference = array - expected
    if explains(difference - difference.mean((0, 2, 3), keepdims=True) + expected, expected):
        return Cause(
            "operator",
            name,
            f"the output {name} equals {describe(match.tensor)} plus a constant in each channel. Either the ONNX file "
            "lacks a bias that SAM 3 has, or the ONNX file adds a bias that SAM 3 does not have, such as SAM 2's "
            "no_mem_embed. Correct the bias in the program that exported the ONNX file",
        )
    scale = float((array * expected).sum() / max(float((expected * expected).sum()), 1e-30))
    if scale and explains(array / scale, expected):
        return Cause("operator", name, f"the output {name} equals {describe(match.tensor)} multiplied by {scale:.4g}")
    return None


def _overlap(array: np.ndarray, expected: np.ndarray, y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
    """An array and what it is when shifted, where both have values."""

    def cut(side: int, by: int) -> tuple[slice, slice]:
        return slice(max(by, 0), side + min(by, 0)), slice(max(-by, 0), side + min(-by, 0))

    (to_y, from_y), (to_x, from_x) = cut(array.shape[2], y), cut(array.shape[3], x)
    return array[:, :, to_y, to_x], expected[:, :, from_y, from_x]


def _position_cause(match: Match, array: np.ndarray, encoder: Sam3DualViTDetNeck) -> Cause | None:
    """Which other map a position encoding is of: of other lengths, its axes swapped, or resized."""
    name, (_, channels, height, width) = match.output, array.shape
    what = describe(match.tensor)
    encoding = PositionEmbeddingSine(channels)
    half = channels // 2
    rows, columns = array[0, :half, :, 0], array[0, half:, 0, :]
    if sampled_error(array[:, [*range(half, channels), *range(half)]], _map(encoding, height, width)) <= FOUND:
        return Cause(
            "positions",
            name,
            f"the output {name} is {what}, but with its channels in the wrong order: those that encode the column (x) "
            "come before those that encode the row (y)",
        )
    lengths = []
    for line, length in ((rows, height), (columns, width)):
        fits = [
            (sampled_error(line[None, None], encoding.table(one)[:, :length].float().numpy()[None, None]), one)
            for one in MAP_LENGTHS
            if one >= length
        ]
        error, best = min(fits)
        lengths.append(best if error <= FOUND else 0)
    if all(lengths) and lengths != [height, width]:
        return Cause(
            "positions",
            name,
            f"the output {name} contains a position encoding that was computed for a feature map of "
            f"{lengths[0]}x{lengths[1]} instead of {height}x{width}",
        )
    for factor in (0.25, 0.5, 2, 4, *(own / height for own in (288, 144, 72, 36, 24))):
        other = (max(1, round(height * factor)), max(1, round(width * factor)))
        whole = torch.from_numpy(_map(encoding, *other))
        for mode in ("nearest", "bilinear", "bicubic"):
            resized = F.interpolate(
                whole, (height, width), mode=mode, **({} if mode == "nearest" else {"align_corners": False})
            )
            if other != (height, width) and sampled_error(array, resized.numpy()) <= FOUND:
                sentence = (
                    f"the output {name} contains a position encoding that was computed for a feature map of "
                    f"{other[0]}x{other[1]} and then resized to {height}x{width} with {mode} interpolation. SAM 3 "
                    f"computes the position encoding directly for {height}x{width}"
                )
                return Cause("positions", name, sentence)
    return Cause(
        "positions",
        name,
        f"the values of the output {name} differ from {what} that SAM 3 computes for a feature map of "
        f"{height}x{width}, and no known variant of the position encoding explains the difference",
    )


def _map(encoding: PositionEmbeddingSine, height: int, width: int) -> np.ndarray:
    """The encoding of a map: (1, channels, height, width)."""
    return encoding(torch.empty(1, 1, height, width)).numpy()


def network_causes(
    matches: list[Match], images: np.ndarray, encoder: Sam3DualViTDetNeck, report: Callable[[str], None]
) -> Cause | None:
    """Which change of the network itself gives what the file gives.

    Args:
        matches: outputs that failed, with the tensors that they should be: features or the trunk's map.
        images: float32 (B, 3, H, W), normalized.
        encoder: the plain encoder, set to the images' size.
        report: told of every variant that is run.
    """
    trunk = encoder.trunk
    if not matches or not isinstance(trunk, ViTDetTrunk):
        return None
    found: list[tuple[float, str, str]] = []
    for kind, sentence, change in _network_variants(trunk):
        report(f"testing a possible cause: {sentence}")
        with change():
            tensors = encoder_tensors(encoder, images)
        error = max(sampled_error(match.array, tensors[match.tensor]) for match in matches)
        nearer = max(match.error for match in matches)
        if error <= FOUND and error <= CLEARER * nearer:
            found.append((error, kind, sentence))
    if not found:
        return None
    _, kind, sentence = min(found)
    return Cause(kind, None, sentence)


def _network_variants(trunk: ViTDetTrunk) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Kind, sentence and context of every change of the trunk that is known to be made."""
    window, (height, width), config = trunk.config.window_size, trunk.grid, trunk.config
    grids = {config.grid, (72, 72), (config.pretrain_grid, config.pretrain_grid), (window, window)} - {trunk.grid}
    for rows, columns in sorted(grids):
        table = axial_angles(height, width, config.head_dim, (window / rows, window / columns), config.rope_theta)
        size = f"{rows * config.patch_size}x{columns * config.patch_size}"
        sentence = (
            "positions for another image size: the rotary table of the global attention blocks is scaled for an image "
            f"size of {size} pixels"
        )
        yield "positions", sentence, functools.partial(_tables, trunk, table)
    for mode in ("bicubic", "bilinear"):
        side = config.pretrain_grid
        if (height, width) == (side, side):
            continue
        grid = trunk.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = F.interpolate(grid.detach(), (height, width), mode=mode, align_corners=False).permute(0, 2, 3, 1)
        sentence = f"the position embedding is resized ({mode}) to the size of the image, but SAM 3 tiles it"
        yield "positions", sentence, functools.partial(_replaced, trunk, resized)
    none = torch.zeros_like(trunk.position())
    yield (
        "positions",
        "the position embedding is missing in the network",
        functools.partial(_replaced, trunk, none),
    )
    yield (
        "operator",
        "GELU is computed with the tanh approximation, but SAM 3 uses the exact GELU",
        functools.partial(_tanh, trunk),
    )
    blocks = len(trunk.blocks)
    for window_size, words in ((window, "windowed"), (0, "global")):
        sentence = f"all {blocks} blocks have {words} attention, but SAM 3 uses windowed and global attention"
        yield "operator", sentence, functools.partial(_windows, trunk, window_size)


@contextlib.contextmanager
def _tables(trunk: ViTDetTrunk, angles: torch.Tensor) -> Iterator[None]:
    before = trunk.global_cos, trunk.global_sin
    trunk.global_cos, trunk.global_sin = (part.to(before[0]) for part in (angles.cos(), angles.sin()))
    try:
        yield
    finally:
        trunk.global_cos, trunk.global_sin = before


@contextlib.contextmanager
def _replaced(trunk: ViTDetTrunk, position: torch.Tensor) -> Iterator[None]:
    """Another position embedding of the grid."""
    trunk.__dict__["position"] = lambda: position
    try:
        yield
    finally:
        del trunk.__dict__["position"]


class _TanhMlp(nn.Module):
    """An MLP whose GELU is computed by tanh."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.fc2 = mlp.fc1, mlp.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


@contextlib.contextmanager
def _changed_blocks(trunk: ViTDetTrunk, change: Callable[[Any], None]) -> Iterator[None]:
    """Copies of the blocks, changed, in the place of the blocks."""
    before = trunk.blocks
    blocks = []
    for block in before:
        twin = copy.copy(block)
        twin._modules = block._modules.copy()
        change(twin)
        blocks.append(twin)
    trunk.blocks = nn.ModuleList(blocks)
    try:
        yield
    finally:
        trunk.blocks = before


def _tanh(trunk: ViTDetTrunk) -> Any:
    return _changed_blocks(trunk, lambda block: setattr(block, "mlp", _TanhMlp(block.mlp)))


def _windows(trunk: ViTDetTrunk, size: int) -> Any:
    return _changed_blocks(trunk, lambda block: setattr(block, "window_size", size))
