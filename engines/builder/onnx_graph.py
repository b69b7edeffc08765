"""Reads an ONNX file before it is built: whether it is complete, its attentions and its number of operations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import onnx_ir as ir

from export.contract.errors import ExportError
from export.contract.onnx_file import OnnxFile
from export.lowering.attention import before_casts, fp8_attentions


class BuildError(RuntimeError):
    """A plan could not be built; the message says which file, why, and what to do."""


class RefusedError(BuildError):
    """TensorRT cannot build the graph: `reason` is one line, `by_form` whether another attention form may help."""

    def __init__(self, message: str, reason: str, by_form: bool = True) -> None:
        super().__init__(message)
        self.reason, self.by_form = reason, by_form


@dataclasses.dataclass(frozen=True)
class Graph:
    """An ONNX file without its weights.

    Attributes:
        attentions: the number of attentions, as Attention nodes or around a Softmax.
        fp32_attentions: names of the Attention nodes that would run in FP32, which no TensorRT can build.
        node_operations: operations (2 x multiply-add) of each matrix multiplication, convolution and attention at the
            requested batch size, by the name of the node or, without one, of its output; None if a shape is unknown.
        quantized: the number of matrix multiplications of which both factors come from DequantizeLinear.
        fusable: the number of attentions with scores in FP16 or BF16; TensorRT-RTX 1.7 fuses no others.
        fp8_attentions: the number of FP8 attentions.
    """

    attentions: int
    fp32_attentions: tuple[str, ...]
    node_operations: dict[str, int] | None
    quantized: int = 0
    fusable: int = 0
    fp8_attentions: int = 0

    @property
    def operations(self) -> int | None:
        """The sum of the operations of all nodes; None if it is unknown."""
        return None if self.node_operations is None else sum(self.node_operations.values())


def whole_file(onnx: Path | OnnxFile) -> OnnxFile:
    """Checks that an ONNX file is complete and returns it.

    Raises:
        BuildError: the file or its weights are missing, or the file is truncated.
    """
    try:
        return OnnxFile.of(onnx).check()
    except ExportError as error:
        raise BuildError(str(error)) from None


def read_graph(onnx: Path | OnnxFile, batch: int = 1) -> Graph:
    """Reads the facts of an ONNX file that the layer report and the checks before a build need.

    Args:
        onnx: the file; its weights may be in other files beside it.
        batch: the batch size for which the operations of a file with dynamic batch are counted.

    Raises:
        BuildError: the file or its weights are missing, or the file is truncated.
    """
    graph = whole_file(onnx).model.graph
    fp32 = [
        node.name or str(node.outputs[0].name)
        for node in graph
        if node.op_type == "Attention" and _is_fp32(node.inputs[0])
    ]
    attentions = sum(node.op_type in ("Attention", "Softmax") for node in graph)
    quantized = sum(node.op_type == "MatMul" and _is_quantized(node) for node in graph)
    counts = (quantized, sum(map(_is_fusable, graph)), len(fp8_attentions(graph)))
    return Graph(attentions, tuple(fp32), _operations(graph, batch), *counts)


def _is_quantized(node: ir.Node) -> bool:
    """Whether both factors are codes, and the second is a weight: the products of an FP8 attention have none."""
    reads = [value.producer() if value is not None else None for value in node.inputs]
    if any(one is None or one.op_type != "DequantizeLinear" for one in reads) or reads[1] is None:
        return False
    codes = reads[1].inputs[0]
    return codes is not None and codes.is_initializer()


def _is_fp32(value: ir.Value | None) -> bool:
    """Whether a value is FP32 in truth: not a Cast to FP32 of something shorter, as the form fp32acc writes it."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast" and producer.inputs[0] is not None:
        return producer.outputs[0].dtype == producer.inputs[0].dtype == ir.DataType.FLOAT
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_fusable(node: ir.Node) -> bool:
    """Whether a node is an Attention, or the Softmax of scores, and the scores are in FP16 or BF16."""
    if node.op_type == "Attention":
        return not _is_fp32(node.inputs[0])
    scores = before_casts(node.inputs[0]) if node.op_type == "Softmax" else None
    return scores is not None and scores.outputs[0].dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _operations(graph: ir.Graph, batch: int) -> dict[str, int] | None:
    found = {}
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"):
            continue
        try:
            sides = [_sides(value, batch) for value in (*node.inputs[:2], node.outputs[0]) if value is not None]
        except ValueError:
            return None
        if node.op_type == "MatMul":
            count = 2 * math.prod(sides[-1]) * sides[0][-1]
        elif node.op_type == "Gemm":
            by_column = bool(node.attributes.get_int("transA", 0))
            count = 2 * math.prod(sides[-1]) * sides[0][0 if by_column else -1]
        elif node.op_type == "Conv":
            count = 2 * math.prod(sides[-1]) * math.prod(sides[1][1:])
        elif node.op_type == "ConvTranspose":
            count = 2 * math.prod(sides[0]) * math.prod(sides[1][1:])
        else:  # two products of (N, D) and (M, D)
            count = 4 * math.prod(sides[0]) * sides[1][-2]
        found[node.name or str(node.outputs[0].name)] = count
    return found


def _sides(value: ir.Value, batch: int) -> list[int]:
    """Numbers of a shape; `4*batch` is 4 times the batch. ValueError where one is not told."""
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        raise ValueError(value.name)
    sides = []
    for dim in shape:
        factors = str(dim if isinstance(dim, int) else dim.value or "").replace(" ", "").split("*")
        sides.append(math.prod(int(factor) if factor.isdecimal() else batch for factor in factors))
        if sides[-1] < 1 or any(not factor.isalnum() for factor in factors):
            raise ValueError(dim)
    return sides
