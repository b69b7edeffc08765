"""What the benchmark says when it cannot go on."""

from __future__ import annotations


class BenchError(ValueError):
    """A benchmark that cannot run, or results that cannot be read, written, merged or compared."""
