"""The tests that only a GPU can pass: run, and read from what pytest prints, so that those that ended count."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LINE = re.compile(
    r"^(tests/\S+?\.py)::(\S+) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)(?: \((.*)\))?\s*(?:\[ *\d+%\])?$", re.MULTILINE
)
OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "not run", "XFAIL": "not run"}
ON_CUDA = {
    "cpp": "tests/test_cpp_on_cuda.py::test_the_engine_runs_on_cuda",
    "session": "tests/test_session_checks.py::test_sessions_on_cuda",
}
"""What needs CUDA and no TensorRT, by its stage: run before all others."""

STAGES_DO = {
    *("test_cpp_on_cuda.py", "test_session_checks.py"),
    *("test_bench.py", "test_backends.py", "test_quantize_choice.py"),
}
"""Files whose gpu tests repeat a stage: those of ON_CUDA, the backends, the rates."""

BROKEN = re.compile(r"^ERROR (tests/\S+\.py)(?: - (.*))?$", re.MULTILINE)


def files_with_gpu_tests() -> list[str]:
    """Test files with tests marked gpu, except those that a stage runs itself."""
    found = (path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in STAGES_DO)
    return [f"tests/{path.name}" for path in found if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(log: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Runs those of the tests that are marked `gpu`; what pytest prints goes into the log line by line."""
    # its own warnings are not other versions' of torch, whose are no errors here
    options = ["-v", "-m", "gpu and not slow", "-W", "default", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", *tests]
    environment = {**os.environ, "COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, check=False)
    found = checks(log)
    failed = [one["name"] for one in found if one["outcome"] == "failed"]
    if not found:
        return {"outcome": "failed", "reason": f"pytest ran no tests; read its output in {log}"}
    if all(one["outcome"] == "not run" for one in found):
        return {"outcome": "unavailable", "reason": found[0]["reason"]}
    return {"outcome": "failed" if failed else "done", "reason": ", ".join(failed) or None}


def checks(log: Path) -> list[dict[str, Any]]:
    """The result of every finished test, read from pytest's output: the results' `checks`."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    found: list[dict[str, Any]] = [
        {"name": f"{file}::{name}", "outcome": OUTCOMES[outcome], "reason": reason or None}
        for file, name, outcome, reason in LINE.findall(text)
    ]
    named = {one["name"].partition("::")[0] for one in found}
    broken = [(file, reason or None) for file, reason in BROKEN.findall(text) if file not in named]
    return found + [{"name": file, "outcome": "failed", "reason": reason} for file, reason in broken]
