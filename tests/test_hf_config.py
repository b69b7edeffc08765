"""Hugging Face's config.json: what transformers computes by it is what is computed here, or it is refused."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, GOLDEN_TOLERANCE, named_outputs, worst_error
from exporting import neck_export_cli, trace_quickly
from safetensors.torch import load_file, save_file

from export.contract.options import ExportOptions
from export.graph.deployed_module import DeployEncoder
from export.options import check_options, load, sign
from export.weights_origin import encoder_config
from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig
from neck.trunk import ViTDetTrunk
from neck.weights.hf_config import CONVERTED, FIXED, IRRELEVANT, IRRELEVANT_NECK, SQUARES, USED, USED_NECK

CASE = DATA / "hf-variant"
FIELDS: dict[str, dict[str, Any]] = json.loads((CASE / "fields.json").read_text())
"""Every entry of transformers 5.24's two config classes, the value that the case has."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The case as save_pretrained left it, to be changed."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CASE / name, tmp_path)
    return tmp_path


def change(folder: Path, remove: tuple[str, ...] = (), **entries: Any) -> None:
    """Changes entries of the backbone in a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    backbone = config["backbone_config"]
    for name in remove:
        del backbone[name]
    backbone.update(entries)
    (folder / "config.json").write_text(json.dumps(config))


def error_against_transformers(folder: Path) -> float:
    expected = load_file(CASE / "expected.safetensors")
    image = expected.pop("image")
    return worst_error(named_outputs(load_encoder(folder), image), expected)


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_encoder(folder)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


def test_another_theta_eps_and_other_levels_are_transformers(folder: Path) -> None:
    assert error_against_transformers(folder) < GOLDEN_TOLERANCE
    config = load_encoder(folder).trunk.config
    assert isinstance(config, EncoderConfig)
    assert (config.rope_theta, config.layer_norm_eps, config.scale_factors) == (100.0, 1e-3, (2.0, 1.0, 0.5))


@pytest.mark.parametrize("rope", [{"rope_type": "axial", "rope_theta": 10000.0}, {"rope_type": "axial"}, None])
def test_the_plain_theta_is_seen_to_be_another(folder: Path, rope: dict[str, Any] | None) -> None:
    """The control: what was computed before theta was read."""
    change(folder, rope_parameters=rope)
    assert error_against_transformers(folder) > 1e-3


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_theta": 100.0, "rope_parameters": None},  # transformers 5.0
        {"rope_theta": 100.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},  # which transformers makes `axial`
        {"patch_size": [14, 14], "image_size": [84, 84], "pretrain_image_size": [42, 42]},
        {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "layer_scale_init_value": None},
        {"attention_dropout": 0.5, "hidden_dropout": 0.5, "initializer_range": 7.0, "top_k": 50, "torch_dtype": "x"},
        {"_attn_implementation_autoset": True, "a_future_entry": None},
    ],
)
def test_other_spellings_of_the_same(folder: Path, entries: dict[str, Any]) -> None:
    change(folder, **entries)
    assert error_against_transformers(folder) < GOLDEN_TOLERANCE


def test_what_published_files_have_from_before_transformers_5(folder: Path) -> None:
    """Entries that today's classes keep as they find them and never read; another unknown one is refused (below)."""
    change(folder, qkv_bias=True, rope_theta=100.0, remove=("rope_parameters",))
    vision = json.loads((folder / "config.json").read_text())
    vision |= {"fpn_kernel_size": 2, "fpn_stride": 2, "num_feature_levels": 3}
    halves = {
        "detector_config": {"model_type": "sam3", "vision_config": vision},
        "tracker_config": {"vision_config": {}},
    }
    (folder / "config.json").write_text(json.dumps({"architectures": ["Sam3VideoModel"], **halves}))
    assert error_against_transformers(folder) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("text", ["1" * 5000, "[" * 100_000, '{"a":' * 100_000, "{", "\ufeff{}"])
def test_json_that_python_does_not_read(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "JSON" in refused(folder)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"global_attn_indexes": ["1"]}, "global_blocks is ['1']; it must be a list of whole numbers"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0}}, "rope_type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0, "factor": 2}}, "with factor is not"),
        ({"rope_parameters": [100.0]}, "rope_parameters is [100.0]"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'"),
        ({"rope_theta": 50.0}, "rope_theta: 50.0 in the entry rope_theta, and 100.0 inside the entry rope_parameters"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"num_channels": 4}, "num_channels 4"),
        ({"qkv_bias": False}, "qkv_bias False"),
        ({"layer_scale_init_value": 0.1}, "layer_scale_init_value 0.1"),
        ({"patch_size": [14, 16]}, "patch_size [14"),
        ({"image_size": [84, 126]}, "image_size [84"),
        ({"pretrain_image_size": [42, 84]}, "pretrain_image_size [42, 84] is not square"),
        ({"intermediate_size": 41}, "hidden channels (embed_dim * mlp_ratio) is 41, but the checkpoint has 40"),
        ({"head_dim": 4}, "head_dim 4"),
        ({"use_qk_norm": True}, "use_qk_norm True"),
        ({"pretrain_image_size": 56}, "pretrain_image_size is 56, but the checkpoint has 42"),
    ],
)
def test_what_the_encoder_does_not_have_is_refused(folder: Path, entries: dict[str, Any], says: str) -> None:
    change(folder, **entries)
    assert says in refused(folder)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"scale_factors": [4.0, 2.0]}, "has 4, 2 as scale_factors, but the encoder in the checkpoint has 3 levels"),
        ({"fpn_hidden_size": 16}, "d_model is 16, but the checkpoint has 8"),
        ({"neck_norm": "layer"}, "neck_norm 'layer'"),
    ],
)
def test_the_necks_entries(folder: Path, entries: dict[str, Any], says: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(CheckpointError) as caught:
        load_encoder(folder)
    assert says in str(caught.value)


KNOWN = {"sam3_vit_model": {*USED, *SQUARES, *CONVERTED, *FIXED}, "sam3_vision_model": {*USED_NECK, *IRRELEVANT_NECK}}
OTHER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "window_size": 2,
    "global_attn_indexes": [0],
    "layer_norm_eps": 0.1,
    "image_size": 126,
    "patch_size": 7,
    "pretrain_image_size": 84,
    "intermediate_size": 48,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 7.0},
    "hidden_act": "silu",
    "num_channels": 1,
    "layer_scale_init_value": 1.0,
    "fpn_hidden_size": 12,
    "scale_factors": [4.0, 2.0, 1.0],
}
"""Another value for each entry that is said to matter."""


@functools.cache
def config_of_the_case() -> object:
    return load_encoder(CASE).trunk.config


@pytest.mark.parametrize(("section", "name"), [(section, name) for section in FIELDS for name in FIELDS[section]])
def test_every_field_is_used_or_refused_or_known_to_change_nothing(folder: Path, section: str, name: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    entries = config["backbone_config"] if section == "sam3_vit_model" else config
    plain = config_of_the_case()
    assert isinstance(plain, EncoderConfig)
    matters = name in KNOWN[section] and name not in IRRELEVANT_NECK * (section == "sam3_vision_model")
    assert matters or name in IRRELEVANT or name in IRRELEVANT_NECK or name.startswith("_")
    assert not (matters and name in IRRELEVANT)
    if name in ("model_type", "backbone_config"):
        return
    entries[name] = OTHER[name] if matters else ["something else"]
    (folder / "config.json").write_text(json.dumps(config))
    try:
        loaded = load_encoder(folder).trunk.config
    except CheckpointError:
        assert matters
    else:
        assert (loaded != plain) == matters


def test_the_case_through_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theta goes into the rewritten graph and the manifest; a level that the neck lacks cannot be asked."""
    trace_quickly(monkeypatch)
    output = folder / "out" / "x.onnx"
    ran = neck_export_cli("onnx", "--checkpoint", folder, "--output", output)
    assert ran.code == 0, ran
    assert json.loads(output.with_suffix(".json").read_text())["encoder"]["rope_theta"] == 100.0
    assert neck_export_cli("verify", output).code == 0
    ran = neck_export_cli("onnx", "--checkpoint", folder, "--levels", "3", "--output", folder / "no" / "x.onnx")
    assert ran.code == 1 and "level 3 does not exist, because the encoder has levels 0 to 2" in ran.err
    assert not (folder / "no").exists()


def test_an_image_size_of_another_patch(folder: Path) -> None:
    """The patch size is the checkpoint's: 16 takes 128 pixels, 14 does not."""
    asked = ("--image-size", "128", "--no-verify", "--output", folder / "out" / "x.onnx")
    refused_14 = neck_export_cli("onnx", "--checkpoint", folder, *asked)
    assert refused_14.code == 1 and "multiple" in refused_14.err and "14" in refused_14.err
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("patch_embeddings.projection.weight")]
    weights[name] = torch.nn.functional.pad(weights[name], (1, 1, 1, 1)).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    vision = config.get("vision_config", config)
    backbone = vision.get("backbone_config", vision)
    backbone |= {"patch_size": 16, "image_size": 128, "pretrain_image_size": 48}
    (folder / "config.json").write_text(json.dumps(config))
    options = ExportOptions(folder / "out" / "x.onnx", checkpoint=folder, image_size=128)
    check_options(options)
    encoder = load(options).encoder
    assert encoder_config(encoder).patch_size == 16
    # what a file of it computes, without a trace of its own
    signature, image = sign(options, encoder), torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        found = DeployEncoder(encoder, signature, options.rewrites)(image)
    names = [spec.name for spec in signature.outputs]
    assert [tuple(one.shape) for one in found] == [spec.shape for spec in signature.outputs]
    assert worst_error(dict(zip(names, found, strict=True)), named_outputs(encoder, image)) < GOLDEN_TOLERANCE


def test_theta_turns_the_tables() -> None:
    trunk = load_encoder(CASE).trunk
    assert isinstance(trunk, ViTDetTrunk)
    # token 1 of a window is one column to the right: pair i turns by theta^(-i / 2), head_dim 8
    assert torch.allclose(trunk.window_cos[1, :2], torch.tensor([1.0, 100**-0.5]).cos())
    # in a global block by window / grid of that
    assert torch.allclose(trunk.global_sin[1, :2], (torch.tensor([1.0, 100**-0.5]) / 2).sin())


def test_a_neck_module_that_is_not_known_is_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "neck.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"neck\.norm\.weight"):
        load_encoder(folder)


# -- what no comparison of two encoders built from the same file shows is said --


def notes_of(path: Path, config: EncoderConfig | None = None) -> list[str]:
    notes: list[str] = []
    load_encoder(path, config, notes=notes)
    return notes


def test_weights_without_their_config_are_said_to_be_taken_as_sam3s(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_encoder(folder).trunk.config
    assert isinstance(config, EncoderConfig)
    monkeypatch.setattr("neck.checkpoint.published_config", lambda path, layout, facts: config)
    (folder / "config.json").unlink()
    monkeypatch.setattr("neck.checkpoint.level_scales", lambda *given: config.scale_factors)
    (note,) = notes_of(folder)
    assert note.startswith(f"{folder}: ") and "config.json" in note
    assert notes_of(folder, config) == []  # the control


@pytest.mark.parametrize(
    ("name", "entries", "said"),
    [
        ("preprocessor_config.json", {"image_mean": [0.485, 0.456, 0.406]}, "image_mean [0.485, 0.456, 0.406]"),
        ("processor_config.json", {"image_processor": {"image_std": [1, 1, 1]}}, "image_std [1, 1, 1]"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize False"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "rescale_factor": 0.00392156862745098}, None),
        ("preprocessor_config.json", [1], None),
    ],
)
def test_another_normalization_is_said(folder: Path, name: str, entries: object, said: str | None) -> None:
    (folder / name).write_text(json.dumps(entries))
    notes = notes_of(folder)
    if said is None:
        assert notes == []
    else:
        assert len(notes) == 1 and said in notes[0] and "mean 0.5 and std 0.5" in notes[0]


def test_matrices_of_one_value_are_said(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    key = "backbone.layers.1.mlp.fc2.weight"
    save_file({**state, key: torch.zeros_like(state[key])}, folder / "model.safetensors")
    (note,) = notes_of(folder)
    assert note.startswith(f"{folder}: ") and key in note


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.rotary_emb.gain",  # was passed over, as was all with rotary_emb in its name
        "layers.0.attention.q_norm.weight",
        "layers.0.attention.rel_pos_h",
        "layers.2.layer_scale1.lambda1",
        "layer_norm_post.weight",
    ],
)
def test_a_tensor_that_the_trunk_does_not_use_is_refused(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, f"backbone.{name}": torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"backbone.{name}"):
        load_encoder(folder)
