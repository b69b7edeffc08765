"""`build_engine`: one call from an ONNX file, or from weights, to a verified plan; `neck-export trt` calls it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from engines.builder.build import check_request
from engines.builder.flavor import choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import newest_onnx
from engines.builder.options import BuildOptions, PlanOptions, WeightsOptions
from engines.plan import PlanResult, make_plan
from engines.tune import tune_plan
from export.api import Texts, checkpoint_path, read_config, read_images, read_quantize, read_size, several
from export.contract.options import DEFAULT_ONNX, AttentionForm, ExportOptions, Precision, Residual, Upsampling
from export.contract.signature import BatchRange
from export.pipeline import export_onnx
from export.quantization.select_quantization import check_quantize
from export.verification.verify import Report
from neck.config import EncoderConfig
from neck.images import ImageFolder
from neck.progress import step
from neck.weightfile import is_checkpoint


def build_engine(
    model: str | Path | None = None,
    output: str | Path | None = None,
    *,
    config: str | Path | EncoderConfig | None = None,
    state: str | None = None,
    prefix: str | None = None,
    adapter_alpha: float | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    neck: str = "auto",
    precision: Precision | None = None,
    quantize: Texts = (),
    budget: float | None = None,
    calibration: str | Path | None = None,
    flavor: Literal["auto", "tensorrt", "rtx"] = "auto",
    compute_capability: str = "",
    batch: int | str | None = None,
    attention: AttentionForm = "auto",
    upsampling: Upsampling = "auto",
    keep_fp32: Texts = (),
    residual: Residual = "auto",
    timing_cache: str | Path | None = None,
    replay_timing: str | Path | None = None,
    optimization_level: int | None = None,
    workspace_gib: float | None = None,
    version_compatible: bool = False,
    hardware_compatible: Literal["none", "ampere+", "same"] = "none",
    checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    tune: bool = False,
    verify: bool = True,
    images: str | Path | ImageFolder | None = None,
    image_range: str | None = None,
    tolerance: Mapping[str, float] | None = None,
) -> PlanResult:
    """Builds a TensorRT plan and verifies it against PyTorch, as `neck-export trt` does.

    Weights are first exported to an FP32 ONNX file with the defaults of `neck-export onnx`; that file stays beside the
    plan. Progress is reported through the logger `neck_export`.

    Args:
        model: an ONNX file, or weights: a file, a folder, a name on the Hugging Face Hub, or `random`. None takes the
            newest ONNX file in build/.
        output: the plan to write; None writes it beside the ONNX file.
        config, state, prefix, adapter_alpha, image_size, neck: of the export, as in export.export_encoder; only if
            `model` is a checkpoint.
        batch: of an ONNX file with dynamic batch, the optimization profile; of a checkpoint, the batch to export.
        compute_capability: GPUs to build for (TensorRT-RTX), with commas: `8.6,8.9,12.0`.
        keep_fp32, quantize: a module or pattern, or several.
        checkpoint: the weights that an ONNX file was exported from, if they were moved.
        adapter: of an ONNX file, what was merged into its weights, if it was moved; of a checkpoint, what to merge.
        tune: build all forms and keep the fastest that passes; needs a GPU.
        tolerance: largest relative L2 by output name or wildcard.
        precision, budget, calibration, flavor, attention, upsampling, residual, timing_cache, replay_timing,
            optimization_level, workspace_gib, version_compatible, hardware_compatible, verify, images, image_range:
            as the options of `neck-export trt`.

    Returns:
        Path and manifest of the plan, its layer report, the verdict, and the export of a checkpoint (`exported`).

    Raises:
        BuildError, FlavorError, TuneError: the plan cannot be built here; the message says why, and what to do.
        CheckpointError, HubError, ConfigError, SignatureError, ImageError, ExportError, ManifestError: an argument or a
            file cannot be used.
        RejectedError: outputs are out of tolerance.
    """
    options = PlanOptions(
        onnx=Path(model) if model is not None else None,  # type: ignore[arg-type]  # as the command line leaves them
        output=Path(output) if output is not None else None,  # type: ignore[arg-type]
        precision=precision,
        flavor=flavor,
        attention=attention,
        upsampling=upsampling,
        keep_fp32=several(keep_fp32),
        residual=residual,
        quantize=read_quantize(quantize, budget, calibration),
        build=BuildOptions(
            batch=BatchRange.parse(str(batch)) if batch is not None else None,
            compute_capabilities=tuple(part for part in compute_capability.split(",") if part),
            optimization_level=optimization_level,
            workspace_bytes=int(workspace_gib * 2**30) if workspace_gib else None,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            timing_cache=Path(timing_cache) if timing_cache is not None else None,
            replay_timing=Path(replay_timing) if replay_timing is not None else None,
        ),
        verify=verify,
        images=read_images(images, image_range),
        tolerances=dict(tolerance or {}),
        checkpoint=Path(checkpoint) if checkpoint is not None else None,
        adapter=Path(adapter) if adapter is not None else None,
        weights=WeightsOptions(read_config(config), state, prefix, adapter_alpha, read_size(image_size), neck),
    )
    return make_engine(options, tune, step)


def make_engine(options: PlanOptions, tune: bool = False, report: Report = step) -> PlanResult:
    """Builds a plan of an ONNX file, or exports a checkpoint first; the function behind `neck-export trt`.

    Args:
        options: `onnx` and `output` may be None, as the command line leaves them; `onnx` may be a checkpoint.
        tune: build all forms and keep the fastest that passes.
        report: told of every step.

    Raises:
        as build_engine says.
    """
    exported = None
    if options.onnx is not None and is_checkpoint(options.onnx):
        weights = options.onnx
        request, options = _split(options)
        _check_before_export(options)
        exported = export_onnx(dataclasses.replace(request, checkpoint=checkpoint_path(weights)), report)
    else:
        onnx = options.onnx or newest_onnx(DEFAULT_ONNX.parent)
        if options.weights != WeightsOptions():
            raise BuildError(
                f"{onnx}: this is an ONNX file, but --config, --state, --prefix, --adapter-alpha, --image-size "
                "and --neck only apply to the export of a checkpoint; build from the checkpoint instead, or "
                "export the ONNX file again with these options (`neck-export onnx`)"
            )
        options = dataclasses.replace(options, onnx=onnx, output=options.output or onnx.with_suffix(".plan"))
    if tune:
        tuning = tune_plan(options, report)
        return dataclasses.replace(tuning.best, exported=exported, tuning=tuning)
    return dataclasses.replace(make_plan(options, report), exported=exported)


def _split(options: PlanOptions) -> tuple[ExportOptions, PlanOptions]:
    """The export of a checkpoint, which is not looked for yet, and the build of what it writes.

    Raises:
        BuildError: options that contradict each other.
    """
    given, asked = options.onnx, options.weights
    if options.checkpoint is not None:
        raise BuildError(f"{given}: MODEL is already a checkpoint; leave out --checkpoint {options.checkpoint}")
    onnx = options.output.with_suffix(".onnx") if options.output is not None else DEFAULT_ONNX
    if onnx == options.output:
        raise BuildError(
            f"{onnx}: the checkpoint is first exported to an ONNX file of this name, so the plan needs a different "
            f"name; use --output {onnx.stem}.plan, for example"
        )
    request = ExportOptions(
        output=onnx,
        state=asked.state,
        prefix=asked.prefix,
        config=asked.config,
        adapter=options.adapter,
        adapter_alpha=asked.adapter_alpha,
        image_size=asked.image_size,
        batch=options.build.batch or BatchRange(),
        necks=asked.necks,
        verify=options.verify,
        images=options.images,
    )
    build = dataclasses.replace(options.build, batch=None)  # the file tells it
    output = options.output or onnx.with_suffix(".plan")
    plan = dataclasses.replace(options, onnx=onnx, output=output, adapter=None, weights=WeightsOptions(), build=build)
    return request, plan


def _check_before_export(options: PlanOptions) -> None:
    """Refuses a build that is known to fail before the export takes its minutes."""
    flavor = choose_flavor(options.flavor)
    precision = options.precision or "fp32"
    check_quantize(options.quantize, precision)
    check_request(flavor, options.onnx, dataclasses.replace(options.build, precision=precision))
