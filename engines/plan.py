"""ONNX file -> plan that is known to compute what PyTorch computes: the function behind `neck-export trt`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.builder.attention_forms import Built, LoweringOptions, build_forms, no_fp8_attention
from engines.builder.flavor import Flavor, choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import Source, read_source, select_for_source
from engines.builder.options import DEFAULT_BATCH, BuildOptions, PlanOptions
from engines.builder.timing_cache import replayed_hash, timing_cache_path
from engines.layers.layer_report import LayerReport, layers_path, read_layers
from engines.layers.plan_memory import plan_memory
from engines.run.verify import verify_plan, why_not_run
from export.contract.atomic import disk_errors, locked, new_folder, publish, staging
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest, to_json, write_manifest
from export.contract.onnx_file import OnnxFile, check_path
from export.contract.options import Precision, Residual
from export.contract.signature import BatchRange
from export.inspect import told_quantization
from export.lowering.attention import other_form
from export.lowering.precision import residuals_to_try
from export.output_files import NamedPath, calibration_paths, check_paths, encoder_paths
from export.pipeline import ExportResult, RejectedError
from export.quantization.select_quantization import QuantizationPlan, all_tolerances
from export.verification.fidelity import Verdict
from export.verification.verify import Report, image_count, verify_onnx
from export.weights_origin import tool_version

if TYPE_CHECKING:
    from engines.tune import Tuning


@dataclasses.dataclass(frozen=True)
class PlanResult:
    """What came of a build.

    Attributes:
        path, manifest: the plan, and what it says.
        layers: its layer report, None where the builder told none.
        verdict: what was verified: the plan where it runs here, else the typed ONNX graph, else None.
        reused, reason: whether the plan was there already; why it was built, where another was there.
        exported: the export that the plan was built from, if one call made both.
        tuning: all candidates of `--tune`, None without it.
    """

    path: Path
    manifest: dict[str, Any]
    layers: LayerReport | None
    verdict: Verdict | None
    reused: bool = False
    reason: str | None = None
    exported: ExportResult | None = None
    tuning: Tuning | None = None

    @property
    def notes(self) -> list[str]:
        """What was done to the file for this TensorRT, and what that means."""
        return list(self.manifest.get("notes", []))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the plans of one ONNX file share: made once for all candidates of `--tune`.

    Attributes:
        source: the file, with what PyTorch gives.
        selected, notes: what is quantized, and what is to be told of it.
    """

    source: Source
    selected: QuantizationPlan | None
    notes: tuple[str, ...]


def read_onnx(options: PlanOptions, report: Report) -> Source:
    """The ONNX file of a plan; see read_source."""
    more = {"checkpoint": options.checkpoint, "adapter": options.adapter, "images": options.images}
    return read_source(options.onnx, report, **more)  # type: ignore[arg-type]


def prepare(options: PlanOptions, source: Source, precision: Precision, flavor: Flavor) -> Prepared:
    """Selects what is quantized; see select_for_source."""
    no_attention = no_fp8_attention(flavor) or other_form(options.attention)
    asked = (precision, options.quantize, options.keep_fp32, no_attention)
    return Prepared(source, *select_for_source(source, *asked))


def make_plan(options: PlanOptions, report: Report = lambda line: None, prepared: Prepared | None = None) -> PlanResult:
    """Builds, verifies and files a plan, or returns the one that is there where nothing has changed.

    Args:
        options: what to build.
        report: told of every step.
        prepared: what other plans of the same file have made already; by default it is made here.

    Raises:
        BuildError, FlavorError: what was asked cannot be built here, or the plan cannot be written.
        ManifestError: the ONNX file is not the one that its manifest speaks of.
        RejectedError: the plan, or without a GPU its ONNX graph, left tolerance; it stays as X.plan.rejected.
    """
    for path in (options.onnx, options.output):
        check_path(path)
    flavor = choose_flavor(options.flavor)
    source = prepared.source if prepared else read_onnx(options, report)
    precision = options.precision or source.precision
    given = (source.manifest, options.quantize, options.tolerances, source.signature(precision))
    options = dataclasses.replace(options, tolerances=all_tolerances(*given))
    check_paths(plan_paths(options, flavor, precision), read_paths(options, source))
    job = BuildRequest(options, flavor, source, precision, report)
    found, reason = reusable(job)
    if found:
        return found
    with (
        disk_errors(BuildError, options.output),
        new_folder(options.output.parent),
        contextlib.ExitStack() as left,
        staging(options.output) as folder,
    ):
        staged = folder / options.output.name
        verdict: Verdict | None = None
        prepared = prepared or prepare(options, source, precision, flavor)
        selected, notes = prepared.selected, prepared.notes
        for residual in job.residuals:
            if verdict:
                notes = (
                    (
                        f"the outputs {', '.join(verdict.failed_names)} exceeded the tolerance, so the plan was "
                        "built again with residual sums in FP32"
                    ),
                )
            forms = (options.attention, options.spelling, options.upsampling, options.keep_fp32)
            typing = LoweringOptions(*forms, residual, selected and selected[0], options.fp8_attention)
            built = build_forms(job.source, staged, job.build, typing, job.flavor, left, report)
            about = _manifest(job, built, (*notes, *built.notes, *built.result.notes), selected)
            verdict, verification = _verify(job, built.typed, staged, about)
            if verdict is None or verdict.passed:
                break
        files, layers = [staged], built.result.layers
        if layers:
            files.append(layers_path(staged))
            files[-1].write_text(to_json(layers.to_dict()), encoding="utf-8")
        manifest = write_manifest(manifest_path(staged), "plan", about | {"verification": verification}, files)
        for other in set(folder.iterdir()) - {*files, manifest_path(staged)}:  # the file as it was typed on the way
            shutil.rmtree(other) if other.is_dir() else other.unlink()
        if verdict and not verdict.passed:
            raise _reject(options, folder, manifest, verdict)
        publish_plan(folder, options.output)
    return PlanResult(options.output, manifest, layers, verdict, reason=reason)


def plan_paths(options: PlanOptions, flavor: Flavor, precision: Precision) -> list[NamedPath]:
    """Every file that `neck-export trt` may write."""
    plan, rejected = options.output, rejected_path(options.output)
    places = [
        NamedPath("the plan (--output)", plan),
        NamedPath("the manifest of the plan", manifest_path(plan)),
        NamedPath("the layer report of the plan", layers_path(plan)),
        NamedPath("the file for a plan that fails verification", rejected),
        NamedPath("the manifest of a plan that fails verification", manifest_path(rejected)),
        *calibration_paths(options.quantize.calibration, precision),
    ]
    if cache := timing_cache_path(flavor, options.build):
        places.append(NamedPath("the timing cache (--timing-cache)", cache))
    return places


def read_paths(options: PlanOptions, source: Source) -> list[NamedPath]:
    """Every file that `neck-export trt` reads."""
    places = encoder_paths(source.path, source.manifest or {}, options.checkpoint)
    if options.build.replay_timing:
        places.append(NamedPath("the timing cache (--replay-timing)", options.build.replay_timing))
    return places


def rejected_path(plan: Path) -> Path:
    """Where a plan that left tolerance is kept: X.plan -> X.plan.rejected."""
    return plan.with_name(plan.name + ".rejected")


@dataclasses.dataclass(frozen=True)
class BuildRequest:
    """What is built, of which file, by which TensorRT, in which precision."""

    options: PlanOptions
    flavor: Flavor
    source: Source
    precision: Precision
    report: Report

    @property
    def key(self) -> dict[str, Any]:
        """Everything that decides what a plan holds; two plans with equal keys are alike."""
        return {
            "onnx": self.source.files,
            "precision": self.precision,
            "attention": self.options.attention,
            "spelling": self.options.spelling,
            "fp8_attention": self.options.fp8_attention,
            "upsampling": self.options.upsampling,
            "keep_fp32": list(self.options.keep_fp32),
            "residual": self.options.residual,
            "quantize": repr(self.options.quantize),
            "options": dataclasses.replace(self.options.build, precision=self.precision).to_dict(),
            "replay_timing": replayed_hash(self.flavor, self.options.build),
            "flavor": self.flavor.name,
            "tensorrt_version": self.flavor.version,
            "gpu": dataclasses.asdict(self.flavor.gpu) if self.flavor.gpu else None,
            "neck_export": tool_version(),
        }

    @property
    def build(self) -> BuildOptions:
        """The builder's options, with what the file tells: its batch, unless another is asked, and its FP32 modules."""
        asked = self.options.build
        kept = (*asked.keep_fp32, *self.options.keep_fp32, *self.source.keep_fp32)
        batch = asked.batch or self.source.batch
        return dataclasses.replace(asked, precision=self.precision, batch=batch, keep_fp32=kept)

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """Types of the residual sums to try in turn; those of a low-precision file are what they are."""
        asked = self.options.residual
        return residuals_to_try(self.precision, asked) if self.source.precision == "fp32" else (asked,)


def reusable(job: BuildRequest) -> tuple[PlanResult | None, str | None]:
    """The plan that is there, or why it must be built again; both None where there is none."""
    options = job.options
    if not options.output.exists():
        return None, None
    where = manifest_path(options.output)
    try:
        manifest = read_manifest(where, "plan")
        check_files(where, manifest)
    except ManifestError as error:
        return None, str(error)
    old = manifest.get("key", {})
    for name, value in job.key.items():
        if old.get(name) != value:
            return None, f"{name} changed from {json.dumps(old.get(name))} to {json.dumps(value)}"
    if job.source.manifest is None:
        return (
            None,
            f"{options.onnx.name} has no manifest, so it is unknown whether the file changed since the plan was built",
        )
    checked = manifest["verification"]
    if options.verify and not checked["verified"] and not checked.get("onnx", {}).get("verified"):
        return None, "the existing plan was not verified"
    return PlanResult(options.output, manifest, read_layers(options.output), None, reused=True), None


def _manifest(
    job: BuildRequest, built: Built, notes: tuple[str, ...], selected: QuantizationPlan | None
) -> dict[str, Any]:
    """What the plan's manifest says, its verification aside."""
    result, signature = built.result, job.source.signature(job.precision)
    quantization = selected.facts if selected else (job.source.manifest or {}).get("quantization")
    first = result.inputs[0].shape[0]
    batch = str(result.options.batch or DEFAULT_BATCH) if isinstance(first, str) else str(first)
    tensors = [dataclasses.asdict(spec) for spec in (*result.inputs, *result.outputs)]
    return {
        "key": job.key,
        "precision": job.precision,
        "attention_form": built.attention.form,
        "attention_spelling": built.attention.spelling,
        "residual": built.residual,
        "quantization": told_quantization(quantization, built.typed.model.graph) if quantization else None,
        "notes": list(notes),
        "flavor": result.flavor,
        "tensorrt_version": result.version,
        "compute_capabilities": list(result.compute_capabilities),
        "gpu": dataclasses.asdict(result.gpu) if result.gpu else None,
        "options": result.options.to_dict(),
        "batch": batch,
        "inputs": tensors[: len(result.inputs)],
        "outputs": tensors[len(result.inputs) :],
        "memory": plan_memory(result.memory, tensors, batch),
        "timing_cache": result.timing_cache,
        "build_seconds": round(result.seconds, 2),
        "layers": result.layers.summary() if result.layers else None,
        "no_layers": result.no_layers,
        "onnx": job.source.files[0],
        "signature": signature.to_dict() if signature else None,
        "onnx_manifest": job.source.manifest,
    }


def _verify(
    job: BuildRequest, typed: OnnxFile, staged: Path, about: dict[str, Any]
) -> tuple[Verdict | None, dict[str, Any]]:
    """The verdict on the plan where it runs here, else on its ONNX graph, and what the manifest says of it."""
    options, source, report = job.options, job.source, job.report
    if not options.verify:
        return None, {"verified": False, "reason": "not verified: --no-verify"}
    signature = source.signature(job.precision)
    if source.manifest is None or signature is None:
        unknown = (
            f"not verified: {source.path.name} has no manifest, so it is unknown which weights to compare the plan with"
        )
        return None, {"verified": False, "reason": unknown}
    if (reason := why_not_run(staged, about, job.flavor)) is None:
        report("verifying the plan against PyTorch")
        reference = source.references.of(signature, image_count(BatchRange.parse(about["batch"])))
        verdict = verify_plan(staged, about, reference=reference, overrides=options.tolerances, report=report)
        return verdict, verdict.to_dict()
    before = source.manifest["verification"]
    if typed is source.file and before["verified"] and not options.images and not options.tolerances:
        return None, {"verified": False, "reason": reason, "onnx": before}
    report("verifying the ONNX graph against PyTorch, because the plan does not run on this machine")
    reference = source.references.of(signature)
    verdict = verify_onnx(typed, signature, reference, job.precision, overrides=options.tolerances, report=report)
    return verdict, {"verified": False, "reason": reason, "onnx": verdict.to_dict()}


def _reject(options: PlanOptions, folder: Path, manifest: dict[str, Any], verdict: Verdict) -> RejectedError:
    """Files a plan that failed as X.plan.rejected, its figures beside it."""
    rejected = rejected_path(options.output)
    with staging(rejected) as other:
        os.replace(folder / options.output.name, other / rejected.name)
        (entry,) = (entry for entry in manifest["files"] if entry["name"] == options.output.name)
        content = manifest | {"files": [entry | {"name": rejected.name}]}
        manifest_path(other / rejected.name).write_text(to_json(content), encoding="utf-8")
        publish_plan(other, rejected)
    return RejectedError(rejected, verdict)


def publish_plan(folder: Path, target: Path) -> None:
    """Publishes a plan with its manifest as one, also where another build of it ends at the same time."""
    with locked(target.parent):
        publish(folder, target)
