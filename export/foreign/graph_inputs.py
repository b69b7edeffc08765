"""The inputs of a graph that must be given, and those that may be images."""

from __future__ import annotations

import onnx_ir as ir

from export.contract.dtypes import ELEMENT_TYPES

FLOATS = {ir.DataType[one.onnx]: one.name for one in ELEMENT_TYPES if "float" in one.name}


def file_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that must be given; older files list their weights among the inputs."""
    return [value for value in graph.inputs if value.name not in graph.initializers]


def image_inputs(graph: ir.Graph) -> list[tuple[ir.Value, str]]:
    """The inputs that may be images, each with its layout."""
    found = []
    for value in file_inputs(graph):
        shape = list(value.shape) if value.shape is not None else None
        if value.dtype not in FLOATS and value.dtype != ir.DataType.UINT8:
            continue
        if shape is None:
            found.append((value, "NCHW"))
        elif len(shape) in (3, 4):
            batch = "N" * (len(shape) - 3)
            planes, last = shape[-3], shape[-1]
            if planes == 3 or not (isinstance(planes, int) or last == 3):
                found.append((value, f"{batch}CHW"))
            elif last == 3:
                found.append((value, f"{batch}HWC"))
    return found


def describe_input(value: ir.Value) -> str:
    """Name, type and shape of an input."""
    shape = ", ".join(str(side) for side in value.shape) if value.shape is not None else "unknown shape"
    return f"{value.name} {value.dtype.name.lower() if value.dtype else 'unknown'} ({shape})"
