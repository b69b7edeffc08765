"""report.html: one file that loads nothing, runs no script, and fits a screen, a phone and paper.

Jinja2 (which torch brings) fills the template and escapes every text. The policy in its head forbids loading anything
and lets no style but the page's own in, by its SHA-256.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.report.axis_plots import error_plot, roofline_plot
from benchmarks.report.bar_charts import NARROW, WIDE, kernels_chart, latency_chart, parts_chart
from benchmarks.report.findings import (
    Answer,
    Row,
    answer_sentence,
    answers,
    caution_sentence,
    error_figure,
    label_of,
    milliseconds,
    missing_sentence,
    percent,
    ranked,
    significant,
    worst_error,
)
from benchmarks.report.growth_plot import growth_plot
from benchmarks.report.machine_facts import environment
from benchmarks.report.method import TITLE, about, commands, encoder_facts, method
from benchmarks.report.tables import errors_table, tables_of
from benchmarks.results.result_files import Result, of_machine

GENERATOR = "neck-export bench"
"""Stands in the page's head; a page without it is not ours and is not replaced."""

PAGE = Path(__file__).parent / "page"


def html_page(result: Result) -> str:
    """The report as a page.

    Args:
        result: a checked result.
    """
    template = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_tied,
    ).get_template("report.html.jinja")
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    found = answers(result)
    return template.render(
        result=result,
        title=TITLE,
        generator=GENERATOR,
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        about=about(result),
        description=" ".join(answer_sentence(result, answer) for answer in found),
        views=[_view(result, answer) for answer in found],
        method=method(result),
        commands=commands(result),
        encoder=encoder_facts(result),
    )


def _tied(value: object) -> object:
    """Text whose figures stay on the line of their units."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"(?<=\d) (?=(?:ms|s|[kMGT]?B|[kMGT]?FLOP|[kMGT])\b|%)", "\u00a0", value)


def _view(result: Result, answer: Answer) -> dict[str, Any]:
    """What the template shows of one machine."""
    machine = answer.machine
    draw = functools.partial(_drawn, result, machine)
    tables = tables_of(result, machine)
    growth = [
        (chart, tables.get(f"Growth with {sweep.replace('_', ' ')}"), sweep.replace("_", "-"))
        for sweep in ("image_size", "batch")
        if (chart := draw(functools.partial(_growth, sweep=sweep)))
    ]
    features = of_machine(result, machine, "features")
    export = tables.get("What the export costs")
    sections = [("latency", "Latency"), ("missing", "Not measured"), ("accuracy", "Accuracy"), ("growth", "Growth")]
    sections += [("roofline", "Roofline"), ("parts", "Where the time goes"), ("features", "Features")]
    sections += [("masks", "Masks")] if "Masks" in tables else []
    sections += [("export", "Export")] if export else []
    kernels = of_machine(result, machine, "kernels")
    compared = [(row, errors_table(row)) for row in ranked(result, machine)]
    errors = [table for _, table in compared if table]
    return {
        "id": machine["id"],
        "name": machine["name"],
        **_answer(result, answer),
        "missing": tables.get("Not measured"),
        "missing_sentence": missing_sentence(result, machine),
        "sections": [*sections, ("environment", "Machine")],
        "latency": draw(latency_chart),
        "results": tables.get("Latency and error"),
        "costs": tables.get("Costs"),
        "plain": tables.get("What the rewrites buy"),
        "accuracy": draw(error_plot),
        "errors": errors,
        "open": next((table for row, table in compared if row is answer.best), None),
        "growth": growth,
        "roofline": draw(roofline_plot),
        "parts": draw(parts_chart),
        "parts_table": tables.get("Work"),
        "kernels": draw(lambda result, machine, width: kernels_chart(kernels, width)),
        "features": features and _features(features),
        "candidate": features and label_of(result, features["candidate"]),
        "masks": tables.get("Masks"),
        "export": export,
        "environment": environment(machine),
    }


def _drawn(result: Result, machine: dict[str, Any], chart: Any) -> dict[str, Markup] | None:
    """A chart at both widths, None where it has nothing to show."""
    wide, narrow = (chart(result, machine, width) for width in (WIDE, NARROW))
    # ElementTree escaped every text and attribute
    return {"wide": Markup(wide), "narrow": Markup(narrow)} if wide and narrow else None


def _growth(result: Result, machine: dict[str, Any], width: float, sweep: str) -> str | None:
    return growth_plot(result, machine, sweep, width)


def _answer(result: Result, answer: Answer) -> dict[str, Any]:
    """The first screen: the backend, four figures, and a caution where a faster one must not be taken."""
    best = answer.best
    facts = _facts(result, best) if best else []
    return {"best": best and best["label"], "facts": facts, "caution": caution_sentence(answer)}


def _facts(result: Result, best: Row) -> list[dict[str, str]]:
    latency, ratio = best["latency"], best.get("ratio")
    high = f"p90 {milliseconds(latency['p90_ms'])}, p99 {milliseconds(latency['p99_ms'])}"
    spread = f"median of {latency['runs']} run{'s' * (latency['runs'] > 1)}; {high}"
    facts = [{"name": "Latency", "figure": milliseconds(latency["p50_ms"]), "note": spread}]
    if ratio:
        note = f"of the latency of {label_of(result, ratio['to'])}; {ratio['low']:.2f} to {ratio['high']:.2f} by round"
        facts.append({"name": "Ratio", "figure": f"{ratio['median']:.2f}", "note": note})
    if best.get("share_of_floor") is not None:
        note = f"of this machine's limit: the floor is {milliseconds(best.get('floor_ms'))} at its own measured rates"
        facts.append({"name": "Reached", "figure": percent(best["share_of_floor"]), "note": note})
    limits = [error["tolerance"]["relative_l2"] for error in best["errors"] or [] if error.get("tolerance")]
    note = "relative L2 of the worst output" + (f"; tolerance {error_figure(max(limits))}" if limits else "")
    return [*facts, {"name": "Error", "figure": error_figure(worst_error(best)), "note": note}]


def _features(features: dict[str, Any]) -> dict[str, Any]:
    levels = [
        {
            **level,
            "factor_text": significant(level["factor"], 1),
            "largest_text": "not finite"
            if level["largest_difference"] is None
            else error_figure(level["largest_difference"]),
        }
        for level in features["levels"]
    ]
    return {**features, "levels": levels}
