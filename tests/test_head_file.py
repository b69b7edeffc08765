"""A file of `--sam2-outputs head` through the stages: verify, inspect, triton, OpenVINO, bench, a plan."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN_TOLERANCE, load_golden, run_onnx, worst_error
from exporting import bench_module, checkpoint_of, config_of, neck_export_cli, quick_trace, trace_quickly
from safetensors.torch import load_file
from test_head import HEAD, NAMES, TINY, deployed, outputs_of, tracker
from test_roofline import AGREEMENT, count

from benchmarks.measure.backends import REFERENCE
from benchmarks.measure.prepare import make_weights
from benchmarks.options import BenchOptions
from benchmarks.roofline import encoder_parts, total_bytes, total_operations
from engines.service.options import RepositoryOptions
from engines.service.repository import make_repository
from export.contract.export_command import export_command
from export.contract.options import Rewrites
from export.contract.signature import Signature, SignatureError, encoder_signature
from export.verification.verify import make_reference, reference_outputs, reference_pixels, verify_onnx
from neck.checkpoint import load_encoder
from neck.config import EncoderConfig

TRACKER = ("--checkpoint", checkpoint_of("hf-tracker"), "--config", config_of("hf-tracker"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("head") / "x.onnx"
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        ran = neck_export_cli("onnx", *TRACKER, *HEAD, "--output", output)
    assert ran.code == 0, ran
    return output


def test_the_file_gives_what_the_mask_decoder_read(exported: Path) -> None:
    found = run_onnx(exported, tracker().image)
    assert list(found) == NAMES
    assert worst_error(found, tracker().expected) < GOLDEN_TOLERANCE
    assert worst_error({**found, NAMES[0]: found[NAMES[0]] * 1.001}, tracker().expected) > GOLDEN_TOLERANCE
    manifest = json.loads(exported.with_suffix(".json").read_text())
    assert manifest["signature"]["sam2_outputs"] == "head" and manifest["encoder"]["sam2_head"] is True
    assert [spec["shape"] for spec in manifest["signature"]["outputs"]] == [list(found[name].shape) for name in NAMES]
    assert "--sam2-outputs head" in export_command(manifest, exported, exported)
    manifest["signature"]["sam2_outputs"] = "features"
    assert "--sam2-outputs" not in export_command(manifest, exported, exported)


def test_the_file_goes_through_the_stages(exported: Path, tmp_path: Path) -> None:
    ran = neck_export_cli("verify", exported, "--save-reference", tmp_path / "r.safetensors")
    assert ran.code == 0 and all(name in ran.out for name in NAMES) and "feat_3" not in ran.out
    saved = load_file(tmp_path / "r.safetensors")
    assert set(saved) == {"pixels", *NAMES} and saved[NAMES[0]].shape == (1, 4, 36, 36)
    assert "sam2_high_res_1: float (1, 8, 18, 18)" in neck_export_cli("inspect", exported).out
    made = make_repository(RepositoryOptions(model=exported, output=tmp_path / "models"), lambda line: None)
    text = " ".join(next(path for path in made.files if path.name == "config.pbtxt").read_text().split())
    assert (
        'name: "sam2_high_res_0" data_type: TYPE_FP32 dims: 1 dims: 4 dims: 36 dims: 36' in text
        and "feat_3" not in text
    )


def test_the_reference_is_not_folded(exported: Path) -> None:
    """A head of other weights in PyTorch is seen: it is applied there, after the neck."""
    signature = Signature.from_dict(json.loads(exported.with_suffix(".json").read_text())["signature"])
    other = load_encoder(checkpoint_of("hf-tracker"), tracker().config, sam2_head=True)
    assert other.sam2_head is not None
    other.sam2_head.conv_s1.weight.data = other.sam2_head.conv_s1.weight * 1.01
    verdict = verify_onnx(exported, signature, make_reference(other, signature, 1), "fp32")
    assert verdict.failed_names == ["sam2_high_res_1"]
    pixels = reference_pixels(signature, None, 1)
    plain = dataclasses.replace(signature, sam2_outputs="features")
    feats, head = (reference_outputs(tracker().encoder, pixels, asked) for asked in (plain, signature))
    conv = tracker().encoder.get_submodule("sam2_head.conv_s0")
    wanted = F.conv2d(torch.from_numpy(feats["sam2_feat_0"]), conv.weight, conv.bias)  # type: ignore[arg-type]
    assert np.array_equal(head["sam2_high_res_0"], wanted.numpy())
    with pytest.raises(SignatureError, match=r"load_encoder\(sam2_head=True\)"):
        reference_outputs(load_golden("hf-tracker").encoder, pixels, signature)


@pytest.mark.parametrize(
    "asked",
    [
        ("--no-rewrite",),
        ("--precision", "fp16", "--output-dtype", "fp32"),
        ("--precision", "bf16"),
        ("--batch", "2", "--input", "uint8", "--positions", "file"),
    ],
    ids=lambda asked: asked[1 % len(asked)],
)
def test_other_exports_pass_too(asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)
    ran = neck_export_cli("onnx", *TRACKER, *HEAD, *asked, "--output", tmp_path / "x.onnx")
    assert ran.code == 0, ran
    assert ran.out.count("  ok") == 6
    if "file" in asked:
        assert list(load_file(tmp_path / "x.positions.safetensors")) == NAMES[3:]


def test_openvino_runs_the_file(exported: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install '.[bench]'")
    # by itself it computes in BF16 where the processor has that: an error of 1.5e-2 on an EPYC with avx512_bf16
    compiled = openvino.Core().compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled({"image": tracker().image.numpy()})
    found = {name: torch.from_numpy(outputs[name]) for name in NAMES}
    assert worst_error(found, tracker().expected) < GOLDEN_TOLERANCE


def test_a_benchmarks_module_has_the_head(tmp_path: Path) -> None:
    """Random weights, written once and read by every backend; the plain module and the folded one agree."""
    config = dataclasses.replace(TINY, sam2_head=False)
    asked = BenchOptions(tmp_path, config=config, necks="sam2", positions="none", sam2_outputs="head")
    made = make_weights(asked, tmp_path)
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    plain, folded = (outputs_of(bench_module(made, name), image) for name in (REFERENCE, "eager-rewritten-fp32"))
    assert list(plain) == NAMES[:3] and worst_error(folded, plain) < GOLDEN_TOLERANCE
    assert make_weights(asked, tmp_path).signature == made.signature


@pytest.mark.parametrize("rewrites", [Rewrites.none(), Rewrites()], ids=["plain", "folded"])
def test_closed_form_is_the_count_over_the_graph(rewrites: Rewrites) -> None:
    module = deployed(rewrites)
    operations, size = count(quick_trace(module))
    parts = encoder_parts(tracker().config, module.signature, 1, rewritten=rewrites.fold_head)
    assert total_operations(parts) == pytest.approx(operations, rel=AGREEMENT / 100)  # the head is 1 % here
    if rewrites.fold_head:
        assert total_bytes(parts, "fp32") == pytest.approx(size, rel=AGREEMENT)
    other = encoder_parts(tracker().config, module.signature, 1, rewritten=not rewrites.fold_head)
    assert total_operations(other) != pytest.approx(operations, rel=AGREEMENT / 100)


def test_what_the_head_saves_at_full_size() -> None:
    config = EncoderConfig(necks=("sam2",), sam2_head=True)
    features, head = (
        encoder_parts(config, encoder_signature(config, sam2_outputs=kind, positions="none"), 1)  # type: ignore[arg-type]
        for kind in ("features", "head")
    )
    saved = {one.part: one.operations for one in features}
    for part in head:
        saved[part.part] -= part.operations
    assert saved["level 0"] == 2 * 9 * 256 * (256 - 32) * 288**2 == 85_614_133_248
    assert saved["level 1"] == 2 * 9 * 256 * (256 - 64) * 144**2
    assert {name for name, value in saved.items() if value} == {"level 0", "level 1", "level 3"}
    outputs = [sum(part.output_elements for part in parts) for parts in (features, head)]
    assert outputs[0] - outputs[1] == 224 * 288**2 + 192 * 144**2 + 256 * 36**2


def test_a_plan_moves_fewer_bytes(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's own builder: the features' file and the head's, both FP16."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    from engines.builder.options import PlanOptions
    from engines.plan import make_plan

    trace_quickly(monkeypatch)
    features = tmp_path / "features.onnx"
    assert neck_export_cli("onnx", *TRACKER, "--no-verify", "--output", features).code == 0
    moved, sizes = [], []
    for onnx in (features, exported):
        plan = tmp_path / f"{onnx.stem}.plan"
        made = make_plan(PlanOptions(onnx=onnx, output=plan, precision="fp16", flavor="rtx", verify=False))
        assert made.layers is not None and made.layers.bytes_moved is not None
        moved.append(made.layers.bytes_moved)
        sizes.append(sum(int(np.prod(spec["shape"])) for spec in made.manifest["outputs"]))
    assert [spec["name"] for spec in made.manifest["outputs"]] == NAMES
    assert [spec["shape"][1] for spec in made.manifest["outputs"]] == [4, 8, 32, 32, 32, 32]
    assert sizes[0] - sizes[1] == 28 * 36**2 + 24 * 18**2 + 2 * 32 * 4**2
    assert moved[0] - moved[1] > 2 * (sizes[0] - sizes[1])
    assert "sam2_high_res_0" in neck_export_cli("inspect", plan).out
