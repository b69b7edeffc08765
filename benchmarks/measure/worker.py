"""One backend in a process of its own: it takes commands from a connection and answers each.

    python -m benchmarks.measure.worker DESCRIPTOR

Whatever a backend does (an exception, a crash, all memory taken) ends this process and costs its row alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.backends import Runner, RunRequest, open_runner
from benchmarks.measure.worker_process import WorkerError

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|can't allocate|bad_?alloc|failed to allocate|not allocate", re.IGNORECASE)


def main() -> None:
    """Answers commands until the connection ends."""
    descriptor = int(sys.argv[-1])
    os.set_inheritable(descriptor, False)  # what a runtime starts must not keep it open
    _end_with_parent()
    worker = Worker()
    with contextlib.suppress(EOFError), Connection(descriptor) as connection:
        while True:
            command, asked = connection.recv()
            try:
                answer = worker.answer(command, **asked)
            except Exception as error:  # a row's reason, whatever a runtime raises
                answer = as_answer(error)
            connection.send(answer)


def as_answer(error: Exception) -> WorkerError:
    """The answer to the benchmark about an error."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    memory = isinstance(error, MemoryError)
    return WorkerError(
        f"the process ran out of memory ({error})" if memory else text, memory or bool(OUT_OF_MEMORY.search(text))
    )


def _end_with_parent() -> None:
    """A killed parent takes its workers along, and where memory runs out the kernel takes a worker, not the parent."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class Worker:
    """The backend that this process has loaded, if any. Each command is a method, or prepares files."""

    runner: Runner

    def answer(self, command: str, **asked: Any) -> Any:
        """Does one command."""
        if command in ("weights", "image", "file", "plan"):
            import benchmarks.measure.prepare as prepare

            return getattr(prepare, f"make_{command}")(**asked)
        return getattr(self, command)(**asked)

    def load(self, job: RunRequest, most_bytes: int | None) -> dict[str, Any]:
        """Loads the backend of a job; on a CPU it may take no more than `most_bytes`."""
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
        start = time.perf_counter()
        self.runner = open_runner(job)
        built = self.runner.load()
        seconds = time.perf_counter() - start - (built or 0.0)
        told = {"note": self.runner.note(), "lower_bound_ms": self.runner.lower_bound_ms()}
        return {"load_s": seconds, "build_s": built, **told}

    def run(self, count: int, least_s: float = 0.0) -> list[float]:
        """Times `count` runs one after the other in ms, and further ones until `least_s` seconds have passed."""
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < count or time.perf_counter() - started < least_s:
            start = time.perf_counter()
            self.runner.run()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def outputs(self, folder: Path) -> list[str]:
        """Writes the last run's outputs as `folder`/NAME.npy; returns their names."""
        folder.mkdir(parents=True, exist_ok=True)
        found = self.runner.outputs()
        for name, array in found.items():
            np.save(folder / f"{name}.npy", array)
        return list(found)

    def parts(self, count: int) -> dict[str, float]:
        """Milliseconds of each part: the medians of `count` runs."""
        runs = [found for found in (self.runner.parts_ms() for _ in range(count)) if found]
        names = runs[0] if runs else {}
        return {name: float(np.median([run.get(name, 0.0) for run in runs])) for name in names}

    def memory(self) -> dict[str, Any]:
        """Peaks so far; a device's that cannot be read leaves the host's."""
        try:
            device = self.runner.device_bytes()
        except Exception as error:  # whatever a runtime raises
            print(f"the peak memory of the GPU cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
            device = None
        return {"peak_host_bytes": peak_bytes(), "peak_device_bytes": device}

    def facts(self) -> dict[str, Any]:
        """The machine and what it has."""
        from benchmarks.measure.environment import capabilities, describe_machine

        return {"environment": describe_machine(), "capabilities": capabilities()}

    def rates(self, device: str) -> dict[str, Any]:
        """The measured rates of `device`."""
        from benchmarks.measure.machine_rates import measure_rates

        return measure_rates(device)


def peak_bytes() -> int:
    """Most resident memory of this process, mapped weights included.

    Not ru_maxrss where the kernel tells VmHWM: a process starts with its parent's ru_maxrss (Linux).
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
