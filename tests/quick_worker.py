"""A benchmark's worker whose traces are those of the run (shared_traces.py): torch.onnx takes 7 s of every process.

python tests/quick_worker.py FOLDER DESCRIPTOR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import benchmarks.measure.worker


class QuickWorker(benchmarks.measure.worker.Worker):
    """The worker; what it shares is looked for when a file is asked of it, since few workers need torch."""

    def answer(self, command: str, **asked: Any) -> Any:
        if command == "file":
            from shared_traces import SharedTraces

            import export.graph.trace

            if not isinstance(export.graph.trace._export, SharedTraces):
                export.graph.trace._export = SharedTraces(export.graph.trace._export, Path(sys.argv[1]))
        return super().answer(command, **asked)


if __name__ == "__main__":
    benchmarks.measure.worker.Worker = QuickWorker  # type: ignore[misc]
    benchmarks.measure.worker.main()
