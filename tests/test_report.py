"""The report's answer, figures, tables, charts and files. All figures here are synthetic."""

from __future__ import annotations

import base64
import errno
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from synthetic import LABEL, Tags, synthetic_features, synthetic_result

from benchmarks.errors import BenchError
from benchmarks.report.charts import (
    Chart,
    error_plot,
    growth_plot,
    kernels_chart,
    latency_chart,
    parts_chart,
    roofline_plot,
)
from benchmarks.report.findings import (
    answer_sentence,
    answers,
    error_figure,
    may_be_used,
    milliseconds,
    missing_sentence,
    percent,
    ranked,
    scaled,
    seconds,
    significant,
    swept,
    verdict,
    worst_error,
)
from benchmarks.report.html import html_page
from benchmarks.report.markdown import escaped, markdown_page
from benchmarks.report.report_files import check_folder, write_report
from benchmarks.report.svg import TEXT, WIDTH_OF_EM, Scale, free_place, linear_ticks, log_ticks
from benchmarks.report.tables import missing_table
from benchmarks.results.feature_images import NOT_FINITE, feature_images
from benchmarks.results.result_files import Result, merge_results, read_result

HOSTILE = '<script>alert("x")</script> & | `a` "quoted"\n\x1b[31m'

CHARTS: dict[str, Callable[[Result, dict[str, Any]], Chart | None]] = {
    "latency": latency_chart,
    "parts": parts_chart,
    "kernels": kernels_chart,
    "error": error_plot,
    "size": lambda result, machine: growth_plot(result, machine, "image_size"),
    "batch": lambda result, machine: growth_plot(result, machine, "batch"),
    "roofline": roofline_plot,
}
each_chart = pytest.mark.parametrize("name", CHARTS)


def draw(name: str, result: Result) -> Chart | None:
    return CHARTS[name](result, result["machines"][0])


def drawn(name: str, result: Result) -> Chart:
    chart = draw(name, result)
    assert chart is not None
    return chart


def without_rows(result: Result) -> Result:
    result["rows"] = []
    return result


def unmeasured(result: Result) -> Result:
    for row in result["rows"]:
        row |= {"status": "failed", "reason": "planted", "latency": None, "times_ms": None, "errors": []}
    return result


# the answer


def test_the_answer_is_the_fastest_within_tolerance() -> None:
    result = synthetic_result()
    (answer,) = answers(result)
    assert answer.best and answer.best["backend"] == "eager-bf16"
    assert answer.fastest_outside and answer.fastest_outside["backend"] == "openvino-bf16"
    assert [row["backend"] for row in answer.missing] == ["tensorrt-fp16", "compile-max"]
    sentence = answer_sentence(result, answer)
    assert "PyTorch eager, plain, BF16. Its latency is p50 26." in sentence and "0.26 (0.25 to 0.27)" in sentence


def test_a_row_that_leaves_tolerance_is_no_answer() -> None:
    """The control: what is the answer above is not when its verdict turns."""
    result = synthetic_result()
    for row in result["rows"]:
        row["passed"] = row["passed"] and row["precision"] == "fp32"
    assert answers(result)[0].best["backend"] == "openvino-fp32"  # type: ignore[index]


def test_a_row_that_was_never_compared_is_no_answer() -> None:
    result = synthetic_result()
    for row in result["rows"]:
        row |= {"passed": None, "errors": None}
    (answer,) = answers(result)
    assert answer.best and answer.best["backend"] == "eager-fp32"  # the reference needs no comparison
    assert "outputs were not compared" in html_page(result)
    for row in result["rows"]:
        row["ratio"] = None
    (answer,) = answers(result)
    assert answer.best is None and answer.fastest_outside
    assert "none was found to be within tolerance" in answer_sentence(result, answer)


def test_the_reference_may_be_the_answer() -> None:
    result = synthetic_result()
    row = next(row for row in result["rows"] if row["backend"] == "eager-fp32" and row["sweep"] is None)
    row["latency"]["p50_ms"] = 1.0
    (answer,) = answers(result)
    assert answer.best is row and answer.fastest_outside is None
    assert verdict(row) == "reference" and worst_error(row) == 0
    row["passed"] = False  # a verdict is a verdict
    assert answers(result)[0].best is not row


@pytest.mark.parametrize("change", [without_rows, unmeasured])
def test_nothing_measured_is_said(change: Callable[[Result], Result]) -> None:
    result = change(synthetic_result())
    page, text = html_page(result), markdown_page(result)
    for shown in (page, text):
        assert "no backend was measured at 1008 x 1008" in shown
    assert "Nothing was measured on this machine" in page
    assert page.count('<ol class="bars"') == 1 and 'class="chart"' not in page  # the parts of the closed form


def test_sweeps_take_the_row_at_the_encoders_own_size() -> None:
    result = synthetic_result()
    lines = swept(result, result["machines"][0], "image_size")
    assert len(lines) == 6
    assert all([row["image_size"][0] for row in rows] == [336, 672, 1008, 1344] for rows in lines.values())
    batches = swept(result, result["machines"][0], "batch")
    assert all([row["batch"] for row in rows] == [1, 4] for rows in batches.values())
    for row in result["rows"]:
        if row["sweep"] == "batch":
            row["image_size"] = [336, 336]  # then the full-size row is no point of it, and one point is no line
    assert swept(result, result["machines"][0], "batch") == {}


def test_an_error_that_is_not_finite_is_the_worst() -> None:
    row = ranked(synthetic_result(), {"id": "m0"})[0]
    assert worst_error(row) == pytest.approx(8e-2)
    row["errors"][3]["relative_l2"] = None
    assert worst_error(row) == math.inf and error_figure(worst_error(row)) == "not finite"
    assert worst_error({"errors": []}) is None


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (significant(1234.5), "1,234"),
        (significant(0.012345), "0.0123"),
        (significant(99.96), "100"),
        (significant(9.996), "10.0"),
        (significant(1e-7), "1.00e-7"),
        (significant(3.2e12), "3.20e12"),
        (significant(0), "0"),
        (significant(math.inf), "not finite"),
        (milliseconds(None), "-"),
        (milliseconds(26.34), "26.3 ms"),
        (milliseconds(999.4), "999 ms"),
        (milliseconds(8460), "8.46 s"),
        (milliseconds(38600), "38.6 s"),
        (seconds(0.25), "250 ms"),
        (seconds(2.5), "2.50 s"),
        (scaled(13.4e9, "B"), "13.4 GB"),
        (scaled(5.62e12, "FLOP"), "5.62 TFLOP"),
        (scaled(12, "B"), "12.0 B"),
        (scaled(None, "B"), "-"),
        (percent(0.614), "61 %"),
        (percent(0.0061), "0.61 %"),
        (error_figure(1.6e-6), "1.6e-6"),
        (error_figure(0.0), "0"),
    ],
)
def test_figures_are_shown_alike(shown: str, expected: str) -> None:
    assert shown == expected


def test_what_the_rewrites_buy_is_told_where_a_plain_twin_was_measured() -> None:
    result = synthetic_result()
    assert "Speedup from the graph rewrites" not in markdown_page(result)
    row = next(row for row in result["rows"] if row["backend"] == "ort-cpu-rewritten-fp32")
    row["ratio_to_plain"] = {"to": "ort-cpu-plain-fp32", "median": 0.961, "low": 0.95, "high": 0.974}
    row["note"] = "loaded 3 times in 3 rounds"
    for shown in (html_page(result), markdown_page(result)):
        assert "0.96 (0.95 to 0.97)" in shown and row["note"] in shown


def test_what_is_missing_is_told_in_short() -> None:
    result = synthetic_result()
    machine = result["machines"][0]
    assert missing_sentence(result, machine) == (
        "2 of 10 backends were not measured on this machine (failed: torch.compile max-autotune, rewritten, FP32; 1: "
        "no NVIDIA driver on this machine; 1: killed by signal 9: out of memory)."
    )
    gone = next(row for row in result["rows"] if row["status"] == "unavailable")
    reason = "this CPU has no BF16 matrix instructions, so torch would emulate them"
    result["rows"] += [{**gone, "backend": f"b{index}", "label": f"b{index}", "reason": reason} for index in range(20)]
    sentence = missing_sentence(result, machine)
    assert "22 of 30" in sentence and "20: this CPU has no BF16 matrix instructions;" in sentence
    assert len(sentence) < 300
    late = {"backend": "eager-fp32", "label": "PyTorch eager", "sweep": "image_size", "image_size": [1344, 1344]}
    result["rows"].append({**gone, **late, "status": "failed", "reason": "out of memory"})
    assert missing_sentence(result, machine).endswith(
        ' Number of missing measurements: 1. The table "Not measured" lists the reasons.'
    )


def test_what_is_missing_at_every_point_is_told_once() -> None:
    result = synthetic_result()
    gone = next(row for row in result["rows"] if row["status"] == "unavailable")
    result["rows"] += [{**gone, "sweep": "batch", "batch": batch} for batch in (1, 2, 4)]
    table = missing_table(result, result["machines"][0])
    assert table and len(table.rows) == 2
    assert table.rows[0][1] == "1008 x 1008, batch 1; 1008 x 1008, batch 2; 1008 x 1008, batch 4"


# charts


@each_chart
def test_a_chart_is_well_formed_and_told_to_a_screen_reader(name: str) -> None:
    chart = drawn(name, synthetic_result(gpu=True))
    assert len(chart.label) > 20 and bool(chart.plot) != bool(chart.groups)
    if chart.plot:
        root = ElementTree.fromstring(chart.plot)
        assert root.get("role") == "img" and root.get("aria-label") == chart.label
        assert "style" not in {key for element in root.iter() for key in element.attrib}
    assert all(0 <= place <= 1000 for _, bars in chart.groups for bar in bars for place in (bar.length, *bar.ends))
    assert "nan" not in str(chart) and "inf" not in str(chart)


@pytest.mark.parametrize("name", ["error", "size", "batch", "roofline"])
def test_texts_keep_inside_the_drawing(name: str) -> None:
    """By the estimate of `text_width`; the browser's own measure is in test_browser."""
    root = ElementTree.fromstring(drawn(name, synthetic_result(gpu=True)).plot)
    left, top, right, bottom = (float(value) for value in (root.get("viewBox") or "").split())
    for text in root.iter("text"):
        x, y = float(text.get("x") or 0), float(text.get("y") or 0)
        wide = len(text.text or "") * TEXT * WIDTH_OF_EM
        start = x - {"end": wide, "middle": wide / 2}.get(text.get("text-anchor") or "", 0)
        assert start >= left - 2 and start + wide <= right + 2, text.text
        assert top <= y - 8 and y <= bottom


@each_chart
def test_a_chart_shows_the_figures(name: str) -> None:
    """The control of all charts: another result draws another chart."""
    one, other = synthetic_result(gpu=True), synthetic_result(seed=5, gpu=True, scale=3.0)
    other["work"]["parts"][1]["ms"] *= 2
    for row in other["rows"]:
        for error in row["errors"] or []:
            error["relative_l2"] *= 1.5
        if row["sweep"]:
            row["latency"]["p50_ms"] *= 1.7
    assert draw(name, one) == draw(name, synthetic_result(gpu=True))
    assert draw(name, one) != draw(name, other)


@pytest.mark.parametrize("name", ["latency", "error", "size", "batch", "roofline"])
def test_a_chart_without_rows_is_left_out(name: str) -> None:
    assert draw(name, without_rows(synthetic_result())) is None


def test_a_chart_without_kernels_rates_or_parts_is_left_out() -> None:
    result = synthetic_result()
    assert draw("kernels", result) is None
    result["kernels"] = [{"name": "k", "kind": None, "ms": None, "bytes": None}]
    assert draw("kernels", result) is None
    result["machines"][0]["roofline"]["flops_per_s"] = {"fp32": None}
    assert draw("roofline", result) is None
    result["machines"][0]["roofline"] = None
    assert draw("roofline", result) is None
    result["work"]["parts"] = []
    assert draw("parts", result) is None
    assert html_page(result)


def test_kernels_without_times_are_drawn_by_bytes() -> None:
    result = synthetic_result(gpu=True)
    for kernel in result["kernels"]:
        kernel["ms"] = None
    assert "bytes moved" in drawn("kernels", result).label


def test_bars_are_as_long_as_the_latencies() -> None:
    result = synthetic_result()
    rows = [row for row in ranked(result, result["machines"][0]) if may_be_used(row)]
    bars = [bar for bar in drawn("latency", result).groups[0][1] if "out" not in bar.css]
    lengths = [bar.length / row["latency"]["p50_ms"] for bar, row in zip(bars, rows, strict=True)]
    assert max(lengths) / min(lengths) == pytest.approx(1)


def test_far_latencies_get_a_logarithmic_axis() -> None:
    result = synthetic_result()
    assert "logarithmic" not in drawn("latency", result).legend[-1][1]
    row = ranked(result, result["machines"][0])[0]
    row["latency"]["p50_ms"] /= 50
    assert "logarithmic" in drawn("latency", result).legend[-1][1]
    assert draw("error", result)


def test_growth_lies_on_the_closed_form_where_latency_grows_as_work() -> None:
    result = synthetic_result()
    base = next(point for point in result["growth"] if point["image_size"] == [336, 336])["operations"]
    work = {point["image_size"][0]: point["operations"] / base for point in result["growth"] if point["batch"] == 1}
    work[1008] = result["work"]["operations"] / base
    for row in result["rows"]:
        if row["status"] == "measured" and row["batch"] == 1:
            row["latency"]["p50_ms"] = 7.0 * work[row["image_size"][0]]
    places = paths(drawn("size", result).plot)
    closed = places.pop("line closed")
    assert len(places) == 6 and all(place == closed for place in places.values())
    for row in result["rows"]:
        if row["image_size"][0] == 1344:
            row["latency"]["p50_ms"] *= 1.3
    places = paths(drawn("size", result).plot)
    assert places["line closed"] not in [place for css, place in places.items() if css != "line closed"]


def paths(markup: str) -> dict[str, str]:
    found = ElementTree.fromstring(markup).iter("path")
    return {path.get("class") or "": path.get("d") or "" for path in found if "line" in (path.get("class") or "")}


@pytest.mark.parametrize(
    ("ticks", "expected"),
    [
        (linear_ticks(0, 216, 8), [0, 50, 100, 150, 200]),
        (linear_ticks(0, 1, 3), [0, 0.5, 1]),
        (linear_ticks(5, 5, 4), [5]),
        (log_ticks(1, 100, 8), [1, 2, 5, 10, 20, 50, 100]),
        (log_ticks(1e-8, 1e-1, 8), [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
    ],
)
def test_ticks_are_round(ticks: list[float], expected: list[float]) -> None:
    assert ticks == pytest.approx(expected)


def test_scales_keep_values_inside() -> None:
    scale = Scale(1, 100, 0, 200, True)
    assert (scale(1), scale(10), scale(100), scale(1000), scale(0.1)) == (0, 100, 200, 200, 0)
    assert Scale(3, 3, 0, 10)(3) == 5


def test_a_label_goes_where_it_is_free() -> None:
    assert free_place(50, 50, 10, 10, []) == (9, 0)
    assert free_place(50, 50, 10, 10, [(55, 40, 75, 60)]) == (-9, 0)
    assert free_place(50, 50, 10, 10, [(0, 40, 75, 60)])[1] < 0  # above both


def test_long_times_are_drawn_in_seconds() -> None:
    for scale, unit in ((1.0, "ms"), (100.0, "s")):
        assert drawn("latency", synthetic_result(scale=scale)).groups[0][1][-1].value.endswith(f" {unit}")
        assert ("seconds," in re.findall("[a-z,]+", drawn("error", synthetic_result(scale=scale)).plot)) == (
            unit == "s"
        )


def test_a_roof_that_no_row_could_reach_is_not_drawn() -> None:
    result = synthetic_result()
    assert "BF16 930 GFLOP/s" in drawn("roofline", result).plot
    result["rows"] = [row for row in result["rows"] if row["precision"] == "fp32"]
    assert "BF16" not in drawn("roofline", result).plot


# the page and the Markdown


def test_the_page_is_closed_and_loads_nothing() -> None:
    tags = Tags(html_page(synthetic_result(gpu=True)))
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for tag, attributes in tags.seen:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("href", "src"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)
    policy = next(attributes["content"] for _, attributes in tags.seen if "http-equiv" in attributes)
    assert policy and "default-src 'none'" in policy and "unsafe" not in policy


def test_every_anchor_has_its_target_and_every_id_is_its_own() -> None:
    merged = merge_results([synthetic_result(gpu=True), synthetic_result(1)])
    tags = Tags(html_page(merged))
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(set(ids)) == len(ids)
    capabilities = [value[1:] for _, attributes in tags.seen if (value := attributes.get("href") or "").startswith("#")]
    capabilities += [value for _, attributes in tags.seen if (value := attributes.get("aria-labeledby"))]
    assert capabilities and set(capabilities) <= set(ids)


def test_every_row_every_reason_and_every_output_is_on_both_pages() -> None:
    result = synthetic_result(gpu=True)
    page, text = html_page(result), markdown_page(result)
    for shown in (page, text):
        for row in result["rows"]:
            assert row["label"] in shown
            assert row["reason"] is None or row["reason"] in shown
        for name in ("sam3\\_feat\\_3", "sam3\\_pos\\_0") if shown is text else ("sam3_feat_3", "sam3_pos_0"):
            assert shown.count(name) >= 7
        for part in ("Imaginary GPU", "Imaginary processor", "1.31.1", "not installed", result["command"], LABEL):
            assert part in shown


def test_hostile_text_is_shown_and_not_run() -> None:
    result = synthetic_result(gpu=True)
    for row in result["rows"]:
        row["label"] = HOSTILE
        row["reason"] = row["reason"] and HOSTILE
    result["machines"][0]["name"] = result["command"] = result["encoder"]["checkpoint"] = HOSTILE
    result["machines"][0]["environment"]["versions"]["torch"] = HOSTILE
    result["features"]["image"] = result["kernels"][0]["name"] = HOSTILE
    page = html_page(result)
    tags = Tags(page)
    assert tags.open == [] and not [tag for tag, _ in tags.seen if tag == "script"]
    assert "&lt;script&gt;" in page
    text = markdown_page(result)
    assert "<script>" not in text.replace("    " + HOSTILE.splitlines()[0], "")  # code blocks show all as it is
    lines = text.splitlines()
    (head,) = [index for index, line in enumerate(lines) if line.startswith("| Backend | Images/s")]
    for line in lines[head : head + 10]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 11


def test_markdown_marks_are_escaped() -> None:
    assert escaped("a|b *c* `d`\n<e>") == "a\\|b \\*c\\* \\`d\\` \\<e\\>"


def test_several_machines_have_each_their_own_sections() -> None:
    other = synthetic_result(1)
    other["machines"][0]["name"] = "another machine"
    page = html_page(merge_results([synthetic_result(gpu=True), other]))
    for machine in ("m0", "m1"):
        for section in ("answer", "latency", "missing", "accuracy", "growth", "roofline", "parts", "environment"):
            assert f'id="{section}-{machine}"' in page
    assert page.count("Kernels of the plan") == 1  # the second machine has no plan


def test_what_the_export_costs_is_shown_where_it_was_measured() -> None:
    result = synthetic_result()
    assert "Time and memory of the export" not in html_page(result)
    rows = {"`neck-export onnx`": {"median_wall_s": 21.6, "peak_bytes": 2.39e9, "file_bytes": 0.91e9}}
    machine = {"processor": "Imaginary processor", "cores": 2}
    result["export"] = {
        "date": "2026-01-02",
        "command": "python -m benchmarks.export",
        "machine": machine,
        "rows": rows,
    }
    for shown in (html_page(result), markdown_page(result)):
        assert "Time and memory of the export" in shown and re.search("21.6[ \u00a0]s", shown)


def test_verdicts_of_masks_are_shown_where_they_were_asked_for() -> None:
    result = synthetic_result()
    assert ">Masks<" not in html_page(result)
    found = {"passed": True, "gate": 0.99, "images": 2, "objects": 41, "lost": 0, "found": 0, "mean_iou": 0.99873}
    found |= {"worst_iou": 0.9713, "worst_image": "cup|.png", "method": "Sam3Model of transformers on cpu"}
    files = [("fp16.onnx", "fp16", {}), ("int8.plan", "int8", {"passed": False, "lost": 3})]
    result["masks"] = [{"file": name, "precision": precision, **found, **more} for name, precision, more in files]
    other = synthetic_result(1)
    other["machines"][0]["name"] = "Another"
    merged = merge_results([result, other])
    for shown in (html_page(result), markdown_page(result), html_page(merged), markdown_page(merged)):
        for text in ("fp16.onnx, FP16", "int8.plan, INT8", "0.9987", "0.9713", "Sam3Model of transformers on cpu"):
            assert text in shown
        assert shown.count(">masks differ<" if shown.startswith("<!doctype") else "| masks differ |") == 1
    assert html_page(result).count('<tr class="warned"><th scope="row">int8.plan') == 1


# the folder


def test_the_folder_has_three_whole_files(tmp_path: Path) -> None:
    result = synthetic_result()
    paths = write_report(result, tmp_path / "new" / "report")
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(path.name for path in paths)
    assert read_result(paths[0]) == result
    assert paths[1].read_text(encoding="utf-8") == markdown_page(result)
    assert paths[2].read_text(encoding="utf-8") == html_page(result)
    assert write_report(synthetic_result(1), paths[0].parent) == paths  # ours, so it is replaced
    assert read_result(paths[0]) == synthetic_result(1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "report.json",
            '{"kind": "bench", "schema": 2}',
            "schema 2, but this version of neck-export reads schema 1.* not changed",
        ),
        ("report.json", '{"mine": 1}', "kind"),
        ("report.json", "{", "JSON"),
        ("report.md", "# My own report\n", r"report\.md: .*not written by `neck-export bench"),
        ("report.html", "<p>mine</p>", r"report\.html: .*not written by `neck-export bench"),
    ],
)
def test_a_file_that_is_not_ours_is_left(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    for refuse in (check_folder, lambda folder: write_report(synthetic_result(), folder)):
        with pytest.raises(BenchError, match=f"(?s){message}"):
            refuse(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    for folder in (tmp_path / "report", tmp_path / "report" / "below"):
        with pytest.raises(BenchError, match="choose another --output"):
            write_report(synthetic_result(), folder)


def test_a_result_of_another_form_is_not_written(tmp_path: Path) -> None:
    result = synthetic_result()
    result["rows"][0]["latency"]["p50_ms"] = math.nan
    with pytest.raises(BenchError, match="is NaN or infinite"):
        write_report(result, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_jsonschema_a_report_is_written_and_no_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare GPU machine has none; what it measured is no worse for that."""
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    data, _, _ = write_report(synthetic_result(), tmp_path)
    with pytest.raises(BenchError, match=r"needs jsonschema, which is not installed"):
        read_result(data)


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_report(synthetic_result(), tmp_path)
    before = [path.read_bytes() for path in paths]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BenchError, match="the disk is full; free some space or choose another --output"):
        write_report(synthetic_result(1), tmp_path)
    assert [path.read_bytes() for path in paths] == before
    assert len(os.listdir(tmp_path)) == 3


# feature images


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_equal_features_give_equal_images_and_a_black_difference() -> None:
    features = synthetic_features(np.random.default_rng(0))
    found = feature_images(features, features, "noise", "eager-fp32")
    assert [level["name"] for level in found["levels"]] == sorted(features)
    for level in found["levels"]:
        assert level["reference_png"] == level["candidate_png"]
        assert pixels(level["difference_png"]).max() == 0
        assert level["largest_difference"] == 0 and level["factor"] == 1
        assert np.ptp(pixels(level["reference_png"]).reshape(-1, 3), axis=0).min() > 200  # all three colors are used


def test_a_difference_is_seen_where_it_is_and_amplified_as_stated() -> None:
    reference = synthetic_features(np.random.default_rng(0), levels=1)
    candidate = {name: array.copy() for name, array in reference.items()}
    candidate["sam3_feat_0"][0, :, 10:30, 20:40] += 0.01
    (level,) = feature_images(reference, candidate, "noise", "x")["levels"]
    shown = pixels(level["difference_png"])
    assert level["largest_difference"] == pytest.approx(0.01, rel=1e-3)
    scale = np.linalg.norm(reference["sam3_feat_0"][0], axis=0).mean()
    expected = 0.01 * math.sqrt(8) / scale * level["factor"] * 255
    assert 255 / 10 < expected <= 255
    assert shown[10:30, 20:40] == pytest.approx(expected, abs=1)
    outside = shown.copy()
    outside[10:30, 20:40] = 0
    assert outside.max() == 0


def test_values_that_are_not_finite_are_marked() -> None:
    reference = synthetic_features(np.random.default_rng(0), levels=1)
    candidate = {"sam3_feat_0": reference["sam3_feat_0"].copy()}
    candidate["sam3_feat_0"][0, 3, 5, 7] = np.inf
    (level,) = feature_images(reference, candidate, "noise", "x")["levels"]
    for name in ("candidate_png", "difference_png"):
        shown = pixels(level[name])
        assert tuple(shown[5, 7]) == NOT_FINITE and (shown.reshape(-1, 3) == NOT_FINITE).all(axis=1).sum() == 1
    assert level["largest_difference"] is None
    json.dumps(level, allow_nan=False)


@pytest.mark.parametrize("shape", [(1, 8, 400, 300), (1, 2, 5, 9), (2, 1, 4, 4)])
def test_images_of_any_shape(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    (level,) = feature_images({"sam3_feat_0": array}, {"sam3_feat_0": array}, "noise", "x")["levels"]
    height, width, _ = pixels(level["reference_png"]).shape
    assert max(height, width) <= 288 and width / height == pytest.approx(shape[3] / shape[2], rel=0.01)


def test_constant_features_are_drawn() -> None:
    array = np.full((1, 4, 6, 6), 2.0, np.float32)
    (level,) = feature_images({"sam3_feat_0": array}, {"sam3_feat_0": array * 1.5}, "noise", "x")["levels"]
    assert level["largest_difference"] == 1.0
    (level,) = feature_images({"sam3_feat_0": array * 0}, {"sam3_feat_0": array * 0}, "noise", "x")["levels"]
    assert level["largest_difference"] == 0.0


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ({}, {}, r"features can be drawn, .* the outputs are: \(none\)"),
        ({"sam3_pos_0": np.zeros((1, 4, 3, 3))}, {}, "features can be drawn, .* the outputs are: sam3_pos_0"),
        ({"sam3_feat_0": np.zeros((1, 4, 3, 3))}, {}, "x: output sam3_feat_0 is missing, but"),
        (
            {"sam3_feat_0": np.zeros((1, 4, 3, 3))},
            {"sam3_feat_0": np.zeros((1, 4, 3, 4))},
            r"x: output sam3_feat_0 has the shape \(1, 4, 3, 4\), but the reference has \(1, 4, 3, 3\)",
        ),
    ],
)
def test_features_that_cannot_be_drawn_are_refused(
    reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(BenchError, match=message):
        feature_images(reference, candidate, "noise", "x")
