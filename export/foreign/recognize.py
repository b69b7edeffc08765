"""What a file is that is not SAM 3's encoder, told by its inputs, outputs and first convolution."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir

from export.contract.errors import ExportError
from export.foreign.graph_inputs import describe_input, file_inputs, image_inputs
from neck.config import EncoderConfig


class NotEncoderError(ExportError):
    """A file whose inputs or outputs are not those of SAM 3's image encoder."""


PROMPTS = re.compile(r"point|box|mask_input|prompt|text|input_ids|token|attention_mask|label", re.IGNORECASE)
EMBEDDINGS = re.compile(r"embed|high_res|feat|fpn|memory|hidden", re.IGNORECASE)
RESULTS = re.compile(r"mask|logit|box|score|iou|class", re.IGNORECASE)


def looks_like(model: ir.Model, size: tuple[int, int] | None = None) -> str | None:
    """What a graph looks like, in a few words; None where nothing tells.

    Args:
        model: the file's graph.
        size: height and width of the image that it takes, where they are known.
    """
    names = [str(value.name) for value in file_inputs(model.graph)]
    outputs = [str(value.name) for value in model.graph.outputs]
    images = image_inputs(model.graph)
    prompts = [name for name in names if PROMPTS.search(name)]
    if prompts and images and len(names) > 1:
        return "a whole SAM 3, or another model with an image and prompts as inputs"
    if any(EMBEDDINGS.search(name) for name in names) and any(RESULTS.search(name) for name in outputs):
        return "a mask decoder, whose inputs are the encoder's outputs"
    if names and all(value.dtype in (ir.DataType.INT64, ir.DataType.INT32) for value in file_inputs(model.graph)):
        return "a text encoder, whose inputs are tokens"
    patch = first_convolution(model)
    if patch is None:
        return None
    taps, stride, channels = patch
    if (taps, stride) == (7, 4):
        return "SAM 2's image encoder, because the first convolution has a 7x7 kernel and a stride of 4"
    if taps == stride == 16:
        return "a ViT with patches of 16x16 pixels, such as the image encoder of the first SAM"
    if images and any(RESULTS.search(name) for name in outputs):
        return "a whole segmentation model, or another model whose outputs are masks, boxes or scores"
    if taps == stride == 14 and size is not None:
        tokens = (size[0] // 14) * (size[1] // 14)
        shapes = [
            [side for side in value.shape if isinstance(side, int)] for value in model.graph.outputs if value.shape
        ]
        if any(tokens + extra in shape for extra in (1, 5) for shape in shapes):
            return f"a ViT with {channels} channels, a class token and patches of 14x14 pixels, such as DINOv2"
    return f"a network whose first convolution is {taps}x{taps} with a stride of {stride} and {channels} channels"


def describe_graph(model: ir.Model, attentions: int) -> str:
    """What a file without a manifest seems to be, in a line; its weights are not looked at, and nothing is run."""
    inputs = ", ".join(describe_input(value) for value in file_inputs(model.graph)) or "no input"
    images, patch = image_inputs(model.graph), first_convolution(model)
    if len(images) == len(file_inputs(model.graph)) == 1 and patch and patch[:2] == (14, 14) and attentions:
        layout = images[0][1]
        return (
            f"the graph has the structure of SAM 3's image encoder: one image input ({inputs}, {layout}), "
            f"14x14 patches, {patch[2]} channels, {attentions} attention layers"
        )
    like = looks_like(model)
    return (
        "the graph does not have the structure of SAM 3's image encoder. The inputs of the graph are "
        f"{inputs}{f'. The graph looks like {like}' if like else ''}"
    )


def first_convolution(model: ir.Model) -> tuple[int, int, int] | None:
    """Taps, stride and channels of the first convolution of an image."""
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "Conv" and len(node.inputs) > 1 else None
        if weight is not None and weight.shape is not None and len(weight.shape) == 4 and weight.shape[1] == 3:
            strides = node.attributes.get_ints("strides", [1])
            return int(weight.shape[2]), int(strides[0]), int(weight.shape[0])  # type: ignore[arg-type]
    return None


def refuse(path: Path, model: ir.Model, config: EncoderConfig, why: str) -> NoReturn:
    """Ends with what a file is instead of SAM 3's encoder, or of the checkpoint's.

    Raises:
        NotEncoderError: always.
    """
    found = first_convolution(model)
    if found and found[0] == found[1] == config.patch_size and found[2] != config.embed_dim:
        raise NotEncoderError(
            f"{path}: the file contains an encoder with {found[2]} channels, but the checkpoint's encoder has "
            f"{config.embed_dim}; use --checkpoint to pass the checkpoint from which this file was exported"
        )
    sizes = {
        side for value, _ in image_inputs(model.graph)[:1] for side in (value.shape or [])[-2:] if isinstance(side, int)
    }
    size = (min(sizes), max(sizes)) if sizes else None
    like = looks_like(model, size)
    raise NotEncoderError(f"{path}: this is not SAM 3's encoder: {why}" + (f";\nit looks like {like}" if like else ""))
