"""Hears what `neck.progress` tells."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from neck.progress import LOG, Count


class Listener(logging.Handler):
    """Hands on every count."""

    def __init__(self, take: Callable[[Count], None]) -> None:
        super().__init__()
        self.take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record; what `take` raises reaches the code that tells."""
        if hasattr(record, "count"):
            self.take(record.count)


@contextlib.contextmanager
def listening(take: Callable[[Count], None]) -> Iterator[None]:
    """Calls a function with every count while the context lasts."""
    listener, level = Listener(take), LOG.level
    LOG.addHandler(listener)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(listener)
        LOG.setLevel(level)
