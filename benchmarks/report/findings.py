"""What the results say, in figures and words: the answer, and every figure as it is shown."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.results.result_files import Result, of_machine

Row = dict[str, Any]

PRECISIONS = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "fp8": "FP8", "int8": "INT8"}
REASONS = 3
"""How many reasons the first screen gives; all of them stand in a table below."""

SECOND = 1000.0
"""From so many ms on, times are told in s."""

NOTHING = "-"
"""Shown where there is no figure."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The main findings about one machine.

    Attributes:
        machine: its entry in the results.
        best: the fastest row within tolerance at the encoder's own size; None where there is none.
        fastest_outside: a faster row out of tolerance or never compared, which must not be taken; None where none is.
        missing: rows that were not measured.
    """

    machine: dict[str, Any]
    best: Row | None
    fastest_outside: Row | None
    missing: tuple[Row, ...]


def answers(result: Result) -> list[Answer]:
    """The answer for each machine, in the results' order."""
    return [_answer(result, machine) for machine in result["machines"]]


def _answer(result: Result, machine: dict[str, Any]) -> Answer:
    measured = ranked(result, machine)
    best = next((row for row in measured if may_be_used(row)), None)
    outside = next((row for row in measured if not may_be_used(row)), None)
    if best and outside and median_ms(outside) >= median_ms(best):
        outside = None
    return Answer(machine, best, outside, tuple(missing(result, machine)))


def ranked(result: Result, machine: dict[str, Any]) -> list[Row]:
    """The machine's measured rows at the encoder's own size, fastest first."""
    rows = [row for row in _rows(result, machine) if row["status"] == "measured" and row["sweep"] is None]
    return sorted(rows, key=median_ms)


def missing(result: Result, machine: dict[str, Any]) -> list[Row]:
    """The machine's rows that were not measured, those of the sweeps too."""
    return [row for row in _rows(result, machine) if row["status"] != "measured"]


def missing_sentence(result: Result, machine: dict[str, Any]) -> str:
    """How many backends were not measured at all, those that failed by name, and why in short."""
    backends = {row["backend"] for row in _rows(result, machine)}
    done = {row["backend"] for row in _rows(result, machine) if row["status"] == "measured"}
    gone = {row["backend"]: row for row in missing(result, machine)}
    points = [row for row in missing(result, machine) if row["backend"] in done]
    failed = [row["label"] for name, row in gone.items() if row["status"] == "failed" and name not in done]
    reasons = collections.Counter(row["reason"] for name, row in gone.items() if name not in done)
    told = [f"failed: {', '.join(failed)}"] if failed else []
    known = reasons.most_common(REASONS)
    told += [f"{count}: {_brief(reason or 'unknown reason')}" for reason, count in known]
    rest = reasons.total() - sum(count for _, count in known)
    told += [f"{rest}: other reasons"] if rest else []
    text = f"{len(backends - done)} of {len(backends)} backends were not measured on this machine"
    text += f" ({'; '.join(told)})." if told else "."
    if points:
        text += (
            " Some backends were measured only at some of the image sizes and batch sizes. Number of missing "
            f'measurements: {len(points)}. The table "Not measured" lists the reasons.'
        )
    return text


def _brief(reason: str, most: int = 70) -> str:
    """The first sentence or clause of a reason."""
    first = reason.partition("; ")[0].partition(", so ")[0]
    return first if len(first) <= most else first[: most - 3].rsplit(" ", 1)[0] + "..."


def swept(result: Result, machine: dict[str, Any], sweep: str) -> dict[str, list[Row]]:
    """Measured rows of a sweep by backend, smallest first; the row at the encoder's own size is one of them.

    Args:
        result: the results.
        machine: one of its machines.
        sweep: image_size or batch.
    """
    measured = [row for row in _rows(result, machine) if row["status"] == "measured"]
    asked = [row for row in measured if row["sweep"] == sweep]
    held = {(row["backend"], _held(row, sweep)) for row in asked}
    own = [row for row in measured if row["sweep"] is None and (row["backend"], _held(row, sweep)) in held]
    found: dict[str, dict[tuple[int, ...], Row]] = {}
    for row in (*own, *asked):
        found.setdefault(row["backend"], {}).setdefault(point_of(row), row)
    return {backend: [points[key] for key in sorted(points)] for backend, points in found.items() if len(points) > 1}


def _held(row: Row, sweep: str) -> tuple[int, ...]:
    """What a sweep leaves as it is."""
    return (row["batch"],) if sweep == "image_size" else tuple(row["image_size"])


def point_of(row: Row) -> tuple[int, ...]:
    """Height, width and batch of a row."""
    return (*row["image_size"], row["batch"])


def closed_form(result: Result, machine: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Operations by height, width and batch."""
    own = {point_of(result["encoder"]): of_machine(result, machine, "work")["operations"]}
    return {point_of(point): point["operations"] for point in result["growth"]} | own


def _rows(result: Result, machine: dict[str, Any]) -> list[Row]:
    return [row for row in result["rows"] if row["machine"] == machine["id"]]


def median_ms(row: Row) -> float:
    """Median latency of a measured row."""
    return float(row["latency"]["p50_ms"])


def worst_error(row: Row) -> float | None:
    """The largest relative L2 of any output, infinite where a value is not finite, None where none was compared.

    The reference has none by definition.
    """
    errors = row.get("errors") or []
    if not errors and is_reference(row):
        return 0.0
    return max((math.inf if e["relative_l2"] is None else e["relative_l2"] for e in errors), default=None)


def is_reference(row: Row) -> bool:
    """Whether all other rows are compared with this one."""
    return bool(row.get("ratio")) and row["ratio"]["to"] == row["backend"]


def may_be_used(row: Row) -> bool:
    """Whether a row is within tolerance, or the reference itself."""
    return bool(row.get("passed")) or (row.get("passed") is None and is_reference(row))


def verdict(row: Row) -> str:
    """Whether a row is within tolerance, in words."""
    if row.get("passed") is None and is_reference(row):
        return "reference"
    return {True: "within tolerance", False: "outside tolerance", None: "not compared"}[row.get("passed")]


def size_name(image_size: Sequence[int], batch: int | None = None) -> str:
    """Such as `1008 x 1008, batch 1`."""
    size = f"{image_size[0]} x {image_size[1]}"
    return size if batch is None else f"{size}, batch {batch}"


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, thousands apart, without exponent between 1e-4 and 1e7."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if not -4 <= exponent < 7:
        return f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+", "e")
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def milliseconds(ms: float | None) -> str:
    """A time with its unit, ms or s."""
    if ms is None:
        return NOTHING
    return f"{significant(ms / 1e3)} s" if ms >= SECOND else f"{significant(ms)} ms"


def seconds(value: float | None) -> str:
    """A time given in seconds."""
    return NOTHING if value is None else milliseconds(value * 1e3)


def scaled(value: float | None, unit: str) -> str:
    """A quantity with a decimal prefix, such as `13.4 GB` or `5.62 TFLOP`."""
    if value is None:
        return NOTHING
    power = next((power for power in (12, 9, 6, 3) if value >= 10**power), 0)
    return f"{significant(value / 10**power)} {({12: 'T', 9: 'G', 6: 'M', 3: 'k', 0: ''})[power]}{unit}"


def error_figure(value: float | None) -> str:
    """An error in scientific form, which compares at a glance."""
    if value is None:
        return NOTHING
    return "not finite" if not math.isfinite(value) else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return NOTHING if value is None else f"{significant(value * 100, 2)} %"


def numbers(result: Result, machine: dict[str, Any]) -> dict[str, int]:
    """The number by which charts and tables call a backend: its rank, then those that only a sweep measured."""
    backends = [row["backend"] for row in ranked(result, machine)]
    backends += [row["backend"] for row in _rows(result, machine) if row["status"] == "measured"]
    return {backend: index for index, backend in enumerate(dict.fromkeys(backends), 1)}


def ratio_figure(row: Row, name: str = "ratio") -> str:
    """The ratio to the row that it is compared with, and its range over the rounds."""
    ratio = row.get(name)
    if not ratio:
        return NOTHING
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def label_of(result: Result, backend: str) -> str:
    """The label of a backend, its id where no row has it."""
    return next((row["label"] for row in result["rows"] if row["backend"] == backend), backend)


def answer_sentence(result: Result, answer: Answer) -> str:
    """The answer in a few sentences, for Markdown, the page's description and the screen."""
    best, size = answer.best, size_name(result["encoder"]["image_size"], result["encoder"]["batch"])
    if best is None:
        if answer.fastest_outside is None:
            return f"On {answer.machine['name']}, no backend was measured at {size}."
        return (
            f"On {answer.machine['name']}, backends were measured at {size}, but none was found to be within tolerance."
        )
    latency = best["latency"]
    text = (
        f"On {answer.machine['name']}, the fastest backend within tolerance at {size} is {best['label']}. "
        f"Its latency is p50 {milliseconds(latency['p50_ms'])}, p90 {milliseconds(latency['p90_ms'])}, p99 "
        f"{milliseconds(latency['p99_ms'])} ({latency['runs']} runs). The largest relative L2 error of its outputs is "
        f"{error_figure(worst_error(best))}."
    )
    if best.get("ratio"):
        ratio = best["ratio"]
        text += (
            f" The latency of {best['label']} is {ratio_figure(best)} times the latency of "
            f"{label_of(result, ratio['to'])}. This ratio is the median of all rounds; the lowest and "
            "the highest ratio are in parentheses."
        )
    if best.get("share_of_floor") is not None:
        text += (
            " The lower bound on the latency, computed from the matrix multiplication and copy rates that were "
            f"measured on this machine, is {percent(best['share_of_floor'])} of the median latency."
        )
    return text


def caution_sentence(answer: Answer) -> str | None:
    """A warning that a faster backend must not be used, and why; None if there is none."""
    outside = answer.fastest_outside
    if outside is None:
        return None
    error, took = worst_error(outside), f"{outside['label']} took only {milliseconds(median_ms(outside))}"
    if error is None:
        return f"{took}, but its outputs were not compared with the reference."
    return f"{took}, but its relative L2 error of {error_figure(error)} exceeds the tolerance."
