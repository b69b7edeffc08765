"""Images and what PyTorch makes of them, in one file: what a service compares its own outputs with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from export.contract.atomic import replacing
from export.verification.fidelity import FidelityError


def check_reference(path: Path) -> None:
    """Refuses before the work a name that no reference can have.

    Raises:
        FidelityError: it does not end in .safetensors, is a folder, or lies in one that cannot be written.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        raise FidelityError(
            f"{path}: the name of a reference file must end in .safetensors; use a name such as reference.safetensors"
        )
    if path.parent.is_dir() and not os.access(path.parent, os.W_OK):
        raise FidelityError(f"{path}: the folder of this file is not writable; pass another path with --save-reference")


def write_reference(path: Path, pixels: np.ndarray, outputs: Mapping[str, np.ndarray]) -> None:
    """Writes `pixels` and every output by its name, as safetensors: a JSON header, then the bytes.

    Args:
        path: the file; it is there whole or not at all.
        pixels: uint8 (B, H, W, 3), RGB.
        outputs: the plain module's, float32.

    Raises:
        FidelityError: it cannot be written.
    """
    try:
        with replacing(path) as staged:
            arrays = {"pixels": pixels, **outputs}
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, staged)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise FidelityError(
            f"{path}: the reference cannot be written to this file ({why}); check that the folder is writable and "
            "the disk has free space"
        ) from None
