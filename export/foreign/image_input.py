"""The image input of a foreign file: which it is, its layout and size, and the values that it may expect."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from export.foreign.graph_inputs import FLOATS, describe_input, file_inputs, image_inputs
from export.foreign.recognize import NotEncoderError
from neck.config import EncoderConfig, check_image_size
from neck.images import PIXEL_SCALE

IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
"""Mean and standard deviation of pixels in 0..1 (torchvision.models, `IMAGENET1K_V1.transforms`)."""
CLIP = (np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711]))
"""The same of CLIP (openai/CLIP, clip.py)."""

RGB, BGR = (0, 1, 2), (2, 1, 0)
VALUES = {
    "sam3": "normalized with SAM 3's mean and standard deviation of 0.5 (-1..1)",
    "unit": "in 0..1",
    "bytes": "in 0..255",
    "imagenet": "normalized with ImageNet's mean and standard deviation",
    "clip": "normalized with CLIP's mean and standard deviation",
    "twice": "normalized twice",
}
"""What the numbers of an image may be."""
CANDIDATES = ("sam3", "bytes", "unit", "imagenet")
"""What a file may expect; the rest of VALUES explains files that are wrong."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How pixels become the numbers that a file is given."""

    values: str = "sam3"
    channels: tuple[int, ...] = RGB

    def __str__(self) -> str:
        return f"{order(self.channels)} {VALUES[self.values]}"

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W)."""
        images = (pixels.astype(np.float32) * np.float32(PIXEL_SCALE) - 1).transpose(0, 3, 1, 2)
        return recode(images, self)


def recode(images: np.ndarray, encoding: Encoding) -> np.ndarray:
    """float32 RGB (B, 3, H, W), normalized for SAM 3 -> the same images in another encoding."""
    if encoding.values != "sam3":
        unit = (images.astype(np.float64) + 1) / 2
        if encoding.values == "bytes":
            unit = np.rint(unit * 255) if np.abs(unit * 255 - np.rint(unit * 255)).max() < 1e-3 else unit * 255
        elif encoding.values in ("imagenet", "clip"):
            mean, deviation = IMAGENET if encoding.values == "imagenet" else CLIP
            unit = (unit - mean[:, None, None]) / deviation[:, None, None]
        elif encoding.values == "twice":
            unit = images.astype(np.float64) * 2 - 1
        images = unit.astype(np.float32)
    return images if encoding.channels == RGB else np.ascontiguousarray(images[:, list(encoding.channels)])


def order(channels: Sequence[int]) -> str:
    """The name of an order of channels, such as BGR."""
    return "".join("RGB"[index] for index in channels)


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """The image input of a file.

    Attributes:
        name: of the input.
        layout: NCHW or NHWC, without N where the file takes one image without a batch axis.
        dtype: numpy name of its type.
        size: (height, width) at which it is run.
        count: how many images it is run on.
        dynamic_batch, dynamic_size: what of its shape is not fixed.
    """

    name: str
    layout: str
    dtype: str
    size: tuple[int, int]
    count: int
    dynamic_batch: bool
    dynamic_size: bool

    def __str__(self) -> str:
        height, width = self.size
        batch = "any batch" if self.dynamic_batch else f"batch {self.count}"
        size = f"any size (verified at {height}x{width})" if self.dynamic_size else f"{height}x{width}"
        return f"{self.name}: {self.dtype} {self.layout}, {batch}, {size}"

    def encodings(self) -> list[Encoding]:
        """What it may expect, the likeliest first."""
        values = ("bytes",) if self.dtype == "uint8" else CANDIDATES
        return [Encoding(*pair) for pair in itertools.product(values, (RGB, BGR))]

    def array(self, images: np.ndarray) -> np.ndarray:
        """float32 (B, 3, H, W) in the file's layout and type."""
        if "C" in self.layout[-1:]:
            images = images.transpose(0, 2, 3, 1)
        images = images[0] if "N" not in self.layout else images
        return np.ascontiguousarray(images).astype(numpy_type(self.dtype))


def numpy_type(name: str) -> np.dtype:
    """A numpy type by its name, BF16 too."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def find_input(graph: ir.Graph, config: EncoderConfig) -> ImageInput:
    """The only image input of a file.

    Args:
        graph: of the file.
        config: of the checkpoint's encoder: its size is that of a dynamic one.

    Raises:
        NotEncoderError: there is none, there are several inputs, or the encoder does not take images of its size.
    """
    inputs, images = file_inputs(graph), image_inputs(graph)
    listed = ", ".join(describe_input(value) for value in inputs) or "none"
    if not images:
        raise NotEncoderError(
            f"the file has no image input (a float or uint8 input with 3 channels); its inputs are {listed}"
        )
    if len(inputs) > 1:
        raise NotEncoderError(
            f"the file has several inputs, but SAM 3's encoder has only one, the image; its inputs are {listed}"
        )
    value, layout = images[0]
    shape = list(value.shape) if value.shape is not None else ["batch", 3, "height", "width"]
    sides = [shape[layout.index(axis)] for axis in "HW"]
    dynamic_size = not all(isinstance(side, int) for side in sides)
    height, width = (side if isinstance(side, int) else own for side, own in zip(sides, config.image_size, strict=True))
    try:
        size = check_image_size((height, width), config.patch_size)
    except ValueError as error:
        raise NotEncoderError(
            f"the input {describe_input(value)} of the file does not fit the checkpoint's encoder: {error}"
        ) from None
    batch = shape[0] if layout[0] == "N" else 1
    count = batch if isinstance(batch, int) else 2
    dtype = "uint8" if value.dtype == ir.DataType.UINT8 else FLOATS[value.dtype]  # type: ignore[index]
    return ImageInput(str(value.name), layout, dtype, size, count, not isinstance(batch, int), dynamic_size)
