"""Where SAM 2's mask decoder lies in a checkpoint, whose conv_s0 and conv_s1 `--sam2-outputs head` takes in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from neck.checkpoint_keys import HEAD_KEY, Layout, listing, nearest
from neck.weights.several_encoders import is_equal
from neck.weights.torchfile import CheckpointError

LOOKED_FOR = "sam_mask_decoder.conv_s0, .conv_s1 (Meta, Ultralytics) and mask_decoder.conv_s0, .conv_s1 (Hugging Face)"


def with_decoder(path: Path, layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """The layout with the mask decoder of the same model: of several, those whose names are nearest to the neck's.

    Raises:
        CheckpointError: there is none, or several that differ.
    """
    starts = list(dict.fromkeys(match[1] for key in tensors if (match := HEAD_KEY.fullmatch(key))))
    near = nearest(starts, layout.necks["sam2"])
    if not near:
        raise CheckpointError(
            f"{path}: --sam2-outputs head needs the convolutions of the SAM 2 mask decoder, but the checkpoint does "
            f"not contain them; neck-export looked for {LOOKED_FOR}, with any prefix.\nPass a checkpoint of the "
            "whole model, or leave out --sam2-outputs head"
        )
    if any(not _is_same(near[0], other, tensors) for other in near[1:]):
        raise CheckpointError(
            f"{path}: the checkpoint contains {len(near)} different mask decoders "
            f"({listing(f'{start}*' for start in near)}), and neck-export cannot tell which of them belongs to the "
            f"sam2 neck ({layout.necks['sam2']}*). Remove the other mask decoders from the checkpoint, or leave out "
            "--sam2-outputs head"
        )
    return dataclasses.replace(layout, decoder=near[0])


def _is_same(one: str, other: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether two decoders have the same convolutions, name by name and bit by bit."""
    found = [
        {key.removeprefix(start): tensors[key] for key in tensors if key.startswith(f"{start}conv_s")}
        for start in (one, other)
    ]
    return found[0].keys() == found[1].keys() and all(
        is_equal(tensor, found[1][name]) for name, tensor in found[0].items()
    )
