"""Times work on a session's stream by CUDA events: what the profile and the tuning share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.run.inputs import Port, SessionError
from engines.run.latency import Latency, summarize, time_runs
from engines.run.open_plan import open_plan
from engines.run.session import Session

RUNS, SECONDS = 200, 10.0
"""Runs are timed until there are so many, or for so long."""

Measure = Callable[[Callable[[], object]], Latency]
"""Times a piece of work."""


def median_ms(
    plan: Path, manifest: Mapping[str, Any] | None = None, *, runs: int = RUNS, seconds: float = SECONDS
) -> float:
    """Median latency at the optimum batch without transfers, by CUDA graph where that is faster.

    Args:
        plan: the plan, its manifest beside it.
        manifest: its content, of a plan whose bytes were compared with it already; as in open_plan.
        runs, seconds: runs are timed until there are so many, or for so long.

    Raises:
        SessionError: the plan cannot run here, or there is no device memory for its inputs and outputs.
    """
    with open_plan(plan, use_runtime_cache=False, manifest=manifest) as session:
        port, timed = session.inputs[0], functools.partial(time_work, session, runs, seconds)
        try:
            image = make_input(port, optimum_batch(session)).to(session.device)
            session.bind({port.name: image})
            latency = timed(session.enqueue)
            captured, _ = time_graph(session, {port.name: image}, timed)
        except torch.OutOfMemoryError:
            raise SessionError(f"{plan}: out of device memory; close other programs, or use a smaller batch") from None
    return min(one.p50_ms for one in (latency, captured) if one)


def time_work(session: Session, runs: int, seconds: float, work: Callable[[], object]) -> Latency:
    """Warms up, then times runs until there are so many, or for so long."""
    return summarize(time_runs(timer(session, work), runs=runs, seconds=seconds))


def timer(session: Session, work: Callable[[], object]) -> Callable[[], float]:
    """Does the work on the session's stream between two CUDA events, and returns the milliseconds between them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run() -> float:
        with torch.cuda.stream(session.stream):
            start.record()
            work()
            end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return run


def time_graph(session: Session, inputs: Mapping[str, Tensor], measure: Measure) -> tuple[Latency | None, str | None]:
    """Latency of a run as a CUDA graph, or why none can be captured."""
    try:
        captured = session.capture(inputs)
    except SessionError as error:
        return None, str(error)
    return measure(captured.graph.replay), None


def make_input(port: Port, batch: int) -> Tensor:
    """Seeded noise on the CPU: zeros would cost the GPU less power than images do."""
    shape, generator = (batch, *port.shape[1:]), torch.Generator().manual_seed(0)
    if port.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(port.dtype)
    return torch.randint(0, 128, shape, generator=generator).to(port.dtype)


def optimum_batch(session: Session) -> int:
    """The batch that the plan was tuned for."""
    port = session.inputs[0]
    if port.batch[0] == port.batch[1]:
        return port.batch[0]
    return session.engine.get_tensor_profile_shape(port.name, 0)[1][0]
