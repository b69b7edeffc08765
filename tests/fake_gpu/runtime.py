"""TensorRT's runtime side: runtime, engine, context, inspector. The names and arguments are NVIDIA's."""

from __future__ import annotations

import ctypes
import json
import math
from typing import Any

import numpy as np
import onnx

from fake_gpu import plan
from fake_gpu.device import ALIGNMENT
from fake_gpu.state import Played, check_driver

LAYER_MS = 0.01
COMPILE_MS = 900.0
"""What RTX needs to compile the kernels of a batch."""
RTX_CUDA = 13000
"""What the wheel tensorrt-rtx-cu13 is built for."""

CAPABILITIES_OF_RTX = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


class Runtime(Played):
    """trt.Runtime."""

    engine_host_code_allowed = False
    engine_header_size = 64

    def __init__(self, logger: Any) -> None:
        if not getattr(logger, "_begun", False):
            raise TypeError("ILogger.__init__() must be called when overriding __init__")
        check_driver(type(self).state, logger)
        type(self).state.take_logger(logger)
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine of a plan, None where it cannot be loaded."""
        state = type(self).state
        if state.device is None or (state.flavor == "rtx" and state.device.cuda < RTX_CUDA):
            return self._refuse("Error Code 1: Cuda Runtime (cudaError 35: CUDA driver version is insufficient)")
        found = plan.unpack(state.flavor, bytes(memoryview(serialized_engine)))
        if state.faults.load or found is None:
            return self._refuse(state.faults.load or "Error Code 1: Serialization (magic tag does not match)")
        facts, model = found
        if "VERSION_COMPATIBLE" in facts["flags"] and not self.engine_host_code_allowed:
            return self._refuse("Error Code 3: API Usage Error (the plan has host code, which is not allowed)")
        if facts["version"] != list(state.version) and "VERSION_COMPATIBLE" not in facts["flags"]:
            return self._refuse("Error Code 1: Serialization (version tag does not match)")
        if not facts["later"] and state.device.capabilities[state.device.current] not in facts["targets"]:
            return self._refuse("Error Code 6: incompatible with compute capability of this device")
        return type(self).trt.ICudaEngine(self._logger, facts, model)

    def get_engine_validity(self, buffer: bytes) -> Any:
        """Whether a plan runs here, and why not (RTX)."""
        trt, state = type(self).trt, type(self).state
        assert len(buffer) <= self.engine_header_size
        why = trt.EngineInvalidityDiagnostics
        if buffer[:4] != plan.MAGIC["rtx"]:
            return trt.EngineValidity.INVALID, int(why.MALFORMED_ENGINE)
        if state.device is not None and state.device.cuda < RTX_CUDA:
            return trt.EngineValidity.INVALID, 0  # as seen with RTX 1.7 without a driver
        if state.device is None or state.device.capability not in CAPABILITIES_OF_RTX:
            return trt.EngineValidity.INVALID, int(why.UNSUPPORTED_CC)
        return trt.EngineValidity.VALID, 0

    def _refuse(self, line: str) -> None:
        self._logger.log(1, line)


class ICudaEngine(Played):
    """trt.ICudaEngine."""

    def __init__(self, logger: Any, facts: dict[str, Any], model: bytes) -> None:
        graph = onnx.load_from_string(model)
        self._logger, self._facts, self._model = logger, facts, model
        self._inputs = [plan.port_of(value) for value in graph.graph.input]
        self._outputs = [plan.port_of(value) for value in graph.graph.output]
        self._ports = {port.name: port for port in (*self._inputs, *self._outputs)}
        self._kernels = plan.kernels_of(graph)

    @property
    def num_io_tensors(self) -> int:
        """How many inputs and outputs."""
        return len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        """A name."""
        return list(self._ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        """Input or output."""
        return type(self).trt.TensorIOMode["INPUT" if self._ports[name] in self._inputs else "OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """A shape, -1 where it is dynamic."""
        return self._ports[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        """A type."""
        return type(self).trt.DataType[self._ports[name].kind]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        """Smallest, optimum, largest shape."""
        return [tuple(shape) for shape in self._facts["profiles"][name]]

    def get_engine_stat(self, stat: Any) -> int:
        """A figure of the engine."""
        return len(self._model) if stat.name == "TOTAL_WEIGHTS_SIZE" else -1

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """Scratch memory."""
        return 1 << 20

    def create_runtime_config(self) -> Any:
        """A runtime config."""
        return type(self).trt.IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any = None) -> Any:
        """A context; in TensorRT 10.3 its argument is an allocation strategy."""
        context = type(self).trt.IExecutionContext(self, runtime_config)
        type(self).state.contexts.append(context)
        return context

    def create_engine_inspector(self) -> Any:
        """An inspector."""
        return type(self).trt.EngineInspector(self)


class IRuntimeConfig(Played):
    """trt.IRuntimeConfig."""

    def __init__(self) -> None:
        trt, self._cache = type(self).trt, None  # type: Any, Any
        if "dynamic_shapes_kernel_specialization_strategy" in type(self).offers:
            strategy = trt.DynamicShapesKernelSpecializationStrategy.LAZY
            self.dynamic_shapes_kernel_specialization_strategy = strategy
            self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> Any:
        """An empty cache."""
        return type(self).trt.IRuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        """Takes a cache, which is filled while contexts run."""
        self._cache = cache
        return True

    def get_runtime_cache(self) -> Any:
        """The cache."""
        return self._cache


class IRuntimeCache(Played):
    """trt.IRuntimeCache: the batches whose kernels were compiled."""

    def __init__(self) -> None:
        self._batches: list[int] = []

    def serialize(self) -> Any:
        """Its bytes."""
        return type(self).trt.IHostMemory(json.dumps(self._batches).encode())

    def deserialize(self, blob: Any) -> bool:
        """Takes what `serialize` gave; False, the cache unchanged, where it is of another GPU or no cache."""
        if type(self).state.faults.foreign_kernels:
            return False
        self._batches = json.loads(bytes(blob))
        return True

    def reset(self) -> bool:
        """Empties it."""
        self._batches = []
        return True


class EngineInspector(Played):
    """trt.EngineInspector."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def get_engine_information(self, format: Any) -> str:
        """What the engine is made of."""
        state = type(self).state
        if state.faults.inspector is not None:
            return str(state.faults.inspector)
        if self._engine._facts["verbosity"] != "DETAILED":
            return '{"Layers": ["names", "alone"], "Bindings": []}'
        return plan.inspected(self._engine._kernels, state.version)


class IExecutionContext(Played):
    """trt.IExecutionContext."""

    def __init__(self, engine: Any, runtime_config: Any) -> None:
        self._engine, self._config = engine, runtime_config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profiler, self._profiled = None, 0  # type: Any, int
        self._compiled: list[int] = []
        self._index = type(self).state.device.current  # its scratch memory lies there

    @property
    def profiler(self) -> Any:
        """Told of every layer's time."""
        return self._profiler

    @profiler.setter
    def profiler(self, profiler: Any) -> None:
        if not getattr(profiler, "_begun", False):
            raise TypeError("IProfiler.__init__() must be called when overriding __init__")
        self._profiler, self._profiled = profiler, 0

    def set_input_shape(self, name: str, shape: Any) -> bool:
        """Chooses the batch."""
        want, low_high = self._engine._ports[name].shape, self._engine._facts["profiles"].get(name)
        batch = (low_high[0][0], low_high[2][0]) if low_high else (want[0], want[0])
        if tuple(shape[1:]) != want[1:] or not batch[0] <= shape[0] <= batch[1]:
            self._engine._logger.log(1, f"Error Code 3: Parameter check failed: {name} is {shape}")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """A shape, once the inputs' are known."""
        port, chosen = self._engine._ports[name], next(iter(self._shapes.values()), None)
        return port.at(chosen[0]) if chosen else port.shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Where a tensor lies; NvInferRuntime.h demands a multiple of 256."""
        if type(self).state.faults.address or memory % ALIGNMENT or name not in self._engine._ports:
            self._engine._logger.log(1, f"Error Code 3: Parameter check failed: address of {name}")
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_address(self, name: str) -> int:
        """Where a tensor lies."""
        return self._addresses[name]

    def is_stream_capturable(self, stream: int) -> bool:
        """Whether a run can be captured (RTX): where the engine takes its memory from the caller."""
        owned = "REQUIRE_USER_ALLOCATION" in self._engine._facts["flags"]
        return bool(type(self).state.faults.capturable) and owned

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Runs what is bound."""
        state, device = type(self).state, type(self).state.device
        if state.faults.run:
            self._engine._logger.log(1, state.faults.run)
            return False
        if self._index != device.current or device.queue(stream_handle).index != self._index:
            self._engine._logger.log(1, "Error Code 1: Cuda Runtime (invalid resource handle: another device)")
            return False
        captured = (
            device.capturing if device.capturing and device.capturing.queue is device.queue(stream_handle) else None
        )
        if captured and self._refuses_capture():
            captured.broken = True
            self._engine._logger.log(1, "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
            return False
        addresses, shapes, cost = dict(self._addresses), dict(self._shapes), state.faults.cost_ms(self._engine._facts)
        missing = sorted(set(self._engine._ports) - set(addresses))
        if missing:
            self._engine._logger.log(1, f"Error Code 3: address of {missing[0]} is not set")
            return False
        self._compile(shapes)
        reads = [addresses[port.name] for port in self._engine._inputs]
        writes = [addresses[port.name] for port in self._engine._outputs]
        device.launch("run", cost, lambda: self._compute(addresses, shapes), stream_handle, reads, writes)
        return True

    def _compile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """RTX: kernels of a batch are compiled at its first run, unless the cache has them."""
        state, batch = type(self).state, next(iter(shapes.values()))[0]
        cache = getattr(self._config, "_cache", None)
        if state.flavor != "rtx" or batch in (self._compiled if cache is None else cache._batches):
            return
        (self._compiled if cache is None else cache._batches).append(batch)
        state.compiled.append(batch)
        state.device.now_ms += COMPILE_MS

    def _refuses_capture(self) -> bool:
        """RTX: kernels that are compiled while it runs, or memory that the engine takes itself."""
        if type(self).state.flavor != "rtx":
            return False
        strategy = getattr(self._config, "dynamic_shapes_kernel_specialization_strategy", None)
        return not self.is_stream_capturable(0) or getattr(strategy, "name", "LAZY") == "LAZY"

    def _compute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        state, engine = type(self).state, self._engine
        batch = next(iter(shapes.values()))[0]
        image = engine._inputs[0]
        data = self._at(addresses[image.name], image, batch)
        values = plan.compute(engine._model, data.copy())
        for port, value in zip(engine._outputs, values, strict=True):
            target = self._at(addresses[port.name], port, batch)
            target[...] = _rounded(state.faults.distort(port.name, value), port.kind)
        if self._profiler is not None:
            more = state.faults.first_runs_ms if self._profiled < 3 else 0.0
            self._profiled += 1
            for kernel in engine._kernels:
                self._profiler.report_layer_time(kernel.name, LAYER_MS + more)

    def _at(self, address: int, port: plan.Port, batch: int) -> np.ndarray:
        shape = port.at(batch)
        count = math.prod(shape) * plan.BYTES[port.kind]
        block = type(self).state.device.block(address, count)
        if block is None or block.index != self._index:
            raise RuntimeError(f"CUDA error: an illegal memory access was encountered ({port.name})")
        buffer = (ctypes.c_byte * count).from_address(address)
        return np.frombuffer(buffer, plan.NUMPY.get(port.kind, np.uint16)).reshape(shape)


def _rounded(value: np.ndarray, kind: str) -> np.ndarray:
    """The value in its output's type; BF16 as the upper half of FP32's bits, rounded to even."""
    if kind != "BF16":
        with np.errstate(over="ignore", invalid="ignore"):
            return value.astype(plan.NUMPY[kind])
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
