"""What a long step is doing, told through standard logging: nobody hears it until a handler listens.

`neck.progress_display` shows it on a terminal or as plain lines; another program can attach a handler of its own to
LOG.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

LOG = logging.getLogger("neck_export")
"""Messages of level INFO: a step that begins, or how much of a step is done."""

Item = TypeVar("Item")


class Count(NamedTuple):
    """How much of a step is done; a log record has it as `count`.

    Attributes:
        step: what is counted, such as `calibration`.
        done: how many are done.
        total: how many there are; None where that is not known beforehand.
        unit: of what, in the plural; `bytes` are shown in MB.
    """

    step: str
    done: int
    total: int | None
    unit: str

    def __str__(self) -> str:
        parts = [f"{part / 1e6:,.0f}" if self.unit == "bytes" else str(part) for part in self[1:3] if part is not None]
        return f"{self.step}: {' of '.join(parts)} {'MB' if self.unit == 'bytes' else self.unit}"


def step(text: str) -> None:
    """Reports that a step begins."""
    LOG.info("%s", text)


def count(text: str, done: int, total: int | None, unit: str) -> None:
    """Reports how much of a step is done; the arguments are those of Count."""
    found = Count(text, done, total, unit)
    LOG.info("%s", found, extra={"count": found})


def counted(items: Iterable[Item], text: str, total: int | None, unit: str) -> Iterator[Item]:
    """Yields items one by one and reports how many are done."""
    count(text, 0, total, unit)
    for done, item in enumerate(items, 1):
        yield item
        count(text, done, total, unit)
