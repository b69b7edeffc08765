"""What an export is asked for, what of it is refused at once, and the encoder and signature that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from export.contract.atomic import disk_errors
from export.contract.dtypes import BY_PRECISION
from export.contract.errors import ExportError
from export.contract.options import ExportOptions
from export.contract.signature import (
    Signature,
    check_levels,
    choose_necks,
    encoder_signature,
)
from export.contract.targets import find_targets
from export.lowering.codes import CODES
from export.lowering.precision import check_opset, check_residual
from export.lowering.resolve_target import Form, resolve_target
from export.output_files import (
    check_paths,
    check_targets,
    export_paths,
    weights_paths,
)
from export.quantization.select_quantization import check_quantize
from export.verification.verify import require_runtime
from export.weights_origin import encoder_config
from neck.config import EncoderConfig, check_image_size
from neck.images import ImageFolder, find_images
from neck.necks import Sam3DualViTDetNeck
from neck.source import Loaded
from neck.weights.adapters import adapter_files


def check_options(options: ExportOptions) -> Form:
    """Refuses requests that are known to fail, before the weights are read.

    Returns:
        The attention form and the opset: as asked, or the best that the asked targets share.

    Raises:
        ExportError, TargetError, FidelityError, ImageError: what cannot be, and what can.
    """
    _check_choices(options)
    source = options.source
    if options.image_size is not None and (source.config or source.path is None):
        check_image_size(options.image_size, (source.config or EncoderConfig()).patch_size)
    if options.opset is not None:
        check_opset(options.opset)
    check_residual(options.precision, options.residual)
    check_quantize(options.quantize, options.precision)
    targets = find_targets(options.targets) if options.targets else ()
    form = resolve_target(targets, options.precision, options.attention, options.opset)
    if source.path is None and (source.state is not None or source.prefix is not None):
        raise ExportError(
            "random weights have no state dicts or prefixes to choose from; leave out --state and --prefix, or "
            "pass a checkpoint with --checkpoint"
        )
    with disk_errors(ExportError, options.output.parent):
        written = export_paths(options.output, options.quantize.calibration, options.precision)
        check_paths(written, weights_paths(source.path, source.adapter))
        check_targets(options.output)
    if source.adapter is not None:
        if source.path is None:
            raise ExportError(
                f"{source.adapter}: an adapter cannot be merged into random weights; pass the adapter's base "
                "model with --checkpoint"
            )
        adapter_files(source.adapter)
    elif source.path is None and source.alpha is not None:
        raise ExportError(
            "random weights contain no adapter, so --adapter-alpha has no effect; leave out --adapter-alpha"
        )
    if options.verify:
        require_runtime()
    if (options.verify or options.precision in CODES) and options.images is not None:
        find_images(ImageFolder.of(options.images).path)
    return form


def _check_choices(options: ExportOptions) -> None:
    """Refuses a value that a field does not have, which a caller in Python may give.

    Raises:
        ExportError: naming the field and its values.
    """
    for name, hint in get_type_hints(ExportOptions, localns={"ImageFolder": ImageFolder}).items():
        parts = (hint, *get_args(hint))
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        value = getattr(options, name)
        if choices and value not in choices and not (value is None and type(None) in parts):
            raise ExportError(f"{name} is {value!r}, which is not supported; use one of {', '.join(choices)}")


def lowering(options: ExportOptions, form: Form) -> dict[str, Any]:
    """The arguments of export.lowering.precision.lower, except the type of the residual sums."""
    return {
        "attention": form.attention,
        "spelling": form.spelling,
        "keep_fp32": options.keep_fp32,
        "output_precision": options.output_precision,
        "opset": form.opset,
        "upsampling": options.upsampling,
    }


def load(options: ExportOptions) -> Loaded:
    """The plain encoder of an export with the necks that it asks for, set to its image size.

    Raises:
        CheckpointError, SignatureError, ExportError: the weights, a neck or the size cannot be had.
    """
    source, head = options.source, options.sam2_outputs == "head"

    def choose(there: Sequence[str]) -> Sequence[str]:
        return choose_necks(options.necks, there, options.sam2_outputs)

    if source.path is None:
        named = [name for name in ("sam2", "interactive", "propagation") if name in options.necks]
        dual = options.necks in ("both", "all") or named == ["sam2"] or head
        necks = ("sam3", "sam2") if dual else ("sam3", "interactive", "propagation") if named else ("sam3",)
        if head:
            choose(necks)
        try:
            loaded = source.load(necks, sam2_head=head)
        except NotImplementedError as error:
            raise ExportError(f"the random weights cannot be created: {error}") from None
    else:
        loaded = source.load(choose, sam2_head=head)
    if options.image_size is not None:
        loaded.encoder.set_imgsz(options.image_size)
    return loaded


def sign(options: ExportOptions, encoder: Sam3DualViTDetNeck) -> Signature:
    """The signature of an export.

    Raises:
        SignatureError: a neck or level that the encoder does not have.
        ExportError: a level that is empty at the image size.
    """
    config = encoder_config(encoder)
    signature = encoder_signature(
        config,
        necks=options.necks,
        levels=options.levels,
        positions=options.positions,
        input_kind=options.input_kind,
        batch=options.batch,
        dtype=BY_PRECISION[options.output_precision or options.precision].name,
        sam2_outputs=options.sam2_outputs,
    )
    check_levels(signature, config)
    return signature
