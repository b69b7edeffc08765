"""Ctrl-C and SIGTERM as a command has them: one line, exit 130 or 143, whenever they come (no import that takes time).

A handler that raises KeyboardInterrupt is right only where the signal lands in code of ours: in a destructor or a
callback of C code Python prints "Exception ignored in ..." and goes on, an import fails in words of its own. So the
handler raises nothing: it removes what is half-written and ends the process. Python runs it between two instructions of
the main thread. Where that is inside one long call of C code, a second thread does it instead: `docker stop` and
Kubernetes kill the process 10 and 30 s after SIGTERM, and what is half-written would stay.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

TYPE_CHECKING = False  # as type checkers know it: typing and pathlib would take most of the time that this file takes,
if TYPE_CHECKING:  # during which Ctrl-C is Python's
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

_unfinished: list[Path] = []
_held = 0
_waiting: int | None = None
_leaving = threading.RLock()

PATIENCE_S = 2.0
"""How long the main thread has to run the handler before the second thread does."""


def take_over_signals() -> None:
    """Ends this process in one line on SIGINT and SIGTERM; not where the caller had them ignored (nohup)."""
    taken = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    if not taken or signal.getsignal(taken[0]) is _leave:
        return
    for number in taken:
        signal.signal(number, _leave)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # C code writes a signal's number there at once
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a copy's signals are not this process's
    threading.Thread(target=_wait_for_signals, args=(reader,), daemon=True).start()


def _wait_for_signals(reader: int) -> None:
    """Runs the handler where the main thread does not get to it."""
    while number := os.read(reader, 1):
        time.sleep(PATIENCE_S)
        if signal.getsignal(number[0]) is _leave:
            _leave(number[0], None)


def ignore_signals() -> None:
    """Ignores signals from here on, because the work is done or its remains are being removed."""
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
    with _leaving:  # of two threads one does it
        if threading.current_thread() is threading.main_thread():
            ignore_signals()  # a second Ctrl-C must not stop the removal
        for path in [*_unfinished]:
            _remove(path)
        _tell(b"error: interrupted\n" if number == signal.SIGINT else b"error: terminated\n")
        os._exit(128 + number)  # no destructor, no waiting for a builder; child processes see their pipes close


def _remove(path: Path) -> None:
    import shutil  # whoever made the path has imported it

    for _ in range(100):  # another thread may be writing into the folder
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if not path.exists():
            return


def _tell(line: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody reads
        # a progress display has left the cursor hidden, behind its last line
        os.write(2, b"\n\x1b[?25h" + line if os.isatty(2) else line)
