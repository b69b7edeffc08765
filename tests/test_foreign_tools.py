"""`verify` of files that other tools made: each passes exactly if a plain ONNX Runtime run agrees with PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import load_golden, open_onnx, tiny_config
from foreign_files import CASE, plain_model, write
from safetensors.torch import save_file
from test_families import PACKAGES, ROOT, why_missing

from benchmarks.exporters import vision_config
from export.contract.onnx_file import OnnxFile
from export.foreign.judge import ForeignVerdict, judge_file
from export.foreign.references import encoder_tensors
from export.graph.rewrite import Rewrites
from export.lowering.precision import lower
from export.verification.fidelity import TOLERANCES
from export.verification.rounding_simulation import AS_WRITTEN
from neck.checkpoint import load_encoder, random_encoder, save_meta_checkpoint
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck

HANG_S = 1800
"""Seconds after which a process hangs; 10 to 30 on an idle machine."""

SMALL = tiny_config(depth=2, global_blocks=(1,), embed_dim=32, d_model=16)


def judged(path: Path, encoder: Sam3DualViTDetNeck) -> ForeignVerdict:
    return judge_file(OnnxFile(path), encoder)[0]


def plain_error(path: Path, verdict: ForeignVerdict, encoder: Sam3DualViTDetNeck) -> float:
    """Largest relative L2 of a plain ONNX Runtime run against the module, of the maps that the verdict names."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 3, 112, 112)).astype(np.float32)
    session = open_onnx(path)
    only = session.get_inputs()[0]
    given = image.astype(np.float16) if only.type == "tensor(float16)" else image
    outputs = dict(zip([one.name for one in session.get_outputs()], session.run(None, {only.name: given}), strict=True))
    expected = encoder_tensors(encoder, given.astype(np.float32))
    errors = []
    for match in verdict.matches:
        want = expected[match.tensor]
        found = outputs[match.output].astype(np.float64)
        if match.layout.startswith("tokens (N, HW"):
            want = want.reshape(*want.shape[:2], -1).transpose(0, 2, 1)
        errors.append(np.linalg.norm(found - want) / np.linalg.norm(want))
    return float(max(errors))


def check(path: Path, encoder: Sam3DualViTDetNeck) -> ForeignVerdict:
    """Judges a file, and the verdict by a plain run, which does not see that of positions the largest error counts."""
    verdict = judged(path, encoder)
    agrees = plain_error(path, verdict, encoder) <= TOLERANCES[verdict.precision].relative_l2
    positions = [row.name for row in verdict.comparisons if not row.passed and row.tolerance.max_abs is not None]
    assert ([name for name in verdict.failed_names if name not in positions] == []) == agrees
    assert verdict.passed == (agrees and not positions), "\n".join(verdict.lines())
    assert verdict.passed or verdict.causes[0].kind != "unknown"
    return verdict


@functools.cache
def vision_model() -> Any:
    """transformers' own module, with random weights."""
    from transformers import Sam3VisionModel

    torch.manual_seed(0)
    return Sam3VisionModel(vision_config(SMALL)).eval()


@pytest.mark.parametrize(
    ("precision", "fusions"),
    [
        pytest.param("fp32", None, marks=pytest.mark.slow),
        pytest.param("fp32", "cpu", marks=pytest.mark.slow),
        ("fp16", None),
    ],
)
def test_transformers_exporter(precision: str, fusions: str | None, tmp_path: Path) -> None:
    """Its FP32 and FP16 files, with and without ONNX Runtime's fused operators."""
    exporters = pytest.importorskip("transformers.exporters", reason="needs transformers 5.24 or later")
    model = vision_model()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    encoder = load_encoder(tmp_path / "model.safetensors", SMALL)
    dtype = torch.float16 if precision == "fp16" else torch.float32
    image = torch.zeros(1, 3, 112, 112, dtype=dtype)
    config = exporters.OnnxConfig(ort_fusions=fusions) if fusions else exporters.OnnxConfig()
    made = exporters.OnnxExporter().export(model.to(dtype), {"pixel_values": image}, config=config)
    path = tmp_path / "encoder.onnx"
    exporters.OnnxExporter.save_program(made.program, path)
    model.float()
    verdict = check(path, encoder)
    assert verdict.precision == precision
    if precision == "fp16":  # transformers computes the angles of the positions in FP16 too: off by up to 3.3e-3
        assert {cause.kind for cause in verdict.causes} == {"rounding"}
        assert all(str(cause.output).startswith("fpn_position_encoding") for cause in verdict.causes)
        verdict = judge_file(OnnxFile(path), encoder, tolerances={"fpn_position_encoding.*": 1e-2})[0]
    assert verdict.passed, "\n".join(verdict.lines())
    assert {match.tensor for match in verdict.matches} >= {"trunk", *(f"sam3_feat_{level}" for level in range(4))}
    assert verdict.weights is not None and verdict.weights.origin == "the checkpoint's"
    if precision == "fp16" and not fusions:
        assert any("accumulates their matrix multiplications in FP16" in risk for risk in verdict.risks)


def test_a_file_that_onnx_runtime_fused(tmp_path: Path) -> None:
    """Its own operators are run and judged as they are."""
    import onnxruntime as ort

    model, path = plain_model(), tmp_path / "encoder.onnx"
    lower(model, "fp32", opset=20)
    before = write(model, tmp_path / "before.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry(*AS_WRITTEN)
    ort.InferenceSession(before, options, providers=["CPUExecutionProvider"])
    assert "com.microsoft" in {node.domain for node in onnx.load(path).graph.node}
    verdict = check(path, load_golden(CASE).encoder)
    assert verdict.passed and verdict.precision == "fp32"
    assert verdict.weights is not None and verdict.weights.origin == "the checkpoint's"


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if why := why_missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("family-exports")
    config = dataclasses.replace(SMALL, d_model=256, necks=("sam3", "sam2"), depth=4, global_blocks=(1, 3))
    save_meta_checkpoint(random_encoder(config), folder / "sam3.pt")
    (folder / "encoder.json").write_text(json.dumps(dataclasses.asdict(config)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", ["meta", "ultralytics"])
def test_plain_export_of_a_package(family: str, family_folder: Path) -> None:
    """torch.onnx.export of Meta's and Ultralytics' own modules."""
    quiet = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(family_folder)}
    paths = os.pathsep.join([str(PACKAGES), str(ROOT)])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("family_export.py"), family],
        cwd=family_folder,
        env={**os.environ, **quiet, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    encoder = load_encoder(family_folder / "sam3.pt", EncoderConfig.from_file(family_folder / "encoder.json"))
    verdict = check(family_folder / f"{family}.onnx", encoder)
    assert verdict.passed
    assert {match.tensor for match in verdict.matches} >= {f"sam2_feat_{level}" for level in range(4)}


@pytest.mark.parametrize("tool", ["onnxsim", "onnxslim"])
def test_a_simplified_file_of_ours(tool: str, tmp_path: Path) -> None:
    simplifier = pytest.importorskip(tool, reason=f"needs {tool}, which is not in the locked environment")
    before = onnx.load(write(plain_model(rewrites=Rewrites()), tmp_path / "before.onnx"))
    after = simplifier.simplify(before)[0] if tool == "onnxsim" else simplifier.slim(before)
    onnx.save(after, tmp_path / "encoder.onnx")
    assert check(tmp_path / "encoder.onnx", load_golden(CASE).encoder).passed


class Images:
    """What quantize_static calibrates on."""

    def __init__(self) -> None:
        generator = np.random.default_rng(1)
        self.images = [generator.uniform(-1, 1, (1, 3, 112, 112)).astype(np.float32) for _ in range(2)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image, None after the last."""
        return {"image": self.images.pop()} if self.images else None


@pytest.mark.parametrize("form", ["dynamic", "QDQ", "QOperator"])
def test_onnx_runtime_quantizers(form: str, tmp_path: Path) -> None:
    """Judged as they are, within INT8's tolerance; where they leave it quantization is named."""
    from onnxruntime import quantization as ort

    before, after = write(plain_model(), tmp_path / "before.onnx"), tmp_path / "encoder.onnx"
    if form == "dynamic":
        ort.quantize_dynamic(before, after, op_types_to_quantize=["MatMul"])
    else:
        ort.quantize_static(
            before,
            after,
            Images(),
            quant_format=ort.QuantFormat[form],
            op_types_to_quantize=["MatMul"],
            weight_type=ort.QuantType.QInt8,
            activation_type=ort.QuantType.QInt8,
        )
    verdict = judged(after, load_golden(CASE).encoder)
    assert verdict.precision == "int8"
    worst = max(row.relative_l2 for row in verdict.comparisons)
    assert verdict.passed == (worst <= TOLERANCES["int8"].relative_l2)
    assert verdict.passed or verdict.causes[0].kind == "rounding"
    assert verdict.weights is not None and verdict.weights.origin == "the checkpoint's"
