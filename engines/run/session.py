"""Load a plan, run it; engines/run/plan_checks.py has what is checked before."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engines.builder.flavor import Flavor
from engines.run.plan_checks import Port, SessionError, check_inputs, check_plan, manifest_specs, type_name
from export.contract.manifest import manifest_path

WARM_UP_RUNS = 3
"""Before a CUDA graph is captured: RTX compiles its kernels in the first run."""

ALIGNMENT = 256
"""Bytes; what NvInferRuntime.h demands of an address. torch allocates at multiples of 512."""

TYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
}

Array = TypeVar("Array", np.ndarray, Tensor)


@dataclasses.dataclass
class Captured:
    """A CUDA graph of one run: its inputs are read and its outputs written wherever it is replayed."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    graph: torch.cuda.CUDAGraph


class Session:
    """An engine in memory, ready to run; for one thread at a time, on the first GPU. `open_plan` makes it.

    Attributes:
        plan, manifest, flavor: what was loaded, by which TensorRT.
        engine, context: TensorRT's own objects; None once closed.
        inputs, outputs: what the engine takes and gives.
        device, stream: where it runs.
        loaded_bytes: device memory that loading took, the context's scratch memory included.
        warnings: what TensorRT warned of, such as a plan of another GPU model.
    """

    def __init__(
        self,
        plan: Path,
        manifest: Mapping[str, Any],
        flavor: Flavor,
        *,
        device: torch.device,
        stream: torch.cuda.Stream | None,
        cuda_graph: bool = False,
    ) -> None:
        self.plan, self.manifest, self.flavor = plan, manifest, flavor
        self.device, self.stream, self.loaded_bytes = device, stream, 0
        self._cuda_graph, self._captured = cuda_graph, None  # type: bool, Captured | None
        self._bound: dict[str, Tensor] = {}
        self.warnings: list[str] = []
        self._failures = collections.deque(["it gave no reason"], maxlen=1)
        self._runtime = flavor.trt.Runtime(flavor.new_logger(_listener(self.warnings, self._failures)))
        # a version-compatible plan brings its own runtime; its SHA-256 is checked
        self._runtime.engine_host_code_allowed = manifest["options"]["version_compatible"] is True
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.engine: Any = self._runtime.deserialize_cuda_engine(data)
        self.context, self._runtime_config = (None, None) if self.engine is None else flavor.create_context(self.engine)  # type: Any, Any
        if self.context is None:
            raise SessionError(
                f"{plan}: TensorRT {flavor.version} cannot load it ({self._failures[0]}); {_memory(device)}"
            )
        ports = [self._port(self.engine.get_tensor_name(index)) for index in range(self.engine.num_io_tensors)]
        self.inputs = tuple(port for port in ports if self._is_input(port.name))
        self.outputs = tuple(port for port in ports if not self._is_input(port.name))
        if sorted((port.name, type_name(port.dtype), port.shape) for port in ports) != manifest_specs(manifest):
            raise SessionError(f"{manifest_path(plan)}: its tensors are not the engine's; build {plan.name} again")

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the engine once.

        Args:
            inputs: arrays by name, of a batch that the plan takes: all numpy, or all contiguous torch tensors on the
                session's GPU, which are read where they are (with a CUDA graph, or at an address that is no multiple of
                256, they are copied first).

        Returns:
            Outputs by name: numpy for numpy, bfloat16 as float32 (numpy has none); torch for torch, at once: work that
            is queued later on the caller's current stream sees them. They are the caller's own, fresh in each run; with
            a CUDA graph they are the session's and the next run overwrites them.

        Raises:
            SessionError: inputs that the plan does not take, out of device memory, or a run that failed.
        """
        if self.context is None:
            raise SessionError(f"{self.plan}: the session is closed; open the plan again")
        check_inputs(self.plan, self.inputs, self.device, inputs)
        with self._errors():
            tensors = {name: self._to_device(value) for name, value in inputs.items()}
            with self._in_order():
                outputs = self._run(tensors)
        if any(isinstance(value, Tensor) for value in inputs.values()):
            return outputs  # type: ignore[return-value]
        with self._errors():
            return {name: _to_numpy(value) for name, value in outputs.items()}  # type: ignore[misc]

    def bind(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes the next runs read these tensors, and returns new tensors that they write.

        The session holds both until others are bound, so a run never writes what somebody else has by now.
        """
        self._bound = {}
        for name, value in inputs.items():
            shape = tuple(value.shape)
            if not self.context.set_input_shape(name, shape):
                raise SessionError(
                    f"{self.plan}: {name} cannot be {shape} ({self._failures[0]}); expected {self.inputs[0]}"
                )
        shapes = {port.name: tuple(self.context.get_tensor_shape(port.name)) for port in self.outputs}
        outputs = {
            port.name: torch.empty(shapes[port.name], dtype=port.dtype, device=self.device) for port in self.outputs
        }
        for name, value in {**inputs, **outputs}.items():
            if not self.context.set_tensor_address(name, value.data_ptr()):
                where = f"{name} lies at {value.data_ptr():#x}"
                raise SessionError(
                    f"{self.plan}: {where}, which TensorRT does not take ({self._failures[0]}); expected device memory "
                    f"at a multiple of {ALIGNMENT}: give a .clone()"
                )
        self._bound = {**inputs, **outputs}
        return outputs

    def enqueue(self) -> None:
        """Starts a run of what is bound on the session's stream."""
        if not self.context.execute_async_v3(self.stream.cuda_stream if self.stream else 0):
            raise SessionError(f"{self.plan}: the run failed ({self._failures[0]}); {_memory(self.device)}")

    def capture(self, inputs: Mapping[str, Tensor]) -> Captured:
        """Captures a run that reads these tensors as a CUDA graph; binding others later makes the graph void.

        Raises:
            SessionError: it cannot be captured; these tensors stay bound, for a run without a graph.
        """
        outputs = self.bind(inputs)
        for _ in range(WARM_UP_RUNS):
            self.enqueue()
        if self.stream and not self.flavor.can_capture(self.context, self.stream.cuda_stream):
            raise SessionError(f"{self.plan}: TensorRT-RTX says that no CUDA graph can be captured; run it without one")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.enqueue()
        except RuntimeError as error:
            raise SessionError(f"{self.plan}: no CUDA graph can be captured ({error}); run it without one") from None
        return Captured(dict(inputs), outputs, graph)

    def close(self) -> None:
        """Waits for the last run and frees the engine."""
        if self.stream:
            self.stream.synchronize()
        self._bound = {}
        self._captured = self.context = self._runtime_config = self.engine = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _is_input(self, name: str) -> bool:
        return self.engine.get_tensor_mode(name).name == "INPUT"

    def _port(self, name: str) -> Port:
        shape, kind = tuple(self.engine.get_tensor_shape(name)), self.engine.get_tensor_dtype(name).name
        if kind not in TYPES or not shape:
            raise SessionError(f"{self.plan}: {name} is {kind} {shape}; expected a batch of {', '.join(TYPES)}")
        batch = (shape[0], shape[0])
        if shape[0] == -1 and self._is_input(name):
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, 0)
            batch = (smallest[0], largest[0])
        return Port(name, TYPES[kind], shape, batch)

    def _run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self._cuda_graph:
            outputs = self.bind(inputs)
            self.enqueue()
            return outputs
        shapes = {name: value.shape for name, value in inputs.items()}
        if self._captured is None or {name: value.shape for name, value in self._captured.inputs.items()} != shapes:
            self._captured = None
            self._captured = self.capture({name: value.clone() for name, value in inputs.items()})
        with torch.cuda.stream(self.stream):
            for name, value in inputs.items():
                self._captured.inputs[name].copy_(value)
            self._captured.graph.replay()
        return self._captured.outputs

    def _to_device(self, value: np.ndarray | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value if value.data_ptr() % ALIGNMENT == 0 else value.clone()  # a view, such as batch[1:2]
        return torch.from_numpy(np.require(value, requirements=["C", "W"])).to(self.device)

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Lets the session's stream wait for the caller's before, and the caller's for the session's after."""
        if self.stream is None:
            yield
            return
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            yield
            caller.wait_stream(self.stream)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise SessionError(f"{self.plan}: out of device memory; {_memory(self.device)}") from None


def open_plan(plan: Path, flavor: Flavor | None = None, *, cuda_graph: bool = False) -> Session:
    """Checks a plan against its manifest and this machine, and loads it.

    Args:
        plan: the file, its manifest X.plan.json beside it.
        flavor: which TensorRT; by default the one that built the plan.
        cuda_graph: run by a CUDA graph, captured anew whenever the input's shape changes.

    Raises:
        SessionError: it cannot run here; the message says why and what to do.
    """
    flavor, manifest = check_plan(plan, flavor)
    if not torch.cuda.is_available():
        raise SessionError(f"torch {torch.__version__} cannot use the GPU; install torch's CUDA build for this driver")
    device = torch.device("cuda", 0)
    with torch.cuda.device(device):
        free = torch.cuda.mem_get_info()[0]
        session = Session(plan, manifest, flavor, device=device, stream=torch.cuda.Stream(), cuda_graph=cuda_graph)
        session.loaded_bytes = max(0, free - torch.cuda.mem_get_info()[0])  # another process may have freed some
    return session


def _listener(warnings: list[str], failures: collections.deque[str]) -> Callable[[int, str], None]:
    """Takes a logger's lines; it must not hold the session, which could then never be freed."""

    def take(severity: int, line: str) -> None:
        if severity <= 2:
            (warnings if severity == 2 else failures).append(" ".join(line.split())[:400])

    return take


def _memory(device: torch.device) -> str:
    """What a message says of device memory."""
    if device.type != "cuda":
        return "device memory is not told"
    free, total = torch.cuda.mem_get_info(device)
    room = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of device memory are free"
    return f"{room}; if too little, end other programs or take a smaller batch"


def _to_numpy(value: Tensor) -> np.ndarray:
    return (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
