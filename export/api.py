"""`export_encoder`: weights to a verified ONNX file in one call, with the names and defaults of `neck-export onnx`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from export.contract.errors import ExportError
from export.contract.options import (
    AttentionForm,
    ExportOptions,
    OutputPrecision,
    Precision,
    QuantizeOptions,
    Residual,
    Rewrites,
    Upsampling,
    parse_opset,
    parse_size,
)
from export.contract.signature import BatchRange, InputKind, Positions, Sam2Outputs
from export.pipeline import ExportResult, export_onnx
from neck.config import EncoderConfig
from neck.hub import local_checkpoint
from neck.images import ImageFolder, ValueRange
from neck.option import OptionError
from neck.progress import step

Texts = str | Sequence[str]
"""One pattern, or several."""


def export_encoder(
    checkpoint: str | Path,
    output: str | Path = "build/sam3-encoder.onnx",
    *,
    adapter: str | Path | None = None,
    adapter_alpha: float | None = None,
    state: str | None = None,
    prefix: str | None = None,
    config: str | Path | EncoderConfig | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    batch: int | str = "1",
    neck: str = "auto",
    levels: str = "all",
    positions: Positions = "graph",
    sam2_outputs: Sam2Outputs = "features",
    input: InputKind = "float",
    precision: Precision = "fp32",
    attention: AttentionForm = "auto",
    upsampling: Upsampling = "auto",
    keep_fp32: Texts = (),
    output_dtype: OutputPrecision | None = None,
    opset: int | str = "auto",
    residual: Residual = "auto",
    quantize: Texts = (),
    budget: float | None = None,
    calibration: str | Path | None = None,
    target: str = "",
    rewrite: bool = True,
    verify: bool = True,
    images: str | Path | ImageFolder | None = None,
    image_range: str | None = None,
    tolerance: Mapping[str, float] | None = None,
    seed: int = 0,
) -> ExportResult:
    """Exports the encoder to an ONNX file and verifies it against PyTorch, as `neck-export onnx` does.

    Progress is reported through the logger `neck_export`. `export.contract.options.ExportOptions` is the same as a
    value.

    Args:
        checkpoint: a file or folder of weights, a name on the Hugging Face Hub such as `facebook/sam3`, or `random` for
            seeded random weights.
        output: the ONNX file to write; its weights and its manifest are written beside it.
        config: an encoder.json, or its content; needed only if the weights do not reveal the architecture.
        image_size: pixels: 1008, or (height, width), or `1008x672`.
        batch: a batch size, or `minimum:optimum:maximum`.
        keep_fp32, quantize: a module or pattern, or several.
        tolerance: largest relative L2 by output name or wildcard.
        adapter, adapter_alpha, state, prefix, neck, levels, positions, sam2_outputs, input, precision, attention,
            upsampling, output_dtype, opset, residual, budget, calibration, target, rewrite, verify, images,
            image_range, seed: as the options of `neck-export onnx`.

    Returns:
        Path and manifest of the file, and the verdict with its error figures (None without verification).

    Raises:
        CheckpointError, HubError, ConfigError, SignatureError, TargetError, ImageError, ExportError: an argument cannot
            be used; the message says which, and what to do.
        RejectedError: the file's outputs are out of tolerance; no file was written.
    """
    options = ExportOptions(
        output=Path(output),
        checkpoint=checkpoint_path(checkpoint),
        state=state,
        prefix=prefix,
        config=read_config(config),
        adapter=Path(adapter) if adapter is not None else None,
        adapter_alpha=adapter_alpha,
        seed=seed,
        image_size=read_size(image_size),
        batch=BatchRange.parse(str(batch)),
        necks=neck,
        levels=levels,
        positions=positions,
        sam2_outputs=sam2_outputs,
        input_kind=input,
        precision=precision,
        attention=attention,
        upsampling=upsampling,
        keep_fp32=several(keep_fp32),
        output_precision=output_dtype,
        opset=_read_opset(opset),
        residual=residual,
        quantize=read_quantize(quantize, budget, calibration),
        targets=target,
        rewrites=Rewrites() if rewrite else Rewrites.none(),
        verify=verify,
        images=read_images(images, image_range),
        tolerances=dict(tolerance or {}),
    )
    return export_onnx(options, step)


def checkpoint_path(checkpoint: str | Path) -> Path | None:
    """Where the weights are, downloaded if they are on the Hugging Face Hub; None stands for random weights."""
    return None if str(checkpoint) == "random" else local_checkpoint(checkpoint)


def several(given: Texts) -> tuple[str, ...]:
    """One text or several, as a tuple."""
    return (given,) if isinstance(given, str) else tuple(given)


def read_config(config: str | Path | EncoderConfig | None) -> EncoderConfig | None:
    """The architecture of a file, or the one that is given."""
    return EncoderConfig.from_file(Path(config)) if isinstance(config, str | Path) else config


def read_quantize(quantize: Texts, budget: float | None, calibration: str | Path | None) -> QuantizeOptions:
    """What to quantize."""
    return QuantizeOptions(several(quantize), budget, Path(calibration) if calibration is not None else None)


def read_images(images: str | Path | ImageFolder | None, image_range: str | None) -> Path | ImageFolder | None:
    """The folder of images with the range of its deep pixels.

    Raises:
        ExportError: a range without a folder.
        ImageError: it is not a range.
    """
    if images is None and image_range is not None:
        raise ExportError("image_range requires images: pass a folder of images as well")
    if images is None or isinstance(images, ImageFolder):
        return images
    return Path(images) if image_range is None else ImageFolder(Path(images), ValueRange.parse(image_range))


def read_size(size: int | str | tuple[int, int] | None) -> int | tuple[int, int] | None:
    """An image size: `1008x672` is height x width.

    Raises:
        ExportError: a text that is no size.
    """
    try:
        return parse_size(size) if isinstance(size, str) else size
    except OptionError as error:
        raise ExportError(f"image_size: {error}") from None


def _read_opset(opset: int | str) -> int | None:
    try:
        return parse_opset(str(opset))
    except OptionError as error:
        raise ExportError(f"opset: {error}") from None
