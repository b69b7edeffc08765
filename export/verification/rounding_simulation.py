"""The rounding simulation: an FP16 or BF16 graph that ONNX Runtime computes on a CPU with its roundings kept.

ONNX Runtime's CPU provider runs an FP16 graph in FP32 and drops the roundings between nodes (1.31.1), so what it says
of overflow is worth nothing. Here the same graph is FP32, and after every node whose result has a low precision stands
the pair Cast down, Cast up. Sums inside a node are FP32: what a fused kernel accumulates in is not simulated.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir

LOW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

MOVES = frozenset(
    {"Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Concat", "Expand", "Slice", "Identity", "MaxPool", "Pad"}
    | {"DepthToSpace", "Flatten", "Tile", "Gather"}
)
"""Operators whose results are values of their inputs: rounded already."""

AS_WRITTEN = ("session.disable_quant_qdq", "1")
"""Session setting of ONNX Runtime, which else fuses Q and DQ with products and rounds otherwise than the graph says."""

EXACT = MOVES | {"DequantizeLinear"}
"""What is not rounded: a builder makes one product of DequantizeLinear and MatMul, whose inputs are the codes."""


LIMITS = {ir.DataType.FLOAT8E4M3FN: (), ir.DataType.INT8: (-128, 127)}
"""Between which codes a value is clipped before a Cast to their type, which saturates by itself in FP8 alone."""


def is_low_precision(model: ir.Model) -> bool:
    """Whether any tensor of the graph is FP16 or BF16."""
    return any(output.dtype in LOW for node in model.graph for output in node.outputs)


def simulate(model: ir.Model) -> list[ir.Value]:
    """Turns a low-precision model into its simulation, in place; the graph's outputs become FP32.

    Returns:
        Every value that was rounded, in the order of computation: where to look for the first that is not finite.
    """
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.dtype in LOW:
            _cast_up_weight(graph, value)
    rounded = []
    for node in list(graph):
        if node.op_type == "Cast" and node.inputs[0] in graph.initializers.values():
            continue
        for output in node.outputs:
            if output.dtype in LOW:
                low = output.dtype
                if node.op_type == "Cast":
                    node.attributes.add(ir.AttrInt64("to", ir.DataType.FLOAT.value))
                output.type = ir.TensorType(ir.DataType.FLOAT)
                if node.op_type not in EXACT:
                    rounded.append(_round(graph, node, output, low))
    return rounded


def spell_out_quantize(model: ir.Model) -> None:
    """Writes every QuantizeLinear of FP32 values as Div and Cast, with the same codes, in place.

    ONNX Runtime 1.23, the newest for Python 3.10, has no QuantizeLinear of opset 23 (run: 1.24.1 has it).
    """
    for node in list(model.graph):
        value, zero = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        known = ir.convenience.get_const_tensor(zero) if zero is not None else None
        if node.op_type != "QuantizeLinear" or value is None or value.dtype != ir.DataType.FLOAT or known is None:
            continue
        if known.size != 1 or known.dtype not in LIMITS or known.numpy().astype(np.float32).any():
            continue
        chain = [ir.node("Div", [value, node.inputs[1]])]
        if limits := LIMITS[known.dtype]:
            chain.append(ir.node("Round", chain[-1].outputs))
            bounds = [ir.node("Constant", [], {"value": ir.tensor(np.float32(limit))}) for limit in limits]
            chain += [*bounds, ir.node("Clip", [chain[-1].outputs[0], *(one.outputs[0] for one in bounds)])]
        chain.append(ir.node("Cast", chain[-1].outputs, {"to": known.dtype.value}))
        codes = node.outputs[0]
        name, chain[-1].outputs[0].type, chain[-1].outputs[0].shape = codes.name, codes.type, codes.shape
        model.graph.insert_before(node, chain)
        for user, position in list(codes.uses()):
            user.replace_input_with(position, chain[-1].outputs[0])
        model.graph.remove(node, safe=True)
        chain[-1].outputs[0].name = name


def _cast_up_weight(graph: ir.Graph, weight: ir.Value) -> None:
    """Reads a low-precision weight as FP32, by a Cast that ONNX Runtime folds once."""
    node = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT.value}, name=f"{weight.name}/up")
    up = node.outputs[0]
    up.name, up.shape, up.type = f"{weight.name}.up", weight.shape, ir.TensorType(ir.DataType.FLOAT)
    for user, position in list(weight.uses()):
        if user is not node:
            user.replace_input_with(position, up)
    graph.insert_before(graph[0], node)


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, low: ir.DataType) -> ir.Value:
    """Puts Cast down, Cast up behind a value; returns the rounded one, which takes the value's name and users."""
    name = str(output.name)
    users, is_output = list(output.uses()), output.is_graph_output()
    down = ir.node("Cast", [output], {"to": low.value}, name=f"{name}/down")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT.value}, name=f"{name}/up")
    for new, dtype in ((down, low), (up, ir.DataType.FLOAT)):
        new.outputs[0].shape, new.outputs[0].type = output.shape, ir.TensorType(dtype)
        new.metadata_props.update(node.metadata_props)
    output.name, down.outputs[0].name, up.outputs[0].name = f"{name}.exact", f"{name}.low", name
    for user, position in users:
        user.replace_input_with(position, up.outputs[0])
    if is_output:
        graph.outputs[list(graph.outputs).index(output)] = up.outputs[0]
    graph.insert_after(node, [down, up])
    return up.outputs[0]


def watch_finite(graph: ir.Graph, values: list[ir.Value]) -> list[str]:
    """Makes the sum of magnitudes of each value the graph's outputs; it is finite exactly where all its numbers are.

    Returns:
        The path of the module and the operator of each output.
    """
    names = []
    watched = []
    for value in values:
        source = cast(ir.Node, value.producer())
        rounded = cast(
            ir.Node, cast(ir.Value, cast(ir.Node, cast(ir.Value, source.inputs[0]).producer()).inputs[0]).producer()
        )
        node = ir.node("ReduceL1", [value], {"keepdims": 0}, name=f"{value.name}/finite")
        node.outputs[0].name, node.outputs[0].type = f"{value.name}/finite", ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([])
        graph.insert_after(source, node)
        watched.append(node.outputs[0])
        names.append(rounded.name or "")
    graph.outputs[:] = watched
    return names
