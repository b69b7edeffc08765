"""`neck-export bench`: every backend measured in turn, compared with PyTorch, set beside what the machine can do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.errors import BenchError
from benchmarks.measure.run import Run
from benchmarks.measure.work_folder import Workplace
from benchmarks.options import BenchOptions, check_options
from benchmarks.results.mask_verdicts import read_masks
from benchmarks.results.result import make_result
from export.contract.manifest import locked

__all__ = ["BenchError", "BenchOptions", "run_bench"]


def run_bench(options: BenchOptions, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures every backend and returns the result, in the form of benchmarks/results/result.schema.json.

    Samples are stored as they come, so that a run that was killed goes on where it was when it is started again.

    Args:
        options: what to measure.
        report: told of every step.

    Raises:
        BenchError: options that cannot be, no verdict of masks beside a file, no backend that can run here,
            another run at work in the same folder.
    """
    masks = read_masks(options.masks)
    with open_run(options, report) as run:
        run.measure()
        return make_result(run) | {"masks": masks or None}


@contextlib.contextmanager
def open_run(options: BenchOptions, report: Callable[[str], None] = lambda line: None) -> Iterator[Run]:
    """A run whose `measure` adds to the samples; `run_bench` says what it raises."""
    check_options(options)
    work = options.output / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work, wait=False), Workplace(work, options) as place, Run(options, place, report) as run:
            yield run
    except BlockingIOError:
        raise BenchError(f"{work}: another run is at work there; wait for it or name another --output") from None
    except OSError as error:
        where, why = error.filename or work, error.strerror or str(error)
        raise BenchError(f"{where}: {why}; mend it or name another --output") from None
