"""A plan of the fake: its facts and the ONNX file that it was built from, computed by ONNX Runtime on the CPU."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from export.verification.rounding_simulation import AS_WRITTEN, is_low_precision, simulate, spell_out_quantize

MAGIC = {"rtx": b"vtrt", "tensorrt": b"ftrt"}
PRODUCTS = {"MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Conv": "CONVOLUTION"}
PRODUCTS |= {"ConvTranspose": "DECONVOLUTION"}
TYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "UINT8": "UINT8", "INT64": "INT64", "INT32": "INT32"}
TYPES |= {"FLOAT8E4M3FN": "FP8", "INT8": "INT8"}
SPELLED = {"FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "UINT8": "UInt8", "INT64": "Int64", "INT32": "Int32"}
SPELLED |= {"FP8": "FP8", "INT8": "Int8"}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT64": np.int64, "INT32": np.int32}
BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "UINT8": 1, "INT64": 8, "INT32": 4}


@dataclasses.dataclass(frozen=True)
class Port:
    """A tensor: its type by TensorRT's name, its shape with -1 for what depends on the batch.

    Windowed tokens are a multiple of the batch: `4*batch` has `times` 4.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    times: int = 1

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch."""
        return tuple(batch * self.times if side == -1 else side for side in self.shape)


def port_of(info: onnx.ValueInfoProto) -> Port:
    """The port of a value."""
    tensor = info.type.tensor_type
    sides = tuple(-1 if side.dim_param else side.dim_value for side in tensor.shape.dim)
    names = "*".join(side.dim_param for side in tensor.shape.dim)
    times = math.prod(int(factor) for factor in re.findall(r"\d+", names))
    return Port(info.name, TYPES[onnx.TensorProto.DataType.Name(tensor.elem_type)], sides, times)


def pack(flavor: str, facts: dict[str, Any], model: onnx.ModelProto) -> bytes:
    """The bytes of a plan."""
    head = json.dumps(facts).encode()
    return MAGIC[flavor] + len(head).to_bytes(8, "little") + head + model.SerializeToString()


def unpack(flavor: str, data: bytes) -> tuple[dict[str, Any], bytes] | None:
    """The facts and the ONNX file of a plan; None where it is none of this flavor."""
    if data[:4] != MAGIC[flavor]:
        return None
    end = 12 + int.from_bytes(data[4:12], "little")
    return json.loads(data[12:end]), bytes(data[end:])


@functools.lru_cache(maxsize=8)
def _session(model: bytes) -> onnxruntime.InferenceSession:
    """The rounding simulation of a low-precision file: ONNX Runtime would drop the roundings (FACTS, FP16 on CPU)."""
    graph = ir.from_proto(onnx.load_from_string(model))
    if is_low_precision(graph):
        simulate(graph)
        spell_out_quantize(graph)  # with the same codes: ONNX Runtime 1.23 has no QuantizeLinear of opset 23
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.add_session_config_entry(*AS_WRITTEN)  # else sums of INT8 products overflow on a CPU without VNNI
    return onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options, ["CPUExecutionProvider"])


def compute(model: bytes, image: np.ndarray) -> list[np.ndarray]:
    """What the file computes, rounded to its outputs' types where numpy has them, else FP32."""
    session = _session(model)
    return list(session.run(None, {session.get_inputs()[0].name: image}))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that the played builder makes of a node."""

    name: str
    kind: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    tactic: str
    metadata: str


def kernels_of(model: onnx.ModelProto) -> list[Kernel]:
    """One kernel for every product and attention, named as Myelin names them."""
    infos = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    ports = {info.name: port_of(info) for info in infos if info.type.tensor_type.elem_type}
    codes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in codes.values():
            ports[tensor.name] = Port(
                tensor.name, TYPES[onnx.TensorProto.DataType.Name(tensor.data_type)], tuple(tensor.dims)
            )
    kernels = []
    for node in model.graph.node:
        if node.op_type not in {*PRODUCTS, "Attention", "Softmax"}:
            continue
        fused = node.op_type in ("Attention", "Softmax")
        name = f"_gemm_mha_v2_myl0_{len(kernels)}" if fused else f"__myl_{node.op_type}_myl0_{len(kernels)}"
        read = [codes.get(each, each) for each in node.input]  # the kernel takes the codes
        known = tuple(ports[each] for each in read if each in ports)
        outputs = tuple(ports[each] for each in node.output if each in ports)
        tactic = re.sub(r"_myl0_\d+", f"_0x{len(kernels):04x}", name)
        kernels.append(Kernel(name, "kgen" if fused else "gemm", known, outputs, tactic, f"[ONNX Layer: {node.name}]"))
    return kernels


def _listed(ports: tuple[Port, ...], rtx: bool) -> str:
    layout = "Strides: [1], StrideOrder: [0], Datatype: {}, Format: N/A" if rtx else "Format/Datatype: {}"
    each = (
        f"{{ Name: {port.name}, Dimensions: [{','.join(map(str, port.shape))}], {layout.format(SPELLED[port.kind])} }}"
        for port in ports
    )
    return f"[ {', '.join(each)}]"


def log_of(kernels: list[Kernel], rtx: bool) -> str:
    """The builder's listing: RTX 1.7's lines as seen, TensorRT 10's as in NVIDIA/TensorRT #4397, without Constants."""
    lines = ["Layers:"]
    for kernel in kernels:
        constants = "Constants: [], " if rtx else ""
        lines.append(
            f"Name: {kernel.name}, LayerType: {kernel.kind}, Inputs: {_listed(kernel.inputs, rtx)}, {constants}"
            f"Outputs: {_listed(kernel.outputs, rtx)}, TacticName: {kernel.tactic}, StreamId: 0, "
            f"Metadata: {kernel.metadata}"
        )
    return "\n".join([*lines, "", "I/O Tensors:" if rtx else "Bindings:", "image"])


def inspected(kernels: list[Kernel], version: tuple[int, ...]) -> str:
    """The engine inspector's JSON: TensorRT 10 says `Format/Datatype` and `Bindings`; waits stand between kernels."""
    old = version[0] == 10

    def tensor(port: Port) -> dict[str, Any]:
        kind = {"Format/Datatype": SPELLED[port.kind]} if old else {"Datatype": SPELLED[port.kind], "Format": "Linear"}
        return {"Name": port.name, "Location": "Device", "Dimensions": list(port.shape), **kind}

    layers: list[dict[str, Any]] = [{"Name": "__mye_wait_0", "LayerType": "wait", "Inputs": [], "Outputs": []}]
    for kernel in kernels:
        tensors = {"Inputs": [*map(tensor, kernel.inputs)], "Outputs": [*map(tensor, kernel.outputs)]}
        about = {"TacticName": kernel.tactic, "StreamId": 0, "Metadata": kernel.metadata}
        layers.append({"Name": kernel.name, "LayerType": kernel.kind, **tensors, **about})
    layers.append({"Name": "__mye_signal_0", "LayerType": "signal", "Inputs": [], "Outputs": []})
    return json.dumps({"Layers": layers, "Bindings" if old else "I/O Tensors": ["image"]})
