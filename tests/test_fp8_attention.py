"""FP8 attention: an independent model of its roundings, what is calibrated, what is refused, what the builder makes."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import load_golden, traced
from exporting import trace_quickly
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engines.builder.onnx_graph import read_graph
from engines.layers.layer_report import LayerReport
from engines.layers.read_layers import read_families
from export.contract.errors import ExportError
from export.contract.options import QuantizeOptions
from export.contract.targets import find_targets, why_no_fp8_attention
from export.inspect import quantized_products, told_quantization
from export.lowering.attention import PROBABILITIES, attention_forms, fp8_attentions
from export.lowering.codes import AttentionScales, Kind
from export.lowering.precision import kept_products, lower
from export.lowering.quantize import Quantization, UnquantizableError, match_products
from export.lowering.relower import relower
from export.quantization import calibration as calibrating
from export.quantization.calibration import (
    Calibration,
    CalibrationError,
    attention_layers,
    calibrate,
    linear_layers,
    read_calibration,
    result_layers,
    save_calibration,
)
from export.quantization.choice import Product, order_products, unmeasured_attentions
from export.quantization.choose_ranges import choose_value_range
from export.quantization.select_quantization import (
    QuantizationPlan,
    manifest_quantization,
    select_quantization,
)
from export.quantization.trials import rounded_layers
from export.verification.rounding_simulation import simulate
from export.verification.verify import References, reference_outputs, reference_pixels, run_model
from neck.images import normalize

NAMES = [f"trunk.blocks.{block}.attn.attention" for block in range(4)]
FIRST = NAMES[0]
SCALES = AttentionScales(1 / 64, 3 / 64, 1 / 32)


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


def canonical(**asked: Any) -> ir.Model:
    golden = load_golden("meta-dual")
    return traced(golden.encoder, golden.config, necks="sam3", positions="none", **asked).model


def lowered(*names: str, scales: AttentionScales = SCALES, **more: Any) -> ir.Model:
    model = canonical()
    lower(model, "fp8", quantization=Quantization("fp8", {}, attentions=dict.fromkeys(names, scales)), **more)
    return model


# --- the roundings


E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
"""Every number of the format that is not negative, in order."""


def as_e4m3(values: NDArray[Any], scale: float) -> NDArray[np.float64]:
    """The nearest code times the scale, ties to the even one, beyond 448 saturated; written by hand."""
    codes = (values.astype(np.float32) / np.float32(np.float16(scale))).astype(np.float64)
    size = np.minimum(np.abs(codes), 448)
    above = np.searchsorted(E4M3, size).clip(1, 126)
    low, high = size - E4M3[above - 1], E4M3[above] - size
    down = (low < high) | ((low == high) & ((above - 1) % 2 == 0))
    return np.copysign(E4M3[np.where(down, above - 1, above)], codes) * float(np.float16(scale))


def attention_by_hand(query: Any, key: Any, value: Any, scales: AttentionScales) -> NDArray[np.float64]:
    """(B, heads, N, D): codes, FP16 scores, softmax, FP16 and E4M3 probabilities, FP16 result; sums in float64."""
    query, key = as_e4m3(query, scales.query), as_e4m3(key, scales.key)
    scores = (query @ key.swapaxes(-1, -2)).astype(np.float16).astype(np.float64)
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(axis=-1, keepdims=True)).astype(np.float16)
    mixed = as_e4m3(probabilities, PROBABILITIES) @ as_e4m3(value, scales.value)
    return mixed.astype(np.float16).astype(np.float64)


@functools.cache
def simulated(name: str) -> dict[str, NDArray[np.float32]]:
    """What the rounding simulation gives of one FP8 attention: query, key, value and result."""
    golden, model = load_golden("meta-dual"), lowered(name)
    path = name.removesuffix(".attention")
    nodes = {str(node.name): node for node in model.graph}
    read = {part: nodes[f"{path}/quantize_{part}"].inputs[0] for part in ("query", "key", "value")}
    simulate(model)
    mixed = nodes[f"{path}/mixed"].outputs[0]
    rounded = next(user for user, _ in mixed.uses()).outputs[0]
    up = next(user for user, _ in rounded.uses()).outputs[0]
    names = {part: str(value.name) for part, value in read.items() if value is not None}
    by_name = {str(v.name): v for node in model.graph for v in node.outputs}
    model.graph.outputs[:] = [*(by_name[one] for one in names.values()), up]
    found = run_model(model, Path(), normalize(reference_pixels(signature(), None, 1)).numpy())
    del golden
    return dict(zip([*names, "result"], found, strict=True))


@functools.cache
def signature() -> Any:
    golden = load_golden("meta-dual")
    return traced(golden.encoder, golden.config, necks="sam3", positions="none").signature


@pytest.mark.parametrize("name", NAMES[:2])
def test_the_simulation_is_a_model_by_hand_to_the_last_rounding(name: str) -> None:
    """A windowed and a global block. Two exponentials may differ in the last bit, and a tie then falls elsewhere."""
    held = simulated(name)
    parts = [held[part] for part in ("query", "key", "value")]
    wanted = attention_by_hand(*parts, SCALES)
    found = held["result"].astype(np.float64)
    assert found.shape == wanted.shape and len(np.unique(found)) > 500
    step = np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64)
    off = np.abs(found - wanted)
    code = np.abs(as_e4m3(parts[2], SCALES.value)).max() * 2.0**-4  # a probability's code more or less
    assert np.mean(off > 0) < 2e-3 and (off <= np.maximum(step, code)).all()
    for changed in ("query", "key", "value"):  # the control
        other = dataclasses.replace(SCALES, **{changed: getattr(SCALES, changed) * 1.1})
        assert np.mean(attention_by_hand(*parts, other) != found) > 0.1
    unrounded = attention_by_hand(*parts, AttentionScales(2.0**-10, 2.0**-10, 2.0**-10))
    assert np.mean(unrounded != found) > 0.1


def test_a_trial_rounds_as_the_graph_does() -> None:
    """The fake-quantized module against the file's simulation: beside FP8 roundings the file has those of FP16."""
    golden = load_golden("meta-dual")
    pixels = reference_pixels(signature(), None, 1)
    exact = reference_outputs(golden.encoder, pixels, signature())
    found = Quantization("fp8", {}, attentions={FIRST: SCALES})
    with rounded_layers(golden.encoder, found):
        rounded = reference_outputs(golden.encoder, pixels, signature())
    again = reference_outputs(golden.encoder, pixels, signature())
    model = lowered(FIRST)
    simulate(model)
    outputs = [str(value.name) for value in model.graph.outputs]
    file = dict(zip(outputs, run_model(model, Path(), normalize(pixels).numpy()), strict=True))
    for name in signature().features:
        norm = np.linalg.norm(exact[name])
        error = np.linalg.norm(rounded[name] - exact[name]) / norm
        assert 1e-3 < error < 0.3
        assert np.linalg.norm(file[name] - rounded[name]) / norm < 0.3 * error
        assert np.array_equal(again[name], exact[name])


# --- the graph


@pytest.mark.parametrize("opset", [None, 23])
def test_only_the_asked_attentions_change(opset: int | None) -> None:
    """All other nodes are those of the FP16 file; beside the Attention operator, too."""
    model, plain = lowered(*NAMES[1:3], opset=opset), canonical()
    lower(plain, "fp16", opset=opset)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert fp8_attentions(model.graph) == NAMES[1:3]
    assert sorted(attention_forms(model.graph)) == ["fp32acc", "fp32acc", "fp8", "fp8"]
    paths = [name.removesuffix(".attention") for name in NAMES[1:3]]

    def others(graph: ir.Graph) -> list[tuple[str, str]]:
        rows = [(str(node.name), str(node.outputs[0].dtype)) for node in graph]
        return [row for row in rows if not row[0].startswith(tuple(f"{path}/" for path in paths))]

    assert others(model.graph) == others(plain.graph)
    assert quantized_products(model.graph) == {}


def test_modules_in_fp32_stay_and_other_forms_are_refused() -> None:
    assert fp8_attentions(lowered(*NAMES, keep_fp32=["trunk.blocks.2.attn"]).graph) == [*NAMES[:2], NAMES[3]]
    assert NAMES[2] in kept_products(canonical().graph, ["trunk.blocks.2"])
    for form in ("fused", "unfused"):
        with pytest.raises(ExportError, match="attention"):
            lowered(FIRST, attention=form)
    with pytest.raises(ExportError, match=r"trunk\.blocks\.9"):
        lowered("trunk.blocks.9.attn.attention")


def test_lowered_again_without_fp8_it_is_what_an_export_gives() -> None:
    model, wanted = lowered(*NAMES), canonical()
    lower(wanted, "fp16")
    kept = lowered(*NAMES)
    assert relower(kept, "fp8", "fp32acc") == 0 and fp8_attentions(kept.graph) == NAMES
    assert relower(model, "fp8", "fp32acc", keep_fp8=False) == 4
    assert fp8_attentions(model.graph) == []

    def told(graph: ir.Graph) -> list[tuple[str, str]]:
        return sorted((node.op_type, str(node.outputs[0].dtype)) for node in graph)

    assert told(model.graph) == told(wanted.graph)
    assert not [name for name in model.graph.initializers if "_scale" in name and "attention" in name]


# --- calibration and choice


@functools.cache
def calibrated() -> Calibration:
    return calibrate(load_golden("meta-dual").encoder, reference_pixels(signature(), None, 2))


def test_calibration_keeps_what_attention_multiplies() -> None:
    """Against queries, keys and values computed here, from the block's own input."""
    encoder = load_golden("meta-dual").encoder
    seen: dict[str, torch.Tensor] = {}
    attention = attention_layers(encoder)[NAMES[1]]
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0], cos=inputs[1], sin=inputs[2]))
    try:
        with torch.inference_mode():
            encoder.trunk(normalize(reference_pixels(signature(), None, 1)))
    finally:
        hook.remove()
    with torch.inference_mode():
        query, key, value = attention.qkv(seen["x"]).unflatten(-1, (3, attention.num_heads, -1)).unbind(-3)
        query, key = (attention.rope(one.transpose(1, 2), seen["cos"], seen["sin"]) for one in (query, key))
    held = calibrate(encoder, reference_pixels(signature(), None, 1)).attentions
    wanted = {"query": float(query.abs().max()) * attention.scale, "key": float(key.abs().max())}
    wanted["value"] = float(value.abs().max())
    assert {part: held[f"{NAMES[1]}.{part}"].largest for part in wanted} == pytest.approx(wanted)
    assert sorted(held) == sorted(f"{name}.{part}" for name in NAMES for part in wanted)


def test_layers_keep_their_tokens() -> None:
    """Those of products are drawn as before there were attentions, so older files and ranges stay what they were."""
    encoder, pixels = load_golden("meta-dual").encoder, reference_pixels(signature(), None, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrating, "attention_layers", lambda _: {})
        patch.setattr(calibrating, "result_layers", lambda _: {})
        alone = calibrate(encoder, pixels)
    assert alone.attentions == {} == alone.results
    for name, layer in calibrated().layers.items():
        assert torch.equal(layer.rows, alone.layers[name].rows)


def select(tmp_path: Path, *patterns: str, kind: Kind = "fp8", **more: Any) -> QuantizationPlan:
    file = tmp_path / "x.safetensors"
    if not file.exists():
        save_calibration(file, calibrated())
    options = QuantizeOptions(patterns, more.pop("budget", None), file)
    encoder = load_golden("meta-dual").encoder
    return select_quantization(References(encoder), signature(), kind, options, more.pop("notes", []), **more)


def test_patterns_name_attentions_and_results() -> None:
    encoder = load_golden("meta-dual").encoder
    every = [*linear_layers(encoder), *attention_layers(encoder), *(f"{one}.result" for one in result_layers(encoder))]
    assert len(match_products(["all"], every)) == 16 + 4 + 4
    assert match_products(["*.attention"], every) == NAMES
    assert match_products(["trunk.blocks.2.attn"], every)[-1] == NAMES[2]
    assert match_products(["*.2.mlp.fc1"], every) == ["trunk.blocks.2.mlp.fc1"]
    assert match_products(["*.2.mlp.fc1.result"], every) == ["trunk.blocks.2.mlp.fc1.result"]


def test_all_takes_attentions_and_results(tmp_path: Path) -> None:
    selected = select(tmp_path, "all")
    found = selected.quantization
    assert (len(found.scales), list(found.attentions), len(found.results)) == (16, NAMES, 4)
    again = manifest_quantization({"quantization": json.loads(json.dumps(selected.facts))})
    assert again is not None and (again.attentions, again.results) == (found.attentions, found.results)
    for parts in selected.facts["attentions"].values():
        assert {part: row["method"] for part, row in parts.items()} == dict.fromkeys(parts, "largest")
        assert all(row["clipped"] == 0 and 0 < row["error"] < 0.05 for row in parts.values())
    model = canonical()
    lower(model, "fp8", quantization=found)
    told = told_quantization(selected.facts, model.graph)
    assert [len(told[key]) for key in ("products", "attentions", "results")] == [16, 4, 4]
    assert select(tmp_path, "*.attention").quantization.scales == {}
    without = select(tmp_path, "all", kind="int8").quantization
    assert (len(without.scales), without.attentions, without.results) == (16, {}, {})


def test_auto_takes_attentions_under_the_budget(tmp_path: Path) -> None:
    """With a budget for all but a few, and with one that all keep."""
    found = select(tmp_path, budget=0.05).quantization
    assert found.scales and found.attentions and len(found.scales) + len(found.attentions) < 20
    assert set(found.results) <= set(found.scales)
    everything = select(tmp_path, budget=0.9).quantization
    assert (len(everything.scales), len(everything.attentions), len(everything.results)) == (16, 4, 4)


def test_a_result_comes_after_its_product() -> None:
    products = [
        Product("a", 10**9, {"x": 1e-2}),
        Product("a.result", 0, {"x": 1e-6}, 10**7),
        Product("b", 10**9, {"x": 1e-3}),
    ]
    assert [one.name for one in order_products(products)] == ["b", "a", "a.result"]
    assert [one.name for one in order_products(products[1:])] == ["a.result", "b"]


def test_operations_of_attentions() -> None:
    """Window 4 on a grid of 8: 4 windows of 16 tokens, or 64 tokens at once; C = 32."""
    config = load_golden("meta-dual").config
    found = {one.name: one.operations for one in unmeasured_attentions(config, NAMES)}
    window, whole = 4 * 4 * 16**2 * config.embed_dim, 4 * 64**2 * config.embed_dim
    assert list(found.values()) == [whole if block in config.global_blocks else window for block in range(4)]


# --- what is refused


def test_int8_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--precision fp8"):
        select(tmp_path, "*.attention", kind="int8")


def test_a_target_that_does_not_fuse_it(tmp_path: Path) -> None:
    assert why_no_fp8_attention(find_targets("tensorrt-rtx")) is None
    for target in ("tensorrt-10.3", "tensorrt-11.4", "tensorrt-rtx,tensorrt-10.15"):
        reason = why_no_fp8_attention(find_targets(target))
        assert reason and "TensorRT" in reason
        with pytest.raises(ExportError, match="--target"):
            select(tmp_path, "*.1.attn.attention", no_attention=reason)
        notes: list[str] = []
        found = select(tmp_path, "all", no_attention=reason, notes=notes).quantization
        assert not found.attentions and len(found.scales) == 16
        assert any(reason in note for note in notes)


def test_a_calibration_without_attentions(tmp_path: Path) -> None:
    """Of an older version: products go on, attentions by name are refused."""
    file = tmp_path / "x.safetensors"
    save_calibration(file, calibrated())
    about = json.loads(metadata(file)) | {"format": 2}
    kept = {
        name: tensor for name, tensor in load_file(file).items() if ".attention." not in name and ".result." not in name
    }
    save_file(kept, file, {calibrating.METADATA: json.dumps(about)})
    notes: list[str] = []
    found = select(tmp_path, "all", notes=notes).quantization
    assert len(found.scales) == 16 and not found.attentions and not found.results
    assert any(str(file) in note for note in notes)
    with pytest.raises(CalibrationError, match=r"x\.safetensors.*--quantize"):
        select(tmp_path, "*.attention")


def test_a_calibration_whose_attentions_are_damaged(tmp_path: Path) -> None:
    file, golden = tmp_path / "x.safetensors", load_golden("meta-dual")
    save_calibration(file, calibrated())
    assert sorted(read_calibration(file, golden.encoder, golden.config.image_size).attentions) == sorted(
        calibrated().attentions
    )
    kept = {name: tensor for name, tensor in load_file(file).items() if f"{FIRST}.key" not in name}
    save_file(kept, file, {calibrating.METADATA: metadata(file)})
    with pytest.raises(CalibrationError, match="damaged"):
        read_calibration(file, golden.encoder, golden.config.image_size)


def metadata(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return str(opened.metadata()[calibrating.METADATA])


@pytest.mark.parametrize("factor", [1e9, 1e-12, 0.0])
def test_values_that_no_scale_brings_to_codes(factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The block stays in FP16, and the manifest says why."""
    held = dict(calibrated().attentions)
    layer = held[f"{FIRST}.key"]
    held[f"{FIRST}.key"] = dataclasses.replace(layer, rows=layer.rows * factor, channels=layer.channels * factor)
    with pytest.raises(UnquantizableError, match="key"):
        choose_value_range("the key", held[f"{FIRST}.key"], "fp8", clip=False)
    changed = dataclasses.replace(calibrated(), attentions=held)
    monkeypatch.setattr("export.quantization.select_quantization._calibration", lambda *_: changed)
    selected = select(tmp_path, "all")
    assert list(selected.quantization.attentions) == NAMES[1:] and FIRST in selected.facts["left_out"]


# --- what the builder makes of it


def built(*names: str, capability: str = "8.9") -> tuple[LayerReport, dict[str, tuple[str, str]]]:
    """The layer report of a plan, and the families that its bytes name."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from engines.builder.build import build_plan
    from engines.builder.options import BuildOptions

    with tempfile.TemporaryDirectory() as folder:
        onnx_file, plan = Path(folder, "x.onnx"), Path(folder, "x.plan")
        ir.save(lowered(*names), onnx_file, external_data="x.onnx.data")
        assert read_graph(onnx_file).fp8_attentions == len(names)
        layers = build_plan(onnx_file, plan, BuildOptions(precision="fp8", compute_capabilities=(capability,))).layers
        assert layers is not None
        return layers, read_families(plan)


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_every_fp8_attention_is_one_fp8_kernel(capability: str) -> None:
    """The plan's bytes name the same kernels as the builder's listing; RTX 1.7 fuses none of 16 tokens in FP8."""
    layers, families = built(NAMES[1], NAMES[3], capability=capability)
    fused = {kernel.tactic: kernel.families for kernel in layers.fused}
    assert fused == families
    assert layers.families == {"Ada_qmma_e4m3_fp32": 2, "Ampere_hmma_fp32": 2}
    assert layers.accumulation == ("fp32", "fp32") and layers.warning() is None
    assert "2 of 2 FP8 attentions are fused" in layers.summary() and layers.products == 0
    fewer = dataclasses.replace(layers, fp8_attentions=3)  # the control: one that was asked and is not there
    assert "1 of 3 FP8 attention" in str(fewer.warning())
    assert LayerReport.from_dict(layers.to_dict()) == layers
