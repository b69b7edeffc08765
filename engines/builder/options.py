"""The options of a build, for the command line and for Python; this module does not import torch."""

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
    CalibrationImages,
    FileCheckpoint,
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
"""The optimization profile of a dynamic batch if no range is given."""

SWITCHES = tuple(
    Option(
        f"Compute in {name.upper()}; this is a short form of --precision {name}.",
        PRECISION,
        f"--{name}",
        bool,
        default=False,
    )
    for name in ("fp16", "bf16", "fp32")
)


def choose_precision(named: Precision | None, *switched: bool) -> Precision | None:
    """Returns the precision that --precision or one of the switches requests; None if none does.

    Raises:
        OptionError: several precisions were requested.
    """
    chosen: list[Any] = [one.key() for one, on in zip(SWITCHES, switched, strict=True) if on]
    chosen += [named] if named else []
    if len(chosen) > 1:
        raise OptionError(f"the precisions {' and '.join(chosen)} were requested together; choose one of them")
    return chosen[0] if chosen else None


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How a plan is built; the help texts of the options describe them.

    Attributes:
        precision: the precision of the matrix multiplications and convolutions in the graph.
        batch: the optimization profile of a file with dynamic batch; by default 1:4:8.
        compute_capabilities: such as ("8.9", "12.0"); empty means the flavor's default.
        keep_fp32: paths of modules that may stay in FP32; wildcards are allowed.
        workspace_bytes: the limit on scratch memory in bytes; None means no limit.
        hardware_compatible: `ampere+` means compute capability 8.0 and later, `same` that of this GPU.
        timing_cache: the file name, which is extended by flavor, version and GPU; `replay_timing` is used unchanged.
    """

    precision: Precision = "fp16"
    batch: Annotated[
        BatchRange | None,
        Option(
            "Set the batch sizes that the plan accepts, as minimum:optimum:maximum, e.g. 1:4:8. If MODEL is an ONNX "
            "file, its batch size must be dynamic. If MODEL is a checkpoint, it is exported with these batch sizes. "
            "[default: the batch sizes of the ONNX file, or batch size 1 for a checkpoint]",
            TARGET,
            read=str,
            parse=BatchRange.parse,
        ),
    ] = None
    compute_capabilities: Annotated[
        tuple[str, ...],
        Option(
            "Build the plan for GPUs with these compute capabilities, separated by commas, e.g. 8.6,8.9,12.0. Only "
            "TensorRT-RTX supports this option. [default: 8.0 and later]",
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
        Option(
            "Set TensorRT's builder optimization level, from 0 (fast build) to 5 (longest search for fast kernels), "
            "e.g. 4. [default: TensorRT's own default]",
            BUILD,
        ),
    ] = None
    workspace_bytes: Annotated[
        int | None,
        Option(
            "Limit the workspace (scratch memory) that the plan may use on the GPU to this many GiB, e.g. 2. "
            "[default: no limit]",
            BUILD,
            name="workspace-gib",
            read=float,
            parse=lambda gib: int(gib * 2**30) if gib else None,
        ),
    ] = None
    version_compatible: Annotated[
        bool,
        Option(
            "Build a plan that can also be loaded by later versions of TensorRT (of TensorRT-RTX with --flavor rtx), "
            "not only by the version that built the plan.",
            TARGET,
        ),
    ] = False
    hardware_compatible: Annotated[
        Literal["none", "ampere+", "same"],
        Option(
            "Choose the GPUs that can load the plan: none (only GPUs of the same model as the GPU that builds the "
            "plan), ampere+ (compute capability 8.0 and later), or same (GPUs with the same compute capability). For "
            "TensorRT-RTX (--flavor rtx), use --compute-capability instead.",
            TARGET,
        ),
    ] = "none"
    timing_cache: Annotated[
        Path | None,
        Option(
            "Save the kernel times that TensorRT measures to this timing cache file, e.g. times.cache, and reuse them "
            "in the next build. TensorRT-RTX does not support this option. [default: no timing cache]",
            BUILD,
        ),
    ] = None
    replay_timing: Annotated[
        Path | None,
        Option(
            "Choose kernels by the times in this timing cache instead of measuring them, and fail if a time is "
            "missing, so that repeated builds choose the same kernels. TensorRT-RTX does not support this option. "
            "[default: kernels are measured]",
            BUILD,
        ),
    ] = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON values, without the paths of timing caches; equal values mean equal builds."""
        values = dataclasses.asdict(self)
        values["batch"] = None if self.batch is None else str(self.batch)
        values["compute_capabilities"], values["keep_fp32"] = list(self.compute_capabilities), list(self.keep_fp32)
        del values["timing_cache"], values["replay_timing"]
        return values


def of_weights(option: Option) -> Option:
    """Returns an export option as an option of `trt`, which applies only if MODEL is a checkpoint."""
    return option.but(help=f"If MODEL is a checkpoint, {option.help[0].lower()}{option.help[1:]}")


@dataclasses.dataclass(frozen=True)
class WeightsOptions:
    """How a checkpoint is exported before its plan is built; everything else has the defaults of `neck-export onnx`."""

    config: Annotated[EncoderConfig | None, of_weights(CONFIG)] = None
    state: Annotated[str | None, of_weights(STATE)] = None
    prefix: Annotated[str | None, of_weights(PREFIX)] = None
    adapter_alpha: Annotated[float | None, of_weights(ADAPTER_ALPHA)] = None
    image_size: Annotated[int | tuple[int, int] | None, of_weights(IMAGE_SIZE)] = None
    necks: Annotated[str, of_weights(NECKS)] = "auto"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What `neck-export trt` builds; the help texts of the options describe them.

    Attributes:
        precision: None means the precision of the file.
        spelling: how fp32acc is written; None tries the spelling that this TensorRT prefers, then the other.
        fp8_attention: whether attentions may be FP8, in an FP8 file or in an FP32 file that is lowered to FP8.
        build: the options of the builder; its precision and batch come from the file.
        checkpoint, adapter: the weights that the file was exported from and the adapter merged into them, if they are
            no longer at the paths in the manifest.
        weights: how a checkpoint is exported if one is given instead of an ONNX file (engines.api.make_engine).
    """

    onnx: Annotated[
        Path,
        Option(
            "Build a plan from this ONNX file or checkpoint. A checkpoint (a file such as sam3.pt, a folder, or a "
            "repository on the Hugging Face Hub) is exported to ONNX first. [default: the newest ONNX file in build/]",
            name="model",
            default=None,
            argument=True,
        ),
    ]
    output: Annotated[
        Path,
        Option(
            "Write the plan to this path, e.g. build/l4.plan. [default: the path of the ONNX file with the suffix "
            ".plan]",
            FILES,
            default=None,
        ),
    ]
    precision: Annotated[
        Precision | None,
        Option(
            "Choose the precision of the plan. An ONNX file in FP32 is converted to this precision (for fp8 and int8 "
            "after a calibration); any other ONNX file must already have the chosen precision. [default: the precision "
            "of the ONNX file]",
            PRECISION,
            parse=choose_precision,
            always=True,
            also=SWITCHES,
        ),
    ] = None
    flavor: Annotated[
        Literal["auto", "tensorrt", "rtx"],
        Option(
            "Build the plan with TensorRT or with TensorRT-RTX (rtx). auto chooses TensorRT if the tensorrt "
            "package and a GPU are present, and TensorRT-RTX otherwise.",
            TARGET,
        ),
    ] = "auto"
    attention: Annotated[
        AttentionForm,
        ATTENTION.but(
            help="Choose how attention is computed. fp32acc uses one kernel, whose matrix multiplications accumulate "
            "in FP32. fused uses one kernel, whose matrix multiplications accumulate in FP16 (in FP32 in a BF16 plan). "
            "unfused uses several slower kernels and computes the scores in FP32. auto keeps the value that the export "
            "used. If the export used auto too, it chooses fp32acc (in a BF16 plan: fused), or unfused if TensorRT "
            "cannot build that kernel."
        ),
    ] = "auto"
    spelling: Spelling | None = None
    fp8_attention: bool = True
    upsampling: Annotated[Upsampling, UPSAMPLING] = "auto"
    keep_fp32: Annotated[tuple[str, ...], KEEP_FP32] = ()
    residual: Annotated[Residual, RESIDUAL] = "auto"
    quantize: Annotated[QuantizeOptions, Group] = dataclasses.field(default_factory=QuantizeOptions)
    build: Annotated[BuildOptions, Group] = dataclasses.field(default_factory=BuildOptions)
    verify: Annotated[
        bool,
        Option(
            "Compare the outputs of the plan with those of PyTorch, and rename the plan to X.plan.rejected if they "
            "differ by more than the tolerance. --no-verify skips the comparison.",
            VERIFICATION,
        ),
    ] = True
    images: CalibrationImages = None
    tolerances: Tolerances = dataclasses.field(default_factory=dict)
    checkpoint: FileCheckpoint = None
    adapter: Annotated[
        Path | None,
        FILE_ADAPTER.but(
            help="Use the LoRA adapter in this PEFT folder, e.g. my-lora. With a checkpoint as MODEL, the adapter is "
            "merged into the weights before the export. With an ONNX file as MODEL, the file must already contain the "
            "merged weights; the adapter then only helps to compute PyTorch's outputs for the verification. [default: "
            "the adapter named in the manifest of the ONNX file]"
        ),
    ] = None
    weights: Annotated[WeightsOptions, Group] = dataclasses.field(default_factory=WeightsOptions)
