"""By what an exported file knows the weights of a live model again, in whatever type the model holds them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from neck.checkpoint_keys import NECK_MODULES

SAMPLES = 64
"""Numbers taken from each tensor, evenly spread: training moves a tensor nearly everywhere, or not at all."""

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Fingerprints = dict[str, dict[str, str]]
"""Part (`trunk`, a neck's name, `sam2_head`) -> type -> SHA-256 of the samples rounded to that type."""


def fingerprints(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprints:
    """Takes the fingerprints of an encoder.

    Args:
        tensors: our names and the tensors, such as `trunk.blocks.3.attn.qkv.weight`, in the order of a state dict.
    """
    parts = {module: neck for neck, module in NECK_MODULES.items()} | {"trunk": "trunk", "sam2_head": "sam2_head"}
    digests: dict[str, dict[str, hashlib._Hash]] = {}
    for name, tensor in tensors:
        kept = _trained(name, tensor)
        values = kept.reshape(-1)[:: max(1, math.ceil(kept.numel() / SAMPLES))].detach().cpu()
        part = digests.setdefault(parts[name.split(".")[0]], {kind: hashlib.sha256() for kind in TYPES})
        for kind, dtype in TYPES.items():
            part[kind].update(f"{name} {tuple(kept.shape)}".encode() + values.to(dtype).float().numpy().tobytes())
    return {part: {kind: digest.hexdigest() for kind, digest in kinds.items()} for part, kinds in digests.items()}


def differing(file: Mapping[str, Mapping[str, str]], model: Fingerprints, dtype: torch.dtype) -> list[str]:
    """The parts of a model that a file does not hold, compared in the type that the model's weights have."""
    kind = next((kind for kind, one in TYPES.items() if one == dtype), "float32")
    return [part for part, kinds in model.items() if file.get(part, {}).get(kind) != kinds[kind]]


def _trained(name: str, tensor: Tensor) -> Tensor:
    """A position embedding without the class-token row, which Hugging Face's models lack (g * g + 1 is no square)."""
    if name != "trunk.pos_embed":
        return tensor
    rows = tensor.shape[1]
    return tensor[:, rows - math.isqrt(rows) ** 2 :]
