"""Picture files to the encoder's input, as SAM 3's own processor does it: RGB, straight resize, values in -1..1."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]

# Named, so that Pillow never hands a file to Ghostscript (EPS) or to a plugin that nobody asked for.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

# The golden tensors have the bits of x * float32(2 / 255) - 1; x / 127.5 - 1 and four other ways are 1.2e-7 off.
PIXEL_SCALE = 2 / 255
"""Factor of the normalisation `pixel * PIXEL_SCALE - 1`, which takes 0..255 to -1..1."""


class PictureError(ValueError):
    """A picture that cannot be read or used; the message says which, why and what to do."""


def read_picture(path: Path) -> Pixels:
    """Reads a picture file at its own size.

    The EXIF orientation is applied. Alpha is dropped, not blended, as `convert("RGB")` does for SAM 3's processor.
    16-bit pixels, grey or colour, keep their high byte. Of an animation or a multi-page file the first frame is taken.

    Args:
        path: a PNG, JPEG, WebP, BMP, TIFF, GIF or PPM file; its content counts, not its suffix.

    Returns:
        RGB pixels, uint8 (H, W, 3).

    Raises:
        PictureError: where the file is missing, empty, damaged, no picture, or above `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _open_file(Path(path)) as stream:
        try:
            return _decode(stream)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            reason = f"has more than the {Image.MAX_IMAGE_PIXELS} pixels that are safe to unpack; make it smaller"
        except UnidentifiedImageError:
            reason = f"is damaged or in no known format ({', '.join(FORMATS)}); fetch it again or convert it to PNG"
        except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, IndexError ...
            cause = " ".join(str(error).split()) or type(error).__name__
            reason = f"cannot be decoded ({cause}); fetch it again or save it as 8-bit RGB PNG"
    raise PictureError(f"{path} {reason}.")


def resize_picture(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes straight to a size, without keeping the aspect: bilinear with antialias, on uint8.

    Args:
        pixels: RGB, uint8 (H, W, 3).
        size: wanted (height, width) in pixels.

    Returns:
        RGB, uint8 (height, width, 3).

    Raises:
        PictureError: where the pixels or the size are of another kind.
    """
    _check_pixels(pixels, dimensions=3)
    if len(size) != 2 or min(size) < 1:
        raise PictureError(f"A picture cannot be resized to {tuple(size)}; give (height, width), both 1 or more.")
    # Golden pictures, 112 x 112: torch on uint8 is exact; Pillow's BILINEAR is 1 level off in 34 of 112896 values.
    image = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)
    resized = torch.nn.functional.interpolate(image, tuple(size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())  # (1, 3, h, w) -> (h, w, 3)


def normalise(pixels: Pixels) -> torch.Tensor:
    """Turns pixels into the encoder's input: mean 0.5 and deviation 0.5 of 0..1, so 0..255 becomes -1..1.

    Args:
        pixels: RGB, uint8 (B, H, W, 3).

    Returns:
        float32 (B, 3, H, W), contiguous.

    Raises:
        PictureError: where the pixels are of another shape or type.
    """
    _check_pixels(pixels, dimensions=4)
    image = torch.from_numpy(np.array(pixels, order="C")).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return image.to(torch.float32, memory_format=torch.contiguous_format).mul_(PIXEL_SCALE).sub_(1)


def load_pictures(paths: Sequence[Path], size: tuple[int, int]) -> Pixels:
    """Reads pictures and brings them to one size, in the order given.

    Args:
        paths: B picture files, one or more.
        size: (height, width) in pixels.

    Returns:
        RGB, uint8 (B, height, width, 3).

    Raises:
        PictureError: where there is no path, or a picture cannot be read.
    """
    if not paths:
        raise PictureError("No picture was given; give one or more picture files.")
    return np.stack([resize_picture(read_picture(path), size) for path in paths])


def find_pictures(folder: Path) -> list[Path]:
    """Lists the pictures of a folder, by suffix, sorted by name; sub-folders and hidden files are left out.

    Args:
        folder: the folder to look in.

    Returns:
        One path or more.

    Raises:
        PictureError: where the folder is missing, cannot be listed, or holds no picture.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{folder} cannot be listed ({reason}); give a folder that holds pictures.") from None
    # Hidden: macOS puts a `._photo.jpg` that is no JPEG beside each `photo.jpg` on foreign disks.
    pictures = [path for path in entries if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()]
    if not pictures:
        raise PictureError(f"{folder} holds no picture; put files there that end in {', '.join(sorted(SUFFIXES))}.")
    return pictures


def _open_file(path: Path) -> BinaryIO:
    """Opens a file that holds at least one byte."""
    if path.is_dir():
        raise PictureError(f"{path} is a folder; give a picture file.")
    if path.is_fifo():  # opening it would wait for ever
        raise PictureError(f"{path} is a pipe; give a picture file.")
    try:
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"{path} cannot be opened ({reason}); check the path and its permissions.") from None
    if os.fstat(stream.fileno()).st_size == 0:  # devices such as /dev/zero too
        stream.close()
        raise PictureError(f"{path} is empty (0 bytes); fetch or save it again.")
    return stream


def _decode(stream: BinaryIO) -> Pixels:
    """Decodes a picture stream to RGB, uint8 (H, W, 3); raises whatever Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream, formats=FORMATS) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            png_or_ppm = image.format in ("PNG", "PPM")  # their mode `I` means 0..65535, a TIFF's any 32 bits
    if upright.mode.startswith("I;16") or (upright.mode == "I" and png_or_ppm):
        # Pillow clips 16-bit grey at 255 but takes the high byte of 16-bit RGB; both take the high byte here.
        grey = (np.asarray(upright).astype(np.int32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if upright.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels, Pillow's mode {upright.mode}, have no fixed range")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return np.array(upright.convert("RGB"))


def _check_pixels(pixels: Pixels, dimensions: int) -> None:
    wanted = "(H, W, 3)" if dimensions == 3 else "(B, H, W, 3)"
    if pixels.dtype != np.uint8 or pixels.ndim != dimensions or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise PictureError(f"Pixels are {pixels.dtype} {pixels.shape}; give uint8 {wanted}, RGB, not empty.")
