"""A fake of TensorRT on real torch.cuda: an engine whose run is torch's kernels on the stream that it is given.

It shows what a CPU cannot: order between real, asynchronous streams, graph captures and their replays. Each run sleeps
on the GPU first, so that a wait that is missing reads what was there before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engines.builder.find_gpu import Gpu
from engines.builder.flavor import Flavor, RuntimeConfig
from engines.run.loaded_plan import LoadedPlan
from engines.run.session import Session
from engines.run.streams import new_stream

SIDE, BATCHES = 64, (1, 2, 3)
SLEEP_CYCLES = 2_000_000
"""About a millisecond at 2 GHz: longer than what a missing wait would have to wait for."""

MANIFEST: dict[str, Any] = {
    "options": {"version_compatible": False, "hardware_compatible": "none"},
    "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", SIDE]}],
    "outputs": [{"name": "twice", "dtype": "float32", "shape": ["batch", SIDE]}],
    "files": [],
}

Kernels = Callable[[Tensor, Tensor], None]
"""Queues the work on the current stream: reads the first tensor, writes the second."""


def double(image: Tensor, twice: Tensor) -> None:
    """Sleeps, then writes 2 * image."""
    torch.cuda._sleep(SLEEP_CYCLES)
    torch.mul(image, 2, out=twice)


def tensor_at(address: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The float32 tensor that lies at an address of the GPU."""
    about = {"shape": shape, "typestr": "<f4", "data": (address, False), "version": 3, "strides": None}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=about), device=device)


class Context:
    """trt.IExecutionContext as far as a session needs it.

    Attributes:
        fails: whether a run is refused; `always`, or `capturing`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shape, self.fails = engine, (0, SIDE), ""
        self.addresses: dict[str, int] = {}
        self._tensors: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Chooses the batch."""
        self.shape = (int(shape[0]), SIDE)
        return shape[0] in BATCHES

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of input and output alike."""
        return self.shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Where it lies."""
        self.addresses[name] = memory
        return memory % 256 == 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queues the kernels on that stream."""
        engine = self.engine
        if torch.cuda.current_device() != engine.device.index:
            return engine.refuse("the thread's current GPU is another one")
        stream = torch.cuda.ExternalStream(stream_handle, device=engine.device)
        with torch.cuda.stream(stream):
            if self.fails and torch.cuda.is_current_stream_capturing():
                return engine.refuse("planted while capturing")
            engine.kernels(self._tensor("image"), self._tensor("twice"))
        return True

    def _tensor(self, name: str) -> Tensor:
        key = (self.addresses[name], self.shape)
        if key not in self._tensors:
            self._tensors[key] = self.engine.tensor_at(*key, self.engine.device)
        return self._tensors[key]


class Engine:
    """trt.ICudaEngine as far as a session needs it."""

    num_io_tensors = 2

    def __init__(self, take: Callable[[int, str], None], flavor: TorchFlavor) -> None:
        self.take, self.device = take, torch.device("cuda", flavor.device)
        self.kernels, self.tensor_at = flavor.trt.kernels, flavor.trt.tensor_at

    def refuse(self, why: str) -> bool:
        """Logs an error."""
        self.take(1, why)
        return False

    def create_execution_context(self) -> Context:
        """A context."""
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        """A name."""
        return ("image", "twice")[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        """Input or output."""
        return SimpleNamespace(name="INPUT" if name == "image" else "OUTPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """With the dynamic batch."""
        return (-1, SIDE)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        """FP32."""
        return SimpleNamespace(name="FLOAT")

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """None."""
        return 0

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        """Smallest, optimum, largest shape."""
        return [(batch, SIDE) for batch in BATCHES]


class TorchFlavor(Flavor):
    """A TensorRT that is torch."""

    def new_logger(self, take: Callable[[int, str], None]) -> Any:
        """The function itself."""
        return take

    def new_runtime(self, logger: Any, *, host_code: bool) -> Any:
        """A runtime that makes an Engine of any plan."""
        return SimpleNamespace(deserialize_cuda_engine=lambda data: Engine(logger, self))

    def create_runtime_config(self, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig:
        """Nothing."""
        return RuntimeConfig()

    def create_context(self, engine: Any, made_with: RuntimeConfig) -> Any:
        """A context."""
        return engine.create_execution_context()

    def can_capture(self, context: Any, stream: int) -> bool:
        """As TensorRT: the capture tells."""
        return True


def open_session(
    folder: Path,
    device: int = 0,
    *,
    cuda_graph: bool = False,
    count: int = 1,
    kernels: Kernels = double,
    at: Callable[[int, tuple[int, ...], torch.device], Tensor] = tensor_at,
) -> list[Session]:
    """Sessions over one engine, each with a stream of its own, on a GPU."""
    plan = folder / "fake.plan"
    plan.write_bytes(b"fake")
    flavor = TorchFlavor(
        "tensorrt", SimpleNamespace(kernels=kernels, tensor_at=at), "0.0.0.0", (), Gpu("", "0.0", "", "0.0"), device
    )
    where = torch.device("cuda", device)
    with torch.cuda.device(where):
        loaded = LoadedPlan(plan, MANIFEST, flavor, where)
        made = functools.partial(Session, loaded, cuda_graph=cuda_graph)
        return [made(stream=new_stream(where)) for _ in range(count)]
