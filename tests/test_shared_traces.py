"""The graphs that the tests share: an encoder's own weights are in them, and another structure has its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from conftest import Save, named_outputs, run_onnx, tiny_config, worst_error
from shared_traces import SharedTraces, structure

import export.graph.trace
from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.deployed_module import DeployEncoder
from neck.checkpoint import random_encoder
from neck.trunk import ViTDetTrunk

CONFIG = tiny_config()


def module_of(seed: int = 0, rewrites: Rewrites | None = None, image_size: int = 112) -> DeployEncoder:
    config = dataclasses.replace(CONFIG, image_size=image_size)
    signature = encoder_signature(config, positions="none")
    return DeployEncoder(random_encoder(config, seed), signature, rewrites or Rewrites())


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DeployEncoder]:
    """The modules that torch exports from here on; those whose structure is known are not among them."""
    modules: list[DeployEncoder] = []
    real = export.graph.trace._export

    def counted(module: DeployEncoder) -> ir.Model:
        modules.append(module)
        return real(module)

    monkeypatch.setattr(export.graph.trace, "_export", SharedTraces(counted, tmp_path))
    return modules


def test_the_second_encoder_has_its_own_weights(exported: list[DeployEncoder], save: Save) -> None:
    image = torch.rand(1, 3, 112, 112)
    encoders = [random_encoder(CONFIG, seed) for seed in (0, 1)]
    wanted = [named_outputs(encoder, image) for encoder in encoders]
    for encoder, want, other in zip(encoders, wanted, reversed(wanted), strict=True):
        signature = encoder_signature(CONFIG, positions="none")
        found = run_onnx(save(export.graph.trace.trace(DeployEncoder(encoder, signature, Rewrites()))), image)
        assert worst_error(found, {name: want[name] for name in found}) < 2e-5
        assert worst_error(found, {name: other[name] for name in found}) > 1e-2
    assert len(exported) == 1


def test_a_deeper_trunk_is_the_same_trace(exported: list[DeployEncoder], save: Save) -> None:
    """Two of its blocks are traced, whatever its depth."""
    image = torch.rand(1, 3, 112, 112)
    for changes in ({}, {"depth": 2, "global_blocks": (1,)}, {"depth": 5, "global_blocks": (2,)}):
        config = tiny_config(**changes)
        encoder = random_encoder(config)
        module = DeployEncoder(encoder, encoder_signature(config, positions="none"), Rewrites())
        found = run_onnx(save(export.graph.trace.trace(module)), image)
        assert worst_error(found, {name: named_outputs(encoder, image)[name] for name in found}) < 2e-5
    assert len(exported) == 1


def _window(module: DeployEncoder) -> None:
    module.trunk.blocks[0].window_size = 0


def _epsilon(module: DeployEncoder) -> None:
    module.trunk.blocks[2].norm1.eps = 1e-3


def _class(module: DeployEncoder) -> None:
    module.trunk.__class__ = ViTDetTrunk


@pytest.mark.parametrize("change", [_window, _epsilon, _class])
def test_what_a_trace_depends_on(change: Callable[[DeployEncoder], None]) -> None:
    module = module_of()
    known = structure(module)
    assert structure(module_of(seed=1)) == known
    change(module)
    assert structure(module) != known
    assert structure(module_of(rewrites=Rewrites.none())) != known != structure(module_of(image_size=56))
