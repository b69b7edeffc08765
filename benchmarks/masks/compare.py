"""Runs a whole SAM 3 twice, with its own encoder and with a file in its place, and compares what users see."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.masks.checkpoint_models import load_checkpoint_segmenter
from benchmarks.masks.drawing import save_images
from benchmarks.masks.objects import Objects, differ, figures
from benchmarks.masks.options import MasksOptions
from benchmarks.masks.transformers_models import Segment, load_segmenter
from engines.attach import attach, detach
from engines.builder.plan_kind import is_plan
from export.contract.manifest import manifest_path, read_manifest, record_in_manifest, seen
from export.verification.verify import SIMULATED
from export.weights_origin import manifest_signature
from neck.images import ImageFolder, find_images, load_images


def compare_masks(
    options: MasksOptions, report: Callable[[str], None] = lambda line: None, notes: list[str] | None = None
) -> dict[str, Any]:
    """Compares, stores the figures in the file's manifest, and returns them; `notes` says if it is not writable.

    Raises:
        MasksError: the model, or prompts that it does not take.
        AttachError, EncoderError, ManifestError, SessionError, RuntimeFileError: the file cannot be used with it.
        ImageError: images that cannot be read.
    """
    where, plan = manifest_path(options.file), is_plan(options.file)
    manifest = read_manifest(where, "plan" if plan else "onnx")
    folder = ImageFolder.of(options.images)
    paths, size = find_images(folder.path), manifest_signature(where, manifest).image_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report(f"loading the SAM 3 model {options.model}")
    asked = (options.model, options.prompts, device, options.threshold)
    model, segment = load_checkpoint_segmenter(*asked, size) if options.model.is_file() else load_segmenter(*asked)
    simulated = device == "cpu" and not plan and manifest.get("precision") != "fp32"

    def images() -> Any:
        return (load_images([path], size, folder.value_range)[0] for path in paths)

    own, other = run_twice(model, segment, options.file, images, options.check, simulated, report)
    names = options.prompts.names
    found = [
        differ(path.name, name, one, two)
        for path, mine, theirs in zip(paths, own, other, strict=True)
        for name, one, two in zip(names, mine, theirs, strict=True)
    ]
    whole = f"{type(model).__name__} of {type(model).__module__.partition('.')[0]} on {device}"
    method = (
        f"{whole}: masks from the model's own encoder compared with masks from the exported encoder; score threshold "
        f"{options.threshold:g}"
    )
    values = figures(found, options.gate) | {
        "method": f"{method}; {SIMULATED}" if simulated else method,
        "model": str(options.model),
        "prompts": names,
        "files": seen(where.with_name(entry["name"]) for entry in manifest["files"]),
    }
    record_in_manifest(where, manifest | {"masks": values}, [] if notes is None else notes)
    if options.save is not None:
        save_images(options.save, paths, images(), own, other)
    return values


def run_twice(
    model: nn.Module,
    segment: Segment,
    file: Path,
    images: Callable[[], Any],
    check: bool = True,
    simulated: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[list[list[Objects]], list[list[Objects]]]:
    """The objects of every image with the model's own encoder and with the file; the model is restored.

    Any package's model can be compared so.

    Args:
        model: SAM 3, as attach takes it.
        segment: asks the model for the objects of an image.
        file: the file.
        images: gives the images anew, each RGB (H, W, 3) at the file's size.
        check, simulated: as in attach.
        report: told of every step.
    """
    encoder = attach(model, file, check=check, simulated=simulated)  # first: what does not fit is told at once
    try:
        report(f"finding objects with the exported encoder {file.name}")
        other = [segment(pixels) for pixels in images()]
    finally:
        detach(model)
    del encoder
    report("finding objects with the model's own encoder")
    return [segment(pixels) for pixels in images()], other
