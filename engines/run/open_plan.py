"""Checks a plan and loads it: one session, or a pool of contexts for many threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

import torch

from engines.builder.flavor import Flavor
from engines.run.loaded_plan import LoadedPlan, cache_key
from engines.run.plan_checks import SessionError, check_plan
from engines.run.pool import Pool, check_count, check_memory
from engines.run.runtime_cache import RuntimeCache
from engines.run.session import Session


@overload
def open_plan(
    plan: Path,
    flavor: Flavor | None = None,
    *,
    contexts: None = None,
    cuda_graph: bool = False,
    rtx_graphs: bool = False,
    runtime_cache: Path | None = None,
    use_runtime_cache: bool = True,
) -> Session: ...


@overload
def open_plan(
    plan: Path,
    flavor: Flavor | None = None,
    *,
    contexts: int,
    cuda_graph: bool = False,
    rtx_graphs: bool = False,
    runtime_cache: Path | None = None,
    use_runtime_cache: bool = True,
) -> Pool: ...


def open_plan(
    plan: Path,
    flavor: Flavor | None = None,
    *,
    contexts: int | None = None,
    cuda_graph: bool = False,
    rtx_graphs: bool = False,
    runtime_cache: Path | None = None,
    use_runtime_cache: bool = True,
) -> Session | Pool:
    """Checks a plan against its manifest and this machine, and loads it.

    Args:
        plan: the file, its manifest X.plan.json beside it.
        flavor: which TensorRT; by default the one that built the plan.
        contexts: how many runs may be at work at the same time, for a pool; by default a session for one thread.
        cuda_graph: run by a CUDA graph, captured anew whenever the input's shape changes.
        rtx_graphs: TensorRT-RTX captures CUDA graphs of its own; not together with cuda_graph.
        runtime_cache: file in which TensorRT-RTX's compiled kernels are kept for the next start; by default
            X.plan.cache beside the plan, which the C++ library reads too.
        use_runtime_cache: whether to read and write it.

    Raises:
        SessionError: it cannot run here; the message says why and what to do.
    """
    if contexts is not None:
        check_count(plan, contexts)
    flavor, manifest = check_plan(plan, flavor)
    _check_options(plan, flavor, cuda_graph, rtx_graphs, runtime_cache)
    if not torch.cuda.is_available():
        raise SessionError(f"torch {torch.__version__} cannot use the GPU; install torch's CUDA build for this driver")
    cache = None
    if flavor.name == "rtx" and use_runtime_cache:
        cache = RuntimeCache(runtime_cache or default_cache(plan), cache_key(manifest, plan, flavor))
    device = torch.device("cuda", 0)
    with torch.cuda.device(device):
        free = torch.cuda.mem_get_info()[0]
        loaded = LoadedPlan(plan, manifest, flavor, device, cache=cache, rtx_graphs=rtx_graphs)
        if contexts is not None:
            torch.cuda.empty_cache()  # what torch keeps for itself counts as taken, and can be given
            check_memory(plan, contexts, loaded.context_bytes, torch.cuda.mem_get_info()[0])
        options: dict[str, Any] = {"cuda_graph": cuda_graph, "rtx_graphs": rtx_graphs}
        sessions = [Session(loaded, stream=torch.cuda.Stream(), **options) for _ in range(contexts or 1)]
        found = sessions[0] if contexts is None else Pool(sessions, context_bytes=loaded.context_bytes)
        found.loaded_bytes = max(0, free - torch.cuda.mem_get_info()[0])  # another process may have freed some
    return found


def default_cache(plan: Path) -> Path:
    """Where TensorRT-RTX's kernels are kept, unless another file is named."""
    return plan.with_name(f"{plan.name}.cache")


def _check_options(plan: Path, flavor: Flavor, cuda_graph: bool, rtx_graphs: bool, runtime_cache: Path | None) -> None:
    if rtx_graphs and (flavor.name != "rtx" or cuda_graph):
        need = "cuda_graph to be off" if flavor.name == "rtx" else "TensorRT-RTX, this plan is of tensorrt"
        raise SessionError(f"{plan}: CUDA graphs of TensorRT-RTX's own need {need}")
    if runtime_cache is not None and flavor.name != "rtx":
        raise SessionError(f"{plan}: TensorRT has no kernels to keep in a runtime_cache; leave it out")
