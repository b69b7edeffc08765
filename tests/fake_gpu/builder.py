"""TensorRT's builder side: parser, network, config, builder. The names and arguments are NVIDIA's."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import onnx

from fake_gpu import plan
from fake_gpu.state import Played, check_driver

VERBOSE, WARNING, ERROR = 4, 2, 1
NEWEST_OPSET = {10: 24, 11: 24, 1: 24}
ATTENTION_SINCE = (10, 14)
"""TensorRT whose ONNX parser has Attention (FACTS)."""


class Builder(Played):
    """trt.Builder."""

    def __init__(self, logger: Any) -> None:
        if not getattr(logger, "_begun", False):
            raise TypeError("ILogger.__init__() must be called when overriding __init__")
        check_driver(type(self).state, logger)
        self._logger = logger

    def create_network(self, flags: int = 0) -> Any:
        """An empty network."""
        trt = type(self).trt
        typed = type(self).state.version[0] != 10 or flags >> int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) & 1
        return trt.INetworkDefinition(typed=bool(typed))

    def create_builder_config(self) -> Any:
        """A config with the defaults: TF32 is allowed."""
        config = type(self).trt.IBuilderConfig()
        config._logger = self._logger
        type(self).state.configs.append(config)
        return config

    def create_optimization_profile(self) -> Any:
        """An empty profile."""
        return type(self).trt.IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        """The plan, None where the builder gave up."""
        data = self._build(network, config)
        return None if data is None else type(self).trt.IHostMemory(data)

    def build_serialized_network_to_stream(self, network: Any, config: Any, writer: Any) -> bool:
        """Streams the plan; a stream that takes nothing is a success all the same (RTX 1.7)."""
        data = self._build(network, config)
        if data is None:
            return False
        half = len(data) // 2
        for part in (data[:half], data[half:]):
            writer.write(part)
        return True

    def _build(self, network: Any, config: Any) -> bytes | None:
        state = type(self).state
        monitor = getattr(config, "_progress_monitor", None)
        if monitor is not None:
            monitor.phase_start("Building engine", None, 2)
            going = all([monitor.step_complete("Building engine", step) for step in range(2)])
            monitor.phase_finish("Building engine")
            if not going:
                return None
        if state.faults.builder:
            self._logger.log(ERROR, state.faults.builder)
            return None
        problem = config._problem(network)
        if problem:
            self._logger.log(ERROR, problem)
            return None
        kernels = plan.kernels_of(network._model)
        tactics = config._choose(kernels)
        if tactics is None:
            return None
        log = state.faults.log
        if log is None:
            log = plan.log_of(kernels, state.flavor == "rtx")
        self._logger.log(VERBOSE, "Engine generation completed in 1 seconds.")
        if log:
            self._logger.log(VERBOSE, log)
        return plan.pack(state.flavor, {**config._facts(state), "tactics": tactics}, network._model)


class IHostMemory(Played):
    """trt.IHostMemory: the bytes by the buffer protocol, which Python 3.11 gives to subclasses of bytes alone."""

    def __new__(cls, data: bytes) -> Any:
        return _HostMemory(data)


class _HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class INetworkDefinition(Played):
    """trt.INetworkDefinition."""

    def __init__(self, typed: bool) -> None:
        self._typed, self._model = typed, onnx.ModelProto()
        self._layers: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __iter__(self) -> Any:
        return iter(self._layers)

    def _take(self, model: onnx.ModelProto) -> None:
        trt, self._model = type(self).trt, model
        infos = [*model.graph.value_info, *model.graph.output, *model.graph.input]
        ports = {info.name: plan.port_of(info) for info in infos if info.type.tensor_type.elem_type}

        def tensor(name: str) -> Any:
            return trt.ITensor(ports[name])

        for node in model.graph.node:
            kind = "CAST" if node.op_type == "Cast" else plan.PRODUCTS.get(node.op_type, "SHUFFLE")
            if node.op_type == "Attention" and hasattr(trt.LayerType, "ATTENTION_INPUT"):
                kind = "ATTENTION_INPUT"
            if node.output[0] in ports:
                inputs = [tensor(name) if name in ports else None for name in node.input]
                self._layers.append(trt.ILayer(node.name, trt.LayerType[kind], inputs, tensor(node.output[0])))
        self._inputs = [tensor(value.name) for value in model.graph.input]
        self._outputs = [tensor(value.name) for value in model.graph.output]

    @property
    def num_layers(self) -> int:
        """How many layers."""
        return len(self._layers)

    def get_layer(self, index: int) -> Any:
        """A layer."""
        return self._layers[index]

    @property
    def num_inputs(self) -> int:
        """How many inputs."""
        return len(self._inputs)

    def get_input(self, index: int) -> Any:
        """An input."""
        return self._inputs[index]

    @property
    def num_outputs(self) -> int:
        """How many outputs."""
        return len(self._outputs)

    def get_output(self, index: int) -> Any:
        """An output."""
        return self._outputs[index]


class ILayer(Played):
    """trt.ILayer."""

    precision_is_set = False

    def __init__(self, name: str, kind: Any, inputs: list[Any], output: Any) -> None:
        self.name, self.type, self._inputs, self._output = name, kind, inputs, output

    def get_input(self, index: int) -> Any:
        """An input, None for one that is a weight."""
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        """An output."""
        return self._output


class IAttentionInputLayer(ILayer):
    """trt.IAttentionInputLayer."""

    @property
    def attention(self) -> Any:
        """The attention that it begins."""
        if "_attention" not in vars(self):
            self._attention = type(self).trt.IAttention()
        return self._attention


class IAttention(Played):
    """trt.IAttention."""

    decomposable = False


class ITensor(Played):
    """trt.ITensor."""

    is_shape_tensor = False

    def __init__(self, port: plan.Port) -> None:
        self.name, self.shape, self.dtype = port.name, port.shape, type(self).trt.DataType[port.kind]


class OnnxParser(Played):
    """trt.OnnxParser."""

    def __init__(self, network: Any, logger: Any) -> None:
        self._network, self._logger, self._errors = network, logger, []  # type: Any, Any, list[Any]

    def parse_from_file(self, model: str) -> bool:
        """Reads a file with its weights."""
        found, state = onnx.load(model), type(self).state
        lacks = state.flavor == "tensorrt" and state.version < ATTENTION_SINCE
        bad = next((node for node in found.graph.node if lacks and node.op_type == "Attention"), None)
        if bad is not None:
            self._errors.append(type(self).trt.ParserError(bad))
            self._logger.log(ERROR, f"Unable to find importer for operator: {bad.op_type}")
            return False
        self._network._take(found)
        return True

    @property
    def num_errors(self) -> int:
        """How many errors."""
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        """An error."""
        return self._errors[index]


class ParserError(Played):
    """trt.ParserError."""

    def __init__(self, node: onnx.NodeProto) -> None:
        self._node = node

    def node_name(self) -> str:
        """The node."""
        return self._node.name

    def node_operator(self) -> str:
        """Its operator."""
        return self._node.op_type

    def desc(self) -> str:
        """What is wrong."""
        return "In function importFallbackPluginImporter: no importer, plugin not found"


class IOptimizationProfile(Played):
    """trt.IOptimizationProfile."""

    def __init__(self) -> None:
        self._shapes: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return True

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        """Shapes of an input."""
        self._shapes[input] = [tuple(min), tuple(opt), tuple(max)]

    def get_shape(self, input: str) -> Any:
        """Shapes of an input."""
        return self._shapes[input]


class IBuilderConfig(Played):
    """trt.IBuilderConfig."""

    def __init__(self) -> None:
        trt = type(self).trt
        self._flags, self._profiles = {trt.BuilderFlag.TF32}, []  # type: set[Any], list[Any]
        self._targets: list[Any] = []
        self._cache: Any = None

    def set_flag(self, flag: Any) -> None:
        """Sets a flag."""
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        """Clears a flag."""
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        """Whether a flag is set."""
        return flag in self._flags

    @property
    def progress_monitor(self) -> Any:
        """Told of the progress."""
        return self._progress_monitor

    @progress_monitor.setter
    def progress_monitor(self, monitor: Any) -> None:
        if not getattr(monitor, "_begun", False):
            raise TypeError("IProgressMonitor.__init__() must be called when overriding __init__")
        self._progress_monitor = monitor

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        """Limits scratch memory."""

    def add_optimization_profile(self, profile: Any) -> int:
        """Adds a profile."""
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Any:
        """A timing cache; an empty one where the bytes are none, as the real one (seen with RTX 1.7)."""
        data = bytes(serialized_timing_cache)
        if data and not data.startswith(b"[["):
            self._logger.log(WARNING, "Failed to deserialize timing cache. Returning an empty timing cache.")
            data = b""
        return type(self).trt.ITimingCache(data)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        """Takes a timing cache, of this GPU and version alone."""
        if cache._of != cache._here() and not ignore_mismatch:
            self._logger.log(ERROR, "Error Code 3: Internal Error (Failed to load timing cache, header mismatch)")
            return False  # the config has none then, as a fresh one
        self._cache = cache
        return True

    def _choose(self, kernels: list[plan.Kernel]) -> dict[str, int] | None:
        """The tactic of each kernel: as the cache says, else measured, which tells another one each time."""
        state = type(self).state
        if state.flavor == "rtx":
            return {}
        only = type(self).trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in self._flags
        times: dict[str, int] = {} if self._cache is None else self._cache._times
        for kernel in kernels:
            key = f"{kernel.kind} {kernel.inputs} {kernel.outputs}"
            if only and key not in times:
                self._logger.log(ERROR, f"Error Code 10: Internal Error (timing cache miss: {kernel.name})")
                return None
            times.setdefault(key, next(state.measured))
        return dict(times)

    def get_timing_cache(self) -> Any:
        """The timing cache; None where none was taken (seen with RTX 1.7)."""
        return self._cache

    def set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        """A GPU to build for."""
        self._targets.append(compute_capability)
        return True

    def _problem(self, network: Any) -> str | None:
        if any(-1 in network.get_input(index).shape for index in range(network.num_inputs)) and not self._profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        return None

    def _facts(self, state: Any) -> dict[str, Any]:
        """What a plan holds of it."""
        trt, device = type(self).trt, state.device
        profiles = self._profiles[0]._shapes if self._profiles else {}
        here = [device.capability] if device and state.flavor == "tensorrt" else []
        capabilities = [f"{int(target.name[2:]) // 10}.{int(target.name[2:]) % 10}" for target in self._targets]
        level = self.__dict__.get("hardware_compatibility_level", trt.HardwareCompatibilityLevel.NONE)
        verbosity = self.__dict__.get("profiling_verbosity", SimpleNamespace(name="LAYER_NAMES_ONLY"))
        return {
            "version": list(state.version),
            "targets": capabilities or here,
            "profiles": profiles,
            "later": level.name == "AMPERE_PLUS" or (state.flavor == "rtx" and not capabilities),
            "verbosity": verbosity.name,
            "flags": sorted(flag.name for flag in self._flags),
            "number": state.configs.index(self),
        }


class ITimingCache(Played):
    """trt.ITimingCache: the tactics that were fastest, and whose they are."""

    def __init__(self, data: bytes) -> None:
        self._of, self._times = self._here(), {}  # type: list[Any], dict[str, int]
        if data:
            self._of, self._times = json.loads(data)

    def _here(self) -> list[Any]:
        state = type(self).state
        return [state.device and state.device.name, *state.version]

    def serialize(self) -> Any:
        """Its bytes."""
        return type(self).trt.IHostMemory(json.dumps([self._of, self._times]).encode())
