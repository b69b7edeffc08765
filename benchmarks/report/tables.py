"""The results as tables of text, the same ones for the page, for Markdown and for the README."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.report.findings import (
    NOTHING,
    Row,
    closed_form,
    error_figure,
    label_of,
    may_be_used,
    median_ms,
    milliseconds,
    missing,
    numbers,
    percent,
    point_of,
    ranked,
    ratio_figure,
    scaled,
    seconds,
    significant,
    size_name,
    swept,
    verdict,
    worst_error,
)
from benchmarks.results.result_files import Result, of_machine


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: cells; the first one names its row.
        words: which columns are words, set left; the others are figures.
        warned: rows to be marked, such as those outside tolerance.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = (0,)
    warned: tuple[int, ...] = ()


def results_table(result: Result, machine: dict[str, Any]) -> Table:
    """Every measured row at the encoder's own size, fastest first."""
    rows, order = ranked(result, machine), numbers(result, machine)
    reference = next((label_of(result, row["ratio"]["to"]) for row in rows if row.get("ratio")), None)
    bounded = any(row.get("lower_bound_ms") for row in rows)
    head: tuple[str, ...] = (
        "Backend",
        "p50",
        "p90",
        "p95",
        "p99",
        "Ratio",
        "Relative L2",
        "Tolerance",
        "Floor / p50",
    )
    head += ("Lower bound",) if bounded else ()
    cells = tuple(
        (
            f"{order[row['backend']]}. {row['label']}",
            *(milliseconds(row["latency"][f"p{percentile}_ms"]) for percentile in (50, 90, 95, 99)),
            ratio_figure(row),
            error_figure(worst_error(row)),
            verdict(row).removesuffix(" tolerance"),
            percent(row.get("share_of_floor")),
            *((milliseconds(row.get("lower_bound_ms")),) if bounded else ()),
        )
        for row in rows
    )
    size = size_name(result["encoder"]["image_size"], result["encoder"]["batch"])
    caption = (
        f"All measured backends at {size}. The relative L2 error is that of the output with the largest error. The "
        "floor is the lowest possible latency, given the matrix multiplication and copy rates measured on this machine"
    )
    if reference:
        caption += (
            f". The ratio is the latency divided by the latency of {reference}. The column Ratio shows the median "
            "ratio of all rounds, followed by the lowest and the highest ratio in parentheses"
        )
    if bounded:
        caption += (
            ". The column Lower bound shows the lowest latency that a TensorRT plan can reach on the GPU, calculated "
            "from the published arithmetic throughput and memory bandwidth of the GPU"
        )
    warned = tuple(index for index, row in enumerate(rows) if not may_be_used(row))
    return Table(f"{caption}.", head, cells, (0, 7), warned)


def costs_table(result: Result, machine: dict[str, Any]) -> Table:
    """The costs of each measured row besides its time."""
    order = numbers(result, machine)
    head = ("Backend", "Images/s", "Host peak", "Device peak", "Load", "Build", "File", "Runs", "Warm-up", "Note")
    cells = tuple(
        (
            f"{order[row['backend']]}. {row['label']}",
            significant(row["images_per_s"]),
            scaled(row.get("peak_host_bytes"), "B"),
            scaled(row.get("peak_device_bytes"), "B"),
            seconds(row.get("load_s")),
            seconds(row.get("build_s")),
            scaled(row.get("file_bytes"), "B"),
            str(row["latency"]["runs"]),
            NOTHING if row.get("warm_up_runs") is None else str(row["warm_up_runs"]),
            row.get("note") or "",
        )
        for row in ranked(result, machine)
    )
    return Table(
        "Throughput, peak host and device memory, load and build time, file size, timed and warm-up runs",
        head,
        cells,
    )


def missing_table(result: Result, machine: dict[str, Any]) -> Table | None:
    """Backends that were requested but not measured, with the reasons."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in missing(result, machine):
        sizes = groups.setdefault((row["label"], row["status"], row["reason"] or NOTHING), [])
        size = size_name(row["image_size"], row["batch"])
        sizes += [size] if size not in sizes else []
    rows = tuple((label, "; ".join(sizes), status, reason) for (label, status, reason), sizes in groups.items())
    head = ("Backend", "Size", "Status", "Reason")
    return Table("Backends that were requested but not measured", head, rows, (0, 1, 2, 3)) if rows else None


def plain_table(result: Result, machine: dict[str, Any]) -> Table | None:
    """The effect of the exact rewrites: the latency of each rewritten row divided by that of its plain twin."""
    rows = tuple(
        (row["label"], label_of(result, row["ratio_to_plain"]["to"]), ratio_figure(row, "ratio_to_plain"))
        for row in ranked(result, machine)
        if row.get("ratio_to_plain")
    )
    caption = (
        "Latency with the graph rewrites of neck-export, divided by the latency without them (column Plain). Each "
        "ratio is the median of all rounds, followed by the lowest and highest ratio in parentheses"
    )
    return Table(caption, ("Backend", "Plain", "Ratio"), rows, (0, 1)) if rows else None


def errors_table(row: Row) -> Table | None:
    """The error figures of every output of a row."""
    errors = row.get("errors") or []
    head = ("Output", "Max abs", "Mean abs", "Relative L2", "Tolerance", "Cosine", "Not finite", "Verdict")
    cells = tuple(
        (
            error["name"],
            error_figure(error["max_abs"]),
            error_figure(error["mean_abs"]),
            error_figure(error["relative_l2"]),
            error_figure((error.get("tolerance") or {}).get("relative_l2")),
            NOTHING if error["cosine"] is None else f"{error['cosine']:.8f}",
            str(error["non_finite"]),
            "within" if error["passed"] else "outside",
        )
        for error in errors
    )
    warned = tuple(index for index, error in enumerate(errors) if not error["passed"])
    caption = f"{row['label']}: numerical errors of every output, compared with PyTorch in FP32"
    return Table(caption, head, cells, (0, 7), warned) if cells else None


def growth_table(result: Result, machine: dict[str, Any], sweep: str) -> Table | None:
    """Median latency of each backend at each point of a sweep, and the operations there."""
    lines = swept(result, machine, sweep)
    points = sorted({point_of(row) for rows in lines.values() for row in rows})
    if not points:
        return None
    order, known = numbers(result, machine), closed_form(result, machine)
    head = ("Backend", *(size_name(point) if sweep == "image_size" else f"batch {point[2]}" for point in points))
    cells = []
    for backend in sorted(lines, key=lambda name: order[name]):
        found = {point_of(row): milliseconds(median_ms(row)) for row in lines[backend]}
        figures = (found.get(point, NOTHING) for point in points)
        cells.append((f"{order[backend]}. {label_of(result, backend)}", *figures))
    cells.append(("operations", *(scaled(known.get(point), "FLOP") for point in points)))
    held = f"batch {points[0][2]}" if sweep == "image_size" else size_name(points[0])
    caption = (
        f"Median latency of each backend at {held}. The last row gives the calculated number of arithmetic "
        "operations in one inference call"
    )
    return Table(caption, head, tuple(cells))


def parts_table(result: Result, machine: dict[str, Any]) -> Table:
    """Operations, least bytes and time of each part."""
    work = of_machine(result, machine, "work")
    of = work.get("parts_of")
    caption = "For each part of the encoder: calculated number of operations, calculated minimum memory traffic" + (
        f", and time measured with {label_of(result, of)}" if of else ""
    )
    rows = tuple(
        (part["part"], scaled(part["operations"], "FLOP"), scaled(part["bytes"], "B"), milliseconds(part["ms"]))
        for part in work["parts"]
    )
    total = ("all", scaled(work["operations"], "FLOP"), scaled(work["least_bytes"], "B"), NOTHING)
    return Table(caption, ("Part", "Operations", "Memory traffic", "Time"), (*rows, total))


def export_table(export: dict[str, Any] | None) -> Table | None:
    """The cost of the export itself (benchmarks/export.py)."""
    if not export:
        return None
    machine = export["machine"]
    caption = (
        f"Time and memory of an export, measured on {machine['processor']}, {machine['cores']} cores, "
        f"{export['date']}, with {export['command']}"
    )
    rows = tuple(
        (
            name.replace("`", ""),
            seconds(row["median_wall_s"]),
            scaled(row["peak_bytes"], "B"),
            scaled(row["file_bytes"], "B"),
        )
        for name, row in export["rows"].items()
    )
    return Table(caption, ("What", "Median wall time", "Peak memory", "Files"), rows)


def masks_table(masks: list[dict[str, Any]] | None) -> Table | None:
    """Results of `neck-export masks`: verdicts, and the image with the largest difference."""
    head = ("File", "Verdict", "Mean IoU", "Worst IoU", "Objects", "Lost", "Found", "Least alike", "Whole model")
    rows = tuple(
        (
            f"{one['file']}, {one['precision'].upper()}",
            "masks agree" if one["passed"] else "masks differ",
            *(f"{one[name]:.4f}" for name in ("mean_iou", "worst_iou")),
            *(str(one[name]) for name in ("objects", "lost", "found")),
            one["worst_image"],
            one["method"],
        )
        for one in masks or []
    )
    warned = tuple(index for index, one in enumerate(masks or []) if not one["passed"])
    caption = (
        "Results of `neck-export masks`: the masks of the whole model with an exported file as its encoder, compared "
        "with the masks of the unchanged model"
    )
    return Table(caption, head, rows, (0, 1, 7, 8), warned) if rows else None


def tables_of(result: Result, machine: dict[str, Any]) -> dict[str, Table]:
    """Every table of a machine that has rows, by title, in the order of a report."""
    found = {
        "Latency and error": results_table(result, machine),
        "Costs": costs_table(result, machine),
        "Speedup from the graph rewrites": plain_table(result, machine),
        "Not measured": missing_table(result, machine),
        "Latency by image size": growth_table(result, machine, "image_size"),
        "Latency by batch": growth_table(result, machine, "batch"),
        "Work": parts_table(result, machine),
        "Masks": masks_table(of_machine(result, machine, "masks")),
        "Time and memory of the export": export_table(of_machine(result, machine, "export")),
    }
    return {title: table for title, table in found.items() if table and table.rows}
