"""What an export is asked for, by the command line and by Python; options that other commands share (no torch)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from export.contract.signature import BatchRange, InputKind, Positions, Sam2Outputs
from neck.config import EncoderConfig
from neck.hub import local_checkpoint
from neck.option import Group, Option, OptionError
from neck.source import EncoderSource

if TYPE_CHECKING:
    from neck.images import ImageFolder

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
OutputPrecision = Literal["fp32", "fp16", "bf16"]
AttentionForm = Literal["auto", "fp32acc", "fused", "unfused"]
Spelling = Literal["matmul", "operator"]
Upsampling = Literal["auto", "deconv", "conv"]
Residual = Literal["auto", "fp16", "fp32"]

DEFAULT_CHECKPOINT = Path("sam3.pt")
DEFAULT_ONNX = Path("build/sam3-encoder.onnx")

WEIGHTS, TENSORS, PRECISION = "Weights", "Input and outputs", "Precision"
TARGET, VERIFICATION, FILES = "Target", "Verification", "Files"
"""Headings of `--help`, in the order in which they are printed (neck_export.py has those of single commands)."""


def choose_checkpoint(asked: str | None) -> Path | None:
    """The checkpoint to read, or None for random weights, with a message if that was not requested."""
    if asked == "random":
        return None
    if asked is not None:
        return local_checkpoint(asked)
    if DEFAULT_CHECKPOINT.exists():
        return DEFAULT_CHECKPOINT
    print(
        f"--checkpoint was not given and the current folder contains no {DEFAULT_CHECKPOINT}, so seeded RANDOM "
        "weights are exported",
        file=sys.stderr,
    )
    return None


def parse_size(size: str) -> int | tuple[int, int]:
    """Reads `1008` or `1008x672` (height x width)."""
    sides = size.lower().split("x")
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        raise OptionError(
            f"{size!r} is not an image size; use a number of pixels such as 1008, or height x width such as 1008x672"
        ) from None
    if len(numbers) > 2:
        raise OptionError(f"{size!r} is not an image size; use one number such as 1008, or two such as 1008x672")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_images(images: Path | None, image_range: str | None) -> Path | ImageFolder | None:
    """The folder of --images, read with --image-range (`LOW:HIGH`); reports which of its files are skipped."""
    if images is None:
        if image_range is not None:
            raise OptionError("--image-range requires --images", RANGE.name)
        return None
    from neck.images import ImageError, ImageFolder, ValueRange, find_images, skipped_line

    try:
        skipped = skipped_line(images) if find_images(images) else None
    except ImageError:  # the stage says it, with what was skipped
        skipped = None
    if skipped:
        print(f"note: {skipped}", file=sys.stderr)
    if image_range is None:
        return images
    try:
        return ImageFolder(images, ValueRange.parse(image_range))
    except ImageError as error:
        raise OptionError(str(error), RANGE.name) from None


def parse_opset(opset: str) -> int | None:
    """Reads a number or `auto`."""
    if opset == "auto":
        return None
    if not opset.isdecimal():
        raise OptionError(f"{opset!r} is not an opset; use a number from 17 to 24, or auto")
    return int(opset)


def parse_tolerances(given: Sequence[str]) -> dict[str, float]:
    """Reads NAME=VALUE pairs."""
    pairs = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            pairs[name] = float(value)
        except ValueError:
            raise OptionError(
                f"{pair!r} is not a tolerance; write it as NAME=VALUE, such as sam3_feat_0=0.02"
            ) from None
    return pairs


def parse_attention(text: str) -> str:
    """Parses a form of attention; a removed one is refused with its replacement."""
    forms = get_args(AttentionForm)
    if text == "scores32":
        raise OptionError(
            "--attention scores32 was removed; use --attention fp32acc, which the same runtimes support and which "
            "accumulates in FP32"
        )
    if text not in forms:
        raise OptionError(f"--attention {text!r} is not supported; use one of {', '.join(forms)}")
    return text


# options of several commands
CHECKPOINT = Option(
    "Read the encoder's weights from this source: a checkpoint file such as sam3.pt; a folder with a sharded "
    "checkpoint; a repository on the Hugging Face Hub such as facebook/sam3 or owner/name@revision/file, which is "
    "downloaded; or `random` for seeded random weights. [default: sam3.pt if the current folder contains it, else "
    "random]",
    WEIGHTS,
    read=str,
    parse=choose_checkpoint,
    always=True,
)
ADAPTER = Option(
    "Merge the LoRA adapter in this PEFT folder, e.g. my-lora, into the weights. [default: no adapter is merged]",
    WEIGHTS,
)
ADAPTER_ALPHA = Option(
    "Use this lora_alpha, e.g. 16, for a LoRA adapter that the checkpoint contains beside the weights. Only needed if "
    "the checkpoint does not contain the value. [default: the value in the checkpoint]",
    WEIGHTS,
)
STATE = Option(
    "Read the state dict with this name, e.g. ema, from a training checkpoint that contains several state dicts. "
    "[default: the only state dict that contains an encoder; if several do, the one that comes first in this list: "
    "`model`, `state_dict`, `model_state_dict`, `module`, `net`, `network`, `weights`]",
    WEIGHTS,
)
PREFIX = Option(
    "Read the encoder whose tensor names begin with this prefix, e.g. `detector.`. Only needed if the checkpoint "
    "contains several encoders. [default: the checkpoint's only encoder]",
    WEIGHTS,
)
CONFIG = Option(
    "Read the encoder's architecture (depth, width, window size and so on) from this JSON file, e.g. encoder.json. "
    "[default: inferred from the weights]",
    WEIGHTS,
    read=Path,
    parse=EncoderConfig.from_file,
)
IMAGE_SIZE = Option(
    "Set the size of the encoder's input image in pixels: one number for a square image, e.g. 1008, or height x "
    "width, e.g. 1008x672. [default: the size in the encoder's configuration if there is one, else 1008]",
    TENSORS,
    read=str,
    parse=parse_size,
)
NECKS = Option(
    "Include these necks; each neck returns a feature pyramid. Write the names of the necks separated by commas, e.g. "
    "sam3,sam2, or one of these words: `all` (every neck of the checkpoint), `both` (sam3 and sam2) or `auto` (sam3, "
    "or the only neck of the checkpoint). A SAM 3.1 checkpoint has the necks sam3, interactive and propagation.",
    TENSORS,
    name="neck",
)
LEVELS = Option(
    "Include these levels of every feature pyramid: all, or numbers separated by commas, e.g. 0,1,2. Level 0 has "
    "the highest resolution.",
    TENSORS,
)
SAM2_OUTPUTS = Option(
    "Choose what the sam2 neck returns: features (its feature pyramid), or head (the three inputs of SAM 2's mask "
    "decoder, sam2_high_res_0, sam2_high_res_1 and sam2_feat_2). With head, the encoder also contains the decoder's "
    "convolutions conv_s0 and conv_s1.",
    TENSORS,
)
ATTENTION = Option(
    "Choose how attention is computed. fp32acc uses one kernel, whose matrix multiplications accumulate in FP32. fused "
    "uses one kernel, whose matrix multiplications accumulate in FP16 (in FP32 if --precision is fp32 or bf16). "
    "unfused uses several slower kernels and computes the scores in FP32. auto chooses fused for fp32 and bf16, and "
    "fp32acc for fp16, fp8 and int8.",
    PRECISION,
    read=str,
    default="auto",
    parse=parse_attention,
    settings={"metavar": f"<{'|'.join(get_args(AttentionForm))}>"},
)
KEEP_FP32 = Option(
    "Keep the module with this path in FP32 when the precision is lower, e.g. trunk.blocks.31. Wildcards are "
    "allowed ('convs.*'), and the option can be repeated. [default: no module is kept]",
    PRECISION,
)
UPSAMPLING = Option(
    "Choose the ONNX operators for the upsampling in the necks: deconv (ConvTranspose) or conv (1x1 convolution "
    "and DepthToSpace, with the same result). auto chooses conv for bf16 and deconv for every other precision.",
    PRECISION,
)
RESIDUAL = Option(
    "Choose the type of the residual sums in the transformer blocks: fp16 (only if --precision is fp16, fp8 or int8) "
    "or fp32, which reduces the numerical error but increases memory traffic. auto uses the type of the other "
    "activations, or fp32 if the ONNX file would otherwise fail verification.",
    PRECISION,
)
TARGETS = Option(
    "Write a file that each of these runtimes can load; separate their names with commas, e.g. "
    "tensorrt-10.3,triton-25.09. A name may end in @ and the compute capability of a GPU, e.g. tensorrt-10.3@8.9. "
    "[default: no particular runtime]",
    TARGET,
    name="target",
)
RANGE = Option(
    "Map the pixel value LOW to black and HIGH to white in images with more than 8 bits per channel; the format is "
    "LOW:HIGH, e.g. 0:4095. [default: the high byte of 16-bit values is used]",
    VERIFICATION,
    name="image-range",
    read=str,
    default=None,
)
IMAGES_HELP = (
    "Compare the outputs with those of PyTorch for the first images in this folder, e.g. photos/. If the batch size is "
    "fixed, one batch of images is used. If the batch size is dynamic, 2 images are used, or more if the minimum batch "
    "size is above 2. "
)
IMAGES_DEFAULT = "[default: the sample photo that is installed with neck-export]"
IMAGES = Option(
    IMAGES_HELP + IMAGES_DEFAULT,
    VERIFICATION,
    read=Path,
    parse=parse_images,
    always=True,
    also=(RANGE,),
)
TOLERANCES = Option(
    "Set the largest relative L2 error that an output may have, written NAME=VALUE, e.g. sam3_feat_0=0.02. NAME may "
    "contain wildcards, e.g. '*_feat_*=0.02', and the option can be repeated. [default: the tolerance of the "
    "precision, e.g. 0.01 for fp16]",
    VERIFICATION,
    name="tolerance",
    read=list[str],
    parse=parse_tolerances,
)
FILE_CHECKPOINT = Option(
    "Compare the outputs with those that PyTorch computes with the weights of this checkpoint, e.g. sam3.pt. [default: "
    "the checkpoint named in the manifest of the ONNX file or plan]",
    VERIFICATION,
)
FILE_ADAPTER = Option(
    "Merge the LoRA adapter in this PEFT folder, e.g. my-lora, into the checkpoint before the comparison with "
    "PyTorch. [default: the adapter that the file's manifest names]",
    VERIFICATION,
)
DEVICE = Option(
    "Run the plan on the GPU with this CUDA device number, e.g. 1. [default: 0]",
    TARGET,
    name="device",
    settings={"min": 0},
)

Images = Annotated["Path | ImageFolder | None", IMAGES]
CALIBRATION_HELP = "With --precision fp8 or int8, up to 16 images in this folder are also used for the calibration. "
CalibrationImages = Annotated[
    "Path | ImageFolder | None", IMAGES.but(help=IMAGES_HELP + CALIBRATION_HELP + IMAGES_DEFAULT)
]
Tolerances = Annotated[Mapping[str, float], TOLERANCES]
FileCheckpoint = Annotated[Path | None, FILE_CHECKPOINT]
FileAdapter = Annotated[Path | None, FILE_ADAPTER]


@dataclasses.dataclass(frozen=True)
class Rewrites:
    """Which rewrites to apply; all by default."""

    window_major: bool = True
    rope_halves: bool = True
    fold_scale: bool = True
    merge_upsampling: bool = True
    position_tables: bool = True
    fold_head: bool = True

    @classmethod
    def none(cls) -> Rewrites:
        """No rewrite: the plain module, as `--no-rewrite` exports it."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """What is asked of an FP8 or INT8 file.

    Attributes:
        products: patterns of products (FP8: attentions and results too), or `all`; with `auto`, or without any, as many
            of them as the budget allows.
        budget: None is the precision's tolerance.
    """

    products: Annotated[
        tuple[str, ...],
        Option(
            "Choose the linear layers that --precision fp8 or int8 quantizes: auto (as many as --budget allows), "
            "all, or a name pattern such as '*.mlp.fc2'; the option can be repeated. With fp8, patterns can also "
            "select attention ('*.attn.attention') and the outputs of linear layers ('*.mlp.fc1.result'). "
            "[default: auto]",
            PRECISION,
            name="quantize",
        ),
    ] = ()
    budget: Annotated[
        float | None,
        Option(
            "Set the largest relative L2 error that any feature output may have with --precision fp8 or int8, e.g. "
            "0.03. With --quantize auto, as many layers are quantized as this limit allows. If the ONNX file exceeds "
            "the limit, the export fails. [default: 0.05]",
            PRECISION,
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Option(
            "Set the file for the calibration of --precision fp8 or int8, e.g. build/sam3.calibration.safetensors. If "
            "the file exists, the calibration in it is reused; otherwise, the new calibration is saved there. "
            "[default: the calibration is not saved]",
            PRECISION,
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export; the help of the options says what they are.

    `checkpoint` is None for seeded random weights, and `image_size` None for the config's. `necks` of `auto` are sam3,
    or what is there if sam3 is not. Without `targets` the form is left to `attention` and `opset`.
    """

    output: Annotated[
        Path,
        Option(
            "Write the ONNX file to this path. Its weights (.onnx.data) and its manifest (.json) are written to the "
            "same folder.",
            FILES,
        ),
    ] = DEFAULT_ONNX
    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    adapter: Annotated[Path | None, ADAPTER] = None
    adapter_alpha: Annotated[float | None, ADAPTER_ALPHA] = None
    state: Annotated[str | None, STATE] = None
    prefix: Annotated[str | None, PREFIX] = None
    config: Annotated[EncoderConfig | None, CONFIG] = None
    seed: Annotated[
        int,
        Option(
            "Set the seed of the random weights that `--checkpoint random` creates.",
            WEIGHTS,
            settings={"min": 0, "max": 2**31 - 1},
        ),
    ] = 0
    image_size: Annotated[int | tuple[int, int] | None, IMAGE_SIZE] = None
    batch: Annotated[
        BatchRange,
        Option(
            "Set the batch size (images per inference call): one number for a fixed batch size, e.g. 4, or "
            "minimum:optimum:maximum for a dynamic one, e.g. 1:4:8.",
            TENSORS,
            read=str,
            default="1",
            parse=BatchRange.parse,
        ),
    ] = dataclasses.field(default_factory=BatchRange)
    necks: Annotated[str, NECKS] = "auto"
    levels: Annotated[str, LEVELS] = "all"
    positions: Annotated[
        Positions,
        Option(
            "Choose where the position encodings are written: graph (the ONNX file returns them as outputs), file "
            "(they are written once, to a file beside the ONNX file), or none (they are not written).",
            TENSORS,
        ),
    ] = "graph"
    sam2_outputs: Annotated[Sam2Outputs, SAM2_OUTPUTS] = "features"
    input_kind: Annotated[
        InputKind,
        Option(
            "Choose the type of the file's input: float (normalized images of shape (B, 3, H, W)) or uint8 (RGB "
            "pixels of shape (B, H, W, 3), which the file itself normalizes).",
            TENSORS,
            name="input",
        ),
    ] = "float"
    precision: Annotated[
        Precision,
        Option(
            "Choose the type of the weights and activations. fp8 and int8 quantize the matrix multiplications and "
            "keep the rest in FP16.",
            PRECISION,
        ),
    ] = "fp32"
    attention: Annotated[AttentionForm, ATTENTION] = "auto"
    upsampling: Annotated[Upsampling, UPSAMPLING] = "auto"
    keep_fp32: Annotated[tuple[str, ...], KEEP_FP32] = ()
    output_precision: Annotated[
        OutputPrecision | None,
        Option(
            "Set the type of the exported encoder's outputs, e.g. fp32. [default: the type of --precision, or fp16 if "
            "--precision is fp8 or int8]",
            TENSORS,
            name="output-dtype",
        ),
    ] = None
    opset: Annotated[
        int | None,
        Option(
            "Write the ONNX file with this opset, a number from 17 to 24. auto chooses 20, or 22 for bf16, unless "
            "--target needs another one.",
            TARGET,
            read=str,
            default="auto",
            parse=parse_opset,
        ),
    ] = None
    residual: Annotated[Residual, RESIDUAL] = "auto"
    quantize: Annotated[QuantizeOptions, Group] = dataclasses.field(default_factory=QuantizeOptions)
    targets: Annotated[str, TARGETS] = ""
    rewrites: Annotated[
        Rewrites,
        Option(
            "Apply graph rewrites that make the encoder faster and do not change its result, apart from rounding. "
            "--no-rewrite exports the original PyTorch module.",
            TARGET,
            name="rewrite",
            read=bool,
            default=True,
            parse=lambda wanted: Rewrites() if wanted else Rewrites.none(),
        ),
    ] = dataclasses.field(default_factory=Rewrites)
    verify: Annotated[
        bool,
        Option(
            "Compare the outputs of the ONNX file with those of PyTorch, and keep no file if they differ by more than "
            "the tolerance. --no-verify skips the comparison.",
            VERIFICATION,
        ),
    ] = True
    images: CalibrationImages = None
    tolerances: Tolerances = dataclasses.field(default_factory=dict)

    @property
    def source(self) -> EncoderSource:
        """The encoder's weights and, where these do not tell it, its architecture."""
        adapter = (self.adapter, self.adapter_alpha)
        return EncoderSource(self.checkpoint, self.seed, self.state, self.prefix, *adapter, self.config)


@dataclasses.dataclass(frozen=True)
class BisectOptions:
    """The file in which to find the block that leaves tolerance."""

    file: Annotated[
        Path,
        Option(
            "Find the modules that cause the numerical error of this file: an ONNX file in FP16 or BF16, or a TensorRT "
            "plan. If the export wrote no ONNX file because verification failed, first repeat the export with "
            "--no-verify.",
            argument=True,
        ),
    ]
    checkpoint: FileCheckpoint = None
    adapter: FileAdapter = None
    images: Images = None
    tolerances: Tolerances = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """The file to verify, and how."""

    file: Annotated[
        Path,
        Option(
            "Verify this file: an ONNX file or a TensorRT plan that neck-export wrote, or a SAM 3 encoder that "
            "another tool exported to ONNX, which requires --checkpoint.",
            argument=True,
        ),
    ]
    checkpoint: FileCheckpoint = None
    adapter: FileAdapter = None
    state: Annotated[str | None, STATE] = None
    prefix: Annotated[str | None, PREFIX] = None
    config: Annotated[EncoderConfig | None, CONFIG] = None
    images: Images = None
    tolerances: Tolerances = dataclasses.field(default_factory=dict)
    write_manifest: Annotated[
        bool,
        Option(
            "If the ONNX file was written by another exporter and passes verification, write a manifest, so that the "
            "trt, triton and masks commands accept the file. If its inputs or outputs do not have the names, shapes "
            "and types that these commands need, an adapted copy with its own manifest is written instead, e.g. "
            "model.neck.onnx for model.onnx.",
            VERIFICATION,
        ),
    ] = False
    save_reference: Annotated[
        Path | None,
        Option(
            "Save the images and PyTorch's outputs to this .safetensors file, e.g. build/reference.safetensors, so "
            "that the C++ program `neck-engine --compare` can check a plan against them. [default: not saved]",
            VERIFICATION,
        ),
    ] = None
    targets: Annotated[
        str,
        TARGETS.but(
            help="Fail if one of these runtimes cannot load the ONNX file; separate their names with commas, e.g. "
            "tensorrt-10.3,triton-25.09. [default: no runtime is checked]"
        ),
    ] = ""
    device: Annotated[int | None, DEVICE] = None
