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
    choose_backends,
    why_unavailable,
)
from benchmarks.measure.environment import package_versions, processor
from benchmarks.measure.host_memory import needed_bytes
from benchmarks.measure.rounds import Candidate, Pace, Point, Report
from benchmarks.measure.samples import Place, Samples
from benchmarks.measure.work_folder import Workplace, digest
from benchmarks.measure.worker_process import WorkerError
from benchmarks.options import DEFAULTS, BenchOptions
from benchmarks.roofline import encoder_parts
from engines.doctor import driver_version
from export.contract.signature import Signature
from neck.config import EncoderConfig

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
        prepared: what `Workplace.prepare` found.
        config, signature: of the main point.
        points: of the sweeps.
        backends, unavailable: all that the result lists; id -> reason of those that cannot run here.
        pace, sweep_pace: how often things run.
        folder, samples: of this benchmark.
        main, swept: the points, once `measure` is done.
    """

    main: Place

    def __init__(self, options: BenchOptions, place: Workplace, report: Report) -> None:
        started = time.monotonic()
        self.options, self.place, self.report = options, place, report
        report("the machine and the encoder")
        try:
            found = place.ask("facts")
        except WorkerError as error:
            raise BenchError(f"the machine cannot be examined: {error}") from None
        self.environment, facts = found["environment"], found["capabilities"]
        self.device: Device = _device(options, facts["cuda"])
        self.prepared = place.prepare()
        size = self._main_size()
        self.config, self.signature = place.sign(size, options.batch)
        self.points = self._sweep_points(size)
        self.swept: list[Place] = []
        named = options.backends or (QUICK[self.device] if options.quick else ())
        self.backends = choose_backends(self.device, named)
        reasons = {one.id: why_unavailable(one, facts, one.id in options.backends) for one in self.backends}
        self.unavailable = {name: reason for name, reason in reasons.items() if reason}
        self._refuse_nothing()
        self.pace, self.sweep_pace = _paces(options, self.device, started)
        self.folder, self.samples = self._open_samples()

    def _main_size(self) -> int | tuple[int, int] | None:
        config, options = self.place.config, self.options
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
            raise BenchError(f"the reference cannot run here: {self.unavailable[REFERENCE]}; use --device cpu")

    def _open_samples(self) -> tuple[Path, Samples]:
        options = self.options
        deciding = {
            "encoder": self.place.folder.name,
            "point": [self.config.image_size, options.batch],
            "pace": dataclasses.astuple(self.pace)[:4],
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
            self.report(f"{folder}: goes on after {rounds} rounds measured before (--fresh forgets them)")
        return folder, samples

    def measure(self) -> None:
        """Measures what the samples lack."""
        self._measure_rates("before")
        self.main = self._measure(self.config, self.signature, None, self.pace, self.available())
        for sweep, config, signature in self.points:
            self.swept.append(self._measure(config, signature, sweep, self.sweep_pace, self.swept_backends()))
        if not self.options.quick and time.monotonic() < self.sweep_pace.ends:
            self._measure_rates("after")

    def available(self) -> list[Backend]:
        """The backends that can run here."""
        return [one for one in self.backends if one.id not in self.unavailable]

    def _measure_rates(self, when: str) -> None:
        """The machine's rates, before the backends and after: the best counts."""
        if self.samples.last("rates", when=when) is None:
            self.report(f"the machine's own rates, {when} the backends")
            try:
                self.samples.add("rates", when=when, **self.place.ask("rates", device=self.device))
            except WorkerError as error:
                raise BenchError(f"the machine's rates cannot be measured: {error}") from None
            self.place.rest()

    def _measure(
        self, config: EncoderConfig, signature: Signature, sweep: str | None, pace: Pace, backends: Sequence[Backend]
    ) -> Place:
        """Measures one point."""
        batch, (height, width) = signature.batch.optimum, config.image_size
        place = Place(
            f"{height}x{width} batch {batch}" + (" (sweep)" if sweep else ""),
            config.image_size,
            batch,
            sweep,
            encoder_parts(config, signature, batch),
        )

        if time.monotonic() < pace.ends and self._lacks(place.name, pace, backends):
            self.place.ends = pace.ends
            candidates = self._candidates(place.name, config, signature, backends)
            # the features of the main point become pictures
            keep: Callable[[str], bool] = (lambda name: False) if sweep else (lambda name: "_pos_" not in name)
            point = Point(place.name, self.folder / place.slug, candidates, self.samples, pace, self.report, keep)
            point.measure(0 if sweep else PARTS_RUNS[self.device])
        if sweep:
            self.place.drop(config, signature)
        return place

    def _lacks(self, point: str, pace: Pace, backends: Sequence[Backend]) -> bool:
        living = (one.id for one in backends if self.samples.last("failed", point=point, backend=one.id) is None)
        return any(self.samples.whole_rounds(point, name) < pace.rounds for name in living)

    def _candidates(
        self, point: str, config: EncoderConfig, signature: Signature, backends: Sequence[Backend]
    ) -> list[Candidate]:
        """The backends of a point with what they load; one whose file cannot be made has failed."""
        self.report(f"{point}: pictures and files")
        candidates = []
        living = [one for one in backends if self.samples.last("failed", point=point, backend=one.id) is None]
        jobs = self.place.jobs(living, config, signature)
        for one in living:
            job = jobs[one.id]
            if isinstance(job, WorkerError) and job.late and time.monotonic() >= self.place.ends:
                self.report(f"{one.id}: its file is not made, the time is over; a rerun makes it")
            elif isinstance(job, WorkerError):
                reason = f"what it runs cannot be made: {job}"
                self.samples.add("failed", point=point, backend=one.id, status="failed", reason=reason)
            else:
                candidates.append(Candidate(one, job, needed_bytes(one, config, signature, signature.batch.optimum)))
        return candidates

    def _sweep_points(self, main_size: int | tuple[int, int] | None) -> list[tuple[str, EncoderConfig, Signature]]:
        """Sweep, config and signature of every point that is not the main one.

        Raises:
            BenchError: a size that cannot be, before anything is measured.
        """
        points = []
        for sweep, size, batch in self.options.sweeps:
            config, signature = self.place.sign(size if size is not None else main_size, batch)
            if (config.image_size, batch) != (self.config.image_size, self.options.batch):
                points.append((sweep, config, signature))
        return points

    def swept_backends(self) -> list[Backend]:
        """What the sweeps measure: `swept`, else those of SWEPT, that are asked; else all that need no compiler."""
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
        raise BenchError("--device cuda: torch can use no NVIDIA GPU here; look at the driver, or use --device cpu")
    if options.device == "auto":
        return "cuda" if cuda else "cpu"
    return options.device


def _paces(options: BenchOptions, device: Device, started: float) -> tuple[Pace, Pace]:
    """Of the main point and of the sweeps."""
    rounds, runs, warm_up = DEFAULTS[device, options.quick]
    rounds, runs, warm_up = options.rounds or rounds, options.runs or runs, options.warm_up or warm_up
    ends = float("inf") if options.minutes is None else started + 60 * options.minutes
    main_ends = ends if options.minutes is None or not options.sweeps else started + MAIN_SHARE * 60 * options.minutes
    warm_up_s = 1.0 if device == "cuda" else 0.0
    sweep_rounds = min(rounds, SWEEP_ROUNDS[device])
    rounds_end = started + QUICK_SECONDS if options.quick else float("inf")
    return (
        Pace(rounds, runs, warm_up, warm_up_s, options.timeout_s, main_ends, rounds_end),
        Pace(sweep_rounds, min(runs, SWEEP_RUNS), min(warm_up, SWEEP_WARM_UP), warm_up_s, options.timeout_s, ends),
    )
