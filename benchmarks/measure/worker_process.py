"""A worker as the benchmark holds it: start, ask, end. Whatever becomes of it is a sentence.

A process of its own and not multiprocessing.Process: that imports the main module again in each worker, which would be
part of the memory that is measured, and gives no environment, session or log to one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Pipe
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
        log: where all that it prints goes.
        environment: further environment variables.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self._connection, theirs = Pipe()
        with log.open("ab") as printed, theirs:
            self._from = printed.tell()
            self._process = subprocess.Popen(
                (*COMMAND, str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **SETTINGS, "PYTHONPATH": path, **(environment or {})},
                start_new_session=True,  # Ctrl-C is the parent's, which ends its workers
            )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def resident_bytes(self) -> int:
        """Resident memory, including mapped files; 0 if it is unknown or the process is gone."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def ask(self, command: str, timeout_s: float, **asked: Any) -> Any:
        """Sends a command and waits for the answer.

        Raises:
            WorkerError: it answered with an error, ended, or gave no answer in time; in the last two cases it is gone.
        """
        try:
            self._connection.send((command, asked))
            if not self._connection.poll(timeout_s):
                self.close()
                raise WorkerError(
                    f"the process was stopped, because its step `{command}` took longer than {timeout_s:.3g} s",
                    late=True,
                )
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended(command) from None
        if isinstance(answer, WorkerError):
            raise answer
        return answer

    def _ended(self, command: str) -> WorkerError:
        self.close()
        code = self._process.returncode
        if code >= 0:
            return WorkerError(
                f"the process failed with exit status {code} in its step `{command}`: {self._last_words()}"
            )
        name = signal.Signals(-code).name
        if name == "SIGKILL":
            return WorkerError(
                f"the process was killed (SIGKILL) in its step `{command}`, most likely because memory ran out",
                memory=True,
            )
        return WorkerError(f"the process crashed ({name}) in its step `{command}`: {self._last_words()}")

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._from)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else f"the process wrote nothing to its log {self.log}"

    def close(self) -> None:
        """Stops the process with its children, such as compilers; kills it if it does not stop by itself."""
        self._connection.close()
        if self._process.returncode is None:
            self._let_end()
            os.killpg(self.pid, signal.SIGKILL)  # it leads the group, whose number is its own until it is waited for
            self._process.wait()

    def _let_end(self, seconds: float = 0.2) -> None:
        """Gives it a moment to end by itself; the operating system frees what it holds either way."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends and not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.005)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
