"""Statistics, joining and texts of the profile; the measuring itself needs a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_session import L4, build_convolution, fake, write_plan

from engines.builder.flavor import Flavor, choose_flavor
from engines.layers.layer_report import Kernel, LayerReport, Tensor
from engines.run.inputs import Port, SessionError
from engines.run.latency import (
    STATE,
    WARM_UP_RUNS,
    WARM_UP_SECONDS,
    Latency,
    LayerTime,
    Profile,
    join_layers,
    parse_state,
    profile_lines,
    summarize,
    time_runs,
)
from engines.run.profiling import (
    LAYER_RUNS,
    ProfilingError,
    choose_batch,
    new_profiler,
    profile_plan,
    read_state,
    scale_operations,
)
from engines.run.timing import make_input

FIXED = Port("image", torch.float32, (2, 3, 8, 8), (2, 2))
DYNAMIC = Port("image", torch.float32, (-1, 3, 8, 8), (1, 8))


class Clock:
    """A clock that goes on by what each run takes."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds, self.time, self.runs = seconds, 0.0, 0

    def run(self) -> float:
        taken = self.seconds(self.runs)
        self.time, self.runs = self.time + taken, self.runs + 1
        return taken * 1e3

    def now(self) -> float:
        return self.time


def test_percentiles_are_interpolated() -> None:
    latency = summarize([float(value) for value in range(100, -1, -1)])
    assert latency == Latency(101, 50.0, 50.0, 90.0, 95.0, 99.0, 0.0, 100.0)
    assert summarize([1.0, 2.0]).p90_ms == pytest.approx(1.9)
    assert summarize([1.0] * 199 + [100.0]).p99_ms == 1.0  # one outlier of 200 is beyond p99 ...
    assert summarize([1.0] * 197 + [100.0] * 3).p99_ms == pytest.approx(100.0)  # ... three are not
    assert summarize([3.0]) == Latency(1, *[3.0] * 7)


def test_runs_are_timed_until_there_are_enough() -> None:
    clock = Clock(lambda run: 0.010)
    assert time_runs(clock.run, runs=200, seconds=10, now=clock.now) == [10.0] * 200
    assert clock.runs == 200 + round(WARM_UP_SECONDS / 0.010)


def test_slow_runs_are_timed_for_so_long() -> None:
    clock = Clock(lambda run: 0.5)
    assert len(time_runs(clock.run, runs=200, seconds=10, now=clock.now)) == 20
    assert clock.runs == 20 + WARM_UP_RUNS
    assert len(time_runs(clock.run, runs=200, seconds=0, now=clock.now)) == 1


def test_the_warm_up_is_not_timed() -> None:
    clock = Clock(lambda run: 9.0 if run < WARM_UP_RUNS else 0.1)
    assert max(time_runs(clock.run, runs=50, seconds=10, now=clock.now)) == pytest.approx(100.0)


def test_the_batch_to_profile() -> None:
    assert choose_batch(Path("x.plan"), DYNAMIC, 4, None) == 4
    assert choose_batch(Path("x.plan"), DYNAMIC, 4, 8) == 8
    assert choose_batch(Path("x.plan"), FIXED, 2, None) == 2
    for port, asked, takes in ((DYNAMIC, 9, "1 to 8"), (DYNAMIC, 0, "1 to 8"), (FIXED, 1, "2")):
        with pytest.raises(
            ProfilingError, match=f"accepts a batch size of {takes}, but {asked} was requested; .*--batch {asked}"
        ):
            choose_batch(Path("x.plan"), port, 4, asked)


def test_the_input_is_seeded_noise_of_the_right_type() -> None:
    image = make_input(DYNAMIC, 3)
    assert (image.shape, image.dtype) == ((3, 3, 8, 8), torch.float32)
    assert torch.equal(image, make_input(DYNAMIC, 3))
    assert image.std() > 0.5
    pixels = make_input(dataclasses.replace(FIXED, dtype=torch.uint8), 2)
    assert pixels.dtype == torch.uint8
    assert pixels.float().std() > 10


def kernel(name: str, onnx: str, sides: tuple[int, ...] = (1000,)) -> Kernel:
    tensor = Tensor("x", sides, "Half")
    return Kernel(name, "gemm", "", (tensor,), (), (tensor,), (onnx,))


SHEET = LayerReport(
    "builder log",
    (kernel("fc1", "trunk.blocks.0.mlp/MatMul"), kernel("_gemm_mha_v2_1", "trunk.blocks.0.attn/attention")),
    1,
    operations=8_000_000,
)


def test_operations_at_another_batch() -> None:
    assert scale_operations(SHEET, DYNAMIC, 4, 8) == 16_000_000
    assert scale_operations(SHEET, DYNAMIC, 4, 1) == 2_000_000
    assert scale_operations(SHEET, FIXED, 2, 2) == 8_000_000
    assert scale_operations(dataclasses.replace(SHEET, operations=None), FIXED, 2, 2) is None
    assert scale_operations(None, FIXED, 2, 2) is None


def test_layers_are_joined_by_name_slowest_first() -> None:
    layers = join_layers({"reformat": 0.1, "fc1": 0.5, "_gemm_mha_v2_1": 2.0}, SHEET)
    assert layers == (
        LayerTime("_gemm_mha_v2_1", 2.0, "attention", ("trunk.blocks.0.attn",), 4000),
        LayerTime("fc1", 0.5, "gemm", ("trunk.blocks.0.mlp",), 4000),
        LayerTime("reformat", 0.1, None, (), None),
    )
    assert [layer.kind for layer in join_layers({"fc1": 1.0}, None)] == [None]


def test_nvidias_profiler_class_adds_up() -> None:
    """NVIDIA's own base class takes ours."""
    times: dict[str, float] = {}
    profiler = new_profiler(choose_flavor("rtx").trt, times)
    for name, ms in (("a", 1.0), ("b", 2.0), ("a", 0.5)):
        profiler.report_layer_time(name, ms)
    assert times == {"a": 1.5, "b": 2.0}


LINE = "P0, 2040, 2040, 6251, 70.12, 72.00, 61\n"
STATE_HERE = {
    "power_state": "P0",
    "sm_mhz": "2040",
    "sm_max_mhz": "2040",
    "memory_mhz": "6251",
    "power_w": "70.12",
    "power_limit_w": "72.00",
    "temperature_c": "61",
}


def test_what_nvidia_smi_says() -> None:
    assert parse_state(LINE) == STATE_HERE
    told = parse_state(LINE.replace("70.12", "[N/A]").replace("72.00", "[Not Supported]"))
    assert told == STATE_HERE | {"power_w": None, "power_limit_w": None}
    assert parse_state("No devices were found") is None
    assert parse_state("") is None
    assert len(STATE) == len(STATE_HERE)


def test_clocks_are_asked_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, runs = tmp_path / "nvidia-smi", []
    command.write_text(f"#!/bin/sh\nsleep 0.2\nprintf '{LINE.strip()}'\n")
    command.chmod(0o755)
    assert read_state(lambda: runs.append(1), str(command)) == STATE_HERE
    assert runs
    command.write_text("#!/bin/sh\nexit 9\n")
    assert read_state(lambda: None, str(command)) is None
    assert read_state(lambda: None, str(tmp_path / "none")) is None
    command.write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr("engines.run.profiling.STATE_SECONDS", 0.1)
    assert read_state(lambda: None, str(command)) is None


PROFILE = Profile(
    plan="build/x.plan",
    batch=4,
    precision="fp16",
    runtime="TensorRT 11.4.0.106 on NVIDIA L4 (compute capability 8.9, driver 570.86)",
    state=STATE_HERE,
    latency=Latency(200, 41.0, 40.0, 42.0, 43.0, 44.0, 39.0, 45.0),
    graph_latency=Latency(200, 40.0, 39.0, 41.0, 42.0, 43.0, 38.0, 44.0),
    graph_problem=None,
    copy_in=Latency(200, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    copy_out=Latency(200, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0),
    bytes_in=12_192_768,
    bytes_out=56_000_000,
    weights_bytes=908_000_000,
    scratch_bytes=250_000_000,
    loaded_bytes=1_300_000_000,
    peak_tflops=100.0,
    peak_gigabytes_per_s=250.0,
    operations=1_950_000_000_000,
    bytes_moved=4_875_000_000,
    layers=join_layers({"fc1": 0.75, "_gemm_mha_v2_1": 2.25, "reformat": 1.0}, SHEET),
)


def test_shares_are_of_the_best_latency() -> None:
    assert PROFILE.median_ms == 39.0
    assert PROFILE.peak_share == pytest.approx(0.5)  # 1.95 TFLOP in 39 ms is 50 TFLOP/s
    assert PROFILE.bandwidth_share == pytest.approx(0.5)  # 4.875 GB in 39 ms is 125 GB/s
    assert PROFILE.images_per_s(PROFILE.latency) == pytest.approx(4 / 0.041)
    plain = dataclasses.replace(PROFILE, graph_latency=None, operations=None, bytes_moved=None)
    assert plain.median_ms == 40.0
    assert plain.peak_share is None
    assert plain.bandwidth_share is None


def test_the_profile_as_json() -> None:
    values = json.loads(json.dumps(PROFILE.to_dict(), allow_nan=False))
    assert values["latency"]["p99_ms"] == 44.0
    assert values["peak_share"] == pytest.approx(0.5)
    assert values["graph_images_per_s"] == pytest.approx(100.0)
    assert values["layers"][0]["kind"] == "attention"
    assert values["state"]["power_state"] == "P0"
    assert "graph_images_per_s" not in dataclasses.replace(PROFILE, graph_latency=None).to_dict()


def test_the_profile_for_a_screen() -> None:
    text = "\n".join(profile_lines(PROFILE))
    for part in (
        "build/x.plan: batch 4, fp16, TensorRT 11.4.0.106 on NVIDIA L4 (compute capability 8.9, driver 570.86)",
        "GPU under load: power state P0, SM clock 2040 of 2040 MHz, memory clock 6251 MHz, 70.12 of 72.00 W, 61 C",
        "inference without CUDA graph, no copies to or from GPU   40.000   42.000   43.000   44.000   41.000   200",
        "copy of inputs to GPU, 12.2 MB",
        "throughput of consecutive inferences: 97.6 images/s, 100.0 images/s with a CUDA graph",
        "weights 908.0 MB, scratch 250.0 MB, inputs and outputs 68.2 MB; loading the plan used 1,300.0 MB",
        "100.0 TFLOP/s (8192^3 fp16 matrix multiplication), 250 GB/s (copy on the GPU)",
        "latency of 39.000 ms, the plan reaches 50% of the peak compute rate and 50% of the peak memory bandwidth",
        "the 3 layers of the plan together take 4.000 ms per inference with the profiler attached",
        "is known for 2 of the 3 layers",
        "2.2500  56.2%       0  attention       trunk.blocks.0.attn",
        "1.0000  25.0%       ?  ?               reformat",
    ):
        assert part in text, text
    assert max(map(len, profile_lines(PROFILE))) <= 120
    assert "reformat" not in "\n".join(profile_lines(PROFILE, layers=1))


def test_what_is_not_known_is_said() -> None:
    changes: dict[str, Any] = {"state": None, "graph_latency": None, "weights_bytes": None, "layers": ()}
    unknown = dataclasses.replace(PROFILE, **changes, operations=None, bytes_moved=None, graph_problem="not capturable")
    text = "\n".join(profile_lines(unknown))
    for part in (
        "clocks and the power",
        "no CUDA graph: not capturable",
        "weights unknown",
        "unknown share of the peak compute rate and an unknown share of the peak memory bandwidth",
        "the 0 layers of the plan together take 0.000 ms",
    ):
        assert part in text, text
    partly = dataclasses.replace(PROFILE, state=STATE_HERE | {"power_w": None})
    assert "? of 72.00 W" in profile_lines(partly)[1]


def test_a_plan_that_cannot_run_here_gets_no_figures(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="no NVIDIA GPU"):
        profile_plan(write_plan(tmp_path), flavor=fake(gpu=None))
    with pytest.raises(SessionError, match="No such file"):
        profile_plan(tmp_path / "none.plan", flavor=fake(gpu=L4))


@pytest.mark.gpu
def test_a_real_plan_is_profiled(tmp_path: Path, gpu_flavor: Flavor) -> None:
    steps: list[str] = []
    plan = build_convolution(tmp_path, gpu_flavor)
    profile = profile_plan(plan, flavor=gpu_flavor, runs=20, seconds=2, report=steps.append)
    assert (profile.batch, profile.precision) == (2, "fp32")
    for latency in (profile.latency, profile.copy_in, profile.copy_out):
        assert 0 < latency.min_ms <= latency.p50_ms <= latency.p99_ms <= latency.max_ms
    assert profile.graph_latency or profile.graph_problem
    assert profile.bytes_in == 2 * 3 * 8 * 8 * 4
    assert profile.peak_tflops > 1
    assert profile.peak_gigabytes_per_s > 10
    assert profile.layers
    assert np.isfinite(sum(layer.ms for layer in profile.layers))
    assert LAYER_RUNS > 1
    assert gpu_flavor.gpu is not None
    assert gpu_flavor.gpu.name in "\n".join(profile_lines(profile))
    json.dumps(profile.to_dict(), allow_nan=False)
    assert steps[0] == "latency"
    assert profile.starts.cold and not profile.starts.cold.warm, profile.starts.problem
    assert (profile.starts.warm is not None) == (gpu_flavor.name == "rtx")
    with pytest.raises(ProfilingError, match="accepts a batch size of 1 to 3, but 7 was requested"):
        profile_plan(plan, batch=7, flavor=gpu_flavor)
