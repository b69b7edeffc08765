"""One backend in a process of its own: it takes commands as JSON lines and answers each with one.

    python -m benchmarks.measure.worker

Whatever a backend does (an exception, a crash, all memory taken) ends this process and costs its row alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.backends import Runner, open_runner

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|can't allocate|bad_?alloc|failed to allocate|not allocate", re.IGNORECASE)


def main() -> None:
    """Answers commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not lie between the answers
    _end_with_parent()
    worker = Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = worker.answer(asked)
        except MemoryError as error:
            answer = {"error": f"out of memory ({error})", "memory": True}
        except Exception as error:  # a row's reason, whatever a runtime raises
            text = " ".join(str(error).split())[:600]
            memory = bool(OUT_OF_MEMORY.search(f"{type(error).__name__} {text}"))
            answer = {"error": f"{type(error).__name__}: {text}", "memory": memory}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """A killed parent takes its workers along, and where memory runs out the kernel takes a worker, not the parent."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class Worker:
    """What this process holds: a backend that was loaded, or nothing yet."""

    runner: Runner

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Does one command."""
        command = asked["do"]
        own: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
            "load": self.load,
            "run": self.run,
            "outputs": self.outputs,
            "parts": self.parts,
            "memory": self.memory,
            "facts": facts,
            "rates": rates,
        }
        if command in own:
            return own[command](asked)
        from benchmarks.measure.prepare import make_file, make_image, make_plan_file, make_weights

        return {
            "weights": make_weights,
            "image": make_image,
            "file": make_file,
            "plan": make_plan_file,
        }[command](asked)

    def load(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Loads the backend of `job`; on a CPU it may take no more than `most_bytes`."""
        if asked["most_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (asked["most_bytes"], asked["most_bytes"]))
        start = time.perf_counter()
        self.runner = open_runner(asked["job"])
        built = self.runner.load()
        seconds = time.perf_counter() - start - (built or 0.0)
        return {"load_s": seconds, "build_s": built, "note": self.runner.note()}

    def run(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Times `count` runs one after the other, and further ones until `least_s` seconds have passed."""
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < asked["count"] or time.perf_counter() - started < asked.get("least_s", 0.0):
            start = time.perf_counter()
            self.runner.run()
            times.append((time.perf_counter() - start) * 1e3)
        return {"times_ms": times}

    def outputs(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the last run's outputs as `folder`/NAME.npy."""
        folder = Path(asked["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        found = self.runner.outputs()
        for name, array in found.items():
            np.save(folder / f"{name}.npy", array)
        return {"names": list(found)}

    def parts(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Milliseconds of each part: the medians of `count` runs."""
        runs = [found for found in (self.runner.parts_ms() for _ in range(asked["count"])) if found]
        names = runs[0] if runs else {}
        return {"parts_ms": {name: float(np.median([run.get(name, 0.0) for run in runs])) for name in names}}

    def memory(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Peaks so far; a device's that cannot be read leaves the host's."""
        try:
            device = self.runner.device_bytes()
        except Exception as error:  # whatever a runtime raises
            print(f"no peak of the device: {type(error).__name__}: {error}", file=sys.stderr)
            device = None
        return {"peak_host_bytes": peak_bytes(), "peak_device_bytes": device}


def peak_bytes() -> int:
    """Most resident memory of this process, mapped weights included.

    Not ru_maxrss where the kernel tells VmHWM: a process starts with its parent's ru_maxrss (Linux).
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def facts(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The machine and what it has."""
    from benchmarks.measure.environment import capabilities, describe_machine

    return {"environment": describe_machine(), "capabilities": capabilities()}


def rates(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What `device` reaches."""
    from benchmarks.measure.machine_rates import measure_rates

    return measure_rates(asked["device"])


if __name__ == "__main__":
    main()
