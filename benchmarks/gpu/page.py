"""A page of text: in 20 lines, what a session learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.report.findings import (
    answer_sentence,
    answers,
    error_figure,
    median_ms,
    milliseconds,
    ranked,
    ratio_figure,
    scaled,
    size_name,
    swept,
    verdict,
    worst_error,
)

MOST_LINES, MOST_ROWS = 20, 9


def page_lines(
    stages: Mapping[str, Mapping[str, Any]],
    result: dict[str, Any],
    doctor: Mapping[str, Any],
    rates: Mapping[str, Any],
) -> list[str]:
    """The page.

    Args:
        stages: of each stage `outcome`, `reason`, `seconds`.
        result: the results; empty where there are none.
        doctor: what the first stage found; empty where it did not end.
        rates: what the stage of that name found; empty where it did not end.
    """
    lines = [
        *_machine(doctor, rates.get("rates")),
        *(_figures(result) if result else ["No backend was measured, so there are no results."]),
    ]
    done = [f"{name} {one['seconds']:.0f} s" for name, one in stages.items() if one["outcome"] == "done"]
    lines.append(f"Stages done: {', '.join(done) or 'none'}.")
    left = [f"{name} {one['outcome']}: {one['reason']}" for name, one in stages.items() if one["outcome"] != "done"]
    room = MOST_LINES - len(lines)
    if len(left) > room:
        left = [*left[: room - 1], f"{len(left) - room + 1} more stages are not done; see session.json"]
    return [line if len(line) <= 300 else f"{line[:297]}..." for line in (*lines, *left)]


def _machine(doctor: Mapping[str, Any], rates: Mapping[str, Any] | None) -> list[str]:
    if "environment" not in doctor:
        return ["The machine is unknown, because the stage `doctor`, which examines the machine, did not finish."]
    told = doctor["environment"]
    gpu, versions = told["gpu"], told["versions"]
    name = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{told['processor']}, {told['cores']} cores, no GPU"
    lines = [f"{name}, torch {versions['torch']}, Python {told['python']}"]
    if rates:
        flops = ", ".join(f"{key.upper()} {scaled(rate, 'FLOP/s')}" for key, rate in rates["flops_per_s"].items())
        lines.append(
            f"Measured rates of the machine: matrix multiplication {flops}; memory copy "
            f"{scaled(rates['copy_bytes_per_s'], 'B/s')}"
        )
    return lines + ([f"Warning: {doctor['warning']}"] if doctor.get("warning") else [])


def _figures(result: dict[str, Any]) -> list[str]:
    (machine,) = result["machines"]
    lines = [answer_sentence(result, answers(result)[0])]
    rows = ranked(result, machine)
    for row in rows[:MOST_ROWS]:
        figures = (milliseconds(median_ms(row)), ratio_figure(row), error_figure(worst_error(row)), verdict(row))
        lines.append(
            f"  {row['label']}: p50 latency {figures[0]}, {figures[1]} times the latency of the reference, relative L2 "
            f"error {figures[2]}, {figures[3]}"
        )
    if len(rows) > MOST_ROWS:
        lines.append(f"  {len(rows) - MOST_ROWS} slower backends are listed in report.md")
    for sweep in ("image_size", "batch"):
        for found in list(swept(result, machine, sweep).values())[-1:]:
            points = (f"{size_name(row['image_size'], row['batch'])} {milliseconds(median_ms(row))}" for row in found)
            lines.append(f"{found[0]['label']}: {'; '.join(points)}")
    outcomes = [one["outcome"] for one in result.get("checks", [])]
    told = ", ".join(f"{outcomes.count(one)} {one}" for one in ("passed", "failed", "not run"))
    return [
        *lines,
        f"Checks: {told}. One check compares the SHA-256 of the encoder's random weights with the SHA-256 from earlier "
        "measurements. All remaining checks are pytest tests with the marker gpu.",
    ]
