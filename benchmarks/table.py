"""Writes README's table of figures from the newest results in benchmarks/results.

python -m benchmarks.table [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- figures: python -m benchmarks.table -->\n", "<!-- end of figures -->\n"


def main() -> None:
    """Writes the table, or with --check exits 1 where it is not what the results say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    made = with_table(text, newest("export"))
    if arguments.check:
        sys.exit(int(made != text))
    README.write_text(made, encoding="utf-8")


def newest(kind: str) -> dict[str, Any]:
    """The newest results of one kind; their names are KIND-DATE.json."""
    files = sorted(RESULTS.glob(f"{kind}-*.json"))
    if not files:
        sys.exit(f"{RESULTS}: no {kind}-*.json; run `python -m benchmarks.{kind} --json FILE` first")
    return json.loads(files[-1].read_text(encoding="utf-8"))


def with_table(readme: str, result: dict[str, Any]) -> str:
    """README with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{README}: has no place for the table ({BEGIN.strip()})")
    return before + BEGIN + "\n".join(table(result)) + "\n" + END + after


def table(result: dict[str, Any]) -> list[str]:
    """The table as Markdown."""
    machine = result["machine"]
    lines = [
        f"Full size (1008 x 1008, sam3 neck with positions), {machine['processor']}, {machine['cores']} cores, "
        f"{result['date']}, `{result['command']}`:",
        "",
        "| | median wall, s | peak memory, GB | files, GB |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        files = f"{row['file_bytes'] / 1e9:.2f}"
        lines.append(f"| {name} | {row['median_wall_s']:.1f} | {row['peak_bytes'] / 1e9:.2f} | {files} |")
    return lines


if __name__ == "__main__":
    main()
