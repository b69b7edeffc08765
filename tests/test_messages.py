"""The list of messages: what it holds, and that its draws can be repeated."""

from __future__ import annotations

from pathlib import Path

import messages
import pytest


def test_kinds_of_messages_are_found_and_docstrings_are_not(tmp_path: Path) -> None:
    source = '''
def load(path, notes, report):
    """This docstring is no message at all."""
    report("export")
    notes.append(f"{path}: the file is old")
    option = typer.Option(help="This help text is none either")
    warning = "The logger passed into the builder differs"
    if "find shared memory region" in str(error):
        return f"{path}: another program's text is no message"
    if found is None or "the region is unknown here" not in str(error):
        raise LoadError(f"{path} has {3.14159:.2f} of " + "it; download it again")
'''
    path = tmp_path / "x.py"
    path.write_text(source)
    found = [(found.line, found.kind, found.text) for found in messages.python_messages(path)]
    assert found == [
        (4, "report", "export"),
        (5, "notes.append", "{path}: the file is old"),
        (9, "return", "{path}: another program's text is no message"),
        (11, "LoadError", "{path} has {3.14159:.2f} of it; download it again"),
    ]


def test_a_cpp_message_is_one_line_with_its_values_in_braces(tmp_path: Path) -> None:
    path = tmp_path / "x.cpp"
    path.write_text(
        '#include "a b c.hpp"\n\nvoid f() {\n    // "no message in here"\n    if (bad) {\n'
        '        throw Error(path.string() + " cannot be "\n                    "opened; check it");\n    }\n}\n'
    )
    (found,) = messages.cpp_messages(path)
    assert (found.line, found.kind, found.text) == (6, "Error", "{path} cannot be opened; check it")


def test_values_and_choices_in_a_cpp_message_are_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.cpp"
    path.write_text(
        'void f() {\n    if (a && b("no, no, no, no")) {\n'
        '        throw Fault{"tensor " + repr(name(one)) + " has " + std::to_string(largest_) + " bytes, " +\n'
        '                    (first ? "more than " + to_text(shape) : "too many") + "; see http://x"};  // "no"\n'
        '    }\n    std::cerr << name << ": the file is " << error.what() << "\\n";\n}\n'
    )
    found = [(found.line, found.kind, found.text) for found in messages.cpp_messages(path)]
    assert found == [
        (2, "b", "no, no, no, no"),
        (3, "Fault", "tensor '{name(one)}' has {largest} bytes, [more than {shape} | too many]; see http://x"),
        (6, "string", "{name}: the file is {error}\\n"),
    ]


@pytest.mark.parametrize("folder", messages.FLOORS)
def test_every_floor_has_messages(folder: str) -> None:
    found = messages.messages(folder)
    assert found
    for message in found:
        assert message.text.strip() and message.line <= len(message.path.read_text(encoding="utf-8").splitlines())
