"""Names, shapes and dtypes of the exported file's inputs and outputs (no torch)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

from neck.checkpoint_keys import NECK_MODULES
from neck.config import EncoderConfig

BATCH = "batch"
"""The name of the batch dimension where it is dynamic."""

Positions = Literal["graph", "file", "none"]
InputKind = Literal["float", "uint8"]


class SignatureError(ValueError):
    """Outputs or inputs that the encoder does not have, or a batch range that is none."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, numpy dtype name and shape, the batch first (an int or `batch`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclasses.dataclass(frozen=True)
class BatchRange:
    """Batch sizes that a file takes: TensorRT's minimum, optimum and maximum; fixed where all are equal."""

    minimum: int = 1
    optimum: int = 1
    maximum: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise SignatureError(f"batch {self}: expected 1 <= minimum <= optimum <= maximum, such as 1:4:8")

    @classmethod
    def parse(cls, text: str) -> BatchRange:
        """Reads `4` (fixed) or `1:4:8` (minimum, optimum, maximum)."""
        numbers = text.split(":")
        if len(numbers) not in (1, 3) or not all(number.isdecimal() for number in numbers):
            raise SignatureError(f"batch {text!r}: expected a number or minimum:optimum:maximum, such as 1:4:8")
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
        input: `float` (B, 3, H, W) normalised, or `uint8` (B, H, W, 3) RGB pixels.
        batch: batch sizes that the file takes.
        necks: names of the necks in the file.
        levels: indices of the levels, 0 the finest.
        positions: whether the position encodings are outputs (`graph`), in a file beside it (`file`), or nowhere.
        d_model: channels of every output.
        level_sizes: (height, width) of every level of the encoder, whether exported or not.
        dtype: numpy dtype name of the outputs.
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

    @property
    def image(self) -> TensorSpec:
        """The only input."""
        height, width = self.image_size
        if self.input == "uint8":
            return TensorSpec("image", "uint8", (self.batch.dim, height, width, 3))
        return TensorSpec("image", "float32", (self.batch.dim, 3, height, width))

    def of_kind(self, kind: Literal["feat", "pos"]) -> tuple[TensorSpec, ...]:
        """The features or the positions of every neck, whether they are outputs or not."""
        return tuple(
            TensorSpec(f"{neck}_{kind}_{level}", self.dtype, (self.batch.dim, self.d_model, *self.level_sizes[level]))
            for neck in self.necks
            for level in self.levels
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Neck by neck: its features, then its positions, finest level first."""
        kinds: tuple[Literal["feat", "pos"], ...] = ("feat", "pos") if self.positions == "graph" else ("feat",)
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
        """The signature that `to_dict` wrote."""
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
) -> Signature:
    """Makes the signature of an export from what the encoder has and what the user asks.

    Args:
        config: the encoder, at the image size of the export.
        necks: `auto` (sam3, or all where there is no sam3), `both`, `all`, or names with commas.
        levels: `all`, or indices with commas.
        positions, input_kind, batch, dtype: as in Signature.

    Raises:
        SignatureError: a neck or level that the encoder does not have, naming those that it has.
    """
    height, width = config.grid
    return Signature(
        image_size=config.image_size,
        input=input_kind,
        batch=batch or BatchRange(),
        necks=choose_necks(necks, config.necks),
        levels=choose_levels(levels, len(config.scale_factors)),
        positions=positions,
        d_model=config.d_model,
        level_sizes=tuple((int(height * scale), int(width * scale)) for scale in config.scale_factors),
        dtype=dtype,
    )


def choose_necks(asked: str, available: Sequence[str]) -> tuple[str, ...]:
    """The asked necks in the encoder's order."""
    auto = ["sam3"] if "sam3" in available else list(available)
    sets = {"auto": auto, "both": ["sam3", "sam2"], "all": list(available)}
    names = sets.get(asked, [name.strip() for name in asked.split(",")])
    unknown = [name for name in names if name not in NECK_MODULES]
    if unknown:
        raise SignatureError(
            f"unknown neck {', '.join(map(repr, unknown))}; known are {', '.join(NECK_MODULES)}, both, all, auto"
        )
    missing = [name for name in names if name not in available]
    if missing:
        raise SignatureError(f"neck {', '.join(missing)} is not in the checkpoint, which has {', '.join(available)}")
    return tuple(name for name in available if name in names)


def choose_levels(asked: str, count: int) -> tuple[int, ...]:
    """The asked levels, finest first."""
    if asked == "all":
        return tuple(range(count))
    if not re.fullmatch(r" *\d+ *(, *\d+ *)*", asked):
        raise SignatureError(f"levels {asked!r}: expected indices with commas, such as 0,1,2")
    levels = sorted({int(level) for level in asked.split(",")})
    if levels[-1] >= count:
        raise SignatureError(f"level {levels[-1]} does not exist; the encoder has levels 0 to {count - 1}")
    return tuple(levels)
