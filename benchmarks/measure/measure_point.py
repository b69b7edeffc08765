"""Where backends are measured (an image size and a batch), and how often."""

from __future__ import annotations

import dataclasses
import functools
import re

from benchmarks.roofline import Part, encoder_parts
from export.contract.signature import Signature
from neck.config import EncoderConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
        rounds: of all backends in turn.
        runs: of each backend in a round, one after the other.
        warm_up: runs after each load that are not counted; on a GPU for `warm_up_s` seconds at least.
        timeout_s: how long a worker may take for one answer.
        ends: when the run's time is over, in `time.monotonic` seconds: nothing is begun, what is at work is ended.
        rounds_end: when no further round is begun, the first aside.
    """

    rounds: int
    runs: int
    warm_up: int
    warm_up_s: float
    timeout_s: float
    ends: float
    rounds_end: float = float("inf")


@dataclasses.dataclass(frozen=True)
class MeasurePoint:
    """An image size and a batch.

    Attributes:
        name: in the samples.
        sweep: which sweep it is part of, if any.
        config, signature: the encoder at that size, and its outputs.
        pace: how much is run there.
    """

    name: str
    sweep: str | None
    config: EncoderConfig
    signature: Signature
    schedule: Schedule

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.config.image_size

    @property
    def batch(self) -> int:
        """Images in a run."""
        return self.signature.batch.optimum

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^0-9a-z]+", "-", self.name).strip("-")

    @property
    def files(self) -> str:
        """The suffix of the names of its image and files."""
        return f"{self.image_size[0]}x{self.image_size[1]}-b{self.batch}"

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The fewest operations and bytes, those of the rewritten module: every row's floor."""
        return encoder_parts(self.config, self.signature, self.batch)

    @functools.cached_property
    def plain_parts(self) -> list[Part]:
        """Those of the plain module."""
        return encoder_parts(self.config, self.signature, self.batch, rewritten=False)
