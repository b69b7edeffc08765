"""What computes in the place of a live model's encoder, whose modules stay where they are.

Only their `forward` is another while a file is attached, so that the state, modes and place of the model are those of
its own encoder. What belongs to one call travels with it (`Run`): calls of several threads do not meet.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engines.live.encoder import DeployedEncoder, Levels, without_gradient
from engines.live.locate_encoder import AttachError, LiveEncoder, unwrapped
from engines.live.not_computed import NotComputed
from neck.checkpoint_keys import NECK_MODULES, listing
from neck.necks import Outputs

MARK = "_neck_export"
"""Attribute of an encoder that a file stands in for: its Attached."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Run:
    """One call of an encoder: its images, and what the file gives for them.

    Args:
        attached: what computes it.
        images: (B, 3, H, W).
        together: the necks that are computed at once when the first of them is asked for.
    """

    def __init__(self, attached: Attached, images: Tensor, together: Sequence[str]) -> None:
        attached.encoder.check_images(images)
        self._attached, self._images, self._together = attached, images, tuple(together)
        self._found: dict[str, Levels] = {}

    def neck(self, name: str) -> Levels:
        """Features and positions of one neck with every level that the encoder has, finest first."""
        if name not in self._found:
            names = self._together if name in self._together else (name,)
            self._found |= self._attached.compute(self._images, names)
        feats, positions = self._found[name]
        return list(feats), list(positions)


class Attached:
    """A file in the place of a live encoder.

    Args:
        live: the encoder, on which nothing is changed before `enter`.
        encoder: the file.
        necks: the necks that the model reads.

    Attributes:
        encoder: the file.
        freed: whether the weights of the model's own encoder were freed.
    """

    def __init__(self, live: LiveEncoder, encoder: DeployedEncoder, necks: Sequence[str]) -> None:
        self.encoder, self.freed = encoder, False
        self.module, self.kind, self.levels = live.module, live.kind, live.levels
        self._necks, self._own = tuple(necks), live.necks[0]
        self._tracker_neck = live.tracker_neck.module if live.tracker_neck and "sam2" in necks else None
        with_head = "sam2" in necks and encoder.signature.has_head("sam2")
        self._heads = [slot.module for slot in live.head] if with_head else []
        self._before: list[tuple[nn.Module, str, bool, Any]] = []
        self._guards: list[Any] = []
        self._warned: set[str] = set()

    def enter(self, ancestors: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
        """Takes the encoder's place.

        Args:
            ancestors: every module of the model that holds one of `parts`, that part's path in it, and the part.
        """
        try:
            self._enter(ancestors)
        except Exception:
            self.leave()  # the model is as it was
            raise

    def _enter(self, ancestors: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
        if self.kind == "vitdet":
            self._put(self.module, "forward", self.run_vitdet)
            self._put(self._trunk, "forward", self.run_trunk)
            if hasattr(self.module, "sam_forward_feature_levels"):
                self._put(self.module, "sam_forward_feature_levels", self.run_neck)
            if hasattr(self.module, "set_imgsz"):
                self._put(self.module, "set_imgsz", self.set_imgsz)
        else:
            self._put(self.module, "forward", self.run_fpn)
            self._put(self._trunk, "forward", self.run_backbone)
            self._put(unwrapped(self.module.neck), "forward", self.run_own_neck)  # type: ignore[arg-type]
            if self._tracker_neck is not None:
                self._put(self._tracker_neck, "forward", self.run_tracker_neck)
        for head in self._heads:
            self._put(head, "forward", self.pass_on)
        setattr(self.module, MARK, self)
        inside: dict[nn.Module, list[tuple[str, nn.Module]]] = {}
        for module, path, part in ancestors:
            inside.setdefault(module, []).append((path, part))
        for module, parts in inside.items():
            self._guards.append(module.register_load_state_dict_pre_hook(LoadGuard(self, parts)))
        for part in self.parts:
            self._guards.append(part.register_state_dict_pre_hook(self.refuse_without_weights))

    def leave(self) -> None:
        """Gives the encoder its place back."""
        for guard in self._guards:
            guard.remove()
        for module, name, had, value in reversed(self._before):
            if had:
                vars(module)[name] = value
            else:
                vars(module).pop(name, None)
        vars(self.module).pop(MARK, None)
        self._before, self._guards = [], []

    def free(self) -> None:
        """Frees the weights of the model's own encoder; an empty buffer keeps following the model's type and place."""
        like = next(self.module.parameters())
        self.freed = True
        for part in self.parts:
            for module in part.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors.update(dict.fromkeys(tensors))
        self.module.register_buffer(f"{MARK}_type", like.new_empty(0).detach(), persistent=False)

    @property
    def parts(self) -> list[nn.Module]:
        """The modules whose weights are in the file."""
        return [self.module, *([self._tracker_neck] if self._tracker_neck is not None else []), *self._heads]

    @property
    def weights_dtype(self) -> torch.dtype:
        """The type of the features that the model's own encoder would give: that of the weights which end it."""
        tensors = [*self._neck(self._own).parameters()] or [*self.module.buffers()]
        return tensors[-1].dtype

    @property
    def _trunk(self) -> Any:
        return unwrapped(getattr(self.module, "trunk" if self.kind == "vitdet" else "backbone"))

    def _neck(self, name: str) -> Any:
        """The module of one neck."""
        if self.kind == "vitdet":
            return getattr(self.module, NECK_MODULES[name])
        return self._tracker_neck if name != self._own and self._tracker_neck is not None else self.module.neck

    def _put(self, module: nn.Module, name: str, value: Callable[..., Any]) -> None:
        """An attribute of this one module in the place of its class's method."""
        self._before.append((module, name, name in vars(module), vars(module).get(name)))
        vars(module)[name] = value

    # What takes the place of a forward. torch.compile leaves it alone and compiles the rest of the model around it.

    @torch.compiler.disable
    def run_fpn(self, *args: Any, **options: Any) -> Any:
        """transformers' vision encoder: as it is, around another backbone and neck."""
        had, value = next((had, value) for module, name, had, value in self._before if module is self.module)
        forward = value if had else types.MethodType(type(self.module).forward, self.module)
        return forward(*args, **options)

    @torch.compiler.disable
    def run_backbone(self, pixel_values: Tensor, **options: Any) -> Any:
        """transformers' backbone: hidden states that carry the images to the necks."""
        run, config = Run(self, pixel_values, self._necks), getattr(self._trunk, "config", None)
        (height, width), channels = self.encoder.signature.level_sizes[2], self.encoder.trunk_channels
        batch, layers = len(pixel_values), self._trunk.layers
        given = types.SimpleNamespace(
            last_hidden_state=self._missing(
                "last_hidden_state", (batch, height * width, channels), pixel_values, source=run
            ),
            hidden_states=None,
            attentions=None,
        )
        for name, count, shape in (
            ("hidden_states", len(layers) + 1, (batch, height, width, channels)),
            ("attentions", len(layers), (batch, 1, height * width, height * width)),
        ):
            option = f"output_{name}"
            if options.get(option, getattr(config, option, None)):
                several = (self._missing(f"{name}[{index}]", shape, pixel_values) for index in range(count))
                setattr(given, name, tuple(several))
        return given

    @torch.compiler.disable
    def run_own_neck(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """transformers' neck: hidden states in any view -> features and positions."""
        return self._of_run(hidden, self._own)

    @torch.compiler.disable
    def run_tracker_neck(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The same of the tracker's own neck."""
        return self._of_run(hidden, "sam2")

    @torch.compiler.disable
    def run_vitdet(self, images: Tensor) -> Outputs:
        """Sam3DualViTDetNeck: the four lists."""
        run = self._run_of(unwrapped(self.module.trunk)(images)[-1])  # type: ignore[arg-type]
        run._together = self._necks
        sam3, sam2 = (run.neck(name) if name in self._necks else None for name in ("sam3", "sam2"))
        return *(sam3 or ([], [])), *(sam2 or (None, None))

    @torch.compiler.disable
    def run_trunk(self, images: Tensor) -> list[NotComputed]:
        """Its trunk: a map that carries the images to the necks."""
        size = self.encoder.signature.level_sizes[2]
        run = Run(self, images, ())
        return [
            self._missing(
                "the feature map of the trunk", (len(images), self.encoder.trunk_channels, *size), images, source=run
            )
        ]

    @torch.compiler.disable
    def run_neck(self, x: Tensor, convs: nn.ModuleList) -> Levels:
        """Its sam_forward_feature_levels: one neck of a trunk's map."""
        names = [name for name, module in NECK_MODULES.items() if getattr(self.module, module, None) is convs]
        if not names:
            raise AttachError(
                f"{self.encoder.path}: sam_forward_feature_levels was called with a neck that is not part of the "
                "attached file; call detach(model) to compute this neck in PyTorch"
            )
        return self._run_of(x).neck(names[0])

    def set_imgsz(self, imgsz: Any = (1008, 1008), *more: Any) -> None:
        """As DeployedEncoder.set_imgsz, and then the model's own."""
        self.encoder.set_imgsz(imgsz)
        if not self.freed:
            type(self.module).set_imgsz(self.module, imgsz, *more)  # type: ignore[attr-defined]

    def pass_on(self, features: Tensor) -> Tensor:
        """conv_s0 and conv_s1, which the file has computed."""
        return features

    def compute(self, images: Tensor, names: Sequence[str]) -> dict[str, Levels]:
        """Runs the file; levels that it lacks can be passed on and not be read."""
        self._warn_of_hooks()
        found = self.encoder.forward_necks(images, names, self.weights_dtype)
        feats = [feat for levels in found.values() for feat in levels[0]]
        trained = next(([one] for one in self.module.parameters() if one.requires_grad), [])
        if not any(feat.requires_grad for feat in feats):  # else a backward pass raises an error already
            feats = without_gradient(feats, trained, self._warn_of_training)
        linked = iter(feats)
        return {
            neck: self._with_missing(neck, [next(linked) for _ in levels[0]], levels[1])
            for neck, levels in found.items()
        }

    def _with_missing(self, neck: str, feats: list[Tensor], positions: list[Tensor]) -> Levels:
        there = self.encoder.levels_of(neck)
        pairs = dict(zip(there, zip(feats, positions, strict=True), strict=True))
        sizes, channels = self.encoder.signature.level_sizes, self.encoder.signature.d_model
        for level in range(self.levels):
            if level not in pairs:
                shape = (len(feats[0]), channels, *sizes[level])
                kinds = (f"level {level} of the features", f"level {level} of the position encoding")
                pairs[level] = tuple(self._missing(kind, shape, feats[0]) for kind in kinds)  # type: ignore[assignment]
        whole = [pairs[level] for level in range(self.levels)]
        return [feat for feat, _ in whole], [position for _, position in whole]

    def _missing(self, what: str, shape: tuple[int, ...], like: Tensor, source: Run | None = None) -> NotComputed:
        return NotComputed(what, shape, self.weights_dtype, like.device, source)

    def _of_run(self, hidden: Tensor, neck: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        feats, positions = self._run_of(hidden).neck(neck)
        return tuple(feats), tuple(positions)

    def _run_of(self, hidden: Tensor) -> Run:
        run = hidden.source if isinstance(hidden, NotComputed) else None
        if run is None or run._attached is not self:
            raise AttachError(
                f"{self.encoder.path}: a neck of the model received a feature map that the attached file did not "
                "compute. Feature maps that were computed before attach() was called, or loaded from disk, cannot be "
                "used. Run the model on the images again"
            )
        return run

    def _warn_of_training(self) -> None:
        self._warn(
            "training",
            f"{self.encoder.path}: the weights of the model's encoder receive no gradients in a backward pass, because "
            "the attached file cannot compute gradients. To train the encoder, call detach(model). To train only the "
            "rest of the model, freeze the weights of the encoder with requires_grad_(False)",
        )

    def _warn_of_hooks(self) -> None:
        if "hooks" in self._warned:
            return
        for path, module in self._silent():
            hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
            if any(_package(hook) != _package(type(module)) for hook in hooks):  # transformers' own look for outputs
                self._warn(
                    "hooks",
                    f"{self.encoder.path}: this file runs in place of the model's encoder, so the hooks on the "
                    f"encoder's module {path} are not called. To run the model's own encoder with its hooks, call "
                    "detach(model)",
                )
                return

    def _silent(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside the encoder that nobody calls now."""
        called = {*self._before_modules()}
        for part in self.parts:
            yield from ((path, module) for path, module in part.named_modules() if module not in called and path)

    def _before_modules(self) -> Iterator[nn.Module]:
        return (module for module, *_ in self._before)

    def _warn(self, once: str, text: str) -> None:
        if once not in self._warned:
            self._warned.add(once)
            warnings.warn(text, stacklevel=2)

    def refuse_without_weights(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Before state_dict, and so before saving.

        Raises:
            AttachError: the weights were freed.
        """
        if self.freed:
            raise AttachError(
                f"{self.encoder.path}: the state dict of the model cannot be read or saved, because attach(..., "
                "free=True) freed the weights of the model's own encoder. Load the model again, and attach the file "
                "without free=True"
            )


class LoadGuard:
    """Refuses other weights for an encoder that a file stands in for, before any of a state is loaded.

    Args:
        attached: the file.
        parts: the path of each part in the module that this guards, and the part.
    """

    def __init__(self, attached: Attached, parts: Sequence[tuple[str, nn.Module]]) -> None:
        self._attached, self._parts = attached, list(parts)

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
        """What torch calls with the state and what stands before the module's names in it.

        Raises:
            AttachError: the state has other values for the encoder.
        """
        attached = self._attached
        for path, part in self._parts:
            start = ".".join(filter(None, (prefix.rstrip("."), path)))
            start = f"{start}." if start else ""
            own = {} if attached.freed else {start + name: value for name, value in part.state_dict().items()}
            others = [
                name
                for name, value in state.items()
                if name.startswith(start) and (attached.freed or (name in own and not _is_same(value, own[name])))
            ]
            if others:
                first = "Load the model again" if attached.freed else "Call detach(model)"
                raise AttachError(
                    f"{attached.encoder.path}: load_state_dict() would change the encoder weights "
                    f"{listing(others, 1)}. New encoder weights have no effect while the file is attached, because the "
                    f"model then uses the file instead of its own encoder. {first}, load the state dict, export the "
                    "encoder again with the new weights, and attach the new file"
                )


def _is_same(value: Any, own: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != own.shape or value.is_meta:
        return False
    return torch.equal(value.to(own.device, own.dtype), own)


def _package(thing: Any) -> str:
    return str(getattr(thing, "__module__", "") or "").partition(".")[0]
