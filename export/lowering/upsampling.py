"""The two forms of a 2x2 ConvTranspose of stride 2: as it is, or a 1x1 convolution followed by DepthToSpace.

Each output pixel depends on one input pixel, so the four taps are four groups of output channels of a 1x1 convolution.
TensorRT-RTX 1.7 does not build a BF16 ConvTranspose, so BF16 takes the second form; which is faster elsewhere needs a
GPU.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir

from export.contract.options import Upsampling
from export.graph.cleanup import MODULE
from export.graph.constant_folding import add_initializer


def lower_upsampling(graph: ir.Graph, precision: str, form: Upsampling) -> None:
    """Writes every 2x2 ConvTranspose of stride 2 as 1x1 convolution and DepthToSpace where the form is `conv`."""
    if form == "deconv" or (form == "auto" and precision != "bf16"):
        return
    for node in [node for node in graph if node.op_type == "ConvTranspose" and _is_doubling(node)]:
        _replace(graph, node)


def _is_doubling(node: ir.Node) -> bool:
    """Whether a ConvTranspose doubles both sides with taps that do not overlap, its weights being constants."""
    weights, attributes = [cast(ir.Value, value) for value in node.inputs[1:]], node.attributes
    return (
        len(weights) == 2
        and all(value.const_value is not None for value in weights)
        and tuple(weights[0].shape or ())[2:] == (2, 2)
        and list(attributes.get_ints("strides", [1, 1])) == [2, 2]
        and not any(attributes.get_ints("pads", [0]))
        and not any(attributes.get_ints("output_padding", [0]))
        and all(step == 1 for step in attributes.get_ints("dilations", [1]))
        and attributes.get_int("group", 1) == 1
    )


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    x, weight, bias = (cast(ir.Value, value) for value in node.inputs)
    output, module = node.outputs[0], node.metadata_props.get(MODULE, "")
    channels, out, _, _ = (int(side) for side in cast(ir.Shape, weight.shape))  # type: ignore[arg-type]
    taps = cast(ir.TensorProtocol, weight.const_value)
    biases = cast(ir.TensorProtocol, bias.const_value)

    def as_points() -> ir.TensorProtocol:  # (C, M, 2, 2) -> (4 M, C, 1, 1), the taps of a channel side by side
        return ir.Tensor(taps.numpy().transpose(1, 2, 3, 0).reshape(4 * out, channels, 1, 1))

    points = ir.LazyTensor(as_points, taps.dtype, ir.Shape([4 * out, channels, 1, 1]))
    repeated = ir.LazyTensor(lambda: ir.Tensor(np.repeat(biases.numpy(), 4)), biases.dtype, ir.Shape([4 * out]))
    weights = {weight.name: points, bias.name: repeated}
    inputs = [x, *(add_initializer(graph, f"{name}.1x1", tensor) for name, tensor in weights.items())]
    conv = ir.node("Conv", inputs, {"kernel_shape": [1, 1]}, name=f"{module}/Conv")
    spread = ir.node("DepthToSpace", [conv.outputs[0]], {"blocksize": 2, "mode": "CRD"}, name=f"{module}/DepthToSpace")
    batch, _, height, width = cast(ir.Shape, output.shape)
    conv.outputs[0].shape = ir.Shape([batch, 4 * out, cast(int, height) // 2, cast(int, width) // 2])
    conv.outputs[0].type, conv.outputs[0].name = output.type, f"{module}/Conv:0"
    spread.outputs[0].shape, spread.outputs[0].type = output.shape, output.type
    conv.metadata_props[MODULE] = spread.metadata_props[MODULE] = module
    graph.insert_after(node, [conv, spread])
    ir.convenience.replace_all_uses_with(output, spread.outputs[0], replace_graph_outputs=True)
    spread.outputs[0].name = output.name
    graph.remove(node, safe=True)
