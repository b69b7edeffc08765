"""What an FP8 or INT8 export quantizes and how: calibration, ranges, choice; told in full in the manifest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from export.contract.errors import ExportError
from export.contract.options import QuantizeOptions
from export.contract.signature import Signature
from export.lowering.quantize import CODES, Kind, Quantization, UnquantizableError, match_products
from export.quantization.calibration import (
    Calibration,
    OutdatedError,
    calibrate,
    calibration_pixels,
    linear_layers,
    read_calibration,
    save_calibration,
    weights_digest,
)
from export.quantization.choice import (
    PROXY,
    Choice,
    Record,
    budget_overrides,
    choose,
    choose_all,
    measure_products,
    unmeasured,
    within,
)
from export.quantization.ranges import Range, choose_range, clipping_note, unpack_move
from export.quantization.rates import product_rates
from export.quantization.trials import Trials, at_size
from export.verification.fidelity import TOLERANCES, Comparison
from export.verification.verify import References, Report, reference_pixels
from export.weights_origin import encoder_config
from neck.images import ImageFolder
from neck.necks import Sam3DualViTDetNeck

AUTO = "auto"

RECORD_FORMAT = 2
"""Version of the record of trials, part of its key."""


def record_path(calibration: Path, kind: str) -> Path:
    """Where the record of trials lies: X.safetensors -> X.fp8.json."""
    return calibration.with_suffix(f".{kind}.json")


class QuantizationPlan(NamedTuple):
    """What is quantized, and what the manifest says of it."""

    quantization: Quantization
    facts: dict[str, Any]


def check_quantize(options: QuantizeOptions, precision: str) -> None:
    """Refuses options that no export can have.

    Raises:
        ExportError: saying which.
    """
    if precision not in CODES:
        if options != QuantizeOptions():
            raise ExportError(
                f"--quantize, --budget and --calibration need --precision fp8 or int8, but --precision is {precision}"
            )
        return
    if options.budget is not None and not 0 < options.budget < 1:
        raise ExportError(f"--budget {options.budget:g} is invalid; expected a relative L2 between 0 and 1")
    path = options.calibration
    if path is not None and (path.suffix != ".safetensors" or path.is_dir()):
        raise ExportError(f"--calibration {path}: the file name must end in .safetensors")


def budget_tolerances(
    options: QuantizeOptions, tolerances: Mapping[str, float], signature: Signature | None
) -> dict[str, float]:
    """The overrides of the tolerances with what a budget means for the features; those that were asked come last."""
    return budget_overrides(options.budget, signature.features if signature else ()) | dict(tolerances)


def manifest_tolerances(manifest: Mapping[str, Any], tolerances: Mapping[str, float] | None) -> dict[str, float]:
    """The same for a file that is there: its export's budget, where one was given."""
    budget = (manifest.get("quantization") or {}).get("budget")
    features = Signature.from_dict(manifest["signature"]).features if budget is not None else ()
    return budget_overrides(budget, features) | dict(tolerances or {})


def all_tolerances(
    manifest: Mapping[str, Any] | None,
    options: QuantizeOptions,
    tolerances: Mapping[str, float],
    signature: Signature | None,
) -> dict[str, float]:
    """Those of a plan: the budget of its file or of its own products, then those that were asked."""
    return manifest_tolerances(manifest or {}, budget_tolerances(options, tolerances, signature))


def select_quantization(
    references: References,
    signature: Signature,
    kind: Kind,
    options: QuantizeOptions,
    notes: list[str],
    kept: Collection[str] = (),
) -> QuantizationPlan:
    """Calibrates, or reads a calibration, and chooses products and ranges.

    Args:
        references: of the plain encoder; their images are those to calibrate on where no calibration is there.
        signature: of the export.
        kind: fp8 or int8.
        options: what is asked.
        notes: takes what the user must know.
        kept: products that stay in FP32 (`--keep-fp32`): they are neither quantized nor take part in the choice.

    Raises:
        CalibrationError, ImageError, ExportError: images, a calibration or patterns that do not serve; no product
            that is left.
    """
    encoder, images, report = references.encoder, references.images, references.report
    layers = linear_layers(encoder)
    patterns = options.products or (AUTO,)
    asked = match_products([one for one in patterns if one != AUTO] or ["all"], layers)
    names = [name for name in asked if name not in kept]
    if not names:
        raise ExportError(
            f"--keep-fp32 keeps all {len(asked)} linear layers in FP32, so nothing is left to quantize to {kind}"
        )
    calibration = _calibration(encoder, signature, options, images, notes, report)
    report(f"computing the ranges of {len(names)} linear layers")
    ranges, left_out = _ranges({name: layers[name] for name in names}, calibration, kind)
    notes += [f"{name} is not quantized: {reason}" for name, reason in left_out.items()]
    if not ranges:
        raise ExportError(f"--precision {kind}: no linear layer can be quantized; {next(iter(left_out.values()))}")
    curve: tuple[dict[str, Any], ...] = ()
    if AUTO in patterns:
        choice = _chosen(references, signature, kind, options, ranges, notes)
        ranges, curve = {name: ranges[name] for name in names if name in choice.names}, choice.curve
    if note := clipping_note(ranges, kind):
        notes.append(note)
    facts = {
        "kind": kind,
        "asked": list(patterns),
        "budget": _budget(options, kind),
        "image_count": calibration.images,
        "calibration": str(options.calibration) if options.calibration else None,
        "images": str(ImageFolder.of(images).path) if images is not None else None,
        "of": len(layers),
        "left_out": left_out,
        "curve": list(curve),
        "rates": product_rates(kind).source if curve else None,
        "products": {name: one.to_dict() for name, one in ranges.items()},
    }
    return QuantizationPlan(quantization_of(kind, ranges), facts)


def _ranges(
    layers: Mapping[str, nn.Linear], calibration: Calibration, kind: Kind
) -> tuple[dict[str, Range], dict[str, str]]:
    """The range of each product, and why some have none."""
    ranges, left_out = dict[str, Range](), dict[str, str]()
    for name, layer in layers.items():
        try:
            ranges[name] = choose_range(name, calibration.layers[name], layer.weight.detach(), kind)
        except UnquantizableError as error:
            left_out[name] = str(error)
    return ranges, left_out


def _budget(options: QuantizeOptions, kind: Kind) -> float:
    return options.budget if options.budget is not None else TOLERANCES[kind].relative_l2


def _chosen(
    references: References,
    signature: Signature,
    kind: Kind,
    options: QuantizeOptions,
    ranges: Mapping[str, Range],
    notes: list[str],
) -> Choice:
    """Tries all products at the export's own size, then each alone at a small one, then sets at the export's own."""
    encoder, report = references.encoder, references.report
    config = dataclasses.replace(encoder_config(encoder), image_size=signature.image_size)
    found, patch = quantization_of(kind, ranges), config.patch_size
    layers = {name: layer for name, layer in linear_layers(encoder).items() if name in ranges}
    small, budget = at_size(signature, PROXY, patch), _budget(options, kind)
    pixels = [reference_pixels(size, references.images, 1) for size in (small, signature)]
    key = {
        "format": RECORD_FORMAT,
        "kind": kind,
        "encoder": weights_digest(encoder, repr(config)),
        "images": [[image.shape, hashlib.sha256(image.tobytes()).hexdigest()] for image in pixels],
        "outputs": signature.features,
        "ranges": {name: {key: one.to_dict()[key] for key in ("scale", "move")} for name, one in ranges.items()},
    }
    record = Record(record_path(options.calibration, kind) if options.calibration else None, key)
    if record.outdated:
        notes.append(record.outdated)
        report(record.outdated)

    @functools.cache
    def trials(size: Signature) -> Trials:
        return Trials(references, size, found)

    def run(names: Sequence[str]) -> list[Comparison]:
        return record.figures(f"together: {' '.join(sorted(names))}", lambda: trials(signature).run(*names))

    products = unmeasured(layers, math.prod(side // patch for side in signature.image_size))
    report(f"trial: quantizing all {len(products)} linear layers")
    if within(rows := run(list(layers)), budget, kind):
        return choose_all(products, rows, kind)
    products = measure_products(products, lambda name: trials(small).run(name), record)
    return choose(products, budget, run, kind, report)


def manifest_quantization(manifest: Mapping[str, Any]) -> Quantization | None:
    """What a file quantizes, by its manifest; None for one that does not."""
    facts = manifest.get("quantization")
    if not facts:
        return None
    scales = {name: one["scale"] for name, one in facts["products"].items()}
    moves = {name: unpack_move(one["move"]) for name, one in facts["products"].items() if one["move"]}
    return Quantization(facts["kind"], scales, moves)


def quantization_of(kind: Kind, ranges: Mapping[str, Range]) -> Quantization:
    """What ranges mean for the graph."""
    scales = {name: one.scale for name, one in ranges.items()}
    return Quantization(kind, scales, {name: one.move for name, one in ranges.items() if one.move is not None})


def _calibration(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    options: QuantizeOptions,
    images: Path | ImageFolder | None,
    notes: list[str],
    report: Report,
) -> Calibration:
    if options.calibration is not None and options.calibration.exists():
        report(f"reading the calibration {options.calibration}")
        try:
            return read_calibration(options.calibration, encoder, signature.image_size)
        except OutdatedError as error:
            notes.append(f"{error}; the calibration was made again")
            report(f"{error}; calibrating again")
    found = calibrate(encoder.at_size(signature.image_size), calibration_pixels(signature, images, notes))
    if options.calibration is not None:
        save_calibration(options.calibration, found)
    return found
