"""Operations and least bytes in closed form, against a count over the graphs that are really exported."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import onnx_ir as ir
import pytest
import torch
from conftest import shared_encoder, tiny_config, traced
from torch import nn

from benchmarks.roofline import encoder_parts, floor_ms, total_bytes, total_operations
from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace
from neck.config import EncoderConfig
from neck.necks import new_encoder

AGREEMENT = 0.01
"""Relative; the operations are in fact equal, the bytes lack constants of a few elements."""


def shape_of(value: ir.Value | None) -> list[int]:
    assert value is not None and value.shape is not None
    return [int(side) for side in value.shape]  # type: ignore[arg-type]


def node_operations(node: ir.Node) -> int:
    """Operations of one node from the shapes that the graph itself says."""
    if node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"):
        return 0
    first, second, out = shape_of(node.inputs[0]), shape_of(node.inputs[1]), shape_of(node.outputs[0])
    match node.op_type:
        case "Conv":  # (B, d, H, W) by (d, C, k, k)
            return 2 * math.prod(out) * math.prod(second[1:])
        case "ConvTranspose":  # (B, C, H, W) by (C, d, k, k)
            return 2 * math.prod(first) * math.prod(second[1:])
        case "Attention":  # (B, heads, N, D) twice
            return 4 * math.prod(first) * second[-2]
        case _:
            return 2 * math.prod(out) * first[-1]


def count(model: ir.Model) -> tuple[int, int]:
    """Operations of the graph; bytes of its weights, its tables and its inputs and outputs."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    floats = [tensor for tensor in weights if tensor is not None and tensor.dtype == ir.DataType.FLOAT]
    ends = [*model.graph.inputs, *model.graph.outputs]
    size = sum(tensor.nbytes for tensor in floats) + sum(4 * math.prod(shape_of(value)) for value in ends)
    return sum(node_operations(node) for node in model.graph), size


TRIPLE = {"necks": ("sam3", "interactive", "propagation"), "scale_factors": (4.0, 2.0, 1.0)}
CASES: dict[str, tuple[dict[str, Any], Rewrites, dict[str, str]]] = {
    "rewritten": ({}, Rewrites(), {}),
    "plain": ({}, Rewrites.none(), {}),
    "padded windows, both necks": ({"image_size": (84, 140), "necks": ("sam3", "sam2")}, Rewrites(), {}),
    "three necks, another pretraining grid": ({**TRIPLE, "pretrain_image_size": 28}, Rewrites(), {}),
    "some levels, no positions, batch 3": ({}, Rewrites(), {"levels": "1,3", "positions": "none", "batch": "3"}),
}


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_the_count_over_the_graph(case: str) -> None:
    changes, rewrites, asked = CASES[case]
    config = tiny_config(**changes)
    found = traced(shared_encoder(config), config, rewrites, **asked)
    batch = found.signature.batch.optimum
    parts = encoder_parts(config, found.signature, batch, rewritten=rewrites.merge_upsampling)
    operations, size = count(found.model)
    assert total_operations(parts) == pytest.approx(operations, rel=AGREEMENT)
    if rewrites.position_tables:  # the plain graph holds larger position constants than it must
        assert total_bytes(parts, "fp32") == pytest.approx(size, rel=AGREEMENT)
    more = encoder_parts(config, found.signature, batch + 1)
    assert total_operations(more) != pytest.approx(operations, rel=AGREEMENT)
    assert total_bytes(more, "fp32") != pytest.approx(size, rel=AGREEMENT)


def test_full_size() -> None:
    """The graph of the published model; its weights are zeros that are never touched, so they cost no memory."""
    config = EncoderConfig()
    with torch.device("meta"):
        encoder = new_encoder(config).eval().requires_grad_(False)
    for module in encoder.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros(weight.shape, device="cpu"), requires_grad=False))
    signature = encoder_signature(config)
    operations, size = count(trace(DeployEncoder(encoder, signature, Rewrites())))
    parts = encoder_parts(config, signature, 1)
    assert total_operations(parts) == pytest.approx(operations, rel=AGREEMENT)
    assert total_bytes(parts, "fp32") == pytest.approx(size, rel=AGREEMENT)
    by_name = {part.part: part.operations for part in encoder_parts(config, signature, 1, rewritten=False)}
    trunk = by_name["patch"] + by_name["windowed"] + by_name["global"]
    neck = sum(value for name, value in by_name.items() if name.startswith("level"))
    assert trunk == pytest.approx(5.4e12, rel=AGREEMENT) and neck == pytest.approx(0.22e12, rel=0.03)


def test_growth_is_that_of_the_grid() -> None:
    """Twice the side: four times everything but the global blocks' scores, which are sixteen times."""
    small = EncoderConfig(image_size=336)
    large = dataclasses.replace(small, image_size=672)
    one, four = (
        {part.part: part.operations for part in encoder_parts(config, encoder_signature(config), 1)}
        for config in (small, large)
    )
    for name in ("patch", "windowed", "level 0", "level 3"):
        assert four[name] == 4 * one[name]
    scores = 4 * (24 * 24) ** 2 * 1024 * 4
    assert four["global"] - 16 * scores == 4 * (one["global"] - scores)


def test_low_precision_halves_what_is_stored_in_it() -> None:
    config = tiny_config()
    parts = encoder_parts(config, encoder_signature(config), 1)
    tables = sum(part.table_bytes for part in parts)
    assert total_bytes(parts, "fp32") - tables == 2 * (total_bytes(parts, "fp16") - tables) > 0
    assert total_bytes(parts, "bf16") == total_bytes(parts, "fp16")


def test_floor_is_the_slower_of_both_rates() -> None:
    config = tiny_config()
    parts = encoder_parts(config, encoder_signature(config), 1)
    operations, size = total_operations(parts), total_bytes(parts, "fp32")
    assert floor_ms(parts, "fp32", {"fp32": operations * 10.0}, size * 20.0) == pytest.approx(100)
    assert floor_ms(parts, "fp32", {"fp32": operations * 40.0}, size * 20.0) == pytest.approx(50)
    assert floor_ms(parts, "fp16", {"fp32": 1.0, "fp16": None}, 1.0) is None
