"""Image files to what the model takes."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import ClientError, one_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")


def read_pixels(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Reads an image, upright and in RGB, resized to (height, width): uint8 (height, width, 3).

    Pillow's resize differs from the exporter's own by one or two of 255 levels in 1.2 % of the values or fewer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                upright = ImageOps.exif_transpose(image)
                if upright.mode[0] in "IF":
                    raise ClientError(
                        f"{path}: the image has {upright.mode} pixels, which have more than 8 bits per "
                        "channel; save the image as 8-bit RGB"
                    )
                if upright.mode == "P" and "transparency" in upright.info:
                    upright = upright.convert("RGBA")
                return np.array(upright.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR))
    except ClientError:
        raise
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, struct.error, IndexError ...
        raise ClientError(
            f"{path}: the file cannot be read as an image ({one_line(error)}); pass a PNG or JPEG file"
        ) from None


def normalize(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels, uint8 (B, H, W, 3), as the encoder's float32 (B, 3, H, W): 0..255 becomes -1..1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) * np.float32(2 / 255) - 1


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file, for a model that decodes it itself."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(
            f"{path}: the file cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
