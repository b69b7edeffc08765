"""How much host memory a backend is likely to take, before it was run once."""

from __future__ import annotations

import math

from benchmarks.measure.backends import Backend
from benchmarks.measure.measure_point import MeasurePoint
from benchmarks.roofline import ITEM_BYTES

BASE_BYTES = {"eager": 4e8, "compile": 1.2e9, "compile-max": 2e9, "ort": 2e8, "openvino": 3e8, "plan": 4e8}
"""The interpreter with what the runtime loads (torch 2.13, ONNX Runtime 1.32, OpenVINO 2026.4 on x86-64)."""

WEIGHT_COPIES = {"eager": 1.0, "compile": 1.0, "compile-max": 1.0, "ort": 1.1, "openvino": 2.1, "plan": 1.0}
"""Resident at full depth and 336 px: ONNX Runtime 2.1 GB, OpenVINO 3.9 GB, which repacks what it has read."""


def needed_bytes(backend: Backend, point: MeasurePoint) -> int:
    """An estimate of the resident memory of a worker at its largest."""
    config, batch, parts = point.config, point.batch, point.parts
    weights = 4 * sum(part.weight_elements for part in parts)
    total = BASE_BYTES[backend.runtime] + weights * WEIGHT_COPIES[backend.runtime]
    if backend.precision != "fp32":
        total += weights / 2
    elif not backend.file and backend.module == "rewritten":
        total += weights / 4  # queries, keys and values are rewritten into weights of their own
    if backend.device == "cuda":
        return int(total + 2e9)  # CUDA's own; what is computed lies on the device
    item, tokens = ITEM_BYTES[backend.precision], batch * math.prod(config.grid)
    outputs = sum(part.output_elements for part in parts)
    hidden = 2 * tokens * max(config.mlp_hidden, 3 * config.embed_dim)
    upsampled = 4 * tokens * config.embed_dim * 2  # level 4.0 between its two steps, before and after GELU
    total += item * (outputs + max(hidden, upsampled))
    if backend.file and backend.runtime == "ort":
        # a global block's scores and their softmax; torch and OpenVINO do not hold them whole
        total += 2 * item * batch * config.num_heads * math.prod(config.grid) ** 2
    return int(total)
