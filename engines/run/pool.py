"""Several contexts of one engine for many threads: the weights are in device memory once."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from engines.run.inputs import SessionError
from engines.run.session import Session
from engines.run.streams import after_caller

MOST_CONTEXTS = 1024
MOST_WAITING = 256
"""Threads that may wait for a context; the next is refused at once."""


class _Waiter:
    """A thread that waits; a context is handed to it, so that nobody who comes later can take it."""

    def __init__(self, lock: threading.Lock) -> None:
        self.changed, self.session = threading.Condition(lock), None  # type: threading.Condition, Session | None


class Pool:
    """Contexts to borrow: who asks first is served first. `open_plan(plan, contexts=4)` makes it.

    All methods may be called from any thread. Runs of several contexts overlap on the GPU where inputs are numpy
    arrays, or torch tensors of threads whose current stream is their own.

    Attributes:
        plan: what was loaded.
        contexts: how many runs may be at work at the same time.
        context_bytes: device memory of each context at the largest batch, beside the weights.
        loaded_bytes: device memory that loading took, every context's scratch memory included.
        warnings: what TensorRT warned of, and a runtime cache that cannot be used or written.
        warm: whether the kernels of an earlier start were there.
    """

    def __init__(
        self, sessions: Sequence[Session], *, context_bytes: int = 0, most_waiting: int = MOST_WAITING
    ) -> None:
        first = sessions[0]
        self.plan, self.warnings, self.warm, self.loaded_bytes = first.plan, first.warnings, first.warm, 0
        self.contexts, self.context_bytes, self._most_waiting = len(sessions), context_bytes, most_waiting
        self._free, self._lock, self._closed = list(sessions), threading.Lock(), False
        self._waiting: collections.deque[_Waiter] = collections.deque()

    @property
    def waiting(self) -> int:
        """Threads that wait for a context now."""
        with self._lock:
            return len(self._waiting)

    @contextlib.contextmanager
    def acquire(self, timeout: float) -> Iterator[Session]:
        """Lends a context until the block ends, by whatever way; then memory that was bound to outputs is unbound, too.

        By a CUDA graph outputs are the context's, and the next thread's run overwrites them: it waits for what this
        thread has queued on its current stream when the block ends.

        Args:
            timeout: seconds to wait for one.

        Raises:
            SessionError: none came free in time, too many wait already, or the pool was closed.
        """
        session = self._take(timeout)
        try:
            yield session
        finally:
            try:
                after_caller(session.stream, session.device)
                session.unbind_outputs()
            finally:
                self._give_back(session)

    def close(self) -> None:
        """Refuses who waits and who comes; contexts that are lent stay good and are freed when they come back."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
            for waiter in self._waiting:
                waiter.changed.notify()
        for session in free:
            session.close()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self, timeout: float) -> Session:
        with self._lock:
            self._check_open()
            if self._free:  # then nobody waits
                return self._free.pop()
            if len(self._waiting) >= self._most_waiting:
                raise SessionError(
                    f"{self.plan}: {len(self._waiting)} threads already wait for one of {self.contexts} "
                    "contexts; try again later, or open the plan with more contexts"
                )
            waiter = _Waiter(self._lock)
            self._waiting.append(waiter)
            try:
                waiter.changed.wait_for(lambda: waiter.session or self._closed, min(timeout, threading.TIMEOUT_MAX))
            except BaseException:  # Ctrl-C: what was handed over meanwhile goes on to the next
                if waiter.session:
                    waiter.session.close() if self._closed else self._hand_on(waiter.session)
                raise
            finally:
                if not waiter.session:
                    self._waiting.remove(waiter)
            if waiter.session:
                return waiter.session
            self._check_open()
        raise SessionError(
            f"{self.plan}: none of {self.contexts} contexts became free within {timeout:g} s; wait longer, or "
            "open the plan with more contexts"
        )

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError(f"{self.plan}: the pool of contexts is closed; open the plan again")

    def _give_back(self, session: Session) -> None:
        with self._lock:
            if not self._closed:
                self._hand_on(session)
                return
        session.close()

    def _hand_on(self, session: Session) -> None:
        """Gives a context to who came first, else lays it aside; the lock is held."""
        if self._waiting:
            waiter = self._waiting.popleft()
            waiter.session = session
            waiter.changed.notify()
        else:
            self._free.append(session)


def check_count(plan: Path, contexts: int) -> None:
    """Raises SessionError for a pool of none, or of more than anybody means."""
    if not 1 <= contexts <= MOST_CONTEXTS:
        raise SessionError(f"{plan}: contexts={contexts} is invalid; expected 1 to {MOST_CONTEXTS} execution contexts")


def check_memory(plan: Path, contexts: int, each: int, free: int) -> None:
    """Raises SessionError where so many contexts do not fit into the memory that is free.

    Args:
        plan: whose.
        contexts: how many shall be made.
        each: bytes of one at the largest batch.
        free: bytes of device memory, the weights loaded already.
    """
    most = free // max(1, each)
    if contexts > most:
        remedy = f"Open at most {most} contexts" if most else "Close other programs that use the GPU"
        raise SessionError(
            f"{plan}: {contexts} contexts need {contexts * each / 1000000.0:.1f} MB of device memory in "
            f"addition to the weights, but only {free / 1000000.0:.1f} MB are free. {remedy}, or build the plan again "
            "with a smaller maximum batch size"
        )
