"""The front door of deployment and benchmark: `neck-export triton` and `neck-export bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from exporting import checkpoint_of, config_of, golden_options, neck_export_cli, trace_quickly
from synthetic import KNOWN_RATES, synthetic_result

from benchmarks.measure.run import Run
from benchmarks.report.report_files import json_text
from export.contract.signature import BatchRange
from export.pipeline import export_onnx


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny ONNX file with a dynamic batch."""
    trace_quickly(monkeypatch)
    output = tmp_path / "x.onnx"
    export_onnx(golden_options("meta-dual", output, batch=BatchRange(1, 4, 8), verify=False))
    return output


def test_triton_writes_a_repository_and_says_what_to_know(exported: Path) -> None:
    repository = exported.with_name("models")
    ran = neck_export_cli("triton", exported, "--output", repository, "--outputs", "sam3_feat_*")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("container nvcr.io/nvidia/tritonserver:")
    assert "x.onnx not verified: not asked: --no-verify" in lines
    assert str(repository / "sam3-encoder" / "1" / "model.onnx") in lines
    config = (repository / "sam3-encoder" / "config.pbtxt").read_text()
    assert "max_batch_size: 8" in config
    assert 'name: "sam3_feat_3"' in config
    assert "sam3_pos_0" not in config


def test_triton_writes_kubernetes_files_beside_the_repository(exported: Path) -> None:
    asked = ("--kubernetes", "--gpus", "2", "--storage", "s3://bucket/models", "--name", "encoder", "--version", "7")
    ran = neck_export_cli("triton", exported, "--output", exported.with_name("models"), *asked)
    assert ran.code == 0, ran.err
    deployment = (exported.with_name("kubernetes") / "deployment.yaml").read_text()
    assert 'nvidia.com/gpu: "2"' in deployment
    assert "s3://bucket/models" in deployment
    assert (exported.with_name("models") / "encoder" / "7").is_dir()


def test_triton_refuses_in_one_line(exported: Path) -> None:
    ran = neck_export_cli("triton", exported, "--output", exported)
    assert (ran.code, len(ran.err.splitlines())) == (1, 1)
    assert "is a file" in ran.err
    assert neck_export_cli("triton", exported.with_name("none.plan")).code == 1
    assert neck_export_cli("triton").code == 2


def save(folder: Path, name: str, **made: float) -> Path:
    path = folder / name
    path.write_text(json_text(synthetic_result(**made)))  # type: ignore[arg-type]
    return path


def test_bench_merges_reports(tmp_path: Path) -> None:
    one, other = save(tmp_path, "a.json"), save(tmp_path, "b.json", seed=1, gpu=True)
    ran = neck_export_cli("bench", "--merge", one, other, "--output", tmp_path / "report")
    assert ran.code == 0, ran.err
    assert len(json.loads((tmp_path / "report" / "report.json").read_text())["machines"]) == 2
    assert ran.out.splitlines()[-1] == str(tmp_path / "report" / "report.html")


def test_bench_takes_files_with_merge_alone(tmp_path: Path) -> None:
    assert neck_export_cli("bench", "--merge").code == 2
    assert neck_export_cli("bench", tmp_path / "a.json").code == 2


def test_bench_compares_with_an_older_report(tmp_path: Path) -> None:
    one, other = save(tmp_path, "a.json", scale=1.3), save(tmp_path, "b.json", seed=1, gpu=True)
    same = neck_export_cli("bench", "--merge", one, other, "--output", tmp_path / "old")
    assert same.code == 0, same.err
    quick = save(tmp_path, "quick.json", scale=1.0)
    merged = neck_export_cli("bench", "--merge", quick, other, "--output", tmp_path / "quick")
    assert merged.code == 0, merged.err
    arguments = ("bench", "--merge", one, other, "--output", tmp_path / "new", "--compare")
    assert neck_export_cli(*arguments, tmp_path / "old" / "report.json").code == 0
    slower = neck_export_cli(*arguments, tmp_path / "quick" / "report.json")
    assert slower.code == 3
    assert "median latency grew" in slower.err


def test_bench_reads_the_older_report_before_it_measures(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"schema": 2, "kind": "bench"}')
    ran = neck_export_cli("bench", "--compare", tmp_path / "old.json", "--output", tmp_path / "report")
    assert ran.code == 1
    assert "has schema 2" in ran.err
    assert not (tmp_path / "report").exists()


def test_bench_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "_measure_rates", lambda run, when: run.samples.add("rates", when=when, **KNOWN_RATES))
    arguments = ("--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"), "--no-sweep")
    small = ("--image-size", "112", "--rounds", "2", "--backend", "eager-rewritten-fp32")
    ran = neck_export_cli("bench", *arguments, *small, "--output", tmp_path / "report")
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    measured = {row["backend"]: row for row in rows if row["status"] == "measured"}
    assert set(measured) == {"eager-fp32", "eager-rewritten-fp32"}
    assert measured["eager-rewritten-fp32"]["passed"] is True
    assert len(measured["eager-fp32"]["times_ms"]) == 2
