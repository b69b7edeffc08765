"""One stage of a session, in a process of its own: what it found goes into OUTPUT/stages/NAME.json.

python -m benchmarks.gpu.stage NAME --output build/gpu --device cuda --ends 1790000000
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.bench import open_run
from benchmarks.errors import BenchError
from benchmarks.gpu.gpu_tests import ON_CUDA, checks, files_with_gpu_tests, run_tests
from benchmarks.gpu.machine import examine
from benchmarks.gpu.time_plan import FOLDER, POINT_BATCHES, POINT_SCALES, QUICK_BUILD_S, Device, Stage, plan
from benchmarks.measure.machine_rates import measure_rates
from benchmarks.measure.work_folder import ArtifactCache
from benchmarks.options import BenchOptions
from benchmarks.report.report_files import write_report
from benchmarks.results.result import all_rows, make_result
from benchmarks.results.rows import is_waiting
from export.contract.manifest import to_json
from neck.config import EncoderConfig

Outcome = Literal["done", "failed", "unavailable", "unfinished"]
Found = dict[str, Any]

FULL_SHA256 = "8d50441c702f664756b02aee291659fa517725bb49c496256043d751fbc0d1ce"
"""Of the full encoder's random weights, seed 0, as an x86-64 CPU with AVX2 made them (tests/test_gpu_kit.py, slow)."""

PACE = {"cuda": {"rounds": 5, "runs": 10, "warm_up": 5}, "cpu": {"rounds": 2, "runs": 1, "warm_up": 1}}
"""Of every stage, so that all add to the same samples."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """The arguments of a stage.

    Attributes:
        output: the session's folder.
        device: where the encoder runs.
        ends: when it should be done, in `time.time` seconds; a little later it is ended.
        config: another encoder than the full one.
        command: what the results say that they were measured by.
    """

    output: Path
    device: Device
    ends: float
    config: Path | None
    command: str = "make gpu"

    @property
    def folder(self) -> Path:
        """The folder of the stages' files."""
        return self.output / FOLDER

    def options(self, **changes: Any) -> BenchOptions:
        """The benchmark of the encoder, the main point alone."""
        config = EncoderConfig.from_file(self.config) if self.config else None
        minutes = max(0.0, self.ends - time.time()) / 60
        values: dict[str, Any] = {"sweep": False, "minutes": minutes, **PACE[self.device], **changes}
        return BenchOptions(self.output, config=config, device=self.device, command=self.command, **values)

    def found(self, name: str) -> Found:
        """The result of an earlier stage."""
        with contextlib.suppress(OSError, ValueError):  # not run, or cut by a full disk
            found: Found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return found
        return {}


def doctor(asked: Asked) -> Found:
    """Examines the machine: hardware, rates, other programs on the GPU."""
    found = examine(asked.device)
    return {"outcome": "failed" if found["fatal"] else "done", **found}


def tests(asked: Asked, name: str, chosen: Sequence[str]) -> Found:
    """Runs tests that need a GPU."""
    return run_tests(asked.folder / f"{name}.txt", chosen)


def rates(asked: Asked) -> Found:
    """Measures the rates of the machine itself."""
    return {"outcome": "done", "reason": None, "rates": measure_rates(asked.device)}


def weights(asked: Asked) -> Found:
    """Makes the random weights that every backend maps, and says whether they are the same as elsewhere."""
    options = asked.options()
    with ArtifactCache(asked.output / "work", options) as place:
        prepared = place.prepare()
    assert prepared.encoder.checkpoint is not None
    digest = weights_digest(prepared.encoder.checkpoint)
    known = None if asked.config else FULL_SHA256
    if known is None or digest == known:
        return {"outcome": "done", "sha256": digest, "same": None if known is None else True}
    reason = (
        "the random weights of this run differ from the random weights of earlier reports, although the seed is the "
        "same. The numerical errors of this run can therefore not be compared with earlier reports. The probable cause "
        "is a different torch version. Install the torch version that is named in the earlier reports, and run "
        f"`{asked.command}` again. SHA-256 of the random weights in this run: {digest[:12]}...; in earlier reports: "
        f"{known[:12]}..."
    )
    return {"outcome": "failed", "sha256": digest, "same": False, "reason": reason}


def weights_digest(path: Path) -> str:
    """SHA-256 over the names and bytes of all weights of a checkpoint that `save_meta_checkpoint` wrote."""
    digest = hashlib.sha256()
    for name, tensor in torch.load(path, mmap=True, weights_only=True)["model"].items():
        digest.update(name.encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def measure(asked: Asked, stage: Stage) -> Found:
    """Measures the stage's backends at the main point."""
    if not stage.backends:
        return {
            "outcome": "unavailable",
            "reason": f"the stage `{stage.name}` was skipped, because the GPU benchmark measures no backend in this "
            f"stage on the device {asked.device}. Nothing needs to be done",
        }
    return _measured(asked.options(backends=stage.backends, timeout_s=stage.answer_s))


def points(asked: Asked, stage: Stage) -> Found:
    """Measures the fastest backend that is built quickly, at other sizes and batches."""
    name = _fastest(asked)
    if name is None:
        return {
            "outcome": "unavailable",
            "reason": "latencies at other image sizes and batch sizes were not measured. Such a measurement needs a "
            f"backend whose outputs are within the tolerance and whose build takes at most {QUICK_BUILD_S:g} s, but no "
            "measured backend meets both conditions. The report contains only the main image size and batch size",
        }
    found = _measured(asked.options(backends=(name,), timeout_s=stage.answer_s, **_sweeps(asked, name)))
    return {**found, "fastest": name}


def _measured(options: BenchOptions) -> Found:
    try:
        with open_run(options, _say) as run:
            run.measure()
            _, rows = all_rows(run)
    except BenchError as error:
        cannot = str(error).startswith("no backend can run here")
        return {"outcome": "unavailable" if cannot else "failed", "reason": str(error)}
    failed = [f"{row['backend']}: {row['reason']}" for row in rows if row["status"] == "failed"]
    waiting = [row["backend"] for row in rows if is_waiting(row)]
    outcome: Outcome = "failed" if failed else "unfinished" if waiting else "done"
    reason = "; ".join(failed) or (
        f"too little time was left to measure {', '.join(dict.fromkeys(waiting))}" if waiting else None
    )
    return {"outcome": outcome, "reason": reason}


def _sweeps(asked: Asked, name: str) -> dict[str, Any]:
    config = EncoderConfig.from_file(asked.config) if asked.config else EncoderConfig()
    patch = config.patch_size
    sizes = tuple(round(scale * config.image_size[0] / patch) * patch for scale in POINT_SCALES)
    return {"sweep": True, "swept": (name,), "sizes": sizes, "batches": POINT_BATCHES}


def _all_backends(asked: Asked) -> tuple[str, ...]:
    return tuple(name for stage in plan(asked.device) for name in stage.backends)


def _fastest(asked: Asked) -> str | None:
    """The fastest measured backend within tolerance whose build took little."""
    try:
        with open_run(asked.options(backends=_all_backends(asked), minutes=0.0), _say) as run:
            run.measure()
            rows = [row for row in all_rows(run)[1] if row["passed"] and (row["build_s"] or 0.0) <= QUICK_BUILD_S]
    except BenchError:
        return None
    return min(rows, key=lambda row: row["latency"]["p50_ms"], default={"backend": None})["backend"]


def report(asked: Asked) -> Found:
    """Results, report.md, report.html: of whatever was measured."""
    name = asked.found("points").get("fastest")
    sweeps = _sweeps(asked, name) if name else {}
    try:
        with open_run(asked.options(backends=_all_backends(asked), **{"minutes": 0.0, **sweeps}), _say) as run:
            run.measure()
            result = {**make_result(run), "checks": _checks(asked)}
    except BenchError as error:
        return {"outcome": "failed", "reason": str(error)}
    paths = write_report(result, asked.output)
    return {"outcome": "done", "reason": None, "files": [path.name for path in paths]}


def _checks(asked: Asked) -> list[dict[str, Any]]:
    same = asked.found("weights").get("same")
    outcome = {True: "passed", False: "failed", None: "not run"}[same]
    reason = asked.found("weights").get("reason")
    weights = {"name": "random weights", "outcome": outcome, "reason": reason}
    return [weights, *(one for name in (*ON_CUDA, "tests") for one in checks(asked.folder / f"{name}.txt"))]


def _say(line: str) -> None:
    print(line, flush=True)


def run_stage(stage: Stage, asked: Asked) -> Found:
    """The result of a stage; `outcome` and `reason` say how it ended."""
    own: dict[str, Callable[[], Found]] = {
        "doctor": lambda: doctor(asked),
        **{name: functools.partial(tests, asked, name, [chosen]) for name, chosen in ON_CUDA.items()},
        "rates": lambda: rates(asked),
        "weights": lambda: weights(asked),
        "tests": lambda: tests(asked, "tests", files_with_gpu_tests()),
        "points": lambda: points(asked, stage),
        "report": lambda: report(asked),
    }
    return own.get(stage.name, lambda: measure(asked, stage))()


def main() -> None:
    """Runs the stage that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--ends", type=float, required=True)
    parser.add_argument("--config", type=Path)
    told = parser.parse_args()
    stage = next(one for one in plan(told.device) if one.name == told.name)
    asked = Asked(told.output, told.device, told.ends, told.config)
    try:
        found = run_stage(stage, asked)
        (asked.folder / f"{stage.name}.json").write_text(to_json(found), encoding="utf-8")
    except (BenchError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
