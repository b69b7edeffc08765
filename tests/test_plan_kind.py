"""Whose plan a file is, by its content, at each command that takes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exporting import DATA, listing, neck_export_cli

from benchmarks.bench import check_options
from benchmarks.errors import BenchError
from benchmarks.options import BenchOptions
from engines.builder.flavor import Flavor, FlavorError
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import read_source
from engines.builder.plan_kind import is_plan, strip_header
from engines.layers.layer_report import LayerReport, layers_path
from export.contract.manifest import manifest_path, write_manifest

PLANS = {"TensorRT": b"ftrt", "TensorRT-RTX": b"vtrt"}
ABOUT = {"description": "Ultralytics SAM model", "task": "segment", "imgsz": [1024, 1024], "names": {"0": "thing"}}
DEEP = (200_000).to_bytes(4, "little") + b"[" * 200_000
"""JSON that Python does not read to its end."""

COMMANDS = ("inspect", "verify", "triton", "profile", "bisect")


def ultralytics(path: Path, magic: bytes = b"ftrt") -> Path:
    """The layout of Ultralytics' exporter: four bytes of length, little-endian, JSON, the plan."""
    text = json.dumps(ABOUT).encode()
    path.write_bytes(len(text).to_bytes(4, "little") + text + magic + bytes(100))
    return path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["x.engine", "x.plan", "x.onnx"])
def test_an_engine_of_ultralytics(command: str, name: str, tmp_path: Path) -> None:
    path = ultralytics(tmp_path / name)
    more = ["--output", str(tmp_path / "repository")] if command == "triton" else []
    before = listing(tmp_path)
    ran = neck_export_cli(command, path, *more)
    assert (ran.code, ran.out) == (1, "")
    first, second = ran.err.splitlines()
    assert first.startswith(f"error: {path}: this is an Ultralytics engine")
    assert "JSON header: description Ultralytics SAM model, task" in first
    assert f"neck-export inspect {path} --strip-header {path.with_suffix('.bare.plan')}" in second
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_under_another_suffix(command: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(PLANS[kind] + bytes(100))
    ran = neck_export_cli(command, path)
    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith(f"error: {path}: this is a {kind} plan, but its manifest x.engine.json is missing")
    assert line.index("original name") < line.index("such as x.plan. ") < line.index("such as x.plan.json")


def test_what_trt_and_bench_say_of_it(tmp_path: Path) -> None:
    """`trt` wants the ONNX file, `bench --plan` the layer report of a plan of ours; both tell before any work."""
    foreign, bare = ultralytics(tmp_path / "u.engine"), tmp_path / "x.engine"
    bare.write_bytes(b"vtrt" + bytes(100))
    for path, words in (
        (foreign, "is an Ultralytics engine"),
        (bare, "is a TensorRT-RTX plan, but its manifest x.engine.json"),
    ):
        with pytest.raises(BuildError, match=words):
            read_source(path, print)
        with pytest.raises(BuildError, match=words):
            check_options(BenchOptions(tmp_path, plan=path))
    ours = tmp_path / "x.plan"
    bare.rename(ours)
    with pytest.raises(BuildError, match=r"is already a plan; name the ONNX file"):
        read_source(ours, print)
    with pytest.raises(BenchError, match=r"x\.plan: .*its layer report .*x\.plan\.layers\.json is missing"):
        check_options(BenchOptions(tmp_path, plan=ours))
    layers_path(ours).write_text(json.dumps(LayerReport("builder log", (), 0).to_dict()))
    check_options(BenchOptions(tmp_path, plan=ours))  # the control


def test_with_its_manifest_it_may_have_any_name(tmp_path: Path) -> None:
    """The control; `trt --output x.engine` writes such a file."""
    path = tmp_path / "x.engine"
    path.write_bytes(b"vtrt" + bytes(100))
    write_manifest(manifest_path(path), "plan", {}, [path])
    assert is_plan(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"ftr", b"\x08\n:", b'\x05\0\0\0{"a":', b"\x02\0\0\0{}abcd", b"\x02\0\0\0[]ftrt", b"\xff" * 40, DEEP],
)
def test_anything_else_is_told_by_its_name(content: bytes, tmp_path: Path) -> None:
    for name, expected in (("x.plan", True), ("x.onnx", False), ("x.engine", False)):
        path = tmp_path / name
        path.write_bytes(content)
        assert is_plan(path) == expected
        with pytest.raises(BuildError, match=r"x\.\w+: --strip-header expects .* this file is not a plan"):
            strip_header(path, tmp_path / "out.plan")
    assert not is_plan(next((DATA / "meta-dual").glob("checkpoint.*")))
    assert not is_plan(tmp_path) and is_plan(tmp_path / "none.plan")


def test_the_header_is_stripped_when_asked(tmp_path: Path) -> None:
    path, bare = ultralytics(tmp_path / "x.engine"), tmp_path / "bare.plan"
    ran = neck_export_cli("inspect", path, "--strip-header", bare)
    assert ran.code == 0, ran
    assert bare.read_bytes() == b"ftrt" + bytes(100)
    assert "task: segment" in ran.out and ran.out.splitlines()[-1] == str(bare)
    assert json.loads(neck_export_cli("inspect", path, "--strip-header", bare, "--json").out) == ABOUT
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bare.plan", "x.engine"]


def test_what_cannot_be_stripped(tmp_path: Path) -> None:
    path, bare = ultralytics(tmp_path / "x.engine"), tmp_path / "bare.plan"
    bare.write_bytes(b"ftrt")
    for given, output, words in (
        (path, path, "the same as the input file"),
        (bare, tmp_path / "y.plan", "this file is a bare TensorRT plan"),
        (tmp_path / "none", bare, "No such file or directory, so no file was written"),
    ):
        with pytest.raises(BuildError, match=words):
            strip_header(given, output)
    assert is_plan(bare) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("capability", ["8.7", "11.0"])
def test_a_jetson_is_built_for_on_the_device(capability: str) -> None:
    rtx = Flavor("rtx", None, "1.7", ("8.6", "8.9"), None)
    with pytest.raises(
        FlavorError,
        match=(
            rf"{capability} is the compute capability of a Jetson: build the plan on that device, with "
            rf"--flavor tensorrt"
        ),
    ):
        rtx.check_targets([capability])
    with pytest.raises(FlavorError) as caught:
        rtx.check_targets(["6.1"])
    assert "Jetson" not in str(caught.value)  # the control
