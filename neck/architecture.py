"""The architecture of a checkpoint: from its tensors' shapes, Hugging Face's config.json, or the published values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from neck.config import LEVEL_SCALES, ConfigError, EncoderConfig
from neck.keys import NECK_MODULES, Layout, count_indices
from neck.weightfile import CheckpointError

DEFAULT_EPS = {"meta": 1e-5, "hf": 1e-6}

UNTOLD = ("num_heads", "window_size", "global_blocks", "image_size")
"""Fields that no tensor's shape tells."""

PUBLISHED = ("embed_dim", "depth", "patch_size", "pretrain_image_size")
"""Fields that, all equal to SAM 3's, mark the published architecture."""

TELLTALES = {
    "embed_dim": "trunk.ln_pre.weight",
    "d_model": "convs.0.conv_1x1.bias",
    "patch_size": "trunk.patch_embed.proj.weight",
    "pretrain_image_size": "trunk.pos_embed",
    "mlp_ratio": "trunk.blocks.0.mlp.fc1.bias",
}
"""A tensor whose shape tells the field."""

HF_FIELDS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "window_size": "window_size",
    "global_attn_indexes": "global_blocks",
    "pretrain_image_size": "pretrain_image_size",
    "layer_norm_eps": "layer_norm_eps",
}
"""Entry of the vision backbone in Hugging Face's config.json -> our field."""

HF_FIXED = {"hidden_act": "gelu", "rope_theta": 10000.0}
"""Entries of the same that our trunk knows with one value only."""


def infer_fields(layout: Layout, arrangement: Sequence[str], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The config's fields that the shapes tell; by majority, so that one bad tensor is found and not believed."""
    depth = count_indices(tensors, layout.blocks)
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
    tokens = (side(["trunk.pos_embed"], 1) or 0) - (layout.source == "meta")  # Meta keeps the class-token row
    if patch_size and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
        facts["pretrain_image_size"] = math.isqrt(tokens) * patch_size
    told: dict[str, Any] = {field: value for field, value in facts.items() if value is not None}
    hidden = side([f"trunk.blocks.{block}.mlp.fc1.bias" for block in range(depth)], 0)
    if hidden and told.get("embed_dim"):
        ratio = hidden / told["embed_dim"]
        told["mlp_ratio"] = ratio if int(told["embed_dim"] * ratio) == hidden else (hidden + 0.5) / told["embed_dim"]
    return told


def hf_config_file(path: Path) -> Path:
    """Where Hugging Face puts the config.json of a checkpoint (a file or a folder)."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_hf_config(file: Path, facts: dict[str, Any]) -> EncoderConfig:
    """The architecture that Hugging Face's config.json gives; what it leaves out has their default, SAM 3's value."""
    try:
        section = _find_backbone(json.loads(file.read_text(encoding="utf-8")))
        if section is None:
            raise CheckpointError(f"{file}: describes no SAM 3 vision backbone; pass --config, or correct the file")
        other = [f"{key} {section[key]!r}" for key, value in HF_FIXED.items() if section.get(key, value) != value]
        if other:
            raise CheckpointError(f"{file}: {', '.join(other)} is not supported; the encoder has {HF_FIXED}")
        values = {ours: section[theirs] for theirs, ours in HF_FIELDS.items() if theirs in section}
        return EncoderConfig.from_dict({"layer_norm_eps": DEFAULT_EPS["hf"], **facts, **values})
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error}); pass --config, or correct it") from None
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}; pass --config, or correct it") from None


def _find_backbone(node: object) -> dict[str, Any] | None:
    """The first object, at any depth, that describes SAM 3's vision backbone."""
    if not isinstance(node, dict):
        return None
    if node.get("model_type") == "sam3_vit_model" or {"global_attn_indexes", "num_attention_heads"} <= set(node):
        return node
    return next((found for value in node.values() if (found := _find_backbone(value)) is not None), None)


def check_config(path: Path, layout: Layout, config: EncoderConfig, said_by: str, facts: dict[str, Any]) -> None:
    """Raises an error that lists where a config contradicts the tensors, naming a tensor for each."""
    said = {field: getattr(config, field) for field in facts}
    has = dict(facts)
    if "mlp_ratio" in facts:  # a ratio is only as exact as the channels that it gives
        said["mlp_ratio"], has["mlp_ratio"] = config.mlp_hidden, int(facts.get("embed_dim", 0) * facts["mlp_ratio"])
    wrong = []
    for field in facts:
        # these two are products: where the factor is wrong, so are they
        blamed = {"mlp_ratio": "embed_dim", "pretrain_image_size": "patch_size"}.get(field)
        if said[field] == has[field] or (blamed and said.get(blamed) != has.get(blamed)):
            continue
        what = "hidden channels (embed_dim * mlp_ratio)" if field == "mlp_ratio" else field
        where = f" ({layout.keys(TELLTALES[field])[0]})" if field in TELLTALES else ""
        wrong.append(f"{what} {said[field]}, checkpoint has {has[field]}{where}")
    if wrong:
        raise CheckpointError(f"{path}: {said_by} contradicts the tensors: it says {'; it says '.join(wrong)}")


def published_config(path: Path, layout: Layout, facts: dict[str, Any]) -> EncoderConfig:
    """SAM 3's own values for what the shapes do not tell, if the rest is SAM 3's."""
    known = {"layer_norm_eps": DEFAULT_EPS[layout.source], **facts}
    published = EncoderConfig()
    if all(facts.get(field) == getattr(published, field) for field in PUBLISHED):
        return EncoderConfig(**known)
    template = ", ".join(f'"{field}": {value}' for field, value in {**known, **dict.fromkeys(UNTOLD, "?")}.items())
    raise CheckpointError(
        f"{path}: not the published architecture, and its tensors do not tell {', '.join(UNTOLD)};\n"
        f"pass --config with a JSON file, filling in: {{{template}}}"
    )
