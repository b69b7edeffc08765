"""Ctrl-C as a command has it: one line and exit 130 at whatever moment it comes (no import that takes time).

A handler that raises KeyboardInterrupt is right only where the signal lands in code of ours: in a destructor or a
callback of C code Python prints "Exception ignored in ..." and goes on, an import fails in words of its own. So the
handler raises nothing: it removes what is half-written and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False  # as type checkers know it: typing and pathlib would take most of the time that this file takes,
if TYPE_CHECKING:  # during which Ctrl-C is Python's
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

_unfinished: list[Path] = []
_held = 0
_waiting: int | None = None


def take_over_signals() -> None:
    """Ends this process in one line on SIGINT, in silence on SIGTERM; not where the caller had them ignored (nohup)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)


def ignore_signals() -> None:
    """From here on a signal that was taken over does nothing: the work is done, or its remains are being removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _leave:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def removed_on_signal(path: Path) -> Iterator[None]:
    """Names a file or folder, before it is made, that goes when a signal ends the process (else the block does it)."""
    _unfinished.append(path)
    try:
        yield
    finally:
        _unfinished.remove(path)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Keeps a signal waiting while files that belong together get their names: milliseconds."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _waiting is not None and not _held:
            _leave(_waiting, None)


def _leave(number: int, frame: FrameType | None) -> None:
    """The handler; Python runs it in the main thread, between two instructions, wherever that is."""
    global _waiting
    if _held:
        _waiting = number
        return
    ignore_signals()  # a second Ctrl-C must not stop the removal
    for path in _unfinished:
        _remove(path)
    if number == signal.SIGINT:
        _tell()
    os._exit(128 + number)  # no destructor, no waiting for a builder's thread; child processes see their pipes close


def _remove(path: Path) -> None:
    import shutil  # whoever made the path has imported it

    for _ in range(100):  # another thread may be writing into the folder
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if not path.exists():
            return


def _tell() -> None:
    with contextlib.suppress(OSError):  # nobody reads
        line = b"error: interrupted\n"
        # a progress display has left the cursor hidden, behind its last line
        os.write(2, b"\n\x1b[?25h" + line if os.isatty(2) else line)
