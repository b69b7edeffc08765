"""The architecture of a checkpoint as its tensors' shapes tell it, what contradicts them, and the published values."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from neck.checkpoint_keys import NECK_MODULES, Layout, count_indices, listing
from neck.config import LEVEL_SCALES, EncoderConfig, exact_ratio
from neck.weightfile import CheckpointError
from neck.weights.hf_config import LAYER_NORM_EPS

DEFAULT_EPS = {"meta": 1e-5, "hf": LAYER_NORM_EPS}

UNTOLD = ("num_heads", "window_size", "global_blocks", "image_size")
"""Fields that no tensor's shape tells."""

PUBLISHED = ("embed_dim", "depth", "patch_size", "pretrain_image_size")
"""Fields that, all equal to SAM 3's, mark the published architecture."""

TELLTALES = {
    "embed_dim": "trunk.ln_pre.weight",
    "patch_size": "trunk.patch_embed.proj.weight",
    "pretrain_image_size": "trunk.pos_embed",
    "mlp_ratio": "trunk.blocks.0.mlp.fc1.bias",
}
"""A tensor whose shape tells the field; d_model is told by any neck."""


def with_class_row(layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """The layout, completed by the length of its position embedding: n * n rows, or one more for the class token.

    Meta keeps that row and Hugging Face drops it, but either file may have been saved by the other's rule.
    """
    position = tensors.get(layout.keys("trunk.pos_embed")[0])
    rows = position.shape[1] if position is not None and position.dim() > 1 else 0
    squares = {offset: rows - offset > 0 and math.isqrt(rows - offset) ** 2 == rows - offset for offset in (0, 1)}
    class_row = squares[1] if squares[0] != squares[1] else layout.source == "meta"
    return dataclasses.replace(layout, class_row=class_row)


def infer_fields(layout: Layout, arrangement: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config's fields that the shapes tell; by majority, so that one bad tensor is found and not believed."""
    depth = len(layout.indices)
    convs = [NECK_MODULES[neck] for neck in arrangement]

    def side(names: Iterable[str], dim: int) -> int | None:
        shapes = [tensors[key].shape for name in names for key in layout.keys(name) if key in tensors]
        votes = Counter(shape[dim] for shape in shapes if len(shape) > dim)
        return votes.most_common(1)[0][0] if votes else None

    norms = [f"trunk.blocks.{block}.{norm}.weight" for block in range(depth) for norm in ("norm1", "norm2")]
    patch_size = side(["trunk.patch_embed.proj.weight"], 2)
    facts = {
        "embed_dim": side(["trunk.ln_pre.weight", "trunk.ln_pre.bias", *norms], 0),
        "depth": depth,
        "d_model": side([f"{neck}.{level}.conv_1x1.bias" for neck in convs for level in range(len(LEVEL_SCALES))], 0),
        "patch_size": patch_size,
    }
    tokens = (side(["trunk.pos_embed"], 1) or 0) - layout.class_row
    if patch_size and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
        facts["pretrain_image_size"] = math.isqrt(tokens) * patch_size
    told: dict[str, Any] = {field: value for field, value in facts.items() if value is not None}
    hidden = side([f"trunk.blocks.{block}.mlp.fc1.bias" for block in range(depth)], 0)
    if hidden and told.get("embed_dim"):
        told["mlp_ratio"] = exact_ratio(hidden, told["embed_dim"])
    return told


def check_config(path: Path, layout: Layout, config: EncoderConfig, said_by: str, facts: dict[str, Any]) -> None:
    """Raises an error that lists where a config contradicts the tensors, naming a tensor for each."""
    said = {field: getattr(config, field) for field in facts}
    has = dict(facts)
    if "mlp_ratio" in facts:  # a ratio is only as exact as the channels that it gives
        said["mlp_ratio"], has["mlp_ratio"] = config.mlp_hidden, int(facts.get("embed_dim", 0) * facts["mlp_ratio"])
    tells = {**TELLTALES, "d_model": f"{NECK_MODULES[next(iter(layout.necks))]}.0.conv_1x1.bias"}
    wrong = []
    for field in facts:
        # these two are products: where the factor is wrong, so are they
        blamed = {"mlp_ratio": "embed_dim", "pretrain_image_size": "patch_size"}.get(field)
        if said[field] == has[field] or (blamed and said.get(blamed) != has.get(blamed)):
            continue
        what = "hidden channels (embed_dim * mlp_ratio)" if field == "mlp_ratio" else field
        where = f" ({layout.keys(tells[field])[0]})" if field in tells else ""
        if field == "depth" and layout.gaps:
            where = f" (blocks {listing(map(str, layout.gaps))} are missing in the checkpoint)"
        wrong.append(f"{what} is {said[field]}, but the checkpoint has {has[field]}{where}")
    if wrong:
        raise CheckpointError(
            f"{path}: the configuration from {said_by} contradicts the shapes of the checkpoint's tensors: "
            f"{'; '.join(wrong)}; correct these values in the configuration, or pass another file with --config"
        )


def published_config(path: Path, layout: Layout, facts: dict[str, Any]) -> EncoderConfig:
    """SAM 3's own values for what the shapes do not determine, if everything else matches SAM 3."""
    known = {"layer_norm_eps": DEFAULT_EPS[layout.source], **facts}
    published = EncoderConfig()
    if all(facts.get(field) == getattr(published, field) for field in PUBLISHED):
        return EncoderConfig(**known)
    template = ", ".join(f'"{field}": {value}' for field, value in {**known, **dict.fromkeys(UNTOLD, "?")}.items())
    raise CheckpointError(
        f"{path}: the encoder does not have SAM 3's published architecture, and the shapes of its tensors do "
        f"not determine {', '.join(UNTOLD)}.\nWrite a JSON file with the following content, replace each ? by "
        f"the value, and pass the file with --config: {{{template}}}"
    )


def level_scales(
    path: Path, layout: Layout, necks: Sequence[str], tensors: dict[str, Tensor], config: EncoderConfig | None
) -> tuple[float, ...]:
    """The scale of each level that the necks have."""
    levels = max(count_indices(tensors, layout.necks[neck]) for neck in necks)
    if config is None or config.scale_factors == LEVEL_SCALES:
        return LEVEL_SCALES[:levels]  # a file of SAM 3.1 has three
    if len(config.scale_factors) != levels:
        given = ", ".join(f"{scale:g}" for scale in config.scale_factors)
        raise CheckpointError(
            f"{path}: the configuration has {given} as scale_factors, but the encoder in the checkpoint has "
            f"{levels} levels; list one scale factor for each level"
        )
    return config.scale_factors


def with_trained_size(
    path: Path, config: EncoderConfig, trained: int | None, given: bool, notes: list[str]
) -> EncoderConfig:
    """The config at the size that the rotary tables were made for, where no config was given; else that size is said.

    Args:
        path: the checkpoint.
        config: the architecture.
        trained: the side in pixels that the tables of the global blocks tell, if there are any.
        given: whether a file says the config's image size.
        notes: takes the line for the user.
    """
    if not trained or config.image_size == (trained, trained):
        return config
    if given:
        notes.append(
            f"{path}: the rotary tables in the checkpoint were made for images of {trained}x{trained} pixels, but the "
            f"configuration sets an image size of {config.image_size[0]}x{config.image_size[1]} pixels. neck-export "
            "uses the image size of the configuration"
        )
        return config
    notes.append(
        f"{path}: the rotary tables in the checkpoint were made for images of {trained}x{trained} pixels. neck-export "
        f"uses {trained}x{trained} as the image size, unless --image-size sets another size"
    )
    return dataclasses.replace(config, image_size=(trained, trained))
