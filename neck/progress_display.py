"""Shows what `neck.progress` tells: bars on a terminal; elsewhere plain lines with the time, at least one a minute."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

from neck.progress import LOG, Count

LINE_EVERY_S = 30.0
"""Between two plain lines of one step: half a minute, so that a busy machine still shows one a minute."""


class PlainLines(logging.StreamHandler):  # subscriptable from Python 3.11 on
    """Writes a line when a step begins and when a count is complete, and one every half minute in between.

    Args:
        stream: where the lines go.
        every_s: the longest time without a line.
    """

    def __init__(self, stream: TextIO, every_s: float = LINE_EVERY_S) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
        self.every_s, self._ended = every_s, threading.Event()
        self._step, self._counts = "", dict[str, Count]()
        self._began = self._told = time.monotonic()
        self._thread = threading.Thread(target=self._keep_telling, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Shows a record; logging holds this handler's lock."""
        now = time.monotonic()
        found: Count | None = getattr(record, "count", None)
        if found is None:
            self._step, self._began = record.getMessage(), now
            self._counts.clear()  # of the step before
        else:
            begins, complete = found.step not in self._counts, found.done == found.total
            self._counts[found.step] = found
            if complete:
                del self._counts[found.step]
            if not begins and not complete and now - self._told < self.every_s:
                return
        self._told = now
        super().emit(record)

    def close(self) -> None:
        """Ends the lines."""
        self._ended.set()
        self._thread.join()
        super().close()

    def _keep_telling(self) -> None:
        """Repeats what is being done where nothing else tells of it."""
        while not self._ended.wait(min(1.0, self.every_s)):
            with self.lock or contextlib.nullcontext():
                now = time.monotonic()
                if now - self._told >= self.every_s and (self._step or self._counts):
                    text = "; ".join(map(str, self._counts.values())) or self._step
                    self._told = now
                    super().emit(_record(f"{text} (running for {now - self._began:.0f} s)"))


class Bars(logging.Handler):
    """A line with a clock for every step and a bar for every count, by rich."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self._shown, self._step = shown, None  # type: Any, Any
        self._tasks: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record."""
        found: Count | None = getattr(record, "count", None)
        if found is None:
            self._end(self._step)
            self._step = self._shown.add_task(record.getMessage(), total=None)
            return
        task = self._tasks.get(found.step)
        if task is None:
            task = self._tasks[found.step] = self._shown.add_task(str(found), total=found.total)
        self._shown.update(task, description=str(found), completed=found.done)
        if found.done == found.total:
            del self._tasks[found.step]

    def close(self) -> None:
        """Stops the clocks."""
        for task in (self._step, *self._tasks.values()):
            self._end(task)
        super().close()

    def _end(self, task: Any) -> None:
        if task is not None:
            self._shown.update(task, total=1, completed=1)


def _record(text: str) -> logging.LogRecord:
    return logging.LogRecord(LOG.name, logging.INFO, __file__, 0, text, None, None)


@contextlib.contextmanager
def shown(stream: TextIO) -> Iterator[None]:
    """Shows progress on a stream while the context lasts: as bars where it is a terminal, else as lines."""
    with contextlib.ExitStack() as stack:
        handler: logging.Handler
        if stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), TimeElapsedColumn())
            handler = Bars(stack.enter_context(Progress(*columns, console=Console(file=stream))))
        else:
            handler = PlainLines(stream)
        level = LOG.level
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        try:
            yield
        finally:
            LOG.removeHandler(handler)
            LOG.setLevel(level)
            handler.close()
