"""FP8 and INT8: codes to the bit, products where they were asked, calibration, refusals."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import load_golden, traced
from exporting import trace_quickly
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.contract.errors import ExportError
from export.contract.options import Rewrites
from export.contract.targets import TargetError, find_targets
from export.graph.cleanup import MODULE
from export.lowering.codes import CODES, Kind
from export.lowering.precision import lower
from export.lowering.quantize import (
    Quantization,
    UnquantizableError,
    encode,
    encode_weight,
    find_products,
    match_products,
    move_channels,
    scale_of,
)
from export.lowering.resolve_target import resolve_target
from export.quantization.calibration import (
    Calibration,
    CalibrationError,
    Layer,
    OutdatedError,
    calibrate,
    linear_layers,
    read_calibration,
    save_calibration,
)
from export.quantization.choose_ranges import choose_range, clipping_note, pack_move, unpack_move
from export.quantization.select_quantization import Ranges, quantization_of
from export.verification.rounding_simulation import simulate, spell_out_quantize
from export.verification.target_check import graph_needs, reading_lines
from export.verification.verify import reference_outputs, reference_pixels, run_model
from neck.checkpoint import load_encoder
from neck.images import normalize
from neck.necks import Sam3DualViTDetNeck

KINDS: tuple[Kind, ...] = ("fp8", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)

MODULE_TOLERANCE = 1e-3
"""Relative L2 of the graph against a fake-quantized module: a value next to an edge may be rounded to either side."""


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


def edges(scale: float) -> np.ndarray:
    """Values that codes are at, between (ties), beyond, and next to."""
    fp8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.concatenate([fp8[np.isfinite(fp8)], np.arange(-140, 141, dtype=np.float32)])
    codes = np.unique(codes)
    ties = (codes[1:] + codes[:-1]) / 2
    beyond = np.array([448, 463, 464, 465, 480, 1e3, 6e4, 1e30], np.float32)
    exact = np.concatenate([codes, ties, beyond, -beyond, [2.0**-10, 2.0**-11, 1e-30, 0]]).astype(np.float32)
    near = [np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    chance = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 100
    return np.concatenate([exact, *near, chance]) * np.float32(scale)


def by_definition(values: np.ndarray, scale: float, kind: Kind) -> np.ndarray:
    """ONNX's text in NumPy: x / scale, rounded half to even, saturated; then times the scale."""
    codes = values / np.float32(scale)
    if kind == "int8":
        found = np.clip(np.rint(codes), -128, 127) + 0.0  # an integer has no -0
    else:  # the nearest of the 253 numbers, of two the one whose last bit is 0
        numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        size = np.minimum(np.abs(codes.astype(np.float64)), 448)
        above = np.searchsorted(numbers, size).clip(1, 126)
        low, high = size - numbers[above - 1], numbers[above] - size
        chosen = np.where((low < high) | ((low == high) & ((above - 1) % 2 == 0)), above - 1, above)
        found = np.copysign(numbers[chosen], codes)
    return (found.astype(np.float32) * np.float32(scale)).astype(np.float32)


@each_kind
@pytest.mark.parametrize("scale", [1.0, 0.0123291015625])
@pytest.mark.parametrize("spelled", [False, True])
def test_onnx_runtime_and_torch_give_the_definition_to_the_bit(kind: Kind, scale: float, spelled: bool) -> None:
    """Where ONNX Runtime lacks QuantizeLinear, too, which is then spelled out."""
    values = edges(scale)
    code = int(CODES[kind])
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [len(values)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(np.float16(scale), "s"), helper.make_tensor("z", code, [], b"\0", raw=True)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    simulate(model)
    if spelled:
        spell_out_quantize(model)
    assert ("QuantizeLinear" in {node.op_type for node in model.graph}) is not spelled
    (found,) = run_model(model, Path(), values)
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    read, finite = np.clip(half, -65504, 65504), np.isfinite(half)
    wanted = by_definition(read, scale, kind)
    assert np.array_equal(found[finite].view(np.int32), wanted[finite].view(np.int32))
    assert found.max() == np.float32(scale) * np.float32({"fp8": 448, "int8": 127}[kind])
    again = encode(torch.from_numpy(read), scale, kind).float() * scale
    assert np.array_equal(again.numpy().view(np.int32), wanted.view(np.int32))
    assert not np.array_equal(by_definition(read, scale * 1.001, kind), wanted)  # the control


def test_a_scale_is_what_fp16_holds_and_clips_nothing() -> None:
    for largest in (0.1, 3.7, 448.0, 6e4):
        for kind, limit in (("fp8", 448), ("int8", 127)):
            scale = scale_of(largest, kind, "it")  # type: ignore[arg-type]
            assert np.float16(scale) == scale
            assert largest <= np.float32(scale) * limit < largest * 1.01
    with pytest.raises(ExportError, match="is 1e-05"):
        scale_of(1e-5, "int8", "it")


@each_kind
def test_a_weight_comes_back_within_half_a_code(kind: Kind) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 0, 32)
    weight[:, 3] = 0
    codes = encode_weight(weight, kind, "w")
    error = (codes.values() - weight).abs()
    if kind == "int8":
        assert codes.ratios is not None
        assert codes.ratios.amax() == 1
        assert (error <= 0.51 * codes.scale * codes.ratios).all()
        assert codes.codes.abs().amax() == 127
    else:
        assert codes.ratios is None
        assert (error <= (weight.abs() / 16).clamp(min=codes.scale * 2**-10) * 1.001).all()


@functools.cache
def calibrated() -> Calibration:
    golden = load_golden("meta-dual")
    signature = traced(golden.encoder, golden.config).signature
    return calibrate(golden.encoder, reference_pixels(signature, None, 2))


@functools.cache
def quantization(kind: Kind, *patterns: str) -> Quantization:
    layers = linear_layers(load_golden("meta-dual").encoder)
    names = match_products(patterns, layers)
    ranges = {name: choose_range(name, calibrated().layers[name], layers[name].weight.detach(), kind) for name in names}
    return quantization_of(kind, Ranges(ranges))


def quantized(kind: Kind, *patterns: str, precision: str | None = None, rewrites: Rewrites | None = None) -> ir.Model:
    golden = load_golden("meta-dual")
    model = traced(golden.encoder, golden.config, rewrites, necks="sam3", positions="none").model
    found = quantization(kind, *patterns) if patterns else None
    lower(model, precision or kind, quantization=found)  # type: ignore[arg-type]
    return model


@each_kind
@pytest.mark.parametrize("rewrites", [None, Rewrites.none()])
def test_only_the_asked_products_change(kind: Kind, rewrites: Rewrites | None) -> None:
    """All other nodes are those of the FP16 file, in its order, with its types."""

    def told(model: ir.Model) -> list[tuple[str, str, str]]:
        of_products = ("QuantizeLinear", "DequantizeLinear")
        nodes = [node for node in model.graph if node.op_type not in of_products]
        return [(str(n.name), n.op_type, str(n.outputs[0].dtype)) for n in nodes if "scale_channels" not in str(n.name)]

    model = quantized(kind, "trunk.blocks.1.mlp", "*.3.attn.qkv", rewrites=rewrites)
    assert told(model) == told(quantized(kind, precision="fp16", rewrites=rewrites))
    asked = {"trunk.blocks.1.mlp.fc1", "trunk.blocks.1.mlp.fc2", "trunk.blocks.3.attn.qkv"}
    reading = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].producer() is not None]  # type: ignore[union-attr]
    products = {str(n.inputs[1].producer().name).rpartition("/")[0] for n in reading if "attn/" not in str(n.name)}  # type: ignore[union-attr]
    assert products >= asked - {"trunk.blocks.3.attn.qkv"}
    stored = {name for name, value in model.graph.initializers.items() if value.dtype == CODES[kind] and value.shape}
    assert stored == {f"{name}.weight_{kind}" for name in asked}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    needs = graph_needs(model)
    others = {"onnxruntime", "openvino"} if kind == "int8" else set()
    assert set(reading_lines(needs)) == {"tensorrt", "tensorrt-rtx"} | others


class FakeQuantized(nn.Module):
    """A linear layer of two rounded factors, written apart from the exporter."""

    def __init__(
        self, layer: nn.Linear, scale: float, kind: Kind, weight_scale: np.ndarray, move: torch.Tensor
    ) -> None:
        super().__init__()
        self.layer, self.scale, self.kind, self.move = layer, scale, kind, move
        weight = (layer.weight.detach() * move).numpy()
        self.weight = torch.from_numpy(
            np.stack([by_definition(*row, kind) for row in zip(weight, weight_scale, strict=True)])
        )

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = by_definition((x / self.move).numpy(), self.scale, self.kind)
        return nn.functional.linear(torch.from_numpy(rounded), self.weight, self.layer.bias)


def fake(encoder: Sam3DualViTDetNeck, kind: Kind, names: list[str], graph: ir.Graph) -> Sam3DualViTDetNeck:
    """The encoder with some layers quantized by the scales that the graph holds."""

    def scale(name: str) -> np.ndarray:
        value = graph.initializers.get(name)
        return np.ones((), np.float32) if value is None else value.const_value.numpy()  # type: ignore[union-attr]

    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = encoder.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        of_rows = np.broadcast_to(scale(f"{name}.weight_scale") * scale(f"{name}.weight_ratios"), layer.out_features)
        move = quantization(kind, "all").moves.get(name, torch.ones(layer.in_features))
        here = FakeQuantized(layer, float(scale(f"{name}.input_scale")), kind, of_rows, move)
        setattr(encoder.get_submodule(parent), leaf, here)
    return encoder


@each_kind
def test_the_graph_computes_what_a_fake_quantized_module_does(kind: Kind) -> None:
    """In FP32 but for the quantized products, so that nothing else differs."""
    names_quantized = list(quantization(kind, "all").scales)
    golden = load_golden("meta-dual")
    signature = traced(golden.encoder, golden.config, necks="sam3", positions="none").signature
    pixels = reference_pixels(signature, None, 1)
    model = quantized(kind, "all", precision="fp32", rewrites=Rewrites.none())
    names, graph = [spec.name for spec in signature.outputs], model.graph.clone()
    outputs = dict(zip(names, run_model(model, Path(), normalize(pixels).numpy()), strict=True))
    size = json.loads((Path(__file__).parent / "data/meta-dual/case.json").read_text())["run_image_size"]

    def worst(chosen: list[str]) -> float:
        encoder = load_encoder(next((Path(__file__).parent / "data/meta-dual").glob("checkpoint.*")), golden.config)
        encoder.set_imgsz(size)
        wanted = reference_outputs(fake(encoder, kind, chosen, graph), pixels, signature)
        return max(float(np.linalg.norm(outputs[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in names)

    assert worst(names_quantized) <= MODULE_TOLERANCE
    assert worst(names_quantized[:-1]) > MODULE_TOLERANCE  # the control: one product less


def test_moving_a_channels_size_changes_no_bit() -> None:
    """Powers of two: what the LayerNorm has less, the weight has more."""
    golden = load_golden("meta-dual")
    signature = traced(golden.encoder, golden.config, necks="sam3", positions="none").signature
    image = normalize(reference_pixels(signature, None, 1)).numpy()
    for rewrites in (None, Rewrites.none()):
        model = traced(golden.encoder, golden.config, rewrites, necks="sam3", positions="none").model
        moved = model.clone()
        products = find_products(moved.graph)
        for name, node in products.items():
            if name.endswith(("attn.qkv", "mlp.fc1")):
                exponents = torch.randint(-4, 5, (32,), generator=torch.Generator().manual_seed(len(name)))
                move_channels(moved.graph, name, node, torch.exp2(exponents.float()))
        before, after = run_model(model, Path(), image), run_model(moved, Path(), image)
        assert all(np.array_equal(one, two) for one, two in zip(before, after, strict=True))
    move_channels(moved.graph, "x", products["trunk.blocks.0.mlp.fc1"], torch.full((32,), 3.0))
    other = run_model(moved, Path(), image)
    assert not np.array_equal(
        other[0], before[0]
    )  # the control: 3 is no power of two, so it is an identity with roundings
    assert np.allclose(other[0], before[0], rtol=1e-3, atol=1e-3)
    with pytest.raises(ExportError, match=r"no such LayerNorm before trunk\.blocks\.0\.mlp\.fc2"):
        move_channels(moved.graph, "trunk.blocks.0.mlp.fc2", products["trunk.blocks.0.mlp.fc2"], torch.ones(148))


@each_kind
def test_a_large_channel_moves_into_the_weight(kind: Kind) -> None:
    """INT8 gains; FP8, which rounds large and small alike, need not."""
    name = "trunk.blocks.1.mlp.fc1"
    layer = calibrated().layers[name]
    weight = linear_layers(load_golden("meta-dual").encoder)[name].weight.detach()
    sizes = torch.ones(32)
    sizes[3], sizes[9] = 64.0, 30.0
    large = Layer(layer.rows * sizes, layer.weights, layer.channels * sizes)
    plain, moved = choose_range("x", large, weight / sizes, kind), choose_range(name, large, weight / sizes, kind)
    assert plain.move is None
    if kind == "int8":
        assert moved.error < 0.5 * plain.error
        assert moved.move is not None
        assert moved.move[3] >= 16 * moved.move[0]
        assert torch.equal(unpack_move(pack_move(moved.move)), moved.move)
    assert moved.error <= plain.error


def test_kept_modules_are_not_quantized() -> None:
    golden = load_golden("meta-dual")
    model = traced(golden.encoder, golden.config, necks="sam3", positions="none").model
    found = quantization("int8", "all")
    lower(model, "int8", quantization=found, keep_fp32=["trunk.blocks.2"])
    modules = {n.metadata_props[MODULE] for n in model.graph if n.op_type == "QuantizeLinear"}
    assert len(modules) == 12
    assert not any(name.startswith("trunk.blocks.2.") for name in modules)


def test_what_cannot_be_lowered_is_refused() -> None:
    with pytest.raises(ExportError, match="the precision int8 requires"):
        quantized("int8")
    with pytest.raises(
        ExportError, match=r"matches none of the 16 linear layers, whose names are trunk.blocks.0.attn.qkv"
    ):
        quantized("int8", "trunk.blocks.9")
    golden = load_golden("meta-dual")
    model = traced(golden.encoder, golden.config, necks="sam3", positions="none").model
    with pytest.raises(ExportError, match="opset 18 has neither the FP8 type"):
        lower(model, "int8", quantization=quantization("int8", "all"), opset=18)


def test_a_range_is_chosen_by_the_error_of_the_product() -> None:
    """With one outlier in a row of a channel that counts for nothing, clipping it errs least."""
    layer = calibrated().layers["trunk.blocks.1.mlp.fc1"]
    weight = linear_layers(load_golden("meta-dual").encoder)["trunk.blocks.1.mlp.fc1"].weight.detach().clone()
    plain = choose_range("x", layer, weight, "int8")
    rows, channels = layer.rows.clone(), layer.channels.clone()
    rows[0, 5] = channels[5] = 100.0
    weight[:, 5] *= 1e-3
    clipped = choose_range("x", dataclasses.replace(layer, rows=rows, channels=channels), weight, "int8")
    assert clipped.method != "largest"
    assert 0 < clipped.clipped < 0.01
    assert clipped.error < 2 * plain.error
    assert clipped.largest == 100
    note = str(clipping_note({"y": plain, "x": clipped}, "int8"))
    assert note.startswith("x: ") and f" {clipped.clipped:.2%} " in note
    assert f" ends at {clipped.scale * 127:.3g} " in note and "the largest input value is 100" in note
    assert clipping_note({"x": dataclasses.replace(clipped, clipped=0.0)}, "int8") is None


def test_a_calibration_is_used_again_for_the_same_encoder_and_size(tmp_path: Path) -> None:
    golden, path = load_golden("meta-dual"), tmp_path / "c.safetensors"
    save_calibration(path, calibrated())
    size = calibrated().image_size
    again = read_calibration(path, golden.encoder, size)
    assert again.layers.keys() == linear_layers(golden.encoder).keys()
    assert all(torch.equal(layer.rows, calibrated().layers[name].rows) for name, layer in again.layers.items())
    with pytest.raises(OutdatedError, match=r"size \[112, 112\], but the size is now \[56, 56\]"):
        read_calibration(path, golden.encoder, (56, 56))
    with pytest.raises(OutdatedError, match="other weights"):
        read_calibration(path, load_golden("meta-tri").encoder, size)
    path.write_bytes(b"no calibration")
    with pytest.raises(CalibrationError, match="is not a calibration that neck-export wrote"):
        read_calibration(path, golden.encoder, size)


def test_an_input_that_is_not_finite_is_refused_and_one_of_zeros_has_no_range() -> None:
    golden = load_golden("meta-dual")
    encoder = load_encoder(next((Path(__file__).parent / "data/meta-dual").glob("checkpoint.*")), golden.config)
    encoder.set_imgsz(112)
    norm = encoder.get_submodule("trunk.blocks.2.norm2")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 112, 112, 3), np.uint8)
    norm.weight.data.zero_()
    norm.bias.data.zero_()
    name = "trunk.blocks.2.mlp.fc1"
    layer = calibrate(encoder, pixels).layers[name]
    with pytest.raises(UnquantizableError, match=f"the input of the layer {name} is zero"):
        choose_range(name, layer, linear_layers(encoder)[name].weight, "int8")
    norm.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=f"{name}: the input of this layer contains NaN"):
        calibrate(encoder, pixels)


def test_targets() -> None:
    assert resolve_target(find_targets("jetpack-6.2"), "int8").spelling == "matmul"
    for name in ("jetpack-6.2", "tensorrt-10.16@8.6"):
        with pytest.raises(TargetError, match=r"--precision fp8: .* with compute capability 8.*use --precision int8"):
            resolve_target(find_targets(name), "fp8")
    assert resolve_target(find_targets("tensorrt-10.16@8.9"), "fp8").spelling == "operator"
    with pytest.raises(TargetError, match=r"TensorRT 8\.6"):
        resolve_target(find_targets("tensorrt-8.6"), "int8")
    with pytest.raises(TargetError, match="the text after the @ is not a compute capability"):
        find_targets("tensorrt-10.16@ada")
    assert find_targets("tensorrt-10.16@8.6")[0].full_name == "tensorrt-10.16@8.6"
