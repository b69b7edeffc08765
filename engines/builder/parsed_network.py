"""Sets and checks properties of the parsed network before it is built."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.builder.onnx_graph import BuildError
from export.contract.dtypes import BY_PRECISION
from export.contract.export_command import AS_AUTO, export_again

SCORES, MIXED = "*.attn/scores*", "*.attn/mixed*"
"""The attention's matrix multiplications that a form keeps in FP32: the first in `unfused`, the second in fp32acc."""


def keep_attentions_whole(trt: Any, network: Any) -> int:
    """Forbids the builder to decompose attentions, so that one that it cannot fuse fails the build.

    Returns:
        The number of attentions; 0 if the API has no attention layers (before TensorRT 10.14).
    """
    if not hasattr(trt, "IAttentionInputLayer") or not hasattr(trt.LayerType, "ATTENTION_INPUT"):
        return 0
    layers = (network.get_layer(index) for index in range(network.num_layers))
    entries = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for entry in entries:
        entry.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
        if hasattr(entry.attention, "decomposable"):
            entry.attention.decomposable = False
    return len(entries)


def check_types(onnx: Path, trt: Any, network: Any, precision: str, keep_fp32: Sequence[str]) -> None:
    """Checks that the parsed graph has the requested precision, which a strongly typed engine takes from the graph.

    Raises:
        BuildError: a matrix multiplication or convolution has another type, or the graph contains none.
    """
    kinds = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    wanted = getattr(trt.DataType, str(BY_PRECISION[precision].tensorrt))
    fp32 = [SCORES, *(f"{pattern}{end}" for pattern in keep_fp32 for end in ("/*", ".*"))]
    seen, widened = 0, _widened(trt, network, wanted)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type not in kinds:
            continue
        tensor = layer.get_output(0)
        seen += tensor.dtype == wanted
        kept = any(fnmatch.fnmatchcase(layer.name, name) for name in fp32)
        if fnmatch.fnmatchcase(layer.name, MIXED):  # in FP32 only to accumulate there: both factors were rounded before
            kept = kept or all(layer.get_input(position).name in widened for position in range(2))
        kept = kept and tensor.dtype == trt.DataType.FLOAT
        if tensor.dtype != wanted and not kept:
            command = export_again(onnx, precision=precision, **AS_AUTO)
            raise BuildError(
                f"{onnx}: the layer {layer.name} computes in {tensor.dtype.name}, but {precision} was "
                "requested. If the layer should stay in FP32, add --keep-fp32 MODULE, where MODULE is the module that "
                f"contains the layer. Otherwise, export the file again in {precision}: {command}"
            )
    if not seen:
        raise BuildError(
            f"{onnx}: the file has no matrix multiplication or convolution in {precision}, so it is not an image "
            f"encoder of that precision; export the encoder with `neck-export onnx --precision {precision}`"
        )


def _widened(trt: Any, network: Any, low: Any) -> set[str]:
    """Returns the names of the tensors that are casts from a lower precision to FP32."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    casts = [layer for layer in layers if layer.type == trt.LayerType.CAST and layer.get_input(0).dtype == low]
    return {layer.get_output(0).name for layer in casts if layer.get_output(0).dtype == trt.DataType.FLOAT}
