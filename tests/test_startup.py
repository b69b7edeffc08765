"""Cold and warm starts as `profile` times them; TensorRT is a fake, and no figure is judged."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exporting import neck_export_cli
from fake_gpu.play import play
from test_profiling import PROFILE
from test_session import build_convolution

from engines.builder.flavor import choose_flavor
from engines.run import startup
from engines.run.latency import Start, Starts, profile_lines
from engines.run.startup import start_process, time_start, time_starts


@pytest.mark.parametrize(("version", "name"), [("rtx-1.7", "rtx"), ("11.4", "tensorrt")])
def test_a_cold_start_and_a_warm_one(tmp_path: Path, version: str, name: str) -> None:
    with play(version) as state:
        plan = build_convolution(tmp_path, choose_flavor())
        starts = time_starts(plan, 2, name, time_start)
        assert starts.cold and not starts.cold.warm and starts.problem is None
        assert min(dataclasses.astuple(starts.cold)[1:]) > 0
        assert state.compiled == ([2] if name == "rtx" else [])
        assert (starts.warm is None) == (name == "tensorrt") and (starts.warm is None or starts.warm.warm)
        state.faults.foreign_kernels = True
        again = time_starts(plan, 2, name, time_start)
        assert again.cold and not (again.warm and again.warm.warm)  # the control: kernels that are refused
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sum.onnx", "sum.plan", "sum.plan.json"]


def test_the_profile_has_both(tmp_path: Path) -> None:
    with play("rtx-1.7"):
        plan = build_convolution(tmp_path, choose_flavor())
        told = json.loads(neck_export_cli("profile", plan, "--json").out)["starts"]
        assert told["cold"]["warm"] is False and told["warm"]["warm"] is True and told["problem"] is None
        assert set(told["cold"]) == {"warm", "load_s", "first_run_s", "second_run_s"}


def run_here(command: Sequence[str], **options: Any) -> SimpleNamespace:
    """What a Python process would do, in this one, which has torch already."""
    assert command[:3] == [sys.executable, "-m", startup.__name__]
    out, code, error = io.StringIO(), 0, ""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", list(command[2:]))
        try:
            startup.main()
        except SystemExit as left:
            code, error = 1, str(left)
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=f"a warning\n{error}\n")


def test_a_start_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", run_here)
    with play("rtx-1.7") as state:
        plan = build_convolution(tmp_path, choose_flavor())
        starts = time_starts(plan, 1, "rtx", start_process)
        assert starts.cold and starts.warm and starts.warm.warm
        state.faults.run = "Error Code 1: Cuda Runtime (launch failed)"
        problem = time_starts(plan, 1, "rtx", start_process).problem
        assert problem and problem.startswith(
            f"{plan}: starting the engine failed: {plan}: the run failed (Error Code 1"
        )

    def hangs(command: Sequence[str], timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert "than 600 s" in str(time_starts(plan, 1, "rtx", start_process).problem)


def test_starts_for_a_screen() -> None:
    starts = Starts(Start(False, 2.5, 11.25, 0.0405), Start(True, 2.25, 0.5, 0.0395))
    text = "\n".join(profile_lines(dataclasses.replace(PROFILE, starts=starts)))
    assert "cold start: loading 2.50 s, first run 11.25 s, second run 0.041 s" in text
    assert (
        "warm start, with the kernels that the cold start compiled: loading 2.25 s, first run 0.50 s, "
        "second run 0.040 s"
    ) in text
    assert "start" not in "\n".join(profile_lines(PROFILE))
    failed = dataclasses.replace(PROFILE, starts=Starts(problem="x.plan: starting the engine failed: out of memory"))
    assert "the startup time could not be measured: x.plan: starting the engine failed: out of memory" in profile_lines(
        failed
    )
