"""What the ONNX file says before a builder sees it: whether it is whole, its attentions, its operations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from export.contract.export_command import export_again
from export.contract.manifest import lfs_pointer

Dims = tuple[int | str, ...]


class BuildError(RuntimeError):
    """The plan could not be built; the message says which file, why, and what to do."""


class RefusedError(BuildError):
    """TensorRT does not take the graph: its `reason`, in a line, and whether another form of attention may help."""

    def __init__(self, message: str, reason: str, by_form: bool = True) -> None:
        super().__init__(message)
        self.reason, self.by_form = reason, by_form


@dataclasses.dataclass(frozen=True)
class Graph:
    """An ONNX file without its weights.

    Attributes:
        attentions: how many it has, as Attention nodes or around a Softmax.
        fp32_attentions: names of Attention nodes that would run in FP32, which no TensorRT builds.
        operations: 2 x multiply-add of matrix products, convolutions and attentions for each batch size that was asked;
            None where a shape is not told.
        quantised: how many matrix products have both factors from DequantizeLinear.
        fusable: how many attentions compute their scores in FP16 or BF16: TensorRT-RTX 1.7 fuses no others.
    """

    attentions: int
    fp32_attentions: tuple[str, ...]
    operations: int | None
    quantised: int = 0
    fusable: int = 0


def read_graph(path: Path, batch: int = 1) -> Graph:
    """Reads an ONNX file and checks that it is whole.

    Args:
        path: the file; its weights may lie in other files beside it.
        batch: size that a dynamic batch dimension takes when operations are counted.

    Raises:
        BuildError: missing, truncated, or without the files of its weights.
    """
    try:
        if pointer := lfs_pointer(path):
            raise BuildError(pointer)
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise BuildError(f"No such file: {path}; `neck-export onnx` writes it") from None
    except (DecodeError, ValueError, OSError) as error:
        raise BuildError(f"{path}: not a whole ONNX file ({str(error) or 'truncated'}); {_again(path)}") from None
    if not model.graph.output:
        raise BuildError(f"{path}: an ONNX file without outputs, so empty or truncated; {_again(path)}")
    _check_weights(path, model.graph)
    types, shapes = _types(model.graph), _shapes(model.graph)
    producers = {output: node for node in model.graph.node for output in node.output}
    fp32 = [
        node.name or node.output[0]
        for node in model.graph.node
        if node.op_type == "Attention" and _is_fp32(node.input[0], types, producers)
    ]
    attentions = sum(node.op_type in ("Attention", "Softmax") for node in model.graph.node)
    quantised = sum(
        node.op_type == "MatMul"
        and all(one in producers and producers[one].op_type == "DequantizeLinear" for one in node.input)
        for node in model.graph.node
    )
    fusable = sum(_is_fusable(node, types, producers) for node in model.graph.node)
    return Graph(attentions, tuple(fp32), _operations(model.graph, shapes, batch), quantised, fusable)


def _check_weights(path: Path, graph: onnx.GraphProto) -> None:
    """Checks that every external weight lies inside a file beside the ONNX file."""
    ends: dict[str, int] = {}
    for tensor in graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == TensorProto.EXTERNAL and where.get("location"):
            end = int(where.get("offset", 0)) + int(where.get("length", 0))
            ends[where["location"]] = max(end, ends.get(where["location"], 0))
    for name, end in ends.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BuildError(f"{path}: its weights lie in {name!r}, outside its folder; {_again(path)}")
        file = path.with_name(name)
        if not file.is_file():
            raise BuildError(f"No such file: {file}, the weights of {path.name}; copy both or {_again(path)}")
        if file.stat().st_size < end:
            raise BuildError(
                lfs_pointer(file)
                or f"{file}: truncated, has {file.stat().st_size:,} of {end:,} bytes; copy it again or {_again(path)}"
            )


def _again(path: Path) -> str:
    return f"export it again: {export_again(path)}"


def _types(graph: onnx.GraphProto) -> dict[str, int]:
    infos = [*graph.value_info, *graph.input, *graph.output]
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _shapes(graph: onnx.GraphProto) -> dict[str, Dims]:
    shapes: dict[str, Dims] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for info in [*graph.value_info, *graph.input, *graph.output]:
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim)
    return shapes


def _is_fp32(name: str, types: dict[str, int], producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a value is FP32 in truth: not a Cast to FP32 of something shorter, as the form fp32acc writes it."""
    producer = producers.get(name)
    if producer is not None and producer.op_type == "Cast":
        to = next(attribute.i for attribute in producer.attribute if attribute.name == "to")
        source = types.get(producer.input[0], TensorProto.UNDEFINED)
        return to == TensorProto.FLOAT and source == TensorProto.FLOAT
    return types.get(name) == TensorProto.FLOAT


def _is_fusable(node: onnx.NodeProto, types: dict[str, int], producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a node is an Attention, or the Softmax of scores, and the scores are in FP16 or BF16."""
    if node.op_type == "Attention":
        return not _is_fp32(node.input[0], types, producers)
    scores = node.input[0] if node.op_type == "Softmax" else ""
    while scores in producers and producers[scores].op_type == "Cast":
        scores = producers[scores].input[0]
    return types.get(scores) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _operations(graph: onnx.GraphProto, shapes: dict[str, Dims], batch: int) -> int | None:
    total = 0
    for node in graph.node:
        try:
            sides = [_sides(shapes[name], batch) for name in (*node.input[:2], node.output[0]) if name]
        except (KeyError, ValueError):
            if node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"):
                return None
            continue
        if node.op_type == "MatMul":
            total += 2 * math.prod(sides[-1]) * sides[0][-1]
        elif node.op_type == "Gemm":
            by_column = any(helper.get_attribute_value(item) for item in node.attribute if item.name == "transA")
            total += 2 * math.prod(sides[-1]) * sides[0][0 if by_column else -1]
        elif node.op_type == "Conv":
            total += 2 * math.prod(sides[-1]) * math.prod(sides[1][1:])
        elif node.op_type == "ConvTranspose":
            total += 2 * math.prod(sides[0]) * math.prod(sides[1][1:])
        elif node.op_type == "Attention":  # two products of (N, D) and (M, D)
            total += 4 * math.prod(sides[0]) * sides[1][-2]
    return total


def _sides(dims: Dims, batch: int) -> list[int]:
    """Numbers of a shape; `4*batch` is 4 times the batch. ValueError where one is not told."""
    sides = []
    for dim in dims:
        factors = str(dim).replace(" ", "").split("*")
        sides.append(math.prod(int(factor) if factor.isdecimal() else batch for factor in factors))
        if sides[-1] < 1 or any(not factor.isalnum() for factor in factors):
            raise ValueError(dim)
    return sides
