"""Reads a file of weights: name -> tensor, memory-mapped, never running code from it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neck.hub import hub_name
from neck.weights.not_checkpoints import file_of, folder_of, missing
from neck.weights.records import OpaqueObject, TensorRecord
from neck.weights.state_dicts import choose_state, find_states
from neck.weights.tensor_names import unwrap_names
from neck.weights.torchfile import CheckpointError, TorchFile

__all__ = ["CheckpointError", "State", "find_file", "is_checkpoint", "read_state", "shard_files"]

INDEX_NAME = "model.safetensors.index.json"
FOLDER_NAMES = (INDEX_NAME, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What a folder of Hugging Face's is read by, the first that is there."""

TORCH_STARTS = (b"PK\x03\x04", b"\x80")
"""A zip archive, or a pickle of protocol 2 and later."""

WEIGHT_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""How files of weights are named; others are told by their first bytes."""

LARGEST_HEADER = 100_000_000
"""Bytes of the largest header that safetensors itself accepts."""


@dataclasses.dataclass(frozen=True)
class State:
    """One state of a file.

    Attributes:
        tensors: by name, views of the mapped file.
        name: its place in the file, dots for depth; "" is the file itself.
        others: places of the other states that hold an encoder.
        files: the file, or the index and then its shards.
    """

    tensors: dict[str, Tensor]
    name: str = ""
    others: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def read_state(path: Path, state: str | None = None) -> State:
    """Reads the tensors of one state of a checkpoint; the format is recognized by the first bytes.

    The tensors are views of the mapped file (except in a .pt from before PyTorch 1.6, a compressed one or one of the
    other byte order, which are read): it must not be overwritten in place while they are used. Replacing it by a
    rename is safe. Wrappers of training code are taken out of their names.

    Args:
        path: .pt or .safetensors under any name, an index of shards, or a folder that holds one.
        state: the place of the state in the file, dots for depth; None takes the only one or the model's.

    Raises:
        CheckpointError: no such file, empty, damaged, not a checkpoint, or no state to choose.
    """
    path = find_file(path)
    head = _head(path)
    if _is_index(head):
        if known := file_of(path, head):
            raise CheckpointError(known)
        if state is not None:
            raise CheckpointError(
                f"{path}: a sharded checkpoint contains only one state dict, so --state cannot choose another; "
                "leave out --state"
            )
        shards, tensors = shard_files(path), dict[str, Tensor]()
        for file in shards:
            if not file.is_file():
                raise CheckpointError(
                    f"{file}: this file does not exist, but {path.name} lists it as a shard of the checkpoint; "
                    "download it as well"
                )
            tensors.update(_read_file(file, _head(file), None).tensors)
        return State(unwrap_names(path, tensors), files=(path, *shards))
    found = _read_file(path, head, state)
    return dataclasses.replace(found, tensors=unwrap_names(path, found.tensors), files=(path,))


def find_file(path: Path) -> Path:
    """Returns the file to read: the path itself, or in a folder the index or the single file."""
    if path.is_dir():
        for name in FOLDER_NAMES:
            if (path / name).is_file():
                return path / name
        if known := folder_of(path):
            raise CheckpointError(known)
        raise CheckpointError(
            f"{path}: the folder contains no {' or '.join(FOLDER_NAMES)}; pass the path of the file with the "
            "weights instead of the folder"
        )
    if not path.is_file():
        raise CheckpointError(missing(path))
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{path}: PyTorch and safetensors can only open paths that are valid UTF-8; rename the file or folder"
        ) from None
    return path


def is_checkpoint(given: str | Path) -> bool:
    """Whether a path or a name on the Hugging Face Hub stands for weights rather than an ONNX file or a plan."""
    path = Path(given)
    if str(given) == "random" or path.is_dir() or path.suffix in WEIGHT_SUFFIXES or hub_name(given):
        return True
    if path.suffix == ".onnx" or not path.is_file():
        return False
    head = _head(path)
    return _is_safetensors(head) or _is_index(head) or head.startswith(TORCH_STARTS)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the file cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    if not head:
        raise CheckpointError(f"{path}: the file is empty; copy or download it again")
    return head


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= LARGEST_HEADER


def _is_index(head: bytes) -> bool:
    return not _is_safetensors(head) and head.lstrip().startswith(b"{")


def _read_file(path: Path, head: bytes, state: str | None) -> State:
    # safetensors first: the length at its front may begin with any byte, also with a pickle's 0x80
    if _is_safetensors(head):
        if state is not None:
            raise CheckpointError(
                f"{path}: a .safetensors file contains only one state dict, so --state cannot choose another; "
                "leave out --state"
            )
        return State(_read_safetensors(path))
    if known := file_of(path, head):
        raise CheckpointError(known)
    if head.startswith(TORCH_STARTS):
        return _read_torch(path, state)
    raise CheckpointError(
        f"{path}: the file is not a checkpoint (its first bytes are {head[:9]!r}); pass a PyTorch .pt file, a "
        f".safetensors file or {INDEX_NAME}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path}: the .safetensors file of {size:,} bytes is truncated or damaged ({error}); copy or download it "
            "again"
        ) from None


def shard_files(path: Path) -> list[Path]:
    """The files that an index of shards speaks of, whether they are there or not.

    Raises:
        CheckpointError: it is not an index, or names a file outside its folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the file is not an index of checkpoint shards ({type(error).__name__}: {error}); the "
            "index must be JSON with a weight_map, so download it again"
        ) from None
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", ".", "..") or re.search(r"[/\\:]", shard):
            raise CheckpointError(
                f"{path}: the index lists the shard {shard!r}, but shards must be in the folder of the index; "
                "correct the index or download the checkpoint again"
            )
    return [path.parent / shard for shard in shards]


def _read_torch(path: Path, asked: str | None) -> State:
    file = TorchFile(path)
    if not isinstance(file.root, dict | OpaqueObject):
        raise CheckpointError(
            f"{path}: the file contains a {_kind(file.root)} instead of weights; pass a file with a state dict or "
            "a module"
        )
    states = find_states(path, file.root)
    if not states:
        keys = [key for key in file.root if isinstance(key, str)] if isinstance(file.root, dict) else []
        shown = ", ".join(repr(key[:40]) for key in keys[:8]) or "nothing"
        raise CheckpointError(
            f"{path}: the file contains no tensors (its keys are {shown}); pass a file with a state dict or a module"
        )
    name = choose_state(path, states, asked)
    entries = states[name]
    if entries.others:
        listed = ", ".join(f"{key} is a {kind}" for key, kind in list(entries.others.items())[:4])
        raise CheckpointError(
            f"{path}: neck-export reads only plain tensors, but {len(entries.others)} tensors of the checkpoint are "
            f"quantized, sparse or sharded over processes. For example, {listed}.\nIn the program that made the "
            "checkpoint, gather sharded tensors, dequantize quantized tensors, and call to_dense() on sparse tensors. "
            "Then save the weights with torch.save(model.state_dict(), 'weights.pt')"
        )
    others = tuple(place for place, found in states.items() if found.fits and place != name)
    return State({key: file.tensor(record) for key, record in entries.tensors.items()}, name, others)


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, TensorRecord) else type(value).__name__
