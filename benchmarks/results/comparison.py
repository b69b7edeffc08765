"""Two results of the same machine and encoder: what got slower or less exact."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.errors import BenchError
from benchmarks.results.result_files import Result, refuse_other_encoder

LEAST_SPREAD = 0.03
"""Of the median: the quartiles of three to five runs may fall together by chance."""

EXACT_FACTOR = 1.5
"""An error may grow by this before it counts: other kernels sum in another order, which is no loss."""

EXACT_FLOOR = 1e-6
"""Relative L2 of FP32 sums in another order; below it no error is told from another."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A row that got worse.

    Attributes:
        machine, backend, label: which row.
        image_size, batch: at which size.
        kind: what got worse; `lost` is a row that was measured and no longer is.
        old, new: medians in milliseconds, or relative L2; None where there is none.
        beyond: what `new - old` had to exceed, in the same unit.
        what: the output, or why the row is lost.
    """

    machine: str
    backend: str
    label: str
    image_size: tuple[int, int]
    batch: int
    kind: Literal["slower", "less exact", "lost"]
    old: float | None
    new: float | None
    beyond: float | None
    what: str | None = None

    def __str__(self) -> str:
        size = f"{self.label} at {self.image_size[0]} x {self.image_size[1]}, batch {self.batch} ({self.machine})"
        if self.kind == "slower" and self.old and self.new and self.beyond:
            return (
                f"{size}: the median latency grew from {self.old:.4g} to {self.new:.4g} ms "
                f"({self.new / self.old - 1:+.1%}); the spread between runs is {self.beyond:.3g} ms"
            )
        if self.kind == "less exact":
            new = "not finite" if self.new is None else f"{self.new:.3g}"
            old = "not finite" if self.old is None else f"{self.old:.3g}"
            return (
                f"{size}: the output {self.what} became less accurate. The relative L2 error of the output is {old} in "
                f"the old result and {new} in the new result"
            )
        return f"{size}: the old result contains measurements that are missing from the new result: {self.what}"


def compare_results(new: Result, old: Result) -> list[Change]:
    """What became slower or less accurate from `old` to `new`, beyond the spread.

    A row is its machine (processor, cores, GPU), backend, size and batch. It is slower where its median exceeds the old
    one by more than both runs' spreads together, a spread being the distance from the 25th to the 75th percentile of
    the row's own timed runs, LEAST_SPREAD of its median at least. Normal noise of 10 % exceeds that by chance in 5
    rows of 100 at three runs each, in 2 at five, in 0.05 at ten (simulated); noise of 1 % never. It is less exact where
    an output's relative L2 grows by more than EXACT_FACTOR above EXACT_FLOOR, or an output that passed does not. A row
    that was measured and now is not is lost; a row that the new result was not asked for is not compared, nor is one
    that is new.

    Raises:
        BenchError: different encoders, or no row on the same machine.
    """
    refuse_other_encoder(new, old, "new result", "old result")
    before = {_key(old, row): row for row in old["rows"] if row["status"] == "measured"}
    after = {_key(new, row): row for row in new["rows"]}  # a sweep tells the row at the encoder's own size again
    pairs = [(before[key], row) for key, row in after.items() if key in before]
    if not pairs:
        raise BenchError(
            f"the new result (from {_machines(new)}) and the old result (from {_machines(old)}) have no measured "
            "backend in common; compare results of the same machine, backends and sizes"
        )
    names = {machine["id"]: machine["name"] for machine in new["machines"]}
    return [change for was, row in pairs for change in _row_changes(was, row, names[row["machine"]])]


def spread_ms(times_ms: Sequence[float]) -> float:
    """From the 25th to the 75th percentile of a row's runs, LEAST_SPREAD of the median at least."""
    low, middle, high = (float(value) for value in np.percentile(times_ms, (25, 50, 75)))
    return max(high - low, LEAST_SPREAD * middle)


def hardware(machine: dict[str, Any]) -> tuple[Any, ...]:
    """The values by which two machines count as the same: processor, cores, GPU."""
    environment = machine["environment"]
    gpu = environment["gpu"]
    return environment["processor"], environment["cores"], gpu["name"] if gpu else None


def _key(result: Result, row: dict[str, Any]) -> tuple[Any, ...]:
    machine = next(machine for machine in result["machines"] if machine["id"] == row["machine"])
    return (*hardware(machine), row["backend"], *row["image_size"], row["batch"])


def _machines(result: Result) -> str:
    return "; ".join(machine["name"] for machine in result["machines"])


def _row_changes(old: dict[str, Any], new: dict[str, Any], machine: str) -> list[Change]:
    size = (new["image_size"][0], new["image_size"][1])
    row = (machine, new["backend"], new["label"], size, new["batch"])
    if new["status"] != "measured":
        return [Change(*row, "lost", old["latency"]["p50_ms"], None, None, new["reason"] or new["status"])]
    was, now = old["latency"]["p50_ms"], new["latency"]["p50_ms"]
    beyond = spread_ms(old["times_ms"]) + spread_ms(new["times_ms"])
    slower = [Change(*row, "slower", was, now, beyond)] if now - was > beyond else []
    errors = {error["name"]: error for error in old["errors"] or []}
    worse = [
        Change(*row, "less exact", errors[name]["relative_l2"], error["relative_l2"], None, name)
        for error in new["errors"] or []
        if (name := error["name"]) in errors and _less_exact(errors[name], error)
    ]
    if errors and not new["errors"]:
        worse = [Change(*row, "lost", None, None, None, "the outputs were not compared with the reference")]
    return slower + worse


def _less_exact(old: dict[str, Any], new: dict[str, Any]) -> bool:
    if old["passed"] and not new["passed"]:
        return True
    was, now = old["relative_l2"], new["relative_l2"]
    if was is None or now is None:  # not finite
        return was is not None
    return now > EXACT_FACTOR * max(was, EXACT_FLOOR)
