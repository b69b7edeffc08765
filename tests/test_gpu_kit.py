"""The kit of a GPU machine: what is in it and why, and what is said where it does not fit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config
from packaging.requirements import Requirement

import benchmarks.gpu.kit
import benchmarks.gpu.machine
from benchmarks.gpu.kit import LEFT_OUT, MOST_BYTES, THERE, KitError, There, chosen, describe, lacking, requirements
from benchmarks.gpu.machine import NEEDED_BYTES, gpu_problem, others, too_little
from benchmarks.gpu.session import unmet
from benchmarks.gpu.stage import FULL_SHA256, weights_digest
from benchmarks.gpu.start import KitError as StartError
from benchmarks.gpu.start import install, read_kit
from neck.checkpoint import random_encoder, save_meta_checkpoint
from neck.config import EncoderConfig

ROOT = Path(__file__).parent.parent
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
GB = 10**9


def test_all_that_the_project_asks_is_there_in_the_kit_or_left_out() -> None:
    """A new requirement goes into the kit by itself; one that the machine has is told in there.json."""
    there = There.read(THERE)
    names = {one.name for one in lacking(requirements(), there)}
    assert names == {"jsonschema", "onnx-ir", "polygraphy"}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}' in project for name in LEFT_OUT)  # none that nobody asks for
    assert not set(LEFT_OUT) & set(there.packages)
    assert there.python == "3.12"


def test_a_new_requirement_is_in_the_kit(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project.write_text(text.replace('"rich>=13.7"', '"rich>=13.7",\n "einops>=0.8",\n "numpy>=2.6"'), encoding="utf-8")
    found = [str(one) for one in lacking(requirements(project), There.read(THERE))]
    assert "einops>=0.8" in found and "numpy>=2.6" in found and "numpy>=1.26" not in found


def test_of_dependencies_only_what_is_not_there_goes_in() -> None:
    def one(name: str, version: str, *needs: str) -> dict[str, Any]:
        info = {"archive_info": {"hashes": {"sha256": version}}}
        return {"metadata": {"name": name, "version": version, "requires_dist": list(needs)}, "download_info": info}

    report = {
        "install": [
            one(
                "jsonschema",
                "4.26",
                "attrs>=22",
                "rpds-py>=0.7",
                "idna; extra == 'format'",
                "old; python_version<'3.9'",
            ),
            one("attrs", "26.1"),
            one("rpds_py", "2026.9", "numpy>=2.6"),
            one("idna", "3.0"),
            one("old", "1.0"),
            one("numpy", "2.7"),
        ]
    }
    there = There("3.12", (), {"attrs": None, "numpy": "2.5"})
    assert chosen(report, [Requirement("jsonschema>=4")], there) == [
        "jsonschema==4.26 --hash=sha256:4.26",
        "numpy==2.7 --hash=sha256:2.7",
        "rpds-py==2026.9 --hash=sha256:2026.9",
    ]


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A kit for this Python of a wheel that installs one module."""
    folder, name = tmp_path / "kit", "one-1.0-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("one.py", "")
        wheel.writestr("one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
        wheel.writestr("one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("one-1.0.dist-info/RECORD", "")
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "requirements.txt").write_text(f"one==1.0 --hash=sha256:{digest}\n", encoding="utf-8")
    manifest = describe(folder, [Requirement("one>=1")], There(HERE, (), {}))
    (folder / "kit.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def start(kit: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.start", "--kit", str(kit), "--output", str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_kit_is_installed_whole_or_not_at_all(kit: Path, tmp_path: Path) -> None:
    assert read_kit(kit)["requirements"] == ["one>=1"]
    (wheel,) = kit.glob("*.whl")
    whole = wheel.read_bytes()
    wheel.write_bytes(whole + b"damaged")
    for change in (lambda: None, wheel.unlink):
        change()
        ran = start(kit, tmp_path / "out")
        assert (
            ran.returncode == 1
            and f"{kit}: pip cannot install the wheels in this folder (ERROR" in ran.stderr
            and "make gpu-kit" in ran.stderr
        )
        assert len(ran.stderr.splitlines()) == 1
    wheel.write_bytes(whole)
    assert (install(kit, tmp_path / "out") / "one.py").is_file()
    wheel.unlink()
    install(kit, tmp_path / "out")  # it is there


def test_no_kit_half_a_manifest_and_another_python_are_one_line(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="nowhere"):
        read_kit(tmp_path / "nowhere")
    whole = (kit / "kit.json").read_text(encoding="utf-8")
    (kit / "kit.json").write_text(whole[:40], encoding="utf-8")
    with pytest.raises(StartError, match=r"kit\.json: the file is damaged"):
        read_kit(kit)
    (kit / "kit.json").write_text(whole.replace(f'"python": "{HERE}"', '"python": "3.9"'), encoding="utf-8")
    ran = start(kit, tmp_path / "out")
    assert ran.returncode == 1 and "are for Python 3.9" in ran.stderr and "PYTHON=python3.9" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_a_kit_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "big-1.0-py3-none-any.whl").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(KitError, match=r" 60\.0 MiB, but the limit is 60 MiB.* largest wheel is big-1\.0"):
        describe(tmp_path, [], There(HERE, (), {}))


def test_what_the_machine_lacks_after_all_is_told() -> None:
    assert unmet(["pytest>=1", "torch>=2.9"]) == []
    assert unmet(["torch>=99", "no-such-thing"]) == [
        f"torch>=99 (installed: {importlib.metadata.version('torch')})",  # a wheel may leave out +cu132
        "no-such-thing (installed: none)",
    ]


def test_a_machine_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build" in (gpu_problem() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(benchmarks.gpu.machine, "driver_version", lambda: None)
    assert "no NVIDIA driver" in (gpu_problem() or "") and "GPU_DEVICE=cpu" in (gpu_problem() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_problem() is None


def test_a_driver_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unable() -> bool:
        import warnings

        warnings.warn(
            "The NVIDIA driver on your system is too old (found version 12020). (Triggered internally)", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(benchmarks.gpu.machine, "driver_version", lambda: "535.1")
    told = gpu_problem() or ""
    assert "driver 535.1" in told and "too old (found version 12020)" in told and "CUDA 13.0" in told


def test_a_gpu_that_others_use_is_told_with_its_free_memory() -> None:
    told = others(60 * GB, 80 * GB, ["123, python, 19000 MiB"]) or ""
    assert "60.0 of 80.0 GB of device memory are free, used by: 123, python, 19000 MiB" in told
    assert others(79 * GB, 80 * GB, []) is None and too_little(60 * GB, 80 * GB, []) is None
    assert "32 GB are needed, but 10.0 of 80.0 GB of device memory are free" in (too_little(10 * GB, 80 * GB, []) or "")
    assert NEEDED_BYTES > 8 * 3 * GB


def test_random_weights_have_one_digest(tmp_path: Path) -> None:
    """Of a small encoder; that of the full one is found by the slow test below."""
    encoder = random_encoder(tiny_config())
    save_meta_checkpoint(encoder, tmp_path / "weights.pt")
    digest = weights_digest(tmp_path / "weights.pt")
    save_meta_checkpoint(random_encoder(tiny_config()), tmp_path / "again.pt")
    assert weights_digest(tmp_path / "again.pt") == digest
    encoder.convs[0].conv_1x1.bias[0] += 1  # type: ignore[index, operator, union-attr]
    save_meta_checkpoint(encoder, tmp_path / "other.pt")
    assert weights_digest(tmp_path / "other.pt") != digest


@pytest.mark.slow
def test_the_full_encoders_random_weights_are_those_that_are_known(tmp_path: Path) -> None:
    save_meta_checkpoint(random_encoder(EncoderConfig()), tmp_path / "weights.pt")
    assert weights_digest(tmp_path / "weights.pt") == FULL_SHA256
