"""A worker as the benchmark holds it: start, ask, end. Whatever becomes of it is a sentence."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

COMMAND = (sys.executable, "-m", "benchmarks.measure.worker")

SETTINGS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Of every worker's environment: malloc asks for huge pages. Without, where a process's weights happened to lie moved
all of its matrix products by up to 9 % (ONNX Runtime 1.32, two sessions of the same products), more than what is
compared."""


class WorkerError(RuntimeError):
    """A worker that failed.

    Attributes:
        memory: whether it was, or most likely was, for want of memory.
        late: whether it gave no answer in time.
    """

    def __init__(self, reason: str, memory: bool = False, late: bool = False) -> None:
        super().__init__(reason)
        self.memory, self.late = memory, late


class Worker:
    """One worker process; a context that ends it.

    Args:
        log: where its standard error goes.
        environment: further environment variables.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with log.open("ab") as errors:
            self._from = errors.tell()
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **SETTINGS, "PYTHONPATH": path, **(environment or {})},
                start_new_session=True,  # Ctrl-C is the parent's, which ends its workers
            )
        self._read = b""

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def resident_bytes(self) -> int:
        """Memory that it holds now, mapped files included; 0 where the system does not tell or it is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def ask(self, command: str, timeout_s: float, **asked: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer.

        Raises:
            WorkerError: it answered with an error, ended, or gave no answer in time; in the last two cases it is gone.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told by the missing answer
            self._process.stdin.write(json.dumps({"do": command, **asked}).encode() + b"\n")
            self._process.stdin.flush()
        answer = json.loads(self._line(command, timeout_s))
        if "error" in answer:
            raise WorkerError(answer["error"], answer["memory"])
        return answer

    def _line(self, command: str, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        ends = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._read:
                if not selector.select(max(0.0, ends - time.monotonic())):
                    self.close()
                    raise WorkerError(f"no answer to `{command}` in {timeout_s:.3g} s; it was ended", late=True)
                piece = os.read(self._process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._ended(command)
                self._read += piece
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _ended(self, command: str) -> WorkerError:
        self.close()
        code = self._process.returncode
        if code >= 0:
            return WorkerError(f"ended with exit status {code} in `{command}`; {self._last_words()}")
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return WorkerError(f"killed (SIGKILL) in `{command}`, most likely because memory ran out", memory=True)
        return WorkerError(f"crashed ({name}) in `{command}`; {self._last_words()}")

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._from)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else f"it said nothing, see {self.log}"

    def close(self) -> None:
        """Ends the process, at once where it does not end by itself, and what it started, such as compilers."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if self._process.returncode is None:
            self._let_end()
            os.killpg(self.pid, signal.SIGKILL)  # it leads the group, whose number is its own until it is waited for
            self._process.wait()
        self._process.stdout.close()

    def _let_end(self, seconds: float = 0.2) -> None:
        """Gives it a moment to end by itself; the operating system frees what it holds either way."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.005)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
