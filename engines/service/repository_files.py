"""How a model's files get into a Triton repository: staged beside it, renamed in, never half there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from engines.service.served_model import Source, TritonError
from export.contract.atomic import staging, sync
from export.contract.interrupt import signals_held
from export.contract.manifest import ManifestError, check_files, to_json
from export.contract.sizes import size_text

CONFIG = "config.pbtxt"
MANIFEST = "manifest.json"

ELSEWHERE = "choose another --name or --output"
"""What to do about a folder that is taken."""

FICLONE = 0x40049409
"""ioctl of linux/fs.h: a file that shares the blocks of another until one of them is written."""


def check_name(name: str) -> None:
    """Refuses a model's name that is no folder's name.

    Raises:
        TritonError: saying what is expected.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise TritonError(
            f"--name {name!r} is invalid; expected up to 63 letters, digits, dots, dashes and underscores"
        )


def versions(model: Path) -> list[int]:
    """The versions of a model that are there, as Triton counts them: all digits, no leading zero."""
    if not model.is_dir():
        return []
    return sorted(int(path.name) for path in model.iterdir() if path.is_dir() and re.fullmatch(r"[1-9]\d*", path.name))


def next_version(model: Path, asked: int | None) -> int:
    """The version to write.

    Raises:
        TritonError: the asked one is there, or older than one that is.
    """
    newest = max(versions(model), default=0)
    if asked is not None and (asked in versions(model) or (model / str(asked)).exists()):
        raise TritonError(
            f"{model / str(asked)}: version {asked} of the model already exists, and neck-export never changes an "
            f"existing version. Leave out --version to write version {newest + 1}"
        )
    if asked is not None and asked < newest:
        raise TritonError(
            f"--version {asked}: {model} already has version {newest}, and new versions must have higher numbers; "
            f"leave out --version to write version {newest + 1}"
        )
    return asked or newest + 1


@contextlib.contextmanager
def stage_beside(output: Path, model: Path) -> Iterator[Path]:
    """A folder on the repository's file system, outside of it where that can be; removed whatever happens.

    Outside, because a polling server takes each folder of the repository for a model, and a folder of the model's that
    is no number for a change of all its versions (Triton's ModelTimestamp, read at 26.09).
    """
    above = output.absolute().parent
    outside = os.access(above, os.W_OK) and above.stat().st_dev == output.stat().st_dev
    with staging(output.absolute() if outside else model / "version") as folder:
        yield folder


def lay_out(folder: Path, sources: Sequence[tuple[Source, str]]) -> None:
    """Copies the files of a version; each manifest names the files as they are called here.

    Args:
        folder: the version's, made here.
        sources: plans or an ONNX file, each with its name in the folder. The first one's manifest is manifest.json, a
            further one's lies beside it under the name that plans' manifests have.
    """
    _check_room(folder.parent, [file for source, _ in sources for file in source.files])
    folder.mkdir()
    for index, (source, name) in enumerate(sources):
        renamed = {source.path.name: name, f"{source.path.name}.layers.json": f"{name}.layers.json"}
        entries = []
        for entry, file in zip(source.manifest["files"], source.files, strict=True):
            target = folder / renamed.get(file.name, file.name)
            if target.exists() or target.name == MANIFEST:
                raise TritonError(
                    f"{file}: the file cannot be copied as {target.name}, because another file of the model "
                    "has that name; export or build the file under another name"
                )
            _copy(file, target)
            entries.append(entry | {"name": target.name})
        where = folder / (MANIFEST if index == 0 else f"{name}.json")
        manifest = source.manifest | {"files": entries}
        where.write_text(to_json(manifest), encoding="utf-8")
        try:  # read_model compared the hashes; this sees a file replaced since
            check_files(where, manifest, hashes=False)
        except ManifestError as error:
            raise TritonError(str(error)) from None


def install(stage: Path, model: Path, version: int, activate: bool = True) -> list[Path]:
    """Renames the staged files into the repository and returns them.

    A new model appears as one folder. To one that is there the version comes first and then its config, which is
    replaced only where it differs: a polling server loads a model again whose config is new.

    Args:
        stage: holds `version`, a folder, and config.pbtxt.
        model: the model's folder.
        version: its new version.
        activate: whether the config is replaced, which names the version that is served.
    """
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a server of another user reads them
        sync(path)
    with signals_held():
        if not model.exists():
            whole = stage / "model"
            whole.mkdir()
            whole.chmod(0o755)
            os.rename(stage / "version", whole / str(version))
            os.rename(stage / CONFIG, whole / CONFIG)
            os.rename(whole, model)
        else:
            os.rename(stage / "version", model / str(version))
        config = replace_config(stage / CONFIG, model / CONFIG) if activate else []
    sync(model)
    sync(model.parent)
    return [*config, *sorted((model / str(version)).iterdir())]


def replace_config(staged: Path, target: Path) -> list[Path]:
    """Puts a config in the place of another in one step, where it differs; the files that are new."""
    if not staged.exists():
        return [target]
    if target.exists() and target.read_bytes() == staged.read_bytes():
        return []
    os.replace(staged, target)
    return [target]


def write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Writes text files, each replaced in one step."""
    with staging(folder / "files") as stage:
        for name, text in texts.items():
            (stage / name).write_text(text, encoding="utf-8")
            os.replace(stage / name, folder / name)
    return [folder / name for name in texts]


def _check_room(folder: Path, files: Sequence[Path]) -> None:
    needed, free = sum(file.stat().st_size for file in files), shutil.disk_usage(folder).free
    if free < needed:
        raise TritonError(
            f"{folder.parent}: the disk has {size_text(free)} free, but the model needs {size_text(needed)}; "
            "free some space, or choose another --output"
        )


def _copy(file: Path, target: Path) -> None:
    """A reflink, or a copy; no hard link: a builder that writes its plan again in place would change what runs."""
    with file.open("rb") as old, target.open("wb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:  # another file system, or one without reflinks
            shutil.copyfileobj(old, new, 1 << 22)
