"""What a comparison of masks is asked for, by the command line and by Python (no torch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from export.contract.options import FILES, IMAGES, RANGE, VERIFICATION
from neck.option import Group, Option, OptionError

if TYPE_CHECKING:
    from neck.images import ImageFolder

PROMPTS, MODEL = "Prompts", "Model and images"


class MasksError(RuntimeError):
    """A model, prompts or images that cannot be compared."""


def parse_places(count: int, given: Sequence[str]) -> tuple[tuple[float, ...], ...]:
    """Reads points or boxes: so many numbers with commas each."""
    try:
        places = tuple(tuple(map(float, text.split(","))) for text in given)
    except ValueError:
        places = ((),)
    if any(len(place) != count for place in places):
        raise OptionError(f"expected {count} numbers separated by commas, such as {','.join(['0.5'] * count)}")
    return places


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts for every image: texts, each for any number of objects, or points and boxes for one each."""

    texts: Annotated[
        tuple[str, ...],
        Option(
            "Find all objects that this text describes; repeatable, e.g. 'a cup'. [default: none]",
            PROMPTS,
            name="prompt",
        ),
    ] = ()
    points: Annotated[
        tuple[tuple[float, ...], ...],
        Option(
            "Find the object at this point, X,Y in parts of the size; repeatable, e.g. 0.5,0.4. [default: none]",
            PROMPTS,
            read=list[str],
            parse=functools.partial(parse_places, 2),
        ),
    ] = ()
    boxes: Annotated[
        tuple[tuple[float, ...], ...],
        Option(
            "Find the object in this box, X0,Y0,X1,Y1 in parts of the size; repeatable, e.g. 0.1,0.2,0.6,0.9. "
            "[default: none]",
            PROMPTS,
            read=list[str],
            parse=functools.partial(parse_places, 4),
        ),
    ] = ()

    def __post_init__(self) -> None:
        places = self.points + self.boxes
        if bool(self.texts) == bool(places):
            raise MasksError("no prompt was given; use --prompt TEXT, or --points X,Y and --boxes X0,Y0,X1,Y1")
        for place in places:
            if not all(0 <= side <= 1 for side in place):
                raise MasksError(f"{place} is outside the image; expected fractions of width and height, 0 to 1")
        if any(box[0] >= box[2] or box[1] >= box[3] for box in self.boxes):
            raise MasksError("a box is empty; give its left, upper, right and lower side")

    @property
    def names(self) -> list[str]:
        """The name of each prompt."""
        return [*self.texts, *(f"point {place}" for place in self.points), *(f"box {place}" for place in self.boxes)]


@dataclasses.dataclass(frozen=True)
class MasksOptions:
    """What to compare; the help of the options says what they are.

    Attributes:
        file: its manifest beside it.
        model: a folder of transformers, or a checkpoint for the package of Meta or Ultralytics.
    """

    file: Annotated[Path, Option("ONNX file or TensorRT plan written by neck-export.", argument=True)]
    model: Annotated[Path, Option("Load the whole SAM 3 from this folder of transformers, or from a sam3.pt.", MODEL)]
    images: Annotated[
        Path | ImageFolder,
        IMAGES.but(help="Compare on all images of this folder.", panel=MODEL, also=(RANGE.but(panel=MODEL),)),
    ]
    prompts: Annotated[Prompts, Group]
    gate: Annotated[
        float,
        Option("Fail below this mean IoU of the masks.", VERIFICATION, settings={"min": 0, "max": 1}),
    ] = 0.99
    threshold: Annotated[
        float, Option("Compare the objects that score at least this.", VERIFICATION, settings={"min": 0, "max": 1})
    ] = 0.5
    check: Annotated[
        bool, Option("Refuse a file that was exported from other weights than the model's.", VERIFICATION)
    ] = True
    save: Annotated[
        Path | None,
        Option("Save images of the masks and their difference to this folder, e.g. masks. [default: not saved]", FILES),
    ] = None
