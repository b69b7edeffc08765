"""A benchmark's worker that is no process of its own: importing torch takes 2 s of each process."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import benchmarks.measure.worker
from benchmarks.measure.worker_process import WorkerError

_one_at_a_time = threading.Lock()
"""Files are asked for by two threads, and torch exports in one."""


class WorkerHere:
    """Does in this process what it is asked; questions and answers are pickled, as between processes."""

    pid = 0

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.worker = benchmarks.measure.worker.Worker()

    def ask(self, command: str, timeout_s: float, **asked: Any) -> Any:
        """The answer; an exception is an error of the worker."""
        given = pickle.loads(pickle.dumps(asked))
        if command == "load":
            given["most_bytes"] = None  # the limit would be this process's own
        try:
            with _one_at_a_time:
                return pickle.loads(pickle.dumps(self.worker.answer(command, **given)))
        except WorkerError:
            raise
        except Exception as error:
            raise benchmarks.measure.worker.as_answer(error) from None

    def resident_bytes(self) -> int:
        """Unknown: what it holds is this process's."""
        return 0

    def close(self) -> None:
        """Forgets what is loaded."""
        self.worker = benchmarks.measure.worker.Worker()

    def __enter__(self) -> WorkerHere:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
