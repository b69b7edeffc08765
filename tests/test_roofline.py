"""Operations and least bytes in closed form, against a count over the graphs that are really exported."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import onnx_ir as ir
import pytest
import torch
from conftest import load_golden, shared_encoder, tiny_config, traced
from test_oracle import BASES
from torch import nn

from benchmarks.roofline import encoder_parts, floor_ms, total_bytes, total_operations
from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace
from neck.config import EncoderConfig
from neck.necks import new_encoder

OBLONG: EncoderConfig = BASES["oblong"]["config"]

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


CASES: dict[str, tuple[EncoderConfig | str, Rewrites, dict[str, Any]]] = {
    "rewritten": (tiny_config(), Rewrites(), {}),
    "plain": (tiny_config(), Rewrites.none(), {}),
    "padded windows, oblong, another pretraining grid": (OBLONG, Rewrites(), {}),
    "padded windows, batch 2": ("meta-padded", Rewrites(), {"batch": "2"}),
    "three necks": ("meta-tri", Rewrites(), {}),
    "some levels, no positions": (
        "meta-dual",
        Rewrites(),
        {"necks": "sam2", "levels": "0,3", "positions": "none", "input_kind": "uint8"},
    ),
}
"""Each a graph that test_trace.py or test_oracle.py traces, too."""


@pytest.mark.parametrize("case", CASES)
def test_closed_form_is_the_count_over_the_graph(case: str) -> None:
    given, rewrites, asked = CASES[case]
    golden = load_golden(given) if isinstance(given, str) else None
    config = golden.config if golden else cast(EncoderConfig, given)
    found = traced(golden.encoder if golden else shared_encoder(config), config, rewrites, **asked)
    batch = found.signature.batch.optimum
    parts = encoder_parts(config, found.signature, batch, rewritten=rewrites.merge_upsampling)
    operations, size = count(found.model)
    assert total_operations(parts) == pytest.approx(operations, rel=AGREEMENT)
    if rewrites.position_tables:  # the plain graph holds larger position constants than it must
        assert total_bytes(parts, "fp32") == pytest.approx(size, rel=AGREEMENT)
    more = encoder_parts(config, found.signature, batch + 1)
    assert total_operations(more) != pytest.approx(operations, rel=AGREEMENT)
    assert total_bytes(more, "fp32") != pytest.approx(size, rel=AGREEMENT)


def test_published_sizes() -> None:
    """Without a graph: the operations of trunk and neck, and the bytes by the parameters of the module."""
    config = EncoderConfig()
    signature = encoder_signature(config)
    by_name = {part.part: part for part in encoder_parts(config, signature, 1, rewritten=False)}
    trunk = sum(by_name[name].operations for name in ("patch", "windowed", "global"))
    neck = sum(part.operations for name, part in by_name.items() if name.startswith("level"))
    assert trunk == pytest.approx(5.4e12, rel=AGREEMENT) and neck == pytest.approx(0.22e12, rel=0.03)
    with torch.device("meta"):
        parameters = sum(value.numel() for value in new_encoder(config).parameters())
    assert sum(part.weight_elements for part in by_name.values()) == pytest.approx(parameters, rel=AGREEMENT)


@pytest.mark.slow
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
    outputs = sum(part.output_elements for part in parts)  # FP16 in a quantized file
    for precision in ("fp8", "int8"):
        assert 2 * (total_bytes(parts, precision) - tables - outputs) == total_bytes(parts, "fp16") - tables > 0


def test_floor_is_the_slower_of_both_rates() -> None:
    config = tiny_config()
    parts = encoder_parts(config, encoder_signature(config), 1)
    operations, size = total_operations(parts), total_bytes(parts, "fp32")
    assert floor_ms(parts, "fp32", {"fp32": operations * 10.0}, size * 20.0) == pytest.approx(100)
    assert floor_ms(parts, "fp32", {"fp32": operations * 40.0}, size * 20.0) == pytest.approx(50)
    assert floor_ms(parts, "fp16", {"fp32": 1.0, "fp16": None}, 1.0) is None
