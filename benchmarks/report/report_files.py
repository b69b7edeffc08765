"""The folder that a benchmark leaves: report.json, report.md, report.html."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.errors import BenchError
from benchmarks.report.html import GENERATOR, html_page
from benchmarks.report.markdown import MARK, markdown_page
from benchmarks.results.result_files import Result, can_check, check_result, read_result
from export.contract.atomic import disk_errors, publish, staging

NAMES = ("report.md", "report.html", "report.json")
"""In the order in which they are put in place: where the JSON is new, the others are."""


def write_report(result: Result, folder: Path) -> tuple[Path, Path, Path]:
    """Writes the three files, each whole: under another name, flushed, then renamed.

    Args:
        result: what was measured.
        folder: where they go; it is made where it is missing.

    Returns:
        The paths of report.json, report.md and report.html.

    Raises:
        BenchError: a result of another form; a file in the folder that is not ours, or of another schema; no room.
    """
    if can_check():  # else the result says that it is not
        check_result(result, "new result")
    with disk_errors(BenchError, folder):
        check_folder(folder)
        markdown, page, data = (folder / name for name in NAMES)
        stored = json_text(result)  # first: it refuses what the pages would show
        texts = {markdown: markdown_page(result), page: html_page(result), data: stored}
        with staging(data) as staged:
            for path, text in texts.items():
                (staged / path.name).write_text(text, encoding="utf-8")
            publish(staged, data)
    return data, markdown, page


def check_folder(folder: Path) -> None:
    """Refuses a folder whose report is not ours to replace; call it before the measurement too.

    Raises:
        BenchError: report.json of another schema or no results at all, report.md or report.html that was not written
            by this program, or the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise BenchError(f"{folder}: --output is a file, not a folder; choose another --output")
    markdown, page, data = (folder / name for name in NAMES)
    if data.exists():
        try:
            read_result(data)
        except BenchError as error:
            raise BenchError(
                f"{error}. The existing file was not changed; move it, or choose another --output"
            ) from None
    for path, mark in ((markdown, MARK), (page, f'content="{GENERATOR}"')):
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace")[:4096]:
            raise BenchError(
                f"{path}: this file was not written by `{GENERATOR}` and will not be overwritten; move the file, or "
                "choose another --output"
            )


def json_text(result: Result) -> str:
    """A result as it is stored.

    Raises:
        BenchError: a figure that is not finite, which JSON cannot hold.
    """
    try:
        return json.dumps(result, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise BenchError(
            "the report was not written, because a value in the benchmark result is NaN or infinite, and JSON cannot "
            "represent NaN and infinity. If you changed the result in Python, replace each NaN or infinite value with "
            "None. If you did not change the result, please report this error as a bug in neck-export"
        ) from None
