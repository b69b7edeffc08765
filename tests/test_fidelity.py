"""The judge: its figures are those of the plain formulas in float64, and it lets nothing through that it should not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from exporting import random_outputs

from export.verification import fidelity
from export.verification.fidelity import (
    POSITION_MAX_ABS,
    TOLERANCES,
    FidelityError,
    Tolerance,
    Verdict,
    check_overrides,
    compare,
    compare_output,
    tolerance_for,
)
from export.verification.verify import open_model

SUMS = 1e-12
"""Relative, between float64 sums of 1e5 numbers in another order."""

WIDE = Tolerance(math.inf, -1.0)
PRECISIONS = ("fp32", "fp16", "bf16")


def noisy(array: np.ndarray, size: float, seed: int = 1) -> np.ndarray:
    """The array with an error of a given relative L2, orthogonal to it as random errors nearly are."""
    noise = np.random.default_rng(seed).normal(size=array.shape)
    return (array + noise * (size * np.linalg.norm(array) / np.linalg.norm(noise))).astype(array.dtype)


def judge(reference: np.ndarray, candidate: np.ndarray, precision: str = "fp32", name: str = "sam3_feat_0") -> Verdict:
    return compare({name: reference}, {name: candidate}, precision, "test")


@pytest.mark.parametrize("chunk", [1 << 20, 1000, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_figures_are_the_plain_formulas(dtype: type, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    reference = random_outputs(x=(2, 3, 41, 29))["x"]
    candidate = (noisy(reference, 0.01) * np.float32(1.01)).astype(dtype)
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    found = compare_output("x", reference, candidate, WIDE)
    assert found.max_abs == np.abs(a - b).max()
    assert found.mean_abs == pytest.approx(np.abs(a - b).mean(), rel=SUMS)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=SUMS)
    assert found.cosine == pytest.approx(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), rel=SUMS)
    assert found.non_finite == 0
    assert found.relative_l2 > 0.01  # the control: the figures see the error


def test_a_large_output_has_a_cosine_of_at_most_one() -> None:
    """Sums in float32 gave 1.00008."""
    reference = np.full((1, 256, 144, 144), 3.14159, np.float32)
    found = compare_output("x", reference, reference, WIDE)
    assert found.cosine == pytest.approx(1.0, abs=SUMS)
    flat = reference.ravel()
    assert abs(float(np.add.accumulate(flat * flat, dtype=np.float32)[-1]) / 52395000 - 1) > SUMS  # the control


@pytest.mark.parametrize("precision", PRECISIONS)
def test_identical_is_exact(precision: str) -> None:
    arrays = random_outputs(sam3_feat_0=(1, 4, 8, 8), sam3_pos_0=(1, 4, 8, 8))
    verdict = compare(arrays, arrays, precision, "test")
    assert verdict.passed
    assert verdict.failed_names == []
    for row in verdict.comparisons:
        assert (row.max_abs, row.mean_abs, row.relative_l2, row.non_finite) == (0.0, 0.0, 0.0, 0)
        assert row.cosine == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_relative_l2_decides(precision: str) -> None:
    """Just inside passes, just outside fails, by each precision's own limit."""
    reference, limit = random_outputs(x=(1, 8, 40, 40))["x"].astype(np.float64), TOLERANCES[precision].relative_l2
    assert judge(reference, noisy(reference, 0.99 * limit), precision).passed
    verdict = judge(reference, noisy(reference, 1.01 * limit), precision)
    assert not verdict.passed
    assert verdict.failed_names == ["sam3_feat_0"]


def test_tolerances_are_the_houses() -> None:
    assert {
        "fp32": Tolerance(1e-4, 0.99999),
        "fp16": Tolerance(1e-2, 0.9995),
        "bf16": Tolerance(5e-2, 0.998),
        "fp8": Tolerance(5e-2, 0.998),
        "int8": Tolerance(5e-2, 0.998),
    } == TOLERANCES
    assert POSITION_MAX_ABS["fp16"] == 2e-3
    assert POSITION_MAX_ABS["fp32"] == 1e-5


def test_cosine_decides_alone() -> None:
    """Where an override lets the L2 pass, the cosine that follows from it still tells another direction."""
    reference = random_outputs(x=(1, 8, 40, 40))["x"]
    for candidate, passes in ((noisy(reference, 0.3), True), (-reference, False), (np.roll(reference, 1), False)):
        row = compare_output(
            "x", reference, candidate, Tolerance(math.inf, tolerance_for("x", "fp32", {"x": 0.4}).cosine)
        )
        assert row.passed == passes
        assert (row.cosine > 0.9) == passes


def test_a_wrong_scale_is_seen_by_l2_alone() -> None:
    reference = random_outputs(x=(1, 8, 40, 40))["x"]
    (row,) = judge(reference, reference * 1.5).comparisons
    assert row.cosine == pytest.approx(1.0, abs=1e-9)
    assert not row.passed


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_fails(bad: float, precision: str) -> None:
    reference = random_outputs(x=(1, 8, 40, 40))["x"]
    candidate = reference.copy()
    candidate[0, 3, 2, 1] = bad
    verdict = compare({"x": reference}, {"x": candidate}, precision, "test", {"x": 1e6})
    assert [row.non_finite for row in verdict.comparisons] == [1]
    assert not verdict.passed
    json.loads(json.dumps(verdict.to_dict()), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_infinity_in_both_fails() -> None:
    reference = random_outputs(x=(1, 8, 4, 4))["x"]
    reference[0, 0, 0, 0] = np.inf
    assert not judge(reference, reference.copy()).passed
    assert not judge(reference, np.nan_to_num(reference, posinf=1.0)).passed


def test_zeros() -> None:
    zeros, ones = np.zeros((1, 2, 3, 3), np.float32), np.ones((1, 2, 3, 3), np.float32)
    assert judge(zeros, zeros).passed
    assert not judge(zeros, ones).passed
    assert not judge(ones, zeros).passed


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_positions_have_a_largest_difference(precision: str, limit: float) -> None:
    reference = np.sin(np.arange(4000, dtype=np.float64)).reshape(1, 10, 20, 20)
    for factor, passes in ((0.9, True), (1.1, False)):
        candidate = reference.copy()
        candidate[0, 5, 5, 5] += factor * limit
        assert judge(reference, candidate, precision, "sam2_pos_3").passed == passes
        assert judge(reference, candidate, precision, "sam2_feat_3").passed  # the control: a feature has none


def test_overrides() -> None:
    names = ["sam3_feat_0", "sam3_feat_1", "sam2_feat_0"]
    reference = {name: random_outputs(x=(1, 8, 20, 20))["x"] for name in names}
    candidate = {name: noisy(array, 0.02) for name, array in reference.items()}

    def failed(overrides: dict[str, float]) -> list[str]:
        return compare(reference, candidate, "fp16", "test", overrides).failed_names

    assert failed({}) == names
    assert failed({"sam3_feat_0": 0.03}) == names[1:]
    assert failed({"sam3_feat_*": 0.03}) == names[2:]
    assert failed({"*_feat_0": 0.03}) == names[1:2]
    assert failed({"*": 0.03}) == []
    assert failed({"*": 0.03, "sam2_*": 0.001}) == names[2:]  # tighter too; the last that fits counts


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sam2_feat_0": 0.1}, "matches no output; the outputs are sam3_feat_0"),
        ({"sam4*": 0.1}, "'sam4*'"),
        ({"sam3_feat_0": 0.0}, "above 0"),
        ({"sam3_feat_0": -1.0}, "above 0"),
        ({"sam3_feat_0": math.nan}, "above 0"),
        ({"sam3_feat_0": math.inf}, "above 0"),
    ],
)
def test_an_override_that_cannot_be_is_told(overrides: dict[str, float], words: str) -> None:
    with pytest.raises(FidelityError) as caught:
        check_overrides(overrides, ["sam3_feat_0", "sam3_pos_0"])
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    check_overrides({"sam3_*": 0.1}, ["sam3_feat_0"])  # the control


def test_outputs_that_cannot_be_compared() -> None:
    arrays = random_outputs(a=(1, 2), b=(1, 2))
    with pytest.raises(FidelityError, match="output b is missing from the reference, which contains a"):
        compare({"a": arrays["a"]}, arrays, "fp32", "test")
    with pytest.raises(
        FidelityError, match=r"output a has the shape \(2, 1\), but the shape in the reference is \(1, 2\)"
    ):
        compare(arrays, {"a": arrays["a"].T}, "fp32", "test")
    assert not compare(arrays, {}, "fp32", "test").passed  # nothing compared is nothing proved


def test_the_verdict_tells_all() -> None:
    reference = random_outputs(x=(1, 8, 4, 4))["x"]
    told = judge(reference, noisy(reference, 0.5)).to_dict()
    assert told["verified"] is False
    assert told["method"] == "test"
    (row,) = told["outputs"]
    assert set(row) == {"name", "max_abs", "mean_abs", "relative_l2", "cosine", "non_finite", "tolerance", "passed"}
    assert row["tolerance"] == {"relative_l2": 1e-4, "cosine": 0.99999, "max_abs": None}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_watched_tensors_are_not_kept() -> None:
    """The largest value of each of 40 tensors of 16 MiB is an output; ONNX Runtime's default order keeps them all."""
    side, count = 2048, 40
    x = ir.val("x", ir.DataType.FLOAT, [side, side])
    nodes, most, value = [], [], x
    for _ in range(count):
        half = ir.node("Sin", [value])
        large = ir.node("Abs", half.outputs)
        most.append(ir.node("ReduceMax", large.outputs, {"keepdims": 0}))
        nodes += [half, large, most[-1]]
        value = half.outputs[0]
    for node in nodes:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    for node in most:
        node.outputs[0].shape = ir.Shape([])
    value.shape = ir.Shape([side, side])
    graph = ir.Graph([x], [value, *(node.outputs[0] for node in most)], nodes=nodes, opset_imports={"": 17})
    session = open_model(ir.Model(graph, ir_version=8), Path())
    image = np.ones((side, side), np.float32)

    def peak() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is in use now
    before = peak()
    found = session.run(None, {"x": image})
    assert len(found) == count + 1
    assert peak() - before < 10 * image.nbytes
