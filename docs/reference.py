"""Writes docs/reference.md from the command line itself: every command with its arguments and options.

python docs/reference.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import typer.main

import neck_export

TARGET = Path(__file__).with_name("reference.md")
HEAD = """# All commands and options

Generated from the command line by `python docs/reference.py`; do not edit.
`neck-export COMMAND --help` prints the same.
"""


def main() -> None:
    """Writes the file."""
    TARGET.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole page."""
    group: Any = typer.main.get_command(neck_export.app)
    return "\n".join([HEAD, *(command_text(name, command) for name, command in group.commands.items())])


def command_text(name: str, command: Any) -> str:
    """One command: what it does, how it is called, then a table for each group of its options."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## neck-export {name}", "", str(command.help).strip(), "", f"    neck-export {name} {usage}", ""]
    groups: dict[str, list[str]] = {}
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record and parameter.name != "help":
            title = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name.capitalize()}s"
            shown, told = (" ".join(part.split()).replace("|", "\\|") for part in record)
            groups.setdefault(title, []).append(f"| `{shown}` | {told} |")
    for title, rows in groups.items():
        lines += [f"| {title} | |", "| --- | --- |", *rows, ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
