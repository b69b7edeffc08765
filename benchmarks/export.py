"""What the exporter itself costs at full size, against plain torch.onnx.export of the unrewritten module.

    python -m benchmarks.export --runs 3 --all

Each run is a process of its own, the two in turn, both from the same Meta-format checkpoint of random weights; wall
time and peak resident memory are the operating system's figures for the whole process, imports and loading included.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.measure.environment import processor
from export.contract.manifest import to_json

PLAIN = "plain `torch.onnx.export`, FP32"
OURS = "`neck-export onnx`, FP16, not verified"
VERIFIED = "`neck-export onnx`, FP16, verified"
PLAN = "`neck-export trt`, TensorRT-RTX plan built from the verified ONNX file"


@dataclasses.dataclass(frozen=True)
class Run:
    """One process: seconds and bytes, as the operating system counted them."""

    wall_s: float
    peak_bytes: int
    file_bytes: int
    cpu_s: float


def main() -> None:
    """Runs the comparison and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs",
        type=int,
        default=3,
        help="Measure each exporter this many times, alternating between the exporters. [default: 3]",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="Also measure two more commands: the export of an ONNX file with verification, and the build of a "
        "TensorRT-RTX plan from the verified ONNX file.",
    )
    parser.add_argument("--checkpoint", type=Path, help="Export this checkpoint. [default: random weights]")
    parser.add_argument("--json", type=Path, help="Also write the measured values to this JSON file.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint or make_checkpoint(Path(folder))
        runs: dict[str, list[Run]] = {PLAIN: [], OURS: []}
        for _ in range(arguments.runs):
            for name, found in runs.items():
                found.append(measure(command(name, checkpoint, Path(folder)), Path(folder)))
                print(f"{name}: {found[-1].wall_s:.1f} s, peak memory {found[-1].peak_bytes / 1e9:.2f} GB", flush=True)
        for name in (VERIFIED, PLAN) if arguments.all else ():  # the plan is built from the verified file
            runs[name] = [measure(command(name, checkpoint, Path(folder)), Path(folder), fresh=name != PLAN)]
            print(
                f"{name}: {runs[name][-1].wall_s:.1f} s, peak memory {runs[name][-1].peak_bytes / 1e9:.2f} GB",
                flush=True,
            )
        size = checkpoint.stat().st_size
    result = summary(runs, size)
    print("\n".join(table(result)))
    if arguments.json:
        arguments.json.write_text(to_json(result), encoding="utf-8")


def make_checkpoint(folder: Path) -> Path:
    """Writes a Meta-format checkpoint of random weights, two necks (1.85 GB)."""
    path = folder / "sam3.pt"
    code = (
        "import sys, pathlib; from neck.checkpoint import random_encoder, save_meta_checkpoint; "
        "from neck.config import EncoderConfig; "
        "save_meta_checkpoint(random_encoder(EncoderConfig(necks=('sam3', 'sam2'))), pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    return path


def command(name: str, checkpoint: Path, folder: Path) -> list[str]:
    """The process of one row."""
    output = str(folder / "out" / "encoder.onnx")
    if name == PLAIN:
        return [sys.executable, "-m", "benchmarks.plain_export", str(checkpoint), output]
    if name == PLAN:
        return [sys.executable, "-m", "neck_export", "trt", output, "--flavor", "rtx"]
    options = ["--checkpoint", str(checkpoint), "--precision", "fp16", "--output", output]
    return [sys.executable, "-m", "neck_export", "onnx", *options, "--verify" if name == VERIFIED else "--no-verify"]


def measure(arguments: list[str], folder: Path, fresh: bool = True) -> Run:
    """Runs one process to its end; raises CalledProcessError where it fails.

    Args:
        arguments: the command.
        folder: its files go into the folder `out` in there.
        fresh: whether that folder is emptied first.
    """
    output = folder / "out"
    output.mkdir(exist_ok=True)
    for file in output.iterdir() if fresh else ():
        file.unlink()
    start = time.perf_counter()
    with open(folder / "stderr", "wb") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.stderr.write((folder / "stderr").read_text(errors="replace"))
        raise subprocess.CalledProcessError(process.returncode, arguments)
    # ru_maxrss is in KiB on Linux
    size = sum(file.stat().st_size for file in output.iterdir())
    return Run(wall_s, usage.ru_maxrss * 1024, size, usage.ru_utime + usage.ru_stime)


def summary(runs: dict[str, list[Run]], checkpoint_bytes: int) -> dict[str, object]:
    """Medians of each row, and the ratio of ours to plain, pair by pair."""
    rows = {
        name: {
            "runs": [dataclasses.asdict(run) for run in found],
            "median_wall_s": statistics.median(run.wall_s for run in found),
            "peak_bytes": max(run.peak_bytes for run in found),
            "file_bytes": found[-1].file_bytes,
        }
        for name, found in runs.items()
    }
    pairs = list(zip(runs[OURS], runs[PLAIN], strict=True))
    return {
        "schema": 1,
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.export " + " ".join(sys.argv[1:]),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "checkpoint_bytes": checkpoint_bytes,
        "rows": rows,
        "wall_ratios": sorted(ours.wall_s / plain.wall_s for ours, plain in pairs),
        "peak_ratios": sorted(ours.peak_bytes / plain.peak_bytes for ours, plain in pairs),
        "peak_over_checkpoint": max(run.peak_bytes for run in runs[OURS]) / checkpoint_bytes,
    }


def table(result: dict[str, object]) -> list[str]:
    """The result for a screen, as a Markdown table."""
    rows: dict[str, dict[str, float]] = result["rows"]  # type: ignore[assignment]
    ratios: list[float] = result["wall_ratios"]  # type: ignore[assignment]
    peaks: list[float] = result["peak_ratios"]  # type: ignore[assignment]
    return [
        "| exporter | median wall time, s | peak memory, GB | size of the files, GB |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {row['median_wall_s']:.1f} | {row['peak_bytes'] / 1e9:.2f} | {row['file_bytes'] / 1e9:.2f} |"
            for name, row in rows.items()
        ),
        f"Compared with plain `torch.onnx.export`, `neck-export onnx` took {statistics.median(ratios):.2f} times the "
        f"wall time ({ratios[0]:.2f} to {ratios[-1]:.2f}) and {statistics.median(peaks):.2f} times the peak memory. "
        f"The peak memory of `neck-export onnx` is {result['peak_over_checkpoint']:.2f} times the size of the "
        "checkpoint.",
    ]


if __name__ == "__main__":
    main()
