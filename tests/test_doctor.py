"""The doctor: what it finds is what is there, and what is missing has its remedy."""

from __future__ import annotations

import importlib.metadata
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from exporting import neck_export_cli
from fake_gpu.play import play

from engines import doctor
from engines.doctor import PACKAGES, abilities, driver_version, examine, gpu_names, installed_version, report_lines

NOTHING: dict[str, str | None] = dict.fromkeys(PACKAGES)


def test_this_machine() -> None:
    found = examine()
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["cores"] >= 1
    assert found["memory_gb"] > 0.1
    assert found["disk_free_gb"] >= 0
    assert found["can"]["export to ONNX"] == "yes"
    assert json.loads(json.dumps(found)) == found


def test_command() -> None:
    ran = neck_export_cli("doctor")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Python 3.")
    assert len(ran.out.splitlines()) == 2 + len(PACKAGES) + 4
    assert f"torch {importlib.metadata.version('torch')}" in ran.out
    as_json = neck_export_cli("doctor", "--json")
    assert (as_json.code, as_json.err) == (0, "")
    assert set(json.loads(as_json.out)) == {
        "python", "system", "cores", "memory_gb", "disk_free_gb", "driver", "gpus", "packages", "can",
    }  # fmt: skip


RTX_TARGETS = ("8.6", "8.9", "12.0")
TENSORRT, RTX = {"onnxruntime": "1.31.1", "tensorrt": "11.4"}, {"onnxruntime": "1.31.1", "tensorrt-rtx-cu13": "1.7"}


@pytest.mark.parametrize(
    ("packages", "gpus", "expected"),
    [
        (
            {},
            [],
            (
                "onnxruntime is not installed; run pip",
                "TensorRT is not installed; run pip install '.[gpu]'",
                "TensorRT is not installed",
            ),
        ),
        (
            {"onnxruntime": "1.31.1"},
            ["8.9"],
            ("yes", "TensorRT is not installed; run pip", "TensorRT is not installed"),
        ),
        (TENSORRT, [], ("yes", "torch finds no NVIDIA GPU", "torch finds no NVIDIA GPU")),
        (TENSORRT, ["8.9"], ("yes", "yes", "yes")),
        (TENSORRT, ["9.0"], ("yes", "yes", "yes")),
        (RTX, [], ("yes", "yes", "torch finds no NVIDIA GPU")),
        (RTX, ["8.9", "9.0"], ("yes", "yes", "yes")),
        (
            RTX,
            ["9.0"],
            (
                "yes",
                "yes",
                "TensorRT-RTX does not list compute capability 9.0 as supported. "
                "To run engines on this GPU, install TensorRT: run pip",
            ),
        ),
        (RTX, ["10.0"], ("yes", "yes", "TensorRT-RTX does not list compute capability 10.0")),
        (TENSORRT | RTX, ["9.0"], ("yes", "yes", "yes")),
    ],
)
def test_abilities(packages: dict[str, str | None], gpus: list[str], expected: tuple[str, ...]) -> None:
    found = abilities(NOTHING | packages, gpus, RTX_TARGETS)
    assert found["export to ONNX"] == "yes"
    for step, words in zip(("verify ONNX", "build engines", "run, verify and profile engines"), expected, strict=True):
        assert found[step].startswith(words)


def test_a_missing_package_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    lines = report_lines(examine())
    for name, remedy in PACKAGES.items():
        assert f"package  {name} is not installed; run {remedy}" in lines


def test_what_a_message_installs_is_there() -> None:
    """neck-export is on no package index, and only an extra of pyproject.toml can be installed."""
    root = Path(__file__).parent.parent
    folders = ("neck", "export", "engines", "benchmarks", "docs", "tests")
    paths = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in (".py", ".md")]
    texts = {path: path.read_text() for path in [*paths, root / "README.md", root / "neck_export.py"]}
    assert [path for path, text in texts.items() if re.search(r"pip install '?neck-export", text)] == []
    named = {
        extra
        for text in texts.values()
        for found in re.findall(r"pip install '?\.\[([\w,]+)\]|\binstall\(\"(\w+)\"\)", text)
        for extra in "".join(found).split(",")
    }
    declared = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert {"cpu", "gpu", "rtx", "triton"} <= named <= set(re.findall(r"(?m)^(\w+) = ", declared))


def test_versions_come_from_whichever_distribution_brings_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "tensorrt-cu13":
            raise importlib.metadata.PackageNotFoundError(name)
        return "11.4.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed_version("tensorrt") == "11.4.0"
    assert installed_version("tensorrt-rtx-cu13") is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024", "535.161.08"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.3.0  Release Build", "540.3.0"),
        ("something else", None),
        (None, None),
    ],
)
def test_driver(text: str | None, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "nvml_driver_version", lambda: None)
    if text is not None:
        (tmp_path / "version").write_text(f"{text}\nGCC version: gcc 12.2.0\n")
    assert driver_version() == version


def test_the_driver_of_wsl2_is_nvmls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no /proc/driver/nvidia."""
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    with play("11.4"):
        assert driver_version() == "580.95.05"
    with play("11.4", gpu=False):
        assert driver_version() is None


def cuda(available: Callable[[], bool], count: int = 0) -> SimpleNamespace:
    properties = SimpleNamespace(name="NVIDIA L4", major=8, minor=9)
    return SimpleNamespace(
        is_available=available, device_count=lambda: count, get_device_properties=lambda index: properties
    )


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", cuda(lambda: True, 2))
    assert gpu_names() == ["NVIDIA L4, compute capability 8.9"] * 2
    assert "GPU      NVIDIA L4, compute capability 8.9; NVIDIA L4" in "\n".join(report_lines(examine()))


def test_an_old_driver_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_driver() -> bool:
        warnings.warn("CUDA initialization: the driver is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch, "cuda", cuda(old_driver))
    assert gpu_names() == []
