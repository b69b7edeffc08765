"""Chooses between TensorRT and TensorRT-RTX; `Flavor` hides the differences between the two."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import mmap
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from engines.builder.find_gpu import Gpu, find_gpu
from export.contract.extras import install
from export.contract.targets import version_numbers

FlavorName = Literal["tensorrt", "rtx"]
MODULES: dict[FlavorName, str] = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS: dict[FlavorName, str] = {"tensorrt": "gpu", "rtx": "rtx"}
OLDEST: dict[FlavorName, tuple[int, int]] = {"tensorrt": (10, 3), "rtx": (1, 7)}
"""Oldest versions that work, by the API listings in tests/data/tensorrt-api; 10.3 is JetPack 6's. As in pyproject."""

RTX_MAGIC = b"vtrt"
"""First bytes of a TensorRT-RTX plan (1.7); TensorRT plans begin with other bytes."""

JETSONS = ("7.2", "8.7", "10.1", "11.0")
"""Xavier, Orin, and Thor by its two names (https://developer.nvidia.com/cuda/gpus)."""
JETSON = (
    "; {} is the compute capability of a Jetson: build the plan on that device, with --flavor tensorrt and without "
    "--compute-capability"
)
OTHERS = {"9.0": "; for Hopper (9.0), use --flavor tensorrt"} | {one: JETSON.format(one) for one in JETSONS}
"""What to do for GPUs that TensorRT-RTX does not build for."""

CUDA_DRIVERS = {12: "525", 13: "580"}
"""Oldest driver of each CUDA (docs.nvidia.com, CUDA Compatibility, minor version compatibility)."""

PACKAGED = {("tensorrt", 12), ("tensorrt", 13), ("rtx", 12), ("rtx", 13)}
"""CUDA versions that NVIDIA's wheels of TensorRT 11.4 and TensorRT-RTX 1.7 are built for."""

OTHER_LOGGER = "The logger passed into"
"""How TensorRT's warning begins at the second runtime or builder of a process."""

POLYGRAPHY_SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"


class FlavorError(RuntimeError):
    """No installed TensorRT can do what was requested on this machine."""


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """The configuration that every context of a TensorRT-RTX engine is created with; TensorRT has none.

    Attributes:
        runtime_config, runtime_cache: TensorRT-RTX's objects, which must outlive the contexts; None with TensorRT.
        warm: whether the runtime cache accepted the kernels of an earlier start.
    """

    runtime_config: Any = None
    runtime_cache: Any = None
    warm: bool = False

    def kernels(self) -> bytes:
        """Returns the kernels that were compiled so far, to be saved; empty without a runtime cache."""
        memory = None if self.runtime_cache is None else self.runtime_cache.serialize()
        return b"" if memory is None else bytes(memory)


@dataclasses.dataclass(frozen=True)
class Flavor:
    """An installed TensorRT.

    Attributes:
        name: `tensorrt` or `rtx`.
        trt: the Python module.
        version: the version of the module.
        capabilities: compute capabilities that a plan can be built for; empty if only the GPU of this machine is.
        gpu: the GPU of this machine, or None.
        device: the index of the GPU.
    """

    name: FlavorName
    trt: Any
    version: str
    capabilities: tuple[str, ...]
    gpu: Gpu | None
    device: int = 0

    def on(self, device: int) -> Flavor:
        """Returns the same TensorRT for the GPU with another index."""
        return self if device == self.device else dataclasses.replace(self, gpu=find_gpu(device), device=device)

    @property
    def title(self) -> str:
        """Name and version in messages, such as `TensorRT 10.3.0`."""
        return f"{'TensorRT-RTX' if self.name == 'rtx' else 'TensorRT'} {self.version}"

    @property
    def target(self) -> str:
        """The name of this TensorRT among the export targets, such as `tensorrt-10.3`."""
        numbers = version_numbers(self.version)
        return "tensorrt-rtx" if self.name == "rtx" else f"tensorrt-{numbers[0]}.{numbers[1]}"

    def check_targets(self, asked: Sequence[str]) -> tuple[str, ...]:
        """Returns the compute capabilities to build for, such as ("8.6", "12.0").

        Args:
            asked: the requested compute capabilities; empty means the flavor's default.

        Raises:
            FlavorError: the flavor cannot build for one of them.
        """
        if not self.capabilities:
            at_hand = self.gpu.compute_capability if self.gpu else "none"
            if set(asked) - {at_hand}:
                raise FlavorError(
                    f"--compute-capability {','.join(asked)}: TensorRT only builds for the compute capability "
                    f"of the GPU in this machine ({at_hand}); leave the option out, or use "
                    "--hardware-compatible or --flavor "
                    f"rtx{''.join(JETSON.format(target) for target in asked if target in JETSONS)}"
                )
            return (at_hand,)
        unknown = [target for target in asked if target not in self.capabilities]
        if unknown:
            supported = ", ".join(self.capabilities)
            raise FlavorError(
                f"--compute-capability {','.join(unknown)}: TensorRT-RTX {self.version} only builds for "
                f"compute capability {supported}{''.join(OTHERS.get(target, '') for target in unknown)}"
            )
        return tuple(dict.fromkeys(asked))

    def refuse(
        self,
        *,
        timing_cache: bool = False,
        replay_timing: bool = False,
        hardware_compatible: bool = False,
        version_compatible: bool = False,
    ) -> None:
        """Refuses options that the flavor would silently ignore.

        Raises:
            FlavorError: an option has no effect; the message says what to do instead.
        """
        if self.name != "rtx":
            return
        if timing_cache:
            raise FlavorError(
                "--timing-cache: TensorRT-RTX does not measure kernels while it builds, so a timing cache has "
                "no effect; leave the option out"
            )
        if replay_timing:
            raise FlavorError(
                "--replay-timing: TensorRT-RTX chooses kernels at run time and uses no timing cache; leave "
                "the option out"
            )
        if hardware_compatible:
            raise FlavorError(
                "--hardware-compatible has no effect with TensorRT-RTX; name the GPUs with --compute-capability instead"
            )
        if version_compatible and self.gpu is None:
            raise FlavorError(
                "--version-compatible: TensorRT-RTX can build version-compatible plans only on a machine with "
                "a GPU; leave the option out, or build the plan on such a machine"
            )

    def create_config(self, builder: Any, network: Any, capabilities: Sequence[str], common: dict[str, Any]) -> Any:
        """Creates the builder config through Polygraphy; `common` are arguments that both its config classes accept."""
        from polygraphy.logger import G_LOGGER

        trt = self.trt
        with warnings.catch_warnings(), G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            # Polygraphy 0.53 makes an empty timing cache, which RTX calls deprecated since 1.2
            warnings.simplefilter("ignore", DeprecationWarning)
            if self.name == "rtx":
                from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

                pairs = [tuple(int(part) for part in target.split(".")) for target in capabilities]
                config = CreateConfigRTX(compute_capabilities=pairs or None, **common)(builder, network)
                config.set_flag(
                    trt.BuilderFlag.REQUIRE_USER_ALLOCATION
                )  # else a run may allocate, which no CUDA graph takes
            else:
                from polygraphy.backend.trt import CreateConfig

                config = CreateConfig(**common)(builder, network)
        config.clear_flag(trt.BuilderFlag.TF32)  # allowed by default, and FP32 products would keep 10 bits of 23
        return config

    def create_runtime_config(self, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig | None:
        """Returns the configuration for the contexts of an engine, or None if TensorRT-RTX refuses it.

        The arguments are those of new_runtime_config.
        """
        return new_runtime_config(self.trt, engine, cached, own_graphs) if self.name == "rtx" else RuntimeConfig()

    def create_context(self, engine: Any, made_with: RuntimeConfig) -> Any:
        """Creates an execution context; returns None if there is not enough memory."""
        if self.name == "rtx":
            return engine.create_execution_context(made_with.runtime_config)
        return engine.create_execution_context()

    def can_capture(self, context: Any, stream: int) -> bool:
        """Returns whether a run can be captured as a CUDA graph; TensorRT only shows that when it captures, so True."""
        return self.name != "rtx" or bool(context.is_stream_capturable(stream))

    def new_builder(self, logger: Any) -> Any:
        """Creates TensorRT's Builder.

        Raises:
            FlavorError: TensorRT cannot start on this machine, for example because the driver is too old.
        """
        return self._start(self.trt.Builder, logger)

    def new_runtime(self, logger: Any, *, host_code: bool) -> Any:
        """Creates TensorRT's Runtime.

        Args:
            logger: a logger from `new_logger`.
            host_code: whether plans may contain host code. A version-compatible plan contains a lean runtime, and no
                TensorRT version loads such a plan without this permission.

        Raises:
            FlavorError: TensorRT cannot start on this machine, for example because the driver is too old.
        """
        runtime = self._start(self.trt.Runtime, logger)
        runtime.engine_host_code_allowed = host_code
        return runtime

    def _start(self, factory: Callable[[Any], Any], logger: Any) -> Any:
        try:
            return factory(logger)
        except TypeError as error:  # pybind11: "factory function returned nullptr" (NVIDIA/TensorRT #308, #2913)
            if "nullptr" not in str(error):
                raise
            why = self.driver_problem() or (
                "TensorRT gave no reason; check with nvidia-smi that the GPU and its driver work"
            )
            raise FlavorError(f"{self.title} cannot start: {why}") from None

    def driver_problem(self) -> str | None:
        """Returns why the driver is too old for this TensorRT and what to install; None if it is not known to be so."""
        needed = _cuda_major(self.name, self.version)
        if self.gpu is None or needed is None or version_numbers(self.gpu.cuda)[:1] >= (needed,):
            return None
        have = version_numbers(self.gpu.cuda)[0]
        package = "tensorrt-rtx" if self.name == "rtx" else "tensorrt"
        remedy = (
            f"update the driver to {CUDA_DRIVERS[needed]} or later" if needed in CUDA_DRIVERS else "update the driver"
        )
        if (self.name, have) in PACKAGED:
            remedy += f", or run: pip uninstall {package}-cu{needed}; pip install {package}-cu{have}"
        return (
            f"the NVIDIA driver {self.gpu.driver} supports CUDA {self.gpu.cuda}, but this TensorRT needs CUDA "
            f"{needed}; {remedy}"
        )

    def inspect(self, plan: Path, *, host_code: bool) -> str:
        """Returns the engine inspector's JSON for a plan that was built here; empty if the plan cannot be loaded here.

        Args:
            plan: the plan file.
            host_code: whether the plan is version-compatible, as in `new_runtime`.
        """
        if self.gpu is None:
            return ""
        runtime = self.new_runtime(self.new_logger(lambda severity, line: None), host_code=host_code)
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = runtime.deserialize_cuda_engine(data)
        return "" if engine is None else inspect_engine(self.trt, engine)

    def why_invalid(self, header: bytes) -> str | None:
        """Returns why a plan cannot run on this machine, according to its header; None if it can or if it is unknown.

        Only TensorRT-RTX has such a check, which was not run on a GPU; for TensorRT, the manifest is compared instead.

        Raises:
            FlavorError: TensorRT-RTX cannot start on this machine.
        """
        if self.name != "rtx":
            return None
        trt = self.trt
        runtime = self.new_runtime(self.new_logger(lambda severity, line: None), host_code=False)
        validity, diagnostics = runtime.get_engine_validity(header[: runtime.engine_header_size])
        if validity != trt.EngineValidity.INVALID:
            return None
        reasons = trt.EngineInvalidityDiagnostics.__members__
        told = [name.lower().replace("_", " ") for name, reason in reasons.items() if int(diagnostics) & int(reason)]
        return ", ".join(told) or ("TensorRT gave no reason" if self.gpu else "this machine has no NVIDIA GPU")

    def new_logger(self, take: Callable[[int, str], None]) -> Any:
        """Creates a TensorRT logger that passes severity (0, 1: error, 2: warning, 3: info, 4: verbose) and line on.

        TensorRT's warning that the logger differs from an earlier one is dropped: every plan has its own logger, and
        TensorRT-RTX 1.7 uses it although it warns that it does not.
        """
        trt: Any = self.trt

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, line: str) -> None:
                if OTHER_LOGGER not in line:
                    take(int(severity), line)

        return Logger()


def inspect_engine(trt: Any, engine: Any) -> str:
    """Returns the engine inspector's JSON for an engine in memory."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON) or "")


def choose_flavor(asked: Literal["auto", "tensorrt", "rtx"] = "auto", device: int = 0) -> Flavor:
    """Chooses the TensorRT of this process and configures Polygraphy for it.

    Args:
        asked: the requested flavor; `auto` is TensorRT if it can be imported and a GPU is present, else TensorRT-RTX.
        device: the index of the GPU.

    Raises:
        FlavorError: the requested flavor is not installed, is too old or needs a GPU; the message names the fix.
    """
    gpu = find_gpu(device)
    names: tuple[FlavorName, ...] = (asked,) if asked != "auto" else (("tensorrt", "rtx") if gpu else ("rtx",))
    reasons: list[str] = []
    for name in names:
        if name == "tensorrt" and gpu is None:
            raise FlavorError(
                "--flavor tensorrt needs an NVIDIA GPU and its driver, but none was found; use --flavor rtx, "
                "which can build plans without a GPU"
            )
        module = _import(name, reasons)
        if module is not None:
            _set_polygraphy_up(name)
            return Flavor(name, module, module.__version__, _targets(name, module), gpu, device)
    remedies = {
        "tensorrt": f"{install(EXTRAS['tensorrt'])} (needs an NVIDIA GPU)",
        "rtx": f"{install(EXTRAS['rtx'])} (TensorRT-RTX can build plans without a GPU)",
    }
    shown = " or ".join(remedy for name, remedy in remedies.items() if asked in ("auto", name))
    raise FlavorError(f"no usable TensorRT is installed: {'; '.join(reasons)};\nrun {shown}")


def _import(name: FlavorName, reasons: list[str]) -> Any:
    try:
        module = importlib.import_module(MODULES[name])
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its libraries raises any of them
        reasons.append(f"{MODULES[name]} cannot be imported ({str(error).strip().splitlines()[0]})")
        return None
    if version_numbers(module.__version__) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        reasons.append(f"{MODULES[name]} has version {module.__version__}, but {oldest} or later is needed")
        return None
    return module


def _cuda_major(name: FlavorName, version: str) -> int | None:
    """Returns the CUDA version that an installed TensorRT is built for, from its package name; None if unknown."""
    package = "tensorrt_rtx" if name == "rtx" else "tensorrt"
    for distribution in importlib.metadata.distributions():
        found = re.fullmatch(rf"{package}_cu(\d+)", distribution.name.lower().replace("-", "_"))
        if found and version_numbers(distribution.version)[:3] == version_numbers(version)[:3]:
            return int(found[1])
    return 13 if name == "tensorrt" and version_numbers(version) >= (11,) else None


def find_targets(name: FlavorName) -> tuple[str, ...]:
    """Returns the compute capabilities that an installed flavor supports; empty if it cannot be imported."""
    module = _import(name, [])
    return () if module is None else _targets(name, module)


def _targets(name: FlavorName, module: Any) -> tuple[str, ...]:
    """Returns the compute capabilities that the flavor lists: SM89 is 8.9, SM120 is 12.0."""
    if name != "rtx":
        return ()
    numbers = sorted(int(name[2:]) for name in module.ComputeCapability.__members__ if name.startswith("SM"))
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _set_polygraphy_up(name: FlavorName) -> None:
    """Sets the environment variable that Polygraphy reads once per process, when it is imported."""
    wanted = name == "rtx"
    os.environ[POLYGRAPHY_SWITCH] = str(int(wanted))
    try:
        from polygraphy import config as polygraphy_config
    except ImportError:
        raise FlavorError(f"the package polygraphy is not installed; run {install(EXTRAS[name])}") from None

    if "polygraphy.backend.trt" in sys.modules and bool(polygraphy_config.USE_TENSORRT_RTX) != wanted:
        raise FlavorError(
            f"--flavor {name}: this process has already loaded {'TensorRT' if wanted else 'TensorRT-RTX'}, and "
            f"TensorRT and TensorRT-RTX cannot be used in the same process; start a new process for --flavor {name}"
        )
    polygraphy_config.USE_TENSORRT_RTX = wanted


def new_runtime_config(trt: Any, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig | None:
    """Creates the runtime config of an engine; returns None if TensorRT-RTX refuses it.

    Kernels for the current shapes are compiled immediately. By default, they are compiled in the background while
    fallback kernels run, which would then be measured and captured in CUDA graphs.

    Args:
        trt, engine: the TensorRT-RTX module and the engine.
        cached: what `RuntimeConfig.kernels` returned in an earlier process, or nothing.
        own_graphs: whether TensorRT-RTX itself captures the runs as CUDA graphs.
    """
    runtime_config = engine.create_runtime_config()
    if runtime_config is None:
        return None
    runtime_config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if own_graphs:
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if runtime_config.cuda_graph_strategy != trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            return None
    runtime_cache = runtime_config.create_runtime_cache()
    warm = runtime_cache is not None and bool(cached) and bool(runtime_cache.deserialize(cached))
    if runtime_cache is not None and not runtime_config.set_runtime_cache(runtime_cache):
        runtime_cache, warm = None, False
    return RuntimeConfig(runtime_config, runtime_cache, warm)
