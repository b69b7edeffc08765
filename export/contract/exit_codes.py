"""Exit codes of the command line; the C++ programs have the same (`Exit` in engines/cpp/src/commands/command.hpp)."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """How a command ended. typer itself ends with USAGE."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3  # an output outside its tolerance, or other masks
    INTERRUPTED = 130  # by Ctrl-C, as shells count: 128 and the signal's number
