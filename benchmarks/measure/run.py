"""A run of the benchmark: what was found, what is to be measured, and the samples."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.errors import BenchError
from benchmarks.measure.backends import (
    QUICK,
    REFERENCE,
    SWEPT,
    Backend,
    Device,
    RunRequest,
    choose_backends,
    why_unavailable,
)
from benchmarks.measure.environment import package_versions, processor
from benchmarks.measure.host_memory import needed_bytes
from benchmarks.measure.measure_point import MeasurePoint, Schedule
from benchmarks.measure.rounds import Report, Rounds
from benchmarks.measure.samples import Samples
from benchmarks.measure.work_folder import ArtifactCache, digest
from benchmarks.measure.worker_process import WorkerError
from benchmarks.options import DEFAULTS, BenchOptions
from engines.doctor import driver_version

MAIN_SHARE = 0.6
"""Of a run of `minutes`, where sweeps follow the main point."""

SWEEP_ROUNDS, SWEEP_RUNS, SWEEP_WARM_UP = {"cpu": 1, "cuda": 3}, 5, 3
"""A CPU takes minutes for a batch of 8 at full size."""

QUICK_SECONDS = 110.0
"""After so long `--quick` begins no further round, so that it ends within three minutes on a slow machine, too."""

PARTS_RUNS = {"cpu": 1, "cuda": 5}


class Run:
    """One run; a context that closes the samples.

    Attributes:
        options, place: what is asked, and where the encoder lies.
        environment, device: the machine.
        main, swept: the encoder's own point, and those of the sweeps that are others.
        backends, unavailable: all that the result lists; id -> reason of those that cannot run here.
        folder, samples: of this benchmark.
    """

    def __init__(self, options: BenchOptions, place: ArtifactCache, report: Report) -> None:
        started = time.monotonic()
        self.options, self.place, self.report = options, place, report
        report("examining the machine and the encoder")
        try:
            found = place.ask("facts")
        except WorkerError as error:
            raise BenchError(f"the process that examines the machine failed: {error}") from None
        self.environment, facts = found["environment"], found["capabilities"]
        self.device: Device = _device(options, facts["cuda"])
        place.prepare()
        schedule, sweep_pace = _paces(options, self.device, started)
        size = self._main_size()
        self.main = place.point(size, options.batch, schedule)
        # a size that cannot be is an error before anything is measured
        points = [
            place.point(size if side is None else side, batch, sweep_pace, sweep)
            for sweep, side, batch in options.sweeps
        ]
        self.swept = [one for one in points if one.files != self.main.files]
        named = options.backends or (QUICK[self.device] if options.quick else ())
        self.backends = choose_backends(self.device, named)
        reasons = {one.id: why_unavailable(one, facts, one.id in options.backends) for one in self.backends}
        self.unavailable = {name: reason for name, reason in reasons.items() if reason}
        self._refuse_nothing()
        self.folder, self.samples = self._open_samples()

    def _main_size(self) -> int | tuple[int, int] | None:
        config, options = self.place.prepared.config, self.options
        small = 24 * config.patch_size
        if options.image_size is None and options.quick and self.device == "cpu" and min(config.image_size) > small:
            return small
        return options.image_size

    def _refuse_nothing(self) -> None:
        """Refuses a run whose every asked backend is unavailable."""
        asked = [one for one in self.backends if not self.options.backends or one.id in self.options.backends]
        if all(one.id in self.unavailable for one in asked):
            reasons = "; ".join(f"{one.id}: {self.unavailable[one.id]}" for one in asked)
            raise BenchError(f"no backend can run here: {reasons}")
        if REFERENCE in self.unavailable:
            raise BenchError(
                f"the backend {REFERENCE}, with which every other backend is compared, cannot run on the device "
                f"{self.device}: {self.unavailable[REFERENCE]}. Use --device cpu"
            )

    def _open_samples(self) -> tuple[Path, Samples]:
        options = self.options
        deciding = {
            "encoder": self.place.folder.name,
            "point": [self.main.image_size, options.batch],
            "pace": dataclasses.astuple(self.main.schedule)[:4],
            "machine": [processor(), driver_version(), package_versions()],
        }
        key = digest(deciding)
        folder = self.place.folder.parent / f"run-{key}"
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        samples = Samples(folder / "samples.jsonl", key)
        if samples.resumed:
            rounds = len(samples.all("round"))
            self.report(f"{folder}: continuing an interrupted run after {rounds} rounds; use --fresh to start again")
        return folder, samples

    def measure(self) -> None:
        """Measures everything that is missing in the samples."""
        self._measure_rates("before")
        self._measure(self.main, self.available())
        for point in self.swept:
            self._measure(point, self.swept_backends())
        ends = (self.swept or [self.main])[-1].schedule.ends
        if not self.options.quick and time.monotonic() < ends:
            self._measure_rates("after")

    def available(self) -> list[Backend]:
        """The backends that can run here."""
        return [one for one in self.backends if one.id not in self.unavailable]

    def _measure_rates(self, when: str) -> None:
        """The machine's rates, before the backends and after: the best counts."""
        if self.samples.last("rates", when=when) is None:
            self.report(
                f"measuring how fast this machine multiplies matrices and copies memory ({when} the backends are "
                "measured)"
            )
            try:
                self.samples.add("rates", when=when, **self.place.ask("rates", device=self.device))
            except WorkerError as error:
                raise BenchError(
                    f"the matrix multiplication and copy rates of this machine cannot be measured: {error}"
                ) from None
            self.place.rest()

    def _measure(self, point: MeasurePoint, backends: Sequence[Backend]) -> None:
        """Measures what one point lacks."""
        living = [one for one in backends if self.samples.last("failed", point=point.name, backend=one.id) is None]
        lacking = any(self.samples.whole_rounds(point.name, one.id) < point.schedule.rounds for one in living)
        if lacking and time.monotonic() < point.schedule.ends:
            jobs = self._jobs(point, living)
            needed = {name: needed_bytes(job.backend, point) for name, job in jobs.items()}
            # the features of the main point become images
            keep: Callable[[str], bool] = (lambda name: False) if point.sweep else (lambda name: "_pos_" not in name)
            rounds = Rounds(point, self.folder / point.slug, jobs, needed, self.samples, self.report, keep)
            rounds.measure(0 if point.sweep else PARTS_RUNS[self.device])
        if point.sweep:
            self.place.drop(point)

    def _jobs(self, point: MeasurePoint, backends: Sequence[Backend]) -> dict[str, RunRequest]:
        """What the backends of a point load; one whose file cannot be made has failed."""
        self.report(f"{point.name}: preparing the input images, ONNX files and TensorRT plans that the backends load")
        found = {}
        for name, job in self.place.jobs(backends, point).items():
            if isinstance(job, RunRequest):
                found[name] = job
            elif job.late and time.monotonic() >= point.schedule.ends:
                self.report(
                    f"{name}: the time limit was reached before the file for this backend was exported; run the "
                    "same command again, which keeps the finished measurements and continues with the rest"
                )
            else:
                reason = f"the ONNX file or plan for this backend could not be made. The error was: {job}"
                self.samples.add("failed", point=point.name, backend=name, status="failed", reason=reason)
        return found

    def swept_backends(self) -> list[Backend]:
        """The backends of the sweeps: `swept`, else the requested ones of SWEPT, else all that need no compiler."""
        asked = [one for one in self.available() if one.id != REFERENCE]
        swept = [one for one in asked if one.id in (self.options.swept or SWEPT[self.device])]
        swept = swept or [one for one in asked if one.runtime not in ("compile", "compile-max")]
        return [one for one in self.available() if one.id == REFERENCE or one in swept]

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.samples.close()


def _device(options: BenchOptions, cuda: bool) -> Device:
    if options.device == "cuda" and not cuda:
        raise BenchError(
            "--device cuda: torch finds no usable NVIDIA GPU; check the driver with nvidia-smi, or use --device cpu"
        )
    if options.device == "auto":
        return "cuda" if cuda else "cpu"
    return options.device


def _paces(options: BenchOptions, device: Device, started: float) -> tuple[Schedule, Schedule]:
    """Of the main point and of the sweeps."""
    rounds, runs, warm_up = DEFAULTS[device, options.quick]
    rounds, runs, warm_up = options.rounds or rounds, options.runs or runs, options.warm_up or warm_up
    ends = float("inf") if options.minutes is None else started + 60 * options.minutes
    main_ends = ends if options.minutes is None or not options.sweeps else started + MAIN_SHARE * 60 * options.minutes
    warm_up_s = 1.0 if device == "cuda" else 0.0
    sweep_rounds = min(rounds, SWEEP_ROUNDS[device])
    rounds_end = started + QUICK_SECONDS if options.quick else float("inf")
    return (
        Schedule(rounds, runs, warm_up, warm_up_s, options.timeout_s, main_ends, rounds_end),
        Schedule(sweep_rounds, min(runs, SWEEP_RUNS), min(warm_up, SWEEP_WARM_UP), warm_up_s, options.timeout_s, ends),
    )
