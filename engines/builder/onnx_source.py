"""The ONNX file that a plan is built from: which it is, whether it is whole, its precision, and the pass to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from engines.builder.onnx_graph import BuildError
from export.contract.export_command import AS_AUTO, export_again
from export.contract.manifest import check_files, data_path, manifest_path, read_manifest
from export.graph.cleanup import MODULE
from export.lowering.precision import Precision, lower
from export.lowering.quantise import CODES
from export.proof.verify import Report
from export.quantising.settle import (
    QuantiseOptions,
    Settled,
    budget_tolerances,
    check_quantise,
    manifest_tolerances,
    settle,
)
from export.weights_origin import manifest_encoder, manifest_signature
from neck.pictures import PictureFolder


def newest_onnx(folder: Path) -> Path:
    """The newest ONNX file of a folder.

    Raises:
        BuildError: there is none.
    """
    files = sorted(folder.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise BuildError(f"{folder}: holds no ONNX file; run `neck-export onnx` first, or name one")
    return files[-1]


def read_source(onnx: Path, report: Report) -> dict[str, Any] | None:
    """The ONNX file's manifest, its files checked byte for byte; None for a file that another tool wrote.

    Raises:
        ManifestError: damaged, or the file was changed after it was written.
    """
    where = manifest_path(onnx)
    if not where.exists():
        return None
    manifest = read_manifest(where, "onnx")
    report("hashes of the ONNX file")
    check_files(where, manifest)
    return manifest


def typed_as(onnx: Path) -> Precision:
    """The type that an ONNX file computes in: of its FP16 and BF16 weights the larger part, FP32 where it has neither.

    Where any are FP8 or INT8, that is what it is. A file with most of its weights in an FP32 island (a trial of
    `bisect`) is a low-precision file all the same.
    """
    sizes: dict[str, int] = {"FLOAT16": 0, "BFLOAT16": 0, **{code.name: 0 for code in CODES.values()}}
    for value in ir.load(onnx).graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in sizes:
            sizes[value.const_value.dtype.name] += value.const_value.nbytes
    if not any(sizes.values()):
        return "fp32"
    for kind, code in CODES.items():
        if sizes[code.name]:
            return kind
    return "fp16" if sizes["FLOAT16"] >= sizes["BFLOAT16"] else "bf16"


def settle_file(
    onnx: Path,
    source: dict[str, Any] | None,
    held: Precision,
    precision: Precision,
    options: QuantiseOptions,
    images: Path | PictureFolder | None,
    report: Report,
) -> tuple[Settled | None, tuple[str, ...]]:
    """What is quantised where an FP32 file is lowered to fp8 or int8 (None for every other), and what is to be told.

    Raises:
        BuildError: a file without manifest, whose weights cannot be calibrated; options of a file that is not lowered.
    """
    check_quantise(options, precision)
    if precision not in CODES or held == precision:
        if options != QuantiseOptions():
            raise BuildError(f"{onnx}: is {held} already; --quantise, --budget and --calibration are of its export")
        return None, ()
    if source is None or held != "fp32":
        return None, ()  # which lower_file refuses
    where = manifest_path(onnx)
    encoder, signature = manifest_encoder(where, source), manifest_signature(where, source)
    encoder.set_imgsz(signature.image_size)
    notes: list[str] = []
    return settle(encoder, signature, precision, options, images, notes, report), tuple(notes)


def tolerances_of(
    source: dict[str, Any] | None, options: QuantiseOptions, tolerances: Mapping[str, float]
) -> dict[str, float]:
    """The tolerances of a plan: those that were asked, and the budget of its products, or of its file's."""
    return manifest_tolerances(source or {}, budget_tolerances(options, tolerances))


def lower_file(onnx: Path, held: Precision, precision: Precision, folder: Path, **forms: Any) -> Path:  # noqa: ANN401
    """Writes an FP32 file in another precision into a folder; `forms` are those of export.lowering.precision.lower.

    Raises:
        BuildError: the file is not FP32, or not one whose nodes tell their modules.
    """
    if held != "fp32":
        raise BuildError(
            f"{onnx}: is {held}, asked was {precision};\n"
            f"export it again: {export_again(onnx, precision=precision, **AS_AUTO)}"
        )
    model = ir.load(onnx)
    if not any(MODULE in node.metadata_props for node in model.graph):
        raise BuildError(
            f"{onnx}: was not written by neck-export, so its nodes do not tell what must stay in FP32; "
            f"build it as it is with --fp32, or export it with --precision {precision}"
        )
    lower(model, precision, **forms)
    typed = folder / f"{onnx.stem}.{precision}.onnx"
    ir.save(model, typed, external_data=data_path(typed).name)
    return typed


def plan_source(where: Path) -> dict[str, Any]:
    """The manifest of the ONNX file that a plan was built from, with the precision and the forms of the plan.

    Raises:
        BuildError: the plan was built from another tool's file.
    """
    manifest = read_manifest(where, "plan")
    if manifest["onnx_manifest"] is None:
        raise BuildError(f"{where}: the plan was built from a file without manifest, so its weights are unknown")
    forms = {name: manifest["key"][name] for name in ("attention", "upsampling", "keep_fp32")}
    forms |= {name: manifest[name] for name in ("attention_form", "residual", "quantisation") if name in manifest}
    return manifest["onnx_manifest"] | forms | {"precision": manifest["precision"]}
