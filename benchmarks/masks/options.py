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
        option = "--points" if count == 2 else "--boxes"
        raise OptionError(
            f"{option} needs {count} numbers separated by commas, such as {','.join(['0.5'] * count)}, but the command "
            f"line gives {', '.join(map(repr, given))}"
        )
    return places


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts for every image: texts, each for any number of objects, or points and boxes for one each."""

    texts: Annotated[
        tuple[str, ...],
        Option(
            "Search every image for all objects that this text describes, e.g. 'a cup'; the option can be repeated. At "
            "least one text, point or box must be given. [default: no text]",
            PROMPTS,
            name="prompt",
        ),
    ] = ()
    points: Annotated[
        tuple[tuple[float, ...], ...],
        Option(
            "In every image, segment the object at this point: X,Y as fractions of the image's width and height, e.g. "
            "0.5,0.4; the option can be repeated. [default: no point]",
            PROMPTS,
            read=list[str],
            parse=functools.partial(parse_places, 2),
        ),
    ] = ()
    boxes: Annotated[
        tuple[tuple[float, ...], ...],
        Option(
            "In every image, segment the object in this box: X0,Y0,X1,Y1 as fractions of the image's width and height, "
            "e.g. 0.1,0.2,0.6,0.9; the option can be repeated. [default: no box]",
            PROMPTS,
            read=list[str],
            parse=functools.partial(parse_places, 4),
        ),
    ] = ()

    def __post_init__(self) -> None:
        places = self.points + self.boxes
        if bool(self.texts) == bool(places):
            raise MasksError(
                "say what to find: pass either --prompt TEXT, or one or both of --points X,Y and --boxes X0,Y0,X1,Y1"
            )
        for place in places:
            if not all(0 <= side <= 1 for side in place):
                raise MasksError(
                    f"the point or box {place} is outside the image; pass fractions of the width and height from 0 to 1"
                )
        for box in self.boxes:
            if box[0] >= box[2] or box[1] >= box[3]:
                raise MasksError(
                    f"--boxes: the box {box} has no area; pass the left, top, right and bottom side in this order, "
                    "with left < right and top < bottom"
                )

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

    file: Annotated[
        Path,
        Option(
            "Run the model once with this exported encoder (an ONNX file or a TensorRT plan that neck-export wrote) "
            "and once with the model's own encoder, and compare the masks.",
            argument=True,
        ),
    ]
    model: Annotated[
        Path,
        Option(
            "Load the complete SAM 3 model from this folder in the format of Hugging Face Transformers, or from this "
            "checkpoint, e.g. sam3.pt. For the comparison, the model's encoder is replaced by the ONNX file or plan.",
            MODEL,
        ),
    ]
    images: Annotated[
        Path | ImageFolder,
        IMAGES.but(
            help="Compare the masks on every image in this folder, e.g. photos.",
            panel=MODEL,
            also=(RANGE.but(panel=MODEL),),
        ),
    ]
    prompts: Annotated[Prompts, Group]
    gate: Annotated[
        float,
        Option(
            "Fail with exit code 3 if the mean IoU (overlap) between the masks of the model's own encoder and those of "
            "the exported encoder is lower than this value.",
            VERIFICATION,
            settings={"min": 0, "max": 1},
        ),
    ] = 0.99
    threshold: Annotated[
        float,
        Option(
            "Compare only objects that the model detects with a score above this value.",
            VERIFICATION,
            settings={"min": 0, "max": 1},
        ),
    ] = 0.5
    check: Annotated[
        bool,
        Option(
            "Refuse a file that was exported from other weights than those of --model. With --no-check, such a file is "
            "compared too.",
            VERIFICATION,
        ),
    ] = True
    save: Annotated[
        Path | None,
        Option(
            "Save images to this folder, e.g. mask-images. They show the masks of the model's own encoder, the masks "
            "of the exported encoder, and where the two differ. [default: no images are saved]",
            FILES,
        ),
    ] = None
