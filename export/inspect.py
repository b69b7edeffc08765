"""What an ONNX file holds: contract, graph, types, attention forms, and what its manifest says was verified."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.contract.export_command import hub_text
from export.contract.manifest import (
    ManifestError,
    check_files,
    data_path,
    manifest_path,
    read_manifest,
    unchanged,
)
from export.contract.onnx_file import OnnxFile
from export.contract.targets import TargetError
from export.foreign.recognize import describe_graph
from export.foreign.risks import graph_risks
from export.lowering.attention import attention_forms, fp8_attentions
from export.verification.target_check import check_claims, graph_needs, read_by

NOT_CHECKED = (
    "the manifest says that these files were verified, but their sizes or modification times have changed since; use "
    "--check to compare the files with their SHA-256 in the manifest, or `neck-export verify` to verify them again"
)


def inspect_onnx(path: Path, check: bool = False) -> dict[str, Any]:
    """A summary of an ONNX file as JSON values.

    Args:
        path: the file.
        check: compare every byte with the manifest's SHA-256. Otherwise a verdict is repeated only for files that
            have the sizes and times that they had when they were verified.

    Raises:
        ExportError: the file cannot be read.
    """
    model = OnnxFile(path).model
    graph = model.graph
    types: collections.Counter[str] = collections.Counter()
    for value in graph.initializers.values():
        if value.const_value is not None:
            types[value.const_value.dtype.name.lower()] += value.const_value.nbytes
    data = data_path(path)
    found: dict[str, Any] = {
        "file": str(path),
        "bytes": path.stat().st_size + (data.stat().st_size if data.is_file() else 0),
        "producer": model.producer_name or "unknown",
        "opset": model.opset_imports.get(""),
        "inputs": [describe(value) for value in graph.inputs],
        "outputs": [describe(value) for value in graph.outputs],
        "nodes": len(graph),
        "operators": dict(collections.Counter(node.op_type for node in graph).most_common()),
        "weight_bytes": dict(types.most_common()),
        "attention": dict(collections.Counter(attention_forms(graph))),
    }
    found["quantized"] = quantized_products(graph)
    needs = graph_needs(model)
    found["read_by"], found["readers_problem"] = read_by(needs), None
    try:
        manifest = read_manifest(manifest_path(path), "onnx")
        check_files(manifest_path(path), manifest, hashes=check)
        keys = ("created", "versions", "precision", "weights", "verification")
        told = {key: manifest[key] for key in keys}
        told |= {key: manifest.get(key) for key in ("residual", "quantization", "masks")}
        verified = told["verification"]["verified"]
        if verified and not check and not unchanged(manifest_path(path), manifest["verification"].get("files")):
            told["verification"] = {"verified": False, "reason": NOT_CHECKED}
        if not check and told["masks"] and not unchanged(manifest_path(path), told["masks"].get("files")):
            told["masks"] = None
        found["manifest"] = told
        check_claims(manifest_path(path), manifest, needs)
    except TargetError as error:
        found["readers_problem"] = str(error)
    except (ManifestError, KeyError) as error:
        found["manifest"] = None
        missing = f"{manifest_path(path)}: the manifest has no entry {error}; export {path.name} again"
        found["manifest_problem"] = missing if isinstance(error, KeyError) else str(error)
        if not manifest_path(path).exists():
            found["seems"] = describe_graph(model, sum(found["attention"].values()))
            found["risks"] = graph_risks(model, found["attention"])
            found["manifest_problem"] = (
                f"{manifest_path(path)}: the manifest is missing, so another tool may have written {path.name}; "
                f"verify {path.name} with `neck-export verify {path} --checkpoint sam3.pt`"
            )
    return found


def describe(value: ir.Value) -> str:
    """Name, type and shape of an input or output."""
    shape = ", ".join(str(side) for side in value.shape or ())
    return f"{value.name}: {value.dtype.name.lower() if value.dtype else 'unknown'} ({shape})"


def quantized_products(graph: ir.Graph) -> dict[str, str]:
    """The products of a written graph that are quantized, and the names of their codes' types.

    A product is quantized where both of its factors are codes behind DequantizeLinear.
    """
    found = {}
    for node in graph:
        reads = [value.producer() if value is not None else None for value in node.inputs]
        if node.op_type == "MatMul" and all(one is not None and one.op_type == "DequantizeLinear" for one in reads):
            codes = reads[1].inputs[0] if reads[1] is not None else None
            if codes is not None and codes.is_initializer() and codes.dtype is not None:
                found[str(codes.name).rpartition(".weight_")[0]] = codes.dtype.name
    return found


def told_quantization(facts: Mapping[str, Any], graph: ir.Graph) -> dict[str, Any]:
    """What a manifest says is quantized, reduced to what the graph has."""
    held = {"products": quantized_products(graph), "attentions": fp8_attentions(graph)}
    held["results"] = coded_results(graph)
    return {**facts, **{key: {name: facts[key][name] for name in names} for key, names in held.items() if key in facts}}


def coded_results(graph: ir.Graph) -> list[str]:
    """The products of a written graph whose results are codes."""
    names = [str(node.name) for node in graph if node.op_type == "QuantizeLinear"]
    return [name.removesuffix("/quantize_result") for name in names if name.endswith("/quantize_result")]


def quantized_line(quantization: dict[str, Any], count: int | None = None) -> str:
    """A line about quantization from a manifest; `count` is the number of layers found in the graph."""
    images = quantization["image_count"]
    count = len(quantization["products"]) if count is None else count
    attentions, results = (quantization.get(key) or {} for key in ("attentions", "results"))
    more = f" and {len(attentions)} of {quantization['of_attentions']} attention layers" if attentions else ""
    more += f" (and the outputs of {len(results)} linear layers)" if results else ""
    return (
        f"{count} of {quantization['of']} linear layers{more} are quantized to {quantization['kind']}; the "
        f"calibration used {images} image{'s' * (images > 1)}"
    )


def _error(relative_l2: float | None) -> str:
    """An error as the table of a verification shows it; manifests have null for infinity."""
    return "infinite" if relative_l2 is None else f"{relative_l2:.2e}"


def summary_lines(found: dict[str, Any]) -> list[str]:
    """The summary for a screen."""
    operators = ", ".join(f"{count} {name}" for name, count in list(found["operators"].items())[:8])
    weights = ", ".join(f"{size / 1e6:,.1f} MB {name}" for name, size in found["weight_bytes"].items())
    forms = ", ".join(f"{count} {name}" for name, count in found["attention"].items()) or "none"
    lines = [
        f"{found['file']}  {found['bytes'] / 1e6:,.1f} MB, written by {found['producer']}, opset {found['opset']}",
        *(f"  input   {line}" for line in found["inputs"]),
        *(f"  output  {line}" for line in found["outputs"]),
        f"  graph   {found['nodes']} nodes: {operators}",
        f"  weights {weights}",
        f"  attention {forms}",
        f"  {found['read_by']}",
        *(f"  WRONG: {line}" for line in (found["readers_problem"] or "").splitlines()),
    ]
    manifest = found["manifest"]
    if manifest is None:
        seems = [f"  seems   {found['seems']}"] if "seems" in found else []
        risks = [f"  risk    {risk}" for risk in found.get("risks", ())]
        return [*lines, *seems, *risks, f"  not verified: {found['manifest_problem']}"]
    weights_from = manifest["weights"]
    origin = (
        f"random weights (seed {weights_from['seed']})"
        if weights_from["random"]
        else hub_text(weights_from) or weights_from["path"]
    )
    origin += f", adapter {weights_from['adapter']['path']}" if "adapter" in weights_from else ""
    origin += f", state {weights_from['state']}" if weights_from.get("state") else ""
    precision = manifest["precision"]
    precision += " with residual sums in FP32" if manifest["residual"] == "fp32" != precision else ""
    verification = manifest["verification"]
    verdict = "verified" if verification["verified"] else "NOT VERIFIED"
    verdict = "not checked" if verification.get("reason") == NOT_CHECKED else verdict
    quantized = manifest["quantization"]
    return [
        *lines,
        *([f"  {quantized_line(quantized, len(found['quantized']))}"] if quantized else []),
        f"  from    {origin}, {precision}, {manifest['created']}",
        f"  {verdict}: {verification.get('method') or verification.get('reason')}",
        *(f"    {row['name']}: relative L2 {_error(row['relative_l2'])}" for row in verification.get("outputs", [])),
        *masks_lines(manifest),
    ]


def masks_lines(manifest: Mapping[str, Any]) -> list[str]:
    """A line with the result of `neck-export masks`; empty if it was not run."""
    masks = manifest.get("masks")
    if not masks:
        return []
    return [
        f"  the masks computed with the exported encoder {'agree with' if masks['passed'] else 'DIFFER from'} the "
        f"masks computed with SAM 3's own encoder: mean mask IoU {masks['mean_iou']:.4f}, worst mask IoU "
        f"{masks['worst_iou']:.4f}. In {masks['images']} images, {masks['objects']} objects were found with both "
        f"encoders, {masks['lost']} only with SAM 3's own encoder, and {masks['found']} only with the exported encoder"
    ]
