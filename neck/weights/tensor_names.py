"""Names of tensors as training leaves them: what DDP, torch.compile, FSDP and checkpointing put into the path."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from neck.weights.torchfile import CheckpointError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_module"})
"""Of DistributedDataParallel, torch.compile, FSDP, activation checkpointing (torch's, fairscale's and Opacus')."""

FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?$")
"""FSDP's parameters of a whole module in one row, cut between the processes."""

ENCODER = re.compile(r"(?:^|\.)(?:trunk|backbone|neck|\w*convs|fpn_layers)\.")


def plain_name(name: str) -> str:
    """The name without wrappers, wherever in the path they stand; line ends and the like are escaped, for messages."""
    name = name if name.isprintable() else name.encode("unicode_escape").decode()
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrap_names(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without wrappers.

    Two that would then have one name stay as they are where they are one tensor, or no part of an encoder.

    Raises:
        CheckpointError: two tensors of the encoder have one name, or the parameters are FSDP's flat ones.
    """
    if flat := [name for name in tensors if FLAT.search(name)]:
        raise CheckpointError(
            f"{path}: the file contains FSDP's flattened parameters, for example {flat[0]}. Flattened parameters are "
            "only one process's part of the weights, so neck-export cannot load the file. Change the training script "
            "to save the whole model, either with StateDictType.FULL_STATE_DICT, or with get_model_state_dict and the "
            "option full_state_dict=True"
        )
    sources: dict[str, str] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = plain_name(name)
        if short not in sources:
            sources[short], plain[short] = name, tensor
        elif not _is_same(plain[short], tensor):
            if ENCODER.search(f"{short}."):
                raise CheckpointError(
                    f"{path}: {sources[short]} and {name} are different tensors, but without their wrapper "
                    f"prefixes both are named {short}; save the checkpoint with only one of them"
                )
            plain[name] = tensor
    return plain


def _is_same(one: Tensor, other: Tensor) -> bool:
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in (one, other)]
    return places[0] == places[1]
