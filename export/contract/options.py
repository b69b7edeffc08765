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
        f"there is no --checkpoint and no {DEFAULT_CHECKPOINT} in this folder, so seeded RANDOM weights are exported",
        file=sys.stderr,
    )
    return None


def parse_size(size: str) -> int | tuple[int, int]:
    """Reads `1008` or `1008x672` (height x width)."""
    sides = size.lower().split("x")
    try:
        numbers = [int(side) for side in sides]
    except ValueError:
        raise OptionError(f"{size!r}: expected pixels such as 1008 or 1008x672") from None
    if len(numbers) > 2:
        raise OptionError(f"{size!r}: expected one or two numbers")
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
        raise OptionError(f"{opset!r}: expected a number from 17 to 24, or auto")
    return int(opset)


def parse_tolerances(given: Sequence[str]) -> dict[str, float]:
    """Reads NAME=VALUE pairs."""
    pairs = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            pairs[name] = float(value)
        except ValueError:
            raise OptionError(f"{pair!r}: expected NAME=VALUE, such as sam3_feat_0=0.02") from None
    return pairs


def parse_attention(text: str) -> str:
    """Parses a form of attention; a removed one is refused with its replacement."""
    forms = get_args(AttentionForm)
    if text == "scores32":
        raise OptionError(
            "scores32 was removed; use fp32acc, which the same runtimes read and which accumulates in FP32"
        )
    if text not in forms:
        raise OptionError(f"{text!r} is not one of {', '.join(forms)}")
    return text


# options of several commands
CHECKPOINT = Option(
    "Read the weights from this file or folder, or download them: sam3.pt, a folder of shards, a name on the Hugging "
    "Face Hub such as facebook/sam3 (also owner/name@revision/file), or `random` for seeded random weights. "
    "[default: sam3.pt in this folder if it exists, else random]",
    WEIGHTS,
    read=str,
    parse=choose_checkpoint,
    always=True,
)
ADAPTER = Option("Merge the LoRA of this PEFT folder into the weights, e.g. my-lora. [default: none]", WEIGHTS)
ADAPTER_ALPHA = Option(
    "Use this lora_alpha if the checkpoint contains an adapter without one, e.g. 16. [default: the checkpoint's]",
    WEIGHTS,
)
STATE = Option(
    "Read this state dict of a training checkpoint that contains several, e.g. ema. [default: the model's, or the "
    "only one]",
    WEIGHTS,
)
PREFIX = Option(
    "Read the encoder with this prefix of a checkpoint that holds several, e.g. `detector.`. [default: the only one]",
    WEIGHTS,
)
CONFIG = Option(
    "Read the architecture from this JSON file, e.g. encoder.json. [default: inferred from the weights]",
    WEIGHTS,
    read=Path,
    parse=EncoderConfig.from_file,
)
IMAGE_SIZE = Option(
    "Set the size of the input in pixels: one side (1008), or height x width (1008x672). [default: 1008, or the "
    "config's]",
    TENSORS,
    read=str,
    parse=parse_size,
)
NECKS = Option(
    "Include these necks: auto (sam3, or the checkpoint's only neck), both (sam3 and sam2), all, or names separated by "
    "commas, e.g. sam3,interactive.",
    TENSORS,
    name="neck",
)
LEVELS = Option(
    "Include these levels of the feature pyramid, separated by commas; 0 is the finest, e.g. 0,1,2.", TENSORS
)
SAM2_OUTPUTS = Option(
    "Choose what the sam2 neck returns: its features, or (head) what SAM 2's mask decoder reads: sam2_high_res_0, "
    "sam2_high_res_1 and sam2_feat_2, with the decoder's conv_s0 and conv_s1 included.",
    TENSORS,
)
ATTENTION = Option(
    "Choose the form of attention: fp32acc and unfused compute FP16 attention with FP32 accumulation or FP32 scores, "
    "fused in the precision itself. [auto: fp32acc for fp16, fp8 and int8, else fused]",
    PRECISION,
    read=str,
    default="auto",
    parse=parse_attention,
    settings={"metavar": f"<{'|'.join(get_args(AttentionForm))}>"},
)
KEEP_FP32 = Option(
    "Keep this module in FP32; wildcards are allowed and the option is repeatable, e.g. trunk.blocks.31 or 'convs.*'. "
    "[default: none]",
    PRECISION,
)
UPSAMPLING = Option(
    "Write the necks' upsampling as ConvTranspose (deconv) or as 1x1 convolution and DepthToSpace (conv). [auto: conv "
    "for bf16, else deconv]",
    PRECISION,
)
RESIDUAL = Option(
    "Choose the type of the blocks' residual sums. [auto: the type of --precision, or FP32 if the file would fail "
    "verification otherwise]",
    PRECISION,
)
TARGETS = Option(
    "Name the runtimes that must be able to load the file, separated by commas, e.g. tensorrt-10.3,triton-25.09; a "
    "name may end in @ and a compute capability, e.g. tensorrt-10.3@8.9. [default: none; --attention and --opset "
    "decide]",
    TARGET,
    name="target",
)
RANGE = Option(
    "Read LOW as black and HIGH as white in images with more than 8 bits per channel, e.g. 0:4095. [default: the high "
    "byte]",
    VERIFICATION,
    name="image-range",
    read=str,
    default=None,
)
IMAGES = Option(
    "Verify on the images of this folder: the first ones, as many as the optimal batch size. [default: the packaged "
    "image]",
    VERIFICATION,
    read=Path,
    parse=parse_images,
    always=True,
    also=(RANGE,),
)
TOLERANCES = Option(
    "Allow this relative L2 error for the outputs of this name; repeatable, e.g. sam3_feat_0=0.02 or '*_feat_*=0.02'. "
    "[default: the precision's]",
    VERIFICATION,
    name="tolerance",
    read=list[str],
    parse=parse_tolerances,
)
FILE_CHECKPOINT = Option(
    "Compare with the weights of this checkpoint. [default: the checkpoint that the manifest names]", VERIFICATION
)
FILE_ADAPTER = Option(
    "Merge this adapter into the checkpoint before the comparison. [default: the adapter that the manifest names]",
    VERIFICATION,
)
DEVICE = Option(
    "Run the plan on the GPU with this number, e.g. 1. [default: 0]", TARGET, name="device", settings={"min": 0}
)

Images = Annotated["Path | ImageFolder | None", IMAGES]
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
            "For fp8 and int8: quantize these linear layers: auto (as many as --budget allows), all, or a pattern "
            "such as '*.mlp.fc2'; repeatable. With fp8, patterns can also select attention ('*.attn.attention') and "
            "the outputs of layers ('*.mlp.fc1.result'). [default: auto]",
            PRECISION,
            name="quantize",
        ),
    ] = ()
    budget: Annotated[
        float | None,
        Option("For fp8 and int8: allow every feature this relative L2 error, e.g. 0.03. [default: 0.05]", PRECISION),
    ] = None
    calibration: Annotated[
        Path | None,
        Option(
            "For fp8 and int8: store the calibration in this file, or reuse it if it exists, e.g. "
            "build/sam3.calibration.safetensors. [default: not stored]",
            PRECISION,
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What to export; the help of the options says what they are.

    `checkpoint` is None for seeded random weights, and `image_size` None for the config's. `necks` of `auto` are sam3,
    or what is there if sam3 is not. Without `targets` the form is left to `attention` and `opset`.
    """

    output: Annotated[Path, Option("Write the ONNX file here, its weights and manifest beside it.", FILES)] = (
        DEFAULT_ONNX
    )
    checkpoint: Annotated[Path | None, CHECKPOINT] = None
    adapter: Annotated[Path | None, ADAPTER] = None
    adapter_alpha: Annotated[float | None, ADAPTER_ALPHA] = None
    state: Annotated[str | None, STATE] = None
    prefix: Annotated[str | None, PREFIX] = None
    config: Annotated[EncoderConfig | None, CONFIG] = None
    seed: Annotated[
        int,
        Option("Seed the random weights of `--checkpoint random`.", WEIGHTS, settings={"min": 0, "max": 2**31 - 1}),
    ] = 0
    image_size: Annotated[int | tuple[int, int] | None, IMAGE_SIZE] = None
    batch: Annotated[
        BatchRange,
        Option(
            "Set the batch size: a fixed one (4), or minimum:optimum:maximum (1:4:8) for a dynamic batch.",
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
            "Write the position encodings as outputs (graph), to a file beside the ONNX file (file), or not at all "
            "(none).",
            TENSORS,
        ),
    ] = "graph"
    sam2_outputs: Annotated[Sam2Outputs, SAM2_OUTPUTS] = "features"
    input_kind: Annotated[
        InputKind,
        Option(
            "Choose the input: float takes normalized images (B, 3, H, W), uint8 RGB pixels (B, H, W, 3).",
            TENSORS,
            name="input",
        ),
    ] = "float"
    precision: Annotated[Precision, Option("Compute in this precision; it is the type of the weights.", PRECISION)] = (
        "fp32"
    )
    attention: Annotated[AttentionForm, ATTENTION] = "auto"
    upsampling: Annotated[Upsampling, UPSAMPLING] = "auto"
    keep_fp32: Annotated[tuple[str, ...], KEEP_FP32] = ()
    output_precision: Annotated[
        OutputPrecision | None,
        Option(
            "Return the outputs in this type, e.g. fp32. [default: the type of --precision; fp16 for fp8 and int8]",
            TENSORS,
            name="output-dtype",
        ),
    ] = None
    opset: Annotated[
        int | None,
        Option(
            "Write this ONNX opset, 17 to 24. [auto: 20, or 22 for bf16, if --target does not need another]",
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
            "Apply the rewrites that make the graph faster and are exact in real arithmetic.",
            TARGET,
            name="rewrite",
            read=bool,
            default=True,
            parse=lambda wanted: Rewrites() if wanted else Rewrites.none(),
        ),
    ] = dataclasses.field(default_factory=Rewrites)
    verify: Annotated[bool, Option("Compare the file with PyTorch before it gets its name.", VERIFICATION)] = True
    images: Images = None
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
            "FP16 or BF16 ONNX file, or a TensorRT plan; if the export refuses the file, export it with --no-verify "
            "first.",
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
            "ONNX file or TensorRT plan written by neck-export, or anyone's SAM 3 encoder in ONNX, which requires "
            "--checkpoint.",
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
            "If an ONNX file without a manifest passes, write the manifest that trt, triton, attach and masks need. "
            "If its input or outputs have other names or layouts, a copy is adapted: X.neck.onnx.",
            VERIFICATION,
        ),
    ] = False
    save_reference: Annotated[
        Path | None,
        Option(
            "Save the images and PyTorch's outputs to this .safetensors file, for `neck-engine --compare`, e.g. "
            "build/reference.safetensors. [default: not saved]",
            VERIFICATION,
        ),
    ] = None
    targets: Annotated[
        str,
        TARGETS.but(
            help="Refuse an ONNX file that one of these runtimes cannot load, separated by commas, e.g. "
            "tensorrt-10.3,triton-25.09. [default: none]"
        ),
    ] = ""
    device: Annotated[int | None, DEVICE] = None
