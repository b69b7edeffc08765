"""Recognizes plans by their content, because file names say little and Ultralytics engines begin with JSON."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from engines.builder.flavor import RTX_MAGIC
from engines.builder.onnx_graph import BuildError
from export.contract.atomic import staging
from export.contract.manifest import manifest_path

MAGIC = {RTX_MAGIC: "TensorRT-RTX", b"ftrt": "TensorRT"}

MOST_JSON = 1 << 20
"""Largest JSON header in bytes. Ultralytics writes a few hundred; in an ONNX file, the same field is far larger."""


def is_plan(path: Path) -> bool:
    """Returns whether a file is a plan that neck-export built; any file that is not a plan is treated as ONNX.

    Raises:
        BuildError: the file is an Ultralytics engine, or a plan without its manifest.
    """
    try:
        with path.open("rb") as file:
            kind, metadata = _begins(file)
    except OSError:  # missing, a folder: told by whoever reads it
        return path.suffix == ".plan"
    if metadata is not None:
        bare = path.with_suffix(".bare.plan")
        raise BuildError(
            f"{path}: this is an Ultralytics engine, which consists of a JSON header and a {kind} plan. Content of the "
            f"JSON header: {_told(metadata)}. neck-export only loads plans that neck-export built.\n"
            "To use the model with neck-export, find the checkpoint from which Ultralytics made the engine. Write an "
            "ONNX file from the checkpoint with `neck-export onnx`, and build a plan from the ONNX file with "
            "`neck-export trt`. To use the plan of the engine in another program, write the plan without the JSON "
            f"header to a new file: `neck-export inspect {path} --strip-header {bare}`"
        )
    if kind and path.suffix != ".plan" and not manifest_path(path).is_file():
        name = path.with_suffix(".plan").name
        raise BuildError(
            f"{path}: this is a {kind} plan, but its manifest {manifest_path(path).name} is missing. If neck-export "
            f"built the plan and the plan was renamed or moved, give the plan its original name, such as {name}. Then "
            f"copy the manifest that neck-export wrote, such as {name}.json, into the folder of the plan. If another "
            "program built the plan, or if the manifest is lost, build a new plan from the ONNX file with "
            "`neck-export trt`"
        )
    return bool(kind) or path.suffix == ".plan"


def strip_header(path: Path, output: Path) -> dict[str, Any]:
    """Writes the bare plan of an Ultralytics engine and returns the JSON header.

    Raises:
        BuildError: the file is not an Ultralytics engine, or the plan cannot be written.
    """
    try:
        with path.open("rb") as file:
            kind, metadata = _begins(file)
            if metadata is None:
                held = f"a bare {kind} plan" if kind else "not a plan"
                raise BuildError(f"{path}: --strip-header expects an Ultralytics engine, but this file is {held}")
            if output.exists() and output.samefile(path):
                raise BuildError(f"{output}: the output file is the same as the input file; choose another output file")
            with staging(output) as folder:
                with (folder / output.name).open("wb") as plan:
                    shutil.copyfileobj(file, plan, 1 << 22)
                os.replace(folder / output.name, output)
    except OSError as error:
        raise BuildError(
            f"{error.filename or output}: {error.strerror}, so no file was written; check the path, its "
            "permissions and the free disk space"
        ) from None
    return metadata


def _begins(file: BinaryIO) -> tuple[str | None, dict[str, Any] | None]:
    """Returns the kind of plan and the JSON header before it; the file position is then the start of the plan."""
    start = file.read(4)
    if start in MAGIC:
        file.seek(0)
        return MAGIC[start], None
    length = int.from_bytes(start, "little")
    if not 2 <= length <= MOST_JSON:
        return None, None
    try:
        metadata = json.loads(file.read(length))
    except (ValueError, RecursionError):
        return None, None
    kind = MAGIC.get(file.read(4))
    file.seek(4 + length)
    return (kind, metadata) if kind and isinstance(metadata, dict) else (None, None)


def _told(metadata: dict[str, Any]) -> str:
    shown = [f"{name} {metadata[name]}" for name in ("description", "task", "imgsz", "version") if name in metadata]
    return " ".join(", ".join(shown).split())[:200] or "empty"
