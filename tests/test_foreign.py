"""`verify` of a file without a manifest: sound files in every layout and form, planted faults, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from conftest import load_golden, shared_encoder, tiny_config
from exporting import checkpoint_of, neck_export_cli
from foreign_files import CASE, Edit, half, perturbed, swap_weights, weights_of, write
from foreign_files import plain_model as other_model

from engines.builder.flavor import FlavorError, choose_flavor
from engines.foreign_builds import builder_lines
from engines.live.encoder import DeployedEncoder
from export.contract.errors import ExportError
from export.contract.onnx_file import OnnxFile
from export.foreign.adopt import contract_of
from export.foreign.judge import ForeignVerdict, judge_file
from export.graph.rewrite import Rewrites
from export.lowering.precision import lower
from export.pipeline import RejectedError, verify_file
from neck.checkpoint import random_encoder, save_meta_checkpoint
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck, shallow_copy
from neck.position import PositionEmbeddingSine
from neck.rope import axial_angles

FEATS = tuple(f"sam3_feat_{level}" for level in range(4))
SIDE = 112
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
Build = Callable[[Edit], Any]


def config() -> EncoderConfig:
    """Of two blocks, one of them windowed: every step of a verdict takes as long as the graph has nodes."""
    return dataclasses.replace(load_golden(CASE).config, depth=2, global_blocks=(1,))


def encoder() -> Sam3DualViTDetNeck:
    """The encoder whose files these are, at its own size."""
    return shared_encoder(config())


WEIGHTS: dict[str, Path] = {}
"""Its checkpoint and its config, as the command line takes them."""


@pytest.fixture(scope="module", autouse=True)
def _weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("weights")
    WEIGHTS.update(checkpoint=folder / "sam3.pt", config=folder / "encoder.json")
    save_meta_checkpoint(encoder(), WEIGHTS["checkpoint"])
    WEIGHTS["config"].write_text(json.dumps(config().to_dict()))


def plain_model(**asked: Any) -> ir.Model:
    """Its graph, before anyone edits it."""
    return other_model(**{"encoder": encoder(), "config": config(), **asked})


def judged(model: ir.Model, folder: Path, of: Sam3DualViTDetNeck | None = None) -> ForeignVerdict:
    return judge_file(OnnxFile(write(model, folder / "encoder.onnx")), of or encoder())[0]


def edited(build: Build, **asked: Any) -> ir.Model:
    """A graph of the plain module, edited."""
    model = plain_model(**asked)
    build(Edit(model))
    return model


# --- sound files

UINT8, HALF = ir.DataType.UINT8, ir.DataType.FLOAT16


def to_float(edit: Edit, image: ir.Value) -> ir.Node:
    return edit.node("Cast", [image], to=ir.DataType.FLOAT.value)


def of_bytes(*axes: int) -> Build:
    """uint8 pixels, normalized in the graph, their axes brought into NCHW."""

    def build(edit: Edit) -> None:
        edit.affine(2 / 255, -1)
        shape = [1, 3, SIDE, SIDE] if axes == (0, 1, 2, 3) else [1, SIDE, SIDE, 3]

        def chain(image: ir.Value) -> list[ir.Node]:
            cast = to_float(edit, image)
            return [cast, edit.node("Transpose", cast.outputs, [1, 3, SIDE, SIDE], perm=list(axes))]

        edit.before(chain, shape, UINT8)

    return build


def without_batch(edit: Edit) -> None:
    shape = edit.constant([1, 3, SIDE, SIDE], np.int64)
    edit.before(lambda image: [edit.node("Reshape", [image, shape], [1, 3, SIDE, SIDE])], [3, SIDE, SIDE])


def nhwc_input(edit: Edit) -> None:
    edit.before(lambda image: [edit.node("Transpose", [image], perm=[0, 3, 1, 2])], [1, SIDE, SIDE, 3])


def foreign_names(edit: Edit, *order: int) -> None:
    """transformers' names, the levels in an order."""
    edit.keep(*(FEATS[level] for level in order))
    edit.rename(**{FEATS[level]: f"features_{place}" for place, level in enumerate(order)})


def pooled(edit: Edit) -> None:
    """An output more, of no meaning."""
    node = edit.node("ReduceMean", [edit.graph.outputs[2], edit.constant([2, 3], np.int64)], [1, 16], keepdims=0)
    node.outputs[0].name = "pooled"
    edit.graph.append(node)
    edit.graph.outputs.append(node.outputs[0])


def trunk_output(edit: Edit) -> None:
    """The trunk's map as tokens."""
    conv = next(node for node in edit.graph if node.op_type == "Conv" and "convs.2" in str(node.inputs[1].name))
    trunk = conv.inputs[0]
    node = edit.node("Transpose", [trunk], [1, 8, 8, 32], perm=[0, 2, 3, 1])
    node.outputs[0].name = "last_hidden_state"
    edit.graph.append(node)
    edit.graph.outputs.append(node.outputs[0])


def dynamic(edit: Edit) -> None:
    edit.graph.inputs[0].shape = ir.Shape(["batch", 3, "height", "width"])
    edit.graph.inputs[0].shape = ir.Shape([1, 3, "height", "width"])


def low(precision: Any, **forms: Any) -> Build:
    return lambda edit: lower(edit.model, precision, **forms)


def same_map_twice(edit: Edit) -> None:
    node = edit.node("Identity", [edit.graph.outputs[3]], [1, 16, 4, 4])
    node.outputs[0].name = "vision_features"
    edit.graph.append(node)
    edit.graph.outputs.append(node.outputs[0])


def half_weights(edit: Edit) -> None:
    """Weights stored in FP16, and computed with in FP32."""
    for value in list(edit.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value.const_value.size > 64:
            stored = edit.constant(value.const_value.numpy().astype(np.float16), np.float16)
            up = edit.node("Cast", [stored], value.shape, to=ir.DataType.FLOAT.value)
            for user, position in list(value.uses()):
                user.replace_input_with(position, up.outputs[0])
            edit.graph.insert_before(edit.graph[0], up)


def extras(edit: Edit) -> None:
    """Outputs more than ours, and a position without its batch."""
    for one in (trunk_output, pooled, same_map_twice):
        one(edit)
    edit.reshape("sam3_pos_1", 16, 16, 16)


def tokens(edit: Edit) -> None:
    """A layout for each level."""
    edit.keep(*FEATS).reshape(FEATS[0], 1024, 16, first=(0, 2, 3, 1)).reshape(FEATS[1], 1, 256, 16, first=(0, 2, 3, 1))
    edit.reshape(FEATS[2], 1, 16, 64).reshape(FEATS[3], 16, 4, 4)


def other_tokens(edit: Edit) -> None:
    edit.keep(*FEATS).reshape(FEATS[0], 16, 1024).reshape(FEATS[1], 256, 1, 16, first=(2, 3, 0, 1))
    edit.reshape(FEATS[2], 8, 8, 16, first=(0, 2, 3, 1)).transpose(FEATS[3], 0, 2, 3, 1)


def planes_last(edit: Edit) -> None:
    edit.keep(*FEATS)
    for name in FEATS:
        edit.transpose(name, 0, 2, 3, 1)


def told_layouts(*words: str) -> list[str]:
    return [f"{FEATS[level]}: level {level} of neck sam3, {layout}" for level, layout in enumerate(words)]


SOUND: dict[str, tuple[Any, ...]] = {
    "plain": (lambda edit: None, "level 3 of neck sam2"),
    "features of one neck": (lambda edit: edit.keep(*FEATS), "the features of neck sam2 at level 0, 1, 2, 3"),
    "tokens": (tokens, *told_layouts("tokens (HW, C)", "tokens (N, HW, C)", "tokens (N, C, HW)", "CHW")),
    "other tokens": (other_tokens, *told_layouts("tokens (C, HW)", "tokens (HW, N, C)", "HWC", "NHWC")),
    "image NHWC in 0..1": (
        lambda edit: (edit.affine(2, -1), nhwc_input(edit)),
        "float32 NHWC",
        "in this encoding: RGB in 0..1",
    ),
    "image CHW in 0..255": (
        lambda edit: (edit.affine(2 / 255, -1), without_batch(edit)),
        "float32 CHW",
        "in this encoding: RGB in 0..255",
    ),
    "ImageNet's image": (
        lambda edit: edit.affine(2 * STD, 2 * MEAN - 1),
        "in this encoding: RGB normalized with ImageNet",
    ),
    "BGR": (lambda edit: edit.channels(2, 1, 0), "in this encoding: BGR normalized with SAM 3"),
    "BGR pixels NHWC": (
        lambda edit: (edit.channels(2, 1, 0), of_bytes(0, 3, 1, 2)(edit)),
        "uint8 NHWC",
        "in this encoding: BGR in 0..255",
    ),
    "pixels NCHW": (of_bytes(0, 1, 2, 3), "uint8 NCHW"),
    "coarsest first": (lambda edit: foreign_names(edit, 3, 2, 1, 0), "features_0: level 3"),
    "three levels under other names": (lambda edit: foreign_names(edit, 1, 2, 3), "features_0: level 1"),
    "other outputs": (
        extras,
        "the trunk's feature map, NHWC",
        "sam3_pos_1: the position",
        "pooled: this output of shape (1, 16) matches no output",
        "vision_features: level 3 of neck sam3",
    ),
    "size not fixed": (dynamic, "any size (verified at 112x112)"),
    "FP16 in FP32 islands": (low("fp16", opset=20, attention="fp32acc"), "type    fp16"),
    "FP16 throughout": (half, "LayerNorms are computed in FP16"),
    "FP16 with outputs in FP32": (low("fp16", output_precision="fp32", opset=20, attention="fused"), "accumulates"),
    "BF16": (low("bf16"), "type    bf16"),
    "weights alone in FP16": (half_weights, "cast to float16"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_passes(name: str, tmp_path: Path) -> None:
    """And what is told of it is what was done to it."""
    build, *told = SOUND[name]
    verdict = judged(edited(build), tmp_path)
    lines = "\n".join(verdict.lines())
    assert verdict.passed, lines
    assert all(part in lines for part in told), lines
    assert verdict.weights is not None and verdict.weights.origin == "the checkpoint's"


def test_our_own_file_passes(tmp_path: Path) -> None:
    """Its weights are permuted, scaled and merged, and are found all the same."""
    verdict = judged(plain_model(rewrites=Rewrites()), tmp_path)
    assert verdict.passed
    assert verdict.weights is not None and verdict.weights.origin == "the checkpoint's"
    assert verdict.weights.forms["folded"] > 4


def test_a_dynamic_batch_passes(tmp_path: Path) -> None:
    """It is run on two images."""
    verdict = judged(plain_model(batch="1:1:2", rewrites=Rewrites()), tmp_path)
    assert verdict.passed and verdict.images == 2
    assert "any batch" in "\n".join(verdict.lines())


HEADED = tiny_config(d_model=16, necks=("sam3", "sam2"), sam2_head=True)
HIGH_RES = {"sam2_high_res_0": "high_res_feats_0", "sam2_high_res_1": "high_res_feats_1", "sam2_feat_2": "image_embed"}


def headed_model() -> ir.Model:
    """SAM 2's folded high-resolution features under the names of SAM 2's exporters."""
    asked = {"necks": "sam2", "sam2_outputs": "head", "rewrites": Rewrites()}
    model = plain_model(encoder=shared_encoder(HEADED), config=HEADED, **asked)
    Edit(model).keep(*HIGH_RES).rename(**HIGH_RES)
    return model


def test_folded_high_resolution_features_are_found(tmp_path: Path) -> None:
    """In planes and as tokens; exchanged they are refused, and so they are without the mask decoder's weights."""
    model = headed_model()
    Edit(model).reshape("high_res_feats_0", 1024, 1, 2, first=(2, 3, 0, 1)).reshape("high_res_feats_1", 4, 16, 16)
    verdict = judged(model, tmp_path, shared_encoder(HEADED))
    assert verdict.passed, verdict.lines()
    assert [match.tensor for match in verdict.matches] == list(HIGH_RES)
    assert [match.layout for match in verdict.matches] == ["tokens (HW, N, C)", "CHW", "NCHW"]
    assert contract_of(OnnxFile(tmp_path / "encoder.onnx"), verdict).sam2_outputs == "head"
    wrong = headed_model()
    Edit(wrong).rename(high_res_feats_0="high_res_feats_1", high_res_feats_1="high_res_feats_0")
    assert [cause.kind for cause in judged(wrong, tmp_path, shared_encoder(HEADED)).causes] == ["levels"]
    without = shallow_copy(shared_encoder(HEADED))
    without.sam2_head = None
    verdict = judged(headed_model(), tmp_path, without)
    assert not verdict.passed and "mask decoder" in verdict.causes[0].sentence


# --- faults


def imagenet_of(scale: float) -> Build:
    return lambda edit: edit.affine(scale / STD, -MEAN / STD)


def shifted_image(edit: Edit) -> None:
    """One pixel down and one to the right."""
    pads = edit.constant([0, 0, 1, 1, 0, 0, -1, -1], np.int64)
    edit.before(lambda image: [edit.node("Pad", [image, pads], image.shape)])


def shifted_output(edit: Edit) -> None:
    pads = edit.constant([0, 0, 0, 1, 0, 0, 0, -1], np.int64)
    edit.after(FEATS[1], lambda value: [edit.node("Pad", [value, pads], [1, 16, 16, 16])])


def other_position(edit: Edit) -> None:
    """Level 1's encoding as of the published size."""
    table = PositionEmbeddingSine(16)(torch.empty(1, 1, 144, 144))[..., :16, :16].numpy()
    edit.after("sam3_pos_1", lambda value: [edit.node("Identity", [edit.constant(table)], [1, 16, 16, 16])])


def other_rotary(edit: Edit) -> None:
    """The global blocks' table as of an image of the published size."""
    right = axial_angles(8, 8, config().head_dim, (0.5, 0.5))
    wrong = axial_angles(8, 8, config().head_dim, (4 / 72, 4 / 72))
    for function in (torch.cos, torch.sin):
        table, other = function(right).float().numpy(), function(wrong).float().numpy()
        replaced = swap_weights(edit.model, lambda array, t=table, o=other: o if same(array, t) else None)
        assert replaced, "the graph has no such table"


def same(array: np.ndarray, table: np.ndarray) -> bool:
    return array.size == table.size and bool(np.allclose(array.reshape(table.shape), table, atol=1e-6))


def resized_embedding(edit: Edit) -> None:
    """The position embedding interpolated to the grid."""
    trunk = encoder().trunk
    tile = trunk.pos_embed[:, 1:].detach().unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    resized = F.interpolate(tile, (8, 8), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).numpy()
    node = next(node for node in edit.graph if node.op_type == "Tile")
    for user, position in list(node.outputs[0].uses()):
        user.replace_input_with(position, edit.constant(resized))


def no_embedding(edit: Edit) -> None:
    node = next(node for node in edit.graph if node.op_type == "Tile")
    for user, position in list(node.outputs[0].uses()):
        user.replace_input_with(position, edit.constant(np.zeros((1, 8, 8, 32))))


def tanh_gelu(edit: Edit) -> None:
    for node in edit.graph:
        if node.op_type == "Gelu" and "blocks" in str(node.name):
            node.attributes.add(ir.AttrString("approximate", "tanh"))
    assert any(node.op_type == "Gelu" and "approximate" in node.attributes for node in edit.graph)


def exchanged_necks(edit: Edit) -> None:
    edit.keep(*FEATS, *(f"sam2_feat_{level}" for level in range(4)))
    pairs = {f"sam3_feat_{level}": f"sam2_feat_{level}" for level in range(4)}
    edit.rename(**pairs, **{new: old for old, new in pairs.items()})


def mixed_necks(edit: Edit) -> None:
    edit.keep(FEATS[0], "sam2_feat_1", FEATS[2], FEATS[3])
    edit.rename(**{name: f"features_{place}" for place, name in enumerate(edit.names)})


def overflowing(edit: Edit) -> None:
    """Between the two convolutions of level 2 values pass FP16's range; in FP32 nothing changes."""
    weights_of(edit, encoder().convs[2].conv_1x1.weight, lambda array: array * 2.0**16)
    weights_of(edit, encoder().convs[2].conv_1x1.bias, lambda array: array * 2.0**16)
    weights_of(edit, encoder().convs[2].conv_3x3.weight, lambda array: array / 2.0**16)
    lower(edit.model, "fp16", opset=20, attention="fp32acc")


def not_a_number(edit: Edit) -> None:
    weights_of(edit, encoder().trunk.blocks[1].mlp.fc1.bias, lambda array: np.full_like(array, np.nan))


def of_encoder(other: Callable[[], Sam3DualViTDetNeck]) -> Build:
    """The weights of another encoder."""

    def build(edit: Edit) -> None:
        wrong = dict(other().named_parameters())
        for name, parameter in encoder().named_parameters():
            value = wrong[name].detach().numpy()
            weights_of(edit, parameter, lambda array, value=value: fitted(array, value), several=True)

    return build


def fitted(array: np.ndarray, value: np.ndarray) -> np.ndarray:
    return value.T if array.shape == value.T.shape and array.shape != value.shape else value.reshape(array.shape)


def no_bias(edit: Edit) -> None:
    weights_of(edit, encoder().convs[1].conv_3x3.bias, lambda array: array * 0)


def cropped(edit: Edit) -> None:
    """Level 0 without its last rows."""
    ends = [edit.constant([value], np.int64) for value in (0, 30, 2)]
    edit.after(FEATS[0], lambda value: [edit.node("Slice", [value, *ends], [1, 16, 30, 32])])


def fewer_channels(edit: Edit) -> None:
    ends = [edit.constant([value], np.int64) for value in (0, 8, 1)]
    edit.after(FEATS[0], lambda value: [edit.node("Slice", [value, *ends], [1, 8, 32, 32])])


FAULTS: dict[str, tuple[Build, str]] = {
    "ImageNet's normalization of 0..1": (imagenet_of(1), "normalization"),
    "0..255 only divided": (lambda edit: edit.affine(1 / 255, 0), "normalization"),
    "normalized twice": (lambda edit: edit.affine(2, -1) and edit.affine(2, -1), "normalization"),
    "BRG": (lambda edit: edit.channels(2, 0, 1), "channels"),
    "image shifted": (shifted_image, "shift"),
    "output shifted": (shifted_output, "shift"),
    "image transposed": (
        lambda edit: edit.before(lambda i: [edit.node("Transpose", [i], perm=[0, 1, 3, 2])]),
        "layout",
    ),
    "output transposed": (lambda edit: edit.transpose(FEATS[2], 0, 1, 3, 2), "layout"),
    "levels exchanged": (lambda edit: edit.rename(sam3_feat_0=FEATS[1], sam3_feat_1=FEATS[0]), "levels"),
    "levels out of order": (lambda edit: foreign_names(edit, 0, 2, 1, 3), "levels"),
    "position of another size": (other_position, "positions"),
    "position transposed": (lambda edit: edit.transpose("sam3_pos_0", 0, 1, 3, 2), "layout"),
    "rotary of another size": (other_rotary, "positions"),
    "embedding resized": (resized_embedding, "positions"),
    "embedding missing": (no_embedding, "positions"),
    "necks exchanged": (exchanged_necks, "neck"),
    "one level of another neck": (mixed_necks, "neck"),
    "random weights": (of_encoder(lambda: random_encoder(config(), 7)), "weights"),
    "a fine-tune": (of_encoder(lambda: perturbed(encoder(), 0.02)), "weights"),
    "overflow in FP16": (overflowing, "overflow"),
    "NaN": (not_a_number, "overflow"),
    "GELU by tanh": (tanh_gelu, "operator"),
    "a bias missing": (no_bias, "operator"),
    "map of another size": (cropped, "levels"),
    "channels missing": (fewer_channels, "levels"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_and_named(name: str, tmp_path: Path) -> None:
    build, kind = FAULTS[name]
    verdict = judged(edited(build), tmp_path)
    assert not verdict.passed
    assert [cause.kind for cause in verdict.causes][:1] == [kind], "\n".join(verdict.lines())
    assert verdict.to_dict()["causes"][0]["kind"] == kind


def test_without_a_patch_embedding_every_encoding_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file that cuts the image itself; a wrong one is refused all the same."""
    monkeypatch.setattr("export.foreign.judge.find_patch_embedding", lambda model, patch: None)
    verdict = judged(edited(lambda edit: edit.affine(2 / 255, -1)), tmp_path)
    assert verdict.passed and str(verdict.encoding).startswith("RGB in 0..255")
    assert not judged(edited(imagenet_of(1)), tmp_path / "wrong").passed


def test_an_operator_that_the_simulation_does_not_know_is_told(tmp_path: Path) -> None:
    """The FP16 graph is then run as it is."""

    def build(edit: Edit) -> None:
        low("fp16", opset=20, attention="fused")(edit)
        inner = edit.node("Identity", [edit.graph.outputs[3]], [1, 16, 4, 4], HALF)
        branch = ir.Graph([], inner.outputs, nodes=[inner], name="branch")
        other = edit.node("Identity", [edit.graph.outputs[3]], [1, 16, 4, 4], HALF)
        second = ir.Graph([], other.outputs, nodes=[other], name="second")
        yes = edit.constant(True, np.bool_)
        edit.after(FEATS[3], lambda value: [edit.node("If", [yes], then_branch=branch, else_branch=second, dtype=HALF)])

    verdict = judged(edited(build), tmp_path)
    assert verdict.passed
    assert "without simulating FP16 rounding" in verdict.method


# --- the command line, the manifest, Python


def verify_cli(path: Path, *more: str | Path) -> Any:
    return neck_export_cli("verify", path, "--checkpoint", WEIGHTS["checkpoint"], "--config", WEIGHTS["config"], *more)


@pytest.fixture
def _no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without TensorRT-RTX, which else builds two plans for every verdict."""

    def refuse(asked: str) -> Any:
        raise FlavorError("no TensorRT-RTX in this test")

    monkeypatch.setattr("engines.foreign_builds.choose_flavor", refuse)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A file with another tool's input and outputs."""
    return write(
        edited(lambda edit: (edit.affine(2, -1), planes_last(edit), foreign_names_of(edit))), tmp_path / "other.onnx"
    )


def foreign_names_of(edit: Edit) -> None:
    edit.rename(**{name: f"backbone_fpn.{level}" for level, name in enumerate(FEATS)})
    edit.graph.inputs[0].name = "pixel_values"


@pytest.mark.usefixtures("_no_builder")
def test_the_command_tells_what_it_found(sound: Path) -> None:
    ran = verify_cli(sound)
    assert ran.code == 0, ran.err
    for told in (
        "pixel_values: float32 NCHW",
        "in 0..1",
        "backbone_fpn.3: level 3 of neck sam3, NHWC",
        "the weights come from the checkpoint",
    ):
        assert told in ran.out
    assert not sound.with_suffix(".json").exists()


def test_kernels_and_bytes_stand_next_to_ours(tmp_path: Path) -> None:
    """The file in the published form accumulates in FP16; ours of the same encoder in FP32, with fewer kernels."""
    try:
        choose_flavor("rtx")
    except FlavorError as error:
        pytest.skip(f"needs TensorRT-RTX: {str(error).splitlines()[0]}")
    verdict = judged(edited(low("fp16", opset=20, attention="fused")), tmp_path)
    theirs, ours, *risks = builder_lines(OnnxFile(tmp_path / "encoder.onnx"), verdict)
    assert theirs.startswith("builder TensorRT-RTX") and "accumulation FP16" in theirs
    assert ours.startswith("ours") and "accumulation FP32" in ours
    kernels = [int(line.split(" kernels")[0].rsplit(" ", 1)[1]) for line in (theirs, ours)]
    assert kernels[1] < kernels[0]
    assert any("accumulates in FP16" in risk for risk in risks)


def test_a_failed_file_ends_with_3_and_the_cause(tmp_path: Path) -> None:
    path = write(edited(imagenet_of(1)), tmp_path / "wrong.onnx")
    ran = verify_cli(path, "--write-manifest")
    assert ran.code == 3
    assert "the normalization is wrong" in ran.err and str(path) in ran.err
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RejectedError) as raised:
        verify_file(path, WEIGHTS["checkpoint"], config=config())
    assert isinstance(raised.value.verdict, ForeignVerdict) and raised.value.verdict.causes


@pytest.mark.usefixtures("_no_builder")
def test_write_manifest_makes_a_file_that_our_commands_take(sound: Path) -> None:
    """Its interface is adapted in a copy, which `verify` then judges as one of ours; the foreign file is left alone."""
    before = sound.read_bytes()
    ran = verify_cli(sound, "--write-manifest")
    assert ran.code == 0, ran.err
    ours = sound.with_name("other.neck.onnx")
    assert ours.is_file() and sound.read_bytes() == before
    again = neck_export_cli("verify", ours)
    assert again.code == 0, again.err
    assert "sam3_feat_3" in again.out
    told = neck_export_cli("inspect", ours, "--check")
    assert told.code == 0 and "verified: PyTorch FP32" in told.out
    with DeployedEncoder(ours, "cpu") as live, torch.no_grad():
        image = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (1, 3, SIDE, SIDE)).astype(np.float32))
        found, wanted = live(image)[0], encoder()(image)[0]
        assert max(float((one - two).abs().max()) for one, two in zip(found, wanted, strict=True)) < 1e-4
    served = neck_export_cli("triton", ours, "--output", sound.parent / "repository")
    assert served.code == 0, served.err
    changed = bytearray(ours.read_bytes())
    changed[len(changed) // 2] ^= 1
    ours.write_bytes(bytes(changed))
    assert neck_export_cli("verify", ours).code == 1


@pytest.mark.usefixtures("_no_builder")
def test_a_copy_reads_the_weights_file_that_is_there(tmp_path: Path) -> None:
    """Nothing of it is written twice, and the manifest speaks of it; its outputs become planes again."""
    model = edited(lambda edit: (edit.channels(2, 1, 0), of_bytes(0, 3, 1, 2)(edit), other_tokens(edit)))
    path = tmp_path / "other.onnx"
    ir.save(model, path, external_data="other.bin")
    ran = verify_cli(path, "--write-manifest")
    assert ran.code == 0, ran.err
    names = ["other.bin", "other.neck.json", "other.neck.onnx", "other.onnx"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert (tmp_path / "other.neck.onnx").stat().st_size < (tmp_path / "other.bin").stat().st_size
    manifest = json.loads((tmp_path / "other.neck.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["other.neck.onnx", "other.bin"]
    assert neck_export_cli("verify", tmp_path / "other.neck.onnx").code == 0


@pytest.mark.usefixtures("_no_builder")
def test_our_own_file_gets_its_manifest_back(tmp_path: Path) -> None:
    """Nothing but the manifest is written, since its input and outputs are ours."""
    path = write(plain_model(rewrites=Rewrites()), tmp_path / "encoder.onnx")
    ran = verify_cli(path, "--write-manifest")
    assert ran.code == 0, ran.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.json", "encoder.onnx"]
    assert neck_export_cli("verify", path).code == 0
    assert verify_cli(path, "--write-manifest").code == 1  # it has one now


def test_inspect_says_what_a_file_seems_to_be(sound: Path, tmp_path: Path) -> None:
    told = neck_export_cli("inspect", sound)
    assert told.code == 0
    assert (
        "has the structure of SAM 3's image encoder" in told.out
        and "pixel_values" in told.out
        and "2 attention layers" in told.out
    )
    assert "neck-export verify" in told.out
    decoder = neck_export_cli("inspect", write(decoder_model(), tmp_path / "decoder.onnx"))
    assert "does not have the structure of SAM 3's image encoder" in decoder.out


# --- bad input


def small_model(inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], *, taps: tuple[int, ...] = ()) -> ir.Model:
    """A graph with such inputs and outputs, which computes zeros; with a first convolution of such taps and stride."""
    values = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for name, shape in inputs.items()
    ]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 20}, name="small")
    model = ir.Model(graph, ir_version=10)
    edit = Edit(model)
    total = edit.node("ReduceMean", [values[0]], [], keepdims=0)
    graph.append(total)
    if taps:
        weight = edit.constant(np.zeros((taps[2], 3, taps[0], taps[0])))
        conv = edit.node("Conv", [values[0], weight], strides=[taps[1]] * 2)
        total = edit.node("ReduceMean", conv.outputs, [], keepdims=0)
        graph.extend([conv, total])
    for name, shape in outputs.items():
        node = edit.node("Expand", [total.outputs[0], edit.constant(shape, np.int64)], shape)
        node.outputs[0].name = name
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return model


def decoder_model() -> ir.Model:
    return small_model(
        {"image_embeddings": [1, 256, 64, 64], "point_coords": [1, 1, 2]}, {"masks": [1, 1, 256, 256], "scores": [1, 1]}
    )


def custom_operator() -> ir.Model:
    model = plain_model()
    Edit(model).before(lambda image: [ir.node("Normalize", [image], domain="my.ops")])
    model.opset_imports["my.ops"] = 1
    return model


IMAGE = {"image": [1, 3, SIDE, SIDE]}
REFUSED: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "no image": (lambda: small_model({"x": [1, 768]}, {"y": [1, 16, 8, 8]}), "no image input"),
    "a decoder": (decoder_model, "a mask decoder"),
    "several inputs": (lambda: small_model({**IMAGE, "other": [1, 3, SIDE, SIDE]}, {"y": [1, 2]}), "several inputs"),
    "a whole SAM 3": (
        lambda: small_model({**IMAGE, "input_boxes": [1, 4]}, {"pred_masks": [1, 1, 28, 28]}),
        "a whole SAM 3",
    ),
    "SAM 2's encoder": (
        lambda: small_model(IMAGE, {"image_embed": [1, 256, 64, 64]}, taps=(7, 4, 32)),
        "SAM 2's image encoder",
    ),
    "DINOv2": (lambda: small_model(IMAGE, {"last_hidden_state": [1, 65, 32]}, taps=(14, 14, 32)), "DINOv2"),
    "another architecture": (
        lambda: small_model(IMAGE, {"features": [1, 64, 9, 9]}, taps=(14, 14, 64)),
        "encoder with 64 channels, but the checkpoint's",
    ),
    "another patch": (lambda: small_model({"image": [1, 3, 100, 100]}, {"y": [1, 2]}), "does not fit"),
    "nothing of a map": (lambda: small_model(IMAGE, {"y": [1, 2]}), "none of the file's outputs"),
    "a custom operator": (custom_operator, "my.ops::Normalize"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_encoder_is_refused_in_two_lines(name: str, tmp_path: Path) -> None:
    build, told = REFUSED[name]
    path = write(build(), tmp_path / "file.onnx")
    ran = verify_cli(path)
    assert ran.code == 1
    assert told in ran.err and str(path) in ran.err
    assert len(ran.err.strip().splitlines()) <= 2


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(plain_model(), tmp_path / "encoder.onnx")
    path.write_bytes(path.read_bytes()[:5000])
    ran = verify_cli(path)
    assert ran.code == 1 and str(path) in ran.err


def test_outputs_whose_shape_is_not_told_are_judged(tmp_path: Path) -> None:
    model = plain_model()
    for value in model.graph.outputs:
        value.shape = None
    assert judged(model, tmp_path).passed


@pytest.mark.usefixtures("_no_builder")
def test_nothing_is_overwritten(sound: Path, tmp_path: Path) -> None:
    """Neither the weights by a reference, nor a file of the adapted copy's name."""
    checkpoint = shutil.copy(checkpoint_of("hf-dual"), tmp_path / "model.safetensors")
    refused = neck_export_cli("verify", sound, "--checkpoint", checkpoint, "--save-reference", checkpoint)
    assert refused.code == 1 and "overwrite" in refused.err
    (tmp_path / "other.neck.onnx").write_text("mine")
    ran = verify_cli(sound, "--write-manifest")
    assert ran.code == 1 and "other.neck.onnx" in ran.err
    assert (tmp_path / "other.neck.onnx").read_text() == "mine"


def test_without_a_checkpoint_there_is_nothing_to_compare_with(sound: Path) -> None:
    ran = neck_export_cli("verify", sound)
    assert ran.code == 1 and "--checkpoint" in ran.err


@pytest.mark.usefixtures("_no_builder")
def test_options_of_a_foreign_file_are_refused_for_ours(tmp_path: Path) -> None:
    """Its manifest tells the state, the prefix and the config."""
    path = write(plain_model(rewrites=Rewrites()), tmp_path / "encoder.onnx")
    assert verify_cli(path, "--write-manifest").code == 0
    with pytest.raises(ExportError, match="--prefix"):
        verify_file(path, prefix="detector.")
