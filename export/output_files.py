"""Every file that a command reads and writes: checked before the work, and what is said where writing fails."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from export.contract.errors import ExportError
from export.contract.manifest import data_path, manifest_path
from export.contract.onnx_file import check_path
from export.contract.options import Precision
from export.contract.signature import Signature
from export.contract.sizes import size_text
from export.lowering.codes import CODES
from export.lowering.precision import TORCH_TYPES, TYPES
from export.quantization.select_quantization import record_path
from export.verification.verify import positions_path
from neck.necks import Sam3DualViTDetNeck
from neck.weightfile import CheckpointError, find_file, shard_files
from neck.weights.adapters import adapter_files

TRIALS = "the results of the quantization trials (a file beside the --calibration file)"
"""How messages name the file that no option names, so that only a file of ours is replaced."""


class NamedPath(NamedTuple):
    """A file that a command reads or writes, and as what."""

    what: str
    path: Path


def target_files(output: Path) -> list[Path]:
    """Every file that an export may write beside its output, the output included."""
    return [output, data_path(output), positions_path(output), manifest_path(output)]


def export_paths(output: Path, calibration: Path | None, precision: str) -> list[NamedPath]:
    """Every file that `neck-export onnx` may write."""
    names = (
        "the ONNX file (--output)",
        *(f"the {what} file that belongs to the ONNX file (--output)" for what in ("weights", "positions", "manifest")),
    )
    places = [NamedPath(what, path) for what, path in zip(names, target_files(output), strict=True)]
    return places + calibration_paths(calibration, precision)


def calibration_paths(calibration: Path | None, precision: str) -> list[NamedPath]:
    """The files that `--calibration` writes, for every command that has the option."""
    if calibration is None or precision not in CODES:
        return []
    record = NamedPath(TRIALS, record_path(calibration, precision))
    return [NamedPath("the calibration file (--calibration)", calibration), record]


def weights_paths(checkpoint: Path | None, adapter: Path | None) -> list[NamedPath]:
    """The files of a checkpoint and an adapter; missing or damaged ones are refused when they are read."""
    files = [path for path in (checkpoint, adapter) if path is not None]
    problems = (CheckpointError, OSError, ValueError, LookupError, TypeError, AttributeError)
    if checkpoint is not None:
        with contextlib.suppress(*problems):
            path = find_file(checkpoint)
            files += [path, *(shard_files(path) if path.suffix == ".json" else ())]
    if adapter is not None:
        with contextlib.suppress(*problems):
            files += adapter_files(adapter)
    return [NamedPath("an input file with weights", file) for file in files]


def encoder_paths(path: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None) -> list[NamedPath]:
    """The files that are read to verify an ONNX file: its own, and the weights that its manifest names."""
    weights = manifest.get("weights") or {}
    told = (weights.get("path"), (weights.get("adapter") or {}).get("path"))
    source, adapter = (Path(one) if isinstance(one, str) else None for one in told)
    own = [NamedPath("one of the encoder's files that this command reads", file) for file in target_files(path)]
    return own + weights_paths(checkpoint or source, adapter)


def check_paths(written: Sequence[NamedPath], read: Sequence[NamedPath]) -> None:
    """Refuses, before any work, a command whose files are in each other's way.

    Args:
        written: every file that it may write.
        read: files that it reads; one that it replaces in the end stands in `written` alone.

    Raises:
        ExportError: a folder where a file is to be written, two files of one name, or one that would replace what is
            read, or a file beside --calibration that is not ours.
    """
    seen: dict[Path, str] = {}
    for what, path in written:
        if path.is_dir():
            raise ExportError(
                f"{path}: this is a folder, but {what} would be written to this path; choose another name"
            )
        place = path.parent.resolve() / path.name
        if place in seen:
            raise ExportError(
                f"{path}: both {seen[place]} and {what} would be written to this path; choose different names for the "
                "two files"
            )
        seen[place] = what
        for other, there in read:
            linked = path.exists() and there.exists() and path.samefile(there)
            if linked or place == there.parent.resolve() / there.name:
                raise ExportError(
                    f"{there}: this is {other}, but {what} would overwrite this file; choose another name for {what}"
                )
        if what == TRIALS and not _has_keys(path, {"key", "rows"}):
            raise ExportError(
                f"{path}: this file was not written by neck-export, but {what} would overwrite this file; "
                "choose another name for --calibration"
            )


def check_targets(output: Path) -> None:
    """Refuses an output whose manifest would replace a file that is not a manifest.

    Raises:
        ExportError: naming it.
    """
    check_path(output)
    manifest = manifest_path(output)
    if not _has_keys(manifest, {"format", "kind"}):
        raise ExportError(
            f"{manifest}: this file is not a manifest of neck-export, but the new manifest would overwrite "
            "this file; move the file, or choose another --output"
        )


def _has_keys(path: Path, keys: set[str]) -> bool:
    """Whether a file holds a JSON object with these keys, or is not there, or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text else dict.fromkeys(keys)
    except (FileNotFoundError, NotADirectoryError):  # a folder that is a file is told later
        return True
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and keys <= set(content)


def check_room(output: Path, encoder: Sam3DualViTDetNeck, signature: Signature, precision: Precision) -> None:
    """Refuses before the work if the disk cannot hold the weights.

    Raises:
        ExportError: saying how much is free and how much it takes.
    """
    used = [encoder.trunk, *(encoder.necks[neck] for neck in signature.necks)]
    elements = sum(parameter.numel() for module in used for parameter in module.parameters())
    needed = elements * TORCH_TYPES[TYPES[precision]].itemsize
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise ExportError(
            f"{output.parent}: the disk has {size_text(free)} of free space, but the export needs "
            f"{size_text(needed)}; free some space or choose another --output"
        )
