"""`neck-export bench`: every backend measured in turn, compared with PyTorch, set beside what the machine can do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError
from benchmarks.measure.run import Run
from benchmarks.measure.work_folder import ArtifactCache
from benchmarks.options import SELECTION, BenchOptions
from benchmarks.results.result import make_result
from engines.builder.plan_kind import is_plan
from engines.layers.layer_report import layers_path, read_layers
from export.contract.atomic import locked
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest

COUNTS = ("images", "objects", "lost", "found")
SHOWN = ("passed", "gate", *COUNTS, "mean_iou", "worst_iou", "worst_image", "method")

__all__ = ["BenchError", "BenchOptions", "run_bench"]


def run_bench(options: BenchOptions, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures every backend and returns the result, in the form of benchmarks/results/result.schema.json.

    Samples are stored as they come, so that a run that was killed goes on where it was when it is started again.

    Args:
        options: what to measure.
        report: told of every step.

    Raises:
        BenchError: options that cannot be, no verdict of masks beside a file, no backend that can run here,
            another run at work in the same folder.
    """
    masks = read_masks(options.masks)
    with open_run(options, report) as run:
        run.measure()
        return make_result(run) | {"masks": masks or None}


@contextlib.contextmanager
def open_run(options: BenchOptions, report: Callable[[str], None] = lambda line: None) -> Iterator[Run]:
    """A run whose `measure` adds to the samples; `run_bench` says what it raises."""
    check_options(options)
    work = options.output / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, wait=False), ArtifactCache(work, options) as place, Run(options, place, report) as run:
            yield run
    except BlockingIOError:
        raise BenchError(
            f"{work}: another benchmark is running in this folder; wait until it has finished, or choose another "
            "--output"
        ) from None
    except OSError as error:
        where, why = error.filename or work, error.strerror or str(error)
        raise BenchError(
            f"{where}: the file or folder cannot be used ({why}); check its permissions and the free disk space, or "
            "choose another --output"
        ) from None


def check_options(options: BenchOptions) -> None:
    """Refuses what cannot be.

    Raises:
        BenchError: saying what can.
        BuildError: --plan names another tool's plan.
    """
    counts = {name: getattr(options, name) for name in ("batch", "rounds", "runs", "warm_up")}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise BenchError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    if options.positions == "file":
        raise BenchError(
            "--positions=file cannot be measured. The times would be the same as with --positions none, because in "
            "neither case does the encoder compute the position encodings. Use --positions none, or use --positions "
            "graph to measure the encoder with its position encodings"
        )
    chosen = [f"--{name.replace('_', '-')}" for name in SELECTION if getattr(options, name) is not None]
    if options.checkpoint is None and chosen:
        raise BenchError(
            f"{', '.join(chosen)} cannot be combined with random weights; pass a checkpoint file with --checkpoint, "
            f"or leave out {', '.join(chosen)}"
        )
    if options.plan and (not is_plan(options.plan) or read_layers(options.plan) is None):
        raise BenchError(
            f"--plan {options.plan}: the file is not a TensorRT plan, or its layer report {layers_path(options.plan)} "
            "is missing; build the plan with `neck-export trt`, which also writes the layer report"
        )
    if options.export and options.config:
        raise BenchError(
            "--export measures the exporter at full size only, so it cannot be combined with --config; leave out one "
            "of these two options"
        )


def read_masks(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The verdicts of `neck-export masks` on files, in the form of result.schema.json.

    Args:
        files: ONNX files or plans, their manifests beside them.

    Raises:
        BenchError: one that was not judged, or has changed since.
    """
    return [_read_verdict(file) for file in files]


def _read_verdict(file: Path) -> dict[str, Any]:
    where = manifest_path(file)
    try:
        manifest = read_manifest(where, "plan" if is_plan(file) else "onnx")
        check_files(where, manifest, hashes=False)
    except ManifestError as error:
        raise BenchError(f"--masks {file}: {error}") from None
    found = manifest.get("masks")
    if not found:
        raise BenchError(
            f"--masks {file}: the manifest of this encoder contains no comparison of masks yet; first run "
            f"`neck-export masks {file} --model MODEL --images FOLDER --prompt TEXT`"
        )
    return {"file": file.name, "precision": manifest["precision"], **{name: found.get(name) for name in SHOWN}}
