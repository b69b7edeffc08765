"""Charts with two axes: error against latency, the roofline; what all plots are made of (widths: see bar_charts.py)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from benchmarks.report.bar_charts import NARROW, axis, size_class, tick_name, time_unit
from benchmarks.report.findings import (
    PRECISIONS,
    Row,
    error_figure,
    may_be_used,
    median_ms,
    milliseconds,
    numbers,
    ranked,
    scaled,
    worst_error,
)
from benchmarks.report.svg import (
    PLACES,
    SMALL,
    TEXT,
    Drawing,
    Scale,
    fitted,
    free_place,
    log_range,
    spread_apart,
    text_width,
)
from benchmarks.results.result_files import Result, of_machine

KEY = 390.0
"""Column of the key at the right of a wide drawing; in a narrow one it stands below."""

HEIGHT = {True: 300.0, False: 380.0}
"""Of the plot itself, narrow or not."""

LOG_PLOT_FROM = 3.0
"""Points need no axis that begins at 0, as bars do: they are told apart better on a logarithmic one."""

RIGHT_OF_POINTS = 4.0
"""Room for their numbers, as a factor of the logarithmic axis."""

SHAPES = {"fp32": 0, "fp16": 1, "bf16": 2, "fp8": 3, "int8": 4}

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Point:
    """A point with its number in the key."""

    x: float
    y: float
    number: int
    shape: int
    css: str
    title: str


@dataclasses.dataclass(frozen=True)
class Area:
    """Where the plot lies in its drawing."""

    left: float
    top: float
    right: float
    bottom: float


def plot_area(width: float) -> Area:
    narrow = width == NARROW
    return Area(54, 26, width - (14 if narrow else KEY + 40), 26 + HEIGHT[narrow])


def error_plot(result: Result, machine: dict[str, Any], width: float) -> str | None:
    """Worst relative L2 of each row over its latency, with the tolerances; None where nothing was compared."""
    rows = [row for row in ranked(result, machine) if worst_error(row) is not None]
    if not rows:
        return None
    drawing = Drawing(width, size_class(width), f"Scatter plot of error against latency, {len(rows)} backends")
    area = plot_area(width)
    tolerances = _tolerances(rows)
    errors = [worst_error(row) or 0.0 for row in rows]
    finite = [error for error in errors if 0 < error < math.inf] + list(tolerances.values())
    low, high = log_range(finite or [1e-6, 1.0])
    bands = 22 * (0.0 in errors), 22 * (math.inf in errors)
    across = _latency_scale(rows, area)
    unit = time_unit(across.high)
    up = Scale(low, high, area.bottom - bands[0], area.top + bands[1], True)
    name = f"latency p50, {unit[0]}{', log' * across.log}"
    axis(drawing, across, area.top, area.bottom, 4 if width == NARROW else 7, name, unit[1])
    up_axis(drawing, up, area, "worst relative L2 of any output")
    taken = [_tolerance_line(drawing, up(value), area, name) for name, value in tolerances.items()]
    for there, place, name in ((bands[0], area.bottom, "0"), (bands[1], area.top + 11, "not fin.")):
        if there:
            drawing.text(area.left - 6, place, name, "small", "end")
    order, points = numbers(result, machine), []
    for row, error in zip(rows, errors, strict=True):
        y = area.bottom - 5 if error == 0 else area.top + 7 if math.isinf(error) else up(error)
        css = f"dot {row['precision']}{'' if may_be_used(row) else ' out'}"
        title = f"{row['label']}: {milliseconds(median_ms(row))}, relative L2 {error_figure(error)}"
        x = across(median_ms(row))
        points.append(Point(x, y, order[row["backend"]], SHAPES.get(row["precision"], 3), css, title))
    _points(drawing, points, taken)
    plot_key(drawing, area, [(point, row["label"]) for point, row in zip(points, rows, strict=True)])
    return drawing.markup()


def _tolerances(rows: Sequence[Row]) -> dict[str, float]:
    """The relative L2 that each precision is held to, as its rows were."""
    found: dict[str, float] = {}
    for row in rows:
        limits = [error["tolerance"]["relative_l2"] for error in row["errors"] or [] if error.get("tolerance")]
        if limits:
            found[f"{PRECISIONS.get(row['precision'], row['precision'])} tolerance"] = max(limits)
    return found


def _tolerance_line(drawing: Drawing, y: float, area: Area, name: str) -> Box:
    drawing.line(area.left, y, area.right, y, "limit")
    drawing.text(area.right - 4, y - 4, name, "small quiet", "end")
    return area.right - 4 - text_width(name, SMALL), y - 15, area.right, y + 1


def _latency_scale(rows: Sequence[Row], area: Area) -> Scale:
    medians = [median_ms(row) for row in rows]
    if max(medians) > LOG_PLOT_FROM * min(medians):
        return Scale(*log_range(medians), area.left, area.right, True)
    return Scale(0, max(medians) * 1.12, area.left, area.right)


def roofline_plot(result: Result, machine: dict[str, Any], width: float) -> str | None:
    """Operations per second over operations per byte, under the ceilings that this machine was measured to have.

    Bytes are the least ones, so a point's place across says what the work could reach, not what the backend moved.
    """
    rows, roof = ranked(result, machine), machine["roofline"]
    used = {row["precision"] for row in rows}
    peaks = {name: rate for name, rate in (roof or {}).get("flops_per_s", {}).items() if rate and name in used}
    if not rows or not peaks or not roof["copy_bytes_per_s"]:
        return None
    work, copy_rate = of_machine(result, machine, "work"), roof["copy_bytes_per_s"]
    rates = [work["operations"] / median_ms(row) * 1e3 for row in rows]
    # least bytes are told for FP32; weights and outputs, nearly all of them, halve
    halves = [1 if row["precision"] == "fp32" else 2 for row in rows]
    intensities = [half * work["operations"] / work["least_bytes"] for half in halves]
    ridge = [rate / copy_rate for rate in peaks.values()]
    area = plot_area(width)
    drawing = Drawing(width, size_class(width), f"Roofline of {machine['name']}, {len(rows)} backends")
    across = Scale(*log_range([*intensities, *ridge, RIGHT_OF_POINTS * max(intensities)]), area.left, area.right, True)
    up = Scale(*log_range([*rates, *peaks.values()]), area.bottom, area.top, True)
    axis(drawing, across, area.top, area.bottom, 4 if width == NARROW else 7, "FLOP per byte of least traffic, log")
    up_axis(drawing, up, area, "FLOP per second, log", "FLOP/s")
    taken = 0.0
    for name, rate in sorted(peaks.items(), key=lambda peak: -peak[1]):
        label = up(rate) - 5 if up(rate) - 5 > taken + 14 else up(rate) + 14  # below its line where two are close
        taken = label
        _ceiling(drawing, area, (across, up), (name, rate), copy_rate, label)
    order, points = numbers(result, machine), []
    for row, rate, intensity in zip(rows, rates, intensities, strict=True):
        css = f"dot {row['precision']}{'' if may_be_used(row) else ' out'}"
        title = f"{row['label']}: {scaled(rate, 'FLOP/s')}"
        shape = SHAPES.get(row["precision"], 3)
        points.append(Point(across(intensity), up(rate), order[row["backend"]], shape, css, title))
    _stacked_points(drawing, points, area)
    plot_key(drawing, area, [(point, row["label"]) for point, row in zip(points, rows, strict=True)])
    return drawing.markup()


def _ceiling(
    drawing: Drawing, area: Area, scales: tuple[Scale, Scale], peak: tuple[str, float], copy_rate: float, label: float
) -> None:
    """One precision's roof: the copy rate up to the ridge, then the product rate."""
    across, up = scales
    name, rate = peak
    left = max(across.low, up.low / copy_rate)
    points = [(left, left * copy_rate), (rate / copy_rate, rate), (across.high, rate)]
    drawing.path([(across(x), up(y)) for x, y in points if x >= left], f"line {name}")
    text = f"{PRECISIONS.get(name, name)} {scaled(rate, 'FLOP/s')}"
    beside = min(across(rate / copy_rate) + 6, area.right - 4 - text_width(text, SMALL))
    drawing.text(beside, label, text, "small quiet")


def up_axis(drawing: Drawing, scale: Scale, area: Area, name: str, unit: str = "") -> None:
    for tick in scale.ticks(8):
        drawing.line(area.left, scale(tick), area.right, scale(tick), "grid")
        text = tick_name(tick) if not unit else scaled(tick, "").replace(".00", "").replace(".0 ", " ")
        drawing.text(area.left - 6, scale(tick) + 4, text.strip(), "small", "end")
    drawing.text(2, 12, name, "small")


def _points(drawing: Drawing, points: Sequence[Point], taken: list[Box]) -> None:
    """Marks, then each one's number where it is free."""
    boxes = [*taken, *((point.x - 6, point.y - 6, point.x + 6, point.y + 6) for point in points)]
    for point in points:
        drawing.mark(point.x, point.y, point.shape, point.css, point.title)
    for point in points:
        text = str(point.number)
        width = text_width(text, SMALL)
        dx, dy = PLACES[free_place(point.x, point.y, width, 13, boxes)]
        left = point.x + dx - (width if dx < 0 else 0)
        if dy or abs(dx) > 9:
            drawing.line(point.x, point.y, left + width / 2, point.y + dy, "leader")
        drawing.text(left, point.y + dy + 4, text, "small value")
        boxes.append((left - 4, point.y + dy - 7, left + width + 4, point.y + dy + 6))


def _stacked_points(drawing: Drawing, points: Sequence[Point], area: Area) -> None:
    """Marks that stand in columns, each column's numbers in a list beside it."""
    for point in points:
        drawing.mark(point.x, point.y, point.shape, point.css, point.title)
    rightmost = max(point.x for point in points)
    for x in sorted({point.x for point in points}):
        column = [point for point in points if point.x == x]
        side = 1 if x == rightmost else -1
        places = spread_apart([point.y for point in column], 13, area.top + 8, area.bottom - 8)
        for point, y in zip(column, places, strict=True):
            drawing.line(x + 6 * side, point.y, x + 18 * side, y, "leader")
            drawing.text(x + 20 * side, y + 4, str(point.number), "small value", "start" if side > 0 else "end")


def plot_key(drawing: Drawing, area: Area, entries: Sequence[tuple[Point, str]], dashed: str | None = None) -> None:
    """Which number is which backend: below a narrow plot, else at its right."""
    narrow = drawing.width == NARROW
    x, y = (2.0, area.bottom + 58) if narrow else (area.right + 30, area.top + 10)
    room = drawing.width - x - 46
    for point, label in sorted(entries, key=lambda entry: entry[0].number):
        drawing.mark(x + 6, y - 4, point.shape, point.css)
        drawing.text(x + 32, y, str(point.number), "small value", "end")
        size, css = (SMALL, "small key") if narrow else (TEXT, "")
        drawing.text(x + 40, y, fitted(label, room, size), css)
        y += 21
    if dashed:
        drawing.line(x, y - 4, x + 32, y - 4, "line closed")
        drawing.text(x + 40, y, dashed)
