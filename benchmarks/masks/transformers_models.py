"""SAM 3 of transformers, asked for the objects of an image by texts, or by points and boxes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.masks.objects import Objects
from benchmarks.masks.options import MasksError, Prompts
from export.contract.extras import install
from neck.images import Pixels, normalize

Segment = Callable[[Pixels], list[Objects]]
"""Takes RGB pixels (H, W, 3) at the model's size; gives the objects of every prompt."""

TEXT_TOKENS = 32
DETECTORS = ("sam3", "sam3_video")
TRACKERS = ("sam3_tracker_video", "sam3_video")


def load_segmenter(folder: Path, prompts: Prompts, device: str, threshold: float) -> tuple[nn.Module, Segment]:
    """Loads the model that accepts the prompts.

    Args:
        folder: config.json, weights and, for texts, the tokenizer.
        prompts: what it is asked.
        device: where it runs.
        threshold: the least score of an object.

    Returns:
        The model, and what asks it.

    Raises:
        MasksError: no such model, one that does not take these prompts, or transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MasksError(f"transformers is not installed; run {install('sam3')}") from None
    kind = _kind(folder)
    wanted, name = (DETECTORS, "Sam3Model") if prompts.texts else (TRACKERS, "Sam3TrackerVideoModel")
    if kind not in (*TRACKERS, *DETECTORS):
        raise MasksError(
            f"{folder}: `neck-export masks` does not support models of type {kind!r}. The given prompts need a model "
            f"of type {' or '.join(wanted)}. Choose another model with --model"
        )
    if kind not in wanted:
        takes = "--points and --boxes" if kind in TRACKERS else "--prompt"
        raise MasksError(
            f"{folder}: a model of type {kind!r} accepts {takes}, but these prompts need a model of type "
            f"{' or '.join(wanted)}; choose another --model or other prompts"
        )
    transformers.utils.logging.set_verbosity_error()  # its report of keys that belong to other classes
    transformers.utils.logging.disable_progress_bar()
    try:
        model, told = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder) if prompts.texts else None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise MasksError(
            f"{folder}: transformers cannot load the model ({' '.join(str(error).split())[:300]}); download the model "
            "again"
        ) from None
    if told["missing_keys"]:
        lacking = sorted(told["missing_keys"])
        raise MasksError(
            f"{folder}: {len(lacking)} tensors of {name} are missing ({', '.join(lacking[:3])}, ...); download the "
            "whole model again"
        )
    model = model.eval().to(device)
    if prompts.texts:
        return model, lambda pixels: by_text(model, tokenizer, prompts, _image(pixels, device), threshold)
    return model, lambda pixels: by_place(model, prompts, _image(pixels, device), threshold)


def by_text(model: Any, tokenizer: Any, prompts: Prompts, image: Tensor, threshold: float) -> list[Objects]:
    """Objects of each text; the image is encoded once."""
    with torch.inference_mode():
        embeds = model.get_vision_features(pixel_values=image)
        found = []
        for text in prompts.texts:
            words = tokenizer(text, return_tensors="pt", padding="max_length", max_length=TEXT_TOKENS, truncation=True)
            ids, mask = words["input_ids"].to(image.device), words["attention_mask"].to(image.device)
            given = model(vision_embeds=embeds, input_ids=ids, attention_mask=mask)
            masks, boxes = given.pred_masks[0], given.pred_boxes[0]
            found.append(objects_above(threshold, given.pred_logits[0], given.presence_logits, masks, boxes))
        return found


def objects_above(threshold: float, logits: Tensor, presence: Tensor, masks: Tensor, boxes: Tensor) -> Objects:
    """A detector's objects above a score: logits (N,), the presence logit, mask logits (N, h, w), boxes (N, 4)."""
    sure = presence.sigmoid().flatten()[0]
    scores = logits.sigmoid() * sure
    kept = scores > threshold
    bad = count_non_finite(logits, presence, masks, boxes)
    return Objects(_numpy(masks[kept] > 0), _numpy(boxes[kept]), _numpy(scores[kept]), float(sure), bad)


def count_non_finite(*tensors: Tensor) -> int:
    """How many values are NaN or infinite."""
    return sum(int((~tensor.isfinite()).sum()) for tensor in tensors)


def by_place(model: Any, prompts: Prompts, image: Tensor, threshold: float) -> list[Objects]:
    """The object at each point and in each box: the first frame of a video of one."""
    from transformers import Sam3TrackerVideoInferenceSession

    height, width = image.shape[2:]
    session = Sam3TrackerVideoInferenceSession(
        image, height, width, image.device, image.device, image.device, dtype=image.dtype
    )
    for place in (*prompts.points, *prompts.boxes):
        corners = torch.tensor(place).view(1, 1, -1, 2) * torch.tensor([width, height])
        labels = [1] if len(place) == 2 else [2, 3]  # a click on the object; a box's two corners
        given = {"point_coords": corners, "point_labels": torch.tensor([[labels]], dtype=torch.int32)}
        session.add_point_inputs(session.obj_id_to_idx(len(session.obj_ids)), 0, given)
    session.obj_with_new_inputs = list(session.obj_ids)
    with torch.inference_mode():
        given = model(session, frame_idx=0)
    masks, scores = _numpy(given.pred_masks[:, 0] > 0), _numpy(given.object_score_logits[:, 0].sigmoid())
    found, outputs = [], zip(given.pred_masks, given.object_score_logits, strict=True)
    bad = [count_non_finite(*pair) for pair in outputs]
    for index, score in enumerate(scores):
        kept = slice(index, index + 1 if score > threshold else index)
        boxes = np.array([_extent(mask) for mask in masks[kept]], np.float32).reshape(-1, 4)
        found.append(Objects(masks[kept], boxes, scores[kept], float(score), bad[index]))
    return found


def _extent(mask: Any) -> tuple[int, int, int, int]:
    """The box around a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def _image(pixels: Pixels, device: str) -> Tensor:
    return normalize(pixels[None]).to(device)


def _numpy(value: Tensor) -> Any:
    return value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy()


def _kind(folder: Path) -> str:
    """The model_type of a folder's config.json."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config["model_type"])
    except FileNotFoundError:
        raise MasksError(
            f"{folder}: the folder contains no config.json; set --model to a Hugging Face Transformers model folder, "
            "such as a download of facebook/sam3, or to a checkpoint file"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MasksError(
            f"{folder / 'config.json'}: the file cannot be read ({error!r}); download the model again"
        ) from None
