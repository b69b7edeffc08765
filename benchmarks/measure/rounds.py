"""One point (image size, batch) measured: every backend in turn, round by round, each in a worker of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.backends import REFERENCE, RunRequest
from benchmarks.measure.environment import available_bytes
from benchmarks.measure.measure_point import MeasurePoint
from benchmarks.measure.samples import Samples
from benchmarks.measure.worker_process import Worker, WorkerError
from export.verification.fidelity import FidelityError, compare

Report = Callable[[str], None]
"""Takes a line that says what is being done."""

GRACE_SECONDS = 10.0
"""What a worker is given for its peaks when the run's time is over."""

SPARE_BYTES = 1 << 30
"""Left free beside what a worker is known or thought to need."""


class Rounds:
    """The measurement of one point; `measure` does it.

    Args:
        point: where.
        folder: for the workers' outputs and logs.
        jobs: what the workers load, by backend, the reference first.
        needed: the memory that each likely takes.
        keep: which outputs stay in `folder` for the report's images.
    """

    def __init__(
        self,
        point: MeasurePoint,
        folder: Path,
        jobs: Mapping[str, RunRequest],
        needed: Mapping[str, int],
        samples: Samples,
        report: Report,
        keep: Callable[[str], bool],
    ) -> None:
        self.name, self.schedule, self.folder, self.jobs, self.samples = (
            point.name,
            point.schedule,
            folder,
            jobs,
            samples,
        )
        self.report, self.keep = report, keep
        self._needed = dict(needed)
        self._loaded: dict[str, Worker] = {}
        self._left: set[str] = set()  # not tried again in this run; a rerun does

    def measure(self, parts_runs: int = 0) -> None:
        """Measures the rounds of each backend that are missing in the samples.

        What was left out for want of time in an earlier run has rounds of its own with the reference, since a ratio is
        of runs in the same round.

        Args:
            parts_runs: runs of the reference that tell the time of each part; 0 for none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            while lacking := self._lacking():
                number = self.samples.rounds(self.name)
                last = number + max(lacking.values())
                if self._over() or (number and time.monotonic() > self.schedule.rounds_end):
                    self.report(
                        f"{self.name}: the time limit was reached after {number} of {last} rounds; run the command "
                        "again to continue"
                    )
                    break
                self.report(f"{self.name}: measuring round {number + 1} of {last}")
                for name in lacking:
                    if not self._over() and not self._given_up(name):
                        self._visit(name, number)
                if not self._over():  # a round that was cut is measured again whole
                    self.samples.add("round", point=self.name, round=number)
            parts = self.samples.last("parts", point=self.name)
            if parts_runs and not parts and not self._given_up(REFERENCE) and not self._over():
                self._measure_parts(parts_runs)
            for name in list(self._loaded):
                self._unload(name)
        finally:
            for name in list(self._loaded):  # interrupted: they may be in the middle of a run
                self._end(name)
        self._drop_outputs()

    def _lacking(self) -> dict[str, int]:
        """The backends of the next round with how many rounds they lack; those that once took too long come last."""
        living = [name for name in self.jobs if not self._given_up(name)]
        lacking = {name: self.schedule.rounds - self.samples.whole_rounds(self.name, name) for name in living}
        if all(rounds <= 0 for rounds in lacking.values()):
            return {}
        chosen = [name for name in living if lacking[name] > 0 or name == REFERENCE]
        chosen.sort(key=lambda name: self._has("cut", name))
        return {name: lacking[name] for name in chosen}

    def _add(self, kind: str, name: str, **values: Any) -> None:
        self.samples.add(kind, point=self.name, backend=name, **values)

    def _has(self, kind: str, name: str) -> bool:
        return self.samples.last(kind, point=self.name, backend=name) is not None

    def _over(self) -> bool:
        return time.monotonic() >= self.schedule.ends

    def _timeout(self, name: str, grace_s: float = 0.1) -> float:
        """How long a worker may take now: twice as long as when it was last late."""
        late = len(self.samples.all("cut", point=self.name, backend=name, late=True))
        return min(self.schedule.timeout_s * 2**late, max(self.schedule.ends - time.monotonic(), grace_s))

    def _given_up(self, name: str) -> bool:
        return name in self._left or self._has("failed", name)

    def _visit(self, name: str, number: int) -> None:
        """One backend's turn; where memory runs out, once more with the others unloaded."""
        for attempt in ("shared", "alone"):
            try:
                self._take_turn(name, number)
                return
            except WorkerError as error:
                self._end(name)
                if error.late:
                    self._leave(name, str(error))
                    return
                others = [one for one in self._loaded if one != name]
                if error.memory and others and attempt == "shared":
                    self.report(
                        f"{name}: {error}; unloading the other backends to free memory, then measuring {name} again"
                    )
                    for other in others:
                        self._unload(other)
                    continue
                self._give_up(name, str(error))
                return
            except FidelityError as error:
                self._end(name)
                self._give_up(name, f"the outputs cannot be compared with the reference: {error}")
                return

    def _give_up(self, name: str, reason: str) -> None:
        self.report(f"{name}: the measurement failed: {reason}")
        self._add("failed", name, status="failed", reason=reason)

    def _leave(self, name: str, reason: str) -> None:
        """Leaves a backend that was too slow to a rerun: it may need a second more than it had."""
        self._left.add(name)
        if self._over():
            self.report(
                f"{name}: this round was stopped, because the time limit was reached; run the command again to repeat "
                "the round"
            )
            self._add("cut", name)
            return
        self.report(f"{name}: {reason}; if you run the command again, this backend is allowed twice the time")
        self._add("cut", name, late=True, reason=reason)

    def _take_turn(self, name: str, number: int) -> None:
        if name not in self._loaded and not self._load(name):
            return
        worker = self._loaded[name]
        times = worker.ask("run", self._timeout(name), count=self.schedule.runs)
        self._add("times", name, round=number, times_ms=times)
        self._compare(name, worker)

    def _load(self, name: str) -> bool:
        """Loads and warms up."""
        if not self._make_room(name):
            return False
        job = self.jobs[name]
        cuda = job.backend.device == "cuda"
        worker = Worker(self.folder / f"{name}.log", {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor" / name)})
        self._loaded[name] = worker
        loaded = worker.ask("load", self._timeout(name), job=job, most_bytes=None if cuda else available_bytes())
        least_s = self.schedule.warm_up_s if cuda else 0.0
        if self.schedule.warm_up:
            worker.ask("run", self._timeout(name), count=self.schedule.warm_up, least_s=least_s)
        build_s = loaded["build_s"] if loaded["build_s"] is not None else job.build_s
        self._add("load", name, **loaded | {"build_s": build_s, "file_bytes": job.file_bytes})
        return True

    def _compare(self, name: str, worker: Worker) -> None:
        """Where it was not done yet, writes the outputs and their error figures against the reference's."""
        folder, reference = self.folder / name, self.folder / REFERENCE
        wanted = any(not self._judged(other) for other in self.jobs)
        if not (wanted if name == REFERENCE else not self._judged(name)):
            return
        names = worker.ask("outputs", self._timeout(name), folder=folder)
        found = {one: np.load(folder / f"{one}.npy", mmap_mode="r") for one in names}
        if name == REFERENCE or not reference.is_dir():
            if not self._judged(name):
                self._add("errors", name, errors=[], passed=None)
            return
        expected = {one: np.load(reference / f"{one}.npy", mmap_mode="r") for one in names}
        verdict = compare(expected, found, self.jobs[name].backend.precision, f"PyTorch FP32 compared with {name}")
        errors = [comparison.to_dict() for comparison in verdict.comparisons]
        self._add("errors", name, errors=errors, passed=verdict.passed)
        for one in names:
            if not self.keep(one):
                (folder / f"{one}.npy").unlink()

    def _judged(self, name: str) -> bool:
        return self._given_up(name) or self._has("errors", name)

    def _make_room(self, name: str) -> bool:
        """Unloads others until there is memory, first those whose turn is furthest away; none where it is in vain.

        What runs on a GPU needs device memory above all, and the free memory of some hosts grows only as it is used: on
        a GPU nothing is refused, and what runs out of memory is tried again alone.
        """
        if self.jobs[name].backend.device == "cuda":
            return True
        order, needed = list(self.jobs), self._needed[name]
        most = available_bytes() + sum(worker.resident_bytes() for worker in self._loaded.values())
        if most < needed:
            reason = f"this backend needs about {needed / 1e9:.1f} GB of memory, but only {most / 1e9:.1f} GB are free"
            self.report(f"{name}: {reason}")
            self._add("short", name, reason=reason)
            self._left.add(name)
            return False
        while available_bytes() < needed + SPARE_BYTES and self._loaded:
            place = order.index(name)
            furthest = max(self._loaded, key=lambda other: (order.index(other) - place) % len(order))
            self.report(f"{furthest}: unloaded to free memory for {name}")
            self._unload(furthest)
        return True

    def _unload(self, name: str) -> None:
        """Ends a worker, its peaks noted; they are the better estimate from then on."""
        try:
            peaks = self._loaded[name].ask("memory", self._timeout(name, GRACE_SECONDS))
            self._add("memory", name, **peaks)
            self._needed[name] = max(peaks["peak_host_bytes"], 1)
        except WorkerError as error:
            self.report(f"{name}: the peak memory cannot be measured: {error}")
        self._end(name)

    def _end(self, name: str) -> None:
        worker = self._loaded.pop(name, None)
        if worker:
            worker.close()

    def _measure_parts(self, runs: int) -> None:
        try:
            if REFERENCE in self._loaded or self._load(REFERENCE):
                found = self._loaded[REFERENCE].ask("parts", self._timeout(REFERENCE), count=runs)
                self.samples.add("parts", point=self.name, parts_ms=found)
        except (WorkerError, FidelityError) as error:
            self.report(f"the time of each part of the encoder cannot be measured: {error}")
            self._end(REFERENCE)

    def _drop_outputs(self) -> None:
        """Frees the disk of what nothing reads any more."""
        for name in self.jobs:
            for file in (self.folder / name).glob("*.npy"):
                if not self.keep(file.stem):
                    file.unlink()
        if not self._left:  # what a late compile has made spares its rerun half of the work
            shutil.rmtree(self.folder / "inductor", ignore_errors=True)
