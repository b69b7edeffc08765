"""ONNX files that are links, as in the cache of a hub: read as ONNX Runtime reads them from a path, or refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exporting import golden_options, listing, neck_export_cli, trace_quickly

from engines.attach import DeployedEncoder
from engines.builder.attention_forms import Attempt, relower_file
from export.contract.errors import ExportError
from export.contract.onnx_file import OnnxFile
from export.contract.options import Precision
from export.pipeline import export_onnx, verify_file


def exported(folder: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> Path:
    trace_quickly(monkeypatch)
    options = {"necks": "sam3", "positions": "none", "precision": precision, "verify": False}
    return export_onnx(golden_options("meta-dual", folder / "e.onnx", **options)).path


def cached(path: Path, hub: Path) -> Path:
    """The file as huggingface_hub keeps it: snapshots/REVISION/NAME -> blobs/HASH."""
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in path.parent.iterdir():
        blob = hashlib.sha256(file.read_bytes()).hexdigest()
        (hub / "blobs" / blob).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob}")
    return snapshot / path.name


@pytest.fixture(params=["fp32", "fp16"])
def files(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A file, and the same in a cache."""
    path = exported(tmp_path / "plain", request.param, monkeypatch)
    return path, cached(path, tmp_path / "hub")


def test_verify_in_a_cache(files: tuple[Path, Path]) -> None:
    """The figures are the plain file's; the cache is left as it is, and the command says so."""
    plain, link = files
    before, notes = listing(link.parent.parent.parent), list[str]()
    assert verify_file(link, notes=notes).to_dict() == verify_file(plain).to_dict()
    assert len(notes) == 1 and str(link.with_suffix(".json")) in notes[0]
    assert listing(link.parent.parent.parent) == before and link.with_suffix(".json").is_symlink()
    assert json.loads(plain.with_suffix(".json").read_text())["verification"]["verified"]  # the control: written there
    ran = neck_export_cli("verify", link)
    assert ran.code == 0 and "sam3_feat_0" in ran.out and ran.err.startswith("note: ") and ran.err.count("\n") == 1
    assert neck_export_cli("inspect", link).code == 0
    assert neck_export_cli("triton", link, "--output", link.parent.parent / "repository").code == 0


def test_weights_are_read_and_written_elsewhere(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain, link = files
    want = {name: value.const_value.numpy() for name, value in ir.load(plain).graph.initializers.items()}  # type: ignore[union-attr]
    model, folder = OnnxFile(link).load()
    assert folder == link.parent.parent.parent / "blobs"
    assert OnnxFile(plain).load()[1] == plain.parent
    if "fp16" in json.loads(plain.with_suffix(".json").read_text())["precision"]:
        (tmp_path / "work").mkdir()
        with contextlib.ExitStack() as left:
            model = ir.load(relower_file(link, "fp16", Attempt("fp32acc", "operator"), tmp_path / "work", left))
    found = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    assert found and all(np.array_equal(found[name], want[name]) for name in found.keys() & want.keys())
    assert sum(array.size for array in found.values()) > 0.9 * sum(array.size for array in want.values())
    assert all(file.is_symlink() for file in link.parent.iterdir())  # nothing was left beside them


def test_a_deployed_encoder_of_a_cache(files: tuple[Path, Path]) -> None:
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    outputs = []
    for path in files:
        with DeployedEncoder(path, runtime="onnxruntime", device="cpu", simulated=True) as encoder:
            outputs.append(encoder(pixels)[0][0])
    assert torch.equal(outputs[0], outputs[1])


def test_a_plan_of_a_cache(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    link = files[1]
    output = tmp_path / "plan" / "x.plan"
    ran = neck_export_cli("trt", link, "--fp16", "--flavor", "rtx", "--no-verify", "--output", output)
    assert ran.code == 0, ran
    assert sorted(listing(output.parent)) == ["x.plan", "x.plan.json", "x.plan.layers.json"]


@pytest.mark.parametrize("where", ["weights", "elsewhere"])
def test_links_that_onnx_runtime_refuses(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line that names the link; no file outside is read."""
    path = exported(tmp_path / "plain", "fp32", monkeypatch)
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "e.json").write_bytes(path.with_suffix(".json").read_bytes())
    data = folder / "e.onnx.data"
    if where == "weights":
        (folder / "e.onnx").write_bytes(path.read_bytes())
        data.symlink_to("../plain/e.onnx.data")
    else:
        (tmp_path / "secret").mkdir()
        (tmp_path / "secret" / "data").write_bytes(path.with_name("e.onnx.data").read_bytes())
        (folder / "e.onnx").symlink_to("../plain/e.onnx")
        data.symlink_to("../secret/data")
    with pytest.raises(ExportError, match=str(data)):
        OnnxFile(folder / "e.onnx").load()
    ran = neck_export_cli("verify", folder / "e.onnx")
    assert ran.code == 1 and ran.err.startswith(f"error: {data}: ") and ran.err.count("\n") == 1
    data.unlink()
    data.write_bytes(path.with_name("e.onnx.data").read_bytes())  # the control: as the message says
    assert neck_export_cli("verify", folder / "e.onnx").code == 0


def test_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rsync --link-dest and deduplicating file systems make them: ONNX Runtime reads them, onnx-ir does not."""
    path = exported(tmp_path / "plain", "fp32", monkeypatch)
    data = path.with_name("e.onnx.data")
    (tmp_path / "other").hardlink_to(data)
    assert neck_export_cli("verify", path).code == 0
    with pytest.raises(ExportError, match=str(data)):
        OnnxFile(path).load(values=True)
    (tmp_path / "other").unlink()
    assert OnnxFile(path).load(values=True)[1] == path.parent
