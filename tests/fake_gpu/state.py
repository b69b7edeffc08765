"""What a play knows, and the faults that a test plants in it."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fake_gpu.device import Device


@dataclasses.dataclass
class Faults:
    """What goes wrong; by default nothing.

    Attributes:
        builder: the error that the builder gives up with.
        log: the listing that it prints in the place of its own; "" prints none.
        inspector: the text that the engine inspector gives in the place of its own.
        load: the error with which no plan is loaded.
        run: the error with which every run fails.
        address: whether every address is refused.
        capturable: what RTX says of every stream.
        distort: changes an output, by its name.
        cost_ms: milliseconds of a run, by the plan's facts.
        foreign_kernels: whether RTX's runtime cache takes nothing that was kept.
        first_runs_ms: milliseconds that each layer takes more in a profiler's first runs.
    """

    builder: str | None = None
    log: str | None = None
    inspector: str | None = None
    load: str | None = None
    run: str | None = None
    address: bool = False
    capturable: bool = True
    distort: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value
    cost_ms: Callable[[dict[str, Any]], float] = lambda facts: 5.0
    foreign_kernels: bool = False
    first_runs_ms: float = 100.0


@dataclasses.dataclass
class State:
    """One play.

    Attributes:
        version: numbers of the TensorRT that is played.
        flavor: `tensorrt` or `rtx`.
        device: the GPU, or None where there is none.
        configs: every builder's config, for a test to read its flags.
        contexts: every execution context.
        compiled: batches whose kernels RTX compiled at run time, in order.
        measured: numbers of the tactics that builders find to be the fastest, another one each time.
        loggers: of the runtimes that exist.
    """

    version: tuple[int, ...]
    flavor: str
    device: Device | None
    faults: Faults = dataclasses.field(default_factory=Faults)
    configs: list[Any] = dataclasses.field(default_factory=list)
    contexts: list[Any] = dataclasses.field(default_factory=list)
    compiled: list[int] = dataclasses.field(default_factory=list)
    measured: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    loggers: weakref.WeakSet[Any] = dataclasses.field(default_factory=weakref.WeakSet)

    def take_logger(self, logger: Any) -> None:
        """A runtime or builder has a logger of its own: at the second one there is a warning (RTX 1.7), no more."""
        if set(self.loggers) - {logger}:
            logger.log(
                2,
                "The logger passed into createInferRuntime differs from one already registered for an existing "
                "builder, runtime, or refitter. So the current new logger is ignored, and TensorRT will use the "
                "existing one which is returned by nvinfer1::getLogger() instead.",
            )
        self.loggers.add(logger)


NULL = "pybind11::init(): factory function returned nullptr"
"""What the bindings raise, as a TypeError, where the library gives no object (NVIDIA/TensorRT #308, #2913)."""


def check_driver(state: State, logger: Any) -> None:
    """TensorRT 11 is built for CUDA 13, and 10 for CUDA 12: with an older driver neither Builder nor Runtime is made.

    Raises:
        TypeError: as pybind11 does, which hides the reason.
    """
    needed = 13 if state.version[0] >= 11 else 12
    if state.flavor == "tensorrt" and state.device is not None and state.device.cuda // 1000 < needed:
        logger.log(1, "createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35)")
        raise TypeError(NULL)


class Played:
    """A class of TensorRT: has what its version offers and nothing else.

    Attributes:
        offers: names of its members.
        trt: its module.
        state: the play.
    """

    offers: frozenset[str] = frozenset()
    trt: Any = None
    state: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("_"):
            return object.__getattribute__(self, name)
        cls = type(self)
        if name not in cls.offers:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            raise NotImplementedError(f"the fake does not play {cls.__name__}.{name}") from None

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and name not in type(self).offers:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)
