"""Image files to the encoder's input, as SAM 3's own processor does it: RGB, straight resize, values in -1..1."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from neck.tiff import describe_tiff

Pixels = npt.NDArray[np.uint8]
Say = Callable[[str], None]

# Named, so that Pillow never hands a file to Ghostscript (EPS) or to a plugin that nobody asked for.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
SUFFIXES |= {".ppm", ".pgm"}

UNREAD = frozenset({".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw"})
"""Suffixes of images that are not read here."""

MOST_NAMED = 4

# The golden tensors have the bits of x * float32(2 / 255) - 1; x / 127.5 - 1 and four other ways are 1.2e-7 off.
PIXEL_SCALE = 2 / 255
"""Factor of the normalization `pixel * PIXEL_SCALE - 1`, which takes 0..255 to -1..1."""


logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs what it raises: a second line on the screen


class ImageError(ValueError):
    """An image that cannot be read or used; the message says which, why and what to do."""


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """Values of pixels deeper than 8 bits that become 0 and 255; those between are spread evenly, others clipped."""

    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> ValueRange:
        """Reads `0:4000`.

        Raises:
            ImageError: no two numbers, the lower first.
        """
        try:
            low, high = map(float, text.split(":"))
        except ValueError:
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            raise ImageError(
                f"{text!r} is not a range of pixel values; write it as LOW:HIGH with LOW below HIGH, such as 0:4000."
            )
        return cls(low, high)

    def scale(self, values: np.ndarray) -> Pixels:
        """Any numbers to 0..255; NaN becomes 0."""
        spread = (np.nan_to_num(values.astype(np.float64), nan=self.low) - self.low) / (self.high - self.low)
        return np.rint(np.clip(spread, 0, 1) * 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images, and how to read those with more than 8 bits."""

    path: Path
    value_range: ValueRange | None = None

    @classmethod
    def of(cls, given: Path | ImageFolder) -> ImageFolder:
        """A bare path is a folder without a range."""
        return given if isinstance(given, ImageFolder) else cls(given)


def silent(line: str) -> None:
    """Ignores the line."""


def read_image(path: Path, value_range: ValueRange | None = None, say: Say = silent) -> Pixels:
    """Reads an image file at its own size.

    The EXIF orientation is applied. Alpha is dropped, not blended, as `convert("RGB")` does for SAM 3's processor.
    16-bit pixels, gray or color, keep their high byte, unless a range is given. Of an animation or a multi-page file
    the first frame is taken.

    Args:
        path: a PNG, JPEG, WebP, BMP, TIFF, GIF or PPM file; its content counts, not its suffix.
        value_range: of gray pixels deeper than 8 bits; images of 8 bits are taken as they are.
        say: told in one line of an image deeper than 8 bits: which values it has and what became of them.

    Returns:
        RGB pixels, uint8 (H, W, 3).

    Raises:
        ImageError: where the file is missing, empty, damaged, no image, or above `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _open_file(Path(path)) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of metadata that nobody reads
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode(stream, value_range, lambda line: say(f"{Path(path).name}: {line}"))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            reason = (
                f"the image has more than {Image.MAX_IMAGE_PIXELS} pixels, the limit for decoding; use a smaller image"
            )
        except _NoRangeError as error:
            reason = str(error)
        except UnidentifiedImageError:
            reason = (
                f"the file is damaged or has an unsupported format (supported formats: {', '.join(FORMATS)}); "
                "download it again or convert it to PNG"
            )
            if tiff := describe_tiff(stream):
                reason = (
                    f"the image is a TIFF file with {tiff}. neck-export reads only TIFF files with 1 band (gray) of "
                    "8, 16 or 32 bits, or with 3 or 4 bands (RGB or RGBA) of 8 or 16 bits. Convert the image, for "
                    "example by selecting three bands with `gdal_translate -b 3 -b 2 -b 1 -ot Byte -scale`"
                )
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, IndexError ...
            cause = " ".join(str(error).split()) or type(error).__name__
            reason = f"the image cannot be decoded ({cause}); download it again or save it as 8-bit RGB PNG"
    raise ImageError(f"{path}: {reason}.")


def resize_image(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes straight to a size, without keeping the aspect: bilinear with antialias, on uint8.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        size: wanted (height, width) in pixels.

    Returns:
        RGB, uint8 (height, width, 3).

    Raises:
        ImageError: where the pixels or the size are of another kind.
    """
    _check_pixels(pixels, dimensions=3)
    if len(size) != 2 or min(size) < 1:
        raise ImageError(
            f"An image cannot be resized to {tuple(size)}; pass the size as (height, width) with both numbers at "
            "least 1."
        )
    # Golden images, 112 x 112: torch on uint8 is exact; Pillow's BILINEAR is 1 level off in 34 of 112896 values.
    image = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)
    resized = torch.nn.functional.interpolate(image, tuple(size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())  # (1, 3, h, w) -> (h, w, 3)


def normalize(pixels: Pixels) -> torch.Tensor:
    """Turns pixels into the encoder's input: mean 0.5 and deviation 0.5 of 0..1, so 0..255 becomes -1..1.

    Args:
        pixels: RGB, uint8 (B, H, W, 3).

    Returns:
        float32 (B, 3, H, W), contiguous.

    Raises:
        ImageError: where the pixels are of another shape or type.
    """
    _check_pixels(pixels, dimensions=4)
    image = torch.from_numpy(np.array(pixels, order="C")).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return image.to(torch.float32, memory_format=torch.contiguous_format).mul_(PIXEL_SCALE).sub_(1)


def denormalize(image: torch.Tensor) -> torch.Tensor:
    """Inverts `normalize`: (B, 3, H, W) -> uint8 (B, H, W, 3) on the same device."""
    pixels = ((image.float() + 1) * 127.5).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def load_images(
    paths: Sequence[Path], size: tuple[int, int], value_range: ValueRange | None = None, say: Say = silent
) -> Pixels:
    """Reads images and brings them to one size, in the order given.

    Args:
        paths: B image files, one or more.
        size: (height, width) in pixels.
        value_range, say: as of read_image.

    Returns:
        RGB, uint8 (B, height, width, 3).

    Raises:
        ImageError: where there is no path, or an image cannot be read.
    """
    if not paths:
        raise ImageError("No image file was given; pass one or more image files.")
    return np.stack([resize_image(read_image(path, value_range, say), size) for path in paths])


def find_images(folder: Path) -> list[Path]:
    """Lists the images of a folder, by suffix, sorted by name; sub-folders and hidden files are left out.

    Args:
        folder: the folder to look in.

    Returns:
        One path or more.

    Raises:
        ImageError: where the folder is missing, cannot be listed, or holds no image.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(
            f"The folder {folder} cannot be read ({reason}); pass an existing folder that contains images."
        ) from None
    # Hidden: macOS puts a `._photo.jpg` that is no JPEG beside each `photo.jpg` on foreign disks.
    images = [path for path in entries if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()]
    if not images:
        skipped = f"{line}; " if (line := skipped_line(folder)) else ""
        names = ", ".join(sorted(SUFFIXES))
        raise ImageError(
            f"The folder {folder} contains no image; {skipped}the supported file name extensions are {names}."
        )
    return images


def skipped_line(folder: Path) -> str | None:
    """Counts and names the visible files that `find_images` skips; None if there are none."""
    try:
        entries = sorted(Path(folder).iterdir())
    except (OSError, ValueError):  # told by find_images
        return None
    skipped = [
        path.name for path in entries if path.suffix.lower() not in SUFFIXES and path.name[0] != "." and path.is_file()
    ]
    if not skipped:
        return None
    more = f" and {len(skipped) - MOST_NAMED} more files" if len(skipped) > MOST_NAMED else ""
    files = "1 file was" if len(skipped) == 1 else f"{len(skipped)} files were"
    convert = any(Path(name).suffix.lower() in UNREAD for name in skipped)
    return (
        f"{folder}: {files} skipped ({', '.join(skipped[:MOST_NAMED])}{more})"
        f"{'; convert HEIC, AVIF and raw images to PNG or JPEG' if convert else ''}"
    )


def _open_file(path: Path) -> BinaryIO:
    """Opens a file that holds at least one byte."""
    if path.is_dir():
        raise ImageError(f"{path} is a folder, but an image file is needed; pass an image file.")
    if path.is_fifo():  # opening it would wait for ever
        raise ImageError(f"{path} is a named pipe, which cannot be read as an image; pass an image file.")
    try:
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} cannot be opened ({reason}); check the path and its permissions.") from None
    if os.fstat(stream.fileno()).st_size == 0:  # devices such as /dev/zero too
        stream.close()
        raise ImageError(f"{path} is empty (0 bytes); download or save it again.")
    return stream


class _NoRangeError(ValueError):
    """Pixels whose values have no fixed range, or to which a range cannot be applied."""


def _decode(stream: BinaryIO, value_range: ValueRange | None, say: Say) -> Pixels:
    """Decodes an image stream to RGB, uint8 (H, W, 3); raises whatever Pillow raises."""
    with Image.open(stream, formats=FORMATS) as image:
        deep_color = any(";16" in str(tile[3]) for tile in image.tile) and not image.mode.startswith("I")
        image.load()
        upright = ImageOps.exif_transpose(image)
        png_or_ppm = image.format in ("PNG", "PPM")  # their mode `I` means 0..65535, a TIFF's any 32 bits
    if upright.mode[0] in "IF":
        bits = 16 if upright.mode.startswith("I;16") or (upright.mode == "I" and png_or_ppm) else 32
        return np.repeat(_to_8_bits(np.asarray(upright), bits, value_range, say)[:, :, None], 3, axis=2)
    if deep_color:
        if value_range:
            raise _NoRangeError(
                "the image has 16-bit color, and Pillow decodes only the high byte of each value, so "
                "--image-range cannot be applied; scale the image yourself and save it as 8-bit RGB PNG"
            )
        most = int(np.asarray(upright).max())
        say(
            f"the image has 16-bit color with values up to about {most * 257}; only the high byte of each value is "
            f"used, so the largest 8-bit value is {most} of 255. If the result is too dark, scale the image yourself "
            "and save it as 8-bit RGB PNG"
        )
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # the same colors; Pillow warns about the direct way
    return np.array(upright.convert("RGB"))


def _to_8_bits(values: np.ndarray, bits: int, value_range: ValueRange | None, say: Say) -> Pixels:
    """Gray pixels deeper than 8 bits (H, W), by the range or, of 16 bits, by their high byte."""
    known = values[np.isfinite(values)]
    seen = f"{known.min():.6g} to {known.max():.6g}" if known.size else "none of which is finite"
    kind = f"{bits}-bit {'float ' if values.dtype.kind == 'f' else ''}gray with values {seen}"
    if value_range:
        say(
            f"the image is {kind}; pixel values from {value_range.low:g} to {value_range.high:g} are scaled to the "
            "range 0 to 255"
        )
        return value_range.scale(values)
    if bits == 32:
        raise _NoRangeError(
            f"the image is {kind}, and this type has no fixed range; pass the values of black and white with "
            "--image-range LOW:HIGH"
        )
    # Pillow clips 16-bit gray at 255 but takes the high byte of 16-bit RGB; both take the high byte here.
    high = (values.astype(np.int32) >> 8).astype(np.uint8)
    say(
        f"the image is {kind}. neck-export keeps only the high byte of each 16-bit value, which gives 8-bit values "
        f"from {high.min()} to {high.max()}. If the contrast is too low, pass --image-range LOW:HIGH, which spreads "
        "the values from LOW to HIGH over 0 to 255"
    )
    return high


def _check_pixels(pixels: Pixels, dimensions: int) -> None:
    wanted = "(H, W, 3)" if dimensions == 3 else "(B, H, W, 3)"
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ImageError(
            f"The pixels have the type {pixels.dtype} and the shape {pixels.shape}; pass a non-empty uint8 array "
            f"of shape {wanted} in RGB."
        )
