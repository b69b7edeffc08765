"""Images that the tests of C++ write."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from synthetic_images import images_of


def write_image(path: Path, size: int = 16, mode: str = "RGB", **options: Any) -> Path:
    Image.fromarray(images_of(1, 1, size)[0]).convert(mode).save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, depth: int, color: int, samples: np.ndarray, extra: bytes = b"") -> Path:
    """A PNG that Pillow does not write, such as 16-bit color."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def turned(path: Path, orientation: int = 6, size: int = 13) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(images_of(1, 1, 20)[0, :size, :16]).save(path, exif=exif)
    return path


def cut(path: Path, missing: int | None = None) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - (missing or len(data) // 4)])
    return path


def noise(path: Path, height: int, width: int) -> Path:
    """Pixels without any order, where a wrong weight shows most, over a slope."""
    chance = np.random.default_rng(height * 10_000 + width)
    slope = np.linspace(0, 200, width)[None, :, None] + chance.integers(0, 56, (height, width, 3))
    Image.fromarray(slope.astype(np.uint8)).save(path, compress_level=1)
    return path
