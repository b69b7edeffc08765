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

from export.contract.atomic import disk_errors, locked, new_folder, publish, staging
from export.contract.errors import ExportError
from export.contract.manifest import (
    ManifestError,
    check_files,
    data_path,
    manifest_path,
    named_files,
    read_manifest,
    record_in_manifest,
    write_manifest,
)
from export.contract.onnx_file import OnnxFile, check_path
from export.contract.options import ExportOptions, Precision, Rewrites
from export.contract.signature import Signature
from export.contract.targets import find_targets, why_no_fp8_attention
from export.foreign.adopt import adopt
from export.foreign.judge import judge_file
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace
from export.inspect import told_quantization
from export.lowering.attention import other_form
from export.lowering.codes import CODES
from export.lowering.precision import kept_products, lower, residual_type, residuals_to_try
from export.manifest_values import export_facts, graph_facts, verification
from export.options import check_options, load, lowering, sign
from export.output_files import NamedPath, check_paths, check_room, encoder_paths, target_files
from export.quantization.select_quantization import budget_tolerances, manifest_tolerances, select_quantization
from export.verification.fidelity import Verdict, check_overrides
from export.verification.reference import check_reference, write_reference
from export.verification.target_check import Needs, check_claims, graph_needs, read_by, require
from export.verification.verify import (
    References,
    Report,
    check_memory,
    make_reference,
    positions_path,
    require_runtime,
    verify_onnx,
)
from export.weights_origin import (
    manifest_encoder,
    manifest_precision,
    manifest_signature,
    tool_version,
    weights_origin,
)
from neck.checkpoint import CheckpointError
from neck.config import EncoderConfig
from neck.images import ImageFolder
from neck.necks import Sam3DualViTDetNeck
from neck.source import EncoderSource, Loaded

__all__ = [
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
    """The result of an export: the file, its manifest, and the verdict (None if none was requested)."""

    path: Path
    manifest: dict[str, Any]
    verdict: Verdict | None

    @property
    def manifest_path(self) -> Path:
        """The path of the manifest."""
        return manifest_path(self.path)

    @property
    def read_by(self) -> str | None:
        """The runtimes that can load the file, in one line."""
        targets = self.manifest.get("targets")
        return targets["says"] if targets else None


class RejectedError(Exception):
    """The file does not compute what PyTorch computes; nothing was left under its name."""

    def __init__(self, path: Path, verdict: Verdict) -> None:
        super().__init__(f"{path}: the file failed verification: {verdict.summary}")
        self.path, self.verdict = path, verdict


def export_onnx(options: ExportOptions, report: Report = lambda line: None) -> ExportResult:
    """Exports the encoder to an ONNX file that is proved equal to it, with its weights and manifest beside it.

    Args:
        options: what to export and where.
        report: told of every step.

    Raises:
        CheckpointError, ConfigError, SignatureError, ImageError, ExportError: something given cannot be used.
        RejectedError: the file's outputs left tolerance.
    """
    form = check_options(options)
    report(f"{'loading the weights of' if options.source.path else 'creating'} {options.source}")
    loaded = load(options)
    encoder, notes = loaded.encoder, [*loaded.notes]
    signature = sign(options, encoder)
    tolerances = budget_tolerances(options.quantize, options.tolerances, signature)
    check_overrides(tolerances, [spec.name for spec in signature.outputs])
    if options.verify:
        check_memory(signature, encoder)
    with (
        disk_errors(ExportError, options.output.parent),
        new_folder(options.output.parent),
        ThreadPoolExecutor(1) as background,
        staging(options.output) as folder,
    ):
        check_room(options.output, encoder, signature, options.precision)
        origin = background.submit(weights_origin, loaded.origin)
        staged = folder / options.output.name
        forms, facts = lowering(options, form), dict[str, Any]()
        report("tracing the encoder")
        canonical = trace(DeployEncoder(encoder, signature, options.rewrites))
        references = References(encoder, options.images, report)
        kept = kept_products(canonical.graph, options.keep_fp32)  # before the work: a pattern may name no module
        if options.precision in CODES:
            asked = (signature, options.precision, options.quantize, notes, kept)
            selected = select_quantization(
                references, *asked, why_no_fp8_attention(form.targets) or other_form(form.attention)
            )
            forms["quantization"], facts["quantization"] = selected
        write_positions(encoder, signature, staged)
        verdict: Verdict | None = None
        for residual in residuals_to_try(options.precision, options.residual):
            if verdict:
                notes.append(
                    f"the outputs {', '.join(verdict.failed_names)} exceeded the tolerance, so the file was "
                    "written again with its residual sums in FP32"
                )
                report(notes[-1])
            report("writing the ONNX file")
            model = write_lowered(canonical, staged, options.precision, residual=residual, **forms)
            needs = graph_needs(model)
            require(
                form.targets, needs, f"--target {options.targets}", "choose another --target or another --precision"
            )
            if options.verify:
                proof = (signature, references.of(signature), options.precision)
                verdict = verify_onnx(staged, *proof, overrides=tolerances, report=report)
                sums = ", residual sums in FP32" if residual == "fp32" else ""
                verdict = dataclasses.replace(verdict, method=verdict.method + sums)
            if verdict is None or verdict.passed:
                break
        if verdict and not verdict.passed:
            raise RejectedError(options.output, verdict)
        report("computing the SHA-256 of the files and writing the manifest")
        if "quantization" in facts:  # what is told is what the file has
            facts["quantization"] = told_quantization(facts["quantization"], model.graph)
        values = export_facts(options, form, encoder, signature) | graph_facts(model, needs, form.targets)
        values |= {
            "residual": residual_type(options.precision, residual),
            "verification": verification(verdict, folder.iterdir()),
        }
        values |= {"weights": origin.result(), "notes": notes, **facts}
        manifest = write_manifest(manifest_path(staged), "onnx", values, sorted(folder.iterdir()))
        written = {file.name for file in folder.iterdir()}
        with locked(options.output.parent):
            # of an export with other --positions; a file that no manifest names is not ours
            gone = {file.name for file in target_files(options.output)} & named_files(options.output) - written
            publish(folder, options.output, [options.output.with_name(name) for name in gone])
    return ExportResult(options.output, manifest, verdict)


def verify_file(
    file: Path | OnnxFile,
    checkpoint: Path | None = None,
    images: Path | ImageFolder | None = None,
    tolerances: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
    *,
    adapter: Path | None = None,
    save: Path | None = None,
    targets: str = "",
    notes: list[str] | None = None,
    config: EncoderConfig | None = None,
    state: str | None = None,
    prefix: str | None = None,
    write_manifest: bool = False,
) -> Verdict:
    """Verifies a file that was exported before, and writes the verdict into its manifest.

    A file without a manifest is another tool's: its input, its outputs and what is wrong with it are found out by
    comparison with the encoder of `checkpoint`, and the verdict is a ForeignVerdict.

    Args:
        file: the ONNX file.
        targets: who must be able to read the graph, names with commas.
        checkpoint, adapter: its weights and the adapter that was merged, where they are no longer where the manifest
            says.
        images: a folder of images; without one the shipped image.
        tolerances: relative L2 by output name or wildcard.
        report: told of every step.
        save: where to keep the images and the plain module's outputs.
        notes: takes what the user should know: that the manifest could not be updated.
        config, state, prefix: which encoder of `checkpoint`, for a file without a manifest; as in EncoderSource.
        write_manifest: whether a file without a manifest gets one if it passes, as export.foreign.adopt says.

    Raises:
        ManifestError: the manifest is missing and no checkpoint is given, or the files are not those that it speaks of.
        TargetError: the graph is not read by who must, or not by whom the manifest claims.
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
        RejectedError: the outputs left tolerance; the manifest says so too, where it can be written.
    """
    file = OnnxFile.of(file)
    path, where, asked = file.path, manifest_path(file.path), find_targets(targets) if targets else ()
    if not path.is_file():
        raise ExportError(
            f"{path}: there is no file with this name; check the path, or write the file with `neck-export onnx`"
        )
    check_path(path)
    require_runtime()
    if save is not None:
        check_reference(save)
    if not where.exists():
        needs = graph_needs(file.model)
        require(asked, needs, str(path), _other_target(path, needs))
        if checkpoint is None:
            raise ManifestError(
                f"{where}: the manifest is missing, so neck-export cannot verify the outputs of the ONNX file "
                f"{path.name}. neck-export only checked which runtimes support the graph: {path.name} is "
                f"{read_by(needs)}. To verify the outputs, use --checkpoint to pass the checkpoint that {path.name} "
                "was exported from"
            )
        if save is not None:
            check_paths([NamedPath("the reference file (--save-reference)", save)], encoder_paths(path, {}, checkpoint))
        report("loading the weights of the checkpoint")
        loaded = with_head_if_any(EncoderSource(checkpoint, 0, state, prefix, adapter, config=config))
        foreign, made = judge_file(file, loaded.encoder, images, tolerances, report)
        if save is not None:
            write_reference(save, made.pixels, {one.output: made.outputs[one.tensor] for one in foreign.matches})
        if not foreign.passed:
            raise RejectedError(path, foreign)
        if write_manifest:
            target = adopt(file, foreign, loaded.encoder, loaded.origin, made, report)
            (notes if notes is not None else []).append(
                f"the manifest {manifest_path(target)} for {target.name} was written"
            )
        return foreign
    given = {"config": config, "state": state, "prefix": prefix, "write-manifest": write_manifest}
    if any(given.values()):
        name = next(name for name, value in given.items() if value)
        raise ExportError(
            f"{path}: --{name} is only for files without a manifest, but the manifest of this file already "
            f"describes its encoder; leave out --{name}"
        )
    manifest = read_manifest(where, "onnx")
    signature = manifest_signature(where, manifest)
    if save is not None:
        check_paths(
            [NamedPath("the reference file (--save-reference)", save)], encoder_paths(path, manifest, checkpoint)
        )
    tolerances = manifest_tolerances(manifest, tolerances)
    check_overrides(tolerances, [spec.name for spec in signature.outputs])
    report("comparing the files with their SHA-256 in the manifest")
    check_files(where, manifest)
    needs = graph_needs(file.model)
    check_claims(where, manifest, needs)
    require(asked, needs, str(path), _other_target(path, needs))
    report("loading the weights that the file was exported from")
    encoder = manifest_encoder(where, manifest, checkpoint, adapter)
    precision = manifest_precision(where, manifest)
    reference = make_reference(encoder, signature, images=images, report=report)
    if save is not None:
        write_reference(save, reference.pixels, {spec.name: reference.outputs[spec.name] for spec in signature.outputs})
    verdict = verify_onnx(file, signature, reference, precision, overrides=tolerances, report=report)
    verified = [path.with_name(entry["name"]) for entry in manifest["files"]]
    content = manifest | {"verification": verification(verdict, verified)}
    record_in_manifest(where, content, [] if notes is None else notes)
    if not verdict.passed:
        raise RejectedError(path, verdict)
    return verdict


def _other_target(path: Path, needs: Needs) -> str:
    """What to do if a target cannot load a file."""
    return (
        f"judging by the operators and types in the graph, the ONNX file {path.name} is {read_by(needs)}. In --target, "
        f"name only runtimes that can load {path.name}, or leave out --target"
    )


def with_head_if_any(source: EncoderSource) -> Loaded:
    """The encoder with all of its necks, and with the mask decoder's convolutions if the checkpoint has them.

    Raises:
        CheckpointError: the weights cannot be read.
    """
    try:
        return source.load(sam2_head=True)
    except CheckpointError:
        return source.load()


def write_onnx(
    encoder: Sam3DualViTDetNeck,
    signature: Signature,
    path: Path,
    *,
    precision: Precision = "fp32",
    rewrites: Rewrites | None = None,
    report: Report = lambda line: None,
    **lowering: Any,
) -> ir.Model:
    """Traces, lowers and writes an encoder with any trunk: X.onnx and X.onnx.data, neither verified nor atomic.

    Returns:
        The lowered model, its weights still unread.
    """
    report("tracing the encoder")
    canonical = trace(DeployEncoder(encoder, signature, rewrites or Rewrites()))
    report("writing the ONNX file")
    write_positions(encoder, signature, path)
    return write_lowered(canonical, path, precision, **lowering)


def write_lowered(canonical: ir.Model, path: Path, precision: Precision, **lowering: Any) -> ir.Model:
    """Writes a traced graph in a precision and form; the arguments are those of export.lowering.precision.lower."""
    model = canonical.clone()
    lower(model, precision, **lowering)
    ir.save(model, path, external_data=data_path(path).name)
    return model


def write_positions(encoder: Sam3DualViTDetNeck, signature: Signature, path: Path) -> None:
    """Writes the position encodings beside an ONNX file, where its signature wants them there."""
    if signature.positions != "file":
        return
    sizes = {level: signature.level_sizes[level] for level in signature.levels}
    dtype = getattr(torch, signature.dtype)
    maps = {level: torch.empty(1, 1, *size) for level, size in sizes.items()}
    encodings = {level: encoder.position_encoding(empty).to(dtype) for level, empty in maps.items()}
    stored = {spec.name: encodings[int(spec.name.rsplit("_", 1)[1])].clone() for spec in signature.of_kind("pos")}
    # save_file's errors are no OSErrors (safetensors 0.7), so a full disk would not be told as one
    positions_path(path).write_bytes(safetensors.torch.save(stored))
