"""neck::Preprocessor: PNG and JPEG as neck/pictures.py reads and resizes them; bad pictures."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cpp_build import (
    Programs,
    settings,
    why_missing,
    write_plan,
)
from cpp_pictures import chunk, cut, noise, turned, write_picture, write_png
from PIL import Image

from neck.pictures import load_pictures, normalise, read_picture

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def deep(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (9, 7, channels))


Write = Callable[[Path], Path]


def longer(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"something else")
    return path


PICTURES: list[tuple[str, Write]] = [
    *[
        (f"{mode}.png", lambda path, mode=mode: write_picture(path, 20, mode))
        for mode in ("RGB", "RGBA", "L", "LA", "1", "P")
    ],
    ("grey-16.png", lambda path: write_png(path, 16, 0, deep(1))),
    ("colour-16.png", lambda path: write_png(path, 16, 2, deep(3))),
    ("alpha-16.png", lambda path: write_png(path, 16, 6, deep(4))),
    ("clear.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))),
    ("gamma.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"gAMA", struct.pack(">I", 20000)))),
    ("P-clear.png", lambda path: write_picture(path, 20, "P", transparency=3)),
    ("RGB.jpg", lambda path: write_picture(path, 33)),
    ("sub.jpg", lambda path: write_picture(path, 33, subsampling=2, quality=60)),
    ("grey.jpg", lambda path: write_picture(path, 33, "L")),
    ("progressive.jpg", lambda path: write_picture(path, 33, progressive=True)),
    ("CMYK.jpg", lambda path: write_picture(path, 33, "CMYK")),
    ("grey-clear.png", lambda path: write_png(path, 8, 0, deep(1) >> 8, chunk(b"tRNS", bytes([0, 5])))),
    ("animated.png", lambda path: write_picture(path, 20, save_all=True, append_images=[Image.new("RGB", (20, 20))])),
    ("trailing.jpg", lambda path: longer(write_picture(path, 33))),
    *[(f"turned-{turn}.jpg", lambda path, turn=turn: turned(path, turn)) for turn in range(1, 9)],
    *[(f"turned-{turn}.png", lambda path, turn=turn: turned(path, turn)) for turn in (3, 6)],
]


@pytest.mark.parametrize(("name", "write"), PICTURES, ids=[name for name, _ in PICTURES])
def test_pixels_are_pythons(programs: Programs, tmp_path: Path, name: str, write: Write) -> None:
    """Bit for bit, before and after the normalisation."""
    path = write(tmp_path / name)
    pixels = read_picture(path)
    ended = subprocess.run([programs.path("neck-tests"), "picture", path], capture_output=True, env=settings({}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout[: pixels.size] == pixels.tobytes()
    assert ended.stdout[pixels.size :] == normalise(pixels[None]).numpy().tobytes()


def bomb(path: Path) -> Path:
    """A few bytes that unpack to 10 GB."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


BAD_PICTURES: list[tuple[str, Write, str]] = [
    ("none.png", lambda path: path, "cannot be opened (No such file or directory); check the path"),
    ("folder.png", lambda path: (path.mkdir(), path)[1], "cannot be opened (Is a directory); check the path"),
    ("pipe.png", lambda path: (os.mkfifo(path), path)[1], "cannot be opened (Invalid argument); check the path"),
    ("empty.png", lambda path: (path.touch(), path)[1], "is empty (0 bytes); fetch or save it again."),
    ("a.gif", write_picture, "is damaged or in no known format (PNG, JPEG); fetch it again or convert it to PNG."),
    ("cut.png", lambda path: cut(write_picture(path)), "is damaged ("),
    ("cut.jpg", lambda path: cut(write_picture(path)), "is damaged ("),
    ("short.jpg", lambda path: cut(write_picture(path), 2), "is damaged (it ends too early); "),
    ("zero.png", lambda path: write_png(path, 8, 2, np.zeros((16, 0, 3))), "is damaged (it tells no size, or has no "),
    (
        "bomb.png",
        lambda path: bomb(path),
        "has more than the 89478485 pixels that are safe to unpack; make it smaller.",
    ),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD_PICTURES, ids=[name for name, _, _ in BAD_PICTURES])
def test_a_bad_picture_is_refused(programs: Programs, tmp_path: Path, name: str, write: Write, message: str) -> None:
    picture = write(tmp_path / name)
    ran = programs.run("neck-engine", write_plan(tmp_path / "plan"), picture)
    assert (ran.code, ran.out) == (1, "")
    assert ran.error.startswith(f"{picture} {message}")


def resized(programs: Programs, size: tuple[int, int], threads: int, paths: list[Path]) -> np.ndarray:
    ended = subprocess.run(
        [programs.path("neck-tests"), "resize", *map(str, size), str(threads), *paths],
        capture_output=True,
        env=settings({}),
    )
    assert ended.returncode == 0, ended.stderr
    return np.frombuffer(ended.stdout, np.uint8).reshape(len(paths), *size, 3)


def levels_off(found: np.ndarray, paths: list[Path]) -> int:
    """The largest difference from neck/pictures.py, in levels of 255."""
    return int(np.abs(found.astype(int) - load_pictures(paths, found.shape[1:3])).max())


SIDES = [1, 2, 3, 5, 14, 27, 28, 29, 31, 56, 57, 97, 111, 260, 333]


def test_any_picture_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    """196 sizes, up and down, odd ratios, with one thread and with three; the control is another picture."""
    chance = random.Random(3)
    sizes = [(height, width) for height in SIDES for width in SIDES if height * width < 333 * 260]
    sizes += [(1, 6000), (4000, 1), (700, 900)]
    paths = [noise(tmp_path / f"{index}.{chance.choice(['png', 'jpg'])}", *size) for index, size in enumerate(sizes)]
    assert len(paths) > 190
    found = resized(programs, (28, 56), 1, paths)
    assert levels_off(found, paths) <= 1
    assert levels_off(found[:9], paths[1:10]) > 20
    assert levels_off(resized(programs, (42, 28), 3, paths[::4]), paths[::4]) <= 1


@pytest.mark.slow
def test_a_large_picture_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    paths = [noise(tmp_path / "large.png", 6000, 4000), noise(tmp_path / "large.jpg", 4000, 6000)]
    for size in ((1008, 1008), (1008, 672)):
        assert levels_off(resized(programs, size, 2, paths), paths) <= 1
