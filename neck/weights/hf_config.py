"""The architecture in Hugging Face's config.json: each of its fields is used, known to change nothing, or refused.

Written for transformers 5.0 to 5.24; tests/data/hf-variant/fields.json lists the fields of its classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from neck.config import ConfigError, EncoderConfig, exact_ratio
from neck.weightfile import CheckpointError

LAYER_NORM_EPS = 1e-6
"""Hugging Face's default; Meta's is 1e-5."""

USED = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "window_size": "window_size",
    "global_attn_indexes": "global_blocks",
    "layer_norm_eps": "layer_norm_eps",
}
"""Entry of the backbone -> our field of the same meaning."""

SQUARES = {"image_size": "image_size", "patch_size": "patch_size", "pretrain_image_size": "pretrain_image_size"}
"""The same where the entry may be a list of two sides."""

CONVERTED = ("intermediate_size", "rope_theta", "rope_parameters")
"""Entries of the backbone that become mlp_ratio and rope_theta."""

FIXED: dict[str, Any] = {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True, "layer_scale_init_value": None}
"""Entries of the backbone that our trunk knows with one value only."""

USED_NECK = {"fpn_hidden_size": "d_model", "scale_factors": "scale_factors"}
"""Entry of the vision config around the backbone -> our field."""

NORMALIZED: dict[str, Any] = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_rescale": True,
}
"""Entries of an image processor as SAM 3 has them."""

IRRELEVANT_NECK = (
    *("backbone_config", "backbone_feature_sizes", "hidden_act", "layer_norm_eps"),
    # from before transformers 5.0, in published files still: no module reads them, kernels have the tensors' size
    *("fpn_kernel_size", "fpn_stride", "num_feature_levels"),
)
"""Entries of the vision config that its modules do not read, or whose own entries are read."""

ROPE_TYPES = ("axial", "default")
"""The rotary table that we have by its names: transformers reads `default` as `axial` in this backbone."""

# fmt: off
IRRELEVANT = frozenset(
    # dropout and initialization are training's; feature sizes follow from the image size
    (
        "attention_dropout", "hidden_dropout", "initializer_range", "initializer_factor", "architectures",
        "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_decoder",
        "is_encoder_decoder", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
        "output_hidden_states", "problem_type", "pruned_heads", "return_dict", "tie_word_embeddings",
        "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache", "use_return_dict",
        "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
        "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
        "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
        "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_scores", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
        "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "typical_p",
    )
)
# fmt: on
"""Entries of every config of transformers, those of text generation in older files included, that change no output."""


def hf_config_file(path: Path) -> Path:
    """The path at which Hugging Face puts the config.json of a checkpoint (a file or a folder)."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_hf_config(file: Path, facts: dict[str, Any]) -> EncoderConfig:
    """The architecture described by a config.json; missing fields have transformers' defaults, SAM 3's values.

    Args:
        file: config.json of a whole model, its vision part or its backbone.
        facts: what the tensors tell; they give what the file leaves out.

    Raises:
        CheckpointError: no such description in it, or a field that our encoder does not have.
    """
    try:
        found = _find_backbone(json.loads(file.read_text(encoding="utf-8")), {})
        if found is None:
            raise CheckpointError(
                f"{file}: the file does not describe a SAM 3 vision backbone; use the config.json of the "
                "checkpoint, or pass the architecture with --config"
            )
        backbone, neck = found
        values = {**_backbone_fields(file, backbone), **_neck_fields(file, neck)}
        return EncoderConfig.from_dict({"layer_norm_eps": LAYER_NORM_EPS, **facts, **values})
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(
            f"{file}: {error}; correct this value in the file, or pass the architecture with --config"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise CheckpointError(
            f"{file}: the file cannot be read as JSON ({error}); download it again, or pass the architecture "
            "with --config"
        ) from None


def _find_backbone(node: object, parent: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first object, at any depth, that describes SAM 3's vision backbone, and the object around it."""
    if not isinstance(node, dict):
        return None
    if node.get("model_type") == "sam3_vit_model" or {"global_attn_indexes", "num_attention_heads"} <= set(node):
        return node, parent
    return next((found for value in node.values() if (found := _find_backbone(value, node)) is not None), None)


def _backbone_fields(file: Path, section: dict[str, Any]) -> dict[str, Any]:
    other = [f"{key} {section[key]!r}" for key, value in FIXED.items() if section.get(key, value) != value]
    if other:
        has = ", ".join(f"{key} {value!r}" for key, value in FIXED.items())
        raise CheckpointError(
            f"{file}: the encoder in this file has {', '.join(other)}, but neck-export supports only {has}; use "
            "another checkpoint"
        )
    _refuse_unknown(file, section, {*USED, *SQUARES, *CONVERTED, *FIXED})
    values = {ours: section[theirs] for theirs, ours in USED.items() if theirs in section}
    values |= {ours: _side(theirs, section[theirs]) for theirs, ours in SQUARES.items() if theirs in section}
    if values.get("global_blocks", ()) is None:
        del values["global_blocks"]  # None is their default
    hidden, dim = section.get("intermediate_size"), values.get("embed_dim")
    if isinstance(hidden, int) and isinstance(dim, int) and hidden > 0 and dim > 0:
        values["mlp_ratio"] = exact_ratio(hidden, dim)
    return values | _theta(section)


def _side(name: str, value: Any) -> Any:
    """One side of a square that is given as a number or as two."""
    if not isinstance(value, list):
        return value
    if len(value) == 2 and value[0] == value[1]:
        return value[0]
    raise ConfigError(
        f"{name} {value!r} is not square, but neck-export supports only a square {name}. Use a checkpoint whose "
        f"config.json has one number, or two equal numbers, as {name}"
    )


def _theta(section: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary frequencies: `rope_parameters` since transformers 5.1, before that `rope_theta`."""
    told = {"rope_theta": section["rope_theta"]} if section.get("rope_theta") is not None else {}
    rope = section.get("rope_parameters")
    if rope is None:
        return told
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_parameters is {rope!r}, but it must be a JSON object")
    kind = rope.get("rope_type", "axial")
    unknown = sorted(key for key, value in rope.items() if key not in ("rope_type", "rope_theta") and value is not None)
    if kind not in ROPE_TYPES or unknown:
        what = f"rope_type {kind!r}" if kind not in ROPE_TYPES else ", ".join(unknown)
        raise ConfigError(
            f"rope_parameters with {what} is not supported; only rope_type 'axial' with rope_theta is supported"
        )
    if rope.get("rope_theta") is None:
        return told
    if told and told["rope_theta"] != rope["rope_theta"]:
        raise ConfigError(
            f"the Hugging Face configuration contains two different values of rope_theta: {told['rope_theta']!r} in "
            f"the entry rope_theta, and {rope['rope_theta']!r} inside the entry rope_parameters. Set rope_theta to the "
            "same value in the two entries"
        )
    return {"rope_theta": rope["rope_theta"]}


def _neck_fields(file: Path, section: dict[str, Any]) -> dict[str, Any]:
    if section.get("model_type") == "sam3_vision_model":
        _refuse_unknown(file, section, {*USED_NECK, *IRRELEVANT_NECK})
    return {ours: section[theirs] for theirs, ours in USED_NECK.items() if section.get(theirs) is not None}


def _refuse_unknown(file: Path, section: dict[str, Any], known: set[str]) -> None:
    unknown = [
        f"{key} {value!r:.40}"
        for key, value in section.items()
        if key not in known and key not in IRRELEVANT and not key.startswith("_") and value is not None
    ]
    if unknown:
        raise CheckpointError(
            f"{file}: the section {section.get('model_type', 'backbone_config')} has fields that neck-export "
            f"does not know: {', '.join(unknown[:8])}.\nIf you are sure that the fields do not change the outputs of "
            "the encoder, remove the fields from the file, or describe the architecture in a JSON file and pass the "
            "JSON file with --config. If the fields change the outputs, neck-export cannot export this encoder"
        )


def image_notes(folder: Path) -> list[str]:
    """Notes about a fine-tune whose images were normalized differently, which no comparison of encoders shows."""
    notes = []
    for name, inner in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            told = told.get(inner, {}) if inner else told
            other = [f"{key} {told[key]!r}" for key, ours in NORMALIZED.items() if told.get(key, ours) != ours]
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # not there, or nothing that can be told
        if other:
            notes.append(
                f"{folder / name}: the file sets {', '.join(other)}; neck-export ignores these values and normalizes "
                "images with mean 0.5 and std 0.5"
            )
    return notes
