"""What the tests of the pipeline and of the command line share: tiny exports, traced once, and the front door."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from typer.testing import CliRunner

import export.pipeline
import neck_export
from benchmarks.measure.backends import RunRequest, backends_for
from benchmarks.measure.torch_runner import make_module
from benchmarks.measure.work_folder import Prepared
from export.contract.options import ExportOptions
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import trace
from neck.config import EncoderConfig

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"

PREFIX = "detector.backbone.vision_backbone."
"""Of the keys of meta-dual's checkpoint."""

_traces: dict[tuple[Any, ...], ir.Model] = {}


def quick_trace(module: DeployEncoder) -> ir.Model:
    """`trace`, once for each module: the same weights, architecture and signature give the same graph."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    signature = dataclasses.replace(module.signature, dtype="float32")  # the graph is FP32 whatever the file will be
    key = (signature, getattr(module.trunk, "config", None), repr(module), digest.digest())
    if key not in _traces:
        _traces[key] = trace(module)
        if len(_traces) == 1:
            gc.freeze()  # torch and its registry are not looked through again: a third of every later trace
    return _traces[key].clone()


def trace_quickly(patch: pytest.MonkeyPatch, *others: ModuleType) -> None:
    """Puts `quick_trace` into the pipeline, and into other modules that trace."""
    for module in (export.pipeline, *others):
        patch.setattr(module, "trace", quick_trace)


def checkpoint_of(case: str) -> Path:
    """The checkpoint of a golden case."""
    return next((DATA / case).glob("checkpoint.*"))


def config_of(case: str) -> Path:
    """The encoder.json of a golden case."""
    return DATA / case / "encoder.json"


def golden_options(case: str, output: Path, **changes: Any) -> ExportOptions:
    """Options that export all of a golden case."""
    size = json.loads((DATA / case / "case.json").read_text())["run_image_size"]
    config = EncoderConfig.from_file(config_of(case))
    values: dict[str, Any] = {"config": config, "necks": "all", "image_size": size, **changes}
    return ExportOptions(output, **{"checkpoint": checkpoint_of(case), **values})


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its content; a folder has a name that ends in a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[f"{name}/" if path.is_dir() else name] = b"" if path.is_dir() else path.read_bytes()
    return found


STEP_LINE = r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} "
"""How a line of progress begins where stderr is no terminal."""


def without_steps(err: str) -> str:
    """What a command wrote to stderr, without its lines of progress."""
    return re.sub(STEP_LINE + r".*\n", "", err)


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command gave; `err` without its progress."""

    code: int
    out: str
    err: str


def neck_export_cli(*arguments: str | Path) -> Ran:
    """Runs `neck-export` in this process; an exception that it should have told is raised."""
    result = CliRunner().invoke(neck_export.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, without_steps(result.stderr))


def plant_in_trunk(state: dict[str, torch.Tensor], factor: float = 2.0**16) -> None:
    """Scales one value channel of block 2's attention up and its column of the projection down: the same function."""
    attention = f"{PREFIX}trunk.blocks.2.attn."
    channels = state[attention + "proj.weight"].shape[1]
    for leaf in ("weight", "bias"):
        state[f"{attention}qkv.{leaf}"][2 * channels] *= factor
    state[attention + "proj.weight"][:, 0] /= factor


def plant_in_neck(state: dict[str, torch.Tensor], factor: float = 2.0**16) -> None:
    """The same between the two convolutions of level 2."""
    level = f"{PREFIX}convs.2."
    for leaf in ("weight", "bias"):
        state[f"{level}conv_1x1.{leaf}"][0] *= factor
    state[level + "conv_3x3.weight"][:, 0] /= factor


@functools.cache
def golden_state(case: str) -> dict[str, torch.Tensor]:
    """The state dict of a golden case in Meta's format; copy it before a change."""
    return torch.load(checkpoint_of(case), weights_only=True)["model"]


def save_state(path: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """Writes meta-dual's checkpoint, changed."""
    state = {name: tensor.clone() for name, tensor in golden_state("meta-dual").items()}
    if change:
        change(state)
    torch.save({"model": state}, path)
    return path


def random_outputs(seed: int = 0, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Named arrays of order 1."""
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def bench_module(made: Prepared, name: str = "eager-fp32") -> DeployEncoder:
    """The module of a benchmark's backend on a CPU."""
    backend = next(one for one in backends_for("cpu") if one.id == name)
    return make_module(RunRequest(backend, made.encoder, made.config, made.signature, Path()))
