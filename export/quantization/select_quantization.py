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
from export.lowering.codes import CODES, AttentionScales, Kind
from export.lowering.quantize import RESULT, Quantization, UnquantizableError, match_products
from export.quantization.calibration import (
    PARTS,
    Calibration,
    CalibrationError,
    OutdatedError,
    attention_layers,
    calibrate,
    calibration_pixels,
    linear_layers,
    read_calibration,
    result_layers,
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
    unmeasured_attentions,
    unmeasured_results,
    within,
)
from export.quantization.choose_ranges import Range, choose_range, choose_value_range, clipping_note, unpack_move
from export.quantization.rates import product_rates
from export.quantization.trials import Trials, at_size
from export.verification.fidelity import TOLERANCES, Comparison
from export.verification.verify import References, Report, reference_pixels
from export.weights_origin import encoder_config
from neck.images import ImageFolder
from neck.necks import Sam3DualViTDetNeck

AUTO = "auto"
ATTENTION = ".attention"
"""What the name of every attention ends with."""

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
                "--quantize, --budget and --calibration require --precision fp8 or int8, but --precision is "
                f"{precision}; leave out these options, or change --precision"
            )
        return
    if options.budget is not None and not 0 < options.budget < 1:
        raise ExportError(
            f"--budget {options.budget:g} is invalid; the budget is a relative L2 error, a number between 0 and 1"
        )
    path = options.calibration
    if path is not None and (path.suffix != ".safetensors" or path.is_dir()):
        raise ExportError(f"--calibration {path}: the name of a calibration file must end in .safetensors")


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
    no_attention: str | None = None,
) -> QuantizationPlan:
    """Calibrates, or reads a calibration, and chooses products and ranges.

    Args:
        references: of the plain encoder; their images are those to calibrate on where no calibration is there.
        signature: of the export.
        kind: fp8 or int8.
        options: what is asked.
        notes: takes what the user must know.
        kept: products and attentions that stay in FP32 (`--keep-fp32`): they are neither quantized nor candidates.
        no_attention: why the file's targets cannot have FP8 attention; None if they can.

    Raises:
        CalibrationError, ImageError, ExportError: images, a calibration or patterns that do not serve; no product
            that is left.
    """
    encoder, images, report = references.encoder, references.images, references.report
    layers, attentions = linear_layers(encoder), attention_layers(encoder)
    patterns = options.products or (AUTO,)
    candidates = [*layers, *attentions, *(f"{name}{RESULT}" for name in result_layers(encoder))]
    asked = _asked([one for one in patterns if one != AUTO] or ["all"], candidates, len(layers), kind, no_attention)
    names = [name for name in asked if name not in kept]
    if not names:
        raise ExportError(
            f"--keep-fp32 keeps all {len(asked)} linear layers in FP32, so no layer is left to quantize to "
            f"{kind}; keep fewer layers, or use another --precision"
        )
    calibration = _calibration(encoder, signature, options, images, notes, report)
    if any(name in attentions for name in names) and not calibration.attentions:
        names = _without_attentions(names, options, patterns, notes)
    report(f"computing the quantization ranges of {len(names)} layers")
    ranges, left_out = _ranges(names, layers, calibration, kind)
    notes += [f"{name} is not quantized and stays in FP16: {reason}" for name, reason in left_out.items()]
    if not ranges:
        raise ExportError(
            f"--precision {kind}: no linear layer can be quantized; use other calibration images (--images) or another "
            f"--precision. The reason for the first layer: {next(iter(left_out.values()))}"
        )
    if no_attention and kind == "fp8" and attentions:
        notes.append(f"attention is not quantized and stays in FP16: {no_attention}")
    curve: tuple[dict[str, Any], ...] = ()
    if AUTO in patterns:
        choice = _chosen(references, signature, kind, options, ranges, notes)
        ranges, curve = ranges.only(choice.names), choice.curve
    if ranges.products and (note := clipping_note(ranges.products, kind)):
        notes.append(note)
    facts = {
        "kind": kind,
        "asked": list(patterns),
        "budget": _budget(options, kind),
        "image_count": calibration.images,
        "calibration": str(options.calibration) if options.calibration else None,
        "images": str(ImageFolder.of(images).path) if images is not None else None,
        "of": len(layers),
        "of_attentions": len(attentions),
        "left_out": left_out,
        "curve": list(curve),
        "rates": product_rates(kind).source if curve else None,
        **ranges.to_dict(),
    }
    return QuantizationPlan(quantization_of(kind, ranges), facts)


def _asked(
    patterns: Sequence[str], candidates: Sequence[str], products: int, kind: Kind, no_attention: str | None
) -> list[str]:
    """What patterns name; attentions and results are candidates of FP8 alone.

    Args:
        patterns: without `auto`.
        candidates: products, then attentions and results.
        products: how many of them are products.
        kind: fp8 or int8.
        no_attention: why attentions cannot be quantized for the file's targets; None if they can.

    Raises:
        ExportError: a pattern that names nothing, or only what the kind or a target does not have.
    """
    able = candidates if kind == "fp8" else candidates[:products]
    able = [name for name in able if not (no_attention and name.endswith(ATTENTION))]
    for pattern in patterns:
        everywhere = match_products([pattern], candidates)
        if not set(everywhere) & set(able):
            if kind != "fp8":
                raise ExportError(
                    f"--quantize {pattern!r} matches no linear layer, but --precision {kind} can quantize only linear "
                    "layers. The pattern matches attention layers or output tensors, which require --precision fp8. "
                    "Use --precision fp8, or a --quantize pattern that matches a linear layer"
                )
            raise ExportError(
                f"--quantize {pattern!r} matches only attention layers, which cannot be quantized here: "
                f"{no_attention}; leave out the pattern, or choose another --target or --attention"
            )
    return match_products(patterns, able)


def _without_attentions(
    names: Sequence[str], options: QuantizeOptions, patterns: Sequence[str], notes: list[str]
) -> list[str]:
    """The products among names, for a calibration file of an older version.

    Raises:
        CalibrationError: attentions were asked for by name.
    """
    what = (
        f"{options.calibration}: the calibration was written by an older version of neck-export and contains no "
        "values for attention"
    )
    fix = "delete the file and repeat the command with --images to calibrate again"
    if not set(patterns) <= {AUTO, "all"}:
        raise CalibrationError(
            f"{what}. To quantize attention, {fix}. To leave attention in FP16, remove the patterns that match "
            "attention layers from --quantize"
        )
    notes.append(f"{what}, so attention is not quantized; {fix}")
    return [name for name in names if not name.endswith((ATTENTION, RESULT))]


@dataclasses.dataclass(frozen=True)
class Ranges:
    """The ranges of products by path, of attentions by name and part, and of results by the product's path."""

    products: dict[str, Range] = dataclasses.field(default_factory=dict)
    attentions: dict[str, dict[str, Range]] = dataclasses.field(default_factory=dict)
    results: dict[str, Range] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.products or self.attentions)

    def only(self, names: Collection[str]) -> Ranges:
        """Those of some names; results of products that are among them."""
        return Ranges(
            {name: one for name, one in self.products.items() if name in names},
            {name: one for name, one in self.attentions.items() if name in names},
            {name: one for name, one in self.results.items() if f"{name}{RESULT}" in names and name in names},
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, for a manifest."""
        attentions = {
            name: {part: one.to_dict() for part, one in parts.items()} for name, parts in self.attentions.items()
        }
        flat = {"products": self.products, "results": self.results}
        return {key: {name: one.to_dict() for name, one in held.items()} for key, held in flat.items()} | {
            "attentions": attentions
        }


def _ranges(
    names: Sequence[str], layers: Mapping[str, nn.Linear], calibration: Calibration, kind: Kind
) -> tuple[Ranges, dict[str, str]]:
    """The range of everything that is named, and why something has none."""
    found, left_out = Ranges(), dict[str, str]()
    for name in names:
        try:
            if name in layers:
                weight = layers[name].weight.detach()
                found.products[name] = choose_range(name, calibration.layers[name], weight, kind)
            elif name.endswith(RESULT):
                owner = name.removesuffix(RESULT)
                if owner in found.products:
                    found.results[owner] = choose_value_range(
                        f"the output of the layer {owner}", calibration.results[owner], kind, clip=True
                    )
            else:
                kept = {part: calibration.attentions[f"{name}.{part}"] for part in PARTS}
                found.attentions[name] = {
                    part: choose_value_range(f"the {part} of the attention layer {name}", layer, kind, clip=False)
                    for part, layer in kept.items()
                }
        except UnquantizableError as error:
            left_out[name] = str(error)
    return found, left_out


def _budget(options: QuantizeOptions, kind: Kind) -> float:
    return options.budget if options.budget is not None else TOLERANCES[kind].relative_l2


def _chosen(
    references: References,
    signature: Signature,
    kind: Kind,
    options: QuantizeOptions,
    ranges: Ranges,
    notes: list[str],
) -> Choice:
    """Tries all products at the export's own size, then each alone at a small one, then sets at the export's own."""
    encoder, report = references.encoder, references.report
    config = dataclasses.replace(encoder_config(encoder), image_size=signature.image_size)
    found, patch = quantization_of(kind, ranges), config.patch_size
    layers = {name: layer for name, layer in linear_layers(encoder).items() if name in ranges.products}
    results = {name: layer for name, layer in layers.items() if name in ranges.results}
    small, budget = at_size(signature, PROXY, patch), _budget(options, kind)
    pixels = [reference_pixels(size, references.images, 1) for size in (small, signature)]
    key = {
        "format": RECORD_FORMAT,
        "kind": kind,
        "encoder": weights_digest(encoder, repr(config)),
        "images": [[image.shape, hashlib.sha256(image.tobytes()).hexdigest()] for image in pixels],
        "outputs": signature.features,
        "ranges": _record_ranges(ranges),
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

    tokens = math.prod(side // patch for side in signature.image_size)
    products = unmeasured(layers, tokens) + unmeasured_attentions(config, list(ranges.attentions))
    products += unmeasured_results(results, tokens)
    report(f"trial: quantizing all {len(products)} linear layers")
    if within(rows := run([one.name for one in products]), budget, kind):
        return choose_all(products, rows, kind)
    products = measure_products(products, lambda name: trials(small).run(name), record)
    return choose(products, budget, run, kind, report)


def _record_ranges(ranges: Ranges) -> dict[str, Any]:
    """What the trials' figures depend on of the ranges."""
    found: dict[str, Any] = {
        name: {key: one.to_dict()[key] for key in ("scale", "move")} for name, one in ranges.products.items()
    }
    found |= {name: {part: one.scale for part, one in parts.items()} for name, parts in ranges.attentions.items()}
    return found | {f"{name}{RESULT}": one.scale for name, one in ranges.results.items()}


def manifest_quantization(manifest: Mapping[str, Any]) -> Quantization | None:
    """What a file quantizes, by its manifest; None for one that does not."""
    facts = manifest.get("quantization")
    if not facts:
        return None
    scales = {name: one["scale"] for name, one in facts["products"].items()}
    moves = {name: unpack_move(one["move"]) for name, one in facts["products"].items() if one["move"]}
    attentions = {
        name: AttentionScales(**{part: one["scale"] for part, one in parts.items()})
        for name, parts in facts.get("attentions", {}).items()
    }
    results = {name: one["scale"] for name, one in facts.get("results", {}).items()}
    return Quantization(facts["kind"], scales, moves, attentions, results)


def quantization_of(kind: Kind, ranges: Ranges) -> Quantization:
    """What ranges mean for the graph."""
    scales = {name: one.scale for name, one in ranges.products.items()}
    moves = {name: one.move for name, one in ranges.products.items() if one.move is not None}
    attentions = {
        name: AttentionScales(**{part: one.scale for part, one in parts.items()})
        for name, parts in ranges.attentions.items()
    }
    return Quantization(kind, scales, moves, attentions, {name: one.scale for name, one in ranges.results.items()})


def _calibration(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    options: QuantizeOptions,
    images: Path | ImageFolder | None,
    notes: list[str],
    report: Report,
) -> Calibration:
    if options.calibration is not None and options.calibration.exists():
        report(f"reading the calibration file {options.calibration}")
        try:
            return read_calibration(options.calibration, encoder, signature.image_size)
        except OutdatedError as error:
            notes.append(f"{error}. The new calibration replaces the file {options.calibration.name}")
            report(str(error))
    found = calibrate(encoder.at_size(signature.image_size), calibration_pixels(signature, images, notes))
    if options.calibration is not None:
        save_calibration(options.calibration, found)
    return found
