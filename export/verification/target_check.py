"""What an ONNX graph needs of its target, and which targets of the table have it: told by the graph alone."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from export.contract.targets import (
    FP8,
    NO_FP8,
    QUANTIZED,
    SHIFTED,
    SMALL,
    TARGETS,
    TITLES,
    Family,
    Target,
    TargetError,
    find_targets,
    has_fp8,
)

INTEGERS = frozenset({"BOOL", "INT32", "INT64", "UINT8"})
"""Types of shapes, masks and pixels, which every target takes (TensorRT 8.6 reads INT64 as INT32)."""

KNOWN_OPERATORS = frozenset[str]().union(*(target.operators | target.lacks for target in TARGETS))
KNOWN_TYPES = INTEGERS.union(*(target.types for target in TARGETS))
KNOWN_OPSET = max(target.opset for target in TARGETS)
"""What the table speaks of; of everything else it is unknown who reads it."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a graph asks of its target.

    Attributes:
        opset: of the default domain.
        operators: how many nodes there are of each operator and type; that of an Attention is the type before Casts,
            that of QuantizeLinear and DequantizeLinear the type of the codes, followed by SHIFTED where their zero
            point is not known to be 0.
        versions: in which opset each operator last changed, at the graph's opset.
        types: of all tensors.
    """

    opset: int
    operators: Mapping[tuple[str, str], int]
    versions: Mapping[str, int]
    types: frozenset[str]


def graph_needs(model: ir.Model) -> Needs:
    """Reads the graph, nested ones too; types that it does not tell are inferred, in place."""
    if any(output.dtype is None for node in model.graph.all_nodes() for output in node.outputs):
        common_passes.ShapeInferencePass()(model)
    opset = model.opset_imports.get("", 0)
    operators: collections.Counter[tuple[str, str]] = collections.Counter()
    types = {value.dtype.name for value in (*model.graph.inputs, *model.graph.initializers.values()) if value.dtype}
    for node in model.graph.all_nodes():
        name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        operators[name, _type(node)] += 1
        types |= {output.dtype.name for output in node.outputs if output.dtype}
    return Needs(opset, operators, {name: _version(name, opset) for name, _ in operators}, frozenset(types))


def _type(node: ir.Node) -> str:
    if node.op_type in QUANTIZED and node.domain in ("", "ai.onnx"):
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        kind = codes.dtype.name if codes is not None and codes.dtype else "UNDEFINED"
        return kind if _is_symmetric(node) else f"{kind} {SHIFTED}"
    value = node.outputs[0]
    if node.op_type == "Attention" and node.inputs[0] is not None:
        value = node.inputs[0]
        cast = value.producer()
        if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
            value = cast.inputs[0]
    return value.dtype.name if value.dtype else "UNDEFINED"


def _is_symmetric(node: ir.Node) -> bool:
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    if zero_point is None:
        return True
    known = ir.convenience.get_const_tensor(zero_point)
    return known is not None and not known.numpy().astype(np.float32).any()


def _version(operator: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(operator, opset).since_version)
    except onnx.defs.SchemaError:  # of another domain, or newer than the installed onnx
        return opset


def why_not(target: Target, needs: Needs) -> str | None:
    """Why a target cannot read a graph, or would compute it badly, in a few words; None where it can."""
    if needs.opset > target.opset:
        return f"the runtime is only known to support opsets up to {target.opset}, but the file has opset {needs.opset}"
    for (operator, kind), count in needs.operators.items():
        if operator in target.lacks:
            return f"the runtime does not support the operator {operator} ({count} nodes)"
        if operator not in target.operators:
            return f"the runtime is not known to support the operator {operator} ({count} nodes)"
        if needs.versions[operator] >= target.lacks_from.get(operator, needs.opset + 1):
            return f"the runtime does not support the operator {operator} of opset {needs.opset} ({count} nodes)"
        if (operator, kind) in target.refuses:
            return f"the runtime does not support the operator {operator} in {kind} ({count} nodes)"
        if needs.versions[operator] >= target.on_cpu.get(operator, needs.opset + 1) and operator not in SMALL:
            return (
                f"the runtime computes the operator {operator} of opset {needs.opset} on the CPU, which is slow "
                f"({count} nodes)"
            )
    if FP8 in needs.types and not has_fp8(target.capability):
        return f"{NO_FP8}; use --precision int8"
    unknown = sorted(needs.types - target.types - INTEGERS)
    return f"the runtime is not known to support the type {', '.join(unknown)}" if unknown else None


def on_cpu(target: Target, needs: Needs) -> list[str]:
    """Small operators that a GPU build computes on the CPU all the same."""
    return sorted({name for name, _ in needs.operators if needs.versions[name] >= target.on_cpu.get(name, 1 << 10)})


def require(targets: Sequence[Target], needs: Needs, what: str, remedy: str) -> None:
    """Checks that every target can read a graph.

    Raises:
        TargetError: naming `what`, the first target that cannot, why, and the remedy.
    """
    for target in targets:
        reason = why_not(target, needs)
        if reason:
            raise TargetError(f"{what}: the target {target.name} cannot load the file: {reason};\n{remedy}")


def reading_lines(needs: Needs) -> dict[Family, str]:
    """The version of each family from which on all that are known here read a graph."""
    found: dict[Family, str] = {}
    for family in TITLES:
        lines = [target for target in reversed(TARGETS) if target.family == family]
        able = list(itertools.takewhile(lambda target: why_not(target, needs) is None, lines))
        if able:
            found[family] = able[-1].since
    return found


def not_in_table(needs: Needs) -> list[str]:
    """What a graph needs that no line of the table speaks of, so that nobody can say here who reads it."""
    counts: collections.Counter[str] = collections.Counter()
    for (operator, _), count in needs.operators.items():
        counts[operator] += count
    found = [f"{name} ({count} nodes)" for name, count in sorted(counts.items()) if name not in KNOWN_OPERATORS]
    found += [f"tensors of type {kind}" for kind in sorted(needs.types - KNOWN_TYPES)]
    return found + ([f"opset {needs.opset}"] if needs.opset > KNOWN_OPSET else [])


def read_by(needs: Needs) -> str:
    """Who reads a graph, in one line: `read by TensorRT 10.14 and later, TensorRT-RTX, ...`.

    What the table does not know is called unknown; `no target` are only those that are known to refuse.
    """
    in_table = dataclasses.replace(
        needs,
        opset=min(needs.opset, KNOWN_OPSET),
        operators={key: count for key, count in needs.operators.items() if key[0] in KNOWN_OPERATORS},
        types=needs.types & KNOWN_TYPES,
    )
    known = _titles(reading_lines(in_table))
    if not known:
        return "not supported by any runtime that neck-export knows"
    unknown = not_in_table(needs)
    if unknown:
        return (
            "not known to be supported by any runtime. neck-export does not know which runtimes support the following "
            f"operators, types or opsets in the graph: {', '.join(unknown)}. Everything else in the graph is supported "
            f"by {known}"
        )
    return f"read by {known}"


def _titles(lines: Mapping[Family, str]) -> str:
    parts = []
    for family, since in lines.items():
        title = TITLES[family]
        if family == "onnxruntime":
            gpu_since = lines.get("onnxruntime-gpu")
            where = (
                "on a GPU too"
                if gpu_since == since
                else f"to run on a GPU, the ONNX file needs ONNX Runtime {gpu_since} or later"
                if gpu_since
                else "not known to run on a GPU"
            )
            parts.append(f"{title} {since} and later ({where})")
        elif family != "onnxruntime-gpu":
            parts.append(title if family == "tensorrt-rtx" else f"{title} {since} and later")
    return ", ".join(parts)


def targets_entry(needs: Needs, asked: Sequence[Target]) -> dict[str, Any]:
    """What a manifest says of a file's targets."""
    lines = [f"{family}-{since}" for family, since in reading_lines(needs).items()]
    products = sorted({target.product for target in asked if target.product})
    return {
        "asked": [target.full_name for target in asked],
        **({"products": products} if products else {}),
        "from": lines,
        "says": read_by(needs),
    }


def check_claims(where: Path, manifest: Mapping[str, Any], needs: Needs) -> None:
    """Checks what a manifest says of its file's targets against the graph; one of an older version says nothing.

    Raises:
        TargetError: it claims a target that cannot read the graph, or is damaged.
    """
    claims = manifest.get("targets")
    if claims is None:
        return
    try:
        names = [str(name) for name in (*claims["asked"], *claims["from"])]
        targets = find_targets(",".join(names)) if names else ()
    except (KeyError, TypeError, TargetError) as error:
        raise TargetError(
            f"{where}: the entry `targets` of the manifest is damaged ({error}); export the ONNX file again"
        ) from None
    for target in targets:
        reason = why_not(target, needs)
        if reason:
            raise TargetError(
                f"{where}: the manifest says that {target.name} can load the ONNX file, but the graph in the ONNX file "
                f"contradicts the manifest: {reason}.\nAccording to the graph, the ONNX file is {read_by(needs)}. "
                "Export the ONNX file again to get a manifest that matches the graph"
            )
