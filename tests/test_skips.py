"""The summary of what a run skipped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import GPU_MISSING
from skips import CPP_PACKAGES, WANTS, summary_lines

ROOT = Path(__file__).parent.parent


def test_reasons_become_a_few_lines() -> None:
    reasons = [f"Skipped: {GPU_MISSING}", "tuning needs an NVIDIA GPU", "runs trial plans on an NVIDIA GPU"]
    reasons += ["needs cmake, ninja, c++; apt install g++ cmake ninja-build"] * 5
    reasons += ["Chromium and its driver are not here: apt-get install chromium chromium-driver", "something else"]
    assert summary_lines(reasons) == [
        f"    5  want the C++ tools: apt-get install {CPP_PACKAGES}",
        "    3  want an NVIDIA GPU: run `pytest -m gpu` on a machine with its driver",
        "    1  want a browser: apt-get install chromium chromium-driver fonts-dejavu-core",
        "    1  want something else: -",
    ]
    assert summary_lines([]) == []


def reasons_in_the_tests() -> list[str]:
    """Every reason that is written out in the tests."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))]
    found = re.findall(r"(?:pytest\.skip\(|reason=)\"([^\"]+)\"", "".join(texts))
    return [reason for reason in found if reason not in ("no mount command", "neck_export.py is not there")]


@pytest.mark.parametrize("reason", sorted(set(reasons_in_the_tests())))
def test_every_reason_has_a_remedy(reason: str) -> None:
    known = any(re.search(words, reason) for words, *_ in WANTS)
    assert known or reason in (
        "CUDA's Python bindings are installed",
        "CUDA and TensorRT are found here whatever is said",
    )


def test_ci_installs_what_is_said() -> None:
    """And CONTRIBUTING lists it."""
    remedies = " ".join(remedy for _, _, remedy in WANTS if remedy.startswith("apt-get"))
    named = set(remedies.replace("apt-get install", "").split()) - {"libonnxruntime-dev"}
    for name in (".ci/run", "CONTRIBUTING.md"):
        said = (ROOT / name).read_text(encoding="utf-8").replace("`", " ").split()
        assert named - set(said) == set(), name
