"""Reads a layer report: from the builder's listing of the finished engine, or from the engine inspector.

TensorRT-RTX prints the listing, GPU or not; TensorRT 10 too, where profiling is DETAILED (NVIDIA/TensorRT #4397). The
inspector needs a loaded engine, so a GPU; it is tested on hand-made JSON only.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from engines.layers.layer_report import BYTES, Kernel, LayerReport, Tensor, unconverted

ATTENTION_LAYER = re.compile(r"(^|[/_])(attention|softmax)(_\d+)?$", re.IGNORECASE)
"""Names of ONNX layers of which every attention has one: Attention or Softmax, as this tool and torch name them."""

SPELLINGS = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}

FIELD = re.compile(r"(?:^|, )(Name|LayerType|Inputs|Constants|Outputs|TacticName|StreamId|Metadata): ")
"""What is read of a kernel's line; every version adds fields of its own, and TensorRT 10 has no Constants (#4397)."""

TENSOR = re.compile(r"\{ Name: (.*?)(?:, Location: \w+)?, Dimensions: \[([-\d, ]*)\],[^{}]*?Datatype: ([^,{}]+)")
NO_KERNELS = frozenset({"shape_call", "wait", "signal"})
"""Computed on the host; one stream's waiting for another."""

TRAITS = re.compile(rb"fmha::(\w+?_(?:fp16|fp32|bf16))_traits,\s*fmha::(\w+?_(?:fp16|fp32|bf16))_traits")
ENTRY = re.compile(rb"__global__ void (\w+)\(")
FIRST_LINE = "Layers:"
"""How the builder's message begins that lists the finished engine."""


class LayerReportError(ValueError):
    """A source that tells no layers."""


def layers_from_log(
    log: str,
    families: Mapping[str, tuple[str, str]],
    attentions: int | None = None,
    operations: Mapping[str, int] | None = None,
    products: int = 0,
    fusable: int = 0,
    fp8_attentions: int = 0,
) -> LayerReport:
    """Reads the layer report from the builder's listing of the finished engine (DETAILED profiling verbosity).

    Args:
        log: the builder's message that begins with `Layers:`.
        families: what `read_families` read from the plan.
        attentions: how many the graph has; by default counted from the ONNX layers' names.
        operations: of the graph's nodes by name, as `read_graph` counts them.
        products, fusable, fp8_attentions: as in LayerReport.

    Raises:
        LayerReportError: no kernel is listed.
    """
    kernels = []
    for fields in filter(None, map(_fields, log.splitlines())):
        if fields["LayerType"] in NO_KERNELS:
            continue
        tensors: dict[str, Any] = {
            key.lower(): tuple(
                Tensor(name, _dims(dims), _first_type(words))
                for name, dims, words in TENSOR.findall(fields.get(key, ""))
            )
            for key in ("Inputs", "Constants", "Outputs")
        }
        onnx, tactic = _onnx_layers(fields["Metadata"]), fields.get("TacticName", "").partition(", ")[0]
        tensors |= {"onnx": onnx, **_told(families.get(tactic))}
        kernels.append(Kernel(fields["Name"], fields["LayerType"], tactic, **tensors))
    return _layers("builder log", kernels, attentions, operations, products, fusable, fp8_attentions)


def layers_from_inspector(
    information: str,
    families: Mapping[str, tuple[str, str]],
    attentions: int | None = None,
    operations: Mapping[str, int] | None = None,
    products: int = 0,
    fusable: int = 0,
    fp8_attentions: int = 0,
) -> LayerReport:
    """Reads the layer report from EngineInspector.get_engine_information(JSON); untested on a GPU.

    Args:
        information: the JSON, of TensorRT 10 (`Bindings`) or 11 (`I/O Tensors`); only its `Layers` are read.
        families, attentions, operations, products, fusable, fp8_attentions: as in layers_from_log.

    Raises:
        LayerReportError: not JSON, or names alone, which a plan without detailed profiling verbosity gives.
    """
    try:
        layers = json.loads(information)["Layers"]
        if any(not isinstance(layer, dict) for layer in layers):
            raise LayerReportError(
                "TensorRT's engine inspector returned only the names of the layers in the plan. A layer report needs "
                "the details of each layer, so the plan gets no layer report. No action is needed, because the plan "
                "itself is complete"
            )
        kernels = [_inspected(layer, families) for layer in layers if layer.get("LayerType") not in NO_KERNELS]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise LayerReportError(
            "TensorRT's engine inspector returned a text without a list of layers, so the plan gets no layer report; "
            "nothing needs to be done, because the plan itself is complete"
        ) from None
    return _layers("engine inspector", kernels, attentions, operations, products, fusable, fp8_attentions)


def read_families(plan: Path) -> dict[str, tuple[str, str]]:
    """The kernel families of each fused attention's first and second product, by the name of the kernel's tactic.

    A plan of TensorRT-RTX contains its generated kernels as source, in which `Kernel_traits_v2_flash_attention<fmha::
    Ampere_hmma_fp32_traits, ...>` names both families, and the entry point after it carries the tactic's name. Plans
    of TensorRT contain no source: the result is empty, so their families are unknown.
    """
    found: dict[str, tuple[str, str]] = {}
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for traits in TRAITS.finditer(data):
            entry = ENTRY.search(data, traits.end())
            if entry is not None:
                first, second = (part.decode() for part in traits.groups())
                found[entry[1].decode()] = (first, second)
    return found


def _told(families: tuple[str, str] | None) -> dict[str, Any]:
    """Families of a kernel, and the types of its sums; bf16 products accumulate in FP32."""
    sums = families and tuple("fp16" if family.endswith("fp16") else "fp32" for family in families)
    return {"families": families, "accumulation": sums}


def _layers(
    source: Literal["builder log", "engine inspector"],
    kernels: list[Kernel],
    attentions: int | None,
    operations: Mapping[str, int] | None,
    products: int,
    fusable: int,
    fp8_attentions: int,
) -> LayerReport:
    if not kernels:
        raise LayerReportError(
            f"TensorRT's {source} lists no kernels of the plan, so the plan gets no layer report; nothing needs to be "
            "done, because the plan itself is complete"
        )
    if attentions is None:
        layers = {unconverted(name) for kernel in kernels for name in kernel.onnx}
        attentions = sum(bool(ATTENTION_LAYER.search(name)) for name in layers)
    total = None
    if operations is not None:
        kernels, total = _with_operations(kernels, operations), sum(operations.values())
    return LayerReport(source, tuple(kernels), attentions, total, products, fusable, fp8_attentions)


def _with_operations(kernels: list[Kernel], operations: Mapping[str, int]) -> list[Kernel]:
    """Gives each kernel the operations of its nodes; those of a node that several kernels name are given to none."""
    named = collections.Counter(name for kernel in kernels for name in set(kernel.onnx))
    return [
        dataclasses.replace(
            kernel, operations=sum(operations.get(name, 0) for name in set(kernel.onnx) if named[name] == 1)
        )
        for kernel in kernels
    ]


def _onnx_layers(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: (.*?)\]", metadata)))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"-?\d+", text)))


def _fields(line: str) -> dict[str, str] | None:
    """The fields of a kernel's line, None for any other line; Metadata is the last and may hold anything."""
    head, _, metadata = line.partition(", Metadata: ")
    if not head.startswith("Name: ") or ", LayerType: " not in head:
        return None
    marks = list(FIELD.finditer(head))
    ends = [*(mark.start() for mark in marks[1:]), len(head)]
    fields = {mark[1]: head[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}
    return fields | {"LayerType": fields["LayerType"].partition(", ")[0], "Metadata": metadata}


def _inspected(layer: Mapping[str, Any], families: Mapping[str, tuple[str, str]]) -> Kernel:
    """A kernel of the inspector's JSON; what has another form than expected counts as not told."""
    tensors: dict[str, Any] = {
        key.lower(): tuple(map(_tensor, _list(layer.get(key)))) for key in ("Inputs", "Constants", "Outputs")
    }
    for key in ("Weights", "Bias"):
        weight: dict[str, Any] = layer[key] if isinstance(layer.get(key), dict) else {}
        count = weight.get("Count")
        if isinstance(count, int) and count:
            tensors["constants"] += (Tensor(key, (count,), _first_type(_text(weight.get("Type")))),)
    tactic, onnx = _text(layer.get("TacticName")), _onnx_layers(_text(layer.get("Metadata")))
    tensors |= {"onnx": onnx, **_told(families.get(tactic))}
    return Kernel(_text(layer.get("Name")), _text(layer.get("LayerType")), tactic, **tensors)


def _tensor(told: Any) -> Tensor:
    """A tensor of the inspector's JSON; its size is not told where its sides are no numbers."""
    values = told if isinstance(told, Mapping) else {}
    sides = _list(values.get("Dimensions")) or [None]
    known = all(type(side) is int for side in sides)
    spellings = ("Datatype", "DataType", "Format/Datatype")  # the guide to 11 says DataType, users of 11 read Datatype
    words = next(filter(None, (_text(values.get(key)) for key in spellings)), "")
    return Tensor(_text(values.get("Name")), tuple(sides) if known else (-1,), _first_type(words))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _first_type(words: str) -> str:
    """The type in `Half`, or in `Row major linear FP16 format` (TensorRT 10); `?` where it is none that we know."""
    return next((spelled for spelled in map(_spelled, words.split()) if spelled in BYTES), "?")


def _spelled(word: str) -> str:
    return SPELLINGS.get(word.upper(), word)
