"""The benchmark of the exporter: what it says of runs; and the committed results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from synthetic import LABEL

from benchmarks.export import OURS, PLAIN, Run, measure, summary, table
from benchmarks.results.result_files import read_result

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def test_committed_benchmarks_are_measured_ones() -> None:
    for path in RESULTS.glob("bench-*.json"):
        result = read_result(path)
        assert LABEL not in path.read_text(encoding="utf-8")
        assert path.name.startswith(f"bench-{result['date'][:10]}")
        assert path.stat().st_size < 2 << 20


def test_results_say_when_where_and_how() -> None:
    (path,) = RESULTS.glob("export-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["schema"] == 1 and result["date"] and result["machine"]["processor"]
    assert result["command"].startswith("python -m benchmarks.export")
    for row in result["rows"].values():
        assert row["runs"] and row["median_wall_s"] > 0 and row["peak_bytes"] > 0


def test_ratios_are_pair_by_pair() -> None:
    runs = {PLAIN: [Run(10.0, 100, 5, 9.0), Run(20.0, 100, 5, 9.0)], OURS: [Run(4.0, 50, 3, 3.0), Run(4.0, 60, 3, 3.0)]}
    result = summary(runs, 40)
    assert result["wall_ratios"] == [0.2, 0.4]
    assert result["peak_ratios"] == [0.5, 0.6]
    assert result["peak_over_checkpoint"] == 1.5
    assert (
        "0.30 times the wall time (0.20 to 0.40) and 0.55 times the peak memory"
        in table(json.loads(json.dumps(result)))[-1]
    )


def test_a_process_is_measured_and_its_failure_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import pathlib, sys; b = bytearray(200 << 20); pathlib.Path(sys.argv[1], 'f').write_bytes(b[:1000])"
    run = measure([sys.executable, "-c", code, str(tmp_path / "out")], tmp_path)
    assert run.file_bytes == 1000 and run.peak_bytes > 200 << 20 and run.wall_s > 0 and run.cpu_s > 0
    with pytest.raises(Exception, match="exit status 3"):
        measure([sys.executable, "-c", "import sys; sys.stderr.write('planted'); sys.exit(3)"], tmp_path)
    assert "planted" in capsys.readouterr().err
