"""The layer report of a plan: what the builder made of the graph, told without running it."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from export.contract.manifest import parse_json

ATTENTION_KERNEL = re.compile(r"mha|flash_?attention", re.IGNORECASE)
QUANTIZED = ("FP8", "Int8")
BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int64": 8, "Int32": 4, "Int8": 1, "UInt8": 1, "Bool": 1, "FP8": 1}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that a kernel reads or writes; a dimension of -1 depends on the batch."""

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int | None:
        """Size, None where a dimension or the type is not told."""
        size = BYTES.get(self.dtype)
        return None if size is None or min(self.dims, default=0) < 0 else math.prod(self.dims) * size


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a plan.

    Attributes:
        name, kind, tactic: as the builder names them.
        inputs, constants, outputs: tensors that it reads and writes.
        onnx: names of the ONNX nodes that it comes from; ours begin with the module's path.
        accumulation: of a fused attention, the types in which its first and second product accumulate, where told.
        operations: 2 x multiply-add of the matrix products, convolutions and attentions in it, where told.
        families: of a fused attention, the kernel families of both products, where the plan names them.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    onnx: tuple[str, ...]
    accumulation: tuple[str, str] | None = None
    operations: int | None = None
    families: tuple[str, str] | None = None

    @property
    def attention(self) -> bool:
        """Whether it is a whole attention in one kernel."""
        return bool(ATTENTION_KERNEL.search(f"{self.name} {self.tactic}"))

    @property
    def quantized(self) -> str | None:
        """FP8 or INT8 where it is a product of two tensors of that type."""
        types = [one.dtype for one in (*self.inputs, *self.constants)]
        return next((name.upper() for name in QUANTIZED if types.count(name) > 1), None)

    @property
    def family(self) -> str:
        """The family of a fused attention in a word; `unknown` if the plan does not name it."""
        return " then ".join(dict.fromkeys(self.families)) if self.families else "unknown"

    @property
    def opaque(self) -> bool:
        """Whether it is a whole part of the graph of which the plan tells the ends alone (Myelin's ForeignNode)."""
        return self.kind == "Myelin" or self.name.startswith("{ForeignNode[")

    @property
    def bytes(self) -> int | None:
        """Bytes read and written, weights included, None where a tensor's size is not told."""
        if self.opaque:
            return None
        sizes = [tensor.bytes for tensor in (*self.inputs, *self.constants, *self.outputs)]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that it comes from, in order."""
        return tuple(dict.fromkeys(name.rpartition("/")[0] or name for name in map(unconverted, self.onnx)))


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What a plan is made of.

    Attributes:
        source: `builder log` or `engine inspector`.
        kernels: in the order in which they run.
        attentions: how many the graph has.
        operations: 2 x multiply-add of matrix products, convolutions and attentions at the optimum batch, where known.
        products: how many matrix products of the graph are quantized.
        fusable: how many attentions of the graph are in a form that some TensorRT makes one kernel of.
        fp8_attentions: how many attentions of the graph are FP8.
    """

    source: Literal["builder log", "engine inspector"]
    kernels: tuple[Kernel, ...]
    attentions: int
    operations: int | None = None
    products: int = 0
    fusable: int = 0
    fp8_attentions: int = 0

    @property
    def quantized(self) -> tuple[Kernel, ...]:
        """The FP8 and INT8 products; what they accumulate in is not listed by any builder so far."""
        return tuple(kernel for kernel in self.kernels if kernel.quantized and not kernel.attention)

    @property
    def fused(self) -> tuple[Kernel, ...]:
        """The attentions that are one kernel each."""
        return tuple(kernel for kernel in self.kernels if kernel.attention)

    @property
    def families(self) -> dict[str, int]:
        """How many fused attentions are of each kernel family, most first: `Ampere_hmma_fp32`, `Ada_qmma_e4m3_fp32`."""
        return dict(collections.Counter(kernel.family for kernel in self.fused).most_common())

    @property
    def accumulation(self) -> tuple[str, str] | None:
        """Types in which the fused attentions' two products accumulate, the narrowest of all; None where not told.

        BF16 products accumulate in FP32 (the tensor cores have no other way), so their traits say `fp32` here.
        """
        told = [kernel.accumulation for kernel in self.fused]
        if not told or None in told:
            return None
        first, second = (
            "fp16" if "fp16" in types else "fp32" for types in zip(*(pair for pair in told if pair), strict=True)
        )
        return first, second

    @property
    def bytes_moved(self) -> int | None:
        """Bytes that all kernels read and write, None where the batch is dynamic."""
        sizes = [kernel.bytes for kernel in self.kernels]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    @property
    def by_kind(self) -> dict[str, int]:
        """Number of kernels of each kind, most first."""
        return dict(collections.Counter(kernel.kind for kernel in self.kernels).most_common())

    def summary(self) -> str:
        """The layer report in one line."""
        opaque = sum(kernel.opaque for kernel in self.kernels)
        parts = [f"fused attentions {len(self.fused)} of {self.attentions}"]
        if opaque:
            parts = [
                f"number of fused attentions unknown (the graph has {self.attentions} attention layers, but {opaque} "
                "Myelin blocks do not show which kernels they contain)"
            ]
        if self.fused:
            first, second = self.accumulation or ("unknown", "unknown")
            both = first.upper() if first == second else f"{first.upper()} then {second.upper()}"
            parts.append(f"accumulation {both if self.accumulation else 'unknown'}")
        if self.fp8_attentions:
            parts.append(f"{self._fp8_fused()} of {self.fp8_attentions} FP8 attentions are fused")
        if self.products:
            kinds = " and ".join(sorted({str(kernel.quantized) for kernel in self.quantized})) or "FP8 or INT8"
            parts.append(
                f"precision of the {self.products} quantized linear layers unknown (hidden by {opaque} Myelin blocks)"
                if opaque
                else f"{len(self.quantized)} of {self.products} quantized linear layers run in {kinds} "
                "(accumulation type unknown)"
            )
        parts.append(f"{len(self.kernels)} kernels")
        moved = self.bytes_moved
        reason = "Myelin blocks" if opaque else "dynamic batch"
        parts.append(f"bytes moved: unknown ({reason})" if moved is None else f"{moved / 1e9:.3g} GB moved")
        return ", ".join(parts)

    def _fp8_fused(self) -> int:
        """How many fused attentions multiply E4M3 numbers."""
        return sum("e4m3" in kernel.family for kernel in self.fused)

    def warning(self) -> str | None:
        """What is dangerous about the plan's attention, or not as asked about its products, or None."""
        if any("fp16" in (kernel.accumulation or ()) for kernel in self.fused):
            return (
                "the attention accumulates in FP16. Published SAM 3 engines of this kind returned useless "
                "features without an error (cosine 0.06, NVIDIA/TensorRT #4837). Export with --attention "
                "fp32acc, or only use plans that passed verification"
            )
        hidden = [kernel for kernel in self.kernels if kernel.opaque and self.attentions]
        half = [kernel for kernel in (*self.fused, *hidden) if any(one.dtype == "Half" for one in kernel.inputs)]
        if half and self.accumulation is None:
            return (
                "the layer report does not show in which type the FP16 attention accumulates. Accumulation in "
                "FP16 is known to give useless features (NVIDIA/TensorRT #4837), so only use plans that "
                "passed verification"
            )
        told = not any(kernel.opaque for kernel in self.kernels)
        if told and len(self.fused) < self.fusable:
            return (
                f"{self.fusable - len(self.fused)} of {self.fusable} attention layers are not fused: each of them runs "
                "as several kernels that write the attention scores to memory, which is slow. Build the plan on the "
                "GPU with --tune, which compares several ways to compute the attention, or use another TensorRT version"
            )
        if told and "unknown" not in self.families and self._fp8_fused() < self.fp8_attentions:
            return (
                f"{self.fp8_attentions - self._fp8_fused()} of {self.fp8_attentions} FP8 attention layers do "
                "not run as FP8 kernels. If the plan was built with TensorRT, or with a version of TensorRT-RTX before "
                "1.7, build a new plan with TensorRT-RTX 1.7 or later. If the plan was already built with TensorRT-RTX "
                "1.7 or later, export the ONNX file again with --quantize patterns that match only linear layers"
            )
        missing = self.products - len(self.quantized)
        if told and missing > 0:
            return (
                f"{missing} of {self.products} quantized linear layers do not run as FP8 or INT8 kernels, so "
                "they may be no faster than in FP16"
            )
        return None

    def table(self, limit: int | None = None) -> str:
        """The layer report as text: totals, then the kernels that move most.

        Args:
            limit: how many kernels to list, all by default.
        """
        lines = [self.summary(), "kernels: " + ", ".join(f"{count} {kind}" for kind, count in self.by_kind.items())]
        if self.fused:
            lines.append("attention families: " + ", ".join(f"{count} {name}" for name, count in self.families.items()))
        if self.operations is not None:
            lines.append(f"operations: {self.operations / 1e12:.3g} TFLOP")
        lines += [*filter(None, [self.warning()]), "", f"{'MB':>9}  {'kind':<15} modules"]
        for kernel in sorted(self.kernels, key=lambda kernel: -(kernel.bytes or 0))[:limit]:
            moved = "?" if kernel.bytes is None else f"{kernel.bytes / 1e6:.2f}"
            kind = "attention" if kernel.attention else kernel.kind
            lines.append(f"{moved:>9}  {kind:<15} {', '.join(kernel.modules) or kernel.name}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The layer report as JSON values, the totals beside the kernels for readers that want no rules."""
        totals = {"fused": len(self.fused), "accumulation": self.accumulation, "bytes_moved": self.bytes_moved}
        counts = {"by_kind": self.by_kind, "families": self.families}
        return json.loads(json.dumps({**dataclasses.asdict(self), **totals, **counts}))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayerReport:
        """The layer report that `to_dict` wrote."""
        kernels = []
        for kernel in values["kernels"]:
            tensors = {
                key: tuple(Tensor(t["name"], tuple(t["dims"]), t["dtype"]) for t in kernel[key])
                for key in ("inputs", "constants", "outputs")
            }
            pairs = {key: kernel.get(key) and tuple(kernel[key]) for key in ("accumulation", "families")}
            kernels.append(Kernel(**{**kernel, **tensors, "onnx": tuple(kernel["onnx"]), **pairs}))
        counts = {name: values.get(name, 0) for name in ("products", "fusable", "fp8_attentions")}
        return cls(values["source"], tuple(kernels), values["attentions"], values["operations"], **counts)


def unconverted(name: str) -> str:
    """The name of the node that a Cast of the precision pass (`node/to_float16`) stands at."""
    return re.sub(r"/to_(float|float16|bfloat16)$", "", name)


def layers_path(plan: Path) -> Path:
    """Where a plan's layer report lies."""
    return plan.with_name(plan.name + ".layers.json")


def read_layers(plan: Path) -> LayerReport | None:
    """The layer report beside a plan, or None."""
    path = layers_path(plan)
    return LayerReport.from_dict(parse_json(path.read_text(encoding="utf-8"))) if path.is_file() else None
