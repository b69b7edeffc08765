"""What an ONNX graph needs of its reader, and which readers of the table have it: told by the graph alone."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from export.contract.readers import (
    FP8,
    NO_FP8,
    READERS,
    SMALL,
    TITLES,
    Family,
    Reader,
    ReaderError,
    find_readers,
    has_fp8,
)

INTEGERS = frozenset({"BOOL", "INT32", "INT64", "UINT8"})
"""Types of shapes, masks and pixels, which every reader takes (TensorRT 8.6 reads INT64 as INT32)."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a graph asks of its reader.

    Attributes:
        opset: of the default domain.
        operators: how many nodes there are of each operator and type; that of an Attention is the type before Casts.
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
    value = node.outputs[0]
    if node.op_type == "Attention" and node.inputs[0] is not None:
        value = node.inputs[0]
        cast = value.producer()
        if cast is not None and cast.op_type == "Cast" and cast.inputs[0] is not None:
            value = cast.inputs[0]
    return value.dtype.name if value.dtype else "UNDEFINED"


def _version(operator: str, opset: int) -> int:
    try:
        return int(onnx.defs.get_schema(operator, opset).since_version)
    except onnx.defs.SchemaError:  # of another domain, or newer than the installed onnx
        return opset


def why_not(reader: Reader, needs: Needs) -> str | None:
    """Why a reader cannot read a graph, or would compute it badly, in a few words; None where it can."""
    if needs.opset > reader.opset:
        return f"it is known to read opset {reader.opset}, the file has {needs.opset}"
    for (operator, kind), count in needs.operators.items():
        if operator not in reader.operators:
            return f"it is not known to read {operator} ({count} nodes)"
        if (operator, kind) in reader.refuses:
            return f"it does not build {operator} in {kind} ({count} nodes)"
        if needs.versions[operator] >= reader.on_cpu.get(operator, needs.opset + 1) and operator not in SMALL:
            return f"it computes {operator} of opset {needs.opset} on the CPU ({count} nodes)"
    if FP8 in needs.types and not has_fp8(reader.capability):
        return f"{NO_FP8}; use --precision int8"
    unknown = sorted(needs.types - reader.types - INTEGERS)
    return f"it is not known to compute in {', '.join(unknown)}" if unknown else None


def on_cpu(reader: Reader, needs: Needs) -> list[str]:
    """Small operators that a GPU build computes on the CPU all the same."""
    return sorted({name for name, _ in needs.operators if needs.versions[name] >= reader.on_cpu.get(name, 1 << 10)})


def require(readers: Sequence[Reader], needs: Needs, what: str, remedy: str) -> None:
    """Checks that every reader can read a graph.

    Raises:
        ReaderError: naming `what`, the first reader that cannot, why, and the remedy.
    """
    for reader in readers:
        reason = why_not(reader, needs)
        if reason:
            raise ReaderError(f"{what}: {reader.name} cannot serve it: {reason}\n{remedy}")


def reading_lines(needs: Needs) -> dict[Family, str]:
    """The version of each family from which on all that are known here read a graph."""
    found: dict[Family, str] = {}
    for family in TITLES:
        lines = [reader for reader in reversed(READERS) if reader.family == family]
        able = list(itertools.takewhile(lambda reader: why_not(reader, needs) is None, lines))
        if able:
            found[family] = able[-1].since
    return found


def read_by(needs: Needs) -> str:
    """Who reads a graph, in one line: `read by TensorRT 10.14 and later, TensorRT-RTX, ...`."""
    lines, parts = reading_lines(needs), []
    for family, since in lines.items():
        title = TITLES[family]
        if family == "onnxruntime":
            gpu = lines.get("onnxruntime-gpu")
            where = "on a GPU too" if gpu == since else f"on a GPU {gpu} and later" if gpu else "not on a GPU"
            parts.append(f"{title} {since} and later ({where})")
        elif family != "onnxruntime-gpu":
            parts.append(title if family == "tensorrt-rtx" else f"{title} {since} and later")
    return f"read by {', '.join(parts)}" if parts else "read by no reader that is known here"


def read_by_file(path: Path) -> str:
    """`read_by` of a file."""
    return read_by(graph_needs(ir.load(path)))


def readers_entry(needs: Needs, asked: Sequence[Reader]) -> dict[str, Any]:
    """What a manifest says of a file's readers."""
    lines = [f"{family}-{since}" for family, since in reading_lines(needs).items()]
    return {"asked": [reader.full_name for reader in asked], "from": lines, "says": read_by(needs)}


def check_claims(where: Path, manifest: Mapping[str, Any], needs: Needs) -> None:
    """Checks what a manifest says of its file's readers against the graph; one of an older version says nothing.

    Raises:
        ReaderError: it claims a reader that cannot read the graph, or is damaged.
    """
    claims = manifest.get("readers")
    if claims is None:
        return
    try:
        names = [str(name) for name in (*claims["asked"], *claims["from"])]
        readers = find_readers(",".join(names)) if names else ()
    except (KeyError, TypeError, ReaderError) as error:
        raise ReaderError(f"{where}: what it says of readers is damaged ({error}); write the file again") from None
    for reader in readers:
        reason = why_not(reader, needs)
        if reason:
            raise ReaderError(
                f"{where}: claims that {reader.name} reads the file, but {reason};\n"
                f"the graph is {read_by(needs)}; write the file again"
            )
