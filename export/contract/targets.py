"""Who reads an ONNX file: one table of TensorRT, TensorRT-RTX, ONNX Runtime and OpenVINO by version (no torch).

Each line says where it was found; `run` is by us. A target is claimed only for what a source tells of
it. Where a graph needs something that no line speaks of, who reads it is unknown (`export.verification.target_check`).
Short names of the sources: `operators.md` and `changelog` are docs/ of onnx/onnx-tensorrt at the version's release,
`OperatorKernels.md` is docs/ of microsoft/onnxruntime, `ort#N` and `trt#N` an issue or pull request of
microsoft/onnxruntime and NVIDIA/TensorRT.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from export.contract.triton_containers import ONNX_RUNTIME, TENSORRT

Family = Literal["tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-webgpu", "openvino"]
TITLES: dict[Family, str] = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-gpu": "ONNX Runtime on a GPU",
    "onnxruntime-webgpu": "ONNX Runtime on WebGPU",
    "openvino": "OpenVINO",
}

BASIC = frozenset(
    {"Add", "Cast", "Concat", "Constant", "Conv", "ConvTranspose", "DepthToSpace", "Div", "Erf", "Expand", "Gather"}
    | {
        "Gemm",
        "Identity",
        "LayerNormalization",
        "MatMul",
        "MaxPool",
        "Mul",
        "Neg",
        "Pad",
        "ReduceMean",
        "Reshape",
        "Shape",
    }
    | {"Slice", "Softmax", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze"}
)
"""Operators of opset 17 and earlier that an exported encoder may hold, and which every target below takes."""

_OTHER_EXPORTERS = """
Abs And ArgMax ArgMin AveragePool BatchNormalization Ceil Clip ConstantOfShape Cos Dropout Elu Equal Exp Flatten Floor
GatherElements GatherND GlobalAveragePool Greater GreaterOrEqual HardSigmoid InstanceNormalization LeakyRelu Less
LessOrEqual Log LogSoftmax Max Mean Min Not Or Pow Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMin ReduceProd
ReduceSum ReduceSumSquare Relu Round ScatterElements ScatterND Sigmoid Sign Sin Size Softplus Sqrt Sum Tanh Trilu Where
Xor
"""
OTHER_EXPORTERS = frozenset(_OTHER_EXPORTERS.split())
"""Operators that encoders written by other tools may contain. TensorRT reads them from 8.6 on (operators.md). Loaded in
FP32 and FP16, each in a graph of its own, by ONNX Runtime 1.18.0, 1.23.0 and 1.32.0 on the CPU, OpenVINO 2026.4.1 and
TensorRT-RTX 1.7.1. Which of them ONNX Runtime computes on a GPU was not looked up."""

NO_FP8 = "the GPU of this target cannot multiply matrices in FP8, which needs compute capability 8.9 or higher"

QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear"})
"""With FP16 scales, which came with opset 19."""

SHIFTED = "with a zero point"
"""What follows the type of a QuantizeLinear or DequantizeLinear whose zero point is not known to be 0."""

INTEGER_PRODUCTS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger"})
"""What ONNX Runtime's quantize_dynamic writes."""

CONV_INTEGER = frozenset({"ConvInteger"})
"""With INT8 weights, which ONNX Runtime 1.23 does not load although its own quantize_dynamic writes them (run)."""

QLINEAR = frozenset({"QLinearConv", "QLinearMatMul"})
"""What ONNX Runtime's quantize_static writes in the QOperator format."""

GELU, ATTENTION = frozenset({"Gelu"}), frozenset({"Attention"})
HALF, ALL = frozenset({"FLOAT", "FLOAT16"}), frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
FP8 = "FLOAT8E4M3FN"
CODES = frozenset({FP8, "INT8"})
FP8_CAPABILITY = (8, 9)
"""The first GPUs that have FP8 products: Ada (docs.nvidia.com, TensorRT-RTX, Working with Quantized Types)."""

FP32_ATTENTION = ("Attention", "FLOAT")
"""An Attention whose inputs are FP32 in truth: no TensorRT builds it unless it may be decomposed (run, RTX 1.7)."""

NOT_SYMMETRIC_INT8 = frozenset(
    (operator, kind + shift)
    for operator in QUANTIZED
    for kind in ("INT8", "UINT8", "INT16", "UINT16", "INT32")
    for shift in ("", f" {SHIFTED}")
    if (kind, shift) != ("INT8", "")
)
"""Quantization that TensorRT's parser refuses: it takes INT8 with a zero point of 0 alone (operators.md of every
version; onnx-tensorrt#850: INT32, the biases of quantize_static; run, RTX 1.7: UINT8, INT16, INT32 and zero points)."""

SMALL = frozenset({"MaxPool", "Pad"})
"""Operators that ONNX Runtime may compute on the CPU without harm: they cost copies, not arithmetic."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a family of runtimes can load, from one version to the next entry.

    Attributes:
        family, since: whose line it is, and the first version that it holds for.
        opset: the newest that is known to be read.
        operators: those that are known to be read.
        types: of weights and activations; integers and uint8 pixels are read by all.
        refuses: operator and type that are known to fail.
        lacks: operators that are known to be absent.
        lacks_from: operators that are known to be absent from a version of the operator on.
        on_cpu: operators that a GPU build computes on the CPU, each from which version of the operator on.
        source: where all of it was found.
        version: the one that was asked, `since` where none was.
        capability: of the GPU that it runs on, where that was asked: 8.7.
        product: the product that was requested and contains it: triton-25.09, jetpack-6.2.
    """

    family: Family
    since: str
    opset: int
    operators: frozenset[str]
    types: frozenset[str]
    source: str
    refuses: frozenset[tuple[str, str]] = frozenset()
    lacks: frozenset[str] = frozenset()
    lacks_from: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    on_cpu: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)
    version: str = ""
    capability: str = ""
    product: str = dataclasses.field(default="", compare=False)

    @property
    def name(self) -> str:
        """How a message names it: `TensorRT 10.3`."""
        return f"{TITLES[self.family]} {self.version or self.since}"

    @property
    def full_name(self) -> str:
        """The name for `find_targets`: `tensorrt-10.3`, `tensorrt-10.3@8.7`."""
        return f"{self.family}-{self.version or self.since}" + (f"@{self.capability}" if self.capability else "")


def _trt(since: str, opset: int, more: frozenset[str], types: frozenset[str], source: str) -> Target:
    refuses = frozenset({FP32_ATTENTION}) | NOT_SYMMETRIC_INT8
    lacks = INTEGER_PRODUCTS | QLINEAR  # operators.md
    return Target("tensorrt", since, opset, BASIC | OTHER_EXPORTERS | more, types, source, refuses=refuses, lacks=lacks)


def _ort(
    since: str, opset: int, more: frozenset[str], source: str, lacks_from: Mapping[str, int] | None = None
) -> Target:
    known = BASIC | OTHER_EXPORTERS | GELU | QUANTIZED | (INTEGER_PRODUCTS - CONV_INTEGER) | QLINEAR | more
    kernels = (
        "OperatorKernels.md of ONNX Runtime lists kernels of QuantizeLinear and DequantizeLinear for INT8 and INT32 in "
        "every opset. The INT8 kernels work with and without zero points. A test in ONNX Runtime 1.32 confirmed that "
        "the kernels run"
    )
    types = HALF | {"INT8"}
    return Target(
        "onnxruntime", since, opset, known, types, f"{source}; {kernels}; {_ORT}", lacks_from=lacks_from or {}
    )


NEWER = GELU | ATTENTION | QUANTIZED
_NOTHING: frozenset[str] = frozenset()
_LAYOUT_21 = {"Reshape": 21, "Shape": 21, "Squeeze": 21, "Transpose": 21, "Unsqueeze": 21}
_NEW_22 = {"Attention": 23, "ConvTranspose": 22, "MaxPool": 22, "Pad": 19}
_ORT = (
    "On the CPU, ONNX Runtime has no BF16 kernels (microsoft/onnxruntime#27892); for example, version 1.32 cannot run "
    "a BF16 Conv of opset 22. On CUDA, ONNX Runtime has no BF16 MaxPool kernel (see its OperatorKernels.md)"
)

TARGETS: tuple[Target, ...] = (
    _trt("8.6", 17, frozenset(), HALF, "operators.md 8.6-GA: opset 17, no Gelu, no BF16; uint8 pixels since 8.5"),
    _trt("9.0", 19, frozenset(), ALL, "operators.md and changelog 9.0 to 9.3: opset 19, BF16"),
    _trt(
        "10.0",
        20,
        GELU | QUANTIZED,
        ALL | CODES,
        "operators.md 10.0 and 10.1: opset 9 to 20, Gelu, FP8 and INT8; later ones up to 10.13 not seen",
    ),
    _trt("10.14", 23, NEWER, ALL | CODES, "changelog 10.14: Attention (trt#4705: none builds on an RTX 4080)"),
    _trt(
        "10.15",
        24,
        NEWER,
        ALL | CODES,
        "operators.md 10.15: opset 9 to 24 (trt#4738, #4739: not Attention with several outputs, or inside If)",
    ),
    _trt(
        "11.0",
        24,
        NEWER,
        ALL | CODES,
        "operators.md 11.2: opset 9 to 24; bindings of 11.4; releases 11.3, 11.4 and 11.5 of NVIDIA/TensorRT and "
        "onnx-tensorrt, and docs.nvidia.com, release notes 11.4.1: nothing removed, opset 25 in 11.5",
    ),
    Target(
        "tensorrt-rtx",
        "1.7",
        24,
        BASIC | OTHER_EXPORTERS | NEWER,
        ALL | CODES,
        "run, 1.7.1: parses and builds all of our forms; earlier versions were not tried",
        refuses=frozenset({FP32_ATTENTION, ("ConvTranspose", "BFLOAT16")}) | NOT_SYMMETRIC_INT8,
        lacks=INTEGER_PRODUCTS | QLINEAR,
    ),
    _ort("1.18", 20, _NOTHING, "ort#19560: Gelu (20) in 1.18"),
    _ort("1.21", 22, _NOTHING, "ort#23344: opset 22 in 1.21"),
    _ort(
        "1.23",
        23,
        ATTENTION,
        "ort#25156: Attention (23) in 1.23; run, 1.23.0 and 1.23.2: no QuantizeLinear (23)",
        {"QuantizeLinear": 23},
    ),
    _ort("1.24", 23, ATTENTION | CONV_INTEGER, "run, 1.24.1: QuantizeLinear (23) and ConvInteger"),
    _ort("1.25", 24, ATTENTION | CONV_INTEGER, "ort#27542: Attention (24)"),
    Target(
        "onnxruntime-gpu",
        "1.18",
        20,
        BASIC | GELU,
        HALF,
        f"ort#19560: Gelu (20) on CUDA in 1.18; ort#26393: Pad (19) on the CPU; {_ORT}",
        on_cpu={"Pad": 19},
    ),
    Target(
        "onnxruntime-gpu",
        "1.21",
        22,
        BASIC | GELU,
        HALF,
        f"ort#26065: opset-21 layouts on the CPU; ort#26393: ConvTranspose and MaxPool (22) too; {_ORT}",
        on_cpu={**_NEW_22, **_LAYOUT_21},
    ),
    Target(
        "onnxruntime-gpu",
        "1.23",
        23,
        BASIC | GELU | ATTENTION,
        HALF,
        f"ort#28025: Attention on the CPU with 1.24.4; ort#26393, #27710: ConvTranspose (22) too; {_ORT}",
        on_cpu=_NEW_22,
    ),
    Target(
        "onnxruntime-gpu",
        "1.25",
        23,
        BASIC | GELU | ATTENTION,
        HALF,
        f"ort#27542, #27710 and OperatorKernels.md of March 2026: Attention, Cast, layouts (23) on CUDA; {_ORT}",
        on_cpu={"MaxPool": 22, "Pad": 19},
    ),
    Target(
        "onnxruntime-webgpu",
        "1.31",
        20,
        BASIC | GELU,
        frozenset({"FLOAT"}),
        "run, 1.31.1 with onnxruntime-ep-webgpu 0.4.0 on SwiftShader: every node at opset 17 and 20, ConvTranspose and "
        "MaxPool (22), Attention (23) and what depends on Shape on the CPU; FP16 not tried, SwiftShader has no f16",
        on_cpu={"Attention": 23, "ConvTranspose": 22, "MaxPool": 22, "Shape": 1},
    ),
    Target(
        "openvino",
        "2026.4",
        24,
        BASIC | OTHER_EXPORTERS | NEWER | INTEGER_PRODUCTS | QLINEAR,
        ALL | {"INT8"},
        "run, 2026.4.1 on a CPU, all of our forms but FP8, and what ONNX Runtime's quantizers make of them",
    ),
)
"""Lines of a family lie together, oldest first."""

NEWEST: dict[Family, str] = {
    "tensorrt": "11.5",
    "tensorrt-rtx": "1.7",
    "onnxruntime": "1.32",
    "onnxruntime-gpu": "1.32",
    "onnxruntime-webgpu": "1.31",
    "openvino": "2026.4",
}
"""Newer versions than these are not known here."""

UNVERSIONED: dict[str, str] = {name: NEWEST[name] for name in ("tensorrt-rtx", "onnxruntime-webgpu", "openvino")}
"""Families whose name alone stands for the newest version that is known here."""

JETPACK = {
    "6.1": "10.3",  # docs.pytorch.org/TensorRT v2.6.1, getting_started/jetpack
    "6.2": "10.3",  # the compute stack of 6.1; roboflow/inference and others build on it
    "7.0": "10.13",  # dusty-nv/jetson-containers#1263
    "7.1": "10.13",  # roboflow/inference#1935
    "7.2": "10.16",  # roboflow/inference#2478, read from a device; OE4T/meta-tegra#2224: Orin and Thor
    "7.2.1": "10.16",  # OE4T/meta-tegra#2339 changes no TensorRT; public projects on Orin Nano name 10.16
    "7.2.2": "10.16",  # at least: 7.2's. TensorRT 11.4.1's release notes name 7.2.2; what it installs was not found
}
"""TensorRT of NVIDIA's Jetson releases; they carry no ONNX Runtime."""

JETPACK_CAPABILITY = {"jetpack-6.1": "8.7", "jetpack-6.2": "8.7"}
"""Of the only GPU that these run on (Orin); 7.0 and 7.1 run on Thor, 7.2 on both: `jetpack-7.2@8.7` is Orin."""


class TargetError(ValueError):
    """An unknown target, or a file that a requested target cannot load; the message contains the fix."""


def target_names() -> list[str]:
    """The names that `find_targets` accepts; of versions, those at which an entry begins."""
    lines = [f"{target.family}-{target.since}" for target in TARGETS]
    newest = [f"{family}-{version}" for family, version in NEWEST.items()]
    names = [*UNVERSIONED, *lines, *newest, *(f"jetpack-{v}" for v in JETPACK)]
    return list(dict.fromkeys([*names, *(f"triton-{container}" for container in triton_containers())]))


def triton_containers() -> list[str]:
    """The Triton containers whose TensorRT and ONNX Runtime are both known, oldest first."""
    known = {*TENSORRT, *ONNX_RUNTIME}
    return sorted(month for month in known if month >= max(min(TENSORRT), min(ONNX_RUNTIME)))


def find_targets(names: str) -> tuple[Target, ...]:
    """The targets that names with commas mean; `triton-25.09` is its TensorRT and its ONNX Runtime.

    Raises:
        TargetError: a name that is not known, with those near it, or a version that the table does not know.
    """
    found: dict[str, Target] = {}
    for name in (part.strip() for part in names.split(",")):
        plain, _, capability = name.partition("@")
        if capability and not re.fullmatch(r"\d+\.\d", capability):
            raise TargetError(
                f"--target {name!r}: the text after the @ is not a compute capability; write one such as 8.6"
            )
        capability = capability or JETPACK_CAPABILITY.get(plain.lower(), "")
        product = plain.lower() if plain.lower().startswith(("triton-", "jetpack-")) else ""
        for one in _parts(plain.lower()):
            target = dataclasses.replace(_find(one, plain), capability=capability, product=product)
            found[f"{one}@{capability}"] = target
    return tuple(found.values())


def line_of(family: Family, version: str) -> Target | None:
    """The entry that holds for a version; None if the table does not know the version."""
    lines = [target for target in TARGETS if target.family == family]
    if not re.fullmatch(r"\d+(\.\d+)*", version) or version_numbers(version)[:2] > version_numbers(NEWEST[family]):
        return None
    fitting = [target for target in lines if version_numbers(target.since) <= version_numbers(version)]
    return dataclasses.replace(fitting[-1], version=version) if fitting else None


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: 10.14 comes after 10.3, and `10.7.0.post1` is (10, 7, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def release_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a TensorRT version, of which two are compared as far as both have them.

    The wheels 10.3 to 10.6 report three numbers (10.5.0), one of 10.7 three and a suffix (10.7.0.post1), and later
    wheels and every library four (10.5.0.18).

    Raises:
        ValueError: it does not begin with three numbers.
    """
    numbers = version_numbers(version)
    if len(numbers) < 3:
        raise ValueError(f"{version!r} is not a TensorRT version such as 10.16.1.11")
    return numbers


def prefers_attention(family: str, version: str) -> bool:
    """Whether the Attention operator is the better spelling of attention that accumulates in FP32.

    NVIDIA promises FP32 accumulation of it where q, k and v are cast to FP32 (release notes of TensorRT 11.3), and
    promises nothing of MatMul - Softmax - MatMul. TensorRT-RTX 1.7 fuses both, and copies the operator's output in a
    kernel of its own (run).
    """
    first = next(line.since for line in TARGETS if line.family == "tensorrt" and "Attention" in line.operators)
    return family == "tensorrt" and version_numbers(version)[:2] >= version_numbers(first)


FUSES_FP8_ATTENTION = {"tensorrt-rtx": "1.7"}
"""Since when a family makes one kernel of our FP8 attention (run: RTX 1.7 for 8.9 and 12.0, 576 and 5184 tokens).

TensorRT 10.6's release notes name FP8 attention on Ada of up to 3072 tokens; no version of TensorRT was tried.
"""


def fuses_fp8_attention(family: str, version: str) -> bool:
    """Whether a runtime is known to make one kernel of an FP8 attention; unfused it writes every score to memory."""
    since = FUSES_FP8_ATTENTION.get(family)
    return since is not None and version_numbers(version)[:2] >= version_numbers(since)


def why_no_fp8_attention(targets: Sequence[Target]) -> str | None:
    """Why a file for these targets has no FP8 attention, None if all of them are known to fuse it."""
    for one in targets:
        if not fuses_fp8_attention(one.family, one.version or one.since):
            return f"{one.name} is not known to fuse FP8 attention; only TensorRT-RTX 1.7 and later are known to do so"
    return None


def has_fp8(capability: str) -> bool:
    """Whether a GPU can multiply matrices in FP8; an unknown compute capability is assumed to."""
    return not capability or version_numbers(capability) >= FP8_CAPABILITY


def _parts(name: str) -> list[str]:
    """The plain targets that a known product carries."""
    product, _, version = name.partition("-")
    if product == "jetpack" and version in JETPACK:
        return [f"tensorrt-{JETPACK[version]}"]
    if product == "triton" and f"{product}-{version}" in target_names():
        tables = {"tensorrt": TENSORRT, "onnxruntime-gpu": ONNX_RUNTIME}
        # a month that a table lacks has at least what the months before it have
        return [f"{family}-{table[max(m for m in table if m <= version)]}" for family, table in tables.items()]
    return [f"{name}-{UNVERSIONED[name]}" if name in UNVERSIONED else name]


def _find(name: str, asked: str) -> Target:
    family, _, version = (f"{name}-" if name in TITLES else name).rpartition("-")
    if family in TITLES:
        target = line_of(family, version)
        if target:
            return target
        first = next(line.since for line in TARGETS if line.family == family)
        newest = NEWEST[family]
        known = f"{first} to {newest}" if first != newest else first
        what = (
            f"neck-export does not know which opsets, operators and data types {name} supports. Use one of the known "
            "versions"
            if version
            else (f"the version is missing; write it as in {family}-{newest}")
        )
        raise TargetError(f"--target {asked!r}: {what}; the known versions are {known}")
    near = difflib.get_close_matches(asked.lower(), target_names(), n=4, cutoff=0.4)
    shown = near or ["tensorrt-10.3", "tensorrt-rtx", "onnxruntime-1.23", "jetpack-6.2", "triton-25.09"]
    raise TargetError(f"--target {asked!r}: there is no target with this name; similar names are {', '.join(shown)}")
