"""What some quantized products do to the features: the plain module with those layers rounded, from their block on."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from export.contract.signature import Signature
from export.lowering.attention import PROBABILITIES
from export.lowering.codes import AttentionScales, Kind
from export.lowering.quantize import Quantization, encode_weight
from export.quantization.calibration import attention_layers, linear_layers
from export.quantization.choose_ranges import decode
from export.verification.fidelity import Comparison, compare_output, tolerance_for
from export.verification.verify import References, reference_outputs
from neck.necks import Sam3DualViTDetNeck, shallow_copy
from neck.trunk import Attention, ViTDetTrunk

ONE = torch.ones(())


@contextlib.contextmanager
def rounded_layers(encoder: Sam3DualViTDetNeck, found: Quantization) -> Iterator[None]:
    """Rounds what the file will round of some linear layers and attentions, while the context lasts."""
    layers, weights, hooks = linear_layers(encoder), {}, []
    attentions = attention_layers(encoder)
    try:
        for name, scales in found.attentions.items():
            attentions[name].forward = partial(rounded_attention, attentions[name], scales)  # type: ignore[method-assign]
        for name, scale in found.results.items():
            hooks.append(layers[name].register_forward_hook(partial(_round_result, scale, found.kind)))
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
        for name in found.attentions:
            attentions[name].__dict__.pop("forward", None)
        for hook in hooks:
            hook.remove()


def _round_input(scale: float, move: Tensor, kind: Kind, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (decode(inputs[0] / move, scale, kind),)


def _round_result(scale: float, kind: Kind, layer: nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bias = 0 if layer.bias is None else layer.bias
    return decode(output - bias, scale, kind) + bias


def rounded_attention(module: Attention, scales: AttentionScales, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """An attention's forward with FP8 queries, keys, values and probabilities; x (B, N, C) -> (B, N, C)."""
    tokens, dim = x.shape[-2:]
    qkv = module.qkv(x).view(-1, tokens, 3, module.num_heads, dim // module.num_heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D) each
    query = decode(module.rope(query, cos, sin) * module.scale, scales.query, "fp8")
    key = decode(module.rope(key, cos, sin), scales.key, "fp8")
    value = decode(value, scales.value, "fp8")
    scale = float(np.float16(PROBABILITIES))  # as the file stores it
    mixed = torch.empty_like(query)
    for image, head in itertools.product(range(query.shape[0]), range(query.shape[1])):  # (N, N) at a time
        probabilities = (query[image, head] @ key[image, head].T).softmax(dim=-1)
        mixed[image, head] = decode(probabilities, scale, "fp8") @ value[image, head]
    projected: Tensor = module.proj(mixed.transpose(1, 2).reshape(-1, tokens, dim))
    return projected


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
        """The figures of every feature with these products, attentions and results quantized."""
        start = min(int(name.split(".")[2]) for name in names)
        encoder, trunk = shallow_copy(self.encoder), shallow_copy(cast(ViTDetTrunk, self.encoder.trunk))
        trunk.blocks = nn.ModuleList(list(trunk.blocks)[start:])
        encoder.trunk = trunk
        skip = trunk.blocks[0].register_forward_pre_hook(lambda _, inputs: (self.inputs[start], *inputs[1:]))
        try:
            with rounded_layers(self.encoder, self.found.only(names)):
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
