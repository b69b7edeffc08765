"""Where an encoder's weights come from, and what was loaded from there; torch is imported by `load` alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neck.config import EncoderConfig

if TYPE_CHECKING:
    from neck.necks import Sam3DualViTDetNeck

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Chooses the necks to load from those that a checkpoint has."""


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """Which weights an encoder has: those of a checkpoint, or random ones.

    Attributes:
        path: .pt, .safetensors, a safetensors index, or the folder of one; None stands for random weights.
        seed: of the random weights.
        state: which state of a training file, dots for depth; None takes the only one or the model's.
        prefix: which encoder of a state that holds several: what stands before `trunk.` or `backbone.`.
        adapter: a folder that PEFT saved, whose LoRA is merged into the weights.
        alpha: lora_alpha of an adapter that the checkpoint itself holds, where nothing beside it tells.
        config: the architecture; None infers it from a checkpoint, and is SAM 3's for random weights.
    """

    path: Path | None = None
    seed: int = 0
    state: str | None = None
    prefix: str | None = None
    adapter: Path | None = None
    alpha: float | None = None
    config: EncoderConfig | None = None

    def __str__(self) -> str:
        return str(self.path) if self.path else f"random weights with seed {self.seed}"

    def load(self, necks: Sequence[str] | Choose | None = None, *, sam2_head: bool = False) -> Loaded:
        """Loads the encoder in float32, in eval mode, without gradients.

        Args:
            necks: names of the necks, or what chooses them from those that are there; None means all. Random weights
                have those that are named, by default the config's.
            sam2_head: also load the mask decoder's conv_s0 and conv_s1 (`encoder.sam2_head`); sam2 must be loaded.

        Raises:
            CheckpointError: what is wrong with the file, the tensors, the config or the adapter, and what to do.
            NotImplementedError: necks that random weights cannot have.
        """
        from neck.checkpoint import random_encoder, read_checkpoint

        if self.path is not None:
            return read_checkpoint(self, necks, sam2_head=sam2_head)
        config = self.config or EncoderConfig()
        if necks is not None and not callable(necks):
            config = dataclasses.replace(config, necks=tuple(necks), sam2_head=sam2_head)
        return Loaded(random_encoder(config, self.seed), Origin(self))


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an encoder's weights came from.

    Attributes:
        source: what was asked for.
        files: the checkpoint, or the index and then its shards; none of random weights.
        state: the place of the state that was read, "" for the file itself.
        other_states: places of the other states that hold an encoder.
    """

    source: EncoderSource
    files: tuple[Path, ...] = ()
    state: str = ""
    other_states: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An encoder, its origin, and notes for the user."""

    encoder: Sam3DualViTDetNeck
    origin: Origin
    notes: tuple[str, ...] = ()
