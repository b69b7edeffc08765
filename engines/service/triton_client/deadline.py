"""A limit on the time of a whole call, however many requests it makes and however slowly the server answers."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from .errors import ClientError, import_part


class Deadline:
    """Limits the time of a client's calls: HTTP calls with gevent's timer, gRPC calls with gRPC's own deadline.

    Args:
        seconds: that a call may take.
        protocol: `http` or `grpc`.
        url: for messages.

    Raises:
        ClientError: the seconds are not a positive number.
    """

    def __init__(self, seconds: float, protocol: str, url: str) -> None:
        if not (math.isfinite(seconds) and seconds > 0):
            raise ClientError(f"the timeout {seconds:g} s is invalid; expected a number above 0")
        self.seconds, self.url = seconds, url
        self._gevent = import_part("gevent", "pip install 'tritonclient[http]'") if protocol == "http" else None
        self._end = 0.0

    @contextlib.contextmanager
    def running(self, broken: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Raises ClientError if the block takes too long, after calling `broken` to drop half-read connections."""
        self._end = time.monotonic() + self.seconds
        if self._gevent is None:
            yield
            return
        timer = self._gevent.Timeout(self.seconds)
        timer.start()
        try:
            yield
        except self._gevent.Timeout as error:
            if error is not timer:
                raise
            broken()
            raise self._late() from None
        finally:
            timer.close()

    def left_s(self) -> float:
        """Seconds that the running call has left.

        Raises:
            ClientError: none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise self._late()
        return left

    def options(self, **more: Any) -> dict[str, Any]:
        """Options for a gRPC method, including `more`; nothing for HTTP."""
        return {} if self._gevent is not None else {"client_timeout": self.left_s(), **more}

    def _late(self) -> ClientError:
        return ClientError(
            f"{self.url}: no answer within {self.seconds:g} s; check the server and the network, or use a "
            "longer --timeout"
        )
