"""report.md: the same tables as the page's, for a terminal, a pull request, or a reader without a browser."""

from __future__ import annotations

import re

from benchmarks.report.findings import (
    answer_sentence,
    answers,
    error_figure,
    median_ms,
    milliseconds,
    missing_sentence,
    ranked,
    worst_error,
)
from benchmarks.report.html import TITLE, about, commands, encoder_facts, method
from benchmarks.report.tables import (
    Table,
    costs_table,
    environment,
    errors_table,
    export_table,
    growth_table,
    missing_table,
    parts_table,
    plain_table,
    results_table,
)
from benchmarks.results.result_files import Result, of_machine

MARK = "<!-- neck-export bench -->"
"""First line of the file; one without it is not ours and is not replaced."""


def markdown_page(result: Result) -> str:
    """The report as Markdown.

    Args:
        result: a checked result.
    """
    lines = [MARK, f"# {TITLE}", "", escaped(about(result)), ""]
    for answer in answers(result):
        lines += [f"**{escaped(answer_sentence(result, answer))}**", ""]
        if answer.missing:
            lines += [escaped(missing_sentence(result, answer.machine)), ""]
        if answer.fastest_outside:
            row = answer.fastest_outside
            latency, error = milliseconds(median_ms(row)), error_figure(worst_error(row))
            text = f"{row['label']} took {latency} but is not within tolerance (worst relative L2 {error})."
            lines += [escaped(text), ""]
    for machine in result["machines"]:
        lines += [f"## {escaped(machine['name'])}", ""]
        tables: list[tuple[str, Table | None]] = [
            ("Latency and error", results_table(result, machine)),
            ("Costs", costs_table(result, machine)),
            ("What the rewrites buy", plain_table(result, machine)),
            ("Not measured", missing_table(result, machine)),
            ("Growth with image size", growth_table(result, machine, "image_size")),
            ("Growth with batch", growth_table(result, machine, "batch")),
            ("Work", parts_table(result, machine)),
            ("What the export costs", export_table(of_machine(result, machine, "export"))),
        ]
        tables += [(f"Errors: {row['label']}", errors_table(row)) for row in ranked(result, machine)]
        pairs = tuple(environment(machine))
        tables.append(("Machine and versions", Table("As the machine tells them", ("", ""), pairs, (0, 1))))
        for title, table in tables:
            if table and table.rows:
                lines += [f"### {escaped(title)}", "", escaped(table.caption), "", *table_lines(table), ""]
    lines += ["## Method and command", "", *(f"- {escaped(line)}" for line in method(result)), ""]
    for command in commands(result):
        lines += [*("    " + line for line in command.splitlines()), ""]
    facts = Table("", ("Encoder", ""), tuple(encoder_facts(result)), (0, 1))
    return "\n".join([*lines, *table_lines(facts), ""])


def table_lines(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    marks = (" --- " if index in table.words else " ---: " for index in range(len(table.head)))
    rows = (" | ".join(escaped(cell) for cell in row) for row in (table.head, *table.rows))
    head, *body = (f"| {row} |" for row in rows)
    return [head, f"|{'|'.join(marks)}|", *body]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_<>|\[\]#~])", r"\\\1", " ".join(text.split()))
