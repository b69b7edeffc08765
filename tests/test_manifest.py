"""The manifest speaks of files as they are, and files get their names all at once or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import listing

from export.contract import atomic
from export.contract.atomic import locked, publish, staging
from export.contract.manifest import (
    FORMAT,
    ManifestError,
    check_files,
    data_path,
    file_entry,
    manifest_path,
    read_manifest,
    replace_manifest,
    sha256,
    to_json,
    write_manifest,
)


def test_names() -> None:
    assert manifest_path(Path("a/x.onnx")) == Path("a/x.json")
    assert manifest_path(Path("a/x.plan")) == Path("a/x.plan.json")
    assert manifest_path(Path("a/x.v2.onnx")) == Path("a/x.v2.json")
    assert manifest_path(Path("a/x")) == Path("a/x.json")
    assert data_path(Path("a/x.onnx")) == Path("a/x.onnx.data")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A manifest that speaks of two files."""
    files = [tmp_path / "x.onnx", tmp_path / "x.onnx.data"]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * (5_000_000 * number + 3))
    write_manifest(tmp_path / "x.json", "onnx", {"precision": "fp16"}, files)
    return tmp_path / "x.json"


def test_written_and_read(written: Path) -> None:
    content = read_manifest(written, "onnx")
    assert content["format"] == FORMAT
    assert content["precision"] == "fp16"
    for entry in content["files"]:
        data = written.with_name(entry["name"]).read_bytes()
        assert entry == {"name": entry["name"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert [entry["name"] for entry in content["files"]] == ["x.onnx", "x.onnx.data"]
    check_files(written, content)


def test_what_is_not_finite_is_null_at_any_depth() -> None:
    text = to_json({"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf,)}]})
    assert json.loads(text) == {"a": None, "b": [1.5, None, {"c": [None]}]}


def change_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(b"short"), "has 5 bytes, but its manifest says 5000003"),
        (change_byte, "was changed after its manifest x.json was written"),
    ],
)
def test_a_changed_file_is_told(written: Path, change: Callable[[Path], Any], words: str) -> None:
    change(written.with_name("x.onnx.data"))
    with pytest.raises(ManifestError, match=words) as caught:
        check_files(written, read_manifest(written, "onnx"))
    assert "x.onnx.data" in str(caught.value)


def test_a_git_lfs_pointer_is_told(written: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000003\n"
    content = read_manifest(written, "onnx")
    written.with_name("x.onnx.data").write_bytes(pointer)
    with pytest.raises(ManifestError, match=r"x\.onnx\.data: .*Git LFS pointer"):
        check_files(written, content)
    written.write_bytes(pointer)
    with pytest.raises(ManifestError, match=r"x\.json: .*Git LFS pointer"):
        read_manifest(written, "onnx")


def test_a_file_that_was_renamed_with_its_manifest(written: Path) -> None:
    content = read_manifest(written, "onnx")
    written.with_name("x.onnx").rename(written.with_name("y.onnx"))
    with pytest.raises(ManifestError, match="is missing"):  # the control: the manifest has its name yet
        check_files(written, content)
    written.rename(written.with_name("y.json"))
    with pytest.raises(ManifestError, match=r"y\.json: .* rename them back to x\.json .*x\.onnx, x\.onnx\.data"):
        check_files(written.with_name("y.json"), content)


def test_sizes_alone_do_not_see_a_changed_byte(written: Path) -> None:
    """The control of `hashes`."""
    change_byte(written.with_name("x.onnx"))
    check_files(written, read_manifest(written, "onnx"), hashes=False)


@pytest.mark.parametrize("name", ["../x.onnx", "/etc/passwd", "sub/x.onnx", ".."])
def test_a_path_outside_is_refused(written: Path, name: str) -> None:
    content = read_manifest(written, "onnx")
    content["files"][0]["name"] = name
    with pytest.raises(ManifestError):
        check_files(written, content)


def edited(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda content: json.dumps(content | changes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: json.dumps(content)[:40], "cannot be read"),
        (lambda content: "", "cannot be read"),
        (lambda content: "\x00", "cannot be read"),
        (lambda content: "[1]", "not a neck-export manifest of type 'onnx'"),
        (lambda content: "{}", "not a neck-export manifest of type 'onnx'"),
        (edited(kind="plan"), "not a neck-export manifest of type 'onnx'"),
        (
            edited(format=FORMAT + 1),
            f"the manifest has format {FORMAT + 1}, but this version of neck-export reads format {FORMAT}",
        ),
        (edited(format=None), "format None"),
        (edited(files=None), "list of files, sizes"),
        (edited(files=["x.onnx"]), "list of files, sizes"),
        (edited(files=[{"name": "x.onnx", "bytes": "3", "sha256": ""}]), "list of files, sizes"),
    ],
)
def test_a_damaged_manifest_is_told(written: Path, damage: Callable[[dict[str, Any]], str], words: str) -> None:
    written.write_text(damage(json.loads(written.read_text())))
    with pytest.raises(ManifestError, match=words) as caught:
        read_manifest(written, "onnx")
    assert str(written) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="is missing"):
        read_manifest(tmp_path / "x.json", "onnx")


def test_sha256_reads_all(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(9_000_001))
    assert sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert file_entry(file)["bytes"] == 9_000_001


def test_replaced_in_one_step(written: Path) -> None:
    content = read_manifest(written, "onnx") | {"verification": {"verified": True}}
    others = [path for path in written.parent.iterdir() if path != written]
    replace_manifest(written, content)
    assert read_manifest(written, "onnx") == content
    assert sorted(written.parent.iterdir()) == sorted([*others, written])


def stage(target: Path, **files: str) -> None:
    """Publishes files under the target's name and that name with suffixes."""
    with staging(target) as folder:
        for suffix, text in files.items():
            (folder / (target.name + ("" if suffix == "own" else f".{suffix}"))).write_text(text)
        publish(folder, target)


def test_published_whole(tmp_path: Path) -> None:
    target = tmp_path / "made" / "x.onnx"
    stage(target, own="graph", data="weights")
    assert listing(target.parent) == {"x.onnx": b"graph", "x.onnx.data": b"weights"}
    stage(target, own="graph 2", data="weights 2")
    assert listing(target.parent) == {"x.onnx": b"graph 2", "x.onnx.data": b"weights 2"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "x.onnx"
    stage(target, own="old", data="old")
    before = listing(tmp_path)
    with pytest.raises(error), staging(target) as folder:
        assert folder.parent == tmp_path
        (folder / "x.onnx").write_text("half")
        (folder / "deeper").mkdir()
        raise error
    assert listing(tmp_path) == before


@pytest.mark.parametrize("failing", [0, 1])
def test_after_a_crash_while_publishing_there_is_no_mixture(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename is the last, the file that names the others is not there beside files of another export."""
    target = tmp_path / "x.onnx"
    stage(target, own="old", data="old")
    replace, count = os.replace, iter(range(10))

    def crash(source: Path, to: Path) -> None:
        if next(count) == failing:
            raise OSError("crash")
        replace(source, to)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="crash"):
        stage(target, own="new", data="new")
    assert not target.exists()


def test_a_folder_swept_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, taken = atomic.fcntl.flock, list[Path]()

    def lock_late(folder: int, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.glob(".x.onnx.staging-*"))
            taken[0].rmdir()
        lock(folder, how)

    monkeypatch.setattr(atomic.fcntl, "flock", lock_late)
    with staging(tmp_path / "x.onnx") as folder:
        assert folder.is_dir() and folder != taken[0]
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_swept(tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    with staging(target) as folder:
        name = folder.name
    left = tmp_path / name
    left.mkdir()
    (left / "x.onnx.data").write_bytes(b"half")
    others = [tmp_path / name.replace("x.onnx", "y.onnx"), tmp_path / ".x.onnx.old", tmp_path / "x.onnx.staging-1"]
    for other in others:
        other.mkdir()
    stage(target, own="new")
    assert sorted(tmp_path.iterdir()) == sorted([*others, target])


def test_what_a_living_run_stages_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    with staging(target) as first:
        (first / "x.onnx").write_text("first")
        stage(target, own="second")
        assert target.read_text() == "second"
        assert (first / "x.onnx").read_text() == "first"
        publish(first, target)
    assert target.read_text() == "first"
    assert sorted(tmp_path.iterdir()) == [target]


def test_a_file_system_without_locks_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError("no locks here")

    left = tmp_path / ".x.onnx.staging-abc"
    left.mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    stage(tmp_path / "x.onnx", own="new")
    assert (tmp_path / "x.onnx").read_text() == "new"
    assert left.exists()  # it cannot be told whether its run lives


def test_a_lock_excludes(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(BlockingIOError), locked(tmp_path, wait=False):
        pytest.fail("both hold it")
    with locked(tmp_path, wait=False):
        pass
