"""No code and no document lets a runtime choose the precision: what it chooses depends on the processor."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULES = (
    # computes in BF16 where the processor has it (avx512_bf16, AMX)
    (("compile_model(",), r"inference_precision|INFERENCE_PRECISION_HINT"),
    # computes FP32 products and convolutions in TF32
    (("InferenceSession(", "CUDAExecutionProvider"), r"use_tf32"),
)
"""What opens a runtime, and what its precision is stated with."""

IN_TESTS = (("InferenceSession(",), r"AS_WRITTEN|disable_quant_qdq")
"""A test judges numbers: ONNX Runtime's own fusion of INT8 products overflows where VNNI is missing."""


def openings(path: Path, text: str) -> Iterator[str]:
    """The innermost functions of a Python file, or the code blocks of a document, with the calls that they hold."""
    if path.suffix == ".md":
        yield from re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
        return
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    inner = [
        node
        for node in functions
        if not any(isinstance(one, ast.FunctionDef) for one in ast.walk(node) if one is not node)
    ]
    yield from (ast.get_source_segment(text, node) or "" for node in inner)


def unstated(path: Path, text: str) -> list[str]:
    """The pieces of a file that open a runtime without saying in which precision it computes."""
    rules = [*RULES, IN_TESTS] if path.is_relative_to(ROOT / "tests") else [*RULES]
    return [
        piece
        for piece in openings(path, text)
        for opens, states in rules
        if all(f".{one}" in piece or f'"{one}"' in piece for one in opens) and not re.search(states, piece)
    ]


def test_every_precision_is_stated() -> None:
    folders = ("neck", "export", "engines", "benchmarks", "tests", "docs")
    files = [path for folder in folders for end in ("py", "md") for path in (ROOT / folder).rglob(f"*.{end}")]
    files += [ROOT / "neck_export.py", ROOT / "README.md"]
    files.remove(Path(__file__))
    found = {path: path.read_text(encoding="utf-8") for path in files}
    found = {path: text for path, text in found.items() if "compile_model(" in text or "InferenceSession(" in text}
    assert len(found) > 5
    assert {str(path): pieces for path, text in found.items() if (pieces := unstated(path, text))} == {}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("engines/x.py", 'def f():\n    return core.compile_model(path, "CPU")'),
        ("engines/x.py", 'def f():\n    return ort.InferenceSession(path, providers=["CUDAExecutionProvider"])'),
        ("tests/x.py", "class X:\n    def f(self):\n        return ort.InferenceSession(path)"),
        ("docs/x.md", '```python\nopenvino.Core().compile_model("x.onnx", "CPU")\n```\n'),
    ],
)
def test_an_open_precision_is_seen(name: str, text: str) -> None:
    """The control."""
    assert unstated(ROOT / name, text)
    assert not unstated(
        ROOT / name,
        text.replace("path", "path, AS_WRITTEN")
        .replace('"CPU"', "inference_precision")
        .replace("CUDA", "use_tf32, CUDA"),
    )
