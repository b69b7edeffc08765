"""SAM 3 of Meta's or Ultralytics' package, from a checkpoint, asked for the objects of an image by texts or boxes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.masks.objects import Objects
from benchmarks.masks.options import MasksError, Prompts
from benchmarks.masks.transformers_models import Segment, objects_above
from neck.images import Pixels, normalize

FAILURES = (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError, UnpicklingError)
"""What a package raises on a checkpoint that is not its own."""
VISUAL = "visual"
"""The text that both packages give where a box alone asks."""


@dataclasses.dataclass(frozen=True)
class Detector:
    """A package's detector.

    Attributes:
        model: the module, as attach takes it.
        words: gives the features of a text.
        place: makes a prompt of boxes (N, 1, 4), center, width and height as parts of the image; N may be 0.
        ground: finds objects, from the features of image and text, and a prompt of boxes.
    """

    model: Any
    words: Callable[[str], dict[str, Any]]
    place: Callable[[Tensor], Any]
    ground: Callable[[dict[str, Any], Any], dict[str, Any]]


Build = Callable[[Path, str, tuple[int, int]], Detector]
"""Takes a checkpoint, the device, and the images' height and width."""


def load_checkpoint_segmenter(
    path: Path, prompts: Prompts, device: str, threshold: float, size: tuple[int, int]
) -> tuple[nn.Module, Segment]:
    """Loads a checkpoint by Meta's package, or else by Ultralytics'.

    Args:
        path: the whole SAM 3, such as Meta's sam3.pt.
        prompts: texts, or boxes, each of which asks for all objects like the one in it.
        device: where it runs.
        threshold: the least score of an object.
        size: height and width of the images, for Ultralytics' model, which takes any.

    Returns:
        The model in FP32, and what asks it.

    Raises:
        MasksError: neither package can be imported, no such model, or one that does not take these prompts.
    """
    if prompts.points:
        raise MasksError(
            f"{path}: with a checkpoint file, --prompt and --boxes are supported, but not --points; for --points, set "
            "--model to a Hugging Face Transformers model folder"
        )
    package, build = _builder(path)
    try:
        with contextlib.redirect_stdout(io.StringIO()), _lacking() as lacking:  # Meta's prints what lacks
            detector = build(path, device, size)
    except FAILURES as error:
        raise MasksError(
            f"{path}: {package} cannot load the checkpoint ({_short(error)}); pass a checkpoint of the whole SAM 3 "
            "model"
        ) from None
    names = {name for name, _ in detector.model.named_parameters()}  # tables that are computed may lack
    if missing := sorted(names & set(lacking)):
        some = ", ".join(missing[:3])
        raise MasksError(
            f"{path}: {len(missing)} of the model's tensors are missing in the checkpoint ({some}, ...); pass a "
            "checkpoint of the whole SAM 3 model"
        )
    return detector.model, lambda pixels: _segment(detector, prompts, pixels, device, threshold)


def _builder(path: Path) -> tuple[str, Build]:
    """The package that is there and what builds its model, Meta's first."""
    why = []
    for package, builder in (("sam3", _meta), ("ultralytics", _ultralytics)):
        try:
            return package, builder()
        except ImportError as error:
            why.append(f"{package}: {_short(error)}")
    raise MasksError(
        f"{path}: loading a checkpoint file needs the package sam3 or ultralytics ({'; '.join(why)}); install one with "
        "pip, or set --model to a Hugging Face Transformers model folder"
    )


def _meta() -> Build:
    """What builds the model of Meta's package."""
    from sam3.model.geometry_encoders import Prompt
    from sam3.model.sam3_image_processor import Sam3Processor
    from sam3.model_builder import build_sam3_image_model

    def build(path: Path, device: str, size: tuple[int, int]) -> Detector:
        model = build_sam3_image_model(checkpoint_path=str(path), load_from_HF=False, device=device)
        stage = Sam3Processor(model, size[0], device).find_stage  # the first text in the first image
        return Detector(
            model,
            lambda text: model.backbone.forward_text([text], device=device),
            lambda boxes: Prompt(box_embeddings=boxes),
            lambda features, place: model.forward_grounding(features, stage, None, place),
        )

    return build


def _ultralytics() -> Build:
    """What builds the model of Ultralytics' package."""
    from ultralytics.models.sam.build_sam3 import build_sam3_image_model
    from ultralytics.models.sam.sam3.geometry_encoders import Prompt

    def build(path: Path, device: str, size: tuple[int, int]) -> Detector:
        model = build_sam3_image_model(str(path)).float().to(device)
        model.set_imgsz(list(size))
        first = torch.zeros(1, dtype=torch.long, device=device)
        return Detector(
            model,
            lambda text: model.backbone.forward_text([text]),
            lambda boxes: Prompt(box_embeddings=boxes) if len(boxes) else None,
            lambda features, place: model.forward_grounding(features, first, place),
        )

    return build


@contextlib.contextmanager
def _lacking() -> Iterator[list[str]]:
    """Collects what load_state_dict(strict=False) leaves as it was; no builder tells."""
    real, lacking = nn.Module.load_state_dict, []

    def load(self: nn.Module, *args: Any, **given: Any) -> Any:
        told = real(self, *args, **given)
        lacking.extend(told.missing_keys)
        return told

    nn.Module.load_state_dict = load  # type: ignore[method-assign]
    try:
        yield lacking
    finally:
        nn.Module.load_state_dict = real  # type: ignore[method-assign]


def _segment(detector: Detector, prompts: Prompts, pixels: Pixels, device: str, threshold: float) -> list[Objects]:
    """Objects of each prompt; the image is encoded once."""
    asked: list[tuple[str, Sequence[Sequence[float]]]] = [(text, ()) for text in prompts.texts]
    for left, top, right, bottom in prompts.boxes:
        asked.append((VISUAL, [((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)]))
    found = []
    with torch.inference_mode():
        features = detector.model.backbone.forward_image(normalize(pixels[None]).to(device))
        for text, boxes in asked:
            place = detector.place(torch.tensor(boxes, device=device).view(-1, 1, 4))
            given = detector.ground({**features, **detector.words(text)}, place)
            presence, masks, sides = given["presence_logit_dec"], given["pred_masks"], given["pred_boxes_xyxy"]
            found.append(objects_above(threshold, given["pred_logits"][0, :, 0], presence, masks[0], sides[0]))
    return found


def _short(error: Exception) -> str:
    """Its first sentence: torch's go on to advise loading a file that cannot be trusted."""
    return " ".join(str(error).split()).partition(". ")[0][:300]
