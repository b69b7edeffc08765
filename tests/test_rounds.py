"""One point, round by round, with workers that only say that they work: memory, time, what a second run takes up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config

import benchmarks.measure.rounds
from benchmarks.measure.backends import REFERENCE, Device, RunRequest, backends_for
from benchmarks.measure.measure_point import MeasurePoint, Schedule
from benchmarks.measure.rounds import Rounds
from benchmarks.measure.samples import Samples
from benchmarks.measure.worker_process import WorkerError
from benchmarks.options import BenchOptions
from benchmarks.results.rows import is_waiting, make_row
from export.contract.signature import encoder_signature

RATES = {"flops_per_s": {"fp32": 1e11}, "copy_bytes_per_s": 1e10}


class FakeWorker:
    """Answers at once; it says which are loaded."""

    loaded: list[str] = []  # noqa: RUF012 - shared on purpose, emptied by the test
    history: list[str] = []  # noqa: RUF012
    clock = 0.0  # the time of the tests, which a run advances by a second
    hangs: set[str] = set()  # noqa: RUF012 - what gives no answer to a load
    timeouts: list[float] = []  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012 - whose outputs were asked for
    kills: dict[str, int] = {}  # noqa: RUF012 - how many runs of a backend end it

    def __init__(self, log: Path, environment: dict[str, str]) -> None:
        self.name = log.stem
        self.loaded.append(self.name)
        self.history.append(f"+{self.name}")

    def resident_bytes(self) -> int:
        return 10 << 30

    def ask(self, command: str, timeout_s: float, **values: Any) -> Any:
        self.timeouts.append(timeout_s)
        if command == "load" and self.name in self.hangs:
            FakeWorker.clock += timeout_s
            raise WorkerError(f"no answer to `load` in {timeout_s} s", late=True)
        if command == "outputs":
            self.written.append(self.name)
            values["folder"].mkdir(exist_ok=True)
            np.save(values["folder"] / "x.npy", np.ones(3, np.float32))
        if command == "run":
            if self.kills.get(self.name, 0):
                self.kills[self.name] -= 1
                raise WorkerError("killed (SIGKILL)", memory=True)
            self.history.append(self.name)
            FakeWorker.clock += 1
        return {
            "load": {"load_s": 1.0, "build_s": None, "note": None},
            "run": [1.0],
            "outputs": ["x"],
            "memory": {"peak_host_bytes": 10 << 30, "peak_device_bytes": None},
        }[command]

    def close(self) -> None:
        self.loaded.remove(self.name)
        self.history.append(f"-{self.name}")


def point_at(schedule: Schedule) -> MeasurePoint:
    """The tiny encoder's own size."""
    config = tiny_config()
    return MeasurePoint("p", None, config, encoder_signature(config), schedule)


def fake_point(
    folder: Path,
    needed: int,
    monkeypatch: pytest.MonkeyPatch,
    ends: float = 1e18,
    machine: int = 25,
    timeout_s: float = 5.0,
    device: Device = "cpu",
    **schedule: float,
) -> Samples:
    """Three backends that take 10 GB each on a machine of so many; their clock begins at 0 and `ends` is its time."""
    FakeWorker.loaded, FakeWorker.history, FakeWorker.clock, FakeWorker.timeouts = [], [], 0.0, []
    FakeWorker.written = []
    monkeypatch.setattr(benchmarks.measure.rounds, "time", SimpleNamespace(monotonic=lambda: FakeWorker.clock))
    monkeypatch.setattr(benchmarks.measure.rounds, "Worker", FakeWorker)
    monkeypatch.setattr(
        benchmarks.measure.rounds, "available_bytes", lambda: (machine - 10 * len(FakeWorker.loaded)) << 30
    )
    samples = Samples(folder / "samples.jsonl", "key")
    names = [REFERENCE, "b", "c"]
    backend = backends_for(device)[0]
    point = point_at(Schedule(rounds=2, runs=1, warm_up=1, warm_up_s=0.0, timeout_s=timeout_s, ends=ends, **schedule))
    encoder = (BenchOptions(folder), point.config, point.signature)
    jobs = {name: RunRequest(dataclasses.replace(backend, id=name), *encoder, folder / "image.npy") for name in names}
    keep: Callable[[str], bool] = lambda name: True  # noqa: E731
    with samples:
        Rounds(point, folder / "p", jobs, dict.fromkeys(names, needed), samples, print, keep).measure()
    return samples


def test_where_memory_is_short_the_furthest_turn_is_unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = fake_point(tmp_path, 10 << 30, monkeypatch)
    a, b, c = REFERENCE, "b", "c"
    first = [f"+{a}", a, a, f"+{b}", b, b, f"-{b}", f"+{c}", c, c]  # a warm-up run and a timed one after each load
    second = [a, f"-{a}", f"+{b}", b, b, c]
    assert FakeWorker.history[: len(first) + len(second)] == first + second
    assert not FakeWorker.loaded
    assert [len(samples.all("load", backend=name)) for name in (a, b, c)] == [1, 2, 1]
    assert all(len(samples.times("p", name)) == 2 for name in (a, b, c))


def test_what_fits_stays_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    samples = fake_point(tmp_path, 1 << 20, monkeypatch, machine=100)
    assert [len(samples.all("load", backend=name)) for name in (REFERENCE, "b", "c")] == [1, 1, 1]
    assert FakeWorker.written == [REFERENCE, "b", "c"]  # in the first round alone


@pytest.mark.parametrize("kills", [1, 2])
def test_a_killed_backend_is_tried_once_more_alone(kills: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "kills", {"b": kills})
    samples = fake_point(tmp_path, 1 << 20, monkeypatch, machine=100)
    a, b, c = REFERENCE, "b", "c"
    alone = ["+b", f"-{b}", f"-{a}", "+b"]
    assert FakeWorker.history[:7] == [f"+{a}", a, a, *alone]
    failed = samples.last("failed", backend=b)
    assert (failed is None) == (kills == 1) and len(samples.times("p", b)) == (2 if kills == 1 else 0)
    assert failed is None or "SIGKILL" in failed["reason"]
    assert all(len(samples.times("p", name)) == 2 for name in (a, c))


def test_where_the_time_is_over_there_are_fewer_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = fake_point(tmp_path, 1 << 20, monkeypatch, machine=100, rounds_end=0.0)
    assert samples.rounds("p") == 1 and len(samples.times("p", "c")) == 1


def test_what_cannot_fit_unloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = fake_point(tmp_path, 26 << 30, monkeypatch)
    assert FakeWorker.history == []
    row = row_of(samples, "b")
    assert (
        row["status"] == "unavailable" and "needs about 27.9 GB of memory, but only 26.8 GB are free" in row["reason"]
    )
    again = fake_point(tmp_path, 26 << 30, monkeypatch, machine=100)  # others have ended meanwhile
    assert row_of(again, "b")["status"] == "measured"


def test_on_a_gpu_host_memory_refuses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some machines tell little free memory, which grows as it is used; on a CPU the same is the end (above)."""
    samples = fake_point(tmp_path, 26 << 30, monkeypatch, device="cuda")
    assert all(row_of(samples, name)["status"] == "measured" for name in (REFERENCE, "b", "c"))
    assert [len(samples.all("load", backend=name)) for name in (REFERENCE, "b", "c")] == [1, 1, 1]


def test_an_interrupted_run_ends_its_workers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes in the middle of a run, whose answer must not be taken for that of a later question."""
    ask = FakeWorker.ask

    def asked(worker: FakeWorker, command: str, timeout_s: float, **values: Any) -> Any:
        if worker.name == "c" and command == "run":
            raise KeyboardInterrupt
        assert command != "memory"
        return ask(worker, command, timeout_s, **values)

    monkeypatch.setattr(FakeWorker, "ask", asked)
    with pytest.raises(KeyboardInterrupt):
        fake_point(tmp_path, 1 << 20, monkeypatch, machine=100)
    assert not FakeWorker.loaded and FakeWorker.history[-1].startswith("-")


def in_time(folder: Path, ends: float, monkeypatch: pytest.MonkeyPatch, timeout_s: float = 5.0) -> Samples:
    """Room for all three."""
    return fake_point(folder, 1 << 20, monkeypatch, ends, machine=100, timeout_s=timeout_s)


def row_of(samples: Samples, name: str) -> dict[str, Any]:
    """A backend's row at the point."""
    backend = dataclasses.replace(backends_for("cpu")[0], id=name)
    return make_row(backend, point_at(Schedule(2, 1, 1, 0.0, 1.0, 0.0)), samples, RATES)


def test_backends_that_are_not_begun_in_time_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = in_time(tmp_path, 0.0, monkeypatch)
    assert FakeWorker.history == []
    row = row_of(samples, "b")
    assert row["status"] == "unavailable" and row["reason"].startswith("not started: this run reached its time limit")
    assert samples.last("failed") is None  # nothing that a rerun would find


def test_a_second_run_begins_what_the_first_had_no_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up and a timed run of each take two seconds: of the first round there is time for two backends."""
    first = in_time(tmp_path, 4.0, monkeypatch)
    assert first.rounds("p") == 0 and row_of(first, "c")["status"] == "unavailable"
    assert row_of(first, "b")["note"].count("1 of 2 rounds") == 1
    second = in_time(tmp_path, 1e18, monkeypatch)
    assert [len(second.times("p", name)) for name in (REFERENCE, "b", "c")] == [2, 2, 2]
    assert row_of(second, "c")["status"] == "measured" and row_of(second, "c")["note"] is None


def test_a_round_that_was_cut_is_measured_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round takes six seconds and the second three: there is time for two of its backends."""
    first = in_time(tmp_path, 8.0, monkeypatch)
    assert first.rounds("p") == 1 and list(first.by_round("p", "b")) == [0, 1]
    second = in_time(tmp_path, 1e18, monkeypatch)
    assert [len(second.all("times", backend=name)) for name in (REFERENCE, "b", "c")] == [3, 3, 2]


def test_a_row_that_comes_late_has_rounds_of_its_own_with_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ratio is of runs in the same round: none of the rounds in which it was not there."""
    with Samples(tmp_path / "samples.jsonl", "key") as samples:
        for number in range(2):
            for name in (REFERENCE, "b"):
                samples.add("times", point="p", backend=name, round=number, times_ms=[100.0])
            samples.add("round", point="p", round=number)
        for name in (REFERENCE, "b"):
            samples.add("errors", point="p", backend=name, errors=[], passed=True)
    found = in_time(tmp_path, 1e18, monkeypatch)
    assert "b" not in FakeWorker.history and found.rounds("p") == 4
    assert list(found.by_round("p", "c")) == [2, 3] and list(found.by_round("p", REFERENCE)) == [0, 1, 2, 3]
    assert row_of(found, "c")["ratio"]["median"] == 1.0  # 0.01 where the first rounds were taken
    assert row_of(found, "c")["errors"] is not None
    in_time(tmp_path, 1e18, monkeypatch)
    assert FakeWorker.history == []


def test_no_row_takes_more_than_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWorker, "hangs", {"b"})
    samples = in_time(tmp_path, 5.0, monkeypatch, timeout_s=1000.0)
    assert FakeWorker.clock == 5.0 and not FakeWorker.loaded
    reason = row_of(samples, "b")["reason"]
    assert row_of(samples, "b")["status"] == "unavailable" and reason.startswith(
        "not finished: this run reached its time limit"
    )
    # what was ended comes last in the next run, so that it cannot take the time of others again
    again = in_time(tmp_path, 20.0, monkeypatch, timeout_s=1000.0)
    assert len(again.times("p", "c")) == 1 and FakeWorker.clock == 20.0
    monkeypatch.setattr(FakeWorker, "hangs", set())
    last = in_time(tmp_path, 1e18, monkeypatch)
    assert [len(last.times("p", name)) for name in (REFERENCE, "b", "c")] == [2, 2, 2]


def test_what_is_late_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile that takes 91 s of its 90 s: it is left alone in this run, and a rerun gives it twice the time."""
    monkeypatch.setattr(FakeWorker, "hangs", {"b"})
    first = in_time(tmp_path, 1e18, monkeypatch)
    row = row_of(first, "b")
    assert row["status"] == "unavailable" and is_waiting(row) and "no answer to `load` in 5" in row["reason"]
    assert len(first.times("p", "c")) == 2 and FakeWorker.history.count("+b") == 1
    second = in_time(tmp_path, 1e18, monkeypatch)
    assert FakeWorker.history.count("+b") == 1 and 10.0 in FakeWorker.timeouts and is_waiting(row_of(second, "b"))
    monkeypatch.setattr(FakeWorker, "hangs", set())
    third = in_time(tmp_path, 1e18, monkeypatch)
    assert row_of(third, "b")["status"] == "measured" and 20.0 in FakeWorker.timeouts


def test_what_ends_in_an_error_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(FakeWorker, "kills", {"b": 2})
    samples = in_time(tmp_path, 1e18, monkeypatch)
    assert row_of(samples, "b")["status"] == "failed" and not is_waiting(row_of(samples, "b"))
    again = in_time(tmp_path, 1e18, monkeypatch)
    assert FakeWorker.history == [] and row_of(again, "b")["status"] == "failed"


def test_a_runners_note_is_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = in_time(tmp_path, 1e18, monkeypatch)
    (line,) = samples.all("load", backend="b")
    assert row_of(samples, "b")["note"] is None
    line["note"] = "no CUDA graph (planted)"
    assert row_of(samples, "b")["note"] == "no CUDA graph (planted)"
