"""Images of features: the three directions in which a level varies most as red, green and blue.

The directions and the colors' ranges are the reference's, so that equal features give equal images.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.errors import BenchError

MOST_SIDE = 288
"""Pixels of an image's longer side; level 0 at 1008 has as many."""

SAMPLES = 20_000
"""Positions that the directions are found from, evenly taken."""

RANGE = (1.0, 99.0)
"""Percentiles of the reference that become black and full color."""

NOT_FINITE = (255, 0, 255)
"""Color of a position with a value that is not finite."""


def feature_images(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], image: str, backend: str
) -> dict[str, Any]:
    """Images of each level of the first image: reference, candidate, and how far they are apart.

    A position's difference is the norm over its channels, relative to the mean norm of the reference, times `factor`, a
    power of ten that makes it visible (white is 1).

    Args:
        reference: features by name, (B, C, H, W); positions (`_pos_`) are not drawn.
        candidate: the same of the backend.
        image: what was encoded.
        backend: the candidate's id.

    Raises:
        BenchError: no features, or the candidate's are missing or of another shape.
    """
    names = [name for name in reference if "_pos_" not in name]
    if not names:
        raise BenchError(
            "no image of the features can be drawn, because none of the outputs contains features (position encodings "
            f"are not drawn); the outputs are: {', '.join(reference) or '(none)'}"
        )
    levels = []
    for name in names:
        shape = reference[name].shape
        if name not in candidate or candidate[name].shape != shape:
            found = f"has the shape {candidate[name].shape}" if name in candidate else "is missing"
            raise BenchError(
                f"{backend}: output {name} {found}, but the reference has {shape}, so the features cannot be drawn"
            )
        levels.append(_level(name, reference[name][0], candidate[name][0]))
    return {"image": image, "candidate": backend, "levels": levels}


def _level(name: str, reference: np.ndarray, candidate: np.ndarray) -> dict[str, Any]:
    """One level; arrays are (C, H, W)."""
    size = reference.shape[1:]
    left = reference.reshape(len(reference), -1).T.astype(np.float32)  # (C, H, W) -> (H * W, C)
    right = candidate.reshape(len(candidate), -1).T.astype(np.float32)
    finite = np.isfinite(right).all(axis=1)
    right = np.where(finite[:, None], right, 0)
    middle, directions = _basis(left)
    both = [(array - middle) @ directions for array in (left, right)]
    low, high = np.percentile(both[0], RANGE, axis=0)
    span = np.where(high > low, high - low, 1)
    colors = [(projected - low) / span for projected in both]
    apart = np.abs(right - left)
    scale = float(np.linalg.norm(left, axis=1).mean()) or 1.0
    difference = np.linalg.norm(apart, axis=1) / scale
    factor = _factor(difference[finite])
    shown = np.repeat(difference[:, None] * factor, 3, axis=1)
    return {
        "name": name,
        "shape": [1, *reference.shape],
        "reference_png": _png(colors[0], size, np.ones_like(finite)),
        "candidate_png": _png(colors[1], size, finite),
        "difference_png": _png(shown, size, finite),
        "factor": factor,
        "largest_difference": float(apart.max()) if finite.all() else None,
    }


def _basis(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (C,) and up to three principal directions (C, 3), signs fixed so that a rerun gives the same colors."""
    sample = features[:: max(1, len(features) // SAMPLES)].astype(np.float64)
    middle = sample.mean(axis=0)
    centerd = sample - middle
    _, vectors = np.linalg.eigh(centerd.T @ centerd)
    directions = vectors[:, ::-1][:, :3]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
    missing = 3 - directions.shape[1]
    return middle.astype(np.float32), np.pad(directions, ((0, 0), (0, missing))).astype(np.float32)


def _factor(difference: np.ndarray) -> float:
    """The largest power of ten that leaves all but one position of 1000 below white; 1 where nothing differs."""
    high = float(np.percentile(difference, 99.9)) if difference.size else 0.0
    return 10.0 ** max(0, math.floor(-math.log10(high))) if high > 0 else 1.0


def _png(values: np.ndarray, size: tuple[int, ...], finite: np.ndarray) -> str:
    """(H * W, 3) of 0..1 -> a PNG in base64, never larger than MOST_SIDE."""
    pixels = np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)
    pixels[~finite] = NOT_FINITE
    image = Image.fromarray(pixels.reshape(*size, 3))
    if max(size) > MOST_SIDE:
        scale = MOST_SIDE / max(size)
        image = image.resize((round(size[1] * scale), round(size[0] * scale)), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
