"""What a plan holds, told by its manifest and its layer report: nothing is loaded, so no GPU is needed."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

from engines.builder.onnx_graph import BuildError
from engines.layers.layer_report import layers_path, read_layers
from engines.layers.lower_bound import bound_lines, lower_bound
from engines.layers.plan_memory import memory_lines
from engines.layers.published_gpus import find_gpus
from engines.layers.read_layers import read_families
from export.contract.manifest import check_files, manifest_path, read_manifest
from export.inspect import masks_lines, quantized_line


def inspect_plan(path: Path, gpus: str = "") -> dict[str, Any]:
    """The manifest of a plan with its layer report, as JSON values.

    Args:
        path: the plan.
        gpus: names of GPUs with commas, or `all`: `lower_bounds` then contains the least latency on each.

    Raises:
        BuildError: no such file, or no layer report to compute lower bounds from.
        GpuError: a GPU whose published rates are not known here.
        ManifestError: the manifest is missing or damaged, or the plan is not the one it speaks of.
    """
    if not path.is_file():
        raise BuildError(f"{path}: there is no such file; build the plan with `neck-export trt`")
    manifest = read_manifest(manifest_path(path), "plan")
    check_files(manifest_path(path), manifest)
    layers, asked = read_layers(path), find_gpus(gpus) if gpus else {}
    if asked and layers is None:
        raise BuildError(
            f"{path}: --gpu needs the plan's layer report, but the file {layers_path(path).name} is missing; "
            "build the plan again"
        )
    families = collections.Counter(" then ".join(dict.fromkeys(pair)) for pair in read_families(path).values())
    return {
        **manifest,
        "file": str(path),
        "layers": layers.to_dict() if layers else None,
        "attention_kernels": dict(families),
        "lower_bounds": {name: lower_bound(layers, gpu).to_dict() for name, gpu in asked.items() if layers},
    }


def plan_lines(path: Path, found: dict[str, Any], kernels: int = 20) -> list[str]:
    """The summary for a screen.

    Args:
        path: the plan.
        found: what inspect_plan gave.
        kernels: how many kernels to list, those first that move most.
    """
    gpus = ", ".join(found["compute_capabilities"]) or "8.0 and later"
    checked = found["verification"]
    tensors = [("input", spec) for spec in found["inputs"]] + [("output", spec) for spec in found["outputs"]]
    lines = [
        f"{path}  {found['files'][0]['bytes'] / 1000000.0:,.1f} MB, {found['flavor']} "
        f"{found['tensorrt_version']}, {found['precision']}, batch {found['batch']}, for compute capability "
        f"{gpus}, built {found['created']}",
        *(f"  {kind:7} {spec['name']}: {spec['dtype']} {tuple(spec['shape'])}" for kind, spec in tensors),
        f"  from    {found['onnx']['name']}",
        *(f"  note    {note}" for note in found.get("notes", ())),
        *([f"  {quantized_line(found['quantization'])}"] if found.get("quantization") else []),
        *timing_cache_lines(found),
        *memory_lines(found),
        f"  plan    {'verified: ' + checked['method'] if checked['verified'] else checked['reason']}",
    ]
    if graph := checked.get("onnx"):
        word = "verified" if graph["verified"] else "NOT verified"
        lines.append(f"  graph   {word}: {graph.get('method') or graph.get('reason')}")
    lines += masks_lines(found)
    kinds = ", ".join(f"{count} {name}" for name, count in found["attention_kernels"].items())
    lines.append(f"  attention kernels: {kinds or 'unknown, because the plan does not name its attention kernels'}")
    layers = read_layers(path)
    if layers is None:
        return [*lines, no_layers_line(found)]
    bounds = bound_lines(layers, found["lower_bounds"], found["compute_capabilities"])
    return [*lines, *([""] if bounds else []), *bounds, "", layers.table(kernels)]


def timing_cache_lines(manifest: dict[str, Any]) -> list[str]:
    """Which timing cache a plan's kernels were saved to or taken from; plans with one hash have the same kernels."""
    cache = manifest.get("timing_cache")
    if not cache:
        return []
    return [
        f"  timing cache {cache['file']}: the build "
        f"{'read its kernel times from' if cache['replayed'] else 'saved its kernel times to'} the file; "
        f"the SHA-256 of the file begins with {cache['sha256'][:12]}"
    ]


def no_layers_line(manifest: dict[str, Any]) -> str:
    """What is said where a plan has no layer report: why, where its manifest tells."""
    return f"  no layer report: {manifest.get('no_layers') or 'the builder did not list the layers of the plan'}"
