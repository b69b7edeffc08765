"""What tracing leaves over is removed, and what stays is named after its module."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from export.graph.constant_folding import add_initializer

MODULE = "neck.module"
"""Metadata key of a node: the path of the module that it comes from."""

INPUT = "input"
"""The path of nodes outside every module: they turn uint8 pixels into the normalized image."""


def tidy(model: ir.Model) -> None:
    """Removes what tracing left over and names nodes and weights after their modules."""
    split_sequences(model.graph)
    drop_zero_biases(model.graph)
    for step in (
        common_passes.IdentityEliminationPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.RemoveUnusedNodesPass(),
    ):
        step(model)
    name_nodes(model.graph)
    model.graph.name = "sam3_encoder"
    model.producer_name, model.producer_version = "neck-export", ""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    common_passes.ShapeInferencePass()(model)


def split_sequences(graph: ir.Graph) -> None:
    """Makes Split of torch's SplitToSequence with SequenceAt."""
    for node in [node for node in graph if node.op_type == "SplitToSequence"]:
        takers = [user for user, _ in node.outputs[0].uses()]
        axis = node.attributes["axis"].as_int()
        whole, size = cast(ir.Value, node.inputs[0]), cast(ir.Value, node.inputs[1])
        sizes = cast(ir.TensorProtocol, size.const_value).numpy()
        if not sizes.ndim:  # one size for all parts
            length = int(cast(ir.Shape, whole.shape)[axis])  # type: ignore[arg-type]
            sizes = np.array([min(int(sizes), length - start) for start in range(0, length, int(sizes))], np.int64)
        inputs = [whole, add_initializer(graph, f"{node.name}_sizes", ir.tensor(sizes))]
        split = ir.node("Split", inputs, {"axis": axis}, num_outputs=len(sizes))
        split.metadata_props.update(node.metadata_props)
        graph.insert_before(node, split)
        for taker in takers:
            index = cast(ir.TensorProtocol, cast(ir.Value, taker.inputs[1]).const_value)
            part = split.outputs[int(index.numpy())]
            part.shape, part.type, part.name = taker.outputs[0].shape, taker.outputs[0].type, taker.outputs[0].name
            ir.convenience.replace_all_uses_with(taker.outputs[0], part)
        graph.remove([*takers, node], safe=True)


def drop_zero_biases(graph: ir.Graph) -> None:
    """Drops the zero bias that torch gives a convolution without a bias."""
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3:
            bias = cast(ir.Value, node.inputs[2]).const_value
            if bias is not None and isinstance(bias, ir.Tensor) and not bias.numpy().any():
                node.resize_inputs(2)


def name_nodes(graph: ir.Graph) -> None:
    """Names each node `path.of.module/Op`, which TensorRT keeps as the layer's name, and its values alike."""
    seen: dict[str, int] = {}
    outputs = set(graph.outputs)
    for node in graph:
        base = f"{node.metadata_props[MODULE]}/{node.op_type}"
        seen[base] = seen.get(base, -1) + 1
        node.name = f"{base}_{seen[base]}" if seen[base] else base
        for position, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{node.name}:{position}"
    for value in list(graph.initializers.values()):
        name = cast(str, value.name)
        if name.startswith("stamped."):
            value.name = name.removeprefix("stamped.")
