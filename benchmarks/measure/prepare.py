"""What the backends run on, made once and kept: weights, the picture, ONNX files, plans. It runs in a worker."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.work_folder import OUTPUTS, about_file, seconds_path
from benchmarks.options import SELECTION, selection
from export.contract.signature import BatchRange, Signature
from export.graph.rewrite import Rewrites
from export.lowering.quantise import CODES
from export.options import ExportOptions, load, sign
from export.pipeline import export_onnx, write_onnx
from export.proof.verify import reference_pixels
from export.quantising.calibration import FEWEST
from export.quantising.settle import QuantiseOptions
from export.weights_origin import encoder_config
from neck.checkpoint import save_meta_checkpoint
from neck.config import EncoderConfig
from neck.pictures import PictureFolder, ValueRange, find_pictures, normalise


def make_weights(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint that every backend maps: the user's, or random weights that are written once.

    Args:
        asked: `checkpoint`, SELECTION, `config`, `seed`, `image_size`, OUTPUTS, `batch`, `folder`.

    Returns:
        `weights`, SELECTION, `config`, `parameters`, `signature` as JSON values.
    """
    made = Path(asked["folder"]) / "weights.pt"
    if asked["checkpoint"] is None and made.is_file():
        asked = {**asked, "checkpoint": made, "config": asked["config"] or EncoderConfig().to_dict()}
    options = _options(asked, made)
    encoder = load(options).encoder
    if options.checkpoint is None:
        save_meta_checkpoint(encoder, made)
    return {
        "weights": str(options.checkpoint or made),
        **{name: asked[name] for name in SELECTION},
        "config": encoder_config(encoder).to_dict(),
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "signature": sign(options, encoder).to_dict(),
    }


def _options(asked: Mapping[str, Any], output: Path) -> ExportOptions:
    config, checkpoint, batch = asked["config"], asked["checkpoint"], asked["batch"]
    return ExportOptions(
        output,
        checkpoint=Path(checkpoint) if checkpoint else None,
        **selection(asked),
        config=EncoderConfig.from_dict(config) if config else None,
        seed=asked["seed"],
        image_size=tuple(asked["image_size"]) if asked["image_size"] else None,
        batch=BatchRange(batch, batch, batch),
        **{name: asked[name] for name in OUTPUTS},
        verify=False,
    )


def make_image(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The normalised picture of a size and batch: float32 (B, 3, H, W) as .npy.

    Args:
        asked: `signature`, `batch`, `images` (a folder or None), `picture_range` (two numbers or None), `path`.
    """
    path = Path(asked["path"])
    if not path.is_file():
        signature, images = Signature.from_dict(asked["signature"]), _pictures(asked)
        with _whole(path) as staged, staged.open("wb") as file:
            np.save(file, normalise(reference_pixels(signature, images, asked["batch"])).numpy())
    return {"path": str(path)}


def _pictures(asked: Mapping[str, Any]) -> PictureFolder | None:
    ends = asked["picture_range"]
    return PictureFolder(Path(asked["images"]), ValueRange(*ends) if ends else None) if asked["images"] else None


def make_file(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Exports the ONNX file of a backend.

    It is not verified, its row is; nor hashed, but for a plan, whose builder checks that.

    Args:
        asked: as `make_weights`, and `path`, `precision`, `module`, `runtime`, `images`, `picture_range`.

    Returns:
        As `about_file`.
    """
    path = Path(asked["path"])
    start = time.perf_counter()
    rewrites = Rewrites() if asked["module"] == "rewritten" else Rewrites.none()
    options = _options(asked, path)
    options = dataclasses.replace(options, precision=asked["precision"], rewrites=rewrites)
    if asked["precision"] in CODES:  # all products, by the benchmark's own pictures where they are enough
        images = _pictures(asked)
        enough = images is not None and len(find_pictures(images.path)) >= FEWEST
        options = dataclasses.replace(options, quantise=QuantiseOptions(("all",)), images=images if enough else None)
    if asked["runtime"] == "plan":
        export_onnx(options)  # a plan's builder wants the manifest
    else:
        encoder = load(options).encoder
        signature = sign(options, encoder)
        write_onnx(encoder, signature, path, precision=options.precision, rewrites=rewrites)
    seconds_path(path).write_text(f"{time.perf_counter() - start}\n")  # last: it says that the file is whole
    return about_file(path)


def make_plan_file(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the plan of an ONNX file, or finds the one that was built before.

    Args:
        asked: `onnx`, `path`, `flavor`.
    """
    from engines.plan import PlanOptions, make_plan

    path = Path(asked["path"])
    result = make_plan(PlanOptions(Path(asked["onnx"]), path, flavor=asked["flavor"], verify=False))
    return {"plan": str(path), "build_s": result.manifest["build_seconds"], "file_bytes": path.stat().st_size}


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file that has its name once it is whole."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield staged
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
