"""Another attention form for a file that is FP16 or BF16 already: Casts and nodes change, no weight does.

The file goes back to where its attentions are in its low precision throughout, without Casts; from there the forms of
attention.py are written as the precision pass writes them, so the result is what an export in that form gives.
"""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

from export.contract.errors import ExportError
from export.contract.options import AttentionForm, Precision, Spelling
from export.graph.cleanup import MODULE
from export.lowering.attention import AUTO, after_casts, is_fp8_attention, lower_attentions
from export.lowering.precision import LOW, TYPES, retype, set_opset


def relower(
    model: ir.Model,
    precision: Precision,
    attention: AttentionForm,
    spelling: Spelling = "matmul",
    keep_fp8: bool = True,
) -> int:
    """Puts every attention of a low-precision model into a form, in place, and chooses the opset anew.

    Args:
        model: an FP16 or BF16 file of ours, its weights unread.
        precision: which of the two.
        attention, spelling: the form, and how fp32acc is written.
        keep_fp8: whether FP8 attentions stay FP8; else they are written in the form like all others.

    Returns:
        How many attentions are in that form now; those of modules that are kept in FP32 stay as they are.

    Raises:
        ExportError: an FP32 model, or one whose nodes do not tell their modules.
    """
    graph = model.graph
    if precision == "fp32":
        raise ExportError(
            "the model is in FP32, but neck-export can only rewrite the attention of FP16 and BF16 models; export the "
            "encoder with --precision fp16 or bf16"
        )
    if not any(MODULE in node.metadata_props for node in graph):
        raise ExportError(
            "the file was not written by neck-export, so neck-export cannot convert the attention layers in "
            "this file to another attention form; export the encoder with `neck-export onnx`"
        )
    if not keep_fp8:
        _drop_fp8_attentions(graph)
    attentions = [node for node in graph if node.op_type in ("Attention", "Softmax") and not is_fp8_attention(node)]
    kept = {node.metadata_props.get(MODULE, "") for node in attentions if not _without_casts(graph, node)}
    form = AUTO[precision] if attention == "auto" else attention
    islands = lower_attentions(graph, TYPES[precision], form, spelling, kept)
    for output in (output for node in islands for output in node.outputs):
        output.type = ir.TensorType(ir.DataType.FLOAT)
    _drop_unused(graph)  # an old scale, whose name the new one takes
    retype(graph, TYPES[precision], _in_fp32)
    _drop_unused(graph)
    set_opset(model, None)
    return len(attentions) - len(kept)


def _drop_fp8_attentions(graph: ir.Graph) -> None:
    """Takes QuantizeLinear and DequantizeLinear from around the attentions' queries, keys, values and probabilities."""
    names = {f"quantize_{part}" for part in ("query", "key", "value", "probabilities")}
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and str(node.name).rpartition("/")[2] in names:
            restored = next(user for user, _ in node.outputs[0].uses())
            ir.convenience.replace_all_uses_with(restored.outputs[0], cast(ir.Value, node.inputs[0]))
            graph.remove([restored, node], safe=True)


def _drop_unused(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if not graph.initializers[name].is_graph_output():
            del graph.initializers[name]


def _in_fp32(node: ir.Node) -> bool:
    """Whether a node of a typed graph is FP32: by its result, or, where that is a shape, by what it reads."""
    output = node.outputs[0].dtype
    if output in LOW or output == ir.DataType.FLOAT:
        return output == ir.DataType.FLOAT
    return any(value is not None and value.dtype == ir.DataType.FLOAT for value in node.inputs)


def _without_casts(graph: ir.Graph, node: ir.Node) -> bool:
    """Takes the Casts from around an attention's FP32 island; False where it is FP32 in truth."""
    scores = cast(ir.Value, node.inputs[0]).producer()
    island = [node]
    if node.op_type == "Softmax" and scores is not None and scores.op_type == "MatMul":
        island.insert(0, scores)  # the form `unfused` has both in FP32
    mixed = after_casts(node.outputs[0]) if node.op_type == "Softmax" else None
    if mixed is not None and mixed.op_type == "MatMul":
        island.append(mixed)  # fp32acc has it in FP32
    for one in island:
        for position, value in enumerate(one.inputs):
            if value is not None:
                one.replace_input_with(position, _source(value))
                _remove_unused(graph, value)
        read = one.inputs[0]
        if read is None or read.dtype not in LOW:
            return False
        _lower_output(graph, one.outputs[0], read.dtype)
    return True


def _source(value: ir.Value) -> ir.Value:
    """The low-precision value behind a Cast to FP32, and behind the Identity that stands before an Attention."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        source = cast(ir.Value, producer.inputs[0])
        return _source(source) if source.dtype in LOW else value
    if producer is not None and producer.op_type == "Identity" and "/rounded_" in (producer.name or ""):
        return cast(ir.Value, producer.inputs[0])
    return value


def _remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    producer = value.producer()
    if producer is not None and producer.op_type in ("Cast", "Identity") and not value.uses():
        source = cast(ir.Value, producer.inputs[0])
        graph.remove(producer, safe=True)
        _remove_unused(graph, source)


def _lower_output(graph: ir.Graph, output: ir.Value, low: ir.DataType | None) -> None:
    """Gives a result the low precision; the Casts to it that follow go."""
    if output.dtype in LOW or low is None:
        return
    output.type = ir.TensorType(low)
    for user, _ in list(output.uses()):
        if user.op_type == "Cast":
            ir.convenience.replace_all_uses_with(user.outputs[0], output)
            graph.remove(user, safe=True)
