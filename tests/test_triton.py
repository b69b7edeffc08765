"""The Triton repository: configs, versions that come in whole, refusals; preprocessing against neck/images.py."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import unusual_images
from conftest import GOLDEN_TOLERANCE, load_golden, run_onnx, tiny_config, worst_error
from exporting import golden_options, listing, neck_export_cli, trace_quickly
from PIL import Image

import engines.service.repository_files
from engines.service.activation import activate_version
from engines.service.container_fit import choose_container
from engines.service.ensemble import PREPROCESS_MODEL
from engines.service.model_config import read_config, to_text
from engines.service.options import RepositoryOptions
from engines.service.repository import Repository, TritonError, make_repository
from engines.service.served_model import Source, read_model
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest, write_manifest
from export.contract.signature import BatchRange, encoder_signature
from export.contract.targets import find_targets
from export.contract.triton_containers import ONNX_RUNTIME, TENSORRT
from export.lowering.resolve_target import resolve_target
from export.pipeline import export_onnx
from neck.images import ImageError, normalize, read_image, resize_image

ROOT = Path(__file__).parent.parent
VERDICT = {"verified": True, "method": "ONNX Runtime", "outputs": []}
USED = {
    *("name", "platform", "backend", "version_policy", "max_batch_size", "input", "output", "optimization"),
    *("dynamic_batching", "ensemble_scheduling", "instance_group", "cc_model_filenames", "model_warmup"),
}
"""Fields of ModelConfig that the configs may have: all of them are in Triton 2.51's."""


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real FP32 file of dynamic batch, not verified."""
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    return export_onnx(golden_options("meta-dual", path, batch=BatchRange(1, 4, 8), verify=False)).path


def facts(batch: str = "1:4:8", seed: int = 0, signed: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What the manifest of a TensorRT plan says."""
    config = tiny_config()
    signature = encoder_signature(config, batch=BatchRange.parse(batch), dtype="float16", **(signed or {})).to_dict()
    weights = {"random": True, "seed": seed}
    values = {
        "flavor": "tensorrt",
        "tensorrt_version": "10.13.3.9",
        "precision": "fp16",
        "compute_capabilities": ["8.9"],
        "options": {"version_compatible": False, "hardware_compatible": "none"},
        "batch": batch,
        "inputs": signature["inputs"],
        "outputs": signature["outputs"],
        "onnx": {"name": "encoder.onnx", "bytes": 1, "sha256": "0"},
        "signature": signature,
        "onnx_manifest": {"encoder": config.to_dict(), "weights": weights},
        "verification": VERDICT,
    }
    return {**values, **changes}


def write_plan(path: Path, data: bytes = b"ptrt" + bytes(range(100)), **changes: Any) -> Path:
    """A plan that only TensorRT could tell from a true one, with its layer report and manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    layers = path.with_name(f"{path.name}.layers.json")
    layers.write_text("{}")
    write_manifest(manifest_path(path), "plan", facts(**changes), [path, layers])
    return path


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "in" / "encoder.plan")


def make(model: Path, folder: Path, **changes: Any) -> Repository:
    return make_repository(RepositoryOptions(model, folder / "repository", **changes))


def config_of(repository: Repository, name: str | None = None) -> Any:
    config = read_config(repository.path / (name or repository.name) / "config.pbtxt")
    assert config is not None and {field.name for field, _ in config.ListFields()} <= USED
    return config


def tensors(specs: Any) -> list[tuple[str, int, list[int]]]:
    return [(spec.name, spec.data_type, list(spec.dims)) for spec in specs]


FP16, FP32, UINT8 = 10, 11, 2
"""Numbers of Triton's data types (model_config.proto)."""


def test_a_plan_with_dynamic_batch(plan: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path, queue_delay_us=500)
    config = config_of(found)
    assert (config.name, config.platform, config.max_batch_size) == ("sam3-encoder", "tensorrt_plan", 8)
    assert tensors(config.input) == [("image", FP32, [3, 112, 112])]
    levels = {
        f"sam3_{kind}_{level}": [8, side, side] for kind in ("feat", "pos") for level, side in enumerate((32, 16, 8, 4))
    }
    assert tensors(config.output) == [(name, FP16, dims) for name, dims in levels.items()]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert list(config.version_policy.specific.versions) == [1] and not config.instance_group
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 8]
    assert all(list(warm.inputs["image"].dims) == [3, 112, 112] for warm in config.model_warmup)
    graphs = config.optimization.cuda
    assert graphs.graphs and [spec.batch_size for spec in graphs.graph_spec] == list(range(1, 9))
    assert all(list(spec.input["image"].dim) == [3, 112, 112] for spec in graphs.graph_spec)
    assert set(listing(found.path)) == {
        "sam3-encoder/",
        "sam3-encoder/config.pbtxt",
        *(f"sam3-encoder/1/{name}" for name in ("", "manifest.json", "model.plan", "model.plan.layers.json")),
        "sam3-encoder/1/config.pbtxt",
    }
    assert (found.version, found.active, found.container) == (1, 1, "25.09")
    assert set(found.files) == {found.path / name for name in listing(found.path) if not name.endswith("/")}
    assert to_text(config) == found.config.read_text()


def test_a_fixed_batch_keeps_its_dimension(tmp_path: Path) -> None:
    """It has no CUDA graphs: the tensorrt backend would capture them and never find them (see takes_graphs)."""
    found = make(write_plan(tmp_path / "encoder.plan", batch="2"), tmp_path)
    config = config_of(found)
    assert config.max_batch_size == 0 and not config.HasField("dynamic_batching")
    assert tensors(config.input) == [("image", FP32, [2, 3, 112, 112])]
    assert tensors(config.output)[0] == ("sam3_feat_0", FP16, [2, 8, 32, 32])
    (warm,) = config.model_warmup
    assert not config.HasField("optimization") and any("CUDA graphs" in note for note in found.notes)
    assert (warm.batch_size, list(warm.inputs["image"].dims)) == (1, [2, 3, 112, 112])


def test_uint8_no_graphs_and_a_wide_batch(tmp_path: Path) -> None:
    pixels = write_plan(tmp_path / "encoder.plan", batch="2:16:64", signed={"input_kind": "uint8"})
    found = make(pixels, tmp_path)
    config = config_of(found)
    assert tensors(config.input) == [("image", UINT8, [112, 112, 3])]
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [2, 16, 64]
    assert any("at least 2 images" in note for note in found.notes)
    config = config_of(make(pixels, tmp_path, cuda_graphs=False, name="plain"))
    assert not config.HasField("optimization")


def test_an_onnx_file_runs_where_it_lies(onnx_file: Path, tmp_path: Path) -> None:
    found = make(onnx_file, tmp_path, outputs=("sam3_feat_*", "sam2_pos_1"))
    config = config_of(found)
    assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "", 8)
    assert not config.HasField("optimization") and config.HasField("dynamic_batching")
    assert [spec.name for spec in config.output] == [*(f"sam3_feat_{level}" for level in range(4)), "sam2_pos_1"]
    golden = load_golden("meta-dual")
    outputs = run_onnx(found.path / found.name / "1" / "model.onnx", golden.image)
    assert worst_error(outputs, golden.expected) < GOLDEN_TOLERANCE
    assert worst_error(outputs, {name: value + 1 for name, value in golden.expected.items()}) > GOLDEN_TOLERANCE
    assert "encoder.onnx not verified: not asked: --no-verify" in found.notes


@pytest.mark.parametrize("kind", ["plan", "onnx"])
def test_the_manifest_travels_and_is_right_where_it_lies(
    kind: str, onnx_file: Path, plan: Path, tmp_path: Path
) -> None:
    model = plan if kind == "plan" else onnx_file
    found = make(model, tmp_path)
    where = found.path / found.name / "1" / "manifest.json"
    manifest, before = read_manifest(where, kind), read_manifest(manifest_path(model), kind)
    check_files(where, manifest)
    assert {entry["sha256"] for entry in manifest["files"]} == {entry["sha256"] for entry in before["files"]}
    assert {key: manifest[key] for key in manifest if key != "files"} == {
        key: before[key] for key in before if key != "files"
    }
    with where.with_name(f"model.{kind}").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(ManifestError, match="was changed"):
        check_files(where, manifest)


def test_a_plan_lists_all_outputs_and_an_ensemble_the_chosen(plan: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path, outputs=("sam3_feat_[01]",))
    assert len(config_of(found).output) == 8
    chosen = config_of(found, "sam3-encoder-outputs")
    assert (chosen.platform, chosen.max_batch_size) == ("ensemble", 8)
    assert [spec.name for spec in chosen.output] == ["sam3_feat_0", "sam3_feat_1"]
    (step,) = chosen.ensemble_scheduling.step
    assert (step.model_name, step.model_version) == ("sam3-encoder", -1)
    assert dict(step.output_map) == {"sam3_feat_0": "sam3_feat_0", "sam3_feat_1": "sam3_feat_1"}
    assert any(
        "to receive only sam3_feat_0, sam3_feat_1, use the ensemble sam3-encoder-outputs" in note
        for note in found.notes
    )


def test_an_ensemble_from_images(plan: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path, ensemble=True, outputs=("sam3_feat_0",))
    preprocess, images = (config_of(found, f"sam3-encoder-{name}") for name in ("preprocess", "images"))
    assert (preprocess.backend, images.platform) == ("python", "ensemble")
    assert preprocess.max_batch_size == images.max_batch_size == 8
    string = 13
    assert tensors(preprocess.input) == tensors(images.input) == [("image_file", string, [1])]
    assert tensors(preprocess.output) == tensors(config_of(found).input)
    assert tensors(images.output) == tensors(config_of(found).output)[:1]
    steps = [(step.model_name, dict(step.input_map), dict(step.output_map)) for step in images.ensemble_scheduling.step]
    assert steps == [
        ("sam3-encoder-preprocess", {"image_file": "image_file"}, {"image": "image"}),
        ("sam3-encoder", {"image": "image"}, {"sam3_feat_0": "sam3_feat_0"}),
    ]
    script = found.path / "sam3-encoder-preprocess" / "1" / "model.py"
    assert script.read_bytes() == PREPROCESS_MODEL.read_bytes()
    assert list((found.path / "sam3-encoder-images" / "1").iterdir())  # an empty folder gets lost in S3 and git
    again = make(plan, tmp_path, ensemble=True, outputs=("sam3_feat_0",))
    changed = {path.relative_to(found.path).parts[:2] for path in again.files}
    assert changed == {("sam3-encoder", "2"), ("sam3-encoder", "config.pbtxt")}
    fixed = make(write_plan(tmp_path / "b3.plan", batch="3"), tmp_path, ensemble=True, name="fixed")
    assert tensors(config_of(fixed, "fixed-images").input) == [("image_file", string, [3])]


def test_an_ensemble_is_not_left_without_its_outputs(onnx_file: Path, tmp_path: Path) -> None:
    make(onnx_file, tmp_path, ensemble=True)
    (tmp_path / "repository" / "sam3-encoder" / "config.pbtxt").unlink()
    shutil.rmtree(tmp_path / "repository" / "sam3-encoder" / "1")
    with pytest.raises(TritonError, match=r"sam3-encoder-images: this ensemble returns sam2_feat_0.*add --ensemble"):
        make(onnx_file, tmp_path, outputs=("sam3_*",))
    assert len(config_of(make(onnx_file, tmp_path)).output) == 16  # all that it asks for is there


def test_a_new_version_has_the_outputs_of_the_old(onnx_file: Path, plan: Path, tmp_path: Path) -> None:
    copied = tmp_path / "verified" / onnx_file.name
    shutil.copytree(onnx_file.parent, copied.parent)
    onnx_file = copied
    spoil(onnx_file, verification=VERDICT)
    found = make(onnx_file, tmp_path, outputs=("sam3_*",), ensemble=True)
    before = state(found.path)
    for fewer in ("sam3_feat_*", "sam3_feat_0"):
        with pytest.raises(TritonError, match=r"sam3-encoder: the new version"):
            make(onnx_file, tmp_path, outputs=(fewer,), ensemble=True)
    assert state(found.path) == before
    more = make(onnx_file, tmp_path, ensemble=True)
    assert len(config_of(more).output) == len(config_of(more, "sam3-encoder-images").output) == 16
    first = make(plan, tmp_path / "plans", outputs=("sam3_feat_*",))
    with pytest.raises(TritonError, match=r"sam3-encoder-outputs: the new version"):
        make(plan, tmp_path / "plans", outputs=("sam3_feat_0",))
    positions = write_plan(tmp_path / "features.plan", signed={"positions": "none"})
    with pytest.raises(TritonError, match=r"sam3-encoder: the new version"):
        make(positions, tmp_path / "plans")
    assert first.version == 1 and make(plan, tmp_path / "plans", outputs=("sam3_feat_*",)).version == 2


def test_a_plan_that_is_replaced_while_it_is_copied(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = engines.service.repository_files._copy

    def other(file: Path, target: Path) -> None:
        copy(file, target)
        target.write_bytes(b"another build")

    monkeypatch.setattr(engines.service.repository_files, "_copy", other)
    with pytest.raises(TritonError, match="has 13 bytes, but its manifest says 104"):
        make(plan, tmp_path)
    assert not (tmp_path / "repository").exists()


def test_a_new_preprocessing_is_a_new_version(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(plan, tmp_path, ensemble=True)
    newer = tmp_path / "model.py"
    newer.write_text(PREPROCESS_MODEL.read_text() + "\n")
    monkeypatch.setattr("engines.service.repository.PREPROCESS_MODEL", newer)
    found = make(plan, tmp_path, ensemble=True)
    assert sorted(path.name for path in (found.path / "sam3-encoder-preprocess").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
    ]


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of every file: what a running server would notice."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in files
    }


def test_a_version_is_added_and_those_there_are_left(plan: Path, tmp_path: Path) -> None:
    first = make(plan, tmp_path)
    before = state(first.path)
    write_plan(plan, b"ptrt other weights", seed=1)  # rewritten in place, as a builder may
    second = make(plan, tmp_path)
    after = state(second.path)
    assert second.version == 2
    del before["sam3-encoder/config.pbtxt"]  # it names the version that is served
    assert {name: after[name] for name in before} == before
    assert list(config_of(second).version_policy.specific.versions) == [2] and second.active == 2
    assert (second.path / "sam3-encoder/2/model.plan").read_bytes() == b"ptrt other weights"
    third = make(plan, tmp_path, version=7, queue_delay_us=9)
    assert third.version == 7 and config_of(third).dynamic_batching.max_queue_delay_microseconds == 9
    assert make(plan, tmp_path).version == 8
    for path in (first.path / "sam3-encoder").rglob("*"):
        assert path.stat().st_mode & 0o004, f"a server of another user reads {path}"
    with pytest.raises(TritonError, match=r"never changes"):
        make(plan, tmp_path, version=7)
    with pytest.raises(TritonError, match=r"version 3"):
        make(plan, tmp_path, version=3)


def test_nothing_of_the_stage_is_seen_in_the_repository(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A polling server takes a folder there for a model, and one in the model's for a change of all its versions."""
    found = make(plan, tmp_path)
    seen: list[set[str]] = []
    copy = engines.service.repository_files._copy

    def look(file: Path, target: Path) -> None:
        copy(file, target)
        seen.append(set(listing(found.path)))

    before = set(listing(found.path))
    monkeypatch.setattr(engines.service.repository_files, "_copy", look)
    make(plan, tmp_path)
    assert seen == [before, before]
    seen.clear()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the folder above cannot be written
    make(plan, tmp_path)
    extra = {name.split("/")[1] for names in seen for name in names - before - {"sam3-encoder/2/"}} - {"2"}
    assert extra and all(name.startswith(".version.staging-") for name in extra)  # the control: it is seen here
    assert sorted(path.name for path in (found.path / "sam3-encoder").iterdir()) == ["1", "2", "3", "config.pbtxt"]


UNVERIFIED = {"verified": False, "reason": "not verified: no NVIDIA driver"}


def served(found: Repository) -> list[int]:
    return list(config_of(found).version_policy.specific.versions)


def test_a_version_that_was_never_loaded_is_not_served(plan: Path, tmp_path: Path) -> None:
    """Or every server that starts would end where it is broken; the first version is served, for there is no other."""
    unverified = write_plan(tmp_path / "unverified.plan", b"ptrt broken", verification=UNVERIFIED)
    alone = make(unverified, tmp_path / "alone")
    assert alone.active == alone.version == 1 and served(alone) == [1]
    first = make(plan, tmp_path)
    before = state(first.path)
    second = make(unverified, tmp_path)
    assert (second.version, second.active, served(second)) == (2, 1, [1])
    (command,) = (line.partition("anyway, run: ")[2] for line in second.notes if "--activate" in line)
    assert shlex.split(command) == ["neck-export", "triton", "--activate", "2", "--output", str(second.path)]
    after = state(second.path)
    assert {name: after[name] for name in before} == before  # nothing that a server reads has changed
    third = make(plan, tmp_path)
    assert (third.version, third.active, served(third)) == (3, 3, [3])


def test_a_version_is_activated_and_rolled_back(plan: Path, tmp_path: Path) -> None:
    first = make(plan, tmp_path, queue_delay_us=7)
    second = make(plan, tmp_path, queue_delay_us=8)
    assert served(second) == [2] and config_of(second).dynamic_batching.max_queue_delay_microseconds == 8
    done = activate_version(first.path, "sam3-encoder", 1)
    assert (done.version, done.before, done.files) == (1, 2, (first.config,))
    config = config_of(first)
    assert served(first) == [1] and config.dynamic_batching.max_queue_delay_microseconds == 7  # all that it came with
    assert activate_version(first.path, "sam3-encoder", 1).files == ()
    ran = neck_export_cli("triton", "--activate", "2", "--output", first.path)
    assert (ran.code, ran.out.splitlines()) == (0, ["Triton serves version 2 of sam3-encoder instead of version 1"])
    assert served(first) == [2]
    assert neck_export_cli("triton", plan, "--activate", "2", "--output", first.path).code == 2
    (first.path / "sam3-encoder" / "1" / "config.pbtxt").unlink()
    with pytest.raises(TritonError, match=r"1/config\.pbtxt: the file is missing"):
        activate_version(first.path, "sam3-encoder", 1)
    assert served(first) == [2]


def test_what_cannot_be_activated(plan: Path, onnx_file: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path)
    make(plan, tmp_path)
    before = state(found.path)
    cases = [
        ((found.path, "sam3-encoder", 3), "there is no version 3; the model has 1, 2"),
        ((found.path, "other", 1), "other: there is no such model"),
        ((found.path, "../repository", 1), "--name '../repository' is invalid"),
        ((tmp_path / "none", "sam3-encoder", 1), "no such folder"),
    ]
    for arguments, words in cases:
        with pytest.raises(TritonError, match=words):
            activate_version(*arguments)
    with (found.path / "sam3-encoder" / "1" / "model.plan").open("r+b") as file:
        file.write(b"other")
    with pytest.raises(TritonError, match=r"version 1 of sam3-encoder cannot be served: .*was changed"):
        activate_version(found.path, "sam3-encoder", 1)
    assert state(found.path)["sam3-encoder/config.pbtxt"] == before["sam3-encoder/config.pbtxt"]
    features = make(write_plan(tmp_path / "f.plan", signed={"positions": "none"}), tmp_path / "b")
    make(plan, tmp_path / "b", outputs=("sam3_*",), ensemble=True)
    with pytest.raises(TritonError, match=r"sam3-encoder-images: this ensemble returns sam3_pos_0"):
        activate_version(features.path, "sam3-encoder", 1)


def test_an_ensemble_does_not_ask_more_than_the_active_version_has(plan: Path, tmp_path: Path) -> None:
    make(write_plan(tmp_path / "f.plan", signed={"positions": "none"}), tmp_path)
    more = write_plan(tmp_path / "more.plan", verification=UNVERIFIED)
    with pytest.raises(TritonError, match=r"sam3-encoder-images: the ensemble needs the outputs sam3_pos_0"):
        make(more, tmp_path, ensemble=True)
    assert make(more, tmp_path, ensemble=True, outputs=("sam3_feat_*",)).active == 1
    assert make(plan, tmp_path, ensemble=True).active == 3


def test_old_versions_are_removed(plan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "sam3-encoder"

    def there() -> list[str]:
        return sorted(path.name for path in folder.iterdir() if path.is_dir())

    for _ in range(4):
        make(plan, tmp_path)
    assert there() == ["1", "2", "3", "4"]
    activate_version(tmp_path / "repository", "sam3-encoder", 2)
    unverified = write_plan(tmp_path / "unverified.plan", verification=UNVERIFIED)
    make(unverified, tmp_path, keep=2)
    assert there() == ["2", "4", "5"]  # the active one stays
    ran = neck_export_cli("triton", "--activate", "4", "--keep", "1", "--output", tmp_path / "repository")
    assert ran.code == 0 and ran.out.splitlines()[1:] == [f"removed {folder / '2'}"]
    assert there() == ["4", "5"]
    with pytest.raises(TritonError, match="--keep 0 is invalid"):
        make(plan, tmp_path, keep=0)
    assert make(plan, tmp_path, keep=1).version == 6 and there() == ["6"]
    assert not [path for path in tmp_path.iterdir() if "staging" in path.name]


CRASHES = """
import os, sys
from pathlib import Path
import engines.service.repository_files as files
from engines.service.repository import RepositoryOptions, make_repository
copy = files._copy
def crash(file, target):
    copy(file, target)
    os.kill(os.getpid(), 9)
files._copy = crash
make_repository(RepositoryOptions(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def test_a_killed_run_leaves_no_half_version(plan: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path)
    before = state(found.path)
    killed = subprocess.run([sys.executable, "-c", CRASHES, plan, found.path], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert state(found.path) == before
    left = [path.name for path in tmp_path.iterdir() if "staging" in path.name]
    assert left  # the control: it was killed at work
    assert make(plan, tmp_path).version == 2
    assert not [path.name for path in tmp_path.iterdir() if "staging" in path.name]


def test_a_full_disk(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(TritonError, match="the disk is full; free some space"):
        patch.setattr(engines.service.repository_files, "_copy", full)
        make(plan, tmp_path)
    usage = SimpleNamespace(free=10)
    with (
        monkeypatch.context() as patch,
        pytest.raises(TritonError, match="the disk has 10 bytes free, but the model needs 1"),
    ):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        make(plan, tmp_path)
    assert not (tmp_path / "repository").exists()  # no empty folder is left
    (tmp_path / "repository").mkdir()
    with monkeypatch.context() as patch, pytest.raises(TritonError, match="10 bytes free"):
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        make(plan, tmp_path)
    assert listing(tmp_path / "repository") == {}  # one that was there stays


def test_runs_at_once_make_a_version_each(plan: Path, tmp_path: Path) -> None:
    found: list[Repository] = []
    threads = [threading.Thread(target=lambda: found.append(make(plan, tmp_path, ensemble=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(repository.version for repository in found) == [1, 2, 3, 4]
    for version in range(1, 5):
        where = tmp_path / "repository" / "sam3-encoder" / str(version) / "manifest.json"
        check_files(where, read_manifest(where, "plan"))


def plans(folder: Path, second: dict[str, Any]) -> tuple[Path, Path]:
    return write_plan(folder / "a" / "encoder.plan"), write_plan(folder / "b" / "encoder.plan", b"ptrt 8.6", **second)


def test_several_plans_by_compute_capability(tmp_path: Path) -> None:
    first, second = plans(tmp_path, {"compute_capabilities": ["8.6"]})
    found = make(first, tmp_path, more=(second,))
    assert dict(config_of(found).cc_model_filenames) == {"8.9": "model_8.9.plan", "8.6": "model_8.6.plan"}
    assert "sam3-encoder can only be served on GPUs of compute capability 8.9, 8.6" in "".join(found.notes)
    version = found.path / "sam3-encoder" / "1"
    assert (version / "model_8.6.plan").read_bytes() == b"ptrt 8.6"
    for where in (version / "manifest.json", version / "model_8.6.plan.json"):
        check_files(where, read_manifest(where, "plan"))


def test_plans_that_are_not_one_encoder(onnx_file: Path, tmp_path: Path) -> None:
    ampere = {"compute_capabilities": ["8.6"]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "is for compute capability 8.9, and so is"),
        (ampere | {"seed": 1}, "differs from .* in weights"),
        (ampere | {"batch": "1:2:4"}, "differs from .* in batch"),
        (ampere | {"signed": {"positions": "none"}}, "differs from .* in outputs"),
        (ampere | {"precision": "bf16"}, "differs from .* in precision"),
        (ampere | {"tensorrt_version": "10.14.1.48"}, "a container has only one"),
        ({"compute_capabilities": ["8.6", "8.9"]}, "must name exactly one compute capability"),
    ]
    for second, message in cases:
        first, other = plans(tmp_path, second)
        with pytest.raises(TritonError, match=message):
            make(first, tmp_path, more=(other,))
    with pytest.raises(TritonError, match=r"\.onnx: this file is an ONNX file"):
        make(first, tmp_path, more=(onnx_file,))
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": "1:4:16"}, "max_batch_size was 8, but is now 16"),
        ({"batch": "4"}, "input image was TYPE_FP32 .3, 112, 112., but is now TYPE_FP32 .4, 3, 112, 112."),
        ({"signed": {"input_kind": "uint8"}}, "input image was TYPE_FP32"),
        ({"precision": "bf16"}, r"other\.plan does not have the same precision as version 1 "),
        (
            {"onnx_manifest": {"encoder": {"depth": 3}, "weights": {}}},
            r"other\.plan does not have the same encoder as version 1 ",
        ),
    ],
)
def test_a_folder_that_holds_another_model(changes: dict[str, Any], message: str, plan: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path)
    before = state(found.path)
    other = write_plan(tmp_path / "other.plan", **changes)
    with pytest.raises(TritonError, match=f"contains a different model.*{message}.*choose another --name"):
        make(other, tmp_path)
    assert state(found.path) == before
    assert make(other, tmp_path, name="other").version == 1


def test_a_folder_that_another_tool_wrote(plan: Path, onnx_file: Path, tmp_path: Path) -> None:
    found = make(plan, tmp_path)
    folder, config = found.config.parent, found.config.read_text()
    with pytest.raises(TritonError, match="backend was tensorrt_plan, but is now onnxruntime"):
        make(onnx_file, tmp_path)
    (folder / "1" / "manifest.json").unlink()
    with pytest.raises(TritonError, match="neck-export did not write"):
        make(plan, tmp_path)
    found.config.write_text("nonsense {")
    with pytest.raises(TritonError, match="cannot be read as a Triton config"):
        make(plan, tmp_path)
    found.config.unlink()
    with pytest.raises(TritonError, match=r"config\.pbtxt"):
        make(plan, tmp_path)
    shutil.rmtree(folder / "1")
    found.config.write_text(config.replace("sam3_", "other_"))
    with pytest.raises(TritonError, match="no output in common"):
        make(plan, tmp_path)
    shutil.rmtree(folder)
    folder.write_text("")
    with pytest.raises(TritonError, match="sam3-encoder: this is a file"):
        make(plan, tmp_path)


def spoil(plan: Path, **changes: Any) -> None:
    where = manifest_path(plan)
    where.write_text(json.dumps(json.loads(where.read_text()) | changes))


MANIFESTS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "onnx"}, "is not a neck-export manifest of type 'plan'"),
    ({"files": []}, "encoder.plan"),
    ({"files": [{"name": "encoder.plan", "bytes": 104, "sha256": "0"}]}, "was changed after its manifest"),
    ({"files": [{"name": "../encoder.plan", "bytes": 104, "sha256": "0"}]}, "which is outside the manifest's folder"),
    ({"flavor": "rtx"}, "TensorRT-RTX plan.*--flavor tensorrt`, or serve the ONNX file"),
    ({"batch": "x"}, "the manifest is damaged"),
    ({"batch": "2"}, "the manifest is damaged"),
    ({"inputs": []}, "0 inputs and 8 outputs"),
    ({"outputs": facts()["outputs"] * 2}, "more than one tensor with the name"),
    ({"outputs": [{"name": "x", "dtype": "float64", "shape": ["batch", 1]}]}, "x is float64"),
    ({"outputs": [{"name": "x", "dtype": "float16", "shape": ["batch", "h"]}]}, "the manifest is damaged"),
    (
        {"verification": {"verified": False, "outputs": [{"name": "sam3_feat_0", "passed": False}]}},
        r"verification failed \(sam3_feat_0\)",
    ),
    (
        {
            "verification": {
                "verified": False,
                "reason": "no GPU",
                "onnx": {"verified": False, "outputs": [{"name": "x"}]},
            }
        },
        r"verification failed \(x\)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MANIFESTS, ids=[message[:30] for _, message in MANIFESTS])
def test_a_manifest_that_does_not_fit(changes: dict[str, Any], message: str, plan: Path, tmp_path: Path) -> None:
    spoil(plan, **changes)
    with pytest.raises(TritonError, match=message):
        make(plan, tmp_path)
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("value", [None, 3, "x", {"x": 3}], ids=str)
def test_a_manifest_with_anything_in_it(value: Any, plan: Path, onnx_file: Path, tmp_path: Path) -> None:
    """Each fact, missing or of another type, is served or refused, never a traceback."""
    onnx = tmp_path / "onnx" / onnx_file.name
    shutil.copytree(onnx_file.parent, onnx.parent)
    refused = 0
    for model in (plan, onnx):
        where = manifest_path(model)
        whole = json.loads(where.read_text())
        for key in whole:
            content = {name: fact for name, fact in whole.items() if name != key}
            where.write_text(json.dumps(content if value is None else content | {key: value}))
            try:
                make(model, tmp_path / str(refused), kubernetes=tmp_path / "cluster")
            except TritonError:
                refused += 1
        where.write_text(json.dumps(whole))
    assert refused > 10


def test_files_that_are_none(plan: Path, tmp_path: Path) -> None:
    with pytest.raises(TritonError, match="is a folder; pass a plan"):
        make(tmp_path, tmp_path)
    with pytest.raises(TritonError, match="no such file"):
        make(tmp_path / "none.onnx", tmp_path)
    rtx = write_plan(tmp_path / "rtx.plan", b"vtrt" + bytes(100))  # its manifest says tensorrt
    with pytest.raises(TritonError, match="is a TensorRT-RTX plan"):
        make(rtx, tmp_path)
    manifest_path(plan).unlink()
    with pytest.raises(TritonError, match="the manifest is missing"):
        make(plan, tmp_path)


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"name": "a/b"}, "--name 'a/b' is invalid"),
    ({"name": ""}, "--name '' is invalid"),
    ({"name": ".."}, "--name '..' is invalid"),
    ({"version": 0}, "--version 0 is invalid"),
    ({"queue_delay_us": -1}, "--queue-delay-us -1 is invalid"),
    (
        {"outputs": ("sam2_feat_0",)},
        "'sam2_feat_0': encoder.plan has no such output; choose from sam3_feat_0, sam3_feat_1",
    ),
    ({"container": "latest"}, "container 'latest' is invalid; expected a year and month"),
    ({"container": "25.01"}, "needs TensorRT 10.13.3.9 exactly, but container 25.01 has 10.8.0; use container 25.09"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[message[:30] for _, message in OPTIONS])
def test_options_that_cannot_be(options: dict[str, Any], message: str, plan: Path, tmp_path: Path) -> None:
    with pytest.raises(TritonError, match=message):
        make(plan, tmp_path, **options)
    assert not (tmp_path / "repository").exists()


def test_the_output_is_a_file_or_cannot_be_written(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").write_text("")
    with pytest.raises(TritonError, match="repository: this is a file; name a folder"):
        make(plan, tmp_path)
    with pytest.raises(TritonError, match="choose another --name or --output"):
        make_repository(RepositoryOptions(plan, tmp_path / "repository" / "below"))


def source_with(tmp_path: Path, **changes: Any) -> Source:
    return read_model(write_plan(tmp_path / "encoder.plan", **changes))


COMPATIBLE = {"version_compatible": True, "hardware_compatible": "none"}


@pytest.mark.parametrize(
    ("version", "options", "asked", "container", "note"),
    [
        ("10.13.3.9", {}, None, "25.09", "has TensorRT 10.13.3, the version that the plan needs"),
        ("10.13.3.9", {}, "25.09", "25.09", "the version that the plan needs"),
        ("10.14.1.48", {}, None, "25.12", "the version that the plan needs"),
        ("10.3.0", {}, None, "24.08", "the version that the plan needs"),
        ("10.7.0.post1", {}, None, "24.12", "the version that the plan needs"),
        ("11.1.0.106", {}, None, "26.07", "the version that the plan needs"),
        ("11.2.1.2", {}, None, "26.08", "the version that the plan needs"),
        ("10.15.1.29", COMPATIBLE, None, "26.08", "--backend-config=tensorrt,version-compatible=true"),
        ("11.4.0.106", {}, None, None, "no Triton container with TensorRT 11.4.0.106 exactly"),
        ("11.4.0.106", {}, "27.01", "27.01", "container 27.01"),
        ("10.9.0.34", COMPATIBLE, None, "25.12", "--backend-config=tensorrt,version-compatible=true"),
        ("10.9.0.34", COMPATIBLE, "25.06", "25.06", "--backend-config=tensorrt,version-compatible=true"),
        ("10.9.0.34", COMPATIBLE, "27.01", "27.01", "--backend-config=tensorrt,version-compatible=true"),
        ("10.13.3.9", COMPATIBLE, None, "25.09", "--backend-config=tensorrt,version-compatible=true"),
        ("10.13.3.9", COMPATIBLE, "25.09", "25.09", "--backend-config=tensorrt,version-compatible=true"),
        ("11.4.0.106", COMPATIBLE, None, None, "--backend-config=tensorrt,version-compatible=true"),
    ],
)
def test_the_container_that_fits(
    version: str, options: dict[str, Any], asked: str | None, container: str | None, note: str, tmp_path: Path
) -> None:
    options = options or {"version_compatible": False, "hardware_compatible": "none"}
    source = source_with(tmp_path, tensorrt_version=version, options=options)
    found, notes = choose_container([source], asked)
    assert found == container and any(note in line for line in notes)
    assert any("version-compatible=true" in line for line in notes) == (options == COMPATIBLE)


def test_one_plan_of_several_that_needs_consent_is_enough(tmp_path: Path) -> None:
    plain = read_model(write_plan(tmp_path / "a" / "encoder.plan"))
    lean = read_model(write_plan(tmp_path / "b" / "encoder.plan", options=COMPATIBLE, compute_capabilities=["8.6"]))
    for sources in ([plain, lean], [lean, plain]):
        container, notes = choose_container(sources, None)
        assert container == "25.09" and any("version-compatible=true" in line for line in notes)
        with pytest.raises(TritonError, match="exactly"):
            choose_container(sources, "25.11")  # the one without a runtime of its own needs its own container
    assert choose_container([lean], "25.11")[0] == "25.11"


def test_containers_that_do_not_fit(onnx_file: Path, tmp_path: Path) -> None:
    compatible = source_with(tmp_path, tensorrt_version="10.13.3.9", options=COMPATIBLE)
    with pytest.raises(TritonError, match=r"needs TensorRT 10\.13\.3\.9 or later, but container 25\.06 has 10\.11\.0"):
        choose_container([compatible], "25.06")
    onnx = read_model(onnx_file)
    assert choose_container([onnx], None)[0] == max(ONNX_RUNTIME)
    assert choose_container([onnx], "24.10") == (
        "24.10",
        ["container nvcr.io/nvidia/tritonserver:24.10-py3 has ONNX Runtime 1.19.2"],
    )
    assert "27.01" in choose_container([onnx], "27.01")[1][0]
    bfloat = dataclasses.replace(onnx, outputs=(dataclasses.replace(onnx.outputs[0], dtype="bfloat16"),))
    assert choose_container([bfloat], "26.04")[0] == "26.04"
    with pytest.raises(TritonError, match=r"bfloat16.*\n.*--output-dtype fp32"):
        choose_container([bfloat], "25.12")


def test_a_file_that_a_container_would_compute_on_the_cpu_is_refused_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At opset 23 an FP16 file has Attention, which ONNX Runtime reads from 1.23, on a GPU from 1.25."""
    trace_quickly(monkeypatch)
    options = golden_options("meta-dual", tmp_path / "x.onnx", necks="sam3", precision="fp16", opset=23, verify=False)
    source = read_model(export_onnx(options).path)
    assert choose_container([source], None)[0] == max(ONNX_RUNTIME)
    assert choose_container([source], "26.07")[0] == "26.07"
    assert "runs MaxPool on the CPU" in choose_container([source], "26.07")[1][1]
    with pytest.raises(
        TritonError, match=r"25\.07 has ONNX Runtime 1\.22\.0.*: the runtime is only known to support opsets up to 22"
    ):
        choose_container([source], "25.07")
    with pytest.raises(TritonError, match=r"1\.17\.3"):
        choose_container([source], "24.04")
    told = (
        r"25\.09 has ONNX Runtime 1\.23\.0.*: the runtime computes the operator Attention of opset 23 on the CPU.*; "
        r"use container 26\.07"
    )
    with pytest.raises(TritonError, match=told) as caught:
        choose_container([source], "25.09")
    first, command = str(caught.value).splitlines()
    assert first.endswith("or export the file again for container 25.09:")
    ran = neck_export_cli(*shlex.split(command)[1:])
    assert ran.code == 0, ran.err
    assert choose_container([read_model(source.path)], "25.09")[0] == "25.09"


def test_the_requested_reader_decides_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24.10 and 24.11 carry the same ONNX Runtime and, as far as is known, the same TensorRT: only the name tells."""
    trace_quickly(monkeypatch)
    options = golden_options("meta-dual", tmp_path / "x.onnx", targets="triton-25.09,tensorrt-10.3", verify=False)
    source = read_model(export_onnx(options).path)
    targets = source.manifest["targets"]
    assert targets["products"] == ["triton-25.09"]
    assert choose_container([source], None)[0] == "25.09"
    assert choose_container([source], "25.12")[0] == "25.12"  # what is requested now comes first
    targets["products"] = ["triton-24.10"]
    assert choose_container([source], None)[0] == "24.10"
    targets["products"] = ["jetpack-6.2"]
    assert choose_container([source], None)[0] == max(ONNX_RUNTIME)


def test_the_example_of_the_docs_works_for_its_container() -> None:
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    targets, containers = re.findall(r"--target ([\w.-]+)", text), re.findall(r"tritonserver:(\d\d\.\d\d)-py3", text)
    assert set(targets) == {f"triton-{container}" for container in containers} and len(set(targets)) == 1
    form = resolve_target(find_targets(targets[0]), "fp16")
    assert (form.attention, form.spelling, form.opset) == ("fp32acc", "matmul", None)


def test_the_tables_are_in_order() -> None:
    """A container that is chosen is the newest: versions grow with the months."""
    for table in (TENSORRT, ONNX_RUNTIME):
        versions = [tuple(map(int, version.split("."))) for version in table.values()]
        assert list(table) == sorted(table) and versions == sorted(versions)


@pytest.mark.parametrize(
    ("precision", "verification", "note"),
    [
        ("fp16", VERDICT, ""),
        ("fp16", {"verified": False, "reason": "not verified: no GPU"}, "not verified: no GPU"),
        (
            "fp8",
            {"verified": False, "reason": "not verified: x", "onnx": VERDICT},
            "verified only the ONNX graph",
        ),
        ("int8", None, "manifest does not say why"),
    ],
)
def test_what_is_not_verified_is_said(precision: str, verification: Any, note: str, tmp_path: Path) -> None:
    """Of plans of any precision; the outputs of a quantized one are FP16."""
    plan = write_plan(tmp_path / "in" / "encoder.plan", precision=precision, verification=verification)
    found = make(plan, tmp_path)
    told = [line for line in found.notes if "verified" in line]
    assert len(told) == bool(note) and all(note in line for line in told)
    assert {kind for _, kind, _ in tensors(config_of(found).output)} == {FP16}
    assert read_manifest(found.path / "sam3-encoder" / "1" / "manifest.json", "plan")["precision"] == precision


def test_without_tritonclient_it_says_what_to_install(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(TritonError, match=r"tritonclient is not installed .*pip install 'tritonclient\[http,grpc\]'"):
        make(plan, tmp_path)


# The preprocessing model, in a fake for the server's python backend.


class Tensor:
    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value

    def as_numpy(self) -> np.ndarray:
        return self.value


class Failure(Exception):
    INVALID_ARG = "invalid argument"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@pytest.fixture
def preprocess(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    backend: Any = ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.TritonError = Tensor, Failure
    backend.get_input_tensor_by_name = lambda request, name: request[name]
    backend.InferenceResponse = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("preprocess_model", PREPROCESS_MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


def started(module: ModuleType, found: Repository) -> Any:
    from google.protobuf import json_format

    config = config_of(found, f"{found.name}-preprocess")
    model = module.TritonPythonModel()
    model.initialize({"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)})
    return model


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_images_become_what_neck_makes_of_them(preprocess: ModuleType, plan: Path, tmp_path: Path) -> None:
    """JPEG and PNG files of every mode that cameras and tools write; those that neck refuses are other tests'."""
    assert preprocess.torch is not None  # the exact resize
    files, expected = [], []
    for path in unusual_images.write_all(tmp_path):
        with contextlib.suppress(ImageError):
            expected.append(resize_image(read_image(path), (112, 112)))
            files.append(path.read_bytes())
    assert len(files) > 90
    request = {"image_file": Tensor("image_file", np.array(files, dtype=object).reshape(-1, 1))}
    (response,) = started(preprocess, make(plan, tmp_path, ensemble=True)).execute([request])
    (tensor,) = response.tensors
    assert response.error is None and tensor.name == "image"
    assert tensor.value.dtype == np.float32 and tensor.value.flags.c_contiguous
    np.testing.assert_array_equal(tensor.value, normalize(np.stack(expected)).numpy())
    assert not np.array_equal(tensor.value[0], tensor.value[1])  # the control: images differ
    pixels = write_plan(tmp_path / "uint8.plan", signed={"input_kind": "uint8"})
    (response,) = started(preprocess, make(pixels, tmp_path, ensemble=True, name="pixels")).execute([request])
    assert response.tensors[0].value.dtype == np.uint8
    np.testing.assert_array_equal(response.tensors[0].value, np.stack(expected))


PILLOW_LEVELS, PILLOW_SHARE = 1, 3e-2
"""Pillow rounds its weights otherwise than torch: by one level, in 34 of 112896 values of photographs, 1.4 % here."""


def test_without_torch_the_resize_is_pillows(preprocess: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "torch", None)
    pixels = np.asarray(Image.fromarray(noise(9, 7)).resize((150, 201), Image.Resampling.BICUBIC))
    for size in ((112, 112), (56, 168), (224, 224)):
        exact = resize_image(pixels, size).astype(int)
        difference = np.abs(preprocess.resize(pixels, size).astype(int) - exact)
        assert difference.shape == (*size, 3) and difference.max() <= PILLOW_LEVELS
        assert (difference > 0).mean() < PILLOW_SHARE
    nearest = np.asarray(Image.fromarray(pixels).resize((112, 112), Image.Resampling.NEAREST)).astype(int)
    assert np.abs(nearest - resize_image(pixels, (112, 112))).max() > PILLOW_LEVELS  # the control


def bad_images() -> dict[str, tuple[bytes, str]]:
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "PNG")
    gif = io.BytesIO()
    Image.fromarray(noise(8, 8)).save(gif, "GIF")
    header = whole.getvalue()
    head = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + header[24:29]
    huge = header[:12] + head + zlib.crc32(head).to_bytes(4, "big") + header[33:]
    return {
        "empty": (b"", r"is empty \(0 bytes\)"),
        "text": (b"hello", r"is damaged or not a JPEG or PNG file \(5 bytes\)"),
        "gif": (gif.getvalue(), "is damaged or not a JPEG or PNG file"),
        "cut": (header[:200], "cannot be decoded"),
        "bomb": (huge, "has more than [0-9]+ pixels"),
    }


@pytest.mark.parametrize("kind", list(bad_images()))
def test_a_bad_image_spoils_its_own_request_only(kind: str, preprocess: ModuleType, plan: Path, tmp_path: Path) -> None:
    data, message = bad_images()[kind]
    Image.fromarray(noise(50, 40)).save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    model = started(preprocess, make(plan, tmp_path, ensemble=True))
    requests = [
        {"image_file": Tensor("image_file", np.array(files, dtype=object))} for files in ([[good], [data]], [[good]])
    ]
    failed, answered = model.execute(requests)
    assert failed.tensors == [] and failed.error.code == Failure.INVALID_ARG
    with pytest.raises(Failure, match=f"image 2 of 2 {message}"):
        raise failed.error
    assert answered.error is None and answered.tensors[0].value.shape == (1, 3, 112, 112)


@pytest.mark.parametrize(("batch", "kind"), [("1:2:4", "float"), ("2", "float"), ("1", "uint8")])
def test_the_line_of_perf_analyzer_names_shape_and_input(
    batch: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_quickly(monkeypatch)
    asked: dict[str, Any] = {"batch": BatchRange.parse(batch), "input_kind": kind}
    if kind == "uint8":  # as test_trace.py traces it
        asked |= {"necks": "sam2", "levels": "0,3", "positions": "none"}
    onnx = export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", verify=False, **asked)).path
    perf, output = tmp_path / "perf", tmp_path / "models"
    ran = neck_export_cli("triton", onnx, "--output", output, "--perf-input", perf)
    assert ran.code == 0, ran.err
    words = shlex.split(ran.out.splitlines()[-1].partition(": ")[2])
    given = dict(zip(words[1::2], words[2::2], strict=True))
    config = config_of(make(onnx, tmp_path / "other"))
    name, _, sides = given["--shape"].partition(":")
    shape = [int(side) for side in sides.split(",")]
    assert (name, shape) == (config.input[0].name, list(config.input[0].dims))
    assert ("-b" in given) == (config.max_batch_size > 0) and given["--input-data"] == str(perf)
    data = np.fromfile(perf / "image", np.float32 if kind == "float" else np.uint8)
    assert data.size == math.prod(shape)  # of one request
    assert float(data.min()) < float(data.max()) <= (1.0 if kind == "float" else 255)
    plain = neck_export_cli("triton", onnx, "--output", output).out.splitlines()[-1]
    assert "--input-data random" in plain
