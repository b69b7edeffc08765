"""Lists every message of the product with its file and line: python tests/messages.py [FOLDER ...]

Listed are errors, warnings, notes and progress messages of Python (every string of prose that is no docstring and no
help text of an option) and every string of prose in the C++ library. `--random 60 --seed 1` draws some of them, to be
read by someone who does not know the code; `--help-lines 40` draws lines of `neck-export COMMAND --help`.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("neck", "export", "engines", "benchmarks", "neck_export.py")
PROGRESS = {"report", "step", "count", "counted"}
"""Functions whose first string is a message even if it is a single word."""

NO_MESSAGES = {"Option", "Argument", "but", "Target", "_trt", "encode"}
"""Calls whose strings are help texts of options, sources of the table of targets, or bytes to be hashed."""

CPP_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')


class Message(NamedTuple):
    """One message: where it is, what it is passed to (a class, a function or a variable), and its text.

    A value that is put into the text is shown as the expression in braces.
    """

    path: Path
    line: int
    kind: str
    text: str


def render(node: ast.expr) -> str:
    """The text of a string expression."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(render(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return render(node.left) + render(node.right)
    if not isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node) + "}"
    conversion = f"!{chr(node.conversion)}" if node.conversion != -1 else ""
    form = ":" + render(node.format_spec) if node.format_spec else ""
    return "{" + ast.unparse(node.value) + conversion + form + "}"


def is_text(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add) and (is_text(node.left) or is_text(node.right))
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def is_prose(text: str) -> bool:
    """Whether a text has three words in a row, apart from the values put into it."""
    return re.search(r"[A-Za-z'-]+[,:;]? [A-Za-z'-]+[,:;]? [A-Za-z]", re.sub(r"\{[^}]*\}", "X", text)) is not None


def python_messages(path: Path) -> Iterator[Message]:
    """The messages of a Python file, in its order."""

    def search(node: ast.AST, kind: str) -> Iterator[Message]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in NO_MESSAGES or name.startswith("re."):
                return
            if name.rpartition(".")[2] in PROGRESS:  # the strings after the first are units
                first = next((one for one in node.args if is_text(one)), None)
                for one in node.args:
                    yield from search(one, name if one is first else "unit")
                return
            if not name.endswith((".join", ".format", ".replace")):
                kind = name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.Return | ast.Yield | ast.FunctionDef | ast.ClassDef):
            kind = getattr(node, "name", type(node).__name__.lower())
        if is_text(node):
            text = render(node)  # type: ignore[arg-type]
            if is_prose(text) or (kind.rpartition(".")[2] in PROGRESS and text.strip(" .")):
                yield Message(path, node.lineno, kind, text)  # type: ignore[attr-defined]
                return
        for child in ast.iter_child_nodes(node):
            yield from search(child, kind)

    yield from search(ast.parse(path.read_text(encoding="utf-8")), "")


def cpp_messages(path: Path) -> Iterator[Message]:
    """The messages of a C++ file: the strings of one statement make one message."""
    line = 1
    code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
    for statement in re.split(r"(?<=[;{}])(?=\s*\n)", code):
        start = line + len(statement) - len(statement.lstrip("\n"))
        line += statement.count("\n")
        if statement.lstrip().startswith("#include"):
            continue
        parts = CPP_STRING.split(statement)
        text = ""
        for index, part in enumerate(parts):
            value = re.sub(r"\s+", " ", part).strip(" +,()")
            text += part if index % 2 else ("{" + value[:60] + "}" if value and 0 < index < len(parts) - 1 else "")
        if is_prose(text):
            yield Message(path, start, "throw" if "throw" in parts[0] else "string", text)


def messages(*folders: str) -> list[Message]:
    """Every message below the folders (all floors without one), sorted by file and line."""
    found: list[Message] = []
    for folder in folders or FLOORS:
        base = ROOT / folder
        for path in sorted([base] if base.is_file() else base.rglob("*")):
            if path.suffix == ".py":
                found += python_messages(path)
            elif path.suffix in {".cpp", ".hpp", ".cu"}:
                found += cpp_messages(path)
    return found


def help_lines() -> list[str]:
    """Every option of every command as `--help` prints it: with its values, its help text and its default."""
    import typer.main

    import neck_export

    group = typer.main.get_command(neck_export.app)
    lines = []
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        context = command.make_context(name, [], resilient_parsing=True)
        records = (parameter.get_help_record(context) for parameter in command.params)
        lines += [f"neck-export {name} {one[0]}: {' '.join(one[1].split())}" for one in records if one]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Lists the messages of neck-export with file and line.")
    parser.add_argument(
        "folders",
        nargs="*",
        help="List the messages of these folders or files only, e.g. engines/cpp [default: all messages]",
    )
    parser.add_argument("--random", type=int, metavar="N", help="Draw N messages instead of listing all")
    parser.add_argument("--help-lines", type=int, metavar="N", default=0, help="Also draw N options with their help")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the draw")
    options = parser.parse_args()
    generator, found = random.Random(options.seed), messages(*options.folders)
    if options.random is not None:
        found = generator.sample(found, options.random)
    for message in found:
        print(f"{message.path.relative_to(ROOT)}:{message.line} [{message.kind}] {message.text.strip()}")
    for line in generator.sample(help_lines(), options.help_lines) if options.help_lines else ():
        print(line)


if __name__ == "__main__":
    main()
