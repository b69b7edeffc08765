"""Names what is no checkpoint, or no plain one, and the public command that turns it into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neck.hub import hub_name

SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.(?:safetensors|bin)$")
PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"access to model", b"invalid username")
LFS = b"version https://git-lfs"
DEEPSPEED = re.compile(r"(?:zero_pp_rank|bf16_zero_pp_rank).*_states\.pt$")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that weights of the encoder may have."""

SCALES = re.compile(
    r"\.(?:SCB|weight_format|weight_scale(?:_inv|_2)?|input_scale|weight_zero_point|weight_packed|qweight|qzeros|g_idx|"
    r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)$"
)
"""What bitsandbytes, compressed-tensors, GPTQ, AWQ and modelopt put beside or instead of a weight."""


def missing(path: Path) -> str:
    """The message for a missing path; a name on the Hugging Face Hub is explained."""
    name = hub_name(f"hf://{path}")
    if path.suffix in (".pt", ".safetensors", ".json") or name is None or name.file:
        return f"{path}: this file does not exist; check the path"
    return (
        f"{path}: this file does not exist. If {path} is a repository on the Hugging Face Hub, pass --checkpoint "
        f"hf://{path}, or download the repository with `hf download {path} --local-dir {path.name}` and pass the "
        f"folder {path.name}. Otherwise, check the path"
    )


def folder_of(path: Path) -> str | None:
    """Describes a folder without weights of ours and how to convert it into a file; None if it is unknown."""
    if (path / ".metadata").is_file() or any(path.glob("*.distcp")):
        return (
            f"{path}: this is a folder of torch.distributed.checkpoint; convert it into one file with\n`python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt`"
        )
    snapshots = sorted(child for child in path.glob("snapshots/*") if child.is_dir())
    if snapshots:
        return (
            f"{path}: this folder of the Hugging Face cache can contain several revisions of a model; pass "
            f"the folder of one revision: {' or '.join(map(str, snapshots[:4]))}"
        )
    inner = [path, *(child for child in sorted(path.glob("global_step*")) if child.is_dir())]
    if any(DEEPSPEED.search(file.name) for folder in inner for file in folder.glob("*.pt")):
        root = path.parent if path.name.startswith("global_step") else path
        return (
            f"{path}: this is a DeepSpeed ZeRO checkpoint, which neck-export cannot read directly. Convert the "
            f"checkpoint with `python {root}/zero_to_fp32.py {root} weights`. The command writes a file or a folder "
            "with the name `weights`. Pass `weights` as the checkpoint"
        )
    return None


def file_of(path: Path, head: bytes) -> str | None:
    """Describes a file that is not a checkpoint, recognized by its first bytes; None if it is unknown.

    Args:
        head: its first 512 bytes.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if path.suffix == ".distcp" or path.name == ".metadata" or DEEPSPEED.search(path.name):
        return folder_of(path.parent)
    if head.startswith(LFS):
        return (
            f"{path}: this is a Git LFS pointer and not the weights themselves; run `git lfs pull` in its folder "
            "to download them"
        )
    refused = text.startswith(b"{") and (b'"error"' in head or b'"message"' in head) and b"weight_map" not in head
    if refused or text.startswith(PAGES):
        return (
            f"{path}: this is a web page or an error message, not a checkpoint; the download probably requires a "
            "login.\nLog in, accept the license (Hugging Face: `hf auth login`, `hf download`), and download the "
            "file again"
        )
    if head.startswith(b"GGUF"):
        return (
            f"{path}: this is a GGUF file, a format of llama.cpp whose weights are usually quantized; use the "
            "original .pt or .safetensors file"
        )
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"BZh")):
        return f"{path}: this is an archive (tar, gzip, ...) and not a checkpoint; unpack it and pass the file inside"
    return None


def quantized(tensors: Mapping[str, Tensor], starts: Iterable[str]) -> str | None:
    """Describes how the weights under some prefixes are quantized; None if they are floats.

    A type is a surer sign than a name: an INT8 weight with its scale beside it is not an adapter.
    """
    starts = tuple(starts)
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(starts)}
    # an embedding's index or a counter may be an integer; a weight may not
    types = [f"{name} has the type {tensor.dtype}" for name, tensor in inside.items() if _is_code(name, tensor)]
    scales = [name for name in inside if SCALES.search(name)]
    signs = [*types, *scales]
    if not signs:
        return None
    more = f" and {len(signs) - 4} more tensors" if len(signs) > 4 else ""
    return (
        f"the encoder's weights are quantized ({', '.join(types[:2] + scales[:2] if types else signs[:4])}{more}); "
        "use the original weights in float32, float16 or bfloat16"
    )


def _is_code(name: str, tensor: Tensor) -> bool:
    return tensor.dtype not in FLOATS and not tensor.is_complex() and name.endswith((".weight", ".bias", "pos_embed"))


def shard_of(path: Path) -> str | None:
    """The message for a file that is one shard of several; None if its name does not say so."""
    found = SHARD.search(path.name)
    if not found or int(found[2]) < 2:
        return None
    index = next(path.parent.glob("*.index.json"), None)
    whole = f"pass the folder {path.parent}" if index else "download all shards and their index, and pass the folder"
    return (
        f"{path.name} is shard {int(found[1])} of {int(found[2])} of a checkpoint and contains only a part of the "
        f"tensors; {whole}"
    )


def channels_last(tensors: Mapping[str, Tensor], patches: Iterable[str]) -> str | None:
    """The message for convolutions with channels last, as in MLX and TensorFlow; None if they are as in PyTorch.

    Args:
        patches: names that the patch embedding's weight may have; PyTorch's has shape (C, 3, patch, patch).
    """
    for name in patches:
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) == 4 and shape[3] == 3 and shape[1] == shape[2] != 3:
            return (
                f"the convolution weights have their channels last, as in MLX: {name} has the shape {shape}, "
                f"but PyTorch needs {(shape[0], shape[3], *shape[1:3])};\nuse the original weights, or "
                "permute the weights of every convolution"
            )
    return None
