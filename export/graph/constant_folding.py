"""Constant folding that is done while the weights are written, so that no weight is held twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

LAZY_BYTES = 1 << 16
"""Constants above this are computed when they are read; smaller ones at once."""

GROWTH_BYTES = 1 << 10
"""Up to this size a result may be larger than what it is computed from: shapes, not tables."""


def fold_constants(model: ir.Model) -> None:
    """Replaces every node that depends on weights alone by an initializer.

    A node whose result is larger than its inputs (Expand, Tile) stays, as the file would grow by it, unless it is
    float64: the position tables of the plain module, which are cast to FP32 next.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "CastLike":  # of a constant to the type of a tensor: only the type is of interest
            node = _as_cast(graph, node)
        if node.op_type == "Constant":
            _replace(graph, node, [_constant_value(node)])
        elif any(value.is_graph_output() for value in node.outputs):
            continue  # an output that is a weight is legal, but few tools take it
        elif all(value is None or value.const_value is not None for value in node.inputs):
            tensors = [None if value is None else value.const_value for value in node.inputs]
            folded = _fold(node, tensors, model.opset_imports[""])
            if folded is not None:
                _replace(graph, node, folded)
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]


def _as_cast(graph: ir.Graph, node: ir.Node) -> ir.Node:
    like = node.inputs[1]
    assert like is not None and like.dtype is not None
    plain = ir.node(
        "Cast", [node.inputs[0]], {"to": like.dtype.value}, outputs=None, metadata_props=node.metadata_props
    )
    ir.convenience.replace_nodes_and_values(graph, node, [node], [plain], node.outputs, plain.outputs)
    return plain


def _constant_value(node: ir.Node) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(node.outputs[0])
    assert tensor is not None
    return tensor


def _fold(node: ir.Node, inputs: Sequence[ir.TensorProtocol | None], opset: int) -> list[ir.TensorProtocol] | None:
    tensors = {name: tensor for name, tensor in zip(_input_names(node), inputs, strict=True) if tensor is not None}
    size_in = sum(tensor.nbytes for tensor in tensors.values())
    evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": opset})
    if size_in <= LAZY_BYTES:
        arrays = _run(evaluator, {name: tensor.numpy() for name, tensor in tensors.items()})
        if _grows(arrays, max(GROWTH_BYTES, size_in)):
            return None
        return [ir.tensor(np.ascontiguousarray(array)) for array in arrays]
    if len(node.outputs) > 1:
        return None
    # the result's shape without its bytes: arrays of stride 0 take no memory
    (result,) = _run(evaluator, {name: _hollow(tensor) for name, tensor in tensors.items()})
    if _grows([result], size_in):
        return None
    if node.op_type in ("Shape", "Size"):  # known without the bytes
        return [ir.tensor(result)]

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(_run(evaluator, {name: tensor.numpy() for name, tensor in tensors.items()})[0])

    return [ir.LazyTensor(compute, ir.DataType.from_numpy(result.dtype), ir.Shape(result.shape))]


def _grows(arrays: Sequence[np.ndarray], limit: int) -> bool:
    """Whether results would make the file grow; float64 tables never stay in the graph, where no builder takes them."""
    return sum(array.nbytes for array in arrays if array.dtype != np.float64) > limit


def _input_names(node: ir.Node) -> list[str]:
    return ["" if value is None else str(value.name) for value in node.inputs]


def _hollow(tensor: ir.TensorProtocol) -> np.ndarray:
    if tensor.nbytes <= LAZY_BYTES:
        return tensor.numpy()
    return np.broadcast_to(np.zeros((), tensor.dtype.numpy()), tensor.shape.numpy())


def _run(evaluator: ReferenceEvaluator, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Computes one node by ONNX's reference implementation."""
    return cast("list[np.ndarray]", evaluator.run(None, feeds))


def _replace(graph: ir.Graph, node: ir.Node, tensors: Sequence[ir.TensorProtocol]) -> None:
    """Puts the tensors in the place of a node; one made of a module's weight takes the weight's name."""
    weights = [value for value in node.inputs if value is not None and "." in str(value.name)]
    source = max(weights, key=_is_source, default=None)
    values = []
    for old, tensor in zip(node.outputs, tensors, strict=True):
        values.append(add_initializer(graph, str((source or old).name), tensor))
        ir.convenience.replace_all_uses_with(old, values[-1], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if source is not None and source.is_initializer() and not source.uses() and not source.is_graph_output():
        name = str(source.name)
        del graph.initializers[name]
        values[0].name = name


def _is_source(value: ir.Value) -> tuple[bool, int]:
    """How much a constant is what a result is made of: numbers before the indices that select them, then by size."""
    tensor = cast(ir.TensorProtocol, value.const_value)
    return tensor.dtype.is_floating_point(), tensor.nbytes


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Registers a tensor as an initializer under a name that is free, near the one given."""
    free, count = name, 0
    while free in graph.initializers:
        free, count = f"{name}_{count}", count + 1
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=free, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
