"""Which products are quantized: each measured once, taken by time saved per error, the set measured as a whole."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_golden, traced
from exporting import checkpoint_of, config_of, neck_export_cli, trace_quickly
from fake_gpu.play import play

from export.contract.options import QuantizeOptions
from export.contract.signature import Signature
from export.lowering.quantize import Quantization, match_products
from export.quantization import rates
from export.quantization.calibration import CalibrationError, calibrate, linear_layers
from export.quantization.choice import (
    Choice,
    Product,
    Record,
    choose,
    curve_lines,
    expected_error,
    expected_ms,
    measure_products,
    order_products,
    unmeasured,
)
from export.quantization.choose_ranges import choose_range
from export.quantization.rates import product_rates
from export.quantization.select_quantization import budget_tolerances, manifest_tolerances, select_quantization
from export.quantization.trials import Trials, at_size, rounded_layers
from export.verification.fidelity import TOLERANCES, Comparison
from export.verification.verify import References, reference_outputs, reference_pixels

BUDGET = TOLERANCES["fp8"].relative_l2
"""All 16 products in FP8 err 0.1 here."""


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


@functools.cache
def signature() -> Signature:
    golden = load_golden("meta-dual")
    return traced(golden.encoder, golden.config, necks="sam3", positions="none").signature


@functools.cache
def trials() -> Trials:
    encoder = load_golden("meta-dual").encoder
    pixels = reference_pixels(signature(), None, 1)
    layers, found = linear_layers(encoder), calibrate(encoder, pixels).layers
    scales = {name: choose_range(name, found[name], layers[name].weight, "fp8").scale for name in layers}
    return Trials(References(encoder), signature(), Quantization("fp8", scales))


@functools.cache
def measured() -> tuple[Product, ...]:
    return tuple(measure_products(of_layers(), trials().run, Record(None, {})))


def of_layers() -> list[Product]:
    return unmeasured(linear_layers(load_golden("meta-dual").encoder), 64)


@functools.cache
def chosen() -> Choice:
    return choose(measured(), BUDGET, lambda names: trials().run(*names), "fp8")


def worst(names: Sequence[str]) -> float:
    return max(row.relative_l2 for row in trials().run(*names))


@pytest.mark.parametrize("patterns", [["*.2.mlp.fc1"], ["*.1.attn", "*.3.mlp"]])
def test_a_trial_that_begins_at_its_block_is_a_whole_one(patterns: list[str]) -> None:
    encoder, names = (
        load_golden("meta-dual").encoder,
        match_products(patterns, linear_layers(load_golden("meta-dual").encoder)),
    )
    pixels = reference_pixels(signature(), None, 1)
    plain = reference_outputs(encoder, pixels, signature())
    with rounded_layers(encoder, Quantization("fp8", {name: trials().found.scales[name] for name in names})):
        whole = reference_outputs(encoder, pixels, signature())
    errors = [np.linalg.norm(whole[row] - plain[row]) / np.linalg.norm(plain[row]) for row in plain if "feat" in row]
    assert worst(names) == pytest.approx(max(errors), rel=1e-3)
    assert max(errors) > 1e-3
    after = reference_outputs(encoder, pixels, signature())
    assert all(np.array_equal(after[row], plain[row]) for row in plain)  # the encoder is as it was


def test_the_choice_fills_the_budget_and_other_orders_err_more() -> None:
    """The controls: as many products by chance, and in the worst order."""
    count = len(chosen().names)
    assert 4 <= count < 16
    assert worst(chosen().names) <= BUDGET
    ordered = [one.name for one in order_products(measured())]
    assert chosen().names == tuple(ordered[:count])
    assert worst(ordered[: count + 1]) > 0.95 * BUDGET
    chance = [random.Random(seed).sample(ordered, count) for seed in range(5)]
    assert np.median([worst(names) for names in chance]) > worst(chosen().names)
    assert worst(ordered[-count:]) > worst(chosen().names)


def test_the_order_is_by_the_square_of_the_error() -> None:
    """The first saves four times as much, but its error weighs nine times as much in the sum."""
    products = [Product("a", 4 * 10**9, {"x": 3e-3}), Product("b", 10**9, {"x": 1e-3})]
    assert [one.name for one in order_products(products)] == ["b", "a"]


def test_squares_add() -> None:
    products = order_products(measured())
    assert expected_error(products) == pytest.approx(worst([one.name for one in products]), rel=0.5)
    assert expected_error(products) > 1.5 * max(one.worst for one in products)
    rates_of = product_rates("fp8").source
    lines = curve_lines(chosen().curve, len(chosen().names), rates_of)
    assert "published" in rates_of and "L4" in rates_of and rates_of in lines[0]
    assert sum("<- chosen" in line for line in lines) == 1
    shares = [row["share"] for row in chosen().curve]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """A GPU that multiplies FP16 at one rate, and what a test adds."""
    known = {"fp16": 1e14}

    def measure(kind: str) -> float:
        if kind not in known:
            raise RuntimeError("torch._scaled_mm is only supported with compute capability >= 8.9\nmore")
        return known[kind]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40S")
    monkeypatch.setattr(rates, "measure_rate", measure)
    product_rates.cache_clear()
    yield known
    product_rates.cache_clear()


def test_times_are_by_this_gpus_rates_where_it_multiplies_the_kind(on_a_gpu: dict[str, float]) -> None:
    products = [Product("a", 10**14, {}), Product("b", 10**14, {})]
    published = product_rates("fp8")
    assert published.per_s == rates.PUBLISHED and published.source.endswith("compute capability >= 8.9")
    assert expected_ms(products, 1, "fp8") == pytest.approx(1e17 / 242.5e12 + 1e17 / 121e12)
    on_a_gpu["int8"] = 4e14
    assert product_rates("int8").source.endswith("measured with torch on this NVIDIA L40S")
    assert expected_ms(products, 1, "int8") == pytest.approx(1250)


@pytest.mark.parametrize(
    ("kind", "product"), [("fp16", "mm"), ("int8", "_int_mm"), ("fp8", "_scaled_mm")], ids=lambda one: one
)
def test_what_is_multiplied_is_data_in_the_layout_of_the_fast_path(
    monkeypatch: pytest.MonkeyPatch, kind: str, product: str
) -> None:
    """Equal numbers cost less power, and so run faster, than data; a row-major right side is slow (pytorch #165230)."""
    multiplied: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(rates, "SIDE", 32)
    monkeypatch.setattr(torch, product, lambda left, right, **options: multiplied.append((left, right)))
    with play("11.4"):
        assert rates.measure_rate(kind) > 0
    assert len(multiplied) == 1 + rates.REPEATS
    for left, right in multiplied:
        assert left.stride() == (32, 1) and right.stride() == (1, 32)
        for side in (left, right):
            assert len(side.to(torch.float32).unique()) > 32


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp16", "fp8", "int8"])
def test_a_gpu_multiplies_it(kind: str) -> None:
    if not torch.cuda.is_available() or (kind == "fp8" and torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("needs an NVIDIA GPU that torch can use, for FP8 of compute capability 8.9")
    assert rates.measure_rate(kind) > 1e12


def figures(error: float) -> list[Comparison]:
    return [Comparison("sam3_feat_0", 0, 0, error, 1 - error**2 / 2, 0, TOLERANCES["int8"])]


@pytest.mark.parametrize("fits", [1, 2, 7, 30, 39, 40])
@pytest.mark.parametrize("bias", [0.6, 1.0, 1.7])
def test_the_search_finds_the_last_set_that_fits(fits: int, bias: float) -> None:
    """Also where the squares do not add as expected."""
    products = [Product(f"p{index:02}", 100, {"sam3_feat_0": 0.001 * bias}) for index in range(40)]
    tried = []

    def run(names: Sequence[str]) -> list[Comparison]:
        tried.append(len(names))
        return figures(0.01 * len(names) / (fits + 0.5))

    assert len(choose(products, 0.01 / 0.95, run, "int8").names) == fits
    assert len(tried) == len(set(tried)) <= 10  # of 40


def test_a_budget_that_nothing_meets() -> None:
    with pytest.raises(CalibrationError, match=r"--budget 0\.001, .* error of all trials was 0\.0\d"):
        choose(measured(), 0.001, lambda names: trials().run(*names), "fp8")


def test_an_interrupted_measurement_goes_on(tmp_path: Path) -> None:
    state, asked = tmp_path / "c.fp8.json", []

    def run(name: str, most: int = 100) -> list[Comparison]:
        if len(asked) == most:
            raise KeyboardInterrupt
        asked.append(name)
        return figures(0.01)

    def measure(scale: int, run: Callable[[str], list[Comparison]]) -> list[Product]:
        return measure_products(of_layers(), run, Record(state, {"scales": (1, scale)}))

    with pytest.raises(KeyboardInterrupt):
        measure(2, functools.partial(run, most=3))
    assert len(json.loads(state.read_text())["rows"]) == 3
    assert len(measure(2, run)) == 16
    assert sorted(asked) == sorted(one.name for one in of_layers())
    assert measure(2, functools.partial(run, most=0)) == measure(2, run)  # all of it held, to the bit
    measure(3, run)  # the control: of other ranges
    assert len(asked) == 32
    for damaged in ("", "[]", "{"):
        state.write_text(damaged)
        assert not Record(state, {}).rows


def test_where_all_products_fit_none_is_tried_alone() -> None:
    golden, told = load_golden("meta-dual"), list[str]()
    for kind, budget in (("int8", None), ("fp8", 0.3)):
        options = QuantizeOptions(budget=budget)
        found = select_quantization(References(golden.encoder, None, told.append), signature(), kind, options, [])  # type: ignore[arg-type]
        assert len(found.quantization.scales) == 16
        count = 16 if kind == "int8" else 16 + 4 + 4  # four attentions and the results of four fc1
        assert [row["error"] is None for row in found.facts["curve"]] == [True] * 8 + [False]
        assert found.facts["curve"][-1]["error"] <= 0.95 * (budget or BUDGET)
        (mark,) = (
            line for line in curve_lines(found.facts["curve"], count, found.facts["rates"]) if "<- chosen" in line
        )
        assert mark.split()[:2] == [str(count), "100.0%"]
    assert not [line for line in told if line.startswith("product ")]
    assert "trial: quantizing all 16 linear layers" in told


def test_a_budget_is_the_tolerance_of_the_features() -> None:
    """The default is none that is given: an override of 0.05 would take a cosine of 0.9975."""
    names = {f"sam3_feat_{level}": 0.03 for level in range(4)}
    assert budget_tolerances(QuantizeOptions(), {"sam3_feat_0": 0.1}, signature()) == {"sam3_feat_0": 0.1}
    assert budget_tolerances(QuantizeOptions(budget=0.05), {}, signature()) == {}
    assert budget_tolerances(QuantizeOptions(budget=0.03), {}, signature()) == names
    manifest = {"signature": signature().to_dict(), "quantization": {"budget": 0.03}}
    assert manifest_tolerances(manifest, None) == names
    assert manifest_tolerances(manifest, {"sam3_feat_0": 0.1}) == names | {"sam3_feat_0": 0.1}
    assert manifest_tolerances({"quantization": None}, None) == {}


def test_small_images_are_of_whole_patches() -> None:
    large = dataclasses.replace(signature(), image_size=(1008, 224))
    assert at_size(large, 336, 14).image_size == (336, 224)
    assert at_size(large, 100, 14).image_size == (98, 98)


def test_auto_from_end_to_end(tmp_path: Path) -> None:
    words = ["onnx", "--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"), "--neck", "sam3"]
    words += ["--positions", "none", "--precision", "fp8", "--output", tmp_path / "a.onnx"]
    ran = neck_export_cli(*words)
    assert ran.code == 0, ran.err
    assert "<- chosen" in ran.out
    quantization = json.loads((tmp_path / "a.json").read_text())["quantization"]
    assert quantization["asked"] == ["auto"]
    assert 4 <= len(quantization["products"]) < quantization["of"] == 16
    assert len(quantization["curve"]) >= 9
    refused = neck_export_cli(*words[:-1], tmp_path / "b.onnx", "--budget", "0.001")
    assert refused.code == 1
    assert "--budget" in refused.err
    assert not list(tmp_path.glob("b*"))
