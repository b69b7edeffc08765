"""report.md: the same tables as the page's, for a terminal, a pull request, or a reader without a browser."""

from __future__ import annotations

import re

from benchmarks.report.findings import answer_sentence, answers, caution_sentence, missing_sentence, ranked
from benchmarks.report.method import TITLE, about, commands, encoder_facts, environment, method
from benchmarks.report.tables import Table, errors_table, tables_of
from benchmarks.results.result_files import Result

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
        if caution := caution_sentence(answer):
            lines += [escaped(caution), ""]
    for machine in result["machines"]:
        lines += [f"## {escaped(machine['name'])}", ""]
        tables = tables_of(result, machine)
        tables |= {f"Errors: {row['label']}": table for row in ranked(result, machine) if (table := errors_table(row))}
        pairs = tuple(environment(machine))
        tables["Machine and versions"] = Table(
            "Hardware and software versions, as reported by the machine", ("", ""), pairs, (0, 1)
        )
        for title, table in tables.items():
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
