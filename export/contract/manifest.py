"""The JSON beside every file: what it holds, where it came from, what was verified (no torch)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from export.contract.atomic import publish, staging
from neck.progress import count

TOLD_BYTES = 1 << 26
"""From this size on a file takes so long to read that its progress is worth telling."""

FORMAT = 1
"""Version of the manifest; readers refuse a newer one."""


LFS = b"version https://git-lfs"
"""How a pointer begins that Git LFS leaves in the place of a large file."""


class ManifestError(ValueError):
    """A manifest that is missing, damaged, or does not describe the files beside it."""


def manifest_path(path: Path) -> Path:
    """The path of a file's manifest: X.onnx -> X.json, X.plan -> X.plan.json."""
    return path.with_suffix(".json") if path.suffix == ".onnx" else path.with_name(path.name + ".json")


def data_path(path: Path) -> Path:
    """The path of an ONNX file's external weights."""
    return path.with_name(path.name + ".data")


def sha256(path: Path) -> str:
    """SHA-256 of a file, read once in pieces of 4 MiB; reports progress for a large file."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if size >= TOLD_BYTES:
                count(f"computing the SHA-256 of {path.name}", file.tell(), size, "bytes")
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """The manifest's entry for a file: name, bytes, SHA-256."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def to_json(values: Any) -> str:
    """Values as strict JSON text that ends in a newline; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"


def parse_json(text: str) -> Any:
    """Reads a strict JSON text.

    Raises:
        ValueError: it is not JSON, or holds NaN, infinity or a number that is too large for a float.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, parse_constant=_finite_number, parse_float=_finite_number)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _finite_number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text} is not finite")
    return number


def seen(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, bytes and time of change of files, by which `unchanged` knows them again; times in whole microseconds.

    Nanoseconds since 1970 pass 2^53, which JSON's readers in other languages round.
    """
    stats = [(file.name, file.stat()) for file in sorted(files)]
    return [{"name": name, "bytes": stat.st_size, "modified_us": stat.st_mtime_ns // 1000} for name, stat in stats]


def unchanged(path: Path, before: Any) -> bool:
    """Whether the files beside a manifest have the sizes and times that `seen` noted.

    Args:
        path: the manifest.
        before: what `seen` gave; anything else means that nobody noted it.
    """
    try:
        files = [path.with_name(Path(entry["name"]).name) for entry in before]
        return bool(files) and seen(files) == before
    except (OSError, LookupError, TypeError, ValueError):
        return False


def write_manifest(path: Path, kind: str, values: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """Writes a manifest that speaks of `files`, which lie beside it, and returns its content."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **values,
        "files": [file_entry(file) for file in files],
    }
    text = to_json(content)
    path.write_text(text, encoding="utf-8")
    return parse_json(text)


def replace_manifest(path: Path, content: dict[str, Any]) -> None:
    """Puts new content in the place of a manifest, in one step."""
    with staging(path) as folder:
        staged = folder / path.name
        staged.write_text(to_json(content), encoding="utf-8")
        publish(folder, path)


def record_in_manifest(path: Path, content: dict[str, Any], notes: list[str]) -> None:
    """Puts new content in the place of a manifest; where that cannot be, `notes` says so in one line.

    What was measured is worth more than its record, so a read-only or full disk is no error here. A manifest that is a
    link belongs to the cache that made the link, and is left as it is.
    """
    why = "the file is a symbolic link, for example into a download cache, and neck-export does not replace links"
    if not path.is_symlink():
        try:
            return replace_manifest(path, content)
        except OSError as error:
            why = error.strerror or str(error)
    notes.append(f"{path}: the manifest was not updated ({why})")


AGAIN = {"onnx": "export the ONNX file again", "plan": "build the plan again"}
"""What makes a manifest and its files anew, by the manifest's kind."""


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        ManifestError: missing, not JSON, of another kind, or newer than this program.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f"{path}: the manifest is missing; neck-export writes one beside each ONNX file and plan, so copy the "
            f"manifest to this path, or {AGAIN[kind]}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        if path.is_file() and (pointer := lfs_pointer(path)):
            raise ManifestError(pointer) from None
        raise ManifestError(f"{path}: the manifest cannot be read ({error}); {AGAIN[kind]}") from None
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ManifestError(
            f"{path}: this is not a neck-export manifest of type '{kind}'; to write a new manifest, {AGAIN[kind]}"
        )
    if not isinstance(content.get("format"), int) or content["format"] > FORMAT:
        raise ManifestError(
            f"{path}: the manifest has format {content.get('format')}, but this version of neck-export reads format "
            f"{FORMAT}; upgrade neck-export, or {AGAIN[kind]} with this version"
        )
    files = content.get("files")
    wanted = {"name": str, "bytes": int, "sha256": str}
    named = isinstance(files, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in wanted.items())
        for entry in files
    )
    if not named:
        raise ManifestError(
            f"{path}: the manifest's list of files, sizes and SHA-256 values is missing or damaged; {AGAIN[kind]}"
        )
    return content


def named_files(path: Path) -> set[str]:
    """Names of the files that the manifest of an ONNX file speaks of; none where it has no readable manifest."""
    try:
        return {entry["name"] for entry in read_manifest(manifest_path(path), "onnx")["files"]}
    except ManifestError:
        return set()


def check_files(path: Path, manifest: dict[str, Any], hashes: bool = True) -> None:
    """Checks that the files which a manifest speaks of are there and unchanged.

    Args:
        path: the manifest.
        manifest: its content.
        hashes: also compare SHA-256, which reads every byte; else the sizes alone.

    Raises:
        ManifestError: a file that is missing, changed, or named outside the manifest's folder.
    """
    again = AGAIN[manifest["kind"]]
    for entry in manifest["files"]:
        if Path(entry["name"]).name != entry["name"]:
            raise ManifestError(
                f"{path}: the manifest names the path {entry['name']!r}, which is outside the manifest's "
                f"folder; {again}"
            )
        file = path.with_name(entry["name"])
        if not file.is_file() and (names := _renamed(path, manifest)):
            raise ManifestError(
                f"{path}: this manifest and its data file were renamed, but files that belong together must keep "
                f"their names; rename them back to {names[0]} (the manifest) and {names[1]}"
            )
        if not file.is_file():
            raise ManifestError(
                f"{file}: the file is missing, but the manifest {path.name} lists it; copy the file to this "
                f"path, or {again}"
            )
        if file.stat().st_size != entry["bytes"] and (pointer := lfs_pointer(file)):
            raise ManifestError(pointer)
        if file.stat().st_size != entry["bytes"]:
            raise ManifestError(
                f"{file}: the file has {file.stat().st_size} bytes, but its manifest says {entry['bytes']} "
                f"bytes; copy the file again, or {again}"
            )
        if hashes and sha256(file) != entry["sha256"]:
            raise ManifestError(
                f"{file}: the file was changed after its manifest {path.name} was written; copy the file again, "
                f"or {again}"
            )


def _renamed(path: Path, manifest: dict[str, Any]) -> tuple[str, str] | None:
    """The names that a manifest and its files had; None where the manifest still has that name."""
    names = [entry["name"] for entry in manifest["files"]]
    had = manifest_path(path.with_name(names[0])).name if names else path.name
    main = next((name for name in names if manifest_path(path.with_name(name)).name == path.name), None)
    in_triton = path.name == "manifest.json"
    if in_triton or main is not None or had == path.name or path.with_name(had).exists():
        return None
    return had, ", ".join(names)


def lfs_pointer(path: Path) -> str | None:
    """The message for a Git LFS pointer; None for any other file."""
    with path.open("rb") as file:
        if file.read(len(LFS)) != LFS:
            return None
    return f"{path}: this is a Git LFS pointer and not the file itself; run `git lfs pull` in its folder to download it"
