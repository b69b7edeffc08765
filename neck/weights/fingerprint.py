"""By what an exported file knows the weights of a live model again, in whatever type the model holds them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from neck.checkpoint_keys import NECK_MODULES

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Fingerprints = dict[str, dict[str, str]]
"""Part (`trunk`, a neck's name, `sam2_head`) -> type -> SHA-256 over all of its values rounded to that type."""


def fingerprints(tensors: Iterable[tuple[str, Tensor]], kinds: Sequence[str] = tuple(TYPES)) -> Fingerprints:
    """Computes the fingerprints of an encoder: every value counts.

    The digest of a part is SHA-256 over the name, shape and digest of each of its tensors, in their order; the digest
    of a tensor is SHA-256 over the bytes of all its values. Tensors are digested in parallel (hashlib releases the
    interpreter's lock).

    Args:
        tensors: our names and the tensors, such as `trunk.blocks.3.attn.qkv.weight`, in the order of a state dict.
        kinds: the types to which the values are rounded, keys of TYPES.
    """
    parts = {module: neck for neck, module in NECK_MODULES.items()} | {"trunk": "trunk", "sam2_head": "sam2_head"}
    digests: dict[str, dict[str, hashlib._Hash]] = {}
    remaining, workers = iter(tensors), torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        while batch := list(itertools.islice(remaining, 2 * workers)):  # not all at once: some are made on the way
            for name, found in pool.map(lambda item: (item[0], _digests(item[0], item[1], kinds)), batch):
                part = digests.setdefault(parts[name.split(".")[0]], {kind: hashlib.sha256() for kind in kinds})
                for kind, digest in found.items():
                    part[kind].update(digest)
    return {part: {kind: digest.hexdigest() for kind, digest in found.items()} for part, found in digests.items()}


def differing(file: Mapping[str, Mapping[str, str]], model: Fingerprints) -> list[str]:
    """The parts of a model whose weights differ from a file's, in every type that the model's fingerprints have."""
    return [
        part
        for part, kinds in model.items()
        if any(file.get(part, {}).get(kind) != digest for kind, digest in kinds.items())
    ]


def kind_of(dtype: torch.dtype) -> str:
    """The key of TYPES in which weights of a type are compared."""
    return next((kind for kind, one in TYPES.items() if one == dtype), "float32")


def _digests(name: str, tensor: Tensor, kinds: Sequence[str]) -> dict[str, bytes]:
    """Name, shape and digest of one tensor in each type."""
    kept = _trained(name, tensor).detach()
    found = {}
    for kind in kinds:
        values = kept.to(TYPES[kind]).cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
        found[kind] = f"{name} {tuple(kept.shape)} {hashlib.sha256(values.data).hexdigest()}\n".encode()
    return found


def _trained(name: str, tensor: Tensor) -> Tensor:
    """A position embedding without the class-token row, which Hugging Face's models lack (g * g + 1 is no square)."""
    if name != "trunk.pos_embed":
        return tensor
    rows = tensor.shape[1]
    return tensor[:, rows - math.isqrt(rows) ** 2 :]
