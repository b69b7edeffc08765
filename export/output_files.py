"""What is checked of the output's place before the work, and said of it when it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from export.contract.errors import ExportError
from export.contract.manifest import data_path, manifest_path
from export.contract.signature import Signature
from export.lowering.precision import TORCH_TYPES, TYPES, Precision
from export.proof.verify import positions_path
from neck.necks import Sam3DualViTDetNeck


def target_files(output: Path) -> list[Path]:
    """Every file that an export may write."""
    return [output, data_path(output), positions_path(output), manifest_path(output)]


def check_targets(output: Path, inputs: list[Path]) -> None:
    """Refuses an output that is a folder, or whose files would replace one that is read or is not ours.

    Raises:
        ExportError: saying which.
    """
    for file in target_files(output):
        if file.is_dir():
            raise ExportError(f"{file}: is a folder; name a file in it by --output")
        taken = next((path for path in inputs if path.exists() and file.exists() and path.samefile(file)), None)
        if taken:
            raise ExportError(f"{taken}: is read, and --output {output} would replace it; choose another --output")
    manifest = manifest_path(output)
    if manifest.is_file() and manifest.stat().st_size and not _is_manifest(manifest):
        raise ExportError(f"{manifest}: is there and no manifest of neck-export; move it, or choose another --output")


def _is_manifest(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "kind"} <= set(content)


def check_room(output: Path, encoder: Sam3DualViTDetNeck, signature: Signature, precision: Precision) -> None:
    """Refuses before the work where the disk cannot hold the weights.

    Raises:
        ExportError: saying how much is free and how much it takes.
    """
    used = [encoder.trunk, *(encoder.necks[neck] for neck in signature.necks)]
    elements = sum(parameter.numel() for module in used for parameter in module.parameters())
    needed = elements * TORCH_TYPES[TYPES[precision]].itemsize
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ExportError(
            f"{output.parent}: {free / 1e9:.2f} GB are free, the file needs {needed / 1e9:.2f} GB; "
            f"make room or choose another --output"
        )


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system says of the output folder into one sentence.

    Raises:
        ExportError: for every OSError.
    """
    try:
        yield
    except OSError as error:
        # numpy's tofile says `1000 requested and 512 written` without a number (numpy 2)
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "written" in str(error)):
            raise ExportError(f"{path.parent}: the disk is full; make room or choose another --output") from None
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise ExportError(f"{error.filename or path}: is a file, not a folder; choose another --output") from None
        reason = error.strerror or str(error) or type(error).__name__
        raise ExportError(f"{error.filename or path}: {reason}; choose another --output") from None
