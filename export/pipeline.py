"""Checkpoint -> verified ONNX file: the one function behind `neck-export onnx`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import safetensors.torch
import torch

from export.contract.manifest import (
    ManifestError,
    check_files,
    data_path,
    locked,
    manifest_path,
    publish,
    read_manifest,
    replace_manifest,
    staging,
    write_manifest,
)
from export.contract.readers import find_readers
from export.contract.signature import Signature
from export.graph.deployed_module import DeployEncoder
from export.graph.rewrite import Rewrites
from export.graph.trace import ExportError, trace
from export.inspect import read_graph
from export.lowering.precision import Precision, Residual, lower
from export.lowering.quantise import CODES
from export.manifest_values import export_facts
from export.options import NUMPY_NAMES, ExportOptions, asked_readers, check_options, form_of, load, sign
from export.output_files import check_room, disk_errors, target_files
from export.proof.fidelity import Verdict, check_overrides
from export.proof.reader_check import check_claims, graph_needs, read_by, require
from export.proof.reference import check_reference
from export.proof.verify import Report, check_memory, positions_path, require_runtime, verify_onnx
from export.quantising.settle import Settled, budget_tolerances, settle
from export.weights_origin import (
    manifest_encoder,
    manifest_precision,
    manifest_signature,
    tool_version,
    weights_origin,
)
from neck.necks import Sam3DualViTDetNeck
from neck.pictures import PictureFolder

__all__ = [
    "NUMPY_NAMES",
    "ExportOptions",
    "ExportResult",
    "RejectedError",
    "export_onnx",
    "manifest_encoder",
    "tool_version",
    "verify_file",
    "write_onnx",
]


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What came of an export: the file, its manifest, and the verdict, None where none was asked."""

    path: Path
    manifest: dict[str, Any]
    verdict: Verdict | None

    @property
    def manifest_path(self) -> Path:
        """Where the manifest lies."""
        return manifest_path(self.path)

    @property
    def read_by(self) -> str | None:
        """Who reads the file, in one line."""
        readers = self.manifest.get("readers")
        return readers["says"] if readers else None


class RejectedError(Exception):
    """The file does not compute what PyTorch computes; nothing was left under its name."""

    def __init__(self, path: Path, verdict: Verdict) -> None:
        super().__init__(f"{path}: rejected, {', '.join(verdict.failed_names)} left tolerance")
        self.path, self.verdict = path, verdict


def export_onnx(options: ExportOptions, report: Report = lambda line: None) -> ExportResult:
    """Exports the encoder to an ONNX file that is proved equal to it, with its weights and manifest beside it.

    Args:
        options: what to export and where.
        report: told of every step.

    Raises:
        CheckpointError, ConfigError, SignatureError, PictureError, ExportError: something given cannot be used.
        RejectedError: the file's outputs left tolerance.
    """
    check_options(options)
    report("weights: " + (str(options.checkpoint) if options.checkpoint else f"random, seed {options.seed}"))
    notes: list[str] = []
    encoder = load(options, notes)
    signature = sign(options, encoder)
    check_overrides(options.tolerances, [spec.name for spec in signature.outputs])
    if options.verify:
        check_memory(signature, encoder)
    with disk_errors(options.output), ThreadPoolExecutor(1) as background, staging(options.output) as folder:
        check_room(options.output, encoder, signature, options.precision)
        asked = (options.checkpoint, options.seed, options.state, options.prefix)
        origin = background.submit(weights_origin, *asked, options.adapter, options.adapter_alpha)
        staged = folder / options.output.name
        residual: Residual = options.residual
        settled = _settled(options, encoder, signature, notes, report)
        model, verdict = _written(options, encoder, signature, staged, residual, settled, report)
        if verdict and not verdict.passed and (options.residual, options.precision) == ("auto", "fp16"):
            residual = "fp32"
            notes.append(f"{', '.join(verdict.failed_names)} left tolerance: residual sums now in FP32")
            report(notes[-1])
            model, verdict = _written(options, encoder, signature, staged, residual, settled, report)
        if verdict and not verdict.passed:
            raise RejectedError(options.output, verdict)
        report("hashes and manifest")
        values = export_facts(options, encoder, signature, model, residual, verdict)
        values |= {"weights": origin.result(), "notes": notes, **({"quantisation": settled.facts} if settled else {})}
        manifest = write_manifest(manifest_path(staged), "onnx", values, sorted(folder.iterdir()))
        kept = {file.name for file in folder.iterdir()}
        with locked(options.output.parent):
            # what is not kept: of an export with other --positions
            publish(folder, options.output, [file for file in target_files(options.output) if file.name not in kept])
    return ExportResult(options.output, manifest, verdict)


def _settled(
    options: ExportOptions, encoder: Sam3DualViTDetNeck, signature: Signature, notes: list[str], report: Report
) -> Settled | None:
    """What an fp8 or int8 export quantises; None for every other."""
    if options.precision not in CODES:
        return None
    return settle(encoder, signature, options.precision, options.quantise, options.images, notes, report)


def _written(
    options: ExportOptions,
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    staged: Path,
    residual: Residual,
    settled: Settled | None,
    report: Report,
) -> tuple[ir.Model, Verdict | None]:
    """Writes the file, checks that the asked readers read it, and verifies it where asked."""
    form, readers = form_of(options), asked_readers(options)
    model = write_onnx(
        encoder,
        signature,
        staged,
        precision=options.precision,
        rewrites=options.rewrites,
        report=report,
        attention=form.attention,
        keep_fp32=options.keep_fp32,
        output_precision=options.output_precision,
        opset=form.opset,
        upsampling=options.upsampling,
        residual=residual,
        quantisation=settled.quantisation if settled else None,
    )
    require(readers, graph_needs(model), f"--reader {options.readers}", "take another reader, or another --precision")
    if not options.verify:
        return model, None
    verdict = verify_onnx(
        staged,
        signature,
        encoder,
        options.precision,
        images=options.images,
        overrides=budget_tolerances(options.quantise, options.tolerances),
        report=report,
    )
    sums = ", residual sums in FP32" if residual == "fp32" else ""
    return model, dataclasses.replace(verdict, method=verdict.method + sums)


def verify_file(
    path: Path,
    checkpoint: Path | None = None,
    images: Path | PictureFolder | None = None,
    tolerances: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
    *,
    adapter: Path | None = None,
    save: Path | None = None,
    readers: str = "",
) -> Verdict:
    """Verifies a file that was exported before, and writes the verdict into its manifest.

    Args:
        path: the ONNX file.
        readers: who must be able to read the graph, names with commas.
        checkpoint, adapter: its weights and the adapter that was merged, where they are no longer where the manifest
            says.
        images, tolerances, report, save: as in verify_onnx.

    Raises:
        ManifestError: the manifest is missing or the files are not those that it speaks of.
        ReaderError: the graph is not read by who must, or not by whom the manifest claims.
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
        RejectedError: the outputs left tolerance; the manifest says so too.
    """
    where, asked = manifest_path(path), find_readers(readers) if readers else ()
    if not path.is_file():
        raise ExportError(f"{path}: no such file; export it by `neck-export onnx`")
    require_runtime()
    if save is not None:
        check_reference(save)
    if not where.exists():
        needs = graph_needs(read_graph(path))
        require(asked, needs, str(path), f"it is {read_by(needs)}")
        raise ManifestError(
            f"{where}: the manifest is missing, so its weights are unknown; {path.name} is {read_by(needs)}"
        )
    manifest = read_manifest(where, "onnx")
    signature = manifest_signature(where, manifest)
    check_overrides(tolerances or {}, [spec.name for spec in signature.outputs])
    report("hashes")
    check_files(where, manifest)
    needs = graph_needs(read_graph(path))
    check_claims(where, manifest, needs)
    require(asked, needs, str(path), f"it is {read_by(needs)}")
    report("weights")
    encoder = manifest_encoder(where, manifest, checkpoint, adapter)
    precision = manifest_precision(where, manifest)
    verdict = verify_onnx(
        path, signature, encoder, precision, images=images, overrides=tolerances, save=save, report=report
    )
    replace_manifest(where, manifest | {"verification": verdict.to_dict()})
    if not verdict.passed:
        raise RejectedError(path, verdict)
    return verdict


def write_onnx(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    path: Path,
    *,
    precision: Precision = "fp32",
    rewrites: Rewrites | None = None,
    report: Report = lambda line: None,
    **lowering: Any,  # noqa: ANN401 - export.lowering.precision.lower's
) -> ir.Model:
    """Traces, lowers and writes an encoder with any trunk: X.onnx and X.onnx.data, neither verified nor atomic.

    Returns:
        The lowered model, its weights still unread.
    """
    report("trace")
    module = DeployEncoder(encoder, signature, rewrites or Rewrites())
    model = trace(module)
    lower(model, precision, **lowering)
    report("write")
    ir.save(model, path, external_data=data_path(path).name)
    if signature.positions == "file":
        specs = signature.of_kind("pos")
        sizes = {level: signature.level_sizes[level] for level in signature.levels}
        dtype = getattr(torch, signature.dtype)
        maps = {level: torch.empty(1, 1, *size) for level, size in sizes.items()}
        encodings = {level: encoder.position_encoding(empty).to(dtype) for level, empty in maps.items()}
        stored = {spec.name: encodings[int(spec.name.rsplit("_", 1)[1])].clone() for spec in specs}
        # save_file's errors are no OSErrors (safetensors 0.7), so a full disk would not be told as one
        positions_path(path).write_bytes(safetensors.torch.save(stored))
    return model
