"""One call, one command: `export_encoder`, `build_engine`, and `neck-export trt` on weights."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer.main
from exporting import checkpoint_of, config_of, neck_export_cli, trace_quickly

import neck_export
from engines import build_engine
from engines.builder.onnx_graph import BuildError
from export import export_encoder
from export.api import read_size
from export.contract.errors import ExportError
from export.contract.manifest import read_manifest
from export.pipeline import RejectedError
from neck.checkpoint import random_encoder, save_meta_checkpoint
from neck.config import EncoderConfig

CHECKPOINT, CONFIG = checkpoint_of("meta-dual"), config_of("meta-dual")


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)
    monkeypatch.setattr("engines.builder.flavor.find_gpu", lambda device: None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command_defaults(name: str) -> dict[str, Any]:
    """Names and defaults of a command's arguments and options."""
    group: Any = typer.main.get_command(neck_export.app)
    return {one.name: one.default for one in group.commands[name].params if one.name != "help"}


def same(ours: object, theirs: object) -> bool:
    """Whether two defaults mean the same: `no pattern` is None on the command line and () in Python."""
    return (ours or None) == (theirs or None) if isinstance(ours, tuple) else str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("call", "command", "left_out"),
    [
        (export_encoder, "onnx", {"checkpoint"}),  # required: Python exports no random weights unasked
        (build_engine, "trt", {"fp16", "bf16", "fp32"}),  # precision= says it
    ],
)
def test_names_and_defaults_are_the_command_lines(call: Any, command: str, left_out: set[str]) -> None:
    parameters = inspect.signature(call).parameters
    ours = {name: one.default for name, one in parameters.items() if name not in left_out}
    theirs = {name: value for name, value in command_defaults(command).items() if name not in left_out}
    assert set(ours) == set(theirs)
    assert [name for name in ours if not same(ours[name], theirs[name])] == []
    assert not same(ours["precision"], "fp8")  # the control
    documented = call.__doc__ or ""
    assert [name for name in parameters if name not in documented] == []


def test_a_file_by_one_call_is_the_commands(tmp_path: Path) -> None:
    made = export_encoder(
        str(CHECKPOINT), str(tmp_path / "a.onnx"), config=str(CONFIG), precision="fp16", batch="1:2:2"
    )
    words = ("--checkpoint", CHECKPOINT, "--config", CONFIG, "--precision", "fp16", "--batch", "1:2:2")
    assert neck_export_cli("onnx", *words, "--output", tmp_path / "b.onnx").code == 0
    assert digest(tmp_path / "a.onnx.data") == digest(tmp_path / "b.onnx.data")
    assert made.verdict is not None and made.verdict.passed and made.manifest["signature"]["batch"] == "1:2:2"
    full = EncoderConfig.from_file(CONFIG)
    other = export_encoder(CHECKPOINT, tmp_path / "c.onnx", config=full, batch=1, verify=False)
    assert other.manifest["signature"]["batch"] == "1"
    assert digest(other.path.with_suffix(".onnx.data")) != digest(tmp_path / "b.onnx.data")  # the control: FP32


def test_bad_arguments_are_refused_by_name(tmp_path: Path) -> None:
    asked: tuple[tuple[str, Any], ...] = (
        ("image_size", "1008x"),
        ("opset", "newest"),
        ("precision", "fp4"),
        ("image_range", "0:4000"),
    )
    for name, value in asked:
        with pytest.raises(ExportError, match=name):
            export_encoder("random", tmp_path / "e.onnx", **{name: value})
    assert read_size("1008x672") == read_size((1008, 672)) == (1008, 672)
    with pytest.raises(RejectedError):
        export_encoder(CHECKPOINT, tmp_path / "e.onnx", config=CONFIG, tolerance={"sam3_feat_0": 1e-12})
    assert not list(tmp_path.iterdir())


rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install '.[rtx]'",
)


@rtx
def test_weights_to_a_plan_in_one_command_writes_the_files_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(EncoderConfig.from_file(CONFIG), depth=2, global_blocks=(1,))
    (tmp_path / "encoder.json").write_text(json.dumps(small.to_dict()))
    both = dataclasses.replace(small, necks=("sam3", "sam2"))
    save_meta_checkpoint(random_encoder(both), tmp_path / "sam3.pt")
    one, two = tmp_path / "one", tmp_path / "two"
    asked = ("--config", "../encoder.json", "--neck", "both", "--batch", "1:2:2", "--image-size", "112")
    for folder in (one, two):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if folder == one:
            ran = neck_export_cli("trt", "../sam3.pt", "--fp16", "--flavor", "rtx", *asked)
        else:
            assert neck_export_cli("onnx", "--checkpoint", "../sam3.pt", *asked).code == 0
            ran = neck_export_cli("trt", "--fp16", "--flavor", "rtx")
        assert ran.code == 0, ran
    names = {path.name for path in (one / "build").iterdir()}
    assert names == {path.name for path in (two / "build").iterdir()}
    assert {"sam3-encoder.onnx", "sam3-encoder.onnx.data", "sam3-encoder.plan"} <= names
    for name in ("sam3-encoder.onnx", "sam3-encoder.onnx.data"):
        assert digest(one / "build" / name) == digest(two / "build" / name)
    assert digest(one / "build" / "sam3-encoder.onnx") != digest(one / "build" / "sam3-encoder.onnx.data")
    manifests = [read_manifest(folder / "build" / "sam3-encoder.plan.json", "plan") for folder in (one, two)]
    assert manifests[0]["key"] == manifests[1]["key"]
    assert manifests[0]["batch"] == "1:2:2" and len(manifests[0]["outputs"]) == 16
    monkeypatch.chdir(one)
    again = neck_export_cli("trt", "build/sam3-encoder.onnx", "--fp16", "--flavor", "rtx")
    assert again.code == 0 and again.out.startswith("the existing plan is kept")


@rtx
def test_weights_to_a_plan_in_one_call(tmp_path: Path) -> None:
    made = build_engine(CHECKPOINT, tmp_path / "e.plan", config=CONFIG, precision="fp16", flavor="rtx", verify=False)
    assert made.path == tmp_path / "e.plan" and made.exported is not None
    assert made.exported.path == tmp_path / "e.onnx" and made.exported.manifest["precision"] == "fp32"
    again = build_engine(tmp_path / "e.onnx", precision="fp16", flavor="rtx", verify=False)
    assert again.reused and again.path == tmp_path / "e.plan" and again.exported is None


@rtx
def test_what_does_not_go_with_the_model_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.api.export_onnx", lambda *given, **asked: pytest.fail("exported"))
    (tmp_path / "x.onnx").touch()
    plan = tmp_path / "e.plan"
    for words, subject in (
        ((tmp_path / "x.onnx", "--image-size", "112"), "--image-size"),
        ((tmp_path / "x.onnx", "--neck", "both"), "--neck"),
        ((CHECKPOINT, "--checkpoint", CHECKPOINT), "--checkpoint"),
        ((CHECKPOINT, "--flavor", "rtx", "--compute-capability", "9.0"), "9.0"),
        ((CHECKPOINT, "--precision", "fp16", "--quantize", "all", "--flavor", "rtx"), "quantize"),
    ):
        ran = neck_export_cli("trt", *words, "--output", plan)
        assert ran.code == 1 and subject in ran.err and len(ran.err.splitlines()) <= 2
    with pytest.raises(BuildError, match=r"e\.onnx"):
        build_engine(CHECKPOINT, tmp_path / "e.onnx", config=CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"x.onnx"}


def test_weights_are_told_from_onnx_files(tmp_path: Path) -> None:
    from neck.weightfile import is_checkpoint

    shutil.copy(CHECKPOINT, tmp_path / "unnamed")
    (tmp_path / "graph").write_bytes(b"\x08\x0a\x12\x0bneck-export")
    for given in (CHECKPOINT, tmp_path / "unnamed", tmp_path, "missing.pt", "random"):
        assert is_checkpoint(given)
    for given in (tmp_path / "graph", "missing.onnx", "missing", tmp_path / "missing.plan"):
        assert not is_checkpoint(given)
