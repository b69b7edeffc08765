"""The one way to write a file whole or not at all, and to report what the disk refuses (no torch)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from export.contract.interrupt import removed_on_signal, signals_held

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it; what is made and still empty when the block fails is removed again.

    Raises:
        OSError: it cannot be made.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, removed whatever happens; publish what is done from it.

    What a killed run left there is removed first. A living run holds a lock on its folder, which ends with it.

    Raises:
        OSError: the target's folder cannot be made or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.staging-"
    for left in target.parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), locked(left, wait=False):  # locked: another run is at work on the same file
            shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = target.with_name(f"{prefix}{secrets.token_hex(4)}")
        with contextlib.ExitStack() as stack:
            stack.enter_context(removed_on_signal(folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            with contextlib.suppress(OSError):  # a file system without locks: then nothing is swept there either
                stack.enter_context(locked(folder))
            if folder.is_dir():  # else another run swept it before it was locked
                yield folder
                return


@contextlib.contextmanager
def workspace(target: Path, room: int) -> Iterator[Path]:
    """A staging folder from which nothing is published; where that cannot take `room` bytes, a temporary folder."""
    with contextlib.ExitStack() as stack:
        folder = None
        with contextlib.suppress(OSError):
            if shutil.disk_usage(target.parent).free >= room:
                folder = stack.enter_context(staging(target))
        if folder is None:
            folder = Path(tempfile.gettempdir()) / f"neck-export-{secrets.token_hex(8)}"
            stack.enter_context(removed_on_signal(folder))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        yield folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there gets the name `path` when the block ends, whole or not at all."""
    with staging(path) as folder:
        staged = folder / path.name
        yield staged
        sync(staged)
        os.replace(staged, path)


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds a folder's lock.

    Raises:
        OSError: another run holds it and `wait` is False, or the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def publish(staged: Path, target: Path, gone: Iterable[Path] = ()) -> None:
    """Moves the files of a staging folder beside the target, the target itself last.

    The old target goes first: after a crash there is the old file with all that belongs to it, or none. `gone` are
    files of the old target that the new one lacks.
    """
    files = sorted(staged.iterdir(), key=lambda file: file.name == target.name)
    for file in files:
        sync(file)
    with signals_held():
        target.unlink(missing_ok=True)
        for file in files:
            os.replace(file, target.with_name(file.name))
        for file in gone:
            file.unlink(missing_ok=True)
    sync(target.parent)


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(failure: type[Exception], place: Path, remedy: str = "choose another --output") -> Iterator[None]:
    """Turns what the file system refuses into a stage's error that names the place and the remedy.

    Raises:
        failure: for every OSError.
    """
    try:
        yield
    except OSError as error:
        # numpy's tofile says `1000 requested and 512 written` without a number (numpy 2)
        if error.errno in FULL or (error.errno is None and "written" in str(error)):
            raise failure(f"{place}: the disk is full; free some space or {remedy}") from None
        where = error.filename or place
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise failure(f"{where}: this path is a file, but a folder is needed there; {remedy}") from None
        raise failure(f"{where}: {error.strerror or str(error) or type(error).__name__}; {remedy}") from None
