"""The lower bound on a plan's latency: each kernel's larger time, by published rates, summed."""

from __future__ import annotations

import dataclasses

import pytest

from engines.layers.layer_report import Kernel, LayerReport, Tensor
from engines.layers.lower_bound import bound_lines, lower_bound, product_type
from engines.layers.published_gpus import PUBLISHED_GPUS, GpuError, PublishedGpu, find_gpus, published_gpu

MEBI = 1 << 20
each_gpu = pytest.mark.parametrize("name", PUBLISHED_GPUS)


def tensor(elements: int, dtype: str = "Half") -> Tensor:
    return Tensor("t", (elements,), dtype)


def kernel(
    name: str, operations: int, read: int = 0, written: int = 0, constants: int = 0, dtype: str = "Half"
) -> Kernel:
    tensors = [(tensor(elements, dtype),) if elements else () for elements in (read, constants, written)]
    return Kernel(name, "gemm", "", *tensors, (), operations=operations)


def report(*kernels: Kernel) -> LayerReport:
    return LayerReport("builder log", kernels, 0, sum(one.operations or 0 for one in kernels))


BUSY = kernel("product", 10**12, MEBI, MEBI, MEBI)
"""Limited by its operations on every GPU: 1 TFLOP for 6 MiB."""

COPY = kernel("copy", 0, 512 * MEBI, 512 * MEBI)
"""1 GiB read and 1 GiB written: more than any cache holds."""


@each_gpu
def test_two_kernels_by_hand(name: str) -> None:
    """The sum of one kernel's operations and the other's bytes, not the larger of both sums."""
    gpu = PUBLISHED_GPUS[name]
    fastest = gpu.clock * max(gpu.tflops[pair] for pair in gpu.tflops if pair.startswith("fp16"))
    product_ms = 1e12 / (fastest * 1e12) * 1e3
    copy_ms = 2**31 / (gpu.gigabytes_per_s * 1e9) * 1e3
    cached_ms = 2 * gpu.cache_megabytes * 1e6 / (gpu.gigabytes_per_s * 1e9) * 1e3
    weights_ms = min(2 * MEBI, gpu.cache_megabytes * 1e6) / (gpu.gigabytes_per_s * 1e9) * 1e3
    found = lower_bound(report(BUSY, COPY), gpu)
    assert found.uncached_ms == pytest.approx(product_ms + copy_ms)
    assert found.bound_ms == pytest.approx(product_ms + copy_ms - cached_ms - weights_ms)
    assert found.bound_ms < found.uncached_ms
    assert found.counted == 10**12 and found.reason is None
    alone = lower_bound(report(COPY), gpu)
    assert alone.bound_ms == pytest.approx(copy_ms - cached_ms) and alone.operations_share == 0
    assert lower_bound(report(BUSY), gpu).bound_ms == pytest.approx(product_ms)  # the cache saves no operation
    assert lower_bound(report(BUSY, BUSY, COPY), gpu).bound_ms != pytest.approx(found.bound_ms)  # the control


@each_gpu
def test_what_fits_in_the_cache_costs_nothing(name: str) -> None:
    gpu = PUBLISHED_GPUS[name]
    small = kernel("gelu", 0, MEBI, MEBI)
    found = lower_bound(report(small), gpu)
    assert found.bound_ms == 0 and found.uncached_ms == pytest.approx(4 * MEBI / gpu.gigabytes_per_s / 1e6)


@each_gpu
def test_weights_are_read_in_every_run_but_for_what_the_cache_keeps(name: str) -> None:
    gpu = PUBLISHED_GPUS[name]
    weights = kernel("weights", 0, constants=512 * MEBI)
    left = (1024 * MEBI - gpu.cache_megabytes * 1e6) / (gpu.gigabytes_per_s * 1e9) * 1e3
    assert lower_bound(report(weights), gpu).bound_ms == pytest.approx(left)


@pytest.mark.parametrize(
    ("families", "dtype", "kind", "pair"),
    [
        (("Ampere_hmma_fp32", "Ampere_hmma_fp32"), "Half", "fp16", "fp16/fp32"),
        (("Ampere_hmma_fp16", "Ampere_hmma_fp16"), "Half", "fp16", "fp16/fp16"),
        (("Ampere_hmma_bf16", "Ampere_hmma_bf16"), "BFloat16", "bf16", "bf16/fp32"),
        (("Ada_qmma_e4m3_fp32", "Ada_qmma_e4m3_fp32"), "FP8", "fp8", "fp8/fp32"),
    ],
)
def test_an_attention_is_bounded_by_what_it_accumulates_in(
    families: tuple[str, str], dtype: str, kind: str, pair: str
) -> None:
    """On a GeForce FP16 sums are twice as fast, so the bound must know them."""
    sums = tuple("fp16" if one.endswith("fp16") else "fp32" for one in families)
    attention = dataclasses.replace(kernel("_mha_", 10**12, 8, 8, dtype=dtype), families=families, accumulation=sums)
    gpu = PUBLISHED_GPUS["rtx-4090"]
    assert product_type(attention) == kind
    assert lower_bound(report(attention), gpu).bound_ms == pytest.approx(1e3 / gpu.tflops[pair] / gpu.clock)
    mixed = dataclasses.replace(attention, accumulation=("fp32", "fp16"))
    if kind == "fp16":
        both = 500 / gpu.tflops["fp16/fp32"] + 500 / gpu.tflops["fp16/fp16"]
        assert lower_bound(report(mixed), gpu).bound_ms == pytest.approx(both / gpu.clock)


def test_what_gives_no_bound_says_why() -> None:
    gpu = PUBLISHED_GPUS["a100"]
    eight = kernel("gemm8", 10**9, 4, 4, 4, "FP8")
    assert "FP8" in str(lower_bound(report(eight), gpu).reason)
    assert lower_bound(report(eight), PUBLISHED_GPUS["l4"]).bound_ms
    dynamic = dataclasses.replace(BUSY, inputs=(Tensor("x", (-1, 4), "Half"),))
    assert "dynamic" in str(lower_bound(report(dynamic), gpu).reason)
    older = dataclasses.replace(BUSY, operations=None)
    assert "build the plan again" in str(lower_bound(report(BUSY, older), gpu).reason)


def test_the_table_says_what_it_is_and_what_it_leaves_out() -> None:
    layers = report(BUSY, COPY)
    bounds = {name: lower_bound(layers, gpu).to_dict() for name, gpu in find_gpus("l4,h100,rtx-4090").items()}
    lines = bound_lines(layers, bounds, ("8.9",))
    assert "lower bound" in lines[0] and "minimum latency" in lines[1]
    assert ["not built for" in line for line in lines[2:]] == [False, True, False]
    more = dataclasses.replace(layers, operations=4 * 10**12)
    assert "75.0%" in bound_lines(more, bounds)[-1]
    assert bound_lines(layers, {}) == []


def test_gpus_by_name_and_by_what_cuda_calls_them() -> None:
    assert list(find_gpus("H100, rtx-4090")) == ["h100", "rtx-4090"]
    assert find_gpus("all") == PUBLISHED_GPUS
    for unknown in ("rtx-4081", "h100,", "mi300"):
        with pytest.raises(GpuError, match="--gpu"):
            find_gpus(unknown)
    known = {"NVIDIA GeForce RTX 4090": "rtx-4090", "NVIDIA H200": "h200", "NVIDIA L4": "l4", "NVIDIA L40S": "l40s"}
    known |= {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "Tesla T4": "t4", "Orin": "orin-64"}
    assert {device: published_gpu(device) for device in known} == {
        device: PUBLISHED_GPUS[name] for device, name in known.items()
    }
    faster = (
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA RTX A4000",
    )
    assert [published_gpu(device) for device in faster] == [None] * 5


def test_the_table_is_consistent() -> None:
    """FP16 sums are never slower, FP8 needs compute capability 8.9, and every line has its source."""
    for gpu in PUBLISHED_GPUS.values():
        assert gpu.tflops["fp16/fp16"] in (gpu.tflops["fp16/fp32"], 2 * gpu.tflops["fp16/fp32"])
        numbers = tuple(map(int, gpu.compute_capability.split(".")))
        assert ("fp8/fp32" in gpu.tflops) == (numbers >= (8, 9))
        assert isinstance(gpu, PublishedGpu) and gpu.source and 1 <= gpu.clock < 1.3
        assert gpu.rate("int4", None) is None
