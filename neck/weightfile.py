"""Reads a file of weights: name -> tensor, memory-mapped, never running code from it."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
SAFETENSORS_NAME = "model.safetensors"
LARGEST_HEADER = 100_000_000
"""Bytes of the largest header that safetensors itself accepts."""

WRAPPERS = ("model", "state_dict")
"""Keys under which training code puts the state dict."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not hold the encoder that was asked for."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint; what kind of file it is, its first bytes tell.

    The tensors are views of the mapped file (except in a .pt from before PyTorch 1.6 or a compressed one, which are
    read): it must not be overwritten in place while they are used. Replacing it by a rename is safe.

    Args:
        path: .pt or .safetensors under any name, a safetensors index, or a folder that holds one.

    Raises:
        CheckpointError: no such file, empty, damaged, not a checkpoint, or a pickle of more than tensors.
    """
    path = find_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not head:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    # safetensors first: the length at its front may begin with any byte, also with a pickle's 0x80
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= LARGEST_HEADER:
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        return _unwrap(path, _read_zip(path))
    if head.startswith(b"\x80"):
        return _unwrap(path, _load(path, mmap=False))
    if head.lstrip().startswith(b"{"):
        return _read_shards(path)
    raise CheckpointError(
        f"{path}: not a checkpoint, it begins with {head!r}; expected a PyTorch .pt, a .safetensors or {INDEX_NAME}"
    )


def find_file(path: Path) -> Path:
    """Returns the file to read: the path itself, or in a folder the index or the single safetensors file."""
    if path.is_dir():
        for name in (INDEX_NAME, SAFETENSORS_NAME):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"No such file: the folder {path} has no {INDEX_NAME} or {SAFETENSORS_NAME}; name a file")
    if not path.is_file():
        raise CheckpointError(f"No such file: {path}")
    return path


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: a truncated or damaged .safetensors of {size:,} bytes ({error}); copy or download it again"
        ) from None


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors index ({type(error).__name__}: {error}); expected JSON with a weight_map"
        ) from None
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\:]", shard):
            raise CheckpointError(f"{path}: names the shard {shard!r}; shards must be files in the index's own folder")
        if not (path.parent / shard).is_file():
            raise CheckpointError(f"No such file: {path.parent / shard}, a shard of {path.name}; download it too")
        tensors.update(_read_safetensors(path.parent / shard))
    return tensors


def _read_zip(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: a truncated or damaged .pt of {size:,} bytes ({error}); copy or download it again"
        ) from None
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save wrote (it has no data.pkl)")
    if "constants.pkl" in names:
        raise CheckpointError(f"{path}: a TorchScript archive, expected a state dict; save its state_dict() instead")
    # mapping needs records as they are; torch.save never compresses, archivers that repack do
    return _load(path, mmap=all(entry.compress_type == zipfile.ZIP_STORED for entry in entries))


def _load(path: Path, mmap: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickle protocols that it then reads or refuses
            return torch.load(str(path), map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        wants = f"asks for {found[1]}" if found else "holds more than tensors"
        raise CheckpointError(
            f"{path}: refused, its pickle {wants}, which could run code; only tensors are read.\n"
            "Where you trust it, save the weights alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from None
    except Exception as error:  # a damaged pickle raises anything: EOFError, struct.error, KeyError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: a truncated or damaged .pt ({reason}); copy or download it again") from None


def _unwrap(path: Path, loaded: object) -> dict[str, Tensor]:
    """Takes the state dict out of the wrappers of training code."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a dict of tensors")
    inner: Mapping[Any, Any] = loaded
    while wrapper := next((key for key in WRAPPERS if isinstance(inner.get(key), Mapping)), None):
        inner = inner[wrapper]
    named = ((key, value) for key, value in inner.items() if isinstance(key, str))
    tensors = {key: value.detach() for key, value in named if isinstance(value, Tensor)}
    if not tensors:
        shown = ", ".join(repr(key) for key in list(inner)[:8]) or "nothing"
        raise CheckpointError(
            f"{path}: no tensors in it (its keys: {shown}); expected a state dict, bare or under "
            f"{' or '.join(WRAPPERS)}"
        )
    return tensors
