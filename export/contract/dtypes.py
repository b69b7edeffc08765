"""The one table of element types: how NumPy, ONNX, TensorRT and Triton call the type of a tensor (no torch)."""

from __future__ import annotations

from typing import NamedTuple


class ElementType(NamedTuple):
    """One type.

    Attributes:
        name: NumPy's, torch's and the manifest's name.
        onnx: the name in `onnx.TensorProto` and `onnx_ir.DataType`.
        bytes: of one element.
        precision: the value of `--precision` and `--output-dtype`, None if there is none.
        tensorrt: the name in `trt.DataType`, None if no engine of ours has such a tensor.
        triton: the name in config.pbtxt without `TYPE_`, None if no model of ours has such a tensor.
    """

    name: str
    onnx: str
    bytes: int
    precision: str | None = None
    tensorrt: str | None = None
    triton: str | None = None


ELEMENT_TYPES = (
    ElementType("float32", "FLOAT", 4, "fp32", "FLOAT", "FP32"),
    ElementType("float16", "FLOAT16", 2, "fp16", "HALF", "FP16"),
    ElementType("bfloat16", "BFLOAT16", 2, "bf16", "BF16", "BF16"),
    ElementType("uint8", "UINT8", 1, None, "UINT8", "UINT8"),
    ElementType("float64", "DOUBLE", 8),
    ElementType("int8", "INT8", 1),
    ElementType("int32", "INT32", 4, None, "INT32"),
    ElementType("int64", "INT64", 8, None, "INT64"),
)

BY_NAME = {one.name: one for one in ELEMENT_TYPES}
BY_ONNX = {one.onnx: one for one in ELEMENT_TYPES}
BY_TENSORRT = {one.tensorrt: one for one in ELEMENT_TYPES if one.tensorrt}
BY_PRECISION = {one.precision: one for one in ELEMENT_TYPES if one.precision}
BY_PRECISION |= {kind: BY_PRECISION["fp16"] for kind in ("fp8", "int8")}  # the type of what is not quantized
