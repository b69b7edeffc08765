"""Images against SAM 3's own processor, and what becomes of unusual and broken files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from neck.images import (
    ImageError,
    find_images,
    load_images,
    normalize,
    read_image,
    resize_image,
    skipped_line,
)

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "preprocess"
NAMES = ("image_0", "image_1", "image_2")
CHELSEA = DATA / "images" / "chelsea.png"

LEVEL = 1 / 127.5
"""One step of a uint8 pixel after normalization."""
LARGEST_DIFFERENCE = 1.5 * LEVEL
"""One level of rounding may differ on another processor's uint8 kernel; two may not."""
MEAN_DIFFERENCE = 0.1 * LEVEL
"""Measured 0 with torch 2.13 (AVX2 and plain); resizing in float32 instead gives 0.15 to 0.18 levels."""
JPEG_NOISE = 6
"""Levels that a quality 95 JPEG may be off; measured 2 for RGB and 0 for CMYK, an inverted CMYK is off by 255."""


def agrees(pixels: npt.NDArray[np.uint8], expected: torch.Tensor) -> bool:
    difference = (normalize(pixels[None])[0] - expected).abs()
    return difference.max().item() <= LARGEST_DIFFERENCE and difference.mean().item() <= MEAN_DIFFERENCE


def halves() -> npt.NDArray[np.uint8]:
    """Red left, blue right, a green row on top: (24, 40, 3), which no turn or flip leaves as it is."""
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:, :20, 0] = 200
    pixels[:, 20:, 2] = 160
    pixels[:8] = (0, 120, 0)
    return pixels


@pytest.mark.parametrize("name", NAMES)
def test_like_the_processor_of_sam3(name: str) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")[name]
    pixels = load_images([GOLDEN / f"{name}.png"], (112, 112))[0]
    assert agrees(pixels, expected)

    off_in_one = pixels.copy()
    off_in_one[50, 60, 1] ^= 2
    assert not agrees(off_in_one, expected)
    off_in_many = pixels.copy()
    off_in_many[::2, ::2] ^= 1
    assert not agrees(off_in_many, expected)
    assert not agrees(np.ascontiguousarray(pixels[:, :, ::-1]), expected)  # BGR
    assert not agrees(np.ascontiguousarray(pixels[:, ::-1]), expected)


@pytest.mark.parametrize("name", NAMES[:2])
def test_nearest_resize_is_told_apart(name: str) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")[name]
    with Image.open(GOLDEN / f"{name}.png") as image:
        assert not agrees(np.array(image.convert("RGB").resize((112, 112), Image.Resampling.NEAREST)), expected)


def test_normalize_takes_0_to_255_to_minus_1_to_1() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    ramp[..., 1] = 0
    image = normalize(ramp)
    assert image.shape == (1, 3, 16, 16) and image.dtype == torch.float32 and image.is_contiguous()
    expected = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    rounding = 2**-22  # two roundings in float32, measured 1.5e-7; the next level is 7.8e-3 away
    assert (image[0, 0].flatten() - expected).abs().max().item() <= rounding
    assert (image[0, 2].flatten() - expected.roll(1)).abs().max().item() > rounding
    assert (image[0, 1] == -1).all()
    assert image.min().item() == -1 and image.max().item() == 1


def test_load_keeps_order_and_size() -> None:
    paths = [CHELSEA, GOLDEN / "image_0.png"]
    batch = load_images(paths, (56, 84))
    assert batch.shape == (2, 56, 84, 3) and batch.dtype == np.uint8
    assert np.array_equal(batch[::-1], load_images(paths[::-1], (56, 84)))
    assert not np.array_equal(batch[0], batch[1])


def test_resize_leaves_its_input_and_the_same_size_alone() -> None:
    pixels = read_image(CHELSEA)
    before = pixels.copy()
    assert np.array_equal(resize_image(pixels, before.shape[:2]), before)
    assert not np.array_equal(resize_image(pixels, (299, 451)), before[:299])
    pixels.setflags(write=False)
    flipped = resize_image(pixels[:, ::-1], (60, 90))  # read-only, negative strides
    assert np.array_equal(flipped, resize_image(np.ascontiguousarray(before[:, ::-1]), (60, 90)))
    assert np.array_equal(pixels, before)
    assert (resize_image(np.full((1, 1, 3), 7, np.uint8), (5, 9)) == 7).all()


def save_gray16(path: Path) -> None:
    Image.fromarray(halves()[:, :, 0].astype(np.uint16) * 257).save(path)


def save_palette(path: Path) -> None:
    Image.fromarray(halves()).quantize(8).save(path)


def save_clear_palette(path: Path) -> None:
    Image.fromarray(halves()).quantize(8).save(path, transparency=bytes([0, 128, 255]))


def save_rgba(path: Path) -> None:
    alpha = np.linspace(0, 255, 24 * 40).astype(np.uint8).reshape(24, 40, 1)
    Image.fromarray(np.concatenate([halves(), alpha], axis=2)).save(path)


RED = halves()[:, :, 0]
BLACK_WHITE = np.where(RED > 0, 255, 0).astype(np.uint8)
EXACT: dict[str, tuple[str, Callable[[Path], None], npt.NDArray[np.uint8]]] = {
    "rgb": ("a.png", lambda path: Image.fromarray(halves()).save(path), halves()),
    "wrong suffix": ("a.jpg", lambda path: Image.fromarray(halves()).save(path, format="PNG"), halves()),
    "tiff": ("a.tif", lambda path: Image.fromarray(halves()).save(path), halves()),
    "bmp": ("a.bmp", lambda path: Image.fromarray(halves()).save(path), halves()),
    "webp": ("a.webp", lambda path: Image.fromarray(halves()).save(path, lossless=True), halves()),
    "gray": ("a.png", lambda path: Image.fromarray(RED).save(path), np.stack([RED] * 3, 2)),
    "gray, 16 bit png": ("a.png", save_gray16, np.stack([RED] * 3, 2)),
    "gray, 16 bit tiff": ("a.tif", save_gray16, np.stack([RED] * 3, 2)),
    "gray, 16 bit pgm": ("a.pgm", save_gray16, np.stack([RED] * 3, 2)),
    "one bit": ("a.png", lambda path: Image.fromarray(RED > 0).save(path), np.stack([BLACK_WHITE] * 3, 2)),
    "palette": ("a.png", save_palette, halves()),
    "palette with alpha": ("a.png", save_clear_palette, halves()),
    "gif": ("a.gif", save_palette, halves()),
    "rgba": ("a.png", save_rgba, halves()),
}


@pytest.mark.parametrize("case", EXACT)
def test_reads_unusual_images(case: str, tmp_path: Path) -> None:
    name, save, expected = EXACT[case]
    save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, expected)
    assert not np.array_equal(pixels, expected ^ 1)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_reads_jpeg(mode: str, tmp_path: Path) -> None:
    Image.fromarray(halves()).convert(mode).save(tmp_path / "a.jpg", quality=95, subsampling=0)
    error = np.abs(read_image(tmp_path / "a.jpg").astype(int) - halves())
    assert error.max() <= JPEG_NOISE
    assert np.abs(255 - read_image(tmp_path / "a.jpg").astype(int) - halves()).max() > JPEG_NOISE  # inverted CMYK


def test_reads_16_bit_rgb_png(tmp_path: Path) -> None:
    path = DATA / "images" / "rgb16.png"
    expected = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    assert np.array_equal(read_image(path), expected)
    assert not np.array_equal(read_image(path), expected ^ 1)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(suffix: str, orientation: int, tmp_path: Path) -> None:
    upright = halves()
    turned = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
    turned += [upright.swapaxes(0, 1), np.rot90(upright, 1), np.rot90(upright, 2).swapaxes(0, 1), np.rot90(upright, -1)]
    stored = np.ascontiguousarray(turned[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(stored).save(path, exif=exif, **options)
    assert np.array_equal(read_image(path), upright)
    assert (orientation == 1) == np.array_equal(stored, upright)


def write_broken(folder: Path, case: str) -> Path:
    good = CHELSEA.read_bytes()
    path = folder / "broken.png"
    contents = {
        "empty": b"",
        "text": b"this is no image\n" * 20,
        "truncated": good[: len(good) // 2],
        "signature only": good[:8],
        "corrupt": good[:5000] + bytes(2000) + good[7000:],
    }
    if case in contents:
        path.write_bytes(contents[case])
    elif case == "folder":
        path.mkdir()
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "eps":
        Image.fromarray(halves()).save(path, format="EPS")
    elif case == "float":
        path = folder / "broken.tif"
        Image.fromarray(np.ones((4, 4), np.float32)).save(path)
    return path


BROKEN = {
    "missing": "cannot be opened .No such file or directory.; check the path",
    "empty": "is empty .0 bytes.",
    "text": "is damaged or",
    "truncated": "cannot be decoded .*truncated",
    "signature only": "is damaged or",
    "corrupt": "is damaged or",
    "folder": "is a folder, but an image file",
    "fifo": "is a named pipe",
    "eps": "is damaged or",
    "float": "is 32-bit float gray with values 1 to 1, and this type has no fixed range",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file_gives_one_clear_error(case: str, tmp_path: Path) -> None:
    path = write_broken(tmp_path, case)
    with pytest.raises(ImageError, match=BROKEN[case]) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


@pytest.mark.parametrize("limit", [600, 300])  # for 960 pixels Pillow warns above the limit, raises above twice that
def test_decompression_bomb(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(halves()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ImageError, match=rf"more than {limit} pixels"):
        read_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 960)
    assert np.array_equal(read_image(tmp_path / "a.png"), halves())


def test_path_with_a_zero_byte() -> None:
    with pytest.raises(ImageError, match="cannot be"):
        read_image(Path("a\0b.png"))


def test_find_images(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "c.txt", "._a.jpg", "noext"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "d.png").mkdir()
    assert find_images(tmp_path) == [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    with pytest.raises(ImageError, match="no image"):
        find_images(tmp_path / "d.png")
    with pytest.raises(ImageError, match="No such file"):
        find_images(tmp_path / "missing")
    with pytest.raises(ImageError, match="Not a directory"):
        find_images(tmp_path / "a.jpg")


def test_the_other_names_of_jpeg(tmp_path: Path) -> None:
    for name in ("a.jfif", "b.JPE"):
        Image.fromarray(halves()).save(tmp_path / name, format="JPEG")
    assert find_images(tmp_path) == [tmp_path / "a.jfif", tmp_path / "b.JPE"]
    assert load_images(find_images(tmp_path), (4, 4)).shape == (2, 4, 4, 3)
    assert skipped_line(tmp_path) is None


def test_files_that_are_skipped_are_counted_and_named(tmp_path: Path) -> None:
    for name in ("a.jpg", "1.HEIC", "2.avif", "3.txt", "4.txt", "5.txt", "._x.heic"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    line = skipped_line(tmp_path) or ""
    assert "5 files" in line and "1.HEIC, 2.avif, 3.txt, 4.txt and 1 more" in line and "convert" in line
    for path in tmp_path.glob("*.*"):
        if path.suffix.lower() not in (".heic",):
            path.unlink()
    with pytest.raises(ImageError, match=r"1 file was skipped \(1\.HEIC\)"):
        find_images(tmp_path)
    assert skipped_line(tmp_path / "missing") is None


def test_wrong_arrays_and_sizes() -> None:
    pixels = halves()
    three: tuple[npt.NDArray[Any], ...]
    three = (pixels[None], pixels[:, :, 0], pixels[:, :, :2], pixels.astype(np.float32), pixels[:0])
    four: tuple[npt.NDArray[Any], ...]
    four = (pixels, pixels[None].astype(np.int16), pixels[None].transpose(0, 3, 1, 2))
    for wrong in three:
        with pytest.raises(ImageError, match=r"uint8 array of shape \(H, W, 3\)"):
            resize_image(wrong, (8, 8))
    for wrong in four:
        with pytest.raises(ImageError, match=r"uint8 array of shape \(B, H, W, 3\)"):
            normalize(wrong)
    for size in ((0, 8), (8, -1), (8,)):
        with pytest.raises(ImageError, match=r"resized to .*\(height, width\)"):
            resize_image(pixels, size)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="No image file was given"):
        load_images([], (8, 8))
