"""What some quantized products do to the features: the plain module with those layers rounded, from their block on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from export.contract.signature import Signature
from export.lowering.quantize import Kind, Quantization, encode_weight
from export.quantization.calibration import linear_layers
from export.quantization.ranges import decode
from export.verification.fidelity import Comparison, compare_output, tolerance_for
from export.verification.verify import References, reference_outputs
from neck.necks import Sam3DualViTDetNeck, shallow_copy
from neck.trunk import ViTDetTrunk

ONE = torch.ones(())


@contextlib.contextmanager
def rounded_layers(encoder: Sam3DualViTDetNeck, found: Quantization) -> Iterator[None]:
    """Rounds inputs and weights of some linear layers as the file will, while the context lasts."""
    layers, weights, hooks = linear_layers(encoder), {}, []
    try:
        for name, scale in found.scales.items():
            layer, move = layers[name], found.moves.get(name, ONE)
            weights[name] = layer.weight
            codes = encode_weight((layer.weight.detach() * move).T, found.kind, name)
            layer.weight = nn.Parameter(codes.values().T.contiguous(), requires_grad=False)
            hooks.append(layer.register_forward_pre_hook(partial(_round_input, scale, move, found.kind)))
        yield
    finally:
        for name, weight in weights.items():
            layers[name].weight = weight
        for hook in hooks:
            hook.remove()


def _round_input(scale: float, move: Tensor, kind: Kind, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (decode(inputs[0] / move, scale, kind),)


class Trials:
    """Trials at one image size on one batch of images; the blocks before the first rounded one run once.

    Args:
        references: of the plain encoder. The reference of the signature must not have been made before, since what the
            blocks read is kept from its pass.
        signature: necks, levels and image size.
        found: of every product that may be quantized.
    """

    def __init__(
        self,
        references: References,
        signature: Signature,
        found: Quantization,
    ) -> None:
        self.encoder, self.signature, self.found = references.encoder.at_size(signature.image_size), signature, found
        self.inputs = torch.empty(0)  # of every block, (depth, B, h, w, C)
        blocks = cast(ViTDetTrunk, self.encoder.trunk).blocks
        keep = [block.register_forward_pre_hook(partial(self._keep, at)) for at, block in enumerate(blocks)]
        try:
            reference = references.of(signature, 1)
            self.pixels, self.reference = reference.pixels, reference.outputs
        finally:
            for hook in keep:
                hook.remove()

    def _keep(self, at: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if at == 0:  # in one piece: pieces would lie among what the pass frees, and the process would grow
            blocks = cast(ViTDetTrunk, self.encoder.trunk).blocks
            self.inputs = torch.empty(len(blocks), *inputs[0].shape)
        self.inputs[at] = inputs[0]

    def run(self, *names: str) -> list[Comparison]:
        """The figures of every feature with these products quantized."""
        start = min(int(name.split(".")[2]) for name in names)
        encoder, trunk = shallow_copy(self.encoder), shallow_copy(cast(ViTDetTrunk, self.encoder.trunk))
        trunk.blocks = nn.ModuleList(list(trunk.blocks)[start:])
        encoder.trunk = trunk
        skip = trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: (self.inputs[start], *inputs[1:]))
        try:
            scales = {name: self.found.scales[name] for name in names}
            with rounded_layers(self.encoder, dataclasses.replace(self.found, scales=scales)):
                found = self._features(encoder)
        finally:
            skip.remove()
        return [
            compare_output(name, self.reference[name], array, tolerance_for(name, self.found.kind))
            for name, array in found.items()
        ]

    def _features(self, encoder: Sam3DualViTDetNeck) -> dict[str, np.ndarray]:
        found = reference_outputs(encoder, self.pixels, self.signature)
        return {name: found[name] for name in self.signature.features}


def at_size(signature: Signature, most: int, patch: int) -> Signature:
    """The signature with each side of its images at most so long, in whole patches."""
    height, width = (min(side, most // patch * patch) for side in signature.image_size)
    return dataclasses.replace(signature, image_size=(height, width))
