"""What an export ends with when it cannot be done; apart from the tracing, since who reads a file needs no torch."""

from __future__ import annotations


class ExportError(RuntimeError):
    """An encoder could not be exported, or a file was not written by neck-export."""
