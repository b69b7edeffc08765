"""reference.safetensors: the images and PyTorch's outputs, which a service compares its own with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Save, run_onnx, shared_encoder
from exporting import golden_options, neck_export_cli, trace_quickly
from safetensors.numpy import load_file
from test_session import facts, write_plan
from test_verify_plan import CONFIG, OnnxSession, export, source

from engines.run import verify
from engines.run.verify import verify_plan_file
from export.contract.manifest import manifest_path, read_manifest, write_manifest
from export.contract.signature import BatchRange
from export.pipeline import RejectedError, export_onnx
from export.verification.fidelity import FidelityError, compare
from export.verification.reference import check_reference, write_reference
from neck.images import normalize


def load(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A reference, read as any reader of safetensors would."""
    arrays = load_file(path)
    return arrays.pop("pixels"), arrays


def test_verify_saves_what_it_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)
    output = tmp_path / "x.onnx"
    export_onnx(golden_options("meta-dual", output, batch=BatchRange(1, 2, 3), verify=False))
    saved = tmp_path / "kept" / "reference.safetensors"
    ran = neck_export_cli("verify", output, "--save-reference", saved)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == str(saved)
    pixels, expected = load(saved)
    assert pixels.dtype == np.uint8
    assert pixels.shape[0] == 2
    assert len(expected) == 16
    found = {name: value.numpy() for name, value in run_onnx(output, normalize(pixels)).items()}
    assert compare(expected, found, "fp32", "x").passed
    assert not compare(expected, {name: value[::-1] for name, value in found.items()}, "fp32", "x").passed
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("name", ["reference.npz", "reference", "folder.safetensors"])
def test_another_name_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FidelityError, match=r"in \.safetensors"):
        check_reference(tmp_path / name)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FidelityError, match="cannot be written"):
        write_reference(tmp_path / "file" / "reference.safetensors", np.zeros((1, 2, 2, 3), np.uint8), {})


def plan_of(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan whose engine is ONNX Runtime."""
    path, signature = export(save)
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"vtrt")
    told = facts(signature=signature.to_dict(), onnx_manifest=source(), precision="fp32", batch="1:2:3")
    write_manifest(manifest_path(plan), "plan", told, [plan])
    monkeypatch.setattr(verify, "open_plan", lambda plan, flavor, **options: OnnxSession(path, told))
    return plan


def test_a_plan_is_verified_again_and_its_manifest_says_so(
    tmp_path: Path,
    save: Save,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(tmp_path, save, monkeypatch)
    saved = tmp_path / "reference.safetensors"
    verdict = verify_plan_file(plan, save=saved)
    assert verdict.passed
    assert read_manifest(manifest_path(plan), "plan")["verification"] == verdict.to_dict()
    pixels, expected = load(saved)
    with torch.no_grad():
        features = shared_encoder(CONFIG)(normalize(pixels))[0]
    assert np.allclose(expected["sam3_feat_2"], features[2].numpy(), atol=1e-5)

    with pytest.raises(RejectedError):
        verify_plan_file(plan, overrides={"*_feat_*": 1e-12})
    assert read_manifest(manifest_path(plan), "plan")["verification"]["verified"] is False


def test_the_reference_of_a_plan_is_written_where_it_cannot_run(
    tmp_path: Path,
    save: Save,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_of(tmp_path, save, monkeypatch)
    monkeypatch.undo()
    saved = tmp_path / "reference.safetensors"
    ran = neck_export_cli("verify", plan, "--save-reference", saved)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert load(saved)[0].shape == (2, 112, 112, 3)


def test_a_plan_without_a_manifest(tmp_path: Path) -> None:
    ran = neck_export_cli("verify", tmp_path / "none.plan")
    assert ran.code == 1
    assert "the manifest is missing" in ran.err
    assert neck_export_cli("verify", write_plan(tmp_path)).code == 1
