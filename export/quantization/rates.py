"""How fast this GPU, else one by its data sheet, multiplies matrices of a kind: for the times that a choice shows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

PUBLISHED = {"fp16": 121e12, "fp8": 242.5e12, "int8": 242.5e12}
"""Operations per second of an L4 by its data sheet, dense."""

PUBLISHED_BYTES = 300e9
"""Bytes per second of an L4's memory by its data sheet."""

SIDE, REPEATS = 8192, 10


class Rates(NamedTuple):
    """Operations per second by kind, and whose they are."""

    per_s: dict[str, float]
    source: str


@functools.cache
def product_rates(kind: str) -> Rates:
    """Of FP16 and a kind (fp8, int8): measured where torch has a GPU that multiplies it, else published."""
    published = Rates(
        PUBLISHED,
        "the computing time is estimated from the published matrix multiplication rates of an L4 GPU, because torch "
        "finds no GPU on this machine",
    )
    if not torch.cuda.is_available():
        return published
    try:
        found = {one: measure_rate(one) for one in ("fp16", kind)}
    except (RuntimeError, NotImplementedError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return published._replace(
            source=(
                f"torch cannot multiply {kind.upper()} matrices on this machine, so the computing time of the "
                "encoder's layers is estimated from the published matrix multiplication rates of an L4 GPU. Message of "
                f"torch: {why}"
            )
        )
    return Rates(
        found,
        "the computing time is estimated from the matrix multiplication rates that were measured with torch on this "
        f"{torch.cuda.get_device_name()}",
    )


def measure_rate(kind: str) -> float:
    """Operations per second of the fastest of some products of 8192 x 8192 matrices on the GPU.

    The matrices are random: with equal numbers the GPU draws less power, so it clocks higher than it does on data. The
    right one is given as a transposed view, since `_int_mm` takes a slow path with a row-major one (pytorch #165230),
    and `_scaled_mm` takes no other.

    Args:
        kind: fp16, fp8 (E4M3, one scale for a matrix, FP16 result) or int8 (INT32 result).

    Raises:
        RuntimeError, NotImplementedError: this torch or GPU does not multiply it.
    """
    dtype = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[kind]
    left, right = (_random_matrix(dtype) for _ in range(2))
    one = torch.ones((), device="cuda")

    def multiply() -> None:
        if kind == "fp8":
            torch._scaled_mm(left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.float16)
        elif kind == "int8":
            torch._int_mm(left, right.t())
        else:
            torch.mm(left, right.t())

    multiply()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        multiply()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * SIDE**3 / min(times) * 1e3


def _random_matrix(dtype: torch.dtype) -> torch.Tensor:
    """(SIDE, SIDE) on the GPU: every INT8 number alike often, else normally distributed."""
    if dtype == torch.int8:
        return torch.randint(-128, 128, (SIDE, SIDE), device="cuda").to(dtype)
    return torch.randn(SIDE, SIDE, device="cuda").to(dtype)
