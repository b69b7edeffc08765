"""Tuning tries every form, survives failures, resumes, keeps the fastest that passes; measuring is replaced here."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATA
from listening import listening

import engines.plan
from engines.builder.find_gpu import find_gpu
from engines.builder.flavor import Flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.options import PlanOptions
from engines.plan import PlanResult, Prepared, make_plan
from engines.tune import Row, TuneError, Tuning, fastest, tune_plan, tuning_lines
from export.contract.manifest import check_files, manifest_path, read_manifest
from export.contract.options import ExportOptions, QuantizeOptions
from export.pipeline import RejectedError, export_onnx
from export.verification.fidelity import Tolerance, Verdict, compare_output
from export.verification.verify import Report
from neck.config import EncoderConfig
from neck.progress import Count

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

CASE = DATA / "meta-dual"
LATENCIES = {"operator-deconv": 3.0, "operator-conv": 2.0, "matmul-deconv": 5.0, "matmul-conv": 4.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = EncoderConfig.from_file(CASE / "encoder.json")
    output = tmp_path_factory.mktemp("tune") / "encoder.onnx"
    return export_onnx(ExportOptions(output=output, checkpoint=CASE / "checkpoint.pt", config=config)).path


def options_for(source: Path, folder: Path) -> PlanOptions:
    return PlanOptions(source, folder / "encoder.plan", precision="fp16", flavor="rtx", verify=False)


_built: dict[tuple[str, str | None, str], PlanResult] = {}


def make(options: PlanOptions, report: Report, prepared: Prepared) -> PlanResult:
    """Builds each form once and copies it from then on.

    But the form `fused` is rejected with convolutions and does not build without.
    """
    if options.attention == "fused":
        if options.upsampling == "deconv":
            raise BuildError("planted: the builder gave up")
        row = compare_output("sam3_feat_0", np.ones(4), np.zeros(4), Tolerance(1e-2, 0.9995))
        raise RejectedError(options.output, Verdict((row,), "planted"))
    forms = (options.attention, options.spelling, options.upsampling)
    if forms not in _built:
        kept = options.onnx.parent / "-".join(map(str, forms)) / options.output.name
        _built[forms] = make_plan(dataclasses.replace(options, output=kept), report, prepared)
    shutil.copytree(_built[forms].path.parent, options.output.parent, dirs_exist_ok=True)
    return dataclasses.replace(_built[forms], path=options.output)


def measure(plan: Path) -> float:
    return LATENCIES[plan.parent.name.removeprefix("fp32acc-")]


def tune(source: Path, folder: Path) -> Tuning:
    return tune_plan(options_for(source, folder), make=make, measure=measure)


def test_the_fastest_that_passes_is_kept_and_the_others_are_told(source: Path, tmp_path: Path) -> None:
    counts: list[Count] = []
    with listening(counts.append):
        tuning = tune(source, tmp_path)
    assert len(tuning.rows) == 6
    assert [(one.done, one.total) for one in counts if one.unit == "builds"] == [(done, 6) for done in range(7)]
    manifest = read_manifest(manifest_path(tuning.best.path), "plan")
    check_files(manifest_path(tuning.best.path), manifest)
    kept = [manifest["key"][name] for name in ("attention", "spelling", "upsampling")]
    assert kept == ["fp32acc", "operator", "conv"] and manifest["attention_spelling"] == "operator"
    text = "\n".join(tuning_lines(tuning))
    assert (
        "planted: the builder gave up" in text
        and "rejected: 1 outputs" in text
        and "kept: fp32acc, operator, conv" in text
    )
    assert [row.spelling for row in tuning.rows] == ["operator", "operator", "matmul", "matmul", "matmul", "matmul"]
    assert all("4 of 4, accumulation FP32" in str(row.layers) for row in tuning.rows if row.problem is None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "encoder.plan",
        "encoder.plan.json",
        "encoder.plan.layers.json",
    }


def test_a_stopped_run_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    tried: list[str] = []

    def stop_at_third(plan: Path) -> float:
        tried.append(plan.parent.name)
        if len(tried) == 3:
            raise KeyboardInterrupt
        return measure(plan)

    with pytest.raises(KeyboardInterrupt):
        tune_plan(options_for(source, tmp_path), make=make, measure=stop_at_third)
    assert not (tmp_path / "encoder.plan").exists()
    tuning = tune_plan(options_for(source, tmp_path), make=make, measure=stop_at_third)
    places = ["operator-deconv", "operator-conv", "matmul-deconv", "matmul-deconv", "matmul-conv"]
    assert tried == [f"fp32acc-{place}" for place in places]
    assert fastest(list(tuning.rows)) == next(row for row in tuning.rows if row.latency_ms == 2.0)


def test_other_options_start_anew(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder.plan.tuning"
    folder.mkdir()
    # a row without a problem would be dropped for want of its plan, whatever the key
    rows = [dataclasses.asdict(Row("fp32acc", "operator", "deconv", problem="of another run"))]
    (folder / "rows.json").write_text(json.dumps({"key": {"other": 1}, "rows": rows}))
    tuning = tune(source, tmp_path)
    assert "of another run" not in [row.problem for row in tuning.rows] and len(tuning.rows) == 6


def test_none_that_passes_is_an_error_with_the_table(source: Path, tmp_path: Path) -> None:
    def refuse(options: PlanOptions, report: Report, prepared: Prepared) -> PlanResult:
        raise BuildError("planted")

    with pytest.raises(TuneError, match="no candidate passed") as caught:
        tune_plan(options_for(source, tmp_path), make=refuse, measure=measure)
    assert str(caught.value).count("planted") == 6
    assert not (tmp_path / "encoder.plan").exists()


def test_what_is_quantized_is_selected_once_for_all_candidates(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selected, asked = list[Path](), list[PlanOptions]()
    real = engines.plan.select_for_source

    def select(*arguments: Any) -> Any:
        selected.append(arguments[0].path)
        return real(*arguments)

    monkeypatch.setattr(engines.plan, "select_for_source", select)

    def one(options: PlanOptions, report: Report, prepared: Prepared) -> PlanResult:
        asked.append(options)
        if options.spelling == "matmul" and (options.attention, options.upsampling) == ("fp32acc", "conv"):
            return make_plan(options, report, prepared)
        raise BuildError("planted")

    options = dataclasses.replace(options_for(source, tmp_path), precision="int8")
    tuning = tune_plan(options, make=one, measure=measure)
    assert len(asked) == 6
    assert selected == [source]
    assert tuning.best.manifest["quantization"]["asked"] == ["auto"]
    assert len(tuning.best.manifest["quantization"]["products"]) == 16
    assert "16 of 16 quantized linear layers run in INT8" in "\n".join(tuning_lines(tuning))
    assert any("the calibration used only the image that comes with neck-export" in note for note in tuning.best.notes)


def test_fp8_attentions_are_of_the_candidates_that_can_have_them(source: Path, tmp_path: Path) -> None:
    """With FP32 accumulation and MatMul; the other forms of attention stay in FP16, and their plans say so."""
    names = [f"trunk.blocks.{index}.attn.attention" for index in range(4)]
    found: dict[tuple[str, str], list[str]] = {}

    def one(options: PlanOptions, report: Report, prepared: Prepared) -> PlanResult:
        if options.upsampling == "deconv":
            raise BuildError("planted: half of the candidates suffice here")
        result = make_plan(options, report, prepared)
        found[options.attention, options.spelling] = sorted(result.manifest["quantization"]["attentions"])
        return result

    quantize = QuantizeOptions(("*.attn.attention", "*.mlp.fc2"))
    options = dataclasses.replace(options_for(source, tmp_path), precision="fp8", quantize=quantize)
    tune_plan(options, make=one, measure=lambda _: 1.0)
    assert found["fp32acc", "matmul"] == names
    assert {tuple(one) for one in found.values()} == {tuple(names), ()}


@pytest.mark.skipif(find_gpu() is not None, reason="says what happens where no GPU is")
def test_without_a_gpu_nothing_is_measured(source: Path, tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="needs an NVIDIA GPU"):
        tune_plan(options_for(source, tmp_path))


@pytest.mark.gpu
def test_tuning_on_a_gpu(source: Path, tmp_path: Path, gpu_flavor: Flavor) -> None:
    tuning = tune_plan(dataclasses.replace(options_for(source, tmp_path), flavor="auto", verify=True))
    assert tuning.best.path.is_file()
    assert any(row.latency_ms for row in tuning.rows)
