"""Reads a layer sheet: from the builder's listing of the finished engine, or from the engine inspector.

TensorRT-RTX prints the listing, GPU or not. The inspector is for TensorRT 10 and 11, where a GPU is; it is tested on
hand-made JSON only.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from engines.sheet.layer_sheet import BYTES, Kernel, LayerSheet, Tensor, unconverted

ATTENTION_LAYER = re.compile(r"(^|[/_])(attention|softmax)(_\d+)?$", re.IGNORECASE)
"""Names of ONNX layers of which every attention has one: Attention or Softmax, as this tool and torch name them."""

SPELLINGS = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64"}

LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: (?P<metadata>.*)"
)
TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\],.*?Datatype: (\w+)")
TRAITS = re.compile(rb"fmha::\w+?_(fp16|fp32|bf16)_traits,\s*fmha::\w+?_(fp16|fp32|bf16)_traits")
ENTRY = re.compile(rb"__global__ void (\w+)\(")
FIRST_LINE = "Layers:"
"""How the builder's message begins that lists the finished engine."""


class LayerSheetError(ValueError):
    """A source that tells no layers."""


def sheet_from_log(
    log: str, accumulations: Mapping[str, tuple[str, str]], attentions: int | None = None, operations: int | None = None
) -> LayerSheet:
    """Reads the sheet from the builder's listing of the finished engine (RTX, DETAILED profiling verbosity).

    Args:
        log: the builder's message that begins with `Layers:`.
        accumulations: what `read_accumulations` read from the plan.
        attentions: how many the graph has; by default counted from the ONNX layers' names.
        operations: as in LayerSheet.

    Raises:
        LayerSheetError: no kernel is listed.
    """
    kernels = []
    for line in log.splitlines():
        found = LINE.match(line)
        if found is None or found["kind"] == "shape_call":  # computed on the host
            continue
        tensors = {
            key: tuple(Tensor(name, _dims(dims), dtype) for name, dims, dtype in TENSOR.findall(found[key]))
            for key in ("inputs", "constants", "outputs")
        }
        onnx, tactic = _onnx_layers(found["metadata"]), found["tactic"]
        kernels.append(
            Kernel(found["name"], found["kind"], tactic, **tensors, onnx=onnx, accumulation=accumulations.get(tactic))
        )
    return _sheet("builder log", kernels, attentions, operations)


def sheet_from_inspector(
    information: str,
    accumulations: Mapping[str, tuple[str, str]],
    attentions: int | None = None,
    operations: int | None = None,
) -> LayerSheet:
    """Reads the sheet from EngineInspector.get_engine_information(JSON); untested on a GPU.

    Args:
        information: the JSON, of TensorRT 10 (`Bindings`) or 11 (`I/O Tensors`); only its `Layers` are read.
        accumulations, attentions, operations: as in sheet_from_log.

    Raises:
        LayerSheetError: not JSON, or names alone, which a plan without detailed profiling verbosity gives.
    """
    try:
        layers = json.loads(information)["Layers"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise LayerSheetError("the engine inspector gave no list of layers") from None
    if any(not isinstance(layer, dict) for layer in layers):
        raise LayerSheetError("the plan tells its layers' names alone; build it with detailed profiling verbosity")
    kernels = []
    for layer in layers:
        tensors: dict[str, Any] = {
            key.lower(): tuple(Tensor(t["Name"], tuple(t["Dimensions"]), _dtype(t)) for t in layer.get(key, []))
            for key in ("Inputs", "Constants", "Outputs")
        }
        tensors["constants"] += tuple(
            Tensor(key, (layer[key]["Count"],), _spelled(layer[key]["Type"]))
            for key in ("Weights", "Bias")
            if layer.get(key, {}).get("Count")
        )
        tactic = layer.get("TacticName", "")
        onnx = _onnx_layers(layer.get("Metadata", ""))
        kernel = Kernel(layer["Name"], layer.get("LayerType", ""), tactic, **tensors, onnx=onnx)
        kernels.append(dataclasses.replace(kernel, accumulation=accumulations.get(tactic)))
    return _sheet("engine inspector", kernels, attentions, operations)


def read_accumulations(plan: Path) -> dict[str, tuple[str, str]]:
    """Types in which each attention kernel's first and second product accumulate, by the kernel's tactic name.

    A plan of TensorRT-RTX holds its generated kernels as source, where `Kernel_traits_v2_flash_attention<fmha::
    Ampere_hmma_fp32_traits, ...>` names both and the entry point after it carries the tactic's name. bf16 traits
    multiply bf16 and accumulate in FP32. Plans of TensorRT hold none: the result is empty.
    """
    found: dict[str, tuple[str, str]] = {}
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for traits in TRAITS.finditer(data):
            entry = ENTRY.search(data, traits.end())
            if entry is not None:
                first, second = ("fp16" if part == b"fp16" else "fp32" for part in traits.groups())
                found[entry[1].decode()] = (first, second)
    return found


def _sheet(
    source: Literal["builder log", "engine inspector"],
    kernels: list[Kernel],
    attentions: int | None,
    operations: int | None,
) -> LayerSheet:
    if not kernels:
        raise LayerSheetError(f"the {source} lists no kernel")
    if attentions is None:
        layers = {unconverted(name) for kernel in kernels for name in kernel.onnx}
        attentions = sum(bool(ATTENTION_LAYER.search(name)) for name in layers)
    return LayerSheet(source, tuple(kernels), attentions, operations)


def _onnx_layers(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: (.*?)\]", metadata)))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split(",") if side)


def _dtype(tensor: Mapping[str, Any]) -> str:
    """The type of a tensor in the inspector's JSON: `Datatype`, or a word of `Format/Datatype` (TensorRT 10)."""
    words: Iterable[str] = tensor.get("Datatype", tensor.get("Format/Datatype", "")).split()
    return next((spelled for spelled in map(_spelled, words) if spelled in BYTES), "?")


def _spelled(word: str) -> str:
    return SPELLINGS.get(word.upper(), word)
