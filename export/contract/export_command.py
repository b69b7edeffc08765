"""The command that exports a file again, changed where it must be (no torch)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.contract.dtypes import BY_NAME
from export.contract.manifest import ManifestError, manifest_path, read_manifest

BASES = {"fp8": "fp16", "int8": "fp16"}
"""The type of what a quantized file does not quantize."""

REPLACED_FORMS = {"scores32": "fp32acc"}
"""Forms of attention that were dropped, in manifests of older versions, and the form that replaces each."""

AS_AUTO = {"attention": "auto", "opset": "auto", "residual": "auto", "upsampling": "auto"}
"""Changes for an export in another precision: what the file has may not be there."""


def export_command(
    manifest: Mapping[str, Any],
    where: Path,
    output: Path,
    checkpoint: Path | None = None,
    changes: Mapping[str, str] | None = None,
) -> str:
    """The `neck-export onnx` that wrote a file, to another place.

    Args:
        manifest: of the ONNX file, with the precision and forms that are wanted.
        where: a manifest or encoder.json that tells the architecture.
        output: the file to write.
        checkpoint: where the weights are now; by default where the manifest says.
        changes: options and their values in the place of the manifest's: attention="auto", opset="auto".
    """
    signature, weights = manifest["signature"], manifest["weights"]
    options = {
        "image-size": "x".join(str(side) for side in signature["image_size"]),
        "batch": signature["batch"],
        "neck": ",".join(signature["necks"]),
        "levels": ",".join(str(level) for level in signature["levels"]),
        "positions": signature["positions"],
        "input": signature["input"],
        "precision": manifest["precision"],
        "attention": REPLACED_FORMS.get(manifest["attention"], manifest["attention"]),
        "residual": manifest.get("residual", "auto"),
        "upsampling": manifest["upsampling"],
        "opset": str(manifest["opset"]),
        **{name.replace("_", "-"): value for name, value in (changes or {}).items()},
    }
    if signature.get("sam2_outputs", "features") != "features":
        options["sam2-outputs"] = signature["sam2_outputs"]
    words = ["neck-export", "onnx", "--config", str(where)]
    if (held := manifest.get("quantization")) and options["precision"] == held["kind"]:
        words += [word for pattern in held["asked"] for word in ("--quantize", pattern)]
        words += ["--budget", str(held["budget"])]
        words += [word for key in ("calibration", "images") if held[key] for word in (f"--{key}", held[key])]
    known = BY_NAME.get(signature.get("dtype", ""))
    dtype = known.precision if known and known.precision else manifest["precision"]
    if dtype != BASES.get(manifest["precision"], manifest["precision"]):
        options.setdefault("output-dtype", dtype)
    if weights["random"] and checkpoint is None:
        words += ["--checkpoint", "random", "--seed", str(weights["seed"])]
    else:
        words += ["--checkpoint", str(checkpoint or hub_text(weights) or weights["path"])]
        words += ["--adapter", weights["adapter"]["path"]] if "adapter" in weights else []
        words += ["--adapter-alpha", str(weights["adapter_alpha"])] if "adapter_alpha" in weights else []
        words += [word for key in ("state", "prefix") if weights.get(key) for word in (f"--{key}", weights[key])]
    for name, value in options.items():
        words += [f"--{name}", value]
    if not any(manifest["rewrites"].values()):
        words.append("--no-rewrite")
    for module in manifest["keep_fp32"]:
        words += ["--keep-fp32", module]
    return shlex.join([*words, "--output", str(output)])


def hub_text(weights: Mapping[str, Any]) -> str:
    """The name on the Hugging Face Hub of the weights that a manifest names; empty for those from elsewhere."""
    hub = weights.get("hub")
    return f"{hub['repository']}@{hub['commit']}/{hub['file']}" if hub else ""


def export_again(onnx: Path, **changes: str) -> str:
    """The command that writes an ONNX file again, reconstructed from its manifest.

    A file that another tool wrote has none: its command is not known here, and so the changed options alone are told.
    """
    where = manifest_path(onnx)
    try:
        return export_command(read_manifest(where, "onnx"), where, onnx, changes=changes)
    except (ManifestError, KeyError, TypeError, AttributeError):
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changes.items())
        return f"neck-export onnx {options}".rstrip()
