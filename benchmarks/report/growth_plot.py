"""How latency grows with image size and batch, beside the operations of the closed form (widths: see bar_charts.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report.axis_plots import Area, Point, plot_area, plot_key, up_axis
from benchmarks.report.bar_charts import size_class
from benchmarks.report.findings import Row, label_of, median_ms, milliseconds, numbers, significant, size_name, swept
from benchmarks.report.svg import SMALL, Drawing, Scale, spread_apart, text_width
from benchmarks.results.result_files import Result, of_machine

COLOURS = 6
"""Of the palette that tells series apart; the seventh takes the first one's with another mark."""


def growth_plot(result: Result, machine: dict[str, Any], sweep: str, width: float) -> str | None:
    """How latency grows along a sweep (image_size or batch), each line from its own first point, beside operations.

    A line that lies on the dashed one grows as its work does; above it, worse.
    """
    lines = swept(result, machine, sweep)
    if not lines:
        return None
    work = _closed_form(result, machine)
    first = min(_place(row) for rows in lines.values() for row in rows)
    base = work.get(first)
    curves = {
        backend: [(_value(_place(row), sweep), y) for row, y in zip(rows, _relative(rows, work, base), strict=True)]
        for backend, rows in lines.items()
    }
    points = [(_value(key, sweep), value / base) for key, value in work.items() if base and _alike(key, first, sweep)]
    closed = sorted(point for point in points if point[0] >= _value(first, sweep))
    name = "image side, pixels" if sweep == "image_size" else "batch"
    drawing = Drawing(width, size_class(width), f"Line chart: latency over {name}, {len(lines)} backends")
    area = plot_area(width)
    across, up = _scales([*closed, *(point for curve in curves.values() for point in curve)], area)
    _side_axis(drawing, across, area, sorted({x for curve in (closed, *curves.values()) for x, _ in curve}), name)
    up_axis(drawing, up, area, "times the first point, log")
    order = numbers(result, machine)
    key = [
        (_curve(drawing, (across, up), curve, lines[backend], (order[backend], index)), label_of(result, backend))
        for index, (backend, curve) in enumerate(sorted(curves.items(), key=lambda pair: order[pair[0]]))
    ]
    if closed:
        drawing.path([(across(x), up(y)) for x, y in closed], "line closed")
    ends = spread_apart([point.y for point, _ in key], 14, area.top + 4, area.bottom)
    for (point, _), y in zip(key, ends, strict=True):
        drawing.text(area.right - 18, y + 4, str(point.number), "small value")
    plot_key(drawing, area, key, "operations, closed form" if closed else None)
    return drawing.markup()


def _curve(
    drawing: Drawing,
    scales: tuple[Scale, Scale],
    curve: Sequence[tuple[float, float]],
    rows: Sequence[Row],
    names: tuple[int, int],
) -> Point:
    """Draws a backend's line and points; returns the last, by which the key names it."""
    number, series = names
    css = f"s{series % COLOURS + 1}"
    places = [(scales[0](x), scales[1](y)) for x, y in curve]
    drawing.path(places, f"line {css}")
    last = Point(0, 0, number, series, f"dot {css}", "")
    for row, (x, y), (_, times) in zip(rows, places, curve, strict=True):
        size, latency = size_name(row["image_size"], row["batch"]), milliseconds(median_ms(row))
        last = Point(
            x, y, number, series, f"dot {css}", f"{row['label']}, {size}: {latency}, {significant(times)} times"
        )
        drawing.mark(x, y, series, last.css, last.title, 4)
    return last


def _scales(points: Sequence[tuple[float, float]], area: Area) -> tuple[Scale, Scale]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across = Scale(min(xs) / 1.05, max(xs) * 1.05, area.left, area.right - 24, True)
    return across, Scale(min(ys) / 1.2, max(ys) * 1.2, area.bottom, area.top, True)


def _closed_form(result: Result, machine: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Operations by height, width and batch."""
    encoder = result["encoder"]
    work = {(*point["image_size"], point["batch"]): point["operations"] for point in result["growth"]}
    own = (*encoder["image_size"], encoder["batch"])
    return {own: of_machine(result, machine, "work")["operations"], **work}


def _place(row: Row) -> tuple[int, ...]:
    return (*row["image_size"], row["batch"])


def _relative(rows: Sequence[Row], work: Mapping[tuple[int, ...], float], base: float | None) -> list[float]:
    """Latencies over the first one; a line that begins later begins on the closed form."""
    start = work.get(_place(rows[0]))
    factor = start / base if start and base else 1.0
    return [factor * median_ms(row) / median_ms(rows[0]) for row in rows]


def _alike(key: tuple[int, ...], other: tuple[int, ...], sweep: str) -> bool:
    """Whether two points are of one sweep: the same batch, or the same size."""
    return key[2:] == other[2:] if sweep == "image_size" else key[:2] == other[:2]


def _value(key: tuple[int, ...], sweep: str) -> float:
    """Where a point lies along its sweep: side of the square of the same area, or batch."""
    return math.sqrt(key[0] * key[1]) if sweep == "image_size" else float(key[2])


def _side_axis(drawing: Drawing, scale: Scale, area: Area, values: Sequence[float], name: str) -> None:
    """The sweep's own values, those that would run into another left out."""
    last = -math.inf
    for value in values:
        x, text = scale(value), f"{value:.0f}"
        drawing.line(x, area.top, x, area.bottom, "grid")
        half = text_width(text, SMALL) / 2
        if x - half > last + 6:
            drawing.text(x, area.bottom + 15, text, "small", "middle")
            last = x + half
    drawing.text(area.right, area.bottom + 32, name, "small", "end")
