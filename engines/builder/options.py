"""What a build is asked for, by the command line and by Python (no torch)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from export.contract.options import (
    ADAPTER_ALPHA,
    ATTENTION,
    CONFIG,
    FILE_ADAPTER,
    FILES,
    IMAGE_SIZE,
    KEEP_FP32,
    NECKS,
    PRECISION,
    PREFIX,
    RESIDUAL,
    STATE,
    TARGET,
    UPSAMPLING,
    VERIFICATION,
    AttentionForm,
    FileCheckpoint,
    Images,
    Precision,
    QuantizeOptions,
    Residual,
    Spelling,
    Tolerances,
    Upsampling,
)
from export.contract.signature import BatchRange
from neck.config import EncoderConfig
from neck.option import Group, Option, OptionError

BUILD = "Build"

DEFAULT_BATCH = BatchRange(1, 4, 8)
"""Optimization profile of a dynamic batch whose range nobody said."""

SWITCHES = tuple(
    Option(f"Compute in {name.upper()}; the same as --precision {name}.", PRECISION, f"--{name}", bool, default=False)
    for name in ("fp16", "bf16", "fp32")
)


def choose_precision(named: Precision | None, *switched: bool) -> Precision | None:
    """The one precision of --precision and the switches."""
    chosen: list[Any] = [one.key() for one, on in zip(SWITCHES, switched, strict=True) if on]
    chosen += [named] if named else []
    if len(chosen) > 1:
        raise OptionError(f"the precisions {' and '.join(chosen)} were requested together; choose one of them")
    return chosen[0] if chosen else None


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build; the help of the options says what they are.

    Attributes:
        precision: type that the graph's matrix products and convolutions must have; of fp8 and int8 their results.
        batch: optimization profile of a file with dynamic batch; by default from 1 through 4 to 8.
        compute_capabilities: such as ("8.9", "12.0"); empty is the flavor's default.
        keep_fp32: paths of modules that are in FP32 all the same, with wildcards.
        workspace_bytes: None is no limit.
        hardware_compatible: `ampere+` is 8.0 and later, `same` GPUs of this one's compute capability.
        timing_cache: flavor, version and GPU enter its name; `replay_timing` is such a file by its own name.
    """

    precision: Precision = "fp16"
    batch: Annotated[
        BatchRange | None,
        Option(
            "Set the batch sizes of the plan, minimum:optimum:maximum, e.g. 1:4:8; an ONNX file needs a dynamic "
            "batch, a "
            "checkpoint is exported with one. [default: the ONNX file's; 1 for a checkpoint]",
            TARGET,
            read=str,
            parse=BatchRange.parse,
        ),
    ] = None
    compute_capabilities: Annotated[
        tuple[str, ...],
        Option(
            "Build for GPUs of these compute capabilities, separated by commas, e.g. 8.6,8.9,12.0 (TensorRT-RTX only). "
            "[default: 8.0 and later]",
            TARGET,
            name="compute-capability",
            read=str,
            default="",
            parse=lambda text: tuple(part for part in text.split(",") if part),
        ),
    ] = ()
    keep_fp32: tuple[str, ...] = ()
    optimization_level: Annotated[
        int | None,
        Option("Search this long for fast kernels: 0 (fast build) to 5. [default: TensorRT's]", BUILD),
    ] = None
    workspace_bytes: Annotated[
        int | None,
        Option(
            "Limit the plan's scratch memory on the GPU to this many GiB, e.g. 2. [default: no limit]",
            BUILD,
            name="workspace-gib",
            read=float,
            parse=lambda gib: int(gib * 2**30) if gib else None,
        ),
    ] = None
    version_compatible: Annotated[
        bool, Option("Build a plan that later versions of the same TensorRT can load, too.", TARGET)
    ] = False
    hardware_compatible: Annotated[
        Literal["none", "ampere+", "same"],
        Option(
            "Build a plan for this GPU alone (none), for compute capability 8.0 and later (ampere+), or for all GPUs "
            "of this one's compute capability (same); TensorRT only.",
            TARGET,
        ),
    ] = "none"
    timing_cache: Annotated[
        Path | None,
        Option(
            "Keep the measured times of kernels in this file for the next build, e.g. times.cache (TensorRT only). "
            "[default: not kept]",
            BUILD,
        ),
    ] = None
    replay_timing: Annotated[
        Path | None,
        Option(
            "Build with the kernels that this timing cache names, or fail if one is missing in it (TensorRT only). "
            "[default: kernels are measured]",
            BUILD,
        ),
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; two builds are alike where these are (the timing caches' places aside)."""
        values = dataclasses.asdict(self)
        values["batch"] = None if self.batch is None else str(self.batch)
        values["compute_capabilities"], values["keep_fp32"] = list(self.compute_capabilities), list(self.keep_fp32)
        del values["timing_cache"], values["replay_timing"]
        return values


def of_weights(option: Option) -> Option:
    """An option of the export that `trt` makes first if MODEL is a checkpoint."""
    return option.but(help=f"If MODEL is a checkpoint: {option.help[0].lower()}{option.help[1:]}")


@dataclasses.dataclass(frozen=True)
class WeightsOptions:
    """How a checkpoint is exported before its plan is built; all else is as `neck-export onnx` has it by default."""

    config: Annotated[EncoderConfig | None, of_weights(CONFIG)] = None
    state: Annotated[str | None, of_weights(STATE)] = None
    prefix: Annotated[str | None, of_weights(PREFIX)] = None
    adapter_alpha: Annotated[float | None, of_weights(ADAPTER_ALPHA)] = None
    image_size: Annotated[int | tuple[int, int] | None, of_weights(IMAGE_SIZE)] = None
    necks: Annotated[str, of_weights(NECKS)] = "auto"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to build; the help of the options says what they are.

    Attributes:
        precision: None is the file's.
        spelling: how fp32acc is written; None is what this TensorRT prefers, then what else it takes.
        fp8_attention: whether attentions may be FP8: those of an FP8 file, or of an FP32 file lowered to FP8.
        build: the builder's options; its precision and batch are taken from the file.
        checkpoint, adapter: the weights that the file was exported from, and what was merged into them, where they are
            no longer where its manifest says.
        weights: how the checkpoint is exported that stands in the place of the ONNX file (engines.api.make_engine).
    """

    onnx: Annotated[
        Path,
        Option(
            "ONNX file to build, or a checkpoint to export first: sam3.pt, a folder, a name on the Hugging Face Hub. "
            "[default: the newest ONNX file in build/]",
            name="model",
            default=None,
            argument=True,
        ),
    ]
    output: Annotated[
        Path, Option("Write the plan here. [default: beside the ONNX file, e.g. x.plan]", FILES, default=None)
    ]
    precision: Annotated[
        Precision | None,
        Option(
            "Compute in this precision; an FP32 file is lowered to it, and calibrated for fp8 and int8. [default: the "
            "precision of the ONNX file]",
            PRECISION,
            parse=choose_precision,
            always=True,
            also=SWITCHES,
        ),
    ] = None
    flavor: Annotated[
        Literal["auto", "tensorrt", "rtx"],
        Option(
            "Build with TensorRT or with TensorRT-RTX. [auto: TensorRT if it and a GPU are present, else TensorRT-RTX]",
            TARGET,
        ),
    ] = "auto"
    attention: Annotated[
        AttentionForm,
        ATTENTION.but(
            help="Choose the form of attention: fp32acc, fused or unfused. [auto: the form in the ONNX file, or the "
            "next one that this TensorRT builds]"
        ),
    ] = "auto"
    spelling: Spelling | None = None
    fp8_attention: bool = True
    upsampling: Annotated[Upsampling, UPSAMPLING] = "auto"
    keep_fp32: Annotated[tuple[str, ...], KEEP_FP32] = ()
    residual: Annotated[Residual, RESIDUAL] = "auto"
    quantize: Annotated[QuantizeOptions, Group] = dataclasses.field(default_factory=QuantizeOptions)
    build: Annotated[BuildOptions, Group] = dataclasses.field(default_factory=BuildOptions)
    verify: Annotated[bool, Option("Compare the plan with PyTorch before it gets its name.", VERIFICATION)] = True
    images: Images = None
    tolerances: Tolerances = dataclasses.field(default_factory=dict)
    checkpoint: FileCheckpoint = None
    adapter: Annotated[
        Path | None, FILE_ADAPTER.but(help=f"{FILE_ADAPTER.help} If MODEL is a checkpoint: merge it into the weights.")
    ] = None
    weights: Annotated[WeightsOptions, Group] = dataclasses.field(default_factory=WeightsOptions)
