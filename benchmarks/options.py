"""What a benchmark is asked for, and how often it runs things."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from export.contract.signature import Positions, Sam2Outputs
from neck.config import EncoderConfig

if TYPE_CHECKING:
    from neck.images import ImageFolder  # it imports torch, which a worker of another runtime must not hold

SIZES, BATCHES = (336, 672, 1008, 1344), (1, 2, 4, 8)
"""The sweeps."""


SELECTION = ("state", "prefix", "adapter", "adapter_alpha")
"""Which weights of a checkpoint, and what is merged into them: options of the same names of load_encoder."""


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure; the command line's options, whose help says more.

    Attributes:
        output: the folder; what a rerun goes on from lies in OUTPUT/work.
        quick: few backends, no sweeps, on a CPU at 24 patches a side (336 px): the whole encoder in under 3 minutes.
        checkpoint, state, prefix, adapter, adapter_alpha, config, seed: the encoder.
        image_size, batch, necks, levels, positions, sam2_outputs: its main point.
        images: a folder of images; without one the shipped image.
        device: where; `auto` is the GPU where there is one.
        backends: ids of those to measure; all, where none is named. The reference is always there.
        rounds, runs, warm_up: how often; None is the device's default.
        sweep: whether to sweep `sizes` and `batches`.
        minutes: after so long nothing is begun and what is at work is ended; its row says so, and a rerun goes on.
        swept: ids of what the sweeps measure; by default those of `backends.SWEPT`.
        timeout_s: how long a backend may take for one load or one round.
        fresh: forget the samples of an earlier run of the same benchmark.
        plan: a plan whose layer report goes into the report.
        masks: files that `neck-export masks` judged, whose verdicts go into the report.
        export: also measure the exporter itself (benchmarks/export.py); some minutes, at full size.
        command: what the result says it was made by; by default this process's command line.
    """

    output: Path
    quick: bool = False
    checkpoint: Path | None = None
    state: str | None = None
    prefix: str | None = None
    adapter: Path | None = None
    adapter_alpha: float | None = None
    config: EncoderConfig | None = None
    seed: int = 0
    image_size: int | tuple[int, int] | None = None
    batch: int = 1
    necks: str = "auto"
    levels: str = "all"
    positions: Positions = "graph"
    sam2_outputs: Sam2Outputs = "features"
    images: Path | ImageFolder | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    backends: tuple[str, ...] = ()
    rounds: int | None = None
    runs: int | None = None
    warm_up: int | None = None
    sweep: bool = True
    sizes: tuple[int, ...] = SIZES
    batches: tuple[int, ...] = BATCHES
    minutes: float | None = None
    swept: tuple[str, ...] = ()
    timeout_s: float = 1200.0
    fresh: bool = False
    plan: Path | None = None
    masks: tuple[Path, ...] = ()
    export: bool = False
    command: str = ""

    @property
    def sweeps(self) -> list[tuple[str, int | tuple[int, int] | None, int]]:
        """Sweep, image size and batch of every point of the sweeps."""
        if self.quick or not self.sweep:
            return []
        sizes = [("image_size", size, self.batch) for size in self.sizes]
        return [*sizes, *(("batch", self.image_size, batch) for batch in self.batches)]


DEFAULTS = {
    ("cpu", False): (5, 1, 1),
    ("cpu", True): (3, 1, 0),
    ("cuda", False): (10, 20, 10),
    ("cuda", True): (5, 20, 10),
}
"""Rounds, runs in a round, warm-up runs, by device and `quick`; a GPU warms up for a second at least. On a CPU a run of
seconds needs little: `--quick` takes another round instead."""
