"""report.html: one file that loads nothing, runs no script, and fits a screen, a phone and paper.

Jinja2 fills the template and escapes every text. The policy in its head forbids loading anything and lets no style but
the page's own in, by its SHA-256.
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

from benchmarks.report.charts import error_plot, growth_plot, kernels_chart, latency_chart, parts_chart, roofline_plot
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
from benchmarks.report.method import TITLE, about, commands, encoder_facts, environment, method
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
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    found = answers(result)
    return (
        _templates()
        .get_template("report.html.jinja")
        .render(
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
    )


@functools.cache
def _templates() -> Environment:
    """Jinja's environment, which remembers the template that it compiled."""
    jinja = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_tied,
    )
    jinja.filters |= {"error_figure": error_figure, "significant": significant}
    return jinja


def _tied(value: object) -> object:
    """Text whose figures stay on the line of their units."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"(?<=\d) (?=(?:ms|s|[kMGT]?B|[kMGT]?FLOP|[kMGT])\b|%)", "\u00a0", value)


def _view(result: Result, answer: Answer) -> dict[str, Any]:
    """What the template shows of one machine."""
    machine, best = answer.machine, answer.best
    tables, features = tables_of(result, machine), of_machine(result, machine, "features")
    sections = {"latency": "Latency", "missing": "Not measured", "accuracy": "Accuracy", "growth": "Growth"}
    sections |= {"roofline": "Roofline", "parts": "Where the time goes", "features": "Features"}
    sections |= {"masks": "Masks"} if "Masks" in tables else {}
    sections |= {"export": "Export"} if "Time and memory of the export" in tables else {}
    compared = [(row, errors_table(row)) for row in ranked(result, machine)]
    return {
        "id": machine["id"],
        "name": machine["name"],
        "best": best and best["label"],
        "facts": _facts(result, best) if best else [],
        "caution": caution_sentence(answer),
        "missing_sentence": missing_sentence(result, machine),
        "sections": {**sections, "environment": "Machine"},
        "tables": tables,
        "latency": latency_chart(result, machine),
        "accuracy": error_plot(result, machine),
        "growth": {sweep: growth_plot(result, machine, sweep) for sweep in ("image_size", "batch")},
        "roofline": roofline_plot(result, machine),
        "parts": parts_chart(result, machine),
        "kernels": kernels_chart(result, machine),
        "errors": [table for _, table in compared if table],
        "open": next((table for row, table in compared if row is best), None),
        "features": features,
        "candidate": features and label_of(result, features["candidate"]),
        "environment": environment(machine),
    }


def _facts(result: Result, best: Row) -> list[dict[str, str]]:
    """The four figures of the first screen."""
    latency, ratio = best["latency"], best.get("ratio")
    high = f"p90 {milliseconds(latency['p90_ms'])}, p99 {milliseconds(latency['p99_ms'])}"
    spread = f"median of {latency['runs']} run{'s' * (latency['runs'] > 1)}; {high}"
    facts = [{"name": "Latency", "figure": milliseconds(latency["p50_ms"]), "note": spread}]
    if ratio:
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        note = f"latency divided by that of {label_of(result, ratio['to'])} ({spread} over the rounds)"
        facts.append({"name": "Ratio", "figure": f"{ratio['median']:.2f}", "note": note})
    if best.get("share_of_floor") is not None:
        floor = milliseconds(best.get("floor_ms"))
        note = f"of the estimated maximum speed; 100 % would be a latency of {floor}"
        facts.append({"name": "Reached", "figure": percent(best["share_of_floor"]), "note": note})
    limits = [error["tolerance"]["relative_l2"] for error in best["errors"] or [] if error.get("tolerance")]
    note = "largest relative L2 error of an output" + (f"; tolerance {error_figure(max(limits))}" if limits else "")
    return [*facts, {"name": "Error", "figure": error_figure(worst_error(best)), "note": note}]
