"""Which version of a model Triton serves: the config names it, so that a new one is served once it is known to load."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from engines.service.existing_models import check_ensembles
from engines.service.model_config import read_config, schema, to_text
from engines.service.repository_files import (
    CONFIG,
    MANIFEST,
    check_name,
    replace_config,
    stage_beside,
    versions,
)
from engines.service.served_model import TritonError
from export.contract.atomic import disk_errors, locked
from export.contract.manifest import ManifestError, check_files, read_manifest


@dataclasses.dataclass(frozen=True)
class Activation:
    """What was switched: the model's active version, the previous one, and the files written or removed."""

    name: str
    version: int
    before: int | None
    files: tuple[Path, ...]
    removed: tuple[Path, ...]


def serve_version(config: Any, version: int) -> None:
    """Makes a config name the only version that is served."""
    config.version_policy.CopyFrom(schema().ModelVersionPolicy(specific={"versions": [version]}))


def active_version(model: Path) -> int | None:
    """The version that a model's config has Triton serve, None where there is no model; the newest if it names none."""
    config = read_config(model / CONFIG)
    if config is None:
        return None
    named = list(config.version_policy.specific.versions)
    return max(named or versions(model), default=None)


def activate_command(output: Path, name: str, version: int) -> str:
    """The command that makes a version the served one."""
    words = ["neck-export", "triton", "--activate", str(version)]
    words += [] if name == "sam3-encoder" else ["--name", name]
    words += [] if output == Path("model_repository") else ["--output", str(output)]
    return shlex.join(words)


def activate_version(
    output: Path, name: str, version: int, keep: int | None = None, report: Callable[[str], None] = lambda line: None
) -> Activation:
    """Has Triton serve a version of a model that is in the repository: a newer one, or an older one again.

    The files are compared with their manifest before. The config is replaced in one step; a polling server loads the
    version and goes on with the one before where it cannot.

    Args:
        output: the repository.
        name: the model.
        version: the version.
        keep: how many versions stay; None keeps all.
        report: told of every step.

    Raises:
        TritonError: there is no such model or version, it is not whole, or an ensemble asks more of it.
    """
    check_name(name)
    model = output / name
    with disk_errors(TritonError, output):
        if not output.is_dir():
            raise TritonError(f"{output}: there is no such folder; name the model repository with --output")
        with locked(output):
            there = versions(model) if (model / CONFIG).is_file() else []
            if not there:
                raise TritonError(
                    f"{model}: there is no such model; use the same --name and --output as when the model was added"
                )
            if version not in there:
                known = ", ".join(map(str, there))
                raise TritonError(f"{model}: there is no version {version}; the model has {known}")
            report("checking the SHA-256 of the files")
            config = _config_of(model / str(version))
            check_ensembles(output, config, ())
            before = active_version(model)
            with stage_beside(output, model) as stage:
                (stage / CONFIG).write_text(to_text(config), encoding="utf-8")
                files = replace_config(stage / CONFIG, model / CONFIG)
            removed = remove_versions(output, name, keep) if keep else []
    return Activation(name, version, before, tuple(files), tuple(removed))


def _config_of(folder: Path) -> Any:
    """The config that a version was written with, naming it; its files are compared with their manifests before."""
    kind: Literal["plan", "onnx"] = "onnx" if (folder / "model.onnx").is_file() else "plan"
    try:
        for where in (folder / MANIFEST, *sorted(folder.glob("*.plan.json"))):  # plans for further compute capabilities
            check_files(where, read_manifest(where, kind))
    except ManifestError as error:
        raise TritonError(f"version {folder.name} of {folder.parent.name} cannot be served: {error}") from None
    config = read_config(folder / CONFIG)
    if config is None:
        raise TritonError(
            f"{folder / CONFIG}: the file is missing; write this version of the model again with `neck-export triton`"
        )
    serve_version(config, int(folder.name))
    return config


def remove_versions(output: Path, name: str, keep: int) -> list[Path]:
    """Removes the oldest versions of a model except `keep` of them and the active one; the caller holds the lock.

    A folder is renamed out of the repository before it is deleted: a polling server sees it whole or not at all.
    """
    model = output / name
    removed = []
    for version in versions(model)[:-keep]:
        if version != active_version(model):
            with stage_beside(output, model) as stage:
                os.rename(model / str(version), stage / "old")
                shutil.rmtree(stage / "old")
            removed.append(model / str(version))
    return removed
