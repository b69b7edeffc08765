"""What several test files share: the golden encoders, tiny encoders, and graphs that are traced once."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from exporting import quick_trace
from numpy.typing import NDArray
from safetensors.torch import load_file
from shared_traces import SharedTraces
from skips import summary_lines
from torch import Tensor

import benchmarks.measure.worker_process
import export.graph.trace
from engines.builder.find_gpu import find_gpu
from engines.builder.flavor import Flavor, FlavorError, choose_flavor
from export.contract.options import Rewrites
from export.contract.signature import BatchRange, Signature, encoder_signature
from export.contract.targets import version_numbers
from export.graph.deployed_module import DeployEncoder
from export.verification.rounding_simulation import AS_WRITTEN
from neck.checkpoint import load_encoder, random_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck, forward_necks

if TYPE_CHECKING:
    from cpp_build import Programs

DATA = Path(__file__).parent / "data"
GOLDEN_CASES = ("hf-dual", "hf-tracker", "meta-dual", "meta-padded", "meta-tri", "ultralytics-resized")

GOLDEN_TOLERANCE = 2e-5
"""Of each output's largest value: FP32 sums in another order over 4 blocks give up to 3e-6 (torch and ONNX Runtime)."""

GPU_MISSING = "needs an NVIDIA GPU with its driver, torch's CUDA build, and a TensorRT that runs on that GPU"


NEWEST_OPSET = 24 if version_numbers(importlib.metadata.version("onnxruntime")) >= (1, 25) else 23
"""The newest opset that ONNX Runtime runs here: 1.23, the newest for Python 3.10, refuses 24."""


LONGEST = (
    *("cpp_engine", "bench", "docs", "foreign", "build", "families", "plan", "trace"),
    *("attach", "cpp_client", "pipeline", "server", "targets", "gpu_played", "select", "oracle"),
    *("browser", "interrupt", "backends", "tune", "probes", "head_file", "server_load", "foreign_tools", "simulate"),
    *("triton_client", "quantize_files", "counts", "cli_service", "cpp_real", "bisect", "forms", "checkpoint"),
)
"""The files that take longest, the longest first: one that is begun last keeps one core busy and the others idle."""


def pytest_configure() -> None:
    """Lets Ctrl-C reach the commands that tests start, also if the shell started pytest in the background.

    Such a shell ignores SIGINT, and a child process inherits that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; within a file nothing changes."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """Spares the garbage collector torch's own million objects, and every run of it that a trace would ask for."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Ends a run with what was skipped and what would bring it."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", ())]
    if reasons:
        terminalreporter.section(f"{len(reasons)} skipped")
        terminalreporter.write_line("\n".join(summary_lines(reasons)))


@pytest.fixture(scope="session", autouse=True)
def _torch_tables_once() -> Iterator[None]:
    """Lets torch.onnx.export make its tables once in a process: 2 of the 5 seconds of every trace (torch 2.13).

    A torch that has them no longer makes them as it likes.
    """
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    registry = getattr(_registration, "ONNXRegistry", None)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(registry, "from_torchlib"):
            table = functools.cache(registry.from_torchlib)  # type: ignore[union-attr]

            def from_torchlib(*arguments: Any, **named: Any) -> Any:
                own = copy.copy(table(*arguments, **named))  # transformers' exporter adds to its own
                own.functions = {name: list(entries) for name, entries in own.functions.items()}
                return own

            patch.setattr(registry, "from_torchlib", staticmethod(from_torchlib))
        if hasattr(utils, "_materialize_cpp_cia_ops"):
            patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        yield


@pytest.fixture(scope="session")
def programs() -> Programs:
    """All that tests/cpp builds: neck-engine, neck-triton and the programs that test the C++ library."""
    from cpp_build import shared_programs

    return shared_programs()


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Lets torch export each structure once in a run, a benchmark's workers included."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    folder = folder / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.graph.trace, "_export", SharedTraces(export.graph.trace._export, folder))
        quick = (sys.executable, str(Path(__file__).with_name("quick_worker.py")), str(folder))
        patch.setattr(benchmarks.measure.worker_process, "COMMAND", quick)
        yield


@dataclasses.dataclass(frozen=True)
class Golden:
    """An encoder of a public implementation, set to the size that it was run at, and what it gave.

    The encoder is shared by all tests: it must be left as it is.
    """

    config: EncoderConfig
    encoder: Sam3DualViTDetNeck
    image: Tensor
    expected: dict[str, Tensor]


@functools.cache
def load_golden(case: str) -> Golden:
    """Loads one case of tests/data; its config has the size, necks and levels that were run."""
    folder = DATA / case
    size = json.loads((folder / "case.json").read_text())["run_image_size"]
    config = EncoderConfig.from_file(folder / "encoder.json")
    encoder = load_encoder(next(folder.glob("checkpoint.*")), config)
    encoder.set_imgsz(size)
    expected = load_file(folder / "expected.safetensors")
    config = dataclasses.replace(
        config, image_size=(size, size), necks=tuple(encoder.necks), scale_factors=tuple(encoder.scale_factors)
    )
    return Golden(config, encoder, expected.pop("image"), expected)


def tiny_config(**changes: Any) -> EncoderConfig:
    """A config of 4 blocks that runs in milliseconds; head_dim 8, so that the attention scale is no power of two."""
    values: dict[str, Any] = {
        "image_size": 112,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 2,
        "window_size": 4,
        "global_blocks": (1, 3),
        "pretrain_image_size": 56,
        "d_model": 8,
    }
    return EncoderConfig(**{**values, **changes})


def named_outputs(encoder: Sam3DualViTDetNeck, image: Tensor) -> dict[str, Tensor]:
    """Runs the module and names its outputs as the file does."""
    with torch.no_grad():
        necks = forward_necks(encoder, image)
    return {
        f"{neck}_{kind}_{level}": tensor
        for neck, both in necks.items()
        for kind, tensors in zip(("feat", "pos"), both, strict=True)
        for level, tensor in enumerate(tensors)
    }


def worst_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of any output, relative to that output's largest value; the names must be the same.

    A tracker of transformers gives features alone: then only those are compared.
    """
    if not any("_pos_" in name for name in expected):
        found = {name: tensor for name, tensor in found.items() if "_pos_" not in name}
    assert sorted(found) == sorted(expected)
    errors = [(found[name].double() - want.double()).abs().max() / want.abs().max() for name, want in expected.items()]
    return float(torch.stack(errors).max())


def open_onnx(path: Path) -> Any:
    """A session on the CPU that computes the same on every processor.

    One thread; QuantizeLinear and DequantizeLinear are computed as they are written, because the sums of fused INT8
    products overflow on a processor without VNNI.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(*AS_WRITTEN)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnx(path: Path, image: Tensor) -> dict[str, Tensor]:
    """Runs a file in ONNX Runtime."""
    session = open_onnx(path)
    names = [output.name for output in session.get_outputs()]
    values: list[NDArray[np.float32]] = session.run(names, {"image": image.numpy()})
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A canonical graph and what it was traced from; `model` is a copy of the test's own."""

    module: DeployEncoder
    signature: Signature
    model: ir.Model


@functools.cache
def _traced(encoder: Sam3DualViTDetNeck, signature: Signature, rewrites: Rewrites) -> tuple[DeployEncoder, ir.Model]:
    module = DeployEncoder(encoder, signature, rewrites)
    return module, quick_trace(module)


def traced(
    encoder: Sam3DualViTDetNeck,
    config: EncoderConfig,
    rewrites: Rewrites | None = None,
    batch: str = "1",
    **asked: Any,
) -> Traced:
    """Traces an encoder, once for all tests that ask for the same (a trace takes 3 s whatever the encoder's size)."""
    asked.setdefault("necks", "all")
    signature = encoder_signature(config, batch=BatchRange.parse(batch), **asked)
    module, model = _traced(encoder, signature, rewrites or Rewrites())
    return Traced(module, signature, model.clone())


@functools.cache
def shared_encoder(config: EncoderConfig) -> Sam3DualViTDetNeck:
    """A random encoder that several tests look at and leave as it is."""
    return random_encoder(config)


@pytest.fixture(params=GOLDEN_CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden encoder."""
    return load_golden(request.param)


Save = Callable[[ir.Model], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a model with its weights beside it, under a name of its own."""
    count = iter(range(100))

    def write(model: ir.Model) -> Path:
        path = tmp_path / f"model{next(count)}.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        return path

    return write


@pytest.fixture
def gpu_flavor() -> Flavor:
    """The TensorRT of this machine, where it can run plans."""
    if find_gpu() is None or not torch.cuda.is_available():
        pytest.skip(GPU_MISSING)
    try:
        flavor = choose_flavor("auto")
    except FlavorError as error:  # a bare machine: nothing has failed
        pytest.skip(f"{GPU_MISSING}: {str(error).splitlines()[0]}")
    if flavor.gpu is None or (flavor.capabilities and flavor.gpu.compute_capability not in flavor.capabilities):
        pytest.skip(GPU_MISSING)
    return flavor
