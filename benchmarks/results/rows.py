"""Samples -> the rows of a result."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measure.backends import REFERENCE, Backend
from benchmarks.measure.measure_point import MeasurePoint, Schedule
from benchmarks.measure.samples import Samples
from benchmarks.roofline import floor_ms, total_bytes, total_operations
from engines.run.latency import summarize

MACHINE = "m0"

NOT_BEGUN = "not started: this run reached its time limit (--minutes); run the command again to measure this backend"
NOT_ENDED = "not finished: this run reached its time limit (--minutes); run the command again to measure this backend"


def empty_row(backend: Backend, point: MeasurePoint, status: str, reason: str | None) -> dict[str, Any]:
    """A row without figures."""
    figures = (
        *("times_ms", "warm_up_runs", "latency", "images_per_s", "load_s", "build_s", "file_bytes", "peak_host_bytes"),
        *("peak_device_bytes", "errors", "passed", "ratio", "ratio_to_plain", "floor_ms", "share_of_floor"),
        *("lower_bound_ms", "note"),
    )
    return {
        "machine": MACHINE,
        "backend": backend.id,
        "label": backend.label,
        **{name: getattr(backend, name) for name in ("device", "precision", "module")},
        "image_size": list(point.image_size),
        "batch": point.batch,
        "sweep": point.sweep,
        "status": status,
        "reason": reason,
        **dict.fromkeys(figures),
    }


def make_row(
    backend: Backend,
    point: MeasurePoint,
    samples: Samples,
    roofline: Mapping[str, Any],
    plain: str | None = None,
) -> dict[str, Any]:
    """The row of a backend at a point.

    Args:
        backend, point: which.
        samples: what was measured.
        roofline: the machine's rates.
        plain: the backend that differs by the plain module alone, for `ratio_to_plain`.
    """
    where = {"point": point.name, "backend": backend.id}
    failed = samples.last("failed", **where)
    rounds = samples.times(point.name, backend.id)
    if failed or not rounds:
        status, reason = ("failed", failed["reason"]) if failed else ("unavailable", _why_waiting(samples, where))
        return empty_row(backend, point, status, reason)
    times = [time for times in rounds for time in times]
    latency, loads = summarize(times), samples.all("load", **where)
    errors = samples.last("errors", **where) or {"errors": None, "passed": None}
    memory = samples.all("memory", **where)
    floor = floor_ms(point.parts, backend.precision, roofline["flops_per_s"], roofline["copy_bytes_per_s"])
    return {
        **empty_row(backend, point, "measured", None),
        "times_ms": times,
        "warm_up_runs": point.schedule.warm_up,
        "latency": dataclasses.asdict(latency),
        "images_per_s": point.batch * 1e3 / latency.mean_ms,
        **{name: loads[0][name] if loads else None for name in ("load_s", "build_s", "file_bytes")},
        **{name: _largest(memory, name) for name in ("peak_host_bytes", "peak_device_bytes")},
        "errors": errors["errors"],
        "passed": errors["passed"],
        "ratio": ratio(samples, point.name, backend.id, REFERENCE),
        "ratio_to_plain": ratio(samples, point.name, backend.id, plain) if plain else None,
        "floor_ms": floor,
        "share_of_floor": floor / latency.p50_ms if floor else None,
        "lower_bound_ms": loads[0].get("lower_bound_ms") if loads else None,
        "note": _note(backend.id, loads, len(rounds), point.schedule),
    }


def _why_waiting(samples: Samples, where: Mapping[str, str]) -> str:
    """Why a backend has no figure though it did not fail: a rerun may measure it."""
    short, cut = samples.last("short", **where), samples.last("cut", **where)
    if cut is None:
        return str(short["reason"]) if short else NOT_BEGUN
    return (
        f"not finished: {cut['reason']}; if you run the command again, this backend is allowed twice the time"
        if cut.get("late")
        else NOT_ENDED
    )


def is_waiting(row: Mapping[str, Any]) -> bool:
    """Whether a rerun measures a row for which there was too little time."""
    return row["status"] == "unavailable" and str(row["reason"]).startswith(("not started: ", "not finished: "))


def _largest(lines: Sequence[Mapping[str, Any]], name: str) -> int | None:
    found = [line[name] for line in lines if line[name] is not None]
    return max(found) if found else None


def _note(name: str, lines: Sequence[Mapping[str, Any]], rounds: int, schedule: Schedule) -> str | None:
    notes = ["reference for all errors and ratios"] if name == REFERENCE else []
    notes += dict.fromkeys(line["note"] for line in lines if line.get("note"))
    loads = len(lines)
    if loads > 1:
        warm_up = f"{schedule.warm_up} warm-up run{'s' * (schedule.warm_up != 1)} after each load"
        notes.append(
            f"the encoder was loaded {loads} times in {rounds} rounds, because memory was scarce or the run was "
            f"resumed; {warm_up}"
        )
    if rounds < schedule.rounds:
        notes.append(
            f"only {rounds} of {schedule.rounds} rounds were measured within the time limit; run the command again to "
            "continue"
        )
    return "; ".join(notes) or None


def ratio(samples: Samples, point: str, name: str, to: str) -> dict[str, Any] | None:
    """Latency over another backend's, the median of each round against the other's in the same round.

    `low` and `high` are the smallest and largest of the rounds.
    """
    own, other = samples.by_round(point, name), samples.by_round(point, to)
    ratios = [statistics.median(own[at]) / statistics.median(other[at]) for at in own if at in other]
    if not ratios:
        return None
    return {"to": to, "median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def plain_twin(backend: Backend, backends: Sequence[Backend]) -> str | None:
    """The backend that differs from a rewritten one only by the plain module."""
    if backend.module == "plain":
        return None
    same = dataclasses.asdict(backend) | {"id": "", "label": "", "module": "plain"}
    return next(
        (one.id for one in backends if dataclasses.asdict(one) | {"id": "", "label": ""} == same),
        None,
    )


def best_rates(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best of several measurements of the machine's rates: what else ran then only made them less."""
    first = found[0]
    flops = {name: max((one["flops_per_s"][name] or 0.0) for one in found) or None for name in first["flops_per_s"]}
    return {**first, "flops_per_s": flops, "copy_bytes_per_s": max(one["copy_bytes_per_s"] for one in found)}


def raise_rates(
    roofline: Mapping[str, Any], points: Sequence[MeasurePoint], backends: Sequence[Backend], samples: Samples
) -> dict[str, Any]:
    """The rates, raised to what a backend reached on the whole encoder, because one multiplication is only a sample.

    Returns:
        The roofline, with `reached_by`: the backend that raised a precision's rate, None where the product stands.
    """
    flops, reached_by = dict(roofline["flops_per_s"]), dict.fromkeys(roofline["flops_per_s"])
    for point in points:
        for one in backends:
            for times in samples.times(point.name, one.id):
                reached = total_operations(point.parts) / min(times) * 1e3
                if flops.get(one.precision) and reached > flops[one.precision]:
                    flops[one.precision], reached_by[one.precision] = reached, one.id
    return {**roofline, "flops_per_s": flops, "reached_by": reached_by}


def work_of(point: MeasurePoint, samples: Samples) -> dict[str, Any]:
    """Operations and least bytes of the reference by part, with the milliseconds of each where they were measured."""
    line, run = samples.last("parts", point=point.name), point.plain_parts
    ms = dict(line["parts_ms"]) if line else {}
    parts = [
        {"part": one.part, "operations": one.operations, "bytes": one.bytes("fp32"), "ms": ms.pop(one.part, None)}
        for one in run
        if one.operations or one.bytes("fp32")
    ]
    parts += [{"part": name, "operations": 0, "bytes": 0, "ms": max(0.0, value)} for name, value in ms.items()]
    return {
        "operations": total_operations(run),
        "least_bytes": total_bytes(run, "fp32"),
        "parts": parts,
        "parts_of": REFERENCE,
    }


def best_candidate(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The fastest measured backend of the main point within tolerance, the reference aside."""
    fit = [row for row in rows if row["status"] == "measured" and row["passed"] and not row["sweep"]]
    return min(fit, key=lambda row: row["latency"]["p50_ms"], default={"backend": None})["backend"]
