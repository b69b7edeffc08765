"""The random weights of a session: made where they are wanted, and the same bits as elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

FULL_SHA256 = "8d50441c702f664756b02aee291659fa517725bb49c496256043d751fbc0d1ce"
"""Of the full encoder's, seed 0, as an x86-64 CPU with AVX2 made them (tests/test_gpu_kit.py, slow)."""


def weights_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of all weights of a checkpoint that `save_meta_checkpoint` wrote."""
    digest = hashlib.sha256()
    for name, tensor in torch.load(path, mmap=True, weights_only=True)["model"].items():
        digest.update(name.encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
