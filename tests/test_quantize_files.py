"""FP8 and INT8 files through every stage of the command line: what works, what is refused, what is said."""

from __future__ import annotations

import contextlib
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from exporting import checkpoint_of, config_of, golden_options, listing, neck_export_cli, trace_quickly
from PIL import Image

from export.contract.manifest import manifest_path, read_manifest
from export.contract.options import ExportOptions
from export.pipeline import export_onnx, verify_file

OPTIONS = ("--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"), "--neck", "sam3")
OPTIONS += ("--positions", "none")


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


@pytest.fixture(scope="module")
def fp8_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four products in FP8, verified."""
    path = tmp_path_factory.mktemp("fp8") / "a.onnx"
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        ran = neck_export_cli("onnx", *OPTIONS, "--precision", "fp8", "--quantize", "*.fc2", "--output", path)
    assert ran.code == 0, ran.err
    assert "simulated" in ran.out
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_other_precisions_do_not_reach_the_quantizing(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of the default and of FP16 were once compared with those from before there was any; FP8 is the control."""

    def reached(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("export.pipeline.select_quantization", reached)
    monkeypatch.setattr("export.lowering.precision.quantize", reached)
    options = golden_options("meta-dual", tmp_path / "a.onnx", precision=precision, verify=False)
    with pytest.raises(ZeroDivisionError) if precision == "fp8" else contextlib.nullcontext():
        export_onnx(options)
    assert (tmp_path / "a.onnx").exists() == (precision != "fp8")


def test_fp8_is_inspected(fp8_file: Path) -> None:
    told = neck_export_cli("inspect", fp8_file).out
    assert "4 of 16 linear layers are quantized to fp8; the calibration used 1 image" in told
    assert "read by TensorRT 10.0 and later, TensorRT-RTX" in told


def test_fp8_becomes_a_plan_that_says_what_no_gpu_verified(fp8_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    plan = tmp_path / "a.plan"
    built = neck_export_cli("trt", fp8_file, "--flavor", "rtx", "--compute-capability", "8.9", "--output", plan)
    assert built.code == 0, built.err
    assert "4 of 4 quantized linear layers run in FP8 (accumulation type unknown)" in built.out
    manifest = read_manifest(manifest_path(plan), "plan")
    verified = manifest["verification"]
    assert manifest["precision"] == "fp8"
    assert verified["onnx"]["verified"]
    assert verified["verified"] or "the plan is not verified: " in built.out
    assert "4 of 16 linear layers are quantized to fp8" in neck_export_cli("inspect", plan).out
    refused = neck_export_cli("triton", plan, "--output", tmp_path / "repository")
    assert refused.code == 1
    assert "is a TensorRT-RTX plan" in refused.err


def test_triton_takes_no_fp8_onnx_file_and_says_what_it_takes(fp8_file: Path, tmp_path: Path) -> None:
    """ONNX Runtime is not known to run Q and DQ of FP8 on a GPU."""
    refused = neck_export_cli("triton", fp8_file, "--output", tmp_path / "repository")
    assert refused.code == 1
    assert "the runtime is not known to support the operator QuantizeLinear (4 nodes); " in refused.err
    command = shlex.split(refused.err.splitlines()[1])
    assert not {"--quantize", "--budget"} & set(command)
    again = neck_export_cli(*command[1:-1], tmp_path / "b.onnx")
    assert again.code == 0, again.err
    assert neck_export_cli("triton", tmp_path / "b.onnx", "--output", tmp_path / "repository").code == 0
    assert not list(fp8_file.parent.glob("repository"))


def export(tmp_path: Path, name: str, **changes: object) -> ExportOptions:
    return golden_options("meta-dual", tmp_path / name, necks="sam3", positions="none", **changes)


def test_int8_from_end_to_end(tmp_path: Path) -> None:
    """Export, verify, inspect, plan where a builder is; the calibration is kept and used again."""
    kept = tmp_path / "c.safetensors"
    options = [*OPTIONS]
    options += ["--precision", "int8", "--quantize", "all", "--calibration", kept]
    first = neck_export_cli("onnx", *options, "--output", tmp_path / "a.onnx")
    assert first.code == 0, first.err
    assert "the calibration used only the image that comes with neck-export" in first.out
    second = neck_export_cli("onnx", *options, "--output", tmp_path / "b.onnx")
    assert "the calibration used only" not in second.out
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert [found["files"][1]["sha256"] for found in (one, two)] == [one["files"][1]["sha256"]] * 2
    assert len(one["quantization"]["products"]) == one["quantization"]["of"] == 16
    assert (
        "16 of 16 linear layers are quantized to int8; the calibration used 1 image"
        in neck_export_cli("inspect", tmp_path / "a.onnx").out
    )
    assert verify_file(tmp_path / "a.onnx").passed
    assert "block and output is within tolerance" in neck_export_cli("bisect", tmp_path / "a.onnx").out
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    built = neck_export_cli("trt", tmp_path / "a.onnx", "--flavor", "rtx", "--compute-capability", "8.6")
    assert built.code == 0, built.err
    assert "16 of 16 quantized linear layers run in INT8 (accumulation type unknown)" in built.out
    assert "16 of 16 linear layers are quantized to int8" in neck_export_cli("inspect", tmp_path / "a.plan").out


def test_fp8_from_an_fp32_file(tmp_path: Path) -> None:
    """`trt --precision fp8` calibrates by the manifest; a GPU without FP8 is refused and INT8 named."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    export_onnx(export(tmp_path, "a.onnx", verify=False))
    words = ["trt", tmp_path / "a.onnx", "--flavor", "rtx", "--precision", "fp8", "--quantize", "*.3.mlp"]
    built = neck_export_cli(*words, "--compute-capability", "8.9,12.0")
    assert built.code == 0, built.err
    assert "2 of 2 quantized linear layers run in FP8" in built.out
    refused = neck_export_cli(*words, "--compute-capability", "8.6,8.9", "--no-verify")
    assert refused.code == 1
    assert "compute capability 8.6" in refused.err
    assert "--precision int8" in refused.err
    words[-1] = "*.attn.attention"  # a file whose only FP8 is in its attentions
    refused = neck_export_cli(*words, "--compute-capability", "8.6", "--no-verify")
    assert refused.code == 1 and "compute capability 8.6" in refused.err


def test_an_fp8_file_that_leaves_its_budget_is_refused(tmp_path: Path) -> None:
    words = ["onnx", *OPTIONS]
    refused = neck_export_cli(
        *words, "--precision", "fp8", "--quantize", "all", "--budget", "0.01", "--output", tmp_path / "a.onnx"
    )
    assert refused.code == 3
    assert not list(tmp_path.iterdir())


def images(folder: Path, count: int, flat: bool = False) -> Path:
    folder.mkdir()
    chance = np.random.default_rng(0)
    for index in range(count):
        pixels = chance.integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels * 0 + 7 if flat and index == 5 else pixels).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--precision", "fp16", "--quantize", "all"], "--precision is fp16"),
        (["--precision", "fp8", "--budget", "0"], "a number between 0 and 1"),
        (["--precision", "fp8", "--calibration", "x.json"], "end in .safetensors"),
        (["--precision", "fp8", "--quantize", "convs.0"], "linear layers, whose names are"),
        (["--precision", "fp8", "--quantize", "all", "--images", "few"], "3 images"),
        (["--precision", "int8", "--quantize", "all", "--images", "flat"], "5.png"),
        (["--precision", "int8", "--images", "broken", "--calibration", "new.safetensors"], "7.png"),
        (["--precision", "int8", "--calibration", "none.safetensors"], "is not a calibration that neck-export wrote"),
    ],
)
def test_bad_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path / "few", 3)
    images(tmp_path / "flat", 8, flat=True)
    (images(tmp_path / "broken", 8) / "7.png").write_bytes(b"no image")
    (tmp_path / "none.safetensors").write_bytes(b"no calibration")
    before = listing(tmp_path)
    ran = neck_export_cli("onnx", *OPTIONS, *options, "--output", "out/a.onnx")
    assert ran.code == 1
    assert words in ran.err
    assert ran.err.count("\n") <= 2
    assert {name: data for name, data in listing(tmp_path).items() if name != "out/"} == before
