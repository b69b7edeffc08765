"""Latency, memory and time per layer of a plan on the GPU at hand, and how near that is to what the GPU can do."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.flavor import Flavor
from engines.layers import LayerSheet
from engines.listing import LayerSheetError, sheet_from_inspector
from engines.plan import read_sheet
from engines.session import Port, Session, SessionError, open_plan
from engines.verify import describe
from export.verify import Report

RUNS, SECONDS = 200, 10.0
"""Runs are timed until there are so many, or for so long."""

WARM_UP_RUNS, WARM_UP_SECONDS = 10, 1.0
"""Both at least: RTX compiles in its first run, and a GPU needs about a second to raise its clocks."""

LAYER_RUNS = 20
PEAK_SIDE = 8192
COPY_BYTES = 1 << 30
PEAK_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

STATE = {
    "power_state": "pstate",
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
"""What nvidia-smi is asked."""

STATE_SECONDS = 20.0
"""It takes 0.1 to 2 s; a driver that hangs must not hold the profile."""


class ProfilingError(RuntimeError):
    """A plan that cannot be profiled as asked."""


@dataclasses.dataclass(frozen=True)
class Latency:
    """Milliseconds of one piece of work, one run after the other; percentiles are interpolated."""

    runs: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    min_ms: float
    max_ms: float


Measure = Callable[[Callable[[], object]], Latency]
"""Times a piece of work."""


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """The mean time of one layer; what the layer sheet says of it, None or empty where it does not know the name."""

    name: str
    ms: float
    kind: str | None
    modules: tuple[str, ...]
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a plan costs on one GPU.

    Attributes:
        plan, batch, precision: what was run.
        runtime: TensorRT, GPU and driver.
        state: clocks and power while it ran, as nvidia-smi tells them; None where it is not there.
        latency: of a run, launched kernel by kernel; without transfers.
        graph_latency: of a run as a CUDA graph; None with `graph_problem` where none can be captured.
        copy_in, copy_out: of the input to the GPU, and of all outputs from it, in page-locked memory.
        bytes_in, bytes_out: their sizes.
        weights_bytes, scratch_bytes: of the engine, as TensorRT tells them; None where it does not.
        loaded_bytes: device memory that loading took.
        peak_tflops: measured here, 8192^3 product in the plan's precision by torch.
        peak_gigabytes_per_s: measured here, reads and writes of a copy on the GPU.
        operations, bytes_moved: of a run at this batch, from the layer sheet; None where it does not tell.
        layers: slowest first.
    """

    plan: str
    batch: int
    precision: str
    runtime: str
    state: dict[str, str | None] | None
    latency: Latency
    graph_latency: Latency | None
    graph_problem: str | None
    copy_in: Latency
    copy_out: Latency
    bytes_in: int
    bytes_out: int
    weights_bytes: int | None
    scratch_bytes: int
    loaded_bytes: int
    peak_tflops: float
    peak_gigabytes_per_s: float
    operations: int | None
    bytes_moved: int | None
    layers: tuple[LayerTime, ...]

    @property
    def median_ms(self) -> float:
        """Median latency, with CUDA graph or without, whichever is less."""
        return min(latency.p50_ms for latency in (self.latency, self.graph_latency) if latency)

    @property
    def peak_share(self) -> float | None:
        """Operations per second over the measured peak, 0 to 1, at the best latency."""
        return self.operations / self.median_ms / 1e9 / self.peak_tflops if self.operations else None

    @property
    def bandwidth_share(self) -> float | None:
        """Bytes per second over the measured copy bandwidth; above 1 where tensors stay in the GPU's cache."""
        return self.bytes_moved / self.median_ms / 1e6 / self.peak_gigabytes_per_s if self.bytes_moved else None

    def images_per_s(self, latency: Latency) -> float:
        """Throughput of runs one after the other."""
        return self.batch * 1e3 / latency.mean_ms

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON values, derived figures included."""
        derived = {"median_ms": self.median_ms, "peak_share": self.peak_share, "bandwidth_share": self.bandwidth_share}
        rates = {"images_per_s": self.images_per_s(self.latency)}
        if self.graph_latency:
            rates["graph_images_per_s"] = self.images_per_s(self.graph_latency)
        return json.loads(json.dumps({**dataclasses.asdict(self), **derived, **rates}))


def profile_plan(
    plan: Path,
    *,
    batch: int | None = None,
    sheet: LayerSheet | None = None,
    flavor: Flavor | None = None,
    runs: int = RUNS,
    seconds: float = SECONDS,
    report: Report = lambda line: None,
) -> Profile:
    """Measures a plan on the first GPU.

    Args:
        plan: the plan, its manifest beside it.
        batch: batch size; by default the optimum of the plan's range.
        sheet: its layer sheet; by default the one beside the plan, else what the engine inspector tells.
        flavor: which TensorRT; by default the one that built the plan.
        runs, seconds: runs are timed until there are so many, or for so long.
        report: told of every step.

    Raises:
        SessionError: the plan cannot run here.
        ProfilingError: a batch that it does not take, or too little device memory to measure in.
    """
    with open_plan(plan, flavor) as session:
        measure = functools.partial(_measure, session, runs, seconds)
        try:
            return _profile(session, batch, sheet or read_sheet(plan) or _inspect(session), measure, report)
        except torch.OutOfMemoryError:
            raise ProfilingError(
                f"{plan}: out of device memory; profiling needs {3 * COPY_BYTES / 1e9:.1f} GB beside the plan, so end "
                f"other programs or take a smaller --batch"
            ) from None


def _measure(session: Session, runs: int, seconds: float, work: Callable[[], object]) -> Latency:
    return summarise(time_runs(_timer(session, work), runs=runs, seconds=seconds))


def _profile(
    session: Session, batch: int | None, sheet: LayerSheet | None, measure: Measure, report: Report
) -> Profile:
    port, optimum = session.inputs[0], _optimum(session)
    size = choose_batch(session.plan, port, optimum, batch)
    image = make_input(port, size).to(session.device)
    outputs = session.bind({port.name: image})
    precision = session.manifest["precision"]
    report("latency")
    latency = measure(session.enqueue)
    state = read_state(_timer(session, session.enqueue))
    report("latency of a CUDA graph")
    graph_latency, problem = _graph_latency(session, {port.name: image}, measure)
    report("transfers")
    tensors = {"in": [image], "out": list(outputs.values())}
    copies = {way: measure(_copying(values, way == "in")) for way, values in tensors.items()}
    report("the GPU's own peak")
    tflops, gigabytes_per_s = _measure_peaks(PEAK_TYPES[precision], session.device, measure)
    report("time per layer")
    session.bind({port.name: image})
    times = _layer_times(session)
    engine, stat = session.engine, session.flavor.trt.EngineStat.TOTAL_WEIGHTS_SIZE
    weights = engine.get_engine_stat(stat)
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
        weights_bytes=weights if weights >= 0 else None,
        scratch_bytes=engine.get_device_memory_size_for_profile_v2(0),
        loaded_bytes=session.loaded_bytes,
        peak_tflops=tflops,
        peak_gigabytes_per_s=gigabytes_per_s,
        operations=scale_operations(sheet, port, optimum, size),
        bytes_moved=sheet.bytes_moved if sheet else None,
        layers=join_layers(times, sheet),
    )


def time_runs(
    run: Callable[[], float],
    *,
    runs: int = RUNS,
    seconds: float = SECONDS,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Warms up, then times runs until there are `runs` of them or `seconds` have passed.

    Args:
        run: does the work once and returns its milliseconds.
        runs, seconds: when to stop, whichever comes first; there is one run at least.
        now: a clock in seconds.

    Returns:
        Milliseconds of each run.
    """
    started, count = now(), 0
    while count < WARM_UP_RUNS or now() - started < WARM_UP_SECONDS:
        run()
        count += 1
    started, times = now(), [run()]
    while len(times) < runs and now() - started < seconds:
        times.append(run())
    return times


def summarise(times_ms: Sequence[float]) -> Latency:
    """Mean, percentiles, smallest and largest of the runs."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 95, 99)))
    return Latency(len(times_ms), float(np.mean(times_ms)), p50, p90, p95, p99, min(times_ms), max(times_ms))


def choose_batch(plan: Path, port: Port, optimum: int, asked: int | None) -> int:
    """The batch to profile: what is asked, else the optimum.

    Raises:
        ProfilingError: the plan does not take it.
    """
    low, high = port.batch
    size = optimum if asked is None else asked
    if not low <= size <= high:
        takes = str(low) if low == high else f"{low} to {high}"
        raise ProfilingError(f"{plan}: takes a batch of {takes}, asked was {size}; build it again with --batch {size}")
    return size


def make_input(port: Port, batch: int) -> Tensor:
    """Seeded noise on the CPU: zeros would cost the GPU less power than pictures do."""
    shape, generator = (batch, *port.shape[1:]), torch.Generator().manual_seed(0)
    if port.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(port.dtype)
    return torch.randint(0, 128, shape, generator=generator).to(port.dtype)


def scale_operations(sheet: LayerSheet | None, port: Port, optimum: int, batch: int) -> int | None:
    """Operations at this batch: the sheet counts them at the optimum batch."""
    if sheet is None or sheet.operations is None:
        return None
    return sheet.operations * batch // optimum if port.batch[0] != port.batch[1] else sheet.operations


def join_layers(times: Mapping[str, float], sheet: LayerSheet | None) -> tuple[LayerTime, ...]:
    """Puts what the layer sheet says beside each layer's milliseconds, slowest first."""
    kernels = {kernel.name: kernel for kernel in sheet.kernels} if sheet else {}
    layers = []
    for name, ms in times.items():
        kernel = kernels.get(name)
        kind = None if kernel is None else "attention" if kernel.attention else kernel.kind
        told = (kernel.modules, kernel.bytes) if kernel else ((), None)
        layers.append(LayerTime(name, ms, kind, *told))
    return tuple(sorted(layers, key=lambda layer: -layer.ms))


def read_state(run: Callable[[], object], command: str = "nvidia-smi") -> dict[str, str | None] | None:
    """Asks nvidia-smi for clocks and power while the work runs; None where it is not there or does not answer."""
    uuid = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else "--id=0"
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


def parse_state(line: str) -> dict[str, str | None] | None:
    """Reads nvidia-smi's line of values; one that the GPU does not tell is None."""
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(STATE):
        return None
    return {name: None if value.startswith("[") else value for name, value in zip(STATE, values, strict=True)}


def new_profiler(trt: Any, times: dict[str, float]) -> Any:  # noqa: ANN401
    """TensorRT's IProfiler that adds up the milliseconds of each layer."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return Profiler()


def _layer_times(session: Session) -> dict[str, float]:
    """Mean milliseconds of each layer; the profiler stays attached and slows further runs."""
    times: dict[str, float] = {}
    session.context.profiler = new_profiler(session.flavor.trt, times)
    for _ in range(LAYER_RUNS):
        session.enqueue()
        torch.cuda.synchronize(session.device)
    return {name: total / LAYER_RUNS for name, total in times.items()}


def _timer(session: Session, work: Callable[[], object]) -> Callable[[], float]:
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


def _graph_latency(
    session: Session, inputs: Mapping[str, Tensor], measure: Measure
) -> tuple[Latency | None, str | None]:
    try:
        captured = session.capture(inputs)
    except SessionError as error:
        return None, str(error)
    return measure(captured.graph.replay), None


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


def _inspect(session: Session) -> LayerSheet | None:
    """The layer sheet from the engine inspector, None where it tells too little."""
    trt = session.flavor.trt
    inspector = session.engine.create_engine_inspector()
    try:
        return sheet_from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON), {})
    except (LayerSheetError, KeyError):
        return None


def _optimum(session: Session) -> int:
    port = session.inputs[0]
    if port.batch[0] == port.batch[1]:
        return port.batch[0]
    return session.engine.get_tensor_profile_shape(port.name, 0)[1][0]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(value.nbytes for value in tensors)


def profile_lines(profile: Profile, layers: int = 20) -> list[str]:
    """The profile for a screen.

    Args:
        profile: what was measured.
        layers: how many of the slowest to list.
    """
    return [
        f"{profile.plan}: batch {profile.batch}, {profile.precision}, {profile.runtime}",
        _state_line(profile.state),
        "",
        f"{'milliseconds, by CUDA events':38} {'p50':>8} {'p90':>8} {'p95':>8} {'p99':>8} {'mean':>8} {'runs':>5}",
        _latency_line("a run, kernel by kernel, no transfers", profile.latency),
        _latency_line("a run, CUDA graph, no transfers", profile.graph_latency)
        if profile.graph_latency
        else f"no CUDA graph: {profile.graph_problem}",
        _latency_line(f"copy in, {profile.bytes_in / 1e6:,.1f} MB", profile.copy_in),
        _latency_line(f"copy out, {profile.bytes_out / 1e6:,.1f} MB", profile.copy_out),
        "",
        *_summary_lines(profile),
        "",
        *_layer_lines(profile.layers, layers),
    ]


def _state_line(state: Mapping[str, str | None] | None) -> str:
    if state is None:
        return "clocks and power: not told (nvidia-smi is not here or does not answer)"
    told = {name: value or "?" for name, value in state.items()}
    return (
        f"under load: {told['power_state']}, SM {told['sm_mhz']} of {told['sm_max_mhz']} MHz, memory "
        f"{told['memory_mhz']} MHz, {told['power_w']} of {told['power_limit_w']} W, {told['temperature_c']} C"
    )


def _latency_line(name: str, latency: Latency) -> str:
    figures = (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms, latency.mean_ms)
    return f"{name:38} {' '.join(f'{figure:8.3f}' for figure in figures)} {latency.runs:5}"


def _summary_lines(profile: Profile) -> list[str]:
    rates = [f"{profile.images_per_s(profile.latency):.1f}"]
    rates += [f"{profile.images_per_s(profile.graph_latency):.1f} by CUDA graph"] if profile.graph_latency else []
    weights = "not told" if profile.weights_bytes is None else f"{profile.weights_bytes / 1e6:,.1f} MB"
    peak, moved = profile.peak_share, profile.bandwidth_share
    shares = [
        "operations not told" if peak is None else f"{peak:.0%} of the product rate",
        "bytes not told" if moved is None else f"{moved:.0%} of the copy rate",
    ]
    return [
        f"throughput, one run after the other: {', '.join(rates)} images/s",
        f"device memory: weights {weights}, scratch {profile.scratch_bytes / 1e6:,.1f} MB, in and out "
        f"{(profile.bytes_in + profile.bytes_out) / 1e6:,.1f} MB; loading took {profile.loaded_bytes / 1e6:,.1f} MB",
        f"measured here by torch: {profile.peak_tflops:.1f} TFLOP/s ({PEAK_SIDE}^3 {profile.precision} product), "
        f"{profile.peak_gigabytes_per_s:.0f} GB/s (copy)",
        f"at the median of {profile.median_ms:.3f} ms: {', '.join(shares)}",
    ]


def _layer_lines(layers: Sequence[LayerTime], limit: int) -> list[str]:
    """The slowest layers; their sum is more than a run's latency, as the profiler waits after each."""
    total = sum(layer.ms for layer in layers)
    known = sum(layer.kind is not None for layer in layers)
    lines = [
        f"{len(layers)} layers, {total:.3f} ms with the profiler attached; the layer sheet names {known} of them",
        f"{'ms':>9} {'share':>6} {'GB/s':>7}  {'kind':<15} modules",
    ]
    for layer in layers[:limit]:
        rate = f"{layer.bytes / layer.ms / 1e6:7.0f}" if layer.bytes and layer.ms else f"{'?':>7}"
        named = ", ".join(layer.modules) or layer.name
        share = layer.ms / total if total else 0.0
        lines.append(f"{layer.ms:9.4f} {share:6.1%} {rate}  {layer.kind or '?':<15} {named}")
    return lines
