"""TensorRT-RTX's compiled kernels in a file: written once, read back, damaged, foreign, not writable, two at once."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu.device import Device
from fake_gpu.play import play
from fake_gpu.state import State
from test_session import build_convolution

from engines.builder.flavor import Flavor, choose_flavor
from engines.run import runtime_cache
from engines.run.inputs import SessionError
from engines.run.loaded_plan import cache_key
from engines.run.open_plan import open_plan
from engines.run.runtime_cache import RuntimeCache
from export.contract.manifest import manifest_path, read_manifest

KEY = "TensorRT-RTX 1.7.1.116 on NVIDIA L4 (compute capability 8.9), driver for CUDA 13.0, plan with SHA-256 abc"


def start(plan: Path, *batches: int, **options: Any) -> tuple[bool, list[str]]:
    """Opens a plan, runs batches; whether it found kernels, and what was warned of."""
    with open_plan(plan, **options) as session:
        for batch in batches:
            found = session.infer({"image": np.ones((batch, 3, 8, 8), np.float32)})["sum"]
            assert (found == 3).all()
        return session.warm, list(session.warnings)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".onnx")


WHOLE = ["sum.plan", "sum.plan.cache", "sum.plan.json"]


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"rtx_graphs": True}])
def test_kernels_of_an_earlier_start_are_used(tmp_path: Path, options: dict[str, bool]) -> None:
    with play("rtx-1.7") as state:
        plan = build_convolution(tmp_path, choose_flavor())
        assert start(plan, 2, **options) == (False, []) and state.compiled == [2]
        kept = plan.with_name("sum.plan.cache").stat()
        assert start(plan, 2, 2, **options) == (True, []) and state.compiled == [2]
        again = plan.with_name("sum.plan.cache").stat()
        assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)  # written once
        assert start(plan, 3, 2, **options) == (True, []) and state.compiled == [2, 3]
        assert start(plan, 3, 2, **options) == (True, []) and state.compiled == [2, 3]
        assert names(tmp_path) == WHOLE
        strategies = {context._config.cuda_graph_strategy.name for context in state.contexts}
        assert strategies == {"WHOLE_GRAPH_CAPTURE" if "rtx_graphs" in options else "DISABLED"}


def test_it_can_lie_elsewhere_or_nowhere(tmp_path: Path) -> None:
    with play("rtx-1.7") as state:
        plan = build_convolution(tmp_path, choose_flavor())
        assert start(plan, 1, use_runtime_cache=False) == (False, [])
        assert names(tmp_path) == ["sum.plan", "sum.plan.json"]
        elsewhere = tmp_path / "caches" / "mine"
        start(plan, 1, runtime_cache=elsewhere)
        assert start(plan, 1, runtime_cache=elsewhere) == (True, []) and state.compiled == [1, 1]
        assert names(tmp_path) == ["caches", "sum.plan", "sum.plan.json"]


def test_the_file_is_what_the_cpp_library_writes(tmp_path: Path) -> None:
    """Key and format word for word (`plan/runtime_cache.cpp`, `engine/engine.cpp`); test_cpp_cache.py runs both."""
    with play("rtx-1.7"):
        flavor = choose_flavor()
        plan = build_convolution(tmp_path, flavor)
        start(plan, 2)
        manifest = read_manifest(manifest_path(plan), "plan")
        key = cache_key(manifest, plan, flavor)
    here = hashlib.sha256(plan.read_bytes()).hexdigest()
    gpu = "NVIDIA L4 (compute capability 8.9)"
    assert key == f"TensorRT-RTX 1.7.1.116 on {gpu}, driver for CUDA 13.0, plan with SHA-256 {here}"
    content = b"[2]"
    lines = [b"neck-export runtime cache 1", key.encode(), hashlib.sha256(content).hexdigest().encode(), content]
    assert plan.with_name("sum.plan.cache").read_bytes() == b"\n".join(lines)


def other_plan(plan: Path, state: State) -> None:
    build_convolution(plan.parent, choose_flavor())  # the played builder numbers its builds


def break_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path, State], object]:
    def act(plan: Path, state: State) -> None:
        cache = plan.with_name("sum.plan.cache")
        cache.write_bytes(change(cache.read_bytes()))

    return act


def make_pipe(plan: Path, state: State) -> None:
    plan.with_name("sum.plan.cache").unlink()
    os.mkfifo(plan.with_name("sum.plan.cache"))


CACHES: list[tuple[str, Callable[[Path, State], object], str]] = [
    ("truncated", break_bytes(lambda data: data[:-1]), "is damaged"),
    ("changed", break_bytes(lambda data: data.replace(b"[2]", b"[3]")), "is damaged"),
    ("empty", break_bytes(lambda data: b""), "has an unknown format"),
    ("another file", break_bytes(lambda data: bytes(999)), "has an unknown format"),
    ("no lines", break_bytes(lambda data: data[:40]), "is damaged"),
    ("not text", break_bytes(lambda data: data.replace(b"NVIDIA L4", b"\xff\n\x00")), "is damaged"),
    ("a pipe", make_pipe, r"cannot be read \(Invalid argument\)"),
    (
        "another plan",
        other_plan,
        "belongs to TensorRT-RTX 1.7.1.116 on NVIDIA L4 .*, not to TensorRT-RTX 1.7.1.116 on",
    ),
    (
        "another driver",
        lambda plan, state: setattr(state.device, "cuda", 13020),
        r"driver for CUDA 13\.0, .* driver for CUDA 13\.2, ",
    ),
    ("another GPU", lambda plan, state: setattr(state.device, "name", "NVIDIA L40S"), "not to .*NVIDIA L40S"),
    (
        "refused",
        lambda plan, state: setattr(state.faults, "foreign_kernels", True),
        "TensorRT-RTX refused the runtime cache",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in CACHES], ids=[case[0] for case in CACHES])
def test_a_damaged_or_foreign_cache_is_dropped_with_one_line(
    tmp_path: Path, change: Callable[[Path, State], object], says: str
) -> None:
    with play("rtx-1.7", Device()) as state:
        plan = build_convolution(tmp_path, choose_flavor())
        start(plan, 2)
        assert start(plan, 2)[0]  # the control
        change(plan, state)
        warm, (line,) = start(plan, 2)
        assert not warm and state.compiled == [2, 2]
        assert re.search(says, line)
        assert line.endswith("; the kernels are compiled again") and "\n" not in line
        state.faults.foreign_kernels = False
        assert start(plan, 2) == (True, [])  # written anew


def test_a_cache_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    """A folder in its place stands for a folder that is read-only: root may write to those."""
    with play("rtx-1.7"):
        plan = build_convolution(tmp_path, choose_flavor())
        plan.with_name("sum.plan.cache").mkdir()
        warm, lines = start(plan, 2, 2, 3)
        assert not warm and names(tmp_path) == WHOLE
        assert lines[0].endswith("cannot be read (Is a directory); the kernels are compiled again")
        wanted = "the runtime cache cannot be written (Is a directory); the next start compiles the kernels again"
        assert lines[1:] == [f"{plan}.cache: {wanted}"] * 2  # once for each batch that was compiled


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_file_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(target: Path) -> None:
        raise OSError(number, os.strerror(number), str(target))

    with play("rtx-1.7"):
        plan = build_convolution(tmp_path, choose_flavor())
        monkeypatch.setattr(runtime_cache, "replacing", refuse)
        _, lines = start(plan, 2, 2)
    why = f"the runtime cache cannot be written ({os.strerror(number)})"
    assert lines == [f"{plan}.cache: {why}; the next start compiles the kernels again"]


def write_often(path: str, number: int) -> None:
    cache = RuntimeCache(Path(path), KEY)
    for count in range(20):
        assert cache.write(b"%d of %d " % (count, number) * 4000) is None


def test_two_processes_at_once_leave_one_whole_cache(tmp_path: Path) -> None:
    """Whoever reads meanwhile finds none, or a whole one."""
    path = tmp_path / "x.cache"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(str(path), number)) for number in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        content, why_not = RuntimeCache(path, KEY).read()
        assert why_not is None and (not content or len(set(content.split(b"of"))) < 4)
    assert [writer.exitcode for writer in writers] == [0, 0]
    content, why_not = RuntimeCache(path, KEY).read()
    assert why_not is None and content.startswith(b"19 of ")
    assert [file.name for file in tmp_path.iterdir()] == ["x.cache"]


def test_a_pool_shares_one_cache(tmp_path: Path) -> None:
    with play("rtx-1.7") as state:
        plan = build_convolution(tmp_path, choose_flavor())
        for warm in (False, True):
            with open_plan(plan, contexts=2) as pool, pool.acquire(0) as one, pool.acquire(0) as other:
                assert pool.warm == warm
                for session in (one, other):
                    session.infer({"image": np.ones((1, 3, 8, 8), np.float32)})
        assert state.compiled == [1]


def test_options_that_are_rtxs_alone(tmp_path: Path) -> None:
    with play("11.4"):
        plan = build_convolution(tmp_path, choose_flavor())
        with pytest.raises(
            SessionError, match="rtx_graphs=True requires a TensorRT-RTX plan, but this plan is for TensorRT"
        ):
            open_plan(plan, rtx_graphs=True)
        with pytest.raises(SessionError, match="no kernels at run time, so runtime_cache has no effect"):
            open_plan(plan, runtime_cache=tmp_path / "x")
        assert start(plan, 1) == (False, []) and names(tmp_path) == ["sum.plan", "sum.plan.json"]
    with play("rtx-1.7"):
        plan = build_convolution(tmp_path, choose_flavor())
        with pytest.raises(SessionError, match="rtx_graphs=True cannot be combined with cuda_graph=True"):
            open_plan(plan, rtx_graphs=True, cuda_graph=True)


@pytest.mark.gpu
def test_real_kernels_are_kept(tmp_path: Path, gpu_flavor: Flavor) -> None:
    if gpu_flavor.name != "rtx":
        pytest.skip("needs TensorRT-RTX; TensorRT compiles nothing when it runs")
    plan = build_convolution(tmp_path, gpu_flavor)
    assert start(plan, 2, flavor=gpu_flavor)[0] is False
    assert start(plan, 2, flavor=gpu_flavor) == (True, [])
    for options in ({"rtx_graphs": True}, {"cuda_graph": True}):
        assert start(plan, 2, 2, 3, flavor=gpu_flavor, **options)[0] is True
