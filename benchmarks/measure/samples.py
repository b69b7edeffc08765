"""Samples as they come, one JSON line each, so that a benchmark that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchError

SCHEMA = 1
KIND = "bench-samples"


class Samples:
    """The lines of one benchmark; `key` says of which. A context that closes the file.

    A round that was cut is measured again whole, since a ratio is of runs in the same round.

    Args:
        path: the file, made where it is not there.
        key: hash of everything that decides what is measured.

    Raises:
        BenchError: the file is another program's or of another version; it stays as it is.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.lines = path, []  # type: Path, list[dict[str, Any]]
        if path.is_file() and path.stat().st_size:
            self._read(key)
        self.resumed = len(self.lines) > 0
        self._file = path.open("ab")
        if path.stat().st_size == 0:
            self._write({"schema": SCHEMA, "kind": KIND, "key": key})

    def _read(self, key: str) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
        except ValueError as error:
            raise BenchError(
                f"{self.path}: the file does not contain benchmark samples ({error}); move the file, or choose "
                "another --output"
            ) from None
        found = {name: head.get(name) for name in ("schema", "kind", "key")} if isinstance(head, dict) else head
        expected = {"schema": SCHEMA, "kind": KIND, "key": key}
        if found != expected:
            raise BenchError(
                f"{self.path}: the file begins with {json.dumps(found)[:200]} instead of {json.dumps(expected)}, so "
                "the file belongs to another benchmark; move the file, or choose another --output"
            )
        self.lines = lines
        if len(whole) < len(data):  # killed while a line was written
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def add(self, kind: str, **values: Any) -> None:
        """Appends a line; it is on the disk when this returns."""
        line = {"sample": kind, **values}
        self._write(line)
        self.lines.append(line)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def all(self, kind: str, **match: Any) -> list[dict[str, Any]]:
        """The lines of a kind with these values, in order."""
        wanted = {"sample": kind, **match}
        return [line for line in self.lines if all(line.get(name) == value for name, value in wanted.items())]

    def last(self, kind: str, **match: Any) -> dict[str, Any] | None:
        """The newest of them, or None."""
        found = self.all(kind, **match)
        return found[-1] if found else None

    def rounds(self, point: str) -> int:
        """How many rounds of a point are whole."""
        return len(self.all("round", point=point))

    def whole_rounds(self, point: str, backend: str) -> int:
        """How many of them measured a backend."""
        return sum(number < self.rounds(point) for number in self.by_round(point, backend))

    def times(self, point: str, backend: str) -> list[list[float]]:
        """Milliseconds of a backend, round by round."""
        return list(self.by_round(point, backend).values())

    def by_round(self, point: str, backend: str) -> dict[int, list[float]]:
        """The same with the rounds' numbers, in order; a round that was measured twice counts as it was last."""
        found = {line["round"]: line["times_ms"] for line in self.all("times", point=point, backend=backend)}
        return {number: found[number] for number in sorted(found)}

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
