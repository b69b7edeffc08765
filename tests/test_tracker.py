"""Encoders with any set of necks: a tracker's sam2 alone, and some of SAM 3.1's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, GOLDEN_TOLERANCE, load_golden, named_outputs, run_onnx, worst_error
from exporting import (
    PREFIX,
    checkpoint_of,
    config_of,
    golden_state,
    listing,
    neck_export_cli,
    save_state,
    trace_quickly,
)
from torch import Tensor

from engines.service.options import RepositoryOptions
from engines.service.repository import make_repository
from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3AnyViTDetNeck, Sam3DualViTDetNeck

TRACKER = ("--checkpoint", checkpoint_of("hf-tracker"), "--config", config_of("hf-tracker"))
DUAL = EncoderConfig.from_file(config_of("meta-dual"))
TRI = EncoderConfig.from_file(config_of("meta-tri"))
FEATURES = [f"sam2_feat_{level}" for level in range(4)]
POSITIONS = [f"sam2_pos_{level}" for level in range(4)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracker's encoder, by the command line and with no --neck, at the size that the golden data was made at."""
    output = tmp_path_factory.mktemp("tracker") / "x.onnx"
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        ran = neck_export_cli("onnx", *TRACKER, "--output", output)
    assert ran.code == 0, ran
    return output


def test_a_tracker_exports_what_it_has(exported: Path) -> None:
    golden = load_golden("hf-tracker")
    found = run_onnx(exported, golden.image)
    assert list(found) == [*FEATURES, *POSITIONS]
    assert worst_error(found, golden.expected) < GOLDEN_TOLERANCE
    positions = {name: found[name] for name in POSITIONS}
    ours = named_outputs(golden.encoder, golden.image)
    assert worst_error(positions, {name: ours[name] for name in POSITIONS}) < GOLDEN_TOLERANCE
    assert worst_error({**found, "sam2_feat_0": found["sam2_feat_0"] * 1.001}, golden.expected) > GOLDEN_TOLERANCE
    manifest = json.loads(exported.with_suffix(".json").read_text())
    assert manifest["signature"]["necks"] == manifest["encoder"]["necks"] == ["sam2"]


def test_a_trackers_file_goes_through_the_stages(exported: Path, tmp_path: Path) -> None:
    ran = neck_export_cli("verify", exported)
    assert ran.code == 0 and "sam2_feat_0" in ran.out and "sam3" not in ran.out
    assert "sam2_pos_3" in neck_export_cli("inspect", exported).out
    made = make_repository(RepositoryOptions(model=exported, output=tmp_path / "models"), lambda line: None)
    text = next(path for path in made.files if path.name == "config.pbtxt").read_text()
    assert "sam2_feat_3" in text and "sam3_" not in text


@pytest.mark.parametrize("asked", ["sam3", "both", "sam3,sam2"])
def test_a_tracker_has_no_sam3(asked: str, tmp_path: Path) -> None:
    ran = neck_export_cli("onnx", *TRACKER, "--neck", asked, "--output", tmp_path / "out" / "x.onnx")
    assert ran.code == 1 and ran.out == ""
    assert (
        "neck sam3 was requested, but the checkpoint contains only sam2" in ran.err and len(ran.err.splitlines()) == 1
    )
    assert listing(tmp_path) == {}


def test_the_seeds_forward_of_a_tracker() -> None:
    """No level of sam3, all of sam2's; the names of the state dict are upstream's."""
    golden = load_golden("hf-tracker")
    assert isinstance(golden.encoder, Sam3DualViTDetNeck) and len(golden.encoder.convs) == 0
    with torch.no_grad():
        sam3, sam3_positions, sam2, sam2_positions = golden.encoder(golden.image)
    assert sam3 == sam3_positions == [] and sam2 is not None and sam2_positions is not None
    assert worst_error(dict(zip(FEATURES, sam2, strict=True)), golden.expected) < GOLDEN_TOLERANCE
    assert [position.shape for position in sam2_positions] == [feat.shape for feat in sam2]
    assert {name.split(".")[0] for name in golden.encoder.state_dict()} == {"trunk", "sam2_convs"}


def without(*names: str) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        for key in [key for key in state if key.startswith(tuple(f"{PREFIX}{name}." for name in names))]:
            del state[key]

    return change


def test_a_meta_checkpoint_with_sam2_convs_alone(tmp_path: Path) -> None:
    encoder = load_encoder(save_state(tmp_path / "x.pt", without("convs")), DUAL)
    whole = load_golden("meta-dual")
    assert list(encoder.necks) == ["sam2"]
    found = named_outputs(encoder, whole.image)
    ours = named_outputs(whole.encoder, whole.image)
    assert all(torch.equal(value, ours[name]) for name, value in found.items()) and len(found) == 8
    with pytest.raises(
        CheckpointError, match="neck sam3 was requested, but the checkpoint contains only the necks sam2"
    ):
        load_encoder(tmp_path / "x.pt", DUAL, ("sam3",))


def save_tri(path: Path, change: Any) -> Path:
    state = {name: tensor.clone() for name, tensor in golden_state("meta-tri").items()}
    change(state)
    torch.save({"model": state}, path)
    return path


@pytest.mark.parametrize(
    ("lacking", "asked", "loaded"),
    [
        (("propagation_convs",), None, ("sam3", "interactive")),
        (("propagation_convs",), ("sam3",), ("sam3",)),
        (("interactive_convs",), None, ("sam3", "propagation")),
        (("convs",), None, ("interactive", "propagation")),
        (("convs", "interactive_convs"), None, ("propagation",)),
        ((), ("propagation", "interactive"), ("interactive", "propagation")),
    ],
)
def test_any_of_sam31s_necks(
    lacking: tuple[str, ...], asked: tuple[str, ...] | None, loaded: tuple[str, ...], tmp_path: Path
) -> None:
    whole = load_golden("meta-tri")
    encoder = load_encoder(save_tri(tmp_path / "x.pt", without(*lacking)), TRI, asked)
    encoder.set_imgsz(whole.config.image_size)
    assert tuple(encoder.necks) == loaded
    found, ours = named_outputs(encoder, whole.image), named_outputs(whole.encoder, whole.image)
    assert len(found) == 6 * len(loaded)
    assert all(torch.equal(value, ours[name]) for name, value in found.items())


def test_a_neck_that_is_not_asked_for_need_not_be_whole(tmp_path: Path) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        del state[f"{PREFIX}interactive_convs.0.conv_1x1.bias"]
        state[f"{PREFIX}interactive_convs.1.unknown"] = torch.full((3,), float("nan"))

    path = save_tri(tmp_path / "x.pt", spoil)
    for asked in ("sam3", "propagation"):
        assert list(load_encoder(path, TRI, (asked,)).necks) == [asked]
    with pytest.raises(CheckpointError, match=r"interactive_convs\.0\.conv_1x1\.bias"):
        load_encoder(path, TRI)


def test_the_command_line_loads_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sam3 by default where it is there; a broken neck beside it does not matter."""
    trace_quickly(monkeypatch)
    path = save_tri(tmp_path / "x.pt", lambda state: state.pop(f"{PREFIX}propagation_convs.0.conv_1x1.bias"))
    given = ("--checkpoint", path, "--config", config_of("meta-tri"), "--no-verify", "--output", tmp_path / "x.onnx")
    ran = neck_export_cli("onnx", *given)
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "x.json").read_text())["encoder"]["necks"] == ["sam3"]
    ran = neck_export_cli("onnx", *given, "--neck", "all")
    assert ran.code == 1 and "propagation_convs.0.conv_1x1.bias" in ran.err


def test_a_set_of_necks_keeps_its_order() -> None:
    encoder = load_encoder(checkpoint_of("meta-tri"), TRI, ("propagation", "sam3"))
    assert isinstance(encoder, Sam3AnyViTDetNeck) and list(encoder.necks) == ["sam3", "propagation"]
    assert json.loads((DATA / "meta-tri" / "case.json").read_text())["necks"] == ["sam3", "interactive", "propagation"]
