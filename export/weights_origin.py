"""Where an exported file came from: what its manifest says of weights, encoder and versions, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.contract.errors import ExportError
from export.contract.export_command import hub_text
from export.contract.manifest import ManifestError, file_entry, sha256
from export.contract.options import Precision
from export.contract.signature import Signature
from export.lowering.precision import TYPES
from neck.checkpoint import CheckpointError
from neck.config import ConfigError, EncoderConfig
from neck.hub import hub_origin, local_checkpoint
from neck.necks import Sam3DualViTDetNeck
from neck.source import EncoderSource, Origin
from neck.trunk import ViTDetTrunk
from neck.weightfile import find_file
from neck.weights.adapters import adapter_files
from neck.weights.fingerprint import fingerprints
from neck.weights.records import shown

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")
"""Distributions whose versions the manifest keeps, those that are installed."""


def weights_origin(origin: Origin) -> dict[str, Any]:
    """What a manifest says of the weights: a seed, or the file with its SHA-256 and those of its shards and adapter.

    The path is not resolved: the Hugging Face Hub's cache keeps files as links, and what is read beside the weights is
    found by the link's name. Weights from there also have their repository and commit.
    """
    source = origin.source
    if source.path is None:
        return {"random": True, "seed": source.seed}
    path, *shards = origin.files
    told: dict[str, Any] = {"shards": list(map(file_entry, shards)), "state": origin.state}
    told |= {"other_states": list(origin.other_states), "prefix": source.prefix, "adapter_alpha": source.alpha}
    if source.adapter is not None:
        files = list(map(file_entry, adapter_files(source.adapter)))
        told["adapter"] = {"path": str(source.adapter.resolve()), "files": files}
    if hub := hub_origin(path):
        told["hub"] = {"repository": hub.repo, "commit": hub.revision, "file": hub.file}
    return {
        "random": False,
        "path": os.path.abspath(path),
        **file_entry(path),
        **{key: value for key, value in told.items() if value},
    }


def state_line(weights: Mapping[str, Any]) -> str | None:
    """Which state of a file was read and which others it has; None where there was nothing to choose."""
    others = weights.get("other_states")
    if not others and not weights.get("state"):
        return None
    there = (
        (
            f"; the file also contains other state dicts with an encoder: {', '.join(map(shown, others))} (choose one "
            "with --state)"
        )
        if others
        else ""
    )
    if weights.get("state"):
        return f"the weights are from the state dict {shown(weights['state'])} of {weights['name']}{there}"
    return f"the weights are from the top-level state dict of {weights['name']}{there}"


def is_origin(weights: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether a checkpoint has the bytes that `weights_origin` saw."""
    path = find_file(checkpoint)
    shards = weights.get("shards", [])
    if sha256(path) != weights["sha256"]:
        return False
    files = [(path.with_name(entry["name"]), entry["sha256"]) for entry in shards]
    return all(file.is_file() and sha256(file) == digest for file, digest in files)


def merged_adapter(where: Path, weights: Mapping[str, Any], adapter: Path | None = None) -> Path | None:
    """The folder of the adapter that was merged into the exported weights; None where there was none.

    Args:
        where: the manifest.
        weights: what it says of the weights.
        adapter: the folder, where it is no longer where the manifest says.

    Raises:
        CheckpointError, ExportError: it is not there, or is another one.
    """
    if "adapter" not in weights:
        if adapter is not None:
            raise ExportError(
                f"{adapter}: the manifest {where.name} says that no adapter was merged into the weights; leave "
                "out --adapter"
            )
        return None
    folder = adapter or Path(weights["adapter"]["path"])
    if not folder.is_dir():
        raise ExportError(
            f"{folder}: this folder does not exist, but the manifest {where.name} names it as the adapter that "
            "was merged; pass the adapter's new path with --adapter"
        )
    known = {entry["name"]: entry["sha256"] for entry in weights["adapter"]["files"]}
    if {file.name: sha256(file) for file in adapter_files(folder)} != known:
        raise ExportError(
            f"{folder}: this is not the adapter that was merged into the weights, because its SHA-256 differs "
            f"from the one in {where.name}; pass the right folder with --adapter"
        )
    return folder


def package_versions() -> dict[str, str]:
    """Versions of the packages that make and judge a file."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def tool_version() -> str:
    """Version of this package, or `unknown` where it runs from a folder that is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("neck-export")
    return "unknown"


def encoder_config(encoder: Sam3DualViTDetNeck) -> EncoderConfig:
    """The config of an encoder of ours at its present image size, with the necks that it has."""
    trunk = encoder.trunk
    if not isinstance(trunk, ViTDetTrunk):
        raise ExportError(
            f"the trunk is a {type(trunk).__name__} and not a ViTDetTrunk, so neck-export cannot derive a "
            "Signature from it; create a Signature and pass it to write_onnx"
        )
    patch, (height, width) = trunk.config.patch_size, trunk.grid
    has = {"necks": tuple(encoder.necks), "sam2_head": encoder.sam2_head is not None}
    return dataclasses.replace(trunk.config, image_size=(height * patch, width * patch), **has)  # type: ignore[arg-type]


def manifest_signature(where: Path, manifest: Mapping[str, Any]) -> Signature:
    """The signature that a manifest holds.

    Raises:
        ManifestError: it holds none, or a damaged one.
    """
    try:
        return Signature.from_dict(manifest["signature"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(
            f"{where}: the entry `signature` of the manifest is damaged ({error!r}); export the encoder again"
        ) from None


def manifest_precision(where: Path, manifest: Mapping[str, Any]) -> Precision:
    """The precision that a manifest holds.

    Raises:
        ManifestError: it holds none that is known.
    """
    precision = manifest.get("precision")
    if precision not in TYPES:
        raise ManifestError(
            f"{where}: the manifest contains the unknown precision {precision!r} (known precisions: "
            f"{', '.join(TYPES)}); export the encoder again"
        )
    return precision


def manifest_encoder(
    where: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None, adapter: Path | None = None
) -> Sam3DualViTDetNeck:
    """The plain encoder that a file was exported from, set to its image size, its adapter merged again.

    Args:
        where: the manifest.
        manifest: its content.
        checkpoint, adapter: the weights and the adapter, where they are no longer where the manifest says.

    Raises:
        ManifestError: the manifest does not say it.
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
    """
    try:
        config = EncoderConfig.from_dict(manifest["encoder"])
        weights = dict(manifest["weights"])
        random, path = weights["random"], None if weights["random"] else Path(weights["path"])
        names = {key: weights[key] for key in ("state", "prefix") if weights.get(key) is not None}
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ManifestError(
            f"{where}: the manifest does not say which weights were exported (the entry {error!r} is missing "
            "or damaged); export the encoder again"
        ) from None
    if random:
        for option, given in (("--checkpoint", checkpoint), ("--adapter", adapter)):
            if given is not None:
                raise ExportError(
                    f"{given}: {option} cannot be used here, because according to the manifest {where.name}, the "
                    f"exported weights are random; leave out {option}"
                )
        return EncoderSource(seed=weights["seed"], config=config).load().encoder
    if not all(isinstance(value, str) for value in names.values()):
        raise ManifestError(
            f"{where}: `state` and `prefix` in the manifest's entry `weights` are not strings; export the encoder again"
        )
    path = local_checkpoint(checkpoint) if checkpoint else path
    assert path is not None
    if not path.exists():
        raise ExportError(
            f"{path}: this checkpoint does not exist. According to the manifest {where.name}, the weights were "
            "exported from this checkpoint, and neck-export must read the weights again. If the checkpoint was moved, "
            "pass its new path with --checkpoint"
            + (f". To download the checkpoint again, use --checkpoint {hub_text(weights)}" if "hub" in weights else "")
        )
    source = EncoderSource(path, config=config, alpha=weights.get("adapter_alpha"), **names)
    if is_origin(weights, path):
        source = dataclasses.replace(source, adapter=merged_adapter(where, weights, adapter))
        encoder = source.load(config.necks, sam2_head=config.sam2_head).encoder
    else:
        encoder = _same_weights(where, manifest, config, source, adapter)
    encoder.set_imgsz(config.image_size)
    return encoder


def _same_weights(
    where: Path, manifest: Mapping[str, Any], config: EncoderConfig, source: EncoderSource, adapter: Path | None
) -> Sam3DualViTDetNeck:
    """The encoder from another file than was exported, told by the SHA-256 of its weights.

    The file may have another format, other states and prefixes, and an adapter that is merged already.

    Raises:
        ExportError: it cannot be read, or holds other weights.
    """
    digests, path = manifest.get("weights_sha256"), source.path
    if not isinstance(digests, dict):
        raise ExportError(
            f"{path}: this is not the checkpoint that was exported, because its SHA-256 differs from the one "
            f"in {where.name}; use --checkpoint to pass the checkpoint that was exported"
        )
    unnamed = dataclasses.replace(source, state=None, prefix=None)
    ways = [unnamed]
    with contextlib.suppress(*(() if adapter is not None else (ExportError,))):
        merged = merged_adapter(where, manifest["weights"], adapter)
        ways = [dataclasses.replace(one, adapter=merged) for one in (source, unnamed)] + ways
    problems: list[Exception] = []
    for way in dict.fromkeys(ways):
        try:
            encoder = way.load(config.necks, sam2_head=config.sam2_head).encoder
        except CheckpointError as error:
            problems.append(error)
            continue
        found = fingerprints(encoder.state_dict().items(), ("float32",))
        others = [part for part, kinds in digests.items() if found.get(part, {}).get("float32") != kinds.get("float32")]
        if not others:
            return encoder
        parts = ", ".join(others)
        problems.insert(
            0,
            ExportError(
                f"{path}: this is not the checkpoint that was exported: the SHA-256 of some weights differs from the "
                f"SHA-256 in the manifest {where.name}. Parts of the encoder with different weights: {parts}. Use "
                "--checkpoint to pass the checkpoint that was exported, or export this checkpoint"
            ),
        )
    if isinstance(problems[0], ExportError):
        raise problems[0]
    raise ExportError(
        f"{path}: this may not be the checkpoint that was exported. The SHA-256 of the file differs from the SHA-256 "
        f"in the manifest {where.name}, and the weights cannot be compared, because neck-export cannot load the "
        f"weights: {problems[0]}. Use --checkpoint to pass the checkpoint that was exported"
    )
