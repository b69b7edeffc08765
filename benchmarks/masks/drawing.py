"""Images of two findings side by side, and of where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.masks.objects import Objects
from benchmarks.masks.options import MasksError
from neck.images import Pixels

OWN, FILE, DIFFERENCE = (64, 160, 255), (255, 170, 0), (255, 0, 96)


def save_images(
    folder: Path,
    paths: Sequence[Path],
    images: Iterable[Pixels],
    own: Sequence[Sequence[Objects]],
    other: Sequence[Sequence[Objects]],
) -> None:
    """Writes NAME.masks.png for each image: the model's masks, the file's masks, and their difference.

    Raises:
        MasksError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, pixels, mine, theirs in zip(paths, images, own, other, strict=True):
            first, second = (_union(objects, (len(pixels), len(pixels[0]))) for objects in (mine, theirs))
            panels = [_tint(pixels, mask, color) for mask, color in ((first, OWN), (second, FILE))]
            panels.append(_tint(pixels, first ^ second, DIFFERENCE))
            Image.fromarray(np.concatenate(panels, axis=1)).save(folder / f"{path.name}.masks.png")
    except OSError as error:
        raise MasksError(
            f"{folder}: the images cannot be written ({error.strerror or error}); choose another folder with --save"
        ) from None


def _union(objects: Sequence[Objects], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Where any object is, at the image's size (height, width)."""
    whole = np.zeros(size, bool)
    for one in objects:
        for mask in one.masks:
            whole |= np.asarray(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST))
    return whole


def _tint(pixels: Pixels, mask: npt.NDArray[np.bool_], color: tuple[int, int, int]) -> Pixels:
    tinted = pixels // 2  # darker, so that the color is seen on any image
    tinted[mask] = pixels[mask] // 2 + np.array(color, np.uint8) // 2
    return tinted
