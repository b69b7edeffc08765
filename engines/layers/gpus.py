"""Published rates of GPUs: one table with the source of every line. Nothing here was measured."""

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
        tflops: dense rates in 1e12 operations per second (2 for each multiply-add) at the published boost clock, by the
            type of the factors and the type of the sums: `fp16/fp32`. FP32 products may run as TF32 where that exists.
        source: the document that has the figures.
        device: regular expression of the whole name that CUDA reports.
    """

    title: str
    compute_capability: str
    gigabytes_per_s: float
    cache_megabytes: float
    tflops: Mapping[str, float]
    source: str
    device: str

    def rate(self, factors: str, sums: str | None) -> float | None:
        """Operations per second of a product, None for one that this GPU does not have.

        Args:
            factors: fp32, fp16, bf16, fp8 or int8.
            sums: fp16, fp32 or int32; None takes the fastest, which is what a lower bound needs if it is not known.
        """
        pairs = [f"{factors}/{sums}"] if sums else [pair for pair in self.tflops if pair.startswith(f"{factors}/")]
        rates = [self.tflops[pair] for pair in pairs if pair in self.tflops]
        return 1e12 * max(rates) if rates else None


def _tflops(fp32: float, fp16: float, fp8: float | None, int8: float, fp16_sums: float = 1) -> dict[str, float]:
    """Rates by types; `fp16_sums` is how many times as fast sums in FP16 are: 2 on GeForce, 1 elsewhere."""
    rates = {"fp32/fp32": fp32, "fp16/fp32": fp16, "fp16/fp16": fp16_sums * fp16, "bf16/fp32": fp16, "int8/int32": int8}
    return rates | ({"fp8/fp32": fp8, "fp8/fp16": fp16_sums * fp8} if fp8 else {})


_TURING = {"fp32/fp32": 8.1, "fp16/fp32": 65.0, "fp16/fp16": 65.0, "int8/int32": 130.0}
_H100 = _tflops(494.7, 989.4, 1978.9, 1978.9)
_ADA, _AMPERE = "appendix A of the Ada white paper", "appendix A of the GA102 white paper"
_BLACKWELL = "appendix A of the RTX Blackwell white paper"

PUBLISHED_GPUS: dict[str, PublishedGpu] = {
    "t4": PublishedGpu(
        "T4", "7.5", 320, 4, _TURING, "T4 data sheet; L2 cache size: Turing white paper", r"(Tesla )?T4"
    ),
    "a10": PublishedGpu(
        "A10", "8.6", 600, 6, _tflops(62.5, 125, None, 250), "A10 data sheet; L2 cache size: GA102 white paper", r"A10"
    ),
    "a100": PublishedGpu(
        "A100 SXM",
        "8.0",
        2039,
        40,
        _tflops(156, 312, None, 624),
        "A100 80GB data sheet; L2 cache size: A100 white paper",
        r"A100[- ].*",
    ),
    "l4": PublishedGpu(
        "L4", "8.9", 300, 48, _tflops(60, 121, 242.5, 242.5), "L4 data sheet; L2 cache size: Ada white paper", r"L4"
    ),
    "l40s": PublishedGpu(
        "L40S",
        "8.9",
        864,
        96,
        _tflops(183, 362.05, 733, 733),
        "L40S data sheet; L2 cache size: Ada white paper",
        r"L40S",
    ),
    "h100": PublishedGpu(
        "H100 SXM",
        "9.0",
        3350,
        50,
        _H100,
        "H100 data sheet; L2 cache size: Hopper white paper",
        r"H100 (80GB HBM3|PCIe)",
    ),
    "h200": PublishedGpu("H200 SXM", "9.0", 4800, 50, _H100, "H200 data sheet; L2 cache size: same as H100", r"H200.*"),
    "gh200": PublishedGpu("GH200", "9.0", 4900, 60, _H100, "GH200 data sheet (144 GB HBM3e)", r"GH200 .*"),
    "b200": PublishedGpu(
        "B200",
        "10.0",
        8000,
        128,
        _tflops(1125, 2250, 4500, 4500),
        "HGX B200 data sheet: half of the sparse rates",
        r"B200",
    ),
    "orin-nx": PublishedGpu(
        "Jetson Orin NX 16GB",
        "8.7",
        102.4,
        4,
        _tflops(9.6, 19.2, None, 38.4),
        "Orin NX data sheet: rates of the GPU without the DLAs at 1173 MHz (super mode)",
        r"Orin NX.*",
    ),
    "orin-64": PublishedGpu(
        "Jetson AGX Orin 64GB",
        "8.7",
        204.8,
        4,
        _tflops(21.3, 42.5, None, 85),
        "AGX Orin technical brief: half of the sparse rates of the GPU without the DLAs",
        r"Orin",
    ),
    "thor": PublishedGpu(
        "Jetson T5000",
        "11.0",
        273,
        32,
        _tflops(129, 258.5, 517, 517),
        "Jetson Thor data sheet: 1/4 and 1/8 of the sparse FP4 rate; L2 cache size: reported by CUDA",
        r"(Jetson )?Thor",
    ),
    "rtx-3090": PublishedGpu(
        "RTX 3090", "8.6", 936.2, 6, _tflops(35.6, 71, None, 284, 2), _AMPERE, r"GeForce RTX 3090"
    ),
    "rtx-4080": PublishedGpu(
        "RTX 4080", "8.9", 716.8, 64, _tflops(48.7, 97.5, 194.9, 389.9, 2), _ADA, r"GeForce RTX 4080"
    ),
    "rtx-4090": PublishedGpu(
        "RTX 4090", "8.9", 1008, 72, _tflops(82.6, 165.2, 330.3, 660.6, 2), _ADA, r"GeForce RTX 4090"
    ),
    "rtx-5090": PublishedGpu(
        "RTX 5090",
        "12.0",
        1792,
        96,
        _tflops(104.8, 209.5, 419, 838, 2),
        _BLACKWELL,
        r"GeForce RTX 5090",
    ),
}
"""By the name that `--gpu` takes. FP16 rates are those of FP32 sums; of two memory sizes the faster one is listed."""


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
