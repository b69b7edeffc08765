"""What the backends run on, made once and kept: weights, the image, ONNX files, plans. It runs in a worker."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.backends import RunRequest
from benchmarks.measure.work_folder import Prepared, about_file, seconds_path
from benchmarks.options import BenchOptions
from export.contract.atomic import replacing
from export.contract.options import ExportOptions, QuantizeOptions, Rewrites
from export.contract.signature import BatchRange, Signature
from export.lowering.codes import CODES
from export.options import load, sign
from export.pipeline import export_onnx, write_onnx
from export.quantization.calibration import FEWEST
from export.verification.verify import reference_pixels
from export.weights_origin import encoder_config
from neck.checkpoint import save_meta_checkpoint
from neck.config import EncoderConfig
from neck.images import ImageFolder, find_images, normalize

SHARED = {field.name for field in dataclasses.fields(ExportOptions)} & {
    field.name for field in dataclasses.fields(BenchOptions)
}
"""What both are asked for by the same names."""


def make_weights(asked: BenchOptions, folder: Path) -> Prepared:
    """The checkpoint that every backend maps: the user's, or random weights that are written once.

    Args:
        asked: the encoder, at its own size.
        folder: for random weights.
    """
    made = folder / "weights.pt"
    if asked.checkpoint is None and made.is_file():
        asked = dataclasses.replace(asked, checkpoint=made, config=asked.config or EncoderConfig())
    options = _options(dataclasses.replace(asked, image_size=None, batch=1), made)
    encoder = load(options).encoder
    if options.checkpoint is None:
        save_meta_checkpoint(encoder, made)
    config = encoder_config(encoder)
    mapped = dataclasses.replace(asked, checkpoint=asked.checkpoint or made, config=config)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    return Prepared(mapped, config, count, sign(options, encoder))


def _options(asked: BenchOptions, output: Path, **changes: Any) -> ExportOptions:
    values = {name: getattr(asked, name) for name in SHARED - {"images"}}
    values |= {"output": output, "batch": BatchRange(asked.batch, asked.batch, asked.batch), "verify": False}
    return ExportOptions(**{**values, **changes})


def make_image(asked: BenchOptions, signature: Signature, path: Path) -> None:
    """The normalized image of a size and batch: float32 (B, 3, H, W) as .npy."""
    images = ImageFolder.of(asked.images) if asked.images else None
    with replacing(path) as staged, staged.open("wb") as file:
        np.save(file, normalize(reference_pixels(signature, images, signature.batch.optimum)).numpy())


def make_file(job: RunRequest, path: Path) -> dict[str, Any]:
    """Exports the ONNX file of a backend.

    It is not verified, its row is; nor hashed, but for a plan, whose builder checks that.

    Returns:
        As `about_file`.
    """
    start = time.perf_counter()
    backend, rewrites = job.backend, Rewrites() if job.backend.module == "rewritten" else Rewrites.none()
    asked = dataclasses.replace(job.encoder, image_size=job.config.image_size, batch=job.signature.batch.optimum)
    options = _options(asked, path, precision=backend.precision, rewrites=rewrites)
    if backend.precision in CODES:  # all products, by the benchmark's own images where they are enough
        images = ImageFolder.of(asked.images) if asked.images else None
        enough = images is not None and len(find_images(images.path)) >= FEWEST
        options = dataclasses.replace(options, quantize=QuantizeOptions(("all",)), images=images if enough else None)
    if backend.runtime == "plan":
        export_onnx(options)  # a plan's builder wants the manifest
    else:
        encoder = load(options).encoder
        write_onnx(encoder, sign(options, encoder), path, precision=options.precision, rewrites=rewrites)
    seconds_path(path).write_text(f"{time.perf_counter() - start}\n")  # last: it says that the file is whole
    return about_file(path)


def make_plan(onnx: Path, path: Path, flavor: str) -> dict[str, Any]:
    """Builds the plan of an ONNX file, or finds the one that was built before."""
    from engines.builder.options import PlanOptions
    from engines.plan import make_plan as build

    result = build(PlanOptions(onnx, path, flavor=flavor, verify=False))  # type: ignore[arg-type]
    return {"plan": path, "build_s": result.manifest["build_seconds"], "file_bytes": path.stat().st_size}
