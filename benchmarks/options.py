"""What a benchmark is asked for, and how often it runs things."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from export.contract.options import (
    ADAPTER,
    ADAPTER_ALPHA,
    CHECKPOINT,
    CONFIG,
    FILES,
    IMAGE_SIZE,
    IMAGES,
    LEVELS,
    NECKS,
    PREFIX,
    SAM2_OUTPUTS,
    STATE,
    TENSORS,
)
from export.contract.signature import Positions, Sam2Outputs
from neck.config import EncoderConfig
from neck.option import Option

if TYPE_CHECKING:
    from neck.images import ImageFolder  # it imports torch, which a worker of another runtime must not hold

MEASURED, REPORT = "Measurement", "Report"
LEAST_1 = {"min": 1}

SIZES, BATCHES = (336, 672, 1008, 1344), (1, 2, 4, 8)
"""The sweeps."""


SELECTION = ("state", "prefix", "adapter", "adapter_alpha")
"""Which weights of a checkpoint, and what is merged into them: options of the same names of load_encoder."""


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure; the help of the options says what they are.

    Attributes:
        output: what a rerun goes on from lies in OUTPUT/work.
        quick: few backends, no sweeps, on a CPU at 24 patches a side (336 px): the whole encoder in under 3 minutes.
        image_size, batch, necks, levels, positions, sam2_outputs: its main point.
        images: without a folder the packaged image.
        backends: all, where none is named. The reference is always there.
        rounds, runs, warm_up: how often; None is the device's default.
        sweep: whether to sweep `sizes` and `batches`.
        minutes: after so long nothing is begun and what is at work is ended; its row says so, and a rerun goes on.
        swept: ids of what the sweeps measure; by default those of `backends.SWEPT`.
        timeout_s: how long a backend may take for one load or one round.
        command: what the result says it was made by; by default this process's command line.
    """

    output: Annotated[
        Path, Option("Write the report to this folder, as the files report.json, report.md and report.html.", FILES)
    ] = Path("report")
    quick: Annotated[
        bool,
        Option(
            "Measure a few backends in few rounds, at one image size (a small one on a CPU) and one batch size. This "
            "takes minutes instead of hours.",
            MEASURED,
            "--quick",
        ),
    ] = False
    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    adapter: Annotated[Path | None, ADAPTER] = None
    adapter_alpha: Annotated[float | None, ADAPTER_ALPHA] = None
    state: Annotated[str | None, STATE] = None
    prefix: Annotated[str | None, PREFIX] = None
    seed: int = 0
    config: Annotated[EncoderConfig | None, CONFIG] = None
    image_size: Annotated[int | tuple[int, int] | None, IMAGE_SIZE] = None
    batch: Annotated[
        int,
        Option(
            "Set the batch size of the measurement, i.e. the number of images per inference call.",
            TENSORS,
            settings=LEAST_1,
        ),
    ] = 1
    necks: Annotated[str, NECKS.but(help=NECKS.help.replace("Include", "Measure an encoder with"))] = "auto"
    levels: Annotated[str, LEVELS.but(help=LEVELS.help.replace("Include", "Let the measured encoder return"))] = "all"
    positions: Annotated[
        Positions,
        Option(
            "Choose whether the measured encoder also returns its position encodings: graph (it returns them as "
            "outputs beside the features) or none (it returns only the features).",
            TENSORS,
            read=Literal["graph", "none"],
            default="graph",
        ),
    ] = "graph"
    sam2_outputs: Annotated[Sam2Outputs, SAM2_OUTPUTS] = "features"
    images: Annotated[
        Path | ImageFolder | None,
        IMAGES.but(
            help="Use the images in this folder, e.g. photos/, to compare the outputs of each backend with the outputs "
            "of PyTorch. [default: the sample photo that is installed with neck-export]"
        ),
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Option("Measure on the CPU or on the GPU (cuda). auto chooses the GPU if there is one.", MEASURED),
    ] = "auto"
    backends: Annotated[
        tuple[str, ...],
        Option(
            "Measure only this backend (a runtime with a file format and precision), e.g. ort-cpu-plain-fp32; the "
            "option can be repeated. To see the names of all backends, pass a wrong name such as `--backend x`. "
            "[default: all backends]",
            MEASURED,
            name="backend",
        ),
    ] = ()
    rounds: Annotated[
        int | None,
        Option(
            "Measure every backend in this many rounds, e.g. 7; in each round, the backends run one after the "
            "other. [default: 5 on a CPU and 10 on a GPU, or 3 and 5 with --quick]",
            MEASURED,
            settings=LEAST_1,
        ),
    ] = None
    runs: int | None = None
    warm_up: int | None = None
    sweep: Annotated[
        bool,
        Option(
            "Also measure other image sizes, from 336 to 1344 pixels, and other batch sizes, from 1 to 8. --no-sweep "
            "skips these measurements.",
            MEASURED,
        ),
    ] = True
    sizes: tuple[int, ...] = SIZES
    batches: tuple[int, ...] = BATCHES
    minutes: Annotated[
        float | None,
        Option(
            "Stop the measurement after this many minutes, e.g. 30; if you run the same command again, the "
            "measurement continues. [default: no limit]",
            MEASURED,
        ),
    ] = None
    swept: tuple[str, ...] = ()
    timeout_s: float = 1200.0
    fresh: Annotated[
        bool,
        Option(
            "Discard the measurements of an interrupted run and start from the beginning; without this option, the "
            "run is continued.",
            MEASURED,
            "--fresh",
        ),
    ] = False
    plan: Annotated[
        Path | None,
        Option(
            "Add a table to the report with the kernels of this TensorRT plan, e.g. build/sam3-encoder.plan. [default: "
            "no plan]",
            REPORT,
        ),
    ] = None
    masks: Annotated[
        tuple[Path, ...],
        Option(
            "Add to the report the results that `neck-export masks` found for this ONNX file or plan, e.g. "
            "build/sam3-encoder.onnx; run `neck-export masks` on the file first. The option can be repeated. "
            "[default: no file]",
            REPORT,
        ),
    ] = ()
    export: Annotated[
        bool,
        Option(
            "Also measure the time and memory that `neck-export onnx` needs at 1008 x 1008 pixels, and add them to the "
            "report. This option cannot be combined with --config.",
            REPORT,
            "--export",
        ),
    ] = False
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
