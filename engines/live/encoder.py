"""An exported file with the interface of the encoder that it was made of."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from engines.builder.plan_kind import is_plan
from engines.live.opening import EncoderError, open_file
from export.contract.export_command import export_again
from export.contract.manifest import check_files, manifest_path, read_manifest
from export.contract.signature import HEAD_LEVELS, KINDS, TensorSpec
from export.verification.verify import positions_path
from export.weights_origin import manifest_signature
from neck.config import check_image_size
from neck.images import denormalize
from neck.necks import Outputs
from neck.position import PositionEmbeddingSine

Levels = tuple[list[Tensor], list[Tensor]]
"""Features and positions of one neck, finest level first."""


def model_dtype(images: Tensor, weights: torch.dtype | None = None) -> torch.dtype:
    """The type in which a model expects features: autocast's where that is on (Meta's videos), or its weights'.

    Args:
        images: their type stands for the weights' where there are none.
        weights: the type of the weights of the encoder that the file stands in for.
    """
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weights or images.dtype


class _NoGradient(torch.autograd.Function):
    """Puts tensors into the graph of what they were computed from, with a backward that only tells so."""

    @staticmethod
    def forward(ctx: Any, told: Callable[[], None], outputs: list[Tensor], *sources: Tensor) -> Any:
        """`outputs` in a list, so that they are no inputs; `sources` are what somebody wants a gradient of."""
        ctx.told, ctx.count = told, len(sources)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Tells, and gives none."""
        ctx.told()
        return (None,) * (2 + ctx.count)


def without_gradient(outputs: list[Tensor], sources: Sequence[Tensor], told: Callable[[], None]) -> list[Tensor]:
    """The outputs of a file, of which `told` is called once somebody goes backward through them.

    Args:
        outputs: tensors without a graph.
        sources: what a gradient may be wanted of; nothing is done where none is.
        told: raises an error or warns.
    """
    wanted = [source for source in sources if source.requires_grad] if torch.is_grad_enabled() else []
    return list(_NoGradient.apply(told, outputs, *wanted)) if wanted and outputs else outputs


class DeployedEncoder(nn.Module):
    """A plan or an ONNX file of ours in the place of the encoder: the interface of Sam3DualViTDetNeck.

    For any number of threads, one run at a time. The outputs are the caller's own, fresh in each run; positions do not
    depend on the image, so they are made once and shared by all runs: do not write into them.

    Args:
        path: the file, its manifest beside it.
        device: where it runs; by default the GPU for a plan, and for an ONNX file where torch and ONNX Runtime have it.
        runtime: `openvino` runs an ONNX file there (CPU).
        simulated: of an FP16 or BF16 ONNX file on a CPU: keep its roundings, which ONNX Runtime drops (about 0.05 s for
            each 20 M numbers).
        levels: which levels the caller reads; by default all of the encoder.

    Attributes:
        path, manifest, signature: the file.
        device: where it runs.

    Raises:
        EncoderError: the file lacks a level, or a runtime that does not go with it.
        ManifestError, SessionError, RuntimeFileError, BuildError, FidelityError: it cannot be loaded here.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        runtime: Literal["auto", "openvino"] = "auto",
        simulated: bool = False,
        levels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.path = path = Path(path)
        self._plan = plan = is_plan(path)
        self.manifest: dict[str, Any] = read_manifest(manifest_path(path), "plan" if plan else "onnx")
        self.signature = signature = manifest_signature(manifest_path(path), self.manifest)
        self.levels = tuple(range(len(signature.level_sizes)) if levels is None else levels)
        lacking = sorted(set(self.levels) - set(signature.levels) - (set() if levels else self._beyond_head()))
        if lacking:
            raise EncoderError(
                f"{path}: the file does not contain level {', '.join(map(str, lacking))} of the features; "
                "export the file again: "
                f"{self.export_again(levels=','.join(map(str, sorted({*self.levels, *signature.levels}))))}"
            )
        self._options = {"device": None if device is None else str(device), "runtime": runtime, "simulated": simulated}
        self._lock, self._warned, self._simulated = threading.Lock(), False, simulated
        self._positions: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._stored = {}
        if not plan:
            check_files(manifest_path(path), self.manifest)
        if not plan and signature.positions == "file":
            self._stored = safetensors.torch.load_file(positions_path(path))
        self._file: Any = open_file(path, device, runtime, simulated)
        self.device: torch.device = self._file.device
        if self.device.type == "cuda":  # the first run loads kernels
            batch, height, width = signature.batch.minimum, *signature.image_size
            self.forward_necks(torch.zeros(batch, 3, height, width, device=self.device))

    @property
    def necks(self) -> tuple[str, ...]:
        """Names of the file's necks."""
        return self.signature.necks

    def levels_of(self, neck: str) -> tuple[int, ...]:
        """The levels that are handed out of a neck: those that are read, of a head the three that it has."""
        return tuple(level for level in self.levels if level in self.signature.levels_of(neck))

    def _beyond_head(self) -> set[int]:
        """The levels that a tracker's file with a head has no need of."""
        alone = all(map(self.signature.has_head, self.necks))
        return set(range(len(self.signature.level_sizes))) - set(HEAD_LEVELS) if alone else set()

    @property
    def onnx_manifest(self) -> dict[str, Any] | None:
        """The manifest of the ONNX file, of which a plan keeps a copy; None of a foreign file."""
        found: dict[str, Any] | None = self.manifest.get("onnx_manifest") if self._plan else self.manifest
        return found

    @property
    def trunk_channels(self) -> int:
        """Channels of the trunk's map, 1024 where nothing tells."""
        encoder = (self.onnx_manifest or {}).get("encoder") or {}
        return int(encoder.get("embed_dim", 1024))

    @torch.compiler.disable
    def forward(self, images: Tensor) -> Outputs:
        """images (B, 3, H, W), normalized -> (sam3_feats, sam3_poss, sam2_feats, sam2_poss), finest level first.

        What Sam3DualViTDetNeck gives, in the type (or autocast's) and on the device of `images`: without `sam3` its
        lists are empty, without `sam2` they are None.

        Raises:
            EncoderError: images of another size or in a batch that the file does not take, or closed; a backward
                pass with respect to the images.
        """
        found = self.forward_necks(images)
        sam3, sam2 = found.get("sam3", ([], [])), found.get("sam2", (None, None))
        return *sam3, *sam2

    def forward_necks(
        self, images: Tensor, necks: Sequence[str] | None = None, weights: torch.dtype | None = None
    ) -> dict[str, Levels]:
        """Features and positions of the named necks, by default of all that the file has; else as forward.

        Outputs of other necks are computed by the file and not handed out.

        Args:
            images, necks: as said.
            weights: the type of features where no autocast is on; by default the images'.
        """
        dtype = model_dtype(images, weights)
        self.check_images(images)
        if dtype.itemsize < self.output_dtype.itemsize and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.path}: the file computes in float32, so its outputs are cast to the model's {dtype}",
                stacklevel=2,
            )
        signature = self.signature
        names = tuple(self.necks if necks is None else necks)
        with torch.no_grad(), self._lock:
            if self._file is None:
                raise EncoderError(f"{self.path}: the encoder was closed; open the file again")
            found = self._run(images.detach(), names, dtype)
            positions = {
                neck: [self._position(neck, level, images, dtype) for level in self.levels_of(neck)] for neck in names
            }
        found = dict(zip(found, without_gradient([*found.values()], [images], self._refuse_gradient), strict=True))
        return {
            neck: ([found[signature.spec(neck, "feat", level).name] for level in self.levels_of(neck)], positions[neck])
            for neck in names
        }

    def _refuse_gradient(self) -> None:
        raise EncoderError(
            f"{self.path}: the file computes no gradients, so the backward pass cannot reach the images. If the file "
            "is attached to a PyTorch model, call neck-export's function engines.attach.detach(model). The model then "
            "uses the model's own PyTorch encoder again, which computes gradients"
        )

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int] = (1008, 1008)) -> None:
        """Accepts the file's own image size.

        Raises:
            EncoderError: for every other, with the command that exports it.
        """
        asked = check_image_size(imgsz, 1)
        if asked != self.signature.image_size:
            raise self.wrong_size(asked)

    def wrong_size(self, asked: tuple[int, int]) -> EncoderError:
        """What to say where a model's images have another size than the file's."""
        sizes = ["x".join(map(str, size)) for size in (self.signature.image_size, asked)]
        return EncoderError(
            f"{self.path}: the file accepts only images with a height x width of {sizes[0]} pixels, but the images to "
            f"be encoded have {sizes[1]} pixels. Resize the images to {sizes[0]} pixels, or export a file for images "
            f"of {sizes[1]} pixels: {self.export_again(image_size=sizes[1])}"
        )

    def export_again(self, **changes: str) -> str:
        """The command that exports the file with other options."""
        if not self._plan:
            return export_again(self.path, **changes)
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        return (
            f"repeat the original `neck-export onnx` command with {options}, then build a plan from the new ONNX file "
            "with `neck-export trt`"
        )

    def close(self) -> None:
        """Frees the engine."""
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file = None
            self._positions.clear()

    def __reduce__(self) -> Any:
        """A copy, by copy.deepcopy or pickle, opens the file again.

        Raises:
            EncoderError: it is closed.
        """
        if self._file is None:
            raise EncoderError(f"{self.path}: the encoder was closed, so it cannot be copied; open the file again")
        return _reopen, (str(self.path), self._options, self.levels)

    def __enter__(self) -> DeployedEncoder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def extra_repr(self) -> str:
        """The file and where it runs."""
        return f"{self.path}, device={self.device}"

    def check_images(self, images: Tensor) -> None:
        """Checks shape, size and batch of images.

        Raises:
            EncoderError: the file does not take them.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise EncoderError(
                f"{self.path}: the encoder was called with a tensor of type {images.dtype} and shape "
                f"{tuple(images.shape)}. Call the encoder with normalized images: a floating-point tensor of shape "
                "(B, 3, H, W)"
            )
        batch, size = self.signature.batch, (images.shape[2], images.shape[3])
        if size != self.signature.image_size:
            raise self.wrong_size(size)
        if not batch.minimum <= len(images) <= batch.maximum:
            wanted = f"{min(batch.minimum, len(images))}:{len(images)}:{max(batch.maximum, len(images))}"
            accepted = f"{batch.minimum} to {batch.maximum}" if batch.dynamic else str(batch)
            raise EncoderError(
                f"{self.path}: the file only accepts batch size {accepted}, but {len(images)} images were passed. Pass "
                f"batches of size {accepted}, or export the file again for {len(images)} images: "
                f"{self.export_again(batch=wanted)}"
            )

    @property
    def output_dtype(self) -> torch.dtype:
        """Type of the outputs before they follow the input's."""
        return torch.float32 if self._simulated else getattr(torch, self.signature.dtype)

    def _run(self, images: Tensor, necks: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        """The features in a type and in the images' place; positions that the graph gives are kept on the way."""
        pairs = [(neck, level) for neck in necks for level in self.levels_of(neck)]
        names = {self.signature.spec(neck, kind, level).name for neck, level in pairs for kind in KINDS}
        wanted = [spec for spec in self.signature.outputs if spec.name in names - set(self._stored)]
        found = self._infer(self._image(images), wanted)
        for name in [name for name in found if "_pos_" in name]:
            value = found.pop(name)[:1]
            self._stored[name] = value.clone() if len(images) > 1 else value
        return {name: value.to(images.device, dtype) for name, value in found.items()}

    def _infer(self, image: Tensor, wanted: Sequence[TensorSpec]) -> dict[str, Tensor]:
        if self._plan:
            outputs: dict[str, Tensor] = self._file.infer({"image": image})
            return {spec.name: outputs[spec.name] for spec in wanted}
        made = {
            spec.name: torch.empty(len(image), *map(int, spec.shape[1:]), dtype=self.output_dtype, device=self.device)
            for spec in wanted
        }
        self._file.run(image, made)
        return made

    def _image(self, images: Tensor) -> Tensor:
        """The file's input: normalized numbers, or the pixels that they came from."""
        if self.signature.input == "float":
            return images.to(self.device, torch.float32).contiguous()
        return denormalize(images.to(self.device))

    def _position(self, neck: str, level: int, images: Tensor, dtype: torch.dtype) -> Tensor:
        """A position encoding (B, C, h, w), which is no copy for each image."""
        name = self.signature.spec(neck, "pos", level).name
        key = (name, dtype, images.device)
        if key not in self._positions:
            if name not in self._stored:
                size = torch.empty(1, 1, *self.signature.level_sizes[level])
                self._stored[name] = PositionEmbeddingSine(self.signature.d_model)(size)
            self._positions[key] = self._stored[name].to(images.device, dtype)
        return self._positions[key].expand(len(images), -1, -1, -1)


def _reopen(path: str, options: dict[str, Any], levels: tuple[int, ...]) -> DeployedEncoder:
    """What a copy is made by."""
    return DeployedEncoder(path, levels=levels, **options)
