"""The encoder's architecture as one frozen value, checked when it is made (no torch)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

LEVEL_SCALES = (4.0, 2.0, 1.0, 0.5)
"""Scale of each level against the trunk's grid, finest first (SAM 3: four levels, SAM 3.1: the first three)."""

HEAD_PARTS = (8, 4)
"""The share of d_model, one part in so many, that SAM 2's mask decoder keeps of levels 0 and 1 (conv_s0, conv_s1)."""

ROPE_THETA = 10000.0
"""Base of the rotary frequencies of the published model."""

LARGEST_SIDE = 8 * 1008
"""Largest side in pixels; above it the finest feature map alone passes 5 GB and one head's scores 400 GB."""


LISTS: tuple[tuple[str, Any, str], ...] = (
    ("global_blocks", int, "whole numbers"),
    ("scale_factors", (int, float), "numbers"),
    ("necks", str, "names"),
)
"""Fields that are lists, the type of their values, and what to call it."""


class ConfigError(ValueError):
    """An architecture that cannot be built, or a file that does not describe one."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture of the SAM 3 image encoder; the defaults are the published model.

    Args:
        image_size: height and width in pixels of the input that the encoder is set to; an int means a square.
        patch_size: side of a patch in pixels.
        embed_dim: channels C of a token.
        depth: number of transformer blocks.
        num_heads: attention heads; head_dim is embed_dim / num_heads and a multiple of 4.
        mlp_ratio: hidden channels of the MLP over embed_dim, rounded down.
        window_size: side of an attention window, in patches.
        global_blocks: indices of the blocks that attend over the whole grid.
        pretrain_image_size: side in pixels of the images that the position embedding was trained on.
        layer_norm_eps: epsilon of every LayerNorm.
        rope_theta: base of the rotary frequencies.
        d_model: channels of every feature map and position encoding.
        scale_factors: scale of each level against the grid, finest first.
        necks: names of the necks: `sam3`, `sam2`, or SAM 3.1's `interactive`, `propagation`.
        sam2_head: whether SAM 2's neck comes with the mask decoder's conv_s0 and conv_s1.

    Raises:
        ConfigError: where a value cannot work, saying which and what would.
    """

    image_size: tuple[int, int] = (1008, 1008)
    patch_size: int = 14
    embed_dim: int = 1024
    depth: int = 32
    num_heads: int = 16
    mlp_ratio: float = 4.625
    window_size: int = 24
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)
    pretrain_image_size: int = 336
    layer_norm_eps: float = 1e-5
    rope_theta: float = ROPE_THETA
    d_model: int = 256
    scale_factors: tuple[float, ...] = LEVEL_SCALES
    necks: tuple[str, ...] = ("sam3",)
    sam2_head: bool = False

    def __post_init__(self) -> None:
        for field in ("patch_size", "embed_dim", "depth", "num_heads", "window_size", "pretrain_image_size", "d_model"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field} is {value!r}; it must be a whole number of at least 1")
        for field in ("mlp_ratio", "layer_norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ConfigError(f"{field} is {value!r}; it must be a finite number above 0")
        for field, kind, what in LISTS:
            values = tuple(getattr(self, field))
            if any(not isinstance(value, kind) or isinstance(value, bool) for value in values):
                raise ConfigError(f"{field} is {list(values)!r}; it must be a list of {what}")
            object.__setattr__(self, field, values)
        object.__setattr__(self, "image_size", check_image_size(self.image_size, self.patch_size))
        self._check_together()

    def _check_together(self) -> None:
        if self.embed_dim % self.num_heads or self.head_dim % 4:
            raise ConfigError(
                f"embed_dim {self.embed_dim} divided by num_heads {self.num_heads} gives a head_dim of "
                f"{self.embed_dim / self.num_heads:g}, but the rotary tables need a multiple of 4; change "
                "embed_dim or num_heads in the configuration"
            )
        if self.mlp_hidden < 1:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio:g} with embed_dim {self.embed_dim} gives an MLP without hidden "
                f"channels; set mlp_ratio to at least {1 / self.embed_dim:g} in the configuration"
            )
        if self.pretrain_image_size % self.patch_size:
            raise ConfigError(
                f"pretrain_image_size {self.pretrain_image_size} is not a multiple of patch_size "
                f"{self.patch_size}; correct pretrain_image_size or patch_size in the configuration"
            )
        if self.d_model % 4:
            raise ConfigError(
                f"d_model is {self.d_model}, but the sine position encoding needs a multiple of 4; correct "
                "d_model in the configuration"
            )
        outside = [index for index in self.global_blocks if not 0 <= index < self.depth]
        if outside:
            raise ConfigError(
                f"global_blocks contains {outside}, but the trunk has only blocks 0 to {self.depth - 1}; "
                "remove these numbers from the configuration"
            )
        if not self.necks or not self.scale_factors:
            raise ConfigError(
                "the configuration has an empty list of necks or scale_factors; each of these lists needs at "
                "least one entry"
            )
        if not isinstance(self.sam2_head, bool):
            raise ConfigError(
                f"sam2_head is {self.sam2_head!r}, but it must be true or false; correct it in the configuration"
            )
        if self.sam2_head and ("sam2" not in self.necks or self.d_model % HEAD_PARTS[0]):
            raise ConfigError(
                "sam2_head is true, but a SAM 2 head needs a neck with the name sam2, and d_model must be a multiple "
                f"of {HEAD_PARTS[0]}. The configuration has the necks {', '.join(self.necks)} and d_model "
                f"{self.d_model}. Set sam2_head to false, or correct necks or d_model in the configuration"
            )

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden channels of each MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def pretrain_grid(self) -> int:
        """Side of the trained position embedding, in patches."""
        return self.pretrain_image_size // self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid at `image_size`."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain JSON values; `sam2_head` where it is true, so that older files compare equal."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        return {key: value for key, value in values.items() if key != "sam2_head" or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncoderConfig:
        """Makes a config from JSON values; an unknown key is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"the configuration contains keys that neck-export does not know: {', '.join(unknown)}. Remove each "
                f"unknown key, or correct its spelling. The known keys are {', '.join(sorted(known))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(
                "the field global_blocks, scale_factors or necks in the configuration has a value of the wrong type: "
                f"{error}. Write the value of each of the three fields as a list"
            ) from None

    @classmethod
    def from_file(cls, path: Path) -> EncoderConfig:
        """Reads an encoder.json, or the manifest of an exported file; raises ConfigError naming the file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
            raise ConfigError(
                f"{path}: the file cannot be read as JSON ({error}); check the path, and correct the file"
            ) from None
        if not isinstance(values, dict):
            raise ConfigError(
                f"{path}: the file contains a {type(values).__name__} instead of a JSON object; write the "
                "fields of EncoderConfig as one JSON object"
            )
        values = values.get("onnx_manifest") or values  # a plan's manifest holds its ONNX file's
        if {"model_type", "architectures"} & set(values):
            raise ConfigError(
                f"{path}: this is Hugging Face's config.json, which neck-export reads from the checkpoint's "
                "folder by itself; leave out --config, or pass a JSON file with the fields of EncoderConfig"
            )
        if isinstance(values.get("encoder"), dict):  # a manifest
            values = values["encoder"]
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def exact_ratio(hidden: int, embed_dim: int) -> float:
    """The mlp_ratio that gives exactly these hidden channels in spite of rounding."""
    ratio = hidden / embed_dim
    return ratio if int(embed_dim * ratio) == hidden else (hidden + 0.5) / embed_dim


def check_image_size(size: Any, patch_size: int) -> tuple[int, int]:
    """Returns (height, width) in pixels from an int, (h, w) or [h, w].

    Raises:
        ConfigError: not whole positive multiples of the patch (naming the nearest that are), or absurdly large.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or any(not isinstance(side, int) or isinstance(side, bool) for side in sides):
        raise ConfigError(
            f"the image size {size!r} is invalid; use one whole number of pixels, or a pair (height, width)"
        )
    for side in sides:
        if side < 1:
            raise ConfigError(
                f"the image size {side} is too small; each side needs at least {patch_size} pixels (one patch)"
            )
    if max(sides) > LARGEST_SIDE:
        tokens = (sides[0] // patch_size) * (sides[1] // patch_size)
        raise ConfigError(
            f"the image size {sides[0]}x{sides[1]} exceeds the limit of {LARGEST_SIDE} pixels per side; the "
            f"finest FP32 feature map would need {tokens * 16 * 256 * 4 / 1000000000.0:,.0f} GB, and the "
            f"attention scores of one head {tokens**2 * 4 / 1000000000.0:,.0f} GB"
        )
    for side in sides:
        if side % patch_size:
            below = side // patch_size * patch_size
            nearest = f"{below} and {below + patch_size}" if below else f"{patch_size}"
            raise ConfigError(
                f"the image size {side} is not a multiple of the patch size {patch_size}; use the nearest "
                f"multiple: {nearest}"
            )
    return int(sides[0]), int(sides[1])
