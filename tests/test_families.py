"""A file inside the SAM 3 of Meta's and of Ultralytics' own packages, from .families, each in a process of its own."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from export.contract.options import ExportOptions
from export.pipeline import export_onnx
from neck.checkpoint import random_encoder, save_meta_checkpoint

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".families"
TOLERANCE = 1e-4
"""Of an output's largest value; found are up to 3e-6."""
HANG_S = 1800
"""Seconds after which a process hangs; 10 to 30 on an idle machine."""

CONFIG = tiny_config(embed_dim=32, d_model=256, necks=("sam3", "sam2"))
"""As family_models.py makes the trunk; d_model 256 is written into both packages."""

SNIPPETS = {"meta": ("meta-image", "meta-video"), "ultralytics": ("ultralytics-image", "ultralytics-video")}
"""In the order of docs/attach.md, after the two of transformers."""
MODELS = {"meta": ("image", "video"), "ultralytics": ("image", "interactive")}
BOTH_NECKS = [
    *(f".backbone_fpn.{level}" for level in range(3)),
    *(f".sam2_backbone_out.backbone_fpn.{level}" for level in range(3)),
    ".sam2_backbone_out.vision_features",
    *(f".sam2_backbone_out.vision_pos_enc.{level}" for level in range(3)),
    ".vision_features",
    *(f".vision_pos_enc.{level}" for level in range(3)),
]
"""What both backbones hand out; the level that they drop is not among it."""


def why_missing() -> str | None:
    """Why the packages are not here, or None."""
    if (PACKAGES / "ready").is_file():
        return None
    why = PACKAGES / "why"
    return why.read_text().strip() if why.is_file() else "needs packages with SAM 3; run `make .families/ready`"


def write_inputs(folder: Path) -> None:
    """Weights, their file and another's, images, and the snippets of the docs."""
    (folder / "build").mkdir()
    for seed, name in ((1, "other"), (0, "sam3-encoder")):
        checkpoint = folder / "sam3.pt"
        save_meta_checkpoint(random_encoder(CONFIG, seed), checkpoint)
        output = folder / "build" / f"{name}.onnx"
        export_onnx(ExportOptions(output, checkpoint, config=CONFIG, necks="both", verify=False))
    (folder / "frames").mkdir()
    for name in ("image.png", "frames/0.png", "frames/1.png", "frames/2.png"):
        shutil.copy(Path(__file__).parent / "data" / "preprocess" / "image_0.png", folder / name)
    text = (ROOT / "docs" / "attach.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[2:]
    names = [name for family in SNIPPETS.values() for name in family]
    for name, snippet in zip(names, found, strict=True):
        (folder / f"{name}.py").write_text(snippet, encoding="utf-8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the packages run."""
    if why := why_missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("families")
    write_inputs(folder)
    return folder


@functools.cache
def ran(family: str, inputs: Path) -> dict[str, Any]:
    """Runs one package, in a copy of the folder."""
    folder = inputs.with_name(family)
    shutil.copytree(inputs, folder)
    quiet = {"TORCHDYNAMO_DISABLE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    paths = os.pathsep.join([str(PACKAGES), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("family_models.py"),
            family,
            *(f"{one}.py" for one in SNIPPETS[family]),
        ],
        cwd=folder,
        env={**os.environ, **quiet, "YOLO_CONFIG_DIR": str(folder), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.parametrize(("family", "model"), [(name, model) for name, models in MODELS.items() for model in models])
def test_what_the_model_reads_of_its_backbone(family: str, model: str, inputs: Path) -> None:
    """Both necks' features and positions; to the bit after detach; another file's are far off."""
    found = ran(family, inputs)[model]
    if model == "interactive":  # the tracker's neck alone, behind conv_s0 and conv_s1
        assert found["outputs"] == [name for name in BOTH_NECKS if not name.startswith(".sam2")]
    else:
        assert found["outputs"] == BOTH_NECKS
    assert found["error"] < TOLERANCE
    assert found["same_after"]
    assert found["other"] > 0.1


@pytest.mark.parametrize(("family", "model"), [("meta", "Sam3Image"), ("ultralytics", "SAM3SemanticModel")])
def test_masks_of_a_checkpoint(family: str, model: str, inputs: Path) -> None:
    """`neck-export masks --model sam3.pt` in FP32: by texts, by boxes, and the other seed's file fails the gate."""
    found = ran(family, inputs)["judged"]
    for asked, images in (("same", 3), ("boxes", 1)):
        told = found[asked]
        assert told["passed"] and told["mean_iou"] == 1 and told["images"] == images and told["objects"] >= images
        assert told["method"].startswith(
            f"{model} of {'sam3' if family == 'meta' else family} on cpu: masks from the model's own encoder"
        )
    assert not found["other"]["passed"] and found["other"]["below_gate"]
    points, part, image = found["refused"]
    assert points.startswith("sam3.pt: ") and "for --points, set --model to a" in points
    assert part.startswith("encoder.pt: ") and part.endswith("the whole SAM 3 model")
    assert "cannot load the checkpoint" in image and not any("\n" in line for line in found["refused"])


@pytest.mark.parametrize("snippet", [name for names in SNIPPETS.values() for name in names])
def test_the_snippets_of_the_docs(snippet: str, inputs: Path) -> None:
    """docs/attach.md, as it stands but for the images' size: three objects or more, three frames."""
    masks = ran(snippet.partition("-")[0], inputs)[snippet]
    assert len(masks) == 3
    assert all(shape[-2:] == masks[0][-2:] and 0 not in shape for shape in masks)
