"""Where an exported file came from: what its manifest says of weights, encoder and versions, and the way back."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.contract.manifest import ManifestError, file_entry, sha256
from export.contract.signature import Signature
from export.graph.trace import ExportError
from export.lowering.precision import TYPES, Precision
from neck.checkpoint import load_encoder, random_encoder
from neck.config import ConfigError, EncoderConfig
from neck.necks import Sam3DualViTDetNeck
from neck.trunk import ViTDetTrunk
from neck.weightfile import find_file

PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")
"""Distributions whose versions the manifest keeps, those that are installed."""


def weights_origin(checkpoint: Path | None, seed: int) -> dict[str, Any]:
    """Where weights came from: a seed, or a file with its SHA-256 and, for an index, those of its shards."""
    if checkpoint is None:
        return {"random": True, "seed": seed}
    path = find_file(checkpoint)
    shards = [file_entry(path.with_name(name)) for name in shard_names(path)]
    return {"random": False, "path": str(path.resolve()), **file_entry(path), **({"shards": shards} if shards else {})}


def shard_names(path: Path) -> list[str]:
    """Names of the files that a safetensors index speaks of; none where the path is another file."""
    if path.suffix != ".json":
        return []
    return sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))


def is_origin(weights: Mapping[str, Any], checkpoint: Path) -> bool:
    """Whether a checkpoint has the bytes that `weights_origin` saw."""
    path = find_file(checkpoint)
    shards = weights.get("shards", [])
    if sha256(path) != weights["sha256"]:
        return False
    files = [(path.with_name(entry["name"]), entry["sha256"]) for entry in shards]
    return all(file.is_file() and sha256(file) == digest for file, digest in files)


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
        raise ExportError(f"the trunk is a {type(trunk).__name__}; build a Signature for it and call write_onnx")
    patch, (height, width) = trunk.config.patch_size, trunk.grid
    return dataclasses.replace(trunk.config, image_size=(height * patch, width * patch), necks=tuple(encoder.necks))


def manifest_signature(where: Path, manifest: Mapping[str, Any]) -> Signature:
    """The signature that a manifest holds.

    Raises:
        ManifestError: it holds none, or a damaged one.
    """
    try:
        return Signature.from_dict(manifest["signature"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{where}: its signature is damaged ({error!r}); write the file again") from None


def manifest_precision(where: Path, manifest: Mapping[str, Any]) -> Precision:
    """The precision that a manifest holds.

    Raises:
        ManifestError: it holds none that is known.
    """
    precision = manifest.get("precision")
    if precision not in TYPES:
        raise ManifestError(f"{where}: precision {precision!r}, expected {', '.join(TYPES)}; write the file again")
    return precision


def manifest_encoder(where: Path, manifest: Mapping[str, Any], checkpoint: Path | None = None) -> Sam3DualViTDetNeck:
    """The plain encoder that a file was exported from, set to its image size.

    Raises:
        ManifestError: the manifest does not say it.
        CheckpointError, ExportError: the weights cannot be read, or are not those that were exported.
    """
    try:
        config = EncoderConfig.from_dict(manifest["encoder"])
        weights = dict(manifest["weights"])
        random, source = weights["random"], None if weights["random"] else Path(weights["path"])
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ManifestError(f"{where}: does not say what was exported ({error!r}); write the file again") from None
    if random:
        if checkpoint is not None:
            raise ExportError(
                f"{checkpoint}: {where.name} says that random weights were exported; leave --checkpoint out"
            )
        return random_encoder(config, weights["seed"])
    source = checkpoint or source
    assert source is not None
    if not source.exists():
        raise ExportError(f"{source}: the weights that {where.name} names are not there; say where by --checkpoint")
    if not is_origin(weights, source):
        raise ExportError(f"{source}: is not the checkpoint that was exported ({where.name} has its SHA-256)")
    encoder = load_encoder(source, config, necks=config.necks)
    encoder.set_imgsz(config.image_size)
    return encoder
