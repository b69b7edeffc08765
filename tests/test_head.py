"""`--sam2-outputs head`: SAM 2's mask decoder's conv_s0 and conv_s1, from the checkpoint into the fold; bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, GOLDEN_TOLERANCE, Golden, load_golden, named_outputs, tiny_config, worst_error
from exporting import checkpoint_of, config_of, golden_state, listing, neck_export_cli
from safetensors.torch import load_file
from torch import Tensor

from export.contract.options import Rewrites
from export.contract.signature import BatchRange, Signature, encoder_signature
from export.graph.deployed_module import DeployEncoder
from export.graph.rewrite import rewrite
from neck.checkpoint import CheckpointError, load_encoder, random_encoder, save_meta_checkpoint
from neck.config import ConfigError, EncoderConfig
from neck.necks import Sam3DualViTDetNeck

TRACKER = ("--checkpoint", checkpoint_of("hf-tracker"), "--config", config_of("hf-tracker"))
HEAD = ("--sam2-outputs", "head")
NAMES = ["sam2_high_res_0", "sam2_high_res_1", "sam2_feat_2", "sam2_pos_0", "sam2_pos_1", "sam2_pos_2"]
EXACT = 1e-12
"""Relative L2 in float64: sums in another order give up to 1e-15 here."""

TINY = tiny_config(d_model=16, necks=("sam3", "sam2"), sam2_head=True)


@functools.cache
def tracker() -> Golden:
    """transformers' tracker with its head, and what its mask decoder read."""
    golden = load_golden("hf-tracker")
    encoder = load_encoder(checkpoint_of("hf-tracker"), golden.config, sam2_head=True)
    encoder.set_imgsz(golden.config.image_size)
    expected = load_file(DATA / "hf-tracker" / "expected_head.safetensors")
    expected["sam2_feat_2"] = golden.expected["sam2_feat_2"]
    return dataclasses.replace(
        golden, encoder=encoder, expected=expected, config=dataclasses.replace(golden.config, sam2_head=True)
    )


def deployed(rewrites: Rewrites) -> DeployEncoder:
    signature = encoder_signature(tracker().config, sam2_outputs="head")
    return DeployEncoder(tracker().encoder, signature, rewrites)


def outputs_of(module: DeployEncoder, image: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return dict(zip([spec.name for spec in module.signature.outputs], module(image), strict=True))


# --- the fold


@pytest.mark.parametrize("necks", [("sam3", "sam2"), ("sam2",)])
@pytest.mark.parametrize("rewrites", [dataclasses.replace(Rewrites.none(), fold_head=True), Rewrites()])
def test_the_fold_is_conv_s0_of_conv_3x3(rewrites: Rewrites, necks: tuple[str, ...]) -> None:
    encoder = random_encoder(dataclasses.replace(TINY, necks=necks)).double()
    image = torch.randn(2, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = named_outputs(encoder, image)
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    folded = rewrite(encoder, rewrites)
    found = named_outputs(folded, image)
    for level in (0, 1):
        conv = encoder.get_submodule(f"sam2_head.conv_s{level}")
        wanted = F.conv2d(before[f"sam2_feat_{level}"], conv.weight, conv.bias)  # type: ignore[arg-type]
        got = found.pop(f"sam2_feat_{level}")
        assert got.shape[1] == (2, 4)[level]
        assert (got - wanted).norm() / wanted.norm() < EXACT
        changed = F.conv2d(before[f"sam2_feat_{level}"], conv.weight * (1 + 1e-9), conv.bias)  # type: ignore[arg-type,operator]
        assert (got - changed).norm() / wanted.norm() > EXACT  # the control
    for name, value in found.items():  # the other neck, the other levels, and the positions
        assert (value - before[name]).norm() <= EXACT * before[name].norm()
    assert not any(name.startswith("sam2_head") for name, _ in folded.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())


def test_features_of_an_encoder_with_a_head_are_not_folded() -> None:
    signature = encoder_signature(tracker().config)
    found = outputs_of(DeployEncoder(tracker().encoder, signature, Rewrites()), tracker().image)
    assert worst_error(found, load_golden("hf-tracker").expected) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("rewrites", [Rewrites.none(), Rewrites()], ids=["plain", "folded"])
def test_the_module_gives_what_the_mask_decoder_read(rewrites: Rewrites) -> None:
    found = outputs_of(deployed(rewrites), tracker().image)
    assert list(found) == NAMES and found["sam2_pos_0"].shape == (1, 32, 36, 36)
    assert worst_error(found, tracker().expected) < GOLDEN_TOLERANCE
    assert worst_error({**found, NAMES[1]: found[NAMES[1]] * 1.001}, tracker().expected) > GOLDEN_TOLERANCE


# --- checkpoints


def with_decoder(path: Path, *starts: str, change: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """meta-dual's checkpoint with a mask decoder under each name; every next one's weights are doubled."""
    state = {name: tensor.clone() for name, tensor in golden_state("meta-dual").items()}
    for index, start in enumerate(starts):
        for name, value in random_encoder(dataclasses.replace(DUAL, sam2_head=True)).state_dict().items():
            if name.startswith("sam2_head."):
                state[name.replace("sam2_head.", start)] = value * 2.0**index
    if change:
        change(state)
    torch.save({"model": state}, path)
    return path


DUAL = dataclasses.replace(EncoderConfig.from_file(config_of("meta-dual")), necks=("sam3", "sam2"))
META = "tracker.sam_mask_decoder."


@pytest.mark.parametrize("start", [META, "sam_mask_decoder.", "model.model.sam_mask_decoder.", "mask_decoder."])
def test_the_mask_decoder_under_its_names(start: str, tmp_path: Path) -> None:
    path = with_decoder(tmp_path / "x.pt", start)
    encoder = load_encoder(path, DUAL, sam2_head=True)
    state = torch.load(path, weights_only=True)["model"]
    head = {name: value for name, value in encoder.state_dict().items() if name.startswith("sam2_head.")}
    assert len(head) == 4
    assert all(torch.equal(value, state[name.replace("sam2_head.", start)]) for name, value in head.items())
    assert load_encoder(path, DUAL).sam2_head is None  # what is not asked for is not kept


def test_the_mask_decoder_of_the_same_model_is_taken(tmp_path: Path) -> None:
    """Another model's beside it, or a copy of it, does not matter; one that is as near and differs does."""
    path = with_decoder(tmp_path / "x.pt", META, "detector.sam_mask_decoder.")
    near = load_encoder(path, DUAL, sam2_head=True)
    assert near.sam2_head is not None
    state = torch.load(path, weights_only=True)["model"]
    assert torch.equal(near.sam2_head.conv_s0.weight, state["detector.sam_mask_decoder.conv_s0.weight"])
    with_decoder(path, META, "other.sam_mask_decoder.", change=lambda state: copy_decoder(state))
    assert load_encoder(path, DUAL, sam2_head=True).sam2_head is not None
    with_decoder(path, META, "other.sam_mask_decoder.")
    with pytest.raises(
        CheckpointError,
        match=r"2 different mask decoders .*tracker\.sam_mask_decoder\.\*, other",
    ):
        load_encoder(path, DUAL, sam2_head=True)
    assert load_encoder(path, DUAL).sam2_head is None


def copy_decoder(state: dict[str, Tensor]) -> None:
    for name in [name for name in state if name.startswith(META)]:
        state[name.replace("tracker.", "other.")] = state[name].clone()


def test_random_weights_with_a_head_save_and_load(tmp_path: Path) -> None:
    """The head's weights are drawn last, so that the others stay as they were."""
    encoder, path = random_encoder(TINY), tmp_path / "x.pt"
    plain = random_encoder(dataclasses.replace(TINY, sam2_head=False)).state_dict()
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in plain.items())
    save_meta_checkpoint(encoder, path)
    assert {name for name in torch.load(path, weights_only=True)["model"] if "decoder" in name} == {
        f"{META}conv_s{level}.{kind}" for level in (0, 1) for kind in ("weight", "bias")
    }
    loaded = load_encoder(path, TINY, sam2_head=True).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())


# --- the contract


def test_the_published_encoder() -> None:
    config = EncoderConfig(necks=("sam3", "sam2"), sam2_head=True)
    both = encoder_signature(config, necks="both", sam2_outputs="head", positions="none")
    shapes = [(spec.name, spec.shape[1:]) for spec in both.outputs if spec.name.startswith("sam2")]
    assert shapes == [
        ("sam2_high_res_0", (32, 288, 288)),
        ("sam2_high_res_1", (64, 144, 144)),
        ("sam2_feat_2", (256, 72, 72)),
    ]
    assert [spec.name for spec in both.outputs][:4] == [f"sam3_feat_{level}" for level in range(4)]
    alone = encoder_signature(config, necks="sam2", sam2_outputs="head")
    assert [spec.name for spec in alone.outputs] == NAMES and alone.levels == (0, 1, 2)


def test_the_manifest_tells_the_head_and_one_without_is_from_before() -> None:
    signature = encoder_signature(TINY, necks="both", sam2_outputs="head", levels="0,3", batch=BatchRange(1, 2, 4))
    values = json.loads(json.dumps(signature.to_dict()))
    assert Signature.from_dict(values) == signature
    del values["sam2_outputs"]
    assert Signature.from_dict(values) == dataclasses.replace(signature, sam2_outputs="features")
    assert "sam2_head" not in dataclasses.replace(TINY, sam2_head=False).to_dict()
    assert EncoderConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY


@pytest.mark.parametrize(
    ("necks", "levels", "sam2"), [("both", "0,3", ["high_res_0"]), ("sam2", "1,2", ["high_res_1", "feat_2"])]
)
def test_some_levels(necks: str, levels: str, sam2: list[str]) -> None:
    signature = encoder_signature(TINY, necks=necks, levels=levels, sam2_outputs="head", positions="none")
    assert [spec.name for spec in signature.outputs if "sam2" in spec.name] == [f"sam2_{name}" for name in sam2]
    image = torch.zeros(1, 3, 112, 112)
    found = DeployEncoder(random_encoder(TINY), signature, Rewrites())(image)
    assert [tuple(output.shape) for output in found] == [spec.shape for spec in signature.outputs]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"necks": ("sam3",)}, "configuration has the necks sam3 and d_model 16"),
        ({"d_model": 12}, "a multiple of 8"),
        ({"sam2_head": "yes"}, "it must be true or false"),
    ],
)
def test_a_config_that_cannot_have_a_head(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        EncoderConfig.from_dict({**TINY.to_dict(), **fields})


# --- bad input


def lacking(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(key) for key in list(state) if name in key] and None


def misshape(state: dict[str, Tensor]) -> None:
    state[f"{META}conv_s1.weight"] = state[f"{META}conv_s1.weight"][:-1].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lacking("mask_decoder"),
            ("mask decoder", "sam_mask_decoder.conv_s0", "mask_decoder.conv_s0", ".conv_s1"),
        ),
        (lacking("conv_s1"), ("missing", f"{META}conv_s1.weight", f"{META}conv_s1.bias")),
        (misshape, ("shape", f"{META}conv_s1.weight has the shape (", "instead of (")),
        (lambda state: state[f"{META}conv_s0.bias"].fill_(float("nan")), ("NaN or infinity", f"{META}conv_s0.bias")),
        (lacking("sam2_convs"), ("--sam2-outputs head",)),
    ],
)
def test_bad_checkpoint(change: Callable[[dict[str, Tensor]], None], words: tuple[str, ...], tmp_path: Path) -> None:
    path = with_decoder(tmp_path / "x.pt", META, change=change)
    given = ("--checkpoint", path, "--config", config_of("meta-dual"), "--output", tmp_path / "out" / "x.onnx")
    necks = ("--neck", "both") if words != ("--sam2-outputs head",) else ()
    ran = neck_export_cli("onnx", *given, *HEAD, *necks)
    assert ran.code == 1 and ran.out == "" and 1 <= len(ran.err.splitlines()) <= 2
    assert all(word in ran.err for word in (*words,)), ran.err
    assert [name for name in listing(tmp_path) if name != "x.pt"] == []
    if necks and "sam3" not in words[0]:  # the control: without the head the same checkpoint is sound
        assert isinstance(load_encoder(path, DUAL), Sam3DualViTDetNeck)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--neck", "sam3"), "--sam2-outputs head"),
        ((), "--neck sam2 or --neck both"),
        (("--neck", "sam2", "--levels", "0,1,2,3"), "--levels 0,1,2,3"),
        (("--neck", "sam2", "--levels", "3"), "but --levels 3 selects neither"),
        (("--neck", "both", "--levels", "2,3"), "but --levels 2,3 selects neither"),
        (("--neck", "interactive"), "neck interactive was requested, but the checkpoint contains only"),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_bad_options(random: bool, asked: tuple[str, ...], says: str, tmp_path: Path) -> None:
    checkpoint = "random" if random else with_decoder(tmp_path / "x.pt", META)
    given = ("--checkpoint", checkpoint, "--config", config_of("meta-dual"), "--output", tmp_path / "out" / "x.onnx")
    ran = neck_export_cli("onnx", *given, *HEAD, *asked)
    assert ran.code == 1 and ran.out == "" and says in ran.err and 1 <= len(ran.err.splitlines()) <= 2, ran.err
    assert [name for name in listing(tmp_path) if name != "x.pt"] == []
    assert neck_export_cli("onnx", *given, "--sam2-outputs", "heads").code == 2
