"""What a session leaves, as one file that can be carried off a rented machine; with it another machine goes on."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path, PurePosixPath

from export.contract.atomic import replacing

MOST_BYTES = 16 << 20
"""Of the archive: what terminals and chats still take."""

WANTED = (
    *("session.json", "report.json", "page.txt", "work/**/samples.jsonl", "stages/*.json"),
    *("report.md", "report.html", "stages/*.txt", "stages/*.log"),
)
"""What a second call and the report need, the most needed first; weights, outputs and environment are made again."""


def archive_path(output: Path) -> Path:
    """Beside the session's folder: build/gpu.tar.gz."""
    return output.with_name(f"{output.name}.tar.gz")


def write_archive(output: Path) -> tuple[Path, list[str]]:
    """Writes the archive; the least important files are left out if it would become too large.

    Returns:
        The archive, and the names of what was left out.

    Raises:
        OSError: the disk takes none.
    """
    target, left_out, chosen = archive_path(output), [], []  # type: Path, list[str], list[Path]
    room = MOST_BYTES - (64 << 10)
    found = dict.fromkeys(path for pattern in WANTED for path in sorted(output.glob(pattern)) if path.is_file())
    for path in found:
        size = 1024 + len(zlib.compress(path.read_bytes(), 6))  # and its header
        if size > room:
            left_out.append(path.relative_to(output).as_posix())
            continue
        room -= size
        chosen.append(path)
    with replacing(target) as staged, tarfile.open(staged, "w:gz", compresslevel=6) as archive:
        for path in chosen:
            archive.add(path, path.relative_to(output).as_posix(), recursive=False)
    return target, left_out


def unpack_archive(output: Path) -> bool:
    """Puts an archive that lies beside the folder into it, if no session is there; returns whether it did.

    Raises:
        OSError, tarfile.TarError: it is no whole archive.
    """
    source = archive_path(output)
    if (output / "session.json").is_file() or not source.is_file():
        return False
    with tarfile.open(source, "r:gz") as archive:
        for member in archive:
            place = PurePosixPath(member.name)
            known = any(PurePosixPath("/", place).match(f"/{pattern.replace('**', '*/*')}") for pattern in WANTED)
            content = archive.extractfile(member) if member.isfile() and ".." not in place.parts else None
            if content is None or place.is_absolute() or not (known or place.name == "samples.jsonl"):
                continue
            path = output / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())
    return True
