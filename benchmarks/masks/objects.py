"""Objects that a model finds in an image, and how two findings of the same image differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.masks.options import MasksError

SAME_OBJECT = 0.5
"""Mask IoU above which two masks are one object; below it, one is lost and another found."""

Masks = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects that a model finds for one prompt in one image, above its score threshold.

    Attributes:
        masks: (N, h, w), at the resolution at which the model gives them.
        boxes: (N, 4), x0, y0, x1, y1 in any unit.
        scores: (N,), 0 to 1.
        presence: how sure the model is that the prompt is in the image at all, 0 to 1.
        non_finite: how many values of the model's outputs are NaN or infinite; objects below the threshold count.
    """

    masks: Masks
    boxes: Numbers
    scores: Numbers
    presence: float = 1.0
    non_finite: int = 0


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two findings differ.

    Attributes:
        ious, box_ious, score_errors: of every object that both have.
        lost, found: how many objects the first or the second has alone.
        presence_error: difference of the presences; None where one is not finite.
        own_non_finite, file_non_finite: values that are NaN or infinite in the first and in the second.
    """

    image: str
    prompt: str
    ious: tuple[float, ...]
    box_ious: tuple[float, ...]
    score_errors: tuple[float, ...]
    lost: int
    found: int
    presence_error: float | None
    own_non_finite: int = 0
    file_non_finite: int = 0

    @property
    def worst(self) -> float:
        """The lowest mask IoU: 0 if an object is lost, additional or not finite; 1 if there is none."""
        wrong = self.lost or self.found or self.own_non_finite or self.file_non_finite
        return 0.0 if wrong else min(self.ious, default=1.0)


def differ(image: str, prompt: str, own: Objects, other: Objects) -> Difference:
    """Pairs the objects of two results by their masks and compares them."""
    ious = mask_ious(own.masks, other.masks)
    pairs = best_pairs(ious)
    error = abs(own.presence - other.presence)
    return Difference(
        image,
        prompt,
        tuple(float(ious[pair]) for pair in pairs),
        tuple(box_iou(own.boxes[row], other.boxes[column]) for row, column in pairs),
        tuple(abs(float(own.scores[row] - other.scores[column])) for row, column in pairs),
        len(own.masks) - len(pairs),
        len(other.masks) - len(pairs),
        error if math.isfinite(error) else None,
        own.non_finite,
        other.non_finite,
    )


def best_pairs(ious: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """The most pairs of masks with an IoU above SAME_OBJECT, each in one pair; of as many, those of the largest sum.

    The Hungarian method (Kuhn 1955) with potentials: one shortest augmenting path for each row, O(n^3).

    Args:
        ious: (N, M).
    """
    size = max(ious.shape)
    cost = np.zeros((size + 1, size + 1))  # row and column 0 stand for none
    there = ious > SAME_OBJECT
    # a pair more is worth more than all that IoUs can differ by
    cost[1 : ious.shape[0] + 1, 1 : ious.shape[1] + 1] = np.where(there, -(size + ious), 0.0)
    row_value, column_value = np.zeros(size + 1), np.zeros(size + 1)
    taken_by = np.zeros(size + 1, int)
    for row in range(1, size + 1):
        taken_by[0], column = row, 0
        least, before = np.full(size + 1, math.inf), np.zeros(size + 1, int)
        visited = np.zeros(size + 1, bool)
        while taken_by[column]:
            visited[column] = True
            current = taken_by[column]
            reduced = cost[current] - row_value[current] - column_value
            better = ~visited & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.argmin(np.where(visited | (np.arange(size + 1) == 0), math.inf, least)))
            step = least[following]
            row_value[taken_by[visited]] += step
            column_value[visited] -= step
            least[~visited] -= step
            column = following
        while column:
            taken_by[column] = taken_by[before[column]]
            column = int(before[column])
    pairs = ((int(row) - 1, column - 1) for column, row in enumerate(taken_by) if column)
    return sorted(pair for pair in pairs if pair[0] < ious.shape[0] and pair[1] < ious.shape[1] and there[pair])


def mask_ious(first: Masks, second: Masks) -> npt.NDArray[np.float64]:
    """Intersection over union of every pair of masks: (N, h, w), (M, h, w) -> (N, M); of two empty masks 1."""
    rows, columns = (
        masks.reshape(len(masks), math.prod(masks.shape[1:])).astype(np.float32) for masks in (first, second)
    )
    both = (rows @ columns.T).astype(np.float64)  # counts: exact in float32 to 16.7 M pixels
    union = rows.sum(1)[:, None] + columns.sum(1)[None, :] - both
    return np.where(union > 0, both / np.maximum(union, 1), 1.0)


def box_iou(first: Numbers, second: Numbers) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; of two empty boxes 1, of sides that are not finite 0."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    union = sum(float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (first, second)) - both
    return both / union if union > 0 else 1.0


def figures(differences: Sequence[Difference], gate: float) -> dict[str, Any]:
    """All images' figures and the verdict, as JSON values.

    Args:
        differences: of every image and prompt.
        gate: the lowest mean mask IoU that passes; an object lost or found, or a value that is not finite, never does.

    Raises:
        MasksError: neither finding has an object in any image, and every value is finite.
    """
    own, other = (sum(getattr(one, name) for one in differences) for name in ("own_non_finite", "file_non_finite"))
    ious = [iou for one in differences for iou in one.ious]
    lost, found = (sum(getattr(one, name) for one in differences) for name in ("lost", "found"))
    if not (ious or lost or found or own or other):
        raise MasksError(
            "no object exceeds the score threshold in any image; use other prompts or images, or lower --threshold"
        )
    boxes, scores = (
        [value for one in differences for value in getattr(one, name)] for name in ("box_ious", "score_errors")
    )
    worst = min(differences, key=lambda one: one.worst)
    mean = sum(ious) / len(ious) if ious else 0.0
    bad = sorted((one for one in differences if one.worst < gate), key=lambda one: one.worst)
    return {
        "passed": mean >= gate and not (lost or found or own or other),
        "gate": gate,
        "images": len({one.image for one in differences}),
        "objects": len(ious),
        "lost": lost,
        "found": found,
        "non_finite": {"own": own, "file": other},
        "mean_iou": mean,
        "worst_iou": min(ious, default=0.0),
        "worst_image": worst.image,
        "mean_box_iou": sum(boxes) / len(boxes) if boxes else 0.0,
        "worst_box_iou": min(boxes, default=0.0),
        "largest_score_error": max(scores, default=0.0),
        "largest_presence_error": max(
            (one.presence_error for one in differences if one.presence_error is not None), default=0.0
        ),
        "below_gate": [dataclasses.asdict(one) | {"worst": one.worst} for one in bad[:20]],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for a screen."""
    return [
        f"{found['images']} images; {found['objects']} objects found with both encoders, {found['lost']} only with "
        f"the model's own encoder, {found['found']} only with the exported encoder",
        *_non_finite_lines(found["non_finite"]),
        f"mask IoU: mean {found['mean_iou']:.4f}, worst {found['worst_iou']:.4f}; the masks differ most in "
        f"{found['worst_image']}",
        f"box IoU: mean {found['mean_box_iou']:.4f}, worst {found['worst_box_iou']:.4f}",
        f"object scores differ by up to {found['largest_score_error']:.2e}, presence scores by up to "
        f"{found['largest_presence_error']:.2e}",
        found["method"],
    ]


def _non_finite_lines(counts: dict[str, int]) -> list[str]:
    """Which of the two encoders makes the model give NaN or infinity."""
    whose = {"own": "the model's own encoder", "file": "the exported encoder"}
    return [
        f"with {whose[key]}, {count} of the model's output values are NaN or infinite"
        for key, count in counts.items()
        if count
    ]


def worst_lines(found: dict[str, Any]) -> list[str]:
    """The images below the gate, the worst first, one a line."""
    return [
        f"{one['image']}, prompt {one['prompt']!r}: the worst mask IoU is {min(one['ious'], default=0):.4f}. Objects "
        f"found only with the model's own encoder: {one['lost']}. Objects found only with the exported encoder: "
        f"{one['found']}"
        + (
            f". NaN or infinite values that the model returned with the exported encoder: {one['file_non_finite']}"
            if one["file_non_finite"]
            else ""
        )
        for one in found["below_gate"][:5]
    ]
