"""The ONNX file that a plan is built from: finds and checks it, and lowers it to another precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from engines.builder.onnx_graph import BuildError, whole_file
from engines.builder.plan_kind import is_plan
from export.contract.dtypes import BY_PRECISION
from export.contract.export_command import AS_AUTO, export_again
from export.contract.manifest import check_files, data_path, manifest_path, read_manifest
from export.contract.onnx_file import OnnxFile
from export.contract.options import Precision, QuantizeOptions
from export.contract.signature import BatchRange, Signature
from export.graph.cleanup import MODULE
from export.lowering.codes import CODES
from export.lowering.precision import kept_products, lower
from export.quantization.select_quantization import QuantizationPlan, check_quantize, select_quantization
from export.verification.verify import References, Report
from export.weights_origin import manifest_encoder, manifest_signature
from neck.images import ImageFolder


@dataclasses.dataclass(frozen=True)
class Source:
    """The ONNX file that a plan is built from.

    Attributes:
        file: the ONNX file.
        manifest: the manifest of the file; None if another tool wrote the file.
        precision: the precision of the file.
        checkpoint, adapter: the weights that the file was exported from and the adapter merged into them, if they are
            no longer at the paths in the manifest.
        images: images for verification and calibration; by default the packaged image.
        report: called with a line for each step.
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
        """The path of the file."""
        return self.file.path

    @functools.cached_property
    def references(self) -> References:
        """The PyTorch outputs of the encoder that the file was exported from.

        Raises:
            ManifestError, CheckpointError, ExportError: as in manifest_encoder.
        """
        where = manifest_path(self.path)
        encoder = manifest_encoder(where, self.manifest or {}, self.checkpoint, self.adapter)
        return References(encoder, self.images, self.report)

    @property
    def files(self) -> list[dict[str, Any]]:
        """Size and SHA-256 of the files, which identify the source; without a manifest only the size."""
        return (
            self.manifest["files"] if self.manifest else [{"name": self.path.name, "bytes": self.path.stat().st_size}]
        )

    @property
    def batch(self) -> BatchRange | None:
        """The batch range that the file was exported for; None if it is fixed."""
        batch = BatchRange.parse(self.manifest["signature"]["batch"]) if self.manifest else BatchRange()
        return batch if batch.dynamic else None

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """The modules that the file keeps in FP32."""
        return tuple(self.manifest["keep_fp32"]) if self.manifest else ()

    def signature(self, precision: Precision) -> Signature | None:
        """Returns the signature of a plan of this file; None without a manifest.

        It is the signature of the file with outputs in the plan's precision, and with positions only if the graph
        returns them.
        """
        if self.manifest is None:
            return None
        signature = Signature.from_dict(self.manifest["signature"])
        dtype = signature.dtype if precision == self.precision else BY_PRECISION[precision].name
        positions: Literal["graph", "none"] = "graph" if signature.positions == "graph" else "none"
        return dataclasses.replace(signature, dtype=dtype, positions=positions)


def newest_onnx(folder: Path) -> Path:
    """Returns the newest ONNX file in a folder.

    Raises:
        BuildError: the folder contains no ONNX file.
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
    """Reads an ONNX file and checks that it is complete and, if it has a manifest, unchanged byte for byte.

    Args:
        onnx: the ONNX file.
        report, checkpoint, adapter, images: as in Source.

    Raises:
        BuildError: the file is missing, truncated or a plan.
        ManifestError: the manifest is damaged, or the file was changed after it was written.
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
    """Returns the precision of an ONNX file: the type of most of its FP16 and BF16 weights, or FP32 if it has neither.

    If any weights are FP8 or INT8, that is the precision. A file with most weights in FP32 islands (a trial of
    `bisect`) is still a low-precision file.
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
    """Selects what is quantized if an FP32 file is lowered to fp8 or int8 (None otherwise), and returns notes.

    `keep_fp32` names the modules that the lowering keeps in FP32; `no_attention` says why this TensorRT gets no FP8
    attention.

    Raises:
        BuildError: the options have no effect, because the file is not lowered.
        CalibrationError, ImageError, ExportError: as in select_quantization.
    """
    check_quantize(options, precision)
    if source.precision == precision and options != QuantizeOptions():
        raise BuildError(
            f"{source.path}: the file is already quantized to {precision}, so --quantize, --budget and --calibration "
            "have no effect on the plan; leave these options out, or pass them to `neck-export onnx` and export "
            "the file again"
        )
    if precision not in CODES or source.precision != "fp32" or source.manifest is None:
        return None, ()  # lower_file refuses what it cannot lower
    notes = list[str]()
    kept = kept_products(source.file.model.graph, keep_fp32)
    signature = manifest_signature(manifest_path(source.path), source.manifest)
    asked = (signature, precision, options, notes, kept, no_attention)
    return select_quantization(source.references, *asked), tuple(notes)


def lower_file(source: Source, precision: Precision, folder: Path, **forms: Any) -> Path:
    """Lowers an FP32 file to another precision and writes it to a folder.

    Args:
        source: the FP32 file.
        precision: the precision to lower it to.
        folder: the folder for the new file.
        forms: further arguments of export.lowering.precision.lower.

    Raises:
        BuildError: the file is not FP32, or its nodes do not name the modules that they come from.
    """
    onnx = source.path
    if source.precision != "fp32":
        raise BuildError(
            f"{onnx}: the ONNX file is in {source.precision}, but the requested precision is {precision}. Export the "
            f"ONNX file again in {precision} with this command:\n"
            f"{export_again(onnx, precision=precision, **AS_AUTO)}"
        )
    model, _ = source.file.load(values=True)
    if not any(MODULE in node.metadata_props for node in model.graph):
        raise BuildError(
            f"{onnx}: the file was not written by neck-export, so it is unknown which nodes must stay in FP32; "
            "build the plan in FP32 with --fp32, or export the encoder with `neck-export onnx --precision "
            f"{precision}`"
        )
    lower(model, precision, **forms)
    typed = folder / f"{onnx.stem}.{precision}.onnx"
    ir.save(model, typed, external_data=data_path(typed).name)
    return typed


def plan_source(where: Path) -> dict[str, Any]:
    """Returns the manifest of the ONNX file that a plan was built from, with the precision and the forms of the plan.

    Raises:
        BuildError: the plan was built from a file without a manifest.
    """
    manifest = read_manifest(where, "plan")
    if manifest["onnx_manifest"] is None:
        raise BuildError(
            f"{where}: the plan was built from an ONNX file without a manifest, so the origin of the plan's "
            "weights is unknown; build a plan from a file that `neck-export onnx` wrote"
        )
    forms = {name: manifest["key"][name] for name in ("attention", "upsampling", "keep_fp32")}
    held = ("attention_form", "attention_spelling", "residual", "quantization")
    forms |= {name: manifest[name] for name in held if name in manifest}
    return manifest["onnx_manifest"] | forms | {"precision": manifest["precision"]}
