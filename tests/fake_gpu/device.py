"""The device: its memory, its clock, its streams, and what of torch.cuda engines/ and benchmarks/ touch.

Memory is a page-aligned mapping of its own for every tensor, so that what was freed is known to be freed. Time is a
clock that goes on by what the work is said to cost: nothing here depends on how fast the machine is.

Streams are asynchronous: what TensorRT is asked for runs when somebody waits for it, or when work that is queued behind
it runs. torch's own operators run at once, after all that their stream waits for; who reads without waiting sees what
was there before, and a run whose input was not waited for is a DeviceFault.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import math
import mmap
import threading
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
POOLED = 32
"""torch.cuda.Stream() hands out so many streams of a device in turn."""


class DeviceFault(RuntimeError):
    """What the GPU would end the process for, or do wrong without a word: the fake tells it at once."""


class Queue:
    """What is queued on a stream of CUDA's: work, and waits for other streams.

    Attributes:
        index: of its GPU.
        queued, ended: how much was queued so far, and how much of it has run.
        seen: how far every other stream must have come before what is queued next here.
    """

    def __init__(self, index: int) -> None:
        self.index, self.queued, self.ended = index, 0, 0
        self.seen: dict[Queue, int] = {}
        self._work: list[Callable[[], None]] = []

    def push(self, work: Callable[[], None]) -> int:
        """Queues work; returns its place."""
        self._work.append(work)
        self.queued += 1
        return self.queued

    def wait(self, other: Queue, place: int, seen: dict[Queue, int]) -> None:
        """Lets what is queued from now on wait for another stream to come so far."""
        self.push(lambda: other.settle(place))
        for each, known in {**seen, other: place}.items():
            self.seen[each] = max(self.seen.get(each, 0), known)

    def settle(self, place: int | None = None) -> None:
        """Runs what was queued up to a place, by default all."""
        place = self.queued if place is None else place
        while self.ended < place and self._work:
            work = self._work.pop(0)
            self.ended += 1
            work()


@dataclasses.dataclass
class Block:
    """Memory that somebody holds: its size, its GPU, what holds it, and which work wrote it last."""

    size: int
    index: int
    held: weakref.ref[Any]
    writer: tuple[Queue, int] | None = None


@dataclasses.dataclass
class Device:
    """One GPU, or several alike.

    Attributes:
        name, capability, driver, cuda: what its driver says.
        others: compute capabilities of further GPUs.
        free_bytes: memory that nobody holds; a test makes it small.
        now_ms: the clock.
        capturing: the graph that is being captured, or None; torch allows one in a process.
        capture_fails: whether a capture ends in an error.
        launches: names of what ran, in order.
    """

    name: str = "NVIDIA L4"
    capability: str = "8.9"
    driver: str = "580.95.05"
    cuda: int = 13000
    others: tuple[str, ...] = ()
    free_bytes: int = MEMORY_BYTES
    now_ms: float = 0.0
    capturing: Graph | None = None
    capture_fails: bool = False
    launches: list[str] = dataclasses.field(default_factory=list)
    _blocks: dict[int, Block] = dataclasses.field(default_factory=dict)
    _queues: dict[int, Queue] = dataclasses.field(default_factory=dict)
    _host: dict[Queue, int] = dataclasses.field(default_factory=dict)  # how far the host has waited
    _thread: threading.local = dataclasses.field(default_factory=threading.local)
    _pooled: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    _created: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(0xC0DE0001))
    _lock: Any = dataclasses.field(default_factory=threading.RLock)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Of every GPU."""
        return (self.capability, *self.others)

    @property
    def current(self) -> int:
        """The index of this thread's GPU."""
        return int(getattr(self._thread, "index", 0))

    @current.setter
    def current(self, index: int) -> None:
        if not 0 <= index < len(self.capabilities):
            raise RuntimeError("CUDA error: invalid device ordinal")
        self._thread.index = index

    def queue(self, handle: int, index: int | None = None) -> Queue:
        """The stream of a handle; 0 is the default stream of each GPU."""
        index = self.current if index is None else index
        return self._queues.setdefault(handle or -1 - index, Queue(index))

    def create_stream(self) -> int:
        """The handle of a new stream of this thread's GPU, as cuStreamCreate gives it."""
        handle = next(self._created)
        self.queue(handle)
        return handle

    def stream_of(self, index: int) -> Stream:
        """This thread's current stream of a GPU."""
        streams: dict[int, Stream] = self._thread.__dict__.setdefault("streams", {})
        return streams.setdefault(index, Stream(self, index, 0))

    def set_stream(self, stream: Stream) -> None:
        """Makes it this thread's current one, and its GPU too."""
        self.stream_of(stream.index)
        self._thread.streams[stream.index] = stream
        self.current = stream.index

    def synchronize(self, queue: Queue | None = None) -> None:
        """The host waits for a stream, by default for all."""
        with self._lock:
            for each in [queue] if queue else list(self._queues.values()):
                if self.capturing is not None and self.capturing.queue is each:
                    self.capturing.broken = True
                    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
                each.settle()
                self._host[each] = each.queued

    def allocate(self, count: int, index: int) -> tuple[int, Any]:
        """The address of new memory and what holds it."""
        if count > self.free_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {count} bytes")
        held = mmap.mmap(-1, max(count, 1))
        address = ctypes.addressof(ctypes.c_char.from_buffer(held))
        block = self._blocks[address] = Block(count, index, weakref.ref(held))
        self.free_bytes -= count
        weakref.finalize(held, self._free, address, block)
        return address, held

    def _free(self, address: int, block: Block) -> None:
        self.free_bytes += block.size
        if self._blocks.get(address) is block:  # the mapping is gone already: another thread may have the address
            del self._blocks[address]

    def block(self, address: int, count: int = 1) -> Block | None:
        """The memory that these bytes lie in, None where nobody holds them."""
        for start, block in list(self._blocks.items()):
            if start <= address and address + count <= start + block.size:
                return block
        return None

    def holds(self, address: int, count: int = 1) -> bool:
        """Whether these bytes are memory that somebody holds."""
        return self.block(address, count) is not None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, index: int = 0) -> Tensor:
        """A new tensor on a GPU."""
        count = math.prod(shape)
        _, held = self.allocate(count * dtype.itemsize, index)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(held, dtype=dtype, count=count).reshape(shape)

    def put(self, value: Tensor, index: int = 0) -> Tensor:
        """A copy on a GPU."""
        return self.empty(tuple(value.shape), value.dtype, index).copy_(value)

    def operate(self, index: int) -> tuple[Queue, int]:
        """An operator of torch's begins on the current stream of a GPU: all that it waits for runs."""
        with self._lock:
            queue = self.stream_of(index).queue
            place = queue.push(lambda: None)
            queue.settle()
            return queue, place

    def launch(
        self, name: str, cost_ms: float, work: Callable[[], None], handle: int, reads: list[int], writes: list[int]
    ) -> None:
        """Queues work on a stream, or puts it into the graph that is captured there.

        Args:
            name, cost_ms: for `launches` and the clock.
            work: what is done, when it runs.
            handle: of the stream.
            reads, writes: addresses.
        """
        queue = self.queue(handle)

        def run() -> None:
            self.launches.append(name)
            self.now_ms += cost_ms
            work()

        with self._lock:
            if self.capturing is not None and self.capturing.queue is queue:
                self.capturing.steps.append((run, reads, writes))
            else:
                self.submit(queue, run, reads, writes)

    def submit(self, queue: Queue, run: Callable[[], None], reads: list[int], writes: list[int]) -> None:
        """Queues work whose memory is known.

        Raises:
            DeviceFault: what it reads may not be written yet, or what it writes may still be written by others.
        """
        for address in (*reads, *writes):
            block = self.block(address)
            if block is None or block.writer is None:
                continue
            writer, place = block.writer
            known = max(queue.seen.get(writer, 0), self._host.get(writer, 0))
            if writer is not queue and known < place:
                raise DeviceFault("a run reads or writes memory that work on another stream may not have written yet")
        # torch gives memory to others in a stream's order: what is queued has it until it has run
        kept = [block.held() for block in map(self.block, (*reads, *writes)) if block]

        def work() -> None:
            run()
            kept.clear()

        place = queue.push(work)
        for address in writes:
            if block := self.block(address):
                block.writer = (queue, place)


class Mode(TorchFunctionMode):
    """Sends what torch would put on `cuda` to the device, and calls its tensors `cuda`."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def block_of(self, value: object) -> Block | None:
        """The memory that a tensor lies in; None if that is the host's."""
        if not isinstance(value, Tensor) or not self.device._blocks or value.is_meta or value.numel() == 0:
            return None
        try:
            return self.device.block(value.data_ptr())
        except RuntimeError:  # a FakeTensor of a trace has none
            return None

    def on_device(self, value: object) -> bool:
        """Whether a value is a tensor that lies on the device."""
        return self.block_of(value) is not None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "data_ptr", "numel", "is_contiguous", "stride", "size", "dim", "element_size"):
            return self._property(func, args) if name == "__get__" else func(*args, **kwargs)
        blocks = [self.block_of(value) for value in _tensors(args, kwargs) if isinstance(value, Tensor)]
        touched = next(filter(None, blocks), None)
        at = self.device.operate(touched.index) if touched else None
        found = self._call(func, name, args, kwargs)
        block = self.block_of(found)
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        written = (
            touched if in_place else block if block not in blocks and name not in ("empty", "empty_like") else None
        )
        if written:
            written.writer = at = at or self.device.operate(written.index)
        # a copy between host and device is over when it returns, unless it was asked not to wait
        moved = (None in blocks and block is not None) or (touched is not None and block is None)
        if at and moved and not kwargs.get("non_blocking"):
            self.device.synchronize(at[0])
        return found

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        places = any(isinstance(value, PLACES) for value in (*args, *kwargs.values()))
        if (not places and name not in NEW and name not in MOVES) or func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "cpu" or (name == "to" and _asks(args, kwargs, "cpu")):
            args, kwargs, _ = _elsewhere(args, kwargs, self.device.current)
            found = func(*args, **kwargs)
            return found.clone() if self.on_device(found) else found
        args, kwargs, asked = _elsewhere(args, kwargs, self.device.current)
        if name == "cuda":
            func, asked, args, kwargs = Tensor.to, self.device.current, (args[0], args[0].dtype), {}
        if "out" in kwargs:
            return func(*args, **kwargs)
        before = self.block_of(args[0]) if name in NEW else None
        index = asked if asked is not None else before.index if before else None
        found = func(*args, **kwargs)
        if index is None or not isinstance(found, Tensor):
            return found
        there = self.block_of(found)
        return found if there and there.index == index else self.device.put(found, index)

    def _property(self, func: Any, args: Any) -> Any:
        block = self.block_of(args[0]) if func in (Tensor.device.__get__, Tensor.is_cuda.__get__) else None
        if func == Tensor.device.__get__:
            return torch.device("cuda", block.index) if block else func(*args)
        return block is not None if func == Tensor.is_cuda.__get__ else func(*args)


def _tensors(args: Any, kwargs: Any) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        yield from value if isinstance(value, list | tuple) else (value,)


PLACES = (str, torch.device)
MOVES = {"cpu", "cuda", "pin_memory"}
NEW = {"clone", "contiguous", "empty_like", "mul", "add", "__mul__", "__add__", "to", "float", "half", "bfloat16"}
"""Operators whose result is a new tensor where their first argument lies."""


def _asks(args: tuple[Any, ...], kwargs: dict[str, Any], kind: str) -> bool:
    places = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str | torch.device)]
    return any(torch.device(place).type == kind for place in places)


def _elsewhere(
    args: tuple[Any, ...], kwargs: dict[str, Any], current: int
) -> tuple[tuple[Any, ...], dict[str, Any], int | None]:
    """The arguments with `cpu` in the place of `cuda`, and which GPU was asked for."""
    asked = None

    def change(value: Any) -> Any:
        nonlocal asked
        named = isinstance(value, str) and value.partition(":")[0] == "cuda"
        if named or (isinstance(value, torch.device) and value.type == "cuda"):
            place = torch.device(value)
            asked = current if place.index is None else place.index
            return torch.device("cpu")
        return value

    changed = tuple(map(change, args)), {key: change(value) for key, value in kwargs.items()}
    return *changed, asked


class Stream:
    """torch.cuda.Stream, as it is handed out: a view of one of CUDA's.

    Attributes:
        cuda_stream: its handle.
        waited: the streams and events that it was told to wait for.
    """

    def __init__(self, played: Device, index: int, handle: int) -> None:
        self.played, self.index, self.cuda_stream, self.waited = played, index, handle, []  # type: Any, int, int, list[Any]
        self.queue = played.queue(handle, index)

    @property
    def device(self) -> torch.device:
        """Its GPU."""
        return torch.device("cuda", self.index)

    def synchronize(self) -> None:
        """Runs what is queued."""
        self.played.synchronize(self.queue)

    def wait_stream(self, stream: Stream) -> None:
        """Waits for what is queued there now."""
        self.waited.append(stream)
        self.queue.wait(stream.queue, stream.queue.queued, stream.queue.seen)

    def wait_event(self, event: Event) -> None:
        """Waits for what was queued before the event."""
        self.waited.append(event)
        if event.mark:
            self.queue.wait(*event.mark)


class Event:
    """torch.cuda.Event.

    Attributes:
        at: the device's clock when it came to pass; not a number before.
        mark: the stream that it was recorded on, how far that was, and what that had waited for.
    """

    played: Device

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.timed, self.at = enable_timing, math.nan
        self.mark: tuple[Queue, int, dict[Queue, int]] | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Notes the device's clock when the stream comes here."""
        queue = (stream or self.played.stream_of(self.played.current)).queue

        def note() -> None:
            self.played.now_ms += EVENT_MS
            self.at = self.played.now_ms

        place = queue.push(note)
        self.mark = (queue, place, dict(queue.seen))

    def synchronize(self) -> None:
        """Runs what is queued before it."""
        if self.mark:
            self.mark[0].settle(self.mark[1])

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds."""
        if not self.timed or not end_event.timed:
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return end_event.at - self.at


class Graph:
    """torch.cuda.CUDAGraph: what was launched while it was captured, with the addresses of then."""

    played: Device

    def __init__(self, keep_graph: bool = False) -> None:
        self.steps: list[tuple[Callable[[], None], list[int], list[int]]] = []
        self.queue: Queue | None = None
        self.broken = False

    def replay(self) -> None:
        """Runs it again, on the current stream."""
        queue = self.played.stream_of(self.played.current).queue
        for run, reads, writes in self.steps:
            self.played.submit(queue, run, reads, writes)


class Capture:
    """torch.cuda.graph: one at a time in a process; where it cannot begin or end, its stream stays the current one."""

    played: Device

    def __init__(
        self, cuda_graph: Graph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph, self.stream = cuda_graph, stream

    def __enter__(self) -> None:
        played = self.played
        played.synchronize()
        self.before = played.stream_of(played.current)
        if self.stream:
            played.set_stream(self.stream)
        if played.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when another graph is captured in this process")
        self.graph.queue, played.capturing = played.stream_of(played.current).queue, self.graph

    def __exit__(self, *error: object) -> None:
        played, graph = self.played, self.graph
        played.capturing = None
        if played.capture_fails or graph.broken or error[0] is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        played.set_stream(self.before)


def cuda_surface(device: Device) -> dict[str, Any]:
    """What takes the place of torch.cuda's own, by name."""

    class Pooled(Stream):
        """torch.cuda.Stream: one of 32."""

        def __init__(self, device: object = None, priority: int = 0) -> None:
            index = _index(device)
            super().__init__(played, index, 0x5EED0000 + 0x100 * index + next(played._pooled) % POOLED)

    class External(Stream):
        """torch.cuda.ExternalStream."""

        def __init__(self, stream_ptr: int, device: object = None) -> None:
            super().__init__(played, _index(device), stream_ptr)

    played = device

    def _index(place: Any) -> int:
        place = torch.device(place) if isinstance(place, str) else place
        index = place.index if isinstance(place, torch.device) else place
        return played.current if index is None else int(index)

    @contextlib.contextmanager
    def on_stream(stream: Stream | None) -> Iterator[None]:
        before, index = played.stream_of(played.current), played.current
        if stream is None:
            yield
            return
        there = played.stream_of(stream.index)
        played.set_stream(stream)
        try:
            yield
        finally:
            played.set_stream(there)
            played.set_stream(before)
            played.current = index

    @contextlib.contextmanager
    def on_gpu(device: Any) -> Iterator[None]:
        before = played.current
        played.current = _index(device)
        try:
            yield
        finally:
            played.current = before

    def properties(device_index: object = None) -> SimpleNamespace:
        major, minor = map(int, played.capabilities[_index(device_index)].split("."))
        told = {"name": played.name, "major": major, "minor": minor, "total_memory": MEMORY_BYTES}
        uuid = f"01234567-89ab-cdef-0123-456789abcde{_index(device_index):x}"
        return SimpleNamespace(**told, uuid=uuid, multi_processor_count=58)

    def synchronize(device_index: object = None) -> None:
        played.synchronize()

    Pooled.__name__, External.__name__ = "Stream", "ExternalStream"
    return {
        "is_available": lambda: True,
        "device_count": lambda: len(played.capabilities),
        "current_device": lambda: played.current,
        "set_device": lambda device: setattr(played, "current", _index(device)),
        "get_device_properties": properties,
        "get_device_name": lambda device_index=None: played.name,
        "get_device_capability": lambda index=None: tuple(map(int, played.capabilities[_index(index)].split("."))),
        "mem_get_info": lambda device_index=None: (played.free_bytes, MEMORY_BYTES),
        "max_memory_reserved": lambda device_index=None: MEMORY_BYTES - played.free_bytes,
        "max_memory_allocated": lambda device_index=None: MEMORY_BYTES - played.free_bytes,
        "reset_peak_memory_stats": lambda device_index=None: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "current_stream": lambda device_index=None: played.stream_of(_index(device_index)),
        "set_stream": played.set_stream,
        "is_current_stream_capturing": lambda: (
            played.capturing is not None and played.capturing.queue is played.stream_of(played.current).queue
        ),
        "_sleep": lambda cycles: None,
        "stream": on_stream,
        "device": on_gpu,
        "Stream": Pooled,
        "ExternalStream": External,
        "Event": type("Event", (Event,), {"played": played}),
        "CUDAGraph": type("CUDAGraph", (Graph,), {"played": played}),
        "graph": type("graph", (Capture,), {"played": played}),
    }
