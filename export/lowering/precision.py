"""Lowering of the canonical FP32 graph to the wanted precision, attention form and opset.

TensorRT 11 has strong typing only: an engine computes in the types that the graph names. So precision is this pass,
and it is the one place for it: `computes_in_fp32` says which nodes stay in FP32, attention.py what attention becomes,
residual.py what of the residual stream stays with `--residual fp32`.
Between a node of one type and a node of the other stands a Cast; nothing else changes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from export.contract.dtypes import BY_PRECISION
from export.contract.errors import ExportError
from export.contract.options import AttentionForm, OutputPrecision, Precision, Residual, Spelling, Upsampling
from export.graph.cleanup import INPUT, MODULE
from export.graph.constant_folding import LAZY_BYTES, add_initializer
from export.lowering.attention import (
    AUTO,
    OPERATOR_OPSET,
    attention_name,
    find_attentions,
    lower_attentions,
    spelling_at,
)
from export.lowering.codes import CODES
from export.lowering.quantize import Quantization, find_products, is_named, quantize
from export.lowering.residual import residual_stream
from export.lowering.upsampling import lower_upsampling

TYPES = {precision: ir.DataType[one.onnx] for precision, one in BY_PRECISION.items()}
TORCH_TYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType[one.onnx]: getattr(torch, one.name) for one in BY_PRECISION.values()
}
LOW = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
OPSETS = range(17, 25)
"""17 has LayerNormalization (TensorRT 8.6); 24 is what TensorRT 11.4 reads."""


def lower(
    model: ir.Model,
    precision: Precision,
    *,
    attention: AttentionForm = "auto",
    spelling: Spelling | None = None,
    keep_fp32: Sequence[str] = (),
    output_precision: OutputPrecision | None = None,
    opset: int | None = None,
    upsampling: Upsampling = "auto",
    residual: Residual = "auto",
    quantization: Quantization | None = None,
) -> None:
    """Lowers a canonical model in place.

    Args:
        model: what `trace` made, or an FP32 file of ours.
        precision: type of weights and activations outside the FP32 islands.
        attention: form of the attentions; `auto` is fp32acc for fp16, fused for bf16 and fp32.
        spelling: how fp32acc is written; by default what `spelling_at` the opset says.
        keep_fp32: paths of modules that stay in FP32, with wildcards (`trunk.blocks.31`, `convs.*`).
        output_precision: type of the outputs, by default the graph's.
        opset: by default 23 for the Attention operator, 22 for bf16 convolutions and 20 elsewhere.
        upsampling: ConvTranspose (`deconv`) or 1x1 convolution with DepthToSpace (`conv`); `auto` is conv for bf16.
        residual: type of the blocks' residual sums; `auto` is the precision.
        quantization: which products are fp8 or int8 where that is the precision.

    Raises:
        ExportError: a pattern that names no module, an opset that cannot hold the graph, a file that is not FP32.
    """
    graph = model.graph
    if output_precision in CODES:
        raise ExportError(
            f"outputs cannot have the type {output_precision}; choose fp32, fp16 or bf16 with --output-dtype"
        )
    if precision in CODES and quantization is None:
        raise ExportError(
            f"the precision {precision} requires a Quantization object, which says how each linear layer is "
            "quantized, but none was given; pass the object as the argument `quantization`, or use another precision"
        )
    low = next((value.dtype for value in graph.initializers.values() if value.dtype in LOW), None)
    if low:
        raise ExportError(
            f"the model cannot be converted to {precision}, because the model already has weights in "
            f"{low.name.lower()}, and only an FP32 model can be converted. Instead of converting the model, export the "
            f"encoder from its checkpoint with `neck-export onnx --precision {precision}`"
        )
    form = AUTO[precision] if attention == "auto" else attention
    check_form(precision, form, opset)
    kept = kept_modules(graph, keep_fp32)
    check_residual(precision, residual)
    stream = residual_stream(graph) if residual == "fp32" != precision else set()
    eights = quantization.attentions if quantization is not None else {}
    islands = stream | lower_attentions(graph, TYPES[precision], form, spelling or spelling_at(opset), kept, eights)
    lower_upsampling(graph, precision, upsampling)
    if quantization is not None:
        quantize(graph, quantization, kept)
    if precision != "fp32":
        retype(graph, TYPES[precision], lambda node: computes_in_fp32(node) or node in islands or _module(node) in kept)
    _retype_outputs(graph, TYPES[output_precision or precision])
    set_opset(model, opset)
    for name in [
        name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]:
        del graph.initializers[name]


def check_form(precision: Precision, attention: str, opset: int | None) -> None:
    """Refuses a form of attention that no graph of a precision, or of an opset, can have.

    Raises:
        ExportError: saying what there is instead.
    """
    if precision == "fp32" and attention == "fp32acc":
        raise ExportError(
            "--attention fp32acc is for files with lower precision than FP32, but --precision is fp32; use "
            "--attention auto"
        )
    if opset is not None:
        check_opset(opset)


def check_opset(opset: int) -> None:
    """Refuses an opset that no graph is written in.

    Raises:
        ExportError: naming those that there are.
    """
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not supported; use an opset from {OPSETS.start} to {OPSETS.stop - 1}, or auto"
        )


def computes_in_fp32(node: ir.Node) -> bool:
    """Whether a node stays in FP32 whatever the precision; attention's islands come from its form.

    LayerNormalization: its sums of squares pass 65504 at C = 1024 once activations pass 8; TensorRT keeps a HALF
    LayerNormalization in HALF even with stash_type 1, and the Casts cost no kernel (TensorRT-RTX 1.7).
    Rotary (`rope`): two products and a sum are rounded once instead of three times, at no kernel either.
    The input: uint8 pixels are normalized before they are rounded.
    """
    module = _module(node)
    return node.op_type == "LayerNormalization" or module.endswith(".rope") or module == INPUT


def residuals_to_try(precision: str, residual: Residual) -> tuple[Residual, ...]:
    """The residual types to try: the requested one; for `auto` with FP16, FP32 sums after a failure."""
    return ("auto", "fp32") if (precision, residual) == ("fp16", "auto") else (residual,)


def residual_type(precision: str, residual: Residual) -> Residual:
    """The manifest's entry: the type of FP16's sums, or `auto` if it is the precision's."""
    return "fp16" if TYPES[precision] == ir.DataType.FLOAT16 and residual == "auto" else residual


def check_residual(precision: str, residual: Residual) -> None:
    """Refuses a type of the residual sums that is neither the precision's nor FP32.

    Raises:
        ExportError: saying what there is.
    """
    if residual == "fp16" and TYPES[precision] != ir.DataType.FLOAT16:
        raise ExportError(
            f"--residual fp16 cannot be used for a file in {precision}; leave out --residual to get residual "
            f"sums in {precision}, or use --residual fp32"
        )


def _module(node: ir.Node) -> str:
    return node.metadata_props.get(MODULE, "")


def kept_products(graph: ir.Graph, patterns: Sequence[str]) -> set[str]:
    """The linear layers and attentions that `--keep-fp32` keeps in FP32, so that they are not quantized.

    Raises:
        ExportError: a pattern that names no module.
    """
    kept = kept_modules(graph, patterns)
    attentions = {attention_name(core) for core in find_attentions(graph) if _module(core.nodes[-1]) in kept}
    return {name for name, node in find_products(graph).items() if _module(node) in kept} | attentions


def kept_modules(graph: ir.Graph, patterns: Sequence[str]) -> set[str]:
    """Paths of all modules that the patterns name, with the modules inside them.

    Raises:
        ExportError: a pattern that names no module.
    """
    modules = sorted({_module(node) for node in graph})
    kept: set[str] = set()
    for pattern in patterns:
        found = {module for module in modules if is_named(module, pattern)}
        if not found:
            whole = {".".join(path.split(".")[:end]) for path in modules for end in range(1, path.count(".") + 2)}
            near = difflib.get_close_matches(pattern, sorted(whole), n=4, cutoff=0.4) or sorted(whole)[:4]
            raise ExportError(
                f"--keep-fp32 {pattern!r} matches no module of the graph; similar names are {', '.join(near)}"
            )
        kept |= found
    return kept


def retype(graph: ir.Graph, low: ir.DataType, in_fp32: Callable[[ir.Node], bool]) -> None:
    """Gives every node its type, with a Cast wherever a value passes from one type to the other."""
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    fp32 = {node for node in graph if in_fp32(node)}  # before anything changes
    for node in list(graph):
        wanted = ir.DataType.FLOAT if node in fp32 else low
        if node.op_type != "Cast":
            for position, value in enumerate(node.inputs):
                if value is not None and value.dtype in TORCH_TYPES and value.dtype != wanted:
                    key = (value, wanted)
                    if key not in casts:
                        casts[key] = _converted(graph, node, value, wanted)
                    node.replace_input_with(position, casts[key])
            for output in node.outputs:
                if output.dtype == ir.DataType.FLOAT:
                    output.type = ir.TensorType(wanted)


def _converted(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value in another type: a converted weight, or a Cast in front of the node that reads it."""
    suffix = dtype.name.lower()
    if value.const_value is not None:
        tensor = converted_weight(str(value.name), value.const_value, dtype)
        return add_initializer(graph, f"{value.name}.{suffix}", tensor)
    producer = value.producer()
    node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{value.name}/to_{suffix}")
    node.metadata_props[MODULE] = _module(before)
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{value.name}.{suffix}", value.shape, ir.TensorType(dtype)
    if producer is None:
        graph.insert_before(before, node)
    else:
        graph.insert_after(producer, node)
    return output


def converted_weight(name: str, tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    """A weight in another type, converted when it is read; one that overflows is then an error that names it."""

    def convert() -> ir.TensorProtocol:
        exact = tensor.raw if isinstance(tensor, TorchTensor) else as_torch(tensor.numpy())
        ends = torch.stack(exact.aminmax())  # 17 times as fast as isfinite over all that was converted
        if not ends.to(TORCH_TYPES[dtype]).isfinite().all():
            raise ExportError(
                f"the weight {name} has values of up to {ends.abs().max():.6g}, which exceed the range of "
                f"{dtype.name.lower()}; keep its module in FP32 with --keep-fp32, or use --precision bf16"
            )
        return TorchTensor(exact.to(TORCH_TYPES[dtype]).contiguous())

    if tensor.nbytes <= LAZY_BYTES:  # at once: what onnx-ir writes inside the graph would wrap the error
        return convert()
    return ir.LazyTensor(convert, dtype, ir.Shape(tensor.shape.numpy()), name=name)


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor on an array's memory, or on a copy where that cannot be written (a mapped file)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _retype_outputs(graph: ir.Graph, dtype: ir.DataType) -> None:
    for position, value in enumerate(list(graph.outputs)):
        if value.dtype == dtype or value.dtype not in TORCH_TYPES:
            continue
        name, producer = str(value.name), cast(ir.Node, value.producer())
        value.name = f"{name}.{value.dtype.name.lower()}"
        node = ir.node("Cast", [value], {"to": dtype.value}, name=f"{name}/to_{dtype.name.lower()}")
        node.metadata_props[MODULE] = _module(producer)
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(dtype)
        graph.insert_after(producer, node)
        graph.outputs[position] = node.outputs[0]


def set_opset(model: ir.Model, opset: int | None) -> None:
    """Sets the opset, by default the oldest that has all of the graph; without Gelu its chain is written."""
    present = {node.op_type for node in model.graph}
    convolutions = [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "MaxPool")]
    bf16 = any(node.outputs[0].dtype == ir.DataType.BFLOAT16 for node in convolutions)  # they take it from opset 22
    opset = opset if opset is not None else OPERATOR_OPSET if "Attention" in present else 22 if bf16 else 20
    check_opset(opset)
    if "Attention" in present and opset < OPERATOR_OPSET:
        raise ExportError(f"the Attention operator does not exist in opset {opset}; use --opset {OPERATOR_OPSET}")
    if bf16 and opset < 22:
        raise ExportError(f"BF16 convolutions do not exist in opset {opset}; use --opset 22, or --precision fp16")
    if "QuantizeLinear" in present and opset < 19:
        raise ExportError(
            f"--precision fp8 and int8 need opset 19 or later, because opset {opset} has neither the FP8 type nor FP16 "
            "scales; use --opset 19, or --precision fp16"
        )
    if opset < 20:
        _expand_gelu(model.graph)
    model.opset_imports[""] = opset


def _expand_gelu(graph: ir.Graph) -> None:
    """Writes every Gelu, which came with opset 20, as 0.5 x (1 + erf(x / sqrt 2))."""
    for node in [node for node in graph if node.op_type == "Gelu"]:
        x, old = cast(ir.Value, node.inputs[0]), node.outputs[0]
        numpy_type = cast(ir.DataType, x.dtype).numpy()
        factors = {"root": math.sqrt(0.5), "one": 1.0, "half": 0.5}
        values = {
            name: graph.initializers.get(f"gelu_{name}_{numpy_type}")
            or add_initializer(graph, f"gelu_{name}_{numpy_type}", ir.tensor(np.asarray(factor, numpy_type)))
            for name, factor in factors.items()
        }
        scaled = ir.node("Mul", [x, values["root"]])
        erf = ir.node("Erf", [scaled.outputs[0]])
        shifted = ir.node("Add", [erf.outputs[0], values["one"]])
        product = ir.node("Mul", [x, shifted.outputs[0]])
        halved = ir.node("Mul", [product.outputs[0], values["half"]])
        chain = [scaled, erf, shifted, product, halved]
        for step, new in enumerate(chain):
            new.name, new.metadata_props[MODULE] = f"{node.name}/{new.op_type}_{step}", _module(node)
            value = new.outputs[0]
            value.name, value.shape, value.type = f"{new.name}:0", old.shape, old.type
        graph.insert_after(node, chain)
        name = old.name
        ir.convenience.replace_all_uses_with(old, halved.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        halved.outputs[0].name = name
