"""Ctrl-C and SIGTERM: one line and exit 130 or 143 whenever they come, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from exporting import ROOT, STEP_LINE, checkpoint_of, config_of, listing, neck_export_cli, trace_quickly, without_steps
from interrupting import MOMENTS, Moment

from export.contract.interrupt import PATIENCE_S, take_over_signals
from export.contract.manifest import check_files, read_manifest

CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
LINES = {"SIGINT": "error: interrupted\n", "SIGTERM": "error: terminated\n", "SIGKILL": ""}
HANGS_S = 580
"""A guard: the run takes 10 s on a quiet machine."""


def run_moments(folder: Path, *more: str) -> tuple[Path, dict[str, Any]]:
    """Runs tests/interrupting.py over a folder with an older file and an older plan; its results."""
    work, results = folder / "work", folder / "results"
    for path in (work, results):
        path.mkdir()
    for name in ("x.onnx", "x.plan"):
        (work / name).write_text("old")
    command = [sys.executable, "tests/interrupting.py", str(work), str(results)]
    command += [str(checkpoint_of("meta-dual")), str(config_of("meta-dual")), *more]
    color = {**os.environ, "FORCE_COLOR": "1"}  # which a file on stderr does not get
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, check=False, env=color)
    assert done.returncode == 0, done.stderr
    for name, told in (("whole.1", done.stdout), ("whole.2", done.stderr)):
        (results / name).write_text(told)
    return results, json.loads((results / "found.json").read_text())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What every moment came to."""
    return run_moments(tmp_path_factory.mktemp("stopped"))


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_stopped_at(stopped: tuple[Path, dict[str, Any]], moment: Moment) -> None:
    """In the words of the command, and the folder as it was; once the names are being changed, as it will be."""
    found, around = stopped[1][str(moment)], stopped[1][moment.command]
    told = without_steps(found["err"])
    assert (found["code"], found["out"], told) == (CODES[moment.signal], "", LINES[moment.signal])
    if moment.event in ("os.remove", "os.rename"):  # hashes differ: a manifest tells when it was made
        assert sorted(found["files"]) == sorted(around["after"])
        old = around["before"]
        assert not any(found["files"][name] == old[name] for name in old if name.startswith(moment.argument))
    elif moment.signal != "SIGKILL":
        assert found["files"] == around["before"]


def test_the_run_itself_ends_whole(stopped: tuple[Path, dict[str, Any]]) -> None:
    """The control: where no signal comes, both commands write their files."""
    work = stopped[0].parent / "work"
    for name, kind in (("x.json", "onnx"), ("x.plan.json", "plan")):
        check_files(work / name, read_manifest(work / name, kind))
    assert not list(work.glob(".*"))


def test_a_real_run_is_quiet(stopped: tuple[Path, dict[str, Any]]) -> None:
    """Both commands in a process of its own: nothing on stderr but a line for each step, no color."""
    out, err = ((stopped[0] / f"whole.{number}").read_text() for number in (1, 2))
    steps = re.findall(STEP_LINE + "(.*)", err)
    assert without_steps(err) == "" and {"tracing the encoder", "writing the ONNX file"} <= {*steps}
    assert any(step.startswith("building the plan with ") for step in steps)
    assert "\x1b" not in out + err
    assert "\r" not in out
    work, lines = stopped[0].parent / "work", out.splitlines()
    assert [line.split("  ")[0] for line in lines[12:15]] == [
        str(work / f"x{end}") for end in (".onnx", ".onnx.data", ".json")
    ]
    assert lines[-1].startswith(f"{work / 'x.plan'}  ")


def test_without_the_handler_a_destructor_speaks(tmp_path: Path) -> None:
    """The control: Python's own handler at the same moments."""
    found = run_moments(tmp_path, "bare")[1]
    assert "Exception ignored in" in found[str(Moment("onnx", "import", "typer", "destructor"))]["err"]
    assert "Traceback" in found[str(Moment("onnx", "import", "typer"))]["err"]


@pytest.mark.parametrize("moment", [Moment("onnx", "open", "x.onnx.data", signal="SIGKILL")], ids=str)
def test_killed_midway(
    stopped: tuple[Path, dict[str, Any]], moment: Moment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can clean up then; the old file is whole, and the next run cleans up and works."""
    folder = tmp_path / "left"
    shutil.copytree(stopped[0] / str(moment), folder)
    assert (folder / "x.onnx").read_text() == "old"
    assert len(list(folder.glob(".x.onnx.staging-*"))) == 1
    trace_quickly(monkeypatch)
    given = ["--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual")]
    ran = neck_export_cli("onnx", *given, "--no-verify", "--output", folder / "x.onnx")
    assert ran.code == 0, ran
    assert sorted(listing(folder)) == ["x.json", "x.onnx", "x.onnx.data", "x.plan"]


SCRIPT = """
    import os, signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a script has it ignored
    def hook(event, arguments):
        if event == "import" and arguments[0] == "typer":
            os.kill(os.getpid(), signal.SIGINT)
    sys.addaudithook(hook)
    sys.argv = [{name!r}, "--help"]
    from neck_export import main
    main()
"""


@pytest.mark.parametrize(("name", "code"), [("/usr/bin/neck-export", 130), ("/usr/bin/other", -signal.SIGINT)])
def test_the_console_script_takes_over_first(name: str, code: int) -> None:
    """It imports neck_export as a module; a program of another name that does so keeps Python's KeyboardInterrupt."""
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT.format(name=name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stderr == "error: interrupted\n") == (code == 130)


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    """As under nohup, or in the background of a script."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        take_over_signals()
        assert all(signal.getsignal(number) is signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


TAKEN = """import os, signal
from export.contract.interrupt import ignore_signals, take_over_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
take_over_signals()
"""
DONE = "ignore_signals()\n"
SENT = "os.kill(os.getpid(), signal.SIGINT)\n"


def test_after_the_work_a_signal_changes_nothing() -> None:
    """Python's own end takes a tenth of a second; the files are there, so the exit status is 0."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEN + DONE + SENT],
        cwd=ROOT,
        capture_output=True,
        timeout=HANGS_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


LONG_CALL = """import ctypes, os, signal, sys, threading
from pathlib import Path
import export.contract.interrupt
from export.contract.interrupt import removed_on_signal, take_over_signals
export.contract.interrupt.PATIENCE_S = 0.5
if sys.argv[2] == "ours":
    take_over_signals()
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
folder = Path(sys.argv[1])
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with removed_on_signal(folder):
    folder.mkdir()
    threading.Timer(0.5, os.kill, (os.getpid(), int(sys.argv[3]))).start()
    lock(mutex)  # for ever, and no signal ends it; it takes no processor time
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_inside_one_long_call_too(number: signal.Signals, tmp_path: Path) -> None:
    """Python's own handlers wait for its end; `docker stop` kills after 10 s, and the staging folder would stay."""
    assert PATIENCE_S < 5  # less in the process below

    def started(handler: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LONG_CALL, str(tmp_path / handler), handler, str(int(number))]
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)

    with started("ours") as child:
        assert child.communicate(timeout=HANGS_S)[1].decode() == LINES[number.name]
        assert child.returncode == CODES[number.name]
        assert not list(tmp_path.iterdir())
    if number == signal.SIGTERM:
        with started("python's") as child:  # the control: it is alive 2 s after the work began, 1.5 s after the signal
            while child.poll() is None and not list(tmp_path.iterdir()):
                time.sleep(0.05)
            with pytest.raises(subprocess.TimeoutExpired):
                child.communicate(timeout=2)
            assert list(tmp_path.iterdir())
            child.kill()


def test_on_a_terminal_the_cursor_comes_back() -> None:
    """A progress display hides it."""
    ours, theirs = os.openpty()
    done = subprocess.run([sys.executable, "-c", TAKEN + SENT], cwd=ROOT, stderr=theirs, timeout=HANGS_S, check=False)
    assert done.returncode == 130
    assert os.read(ours, 1000) == b"\r\n\x1b[?25herror: interrupted\r\n"
    os.close(ours)
    os.close(theirs)
