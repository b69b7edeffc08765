"""The rounding simulation: it rounds where the types say, overflows as FP16 does, errs as PyTorch's half."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from exporting import trace_quickly
from onnx import TensorProto, helper, numpy_helper

import export.verification.rounding_simulation
from export.contract.options import Precision
from export.contract.signature import encoder_signature
from export.pipeline import write_onnx
from export.verification.fidelity import FidelityError, Verdict, compare
from export.verification.rounding_simulation import is_low_precision, simulate, watch_finite
from export.verification.verify import first_non_finite, reference_outputs, reference_pixels, run_model
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig
from neck.images import normalize
from neck.necks import Sam3DualViTDetNeck, forward_necks

TORCH_SHARE = 0.2
"""How far the simulation's relative L2 may be from that of PyTorch's own half precision on the same weights."""

DTYPES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def tiny_model(nodes: list[onnx.NodeProto], low: str, weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A graph image (FP32, 4) -> nodes -> y in a low precision."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        nodes,
        "test",
        [image],
        [helper.make_tensor_value_info("y", TYPES[low], None)],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))


def overflow(low: str = "fp16") -> ir.Model:
    """image x 300 / 300 in a low precision."""
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], name="cast", to=TYPES[low]),
        helper.make_node("Mul", ["x", "w"], ["big"], name="trunk/Mul"),
        helper.make_node("Div", ["big", "w"], ["y"], name="trunk/Div"),
    ]
    return tiny_model(nodes, low, {"w": np.array(300, NUMPY[low])})


def run(model: ir.Model, image: np.ndarray) -> np.ndarray:
    (found,) = run_model(model, Path(), image.astype(np.float32))
    return found


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


IMAGE = np.array([2.0, 300.0, -300.0, 0.1])


def test_fp16_overflows_as_it_does_on_a_gpu() -> None:
    """300 x 300 is 90000, above 65504."""
    model = overflow()
    assert is_low_precision(model)
    rounded = simulate(model)
    assert len(rounded) == 3
    found = run(model, IMAGE)
    assert found.dtype == np.float32
    assert np.isfinite(found).tolist() == [True, False, False, True]
    assert first_non_finite(model, rounded, Path(), IMAGE.astype(np.float32)) == "trunk/Mul"


def test_onnx_runtime_alone_does_not_see_it() -> None:
    """The control, and the reason for the simulation; should this ever fail, ONNX Runtime has learnt FP16."""
    assert np.isfinite(run(overflow(), IMAGE)).all()


def test_bf16_does_not_overflow_there() -> None:
    model = overflow("bf16")
    rounded = simulate(model)
    assert np.isfinite(run(model, IMAGE)).all()
    assert first_non_finite(model, rounded, Path(), IMAGE.astype(np.float32)) is None


@pytest.mark.parametrize("low", ["fp16", "bf16"])
def test_every_step_is_rounded_as_numpy_rounds(low: str) -> None:
    """A chain whose every result numpy rounds in the same way: bit for bit."""
    names = ["Mul", "Add", "Sqrt", "Mul", "Sub", "Div"]
    arrays = np.random.default_rng(0).uniform(0.5, 2, size=(6, 4)).astype(NUMPY[low])
    nodes, value = [helper.make_node("Cast", ["image"], ["v"], to=TYPES[low])], "v"
    for step, name in enumerate(names):
        inputs = [value] if name == "Sqrt" else [value, f"w{step}"]
        value = "y" if step == len(names) - 1 else f"v{step}"
        nodes.append(helper.make_node(name, inputs, [value]))
    weights = {f"w{step}": array for step, array in enumerate(arrays)}
    model = tiny_model(nodes, low, weights)
    simulate(model)
    image = np.random.default_rng(1).uniform(1, 4, size=4).astype(np.float32)
    exact = image.astype(NUMPY[low]).astype(np.float32)
    once = exact
    functions: dict[str, Callable[..., np.ndarray]] = {
        "Mul": np.multiply,
        "Add": np.add,
        "Sub": np.subtract,
        "Div": np.divide,
        "Sqrt": lambda x, _: np.sqrt(x),
    }
    for name, array in zip(names, arrays, strict=True):
        exact = functions[name](exact, array.astype(np.float32)).astype(NUMPY[low]).astype(np.float32)
        once = functions[name](once, array.astype(np.float32))
    found = run(model, image)
    np.testing.assert_array_equal(found, exact)
    assert (found != once.astype(NUMPY[low]).astype(np.float32)).any()  # the control: rounding only once gives another


def test_moves_are_not_rounded_again_and_fp32_islands_not_at_all() -> None:
    nodes = [
        helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT16),
        helper.make_node("Reshape", ["x", "shape"], ["square"]),
        helper.make_node("Transpose", ["square"], ["turned"], perm=[1, 0]),
        helper.make_node("Cast", ["turned"], ["up"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["up", "up"], ["product"]),
        helper.make_node("Sqrt", ["product"], ["root"]),
        helper.make_node("Cast", ["root"], ["y"], to=TensorProto.FLOAT16),
    ]
    model = tiny_model(nodes, "fp16", {"shape": np.array([2, 2])})
    rounded = simulate(model)
    assert [value.name for value in rounded] == ["x", "y"]
    found = run(model, np.array([300.0, 2.0, 0.1, -4.0]))  # 300 squared passes FP16, but stands in an island
    np.testing.assert_array_equal(found, np.array([[300.0, np.float16(0.1)], [2.0, 4.0]], np.float32))


def test_an_fp32_graph_is_left_alone() -> None:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        [helper.make_node("Mul", ["image", "image"], ["y"])],
        "test",
        [image],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    assert not is_low_precision(model)
    assert simulate(model) == []
    np.testing.assert_array_equal(run(model, IMAGE), IMAGE.astype(np.float32) ** 2)


def test_the_first_is_named_not_the_last() -> None:
    """Everything after an infinity is not finite either; the watch lists values in the order of computation."""
    model = overflow()
    rounded = simulate(model)
    names = watch_finite(model.graph, rounded)
    assert names == ["cast", "trunk/Mul", "trunk/Div"]
    finite = [bool(np.isfinite(total)) for total in run_model(model, Path(), IMAGE.astype(np.float32))]
    assert finite == [True, False, False]


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors against PyTorch FP32 of PyTorch's half, of the simulation, and of rounded weights alone."""

    half: Verdict
    simulated: Verdict
    weights_alone: Verdict


def errors_of(encoder: Sam3DualViTDetNeck, config: EncoderConfig, precision: Precision, folder: Path) -> Errors:
    signature = encoder_signature(config)
    pixels = reference_pixels(signature, None, 1)
    image = normalize(pixels)
    reference = reference_outputs(encoder, pixels, signature)
    path = folder / f"{precision}.onnx"
    write_onnx(encoder, signature, path, precision=precision)

    def judge(outputs: list[np.ndarray]) -> Verdict:
        names = [spec.name for spec in signature.outputs]
        return compare(reference, dict(zip(names, outputs, strict=True)), precision, "test")

    def simulated(exact: frozenset[str]) -> Verdict:
        model = ir.load(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export.verification.rounding_simulation, "EXACT", exact)
            simulate(model)
        return judge(run_model(model, folder, image.numpy()))

    every = frozenset(node.op_type for node in ir.load(path).graph)
    half = judge(half_outputs(encoder, image, precision))
    return Errors(half, simulated(export.verification.rounding_simulation.EXACT), simulated(every))


def half_outputs(encoder: Sam3DualViTDetNeck, image: torch.Tensor, precision: Precision) -> list[np.ndarray]:
    """What PyTorch computes with every weight and activation in half precision, in the file's order."""
    half = copy.deepcopy(encoder).to(DTYPES[precision])
    with torch.inference_mode():
        feats, poss = forward_necks(half, image.to(DTYPES[precision]))["sam3"]
    return [tensor.float().numpy() for tensor in (*feats, *poss)]


def fp32_accumulators(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of the form fp32acc: FP16 products that accumulate in FP32, their results rounded to FP16."""
    low = query.dtype
    scores = (query.float() @ key.float().transpose(-1, -2) * scale).to(low)
    return (scores.float().softmax(-1).to(low).float() @ value.float()).to(low)


def check_errors(errors: Errors) -> None:
    assert errors.half.passed
    assert errors.simulated.passed, errors.simulated.failed_names
    verdicts = (errors.half, errors.simulated, errors.weights_alone)
    for half, simulated, weights in zip(*(verdict.comparisons for verdict in verdicts), strict=True):
        assert simulated.relative_l2 == pytest.approx(half.relative_l2, rel=TORCH_SHARE), half.name
        if "_feat_" in half.name:  # the control: without the roundings of activations the error is another
            assert weights.relative_l2 < (1 - TORCH_SHARE) * half.relative_l2, half.name


@pytest.fixture(scope="module")
def deep() -> tuple[Sam3DualViTDetNeck, EncoderConfig]:
    """All 32 blocks of the published encoder, 64 channels wide, on a grid of 8 x 8."""
    config = EncoderConfig((112, 112), embed_dim=64, num_heads=2, d_model=32, window_size=4, pretrain_image_size=56)
    return random_encoder(config), config


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_depth(deep: tuple[Sam3DualViTDetNeck, EncoderConfig], precision: Precision, tmp_path: Path) -> None:
    check_errors(errors_of(*deep, precision, tmp_path))


def test_fp16_products_with_fp32_accumulators(
    deep: tuple[Sam3DualViTDetNeck, EncoderConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's half with attention as the MatMul spelling of fp32acc writes it, instead of PyTorch's own kernel."""
    calls: list[torch.dtype] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if query.dtype != torch.float16:
            return own(query, key, value, scale=scale)
        calls.append(query.dtype)
        return fp32_accumulators(query, key, value, scale)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    errors = errors_of(*deep, "fp16", tmp_path)
    assert len(calls) == 32 and errors.half.passed and errors.simulated.passed
    # of all features together: level 3 has 512 values here, whose error differs by a fifth from seed to seed
    half, simulated, weights = (
        float(np.sqrt(np.mean([row.relative_l2**2 for row in verdict.comparisons if "_feat_" in row.name])))
        for verdict in (errors.half, errors.simulated, errors.weights_alone)
    )
    assert simulated == pytest.approx(half, rel=TORCH_SHARE)
    assert weights < (1 - TORCH_SHARE) * half


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_full_size(precision: Precision, tmp_path: Path) -> None:
    """The published architecture at 336 pixels."""
    config = EncoderConfig(image_size=(336, 336))
    check_errors(errors_of(random_encoder(config), config, precision, tmp_path))


def test_a_graph_that_onnx_runtime_does_not_load_is_told() -> None:
    """Such as one of an opset that is newer than its version."""
    model = overflow()
    model.opset_imports[""] = 99
    with pytest.raises(FidelityError, match="opset") as found:
        run(model, IMAGE)
    assert "--no-verify" in str(found.value)
