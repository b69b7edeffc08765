"""Published rates of GPUs: one table with the source of every line. Nothing here was measured by this project.

A rate holds at a clock, and many cards run faster than the clock that NVIDIA publishes, so every rate is scaled to the
highest clock that the GPU is known to run at (`clock`); if none is known, to 1.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence


class GpuError(ValueError):
    """A GPU that the table does not have."""


@dataclasses.dataclass(frozen=True)
class PublishedGpu:
    """What NVIDIA publishes about a GPU.

    Attributes:
        title: the name for a screen.
        compute_capability: which kernels it runs.
        gigabytes_per_s: bandwidth of its memory.
        cache_megabytes: size of its L2 cache.
        tflops: published dense rates in 1e12 operations per second (2 for each multiply-add), by the type of the
            factors and the type of the sums: `fp16/fp32`. FP32 products may run as TF32 where that exists.
        source: the document that has the figures.
        device: regular expression of the whole name that CUDA reports.
        clock: the highest clock that was seen on such a GPU, divided by the clock of `tflops`.
    """

    title: str
    compute_capability: str
    gigabytes_per_s: float
    cache_megabytes: float
    tflops: Mapping[str, float]
    source: str
    device: str
    clock: float = 1.0

    def rate(self, factors: str, sums: str | None) -> float | None:
        """Operations per second of a product at the highest clock, None for one that this GPU does not have.

        Args:
            factors: fp32, fp16, bf16, fp8 or int8.
            sums: fp16, fp32 or int32; None takes the fastest, which is what a lower bound needs if it is not known.
        """
        pairs = [f"{factors}/{sums}"] if sums else [pair for pair in self.tflops if pair.startswith(f"{factors}/")]
        rates = [self.tflops[pair] for pair in pairs if pair in self.tflops]
        return 1e12 * self.clock * max(rates) if rates else None


def _tflops(
    fp32: float, fp16: float, fp8: float | None, int8: float, fp16_sums: float = 1, fp8_sums: float | None = None
) -> dict[str, float]:
    """Rates by types; `fp16_sums` is how many times as fast sums in FP16 are: 2 on GeForce, 1 elsewhere.

    `fp8_sums` is the same for FP8 products if it differs: GeForce's Blackwell multiplies block-scaled FP8 with FP32
    sums at the full rate (flashinfer-ai/flashinfer#3628).
    """
    rates = {"fp32/fp32": fp32, "fp16/fp32": fp16, "fp16/fp16": fp16_sums * fp16, "bf16/fp32": fp16, "int8/int32": int8}
    return rates | ({"fp8/fp32": fp8, "fp8/fp16": (fp8_sums or fp16_sums) * fp8} if fp8 else {})


_TURING = {"fp32/fp32": 8.15, "fp16/fp32": 65.2, "fp16/fp16": 65.2, "int8/int32": 130.3}
_H100 = _tflops(494.7, 989.4, 1978.9, 1978.9)
_HOPPER = 1980 / 1830
"""Rates are published at 1830 MHz; H200 and GH200 were seen at 1980 (awslabs/amazon-eks-ami#1985)."""

PUBLISHED_GPUS: dict[str, PublishedGpu] = {
    "t4": PublishedGpu(
        "T4", "7.5", 320, 4, _TURING, "T4 data sheet; L2 cache size from the Turing white paper", r"(Tesla )?T4"
    ),
    "a10": PublishedGpu(
        "A10",
        "8.6",
        600.2,
        6,
        _tflops(62.5, 125, None, 250),
        "A10 data sheet; L2 cache size from the GA102 white paper",
        r"A10",
    ),
    "a100": PublishedGpu(
        "A100",
        "8.0",
        2039,
        40,
        _tflops(156, 312, None, 624),
        "A100 80GB SXM data sheet; L2 cache size from the A100 white paper",
        r"A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe",
    ),
    "l4": PublishedGpu(
        "L4",
        "8.9",
        300.1,
        48,
        _tflops(60.6, 121.3, 242.5, 242.5),
        "L4 data sheet; L2 cache size from the Ada white paper",
        r"L4",
    ),
    "l40s": PublishedGpu(
        "L40S",
        "8.9",
        864,
        96,
        _tflops(183.3, 366.5, 733, 733),
        "L40S data sheet. neck-export computes the FP16 rate as half of the FP8 rate, because the FP16 rate in the "
        "data sheet, 362.05 TFLOP/s, does not match the other rates in the data sheet. The L2 cache size is from the "
        "Ada white paper",
        r"L40S",
    ),
    "h100": PublishedGpu(
        "H100 SXM",
        "9.0",
        3352,
        50,
        _H100,
        "H100 data sheet and white paper 1.04",
        r"H100 (80GB HBM3|PCIe)",
        clock=_HOPPER,
    ),
    "h200": PublishedGpu(
        "H200 SXM",
        "9.0",
        4917,
        60,
        _H100,
        "H200 data sheet. The bandwidth is computed from the memory clock of 3201 MHz. The L2 cache size is the one "
        "that CUDA reports",
        r"H200.*",
        clock=_HOPPER,
    ),
    "gh200": PublishedGpu(
        "GH200",
        "9.0",
        4917,
        60,
        _H100,
        "GH200 data sheet (144 GB HBM3e); the L2 cache size is that of the H200",
        r"GH200 .*",
        clock=_HOPPER,
    ),
    "b200": PublishedGpu(
        "B200",
        "10.0",
        8000,
        128,
        _tflops(1125, 2250, 4500, 4500),
        "GB200 data sheet, used for every B200 GPU. The data sheet gives compute rates for sparse matrices at a GPU "
        "clock of 1856 MHz. For dense matrices, neck-export uses half of each rate, scaled to an assumed maximum clock "
        "of 1980 MHz. The memory bandwidth is 8 TB/s, as in a GB200. An HGX B200 has only 7.7 TB/s, so the lower bound "
        "on the latency of an HGX B200 can be slightly too low",
        r"B200",
        clock=1980 / 1856,
    ),
    "orin-nx": PublishedGpu(
        "Jetson Orin NX 16GB",
        "8.7",
        102.4,
        4,
        _tflops(9.7, 19.3, None, 38.5),
        "Orin NX data sheet; the rates are those of the GPU alone (without the DLAs) at 1173 MHz (super mode)",
        r"Orin NX",
    ),
    "orin-64": PublishedGpu(
        "Jetson AGX Orin 64GB",
        "8.7",
        204.8,
        4,
        _tflops(21.4, 42.7, None, 85.3),
        "AGX Orin technical brief, for the AGX Orin 64GB. Each compute rate for dense matrices is half of the "
        "published rate for sparse matrices. CUDA reports the same GPU name on every "
        "Orin module, so `neck-export bench` uses these rates on the other Orin modules too, where they are too high",
        r"Orin",
    ),
    "thor": PublishedGpu(
        "Jetson T5000",
        "11.0",
        273,
        32,
        _tflops(129.4, 258.8, 517.5, 517.5),
        "Jetson Thor data sheet. The FP8 and INT8 rates are 1/4 of the sparse FP4 rate, and the FP16 rate is 1/8 of "
        "it. The L2 cache size is the one that CUDA reports",
        r"(Jetson )?Thor",
    ),
    "rtx-3090": PublishedGpu(
        "RTX 3090",
        "8.6",
        936.2,
        6,
        _tflops(35.6, 71.2, None, 284.7, 2),
        "GA102 white paper, appendix A. The published compute rates are for a GPU clock of 1695 MHz, but an RTX 3090 "
        "can run at a higher clock. For the lower bound on latency, neck-export scales the compute rates to 2100 MHz",
        r"GeForce RTX 3090",
        clock=2100 / 1695,  # 1980 MHz was seen, and more is assumed to be possible
    ),
    "rtx-4080": PublishedGpu(
        "RTX 4080",
        "8.9",
        716.8,
        64,
        _tflops(48.7, 97.5, 194.9, 389.9, 2),
        "Ada white paper, appendix A. The published compute rates are for a GPU clock of 2505 MHz, but Ada GPUs were "
        "observed at a clock of up to 3105 MHz. To compute the lower bound on latency, neck-export scales the compute "
        "rates to 3105 MHz",
        r"GeForce RTX 4080",
        clock=3105 / 2505,
    ),
    "rtx-4090": PublishedGpu(
        "RTX 4090",
        "8.9",
        1008,
        72,
        _tflops(82.6, 165.2, 330.3, 660.6, 2),
        "Ada white paper, appendix A. The published compute rates are for a GPU clock of 2520 MHz, but Ada GPUs were "
        "observed at a clock of up to 3105 MHz. To compute the lower bound on latency, neck-export scales the compute "
        "rates to 3105 MHz",
        r"GeForce RTX 4090",
        clock=3105 / 2520,
    ),
    "rtx-5090": PublishedGpu(
        "RTX 5090",
        "12.0",
        1792,
        96,
        _tflops(104.8, 209.5, 838, 838, 2, fp8_sums=1),
        "RTX Blackwell white paper, appendix A. For FP8 with FP32 accumulation, neck-export uses the compute rate that "
        "the white paper gives for block-scaled FP8. The published compute rates are for a GPU clock of 2407 MHz, but "
        "a clock of 3105 MHz was observed. To compute the lower bound on latency, neck-export scales the compute rates "
        "to 3105 MHz",
        r"GeForce RTX 5090",
        clock=3105 / 2407,
    ),
}
"""By the name that `--gpu` takes; of two memory sizes the faster one is listed. Figures that data sheets round down are
computed from the number of units and the clock."""


def find_gpus(names: str | Sequence[str]) -> dict[str, PublishedGpu]:
    """The GPUs that names with commas mean; `all` means every one of the table.

    Raises:
        GpuError: a name that the table does not have.
    """
    asked = [name.strip().lower() for name in (names.split(",") if isinstance(names, str) else names)]
    found = {}
    for name in PUBLISHED_GPUS if asked == ["all"] else asked:
        if name not in PUBLISHED_GPUS:
            near = difflib.get_close_matches(name, PUBLISHED_GPUS, n=4, cutoff=0.4) or list(PUBLISHED_GPUS)
            raise GpuError(
                f"--gpu {name!r}: neck-export does not know the published rates of this GPU; choose "
                f"{', '.join(near)} or all"
            )
        found[name] = PUBLISHED_GPUS[name]
    return found


def published_gpu(device: str) -> PublishedGpu | None:
    """The GPU that CUDA reports under a name, None if the table does not have it.

    Names are matched as a whole, because an RTX 4080 SUPER is faster than an RTX 4080.
    """
    plain = device.removeprefix("NVIDIA ")
    return next((gpu for gpu in PUBLISHED_GPUS.values() if re.fullmatch(gpu.device, plain)), None)
