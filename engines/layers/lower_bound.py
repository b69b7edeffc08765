"""The time below which a GPU cannot run a plan, by published rates: summed over the kernels. It is not a forecast.

A kernel takes at least the larger of two times: its operations at the rate of its types, and the bytes that pass
between the GPU and its memory at the bandwidth. The L2 cache decides which bytes must pass. So two sums are given:

    bound_ms     what no run can beat: of what a kernel reads or writes, the cache may hold as much as fits in it
    uncached_ms  every kernel reads its inputs from memory and writes its outputs there

Rates are those at the highest clock that such a GPU was seen at, which on GeForce is up to 29 % above the published
one (`published_gpus.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engines.layers.layer_report import Kernel, LayerReport, Tensor
from engines.layers.published_gpus import PublishedGpu

PRODUCT_TYPES = {"Half": "fp16", "BFloat16": "bf16", "Float": "fp32", "FP8": "fp8", "Int8": "int8"}


@dataclasses.dataclass(frozen=True)
class LowerBound:
    """The least time of a plan on a GPU.

    Attributes:
        gpu: which.
        bound_ms: no run is faster; None with a `reason`.
        uncached_ms: the same without a cache.
        operations_share: share of bound_ms in kernels that their operations limit, 0 to 1.
        counted: operations that are assigned to kernels; those of others are left out.
        reason: why there is no bound.
    """

    gpu: PublishedGpu
    bound_ms: float | None = None
    uncached_ms: float | None = None
    operations_share: float = 0.0
    counted: int = 0
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def lower_bound(layers: LayerReport, gpu: PublishedGpu) -> LowerBound:
    """Sums over the kernels of a plan; see this file's first lines.

    Weights are counted as read from memory in every run, but for as many bytes as the cache can keep of them from one
    run to the next.
    """
    if any(kernel.operations is None for kernel in layers.kernels):
        return LowerBound(
            gpu,
            reason=(
                "the plan's layer report does not contain the number of operations of each kernel, because an earlier "
                "version of neck-export built the plan or because the ONNX file does not state the shapes of all "
                "tensors; build the plan again from an ONNX file that `neck-export onnx` wrote"
            ),
        )
    if layers.bytes_moved is None:
        why = "the plan contains Myelin blocks" if any(one.opaque for one in layers.kernels) else "the batch is dynamic"
        return LowerBound(gpu, reason=f"{why}, so it is unknown how many bytes the kernels move")
    cache, bandwidth = gpu.cache_megabytes * 1e6, gpu.gigabytes_per_s * 1e9
    bound = by_operations = uncached = arithmetic = weights = 0.0
    for kernel in layers.kernels:
        computing = _seconds(kernel, gpu)
        if computing is None:
            kind = product_type(kernel).upper()
            return LowerBound(
                gpu,
                reason=(
                    f"the lower bound on latency cannot be computed for the GPU {gpu.title}: the kernel {kernel.name} "
                    f"of the plan multiplies {kind} matrices, but neck-export has no published {kind} compute rate "
                    f"for the {gpu.title}. To get a lower bound for the {gpu.title}, build a plan in another precision"
                ),
            )
        constants, read, written = (_bytes(part) for part in (kernel.constants, kernel.inputs, kernel.outputs))
        moving = (constants + max(0.0, read - cache) + max(0.0, written - cache)) / bandwidth
        bound += max(computing, moving)
        by_operations += computing if computing >= moving else 0.0
        uncached += max(computing, (constants + read + written) / bandwidth)
        arithmetic, weights = arithmetic + computing, weights + constants
    least = max(arithmetic, bound - min(cache, weights) / bandwidth)
    counted = sum(kernel.operations or 0 for kernel in layers.kernels)
    return LowerBound(gpu, 1e3 * least, 1e3 * uncached, min(1.0, by_operations / least) if least else 0.0, counted)


def product_type(kernel: Kernel) -> str:
    """The type of the factors of a kernel's products; of several the shortest, which is the fastest."""
    if kernel.families and all("e4m3" in family for family in kernel.families):
        return "fp8"
    if kernel.quantized:
        return "fp8" if kernel.quantized == "FP8" else "int8"
    types = [one.dtype for one in (*kernel.inputs, *kernel.constants)]
    return next((PRODUCT_TYPES[name] for name in ("Half", "BFloat16", "Float") if name in types), "fp16")


def _seconds(kernel: Kernel, gpu: PublishedGpu) -> float | None:
    """Time of a kernel's operations; both products of a fused attention have equally many."""
    if not kernel.operations:
        return 0.0
    kind = product_type(kernel)
    sums = kernel.accumulation or (None, None)
    rates = [gpu.rate(kind, one) for one in sums]
    return None if None in rates else sum(kernel.operations / 2 / rate for rate in rates if rate)


def _bytes(tensors: tuple[Tensor, ...]) -> float:
    return float(sum(one.bytes or 0 for one in tensors))


def bound_lines(
    layers: LayerReport, bounds: Mapping[str, Mapping[str, Any]], capabilities: Sequence[str] = ()
) -> list[str]:
    """The table for a screen; no line without bounds.

    Args:
        layers: of the plan.
        bounds: what `LowerBound.to_dict` gave, by GPU.
        capabilities: compute capabilities that the plan was built for, where they are known.
    """
    if not bounds:
        return []
    lines = [
        "lower bound on latency, computed from each GPU's published rates (neither a measurement nor a prediction)",
        f"  {'GPU':<20} {'minimum latency':>15} {'minimum latency without L2 cache':>32}  "
        "share of compute-bound kernels in the minimum latency",
    ]
    for one in bounds.values():
        title, capability = one["gpu"]["title"], one["gpu"]["compute_capability"]
        if one["bound_ms"] is None:
            lines.append(f"  {title:<20} unknown: {one['reason']}")
            continue
        other = f"  (the plan is not built for compute capability {capability})"
        note = other if capabilities and capability not in capabilities else ""
        times = f"{one['bound_ms']:>12.2f} ms {one['uncached_ms']:>29.2f} ms"
        lines.append(f"  {title:<20} {times}  {one['operations_share']:.0%}{note}")
    counted = max(one["counted"] for one in bounds.values())
    if layers.operations and 0 < counted < layers.operations:
        missing = 1 - counted / layers.operations
        lines.append(
            f"  the lower bounds on latency leave out {missing:.1%} of the plan's arithmetic operations, because "
            "neck-export cannot tell which kernels run these operations. The true minimum latency may be higher"
        )
    return lines
