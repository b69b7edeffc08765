"""Sizes of files for a message, in the unit that shows them."""

from __future__ import annotations


def size_text(count: int) -> str:
    """Bytes with three figures: `64.0 kB`, `1.82 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{2 if count < 10 * scale else 1 if count < 100 * scale else 0}f} {unit}"
    return f"{count} bytes"
