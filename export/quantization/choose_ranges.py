"""The range of a product's input: by its largest value, a percentile or least squares, as the product errs least."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch
from torch import Tensor

from export.lowering.codes import Kind
from export.lowering.quantize import LIMITS, UnquantizableError, encode, encode_weight, scale_of
from export.quantization.calibration import Layer

PERCENTILES = (99.9, 99.99)
STEPS = 24
"""Least squares looks at the largest value and 24 below it, each 2^(1/4) times smaller: down to 1/64 of it."""

AFTER_NORM = (".attn.qkv", ".mlp.fc1")
SHARES = (0.25, 0.5, 0.75)
GAIN = 0.98
"""A move must take so much of the error: of fewer, the kept tokens tell little."""

NAMED_SHARE = 1e-4
"""Share of clipped values from which on an input is named."""


@dataclasses.dataclass(frozen=True)
class Range:
    """How the input of a product is quantized.

    Attributes:
        scale: of the codes.
        method: `largest`, `percentile 99.9` or `least squares`.
        largest: the largest value that was seen, after the move.
        clipped: share of values that saturate, told by the kept tokens.
        error: relative L2 of the product's result with input and weight quantized, of the kept tokens.
        share: how much of the channels' sizes moves from the LayerNorm into the weight: 0 to 1.
        move: (K,) the factors, powers of two; None where nothing moves.
    """

    scale: float
    method: str
    largest: float
    clipped: float
    error: float
    share: float = 0.0
    move: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; of the factors the exponents, a signed byte each, in base64."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"move": None if self.move is None else pack_move(self.move)}


def pack_move(move: Tensor) -> str:
    """Powers of two as text."""
    return base64.b64encode(move.log2().to(torch.int8).numpy().tobytes()).decode()


def unpack_move(text: str) -> Tensor:
    """The powers of two that `pack_move` wrote."""
    exponents = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int8)
    return torch.exp2(exponents.float())


def choose_range(name: str, layer: Layer, weight: Tensor, kind: Kind) -> Range:
    """The range, and the move out of the LayerNorm before it, whose product errs least on the kept tokens.

    Args:
        name: of the layer, which tells whether it reads a LayerNorm.
        layer: what it read.
        weight: (N, K), as torch keeps it.
        kind: fp8 or int8.

    Raises:
        UnquantizableError: the input or the weight is zero throughout, or too small or large for an FP16 scale.
    """
    if layer.largest == 0:
        raise UnquantizableError(
            f"the input of the layer {name} is zero for every calibration image; to quantize the layer, calibrate with "
            "other images"
        )
    weight = weight.float()
    exact = layer.rows @ weight.T
    best = _best(name, layer, weight, exact, kind)
    for share in SHARES if name.endswith(AFTER_NORM) else ():
        move = channel_move(layer.channels, weight.abs().amax(dim=0), share)
        moved = Layer(layer.rows / move, layer.weights, layer.channels / move)
        try:
            found = _best(name, moved, weight * move, exact, kind)
        except UnquantizableError:  # as it is, it can be
            continue
        if found.error < GAIN * best.error:
            best = dataclasses.replace(found, share=share, move=move)
    return best


def choose_value_range(name: str, layer: Layer, kind: Kind, clip: bool) -> Range:
    """The range of values that no weight multiplies: of a result, or of what an attention multiplies.

    Args:
        name: of the value.
        layer: what was seen of it.
        kind: fp8 or int8.
        clip: whether the largest values may be clipped where that errs least; else all of them have a code.

    Raises:
        UnquantizableError: it is zero throughout, or too small or large for an FP16 scale.
    """
    if layer.largest == 0:
        raise UnquantizableError(
            f"{name} is zero for every calibration image; to quantize {name}, calibrate with other images"
        )
    by, values, found = layer.weights[:, None], layer.rows, []
    norm = float((by * values.square()).sum().sqrt())
    for method, end in (_ends(layer, kind) if clip else {"largest": layer.largest}).items():
        try:
            scale = scale_of(end, kind, name)
        except UnquantizableError:
            if method == "largest":  # the others are smaller
                raise
            continue
        error = float((by * (decode(values, scale, kind) - values).square()).sum().sqrt())
        clipped = float((by * (values.abs() > end)).sum() / (by.sum() * values.shape[1]))
        found.append(Range(scale, method, layer.largest, clipped, error / norm if norm else 0.0))
    return min(found, key=lambda one: one.error)


def channel_move(inputs: Tensor, weights: Tensor, share: float) -> Tensor:
    """SmoothQuant's factors, inputs^share / weights^(1 - share), to the next powers of two around 1.

    Args:
        inputs, weights: (K,) the largest magnitudes of each channel.
        share: between 0 and 1.
    """
    exponents = share * inputs.clamp(min=1e-6).log2() - (1 - share) * weights.clamp(min=1e-6).log2()
    return torch.exp2((exponents - exponents.median()).round().clamp(-8, 8))


def _best(name: str, layer: Layer, weight: Tensor, exact: Tensor, kind: Kind) -> Range:
    values, by = layer.rows, layer.weights[:, None]
    stored = encode_weight(weight.T, kind, name).values()
    norm = float((by * exact.square()).sum().sqrt())
    found = []
    for method, end in _ends(layer, kind).items():
        try:
            scale = scale_of(end, kind, f"the input of {name}")
        except UnquantizableError:
            if method == "largest":  # the others are smaller
                raise
            continue
        error = float((by * (decode(values, scale, kind) @ stored - exact).square()).sum().sqrt())
        clipped = float((by * (values.abs() > end)).sum() / (by.sum() * values.shape[1]))
        found.append(Range(scale, method, layer.largest, clipped, error / norm if norm else 0.0))
    return min(found, key=lambda one: one.error)


def decode(values: Tensor, scale: float, kind: Kind) -> Tensor:
    """Values as they are after QuantizeLinear and DequantizeLinear."""
    return encode(values, scale, kind).float() * scale


def _ends(layer: Layer, kind: Kind) -> dict[str, float]:
    """The last value that is not clipped, by method."""
    sizes, order = layer.rows.abs().flatten().sort()
    share = layer.weights.repeat_interleave(layer.rows.shape[1])[order].cumsum(0)
    ends = {"largest": layer.largest}
    for percentile in PERCENTILES:
        place = torch.searchsorted(share, share[-1] * (percentile / 100))
        ends[f"percentile {percentile}"] = float(sizes[place.clamp(max=len(sizes) - 1)])
    tried = [layer.largest * 2 ** (-step / 4) for step in range(STEPS + 1)]
    by = layer.weights[:, None]
    errors = [float((by * (decode(layer.rows, end / LIMITS[kind], kind) - layer.rows).square()).sum()) for end in tried]
    ends["least squares"] = tried[errors.index(min(errors))]
    return {method: end for method, end in ends.items() if end > 0}


def clipping_note(ranges: dict[str, Range], kind: Kind) -> str | None:
    """Names the input that clips most, where it is worth a line."""
    name, worst = max(ranges.items(), key=lambda item: item[1].clipped)
    if worst.clipped < NAMED_SHARE:
        return None
    return (
        f"{name}: the quantization clips {worst.clipped:.2%} of the input values of this layer, because the "
        f"quantization range ends at {worst.scale * LIMITS[kind]:.3g} and the largest input value is "
        f"{worst.largest:.3g}. The clipping is intended: the range was computed with the method '{worst.method}' and "
        "gives the smallest quantization error"
    )
