"""What the C++ library reads of files: safetensors, damaged files of every kind, halves."""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cpp_build import (
    PLAN,
    Programs,
    settings,
    spoil,
    why_missing,
    write_plan,
)
from cpp_images import turned, write_image
from PIL import Image
from safetensors.numpy import save_file

from export.contract.manifest import manifest_path

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


MUTANTS = 250

Write = Callable[[Path], Path]


def test_halves_are_numpys(programs: Programs) -> None:
    ended = subprocess.run([programs.path("neck-tests"), "half"], capture_output=True, env=settings({}))
    found = np.frombuffer(ended.stdout, np.float32)
    with np.errstate(invalid="ignore"):
        wanted = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(wanted))


def mutants(data: bytes, seed: int, count: int = MUTANTS) -> list[bytes]:
    """The file cut anywhere, with bytes changed, removed, repeated, or with the largest numbers in it."""
    chance, made = random.Random(seed), []
    for number in range(count):
        copy = bytearray(data)
        place = chance.randrange(len(copy))
        if number % 5 == 0:
            del copy[place:]
        elif number % 5 == 1:
            copy[place : place + 4] = b"\xff" * chance.choice([1, 2, 4, 8])
        elif number % 5 == 2:
            del copy[place : place + chance.randrange(1, 9)]
        elif number % 5 == 3:
            copy[place:place] = copy[place : place + 40]
        else:
            for _ in range(chance.randrange(1, 6)):
                copy[chance.randrange(len(copy))] = chance.randrange(256)
        made.append(bytes(copy))
    return made


def small_safetensors(path: Path) -> Path:
    save_file({"pixels": np.zeros((1, 2, 2, 3), np.uint8), "a": np.arange(6, dtype=np.float32)}, path)
    return path


def one_plan(path: Path) -> Path:
    return manifest_path(write_plan(path.parent))


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("safetensors", lambda folder: small_safetensors(folder / "x.safetensors")),
        ("images", lambda folder: write_image(folder / "x.png")),
        ("images", lambda folder: write_image(folder / "x.jpg")),
        ("images", lambda folder: turned(folder / "x.png", size=16)),
        ("plan", lambda folder: one_plan(folder / "x")),
    ],
    ids=["safetensors", "png", "jpeg", "exif", "manifest"],
)
def test_damaged_files_do_no_harm(programs: Programs, tmp_path: Path, kind: str, write: Write) -> None:
    """Each is read or refused in one line; the sanitizers see the rest."""
    whole = write(tmp_path)
    files = []
    for number, data in enumerate([whole.read_bytes(), *mutants(whole.read_bytes(), seed=7)]):
        folder = tmp_path / f"mutant{number}"
        folder.mkdir()
        files.append(folder / (whole.name if kind != "plan" else "x.plan"))
        files[-1].write_bytes(data if kind != "plan" else PLAN)
        if kind == "plan":
            manifest_path(files[-1]).write_bytes(data)
    ran = programs.run("neck-tests", kind, *files)
    assert ran.code == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert len(lines) == len(files)
    assert lines[0].startswith("read:")
    errors = [line for line in lines[1:] if line.startswith("error: ")]
    assert len(errors) > MUTANTS // 2
    assert all(line.startswith("read:") for line in lines[1:] if line not in errors)


def test_arrays_are_numpys(programs: Programs, tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.zeros((0, 4), np.uint8),
        "d": np.arange(5, dtype=np.int32),
        "e": np.array([1.5, -2], np.float16),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"made": "by hand"})
    ran = programs.run("neck-tests", "safetensors", tmp_path / "x.safetensors")
    wanted = {f"{name} {value.dtype} {value.shape} sum {float(value.sum()):.6f}" for name, value in arrays.items()}
    assert set(ran.out.strip().removeprefix("read: ").removesuffix(";").split("; ")) == wanted


BIG = 20_000
"""Bytes of a file of several pages: one that is cut loses whole ones."""


def large_image(folder: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), np.uint8)
    Image.fromarray(noise).save(folder / "x.png")
    return folder / "x.png"


def large_manifest(folder: Path) -> Path:
    plan = write_plan(folder)
    spoil(plan, notes="x" * BIG)
    return plan


def large_plan(folder: Path) -> Path:
    return write_plan(folder, PLAN + b"#" * BIG)


def large_tensors(folder: Path) -> Path:
    save_file({"a": np.zeros(BIG, np.float32)}, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize(
    ("kind", "write"),
    [("images", large_image), ("plan", large_manifest), ("plan", large_plan), ("safetensors", large_tensors)],
    ids=["image", "manifest", "plan", "safetensors"],
)
def test_a_file_that_is_cut_while_it_is_read_is_an_error(
    programs: Programs, tmp_path: Path, kind: str, write: Write
) -> None:
    """It is cut between the look at its size and the reading; a mapped one would end the process with SIGBUS."""
    path = write(tmp_path)
    assert programs.run("neck-tests", kind, path).out.startswith("read:")
    ran = programs.run("neck-tests", kind, path, CUT_AFTER_OPENING="1")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"error: {path}")


DEEP = 100_000


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested_json_is_an_error(programs: Programs, tmp_path: Path, opening: str) -> None:
    """In a manifest and in the header of a safetensors file; 60 levels are read."""
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in (60, DEEP):
        nested = f"{opening * depth}1{closing * depth}"
        plan = write_plan(tmp_path)
        manifest_path(plan).write_text(manifest_path(plan).read_text().replace('"format": 1', f'"format": {nested}'))
        assert nested in manifest_path(plan).read_text()
        path = tmp_path / "x.safetensors"
        path.write_bytes(raw(f'{{"__metadata__": {{"plan": {nested}}}}}', b""))
        for kind, file in (("plan", plan), ("safetensors", path), ("metadata", path)):
            ran = programs.run("neck-tests", kind, file)
            assert (ran.code, ran.err) == (0, "")
            assert ran.out.startswith("read:" if (depth, kind != "plan") == (60, True) else "error: ")


PAGE = 4096
"""Bytes of an allocation that fails where JSON is read: destroying nlohmann's values needs a few bytes of its own."""


@pytest.mark.parametrize(
    ("kind", "write", "least", "most"),
    [
        ("images", lambda folder: write_image(folder / "x.png"), 0, 1000),
        ("images", lambda folder: turned(folder / "x.jpg"), 0, 1000),
        ("memory", lambda folder: write_image(folder / "x.png"), 0, 1000),
        ("safetensors", large_tensors, PAGE, 20),
        ("plan", large_manifest, PAGE, 20),
    ],
    ids=["png", "jpeg", "memory", "safetensors", "manifest"],
)
def test_lack_of_memory_is_an_error_of_its_own(
    programs: Programs, tmp_path: Path, kind: str, write: Write, least: int, most: int
) -> None:
    """Every allocation fails in its turn: each time it is told as such, and nothing else leaves the library."""
    ran = programs.run("neck-tests", "allocations", kind, write(tmp_path), least)
    assert (ran.code, ran.err) == (0, "")
    failed, told = map(int, re.findall(r"\d+", ran.out.splitlines()[-1]))
    assert 0 < failed == told < most


def test_threads_that_cannot_be_started_are_an_error(programs: Programs) -> None:
    ran = programs.run("neck-tests", "threads", ASAN_OPTIONS="detect_leaks=0")  # its search for leaks needs a thread
    assert ran.err == ""
    assert ran.out.startswith("error: preparing images: the operating system refused a resource (")


def raw(header: str, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def entry(begin: int, end: int, shape: str = "[1]", dtype: str = '"F32"') -> str:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": [{begin}, {end}]}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "the file is damaged, because it ends too early"),
        (struct.pack("<Q", 2**63), "the file is truncated or is not a safetensors file"),
        (raw("[1]"), "the file's header is not a JSON object"),
        (raw(f'{{"a": {entry(0, 4)}}}'), "the file is damaged, because 4 bytes belong to no tensor"),
        (
            raw(f'{{"a": {entry(0, 4)}, "b": {entry(0, 4)}}}'),
            "the file is damaged: the data offsets of tensor 'b' in the header do not match",
        ),
        (
            raw(f'{{"a": {entry(0, 4)}, "b": {entry(8, 12)}}}'),
            "the file is damaged: the data offsets of tensor 'b' in the header do not match",
        ),
        (raw(f'{{"a": {entry(4, 0)}}}'), "tensor 'a' has invalid data offsets"),
        (raw(f'{{"a": {entry(0, 8)}}}'), "tensor 'a' is declared as float32 (1,), but its data have 8 bytes"),
        (raw(f'{{"a": {entry(0, 8, "[-2]")}}}'), "tensor 'a' has a size or an offset that is not a valid whole number"),
        (
            raw(f'{{"a": {entry(0, 8, "[4294967296, 4294967296, 4294967296]")}}}'),
            "tensor 'a' is invalid (a float32 tensor cannot have the shape",
        ),
        (raw(f'{{"a": {entry(0, 8, dtype="3")}}}'), "tensor 'a' has type '3', but only U8"),
        (raw('{"a": 3}'), "tensor 'a' has an invalid entry in the header"),
        (raw(f'{{"\\u001b[2J": {entry(0, 4)}}}'), "the file contains a tensor with the invalid name '\\x1b[2J'"),
    ],
)
def test_a_safetensors_file_that_is_not_whole_is_refused(
    programs: Programs, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    ran = programs.run("neck-tests", "safetensors", tmp_path / "x.safetensors")
    assert ran.out.startswith(f"error: {tmp_path / 'x.safetensors'}: {message}")
    assert ran.out.endswith("; `neck-export verify --save-reference` writes a valid file\n")
