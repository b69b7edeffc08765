"""What `neck-export masks` wrote into the manifests of files, for a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError
from engines.builder.plan_kind import is_plan
from export.contract.manifest import ManifestError, check_files, manifest_path, read_manifest

COUNTS = ("pictures", "objects", "lost", "found")
SHOWN = ("passed", "gate", *COUNTS, "mean_iou", "worst_iou", "worst_picture", "method")


def read_masks(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The figures of files that were judged, in the form of result.schema.json.

    Args:
        files: ONNX files or plans, their manifests beside them.

    Raises:
        BenchError: one that was not judged, or has changed since.
    """
    return [_read(file) for file in files]


def _read(file: Path) -> dict[str, Any]:
    where = manifest_path(file)
    try:
        manifest = read_manifest(where, "plan" if is_plan(file) else "onnx")
        check_files(where, manifest, hashes=False)
    except ManifestError as error:
        raise BenchError(f"--masks {file}: {error}") from None
    found = manifest.get("masks")
    if not found:
        raise BenchError(
            f"--masks {file}: its masks were not compared yet: neck-export masks {file} --model MODEL --images FOLDER"
        )
    return {"file": file.name, "precision": manifest["precision"], **{name: found.get(name) for name in SHOWN}}
