"""The benchmark of the exporter: what it says of runs, and that README's table is what the results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from synthetic import LABEL, synthetic_result

from benchmarks.errors import BenchError
from benchmarks.export import OURS, PLAIN, Run, measure, summary, table
from benchmarks.results.result_files import read_result
from benchmarks.table import (
    GPU_CHECKS,
    README,
    RESULTS,
    all_benches,
    bench_lines,
    gpu_rows,
    never_ran,
    newest,
    newest_benches,
    with_never,
    with_table,
)


def test_readme_shows_the_newest_results() -> None:
    text = README.read_text(encoding="utf-8")
    result, benches = newest("export"), newest_benches()
    assert with_table(text, result, benches) == text
    assert with_never(text, all_benches()) == text
    result["rows"][OURS]["median_wall_s"] += 1
    assert with_table(text, result, benches) != text


def test_readme_shows_each_machines_newest_benchmark(tmp_path: Path) -> None:
    """On synthetic results, as it does whether or not any were committed."""
    old, new, other = synthetic_result(), synthetic_result(1), synthetic_result(2, gpu=True)
    old["date"], new["date"] = "2026-01-01", "2026-01-03"
    other["machines"][0]["name"] = "a machine with a GPU"
    for name, result in (("z", old), ("a", new), ("m", other)):
        (tmp_path / f"bench-{result['date']}-{name}.json").write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "export-2026-01-01.json").write_text("{}", encoding="utf-8")
    benches = newest_benches(tmp_path)
    assert [(result["date"], machine["name"]) for result, machine in benches] == [
        (other["date"], "a machine with a GPU"),
        ("2026-01-03", new["machines"][0]["name"]),
    ]
    made = with_table(README.read_text(encoding="utf-8"), newest("export"), benches)
    assert with_table(made, newest("export"), benches) == made  # a second writing changes nothing
    assert made.count("ratio to PyTorch eager, plain, FP32") == 2
    assert made.count("neck-export trt") == README.read_text(encoding="utf-8").count("neck-export trt")
    row = next(row for row in new["rows"] if row["backend"] == "openvino-fp32")
    assert (
        f"| OpenVINO CPU, rewritten, FP32 | {row['latency']['p50_ms']:.1f} ms | 0.44 (0.43 to 0.45) | 1.4e-6 |" in made
    )
    row["latency"]["p50_ms"] += 1
    assert with_table(made, newest("export"), [benches[0], (new, new["machines"][0])]) != made


def test_what_never_ran_on_a_gpu_is_what_no_result_shows() -> None:
    everything = [*gpu_rows(), *GPU_CHECKS]
    assert never_ran([]) == everything and never_ran([synthetic_result()]) == everything
    result = synthetic_result(gpu=True)
    result["rows"][0] |= {"backend": "eager-fp16", "device": "cuda", "status": "measured"}
    result["rows"][1] |= {"backend": "tensorrt-rewritten-fp16", "device": "cuda", "status": "failed"}
    tests = {"tests/test_session.py::test_a[True]": "passed", "tests/test_tune.py::test_b": "not run"}
    result["checks"] = [{"name": name, "outcome": outcome, "reason": None} for name, outcome in tests.items()]
    left = never_ran([synthetic_result(), result])
    assert set(everything) - set(left) == {"PyTorch in `bench` (eager)", "plans loaded and run from Python"}
    text = with_never(README.read_text(encoding="utf-8"), [result])
    assert "run on a GPU:** `torch.compile` in `bench`" in " ".join(text.split()) and with_never(text, [result]) == text
    for prefix in GPU_CHECKS.values():  # a test that was renamed would never be found
        path = README.parent / prefix.removesuffix("::")
        assert "pytest.mark.gpu" in path.read_text(encoding="utf-8")


def test_no_benchmark_leaves_the_readme_as_it_is(tmp_path: Path) -> None:
    assert newest_benches(tmp_path) == []
    text = README.read_text(encoding="utf-8")
    without = with_table(text, newest("export"))
    assert without.count("Worst relative L2") == 0 and "median wall, s" in without


def test_a_damaged_benchmark_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench-2026-01-01-x.json").write_text('{"kind": "bench"')
    with pytest.raises(BenchError, match=r"bench-2026-01-01-x\.json: is no whole JSON file"):
        newest_benches(tmp_path)


def test_a_row_that_must_not_be_used_says_so_in_the_readme() -> None:
    result = synthetic_result()
    lines = bench_lines(result, result["machines"][0])
    assert any(
        line.startswith("| OpenVINO CPU, rewritten, BF16") and "8.0e-2 (outside tolerance)" in line for line in lines
    )
    assert lines[-1].startswith("\nNot measured there: TensorRT plan, rewritten, FP16;")
    assert not any("device peak" in line for line in lines)
    for row in result["rows"]:
        row["peak_device_bytes"] = 2_000_000_000 if row["status"] == "measured" else None
    assert any("device peak" in line for line in bench_lines(result, result["machines"][0]))


def test_committed_benchmarks_are_measured_ones() -> None:
    for path in RESULTS.glob("bench-*.json"):
        result = read_result(path)
        assert LABEL not in path.read_text(encoding="utf-8")
        assert path.name.startswith(f"bench-{result['date'][:10]}")
        assert path.stat().st_size < 2 << 20


def test_results_say_when_where_and_how() -> None:
    result = newest("export")
    assert result["schema"] == 1 and result["date"] and result["machine"]["processor"]
    assert result["command"].startswith("python -m benchmarks.export")
    for row in result["rows"].values():
        assert row["runs"] and row["median_wall_s"] > 0 and row["peak_bytes"] > 0


def test_ratios_are_pair_by_pair() -> None:
    runs = {PLAIN: [Run(10.0, 100, 5), Run(20.0, 100, 5)], OURS: [Run(4.0, 50, 3), Run(4.0, 60, 3)]}
    result = summary(runs, 40)
    assert result["wall_ratios"] == [0.2, 0.4]
    assert result["peak_ratios"] == [0.5, 0.6]
    assert result["peak_over_checkpoint"] == 1.5
    assert "wall ratio 0.30 (0.20 to 0.40)" in table(json.loads(json.dumps(result)))[-1]


def test_a_process_is_measured_and_its_failure_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import pathlib, sys; b = bytearray(200 << 20); pathlib.Path(sys.argv[1], 'f').write_bytes(b[:1000])"
    run = measure([sys.executable, "-c", code, str(tmp_path / "out")], tmp_path)
    assert run.file_bytes == 1000 and run.peak_bytes > 200 << 20 and run.wall_s > 0
    with pytest.raises(Exception, match="exit status 3"):
        measure([sys.executable, "-c", "import sys; sys.stderr.write('planted'); sys.exit(3)"], tmp_path)
    assert "planted" in capsys.readouterr().err
