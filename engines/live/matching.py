"""Whether a file is of the encoder that a live model has: the architecture field by field, then every weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engines.live.locate_encoder import AttachError, LiveEncoder, lowest_type
from neck.architecture import infer_fields, with_class_row
from neck.checkpoint_keys import Layout, find_layouts, listing
from neck.config import EncoderConfig
from neck.necks import new_encoder
from neck.position import PositionEmbeddingSine
from neck.weightfile import CheckpointError
from neck.weights.fingerprint import differing, fingerprints, kind_of
from neck.weights.rotary_tables import check_tables, is_table
from neck.weights.tensor_names import plain_name

ADAPTED = ("lora_", ".base_layer.", ".modules_to_save.")
"""In names of tensors: PEFT's, of layers around which an adapter was put."""

LAYER_FIELDS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: (),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.Conv2d: ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    nn.ConvTranspose2d: ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups"),
}
"""What a layer computes by, besides its weights."""

POSITION_ERROR = 1e-4
"""Between position encodings computed in float32 and in float64; angles are at most 2 pi."""


class Live:
    """The tensors and modules of a live encoder by the names of a checkpoint.

    Args:
        live: the encoder.
    """

    def __init__(self, live: LiveEncoder) -> None:
        self.encoder = live
        parts = {"encoder": live.module, **{f"head.{slot.name}": slot.module for slot in live.head}}
        if live.tracker_neck:
            parts["tracker_neck"] = live.tracker_neck.module
        self.modules = {
            plain_name(f"{start}.{path}".rstrip(".")): module
            for start, part in parts.items()
            for path, module in part.named_modules()
        }
        self.state: dict[str, Tensor] = {
            plain_name(f"{start}.{name}"): tensor
            for start, part in parts.items()
            for name, tensor in part.state_dict().items()
        }

    def layout(self) -> Layout:
        """The names of its tensors.

        Raises:
            AttachError: they are no encoder's, or an adapter's are among them.
        """
        if adapted := [name for name in self.state if any(mark in name for mark in ADAPTED)]:
            raise AttachError(
                f"the model's encoder at {self.encoder.slots[0].path} contains the tensor {adapted[0]} of a PEFT "
                "adapter that was not merged, so attach() cannot compare the encoder's weights with the exported file. "
                "Call model.merge_and_unload() to merge the adapter. Then attach a file that was exported with the "
                "same adapter: `neck-export onnx --adapter FOLDER`, where FOLDER is the folder of the adapter. To skip "
                "the comparison of the weights, call attach(..., check=False)"
            )
        layouts = find_layouts(self.state)
        if not layouts or not layouts[0].necks:
            raise AttachError(
                f"attach() cannot compare the weights of the model's encoder at {self.encoder.slots[0].path} with the "
                "exported file, because the encoder's tensors do not have the names that SAM 3 uses. The tensors "
                f"are named {listing(self.state, 3)}. To attach the file without comparing the weights, call "
                "attach(..., check=False)"
            )
        layout = dataclasses.replace(with_class_row(layouts[0], self.state), decoder="head.")
        if self.encoder.kind == "fpn" and self.encoder.necks == ("sam2",):
            layout = dataclasses.replace(layout, necks={"sam2": layout.necks["sam3"]})
        return layout

    def tables(self, layout: Layout) -> dict[str, Tensor]:
        """Its rotary tables, those that no state holds among them."""
        found: dict[str, Tensor] = {}
        for path, module in self.modules.items():
            if path.startswith(layout.blocks):
                values = {**dict(module.named_buffers(recurse=False)), "freqs_cis": getattr(module, "freqs_cis", None)}
                found |= {f"{path}.{name}": value.cpu() for name, value in values.items() if isinstance(value, Tensor)}
        return {name: value for name, value in found.items() if is_table(layout, name)}


def check_same(path: Path, live: LiveEncoder, config: EncoderConfig, digests: Mapping[str, Any]) -> None:
    """Compares a live encoder with what a manifest says of a file's.

    Args:
        path: the file, for messages.
        live: the model's encoder.
        config: the file's architecture, with the necks and the head that are compared.
        digests: the fingerprints of the file's weights.

    Raises:
        AttachError: what differs, or what cannot be compared.
    """
    found = Live(live)
    layout = found.layout()
    where = f"the model's encoder at {live.slots[0].path}"
    if others := [*_architecture(found, layout, config)]:
        raise AttachError(
            f"{path}: the architecture of the file differs from the architecture of {where}: "
            f"{'; '.join(others[:8])}. Export the encoder again from the checkpoint and the config that the model was "
            "loaded from, and attach the new file. To attach a file without a comparison with the model, call "
            "attach(..., check=False)"
        )
    with torch.device("meta"):
        names = [*new_encoder(config).state_dict()]
    tensors = ((name, _joined([found.state[key] for key in layout.keys(name)])) for name in names)
    if parts := differing(digests, fingerprints(tensors, (kind_of(lowest_type(live)),))):
        raise AttachError(
            f"{path}: the weights of the file differ from those of {where} ({', '.join(parts)}); export the "
            "model's own checkpoint and attach the new file, or skip the comparison with attach(..., check=False)"
        )


def _architecture(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """What differs, one field after the other; where the tensors differ, no more is looked at."""
    different = [*_tensors(found, layout, config)]
    yield from different
    if different:
        return
    yield from _layers(found, layout, config)
    yield from _blocks(found, layout, config)
    yield from _levels(found, layout, config)
    yield from _rest(found, layout, config)


def _tensors(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """Fields that shapes tell, then tensors that one of the two lacks."""
    told = infer_fields(layout, config.necks, found.state)
    told = {name: value for name, value in told.items() if name != "mlp_ratio"}
    different = False
    for name, value in told.items():
        if value != getattr(config, name):
            different = True
            yield f"the setting {name} is {getattr(config, name)} in the file, but {value} in the model"
    if different:
        return
    with torch.device("meta"):
        ours = new_encoder(config).state_dict()
    wanted: dict[str, tuple[int, ...]] = {}
    for name, tensor in ours.items():
        wanted |= layout.shapes(name, tuple(tensor.shape))
    if lacking := [key for key in wanted if key not in found.state]:
        yield f"the model does not contain the tensors {listing(lacking, 3)}"
    inside = [key for key in found.state if layout.has_inside(key, config.necks) and not is_table(layout, key)]
    if more := [key for key in inside if key not in wanted]:
        yield f"the file does not contain the tensors {listing(more, 3)}"
    for key, shape in wanted.items():
        if key in found.state and tuple(found.state[key].shape) != shape:
            yield (
                f"the tensor {key} has the shape {shape} in the file, but {tuple(found.state[key].shape)} in the model"
            )


def _layers(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """Every layer with weights: its class, epsilon, stride and the like."""
    with torch.device("meta"):
        ours = new_encoder(config)
    for name, layer in ours.named_modules():
        fields = LAYER_FIELDS.get(type(layer))
        if fields is None:
            continue
        for key in layout.keys(f"{name}.weight"):
            path = key.removesuffix(".weight")
            theirs = found.modules[path]
            if not isinstance(theirs, type(layer)):
                yield (
                    f"the module {path} is a {type(layer).__name__} in the file, but a {type(theirs).__name__} in the "
                    "model"
                )
                continue
            for field in fields:
                if (mine := getattr(layer, field)) != (value := getattr(theirs, field)):
                    yield f"{field} of the module {path} is {mine} in the file, but {value} in the model"


def _blocks(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """What a block computes by: window, heads, the scale of its scores, its activation."""
    for block, index in enumerate(layout.indices):
        path = f"{layout.blocks}{index}"
        module, attention = found.modules[path], _first(found, path, "attn", "attention")
        mlp = _first(found, path, "mlp")
        heads = _value(attention, "num_heads", "num_attention_heads")
        for name, mine, theirs in (
            ("window_size", 0 if block in config.global_blocks else config.window_size, _value(module, "window_size")),
            ("the number of attention heads", config.num_heads, heads),
            ("the scale of the attention scores", config.head_dim**-0.5, _value(attention, "scale", "scaling")),
        ):
            if theirs is None:
                yield (
                    f"{name} of the block {path} is {mine:g} in the file, but neck-export cannot read the value from "
                    f"the model's block, which has the type {type(module).__name__}"
                )
            elif not math.isclose(mine, theirs, rel_tol=1e-6):
                yield f"{name} of the block {path} is {mine:g} in the file, but {theirs:g} in the model"
        activation = _value(mlp, "activation_fn", "act")
        if activation is None and not type(mlp).__module__.startswith("neck."):  # ours calls a function
            yield (
                f"neck-export cannot compare the activation function of the block {path}: the file uses the exact "
                "GELU, but neck-export cannot read the activation function from the model's MLP, which has the type "
                f"{type(mlp).__name__}"
            )
        elif activation is not None and not _is_gelu(activation):
            yield (
                f"the activation function of the block {path} is the exact GELU in the file, but "
                f"{_named(activation)} in the model"
            )


def _levels(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """The scale of each level, which for two of the four no tensor tells, and the activation of the finest."""
    for neck in config.necks:
        for level, scale in enumerate(config.scale_factors):
            path = f"{layout.necks[neck]}{level}"
            inside = [*found.modules[path].modules()]
            doubled = sum(isinstance(module, nn.ConvTranspose2d) for module in inside)
            halved = sum(isinstance(module, nn.MaxPool2d) for module in inside)
            if (theirs := 2.0 ** (doubled - halved)) != scale:
                yield (
                    f"the neck module {path} scales the feature map by {scale:g} in the file, but by {theirs:g} in the "
                    "model"
                )
            known = (*LAYER_FIELDS, nn.MaxPool2d, nn.Identity)
            leaves = [module for module in inside if not [*module.children()] and not isinstance(module, known)]
            for module in leaves:
                if not isinstance(module, nn.ModuleList) and not _is_gelu(module):
                    yield (
                        f"the activation in the neck module {path} is the exact GELU (erf) in the file, but "
                        f"{_named(module)} in the model"
                    )


def _rest(found: Live, layout: Layout, config: EncoderConfig) -> Iterator[str]:
    """Rotary tables, the block that is handed out, the trained position, and the positions of the levels."""
    try:
        check_tables(Path("the model"), layout, found.tables(layout), config)
    except CheckpointError as error:
        yield str(error).replace("the configuration", "the file")
    trunk = found.modules[layout.trunk.removesuffix(".")]
    ends = _value(trunk, "full_attn_ids")
    if ends and ends[-1] != config.depth - 1:
        yield (
            f"the last block of the trunk is block {config.depth - 1} in the file, but block {ends[-1]} in the model"
        )
    for name, value in (("tile_abs_pos", True), ("retain_cls_token", False), ("use_abs_pos", True)):
        if _value(trunk, name) not in (None, value):
            yield f"the setting {name} is {value} in the file, but {not value} in the model"
    if found.encoder.kind == "vitdet" and isinstance(norm := _value(trunk, "ln_post"), nn.LayerNorm):
        yield f"the model has a {type(norm).__name__} after its last block, but the file has none"
    holder = found.encoder.module if found.encoder.kind == "vitdet" else getattr(found.encoder.module, "neck", None)
    yield from _positions(_value(holder, "position_encoding"), config, found.encoder.kind)


def _positions(encoding: Any, config: EncoderConfig, kind: str) -> Iterator[str]:
    """Computes the encoding of a small map, which tells all of its fields."""
    size = torch.zeros(1, config.d_model, 3, 5)
    try:
        given = encoding(size) if kind == "vitdet" else encoding(size.shape, torch.device("cpu"), torch.float32)
        error = float((given.float().cpu() - PositionEmbeddingSine(config.d_model)(size)).abs().max())
    except Exception as wrong:  # of their code
        yield (
            "the position encoding of the model cannot be compared with the file, because calling the position "
            f"encoding raised {wrong!r:.80}"
        )
        return
    if not error < POSITION_ERROR:
        yield f"the position encoding of the model differs by up to {error:.2g} from the position encoding of the file"


def _is_gelu(activation: Any) -> bool:
    """Whether it is the exact GELU: tanh's approximation is off by up to 5e-4."""
    values = torch.linspace(-4, 4, 81)
    try:
        given = activation(values)
    except Exception:  # of their code
        return False
    return isinstance(given, Tensor) and bool((given.float() - F.gelu(values)).abs().max() < 1e-5)


def _named(activation: Any) -> str:
    return getattr(activation, "__name__", None) or repr(activation)


def _first(found: Live, path: str, *names: str) -> nn.Module | None:
    return next((found.modules[f"{path}.{name}"] for name in names if f"{path}.{name}" in found.modules), None)


def _value(module: Any, *names: str) -> Any:
    """The first attribute that is there."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
