"""Results files: their form, runs of several machines made one, what got worse. All figures here are synthetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from synthetic import synthetic_result

from benchmarks.errors import BenchError
from benchmarks.report.report_files import json_text
from benchmarks.results import comparison as changes
from benchmarks.results import result_files as records
from benchmarks.results.comparison import EXACT_FACTOR, LEAST_SPREAD, compare_results, spread_ms
from benchmarks.results.result_files import Result, check_result, merge_results, of_machine, read_result

Change = Callable[[Result], None]


def saved(path: Path, result: object) -> Path:
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def row_of(result: Result, backend: str) -> dict[str, Any]:
    return next(row for row in result["rows"] if row["backend"] == backend and row["sweep"] is None)


def on_another_machine(result: Result, processor: str = "Another processor") -> Result:
    result["machines"][0]["environment"]["processor"] = processor
    result["machines"][0]["name"] = processor
    return result


def test_the_form_is_a_sound_schema() -> None:
    Draft202012Validator.check_schema(json.loads(Path(records.__file__).with_name("result.schema.json").read_text()))


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = synthetic_result(gpu=True)
    path = tmp_path / "report.json"
    path.write_text(json_text(result), encoding="utf-8")
    assert read_result(path) == result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "JSON"),
        (json.dumps(synthetic_result(sweep=False))[:-500], "JSON"),
        ("\xff", "JSON"),
        ('{"schema": NaN}', "the value NaN, which JSON does not allow"),
        ("[" * 100_000, "nested too deep"),
        ("[1, 2]", "found a JSON list, expected kind 'bench'"),
        ('{"format": 1, "kind": "onnx"}', "found kind 'onnx', expected kind 'bench'"),
        ('{"kind": "bench", "schema": 2}', "schema 2, but this version of neck-export reads schema 1"),
        ('{"kind": "bench"}', "schema None, but this version of neck-export reads schema 1"),
        ('{"kind": "bench", "schema": 1}', "top level: 'date'"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(BenchError, match=message) as caught:
        read_result(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 500


def test_a_folder_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"cannot be read \(Is a directory\)"):
        read_result(tmp_path)


def _set(result: Result, *path: str | int, value: object) -> None:
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", 0, "latency", "p50_ms"), "fast", "rows/0/latency/p50_ms: 'fast' is not of type 'number'"),
        (("rows", 0, "latency", "p50_ms"), -1.0, "rows/0/latency/p50_ms: -1.0 is less than or equal"),
        (("rows", 0, "latency"), None, "rows/0/latency: None is not of type 'object'"),
        (("rows", 0, "times_ms"), [], "rows/0/times_ms"),
        (("rows", 0, "status"), "guessed", "rows/0/status: 'guessed' is not one of"),
        (("rows", 8, "reason"), None, "rows/8/reason: None is not of type 'string'"),
        (("rows", 0, "machine"), "m7", "rows/0/machine is 'm7', but must be one of m0"),
        (("machines",), [], "machines"),
        (("features", "levels", 0, "reference_png"), '"><script>', "features/levels/0/reference_png"),
        (("encoder", "image_size"), [1008], "encoder/image_size"),
        (("work", "operations"), 0, "work/operations"),
    ],
)
def test_a_wrong_value_is_named(path: tuple[str | int, ...], value: object, message: str) -> None:
    result = synthetic_result()
    check_result(result, "here")
    _set(result, *path, value=value)
    with pytest.raises(BenchError, match=f"here: .*{message}"):
        check_result(result, "here")


def test_machines_are_told_apart() -> None:
    result = synthetic_result()
    result["machines"].append(copy.deepcopy(result["machines"][0]))
    with pytest.raises(BenchError, match=r"several machines have the same id \(m0, m0\)"):
        check_result(result, "here")


def test_no_rows_are_a_result() -> None:
    result = synthetic_result()
    result["rows"], result["growth"] = [], []
    check_result(result, "here")


def test_a_merge_keeps_every_row_and_what_belongs_to_each_machine() -> None:
    one = synthetic_result(gpu=True)
    other = on_another_machine(synthetic_result(seed=1))
    other["command"], other["date"] = "neck-export bench --output other", "2026-01-05"
    before = copy.deepcopy([one, other])
    merged = merge_results([one, other])
    check_result(merged, "merged")
    assert [one, other] == before
    assert [machine["id"] for machine in merged["machines"]] == ["m0", "m1"]
    for number, source in (("m0", one), ("m1", other)):
        rows = [row for row in merged["rows"] if row["machine"] == number]
        assert [{**row, "machine": "m0"} for row in rows] == source["rows"]
    assert len(merged["rows"]) == len(one["rows"]) + len(other["rows"])
    second = merged["machines"][1]
    assert of_machine(merged, merged["machines"][0], "kernels") and of_machine(merged, second, "kernels") is None
    assert of_machine(merged, second, "command") == other["command"]
    assert merged["date"] == "2026-01-05" and merged["command"].splitlines() == [one["command"], other["command"]]
    assert merged["growth"] == sorted(one["growth"], key=lambda point: (*point["image_size"], point["batch"]))


def test_a_merge_is_merged_again() -> None:
    results = [on_another_machine(synthetic_result(seed=seed), f"processor {seed}") for seed in range(3)]
    twice = merge_results([merge_results(results[:2]), results[2]])
    assert twice == merge_results(results)


def test_a_result_is_not_merged_with_itself() -> None:
    result = synthetic_result()
    with pytest.raises(BenchError, match=r"the same runs \(machine .*, date 2026-01-02\)"):
        merge_results([result, copy.deepcopy(result)])
    with pytest.raises(BenchError, match="contain the same runs"):
        merge_results([merge_results([result, on_another_machine(synthetic_result(1))]), result])
    assert merge_results([result, synthetic_result(seed=1)])  # the same machine measured again is another run


def test_a_merge_takes_two() -> None:
    with pytest.raises(
        BenchError,
        match=r"--merge needs at least two report\.json files, but the number of files passed is 1",
    ):
        merge_results([synthetic_result()])


@pytest.mark.parametrize("combine", [lambda one, other: merge_results([one, other]), compare_results])
def test_other_encoders_are_refused(combine: Callable[[Result, Result], object]) -> None:
    one, other = synthetic_result(), on_another_machine(synthetic_result(1))
    other["encoder"] |= {"checkpoint": "tuned.pt", "config": {**other["encoder"]["config"], "depth": 32}}
    with pytest.raises(BenchError, match=r"different encoders .checkpoint .* and 'tuned.pt'; config depth 4 and 32"):
        combine(one, other)


def test_equal_results_differ_in_nothing() -> None:
    assert compare_results(synthetic_result(), synthetic_result()) == []


def test_noise_is_no_change() -> None:
    """Other draws of the same 2 % noise; see compare_results for how often chance alone exceeds the spread."""
    assert compare_results(synthetic_result(seed=1), synthetic_result(seed=2)) == []


def test_what_got_slower_is_told_and_what_got_faster_is_not() -> None:
    found = compare_results(synthetic_result(scale=1.2), synthetic_result())
    assert len(found) == sum(row["status"] == "measured" for row in synthetic_result()["rows"])
    for change in found:
        assert change.kind == "slower" and change.old and change.new and change.beyond
        assert change.new - change.old > change.beyond
        assert "median latency grew" in str(change) and "+20.0%" in str(change) and "the spread" in str(change)
    assert compare_results(synthetic_result(scale=0.8), synthetic_result()) == []


def test_slower_within_the_spread_is_not_told() -> None:
    old, new = synthetic_result(), synthetic_result()
    times = row_of(new, "eager-fp32")["times_ms"]
    limit = spread_ms(row_of(old, "eager-fp32")["times_ms"])
    middle = row_of(old, "eager-fp32")["latency"]["p50_ms"]
    for added, told in ((1.9 * limit, 0), (2.2 * limit, 1)):
        row_of(new, "eager-fp32")["times_ms"] = [time + added for time in times]
        row_of(new, "eager-fp32")["latency"]["p50_ms"] = middle + added
        assert len(compare_results(new, old)) == told


def test_the_spread_is_the_quartiles_and_never_nothing() -> None:
    assert spread_ms([10.0, 20.0, 30.0, 40.0, 50.0]) == pytest.approx(20.0)
    assert spread_ms([100.0, 100.0, 100.0]) == pytest.approx(100 * LEAST_SPREAD)


def test_one_wild_run_is_no_spread() -> None:
    assert spread_ms([100.0] * 9 + [1000.0]) == pytest.approx(100 * LEAST_SPREAD)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (1e-3, 1e-3 * EXACT_FACTOR * 1.01, True),
        (1e-3, 1e-3 * EXACT_FACTOR * 0.99, False),
        (0.0, 5e-7, False),
        (0.0, 2e-6, True),
        (1e-3, 1e-4, False),
        (1e-3, None, True),
        (None, 1e-3, False),
    ],
)
def test_what_got_less_exact_is_told(old: float | None, new: float | None, told: bool) -> None:
    results = [synthetic_result(), synthetic_result()]
    for result, value in zip(results, (new, old), strict=True):
        error = row_of(result, "ort-cpu-rewritten-fp32")["errors"][2]
        error["relative_l2"], error["passed"] = value, True
    found = compare_results(*results)
    assert len(found) == told
    if told:
        (change,) = found
        assert (change.kind, change.what) == ("less exact", "sam3_feat_2")
        assert "sam3_feat_2" in str(change)


def test_an_output_that_left_tolerance_is_told() -> None:
    new = synthetic_result()
    row_of(new, "eager-bf16")["errors"][0]["passed"] = False
    assert [change.kind for change in compare_results(new, synthetic_result())] == ["less exact"]


def test_a_row_that_is_no_longer_measured_is_told() -> None:
    new, old = synthetic_result(), synthetic_result()
    row = row_of(new, "openvino-fp32")
    row |= {"status": "failed", "reason": "killed by signal 9", "latency": None, "times_ms": None}
    check_result(new, "new")
    (change,) = compare_results(new, old)
    assert change.kind == "lost" and "missing from the new result: killed by signal 9" in str(change)
    assert compare_results(old, new) == []  # measured now, and not before


def test_errors_that_are_no_longer_measured_are_told() -> None:
    new = synthetic_result()
    row_of(new, "eager-bf16")["errors"] = []
    (change,) = compare_results(new, synthetic_result())
    assert change.kind == "lost" and "outputs were not compared" in str(change)


def test_a_point_that_a_sweep_tells_again_is_told_once() -> None:
    new = synthetic_result(scale=2.0)
    new["rows"] = [row for row in new["rows"] if row["backend"] == "eager-fp32" and row["sweep"] is None]
    new["rows"].append({**new["rows"][0], "sweep": "batch"})
    assert len(compare_results(new, synthetic_result())) == 1


def test_backends_that_were_not_asked_for_are_not_compared() -> None:
    new = synthetic_result(scale=2.0)
    new["rows"] = [row for row in new["rows"] if row["backend"] == "eager-fp32" and row["sweep"] is None]
    assert [change.backend for change in compare_results(new, synthetic_result())] == ["eager-fp32"]


def test_other_machines_are_not_compared() -> None:
    new = on_another_machine(synthetic_result(scale=2.0))
    with pytest.raises(BenchError, match=r"from Another processor.* have no measured backend in common"):
        compare_results(new, synthetic_result())
    with_gpu = synthetic_result(gpu=True)
    with pytest.raises(BenchError, match="no measured backend in common"):
        compare_results(with_gpu, synthetic_result())


def test_a_merged_result_is_compared_machine_by_machine() -> None:
    old = merge_results([synthetic_result(), on_another_machine(synthetic_result(1))])
    new = merge_results([on_another_machine(synthetic_result(1, scale=1.5)), synthetic_result()])
    found = compare_results(new, old)
    assert found and {change.machine for change in found} == {"Another processor"}


def test_the_simulated_chance_is_what_the_docstring_says() -> None:
    import numpy as np

    generator = np.random.default_rng(0)
    shares = []
    for runs in (3, 5):
        draws = 1 + 0.1 * generator.normal(size=(2, 1500, runs))
        beyond = [np.median(b) - np.median(a) > spread_ms(a) + spread_ms(b) for a, b in zip(*draws, strict=True)]
        shares.append(float(np.mean(beyond)))
    assert shares[0] == pytest.approx(0.05, abs=0.02) and shares[1] == pytest.approx(0.02, abs=0.01)
    told = " ".join((changes.compare_results.__doc__ or "").split())  # Python 3.13 takes away its indentation
    assert "in 5 rows of 100 at three runs each, in 2 at five" in told
