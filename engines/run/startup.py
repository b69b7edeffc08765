"""What a process waits for before it serves: loading a plan, then the first run; each start in a new process.

python -m engines.run.startup PLAN BATCH CACHE DEVICE
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.builder.flavor import RTX_MAGIC
from engines.run.inputs import SessionError
from engines.run.latency import Start, Starts
from engines.run.open_plan import open_plan
from engines.run.plan_checks import read_header
from engines.run.timing import make_input
from export.contract.interrupt import removed_on_signal

ROOT = Path(__file__).parent.parent.parent

MOST_SECONDS = 600.0
"""A start that takes longer hangs."""

Starter = Callable[[Path, int, Path], Start]


def time_starts(plan: Path, batch: int, flavor: str, starter: Starter) -> Starts:
    """A cold start, and for TensorRT-RTX a warm one, which finds the kernels of the cold one.

    The runtime cache beside the plan is neither read nor written. What the system keeps of files, and the driver of
    kernels, is as it is.

    Args:
        plan, batch: what is started, and the batch of its runs.
        flavor: the plan's; TensorRT keeps nothing between starts, so it has no warm one.
        starter: starts once, with that file as runtime cache.
    """
    with tempfile.TemporaryDirectory() as folder, removed_on_signal(Path(folder)):
        cache = Path(folder) / "kernels.cache"
        try:
            cold = starter(plan, batch, cache)
            return Starts(cold, starter(plan, batch, cache) if flavor == "rtx" else None)
        except SessionError as error:
            return Starts(None, None, str(error))


def start_process(plan: Path, batch: int, cache: Path, device: int | None = 0) -> Start:
    """Starts once, in a process of its own, on the GPU of that index.

    Raises:
        SessionError: it did not come to a second run; with its last line.
    """
    command = [sys.executable, "-m", "engines.run.startup", str(plan), str(batch), str(cache), str(device or 0)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": path}}
    try:
        ended = subprocess.run(command, timeout=MOST_SECONDS, check=False, **options)
    except subprocess.TimeoutExpired:
        raise SessionError(
            f"{plan}: starting the engine took longer than {MOST_SECONDS:g} s; check that no other process uses the GPU"
        ) from None
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise SessionError(f"{plan}: starting the engine failed: {last}")
    return Start(**json.loads(ended.stdout.splitlines()[-1]))


def time_start(plan: Path, batch: int, cache: Path, device: int = 0) -> Start:
    """Starts once, in this process: loading (checks and SHA-256 included), first and second run with host memory."""
    begun = time.perf_counter()
    rtx = read_header(plan).startswith(RTX_MAGIC)  # TensorRT would refuse a runtime cache
    with open_plan(plan, device=device, runtime_cache=cache if rtx else None) as session:
        loaded = time.perf_counter()
        port = session.inputs[0]
        image = {port.name: make_input(port, batch).numpy()}
        marks = [time.perf_counter()]
        for _ in range(2):
            session.infer(image)
            marks.append(time.perf_counter())
        return Start(session.warm, loaded - begun, marks[1] - marks[0], marks[2] - marks[1])


def main() -> None:
    """Prints a start of the plan that is named, as JSON."""
    plan, batch, cache, device = sys.argv[1:]
    try:
        print(json.dumps(dataclasses.asdict(time_start(Path(plan), int(batch), Path(cache), int(device)))))
    except SessionError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
