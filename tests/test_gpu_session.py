"""`make gpu`: the plan of time, what ends a stage that hangs, what a second call does, the page; and the rehearsal."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from fake_gpu.play import environment
from gpu_rehearsal import Base, can_unshare, make_base, run_session
from synthetic import synthetic_result

import benchmarks.gpu.archive
import benchmarks.gpu.session
from benchmarks.gpu.archive import archive_path, unpack_archive, write_archive
from benchmarks.gpu.gpu_tests import checks, files_with_gpu_tests, run_tests
from benchmarks.gpu.page import MOST_LINES, page_lines
from benchmarks.gpu.session import RESERVE_BYTES, Session
from benchmarks.gpu.stage import Asked
from benchmarks.gpu.start import install
from benchmarks.gpu.time_plan import INSTALL_MINUTES, MINUTES, REPORT, fitting, plan, table, time_limit, total_minutes
from benchmarks.measure.backends import backends_for
from benchmarks.results.result_files import check_result, read_result

ROOT = Path(__file__).parent.parent
STAGES = [one.name for one in plan("cuda")]


def test_the_plan_of_time_fits() -> None:
    total = total_minutes()
    assert round(total, 6) <= MINUTES == 9
    assert all(one.minutes <= one.most for one in plan("cuda"))
    assert table()[-1].split()[1] == f"{total:.1f}"
    drops = [one.drop for one in plan("cuda") if one.drop is not None]
    assert len(set(drops)) == len(drops)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_backend_of_the_plan_is_one(device: Any) -> None:
    assert {name for one in plan(device) for name in one.backends} <= {one.id for one in backends_for(device)}


def test_where_time_is_short_the_least_wanted_is_left_out() -> None:
    assert fitting(plan("cuda"), 9.0) == list(plan("cuda"))
    assert [one.name for one in fitting(plan("cuda"), 8.1)] == [name for name in STAGES if name != "tuned"]
    assert [one.name for one in fitting(plan("cuda"), 0.0)] == ["doctor", "weights", "eager", "report"]


def test_the_order_of_what_is_wanted() -> None:
    """What only a GPU can show, and the report, before what takes longest."""
    first = ["doctor", "cpp", "session", "weights", "eager", "compiled", "rates", "report"]
    assert [*first, "points", "plain", "tuned", "tests"] == STAGES
    assert next(one.most for one in plan("cuda") if one.name == "doctor") <= 2.0
    assert next(one.backends for one in plan("cuda") if one.name == "compiled") == ("compile-rewritten-fp16",)


def test_the_reports_time_is_kept_for_it() -> None:
    eager = next(one for one in plan("cuda") if one.name == "eager")
    assert time_limit(eager, 1e9) == 60 * eager.most
    assert time_limit(eager, 100.0) == 100.0 - 60 * REPORT.most
    assert time_limit(eager, 1e9, 2.0) == 120 * eager.most
    assert time_limit(eager, 10.0) == 0.0 and time_limit(REPORT, 10.0) == 10.0


LIMITED = """
import subprocess, sys
from pathlib import Path
import psutil
from benchmarks.gpu.child_process import adopt_orphans, run_limited
adopt_orphans()
code = "import os, subprocess, sys, time\\n"
code += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\\n"
code += "print('begun', flush=True)\\n" + sys.argv[2]
print(run_limited([sys.executable, "-c", code], float(sys.argv[3]), Path(sys.argv[1]), {}))
print(len(psutil.Process().children(recursive=True)))
"""


@pytest.mark.parametrize(
    ("code", "seconds", "told"),
    [
        ("time.sleep(600)", "2", "stopped after 2 s, because the time limit was reached"),
        ("os.kill(os.getpid(), 9)", "60", "stopped by the signal SIGKILL"),
        ("raise MemoryError('planted')", "60", "failed with exit status 1: MemoryError: planted"),
        ("sys.exit(0)", "60", "None"),
    ],
)
def test_a_stage_is_ended_with_all_that_it_started(code: str, seconds: str, told: str, tmp_path: Path) -> None:
    """In a process of its own, since it ends all that descends from it."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "log"), code, seconds]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines() == [told, "0"], ran.stderr


def test_a_stage_may_print_where_the_disk_is_full(tmp_path: Path) -> None:
    """Its log is a device that is always full."""
    command = [sys.executable, "-c", LIMITED, "/dev/full", "print('last words', flush=True); sys.exit(5)", "60"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.stdout.splitlines() == ["failed with exit status 5: last words", "0"], ran.stderr


def test_what_a_full_disk_cut_is_as_if_it_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "points.json").touch()
    asked = Asked(tmp_path, "cpu", 0.0, None)
    assert asked.found("points") == asked.found("weights") == {}
    (tmp_path / "stages" / "points.json").write_text('{"fastest": "eager-fp16"}', encoding="utf-8")
    assert asked.found("points") == {"fastest": "eager-fp16"}


class Stages:
    """Stages that only say what became of them; each takes the minutes that are expected, of a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.become: dict[str, dict[str, Any] | str] = {}
        self.clock = 0.0
        monkeypatch.setattr(benchmarks.gpu.session, "time", self)
        monkeypatch.setattr(benchmarks.gpu.session, "run_limited", self.run)
        monkeypatch.setattr(benchmarks.gpu.session, "adopt_orphans", lambda: None)

    def time(self) -> float:
        return self.clock

    monotonic = time

    def run(self, command: list[str], seconds: float, log: Path, environment: object) -> str | None:
        name = command[3]
        self.ran.append(name)
        assert 0 < float(command[command.index("--ends") + 1]) - self.clock < seconds
        expected = 60 * next(one.minutes for one in plan("cuda") if one.name == name)
        assert expected <= seconds + 1e-6
        self.clock += expected
        became = self.become.get(name, {"outcome": "done", "reason": None})
        if isinstance(became, str):
            return became
        log.with_suffix(".json").write_text(json.dumps(became), encoding="utf-8")
        return None


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def session(folder: Path, minutes: float = MINUTES - INSTALL_MINUTES, wheel: str = "0") -> Session:
    """One whose time begins now."""
    (folder / "stages").mkdir(exist_ok=True)
    clock = benchmarks.gpu.session.time.time()
    return Session(folder, "cuda", clock + 60 * minutes, None, wheel)


def test_a_session_runs_every_stage(stages: Stages, tmp_path: Path) -> None:
    assert session(tmp_path).run() == 0
    assert stages.ran == [*STAGES, "report"]
    assert (tmp_path / "page.txt").read_text().splitlines()[1] == "No backend was measured, so there are no results."
    assert not (tmp_path / ".reserve").exists()


def test_a_stage_that_hangs_costs_itself_and_the_exit_code(stages: Stages, tmp_path: Path) -> None:
    stages.become = {
        "eager": "after 180 s",
        "tuned": {"outcome": "unavailable", "reason": "-"},
    }
    assert session(tmp_path).run() == 1
    assert stages.ran == [*STAGES, "report"]
    page = (tmp_path / "page.txt").read_text()
    assert "eager failed: after 180 s" in page and "tuned unavailable" in page


def test_a_second_call_goes_on(stages: Stages, tmp_path: Path) -> None:
    stages.become = {
        "compiled": {"outcome": "unfinished", "reason": "no time for compile-rewritten-fp16"},
        "tuned": "stopped by SIGKILL",
    }
    assert session(tmp_path).run() == 1
    stages.ran, stages.become = [], {}
    assert session(tmp_path).run() == 0
    assert stages.ran == ["doctor", "compiled", "report", "tuned", "report"]
    stages.ran = []
    assert session(tmp_path, wheel="1").run() == 0 and stages.ran == [
        *STAGES,
        "report",
    ]  # the control: another kit begins anew


def test_an_archive_lets_another_machine_go_on(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has what the second call and the report need, and no more than 16 MiB."""
    first, second = tmp_path / "a" / "gpu", tmp_path / "b" / "gpu"
    for folder in (first, second):
        folder.mkdir(parents=True)
    stages.become = {"tuned": "stopped by SIGKILL"}
    (first / "work" / "x" / "run-1").mkdir(parents=True)
    (first / "work" / "x" / "run-1" / "samples.jsonl").write_text("{}\n")
    (first / "work" / "x" / "weights.safetensors").write_bytes(bytes(1 << 20))
    (first / "report.json").write_text("{}")
    assert session(first).run() == 1
    with tarfile.open(archive_path(first)) as archive:
        names = set(archive.getnames())
    assert {"session.json", "page.txt", "report.json", "work/x/run-1/samples.jsonl", "stages/eager.json"} <= names
    assert not any("weights" in name and "stages" not in name for name in names)
    archive_path(first).rename(archive_path(second))
    assert unpack_archive(second) and not unpack_archive(second)  # not over a session that is there
    stages.ran, stages.become = [], {}
    assert session(second).run() == 0
    assert stages.ran == ["doctor", "tuned", "report"]
    assert (second / "work" / "x" / "run-1" / "samples.jsonl").read_text() == "{}\n"
    noise = os.urandom(3 << 20)
    monkeypatch.setattr(benchmarks.gpu.archive, "MOST_BYTES", 1 << 20)
    (second / "report.html").write_bytes(noise)
    path, left_out = write_archive(second)
    assert left_out == ["report.html"] and path.stat().st_size < 1 << 20


def test_an_archive_of_others_writes_nothing_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    with tarfile.open(archive_path(tmp_path / "gpu"), "w:gz") as archive:
        for name in ("../session.json", "/tmp/session.json", "site/evil.py", "stages/../../page.txt", "page.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("report.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert unpack_archive(tmp_path / "gpu")
    assert [path.name for path in (tmp_path / "gpu").rglob("*")] == ["page.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu", "gpu.tar.gz"]


def test_what_there_is_no_time_for_is_said(stages: Stages, tmp_path: Path) -> None:
    assert session(tmp_path, minutes=4.0).run() == 1
    assert stages.ran == ["doctor", "session", "weights", "eager", "rates", "report"]
    told = json.loads((tmp_path / "session.json").read_text())["stages"]
    assert told["tuned"]["outcome"] == "left out" and "run the command again" in told["tuned"]["reason"]
    stages.ran = []
    assert session(tmp_path, minutes=-1.0).run() == 1
    assert stages.ran == []


def test_where_nothing_can_be_measured_one_line_says_so(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages.become = {"doctor": {"fatal": "no NVIDIA driver here"}}
    assert session(tmp_path).run() == 1
    assert stages.ran == ["doctor"] and capsys.readouterr().err == "error: no NVIDIA driver here\n"
    stages.become = {}
    assert session(tmp_path).run() == 0  # on a machine that has one


def test_a_full_disk_keeps_no_stage_from_running(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    one = session(tmp_path)
    stages.become = dict.fromkeys(STAGES, "failed with exit status 1: OSError: No space left on device")
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert one.run() == 1 and stages.ran == [*STAGES, "report"]


DOCTOR: dict[str, Any] = {
    "environment": {"gpu": {"name": "GPU", "driver": "1"}, "versions": {"torch": "2"}, "python": "3.12"},
    "warning": "use this GPU",
}


RATES = {"rates": {"flops_per_s": {"fp32": 5e13}, "copy_bytes_per_s": 3e12}}


def test_the_page_has_twenty_lines_at_most() -> None:
    result = synthetic_result(gpu=True)
    result["checks"] = [{"name": str(index), "outcome": "passed", "reason": None} for index in range(5)]
    check_result(result, "the result")
    stages = {name: {"outcome": "failed", "reason": "x" * 500, "seconds": 1.0} for name in STAGES}
    lines = page_lines(stages, result, DOCTOR, RATES)
    assert len(lines) == MOST_LINES and max(map(len, lines)) <= 300
    assert lines[0].startswith("GPU, driver 1") and lines[2] == "Warning: use this GPU"
    assert "the fastest backend within tolerance" in lines[3] and "5 passed, 0 failed" in "\n".join(lines)
    assert "more stages are not done" in lines[-1]


LACKING = ("tensorrt", "tensorrt_rtx", "tritonclient", "tritonclient.http", "openvino", "kubernetes_validate")
"""Modules that a bare machine with a GPU does not have, and the kit does not bring."""


@pytest.mark.slow
def test_a_bare_machine_with_a_gpu_fails_no_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is the fake's, and there is no TensorRT: what cannot be run is skipped, with its reason."""
    for name, value in environment("11.4", LACKING).items():
        monkeypatch.setenv(name, value)
    found = run_tests(tmp_path / "tests.txt", files_with_gpu_tests())
    outcomes = {one["name"]: (one["outcome"], one["reason"]) for one in checks(tmp_path / "tests.txt")}
    assert found["outcome"] == "done", (tmp_path / "tests.txt").read_text()[-5000:]
    assert {outcome for outcome, _ in outcomes.values()} <= {"passed", "not run"} and len(outcomes) >= 16
    without = [reason for outcome, reason in outcomes.values() if outcome == "not run"]
    assert sum("TensorRT" in str(reason) for reason in without) >= 10


PRINTED = """
tests/test_session.py::test_a[True] PASSED                    [ 10%]
tests/test_session.py::test_b SKIPPED (needs a GPU (a real one))      [ 20%]
tests/test_tune.py::test_c FAILED                             [ 30%]
tests/test_cpp_real.py::test_d
=== ERRORS
ERROR tests/test_server.py - ModuleNotFoundError: No module named 'yaml'
"""


def test_tests_that_ended_count(tmp_path: Path) -> None:
    (tmp_path / "tests.txt").write_text(PRINTED, encoding="utf-8")
    found = {one["name"]: (one["outcome"], one["reason"]) for one in checks(tmp_path / "tests.txt")}
    assert found == {
        "tests/test_session.py::test_a[True]": ("passed", None),
        "tests/test_session.py::test_b": ("not run", "needs a GPU (a real one)"),
        "tests/test_tune.py::test_c": ("failed", None),
        "tests/test_server.py": ("failed", "ModuleNotFoundError: No module named 'yaml'"),
    }
    assert checks(tmp_path / "nowhere") == []
    assert "tests/test_session.py" in files_with_gpu_tests() and "tests/test_position.py" not in files_with_gpu_tests()


FAULT = """
import sys
if "benchmarks.measure.worker" in sys.orig_argv:
    import importlib.abc, importlib.machinery, os, subprocess, time
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "benchmarks.measure.torch_runner":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                load = module.TorchRunner.load
                def broken(runner):
                    if runner.job.backend.id == "eager-bf16":
                        subprocess.Popen(["sleep", "86399"], start_new_session=True)
                        time.sleep(86399)
                    if runner.job.backend.id == "eager-fp16":
                        os.kill(os.getpid(), 9)
                    if runner.job.backend.id == "eager-rewritten-fp16":
                        bytearray(1 << 60)
                    return load(runner)
                module.TorchRunner.load = broken
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())
"""
"""One backend hangs, with a child in a session of its own, one is killed, one is out of memory."""

SPARE_BYTES = 1 << 20
"""Of a disk that fills: the main point's outputs take half of it, those of a batch of 8 more than all."""

bare_machine = pytest.mark.skipif(not can_unshare(), reason="needs `unshare` and leave to make namespaces")


@dataclasses.dataclass(frozen=True)
class Bare:
    """A bare machine's Python, its kit, and the tiny encoder."""

    base: Base
    kit: Path
    config: Path

    def run(self, output: Path, minutes: float = 27.0, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a session; prints what it said, for a reader of a rehearsal."""
        told = ["--config", str(self.config), "--minutes", str(minutes)]
        ran = run_session(self.base, self.kit, output, *told, **options)
        print(ran.stdout, ran.stderr, f"exit code {ran.returncode}", sep="\n")
        return ran


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bare]:
    folder = tmp_path_factory.mktemp("bare")
    base = make_base(folder)
    command = [sys.executable, "-m", "benchmarks.gpu.kit", "--output", str(folder / "kit"), "--there", str(base.there)]
    subprocess.run(command, cwd=ROOT, check=True)
    config = tiny_config(depth=2, global_blocks=(1,))
    (folder / "encoder.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    yield Bare(base, folder / "kit", folder / "encoder.json")


UNAVAILABLE = ("cpp", "session", "plain", "tuned", "tests")
OUTCOMES = ["unavailable" if name in UNAVAILABLE else "done" for name in STAGES]
"""On a CPU."""


@bare_machine
@pytest.mark.slow
def test_rehearsal(bare: Bare, tmp_path: Path) -> None:
    """Without network, on the kit and this Python alone: every stage is done or says why not; so does a second call."""
    ran = bare.run(tmp_path / "out")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    stages = json.loads((tmp_path / "out" / "session.json").read_text())["stages"]
    assert [stages[name]["outcome"] for name in STAGES] == OUTCOMES
    assert "no NVIDIA GPU" in stages["tuned"]["reason"]
    result = read_result(tmp_path / "out" / "report.json")
    rows = {row["backend"]: row["status"] for row in result["rows"] if row["sweep"] is None}
    assert set(rows.values()) == {"measured", "unavailable"} and rows["compile-rewritten-fp32"] == "measured"
    assert {row["batch"] for row in result["rows"] if row["sweep"] == "batch" and row["status"] == "measured"} == {4, 8}
    assert len((tmp_path / "out" / "page.txt").read_text().splitlines()) <= MOST_LINES
    assert {one["outcome"] for one in result["checks"]} == {"not run"}
    again = bare.run(tmp_path / "out")
    assert again.returncode == 0 and again.stdout.count(" (at most ") == 2  # doctor, report


@bare_machine
@pytest.mark.slow
def test_rehearsal_with_backends_that_hang_die_and_run_out_of_memory(bare: Bare, tmp_path: Path) -> None:
    ran = bare.run(tmp_path / "out", fault=FAULT)
    assert ran.returncode == 1
    result = read_result(tmp_path / "out" / "report.json")
    rows = {row["backend"]: row for row in result["rows"] if row["sweep"] is None}
    assert (
        "its step `load` took longer than" in rows["eager-bf16"]["reason"] and "SIGKILL" in rows["eager-fp16"]["reason"]
    )
    assert "out of memory" in rows["eager-rewritten-fp16"]["reason"]
    for name in ("eager-fp32", "eager-rewritten-fp32", "eager-rewritten-bf16"):
        assert rows[name]["status"] == "measured"
    left = subprocess.run(["pgrep", "-f", "^sleep 86399"], capture_output=True, text=True)
    assert left.stdout == ""  # neither of the hanging backend's processes
    page = (tmp_path / "out" / "page.txt").read_text()
    assert "eager failed" in page and "eager-fp16: killed" in page  # eager-bf16 is late, which is no failure


@bare_machine
@pytest.mark.slow
def test_rehearsal_on_a_disk_that_fills(bare: Bare, tmp_path: Path) -> None:
    """The disk holds the environment, the reserve, and not all outputs: what was measured before is in the report."""
    site = install(bare.kit, tmp_path / "measured")
    held = sum(-(-path.stat().st_size // 4096) * 4096 for path in site.rglob("*")) + RESERVE_BYTES
    ran = bare.run(tmp_path / "out", disk=held + SPARE_BYTES)
    assert ran.returncode == 1 and "No space left on device" in ran.stdout
    kept = tmp_path / "out.kept"
    assert (kept / "page.txt").read_text().count("No space left") >= 1
    rows = read_result(kept / "report.json")["rows"]
    assert any(row["status"] == "measured" for row in rows) and any(row["status"] == "failed" for row in rows)
