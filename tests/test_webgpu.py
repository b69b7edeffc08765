"""ONNX Runtime's WebGPU provider on a software GPU: what the target's row says is what runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Save, load_golden, open_onnx, traced
from numpy.typing import NDArray

from export.contract.targets import find_targets
from export.lowering.precision import lower
from export.lowering.resolve_target import resolve_target
from export.verification.target_check import graph_needs, why_not

SWIFTSHADER = Path("/usr/lib/chromium")
PYTHON = os.environ.get("WEBGPU_PYTHON", sys.executable)
TOLERANCE = 1e-5
"""Relative L2 in FP32; 1.3e-6 was seen."""

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _webgpu() -> None:
    icd = SWIFTSHADER / "vk_swiftshader_icd.json"
    there = subprocess.run([PYTHON, "-c", "import onnxruntime_ep_webgpu"], capture_output=True, check=False)
    if not icd.is_file() or there.returncode:
        pytest.skip(
            "needs SwiftShader (apt-get install chromium-common) and WEBGPU_PYTHON=PYTHON, an environment with "
            "`pip install onnxruntime==1.31.1 onnxruntime-ep-webgpu==0.4.0`"
        )


def run(file: Path, image: NDArray[Any], folder: Path) -> tuple[dict[str, dict[str, int]], dict[str, NDArray[Any]]]:
    """Nodes by provider and operator, and the outputs."""
    np.save(folder / "image.npy", image)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(SWIFTSHADER),
        "VK_ICD_FILENAMES": str(SWIFTSHADER / "vk_swiftshader_icd.json"),
        "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": "1",
    }
    script = Path(__file__).with_name("webgpu_run.py")
    command = [PYTHON, str(script), str(file), str(folder / "image.npy"), str(folder / "outputs.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), dict(np.load(folder / "outputs.npz"))


def written(save: Save, case: str = "meta-dual", opset: int | None = None, **asked: Any) -> tuple[Path, Any]:
    """A small FP32 file as the target has it, or at another opset."""
    golden = load_golden(case)
    model = traced(golden.encoder, golden.config, **{"necks": "sam3", **asked}).model
    form = resolve_target(find_targets("onnxruntime-webgpu"), "fp32")
    lower(model, "fp32", attention=form.attention, spelling=form.spelling, opset=opset or form.opset)
    return save(model), graph_needs(model)


def pixels(file: Path) -> NDArray[Any]:
    wanted = open_onnx(file).get_inputs()[0]
    shape = [side if isinstance(side, int) else 1 for side in wanted.shape]
    generator = np.random.default_rng(0)
    if "float" in wanted.type:
        return generator.normal(size=shape).astype(np.float32)
    return generator.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("meta-dual", {}),
        ("meta-dual", {"positions": "none"}),
        ("meta-dual", {"input_kind": "uint8"}),
        ("meta-dual", {"batch": "1:2:4", "positions": "none"}),
        ("meta-padded", {}),
    ],
    ids=["default", "no positions", "uint8", "dynamic batch", "padded windows"],
)
def test_every_form_of_the_target_runs_whole_and_exact(
    case: str, asked: dict[str, Any], save: Save, tmp_path: Path
) -> None:
    file, needs = written(save, case, **asked)
    (target,) = find_targets("onnxruntime-webgpu")
    assert why_not(target, needs) is None
    image = pixels(file)
    nodes, found = run(file, image, tmp_path)
    assert set(nodes) == {"WebGpuExecutionProvider"}
    session = open_onnx(file)  # FP32 on the CPU, one thread
    names = [output.name for output in session.get_outputs()]
    for name, expected in zip(names, session.run(names, {"image": image}), strict=True):
        wanted, got = expected.astype(np.float64), found[name].astype(np.float64)
        assert np.linalg.norm(got - wanted) <= TOLERANCE * np.linalg.norm(wanted), name
        assert np.linalg.norm(got * 1.0001 - wanted) > TOLERANCE * np.linalg.norm(wanted)  # the control


@pytest.mark.parametrize(
    ("asked", "left"),
    [({"opset": 22}, {"ConvTranspose", "MaxPool"}), ({"batch": "1:2:4"}, {"Concat"})],
    ids=["opset 22", "shapes at run time"],
)
def test_what_the_row_refuses_leaves_the_gpu(asked: dict[str, Any], left: set[str], save: Save, tmp_path: Path) -> None:
    """ONNX Runtime computes it on the CPU in silence."""
    file, needs = written(save, **asked)
    (target,) = find_targets("onnxruntime-webgpu")
    assert why_not(target, needs)
    nodes, _ = run(file, pixels(file), tmp_path)
    assert left <= set(nodes["CPUExecutionProvider"])
