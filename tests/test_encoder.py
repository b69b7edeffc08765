"""A file with the encoder's interface: every runtime of a CPU, and a played plan."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import GOLDEN_TOLERANCE, load_golden, named_outputs, worst_error
from exporting import golden_options, trace_quickly
from fake_gpu.play import play
from torch import Tensor, nn

from engines.attach import AttachError, attach, detach
from engines.builder.options import PlanOptions
from engines.live.encoder import DeployedEncoder, EncoderError
from engines.live.file_runtimes import OrtFile, RuntimeFileError
from engines.plan import make_plan
from engines.run.session import SessionError
from export.contract.manifest import ManifestError
from export.contract.signature import BatchRange
from export.pipeline import export_onnx
from neck.images import normalize

FP16_ERROR = 2e-2
"""Of an output's largest value, in FP16 through 4 blocks of 16 channels; found is 3e-3."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """both: two necks and positions, FP32, batch 1 to 3; half: the same in FP16; beside: positions in a file."""
    folder = tmp_path_factory.mktemp("encoder")
    same: dict[str, Any] = {"batch": BatchRange(1, 2, 3), "verify": False}
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        export_onnx(golden_options("meta-dual", folder / "both.onnx", **same))
        export_onnx(golden_options("meta-dual", folder / "half.onnx", **same, precision="fp16"))
        export_onnx(golden_options("meta-dual", folder / "beside.onnx", **same, positions="file"))
    yield folder


def images(count: int = 1) -> Tensor:
    """The golden image, then others."""
    golden = load_golden("meta-dual")
    return torch.cat([golden.image[:1].roll(turn * 7, dims=3) for turn in range(count)])


def expected(images: Tensor) -> dict[str, Tensor]:
    return named_outputs(load_golden("meta-dual").encoder, images)


def named(encoder: DeployedEncoder, images: Tensor) -> dict[str, Tensor]:
    """The four lists by the file's names."""
    lists = dict(zip(("sam3_feat", "sam3_pos", "sam2_feat", "sam2_pos"), encoder(images), strict=True))
    return {f"{name}_{level}": one for name, levels in lists.items() for level, one in enumerate(levels or ())}


@pytest.mark.parametrize("options", [{}, {"runtime": "openvino"}])
def test_the_interface_of_the_encoder(options: dict[str, Any], folder: Path) -> None:
    """The four lists, finest first, as the plain module's; any batch that the file takes; fresh each time."""
    if options:
        pytest.importorskip("openvino", reason="needs openvino: pip install '.[bench]'")
    encoder = DeployedEncoder(folder / "both.onnx", **options)
    for count in (1, 3, 2):
        found = named(encoder, images(count))
        assert worst_error(found, expected(images(count))) < GOLDEN_TOLERANCE
        assert worst_error({**found, "sam2_feat_1": found["sam2_feat_1"] * 1.001}, expected(images(count))) > 5e-5
    first, second = encoder(images()), encoder(images())
    assert first[0][0].data_ptr() != second[0][0].data_ptr() and torch.equal(first[0][0], second[0][0])
    assert first[1][0].data_ptr() == second[1][0].data_ptr()  # positions are made once
    assert not list(encoder.parameters()) and "both.onnx, device=cpu" in repr(encoder)


@pytest.mark.parametrize("name", ["both", "beside", "none"])
def test_positions_from_wherever_they_are(name: str, folder: Path, tmp_path: Path) -> None:
    path = folder / f"{name}.onnx"
    if name == "none":  # the graph of `beside` has none; the file beside it is left out
        path = with_manifest(folder / "beside.onnx", tmp_path, positions="none")
        path.with_name("beside.positions.safetensors").unlink()
        drop_file(path, "beside.positions.safetensors")
    encoder = DeployedEncoder(path)
    assert worst_error(named(encoder, images(2)), expected(images(2))) < GOLDEN_TOLERANCE
    half = encoder(images().to(torch.float64))[1][0]
    assert half.dtype == torch.float64


def with_manifest(file: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a file whose manifest says something else of its signature."""
    for path in file.parent.glob(f"{file.stem}.*"):
        shutil.copy(path, folder / path.name)
    where = (folder / file.name).with_suffix(".json")
    manifest = json.loads(where.read_text())
    manifest["signature"] |= changes
    where.write_text(json.dumps(manifest))
    return folder / file.name


def drop_file(path: Path, name: str) -> None:
    where = path.with_suffix(".json")
    manifest = json.loads(where.read_text())
    manifest["files"] = [entry for entry in manifest["files"] if entry["name"] != name]
    where.write_text(json.dumps(manifest))


def test_only_what_is_handed_out_is_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other neck, levels that nobody reads, and positions that are known: no memory and no copy for them."""
    bound: list[list[str]] = []
    run = OrtFile.run

    def watched(self: OrtFile, image: Tensor, outputs: dict[str, Tensor]) -> None:
        bound.append(sorted(outputs))
        assert image.data_ptr() == batch.data_ptr()
        run(self, image, outputs)
        assert all(kept.data_ptr() for kept in outputs.values())

    monkeypatch.setattr(OrtFile, "run", watched)
    batch = images()
    encoder = DeployedEncoder(folder / "both.onnx", levels=(0, 1))
    encoder.forward_necks(batch, ["sam2"])
    encoder.forward_necks(batch, ["sam2"])
    assert bound == [["sam2_feat_0", "sam2_feat_1", "sam2_pos_0", "sam2_pos_1"], ["sam2_feat_0", "sam2_feat_1"]]


def test_an_fp16_file_is_simulated_where_asked(folder: Path) -> None:
    """ONNX Runtime computes it in FP32 and rounds the outputs; the simulation rounds on the way."""
    plain, rounded = DeployedEncoder(folder / "half.onnx"), DeployedEncoder(folder / "half.onnx", simulated=True)
    found, simulated = named(plain, images()), named(rounded, images())
    assert {one.dtype for one in simulated.values()} == {torch.float32} == {one.dtype for one in found.values()}
    want = expected(images())
    for name in ("sam3_feat_0", "sam2_feat_2"):
        errors = [float((one[name] - want[name]).norm() / want[name].norm()) for one in (found, simulated)]
        assert errors[0] < errors[1] < FP16_ERROR
    half = named(plain, images().half())
    assert all(one.dtype == torch.float16 for one in half.values())


def test_uint8_files_get_the_pixels_back(folder: Path, tmp_path: Path) -> None:
    encoder = DeployedEncoder(with_manifest(folder / "both.onnx", tmp_path, input="uint8"))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    assert np.array_equal(encoder._image(normalize(pixels)).numpy(), pixels)


def test_threads_take_turns(folder: Path) -> None:
    encoder, wanted = DeployedEncoder(folder / "both.onnx"), [images(2)[turn : turn + 1] for turn in (0, 1)]
    found: dict[int, dict[str, Tensor]] = {}
    threads = [
        threading.Thread(target=lambda turn=turn: found.update({turn: named(encoder, wanted[turn % 2])}))
        for turn in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for turn in range(6):
        assert worst_error(found[turn], expected(wanted[turn % 2])) < GOLDEN_TOLERANCE


def test_a_plan(folder: Path) -> None:
    """On a played GPU; the plan is opened, warmed up, and gives what its file gives, in the input's place and type."""
    with play("11.4"):
        plan = make_plan(PlanOptions(folder / "half.onnx", folder / "half.plan", verify=False)).path
        encoder = DeployedEncoder(plan)
        assert encoder.device.type == "cuda" and encoder.necks == ("sam3", "sam2")
        found = named(encoder, images(2))
        assert {(one.device.type, one.dtype) for one in found.values()} == {("cpu", torch.float32)}
        assert worst_error(found, expected(images(2))) < FP16_ERROR
        with pytest.raises(EncoderError, match=r"runs in TensorRT on"):
            DeployedEncoder(plan, "cpu")
        with pytest.raises(
            EncoderError, match=r"batch size 1 to 3, but 4 images were passed\. .* --batch 1:4:4, then build"
        ):
            encoder(images(4))
        encoder.close()
    with play("11.4", gpu=False), pytest.raises(SessionError, match="NVIDIA GPU"):
        DeployedEncoder(plan)


def test_the_files_size_is_the_only_one(folder: Path) -> None:
    encoder = DeployedEncoder(folder / "both.onnx")
    encoder.set_imgsz(112)
    encoder.set_imgsz([112, 112])
    with pytest.raises(
        EncoderError, match=r"112x112 pixels, .* have 126x112 pixels\. .*neck-export onnx .*--image-size 126x"
    ):
        encoder.set_imgsz((126, 112))
    for wrong in (images()[0], images()[:, :2], images().to(torch.uint8)):
        with pytest.raises(EncoderError, match=r"Call the encoder with normalized images"):
            encoder(wrong)
    with pytest.raises(EncoderError, match=r"level 4 of the features; export the file again"):
        DeployedEncoder(folder / "both.onnx", levels=range(5))


def test_files_that_cannot_be_used(folder: Path, tmp_path: Path) -> None:
    path = with_manifest(folder / "both.onnx", tmp_path)
    with pytest.raises(RuntimeFileError, match="pip install onnxruntime-gpu, or"):
        DeployedEncoder(path, "cuda:0")
    for options in (
        {"device": "cuda", "simulated": True},
        {"device": "mps"},
        {"runtime": "openvino", "device": "cuda"},
    ):
        with pytest.raises(EncoderError, match="CPU"):
            DeployedEncoder(path, **options)  # type: ignore[arg-type]
    data = path.with_name("both.onnx.data")
    data.write_bytes(data.read_bytes()[:-4] + b"1234")
    with pytest.raises(ManifestError, match="was changed after its manifest"):
        DeployedEncoder(path)
    with pytest.raises(ManifestError, match=r"none\.json: the manifest is missing"):
        DeployedEncoder(path.with_name("none.onnx"))
    path.write_bytes(b"not ONNX")
    manifest = json.loads(path.with_suffix(".json").read_text())
    manifest["files"] = []
    path.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(RuntimeFileError, match=r"ONNX Runtime .* cannot load the file"):
        DeployedEncoder(path)
    with pytest.raises(RuntimeFileError, match=r"OpenVINO .* cannot load the file"):
        DeployedEncoder(path, runtime="openvino")


class Backbone(nn.Module):
    """Holds an encoder as Meta's and Ultralytics' models do: drops the last level, or runs one neck alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.vision_backbone, self.scalp = encoder, 1

    def both(self, images: Tensor) -> list[Tensor]:
        return [one for levels in self.vision_backbone.forward(images) for one in levels[: -self.scalp]]

    def sam2_alone(self, images: Tensor) -> list[Tensor]:
        x = self.vision_backbone.trunk(images)[-1]
        pair = self.vision_backbone.sam_forward_feature_levels(x, self.vision_backbone.sam2_convs)
        return [one for levels in pair for one in levels[: -self.scalp]]


class Predictor:
    """Has a model, as a predictor does once it is set up."""

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model


def test_attached_where_trunk_and_convs_are(folder: Path) -> None:
    """Meta's and Ultralytics' structure, both necks, two images, through a predictor; to the bit after detach."""
    own = load_golden("meta-dual").encoder
    model = nn.ModuleDict({"backbone": Backbone(own)})
    backbone, predictor = model["backbone"], Predictor(model)
    with torch.no_grad():
        for run in (backbone.both, backbone.sam2_alone):
            want = run(images(2))
            attach(predictor, folder / "both.onnx")
            found = run(images(2))
            assert len(found) == len(want)
            assert all((a - b).abs().max() < GOLDEN_TOLERANCE * b.abs().max() for a, b in zip(found, want, strict=True))
            backbone.vision_backbone.set_imgsz((112, 112))
            last = backbone.vision_backbone(images(2))[0][3]  # the model drops it, the file has it
            assert last.shape == (2, 16, 4, 4) and last.isfinite().all()
            with pytest.raises(
                AttachError, match=r"map of the trunk .*is not among the values that the attached file computes"
            ):
                backbone.vision_backbone.trunk(images())[-1].mean()
            detach(predictor)
            assert all(torch.equal(a, b) for a, b in zip(run(images(2)), want, strict=True))
    with pytest.raises(AttachError, match="contains no PyTorch model yet"):
        attach(Predictor(None), folder / "both.onnx")


def test_a_neck_that_nobody_reads_may_lack(folder: Path, tmp_path: Path) -> None:
    model = nn.ModuleDict({"backbone": Backbone(load_golden("meta-dual").encoder)})
    alone = with_manifest(folder / "both.onnx", tmp_path, necks=["sam3"])
    with pytest.raises(AttachError, match=r"the neck sam2\. .*attach\(\.\.\., necks=\('sam3',\)\).*--neck sam3,sam2 "):
        attach(model, alone)
    attach(model, alone, necks=("sam3",))
    with torch.no_grad():
        sam3, _, sam2, _ = model["backbone"].vision_backbone(images())
    assert len(sam3) == 4 and sam2 is None
    detach(model)


def test_a_dynamic_batch_runs_on_cuda_and_a_heavy_operator_on_the_cpu_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime computes consumers of Shape on the CPU by design; which provider ran what is read from its profile.

    The session is a real one, on the CPU; that its products ran on CUDA is written into its profile.
    """
    moved: set[str] = set()
    real = onnxruntime.InferenceSession

    class Session:
        """A session that says of some operators that CUDA ran them."""

        def __init__(self, path: str, options: Any, providers: Any) -> None:
            with contextlib.suppress(RuntimeError):
                if options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1":
                    raise ValueError("nodes are assigned to the CPU, but fallback to CPU EP has been disabled")
            self.session = real(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def io_binding(self) -> Any:
            return SimpleNamespace(
                **dict.fromkeys(("bind_input", "bind_output", "synchronize_outputs"), lambda *_: None)
            )

        def run_with_iobinding(self, binding: object) -> None:
            self.session.run(None, {"image": np.zeros((1, 3, 112, 112), np.float32)})

        def end_profiling(self) -> str:
            path = Path(self.session.end_profiling())
            events = json.loads(path.read_text())
            for event in events:
                if event.get("args", {}).get("op_name") in moved:
                    event["args"]["provider"] = "CUDAExecutionProvider"
            path.write_text(json.dumps(events))
            return str(path)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with play("11.4"):
        image = torch.zeros(1, 3, 112, 112, device="cuda")
        refused = OrtFile(folder / "both.onnx", torch.device("cuda", 0))
        with pytest.raises(RuntimeFileError, match=r"would compute .*Conv \(\d+ nodes\).* on the CPU"):
            refused.run(image, {})
        moved |= {"Conv", "MatMul", "FusedMatMul", "Attention", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm"}
        taken = OrtFile(folder / "both.onnx", torch.device("cuda", 0))
        taken.run(image, {})
        taken.run(image, {})  # only the first run is profiled
