"""neck::Preprocessor: PNG and JPEG as neck/images.py reads and resizes them; bad images."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from cpp_build import (
    Programs,
    settings,
    why_missing,
    write_plan,
)
from cpp_images import chunk, cut, noise, turned, write_image, write_png
from PIL import Image
from unusual_images import jpeg, repeat_last_scan, write_all

from neck.images import ImageError, load_images, normalize, read_image

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def deep(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (9, 7, channels))


Write = Callable[[Path], Path]
PREPROCESS_MODEL = Path(__file__).parent.parent / "engines" / "service" / "preprocess" / "model.py"


def longer(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"something else")
    return path


IMAGES: list[tuple[str, Write]] = [
    *[
        (f"{mode}.png", lambda path, mode=mode: write_image(path, 20, mode))
        for mode in ("RGB", "RGBA", "L", "LA", "1", "P")
    ],
    ("gray-16.png", lambda path: write_png(path, 16, 0, deep(1))),
    ("color-16.png", lambda path: write_png(path, 16, 2, deep(3))),
    ("alpha-16.png", lambda path: write_png(path, 16, 6, deep(4))),
    ("clear.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))),
    ("gamma.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"gAMA", struct.pack(">I", 20000)))),
    ("P-clear.png", lambda path: write_image(path, 20, "P", transparency=3)),
    ("RGB.jpg", lambda path: write_image(path, 33)),
    ("sub.jpg", lambda path: write_image(path, 33, subsampling=2, quality=60)),
    ("gray.jpg", lambda path: write_image(path, 33, "L")),
    ("progressive.jpg", lambda path: write_image(path, 33, progressive=True)),
    ("CMYK.jpg", lambda path: write_image(path, 33, "CMYK")),
    ("gray-clear.png", lambda path: write_png(path, 8, 0, deep(1) >> 8, chunk(b"tRNS", bytes([0, 5])))),
    ("animated.png", lambda path: write_image(path, 20, save_all=True, append_images=[Image.new("RGB", (20, 20))])),
    ("trailing.jpg", lambda path: longer(write_image(path, 33))),
    *[(f"turned-{turn}.jpg", lambda path, turn=turn: turned(path, turn)) for turn in range(1, 9)],
    *[(f"turned-{turn}.png", lambda path, turn=turn: turned(path, turn)) for turn in (3, 6)],
]


@pytest.mark.parametrize(("name", "write"), IMAGES, ids=[name for name, _ in IMAGES])
def test_pixels_are_pythons(programs: Programs, tmp_path: Path, name: str, write: Write) -> None:
    """Bit for bit, before and after the normalization."""
    path = write(tmp_path / name)
    pixels = read_image(path)
    ended = subprocess.run([programs.path("neck-tests"), "image", path], capture_output=True, env=settings({}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout[: pixels.size] == pixels.tobytes()
    assert ended.stdout[pixels.size :] == normalize(pixels[None]).numpy().tobytes()


def preprocess_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The ensemble's decoder without its server."""
    backend = ModuleType("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("preprocess_model", PREPROCESS_MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(read: Callable[[], np.ndarray], refusal: type[Exception]) -> str:
    """Size and SHA-256 of pixels, as `neck-tests images` prints them, or that there are none."""
    try:
        pixels = read()
    except refusal:
        return "refused"
    height, width, _ = pixels.shape
    return f"(1, {height}, {width}, 3) {hashlib.sha256(pixels.tobytes()).hexdigest()}"


def test_unusual_images_are_the_same_bits_or_refused_by_all_three(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++, Python and the ensemble's decoder; the control is that turned images differ from those that are not."""
    paths = write_all(tmp_path)
    model = preprocess_model(monkeypatch)
    ran = programs.run("neck-tests", "images", *paths)
    assert (ran.code, ran.err) == (0, "")
    found = ["refused" if line.startswith("error: ") else line.removeprefix("read: ") for line in ran.out.splitlines()]
    wanted = [shown(lambda path=path: read_image(path), ImageError) for path in paths]  # type: ignore[misc]
    served = [
        shown(lambda path=path: model.decode(path.read_bytes()), model.BadImageError)  # type: ignore[misc]
        for path in paths
    ]
    assert {path.name: text for path, text in zip(paths, found, strict=True)} == {
        path.name: text for path, text in zip(paths, wanted, strict=True)
    }
    assert served == wanted
    by_name = dict(zip((path.name for path in paths), wanted, strict=True))
    assert len(paths) >= 120
    assert len(paths) // 5 > wanted.count("refused") > 20
    turns = {by_name[f"exif-big-{value}.jpg"] for value in range(1, 9)}
    assert len(turns) == 8 and "refused" not in turns
    assert by_name["exif-big-long.jpg"] == by_name["exif-little-6.jpg"] != by_name["exif-big-byte.jpg"]


def test_inks_of_every_kind_are_pillows(programs: Programs, tmp_path: Path) -> None:
    """CMYK with every black: each of 256 x 256 pairs of one ink and black, from a JPEG of flat blocks."""
    inks, blacks = np.meshgrid(np.arange(0, 256, 5), np.arange(256), indexing="ij")
    flat = np.stack([inks, 255 - inks, inks // 2, blacks], axis=-1).astype(np.uint8)
    path = tmp_path / "inks.jpg"
    Image.fromarray(flat.repeat(8, axis=0).repeat(8, axis=1), "CMYK").save(path, quality=100, subsampling=0)
    ran = programs.run("neck-tests", "images", path)
    assert ran.out == f"read: {shown(lambda: read_image(path), ImageError)}\n"


def test_what_a_image_may_cost_is_limited(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans and pixels: refused before anything is unpacked, in C++ and in the ensemble."""
    model = preprocess_model(monkeypatch)
    files = {scans: tmp_path / f"{scans}.jpg" for scans in (100, 101)}
    for scans, path in files.items():
        path.write_bytes(repeat_last_scan(jpeg(progressive=True), scans))
    Image.new("L", (6000, 5000)).save(tmp_path / "large.jpg", progressive=True, quality=5)
    large = tmp_path / "large-36.jpg"  # at 30 million pixels 24 and a half take as long as 12 of the largest image
    large.write_bytes(repeat_last_scan((tmp_path / "large.jpg").read_bytes(), 36))
    ran = programs.run("neck-tests", "images", files[100], files[101], large)
    lines = ran.out.splitlines()
    assert lines[0].startswith("read: ")
    assert lines[1].startswith(f"error: {files[101]}: the image is a JPEG with 101 scans")
    assert lines[2].startswith(f"error: {large}: the image is a JPEG with 36 scans")
    assert model.decode(files[100].read_bytes()).shape == (21, 34, 3)
    for path in (files[101], large):
        with pytest.raises(model.BadImageError, match="scans"):
            model.decode(path.read_bytes())
    data = jpeg()
    assert model.decode(data, model.Limits(21 * 34, 1)).shape == (21, 34, 3)
    with pytest.raises(model.BadImageError, match="pixels"):
        model.decode(data, model.Limits(21 * 34 - 1, 1))
    limits = programs.run("neck-tests", "limits", tmp_path / "100.jpg")
    assert limits.out.splitlines() == ["read", "pixels", "scans", "error", "error"]


def test_the_ensembles_limits_are_read_from_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    model = preprocess_model(monkeypatch)
    output = {"name": "image", "data_type": "TYPE_UINT8", "dims": ["16", "16", "3"]}
    started = model.TritonPythonModel()
    started.initialize({"model_config": json.dumps({"output": [output]})})
    assert started.limits == (89_478_485, 100)
    told = {"max_pixels": {"string_value": "1000"}, "max_scans": {"string_value": "9"}}
    started.initialize({"model_config": json.dumps({"output": [output], "parameters": told})})
    assert started.limits == (1000, 9)
    for bad in ("0", "-1", "many", ""):
        told["max_scans"] = {"string_value": bad}
        with pytest.raises(ValueError, match="max_scans"):
            started.initialize({"model_config": json.dumps({"output": [output], "parameters": told})})


def test_images_from_memory_are_those_of_files(programs: Programs, tmp_path: Path) -> None:
    paths = [turned(tmp_path / "a.jpg"), write_image(tmp_path / "b.png", 30), tmp_path / "c.png"]
    paths[2].write_bytes(b"\x89PNG\r\n\x1a\n")
    ran = programs.run("neck-tests", "memory", *paths)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[:2] == ["same", "same"]
    assert ran.out.splitlines()[2].startswith("error: image 1 of 1: the image is damaged")


def test_damaged_data_are_reported_to_the_log(programs: Programs, tmp_path: Path) -> None:
    """libjpeg makes pixels up, as it does for Pillow; the program says so, the library's own stderr is empty."""
    data = jpeg()
    path = tmp_path / "ended.jpg"
    path.write_bytes(data[: len(data) * 2 // 3] + b"\xff\xd9")
    ran = programs.run("neck-tests", "log", path)
    assert ran.out.startswith(f"warning: {path}: the image is damaged, so libjpeg made up some of the pixels (")
    assert ran.err == ""
    assert programs.run("neck-tests", "images", path).err == ""
    path.write_bytes(data)
    assert programs.run("neck-tests", "log", path).out == ""


def bomb(path: Path) -> Path:
    """A few bytes that unpack to 10 GB."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


BAD_IMAGES: list[tuple[str, Write, str]] = [
    ("none.png", lambda path: path, "the image cannot be opened (No such file or directory); check the path"),
    ("folder.png", lambda path: (path.mkdir(), path)[1], "the image cannot be opened (Is a directory); check the path"),
    (
        "pipe.png",
        lambda path: (os.mkfifo(path), path)[1],
        "the image cannot be opened (Invalid argument); check the path",
    ),
    ("empty.png", lambda path: (path.touch(), path)[1], "the image file is empty (0 bytes"),
    ("a.gif", write_image, "the image is damaged or has an unknown format"),
    ("cut.png", lambda path: cut(write_image(path)), "the image is damaged ("),
    ("cut.jpg", lambda path: cut(write_image(path)), "the image is damaged ("),
    ("short.jpg", lambda path: cut(write_image(path), 2), "the image is damaged (the file ends too early); "),
    ("zero.png", lambda path: write_png(path, 8, 2, np.zeros((16, 0, 3))), "the image is damaged: its width"),
    (
        "bomb.png",
        lambda path: bomb(path),
        "the image has more than 89478485 pixels",
    ),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD_IMAGES, ids=[name for name, _, _ in BAD_IMAGES])
def test_a_bad_image_is_refused(programs: Programs, tmp_path: Path, name: str, write: Write, message: str) -> None:
    image = write(tmp_path / name)
    ran = programs.run("neck-engine", write_plan(tmp_path / "plan"), image)
    assert (ran.code, ran.out) == (1, "")
    assert ran.error.startswith(f"{image}: {message}")


def resized(programs: Programs, size: tuple[int, int], threads: int, paths: list[Path]) -> np.ndarray:
    ended = subprocess.run(
        [programs.path("neck-tests"), "resize", *map(str, size), str(threads), *paths],
        capture_output=True,
        env=settings({}),
    )
    assert ended.returncode == 0, ended.stderr
    return np.frombuffer(ended.stdout, np.uint8).reshape(len(paths), *size, 3)


def levels_off(found: np.ndarray, paths: list[Path]) -> int:
    """The largest difference from neck/images.py, in levels of 255."""
    return int(np.abs(found.astype(int) - load_images(paths, found.shape[1:3])).max())


SIDES = [1, 2, 3, 5, 14, 27, 28, 29, 31, 56, 57, 97, 111, 260, 333]


def test_any_image_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    """196 sizes, up and down, odd ratios, with one thread and with three; the control is another image."""
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
def test_a_large_image_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    paths = [noise(tmp_path / "large.png", 6000, 4000), noise(tmp_path / "large.jpg", 4000, 6000)]
    for size in ((1008, 1008), (1008, 672)):
        assert levels_off(resized(programs, size, 2, paths), paths) <= 1
