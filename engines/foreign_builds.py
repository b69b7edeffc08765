"""What TensorRT-RTX makes of a foreign file, next to our own file of the same encoder; it builds without a GPU."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from engines.builder.build import build_plan
from engines.builder.flavor import Flavor, FlavorError, choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import typed_as
from engines.builder.options import BuildOptions
from engines.layers.layer_report import LayerReport
from export.contract.onnx_file import OnnxFile
from export.contract.signature import BatchRange
from export.foreign.adopt import contract_of
from export.foreign.judge import ForeignVerdict
from export.pipeline import write_onnx
from export.verification.verify import Report

CAPABILITY = "8.9"
"""The GPU that both are built for: TensorRT-RTX lists it in every version that is known here."""


def builder_lines(file: OnnxFile, verdict: ForeignVerdict, report: Report = lambda line: None) -> list[str]:
    """Builds a foreign file and our own, and says how many kernels, bytes and fused attentions each has.

    Args:
        file: the file, which passed.
        verdict: on it.
        report: told of every step.

    Returns:
        Lines for the screen; one that says why, if TensorRT-RTX is not installed or does not build the file.
    """
    try:
        flavor = choose_flavor("rtx")
    except FlavorError as error:
        return [f"builder not run, because TensorRT-RTX cannot be used: {str(error).splitlines()[0]}"]
    with tempfile.TemporaryDirectory() as folder:
        report("building a plan from the file with TensorRT-RTX")
        theirs = _layers(file, Path(folder) / "theirs.plan", flavor)
        if isinstance(theirs, str):
            return [
                f"risk    neck-export could not find out which kernels TensorRT-RTX {flavor.version} uses for the ONNX "
                f"file {file.path}. The reason: {theirs}"
            ]
        report(
            f"for comparison with {file.path.name}: exporting the same encoder with neck-export, and building a plan "
            "from the ONNX file that neck-export wrote"
        )
        ours = _ours(file, verdict, Path(folder), flavor)
    name = f"TensorRT-RTX {flavor.version} for compute capability {CAPABILITY}"
    lines = [f"builder {name}: {theirs.summary()}"]
    lines.append(f"ours    {ours if isinstance(ours, str) else ours.summary()}")
    warning = theirs.warning()
    return [*lines, f"risk    {warning}"] if warning else lines


def _layers(file: OnnxFile, plan: Path, flavor: Flavor) -> LayerReport | str:
    """The layer report of a file, or why it has none."""
    options = BuildOptions(typed_as(file), compute_capabilities=(CAPABILITY,))
    try:
        built = build_plan(file, plan, options, flavor=flavor)
    except (BuildError, FlavorError) as error:
        return " ".join(str(error).split())[:300]
    plan.unlink()
    return built.layers or (built.no_layers or "the builder did not list the kernels of the plan")


def _ours(file: OnnxFile, verdict: ForeignVerdict, folder: Path, flavor: Flavor) -> LayerReport | str:
    """The same of the file that `neck-export onnx` writes of the encoder, with the same outputs and precision."""
    encoder = verdict.encoder
    assert encoder is not None
    signature = dataclasses.replace(contract_of(file, verdict), batch=BatchRange(), dtype="float32")
    precision: Any = verdict.precision if verdict.precision in ("fp32", "fp16", "bf16") else "fp16"
    path = folder / "ours.onnx"
    write_onnx(encoder, signature, path, precision=precision)
    return _layers(OnnxFile(path), folder / "ours.plan", flavor)
