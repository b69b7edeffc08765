"""Checks a plan and loads it: one session, or a pool of contexts for many threads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch

from engines.builder.flavor import Flavor
from engines.run.inputs import SessionError
from engines.run.loaded_plan import LoadedPlan, cache_key
from engines.run.plan_checks import check_plan
from engines.run.pool import Pool, check_count, check_memory
from engines.run.runtime_cache import RuntimeCache
from engines.run.session import Session
from engines.run.streams import new_stream


@overload
def open_plan(
    plan: Path,
    flavor: Flavor | None = None,
    *,
    device: int | str | torch.device | None = None,
    contexts: None = None,
    cuda_graph: bool = False,
    rtx_graphs: bool = False,
    runtime_cache: Path | None = None,
    use_runtime_cache: bool = True,
    manifest: Mapping[str, Any] | None = None,
) -> Session: ...


@overload
def open_plan(
    plan: Path,
    flavor: Flavor | None = None,
    *,
    device: int | str | torch.device | None = None,
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
    device: int | str | torch.device | None = None,
    contexts: int | None = None,
    cuda_graph: bool = False,
    rtx_graphs: bool = False,
    runtime_cache: Path | None = None,
    use_runtime_cache: bool = True,
    manifest: Mapping[str, Any] | None = None,
) -> Session | Pool:
    """Checks a plan against its manifest and this machine, and loads it.

    Args:
        plan: the file, its manifest X.plan.json beside it.
        flavor: which TensorRT; by default the one that built the plan.
        device: the GPU, as 1, "cuda:1" or torch's device; by default torch's current one, as for a tensor on "cuda".
        contexts: how many runs may be at work at the same time, for a pool; by default a session for one thread.
        cuda_graph: run by CUDA graphs, one for each batch size, captured at its first run.
        rtx_graphs: TensorRT-RTX captures CUDA graphs of its own; not together with cuda_graph.
        runtime_cache: file in which TensorRT-RTX's compiled kernels are kept for the next start; by default
            X.plan.cache beside the plan, which the C++ library reads too.
        use_runtime_cache: whether to read and write it.
        manifest: what the manifest will say, of a plan that this process has just built; then none is read, and no
            file is hashed.

    Raises:
        SessionError: it cannot run here; the message says why and what to do.
    """
    if contexts is not None:
        check_count(plan, contexts)
    where = find_device(plan, device)
    with torch.cuda.device(where) if torch.cuda.is_available() else contextlib.nullcontext():
        flavor, manifest = check_plan(plan, flavor, where.index, manifest)
    _check_options(plan, flavor, cuda_graph, rtx_graphs, runtime_cache)
    if not torch.cuda.is_available():
        raise SessionError(f"torch {torch.__version__} cannot use the GPU; install torch's CUDA build for this driver")
    cache = None
    if flavor.name == "rtx" and use_runtime_cache:
        cache = RuntimeCache(runtime_cache or default_cache(plan), cache_key(manifest, plan, flavor))
    with torch.cuda.device(where):
        free = torch.cuda.mem_get_info()[0]
        loaded = LoadedPlan(plan, manifest, flavor, where, cache=cache, rtx_graphs=rtx_graphs)
        if contexts is not None:
            torch.cuda.empty_cache()  # what torch keeps for itself counts as taken, and can be given
            check_memory(plan, contexts, loaded.context_bytes, torch.cuda.mem_get_info()[0])
        options: dict[str, Any] = {"cuda_graph": cuda_graph, "rtx_graphs": rtx_graphs}
        sessions = [Session(loaded, stream=new_stream(where), **options) for _ in range(contexts or 1)]
        found = sessions[0] if contexts is None else Pool(sessions, context_bytes=loaded.context_bytes)
        found.loaded_bytes = max(0, free - torch.cuda.mem_get_info()[0])  # another process may have freed some
    return found


def find_device(plan: Path, asked: int | str | torch.device | None) -> torch.device:
    """The GPU that is meant, with its index; the first one if torch can use none.

    Raises:
        SessionError: not a GPU, or one that is not here.
    """
    if isinstance(asked, int):
        asked = f"cuda:{asked}" if asked >= 0 else "none"
    try:
        wanted = torch.device("cuda" if asked is None else asked)
    except RuntimeError:
        wanted = torch.device("cpu")
    if wanted.type != "cuda":
        raise SessionError(
            f"{plan}: a plan runs on a GPU, not on device {asked}; give the GPU's number, such as 0 or cuda:0"
        )
    usable = torch.cuda.is_available()
    index = wanted.index if wanted.index is not None else torch.cuda.current_device() if usable else 0
    if usable and index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise SessionError(
            f"{plan}: there is no GPU {index}; the number of GPUs in this machine is {count}, and they are "
            "numbered from 0"
        )
    return torch.device("cuda", index)


def default_cache(plan: Path) -> Path:
    """Where TensorRT-RTX's kernels are kept, unless another file is named."""
    return plan.with_name(f"{plan.name}.cache")


def _check_options(plan: Path, flavor: Flavor, cuda_graph: bool, rtx_graphs: bool, runtime_cache: Path | None) -> None:
    if rtx_graphs and (flavor.name != "rtx" or cuda_graph):
        need = (
            "cannot be combined with cuda_graph=True; leave out one of the two"
            if flavor.name == "rtx"
            else "requires a TensorRT-RTX plan, but this plan is for TensorRT; leave out rtx_graphs"
        )
        raise SessionError(f"{plan}: rtx_graphs=True {need}")
    if runtime_cache is not None and flavor.name != "rtx":
        raise SessionError(
            f"{plan}: TensorRT compiles no kernels at run time, so runtime_cache has no effect; leave out runtime_cache"
        )
