"""Latency, memory and time per layer of a plan on the GPU at hand, and how near that is to what the GPU can do."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.builder.flavor import Flavor, inspect_engine
from engines.layers.layer_report import LayerReport, read_layers
from engines.layers.read_layers import LayerReportError, layers_from_inspector
from engines.run.inputs import Port
from engines.run.latency import PEAK_SIDE, STATE, Profile, join_layers, parse_state
from engines.run.open_plan import open_plan
from engines.run.session import Session
from engines.run.startup import start_process, time_starts
from engines.run.timing import RUNS, SECONDS, Measure, make_input, optimum_batch, time_graph, time_work, timer
from engines.run.verify import describe
from export.contract.dtypes import BY_PRECISION
from export.verification.verify import Report

LAYER_WARM_UP_RUNS, LAYER_RUNS = 5, 20
COPY_BYTES = 1 << 30

STATE_SECONDS = 20.0
"""It takes 0.1 to 2 s; a driver that hangs must not hold the profile."""


class ProfilingError(RuntimeError):
    """A plan that cannot be profiled as requested."""


def profile_plan(
    plan: Path,
    *,
    batch: int | None = None,
    layers: LayerReport | None = None,
    flavor: Flavor | None = None,
    device: int | str | torch.device | None = None,
    runs: int = RUNS,
    seconds: float = SECONDS,
    report: Report = lambda line: None,
) -> Profile:
    """Measures a plan on a GPU.

    Args:
        plan: the plan, its manifest beside it.
        batch: batch size; by default the optimum of the plan's range.
        layers: its layer report; by default the one beside the plan, else what the engine inspector tells.
        flavor: which TensorRT; by default the one that built the plan.
        device: the GPU, as in open_plan.
        runs, seconds: runs are timed until there are so many, or for so long.
        report: told of every step.

    Raises:
        SessionError: the plan cannot run here.
        ProfilingError: a batch that it does not take, or too little device memory to measure in.
    """
    with open_plan(plan, flavor, device=device, use_runtime_cache=False) as session:
        measure = functools.partial(time_work, session, runs, seconds)
        try:
            found = _profile(session, batch, layers or read_layers(plan) or _inspect(session), measure, report)
        except torch.OutOfMemoryError:
            raise ProfilingError(
                f"{plan}: out of device memory; profiling needs {3 * COPY_BYTES / 1000000000.0:.1f} GB in "
                "addition to the plan, so close other programs or use a smaller --batch"
            ) from None
    report("measuring the startup time in new processes")  # now that this one holds no engine
    starter = functools.partial(start_process, device=session.device.index)
    return dataclasses.replace(found, starts=time_starts(plan, found.batch, session.flavor.name, starter))


def _profile(
    session: Session, batch: int | None, layers: LayerReport | None, measure: Measure, report: Report
) -> Profile:
    port, optimum = session.inputs[0], optimum_batch(session)
    size = choose_batch(session.plan, port, optimum, batch)
    image = make_input(port, size).to(session.device)
    outputs = session.bind({port.name: image})
    precision = session.manifest["precision"]
    report("measuring latency")
    latency = measure(session.enqueue)
    state = read_state(timer(session, session.enqueue), device=session.device.index)
    report("measuring latency with a CUDA graph")
    graph_latency, problem = time_graph(session, {port.name: image}, measure)
    report("measuring copies between host and GPU")
    tensors = {"in": [image], "out": list(outputs.values())}
    copies = {way: measure(_copying(values, way == "in")) for way, values in tensors.items()}
    report("measuring the peak compute rate and memory bandwidth of the GPU")
    tflops, gigabytes_per_s = _measure_peaks(getattr(torch, BY_PRECISION[precision].name), session.device, measure)
    report("measuring the time of each layer")
    session.bind({port.name: image})
    times = _layer_times(session)
    return Profile(
        plan=str(session.plan),
        batch=size,
        precision=precision,
        runtime=describe(session.flavor),
        state=state,
        latency=latency,
        graph_latency=graph_latency,
        graph_problem=problem,
        copy_in=copies["in"],
        copy_out=copies["out"],
        bytes_in=_bytes(tensors["in"]),
        bytes_out=_bytes(tensors["out"]),
        weights_bytes=_weights_bytes(session),
        scratch_bytes=session.engine.get_device_memory_size_for_profile_v2(0),
        loaded_bytes=session.loaded_bytes,
        peak_tflops=tflops,
        peak_gigabytes_per_s=gigabytes_per_s,
        operations=scale_operations(layers, port, optimum, size),
        bytes_moved=layers.bytes_moved if layers else None,
        layers=join_layers(times, layers),
    )


def choose_batch(plan: Path, port: Port, optimum: int, asked: int | None) -> int:
    """The batch to profile: the requested one, else the optimum.

    Raises:
        ProfilingError: the plan does not take it.
    """
    low, high = port.batch
    size = optimum if asked is None else asked
    if not low <= size <= high:
        takes = str(low) if low == high else f"{low} to {high}"
        raise ProfilingError(
            f"{plan}: the plan accepts a batch size of {takes}, but {size} was requested; build the plan again "
            f"with --batch {size}, or profile another batch size"
        )
    return size


def scale_operations(layers: LayerReport | None, port: Port, optimum: int, batch: int) -> int | None:
    """Operations at this batch: the layer report counts them at the optimum batch."""
    if layers is None or layers.operations is None:
        return None
    return layers.operations * batch // optimum if port.batch[0] != port.batch[1] else layers.operations


def read_state(
    run: Callable[[], object], command: str = "nvidia-smi", device: int | None = 0
) -> dict[str, str | None] | None:
    """Asks nvidia-smi for a GPU's clocks and power while the work runs; None if it is not there or does not answer."""
    uuid = "--id=0"
    if torch.cuda.is_available():
        uuid = f"--id=GPU-{torch.cuda.get_device_properties(device or 0).uuid}"
    query = [command, uuid, f"--query-gpu={','.join(STATE.values())}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    with process:
        started = time.monotonic()
        while process.poll() is None:
            run()
            if time.monotonic() - started > STATE_SECONDS:
                process.kill()
        output, _ = process.communicate()
    return parse_state(output) if process.returncode == 0 else None


def new_profiler(trt: Any, times: dict[str, float]) -> Any:
    """TensorRT's IProfiler that adds up the milliseconds of each layer."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return Profiler()


def _layer_times(session: Session) -> dict[str, float]:
    """Mean milliseconds of each layer; the profiler stays attached and slows further runs.

    The first runs are not counted: with a profiler the engine runs in another way, and RTX compiles again.
    """
    times: dict[str, float] = {}
    session.context.profiler = new_profiler(session.flavor.trt, times)
    for run in range(LAYER_WARM_UP_RUNS + LAYER_RUNS):
        if run == LAYER_WARM_UP_RUNS:
            times.clear()
        session.enqueue()
        torch.cuda.synchronize(session.device)
    return {name: total / LAYER_RUNS for name, total in times.items()}


def _copying(tensors: Sequence[Tensor], to_gpu: bool) -> Callable[[], None]:
    """Copies tensors from or to page-locked memory of the host."""
    pairs = [(value, value.cpu().pin_memory()) for value in tensors]

    def copy() -> None:
        for device, host in pairs:
            target, source = (device, host) if to_gpu else (host, device)
            target.copy_(source, non_blocking=True)

    return copy


def _measure_peaks(dtype: torch.dtype, device: torch.device, measure: Measure) -> tuple[float, float]:
    """TFLOP/s of a large product without TF32, GB/s (read and written) of a large copy; both by torch."""
    left, right = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    tflops = 2 * PEAK_SIDE**3 / measure(lambda: torch.mm(left, right, out=product)).p50_ms / 1e9
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return tflops, 2 * COPY_BYTES / measure(lambda: target.copy_(source)).p50_ms / 1e6


def _inspect(session: Session) -> LayerReport | None:
    """The layer report from the engine inspector, None where it tells too little."""
    try:
        return layers_from_inspector(inspect_engine(session.flavor.trt, session.engine), {})
    except LayerReportError:
        return None


def _weights_bytes(session: Session) -> int | None:
    """Bytes of the engine's weights; None where it does not tell, as before TensorRT 10.14."""
    trt = session.flavor.trt
    if not (hasattr(trt, "EngineStat") and hasattr(session.engine, "get_engine_stat")):
        return None
    told = int(session.engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))
    return told if told >= 0 else None


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(value.nbytes for value in tensors)
