"""Attention that accumulates in FP32, spelled by MatMul, Softmax, MatMul: its roundings, its errors, what is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace
from export.lowering.precision import lower
from export.verification.rounding_simulation import simulate
from export.verification.verify import make_reference, run_model, verify_onnx
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck

TOKENS, HEAD_DIM, SCALE = 40, 16, 0.25


def one_attention() -> ir.Model:
    """A canonical graph: image (3, 2, TOKENS, HEAD_DIM) -> query, key, value -> Attention -> y."""
    shape, single = [3, 2, TOKENS, HEAD_DIM], [1, 2, TOKENS, HEAD_DIM]
    nodes = [
        helper.make_node("Split", ["image"], ["q", "k", "v"], axis=0, num_outputs=3),
        helper.make_node("Attention", ["q", "k", "v"], ["y"], scale=SCALE),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, single)
    graph = helper.make_graph(nodes, "attention", [image], [result])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def emulated(image: np.ndarray, *, round_scores: bool = True, round_p: bool = True) -> np.ndarray:
    """Products of FP16 factors that accumulate in FP32, as PyTorch computes them; results rounded to FP16 or not."""

    def rounded(value: torch.Tensor, really: bool = True) -> torch.Tensor:
        return value.half().float() if really else value

    query, key, value = (rounded(part) for part in torch.from_numpy(image).split(1))
    scores = rounded(rounded(query * SCALE) @ key.transpose(-1, -2), round_scores)
    return rounded(rounded(scores.softmax(-1), round_p) @ value).numpy()


def test_scores_probabilities_and_result_are_rounded_and_nothing_else() -> None:
    """The simulation against PyTorch: FP16 products, FP32 accumulators; without one rounding it is another result."""
    image = np.random.default_rng(0).normal(0, 3, (3, 2, TOKENS, HEAD_DIM)).astype(np.float32)
    model = one_attention()
    lower(model, "fp16")
    assert "Attention" not in {node.op_type for node in model.graph}
    simulate(model)
    (found,) = run_model(model, Path(), image)

    def error(expected: np.ndarray) -> float:
        return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

    assert error(emulated(image)) < 2e-5  # one result in some hundreds is the neighboring FP16 number
    assert error(emulated(image, round_p=False)) > 1e-4
    assert error(emulated(image, round_scores=False)) > 1e-4


Change = Callable[[Sam3DualViTDetNeck], None]


def unchanged(encoder: Sam3DualViTDetNeck) -> None:
    """Random weights."""


def with_outliers(encoder: Sam3DualViTDetNeck) -> None:
    """Eight channels of the residual stream that block 1 makes large for good, as trained transformers have them."""
    channels = torch.randperm(encoder.trunk.config.embed_dim, generator=torch.Generator().manual_seed(1))[:8]
    encoder.trunk.blocks[1].mlp.fc2.bias[channels] += 100


def with_sharp_attention(encoder: Sam3DualViTDetNeck) -> None:
    """The rows of q and k four times as large, so that the scores are sixteen times as large."""
    for block in encoder.trunk.blocks:
        queries_and_keys = 2 * encoder.trunk.config.embed_dim
        block.attn.qkv.weight[:queries_and_keys] *= 4
        block.attn.qkv.bias[:queries_and_keys] *= 4


@pytest.mark.slow
@pytest.mark.parametrize("size", [336, 1008])
@pytest.mark.parametrize("change", [unchanged, with_outliers, with_sharp_attention])
def test_the_error_at_full_depth_is_that_of_the_operator(change: Change, size: int, tmp_path: Path) -> None:
    """The bar: no feature errs more than 1.05 times as much as with the Attention operator, by the simulation."""
    config = dataclasses.replace(EncoderConfig(), image_size=(size, size))
    encoder, signature = random_encoder(config), encoder_signature(config, positions="none")
    change(encoder)
    model, reference = trace(DeployEncoder(encoder, signature, Rewrites())), make_reference(encoder, signature)
    path, errors = tmp_path / "x.onnx", {}
    for spelling in ("operator", "matmul"):
        copy = model.clone()
        lower(copy, "fp16", spelling=spelling)  # type: ignore[arg-type]
        ir.save(copy, path, external_data="x.onnx.data")
        errors[spelling] = [row.relative_l2 for row in verify_onnx(path, signature, reference, "fp16").comparisons]
        print(change.__name__, size, spelling, errors[spelling], flush=True)
    assert all(new <= 1.05 * old for old, new in zip(errors["operator"], errors["matmul"], strict=True))
