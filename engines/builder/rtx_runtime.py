"""How TensorRT-RTX runs an engine: its kernels are compiled at run time, and can be kept for the next process."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """What every context of an engine is made with; TensorRT has none.

    Attributes:
        runtime_config, runtime_cache: TensorRT-RTX's own, which must outlive the contexts; None where it has none.
        warm: whether the cache took kernels of an earlier start.
    """

    runtime_config: Any = None
    runtime_cache: Any = None
    warm: bool = False

    def kernels(self) -> bytes:
        """What was compiled so far, to be kept; empty where there is no cache, or it gives nothing."""
        memory = None if self.runtime_cache is None else self.runtime_cache.serialize()
        return b"" if memory is None else bytes(memory)


def new_runtime_config(trt: Any, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig | None:
    """The runtime config of an engine; None where TensorRT-RTX refuses it.

    Kernels for the shapes at hand are compiled at once and not, as by default, in the background while fallback kernels
    run: those would be measured, and captured in a CUDA graph.

    Args:
        trt, engine: TensorRT-RTX and its engine.
        cached: what `RuntimeConfig.kernels` gave in an earlier process, or nothing.
        own_graphs: TensorRT-RTX captures each run as a CUDA graph of its own.
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
