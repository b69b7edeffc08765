"""Checkpoint -> encoder: finds the encoder by its keys, checks every tensor, holds the weights once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neck.architecture import check_config, hf_config_file, infer_fields, published_config, read_hf_config
from neck.config import LEVEL_SCALES, ConfigError, EncoderConfig
from neck.keys import BUFFERS, Layout, count_indices, find_layouts
from neck.necks import Sam3DualViTDetNeck, new_encoder
from neck.weightfile import CheckpointError, read_tensors
from neck.weights.copies import chosen_by_prefix, without_copies
from neck.weights.foreign import channels_last, quantised

__all__ = ["CheckpointError", "load_encoder", "random_encoder", "save_meta_checkpoint"]

ARRANGEMENTS = (("sam3",), ("sam3", "sam2"), ("sam3", "interactive", "propagation"))
"""Sets of necks that new_encoder builds, smallest first."""

NOISE_STEP = 1 << 15
"""Values at a time, which stay in the cache: 7 ns a value where all at once take 19."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_encoder(
    path: Path,
    config: EncoderConfig | None = None,
    necks: Sequence[str] | None = None,
    *,
    state: str | None = None,
    prefix: str | None = None,
) -> Sam3DualViTDetNeck:
    """Loads the image encoder from a checkpoint of Meta, Ultralytics or Hugging Face.

    The weights stay in the mapped file where they are float32 and need no concatenation (see read_tensors).

    Args:
        path: .pt, .safetensors, a safetensors index, or the folder of one.
        config: the architecture; None infers it. Its necks are not used, its levels only where their number fits.
        necks: names of the necks to load; None means all. The encoder is the smallest that has them, so it always
            has `sam3`, and all three of SAM 3.1's where one of the others is named.
        state: which state of a training file, as read_state takes it.
        prefix: which encoder of a state that holds several: what stands before `trunk.` or `backbone.`.

    Returns:
        The encoder in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: what is wrong with the file, the tensors or the config, and what to do.
    """
    path = Path(path)
    tensors = read_tensors(path, state)
    layout = _find_layout(path, tensors, prefix)
    for problem in (
        quantised(tensors, (layout.trunk, *layout.necks.values())),
        channels_last(tensors, layout.keys("trunk.patch_embed.proj.weight")),
    ):
        if problem:
            raise CheckpointError(f"{path}: {problem}")
    arrangement = _choose_necks(path, layout, necks)
    facts = infer_fields(layout, arrangement, tensors)
    said_by = "--config"
    if config is None and layout.source == "hf" and (file := hf_config_file(path)).is_file():
        config, said_by = read_hf_config(file, facts), file.name
    if config is not None:
        check_config(path, layout, config, said_by, facts)

    levels = max(count_indices(tensors, layout.necks[neck]) for neck in arrangement)
    scales = config.scale_factors if config and len(config.scale_factors) == levels else LEVEL_SCALES[:levels]
    try:
        # what the shapes do not tell changes no shape, so the file is judged before more is asked for
        outline = {"num_heads": 1, "window_size": 1, "global_blocks": (), "image_size": facts.get("patch_size", 14)}
        parts: dict[str, Any] = {"necks": arrangement, "scale_factors": scales}
        wanted = _skeleton(EncoderConfig(**{**facts, **outline, **parts})).state_dict()
        _check_tensors(path, layout, arrangement, tensors, wanted)
        config = config or published_config(path, layout, facts)
        encoder = _skeleton(dataclasses.replace(config, **parts))
    except (ConfigError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    encoder.load_state_dict(_convert(path, layout, tensors, list(wanted)), assign=True)
    return encoder.requires_grad_(False).eval()


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
        raise CheckpointError(f"{path}: holds more than one encoder ({found}); choose by --prefix")
    if layouts:
        what = f"a trunk ({layouts[0].trunk}*) but no SAM 3 neck beside it"
    else:
        what = f"no SAM 3 image encoder among its {len(tensors)} tensors ({_listing(tensors, 3)})"
    raise CheckpointError(
        f"{path}: {what}; a checkpoint of another model? Expected trunk.* and convs.* (Meta, Ultralytics) or "
        "backbone.* and neck.fpn_layers.* (Hugging Face), under any prefix"
    )


def _choose_necks(path: Path, layout: Layout, necks: Sequence[str] | None) -> tuple[str, ...]:
    has, asked = set(layout.necks), set(layout.necks if necks is None else necks)
    if asked - has:
        lacking = ", ".join(sorted(asked - has))
        raise CheckpointError(
            f"{path}: asked for neck {lacking}, but the checkpoint has {', '.join(layout.necks)} only"
        )
    for arrangement in ARRANGEMENTS:
        if asked <= set(arrangement) <= has:
            return arrangement
    raise CheckpointError(
        f"{path}: cannot load necks {', '.join(sorted(asked))} of a checkpoint that has {', '.join(layout.necks)}; "
        f"known sets are {'; '.join(', '.join(arrangement) for arrangement in ARRANGEMENTS)}"
    )


def _skeleton(config: EncoderConfig) -> Sam3DualViTDetNeck:
    """The encoder with rotary tables and without memory for weights."""
    with torch.device("meta"):
        return new_encoder(config)


def _check_tensors(
    path: Path, layout: Layout, arrangement: Sequence[str], tensors: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    """Raises an error that lists what is missing, unknown, misshapen or not a plain float tensor."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, ours in wanted.items():
        expected.update(layout.shapes(name, tuple(ours.shape)))
    there = {key: tensors[key] for key in expected if key in tensors}
    inside = (layout.trunk, *(layout.necks[neck] for neck in arrangement))
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "not known in a SAM 3 encoder (adapters must be merged first)": [
            key for key in tensors if key.startswith(inside) and key not in expected and not BUFFERS.search(key)
        ],
        "misshapen": [
            f"{key} is {tuple(tensor.shape)}, expected {expected[key]}"
            for key, tensor in there.items()
            if tuple(tensor.shape) != expected[key]
        ],
        "not plain float32, float16, bfloat16 or float64 tensors (quantised?)": [
            f"{key} is {tensor.dtype}"
            for key, tensor in there.items()
            if tensor.dtype not in DTYPES or tensor.layout is not torch.strided or tensor.is_meta
        ],
    }
    for problem, items in problems.items():
        if items:
            raise CheckpointError(f"{path}: {len(items)} of the encoder's tensors {problem}: {_listing(items)}")


def _convert(path: Path, layout: Layout, tensors: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Our state dict out of the checkpoint's tensors, which are dropped as they are used."""
    converted, bad = {}, []
    for name in names:
        keys = layout.keys(name)
        parts = [tensors.pop(key).to(torch.float32) for key in keys]
        # min and max carry NaN and infinity, at the speed of memory; isfinite takes 28 times as long (torch 2.13)
        bad += [key for key, part in zip(keys, parts, strict=True) if not _is_finite(part)]
        if layout.source == "hf" and name == "trunk.pos_embed":
            parts = [torch.cat((torch.zeros_like(parts[0][:, :1]), parts[0]), dim=1)]  # the class-token row
        converted[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinity in {len(bad)} of the encoder's tensors: {_listing(bad)}; use a sound checkpoint"
        )
    return converted


def _is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def _listing(items: Iterable[str], most: int = 8) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def even_noise(seed: Sequence[int], count: int, mean: float, std: float) -> np.ndarray:
    """Bell-shaped noise that is the same bits everywhere: float32 (count,), within 3.5 deviations of the mean.

    Each value is the sum of four 16-bit integers, so that nothing is rounded but by IEEE 754's own operations. Torch's
    normal_ takes logarithms and cosines, which AVX2 and AVX-512 round differently (2.13); numpy keeps SFC64's stream.
    """
    stream, values = np.random.SFC64(np.random.SeedSequence(list(seed))), np.empty(count, np.float32)
    low, shift = np.uint64(0x0000FFFF0000FFFF), np.uint64(16)
    for part in np.split(values, range(NOISE_STEP, count, NOISE_STEP)):
        drawn = stream.random_raw(part.size)
        halves = (drawn >> shift) & low
        halves += drawn & low
        pairs = halves.view(np.uint32).reshape(-1, 2)
        part[:] = pairs[:, 0] + pairs[:, 1]
        part -= np.float32(2 * 0xFFFF)
        part *= np.float32(std / math.sqrt((0x10000**2 - 1) / 3))
        part += np.float32(mean)
    return values


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
        prefix: what to put before every name.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": {prefix + name: tensor for name, tensor in encoder.state_dict().items()}}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
