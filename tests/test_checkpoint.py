"""Every checkpoint format loads to the encoder whose outputs were recorded upstream; every bad file is told clearly."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from mapped import MAPS, are_mapped
from safetensors.torch import load_file, save_file
from torch import Tensor

from neck.checkpoint import CheckpointError, _skeleton, load_encoder, random_encoder, save_meta_checkpoint
from neck.config import EncoderConfig
from neck.necks import Sam3AnyViTDetNeck, Sam3DualViTDetNeck, Sam3TriViTDetNeck, forward_necks
from neck.random_noise import even_noise

DATA = Path(__file__).parent / "data"
CASES = ("hf-dual", "hf-tracker", "meta-dual", "meta-padded", "meta-tri", "ultralytics-resized")

TOLERANCE = 2e-5
"""Of each output's largest value: FP32 sums in another order over 4 blocks give up to 1e-6."""

State = dict[str, Tensor]


def config_of(case: str) -> EncoderConfig:
    return EncoderConfig.from_file(DATA / case / "encoder.json")


def checkpoint_of(case: str) -> Path:
    return next((DATA / case).glob("checkpoint.*"))


def state_of(case: str) -> State:
    path = checkpoint_of(case)
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)["model"]


def worst_error(encoder: Sam3DualViTDetNeck, case: str) -> float:
    """Largest error of any output, relative to that output's largest value."""
    expected = load_file(DATA / case / "expected.safetensors")
    encoder.set_imgsz(json.loads((DATA / case / "case.json").read_text())["run_image_size"])
    with torch.inference_mode():
        outputs = forward_necks(encoder, expected.pop("image"))
    found = {}
    for neck, (feats, poss) in outputs.items():
        for level, (feat, pos) in enumerate(zip(feats, poss, strict=True)):
            found[f"{neck}_feat_{level}"], found[f"{neck}_pos_{level}"] = feat, pos
    if not any("_pos_" in name for name in expected):  # a tracker of transformers gives features alone
        found = {name: tensor for name, tensor in found.items() if "_pos_" not in name}
    assert set(found) == set(expected)
    return max(float((found[name] - ours).abs().max() / ours.abs().max()) for name, ours in expected.items())


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def save(state: State, path: Path, wrapper: str | None = "model") -> Path:
    torch.save({wrapper: state} if wrapper else state, path)
    return path


def error_of(path: Path, case: str = "meta-dual", **options: Any) -> str:
    options.setdefault("config", config_of(case))
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, **options)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2
    assert path.name in message
    return message


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_upstreams(case: str) -> None:
    encoder = load_encoder(checkpoint_of(case), config_of(case))
    assert list(encoder.necks) == json.loads((DATA / case / "case.json").read_text())["necks"]
    assert not encoder.training
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in encoder.parameters())
    assert all(value.device.type == "cpu" for value in [*encoder.parameters(), *encoder.buffers()])
    assert worst_error(encoder, case) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "name"),
    list(zip(CASES, ["trunk.blocks.2.attn.qkv.bias", "trunk.pos_embed", "convs.1.dconv_2x2.weight"] * 2, strict=True)),
)
def test_a_changed_weight_is_seen(case: str, name: str) -> None:
    encoder = load_encoder(checkpoint_of(case), config_of(case))
    name = name if encoder.convs or name.startswith("trunk") else f"sam2_{name}"
    encoder.get_parameter(name).mul_(1.01)
    assert worst_error(encoder, case) > TOLERANCE


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        *(("", ".pt"), ("model.", ".safetensors"), ("trunk.", ".safetensors")),
        ("module.detector.backbone.vision_backbone.", ".pt"),
    ],
)
@pytest.mark.parametrize("case", ["meta-dual", "hf-dual"])
def test_any_prefix_and_file_type(case: str, prefix: str, suffix: str, tmp_path: Path) -> None:
    own = json.loads((DATA / case / "case.json").read_text())["key_prefix"]
    state = {prefix + key.removeprefix(own): value for key, value in state_of(case).items()}
    path = tmp_path / f"misnamed{'.pt' if suffix == '.safetensors' else '.bin'}"
    if suffix == ".pt":
        save(state, path)
    else:
        save_file(state, path)
    assert_same_weights(load_encoder(path, config_of(case)), load_encoder(checkpoint_of(case), config_of(case)))


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_wrappers(wrapper: str | None, tmp_path: Path) -> None:
    path = save(state_of("meta-dual"), tmp_path / "weights.pt", wrapper)
    assert worst_error(load_encoder(path, config_of("meta-dual")), "meta-dual") < TOLERANCE


def test_training_checkpoint_with_other_entries(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"state_dict": {"model": state_of("meta-dual")}, "epoch": 3, "step": torch.tensor(7)}, path)
    load_encoder(path, config_of("meta-dual"))


def test_old_and_recompressed_files_are_read(tmp_path: Path) -> None:
    state = state_of("meta-dual")
    old, packed = tmp_path / "old.pt", tmp_path / "packed.pt"
    torch.save(state, old, _use_new_zipfile_serialization=False)
    with (
        zipfile.ZipFile(checkpoint_of("meta-dual")) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as to,
    ):
        for name in source.namelist():
            to.writestr(name, source.read(name))
    for path in (old, packed):
        assert worst_error(load_encoder(path, config_of("meta-dual")), "meta-dual") < TOLERANCE


def shard(case: str, folder: Path, names: tuple[str, ...] = ("model-1.safetensors", "model-2.safetensors")) -> Path:
    state = state_of(case)
    weight_map = {key: names[number % len(names)] for number, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if weight_map[key] == name}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("case", ["meta-tri", "hf-dual"])
def test_shards_by_index_or_folder(case: str, tmp_path: Path) -> None:
    index = shard(case, tmp_path)
    for path in (index, tmp_path):
        assert worst_error(load_encoder(path, config_of(case)), case) < TOLERANCE


def test_folder_with_one_file(tmp_path: Path) -> None:
    shutil.copy(checkpoint_of("hf-dual"), tmp_path / "model.safetensors")
    load_encoder(tmp_path, config_of("hf-dual"))


@pytest.mark.parametrize(
    ("case", "dtype"), [("meta-dual", torch.float16), ("hf-dual", torch.bfloat16), ("meta-dual", torch.float64)]
)
def test_other_float_types_become_float32(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in state_of(case).items() if not value.is_complex()}
    encoder = load_encoder(save(state, tmp_path / "half.pt"), config_of(case))
    full = load_encoder(checkpoint_of(case), config_of(case))
    for name, value in encoder.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full.state_dict()[name].to(dtype).float())


# -- which necks, which architecture --


@pytest.mark.parametrize(
    ("case", "asked", "loaded", "kind"),
    [
        ("meta-dual", ("sam3",), ("sam3",), Sam3DualViTDetNeck),
        ("meta-dual", ("sam2",), ("sam2",), Sam3AnyViTDetNeck),
        ("meta-tri", ("sam3",), ("sam3",), Sam3DualViTDetNeck),
        ("meta-tri", ("propagation",), ("propagation",), Sam3AnyViTDetNeck),
        ("meta-tri", ("interactive", "sam3"), ("sam3", "interactive"), Sam3AnyViTDetNeck),
        ("meta-tri", None, ("sam3", "interactive", "propagation"), Sam3TriViTDetNeck),
        ("hf-tracker", None, ("sam2",), Sam3AnyViTDetNeck),
        ("meta-padded", None, ("sam3",), Sam3DualViTDetNeck),
    ],
)
def test_necks(case: str, asked: tuple[str, ...] | None, loaded: tuple[str, ...], kind: type) -> None:
    encoder = load_encoder(checkpoint_of(case), config_of(case), asked)
    assert tuple(encoder.necks) == loaded
    assert type(encoder) is kind


def test_neck_that_is_not_there() -> None:
    message = error_of(checkpoint_of("meta-padded"), "meta-padded", necks=("sam3", "sam2"))
    assert "neck sam2" in message and "only the necks sam3;" in message


def test_a_neck_that_was_not_asked_for_may_be_broken(tmp_path: Path) -> None:
    state = state_of("meta-dual")
    state = {key: value for key, value in state.items() if not key.endswith("sam2_convs.0.conv_1x1.bias")}
    path = save(state, tmp_path / "x.pt")
    load_encoder(path, config_of("meta-dual"), ("sam3",))
    assert "missing" in error_of(path)


def test_config_is_needed_where_the_shapes_do_not_tell() -> None:
    message = error_of(checkpoint_of("meta-dual"), config=None)
    assert "--config" in message
    assert all(f'"{field}": ?' in message for field in ("num_heads", "window_size", "global_blocks", "image_size"))
    assert all(text in message for text in ('"embed_dim": 32', '"depth": 4', '"d_model": 16', '"mlp_ratio": 4.625'))


def test_published_architecture_needs_no_config(tmp_path: Path) -> None:
    # true widths of what tells the architecture; MLP, neck width and levels are free and therefore small
    config = EncoderConfig(mlp_ratio=0.01, d_model=4, scale_factors=(4.0, 2.0, 1.0), necks=("sam3", "sam2"))
    assert config.mlp_hidden == 10
    shapes = {name: value.shape for name, value in _skeleton(config).state_dict().items()}
    shared = {shape: torch.rand(shape) for shape in shapes.values()}  # one storage per shape keeps the file at 20 MB
    path = save({name: shared[shape] for name, shape in shapes.items()}, tmp_path / "big.pt")
    loaded = load_encoder(path).trunk.config
    assert isinstance(loaded, EncoderConfig)
    assert loaded.mlp_hidden == 10
    for field in ("image_size", "num_heads", "window_size", "global_blocks", "layer_norm_eps", "d_model", "necks"):
        assert getattr(loaded, field) == getattr(config, field)
    assert loaded.scale_factors == config.scale_factors


@pytest.mark.parametrize("fields", [{"embed_dim": 64}, {"depth": 5}, {"mlp_ratio": 4.0}, {"pretrain_image_size": 112}])
def test_config_that_contradicts_the_tensors(fields: dict[str, Any]) -> None:
    values = {**config_of("meta-dual").to_dict(), **fields}
    message = error_of(checkpoint_of("meta-dual"), config=EncoderConfig.from_dict(values))
    assert "--config contradicts" in message and next(iter(fields)) in message
    assert message.count("but the checkpoint has") == 1


def hf_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "window_size": 4,
        "global_attn_indexes": [1, 3],
        "image_size": 112,
        "patch_size": 14,
        "pretrain_image_size": 56,
        **changes,
    }


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    shutil.copy(checkpoint_of("hf-dual"), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    "parents", [(), ("vision_config", "backbone_config"), ("detector_config", "vision_config", "x")]
)
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_hugging_face_config_beside_it(hf_folder: Path, parents: tuple[str, ...], eps: float | None) -> None:
    node = hf_config() if eps is None else hf_config(layer_norm_eps=eps)
    for parent in reversed(parents):
        node = {"architectures": ["Sam3"], "detr": {"num_attention_heads": 8}, parent: node}
    (hf_folder / "config.json").write_text(json.dumps(node))
    for path in (hf_folder, hf_folder / "model.safetensors"):
        encoder = load_encoder(path)
        assert encoder.trunk.config.layer_norm_eps == (eps or 1e-6)  # type: ignore[union-attr]
        assert (worst_error(encoder, "hf-dual") < TOLERANCE) is (eps is None)


def test_given_config_wins_over_hugging_faces(hf_folder: Path) -> None:
    (hf_folder / "config.json").write_text(json.dumps(hf_config(layer_norm_eps=1e-3)))
    assert worst_error(load_encoder(hf_folder, config_of("hf-dual")), "hf-dual") < TOLERANCE


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSON"),
        ("[]", "not describe a SAM 3 vision backbone"),
        (json.dumps(hf_config(hidden_size=64)), "configuration from config.json contradicts"),
        (json.dumps(hf_config(window_size=None)), "window_size is None"),
        (json.dumps(hf_config(hidden_act="relu")), "hidden_act 'relu'"),
    ],
)
def test_bad_hugging_face_config(hf_folder: Path, text: str, says: str) -> None:
    (hf_folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        load_encoder(hf_folder)
    assert says in str(caught.value)


# -- bad files --


def test_no_such_file(tmp_path: Path) -> None:
    assert error_of(tmp_path / "sam3.pt").endswith("sam3.pt: this file does not exist; check the path")
    assert error_of(tmp_path).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.pt", b"", "empty"),
        ("empty.safetensors", b"", "empty"),
        ("notes.pt", b"these are not weights\n", "checkpoint"),
        ("page.safetensors", b"<!DOCTYPE html><html>", "not a checkpoint"),
        ("short.pt", b"PK", "checkpoint"),
        ("other.json", b'{"weights": {}}', "an index"),
        ("other.json", b'{"weight_map": {"a": 1}}', "lists the shard 1"),
        ("other.json", b'{"weight_map": ["a"]}', "an index"),
        ("cut.json", b'{"weight_map": {"a":', "an index"),
    ],
)
def test_no_checkpoint_at_all(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert says in error_of(path)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated(kind: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    state = {key: value for key, value in state_of("meta-dual").items() if not value.is_complex()}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    message = error_of(path)
    assert "truncated or damaged" in message and "again" in message


def test_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "images.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    assert "zip archive" in error_of(path)


class RunsCode:
    """Unpickling this makes the folder that it names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_a_pickle_does_not_run(kind: str, tmp_path: Path) -> None:
    path, folder = tmp_path / "evil.pt", tmp_path / "ran"
    content = {"model": state_of("meta-dual"), "x": RunsCode(folder)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(folder)))
        assert "refused" in error_of(path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
        assert worst_error(load_encoder(path, config_of("meta-dual")), "meta-dual") < TOLERANCE
    assert not folder.exists()


def test_module_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    assert "no SAM 3 image encoder" in error_of(path)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(2)}, "SAM 3 image encoder"),
        ({"backbone.encoder.layer.0.attention.weight": torch.zeros(2)}, "SAM 3 image encoder"),
        (
            {"image_encoder.trunk.pos_embed": torch.zeros(1, 4, 7, 7)},
            "a trunk (tensors image_encoder.trunk.*) but no SAM 3 neck",
        ),
        ({"backbone.layer_norm.weight": torch.zeros(2)}, "a trunk (tensors backbone.*) but no SAM 3 neck"),
        ({}, "no tensors"),
        ({"epoch": 3}, "no tensors"),
        ([torch.zeros(2)], "contains a list"),
        (torch.zeros(2), "contains a tensor"),
    ],
)
def test_checkpoint_of_another_model(state: object, says: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "other.pt")
    assert says in error_of(tmp_path / "other.pt")


# -- bad tensors --

NAMES = {
    "meta-dual": (
        "trunk.patch_embed.proj.weight",
        "trunk.pos_embed",
        "trunk.ln_pre.weight",
        "trunk.blocks.2.attn.qkv.weight",
        "trunk.blocks.3.mlp.fc2.bias",
        "convs.0.conv_1x1.bias",
        "sam2_convs.3.conv_3x3.weight",
    ),
    "hf-dual": (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.position_embeddings",
        "backbone.layers.2.attention.k_proj.weight",
        "tracker_neck.fpn_layers.0.scale_layers.2.bias",
    ),
}
BROKEN = [(case, name) for case, names in NAMES.items() for name in names]


def change(case: str, name: str, make: Callable[[Tensor], Tensor | None], path: Path) -> tuple[Path, str]:
    """Saves a case's checkpoint with the one tensor whose key ends with `name` replaced, or left out."""
    state = state_of(case)
    key = next(key for key in state if key.endswith(name) and (name[:5] != "convs" or key[: -len(name)].endswith(".")))
    replaced = make(state.pop(key))
    return save(state if replaced is None else {**state, key: replaced}, path), key


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(("case", "name"), BROKEN)
def test_missing_key(case: str, name: str, with_config: bool, tmp_path: Path) -> None:
    path, key = change(case, name, lambda value: None, tmp_path / "x.pt")
    message = error_of(path, config=config_of(case) if with_config else None)
    assert f"missing: {key}" in message


@pytest.mark.parametrize(("case", "name"), BROKEN)
def test_misshapen_tensor(case: str, name: str, tmp_path: Path) -> None:
    path, key = change(case, name, lambda value: torch.cat((value, value), dim=-1), tmp_path / "x.pt")
    message = error_of(path, case)
    shape = state_of(case)[key].shape
    assert f"shape: {key} has the shape {(*shape[:-1], 2 * shape[-1])}" in message
    assert f"instead of {tuple(shape)}" in message


def test_misshapen_tensor_that_alone_tells_a_field(tmp_path: Path) -> None:
    path, key = change("meta-dual", "trunk.pos_embed", lambda value: value[:, :5], tmp_path / "x.pt")
    message = error_of(path)
    assert "pretrain_image_size is 56, but the checkpoint has 28" in message and key in message


def test_many_missing_keys_are_counted(tmp_path: Path) -> None:
    state = {key: value for key, value in state_of("meta-dual").items() if not key.endswith(".bias")}
    message = error_of(save(state, tmp_path / "x.pt"))
    assert "47 of the encoder's tensors" in message and "and 39 more" in message
    assert message.count(".bias") == 8


@pytest.mark.parametrize(
    ("case", "name", "value"),
    [(*broken, float(("nan", "inf", "-inf")[index % 3])) for index, broken in enumerate(BROKEN)],
)
def test_not_finite(case: str, name: str, value: float, tmp_path: Path) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    path, key = change(case, name, spoil, tmp_path / "x.pt")
    assert f"1 of the encoder's tensors contain NaN or infinity: {key};" in error_of(path, case)


def test_overflow_of_float64_is_seen(tmp_path: Path) -> None:
    path, key = change("meta-dual", "ln_pre.bias", lambda value: value.double() + 1e39, tmp_path / "x.pt")
    assert f"1 of the encoder's tensors contain NaN or infinity: {key};" in error_of(path)


@pytest.mark.parametrize(
    ("name", "noted"), [("fc1.weight", True), ("dconv_2x2.weight", True), ("ln_pre.weight", False)]
)
def test_a_weight_of_one_value_is_noted(name: str, noted: bool, tmp_path: Path) -> None:
    """A trained norm or bias may be of one value."""
    path, key = change("meta-dual", name, torch.ones_like, tmp_path / "x.pt")
    notes: list[str] = []
    load_encoder(path, config_of("meta-dual"), notes=notes)
    assert [f" are equal: {key};" in note for note in notes] == [True] * noted


def test_not_finite_elsewhere_does_not_matter(tmp_path: Path) -> None:
    state = state_of("meta-dual")
    state["tracker.maskmem_tpos_enc"].fill_(float("nan"))
    load_encoder(save(state, tmp_path / "x.pt"), config_of("meta-dual"))


def test_integers_are_refused(tmp_path: Path) -> None:
    path, key = change("meta-dual", "fc1.weight", lambda value: value.to(torch.int8), tmp_path / "x.pt")
    assert f"{key} has the type torch.int8" in error_of(path)


@pytest.mark.parametrize(
    "name", ["trunk.blocks.0.ls1.gamma", "trunk.blocks.1.attn.qkv.lora_A", "convs.4.conv_1x1.bias"]
)
def test_tensor_that_the_encoder_does_not_know(name: str, tmp_path: Path) -> None:
    state = {**state_of("ultralytics-resized"), name: torch.ones(32)}
    message = error_of(save(state, tmp_path / "x.pt"), "ultralytics-resized")
    assert name.partition(".")[2] in message
    assert "adapter" in message or "missing" in message  # a fifth level lacks the rest of itself


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..", "", "a\\b", "c:d"])
def test_shards_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"trunk.pos_embed": name}}))
    assert "folder" in error_of(index)


def test_missing_and_truncated_shards(tmp_path: Path) -> None:
    index = shard("hf-dual", tmp_path)
    second = tmp_path / "model-2.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"model-2.safetensors: the .safetensors file"):
        load_encoder(index, config_of("hf-dual"))
    second.unlink()
    assert error_of(index, "hf-dual").startswith(f"{second}: this file does not exist")


# -- memory, random weights, saving --


@pytest.mark.skipif(not MAPS.exists(), reason="reads what the process has mapped from /proc")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "float16"])
def test_weights_are_mapped_and_not_copied(kind: str, tmp_path: Path) -> None:
    config, path = config_of("meta-dual"), tmp_path / "weights"
    state = {key: value for key, value in state_of("meta-dual").items() if not value.is_complex()}
    if kind == "safetensors":
        save_file(state, path)
    else:
        save({name: value.half() if kind == "float16" else value for name, value in state.items()}, path)
    encoder = load_encoder(path, config)
    mapped = are_mapped(encoder.parameters(), path)
    # float16 becomes float32 once (the negative control)
    assert len(mapped) > 90 and set(mapped) == {kind != "float16"}


def test_random_weights_are_the_same_bits_everywhere() -> None:
    """Found on an x86-64 CPU with AVX2; torch's normal_ has other bits under ATEN_CPU_CAPABILITY=default (2.13)."""
    digest = hashlib.sha256()
    for name, tensor in random_encoder(tiny_config(), seed=3).state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    assert digest.hexdigest() == "412b67c015b82994fdd52f66b5ca9218bb32112d2ce7ca22bc9fe18dd4fa0334"


def test_noise_is_bell_shaped() -> None:
    noise = even_noise((0, 1), 100_000, mean=1.0, std=0.1).astype(np.float64)
    assert noise.mean() == pytest.approx(1.0, abs=2e-3) and noise.std() == pytest.approx(0.1, rel=1e-2)
    inside = [float((abs(noise - 1.0) < limit * 0.1).mean()) for limit in (1, 2, 3.5)]
    assert inside == [pytest.approx(0.669, abs=5e-3), pytest.approx(0.958, abs=5e-3), 1.0]  # a normal's: 0.683, 0.954
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02


def test_random_encoder_is_seeded() -> None:
    config = EncoderConfig.from_dict({**config_of("meta-dual").to_dict(), "necks": ["sam3", "sam2"]})
    encoder = random_encoder(config, seed=3)
    assert_same_weights(encoder, random_encoder(config, seed=3))
    other = random_encoder(config, seed=4).state_dict()
    assert not any(torch.equal(value, other[name]) for name, value in encoder.state_dict().items())
    assert not any(value.requires_grad for value in encoder.parameters())
    assert all(float(value.std()) > 0.01 for value in encoder.state_dict().values())


@pytest.mark.parametrize("seed", [0, 1])
def test_random_encoder_keeps_activations_moderate(seed: int) -> None:
    config = EncoderConfig(
        embed_dim=128, num_heads=4, window_size=4, image_size=(112, 112), pretrain_image_size=56, d_model=64
    )
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    encoder = random_encoder(config, seed)
    with torch.inference_mode():
        trunk = encoder.trunk(image)[0]
        outputs = [feat for feats, _ in forward_necks(encoder, image).values() for feat in feats]
    assert 1 < float(trunk.std()) < 10
    assert all(0.1 < float(feat.std()) < 10 and float(feat.abs().max()) < 100 for feat in outputs)


@pytest.mark.parametrize("necks", [("sam3",), ("sam3", "sam2"), ("sam3", "interactive", "propagation")])
def test_saved_checkpoint_loads_back(necks: tuple[str, ...], tmp_path: Path) -> None:
    scales = (4.0, 2.0, 1.0) if len(necks) == 3 else (4.0, 2.0, 1.0, 0.5)
    config = EncoderConfig.from_dict({**config_of("meta-dual").to_dict(), "necks": necks, "scale_factors": scales})
    encoder, path = random_encoder(config), tmp_path / "random.pt"
    save_meta_checkpoint(encoder, path)
    loaded = load_encoder(path, config)
    assert_same_weights(loaded, encoder)
    save_meta_checkpoint(loaded, path, prefix="")  # over the file that it is mapped from
    assert_same_weights(load_encoder(path, config), encoder)
    assert_same_weights(loaded, encoder)
    assert [file.name for file in tmp_path.iterdir()] == ["random.pt"]
