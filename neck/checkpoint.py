"""Checkpoint -> encoder: finds the encoder by its keys, checks every tensor, holds the weights once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neck.architecture import (
    check_config,
    infer_fields,
    level_scales,
    published_config,
    with_class_row,
    with_trained_size,
)
from neck.checkpoint_keys import META_DECODER, NECK_MODULES, Layout, find_layouts, listing
from neck.config import ConfigError, EncoderConfig
from neck.necks import Sam3DualViTDetNeck, new_encoder
from neck.random_noise import even_noise
from neck.source import Choose, EncoderSource, Loaded, Origin
from neck.weightfile import CheckpointError, read_state
from neck.weights.adapters import check_base, find_adapter
from neck.weights.hf_config import hf_config_file, image_notes, read_hf_config
from neck.weights.mask_decoder import with_decoder
from neck.weights.merging import Changes, merge, merge_notes, plan_changes
from neck.weights.not_checkpoints import channels_last, quantized, shard_of
from neck.weights.rotary_tables import check_tables, is_table
from neck.weights.several_encoders import chosen_by_prefix, without_copies

__all__ = ["CheckpointError", "load_encoder", "random_encoder", "read_checkpoint", "save_meta_checkpoint"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_encoder(
    path: Path,
    config: EncoderConfig | None = None,
    necks: Sequence[str] | Choose | None = None,
    *,
    sam2_head: bool = False,
    state: str | None = None,
    prefix: str | None = None,
    adapter: Path | None = None,
    adapter_alpha: float | None = None,
    notes: list[str] | None = None,
) -> Sam3DualViTDetNeck:
    """Loads the image encoder from a checkpoint of Meta, Ultralytics or Hugging Face.

    Args:
        path, config, state, prefix, adapter, adapter_alpha: as in EncoderSource.
        necks, sam2_head: as in EncoderSource.load.
        notes: takes what the user should know: what was merged or ignored, and another size than was trained.

    Returns:
        The encoder in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: what is wrong with the file, the tensors, the config or the adapter, and what to do.
    """
    source = EncoderSource(Path(path), 0, state, prefix, adapter, adapter_alpha, config)
    loaded = source.load(necks, sam2_head=sam2_head)
    if notes is not None:
        notes += loaded.notes
    return loaded.encoder


def read_checkpoint(
    source: EncoderSource, necks: Sequence[str] | Choose | None = None, *, sam2_head: bool = False
) -> Loaded:
    """Loads the image encoder from a checkpoint of Meta, Ultralytics or Hugging Face; see EncoderSource.load.

    The weights stay in the mapped file where they are float32 and need no concatenation (see read_state). The config's
    necks are not used, its levels only where their number fits. Necks that are not loaded need not be whole. The class
    is Sam3DualViTDetNeck for sam3 and sam3 + sam2, else a subclass.
    """
    assert source.path is not None
    try:
        return _read(source.path, source, necks, sam2_head)
    except CheckpointError as error:
        shard = shard_of(source.path)  # its name may tell that it is one of several
        raise CheckpointError(f"{error}; {shard}" if shard else str(error)) from None


def _read(path: Path, source: EncoderSource, necks: Sequence[str] | Choose | None, sam2_head: bool) -> Loaded:
    config, notes = source.config, list[str]()
    check_base(path)
    read = read_state(path, source.state)
    tensors, lora = find_adapter(path, read.tensors, source.adapter, source.alpha)
    layout = with_class_row(_find_layout(path, tensors, source.prefix), tensors)
    for problem in (
        quantized(tensors, (layout.trunk, *layout.necks.values())),
        channels_last(tensors, layout.keys("trunk.patch_embed.proj.weight")),
    ):
        if problem:
            raise CheckpointError(f"{path}: {problem}")
    chosen = _choose_necks(path, layout, necks)
    if sam2_head and "sam2" in chosen:
        layout = with_decoder(path, layout, tensors)
    facts = infer_fields(layout, chosen, tensors)
    said_by = "--config"
    if layout.source == "hf":
        file = hf_config_file(path)
        if config is None and file.is_file():
            config, said_by = read_hf_config(file, facts), file.name
        elif config is None:
            notes.append(
                f"{path}: the checkpoint's folder contains no {file.name}, so the number of heads, the window "
                "size, the rotary theta and the LayerNorm epsilon are assumed to be those of SAM 3"
            )
        notes += image_notes(file.parent)
    if config is not None:
        check_config(path, layout, config, said_by, facts)
    if layout.gaps and config is None:
        raise CheckpointError(
            f"{path}: the checkpoint does not contain blocks {listing(map(str, layout.gaps))} of the trunk; "
            "if they were pruned, describe the remaining architecture in a JSON file and pass it with --config"
        )
    try:
        parts: dict[str, Any] = {"necks": chosen, "sam2_head": sam2_head}
        parts["scale_factors"] = level_scales(path, layout, chosen, tensors, config)
        # what the shapes do not tell changes no shape, so the file is judged before more is asked for
        outline = {"num_heads": 1, "window_size": 1, "global_blocks": (), "image_size": facts.get("patch_size", 14)}
        drawn = dataclasses.replace(config or EncoderConfig(**{**facts, **outline}), **parts)
        encoder = _skeleton(drawn)
        wanted = encoder.state_dict()
        expected = _check_tensors(path, layout, chosen, tensors, wanted)
        given = config is not None
        config = config or published_config(path, layout, facts)
        config = with_trained_size(path, config, check_tables(path, layout, tensors, config), given, notes)
        if (config := dataclasses.replace(config, **parts)) != drawn:
            encoder = _skeleton(config)
    except (ConfigError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    changes: Changes = {}
    if lora is not None:
        changes, ignored = plan_changes(path, lora, layout, chosen, expected)
        notes += merge_notes(lora, changes, ignored)
    if layout.gaps:
        notes.append(
            f"{path}: some blocks of the trunk are missing; the remaining blocks "
            f"({listing(map(str, layout.indices), 40)}) get the numbers 0 to {config.depth - 1}"
        )
    encoder.load_state_dict(_convert(path, layout, tensors, list(wanted), changes, notes), assign=True)
    origin = Origin(source, read.files, read.name, read.others)
    return Loaded(encoder.requires_grad_(False).eval(), origin, tuple(notes))


def _find_layout(path: Path, tensors: dict[str, Tensor], prefix: str | None) -> Layout:
    layouts = find_layouts(tensors)
    complete = [layout for layout in layouts if layout.necks]
    if prefix is not None:
        complete = chosen_by_prefix(path, complete, prefix)
    complete = without_copies(complete, tensors)
    if len(complete) == 1:
        return complete[0]
    if complete:
        found = " and ".join(f"{layout.trunk}* with {', '.join(layout.necks.values())}*" for layout in complete)
        raise CheckpointError(
            f"{path}: the checkpoint contains several encoders ({found}); choose one of them with --prefix"
        )
    if layouts:
        what = f"the checkpoint contains a trunk (tensors {layouts[0].trunk}*) but no SAM 3 neck"
    else:
        what = f"the checkpoint contains {len(tensors)} tensors ({listing(tensors, 3)}), but no SAM 3 image encoder"
    raise CheckpointError(
        f"{path}: {what}; check that this is a SAM 3 checkpoint. Its tensors must be named trunk.* and "
        "convs.* (Meta, Ultralytics) or backbone.* and neck.fpn_layers.* (Hugging Face); any prefix is allowed"
    )


def _choose_necks(path: Path, layout: Layout, necks: Sequence[str] | Choose | None) -> tuple[str, ...]:
    """The necks to load, in the order of NECK_MODULES."""
    asked = set(layout.necks if necks is None else necks(tuple(layout.necks)) if callable(necks) else necks)
    if asked - set(layout.necks):
        lacking = ", ".join(sorted(asked - set(layout.necks)))
        raise CheckpointError(
            f"{path}: the neck {lacking} was requested, but the checkpoint contains only the necks "
            f"{', '.join(layout.necks)}; choose one of them with --neck"
        )
    return tuple(neck for neck in NECK_MODULES if neck in asked)


def _skeleton(config: EncoderConfig) -> Sam3DualViTDetNeck:
    """The encoder with rotary tables and without memory for weights."""
    with torch.device("meta"):
        return new_encoder(config)


def _check_tensors(
    path: Path, layout: Layout, necks: Sequence[str], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each key; lists in an error what is missing, unknown, misshapen or not a plain float."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, ours in wanted.items():
        expected.update(layout.shapes(name, tuple(ours.shape)))
    there = {key: tensors[key] for key in expected if key in tensors}
    problems = {
        "tensors are missing": [key for key in expected if key not in tensors],
        "tensors do not belong to a SAM 3 encoder (if these tensors are a LoRA adapter, merge the adapter first)": [
            key
            for key in tensors
            if layout.has_inside(key, necks) and key not in expected and not is_table(layout, key)
        ],
        "tensors have the wrong shape": [
            f"{key} has the shape {tuple(tensor.shape)} instead of {expected[key]}"
            for key, tensor in there.items()
            if tuple(tensor.shape) != expected[key]
        ],
        "tensors have a type or layout that neck-export cannot read, for example because the tensors are quantized. "
        "Use a checkpoint with dense tensors of type float32, float16, bfloat16 or float64. Unsupported tensors": [
            f"{key} has the type {tensor.dtype}"
            for key, tensor in there.items()
            if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta
        ],
    }
    for problem, items in problems.items():
        if items:
            raise CheckpointError(f"{path}: {len(items)} of the encoder's {problem}: {listing(items)}")
    return expected


def _convert(
    path: Path, layout: Layout, tensors: dict[str, Tensor], names: Sequence[str], changes: Changes, notes: list[str]
) -> dict[str, Tensor]:
    """Our state dict out of the checkpoint's tensors, which are dropped as they are used."""
    converted, bad, constant = {}, [], []
    for name in names:
        keys = layout.keys(name)
        parts = [tensors.pop(key).to(torch.float32) for key in keys]
        parts = [merge(part, changes[key]) if key in changes else part for key, part in zip(keys, parts, strict=True)]
        for key, part in zip(keys, parts, strict=True):
            # min and max carry NaN and infinity, at the speed of memory; isfinite takes 28 times as long (torch 2.13)
            low, high = (float(bound) for bound in torch.aminmax(part))
            if not (math.isfinite(low) and math.isfinite(high)):
                bad.append(key)
            elif low == high and part.dim() > 1:
                constant.append(key)
        if name == "trunk.pos_embed" and not layout.class_row:
            parts = [torch.cat((torch.zeros_like(parts[0][:, :1]), parts[0]), dim=1)]  # the class-token row
        converted[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if bad:
        raise CheckpointError(
            f"{path}: {len(bad)} of the encoder's tensors contain NaN or infinity: {listing(bad)}; use a "
            "checkpoint with finite weights"
        )
    if constant:
        notes.append(
            f"{path}: all values within each of these tensors are equal: {listing(constant)}; the download "
            "may be incomplete, or the encoder was never trained"
        )
    return converted


def random_encoder(config: EncoderConfig, seed: int = 0) -> Sam3DualViTDetNeck:
    """Makes an encoder with seeded random weights whose activations stay of order 1 to 10 through all blocks.

    Args:
        config: the architecture.
        seed: the same seed gives the same bits on any machine (`even_noise`), on any number of threads.
    """
    encoder = _skeleton(config)
    shapes = [(name, tuple(ours.shape)) for name, ours in encoder.state_dict().items()]

    def draw(index: int) -> Tensor:
        name, shape = shapes[index]
        mean, std = 0.0, 0.05
        if name.endswith("pos_embed"):
            std = 0.2
        elif len(shape) == 1 and name.endswith("weight"):
            mean, std = 1.0, 0.1  # LayerNorm
        elif len(shape) > 1:
            # a transposed 2x2 convolution of stride 2 sums over its inputs alone
            std = 1 / math.sqrt(shape[0] if "dconv" in name else math.prod(shape[1:]))
        return torch.from_numpy(even_noise((seed, index), math.prod(shape), mean, std)).view(shape)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # one generator fills on one core only
        weights = threads.map(draw, range(len(shapes)))
        encoder.load_state_dict({name: weight for (name, _), weight in zip(shapes, weights, strict=True)}, assign=True)
    return encoder.requires_grad_(False).eval()


def save_meta_checkpoint(encoder: nn.Module, path: Path, prefix: str = "detector.backbone.vision_backbone.") -> None:
    """Writes the encoder as Meta does: a .pt of {"model": {prefix + name: tensor}}.

    Args:
        encoder: the module whose state dict is written.
        path: the file; it is replaced whole, so that an encoder mapped from it keeps its weights.
        prefix: what to put before every name but the mask decoder's.
    """

    def key(name: str) -> str:
        top, _, rest = name.partition(".")
        return META_DECODER + rest if top == "sam2_head" else prefix + name

    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": {key(name): tensor for name, tensor in encoder.state_dict().items()}}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
