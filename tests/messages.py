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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("neck", "export", "engines", "benchmarks", "neck_export.py")
PROGRESS = {"report", "step", "count", "counted"}
"""Functions whose first string is a message even if it is a single word."""

NO_MESSAGES = {"Option", "Argument", "but", "Target", "_trt", "encode"}
"""Calls whose strings are help texts of options, sources of the table of targets, or bytes to be hashed."""

NO_MESSAGE_TEXTS = re.compile("Authorization: Bearer|Raw profile type|The logger passed|neck-export runtime cache")
"""How texts begin that other programs read or write."""

CPP_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*|/\*.*?\*/|\#[^\n]*|R"\(.*?\)")|"(?P<string>(?:[^"\\]|\\.)*)"|'(?:[^'\\]|\\.)+'"""
    r"""|\d[\w.']*|[A-Za-z_][\w:]*|<<|->|.""",
    re.DOTALL,
)
CPP_WRAPPERS = re.compile(r"\b(?:to_string|string|one_line|to_text|name_of)\(((?:[^()]|\([^()]*\))*)\)")
"""Calls that only turn a value into text."""


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
    """Whether a text has three words in a row, a value counting as one, and three words of its own."""
    while (shorter := re.sub(r"\{[^{}]*\}", "X", text)) != text:
        text = shorter
    own = re.findall(r"\b(?!X+\b)[A-Za-z]{2,}", text)
    in_a_row = re.search(r"[A-Za-z'-]+[,:;]? [A-Za-z'-]+[,:;]? [A-Za-z]", text)
    return in_a_row is not None and len(own) > 2 and not text.startswith("import ")


def python_messages(path: Path) -> Iterator[Message]:
    """The messages of a Python file, in its order."""

    def search(node: ast.AST, kind: str) -> Iterator[Message]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn) and is_text(node.left):
            return  # a text that is looked for in another program's message
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
            if NO_MESSAGE_TEXTS.match(text):
                return
            if is_prose(text) or (kind.rpartition(".")[2] in PROGRESS and text.strip(" .")):
                yield Message(path, node.lineno, kind, text)  # type: ignore[attr-defined]
                return
        for child in ast.iter_child_nodes(node):
            yield from search(child, kind)

    yield from search(ast.parse(path.read_text(encoding="utf-8")), "")


class Token(NamedTuple):
    """A word of C++ with its line; a bracket has what is between it and its end."""

    text: str
    line: int
    string: bool = False
    inside: tuple[Token, ...] = ()


def cpp_tokens(code: str) -> tuple[Token, ...]:
    """The code as a tree of brackets, without comments, directives and raw strings."""
    levels: list[list[Token]] = [[]]
    opened: list[Token] = []
    line = 1
    for match in CPP_TOKEN.finditer(code):
        text = match[0]
        if match["string"] is not None:
            levels[-1].append(Token(match["string"], line, string=True))
        elif text in "([{":
            opened.append(Token(text, line))
            levels.append([])
        elif text in ")]}" and opened:
            inside = tuple(levels.pop())
            levels[-1].append(opened.pop()._replace(inside=inside))
        elif match["skip"] is None:
            levels[-1].append(Token(text, line))
        line += text.count("\n")
    return tuple(levels[0])


def split(tokens: Sequence[Token], *separators: str) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in tokens:
        if not token.string and token.text in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def cpp_value(tokens: Sequence[Token]) -> str:
    """A value that is put into a message: its expression, without what only turns it into text."""
    ends = {"(": ")", "[": "]", "{": "}"}

    def source(token: Token) -> str:
        inside = "".join(map(source, token.inside))
        return f'"{token.text}"' if token.string else token.text + inside + ends.get(token.text, "")

    text = re.sub(r"\b(?:std|neck)::", "", "".join(map(source, tokens))).replace("->", ".")
    text = re.sub(r"^joined\((.*?)(?:\(\))?,.*", r"\1", text)
    text = re.sub(r"\.(?:string|describe|what|code|c_str|filename)\(\)", "", text)
    while (shorter := CPP_WRAPPERS.sub(r"\1", text)) != text:
        text = shorter
    text = re.sub(r"\(\)|_\b", "", text)
    quoted = re.fullmatch(r"repr\((.*)\)", text)
    return f"'{{{quoted[1]}}}'" if quoted else f"{{{text}}}"


def cpp_text(tokens: Sequence[Token]) -> str | None:
    """The text of a sum or a choice with a string in it; None if it has none."""
    if any(token.text == "?" for token in tokens if not token.string):
        parts = [part for part in split(tokens, "?", ":")[1:] if part]
        choices = [cpp_text(part) for part in parts]
        if not any(choices):
            return None
        shown = [cpp_value(part) if choice is None else choice for choice, part in zip(choices, parts, strict=True)]
        return f"[{' | '.join(shown)}]"
    found = False
    texts: list[str] = []
    for part in split(tokens, "+", "<<"):
        inside: str | None = None
        if part and all(token.string for token in part):
            inside = "".join(token.text for token in part)
        elif len(part) == 1 and part[0].text == "(":
            inside = cpp_text(part[0].inside)
        elif len(part) == 2 and part[0].text in ("std::string", "format", "neck::format"):
            inside = cpp_text(split(part[1].inside, ",")[0])
        found = found or inside is not None
        stream = any(token.text in ("std::cout", "std::cerr", "out", "std::flush") for token in part)
        texts.append("" if stream or not part else cpp_value(part) if inside is None else inside)
    return "".join(texts) if found else None


def cpp_messages(path: Path) -> list[Message]:
    """The messages of a C++ file: each sum of strings and values, and each choice between strings, is one."""

    def search(tokens: Sequence[Token], kind: str) -> Iterator[Message]:
        for statement in split(tokens, ";", ",", "=", "return", "throw", "&", "|"):
            blocks = [at for at, token in enumerate(statement) if token.text == "{" and not token.string]
            start = blocks[-1] + 1 if blocks else 0
            text = cpp_text(statement[start:])
            if text and is_prose(text) and not NO_MESSAGE_TEXTS.match(text):
                yield Message(path, min(token.line for token in strings(statement[start:])), kind, text)
            for before, token in zip([None, *statement], statement[: start if text else None], strict=False):
                called = before and token.text == "(" and re.fullmatch(r"(?!if|for|while|switch)\w+", before.text)
                thrown = before and before.text.endswith(("Error", "Fault"))
                inside = before.text if before and (called or thrown) else "string" if token.text == "{" else kind
                yield from search(token.inside, inside)

    def strings(tokens: Sequence[Token]) -> Iterator[Token]:
        for token in tokens:
            yield from [token] if token.string else strings(token.inside)

    found = search(cpp_tokens(path.read_text(encoding="utf-8")), "string")
    return sorted(found, key=lambda message: message.line)


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
