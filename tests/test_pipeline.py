"""Checkpoint -> files: their names, what the manifest says of them, the verdict, and what is never left behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from conftest import GOLDEN_CASES, load_golden, tiny_config
from exporting import (
    PREFIX,
    checkpoint_of,
    config_of,
    golden_options,
    golden_state,
    listing,
    neck_export_cli,
    plant_in_neck,
    plant_in_trunk,
    save_state,
    trace_quickly,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import export.verification.verify
from export.contract.errors import ExportError
from export.contract.manifest import ManifestError, file_entry, read_manifest, sha256
from export.contract.options import ExportOptions
from export.contract.signature import BatchRange, Signature, SignatureError
from export.options import check_options, load, sign
from export.pipeline import ExportResult, RejectedError, export_onnx, verify_file, write_onnx
from export.verification.fidelity import TOLERANCES, FidelityError, compare
from export.verification.verify import check_memory, reference_outputs, reference_pixels, require_runtime, run_model
from export.weights_origin import encoder_config
from neck.checkpoint import CheckpointError
from neck.config import EncoderConfig
from neck.images import normalize


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """An FP16 file of a golden encoder, to be left as it is."""
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        path = tmp_path_factory.mktemp("exported") / "x.onnx"
        return export_onnx(golden_options("meta-dual", path, precision="fp16"))


@pytest.fixture
def exported(exported_once: ExportResult, tmp_path: Path) -> ExportResult:
    """A copy of that file, in a folder of its own."""
    folder = shutil.copytree(exported_once.path.parent, tmp_path / "out")
    return dataclasses.replace(exported_once, path=folder / exported_once.path.name)


PRECISIONS = ("fp32", "fp16", "bf16", "fp16", "bf16", "fp32")
"""One of each golden case: how a file is judged does not depend on both."""


@pytest.mark.parametrize(("case", "precision"), list(zip(GOLDEN_CASES, PRECISIONS, strict=True)))
def test_golden(case: str, precision: Any, tmp_path: Path) -> None:
    output = tmp_path / "made" / "deeper" / "x.onnx"
    steps: list[str] = []
    count = len(load_golden(case).image)
    options = golden_options(case, output, precision=precision, batch=BatchRange(count, count, count))
    result = export_onnx(options, steps.append)
    assert sorted(path.name for path in output.parent.iterdir()) == ["x.json", "x.onnx", "x.onnx.data"]
    assert steps[0] == f"loading the weights of {checkpoint_of(case)}"
    assert len(steps) == 6

    assert result.verdict is not None
    assert result.verdict.passed
    model = ir.load(output)
    names = [value.name for value in model.graph.outputs]
    assert [row.name for row in result.verdict.comparisons] == names
    assert all(row.tolerance.relative_l2 == TOLERANCES[precision].relative_l2 for row in result.verdict.comparisons)
    assert ("simulated" in result.verdict.method) == (precision != "fp32")
    if precision != "fp32":  # a file that was not rounded would pass too
        feats = [row for row in result.verdict.comparisons if "_feat_" in row.name]
        assert all(row.relative_l2 > TOLERANCES["fp32"].relative_l2 for row in feats)

    content = read_manifest(result.manifest_path, "onnx")
    assert content == json.loads(json.dumps(result.manifest))
    assert content["files"] == [file_entry(output), file_entry(output.with_name("x.onnx.data"))]
    assert content["weights"] == {
        "random": False,
        "path": str(checkpoint_of(case).resolve()),
        **({} if checkpoint_of(case).suffix == ".safetensors" else {"state": "model"}),
        **file_entry(checkpoint_of(case)),
    }
    assert {**content["verification"], **result.verdict.to_dict()} == content["verification"]
    assert content["precision"] == precision
    assert content["opset"] == model.opset_imports[""]
    assert content["graph"]["nodes"] == len(model.graph) == sum(content["graph"]["operators"].values())
    assert {"neck-export", "torch", "onnx", "onnx-ir", "onnxruntime"} <= set(content["versions"])

    encoder = load(options).encoder
    signature = Signature.from_dict(content["signature"])
    assert signature == sign(options, encoder)
    assert [spec.name for spec in signature.outputs] == names
    assert EncoderConfig.from_dict(content["encoder"]) == encoder_config(encoder)
    assert signature.necks == tuple(encoder.necks)


PAIR = BatchRange(2, 2, 2)


def test_positions_in_a_file(tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    result = export_onnx(golden_options("meta-dual", output, precision="fp16", positions="file", batch=PAIR))
    stored = load_file(tmp_path / "x.positions.safetensors")
    poss = [f"{neck}_pos_{level}" for neck in ("sam3", "sam2") for level in range(4)]
    assert sorted(stored) == sorted(poss)
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float16"}
    assert {tensor.shape[0] for tensor in stored.values()} == {1}  # the same for every image
    assert not [value.name for value in ir.load(output).graph.outputs if "_pos_" in str(value.name)]
    assert result.verdict is not None
    judged = [row.name for row in result.verdict.comparisons]
    assert set(poss) < set(judged)
    assert len(judged) == 16
    assert "x.positions.safetensors" in [entry["name"] for entry in result.manifest["files"]]
    assert verify_file(output).passed

    stored["sam2_pos_1"][0, 3, 2, 1] += 0.01  # the control
    save_file(stored, tmp_path / "x.positions.safetensors")
    forge(output)
    with pytest.raises(RejectedError) as caught:
        verify_file(output)
    assert caught.value.verdict.failed_names == ["sam2_pos_1"]


def forge(output: Path) -> None:
    """Makes the manifest speak of the files as they are now."""
    path = output.with_suffix(".json")
    content = json.loads(path.read_text())
    content["files"] = [file_entry(output.with_name(entry["name"])) for entry in content["files"]]
    path.write_text(json.dumps(content))


def test_no_positions(tmp_path: Path) -> None:
    result = export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", positions="none", batch=PAIR, verify=False))
    assert [value.name for value in ir.load(result.path).graph.outputs] == [
        f"{neck}_feat_{level}" for neck in ("sam3", "sam2") for level in range(4)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.onnx", "x.onnx.data"]


def test_not_verified_is_said(tmp_path: Path) -> None:
    result = export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", verify=False))
    assert result.verdict is None
    assert result.manifest["verification"] == {"verified": False, "reason": "not asked: --no-verify"}
    assert verify_file(result.path).passed
    assert read_manifest(result.manifest_path, "onnx")["verification"]["verified"] is True


def test_a_dynamic_batch_is_verified_on_two_different_images(tmp_path: Path) -> None:
    batch = BatchRange.parse("1:2:4")
    result = export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", batch=batch, input_kind="uint8"))
    assert result.verdict is not None
    assert "2 images" in result.verdict.method
    pixels = reference_pixels(Signature.from_dict(result.manifest["signature"]), None, 2)
    assert (pixels[0] != pixels[1]).mean() > 0.9


# --- verify_file


def rewrite_weights(output: Path, factor: float) -> None:
    """Scales one projection of the file as a faulty converter would."""
    model = ir.load(output)
    ir.external_data.load_to_model(model)
    for name, value in model.graph.initializers.items():
        if ("blocks.2.attn.proj" in name and "weight" in name) or "blocks.2.attn.proj/MatMul" in name:
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float16(factor), name=name)
            break
    else:
        pytest.fail(f"no such weight among {list(model.graph.initializers)}")
    ir.save(model, output, external_data=f"{output.name}.data")


def test_verify_writes_its_verdict(exported: ExportResult) -> None:
    rewrite_weights(exported.path, 1.0)
    forge(exported.path)
    assert verify_file(exported.path).passed

    rewrite_weights(exported.path, 1.2)  # the control
    forge(exported.path)
    with pytest.raises(RejectedError) as caught:
        verify_file(exported.path)
    assert "sam3_feat_0" in caught.value.verdict.failed_names
    verification = read_manifest(exported.manifest_path, "onnx")["verification"]
    assert {**verification, **caught.value.verdict.to_dict()} == verification
    assert verification["verified"] is False


def test_verify_takes_tolerances(exported: ExportResult) -> None:
    assert verify_file(exported.path, tolerances={"*": 0.5}).passed
    with pytest.raises(RejectedError):
        verify_file(exported.path, tolerances={"sam3_feat_2": 1e-9})
    with pytest.raises(FidelityError, match="matches no output"):
        verify_file(exported.path, tolerances={"sam4": 1.0})


def unlink(name: str) -> Callable[[ExportResult], None]:
    return lambda result: result.path.with_name(name).unlink()


def set_manifest(**changes: Any) -> Callable[[ExportResult], None]:
    def change(result: ExportResult) -> None:
        content = json.loads(result.manifest_path.read_text()) | changes
        result.manifest_path.write_text(json.dumps(content))

    return change


def touch_weights(result: ExportResult) -> None:
    data = result.path.with_name("x.onnx.data")
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (unlink("x.onnx"), ExportError, "there is no file with this name"),
        (unlink("x.json"), ManifestError, "manifest is missing"),
        (unlink("x.onnx.data"), ManifestError, "x.onnx.data: the file is missing"),
        (touch_weights, ManifestError, "x.onnx.data: the file was changed after"),
        (set_manifest(signature=None), ManifestError, "`signature` of the manifest is damaged"),
        (set_manifest(signature={}), ManifestError, "`signature` of the manifest is damaged"),
        (set_manifest(encoder={"depth": 0}), ManifestError, "exported"),
        (set_manifest(encoder=None), ManifestError, "exported"),
        (set_manifest(weights=None), ManifestError, "exported"),
        (set_manifest(weights={"random": False}), ManifestError, "exported"),
        (
            set_manifest(weights={"random": False, "path": "/no/such.pt"}),
            ExportError,
            "/no/such.pt: this checkpoint does not exist",
        ),
        (
            set_manifest(precision="fp4"),
            ManifestError,
            "the unknown precision 'fp4'",
        ),
    ],
)
def test_verify_refuses(
    exported: ExportResult, change: Callable[[ExportResult], None], error: type[Exception], words: str
) -> None:
    change(exported)
    with pytest.raises(error, match=words) as caught:
        verify_file(exported.path)
    assert len(str(caught.value).splitlines()) == 1


def test_verify_wants_the_checkpoint_that_was_exported(exported: ExportResult, tmp_path: Path) -> None:
    moved = tmp_path / "moved.pt"
    moved.write_bytes(checkpoint_of("meta-dual").read_bytes())
    assert verify_file(exported.path, checkpoint=moved).passed
    for other in (checkpoint_of("meta-padded"), save_state(tmp_path / "tuned.pt", lambda state: nudge(state))):
        with pytest.raises(ExportError, match=rf"{other.name}: .*the checkpoint that was exported.*x\.json"):
            verify_file(exported.path, checkpoint=other)
    with pytest.raises(
        ExportError,
        match=r"none\.pt: this checkpoint does not exist.*x\.json.*--checkpoint",
    ):
        verify_file(exported.path, checkpoint=tmp_path / "none.pt")


def test_verify_takes_the_same_weights_in_another_container(exported: ExportResult, tmp_path: Path) -> None:
    """safetensors and another prefix instead of .pt; one value changed, or no digests in the manifest: refused."""
    state = {
        f"net.{name.removeprefix(PREFIX)}": value.contiguous() for name, value in golden_state("meta-dual").items()
    }
    save_file(state, tmp_path / "same.safetensors")
    assert verify_file(exported.path, checkpoint=tmp_path / "same.safetensors").passed
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "same.pt")
    assert verify_file(exported.path, checkpoint=tmp_path / "same.pt").passed
    state["net.convs.0.conv_3x3.bias"] = state["net.convs.0.conv_3x3.bias"] + 1e-6
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ExportError, match=r"x\.json"):
        verify_file(exported.path, checkpoint=tmp_path / "other.safetensors")
    (tmp_path / "no.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ExportError, match=r"no\.pt: .*SHA-256.*x\.json.* cannot load the weights"):
        verify_file(exported.path, checkpoint=tmp_path / "no.pt")
    set_manifest(weights_sha256=None)(exported)
    with pytest.raises(ExportError, match="is not the checkpoint that was exported"):
        verify_file(exported.path, checkpoint=tmp_path / "same.safetensors")


def nudge(state: dict[str, Tensor]) -> None:
    state[f"{PREFIX}convs.0.conv_3x3.bias"][0] += 1e-6


def test_shards_have_hashes_too(tmp_path: Path) -> None:
    state = load_file(checkpoint_of("hf-dual"))
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    options = golden_options("hf-dual", tmp_path / "out" / "x.onnx", checkpoint=tmp_path, batch=PAIR, verify=False)
    result = export_onnx(options)
    weights = result.manifest["weights"]
    assert weights["name"] == "model.safetensors.index.json"
    assert weights["shards"] == [file_entry(tmp_path / shard) for shard in sorted(shards)]
    assert verify_file(result.path).passed
    state[names[1]] += 1e-6
    save_file({key: state[key] for key in shards["b.safetensors"]}, tmp_path / "b.safetensors")
    with pytest.raises(ExportError, match="is not the checkpoint that was exported"):
        verify_file(result.path)


# --- random weights


def random_options(output: Path, **changes: Any) -> ExportOptions:
    return ExportOptions(output, config=tiny_config(), **changes)


def test_random_weights_are_the_same_again(tmp_path: Path) -> None:
    results = [
        export_onnx(random_options(tmp_path / f"{name}.onnx", seed=seed, verify=False))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (sha256(tmp_path / f"{name}.onnx.data") for name in "abc")
    assert first == again != other
    assert [result.manifest["weights"] for result in results] == [{"random": True, "seed": seed} for seed in (0, 0, 1)]
    assert verify_file(results[2].path).passed
    with pytest.raises(ExportError, match=r"a\.json.*weights are random; leave out --checkpoint"):
        verify_file(results[0].path, checkpoint=checkpoint_of("meta-dual"))


@pytest.mark.parametrize(
    ("necks", "has"),
    [
        ("sam3", ("sam3",)),
        ("both", ("sam3", "sam2")),
        ("all", ("sam3", "sam2")),
        ("sam2", ("sam3", "sam2")),
        ("interactive", ("sam3", "interactive", "propagation")),
        ("sam3,propagation", ("sam3", "interactive", "propagation")),
        ("foo", ("sam3",)),
    ],
)
def test_random_weights_have_the_necks_that_are_asked(necks: str, has: tuple[str, ...]) -> None:
    options = random_options(Path("x.onnx"), necks=necks)
    encoder = load(options).encoder
    assert tuple(encoder.necks) == has
    if necks == "foo":
        with pytest.raises(SignatureError, match="there is no neck 'foo'"):
            sign(options, encoder)
    else:
        assert set(sign(options, encoder).necks) <= set(has)


def test_random_weights_of_an_architecture_that_does_not_exist() -> None:
    config = dataclasses.replace(tiny_config(), scale_factors=(3.0,))
    with pytest.raises(ExportError, match=r"scale factor 3\.0"):
        load(ExportOptions(Path("x.onnx"), config=config))


# --- what is there before and after


def test_an_export_replaces_the_old_one_whole(tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    export_onnx(golden_options("meta-dual", output, positions="file", batch=PAIR, verify=False))
    assert (tmp_path / "x.positions.safetensors").exists()
    (tmp_path / "mine.txt").write_text("mine")
    old = listing(tmp_path)
    export_onnx(golden_options("meta-padded", output, precision="fp16", batch=PAIR, verify=False))
    new = listing(tmp_path)
    assert sorted(new) == ["mine.txt", "x.json", "x.onnx", "x.onnx.data"]  # no positions of other necks
    assert not [name for name, content in new.items() if name != "mine.txt" and content == old[name]]
    assert verify_file(output).passed


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tolerances": {"sam3_feat_0": 1e-9}}, RejectedError),
        ({"keep_fp32": ("no.such.module",)}, ExportError),
        ({"levels": "7"}, SignatureError),
        ({"checkpoint": Path("/no/such.pt")}, CheckpointError),
    ],
)
def test_after_a_failure_the_old_file_is_there(
    exported: ExportResult, changes: dict[str, Any], error: type[Exception]
) -> None:
    before = listing(exported.path.parent)
    with pytest.raises(error):
        export_onnx(golden_options("meta-dual", exported.path, precision="fp16", **changes))
    assert listing(exported.path.parent) == before


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match="sam3_feat_0"):
        export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", tolerances={"sam3_feat_0": 1e-9}))
    assert listing(tmp_path) == {}


def test_the_output_takes_no_others_place(tmp_path: Path) -> None:
    def refused(output: Path, words: str, **changes: Any) -> None:
        before = listing(tmp_path)
        with pytest.raises(ExportError, match=words) as caught:
            export_onnx(golden_options("meta-dual", output, **changes))
        assert len(str(caught.value).splitlines()) == 1
        assert listing(tmp_path) == before

    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "y.onnx.data").mkdir()
    refused(tmp_path, "is a folder")
    refused(tmp_path / "folder.onnx", "is a folder")
    refused(tmp_path / "y.onnx", "y.onnx.data: this is a folder")

    weights = save_state(tmp_path / "weights.pt")
    refused(weights, "weights.pt", checkpoint=weights)
    (tmp_path / "link.onnx").symlink_to(weights)
    refused(tmp_path / "link.onnx", "weights.pt", checkpoint=weights)

    (tmp_path / "encoder.json").write_text(json.dumps(tiny_config().to_dict()))
    refused(tmp_path / "encoder.onnx", "encoder.json: this file is not a manifest of neck-export")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"opset": 16}, ExportError, "opset 16 .* 17 to 24"),
        ({"image_size": 15}, ValueError, "nearest multiple: 14 and 28"),
        ({"images": Path("/no/such/folder")}, ValueError, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_the_weights_are_read(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    options = golden_options("meta-dual", tmp_path / "x.onnx", **{"checkpoint": Path("/no/such.pt"), **changes})
    with pytest.raises(error, match=words):
        export_onnx(options)
    check_options(golden_options("meta-dual", tmp_path / "x.onnx"))  # the control


def test_a_level_that_would_be_empty(tmp_path: Path) -> None:
    options = golden_options("meta-dual", tmp_path / "x.onnx", image_size=14)
    with pytest.raises(ExportError, match="empty at an image size of 14x14 pixels"):
        export_onnx(options)
    for fits in (dataclasses.replace(options, levels="0,1,2"), dataclasses.replace(options, image_size=28)):
        assert all(0 not in spec.shape for spec in sign(fits, load(fits).encoder).outputs)


# --- planted overflow


FEATURES = [f"{neck}_feat_{level}" for neck in ("sam3", "sam2") for level in range(4)]


@pytest.mark.parametrize(
    ("plant", "module", "failed"),
    [(plant_in_trunk, "trunk.blocks.2", FEATURES), (plant_in_neck, "convs.2", ["sam3_feat_2"])],
)
def test_a_planted_overflow_is_refused(
    plant: Callable[[dict[str, Tensor]], None], module: str, failed: list[str], tmp_path: Path
) -> None:
    """One channel is scaled so that it passes 65504, and back by the next weight: FP32 does not see it, FP16 does."""
    checkpoint, output = save_state(tmp_path / "planted.pt", plant), tmp_path / "out" / "x.onnx"
    options = golden_options("meta-dual", output, checkpoint=checkpoint, precision="fp16")
    arguments = (
        "onnx",
        "--checkpoint",
        checkpoint,
        "--config",
        config_of("meta-dual"),
        "--neck",
        "all",
        "--output",
        output,
    )
    ran = neck_export_cli(*arguments, "--precision", "fp16")
    assert ran.code == 3
    assert ran.out == ""
    *_, first_bad, last = ran.err.splitlines()
    assert first_bad.startswith(f"the first tensor with NaN or infinity is {module}.")
    assert last.startswith(f"error: {output}: ") and ", ".join(failed) in last
    assert listing(output.parent) == {}
    kept = neck_export_cli(*arguments, "--precision", "fp16", "--keep-fp32", module)
    assert kept.code == 0  # the control: without that overflow the same weights pass

    encoder, plain = load(options).encoder, load(golden_options("meta-dual", output)).encoder
    signature = sign(options, encoder)
    pixels = reference_pixels(signature, None, 1)
    reference = reference_outputs(plain, pixels, signature)
    planted = reference_outputs(encoder, pixels, signature)
    assert compare(reference, planted, "fp32", "test").passed


def test_onnx_runtime_alone_passes_a_planted_overflow(tmp_path: Path) -> None:
    """The control, and why the simulation judges: between two convolutions nothing is seen (1.31, x86-64)."""
    checkpoint = save_state(tmp_path / "planted.pt", plant_in_neck)
    options = golden_options("meta-dual", tmp_path / "x.onnx", checkpoint=checkpoint, precision="fp16")
    encoder = load(options).encoder
    signature = sign(options, encoder)
    pixels = reference_pixels(signature, None, 1)
    reference = reference_outputs(encoder, pixels, signature)
    write_onnx(encoder, signature, tmp_path / "x.onnx", precision="fp16")
    outputs = run_model(ir.load(tmp_path / "x.onnx"), tmp_path, normalize(pixels).numpy())
    names = [spec.name for spec in signature.outputs]
    assert compare(reference, dict(zip(names, outputs, strict=True)), "fp16", "test").passed


def test_a_weight_beyond_fp16_is_named(tmp_path: Path) -> None:
    """A small one too, which is written into the graph and not beside it."""

    def overflow(state: dict[str, Tensor]) -> None:
        state[f"{PREFIX}trunk.blocks.1.attn.proj.bias"][0] = 7e4

    checkpoint, output = save_state(tmp_path / "large.pt", overflow), tmp_path / "out" / "x.onnx"
    with pytest.raises(
        ExportError, match=r"blocks\.1\.attn\.proj.*exceed the range of float16; keep its module in FP32"
    ):
        export_onnx(golden_options("meta-dual", output, checkpoint=checkpoint, precision="fp16"))
    assert listing(output.parent) == {}


# --- what verification needs


def test_without_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FidelityError, match=r"ONNX Runtime is not installed.*\[cpu\].*--no-verify"):
        export_onnx(golden_options("meta-dual", tmp_path / "x.onnx"))
    assert export_onnx(golden_options("meta-dual", tmp_path / "x.onnx", verify=False)).verdict is None
    monkeypatch.undo()
    assert require_runtime() is onnxruntime


def test_without_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = golden_options("meta-dual", tmp_path / "x.onnx")
    encoder = load(options).encoder
    check_memory(sign(options, encoder), encoder)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:      50 kB\n")
    monkeypatch.setattr(export.verification.verify, "MEMORY", tmp_path / "meminfo")
    with pytest.raises(
        FidelityError, match=r"at 112x112 pixels needs 65\.5 kB of memory for the attention of one block"
    ) as caught:
        check_memory(sign(options, encoder), encoder)
    assert len(str(caught.value).splitlines()) == 2


def test_golden_states_are_not_shared() -> None:
    """The control of `save_state`: what a test plants does not reach the others."""
    assert float(golden_state("meta-dual")[f"{PREFIX}trunk.blocks.2.attn.qkv.weight"].abs().max()) < 10
