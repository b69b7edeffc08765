"""Names, shapes and dtypes of the exported file's inputs and outputs (no torch)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from export.contract.errors import ExportError
from neck.checkpoint_keys import NECK_MODULES
from neck.config import HEAD_PARTS, EncoderConfig

BATCH = "batch"
"""The name of the batch dimension where it is dynamic."""

Positions = Literal["graph", "file", "none"]
InputKind = Literal["float", "uint8"]
Sam2Outputs = Literal["features", "head"]
Kind = Literal["feat", "pos"]
KINDS: tuple[Kind, ...] = ("feat", "pos")
"""What a neck gives at a level, in the order of the file's outputs."""

HEAD_LEVELS = range(len(HEAD_PARTS) + 1)
"""The levels of SAM 2's neck that its mask decoder reads: the two that its head narrows, and the one below."""


class SignatureError(ValueError):
    """Outputs or inputs that the encoder does not have, or an invalid batch range."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, numpy dtype name and shape, the batch first (an int or `batch`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class BatchRange:
    """Batch sizes of a file: TensorRT's minimum, optimum and maximum; fixed if all are equal."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise SignatureError(
                f"batch {self} is invalid; write it as minimum:optimum:maximum, three ascending numbers of at "
                "least 1, such as 1:4:8"
            )

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Reads `4` (fixed) or `1:4:8` (minimum, optimum, maximum)."""
        numbers = text.split(":")
        if len(numbers) not in (1, 3) or not all(number.isdecimal() for number in numbers):
            raise SignatureError(
                f"batch {text!r} is invalid; write it as one number, or as minimum:optimum:maximum such as 1:4:8"
            )
        return cls(*(int(number) for number in (numbers * 3 if len(numbers) == 1 else numbers)))

    @property
    def dynamic(self) -> bool:
        """Whether one file serves several batch sizes."""
        return self.minimum != self.maximum

    @property
    def dim(self) -> int | str:
        """The batch dimension of every input and output."""
        return BATCH if self.dynamic else self.optimum

    def __str__(self) -> str:
        return f"{self.minimum}:{self.optimum}:{self.maximum}" if self.dynamic else str(self.optimum)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The contract of one exported file.

    Attributes:
        image_size: (height, width) in pixels.
        input: `float` (B, 3, H, W) normalized, or `uint8` (B, H, W, 3) RGB pixels.
        batch: batch sizes that the file takes.
        necks: names of the necks in the file.
        levels: indices of the levels, 0 the finest.
        positions: whether the position encodings are outputs (`graph`), in a file beside it (`file`), or nowhere.
        d_model: channels of every output.
        level_sizes: (height, width) of every level of the encoder, whether exported or not.
        dtype: numpy dtype name of the outputs.
        sam2_outputs: `features`, or `head`: levels 0 and 1 of the sam2 neck as its mask decoder reads them.
    """

    image_size: tuple[int, int]
    input: InputKind
    batch: BatchRange
    necks: tuple[str, ...]
    levels: tuple[int, ...]
    positions: Positions
    d_model: int
    level_sizes: tuple[tuple[int, int], ...]
    dtype: str = "float32"
    sam2_outputs: Sam2Outputs = "features"

    @property
    def image(self) -> TensorSpec:
        """The only input."""
        height, width = self.image_size
        if self.input == "uint8":
            return TensorSpec("image", "uint8", (self.batch.dim, height, width, 3))
        return TensorSpec("image", "float32", (self.batch.dim, 3, height, width))

    def of_kind(self, kind: Kind) -> tuple[TensorSpec, ...]:
        """The features or the positions of every neck, whether they are outputs or not."""
        return tuple(self.spec(neck, kind, level) for neck in self.necks for level in self.levels_of(neck))

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the feature maps, those of SAM 2's head included, whether they are outputs or not."""
        return tuple(spec.name for spec in self.of_kind("feat"))

    def spec(self, neck: str, kind: Kind, level: int) -> TensorSpec:
        """One neck's feature map or position at one level."""
        channels = self.channels(neck, level) if kind == "feat" else self.d_model
        name = f"{neck}_{kind if channels == self.d_model else 'high_res'}_{level}"
        return TensorSpec(name, self.dtype, (self.batch.dim, channels, *self.level_sizes[level]))

    def channels(self, neck: str, level: int) -> int:
        """Channels of a feature map: d_model, or fewer after the head."""
        return self.d_model // (HEAD_PARTS[level] if self.has_head(neck) and level < len(HEAD_PARTS) else 1)

    def has_head(self, neck: str) -> bool:
        """Whether a neck's outputs are those of the mask decoder's convolutions."""
        return self.sam2_outputs == "head" and neck == "sam2"

    def levels_of(self, neck: str) -> tuple[int, ...]:
        """The levels of one neck."""
        return tuple(level for level in self.levels if level in HEAD_LEVELS or not self.has_head(neck))

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Neck by neck: its features, then its positions, finest level first."""
        kinds = KINDS if self.positions == "graph" else KINDS[:1]
        return tuple(
            spec
            for neck in self.necks
            for kind in kinds
            for spec in dataclasses.replace(self, necks=(neck,)).of_kind(kind)
        )

    def to_dict(self) -> dict[str, Any]:
        """The signature as JSON values, with the list of inputs and outputs for readers that want no rules."""
        values = dataclasses.asdict(self)
        values["batch"] = str(self.batch)
        tensors = {"inputs": (self.image,), "outputs": self.outputs}
        return values | {key: [dataclasses.asdict(spec) for spec in specs] for key, specs in tensors.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Signature:
        """The signature that `to_dict` wrote; one from before there was a head has none."""
        values = {"sam2_outputs": "features", **values}
        fields = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        for name in ("image_size", "necks", "levels"):
            fields[name] = tuple(fields[name])
        fields["level_sizes"] = tuple((height, width) for height, width in fields["level_sizes"])
        return cls(**fields | {"batch": BatchRange.parse(fields["batch"])})


def encoder_signature(
    config: EncoderConfig,
    *,
    necks: str = "auto",
    levels: str = "all",
    positions: Positions = "graph",
    input_kind: InputKind = "float",
    batch: BatchRange | None = None,
    dtype: str = "float32",
    sam2_outputs: Sam2Outputs = "features",
) -> Signature:
    """Makes the signature of an export from what the encoder has and what the user asks.

    Args:
        config: the encoder, at the image size of the export.
        necks: `auto` (sam3, or all where there is no sam3), `both`, `all`, or names with commas.
        levels: `all`, or indices with commas.
        positions, input_kind, batch, dtype, sam2_outputs: as in Signature.

    Raises:
        SignatureError: a neck or level that the encoder does not have, naming those that it has.
    """
    height, width = config.grid
    chosen = choose_necks(necks, config.necks, sam2_outputs)
    indices = choose_levels(levels, len(config.scale_factors))
    if sam2_outputs == "head":
        indices = _head_levels(levels, indices, chosen)
    return Signature(
        image_size=config.image_size,
        input=input_kind,
        batch=batch or BatchRange(),
        necks=chosen,
        levels=indices,
        positions=positions,
        d_model=config.d_model,
        level_sizes=tuple((int(height * scale), int(width * scale)) for scale in config.scale_factors),
        dtype=dtype,
        sam2_outputs=sam2_outputs,
    )


def choose_necks(asked: str, available: Sequence[str], sam2_outputs: Sam2Outputs = "features") -> tuple[str, ...]:
    """The requested necks in the encoder's order; a SAM 2 head requires the neck sam2."""
    auto = ["sam3"] if "sam3" in available else list(available)
    sets = {"auto": auto, "both": ["sam3", "sam2"], "all": list(available)}
    names = sets.get(asked, [name.strip() for name in asked.split(",")])
    unknown = [name for name in names if name not in NECK_MODULES]
    if unknown:
        raise SignatureError(
            f"there is no neck {', '.join(map(repr, unknown))}. For --neck, choose one or more of "
            f"{', '.join(NECK_MODULES)}, separated by commas, or one of the words `both`, `all` and `auto`. The "
            "word `both` selects sam3 and sam2, `all` selects every neck of the checkpoint, and `auto` selects sam3, "
            "or every neck if the checkpoint has no sam3"
        )
    missing = [name for name in names if name not in available]
    if missing:
        raise SignatureError(
            f"the neck {', '.join(missing)} was requested, but the checkpoint contains only "
            f"{', '.join(available)}; choose one of them with --neck"
        )
    if sam2_outputs == "head" and "sam2" not in available:
        raise SignatureError(
            "--sam2-outputs head requires the neck sam2, but the checkpoint contains only "
            f"{', '.join(available)}; leave out --sam2-outputs"
        )
    if sam2_outputs == "head" and "sam2" not in names:
        raise SignatureError(
            f"--sam2-outputs head requires the neck sam2, but --neck {asked} selects {', '.join(names)}; use "
            "--neck sam2 or --neck both"
        )
    return tuple(name for name in available if name in names)


def choose_levels(asked: str, count: int) -> tuple[int, ...]:
    """The requested levels, finest first."""
    if asked == "all":
        return tuple(range(count))
    if not re.fullmatch(r" *\d+ *(, *\d+ *)*", asked):
        raise SignatureError(
            f"--levels {asked!r} is invalid; write the level numbers separated by commas, such as 0,1,2"
        )
    levels = sorted({int(level) for level in asked.split(",")})
    if levels[-1] >= count:
        raise SignatureError(
            f"level {levels[-1]} does not exist, because the encoder has levels 0 to {count - 1}; choose from "
            "these with --levels"
        )
    return tuple(levels)


def _head_levels(asked: str, levels: tuple[int, ...], necks: Sequence[str]) -> tuple[int, ...]:
    """The levels of a file whose sam2 outputs are the head's; level 3 stays where another neck has it."""
    if not any(level < len(HEAD_PARTS) for level in levels):
        raise SignatureError(
            f"--sam2-outputs head changes levels 0 and 1, but --levels {asked} selects neither; add one of "
            "them, or leave out --sam2-outputs"
        )
    if tuple(necks) != ("sam2",):
        return levels
    beyond = [level for level in levels if level not in HEAD_LEVELS]
    if beyond and asked != "all":
        raise SignatureError(
            f"--sam2-outputs head returns only levels 0, 1 and 2 of the neck sam2, but --levels {asked} also "
            f"selects level {beyond[0]}; remove that level from --levels"
        )
    return tuple(level for level in levels if level in HEAD_LEVELS)


def check_levels(signature: Signature, config: EncoderConfig) -> None:
    """Refuses an image size at which a level has no pixels.

    Raises:
        ExportError: a level that is empty at the image size.
    """
    for level in signature.levels:
        if not all(signature.level_sizes[level]):
            (height, width), least = config.image_size, 2 * config.patch_size
            raise ExportError(
                f"level {level} of the feature pyramid would be empty at an image size of {height}x{width} "
                f"pixels; use an image size of at least {least} pixels per side"
            )
