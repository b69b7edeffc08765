"""Writes README's tables of figures from the newest results in benchmarks/results.

python -m benchmarks.table [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure.backends import backends_for
from benchmarks.report.findings import (
    error_figure,
    label_of,
    may_be_used,
    median_ms,
    milliseconds,
    missing,
    ranked,
    ratio_figure,
    scaled,
    size_name,
    verdict,
    worst_error,
)
from benchmarks.report.markdown import escaped, table_lines
from benchmarks.report.tables import Table
from benchmarks.results.comparison import hardware
from benchmarks.results.result_files import Result, of_machine, read_result

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
NEVER, NEVER_END = "<!-- never on a GPU: python -m benchmarks.table -->\n", "<!-- end of never on a GPU -->\n"
BEGIN, END = "<!-- figures: python -m benchmarks.table -->\n", "<!-- end of figures -->\n"


GPU_CHECKS = {
    "plans built by TensorRT for the GPU at hand": "tests/test_build.py::",
    "plans loaded and run from Python": "tests/test_session.py::",
    "pools of contexts in Python": "tests/test_pool.py::",
    "outputs by DLPack and in the caller's memory in Python": "tests/test_outputs.py::",
    "TensorRT-RTX's kernels kept for the next start": "tests/test_runtime_cache.py::",
    "`trt --replay-timing`": "tests/test_timing_cache.py::",
    "verification of plans by `trt` and `verify`": "tests/test_verify_plan.py::",
    "`trt --tune`": "tests/test_tune.py::",
    "`profile`": "tests/test_profiling.py::",
    "`bisect PLAN`": "tests/test_bisect.py::",
    "the C++ library": "tests/test_cpp_real.py::",
    "the C++ library on CUDA alone (a stand-in of TensorRT)": "tests/test_cpp_on_cuda.py::",
    "CUDA shared memory of the Triton client": "tests/test_server.py::",
}
"""What else needs a GPU -> the tests marked `gpu` of which one that passed there shows it."""


def main() -> None:
    """Writes the tables, or with --check exits 1 where they are not what the results say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    made = with_never(with_table(text, newest("export"), newest_benches()), all_benches())
    if arguments.check:
        sys.exit(int(made != text))
    README.write_text(made, encoding="utf-8")


def newest(kind: str) -> dict[str, Any]:
    """The newest results of one kind; their names are KIND-DATE.json."""
    files = sorted(RESULTS.glob(f"{kind}-*.json"))
    if not files:
        sys.exit(f"{RESULTS}: no {kind}-*.json; run `python -m benchmarks.{kind} --json FILE` first")
    return json.loads(files[-1].read_text(encoding="utf-8"))


def newest_benches(folder: Path = RESULTS) -> list[tuple[Result, dict[str, Any]]]:
    """Each machine with the newest bench-DATE-*.json that measured it, GPUs first; empty where there is none.

    Raises:
        BenchError: a file of another form.
    """
    results = [read_result(path) for path in sorted(folder.glob("bench-*.json"))]
    found: dict[tuple[Any, ...], tuple[Result, dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: str(result["date"])):  # stable: of one day the last name stays
        for machine in result["machines"]:
            found[hardware(machine)] = (result, machine)
    return sorted(found.values(), key=lambda pair: (pair[1]["environment"]["gpu"] is None, pair[1]["name"]))


def all_benches(folder: Path = RESULTS) -> list[Result]:
    """Every bench-DATE-*.json.

    Raises:
        BenchError: a file of another form.
    """
    return [read_result(path) for path in sorted(folder.glob("bench-*.json"))]


def with_never(readme: str, results: Sequence[Result]) -> str:
    """README with what never ran on a GPU between its two marks, by what the results measured and checked."""
    before, _, rest = readme.partition(NEVER)
    _, mark, after = rest.partition(NEVER_END)
    if not mark:
        sys.exit(f"{README}: has no place for what never ran on a GPU ({NEVER.strip()})")
    left = never_ran(results)
    told = "**Written, with tests marked `gpu`, and never run on a GPU:** "
    text = f"{told}{', '.join(left)}." if left else "All that needs a GPU has run on one."
    return before + NEVER + textwrap.fill(text, 120, break_on_hyphens=False) + "\n" + NEVER_END + after


def never_ran(results: Sequence[Result]) -> list[str]:
    """What needs a GPU and has, in no result, a measured row or a check that passed."""
    rows = [row for result in results for row in result["rows"]]
    measured = {row["backend"] for row in rows if row["status"] == "measured" and row["device"] == "cuda"}
    passed = [one["name"] for result in results for one in result.get("checks", []) if one["outcome"] == "passed"]
    left = [what for what, backends in gpu_rows().items() if not measured & set(backends)]
    return left + [what for what, prefix in GPU_CHECKS.items() if not any(name.startswith(prefix) for name in passed)]


def gpu_rows() -> dict[str, list[str]]:
    """What `bench` measures on a GPU -> the backends that show it."""
    kinds = {
        "eager": "PyTorch in `bench` (eager)",
        "compile": "`torch.compile` in `bench`",
        "compile-max": "`torch.compile` max-autotune in `bench`",
        "ort": "ONNX Runtime's GPU providers in `bench`",
        "plan": "plans in `bench`",
    }
    known = [one for one in backends_for("cuda") if one.device == "cuda"]
    return {what: [one.id for one in known if one.runtime == runtime] for runtime, what in kinds.items()}


def with_table(readme: str, export: dict[str, Any], benches: Sequence[tuple[Result, dict[str, Any]]] = ()) -> str:
    """README with the tables between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{README}: has no place for the tables ({BEGIN.strip()})")
    blocks = [*(bench_lines(result, machine) for result, machine in benches), table(export)]
    return before + BEGIN + "\n\n".join("\n".join(lines) for lines in blocks) + "\n" + END + after


def bench_lines(result: Result, machine: dict[str, Any]) -> list[str]:
    """The backends of one machine as Markdown, fastest first."""
    encoder = result["encoder"]
    date, command = (of_machine(result, machine, key) for key in ("date", "command"))
    place = f"{size_name(encoder['image_size'], encoder['batch'])}, {machine['name']}, {date}"
    rows = ranked(result, machine)
    to = next((label_of(result, row["ratio"]["to"]) for row in rows if row.get("ratio")), "the reference")
    head: tuple[str, ...] = ("", "latency, p50", f"ratio to {to}", "worst relative L2", "host peak", "device peak")
    cells: tuple[tuple[str, ...], ...] = tuple(
        (
            row["label"],
            milliseconds(median_ms(row)),
            ratio_figure(row),
            error_figure(worst_error(row)) + ("" if may_be_used(row) else f" ({verdict(row)})"),
            scaled(row.get("peak_host_bytes"), "B"),
            scaled(row.get("peak_device_bytes"), "B"),
        )
        for row in rows
    )
    if not any(row.get("peak_device_bytes") for row in rows):
        head, cells = head[:-1], tuple(row[:-1] for row in cells)
    lines = [f"The encoder, {escaped(place)}, `{' '.join(command.split())}`:", "", *table_lines(Table("", head, cells))]
    gone = dict.fromkeys(row["label"] for row in missing(result, machine) if row["sweep"] is None)
    return lines + ([f"\nNot measured there: {escaped('; '.join(gone))}."] if gone else [])


def table(result: dict[str, Any]) -> list[str]:
    """The exporter's own cost as Markdown."""
    machine = result["machine"]
    lines = [
        f"Full size (1008 x 1008, sam3 neck with positions), {machine['processor']}, {machine['cores']} cores, "
        f"{result['date']}, `{result['command']}`:",
        "",
        "| | median wall, s | peak memory, GB | files, GB |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        files = f"{row['file_bytes'] / 1e9:.2f}"
        lines.append(f"| {name} | {row['median_wall_s']:.1f} | {row['peak_bytes'] / 1e9:.2f} | {files} |")
    return lines


if __name__ == "__main__":
    main()
