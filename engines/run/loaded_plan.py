"""A plan in device memory: the engine and its weights, over which a session or several run."""

from __future__ import annotations

import collections
import math
import mmap
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engines.builder.flavor import Flavor, FlavorError, RuntimeConfig
from engines.run.inputs import Port, SessionError, type_name
from engines.run.plan_checks import manifest_specs
from engines.run.runtime_cache import RuntimeCache
from export.contract.dtypes import BY_TENSORRT
from export.contract.manifest import manifest_path

TYPES: dict[str, torch.dtype] = {name: getattr(torch, one.name) for name, one in BY_TENSORRT.items()}


class LoadedPlan:
    """An engine in memory; what its sessions share.

    Attributes:
        plan, manifest, flavor, device: what was loaded, by which TensorRT, where.
        engine: TensorRT's own object; None once closed.
        inputs, outputs: what the engine takes and gives.
        warm: whether TensorRT-RTX took the kernels of an earlier start.
        warnings: what TensorRT warned of, such as a plan of another GPU model, and a runtime cache of no use.
    """

    def __init__(
        self,
        plan: Path,
        manifest: Mapping[str, Any],
        flavor: Flavor,
        device: torch.device,
        *,
        cache: RuntimeCache | None = None,
        rtx_graphs: bool = False,
    ) -> None:
        self.plan, self.manifest, self.flavor, self.device = plan, manifest, flavor, device
        self.warnings: list[str] = []
        self._failures = collections.deque(["TensorRT gave no reason"], maxlen=1)
        self._cache, self._lock = cache, threading.Lock()
        self._kept: set[int] = set()  # batch sizes whose kernels are in the file
        logger = flavor.new_logger(_listener(self.warnings, self._failures))
        try:  # a version-compatible plan brings code of its own; its SHA-256 is checked
            self._runtime = flavor.new_runtime(logger, host_code=manifest["options"]["version_compatible"] is True)
        except FlavorError as error:
            raise SessionError(f"{plan}: {error}") from None
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.engine: Any = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            remedy = flavor.driver_problem() or memory_text(device)
            raise SessionError(f"{plan}: {flavor.title} cannot load the plan ({self.failure}); {remedy}")
        ports = [self._port(self.engine.get_tensor_name(index)) for index in range(self.engine.num_io_tensors)]
        self.inputs = tuple(port for port in ports if self._is_input(port.name))
        self.outputs = tuple(port for port in ports if not self._is_input(port.name))
        if sorted((port.name, type_name(port.dtype), port.shape) for port in ports) != manifest_specs(manifest):
            raise SessionError(
                f"{manifest_path(plan)}: the tensors in the manifest differ from the engine's; build {plan.name} again"
            )
        self._made_with = self._read_kernels(rtx_graphs)
        self.warm = self._made_with is not None and self._made_with.warm

    @property
    def failure(self) -> str:
        """TensorRT's last error, in one line."""
        return self._failures[0]

    @property
    def context_bytes(self) -> int:
        """Device memory of one context at the largest batch: its scratch memory, inputs and outputs."""
        largest = self.inputs[0].batch[1]
        scratch = max(0, int(self.engine.get_device_memory_size_for_profile_v2(0)))
        return scratch + sum(most_bytes(port, largest) for port in (*self.inputs, *self.outputs))

    def new_context(self) -> Any:
        """An execution context over these weights.

        Raises:
            SessionError: TensorRT makes none, as where memory is short.
        """
        context = None if self._made_with is None else self.flavor.create_context(self.engine, self._made_with)
        if context is None:
            why = f"no execution context can be created ({self.failure})"
            raise SessionError(f"{self.plan}: {why}; {memory_text(self.device)}")
        return context

    def keep_kernels(self, batch: int) -> None:
        """Writes what the first run of a batch size compiled, so that a process that is killed later leaves it."""
        if self._cache is None or self._made_with is None or batch in self._kept:
            return
        with self._lock:
            self._kept.add(batch)
            failed = self._cache.write(self._made_with.kernels())
            if failed:
                self.warnings.append(failed)

    def _read_kernels(self, rtx_graphs: bool) -> RuntimeConfig | None:
        cached, why_not = self._cache.read() if self._cache else (b"", None)
        made_with = self.flavor.create_runtime_config(self.engine, cached, rtx_graphs)
        if cached and made_with is not None and not made_with.warm:
            why_not = f"TensorRT-RTX refused the runtime cache ({self.failure}); the kernels are compiled again"
        if why_not:
            self.warnings.append(why_not)
        return made_with

    def _is_input(self, name: str) -> bool:
        return self.engine.get_tensor_mode(name).name == "INPUT"

    def _port(self, name: str) -> Port:
        shape, kind = tuple(self.engine.get_tensor_shape(name)), self.engine.get_tensor_dtype(name).name
        if kind not in TYPES or not shape:
            raise SessionError(
                f"{self.plan}: the tensor {name} is {kind} {shape}; expected a tensor with a batch dimension "
                f"and one of the types {', '.join(TYPES)}"
            )
        batch = (shape[0], shape[0])
        if shape[0] == -1 and self._is_input(name):
            smallest, _, largest = self.engine.get_tensor_profile_shape(name, 0)
            batch = (smallest[0], largest[0])
        return Port(name, TYPES[kind], shape, batch)


def most_bytes(port: Port, largest: int) -> int:
    """Bytes of a tensor at the largest batch."""
    return port.dtype.itemsize * math.prod(largest if side == -1 else side for side in port.shape)


def cache_key(manifest: Mapping[str, Any], plan: Path, flavor: Flavor) -> str:
    """What a runtime cache is of; word for word as in the C++ library, so that both read one file."""
    if flavor.gpu is None:
        raise SessionError(
            f"{plan}: this machine has no NVIDIA GPU that CUDA can use. Check the GPU and its driver with "
            "`nvidia-smi`, or run the plan on another machine with an NVIDIA GPU"
        )
    sha256 = next(entry["sha256"] for entry in manifest["files"] if entry["name"] == plan.name)
    gpu = f"{flavor.gpu.name} (compute capability {flavor.gpu.compute_capability})"
    return f"TensorRT-RTX {flavor.version} on {gpu}, driver for CUDA {flavor.gpu.cuda}, plan with SHA-256 {sha256}"


def memory_text(device: torch.device) -> str:
    """What a message says of device memory."""
    if device.type != "cuda":
        return "the free device memory is unknown"
    free, total = torch.cuda.mem_get_info(device)
    room = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of device memory are free"
    return f"{room}; if that is too little, close other programs or use a smaller batch"


def _listener(warnings: list[str], failures: collections.deque[str]) -> Callable[[int, str], None]:
    """Takes a logger's lines; it must not hold the session, which could then never be freed."""

    def take(severity: int, line: str) -> None:
        if severity <= 2:
            (warnings if severity == 2 else failures).append(" ".join(line.split())[:400])

    return take
