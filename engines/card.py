"""A folder for the Hugging Face Hub: an exported file with a model card that says what its manifest says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.builder.onnx_graph import BuildError
from engines.builder.plan_kind import is_plan
from engines.layers.plan_memory import memory_lines
from export.contract.atomic import disk_errors, staging
from export.contract.export_command import export_command, hub_text
from export.contract.manifest import check_files, manifest_path, read_manifest, to_json
from export.contract.signature import Signature

LICENSE = {
    "license": "other",
    "license_name": "sam-license",
    "license_link": "https://huggingface.co/facebook/sam3/blob/main/LICENSE",
}
"""Of SAM 3's weights, as copies of facebook/sam3 on the Hub name it; an export does not change it."""

README = "README.md"


def write_card(file: Path) -> list[Path]:
    """Writes X-hub/ beside a file: README.md, the file and what belongs to it, ready for `hf upload`.

    The manifest's copy names the weights without their place on this machine.

    Returns:
        The folder, then what is in it.

    Raises:
        BuildError: no such file, or a folder there that is not ours.
        ManifestError: the manifest is missing or damaged, or the file was changed after it was written.
    """
    if not file.is_file():
        raise BuildError(f"{file}: there is no such file; pass an ONNX file or a plan that neck-export wrote")
    kind = "plan" if is_plan(file) else "onnx"
    where = manifest_path(file)
    manifest = read_manifest(where, kind)
    check_files(where, manifest)
    folder = file.with_name(f"{file.stem}-hub")
    if folder.exists() and not (folder / README).is_file():
        raise BuildError(
            f"{folder}: the model card would be written to this folder, but the folder already exists and was not "
            f"created by neck-export (it contains no {README}); move or rename the existing folder"
        )
    names = [entry["name"] for entry in manifest["files"]]
    with disk_errors(BuildError, folder), staging(folder) as stage:
        whole = stage / folder.name
        whole.mkdir()
        whole.chmod(0o755)
        for name in names:
            shutil.copy2(file.with_name(name), whole / name)
        (whole / where.name).write_text(to_json(without_places(manifest)), encoding="utf-8")
        (whole / README).write_text(card_text(file.name, manifest), encoding="utf-8")
        if folder.exists():
            os.rename(folder, stage / "old")
        os.rename(whole, folder)
    return [folder, *sorted(folder.iterdir())]


def without_places(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest whose weights and adapter have names instead of paths on this machine."""
    told = dict(manifest)
    if isinstance(told.get("onnx_manifest"), dict):
        told["onnx_manifest"] = without_places(told["onnx_manifest"])
    if isinstance(told.get("weights"), dict) and "path" in told["weights"]:
        weights = told["weights"] | {"path": told["weights"]["name"]}
        if "adapter" in weights:
            weights["adapter"] = weights["adapter"] | {"path": Path(weights["adapter"]["path"]).name}
        told["weights"] = weights
    return told


def card_text(name: str, manifest: Mapping[str, Any]) -> str:
    """The model card: metadata of the Hub in front, then Markdown.

    Args:
        name: of the file.
        manifest: of an ONNX file or of a plan.
    """
    source = manifest.get("onnx_manifest") or manifest
    weights = source.get("weights") or {"random": True, "seed": "unknown"}
    signature = Signature.from_dict(source["signature"]) if "signature" in source else None
    lines = [*_metadata(manifest, weights), f"# SAM 3 image encoder: {name}", ""]
    lines += [*_about(manifest, source, weights), ""]
    if weights["random"]:
        lines += [
            "**The weights are random. Use the file only to test loading and speed; its features are meaningless.**",
            "",
        ]
    lines += ["## Input and outputs", "", *_tensors(manifest, signature), ""]
    lines += ["## Verification", "", *_verification(manifest), ""]
    if "compute_capabilities" in manifest:
        lines += ["## Where it runs", "", *_plan_facts(manifest), ""]
    elif targets := manifest.get("targets"):
        lines += ["## Runtimes", "", f"{targets['says'][0].upper()}{targets['says'][1:]}.", ""]
    lines += ["## How it was made", "", *_made(name, manifest, source, weights), ""]
    lines += ["## License", "", *_license(weights), ""]
    return "\n".join(lines)


def base_model(weights: Mapping[str, Any]) -> str:
    """The repository on the Hub whose weights were exported, or the original of a file from elsewhere."""
    hub = weights.get("hub")
    return hub["repository"] if hub else "facebook/sam3"


def _metadata(manifest: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    plan = "compute_capabilities" in manifest
    tags = ["sam3", "image-encoder", manifest["precision"], "tensorrt" if plan else "onnx", "neck-export"]
    lines = ["---"]
    if not weights["random"]:
        lines += [*(f"{key}: {value}" for key, value in LICENSE.items()), f"base_model: {base_model(weights)}"]
    lines += [f"library_name: {'tensorrt' if plan else 'onnx'}", "pipeline_tag: image-feature-extraction", "tags:"]
    return [*lines, *(f"- {tag}" for tag in tags), "---", ""]


def _about(manifest: Mapping[str, Any], source: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    signature = source.get("signature") or {}
    size = "x".join(map(str, signature.get("image_size", ()))) or "unknown"
    what = "A TensorRT plan" if "compute_capabilities" in manifest else f"An ONNX file (opset {manifest['opset']})"
    batch = manifest.get("batch") or signature.get("batch", "unknown")
    origin = "random weights" if weights["random"] else f"`{hub_text(weights) or weights['name']}`"
    return [
        f"{what} of SAM 3's image encoder (ViT trunk and necks {', '.join(signature.get('necks', ()))}) in "
        f"{manifest['precision'].upper()}, exported from {origin}, for images of {size} pixels (height x "
        f"width), batch {batch}. The file does not contain the detector, the text encoder or the mask decoder."
    ]


def _tensors(manifest: Mapping[str, Any], signature: Signature | None) -> list[str]:
    specs = [*manifest["inputs"], *manifest["outputs"]] if "inputs" in manifest else []
    if not specs and signature:
        specs = [vars(spec) for spec in (signature.image, *signature.outputs)]
    rows = [f"| `{one['name']}` | {one['dtype']} | {' x '.join(map(str, one['shape']))} |" for one in specs]
    floating = signature is None or signature.input == "float"
    said = (
        "RGB values, scaled to 0..1 and then normalized with mean 0.5 and standard deviation 0.5"
        if floating
        else "RGB pixels with values from 0 to 255"
    )
    return [*_table(("tensor", "type", "shape"), rows), "", f"The input `image` contains {said}."]


def _verification(manifest: Mapping[str, Any]) -> list[str]:
    checked = manifest["verification"]
    graph = checked.get("onnx") or {}
    found = checked if checked.get("outputs") else graph
    lines = []
    if not checked["verified"]:
        lines.append(f"The file itself was not verified: {checked.get('reason', 'unknown reason')}.")
    if found.get("outputs"):
        what = "the file" if found is checked else "the ONNX graph that the plan was built from"
        verdict = "passed" if found["verified"] else "FAILED"
        lines.append(f"Verification of {what} {verdict}: {found['method']}.")
        rows = [
            f"| `{one['name']}` | {one['relative_l2']:.2e} | {one['cosine']:.8f} | {one['max_abs']:.2e} |"
            for one in found["outputs"]
        ]
        lines += ["", *_table(("output", "relative L2", "cosine", "largest absolute difference"), rows)]
    return lines


def _plan_facts(manifest: Mapping[str, Any]) -> list[str]:
    later = manifest["options"]["hardware_compatible"] == "ampere+" or not manifest["compute_capabilities"]
    gpus = "8.0 and later" if later else ", ".join(manifest["compute_capabilities"])
    newer = " or with a later version" if manifest["options"]["version_compatible"] else ""
    flavor = "TensorRT-RTX" if manifest["flavor"] == "rtx" else "TensorRT"
    lines = [
        f"The plan was built with {flavor} {manifest['tensorrt_version']}. Load the plan with the same version of "
        f"{flavor}{newer}. The plan runs only on GPUs with compute capability {gpus}."
    ]
    if manifest.get("layers"):
        lines += ["", f"The builder reports: {manifest['layers']}."]
    return [*lines, "", "; ".join(line.strip() for line in memory_lines(manifest)) + "."]


def _made(name: str, manifest: Mapping[str, Any], source: Mapping[str, Any], weights: Mapping[str, Any]) -> list[str]:
    lines = [f"Written on {manifest['created'][:10]} by neck-export:", "", "```"]
    if "signature" in source:
        told = {**without_places(source), "weights": dict(without_places(source)["weights"])}
        onnx = Path(manifest["onnx"]["name"] if "onnx" in manifest else name)
        lines.append(export_command(told, manifest_path(onnx), onnx))
    if "compute_capabilities" in manifest:
        words = ["neck-export trt", manifest["onnx"]["name"], f"--precision {manifest['precision']}"]
        words += [f"--flavor {manifest['flavor']}", f"--output {name}"]
        lines.append(" ".join(words))
    lines.append("```")
    versions = dict(source.get("versions") or {})
    if "tensorrt_version" in manifest:
        versions["TensorRT-RTX" if manifest["flavor"] == "rtx" else "TensorRT"] = manifest["tensorrt_version"]
    lines += ["", *_table(("package", "version"), [f"| {key} | {value} |" for key, value in versions.items()])]
    if not weights["random"]:
        lines += ["", f"The SHA-256 of the weights file is `{weights['sha256']}`."]
    return lines


def _license(weights: Mapping[str, Any]) -> list[str]:
    if weights["random"]:
        return ["The weights are random numbers, so the license of SAM 3 does not apply to them."]
    base = base_model(weights)
    return [
        f"The weights come from [{base}](https://huggingface.co/{base}) or from a fine-tuned version of {base}. The "
        f"weights of SAM 3 are under the [SAM License]({LICENSE['license_link']}). A copy of the SAM License must "
        "accompany the weights, so add the copy to this repository as the file `LICENSE`. If your weights have another "
        "license, change the license in the metadata at the top of this model card."
    ]


def _table(head: Sequence[str], rows: Iterable[str]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *rows]
