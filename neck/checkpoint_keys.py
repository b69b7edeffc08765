"""What the tensors of the encoder are called in each checkpoint format (no torch).

Meta and Ultralytics use our own names under some prefix: `<prefix>trunk.*`, `<prefix>convs.*`. Hugging Face uses
`<prefix>backbone.*`, `<prefix>neck.fpn_layers.*` and, elsewhere, `tracker_neck.fpn_layers.*`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable

NECK_MODULES = {
    "sam3": "convs",
    "sam2": "sam2_convs",
    "interactive": "interactive_convs",
    "propagation": "propagation_convs",
}
"""Module of each neck in our encoder and in Meta's checkpoints."""

HF_MODULES = {
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "ln_pre": ("layer_norm",),
    "norm1": ("layer_norm1",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layer_norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "dconv_2x2_0": ("scale_layers.0",),
    "dconv_2x2_1": ("scale_layers.2",),
    "dconv_2x2": ("scale_layers.0",),
    "conv_1x1": ("proj1",),
    "conv_3x3": ("proj2",),
}
"""Our module inside the trunk, a block or a level -> Hugging Face's; several are concatenated in this order."""

HF_POSITION = "embeddings.position_embeddings"

TRUNK_KEYS = {
    "meta": re.compile(r"((?:.*\.)?)trunk\.(?:pos_embed$|patch_embed\.proj\.|ln_pre\.|blocks\.\d+\.)"),
    "hf": re.compile(r"((?:.*\.)?)backbone\.(?:embeddings\.\w+|layers\.\d+\.attention|layer_norm)\b"),
}
HEAD_KEY = re.compile(r"((?:.*\.)?(?:sam_)?mask_decoder\.)conv_s[01]\.(?:weight|bias)")
"""SAM 2's mask decoder: Meta's and Ultralytics' `sam_mask_decoder`, Hugging Face's `mask_decoder`, under any prefix."""
META_DECODER = "tracker.sam_mask_decoder."
"""What stands before conv_s0 in Meta's sam3.pt."""
TRACKER_NECK_KEY = re.compile(r"((?:.*\.)?(tracker_neck\.fpn_layers\.))\d+\.")

MOST_LAYOUTS = 16
"""Trunks that are looked at; each costs a look at all keys, and a file may name thousands."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The position of one encoder in a checkpoint.

    Args:
        source: `meta` (also Ultralytics) or `hf`.
        prefix: what stands before `trunk.` or `backbone.`.
        necks: the necks that the checkpoint has: name -> what stands before the level's index.
        indices: the checkpoint's indices of our blocks, in order: a pruned file may have gaps.
        class_row: whether the position embedding has the class-token row of pretraining.
        decoder: what stands before the mask decoder's conv_s0 and conv_s1, where they are wanted.
    """

    source: str
    prefix: str
    necks: dict[str, str]
    indices: tuple[int, ...] = ()
    class_row: bool = True
    decoder: str = ""

    @property
    def trunk(self) -> str:
        """The prefix of the names inside the trunk."""
        return self.prefix + ("trunk." if self.source == "meta" else "backbone.")

    @property
    def blocks(self) -> str:
        """The prefix of a block's index."""
        return self.trunk + ("blocks." if self.source == "meta" else "layers.")

    @property
    def gaps(self) -> list[int]:
        """Indices below the last block's that are missing in the checkpoint."""
        return sorted(set(range(max(self.indices, default=0))) - set(self.indices))

    def keys(self, name: str) -> tuple[str, ...]:
        """The checkpoint's keys of our tensor `name`, such as `trunk.blocks.3.attn.qkv.weight`."""
        if name == "trunk.pos_embed":
            return (self.trunk + (HF_POSITION if self.source == "hf" else "pos_embed"),)
        top, rest = name.split(".", 1)
        if top == "sam2_head":
            return (self.decoder + rest,)
        if top == "trunk":
            start = self.trunk
            if rest.startswith("blocks."):
                _, index, rest = rest.split(".", 2)
                start = f"{self.blocks}{self.indices[int(index)]}."
        else:
            index, rest = rest.split(".", 1)
            neck = next(neck for neck, module in NECK_MODULES.items() if module == top)
            start = f"{self.necks[neck]}{index}."
        if self.source == "meta":
            return (start + rest,)
        module, leaf = rest.rsplit(".", 1)
        return tuple(f"{start}{theirs}.{leaf}" for theirs in HF_MODULES[module])

    def short(self, key: str) -> str:
        """A key, or the start of keys, without what stands before the encoder in this file."""
        tracker = TRACKER_NECK_KEY.match(f"{key}0.")
        return key[tracker.start(2) :] if tracker else key.removeprefix(self.prefix)

    def has_inside(self, key: str, necks: Iterable[str]) -> bool:
        """Whether a key belongs to the encoder with these necks, so that it must be known."""
        starts = (self.necks[neck].removesuffix("fpn_layers.") for neck in necks)
        return key.startswith((self.trunk, *starts))

    def shapes(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shape that each of the checkpoint's keys of our tensor `name` must have, given ours."""
        keys = self.keys(name)
        if name == "trunk.pos_embed" and not self.class_row:
            shape = (shape[0], shape[1] - 1, *shape[2:])
        return dict.fromkeys(keys, (shape[0] // len(keys), *shape[1:]))


def find_layouts(keys: Iterable[str]) -> list[Layout]:
    """Every trunk in a checkpoint, recognized by its keys, with the necks beside it (possibly none)."""
    keys = list(keys)
    trackers = sorted({match[1] for key in keys if (match := TRACKER_NECK_KEY.match(key))})[:MOST_LAYOUTS]
    layouts = []
    for source, pattern in TRUNK_KEYS.items():
        for prefix in sorted({match[1] for key in keys if (match := pattern.match(key))})[:MOST_LAYOUTS]:
            if source == "meta":
                choices = [{neck: f"{prefix}{module}." for neck, module in NECK_MODULES.items()}]
            else:
                sam3 = {"sam3": f"{prefix}neck.fpn_layers."}
                choices = [{**sam3, "sam2": tracker} for tracker in nearest(trackers, prefix)] or [sam3]
            for necks in choices:
                present = {neck: start for neck, start in necks.items() if count_indices(keys, start)}
                layout = Layout(source, prefix, present)
                layouts.append(dataclasses.replace(layout, indices=find_indices(keys, layout.blocks)))
    return layouts


def nearest(starts: list[str], prefix: str) -> list[str]:
    """The tracker's parts whose names share most with a trunk's prefix, counted in parts: those of the same model."""

    def shared(start: str) -> int:
        pairs = zip(start.split("."), prefix.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    most = max(map(shared, starts), default=0)
    return [start for start in starts if shared(start) == most]


def find_indices(keys: Iterable[str], start: str) -> tuple[int, ...]:
    """The different numbers that follow `start` in the keys, in order."""
    rests = (key[len(start) :].split(".", 1)[0] for key in keys if key.startswith(start))
    return tuple(sorted({int(rest) for rest in rests if rest.isdecimal() and len(rest) < 5}))


def count_indices(keys: Iterable[str], start: str) -> int:
    """How many different numbers follow `start` in the keys."""
    return len(find_indices(keys, start))


def listing(items: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
