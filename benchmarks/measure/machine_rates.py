"""What this machine's processor reaches at its best: matrix products and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measure.backends import QUANTIZED
from export.contract.dtypes import BY_PRECISION
from export.quantization.rates import measure_rate

PRODUCT_SECONDS = 0.05
"""A product is made larger until it takes so long at least; a rate that small ones reach says little."""

LARGEST = {"cpu": 4096, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Beyond the largest cache of a CPU (a few hundred MB) only in part; of a GPU by far."""

REPEATS = {"cpu": 3, "cuda": 10}
TYPES = {kind: getattr(torch, BY_PRECISION[kind].name) for kind in ("fp32", "bf16", "fp16")}


def measure_rates(device: str) -> dict[str, Any]:
    """The best of several matrix multiplications for each precision, and of several copies.

    FP32 on a CPU is the better of torch and numpy, whose libraries differ. TF32 is off.

    Returns:
        The result's `roofline`: `device`, `flops_per_s` by precision, `copy_bytes_per_s` (read and written). FP8 and
        INT8 on a GPU alone, None where it does not multiply them.
    """
    rates: dict[str, float | None] = {name: _product_rate(dtype, device) for name, dtype in TYPES.items()}
    if device == "cpu":
        rates["fp32"] = max(rates["fp32"] or 0.0, _numpy_rate())
    else:
        rates |= {kind: _quantized_rate(kind) for kind in QUANTIZED}
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = best_of(lambda: target.copy_(source), device)
    return {"device": device, "flops_per_s": rates, "copy_bytes_per_s": 2 * source.nbytes / seconds}


def best_of(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    seconds = []
    for _ in range(REPEATS[device] + 1):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _product_rate(dtype: torch.dtype, device: str) -> float:
    side, best = 256, 0.0
    while True:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        seconds = best_of(lambda a=left, b=right: torch.mm(a, b), device)  # type: ignore[misc]
        best = max(best, 2 * side**3 / seconds)
        if side >= LARGEST[device] or seconds > PRODUCT_SECONDS:
            return best
        side *= 2


def _quantized_rate(kind: str) -> float | None:
    try:
        return measure_rate(kind)
    except (RuntimeError, NotImplementedError):
        return None


def _numpy_rate(side: int = 2048) -> float:
    left, right = (np.random.default_rng(0).standard_normal((side, side), dtype=np.float32) for _ in range(2))
    return 2 * side**3 / best_of(lambda: left @ right, "cpu")
