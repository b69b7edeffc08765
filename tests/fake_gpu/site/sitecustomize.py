"""Puts the fakes into a process that a test starts, before its own code runs; see play.environment."""

import atexit
import contextlib
import os
import sys

if "NECK_PLAYED" in os.environ:
    sys.path.append(os.environ["NECK_PLAYED_TESTS"])
    from fake_gpu.play import play

    stack = contextlib.ExitStack()
    stack.enter_context(play(os.environ["NECK_PLAYED"]))
    for name in filter(None, os.environ.get("NECK_PLAYED_WITHOUT", "").split(",")):
        sys.modules[name] = None  # type: ignore[assignment]
    atexit.register(stack.close)
