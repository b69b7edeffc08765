"""What the trunk's linear layers read on real images: kept in a file, it is what every range is chosen by."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import torch
import torch.utils.hooks
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export.contract.atomic import replacing
from export.contract.signature import Signature
from export.lowering.quantize import RESULT
from export.verification.verify import reference_pixels
from neck.images import ImageFolder, find_images, load_images, normalize
from neck.necks import Sam3DualViTDetNeck
from neck.progress import counted
from neck.trunk import Attention

ROWS = 64
"""Tokens of each layer that are kept, of all images together: 64 MB at full size."""

FEWEST, MOST = 8, 16
"""Images of a folder that are read: fewer than 8 say little, and one takes 40 s at 1008 on 2 cores."""


FORMAT, OLDEST_FORMAT = 3, 2
"""Version of the file; 1 did not record the architecture, 2 had no attentions and serves for products alone."""

REPAIR = "delete the calibration file to calibrate again, or pass another file with --calibration"
"""What helps against a file that cannot be used."""

METADATA = "neck_export_calibration"
FIELDS = ("rows", "weights", "channels")
PARTS = ("query", "key", "value")

NOT_OF_THE_TRUNK = ("image_size", "d_model", "scale_factors", "necks", "sam2_head")
"""Fields of EncoderConfig that change nothing of what the trunk's layers read; the image size is recorded apart."""


class CalibrationError(ValueError):
    """Images that tell no range, or a calibration file that is damaged."""


class OutdatedError(CalibrationError):
    """A calibration of another encoder or image size, which is made again."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The input of one linear layer.

    Attributes:
        rows: (R, K) tokens: those with the largest values of each image, and others by chance.
        weights: (R,) how many tokens each stands for.
        channels: (K,) the largest magnitude of each channel, of all tokens.
    """

    rows: Tensor
    weights: Tensor
    channels: Tensor

    @property
    def largest(self) -> float:
        """The largest magnitude of all tokens."""
        return float(self.channels.amax())


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What was seen.

    Attributes:
        images, image_size: how many images, and their height and width.
        encoder: fingerprint of the trunk.
        layers: inputs of the linear layers by path.
        attentions: what the attentions multiplied, by name and part: `trunk.blocks.0.attn.attention.query`.
        results: results of `mlp.fc1` before the bias, by path.
    """

    images: int
    image_size: tuple[int, int]
    encoder: str
    layers: dict[str, Layer]
    attentions: dict[str, Layer] = dataclasses.field(default_factory=dict)
    results: dict[str, Layer] = dataclasses.field(default_factory=dict)


def linear_layers(encoder: Sam3DualViTDetNeck) -> dict[str, nn.Linear]:
    """The trunk's linear layers by path, in the order of computation."""
    return {name: module for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}


def attention_layers(encoder: Sam3DualViTDetNeck) -> dict[str, Attention]:
    """The trunk's attentions by the names that `--quantize` takes, in the order of computation."""
    return {f"{name}.attention": module for name, module in encoder.named_modules() if isinstance(module, Attention)}


def result_layers(encoder: Sam3DualViTDetNeck) -> dict[str, nn.Linear]:
    """The linear layers whose results may be written as codes: those with the largest results, by path."""
    return {name: layer for name, layer in linear_layers(encoder).items() if name.endswith(".mlp.fc1")}


def calibration_pixels(signature: Signature, images: Path | ImageFolder | None, notes: list[str]) -> np.ndarray:
    """Images to calibrate on, uint8 (B, H, W, 3); without a folder the shipped one, and a note of what it is worth.

    Raises:
        CalibrationError: too few, or one of a single color.
        ImageError: one that cannot be read.
    """
    if images is None:
        notes.append(
            "the calibration used only the image that comes with neck-export, so activations that are larger with "
            f"your own images will be clipped; use --images to pass a folder of {FEWEST} or more of your images"
        )
        return reference_pixels(signature, None, 1)
    folder = ImageFolder.of(images)
    paths = find_images(folder.path)[:MOST]
    if len(paths) < FEWEST:
        raise CalibrationError(
            f"{folder.path}: the folder contains {len(paths)} images, but the calibration needs at least "
            f"{FEWEST}; add images or choose another folder"
        )
    pixels = load_images(paths, signature.image_size, folder.value_range, notes.append)
    for path, image in zip(paths, pixels, strict=True):
        if image.min() == image.max():
            raise CalibrationError(
                f"{path}: all pixels of this image have the same color, so it cannot be used for the "
                "calibration; remove it from the folder"
            )
    return pixels


def calibrate(encoder: Sam3DualViTDetNeck, pixels: np.ndarray) -> Calibration:
    """Runs the plain trunk on images, one after the other, and keeps what its linear layers read.

    Args:
        encoder: the plain encoder, set to the images' size.
        pixels: uint8 (B, H, W, 3).

    Raises:
        CalibrationError: a layer whose input is not finite.
    """
    layers, seen, each = linear_layers(encoder), len(pixels), -(-ROWS // len(pixels))
    # made before any pass: what stays would else lie among what a pass frees, and the process would grow by 15 GB
    kept = {name: _room(each * seen, layer.in_features) for name, layer in layers.items()}
    chance, index = torch.Generator().manual_seed(0), 0

    def keep(name: str, tokens: Tensor, chance: torch.Generator = chance) -> None:
        part, room = _kept(name, tokens.flatten(0, -2).float(), each, chance), kept[name]
        at = slice(index * each, index * each + len(part.rows))
        room.rows[at], room.weights[at] = part.rows, part.weights
        torch.maximum(room.channels, part.channels, out=room.channels)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs[0]))
        for name, module in layers.items()
    ]
    others = torch.Generator().manual_seed(1)  # one of their own: the layers' tokens stay those of older versions

    def keep_other(name: str, tokens: Tensor) -> None:
        keep(name, tokens, others)

    for name, layer in result_layers(encoder).items():
        kept[f"{name}{RESULT}"] = _room(each * seen, layer.out_features)
        hooks.append(layer.register_forward_hook(partial(_keep_result, f"{name}{RESULT}", keep_other)))
    for name, attention in attention_layers(encoder).items():
        kept |= {f"{name}.{part}": _room(each * seen, attention.qkv.in_features) for part in PARTS}
        hooks += _attention_hooks(name, attention, keep_other)
    try:
        for index in counted(range(seen), "calibrating the linear layers", seen, "images"):
            with torch.inference_mode():
                encoder.trunk(normalize(pixels[index : index + 1]))
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: _filled(room) for name, room in kept.items()}
    height, width = pixels.shape[1:3]
    return Calibration(seen, (height, width), fingerprint(encoder), *_sorted(found))


def _sorted(found: Mapping[str, Layer]) -> tuple[dict[str, Layer], dict[str, Layer], dict[str, Layer]]:
    """Layers, attentions and results of what was kept, by its names."""
    results = {name.removesuffix(RESULT): layer for name, layer in found.items() if name.endswith(RESULT)}
    attentions = {name: layer for name, layer in found.items() if name.rpartition(".")[2] in PARTS}
    layers = {name: one for name, one in found.items() if name not in attentions and not name.endswith(RESULT)}
    return layers, attentions, results


def _keep_result(
    name: str, keep: Callable[[str, Tensor], None], layer: nn.Module, _: tuple[Tensor, ...], output: Tensor
) -> None:
    """Keeps the result of a linear layer without its bias, as the product writes it."""
    keep(name, output if layer.bias is None else output - cast(Tensor, layer.bias))


def _attention_hooks(
    name: str, attention: Attention, keep: Callable[[str, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Keeps queries and keys after the rotary, which turns first one, then the other, and values; (B, N, C) each."""
    turned = itertools.cycle(PARTS[:2])

    def after_rotary(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        part = next(turned)
        tokens = output.transpose(1, 2).flatten(-2)  # (B, heads, N, D) -> (B, N, C)
        keep(f"{name}.{part}", tokens * attention.scale if part == "query" else tokens)

    def after_qkv(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep(f"{name}.value", output.chunk(3, dim=-1)[2])

    return [attention.rope.register_forward_hook(after_rotary), attention.qkv.register_forward_hook(after_qkv)]


def _kept(name: str, tokens: Tensor, rows: int, chance: torch.Generator) -> Layer:
    """Some of the tokens (N, K) of an image: a quarter are those with the largest values."""
    largest = tokens.abs().amax(dim=1)
    if not largest.isfinite().all():
        raise CalibrationError(
            f"{name}: the input of this layer contains NaN or infinity for one of the images; check the weights"
        )
    order = largest.argsort(descending=True)
    top, rest = order[: max(1, rows // 4)], order[max(1, rows // 4) :]
    others = rest[torch.randperm(len(rest), generator=chance)[: rows - len(top)]]
    weights = [torch.ones(len(top)), torch.full((len(others),), len(rest) / max(1, len(others)))]
    return Layer(tokens[torch.cat((top, others))], torch.cat(weights), tokens.abs().amax(dim=0))


def _room(rows: int, channels: int) -> Layer:
    """Room for so many tokens, of weight 0 as long as they are none."""
    return Layer(torch.zeros(rows, channels), torch.zeros(rows), torch.zeros(channels))


def _filled(room: Layer) -> Layer:
    taken = room.weights > 0
    return Layer(room.rows[taken], room.weights[taken], room.channels)


def fingerprint(encoder: Sam3DualViTDetNeck) -> str:
    """SHA-256 of what the inputs of the trunk's layers depend on besides the images: its architecture and weights."""
    config = getattr(encoder.trunk, "config", None)
    fields = {name: value for name, value in vars(config).items() if name not in NOT_OF_THE_TRUNK} if config else {}
    return weights_digest(encoder.trunk, repr(sorted(fields.items())))


def weights_digest(module: nn.Module, about: str) -> str:
    """SHA-256 of a module's parameters, their names, shapes and types, and of a text."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in module.named_parameters():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_calibration(path: Path, calibration: Calibration) -> None:
    """Writes a calibration as safetensors; it is there whole or not at all.

    Raises:
        CalibrationError: it cannot be written.
    """
    about = {
        "format": FORMAT,
        "images": calibration.images,
        "image_size": calibration.image_size,
        "encoder": calibration.encoder,
    }
    kept = calibration.layers | calibration.attentions
    kept |= {f"{name}{RESULT}": layer for name, layer in calibration.results.items()}
    tensors = {
        f"{name}.{field}": getattr(layer, field).contiguous() for name, layer in kept.items() for field in FIELDS
    }
    try:
        with replacing(path) as staged:
            staged.write_bytes(safetensors.torch.save(tensors, {METADATA: json.dumps(about)}))
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CalibrationError(
            f"{path}: the calibration cannot be written to this file ({why}); check that the folder is writable "
            "and the disk has free space"
        ) from None


def read_calibration(path: Path, encoder: Sam3DualViTDetNeck, image_size: tuple[int, int]) -> Calibration:
    """Reads a calibration of an encoder at an image size.

    Raises:
        CalibrationError: the file is not a calibration, or is damaged.
        OutdatedError: it was made for another encoder or image size, or by another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        if not isinstance(about, dict):
            raise ValueError
    except (SafetensorError, OSError, ValueError, LookupError, RecursionError):
        raise CalibrationError(
            f"{path}: the file is not a calibration that neck-export wrote. Pass another path with --calibration; if "
            "no file exists there, a new calibration is saved to it"
        ) from None
    if about.get("format") not in range(OLDEST_FORMAT, FORMAT + 1):
        raise OutdatedError(
            f"{path}: the calibration was written by another version of neck-export, in a format that this "
            "version cannot read, so the calibration is repeated"
        )
    if about.get("image_size") != list(image_size):
        raise OutdatedError(
            f"{path}: the calibration was made for the image size {about.get('image_size')}, but the size is "
            f"now {list(image_size)}, so the calibration is repeated"
        )
    if about.get("encoder") != fingerprint(encoder):
        raise OutdatedError(
            f"{path}: the calibration was made for an encoder with other weights or another architecture, so the "
            "calibration is repeated"
        )
    try:
        sides = {name: layer.in_features for name, layer in linear_layers(encoder).items()}
        if about["format"] == FORMAT:
            sides |= {f"{name}{RESULT}": layer.out_features for name, layer in result_layers(encoder).items()}
            for name, attention in attention_layers(encoder).items():
                sides |= {f"{name}.{part}": attention.qkv.in_features for part in PARTS}
        kept = _sorted({name: _read_layer(name, side, tensors) for name, side in sides.items()})
        if type(about["images"]) is not int or about["images"] < 1:
            raise ValueError(
                "the calibration file is damaged: the number of calibration images in the file is "
                f"{about['images']!r} instead of an integer of at least 1; {REPAIR}"
            )
    except LookupError as error:
        raise CalibrationError(
            f"{path}: the calibration file is damaged: the entry {error} is missing; {REPAIR}"
        ) from None
    except ValueError as error:
        raise CalibrationError(f"{path}: {error}") from None
    return Calibration(about["images"], image_size, about["encoder"], *kept)


def _read_layer(name: str, channels: int, tensors: Mapping[str, Tensor]) -> Layer:
    """One layer's part of a calibration, of so many channels.

    Raises:
        LookupError, ValueError: what is missing or wrong.
    """
    found = Layer(*(tensors[f"{name}.{field}"] for field in FIELDS))
    count = len(found.weights) if found.weights.dim() == 1 else 0
    shapes = ((count, channels), (count,), (channels,))
    for field, shape in zip(FIELDS, shapes, strict=True):
        tensor = getattr(found, field)
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            raise ValueError(
                f"the calibration file is damaged: the tensor {name}.{field} has the type {tensor.dtype} and the shape "
                f"{tuple(tensor.shape)}, but must have the type torch.float32 and the shape {shape}; {REPAIR}"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"the calibration file is damaged: the tensor {name}.{field} contains NaN or infinity; {REPAIR}"
            )
    if not count or not (found.weights > 0).all() or (found.rows.abs() > found.channels).any():
        raise ValueError(
            f"the calibration file is damaged: the recorded input values of the layer {name} are invalid; {REPAIR}"
        )
    return found
