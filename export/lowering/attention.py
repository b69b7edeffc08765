"""The forms of attention: what of it is computed in FP32, which decides what TensorRT makes of it.

Seen in the plans of TensorRT-RTX 1.7 (compute capability 8.9), FP16:

    fp32acc    one fused kernel, both products accumulate in FP32
    fused      MatMul, Softmax, MatMul without casts: one fused kernel, both products accumulate in FP16
    unfused    the first MatMul and Softmax in FP32: kernels of their own, slow

The form fp32acc has two spellings:

    matmul     scores = MatMul(q, k^T)                              FP16
               p      = Cast(Softmax(Cast(scores, FP32)), FP16)
               out    = Cast(MatMul(Cast(p, FP32), Cast(v, FP32)), FP16)
    operator   Attention (opset 23), its inputs cast to FP32, its output cast back

TensorRT-RTX 1.7 computes both alike, but it copies the operator's output in a kernel of its own: 307 kernels instead of
277 at full size. The first MatMul must stay in FP16 and p must be rounded to FP16, or attention is not fused.

An FP8 attention is the first spelling with QuantizeLinear and DequantizeLinear (E4M3) on q, k, v and p:

    scores = MatMul(QDQ(q), QDQ(k)^T)                       FP8 products, FP32 sums
    p      = QDQ(Cast(Softmax(Cast(scores, FP32)), FP16))   scale 1/448, since no probability exceeds 1
    out    = MatMul(p, QDQ(v))                              FP8 products, FP32 sums

TensorRT-RTX 1.7 makes one kernel of it (family Ada_qmma_e4m3_fp32); without the pair on p, or in INT8, it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
import onnx_ir as ir

from export.contract.errors import ExportError
from export.contract.options import AttentionForm, Spelling
from export.graph.cleanup import MODULE
from export.graph.constant_folding import add_initializer
from export.lowering.codes import CODES, AttentionScales, zero_code

AUTO: dict[str, AttentionForm] = {"fp32": "fused", "fp16": "fp32acc", "bf16": "fused"}
AUTO |= {"fp8": "fp32acc", "int8": "fp32acc"}
"""BF16 products always accumulate in FP32; an FP32 Attention node does not build, so FP32 takes MatMul and Softmax."""


class Form(NamedTuple):
    """A form of attention.

    Attributes:
        in_fp32: whether the first MatMul, the Softmax and the second MatMul are computed in FP32.
        meaning: what TensorRT-RTX 1.7 builds of the form in FP16, as a clause.
        tuned: the spellings that `trt --tune` builds.
    """

    in_fp32: tuple[bool, bool, bool]
    meaning: str
    tuned: tuple[Spelling, ...] = ()


FORMS: dict[AttentionForm, Form] = {
    "fp32acc": Form(
        (False, True, True),
        "both matrix multiplications in each attention layer accumulate in FP32",
        ("operator", "matmul"),
    ),
    "fused": Form(
        (False, False, False), "both matrix multiplications in each attention layer accumulate in FP16", ("matmul",)
    ),
    "unfused": Form(
        (True, True, False),
        "each attention layer runs as several separate kernels, which are accurate but slower than one fused kernel",
    ),
}
"""All forms, the best one first. `unfused` is the last resort for exactness and slow, so it is not tuned."""

FOUND = {(True, True, True): "FP32", (False, True, False): "scores32"} | {
    form.in_fp32: name for name, form in FORMS.items()
}
"""What is in FP32 -> name. Files of older versions and of other tools have their Softmax alone in FP32 (scores32)."""

OPERATOR_OPSET = 23
"""The opset that brought the Attention operator."""


SCALE = "neck.attention_scale"
"""Metadata key of the Mul that scales queries: the exact factor, of which the constant is a rounding."""


PROBABILITIES = 1 / 448
"""The scale of FP8 probabilities: the largest, 1, becomes the largest code."""


@dataclasses.dataclass
class AttentionCore:
    """softmax(scale * query key^T) value, whatever nodes it is made of; all (B, heads, N, D)."""

    nodes: list[ir.Node]
    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    output: ir.Value


def spelling_at(opset: int | None) -> Spelling:
    """The spelling for an unknown target: the operator from opset 23 on, which older opsets do not have."""
    return "operator" if opset is not None and opset >= OPERATOR_OPSET else "matmul"


def other_form(asked: AttentionForm) -> str | None:
    """Why a requested form leaves no attention to FP8; None if FP8 attention has that form."""
    return (
        None
        if asked in ("auto", "fp32acc")
        else f"--attention {asked} cannot be combined with FP8 attention. To get FP8 attention, use --attention auto "
        "or --attention fp32acc"
    )


def lower_attentions(
    graph: ir.Graph,
    low: ir.DataType,
    form: AttentionForm,
    spelling: Spelling = "matmul",
    fp32_modules: Collection[str] = (),
    fp8: Mapping[str, AttentionScales] | None = None,
) -> set[ir.Node]:
    """Puts every attention of the graph into a form; returns the nodes that the form wants in FP32.

    Args:
        graph: the canonical graph, FP32.
        low: the type that the graph is lowered to.
        form: the form, not `auto`.
        spelling: how fp32acc is written.
        fp32_modules: paths of modules that stay in FP32; their attentions become MatMul and Softmax, because no
            TensorRT builds an Attention node whose inputs are FP32 in truth.
        fp8: scales of those that become FP8, by name (`trunk.blocks.3.attn.attention`), unless they stay in FP32.

    Raises:
        ExportError: an FP8 attention that the graph does not have, or that another form than fp32acc is wanted of.
        ExportError: an Attention of a foreign trunk that is more than softmax(scale * query key^T) value.
    """
    islands: set[ir.Node] = set()
    cores = find_attentions(graph)
    if fp8 and form != "fp32acc":
        raise ExportError(f"--attention {form} cannot be combined with FP8 attention; use --attention auto or fp32acc")
    if missing := set(fp8 or ()) - {attention_name(core) for core in cores}:
        raise ExportError(
            f"the Quantization object contains scales for the attention layer {min(missing)}, but the graph of the "
            "encoder contains no attention layer with this name. The scales were probably calibrated with another "
            "encoder. Repeat the calibration with the encoder that you export, and pass the new Quantization object"
        )
    for core in cores:
        kept = core.nodes[-1].metadata_props.get(MODULE) in fp32_modules
        scales = (fp8 or {}).get(attention_name(core)) if not kept else None
        if scales is not None:
            nodes = _fp8_primitives(graph, core, low, scales)
        elif form == "fp32acc" and spelling == "operator" and not kept:
            nodes = _attention_node(core)
        else:
            nodes = _primitives(graph, core, low if form == "fp32acc" and not kept else None)
        for node in nodes:
            node.metadata_props[MODULE] = core.nodes[-1].metadata_props.get(MODULE, "")
        islands |= {node for node in nodes if node.name in (["softmax"] if scales else _in_fp32(form))}
        _replace(graph, core, nodes)
    return islands


def _in_fp32(form: AttentionForm) -> set[str]:
    """The nodes that a form computes in FP32, by the names that they get below; the operator exists for fp32acc."""
    names = ("scores", "softmax", "mixed")
    return {"attention"} | {name for name, wide in zip(names, FORMS[form].in_fp32, strict=True) if wide}


def attention_name(core: AttentionCore) -> str:
    """The name of an attention for `--quantize`: its module's path and `attention`."""
    return f"{core.nodes[-1].metadata_props.get(MODULE, '')}.attention"


def attention_forms(graph: ir.Graph) -> Iterator[str]:
    """The form of every attention of a written graph: a name of FORMS or FOUND, `fp8` or `other`."""
    for node in graph:
        if node.op_type == "Attention":
            query = node.inputs[0]
            yield "fp32acc" if query is not None and query.dtype == ir.DataType.FLOAT else "Attention in low precision"
        elif is_fp8_attention(node):
            yield "fp8"
        elif node.op_type == "Softmax":
            scores, mixed = before_casts(node.inputs[0]), after_casts(node.outputs[0])
            if scores is not None and mixed is not None and scores.op_type == mixed.op_type == "MatMul":
                in_fp32 = [one.outputs[0].dtype == ir.DataType.FLOAT for one in (scores, node, mixed)]
                yield FOUND.get((in_fp32[0], in_fp32[1], in_fp32[2]), "other")


def is_fp8_attention(node: ir.Node) -> bool:
    """Whether a node is the Softmax of an FP8 attention."""
    user = after_casts(node.outputs[0]) if node.op_type == "Softmax" else None
    return user is not None and user.op_type == "QuantizeLinear"


def fp8_attentions(graph: ir.Graph) -> list[str]:
    """The names of a graph's FP8 attentions."""
    return [f"{node.metadata_props.get(MODULE, '')}.attention" for node in graph if is_fp8_attention(node)]


def find_attentions(graph: ir.Graph) -> list[AttentionCore]:
    """Every Attention node, and every Softmax between two MatMuls."""
    cores = [_of_attention(node) if node.op_type == "Attention" else _of_softmax(node) for node in graph]
    return [core for core in cores if core is not None]


def before_casts(value: ir.Value | None) -> ir.Node | None:
    """The node that a value comes from, Casts aside."""
    node = value.producer() if value is not None else None
    return before_casts(node.inputs[0]) if node is not None and node.op_type == "Cast" else node


def after_casts(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, Casts aside; None where several do."""
    users = [user for user, _ in value.uses()]
    if len(users) != 1:
        return None
    return after_casts(users[0].outputs[0]) if users[0].op_type == "Cast" else users[0]


def _of_attention(node: ir.Node) -> AttentionCore:
    query, key, value = (cast(ir.Value, value) for value in node.inputs[:3])
    shape, scale = cast(ir.Shape, query.shape), node.attributes.get("scale")
    # dropping a mask would give a file that computes something else
    more = [value for value in node.inputs[3:] if value is not None] + [v for v in node.outputs[1:] if v.uses()]
    heads = [len(cast(ir.Shape, value.shape)) == 4 and value.shape[1] == shape[1] for value in (query, key, value)]  # type: ignore[index]
    if more or not all(heads) or any(_number(node, name) for name in ("is_causal", "softcap")):
        path = node.metadata_props.get(MODULE) or node.name
        raise ExportError(
            f"the attention layer {path} has a mask, a cache, grouped heads or a softcap, but neck-export can only "
            "export attention without these; use a model whose image encoder has none of them"
        )
    head_dim = cast(int, shape[-1])
    return AttentionCore([node], query, key, value, scale.as_float() if scale else head_dim**-0.5, node.outputs[0])


def _number(node: ir.Node, name: str) -> float:
    attribute = node.attributes.get(name)
    return 0.0 if attribute is None else float(attribute.value)


def _of_softmax(node: ir.Node) -> AttentionCore | None:
    """The attention around a Softmax as `_primitives` writes it, or None."""
    if node.op_type != "Softmax":
        return None
    scores = cast(ir.Value, node.inputs[0]).producer()
    users = [user for user, _ in node.outputs[0].uses()]
    if scores is None or scores.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "MatMul":
        return None
    transpose = cast(ir.Value, scores.inputs[1]).producer()
    if transpose is None or transpose.op_type != "Transpose" or users[0].inputs[0] is not node.outputs[0]:
        return None
    axes, axis = list(transpose.attributes.get_ints("perm", [])), node.attributes.get_int("axis", -1)
    if axes != [0, 1, 3, 2] or axis not in (-1, 3) or any(len(n.outputs[0].uses()) > 1 for n in (scores, transpose)):
        return None
    query, key, value = scores.inputs[0], transpose.inputs[0], users[0].inputs[1]
    nodes, scale = [transpose, scores, node, users[0]], 1.0
    scaling = cast(ir.Value, query).producer()
    ours = scaling is not None and scaling.op_type == "Mul" and (scaling.name or "").endswith("/scale")
    if scaling is not None and ours and len(scaling.outputs[0].uses()) == 1:
        query, nodes = scaling.inputs[0], [scaling, *nodes]
        rounded = cast(ir.TensorProtocol, cast(ir.Value, scaling.inputs[1]).const_value).numpy()
        scale = float(scaling.metadata_props.get(SCALE, rounded))
    assert query is not None and key is not None and value is not None
    return AttentionCore(nodes, query, key, value, scale, users[0].outputs[0])


def _attention_node(core: AttentionCore) -> list[ir.Node]:
    nodes, inputs = [], []
    for name, value in (("query", core.query), ("key", core.key), ("value", core.value)):
        producer = value.producer()
        if producer is not None and producer.op_type == "Cast":  # of a file that is typed already
            producer = cast(ir.Value, producer.inputs[0]).producer()
        if producer is not None and producer.metadata_props.get(MODULE, "").endswith(".rope"):
            # the plain module's rotary is FP32 up to here; TensorRT builds no Attention without a rounding before it
            nodes.append(ir.node("Identity", [value], name=f"rounded_{name}"))
            nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = value.shape, value.type
            value = nodes[-1].outputs[0]
        inputs.append(value)
    # the scale is always written: without it TensorRT's parser adds layers of its own
    return [*nodes, ir.node("Attention", inputs, {"scale": core.scale}, name="attention")]


def _fp8_primitives(graph: ir.Graph, core: AttentionCore, low: ir.DataType, scales: AttentionScales) -> list[ir.Node]:
    """MatMul, Softmax, MatMul with codes for queries, keys, probabilities and values."""
    nodes, path = _primitives(graph, core, low), attention_name(core)
    by_name = {str(node.name): node for node in nodes}
    pairs = [
        ("query", by_name["scores"], 0, scales.query),
        ("key", by_name["transposed_key"], 0, scales.key),
        ("probabilities", by_name["mixed"], 0, PROBABILITIES),
        ("value", by_name["mixed"], 1, scales.value),
    ]
    for name, user, position, scale in pairs:
        value = cast(ir.Value, user.inputs[position])
        zero = graph.initializers.get("fp8_zero") or add_initializer(graph, "fp8_zero", zero_code("fp8"))
        held = add_initializer(graph, f"{path}.{name}_scale", ir.tensor(np.float32(scale)))
        quantized = ir.node("QuantizeLinear", [value, held, zero], name=f"quantize_{name}")
        restored = ir.node("DequantizeLinear", [quantized.outputs[0], held], name=f"dequantize_{name}")
        for node, kind in ((quantized, CODES["fp8"]), (restored, ir.DataType.FLOAT)):
            node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(kind)
        user.replace_input_with(position, restored.outputs[0])
        at = nodes.index(user)
        nodes[at:at] = [quantized, restored]
    return nodes


def _primitives(graph: ir.Graph, core: AttentionCore, rounded: ir.DataType | None) -> list[ir.Node]:
    """MatMul, Softmax, MatMul; the probabilities between the last two are rounded to a type where one is given."""
    nodes, query = [], core.query
    if core.scale != 1.0:
        factor = add_initializer(graph, "attention_scale", ir.tensor(np.float32(core.scale)))
        nodes.append(ir.node("Mul", [query, factor], name="scale", metadata_props={SCALE: repr(core.scale)}))
        query = nodes[-1].outputs[0]
        query.shape, query.type = core.query.shape, core.query.type
    *outer, tokens, head_dim = cast(ir.Shape, core.key.shape)
    turned = ir.node("Transpose", [core.key], {"perm": [0, 1, 3, 2]}, name="transposed_key")
    scores = ir.node("MatMul", [query, turned.outputs[0]], name="scores")
    softmax = ir.node("Softmax", [scores.outputs[0]], {"axis": -1}, name="softmax")
    probabilities = softmax.outputs[0]
    turned.outputs[0].shape = ir.Shape([*outer, head_dim, tokens])
    scores.outputs[0].shape = probabilities.shape = ir.Shape([*outer, tokens, tokens])
    for node in (turned, scores, softmax):
        node.outputs[0].type = core.query.type
    nodes += [turned, scores, softmax]
    if rounded is not None:  # between two nodes in FP32, where the precision pass would write no Cast
        nodes.append(ir.node("Cast", [probabilities], {"to": rounded.value}, name="probabilities"))
        nodes[-1].outputs[0].shape, nodes[-1].outputs[0].type = probabilities.shape, ir.TensorType(rounded)
        probabilities = nodes[-1].outputs[0]
    return [*nodes, ir.node("MatMul", [probabilities, core.value], name="mixed")]


def _replace(graph: ir.Graph, core: AttentionCore, nodes: list[ir.Node]) -> None:
    last = nodes[-1].outputs[0]
    last.shape, last.type, name = core.output.shape, core.output.type, core.output.name
    path = core.nodes[-1].metadata_props.get(MODULE) or "attention"
    graph.insert_after(core.nodes[-1], nodes)
    ir.convenience.replace_all_uses_with(core.output, last, replace_graph_outputs=True)
    graph.remove(list(reversed(core.nodes)), safe=True)
    for node in nodes:
        kind = node.name
        node.name = f"{path}/{kind}"
        node.outputs[0].name = f"{node.name}:0"
    last.name = name if name and name not in {value.name for value in nodes[-1].inputs if value} else last.name
