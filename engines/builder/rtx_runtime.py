"""How TensorRT-RTX runs an engine: its kernels are compiled at run time, and can be kept for the next process."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """What every context of an engine is made with; TensorRT has none.

    Attributes:
        config, cache: TensorRT-RTX's own objects, which must outlive the contexts; None where there is none.
        warm: whether the cache took kernels of an earlier start.
    """

    config: Any = None
    cache: Any = None
    warm: bool = False

    def kernels(self) -> bytes:
        """What was compiled so far, to be kept; empty where there is no cache, or it gives nothing."""
        memory = None if self.cache is None else self.cache.serialize()
        return b"" if memory is None else bytes(memory)


def new_runtime_config(trt: Any, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig | None:  # noqa: ANN401
    """The runtime config of an engine; None where TensorRT-RTX refuses it.

    Kernels for the shapes at hand are compiled at once and not, as by default, in the background while fallback kernels
    run: those would be measured, and captured in a CUDA graph.

    Args:
        trt, engine: TensorRT-RTX and its engine.
        cached: what `RuntimeConfig.kernels` gave in an earlier process, or nothing.
        own_graphs: TensorRT-RTX captures each run as a CUDA graph of its own.
    """
    config = engine.create_runtime_config()
    if config is None:
        return None
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    if own_graphs:
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if config.cuda_graph_strategy != trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            return None
    cache = config.create_runtime_cache()
    warm = cache is not None and bool(cached) and bool(cache.deserialize(cached))
    if cache is not None and not config.set_runtime_cache(cache):
        cache, warm = None, False
    return RuntimeConfig(config, cache, warm)
