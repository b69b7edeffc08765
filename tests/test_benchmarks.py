"""The benchmark of the exporter: what it says of runs, and that README's table is what the results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.export import OURS, PLAIN, Run, measure, summary, table
from benchmarks.table import README, newest, with_table


def test_readme_shows_the_newest_results() -> None:
    text = README.read_text(encoding="utf-8")
    result = newest("export")
    assert with_table(text, result) == text
    result["rows"][OURS]["median_wall_s"] += 1
    assert with_table(text, result) != text


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
