"""No logic stands twice in the product: no six lines of code are the same."""

from __future__ import annotations

import ast
import collections
from collections.abc import Iterator
from pathlib import Path

from test_imports import FILES, ROOT

LINES = 6


def code_lines(text: str) -> list[tuple[int, str]]:
    """Number and text of each line of code: imports, signatures of functions, docstrings and comments aside."""
    left_out: set[int] = set()
    for node in statements(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef):
            left_out.update(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate((line.split("  # ")[0].strip() for line in text.splitlines()), 1)
    return [(number, line) for number, line in lines if line and line[0] != "#" and number not in left_out]


def statements(parent: ast.AST) -> Iterator[ast.AST]:
    """Every statement below a node, not the expressions, which are most of a tree."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(parent, name, ()):
            yield node
            yield from statements(node)


def repeated(texts: dict[str, str]) -> list[list[str]]:
    """Places of runs of lines that stand more than once."""
    places: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for name, text in texts.items():
        lines = code_lines(text)
        for start in range(len(lines) - LINES + 1):
            run = lines[start : start + LINES]
            places[tuple(line for _, line in run)].append(f"{name}:{run[0][0]}")
    return [found for found in places.values() if len(found) > 1]


def test_no_six_lines_stand_twice() -> None:
    texts = {str(path.relative_to(ROOT)): Path(path).read_text(encoding="utf-8") for _, path in FILES}
    assert repeated(texts) == []


def test_lines_that_stand_twice_are_seen() -> None:
    """The control."""
    six = "".join(f"    x = x + {number}  # {{}}\n" for number in range(LINES))
    whole = "def f(x):\n" + six.replace("{}", "one") + "\n\ndef g(x):\n" + six.replace("{}", "two")
    assert repeated({"a.py": whole}) == [["a.py:2", "a.py:11"]]
    assert repeated({"a.py": whole.replace("x + 3", "x + 4", 1)}) == []
    assert repeated({name: f"import {', '.join('abcdefgh')}\n" * LINES for name in ("a.py", "b.py")}) == []
