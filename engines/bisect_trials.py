"""How a search runs a trial: a graph with some of its modules in FP32, simulated on the CPU or built for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from engines.builder.options import BuildOptions, PlanOptions
from engines.plan import make_plan
from engines.run.open_plan import open_plan
from export.contract.signature import BatchRange
from export.verification.rounding_simulation import is_low_precision, simulate
from export.verification.verify import run_model

TRIAL = "trial.onnx"
Runner = Callable[[ir.Model, Path, np.ndarray, Sequence[str]], list[np.ndarray]]
"""Computes a typed model's outputs from the image; it lies in the folder as TRIAL, some of its modules in FP32."""


def run_on_gpu(
    model: ir.Model, folder: Path, image: np.ndarray, keep_fp32: Sequence[str], plan: Mapping[str, Any]
) -> list[np.ndarray]:
    """Builds a plan of the trial as the searched plan was built, and runs it on the GPU.

    Args:
        model, folder, image, keep_fp32: as for every Runner.
        plan: the manifest of the searched plan, for its flavor, its precision and its builder's options.
    """
    asked, batch = plan["options"], BatchRange.parse(plan["batch"])
    build = BuildOptions(
        batch=batch if batch.dynamic else None,
        keep_fp32=tuple(keep_fp32),
        optimization_level=asked["optimization_level"],
        workspace_bytes=asked["workspace_bytes"],
    )
    built = folder / "built" / "trial.plan"  # the search holds the lock of `folder`, and a plan is filed under a lock
    options = PlanOptions(
        folder / TRIAL, built, precision=plan["precision"], flavor=plan["flavor"], build=build, verify=False
    )
    with open_plan(make_plan(options).path, use_runtime_cache=False) as session:
        outputs = session.infer({"image": image})
    return [outputs[str(value.name)] for value in model.graph.outputs]


def run_simulated(model: ir.Model, folder: Path, image: np.ndarray, keep_fp32: Sequence[str]) -> list[np.ndarray]:
    """Runs the model's rounding simulation in ONNX Runtime."""
    if is_low_precision(model):
        simulate(model)
    return run_model(model, folder, image)
