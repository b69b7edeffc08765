"""Device memory that a plan takes: weights once, and for each context its activations, inputs and outputs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from export.contract.dtypes import BY_NAME
from export.contract.signature import BATCH, BatchRange

LOGGED = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")
"""The builder's words, seen in TensorRT-RTX 1.7; activations are for the largest batch of the profile."""

CONTEXTS = (1, 4)
"""Sizes of a pool whose total is shown."""


def read_memory(line: str) -> dict[str, int]:
    """What a line of the builder's log tells: `weights_bytes` or `activation_bytes`; empty for any other line."""
    found = LOGGED.search(line)
    return {f"{found[1].lower()}_bytes": int(found[2])} if found else {}


def plan_memory(logged: Mapping[str, int], tensors: Iterable[Mapping[str, Any]], batch: str) -> dict[str, int | None]:
    """Bytes for the manifest of a plan.

    Args:
        logged: what the builder's log told.
        tensors: the inputs and outputs, with `dtype` and `shape`.
        batch: the batch sizes of the plan; the largest counts.
    """
    largest = BatchRange.parse(batch).maximum
    sizes = [
        (BY_NAME[tensor["dtype"]].bytes if tensor["dtype"] in BY_NAME else math.nan)
        * math.prod(largest if side == BATCH else int(side) for side in tensor["shape"])
        for tensor in tensors
    ]
    total = sum(sizes)
    known = {name: logged.get(name) for name in ("weights_bytes", "activation_bytes")}
    return {**known, "io_bytes": None if math.isnan(total) else int(total)}


def pool_bytes(memory: Mapping[str, int | None], contexts: int) -> int | None:
    """Device memory of a pool: the weights once, the rest for every context; None if a part is not known."""
    weights, activations, tensors = (memory.get(name) for name in ("weights_bytes", "activation_bytes", "io_bytes"))
    if weights is None or activations is None or tensors is None:
        return None
    return weights + contexts * (activations + tensors)


def memory_lines(manifest: Mapping[str, Any]) -> list[str]:
    """The lines of `inspect` and `trt` about a plan's device memory."""
    tensors = [*manifest["inputs"], *manifest["outputs"]]
    memory = manifest.get("memory") or plan_memory({}, tensors, manifest["batch"])
    batch = BatchRange.parse(manifest["batch"]).maximum
    lines = [
        f"  memory  on the GPU at batch {batch}: weights {_text(memory['weights_bytes'])}, activations "
        f"{_text(memory['activation_bytes'])} (both from the builder's log), inputs and outputs "
        f"{_text(memory['io_bytes'])}"
    ]
    totals = [
        f"{_text(total)} with {contexts} execution context{'s' if contexts > 1 else ''}"
        for contexts in CONTEXTS
        if (total := pool_bytes(memory, contexts))
    ]
    if totals:
        lines.append(f"          total GPU memory: {', '.join(totals)}; all contexts share one copy of the weights")
    return lines


def _text(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.1f} MB"
