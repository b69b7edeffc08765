"""FP8 and INT8 products: QuantizeLinear and DequantizeLinear around matrix products whose weights are stored quantized.

A product x W becomes DQ(Q(x)) DQ(codes of W), which a strongly typed builder makes one FP8 or INT8 product of. FP8
weights have one scale, as E4M3 has the same relative precision at every size; INT8 weights have one per output channel.
DequantizeLinear with an axis is not how those are written: TensorRT-RTX 1.7 multiplies by the channels' scales in the
kernel after the product, so the product itself is written as FP16 without them, hundreds or thousands of times as large
as the result, and no simulation sees it overflow. Here the weights' scale is the largest of all channels, and what the
others have less (at most 1) is a Mul of the graph: the same kernels, with the rounding in between told.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from typing import cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from export.contract.errors import ExportError
from export.graph.cleanup import MODULE
from export.graph.constant_folding import add_initializer
from export.lowering.codes import CODES, AttentionScales, Kind, zero_code

LIMITS: dict[Kind, float] = {"fp8": 448.0, "int8": 127.0}
"""Largest code; activations take INT8's -128 too, weights do not."""

RESULT = ".result"
"""What follows a product's name where its result is meant."""

LAYOUT = ("Reshape", "Transpose", "Pad", "Slice")
"""What stands between a LayerNorm and its product where windows are cut; channels stay last."""

FP16_TINY = 2.0**-20
"""Below it an FP16 scale has fewer than 4 bits."""


class UnquantizableError(ExportError):
    """A layer whose weight or input no FP16 scale can map to the codes; other layers can still be quantized."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which linear layers and attentions are quantized, and how.

    Attributes:
        kind: fp8 (E4M3) or int8.
        scales: of the activations by product (`trunk.blocks.3.mlp.fc1`), one that FP16 holds.
        moves: (K,) powers of two by product, by which a LayerNorm's channels are divided and the weight multiplied.
        attentions: scales by attention (`trunk.blocks.3.attn.attention`); of fp8 alone.
        results: scales of results that are written as codes, by product: before the bias, so that the product's kernel
            writes one byte for each number and the next one reads it. Only of products that are quantized.
    """

    kind: Kind
    scales: Mapping[str, float]
    moves: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    attentions: Mapping[str, AttentionScales] = dataclasses.field(default_factory=dict)
    results: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def only(self, names: Collection[str]) -> Quantization:
        """What some products, attentions and results (`trunk.blocks.3.mlp.fc1.result`) of it are."""
        return dataclasses.replace(
            self,
            scales={name: scale for name, scale in self.scales.items() if name in names},
            attentions={name: scales for name, scales in self.attentions.items() if name in names},
            results={name: scale for name, scale in self.results.items() if f"{name}{RESULT}" in names},
        )


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized weight: codes * scale, or codes * scale * ratios where there are some.

    Attributes:
        codes: (K, N) int8 or float8_e4m3fn.
        scale: FP16 holds it.
        ratios: (N,) of at most 1, FP16 holds them; None for one scale.
    """

    codes: Tensor
    scale: float
    ratios: Tensor | None

    def values(self) -> Tensor:
        """The weight that the codes stand for, (K, N) float32."""
        found = self.codes.float() * self.scale
        return found if self.ratios is None else found * self.ratios


def scale_of(largest: float, kind: Kind, what: str) -> float:
    """The smallest FP16 scale that maps `largest` to the last code.

    Raises:
        UnquantizableError: FP16 holds none.
    """
    exact = np.float32(largest / LIMITS[kind])
    with np.errstate(over="ignore"):
        scale = np.float16(exact)
        scale = np.nextafter(scale, np.float16(np.inf)) if np.float32(scale) < exact else scale
    if not FP16_TINY <= scale < np.inf:
        raise UnquantizableError(
            f"{what} cannot be quantized to {kind}. The largest value is {largest:.3g}, which needs a quantization "
            "scale that is too small or too large for FP16"
        )
    return float(scale)


def encode(values: Tensor, scale: float | Tensor, kind: Kind) -> Tensor:
    """Codes of values as computed by ONNX's QuantizeLinear: divided, rounded half to even, saturated."""
    codes = values / scale
    if kind == "int8":
        return codes.round().clamp(-128, 127).to(torch.int8)
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn)


def encode_weight(weight: Tensor, kind: Kind, name: str) -> Codes:
    """Quantizes a weight (K, N), per output channel in INT8.

    Raises:
        UnquantizableError: a weight that is zero throughout, too small or not finite.
    """
    weight = weight.float()
    if kind == "fp8":
        scale = scale_of(float(weight.abs().amax()), kind, f"weight {name}")
        return Codes(encode(weight, scale, kind), scale, None)
    largest = weight.abs().amax(dim=0)
    scale = scale_of(float(largest.amax()), kind, f"weight {name}")
    # rounded up, so that no weight saturates; a channel of zeros takes any
    exact = (largest / (LIMITS[kind] * scale)).clamp(2.0**-14, 1.0)
    ratios = exact.half()
    ratios = torch.where(ratios.float() < exact, torch.nextafter(ratios, torch.ones_like(ratios)), ratios).float()
    return Codes(encode(weight, scale * ratios, kind), scale, ratios)


def find_products(graph: ir.Graph) -> dict[str, ir.Node]:
    """The trunk's linear layers by path: MatMuls with a weight (K, N) of that name."""
    found = {}
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        path, _, leaf = str(weight.name).rpartition(".")
        if leaf == "weight" and path.startswith("trunk."):
            found[path] = node
    return found


def match_products(patterns: Sequence[str], products: Collection[str]) -> list[str]:
    """The linear layers, attentions and results that match the patterns, in the order of `products`.

    A module around a linear layer or attention names it too; a result is named by itself or by `all` alone.

    Raises:
        ExportError: a pattern that names none.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in products if pattern == "all" or _is_asked(name, pattern)}
        if not found:
            shown = ", ".join(list(products)[:4])
            raise ExportError(
                f"--quantize {pattern!r} matches none of the {len(products)} linear layers, whose names are "
                f"{shown}, ..."
            )
        chosen |= found
    return [name for name in products if name in chosen]


def _is_asked(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) if name.endswith(RESULT) else is_named(name, pattern)


def is_named(path: str, pattern: str) -> bool:
    """Whether a pattern matches the path of a module, or of a module around it."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{pattern}.*")


def quantize(graph: ir.Graph, quantization: Quantization, fp32_modules: Collection[str] = ()) -> None:
    """Quantizes linear layers of an FP32 graph in place; the types of the rest are changed afterwards.

    Args:
        graph: the canonical graph.
        quantization: which products, and how.
        fp32_modules: modules that are kept in FP32, whose products are left alone.

    Raises:
        ExportError: a product that the graph does not have, or whose weight cannot be quantized.
    """
    products = find_products(graph)
    inputs: dict[tuple[ir.Value, float], ir.Value] = {}
    for name, scale in quantization.scales.items():
        if name not in products:
            raise ExportError(
                f"the Quantization object contains a scale for the linear layer {name}, but the graph of the encoder "
                "contains no linear layer with this name. The scale was probably calibrated with another encoder. "
                "Repeat the calibration with the encoder that you export, and pass the new Quantization object"
            )
        if products[name].metadata_props.get(MODULE, "") not in fp32_modules:
            if name in quantization.moves:
                move_channels(graph, name, products[name], quantization.moves[name])
            _quantize_product(graph, name, products[name], scale, quantization.kind, inputs)
            if name in quantization.results:
                _quantize_result(graph, name, products[name], quantization.results[name], quantization.kind)


def move_channels(graph: ir.Graph, name: str, node: ir.Node, factors: Tensor) -> None:
    """Divides the channels of the LayerNorm before a layer by factors, and multiplies the layer's weight by them.

    SmoothQuant's identity (Xiao et al., 2023). The factors are powers of two, so it holds to the bit.

    Raises:
        ExportError: the product does not read a LayerNorm alone.
    """
    value = cast(ir.Value, node.inputs[0])
    while (norm := value.producer()) is not None and norm.op_type in LAYOUT and len(value.uses()) == 1:
        value = cast(ir.Value, norm.inputs[0])
    if norm is None or norm.op_type != "LayerNormalization" or len(value.uses()) > 1:
        raise ExportError(
            "the Quantization object does not fit the encoder. The object contains scales for the input channels of "
            f"the linear layer {name}. Such scales require a LayerNorm whose output goes only to the linear layer, but "
            f"the encoder has no such LayerNorm before {name}. The Quantization object was probably made by "
            "calibrating another encoder. Repeat the calibration with the encoder that you export, and pass the new "
            "Quantization object"
        )
    changes = [(norm, 1, 1 / factors), (norm, 2, 1 / factors), (node, 1, factors[:, None])]
    for user, position, factor in changes:
        if position < len(user.inputs) and (old := user.inputs[position]) is not None:
            tensor = TorchTensor(_as_torch(cast(ir.TensorProtocol, old.const_value)) * factor)
            moved = add_initializer(graph, f"{old.name}.moved", tensor)
            user.replace_input_with(position, moved)


def _quantize_product(
    graph: ir.Graph, name: str, node: ir.Node, scale: float, kind: Kind, inputs: dict[tuple[ir.Value, float], ir.Value]
) -> None:
    value, weight, result = cast(ir.Value, node.inputs[0]), cast(ir.Value, node.inputs[1]), node.outputs[0]
    codes = encode_weight(_as_torch(cast(ir.TensorProtocol, weight.const_value)), kind, str(weight.name))
    scales = {"input_scale": scale, "weight_scale": codes.scale}
    values = {key: add_initializer(graph, f"{name}.{key}", ir.tensor(np.float32(one))) for key, one in scales.items()}
    stored = add_initializer(graph, f"{name}.weight_{kind}", _stored(codes))
    new = []
    if (value, scale) not in inputs:
        zero = add_initializer(graph, f"{name}.input_zero", zero_code(kind))
        quantized = _node("QuantizeLinear", f"{name}/quantize", [value, values["input_scale"], zero], value, node)
        quantized.outputs[0].type = ir.TensorType(CODES[kind])
        new = [
            quantized,
            _node("DequantizeLinear", f"{name}/dequantize", [quantized.outputs[0], values["input_scale"]], value, node),
        ]
        inputs[value, scale] = new[-1].outputs[0]
    read = _node("DequantizeLinear", f"{name}/dequantize_weight", [stored, values["weight_scale"]], weight, node)
    graph.insert_before(node, [*new, read])
    node.replace_input_with(0, inputs[value, scale])
    node.replace_input_with(1, read.outputs[0])
    if codes.ratios is not None:
        ratios = add_initializer(graph, f"{name}.weight_ratios", TorchTensor(codes.ratios))
        scaled = _node("Mul", f"{name}/scale_channels", [result, ratios], result, node)
        ir.convenience.replace_all_uses_with(result, scaled.outputs[0])
        scaled.replace_input_with(0, result)
        graph.insert_after(node, scaled)


def _quantize_result(graph: ir.Graph, name: str, node: ir.Node, scale: float, kind: Kind) -> None:
    """Writes a product's result as codes."""
    result = node.outputs[0]
    held = add_initializer(graph, f"{name}.result_scale", ir.tensor(np.float32(scale)))
    zero = add_initializer(graph, f"{name}.result_zero", zero_code(kind))
    quantized = _node("QuantizeLinear", f"{name}/quantize_result", [result, held, zero], result, node)
    quantized.outputs[0].type = ir.TensorType(CODES[kind])
    restored = _node("DequantizeLinear", f"{name}/dequantize_result", [quantized.outputs[0], held], result, node)
    ir.convenience.replace_all_uses_with(result, restored.outputs[0])
    quantized.replace_input_with(0, result)
    graph.insert_after(node, [quantized, restored])


def _node(operator: str, name: str, inputs: Sequence[ir.Value], like: ir.Value, product: ir.Node) -> ir.Node:
    """A node whose result has the shape and type of another value, in the product's module."""
    node = ir.node(operator, inputs, name=name, metadata_props={MODULE: product.metadata_props.get(MODULE, "")})
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}:0", like.shape, ir.TensorType(ir.DataType.FLOAT)
    return node


def _as_torch(tensor: ir.TensorProtocol) -> Tensor:
    if isinstance(tensor, TorchTensor):
        return tensor.raw.detach()
    array = tensor.numpy()
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _stored(codes: Codes) -> ir.TensorProtocol:
    array = codes.codes.contiguous()
    if array.dtype == torch.int8:
        return ir.tensor(array.numpy())
    return ir.tensor(array.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn))
