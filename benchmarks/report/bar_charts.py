"""Charts made of bars: latency with its percentiles, where the time goes by part and by kernel.

Each is drawn twice, WIDE and NARROW; the page shows the one that fits, so that text keeps its size on a phone.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from benchmarks.report.findings import (
    PRECISIONS,
    SECOND,
    Row,
    error_figure,
    may_be_used,
    median_ms,
    milliseconds,
    numbers,
    percent,
    ranked,
    scaled,
    verdict,
    worst_error,
)
from benchmarks.report.svg import SMALL, Anchor, Drawing, Scale, fitted, text_width
from benchmarks.results.result_files import Result, of_machine

WIDE, NARROW = 880.0, 336.0
"""Pixels of a drawing: of the page on a screen, and of a phone of 360 pixels less its margins."""

LOG_FROM = 15.0
"""From this ratio of slowest to fastest on, a linear axis would make the fast ones invisible."""

LABELS, VALUES = 330.0, 86.0
"""Columns left and right of the bars in a wide drawing."""

KERNELS = 12
"""How many kernels are drawn; the page has no room for all 300."""


def latency_chart(result: Result, machine: dict[str, Any], width: float) -> str | None:
    """Median, spread up to the 99th percentile, and floor of every measured row; None where there is none."""
    rows = ranked(result, machine)
    if not rows:
        return None
    best = f"fastest {rows[0]['label']} {milliseconds(median_ms(rows[0]))}"
    drawing = Drawing(width, size_class(width), f"Bar chart of latency, {len(rows)} backends, {best}")
    precisions = [name for name in PRECISIONS if any(row["precision"] == name for row in rows)]
    entries = [(f"bar {name}", PRECISIONS[name]) for name in precisions]
    entries += [("whisker", "p50, p90, p95, p99")]
    if any(row.get("floor_ms") for row in rows):
        entries.append(("floor", "floor"))
    if not all(may_be_used(row) for row in rows):
        entries.append(("bar out", "not within tolerance"))
    top = legend(drawing, entries, 14)
    scale, unit = _time_axis(rows, width)
    bands = [_band(width, top + 8, index) for index in range(len(rows))]
    bottom = bands[-1][1] + 20
    axis(drawing, scale, top + 4, bottom, 4 if width == NARROW else 8, unit, time_unit(scale.high)[1])
    order = numbers(result, machine)
    for row, (text_y, bar_y) in zip(rows, bands, strict=True):
        name = f"{order[row['backend']]}. {row['label']}"
        _labels(drawing, text_y, bar_y, name, milliseconds(median_ms(row)))
        _latency_bar(drawing, row, scale, bar_y)
    return drawing.markup()


def _time_axis(rows: Sequence[Row], width: float) -> tuple[Scale, str]:
    """The scale in ms, logarithmic where the rows lie far apart, and the axis's name."""
    high = max(row["latency"]["p99_ms"] for row in rows)
    low = min(min(median_ms(row), row.get("floor_ms") or median_ms(row)) for row in rows)
    log = max(median_ms(row) for row in rows) > LOG_FROM * median_ms(rows[0])
    start, end = (2.0, width - VALUES) if width == NARROW else (LABELS, width - VALUES)
    if log:
        return Scale(low / 1.2, high * 1.05, start, end, True), f"{time_unit(high)[0]}, logarithmic"
    return Scale(0, high * 1.02, start, end), time_unit(high)[0]


def _band(width: float, top: float, index: int) -> tuple[float, float]:
    """Baseline of a row's text and top of its bar."""
    if width == NARROW:
        return top + 44 * index + 14, top + 44 * index + 21
    return top + 27 * index + 17, top + 27 * index + 6


def _labels(drawing: Drawing, text_y: float, bar_y: float, name: str, value: str) -> None:
    """A row's name, beside its bar or above it, and its figure at the bar's right."""
    narrow = drawing.width == NARROW
    drawing.text(2, text_y, fitted(name, drawing.width - 4 if narrow else LABELS - 14))
    drawing.text(drawing.width - 4, bar_y + 11.5, value, "value", "end")


def _latency_bar(drawing: Drawing, row: Row, scale: Scale, y: float) -> None:
    latency = row["latency"]
    told = ", ".join(f"{key} {milliseconds(latency[f'{key}_ms'])}" for key in ("p50", "p90", "p95", "p99"))
    title = f"{row['label']}: {told}; {verdict(row)}, worst relative L2 {error_figure(worst_error(row))}"
    out = "" if may_be_used(row) else " out"
    drawing.rect(scale.start, y, scale(latency["p50_ms"]) - scale.start, 14, f"bar {row['precision']}{out}", title)
    middle = y + 7
    drawing.line(scale(latency["p50_ms"]), middle, scale(latency["p99_ms"]), middle, "whisker")
    for key, half in (("p50", 5), ("p90", 3), ("p95", 3), ("p99", 5)):
        drawing.line(scale(latency[f"{key}_ms"]), middle - half, scale(latency[f"{key}_ms"]), middle + half, "whisker")
    if row.get("floor_ms"):
        drawing.line(scale(row["floor_ms"]), y - 3, scale(row["floor_ms"]), y + 17, "floor")


def parts_chart(result: Result, machine: dict[str, Any], width: float) -> str | None:
    """Each part's share of the operations, of the least bytes and, where it was measured, of the time."""
    parts = [dict(part) for part in of_machine(result, machine, "work")["parts"]]
    series = [("operations", "s1", "operations"), ("bytes", "s2", "least bytes"), ("ms", "s3", "time")]
    series = [entry for entry in series if any(part[entry[0]] for part in parts)]
    if not series:
        return None
    totals = {key: sum(part[key] or 0 for part in parts) for key, _, _ in series}
    drawing = Drawing(width, size_class(width), f"Bar chart: each part's share of {', '.join(s[2] for s in series)}")
    top = legend(drawing, [(f"bar {css}", name) for _, css, name in series], 14) + 8
    most = max((part[key] or 0) / totals[key] for part in parts for key in totals)
    start, end = (2.0, width - 60) if width == NARROW else (130.0, width - 60)
    scale = Scale(0, most, start, end)
    for part in parts:
        if width == NARROW:
            drawing.text(2, top + 13, part["part"])
            top += 18
        else:
            drawing.text(2, top + 8 + 7 * len(series), part["part"])
        for key, css, name in series:
            share = (part[key] or 0) / totals[key]
            drawing.rect(
                start, top, scale(share) - start, 11, f"bar {css}", f"{part['part']}: {percent(share)} of {name}"
            )
            shown = percent(share) if part[key] is not None else "not told"
            drawing.text(scale(share) + 6, top + 10, shown, "small")
            top += 14
        top += 8
    return drawing.markup()


def kernels_chart(kernels: Sequence[dict[str, Any]] | None, width: float) -> str | None:
    """A plan's kernels by kind, and the largest of them: by time where it was measured, else by bytes moved."""
    if not kernels:
        return None
    key = "ms" if any(kernel["ms"] for kernel in kernels) else "bytes"
    known = [kernel for kernel in kernels if kernel[key]]
    if not known:
        return None
    kinds: dict[str, list[float]] = collections.defaultdict(list)
    for kernel in known:
        kinds[kernel["kind"] or "not told"].append(kernel[key])
    total = sum(sum(values) for values in kinds.values())
    largest = sorted(known, key=lambda kernel: -kernel[key])[:KERNELS]
    by_kind = [(f"{len(values)} {kind}", sum(values)) for kind, values in kinds.items()]
    what = "time" if key == "ms" else "bytes moved"
    drawing = Drawing(width, size_class(width), f"Bar chart of {what}: {len(known)} kernels by kind, and the largest")
    top = 0.0
    groups = (
        (f"By kind, all {len(known)}", "s1", sorted(by_kind, key=lambda pair: -pair[1])),
        (f"The largest {len(largest)}", "s2", [(kernel["name"], kernel[key]) for kernel in largest]),
    )
    for title, css, pairs in groups:
        drawing.text(2, top + 16, title, "value")
        top = _share_bars(drawing, pairs, css, total, key, top + 24) + 14
    return drawing.markup()


def _share_bars(
    drawing: Drawing, pairs: Sequence[tuple[str, float]], css: str, total: float, key: str, top: float
) -> float:
    """One bar for each pair of name and value; returns where they end."""
    start, end = (2.0 if drawing.width == NARROW else LABELS, drawing.width - 1.6 * VALUES)
    scale = Scale(0, max(value for _, value in pairs), start, end)
    text_y = bar_y = top
    for index, (name, value) in enumerate(pairs):
        text_y, bar_y = _band(drawing.width, top, index)
        figure = milliseconds(value) if key == "ms" else scaled(value, "B")
        _labels(drawing, text_y, bar_y, name, f"{figure}, {percent(value / total)}")
        drawing.rect(start, bar_y, scale(value) - start, 14, f"bar {css}", f"{name}: {figure}")
    return max(text_y, bar_y + 14)


def size_class(width: float) -> str:
    """The class by which the page shows one of the two drawings."""
    return "narrow" if width == NARROW else "wide"


def legend(drawing: Drawing, entries: Sequence[tuple[str, str]], y: float) -> float:
    """What the colours and lines mean, in as many lines as it takes; returns where it ends."""
    x = 2.0
    for css, name in entries:
        room = 26 + text_width(name, SMALL)
        if x > 2 and x + room > drawing.width:
            x, y = 2.0, y + 19
        if css.startswith("bar"):
            drawing.rect(x, y - 9, 14, 10, css)
        elif css == "floor":
            drawing.line(x + 7, y - 11, x + 7, y + 2, css)
        else:
            drawing.line(x, y - 4, x + 14, y - 4, css)
        drawing.text(x + 20, y, name, "small")
        x += room + 10
    return y + 8


def time_unit(most_ms: float) -> tuple[str, float]:
    """The unit of an axis of times that reaches so far, and its milliseconds."""
    return ("seconds", 1e3) if most_ms >= SECOND else ("milliseconds", 1.0)


def axis(drawing: Drawing, scale: Scale, top: float, bottom: float, most: int, name: str, unit: float = 1.0) -> None:
    """Grid lines with their values below, divided by `unit`, and the axis's name."""
    for tick in scale.ticks(most):
        drawing.line(scale(tick), top, scale(tick), bottom, "grid")
        x, half = scale(tick), text_width(tick_name(tick / unit), SMALL) / 2
        anchor: Anchor = "start" if x < half else "end" if x + half > drawing.width else "middle"
        drawing.text(x, bottom + 15, tick_name(tick / unit), "small", anchor)
    drawing.text(scale.end, bottom + 32, name, "small", "end")


def tick_name(value: float) -> str:
    """A tick's value, short."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.6g}" if value >= 1e4 else f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
