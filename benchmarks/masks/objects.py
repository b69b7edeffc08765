"""Objects that a model finds in a picture, and how two findings of the same picture differ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SAME_OBJECT = 0.5
"""Mask IoU above which two masks are one object; below it, one is lost and another found."""

Masks = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float32]


class MasksError(RuntimeError):
    """A model, prompts or pictures that cannot be compared."""


@dataclasses.dataclass(frozen=True)
class Objects:
    """What a model finds for one prompt in one picture, above its score threshold.

    Attributes:
        masks: (N, h, w), at the resolution at which the model gives them.
        boxes: (N, 4), x0, y0, x1, y1 in any unit.
        scores: (N,), 0 to 1.
        presence: how sure the model is that the prompt is in the picture at all, 0 to 1.
    """

    masks: Masks
    boxes: Numbers
    scores: Numbers
    presence: float = 1.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """How two findings differ.

    Attributes:
        ious, box_ious, score_errors: of every object that both have.
        lost, found: how many objects the first or the second has alone.
        presence_error: difference of the presences.
    """

    picture: str
    prompt: str
    ious: tuple[float, ...]
    box_ious: tuple[float, ...]
    score_errors: tuple[float, ...]
    lost: int
    found: int
    presence_error: float

    @property
    def worst(self) -> float:
        """The lowest mask IoU; 0 where an object is lost or found, 1 where there is none."""
        return 0.0 if self.lost or self.found else min(self.ious, default=1.0)


def differ(picture: str, prompt: str, own: Objects, other: Objects) -> Difference:
    """Pairs the objects of two findings by their masks, the most alike first, and compares them."""
    ious = mask_ious(own.masks, other.masks)
    pairs: list[tuple[int, int]] = []
    for index in np.argsort(-ious, axis=None, kind="stable"):
        row, column = divmod(int(index), ious.shape[1])
        if ious[row, column] <= SAME_OBJECT:
            break
        if row not in {pair[0] for pair in pairs} and column not in {pair[1] for pair in pairs}:
            pairs.append((row, column))
    return Difference(
        picture,
        prompt,
        tuple(float(ious[pair]) for pair in pairs),
        tuple(box_iou(own.boxes[row], other.boxes[column]) for row, column in pairs),
        tuple(abs(float(own.scores[row] - other.scores[column])) for row, column in pairs),
        len(own.masks) - len(pairs),
        len(other.masks) - len(pairs),
        abs(own.presence - other.presence),
    )


def mask_ious(first: Masks, second: Masks) -> npt.NDArray[np.float64]:
    """Intersection over union of every pair of masks: (N, h, w), (M, h, w) -> (N, M); of two empty masks 1."""
    rows, columns = (
        masks.reshape(len(masks), math.prod(masks.shape[1:])).astype(np.float32) for masks in (first, second)
    )
    both = (rows @ columns.T).astype(np.float64)  # counts: exact in float32 to 16.7 M pixels
    union = rows.sum(1)[:, None] + columns.sum(1)[None, :] - both
    return np.where(union > 0, both / np.maximum(union, 1), 1.0)


def box_iou(first: Numbers, second: Numbers) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1; of two empty boxes 1."""
    sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    both = float(np.prod(np.maximum(sides, 0)))
    union = sum(float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (first, second)) - both
    return both / union if union > 0 else 1.0


def figures(differences: Sequence[Difference], gate: float) -> dict[str, Any]:
    """All pictures' figures and the verdict, as JSON values.

    Args:
        differences: of every picture and prompt.
        gate: the lowest mean mask IoU that passes; an object lost or found never does.

    Raises:
        MasksError: neither finding has an object in any picture.
    """
    ious = [iou for one in differences for iou in one.ious]
    lost, found = (sum(getattr(one, name) for one in differences) for name in ("lost", "found"))
    if not ious and not lost and not found:
        raise MasksError(
            "no object above the score threshold in any picture; take other prompts, pictures, --threshold"
        )
    boxes, scores = (
        [value for one in differences for value in getattr(one, name)] for name in ("box_ious", "score_errors")
    )
    worst = min(differences, key=lambda one: one.worst)
    mean = sum(ious) / len(ious) if ious else 0.0
    bad = sorted((one for one in differences if one.worst < gate), key=lambda one: one.worst)
    return {
        "passed": mean >= gate and not lost and not found,
        "gate": gate,
        "pictures": len({one.picture for one in differences}),
        "objects": len(ious),
        "lost": lost,
        "found": found,
        "mean_iou": mean,
        "worst_iou": min(ious, default=0.0),
        "worst_picture": worst.picture,
        "mean_box_iou": sum(boxes) / len(boxes) if boxes else 0.0,
        "worst_box_iou": min(boxes, default=0.0),
        "largest_score_error": max(scores, default=0.0),
        "largest_presence_error": max(one.presence_error for one in differences),
        "below_gate": [dataclasses.asdict(one) | {"worst": one.worst} for one in bad[:20]],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The figures for a screen."""
    return [
        f"{found['pictures']} pictures, {found['objects']} objects, {found['lost']} lost, {found['found']} found",
        f"mask IoU  mean {found['mean_iou']:.4f}, worst {found['worst_iou']:.4f}; least alike {found['worst_picture']}",
        f"box IoU   mean {found['mean_box_iou']:.4f}, worst {found['worst_box_iou']:.4f}",
        f"scores differ by up to {found['largest_score_error']:.2e}, presence by {found['largest_presence_error']:.2e}",
        found["method"],
    ]


def worst_lines(found: dict[str, Any]) -> list[str]:
    """The pictures below the gate, the worst first, one a line."""
    return [
        f"{one['picture']} ({one['prompt']}): mask IoU {min(one['ious'], default=0):.4f}, {one['lost']} lost, "
        f"{one['found']} found"
        for one in found["below_gate"][:5]
    ]
