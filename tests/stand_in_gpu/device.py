"""The device: its memory, its clock, its streams, and what of torch.cuda engines/ and benchmarks/ touch.

Memory is a page-aligned mapping of its own for every tensor, so that what was freed is known to be freed. Time is a
clock that goes on by what the work is said to cost: nothing here depends on how fast the machine is.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MEMORY_BYTES = 24 << 30
EVENT_MS = 0.001
"""What recording an event costs, so that no interval is nothing."""

ALIGNMENT = 256


class DeviceFault(RuntimeError):
    """What the GPU would end the process for: the stand-in tells it at once."""


@dataclasses.dataclass
class Device:
    """One GPU.

    Attributes:
        name, capability, driver, cuda: what its driver says.
        free_bytes: memory that nobody holds; a test makes it small.
        now_ms: the clock.
        capturing: the graph that is being captured, or None.
        capture_fails: whether a capture ends in an error.
        launches: names of what ran, in order.
    """

    name: str = "NVIDIA L4"
    capability: str = "8.9"
    driver: str = "580.95.05"
    cuda: int = 13000
    free_bytes: int = MEMORY_BYTES
    now_ms: float = 0.0
    capturing: Graph | None = None
    capture_fails: bool = False
    launches: list[str] = dataclasses.field(default_factory=list)
    _blocks: dict[int, int] = dataclasses.field(default_factory=dict)

    def allocate(self, count: int) -> tuple[int, Any]:
        """The address of new memory and what holds it."""
        if count > self.free_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count} bytes")
        held = mmap.mmap(-1, max(count, 1))
        address = ctypes.addressof(ctypes.c_char.from_buffer(held))
        self._blocks[address] = count
        self.free_bytes -= count
        weakref.finalize(held, self._free, address)
        return address, held

    def _free(self, address: int) -> None:
        self.free_bytes += self._blocks.pop(address)

    def holds(self, address: int, count: int = 1) -> bool:
        """Whether these bytes are memory that somebody holds."""
        return any(start <= address and address + count <= start + size for start, size in self._blocks.items())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor on the device."""
        count = math.prod(shape)
        _, held = self.allocate(count * dtype.itemsize)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(held, dtype=dtype, count=count).reshape(shape)

    def put(self, value: Tensor) -> Tensor:
        """A copy on the device."""
        return self.empty(tuple(value.shape), value.dtype).copy_(value)

    def launch(self, name: str, cost_ms: float, work: Callable[[], None]) -> None:
        """Runs work, or puts it into the graph that is being captured."""

        def run() -> None:
            self.launches.append(name)
            self.now_ms += cost_ms
            work()

        if self.capturing is not None:
            self.capturing.steps.append(run)
        else:
            run()


class Mode(TorchFunctionMode):
    """Sends what torch would put on `cuda` to the device, and calls its tensors `cuda`."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def on_device(self, value: object) -> bool:
        """Whether a value is a tensor that lies on the device."""
        return isinstance(value, Tensor) and value.numel() > 0 and self.device.holds(value.data_ptr())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args)
        places = any(isinstance(value, PLACES) for value in (*args, *kwargs.values()))
        if (not places and name not in NEW and name not in MOVES) or func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "cpu" or (name == "to" and _asks(args, kwargs, "cpu")):
            args, kwargs, _ = _elsewhere(args, kwargs)
            found = func(*args, **kwargs)
            return found.clone() if self.on_device(found) else found
        args, kwargs, asked = _elsewhere(args, kwargs)
        if name == "cuda":
            func, asked, args, kwargs = Tensor.to, True, (args[0], args[0].dtype), {}
        if "out" in kwargs:
            return func(*args, **kwargs)
        here = asked or (name in NEW and self.on_device(args[0]))
        found = func(*args, **kwargs)
        return self.device.put(found) if here and isinstance(found, Tensor) and not self.on_device(found) else found

    def _property(self, func: Any, args: Any) -> Any:  # noqa: ANN401
        if func == Tensor.device.__get__:
            return torch.device("cuda", 0) if self.on_device(args[0]) else func(*args)
        return self.on_device(args[0]) if func == Tensor.is_cuda.__get__ else func(*args)


PLACES = (str, torch.device)
MOVES = {"cpu", "cuda", "pin_memory"}
NEW = {"clone", "contiguous", "empty_like", "mul", "add", "__mul__", "__add__", "to", "float", "half", "bfloat16"}
"""Operators whose result is a new tensor where their first argument lies."""


def _asks(args: tuple[Any, ...], kwargs: dict[str, Any], kind: str) -> bool:
    places = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str | torch.device)]
    return any(torch.device(place).type == kind for place in places)


def _elsewhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
    """The arguments with `cpu` in the place of `cuda`, and whether there was one."""
    asked = False

    def change(value: Any) -> Any:  # noqa: ANN401
        nonlocal asked
        named = isinstance(value, str) and value.partition(":")[0] == "cuda"
        if named or (isinstance(value, torch.device) and value.type == "cuda"):
            asked = True
            return torch.device("cpu")
        return value

    changed = tuple(map(change, args)), {key: change(value) for key, value in kwargs.items()}
    return *changed, asked


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.cuda_stream, self.waited = 0x5EED0000 + id(self) % 0xFFFF, []  # type: int, list[Any]

    def synchronize(self) -> None:
        """Everything has run already."""

    def wait_stream(self, stream: Stream) -> None:
        """Everything has run already; that it waits is noted."""
        self.waited.append(stream)

    def wait_event(self, event: Event) -> None:
        """Everything has run already; that it waits is noted."""
        self.waited.append(event)


class Event:
    """torch.cuda.Event."""

    device: Device

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timed, self.at = enable_timing, math.nan

    def record(self, stream: Stream | None = None) -> None:
        """Notes the device's clock."""
        self.device.now_ms += EVENT_MS
        self.at = self.device.now_ms

    def synchronize(self) -> None:
        """Everything has run already."""

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds."""
        if not self.timed or not end_event.timed:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return end_event.at - self.at


class Graph:
    """torch.cuda.CUDAGraph: what was launched while it was captured, with the addresses of then."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Runs it again."""
        for step in self.steps:
            step()


class Capture:
    """torch.cuda.graph."""

    device: Device

    def __init__(
        self, cuda_graph: Graph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph = cuda_graph

    def __enter__(self) -> None:
        self.device.capturing = self.graph

    def __exit__(self, *error: object) -> None:
        self.device.capturing = None
        if self.device.capture_fails or error[0] is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def cuda_surface(device: Device) -> dict[str, Any]:
    """What takes the place of torch.cuda's own, by name."""
    current = Stream()

    @contextlib.contextmanager
    def nothing(stream: object) -> Iterator[None]:
        yield

    def properties(device_index: object = None) -> SimpleNamespace:
        major, minor = map(int, device.capability.split("."))
        told = {"name": device.name, "major": major, "minor": minor, "total_memory": MEMORY_BYTES}
        return SimpleNamespace(**told, uuid="01234567-89ab-cdef-0123-456789abcdef", multi_processor_count=58)

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": properties,
        "get_device_name": lambda device_index=None: device.name,
        "get_device_capability": lambda device_index=None: tuple(map(int, device.capability.split("."))),
        "mem_get_info": lambda device_index=None: (device.free_bytes, MEMORY_BYTES),
        "max_memory_reserved": lambda device_index=None: MEMORY_BYTES - device.free_bytes,
        "max_memory_allocated": lambda device_index=None: MEMORY_BYTES - device.free_bytes,
        "reset_peak_memory_stats": lambda device_index=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device_index=None: None,
        "current_stream": lambda device_index=None: current,
        "stream": nothing,
        "device": nothing,
        "Stream": Stream,
        "Event": type("Event", (Event,), {"device": device}),
        "CUDAGraph": Graph,
        "graph": type("graph", (Capture,), {"device": device}),
    }
