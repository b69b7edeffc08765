"""The report's charts: bars, which the page draws beside their texts, and plots with two axes."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from benchmarks.report.findings import (
    PRECISIONS,
    SECOND,
    Row,
    closed_form,
    error_figure,
    label_of,
    may_be_used,
    median_ms,
    milliseconds,
    numbers,
    percent,
    point_of,
    ranked,
    scaled,
    significant,
    size_name,
    swept,
    verdict,
    worst_error,
)
from benchmarks.report.svg import BOTTOM, LEFT, RIGHT, TOP, Plot, Scale, log_range, mark, text_width
from benchmarks.results.result_files import Result, of_machine

FULL = 1000.0
"""Length of the longest bar that there can be."""

LOG_FROM = 15.0
"""From this ratio of slowest to fastest on, a linear axis would make the fast ones invisible."""

LOG_PLOT_FROM = 3.0
"""Points need no axis that begins at 0, as bars do: they are told apart better on a logarithmic one."""

RIGHT_OF_POINTS = 4.0
"""Room for their numbers, as a factor of the logarithmic axis."""

KERNELS = 12
"""How many kernels are drawn; the page has no room for all 300."""

COLORS = 6
"""Of the palette that tells series apart; the seventh takes the first one's with another mark."""

SHAPES = {name: shape for shape, name in enumerate(PRECISIONS)}


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar with its texts; lengths are parts of FULL.

    Attributes:
        name, value: the texts at its left and right.
        title: shown where the pointer rests.
        css, length: of the bar.
        ends: where the percentiles of LATENCIES lie.
        floor: the least that there could be.
    """

    name: str
    value: str
    title: str
    css: str
    length: float
    ends: tuple[float, ...] = ()
    floor: float | None = None


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as the template shows it.

    Attributes:
        label: told to a screen reader.
        legend: class and meaning of colors and lines.
        groups: title and bars of each group.
        plot: SVG.
        key: mark (SVG), number and name of each point.
    """

    label: str
    legend: Sequence[tuple[str, str]] = ()
    groups: Sequence[tuple[str, Sequence[Bar]]] = ()
    plot: str = ""
    key: Sequence[tuple[str, int, str]] = ()


LATENCIES = ("p50", "p90", "p95", "p99")


def latency_chart(result: Result, machine: dict[str, Any]) -> Chart | None:
    """Median, spread up to the 99th percentile, and floor of every measured row; None without rows."""
    rows = ranked(result, machine)
    if not rows:
        return None
    high, floors = (
        max(row["latency"]["p99_ms"] for row in rows),
        [row["floor_ms"] for row in rows if row.get("floor_ms")],
    )
    log = median_ms(rows[-1]) > LOG_FROM * median_ms(rows[0])
    low = min([median_ms(rows[0]), *floors]) / 1.2 if log else 0.0
    scale = Scale(low, high * 1.02, 0, FULL, log)
    legend = [(f"bar {name}", PRECISIONS[name]) for name in PRECISIONS if any(row["precision"] == name for row in rows)]
    legend += [("whisker", ", ".join(LATENCIES)), *([("floor", "floor")] if floors else [])]
    legend += [] if all(may_be_used(row) for row in rows) else [("bar out", "not within tolerance")]
    legend.append(("", f"the axis goes from {milliseconds(low)} to {milliseconds(scale.high)}{', logarithmic' * log}"))
    order, bars = numbers(result, machine), []
    for row in rows:
        latency = row["latency"]
        told = ", ".join(f"{name} {milliseconds(latency[f'{name}_ms'])}" for name in LATENCIES)
        bars.append(
            Bar(
                f"{order[row['backend']]}. {row['label']}",
                milliseconds(median_ms(row)),
                f"{row['label']}. Latency: {told}. Outputs: {verdict(row)}, largest relative L2 error "
                f"{error_figure(worst_error(row))}",
                f"bar {row['precision']}{'' if may_be_used(row) else ' out'}",
                scale(median_ms(row)),
                tuple(scale(latency[f"{name}_ms"]) for name in LATENCIES),
                scale(row["floor_ms"]) if row.get("floor_ms") else None,
            )
        )
    best = f"the fastest is {rows[0]['label']} with {milliseconds(median_ms(rows[0]))}"
    return Chart(f"Bar chart of the latency of {len(rows)} backends; {best}", legend, [("", bars)])


def parts_chart(result: Result, machine: dict[str, Any]) -> Chart | None:
    """Each part's share of the operations, of the least bytes and, where it was measured, of the time."""
    parts = of_machine(result, machine, "work")["parts"]
    known = [
        ("operations", "bar s1", "operations"),
        ("bytes", "bar s2", "minimum memory traffic"),
        ("ms", "bar s3", "time"),
    ]
    series = [entry for entry in known if any(part[entry[0]] for part in parts)]
    if not series:
        return None
    totals = {key: sum(part[key] or 0 for part in parts) for key, _, _ in series}
    most = max((part[key] or 0) / totals[key] for part in parts for key in totals)
    bars = []
    for part in parts:
        for key, css, name in series:
            share = (part[key] or 0) / totals[key]
            value = percent(share) if part[key] is not None else "unknown"
            title = f"{part['part']}: {value} of {name}"
            bars.append(Bar(part["part"] * (key == series[0][0]), value, title, css, FULL * (share / most)))
    names = " and ".join(name for _, _, name in series)
    legend = [(css, name) for _, css, name in series]
    label = f"Bar chart: {names} of each part of the encoder, in percent of the whole encoder"
    return Chart(label, legend, [("", bars)])


def kernels_chart(result: Result, machine: dict[str, Any]) -> Chart | None:
    """A plan's kernels by kind, and the largest of them: by time where it was measured, else by bytes moved."""
    kernels = of_machine(result, machine, "kernels") or []
    key = "ms" if any(kernel["ms"] for kernel in kernels) else "bytes"
    known = [kernel for kernel in kernels if kernel[key]]
    if not known:
        return None
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in known:
        kinds[kernel["kind"] or "of unknown kind"].append(kernel[key])
    total = sum(kernel[key] for kernel in known)
    by_kind = {f"{len(values)} {kind}": sum(values) for kind, values in kinds.items()}
    largest = sorted(known, key=lambda kernel: -kernel[key])[:KERNELS]
    what = "time" if key == "ms" else "bytes moved"
    groups = []
    for title, css, pairs in (
        (f"All {len(known)} kernels by kind", "bar s1", sorted(by_kind.items(), key=lambda pair: -pair[1])),
        (
            f"The {len(largest)} kernels with the most {what}",
            "bar s2",
            [(kernel["name"], kernel[key]) for kernel in largest],
        ),
    ):
        bars = []
        for name, value in pairs:
            figure = milliseconds(value) if key == "ms" else scaled(value, "B")
            bars.append(
                Bar(name, f"{figure}, {percent(value / total)}", f"{name}: {figure}", css, FULL * (value / pairs[0][1]))
            )
        groups.append((title, bars))
    return Chart(
        f"Two bar charts. The first chart shows the total {what} for each kind of kernel. The second chart shows the "
        f"{len(largest)} kernels with the most {what}",
        groups=groups,
    )


def error_plot(result: Result, machine: dict[str, Any]) -> Chart | None:
    """Worst relative L2 of each row over its latency, with the tolerances; None where nothing was compared."""
    rows = [row for row in ranked(result, machine) if worst_error(row) is not None]
    if not rows:
        return None
    tolerances = _tolerances(rows)
    errors = [worst_error(row) or 0.0 for row in rows]
    low, high = log_range([e for e in errors if 0 < e < math.inf] + list(tolerances.values()) or [1e-6, 1.0])
    bands = 22 * (0.0 in errors), 22 * (math.inf in errors)
    slowest, fastest = median_ms(rows[-1]), median_ms(rows[0])
    log = slowest > LOG_PLOT_FROM * fastest
    ends: tuple[float, float] = log_range([fastest, slowest]) if log else (0.0, slowest * 1.12)
    up = Scale(low, high, BOTTOM - bands[0], TOP + bands[1], True)
    label = f"Scatter plot of numerical error against latency for {len(rows)} backends"
    plot = Plot(label, Scale(*ends, LEFT, RIGHT, log), up)
    unit, ms = ("seconds", 1e3) if ends[1] >= SECOND else ("milliseconds", 1.0)
    plot.axes(
        f"latency p50, {unit}{', log scale' * log}",
        "largest relative L2 error of the outputs",
        {tick: tick_name(tick / ms) for tick in plot.across.ticks(5)},
        {tick: tick_name(tick) for tick in up.ticks(8)},
    )
    for name, value in tolerances.items():
        plot.line([(LEFT, up(value)), (RIGHT, up(value))], "limit")
        plot.text(RIGHT - 4, up(value) - 4, name, "end")
    for there, place, name in ((bands[0], BOTTOM, "0"), (bands[1], TOP + 11, "not fin.")):
        if there:
            plot.text(LEFT - 6, place, name, "end")
    order = numbers(result, machine)
    for row, error in zip(rows, errors, strict=True):
        y = BOTTOM - 5 if error == 0 else TOP + 7 if math.isinf(error) else up(error)
        told = (
            f"{row['label']}: latency {milliseconds(median_ms(row))}, largest relative L2 error of its outputs "
            f"{error_figure(error)}"
        )
        plot.point(plot.across(median_ms(row)), y, *_look(row), told, order[row["backend"]])
    return _with_key(label, plot, [(*_look(row), order[row["backend"]], row["label"]) for row in rows])


def _look(row: Row) -> tuple[int, str]:
    """Shape and class of a row's mark."""
    return SHAPES.get(row["precision"], 3), f"dot {row['precision']}{'' if may_be_used(row) else ' out'}"


def _with_key(label: str, plot: Plot, entries: Sequence[tuple[int, str, int, str]]) -> Chart:
    """A plot with its key, given shape, class, number and name of each entry."""
    key = []
    for shape, css, number, name in sorted(entries, key=lambda entry: entry[2]):
        root = ElementTree.Element("svg", {"class": "swatch", "viewBox": "0 0 14 14", "aria-hidden": "true"})
        root.append(mark(shape, css))
        key.append((ElementTree.tostring(root, encoding="unicode"), number, name))
    return Chart(label, plot=plot.markup(), key=key)


def _tolerances(rows: Sequence[Row]) -> dict[str, float]:
    """The relative L2 that each precision is held to, as its rows were."""
    found: dict[str, float] = {}
    for row in rows:
        limits = [error["tolerance"]["relative_l2"] for error in row["errors"] or [] if error.get("tolerance")]
        if limits:
            found[f"{PRECISIONS.get(row['precision'], row['precision'])} tolerance"] = max(limits)
    return found


def roofline_plot(result: Result, machine: dict[str, Any]) -> Chart | None:
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
    ridges = [rate / copy_rate for rate in peaks.values()]
    label = f"Roofline plot of {machine['name']} with {len(rows)} backends"
    across = Scale(*log_range([*intensities, *ridges, RIGHT_OF_POINTS * max(intensities)]), LEFT, RIGHT, True)
    up = Scale(*log_range([*rates, *peaks.values()]), BOTTOM, TOP, True)
    plot = Plot(label, across, up)
    plot.axes(
        "Arithmetic intensity (FLOP per byte), log scale",
        "FLOP per second, log scale",
        {tick: tick_name(tick) for tick in across.ticks(5)},
        {tick: scaled(tick, "").replace(".00", "").replace(".0 ", " ").strip() for tick in up.ticks(8)},
    )
    above = 0.0
    for name, rate in sorted(peaks.items(), key=lambda peak: -peak[1]):
        left, ridge = max(across.low, up.low / copy_rate), rate / copy_rate
        slope = [(left, left * copy_rate)] if left < ridge else []
        plot.curve([*slope, (ridge, rate), (across.high, rate)], f"line {name}")
        y = up(rate) - 5 if up(rate) - 5 > above + 14 else up(rate) + 14  # below its line where two are close
        text, above = f"{PRECISIONS.get(name, name)} {scaled(rate, 'FLOP/s')}", y
        plot.text(min(across(ridge) + 6, RIGHT - 4 - text_width(text)), y, text)
    order = numbers(result, machine)
    for row, rate, intensity in zip(rows, rates, intensities, strict=True):
        told = f"{row['label']}: {scaled(rate, 'FLOP/s')}"
        plot.point(across(intensity), up(rate), *_look(row), told, order[row["backend"]])
    return _with_key(label, plot, [(*_look(row), order[row["backend"]], row["label"]) for row in rows])


def growth_plot(result: Result, machine: dict[str, Any], sweep: str) -> Chart | None:
    """How latency grows along a sweep (image_size or batch), each line from its own first point, beside operations.

    A line that lies on the dashed one grows as its work does; above it, worse. A line that begins later begins on the
    closed form.
    """
    lines = swept(result, machine, sweep)
    if not lines:
        return None

    def value(point: tuple[int, ...]) -> float:
        """The position of a point along the sweep: side of the square of the same area, or batch."""
        return math.sqrt(point[0] * point[1]) if sweep == "image_size" else float(point[2])

    work = closed_form(result, machine)
    first = min(point_of(row) for rows in lines.values() for row in rows)
    held = (lambda point: point[2:]) if sweep == "image_size" else (lambda point: point[:2])
    base = work.get(first)
    closed = sorted((value(key), ops / base) for key, ops in work.items() if base and held(key) == held(first))
    closed = [point for point in closed if point[0] >= value(first)]
    curves: dict[str, list[tuple[float, float]]] = {}
    for backend, rows in lines.items():
        start = work.get(point_of(rows[0]))
        factor = (start / base if start and base else 1.0) / median_ms(rows[0])
        curves[backend] = [(value(point_of(row)), factor * median_ms(row)) for row in rows]
    places = [*closed, *(point for curve in curves.values() for point in curve)]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    name = "image side in pixels" if sweep == "image_size" else "batch"
    label = f"Line chart: latency over {name} for {len(lines)} backends"
    across = Scale(min(xs) / 1.05, max(xs) * 1.05, LEFT, RIGHT - 70, True)
    plot = Plot(label, across, Scale(min(ys) / 1.2, max(ys) * 1.2, BOTTOM, TOP, True))
    up_ticks = {tick: tick_name(tick) for tick in plot.up.ticks(8)}
    plot.axes(
        name, "latency relative to the first point, log scale", {x: f"{x:.0f}" for x in sorted(set(xs))}, up_ticks
    )
    order, key = numbers(result, machine), []
    for series, backend in enumerate(sorted(curves, key=lambda name: order[name])):
        css, rows, curve = f"s{series % COLORS + 1}", lines[backend], curves[backend]
        plot.curve(curve, f"line {css}")
        for row, (x, y) in zip(rows, curve, strict=True):
            size, latency = size_name(row["image_size"], row["batch"]), milliseconds(median_ms(row))
            told = (
                f"{row['label']} at {size}: latency {latency}, relative latency {significant(y)}. The relative latency "
                "is 1 at the leftmost point of the chart"
            )
            number = order[backend] if row is rows[-1] else None
            plot.point(across(x), plot.up(y), series, f"dot {css}", told, number)
        key.append((series, f"dot {css}", order[backend], label_of(result, backend)))
    if closed:
        plot.curve(closed, "line closed")
    legend = [("closed", "calculated number of arithmetic operations, relative to the first point")] if closed else []
    return dataclasses.replace(_with_key(label, plot, key), legend=legend)


def tick_name(value: float) -> str:
    """A tick's value, short."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}" if value >= 1e4 else f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
