"""What TensorRT-RTX compiled, in a file: for one plan on one GPU, driver and version; the C++ library reads it too."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from export.contract.atomic import replacing

MAGIC = b"neck-export runtime cache 1\n"
"""The first line of the file; then its key, the SHA-256 of what follows, and that. As in engines/cpp."""


class RuntimeCache:
    """The file; for one thread at a time."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._written = ""  # SHA-256 of what the file has

    def read(self) -> tuple[bytes, str | None]:
        """The content of the file (empty if it is not ours), and a line if it cannot be used."""
        try:
            text = _read_whole(self.path)
        except FileNotFoundError:
            return b"", None
        except OSError as error:
            return self._dropped(f"cannot be read ({error.strerror})")
        if not text.startswith(MAGIC):
            return self._dropped("has an unknown format")
        key, _, rest = text[len(MAGIC) :].partition(b"\n")
        sha256, _, content = rest.partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != sha256:
            return self._dropped("is damaged")
        if key != self.key.encode():
            return self._dropped(f"belongs to {_one_line(key)}, not to {self.key}")
        self._written = sha256.decode()
        return content, None

    def write(self, content: bytes) -> str | None:
        """Writes the file where that is new; the old one is there until the new one is whole.

        Returns:
            One line where it cannot be written; it is told once for one content.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        if not content or sha256 == self._written:
            return None
        self._written = sha256
        try:
            with replacing(self.path) as unfinished:
                unfinished.write_bytes(b"".join((MAGIC, self.key.encode(), b"\n", sha256.encode(), b"\n", content)))
        except OSError as error:
            why = f"the runtime cache cannot be written ({error.strerror})"
            return f"{self.path}: {why}; the next start compiles the kernels again"
        return None

    def _dropped(self, why: str) -> tuple[bytes, str]:
        return b"", f"{self.path}: the runtime cache {why}; the kernels are compiled again"


def _read_whole(path: Path) -> bytes:
    """The bytes of a plain file; a pipe, which would hold the program for ever, is refused."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(22, os.strerror(22))
        return file.read()


def _one_line(text: bytes) -> str:
    return " ".join(text.decode("utf-8", "backslashreplace").split())[:400]
