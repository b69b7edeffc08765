"""Runs the builder: handles its log, its progress and Ctrl-C, and streams the plan into a file."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from engines.builder.onnx_graph import BuildError, RefusedError
from engines.layers.plan_memory import read_memory
from engines.layers.read_layers import FIRST_LINE
from neck.progress import count

OUT_OF_MEMORY = (
    "TensorRT ran out of host memory during the build, which needs 3 GB for the full-size encoder; close other programs"
)

NO_HOST_MEMORY = re.compile(r"bad_?alloc", re.IGNORECASE)
NO_DEVICE_MEMORY = re.compile(r"out ?of ?memory|gpu memory", re.IGNORECASE)
"""TensorRT's words: `Error Code 2: OutOfMemory (Requested size was N bytes.)`, `Error Code 1: Cuda Runtime (out of
memory)`, `Requested amount of GPU memory (N bytes) could not be allocated` are of the device, std::bad_alloc the
host's."""

DEVICE_REMEDY = (
    "the GPU has too little free memory for this build: close other programs on it, or build with a smaller "
    "--batch or --workspace-gib"
)


class Watch:
    """Collects the errors, the layer list and the memory use of a running build, and exceptions of our callbacks.

    The rest of the log (2.7 MB at full size) is dropped. Once `cancelled` is set, the builder stops at its next step.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.engine = ""
        self.memory: dict[str, int] = {}
        self.failures: list[BaseException] = []
        self.cancelled = threading.Event()

    def take(self, severity: int, line: str) -> None:
        """Processes a line of the log."""
        if severity <= 1 and "cudaError 35" not in line:  # 35: no driver, which RTX does not need
            self.errors.append(" ".join(line.split()))
        elif line.startswith(FIRST_LINE):
            self.engine = line
        else:
            self.memory |= read_memory(line)

    @property
    def reason(self) -> str:
        """The last error in one line."""
        return self.errors[-1][:400] if self.errors else "TensorRT gave no reason"


def new_monitor(trt: Any, watch: Watch) -> Any:
    """Creates a progress monitor that reports the outermost phases and stops a cancelled build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def tell(self, name: str, done: int) -> None:
            try:
                count(f"build: {name}", done, self.steps.get(name, done), "steps")
            except BaseException as error:  # through the builder's C++ it would end the process
                watch.failures.append(error)
                watch.cancelled.set()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.steps[name] = steps
                self.tell(name, 0)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self.steps:
                self.tell(name, step + 1)
            return not watch.cancelled.is_set()

        def phase_finish(self, name: str) -> None:
            if name in self.steps and not watch.cancelled.is_set():  # a cancelled phase finishes too
                self.tell(name, self.steps[name])
            self.steps.pop(name, None)

    return Monitor()


def run_builder(trt: Any, builder: Any, network: Any, config: Any, file: IO[bytes], watch: Watch) -> None:
    """Builds in a second thread, so that Ctrl-C reaches this one, and streams the plan into the file.

    Raises:
        BuildError: the builder failed or ran out of memory.
        OSError: the plan cannot be written to the file.
    """
    streams = hasattr(trt, "IStreamWriter") and hasattr(builder, "build_serialized_network_to_stream")
    with ThreadPoolExecutor(1, "tensorrt") as thread:
        if streams:
            writer = _new_writer(trt, file, watch)
            done = thread.submit(builder.build_serialized_network_to_stream, network, config, writer)
        else:  # before TensorRT 10.13: the whole plan is in memory once more
            done = thread.submit(builder.build_serialized_network, network, config)
        try:
            built = done.result()
        except MemoryError:
            raise BuildError(OUT_OF_MEMORY) from None
        except KeyboardInterrupt:
            watch.cancelled.set()  # leaving the block waits for the builder's next step
            raise
    if watch.failures:
        raise watch.failures[0]
    if built is not None and not streams:
        file.write(built)
    if not built or not file.tell():
        if any(map(NO_HOST_MEMORY.search, watch.errors)):
            raise BuildError(OUT_OF_MEMORY)
        short = any(map(NO_DEVICE_MEMORY.search, watch.errors))  # another form may need less
        remedy = f"\n{DEVICE_REMEDY}" if short else ""
        raise RefusedError(f"TensorRT could not build the plan: {watch.reason}{remedy}", watch.reason)


def _new_writer(trt: Any, file: IO[bytes], watch: Watch) -> Any:
    """Creates a stream writer that writes the builder's output to a file."""

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:  # RTX 1.7 calls a build whose stream took nothing a success
                watch.failures.append(error)
                return 0

    return Writer()
