"""Where the encoder sits in a live SAM 3: told by the modules that are there, whatever package they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from neck.checkpoint_keys import NECK_MODULES


class AttachError(RuntimeError):
    """A model and a file that do not go together; the model is as it was."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """An attribute of a module that holds another."""

    parent: nn.Module
    name: str
    path: str

    @property
    def module(self) -> nn.Module:
        """What it holds."""
        found: nn.Module = getattr(self.parent, self.name)
        return unwrapped(found)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper, which passes on all attributes of what it wraps."""
    while "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]  # type: ignore[assignment]
    return module


@dataclasses.dataclass(frozen=True)
class LiveEncoder:
    """The encoder of a live model.

    Attributes:
        kind: `vitdet`: a trunk with its necks in one module (Meta, Ultralytics); `fpn`: a backbone with one neck and
            perhaps a tracker's neck elsewhere (transformers).
        module: the encoder.
        slots: every attribute that holds it.
        tracker_neck: the tracker's neck where it is a module of its own.
        head: conv_s0 and conv_s1 of the tracker's mask decoder, which read levels 0 and 1 of sam2; empty without one.
        necks: names of the necks, as ours.
        levels: how many each neck has.
        unread: how many of them, the coarsest, the model drops without a look.
    """

    kind: Literal["vitdet", "fpn"]
    module: nn.Module
    slots: tuple[Slot, ...]
    tracker_neck: Slot | None
    head: tuple[Slot, ...]
    necks: tuple[str, ...]
    levels: int
    unread: int

    @property
    def read(self) -> tuple[int, ...]:
        """The levels that the model reads."""
        return tuple(range(self.levels - self.unread))

    @property
    def modules(self) -> list[nn.Module]:
        """All that the file stands in for."""
        return [self.module] + ([self.tracker_neck.module] if self.tracker_neck else [])

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) that the model is configured for, where it says (transformers)."""
        config = getattr(getattr(self.module, "config", None), "backbone_config", None)
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            return size, size
        return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights that the file stands in for."""
        return (parameter for module in self.modules for parameter in module.parameters())


def find_encoder(model: nn.Module) -> LiveEncoder:
    """Finds the encoder of a live model.

    Raises:
        AttachError: there is none, or more than one.
    """
    slots: dict[nn.Module, list[Slot]] = {}
    for path, parent in model.named_modules():
        if "_orig_mod" in parent._modules:  # what it wraps is in the slot that the wrapper is in
            continue
        for name, child in parent.named_children():
            names = [*(part for part in path.split(".") if part and part != "_orig_mod"), name]
            slots.setdefault(unwrapped(child), []).append(Slot(parent, name, ".".join(names)))
    found = [module for module in slots if _is_vitdet(module) or _is_fpn(module)]
    if not found:
        top = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_children()) or "nothing"
        name = type(model).__name__
        problem = (
            f"{name} is the image encoder itself, but the function attach() needs the model that contains the encoder"
            if _is_vitdet(model) or _is_fpn(model)
            else f"{name} contains no SAM 3 image encoder"
        )
        raise AttachError(
            f"{problem}. Pass a model with a submodule "
            "that has the attributes trunk and convs (Meta, Ultralytics) or backbone and neck.fpn_layers "
            f"(transformers); the submodules of the given model are: {top[:300]}"
        )
    if len(found) > 1:
        places = ", ".join(slots[module][0].path for module in found)
        raise AttachError(
            f"{type(model).__name__} contains {len(found)} encoders ({places}); pass a submodule that contains "
            "only one of them"
        )
    where = tuple(slots[found[0]])
    head = _find_head(slots)
    if _is_vitdet(found[0]):
        return _of_vitdet(found[0], where, head)
    return _of_fpn(found[0], where, head, slots)


def _find_head(slots: dict[nn.Module, list[Slot]]) -> tuple[Slot, ...]:
    """conv_s0 and conv_s1 of every mask decoder."""
    return tuple(slot for found in slots.values() for slot in found if slot.name in ("conv_s0", "conv_s1"))


def _is_vitdet(module: nn.Module) -> bool:
    convs = getattr(module, "convs", None)
    return isinstance(getattr(module, "trunk", None), nn.Module) and isinstance(convs, nn.ModuleList)


def _is_fpn(module: nn.Module) -> bool:
    backbone = getattr(module, "backbone", None)
    return isinstance(getattr(backbone, "layers", None), nn.ModuleList) and _has_levels(getattr(module, "neck", None))


def _has_levels(module: Any) -> bool:
    return isinstance(module, nn.Module) and isinstance(getattr(module, "fpn_layers", None), nn.ModuleList)


def _of_vitdet(
    module: Any,
    slots: tuple[Slot, ...],
    head: tuple[Slot, ...],
) -> LiveEncoder:
    necks = tuple(neck for neck, name in NECK_MODULES.items() if len(getattr(module, name, None) or ()))
    levels = len(getattr(module, NECK_MODULES[necks[0]])) if necks else 0
    unread = min(int(getattr(slot.parent, "scalp", 0)) for slot in slots)
    return LiveEncoder("vitdet", module, slots, None, head, necks, levels, unread)


def _of_fpn(
    module: Any,
    slots: tuple[Slot, ...],
    head: tuple[Slot, ...],
    all_slots: dict[nn.Module, list[Slot]],
) -> LiveEncoder:
    """Of transformers: which neck it is tells the rest of the model, for a tracker's is called `neck` too."""
    others = [
        slot for other, (slot, *_) in all_slots.items() if _has_levels(other) and other is not unwrapped(module.neck)
    ]
    others = [slot for slot in others if slot.parent is not module]
    levels = len(module.neck.fpn_layers)
    unread = 1 if levels > 3 else 0  # each of the four models reads the three finest
    if others:
        return LiveEncoder("fpn", module, slots, others[0], head, ("sam3", "sam2"), levels, unread)
    return LiveEncoder("fpn", module, slots, None, head, ("sam2",) if head else ("sam3",), levels, unread)


def lowest_type(encoder: LiveEncoder) -> torch.dtype:
    """The type of the encoder's weights, where they are mixed the one of fewest bits."""
    return min((parameter.dtype for parameter in encoder.parameters()), key=lambda dtype: dtype.itemsize)
