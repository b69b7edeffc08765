"""The range of a product's input: by its largest value, a percentile or least squares, as the product errs least."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from export.lowering.quantise import LIMITS, Kind, encode, encode_weight, scale_of
from export.quantising.calibration import Layer

PERCENTILES = (99.9, 99.99)
STEPS = 24
"""Least squares looks at the largest value and 24 below it, each 2^(1/4) times smaller: down to 1/64 of it."""

NAMED_SHARE = 1e-4
"""Share of clipped values from which on an input is named."""


@dataclasses.dataclass(frozen=True)
class Range:
    """How the input of a product is quantised.

    Attributes:
        scale: of the codes.
        method: `largest`, `percentile 99.9` or `least squares`.
        largest: the largest value that was seen.
        clipped: share of values that saturate, told by the kept tokens.
        error: relative L2 of the product's result with input and weight quantised, of the kept tokens.
    """

    scale: float
    method: str
    largest: float
    clipped: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def choose_range(name: str, layer: Layer, weight: Tensor, kind: Kind) -> Range:
    """The range whose product errs least on the kept tokens.

    Args:
        name: of the layer, for errors.
        layer: what it read.
        weight: (N, K), as torch keeps it.
        kind: fp8 or int8.
    """
    values, by = layer.rows, layer.weights[:, None]
    exact, stored = values @ weight.T.float(), encode_weight(weight.T, kind, name).values()
    norm = float((by * exact.square()).sum().sqrt())
    found = []
    for method, end in _ends(layer, kind).items():
        scale = scale_of(end, kind, f"the input of {name}")
        result = decode(values, scale, kind) @ stored
        error = float((by * (result - exact).square()).sum().sqrt()) / norm if norm else 0.0
        clipped = float((by * (values.abs() > end)).sum() / (by.sum() * values.shape[1]))
        found.append(Range(scale, method, layer.largest, clipped, error))
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
        f"{name}: {worst.clipped:.2%} of its input is clipped, beyond {worst.scale * LIMITS[kind]:.3g} "
        f"where the largest is {worst.largest:.3g} ({worst.method} errs least)"
    )
