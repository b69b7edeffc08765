"""The ONNX file that a plan is built from: which it is, whether it is whole, its precision, and the pass to another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from engines.builder.onnx_graph import BuildError, whole_file
from engines.builder.plan_kind import is_plan
from export.contract.export_command import AS_AUTO, export_again
from export.contract.manifest import check_files, data_path, manifest_path, read_manifest
from export.contract.onnx_file import OnnxFile
from export.contract.options import Precision, QuantizeOptions
from export.contract.signature import BatchRange, Signature
from export.graph.cleanup import MODULE
from export.lowering.codes import CODES
from export.lowering.precision import kept_products, lower
from export.options import NUMPY_NAMES
from export.quantization.select_quantization import QuantizationPlan, check_quantize, select_quantization
from export.verification.verify import References, Report
from export.weights_origin import manifest_encoder, manifest_signature
from neck.images import ImageFolder


@dataclasses.dataclass(frozen=True)
class Source:
    """The ONNX file that a plan is built from.

    Attributes:
        file: the file.
        manifest: its manifest, None where another tool wrote the file.
        precision: what it computes in.
        checkpoint, adapter: the weights that it was exported from, and what was merged into them, where they are no
            longer where its manifest says.
        images: images to judge and to calibrate on; without a folder the shipped one.
        report: told of every step.
    """

    file: OnnxFile
    manifest: dict[str, Any] | None
    precision: Precision
    checkpoint: Path | None = None
    adapter: Path | None = None
    images: Path | ImageFolder | None = None
    report: Report = lambda line: None

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.file.path

    @functools.cached_property
    def references(self) -> References:
        """What the encoder that the file was exported from gives in PyTorch.

        Raises:
            ManifestError, CheckpointError, ExportError: as manifest_encoder says.
        """
        where = manifest_path(self.path)
        encoder = manifest_encoder(where, self.manifest or {}, self.checkpoint, self.adapter)
        return References(encoder, self.images, self.report)

    @property
    def files(self) -> list[dict[str, Any]]:
        """What tells it from another one: bytes and SHA-256, or the bytes alone."""
        return (
            self.manifest["files"] if self.manifest else [{"name": self.path.name, "bytes": self.path.stat().st_size}]
        )

    @property
    def batch(self) -> BatchRange | None:
        """The range that it was exported for; None where nothing tells one."""
        batch = BatchRange.parse(self.manifest["signature"]["batch"]) if self.manifest else BatchRange()
        return batch if batch.dynamic else None

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Modules that it has in FP32."""
        return tuple(self.manifest["keep_fp32"]) if self.manifest else ()

    def signature(self, precision: Precision) -> Signature | None:
        """A plan's contract: the file's, its outputs in the plan's precision, positions only where they are outputs."""
        if self.manifest is None:
            return None
        signature = Signature.from_dict(self.manifest["signature"])
        dtype = signature.dtype if precision == self.precision else NUMPY_NAMES[precision]
        positions: Literal["graph", "none"] = "graph" if signature.positions == "graph" else "none"
        return dataclasses.replace(signature, dtype=dtype, positions=positions)


def newest_onnx(folder: Path) -> Path:
    """The newest ONNX file of a folder.

    Raises:
        BuildError: there is none.
    """
    files = sorted(folder.glob("*.onnx"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise BuildError(
            f"{folder}: the folder contains no ONNX file; run `neck-export onnx` first, or name the ONNX file "
            "to build from"
        )
    return files[-1]


def read_source(
    onnx: Path,
    report: Report,
    *,
    checkpoint: Path | None = None,
    adapter: Path | None = None,
    images: Path | ImageFolder | None = None,
) -> Source:
    """Finds the file whole, and as its manifest says byte for byte where it has one.

    Args:
        onnx: the file.
        report, checkpoint, adapter, images: as in Source.

    Raises:
        BuildError: missing, truncated, or a plan.
        ManifestError: damaged, or the file was changed after it was written.
    """
    if is_plan(onnx):
        raise BuildError(f"{onnx}: this file is already a plan; name the ONNX file to build from")
    file = whole_file(onnx)
    where = manifest_path(onnx)
    if not where.exists():
        return Source(file, None, typed_as(file), report=report)
    manifest = read_manifest(where, "onnx")
    report("checking the SHA-256 of the ONNX file")
    check_files(where, manifest)
    return Source(file, manifest, manifest["precision"], checkpoint, adapter, images, report)


def typed_as(file: OnnxFile) -> Precision:
    """The type that an ONNX file computes in: of its FP16 and BF16 weights the larger part, FP32 where it has neither.

    Where any are FP8 or INT8, that is what it is. A file with most of its weights in an FP32 island (a trial of
    `bisect`) is a low-precision file all the same.
    """
    sizes: dict[str, int] = {"FLOAT16": 0, "BFLOAT16": 0, **{code.name: 0 for code in CODES.values()}}
    for value in file.model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in sizes:
            sizes[value.const_value.dtype.name] += value.const_value.nbytes
    if not any(sizes.values()):
        return "fp32"
    for kind, code in CODES.items():
        if sizes[code.name]:
            return kind
    return "fp16" if sizes["FLOAT16"] >= sizes["BFLOAT16"] else "bf16"


def select_for_source(
    source: Source,
    precision: Precision,
    options: QuantizeOptions,
    keep_fp32: Sequence[str] = (),
    no_attention: str | None = None,
) -> tuple[QuantizationPlan | None, tuple[str, ...]]:
    """What is quantized where an FP32 file is lowered to fp8 or int8 (None for every other), and what is to be told.

    `keep_fp32` names the modules that the lowering keeps in FP32; `no_attention` says why this TensorRT gets no FP8
    attention.

    Raises:
        BuildError: options of a file that is not lowered.
        CalibrationError, ImageError, ExportError: as in select_quantization.
    """
    check_quantize(options, precision)
    if source.precision == precision and options != QuantizeOptions():
        words = (
            "--quantize, --budget and --calibration have no effect on its build; leave them out, or export "
            "the file again with them"
        )
        raise BuildError(f"{source.path}: the file is already quantized to {precision}, so {words}")
    if precision not in CODES or source.precision != "fp32" or source.manifest is None:
        return None, ()  # lower_file refuses what it cannot lower
    notes = list[str]()
    kept = kept_products(source.file.model.graph, keep_fp32)
    signature = manifest_signature(manifest_path(source.path), source.manifest)
    asked = (signature, precision, options, notes, kept, no_attention)
    return select_quantization(source.references, *asked), tuple(notes)


def lower_file(source: Source, precision: Precision, folder: Path, **forms: Any) -> Path:
    """Writes an FP32 file in another precision into a folder; `forms` are those of export.lowering.precision.lower.

    Raises:
        BuildError: the file is not FP32, or not one whose nodes tell their modules.
    """
    onnx = source.path
    if source.precision != "fp32":
        raise BuildError(
            f"{onnx}: the file is in {source.precision}, but {precision} was requested;\n"
            f"export the file again: {export_again(onnx, precision=precision, **AS_AUTO)}"
        )
    model, _ = source.file.load(values=True)
    if not any(MODULE in node.metadata_props for node in model.graph):
        raise BuildError(
            f"{onnx}: the file was not written by neck-export, so it is unknown which nodes must stay in FP32; "
            "build the file unchanged with --fp32, or export the encoder with `neck-export onnx --precision "
            f"{precision}`"
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
        raise BuildError(
            f"{where}: the plan was built from an ONNX file without a manifest, so it is unknown which weights "
            "it contains; build a plan from a file that `neck-export onnx` wrote"
        )
    forms = {name: manifest["key"][name] for name in ("attention", "upsampling", "keep_fp32")}
    held = ("attention_form", "attention_spelling", "residual", "quantization")
    forms |= {name: manifest[name] for name in held if name in manifest}
    return manifest["onnx_manifest"] | forms | {"precision": manifest["precision"]}
