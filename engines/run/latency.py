"""What a profile says: runs and their statistics, the join with the layer report, the screen. It needs no GPU."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engines.layers.layer_report import LayerReport

WARM_UP_RUNS, WARM_UP_SECONDS = 10, 1.0
"""Both at least: RTX compiles in its first run, and a GPU needs about a second to raise its clocks."""

PEAK_SIDE = 8192

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


@dataclasses.dataclass(frozen=True)
class Start:
    """Seconds until a new process serves; `warm`: TensorRT-RTX took the kernels of an earlier start."""

    warm: bool
    load_s: float
    first_run_s: float
    second_run_s: float


@dataclasses.dataclass(frozen=True)
class Starts:
    """A cold start and a warm one; None with `problem` where it could not be measured, or TensorRT has none."""

    cold: Start | None = None
    warm: Start | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """The mean time of one layer; what the layer report says of it, None or empty where it does not know the name."""

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
        operations, bytes_moved: of a run at this batch, from the layer report; None where it does not tell.
        layers: slowest first.
        starts: of a new process, until its first result.
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
    starts: Starts = Starts()

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


def time_runs(
    run: Callable[[], float],
    *,
    runs: int,
    seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Warms up, then gives the milliseconds of each run until there are `runs` of them or `seconds` have passed.

    Args:
        run: does the work once and returns its milliseconds.
        runs, seconds: when to stop, whichever comes first; there is one run at least.
        now: a clock in seconds.
    """
    started, count = now(), 0
    while count < WARM_UP_RUNS or now() - started < WARM_UP_SECONDS:
        run()
        count += 1
    started, times = now(), [run()]
    while len(times) < runs and now() - started < seconds:
        times.append(run())
    return times


def summarize(times_ms: Sequence[float]) -> Latency:
    """Mean, percentiles, smallest and largest of the runs."""
    p50, p90, p95, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 95, 99)))
    return Latency(len(times_ms), float(np.mean(times_ms)), p50, p90, p95, p99, min(times_ms), max(times_ms))


def join_layers(times: Mapping[str, float], layers: LayerReport | None) -> tuple[LayerTime, ...]:
    """Puts what the layer report says beside each layer's milliseconds, slowest first."""
    kernels = {kernel.name: kernel for kernel in layers.kernels} if layers else {}
    found = []
    for name, ms in times.items():
        kernel = kernels.get(name)
        kind = None if kernel is None else "attention" if kernel.attention else kernel.kind
        told = (kernel.modules, kernel.bytes) if kernel else ((), None)
        found.append(LayerTime(name, ms, kind, *told))
    return tuple(sorted(found, key=lambda layer: -layer.ms))


def parse_state(line: str) -> dict[str, str | None] | None:
    """Reads nvidia-smi's line of values; one that the GPU does not tell is None."""
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(STATE):
        return None
    return {name: None if value.startswith("[") else value for name, value in zip(STATE, values, strict=True)}


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
        f"{'milliseconds, measured by CUDA events':54} {'p50':>8} {'p90':>8} {'p95':>8} {'p99':>8} {'mean':>8} "
        f"{'runs':>5}",
        _latency_line("inference without CUDA graph, no copies to or from GPU", profile.latency),
        _latency_line("inference with CUDA graph, no copies to or from GPU", profile.graph_latency)
        if profile.graph_latency
        else f"no CUDA graph: {profile.graph_problem}",
        _latency_line(f"copy of inputs to GPU, {profile.bytes_in / 1000000.0:,.1f} MB", profile.copy_in),
        _latency_line(f"copy of outputs to host, {profile.bytes_out / 1000000.0:,.1f} MB", profile.copy_out),
        "",
        *_summary_lines(profile),
        *_start_lines(profile.starts),
        "",
        *_layer_lines(profile.layers, layers),
    ]


def _state_line(state: Mapping[str, str | None] | None) -> str:
    if state is None:
        return "the clocks and the power of the GPU are unknown, because nvidia-smi is missing or does not answer"
    told = {name: value or "?" for name, value in state.items()}
    return (
        f"GPU under load: power state {told['power_state']}, SM clock {told['sm_mhz']} of {told['sm_max_mhz']} "
        f"MHz, memory clock {told['memory_mhz']} MHz, {told['power_w']} of {told['power_limit_w']} W, "
        f"{told['temperature_c']} C"
    )


def _latency_line(name: str, latency: Latency) -> str:
    figures = (latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms, latency.mean_ms)
    return f"{name:54} {' '.join(f'{figure:8.3f}' for figure in figures)} {latency.runs:5}"


def _summary_lines(profile: Profile) -> list[str]:
    rates = [f"{profile.images_per_s(profile.latency):.1f} images/s"]
    rates += (
        [f"{profile.images_per_s(profile.graph_latency):.1f} images/s with a CUDA graph"]
        if profile.graph_latency
        else []
    )
    weights = "unknown" if profile.weights_bytes is None else f"{profile.weights_bytes / 1e6:,.1f} MB"
    peak, moved = profile.peak_share, profile.bandwidth_share
    shares = [
        "an unknown share of the peak compute rate" if peak is None else f"{peak:.0%} of the peak compute rate",
        "an unknown share of the peak memory bandwidth"
        if moved is None
        else f"{moved:.0%} of the peak memory bandwidth",
    ]
    return [
        f"throughput of consecutive inferences: {', '.join(rates)}",
        f"device memory: weights {weights}, scratch {profile.scratch_bytes / 1000000.0:,.1f} MB, inputs and "
        f"outputs {(profile.bytes_in + profile.bytes_out) / 1000000.0:,.1f} MB; loading the plan "
        f"used {profile.loaded_bytes / 1000000.0:,.1f} MB",
        f"peak rates measured with torch: {profile.peak_tflops:.1f} TFLOP/s ({PEAK_SIDE}^3 {profile.precision} "
        f"matrix multiplication), {profile.peak_gigabytes_per_s:.0f} GB/s (copy on the GPU)",
        f"at the median latency of {profile.median_ms:.3f} ms, the plan reaches {' and '.join(shares)}",
    ]


def _start_lines(starts: Starts) -> list[str]:
    """The time to the first result of a new process, its imports aside."""
    return ([f"the startup time could not be measured: {starts.problem}"] if starts.problem else []) + [
        f"{'warm start, with the kernels that the cold start compiled' if one.warm else 'cold start'}: loading "
        f"{one.load_s:.2f} s, first run {one.first_run_s:.2f} s, second run {one.second_run_s:.3f} s"
        for one in (starts.cold, starts.warm)
        if one
    ]


def _layer_lines(layers: Sequence[LayerTime], limit: int) -> list[str]:
    """The slowest layers; their sum is more than a run's latency, as the profiler waits after each."""
    total = sum(layer.ms for layer in layers)
    known = sum(layer.kind is not None for layer in layers)
    lines = [
        f"the {len(layers)} layers of the plan together take {total:.3f} ms per inference with the profiler attached",
        f"the kind of kernel is known for {known} of the {len(layers)} layers; it is shown as ? for the other layers",
        f"{'ms':>9} {'share':>6} {'GB/s':>7}  {'kind':<15} modules",
    ]
    for layer in layers[:limit]:
        rate = f"{layer.bytes / layer.ms / 1e6:7.0f}" if layer.bytes and layer.ms else f"{'?':>7}"
        named = ", ".join(layer.modules) or layer.name
        share = layer.ms / total if total else 0.0
        lines.append(f"{layer.ms:9.4f} {share:6.1%} {rate}  {layer.kind or '?':<15} {named}")
    return lines
