"""neck-engine with TensorRT-RTX: CUDA graphs, the cache of compiled kernels, warm starts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpp_build import (
    PLAN,
    RTX,
    Programs,
    settings,
    why_missing,
    write_plan,
    write_reference,
)

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def run_rtx(programs: Programs, folder: Path, lines: bytes = b"", fail: str = "") -> Any:
    """Runs a TensorRT-RTX plan by a CUDA graph."""
    plan, reference = write_plan(folder, b"vtrt " + PLAN + lines, **RTX), write_reference(folder)
    environment = {"STAND_IN_VERSION": "1.7.1.116", "STAND_IN_FAIL": fail}
    return programs.run("neck-engine-rtx", plan, "--graph", "--compare", reference, "--runs", 1, **environment)


def test_a_graph_of_an_rtx_plan_holds_its_specialised_kernels(programs: Programs, tmp_path: Path) -> None:
    """The fake aborts where a graph is captured while kernels are still compiled in the background."""
    ran = run_rtx(programs, tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert "inference with CUDA graph, batch 2" in ran.out
    *_, error = run_rtx(programs, tmp_path, fail="createRuntimeConfig").err.splitlines()  # after a note on the cache
    assert "no execution context can be created (Error Code 2: OutOfMemory (runtime config))" in error


def test_an_rtx_plan_that_cannot_be_captured_is_told_before(programs: Programs, tmp_path: Path) -> None:
    ran = run_rtx(programs, tmp_path, b"allocates\n")
    assert ran.code == 1
    wanted = (
        "TensorRT-RTX reports that no CUDA graph of this plan can be captured; run the plan without a CUDA graph "
        "(leave out --graph, or set EngineOptions::cuda_graph to false)"
    )
    assert ran.error == f"{tmp_path / 'x.plan'}: {wanted}"


def start_rtx(programs: Programs, plan: Path, *options: Any, **environment: str) -> Any:
    """Times the start of a TensorRT-RTX plan."""
    environment = {"STAND_IN_VERSION": "1.7.1.116", **environment}
    return programs.run("neck-engine-rtx", plan, "--startup", "--batch", 2, *options, **environment)


COMPILED = "fake: compiles kernels of batch 2\n"


@pytest.mark.parametrize("options", [[], ["--graph"], ["--rtx-graph"]])
def test_kernels_of_an_earlier_start_are_used(programs: Programs, tmp_path: Path, options: list[str]) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    cold = start_rtx(programs, plan, *options)
    assert (cold.code, cold.err) == (0, "")
    assert "on NVIDIA L4 (compute capability 8.9); cold start\n" in cold.out
    assert COMPILED in cold.out
    assert [line.split("  ")[0] for line in cold.out.splitlines() if line.endswith(" ms")] == [
        "loading",
        "first run, batch 2",
        "second run",
    ]
    warm = start_rtx(programs, plan, *options)
    assert "; warm start with kernels from the runtime cache\n" in warm.out
    assert COMPILED not in warm.out
    other = start_rtx(programs, plan, *options, "--batch", 4)
    assert "fake: compiles kernels of batch 4\n" in other.out
    assert "compiles" not in start_rtx(programs, plan, *options, "--batch", 4).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


CACHES: list[tuple[str, Callable[[Path], object], dict[str, str], str]] = [
    ("damaged", lambda cache: cache.write_bytes(cache.read_bytes()[:-1]), {}, "the runtime cache is damaged"),
    (
        "changed",
        lambda cache: cache.write_bytes(cache.read_bytes().replace(b"batch 2", b"batch 3")),
        {},
        "the runtime cache is damaged",
    ),
    ("empty", lambda cache: cache.write_bytes(b""), {}, "the file is not a runtime cache"),
    ("another file", lambda cache: cache.write_bytes(b"\0" * 999), {}, "the file is not a runtime cache"),
    (
        "a folder",
        lambda cache: (cache.unlink(), cache.mkdir()),
        {},
        "cannot be read (Is a directory)",
    ),
    ("another driver", lambda cache: None, {"STAND_IN_DRIVER": "12080"}, "driver for CUDA 13.0, plan "),
    ("another RTX", lambda cache: None, {"STAND_IN_VERSION": "1.7.2.9"}, "is for TensorRT-RTX 1.7.1.116 on NVIDIA L4"),
    ("refused", lambda cache: None, {"STAND_IN_FAIL": "deserialize"}, "TensorRT-RTX rejected the runtime cache"),
]


@pytest.mark.parametrize(("name", "change", "environment", "message"), CACHES, ids=[case[0] for case in CACHES])
def test_a_damaged_or_foreign_cache_is_dropped_with_one_line(
    programs: Programs,
    tmp_path: Path,
    name: str,
    change: Callable[[Path], object],
    environment: dict[str, str],
    message: str,
) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    start_rtx(programs, plan)
    change(plan.with_name("x.plan.cache"))
    ran = start_rtx(programs, plan, **environment)
    assert (ran.code, "; cold start\n" in ran.out) == (0, True)
    line, *more = ran.err.splitlines()
    assert message in line
    assert line.endswith("; the kernels are compiled again")
    assert len(more) == (1 if name == "a folder" else 0)  # and it cannot be written
    if name not in ("a folder", "refused"):
        assert "; warm start" in start_rtx(programs, plan, **environment).out  # written anew


def test_a_cache_of_another_plan_is_dropped(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    start_rtx(programs, plan)
    write_plan(tmp_path, b"vtrt " + PLAN + b"scratch 2000\n", **RTX)
    assert "; the kernels are compiled again" in start_rtx(programs, plan).err


def test_a_cache_that_cannot_be_written_is_told_once(programs: Programs, tmp_path: Path) -> None:
    """A folder in its place stands for a folder that is read-only: root may write to those."""
    plan = write_plan(tmp_path / "plans", b"vtrt " + PLAN, **RTX)
    plan.with_name("x.plan.cache").mkdir()
    ran = start_rtx(programs, plan)
    assert ran.code == 0
    wanted = (
        f"{plan}.cache: the runtime cache cannot be written (Is a directory); the next start compiles the kernels again"
    )
    assert ran.err.splitlines()[-1] == f"neck-engine: {wanted}"
    assert sorted(path.name for path in plan.parent.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


def test_two_starts_at_once_leave_one_whole_cache(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    command = [programs.path("neck-engine-rtx"), plan, "--startup", "--batch"]
    environment = settings({"STAND_IN_VERSION": "1.7.1.116"})
    started = [
        subprocess.Popen([*command, str(batch)], env=environment, stdout=subprocess.DEVNULL) for batch in (1, 2, 3, 4)
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0, 0]
    assert "; warm start" in start_rtx(programs, plan).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


def test_rtx_graphs_are_for_rtx_alone(programs: Programs, tmp_path: Path) -> None:
    ran = programs.run("neck-engine", write_plan(tmp_path), "--rtx-graph")
    assert "--rtx-graph (in C++: EngineOptions::rtx_graphs) needs TensorRT-RTX" in ran.error
    plan = write_plan(tmp_path / "rtx", b"vtrt " + PLAN, **RTX)
    assert (
        "--rtx-graph (in C++: EngineOptions::rtx_graphs) cannot be combined with --graph"
        in start_rtx(programs, plan, "--rtx-graph", "--graph").error
    )
    ran = start_rtx(programs, plan, "--rtx-graph", STAND_IN_FAIL="setCudaGraphStrategy")
    assert "no execution context can be created" in ran.error
