"""The codes of FP8 and INT8 in a graph (no torch)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

Kind = Literal["fp8", "int8"]
CODES: dict[Kind, ir.DataType] = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8}


@dataclasses.dataclass(frozen=True)
class AttentionScales:
    """The scales of an FP8 attention's queries (already multiplied by the attention scale), keys and values."""

    query: float
    key: float
    value: float


def zero_code(kind: Kind) -> ir.TensorProtocol:
    """The zero point of all codes: 0."""
    return ir.tensor(np.zeros((), np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn))
