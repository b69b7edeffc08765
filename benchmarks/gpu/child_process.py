"""A process with a time limit, ended with all that it started: nothing that hangs outlives its time (no torch)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36
WAIT_SECONDS = 5.0
"""For what was killed to be gone; what the kernel holds longer is left to it."""


TAIL_BYTES = 1 << 12
"""Of what a process prints, kept for its last words."""


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind (Linux), so that `end_all` finds it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_all() -> int:
    """Kills every process that descends from this one; returns how many there were.

    A worker has a session of its own, so that the group of a stage's process is not all that it started.
    """
    ended: set[int] = set()
    for _ in range(10):  # what was started while others were killed
        living = [one for one in psutil.Process().children(recursive=True) if one.pid not in ended]
        if not living:
            break
        for one in living:
            ended.add(one.pid)
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(signal.SIGKILL)
    psutil.wait_procs(psutil.Process().children(recursive=True), WAIT_SECONDS)
    return len(ended)


def run_limited(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str]) -> str | None:
    """Runs a command and ends it, with all that it started, after so long.

    Args:
        command: what to run.
        seconds: how long it may take.
        log: what it prints goes there.
        environment: its environment, whole.

    Returns:
        None where it ended with exit status 0, else what became of it.
    """
    started, tail = time.monotonic(), bytearray()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=dict(environment))
    reader = threading.Thread(target=_keep, args=(process, log, tail), daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - started:.0f} s, because the time limit was reached"
    finally:
        end_all()
        reader.join(WAIT_SECONDS)  # all who could write are gone
    if code == 0:
        return None
    if code < 0:
        return f"stopped by the signal {signal.Signals(-code).name}"
    lines = tail.decode(errors="replace").strip().splitlines()
    return f"failed with exit status {code}: {lines[-1][:400] if lines else 'the process printed nothing'}"


def _keep(process: subprocess.Popen[bytes], log: Path, tail: bytearray) -> None:
    """Writes what a process prints into its log while there is room; on a full disk, too, it may print, and its last
    words are kept."""
    assert process.stdout is not None
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        tail += piece
        del tail[:-TAIL_BYTES]
        with contextlib.suppress(OSError), log.open("ab") as file:
            file.write(piece)
