"""What of a sound file may fail in another runtime: told by its graph, and by the largest values that were seen."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping

import onnx_ir as ir

from export.contract.targets import NEWEST, TITLES, line_of
from export.verification.rounding_simulation import LOW
from export.verification.target_check import graph_needs, not_in_table, why_not

SQUARE_LIMIT = 255.0
"""The largest value whose square FP16 holds (65504): LayerNorm's variance is a mean of squares."""
SCORE_LIMIT = 1024.0
"""Above it neighbors in FP16 are 1 apart, so that a softmax of such scores is off by a factor of up to e."""


def graph_risks(model: ir.Model, forms: Mapping[str, int], dynamic_size: bool = False) -> list[str]:
    """Risks that the graph alone tells.

    Args:
        model: the file's graph.
        forms: how many of its attentions have each form (`export.lowering.attention.attention_forms`).
        dynamic_size: whether its image may have any size.
    """
    graph, found = model.graph, list[str]()
    forms = collections.Counter(forms)
    low = any(output.dtype in LOW for node in graph for output in node.outputs)
    half = any(output.dtype == ir.DataType.FLOAT16 for node in graph for output in node.outputs)
    accumulate = forms["fused"] + forms["scores32"] + forms["Attention in low precision"]
    if half and accumulate:
        found.append(
            f"{accumulate} attention layers are in FP16, so TensorRT fuses them and accumulates their matrix "
            "multiplications in FP16; published engines of this kind returned useless features "
            "(NVIDIA/TensorRT#4837). Export the encoder with `neck-export onnx`, whose attention accumulates in FP32"
        )
    if low and (unfused := forms["unfused"] + forms["FP32"]):
        found.append(
            f"{unfused} attention layers compute their scores in FP32, so TensorRT does not fuse them and the "
            "engine is slow"
        )
    for operator, what in (("LayerNormalization", "LayerNorms"), ("Softmax", "softmaxes")):
        if count := sum(node.op_type == operator and node.outputs[0].dtype == ir.DataType.FLOAT16 for node in graph):
            found.append(f"{count} {what} are computed in FP16 instead of FP32, which can overflow or lose precision")
    if count := sum(map(_is_tanh, graph)):
        found.append(
            f"{count} GELUs use tanh or another approximation, but SAM 3 uses the exact GELU; the values "
            "differ by up to 5e-4"
        )
    if dynamic_size:
        found.append(
            "the file accepts any image size but was verified at one size only; if it contains a fixed table "
            "of positions, its results are wrong at every other size"
        )
    return found + list(_targets(model))


def _is_tanh(node: ir.Node) -> bool:
    if node.op_type == "Gelu":
        return node.attributes.get_string("approximate", "none") == "tanh"
    return node.op_type in ("Tanh", "FastGelu", "QuickGelu")


def _targets(model: ir.Model) -> Iterable[str]:
    """Which of the newest targets refuse the graph, and why."""
    needs = graph_needs(model)
    if unknown := not_in_table(needs):
        yield f"the file uses operators or types that no runtime is known to support: {', '.join(unknown)}"
    else:
        for family, version in NEWEST.items():
            target = line_of(family, version)
            if target is not None and family != "onnxruntime-gpu" and (reason := why_not(target, needs)):
                yield f"{TITLES[family]} {version} does not load the file: {reason}"


def value_risks(largest: Mapping[str, float]) -> list[str]:
    """Risks that the largest inputs of the LayerNorms and softmaxes in FP16 tell.

    Args:
        largest: operator and node, parted by a bar -> largest magnitude of its input.
    """
    found = []
    for operator, limit, why in (
        (
            "LayerNormalization",
            SQUARE_LIMIT,
            "if a runtime computes the variance in FP16, the squares of these values overflow",
        ),
        (
            "SkipLayerNormalization",
            SQUARE_LIMIT,
            "if a runtime computes the variance in FP16, the squares of these values overflow",
        ),
        (
            "Softmax",
            SCORE_LIMIT,
            f"FP16 stores numbers above {SCORE_LIMIT:g} without their fractional part, so the results of the Softmax "
            "nodes can be inaccurate",
        ),
    ):
        values = {name.partition("|")[2]: value for name, value in largest.items() if name.startswith(f"{operator}|")}
        above = {name: value for name, value in values.items() if not value <= limit}
        if above:
            name, value = max(above.items(), key=lambda pair: pair[1])
            found.append(
                f"{len(above)} {operator} nodes in FP16 have large input values, up to {value:.4g}: {why}. To find the "
                f"node with the largest input value, search the graph for the name {name}"
            )
    return found
