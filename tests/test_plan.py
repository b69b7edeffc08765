"""ONNX file to filed plan: manifest, reuse, refusal, and what is said where no GPU is."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from conftest import DATA
from exporting import plant_in_trunk, save_state
from typer.testing import CliRunner

import engines.plan
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import newest_onnx
from engines.builder.options import BuildOptions, PlanOptions
from engines.layers.layer_report import layers_path, read_layers
from engines.layers.plan_memory import memory_lines, pool_bytes, read_memory
from engines.plan import make_plan
from engines.run.verify import NO_GPU
from export.contract.manifest import ManifestError, check_files, data_path, manifest_path, read_manifest
from export.contract.options import ExportOptions
from export.contract.signature import BatchRange
from export.pipeline import RejectedError, export_onnx
from neck.config import EncoderConfig
from neck_export import app

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

ROOT = Path(__file__).parent.parent
CASE = DATA / "meta-dual"
CONFIG = CASE / "encoder.json"


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests say what happens without a GPU, on a machine that has one too; test_gpu_played.py says the rest."""
    monkeypatch.setattr("engines.builder.flavor.find_gpu", lambda device: None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified FP32 file."""
    return export(tmp_path_factory.mktemp("exported") / "encoder.onnx")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified FP16 file with dynamic batch."""
    output = tmp_path_factory.mktemp("dynamic") / "encoder.onnx"
    return export(output, precision="fp16", batch=BatchRange(1, 2, 4))


def export(output: Path, **options: object) -> Path:
    given = {"checkpoint": CASE / "checkpoint.pt", "config": EncoderConfig.from_file(CONFIG), **options}
    return export_onnx(ExportOptions(output=output, **given)).path  # type: ignore[arg-type]


def plan_options(onnx_file: Path, folder: Path, **changes: object) -> PlanOptions:
    options = PlanOptions(onnx=onnx_file, output=folder / "encoder.plan", precision="fp16", flavor="rtx")
    return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def test_an_fp32_file_becomes_an_fp16_plan_whose_graph_is_verified(exported: Path, tmp_path: Path) -> None:
    build = BuildOptions(compute_capabilities=("8.6", "8.9", "12.0"))
    result = make_plan(plan_options(exported, tmp_path, build=build))
    manifest = read_manifest(manifest_path(result.path), "plan")
    check_files(manifest_path(result.path), manifest)
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder.plan",
        "encoder.plan.json",
        "encoder.plan.layers.json",
    }
    assert manifest["verification"]["verified"] is False  # the plan itself did not run
    assert manifest["verification"]["reason"] == NO_GPU
    assert manifest["verification"]["onnx"]["verified"] is True
    assert len(manifest["verification"]["onnx"]["outputs"]) == 8
    assert manifest["compute_capabilities"] == ["8.6", "8.9", "12.0"]
    assert manifest["signature"]["dtype"] == "float16"
    assert [spec["dtype"] for spec in manifest["outputs"]] == ["float16"] * 8
    assert manifest["onnx"]["sha256"]
    assert result.layers is not None and result.layers == read_layers(result.path)
    assert json.loads(layers_path(result.path).read_text())["fused"] == 4
    assert "fused attentions 4 of 4, accumulation FP32" in result.layers.summary()
    assert result.path.stat().st_mode & 0o044  # a service of another user reads it


def test_a_plan_is_reused_until_something_changes(exported: Path, tmp_path: Path) -> None:
    options = plan_options(exported, tmp_path, verify=False)
    assert not make_plan(options).reused
    before = options.output.stat().st_mtime_ns
    again = make_plan(options)
    assert again.reused and options.output.stat().st_mtime_ns == before
    other = make_plan(dataclasses.replace(options, build=BuildOptions(optimization_level=1)))
    assert not other.reused and other.reason is not None and "options" in other.reason
    with options.output.open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    mended = make_plan(dataclasses.replace(options, build=BuildOptions(optimization_level=1)))
    assert not mended.reused and "changed" in str(mended.reason)


def test_a_plan_that_was_not_verified_is_built_again_when_that_is_asked(exported: Path, tmp_path: Path) -> None:
    options = plan_options(exported, tmp_path, verify=False)
    assert make_plan(options).manifest["verification"] == {"verified": False, "reason": "not verified: --no-verify"}
    assert make_plan(options).reused
    verified = make_plan(dataclasses.replace(options, verify=True))
    assert (
        verified.reason == "the existing plan was not verified"
        and verified.verdict is not None
        and verified.verdict.passed
    )
    assert make_plan(dataclasses.replace(options, verify=True)).reused


def test_a_graph_that_leaves_tolerance_stays_as_rejected_only(tmp_path: Path) -> None:
    save_state(tmp_path / "faulty.pt", plant_in_trunk)
    source = export(tmp_path / "in" / "faulty.onnx", checkpoint=tmp_path / "faulty.pt")  # sound in FP32
    folder = tmp_path / "out"
    with pytest.raises(RejectedError) as caught:
        make_plan(plan_options(source, folder))
    assert caught.value.verdict.first_bad is not None and "trunk.blocks.2" in caught.value.verdict.first_bad
    assert {path.name for path in folder.iterdir()} == {"encoder.plan.rejected", "encoder.plan.rejected.json"}
    figures = read_manifest(folder / "encoder.plan.rejected.json", "plan")["verification"]["onnx"]
    assert not figures["verified"] and figures["outputs"]
    mended = make_plan(plan_options(source, folder, keep_fp32=("trunk.blocks.2.attn",)))
    assert mended.verdict is not None and mended.verdict.passed


def test_a_file_that_was_changed_after_its_manifest_is_refused(exported: Path, tmp_path: Path) -> None:
    for file in (exported, data_path(exported), manifest_path(exported)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copy = tmp_path / exported.name
    with data_path(copy).open("r+b") as file:
        file.write(b"other")
    with pytest.raises(ManifestError, match="changed after its manifest"):
        make_plan(plan_options(copy, tmp_path / "out"))
    manifest_path(copy).write_text("{}")
    with pytest.raises(ManifestError, match="not a neck-export manifest"):
        make_plan(plan_options(copy, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_file_of_another_tool_builds_as_it_is_and_says_what_it_lacks(exported: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.onnx"
    model = onnx.load(exported)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, foreign)
    result = make_plan(plan_options(foreign, tmp_path, precision=None))
    assert "no manifest" in result.manifest["verification"]["reason"]
    with pytest.raises(BuildError, match="not written by neck-export"):
        make_plan(plan_options(foreign, tmp_path, precision="fp16"))


def test_a_low_precision_file_is_not_turned_into_another(exported: Path, tmp_path: Path) -> None:
    source = export(tmp_path / "half.onnx", precision="fp16", verify=False)
    with pytest.raises(BuildError, match="is in fp16, but the requested precision is bf16"):
        make_plan(plan_options(source, tmp_path / "out", precision="bf16"))


def test_the_plans_memory_is_told(dynamic: Path, tmp_path: Path) -> None:
    """Weights and activations as the builder logs them, inputs and outputs from their shapes, a pool of N from both."""
    found = {}
    for largest in (2, 4):
        build = BuildOptions(batch=BatchRange(1, 2, largest))
        made = make_plan(plan_options(dynamic, tmp_path / str(largest), build=build, verify=False))
        memory = found[largest] = made.manifest["memory"]
        tensors = [*made.manifest["inputs"], *made.manifest["outputs"]]
        items = {"float32": 4, "float16": 2}
        sizes = [items[one["dtype"]] * largest * math.prod(one["shape"][1:]) for one in tensors]
        assert memory["io_bytes"] == sum(sizes)
        total = memory["weights_bytes"] + 4 * (memory["activation_bytes"] + memory["io_bytes"])
        assert pool_bytes(memory, 4) == total
        shown = CliRunner().invoke(app, ["inspect", str(made.path)]).output
        assert f"{total / 1e6:,.1f} MB with 4 execution contexts" in shown and f"at batch {largest}" in shown
    weights = data_path(dynamic).stat().st_size
    assert 0.9 * weights < found[4]["weights_bytes"] < 1.5 * weights
    assert found[4]["activation_bytes"] > found[2]["activation_bytes"]
    lines = memory_lines(made.manifest | {"memory": None})  # a plan of an older version: what its shapes tell
    assert len(lines) == 1 and lines[0].count("unknown") == 2
    assert read_memory("Total Weights Memory: 12 bytes") == {"weights_bytes": 12} and not read_memory("Weights: 12")


def test_a_dynamic_batch_becomes_the_plans_profile(dynamic: Path, tmp_path: Path) -> None:
    result = make_plan(plan_options(dynamic, tmp_path / "out", precision=None))
    assert result.manifest["batch"] == "1:2:4"
    assert result.manifest["inputs"][0]["shape"][0] == "batch"
    # the file was verified when it was exported, so its figures are taken over
    assert result.verdict is None and result.manifest["verification"]["onnx"]["verified"]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_weights_may_have_moved(precision: str, exported: Path, tmp_path: Path) -> None:
    """Exported on one machine, built on another: --checkpoint says where they are now."""
    for file in exported.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    onnx_file, where = tmp_path / exported.name, manifest_path(tmp_path / exported.name)
    manifest = read_manifest(where, "onnx")
    manifest["weights"]["path"] = str(tmp_path / "gone.pt")
    where.write_text(json.dumps(manifest))
    arguments = ["trt", str(onnx_file), "--precision", precision, "--flavor", "rtx"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 1 and "--checkpoint" in ran.output
    ran = CliRunner().invoke(app, [*arguments, "--checkpoint", str(CASE / "checkpoint.pt")])
    assert ran.exit_code == 0 and "is verified" in ran.output, ran.output
    other = tmp_path / "other.pt"
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)["model"]
    torch.save({name: 1.25 * value if "patch_embed" in name else value for name, value in state.items()}, other)
    ran = CliRunner().invoke(app, [*arguments, "--checkpoint", str(other), "--output", str(tmp_path / "y.plan")])
    assert ran.exit_code == 1 and str(other) in ran.output  # the control: other weights


def test_two_builds_into_one_folder_leave_one_whole_plan(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process's build ends while this one's plan is built and not yet published; neither sweeps the other's."""
    words = [sys.executable, "-m", "neck_export", "trt", str(exported), "--fp16", "--no-verify", "--flavor", "rtx"]
    words += ["--output", str(tmp_path / "encoder.plan"), "--optimization-level", "1"]
    real, ended = engines.plan.publish_plan, list[int]()

    def publish(folder: Path, target: Path) -> None:
        ended.append(subprocess.run(words, cwd=ROOT, stdout=subprocess.DEVNULL).returncode)
        assert target.exists() and folder.exists()
        real(folder, target)

    monkeypatch.setattr(engines.plan, "publish_plan", publish)
    made = make_plan(plan_options(exported, tmp_path, verify=False, build=BuildOptions(optimization_level=2)))
    assert ended == [0] and made.manifest["options"]["optimization_level"] == 2
    manifest = read_manifest(tmp_path / "encoder.plan.json", "plan")
    check_files(tmp_path / "encoder.plan.json", manifest)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_trt_straight_after_onnx_needs_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["onnx", "--checkpoint", str(CASE / "checkpoint.pt"), "--config", str(CONFIG)]
    assert CliRunner().invoke(app, words).exit_code == 0
    result = CliRunner().invoke(app, ["trt", "--fp16"])
    assert result.exit_code == 0, result.output
    assert "the plan is not verified: no NVIDIA driver" in result.output
    assert "the ONNX graph that the plan was built from is verified" in result.output
    assert "fused attentions 4 of 4, accumulation FP32" in result.output
    assert (tmp_path / "build" / "sam3-encoder.plan").is_file()
    shown = CliRunner().invoke(app, ["inspect", "build/sam3-encoder.plan"])
    assert shown.exit_code == 0 and "fused attentions 4 of 4" in shown.output
    assert CliRunner().invoke(app, ["inspect", "build/sam3-encoder.plan", "--json"]).exit_code == 0


def test_an_fp16_accumulating_plan_is_warned_of(exported: Path, tmp_path: Path) -> None:
    words = ["trt", str(exported), "--fp16", "--attention", "fused", "--no-verify"]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path / "e.plan")])
    assert result.exit_code == 0
    assert "accumulation FP16" in result.output and "#4837" in result.output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--flavor", "tensorrt"], 1, "GPU"),
        (["--compute-capability", "9.0"], 1, "9.0"),
        (["--fp16", "--bf16"], 2, "choose one"),
        (["--batch", "1:4:8"], 1, "batch size 1, but 1:4:8 was requested"),
        (["--tune", "--fp16"], 1, "needs an NVIDIA GPU"),
    ],
)
def test_bad_options_are_one_line(exported: Path, tmp_path: Path, words: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(app, ["trt", str(exported), *words, "--output", str(tmp_path / "out" / "e.plan")])
    assert result.exit_code == code and said in result.output
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_no_onnx_file_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["trt"])
    assert result.exit_code == 1 and "neck-export onnx" in result.output
    for name, age in (("old.onnx", 100), ("new.onnx", 10)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1_700_000_000 - age,) * 2)
    assert newest_onnx(tmp_path).name == "new.onnx"
