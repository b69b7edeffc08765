"""The lowering: types, islands, attention and upsampling forms, opsets; and that each form computes the same."""

from __future__ import annotations

import collections
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import NEWEST_OPSET, Save, load_golden, open_onnx, run_onnx, traced, worst_error
from torch import Tensor

from export.contract.errors import ExportError
from export.graph.cleanup import INPUT, MODULE
from export.lowering.attention import find_attentions
from export.lowering.precision import converted_weight, lower
from export.verification.rounding_simulation import simulate

SAME = 1e-5
"""Of an output's largest value: the same FP32 sums in another order, over 4 blocks."""

LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
HALF_TOLERANCE = {"fp16": 1e-2, "bf16": 5e-2}
"""Relative L2, DESIGN's tolerances; 4 blocks give a tenth of them."""


def model() -> ir.Model:
    """The canonical graph of the golden encoder with two necks, positions included; batch 2."""
    golden = load_golden("meta-dual")
    return traced(golden.encoder, golden.config, batch="2").model


def lowered(precision: str, **options: Any) -> ir.Model:
    made = model()
    lower(made, precision, **options)  # type: ignore[arg-type]
    return made


def module_of(node: ir.Node) -> str:
    return node.metadata_props.get(MODULE, "")


def nodes_of(made: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in made.graph if node.op_type == kind]


def types(node: ir.Node) -> set[ir.DataType | None]:
    """Float types that a node reads and gives."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    return {value.dtype for value in values} - {ir.DataType.INT64}


def kinds(made: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in made.graph)


def image() -> Tensor:
    return load_golden("meta-dual").image


def check(made: ir.Model, save: Save) -> Path:
    """Saves; every type and shape that the graph names is what ONNX infers; names are unique."""
    path = save(made)
    onnx.checker.check_model(path, full_check=True)
    names = [node.name for node in made.graph]
    assert len(set(names)) == len(names)
    named = {value.name: value.dtype for node in made.graph for value in node.outputs}
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    for info in inferred.graph.value_info:
        assert named[info.name] == ir.DataType(info.type.tensor_type.elem_type), info.name
    return path


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_computes_in_low_precision(precision: str, save: Save) -> None:
    made, low = lowered(precision), LOW[precision]
    check(made, save)
    for kind in ("MatMul", "Conv", "ConvTranspose", "Gelu", "MaxPool", "DepthToSpace"):
        nodes = [node for node in nodes_of(made, kind) if not (node.name or "").endswith(".attn/mixed")]  # in fp32acc
        assert all(types(node) == {low} for node in nodes), kind
    assert len(nodes_of(made, "MatMul")) >= 16
    assert nodes_of(made, "ConvTranspose" if precision == "fp16" else "DepthToSpace")
    residual = [node for node in nodes_of(made, "Add") if not module_of(node).endswith(".rope")]
    assert len(residual) > 8
    assert all(types(node) == {low} for node in residual)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_computes_in_fp32(precision: str) -> None:
    made, low = lowered(precision), LOW[precision]
    norms = nodes_of(made, "LayerNormalization")
    assert len(norms) == 9
    for node in norms:
        assert types(node) == {ir.DataType.FLOAT}
        down = [user.outputs[0].dtype for user, _ in node.outputs[0].uses() if user.op_type == "Cast"]
        assert down == [low]
        assert all(user.op_type in ("Cast", "LayerNormalization") for user, _ in node.outputs[0].uses())
    turns = [node for node in made.graph if module_of(node).endswith(".rope") and node.op_type in ("Mul", "Add", "Sub")]
    assert len(turns) == 4 * 6
    assert all(types(node) == {ir.DataType.FLOAT} for node in turns)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pixels_are_normalized_in_fp32(precision: Any) -> None:
    golden = load_golden("meta-dual")
    asked: dict[str, Any] = {"necks": "sam2", "levels": "0,3", "positions": "none"}  # as test_trace.py traces it
    made = traced(golden.encoder, golden.config, input_kind="uint8", **asked).model
    lower(made, precision)
    scaled = [node for node in made.graph if module_of(node) == INPUT and node.op_type in ("Mul", "Add", "Sub", "Div")]
    assert scaled and all(types(node) == {ir.DataType.FLOAT} for node in scaled)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_types_of_the_ends(precision: str) -> None:
    made = lowered(precision)
    assert made.graph.inputs[0].dtype == ir.DataType.FLOAT
    assert {value.dtype for value in made.graph.outputs} == {LOW.get(precision, ir.DataType.FLOAT)}
    assert [value.name for value in made.graph.outputs] == [value.name for value in model().graph.outputs]


@pytest.mark.parametrize(
    ("precision", "outputs"), [("fp16", "fp32"), ("bf16", "fp32"), ("fp32", "fp16"), ("fp16", "bf16")]
)
def test_outputs_of_another_precision(precision: str, outputs: str, save: Save) -> None:
    made = lowered(precision, output_precision=outputs)
    assert {value.dtype for value in made.graph.outputs} == {LOW.get(outputs, ir.DataType.FLOAT)}
    assert [value.name for value in made.graph.outputs] == [value.name for value in model().graph.outputs]
    check(made, save)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_low_precision_graph_is_near_its_module(precision: str, save: Save) -> None:
    golden = load_golden("meta-dual")
    made = lowered(precision)
    simulate(made)  # as it is, ONNX Runtime's CPU computes it in FP32
    found = run_onnx(save(made), golden.image)
    errors = [float((found[name] - want).norm() / want.norm()) for name, want in golden.expected.items()]
    assert max(errors) < HALF_TOLERANCE[precision]
    assert max(errors) > HALF_TOLERANCE[precision] / 100  # the control: something was rounded


def test_low_precision_weights_are_the_rounded_weights(save: Save) -> None:
    golden = load_golden("meta-dual")
    for precision, kind in (("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)):
        loaded = ir.load(save(lowered(precision)))
        stored = {name: value.const_value for name, value in loaded.graph.initializers.items()}
        name = next(name for name in stored if name.startswith("sam2_convs.2.conv_3x3.weight"))
        exact = golden.encoder.get_parameter("sam2_convs.2.conv_3x3.weight")
        tensor = stored[name]
        assert tensor is not None
        found = tensor.numpy()
        assert found.dtype == kind
        assert np.array_equal(found, exact.numpy().astype(kind))


def fp32_modules(made: ir.Model) -> set[str]:
    """Modules whose products are all in FP32."""
    products = [node for node in made.graph if node.op_type in ("MatMul", "Conv", "ConvTranspose")]
    low = {module_of(node) for node in products if types(node) != {ir.DataType.FLOAT}}
    return {module_of(node) for node in products} - low


KEPT: list[Any] = [
    ((), set()),
    (
        ("trunk.blocks.3",),
        {f"trunk.blocks.3.{name}" for name in ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
    ),
    (("convs.0",), {"convs.0.dconv_2x2_0", "convs.0.dconv_2x2_1", "convs.0.conv_3x3"}),
    (("convs.*.conv_3x3",), {f"convs.{level}.conv_3x3" for level in range(4)}),
    (
        ("*.mlp", "trunk.patch_embed"),
        {f"trunk.blocks.{b}.mlp.fc{i}" for b in range(4) for i in (1, 2)} | {"trunk.patch_embed.proj"},
    ),
    (("trunk.blocks.[02].attn.proj",), {"trunk.blocks.0.attn.proj", "trunk.blocks.2.attn.proj"}),
]


@pytest.mark.parametrize(("patterns", "expected"), KEPT)
def test_kept_modules(patterns: tuple[str, ...], expected: set[str], save: Save) -> None:
    made = lowered("fp16", keep_fp32=patterns)
    assert fp32_modules(made) == expected
    check(made, save)


def test_everything_kept_is_the_fp32_file(save: Save) -> None:
    made = lowered("fp16", keep_fp32=["*"], attention="fused")
    assert kinds(made)["Cast"] == len(made.graph.outputs)
    found = run_onnx(save(lowered("fp16", keep_fp32=["*"], attention="fused", output_precision="fp32")), image())
    assert worst_error(found, load_golden("meta-dual").expected) < 2 * SAME


@pytest.mark.parametrize("pattern", ["trunk.blocks.9", "convs", "trunk.block.*", "", "convs.0.conv_1x1"])
def test_a_pattern_that_names_nothing_is_refused(pattern: str) -> None:
    if pattern == "convs":  # a prefix names all modules inside
        assert len(fp32_modules(lowered("fp16", keep_fp32=[pattern]))) == 3 + 2 + 2 + 2
        return
    near = "trunk.blocks.0" if "block" in pattern else "convs"
    with pytest.raises(ExportError, match=rf"matches no module of the graph; .*{near}"):
        lowered("fp16", keep_fp32=["convs.1", pattern])


def test_a_weight_that_overflows_is_named_when_it_is_written(save: Save) -> None:
    weight = ir.tensor(np.array([1.0, -7e4], np.float32))
    with pytest.raises(
        ExportError,
        match=r"weight trunk\.a has values of up to 70000, which exceed the range of float16; .*--keep-fp32",
    ) as caught:
        converted_weight("trunk.a", weight, ir.DataType.FLOAT16).numpy()
    assert "\n" not in str(caught.value)
    assert np.isfinite(converted_weight("trunk.a", weight, ir.DataType.BFLOAT16).numpy().astype(np.float32)).all()


@pytest.mark.parametrize("name", ["fc2.weight", "fc2.bias"])  # above and below the 256 bytes that go beside the graph
def test_a_weight_that_overflows_stops_the_writing(name: str, save: Save) -> None:
    made = model()
    path = f"trunk.blocks.2.mlp.{name}"
    (weight,) = [node.inputs[1] for node in made.graph if node.name == "trunk.blocks.2.mlp.fc2/MatMul"]
    if name == "fc2.bias":
        weight = made.graph.initializers[path]
    assert weight is not None and weight.const_value is not None
    values = weight.const_value.numpy().copy()
    values.flat[3] = 1e5
    weight.const_value = ir.tensor(values)
    low = made.clone()
    with pytest.raises(
        ExportError,
        match=r"weight \S*trunk\.blocks\.2\.mlp\.fc2\S* has values of up to 100000, which exceed the range of float16",
    ):
        lower(low, "fp16")
        save(low)
    lower(made, "fp16", keep_fp32=["trunk.blocks.2"])
    save(made)


def test_a_weight_near_the_limit_is_kept() -> None:
    largest = converted_weight("w", ir.tensor(np.array([65504.0, 65519.0], np.float32)), ir.DataType.FLOAT16).numpy()
    assert largest.tolist() == [65504.0, 65504.0]
    with pytest.raises(ExportError):
        converted_weight("w", ir.tensor(np.array([65520.0], np.float32)), ir.DataType.FLOAT16).numpy()


FORMS = ("fp32acc", "fused", "unfused")


def attention_types(made: ir.Model) -> list[tuple[str, str, str]]:
    """Operator, input type, output type of the nodes of block 1's attention between rotary and projection."""
    path = "trunk.blocks.1.attn"
    names = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
    chosen = ("attention", "scale", "transposed_key", "scores", "softmax", "probabilities", "mixed")
    nodes = [node for node in made.graph if node.name in {f"{path}/{name}" for name in chosen}]
    found = []
    for node in nodes:
        first, result = node.inputs[0], node.outputs[0]
        assert first is not None and first.dtype is not None and result.dtype is not None
        found.append((node.op_type, names[first.dtype], names[result.dtype]))
    return found


MATMUL = [
    ("Transpose", "fp16", "fp16"),
    ("MatMul", "fp16", "fp16"),
    ("Softmax", "fp32", "fp32"),
    ("Cast", "fp32", "fp16"),
    ("MatMul", "fp32", "fp32"),
]
PATTERNS: list[Any] = [
    ("fp16", "fp32acc", MATMUL),
    (
        "fp16",
        "fused",
        [
            ("Transpose", "fp16", "fp16"),
            ("MatMul", "fp16", "fp16"),
            ("Softmax", "fp16", "fp16"),
            ("MatMul", "fp16", "fp16"),
        ],
    ),
    (
        "fp16",
        "unfused",
        [
            ("Transpose", "fp16", "fp16"),
            ("MatMul", "fp32", "fp32"),
            ("Softmax", "fp32", "fp32"),
            ("MatMul", "fp16", "fp16"),
        ],
    ),
    ("fp16", "auto", MATMUL),
    (
        "bf16",
        "auto",
        [
            ("Transpose", "bf16", "bf16"),
            ("MatMul", "bf16", "bf16"),
            ("Softmax", "bf16", "bf16"),
            ("MatMul", "bf16", "bf16"),
        ],
    ),
    (
        "fp32",
        "auto",
        [
            ("Transpose", "fp32", "fp32"),
            ("MatMul", "fp32", "fp32"),
            ("Softmax", "fp32", "fp32"),
            ("MatMul", "fp32", "fp32"),
        ],
    ),
]


@pytest.mark.parametrize(("precision", "form", "expected"), PATTERNS, ids=[f"{p}-{f}" for p, f, _ in PATTERNS])
def test_attention_forms(precision: str, form: str, expected: list[tuple[str, str, str]], save: Save) -> None:
    made = lowered(precision, attention=form)
    assert attention_types(made) == expected
    check(made, save)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("opset", {23, NEWEST_OPSET})
def test_at_opset_23_it_is_the_operator(precision: str, opset: int, save: Save) -> None:
    made = lowered(precision, attention="fp32acc", opset=opset)
    assert attention_types(made) == [("Attention", "fp32", "fp32")]
    check(made, save)


def test_probabilities_are_rounded_once_and_values_stay_low_before_the_second_product() -> None:
    """What fuses in TensorRT-RTX 1.7: the second product reads FP16 values by Casts, and gives FP16 by a Cast."""
    nodes = [node for node in nodes_of(lowered("fp16"), "MatMul") if (node.name or "").endswith("/mixed")]
    assert len(nodes) == 4
    for node in nodes:
        ups = [value.producer() for value in node.inputs if value is not None]
        assert [up.op_type for up in ups if up] == ["Cast", "Cast"]
        assert all(up and up.inputs[0] is not None and up.inputs[0].dtype == ir.DataType.FLOAT16 for up in ups)
        (user, _), *more = node.outputs[0].uses()
        assert user.op_type == "Cast" and user.outputs[0].dtype == ir.DataType.FLOAT16 and not more


def test_queries_and_keys_are_low_before_the_attention_island() -> None:
    """An FP32 rotary that runs into the FP32 attention without a Cast down loses the fusion (FACTS)."""
    nodes = nodes_of(lowered("fp16", spelling="operator"), "Attention")
    assert len(nodes) == 4
    for node in nodes:
        for value in node.inputs[:3]:
            up = value.producer() if value is not None else None
            assert up is not None and up.op_type == "Cast" and up.inputs[0] is not None
            assert up.inputs[0].dtype == ir.DataType.FLOAT16
        (user, _), *more = node.outputs[0].uses()
        assert user.op_type == "Cast" and user.outputs[0].dtype == ir.DataType.FLOAT16 and not more


def test_fp32acc_of_fp32_is_refused() -> None:
    with pytest.raises(ExportError, match="--attention fp32acc"):
        lowered("fp32", attention="fp32acc")


def test_all_forms_compute_the_same_in_fp32(save: Save) -> None:
    """ONNX Runtime's own Attention, then each form with its types taken out again by keep_fp32."""
    outputs = [run_onnx(save(model()), image())]
    outputs += [run_onnx(save(lowered("fp32", attention=form)), image()) for form in ("fused", "unfused")]
    outputs += [
        run_onnx(save(lowered("fp16", attention=form, keep_fp32=["*"], output_precision="fp32")), image())
        for form in FORMS
    ]
    expected = load_golden("meta-dual").expected
    assert all(worst_error(found, expected) < 2 * SAME for found in outputs)
    assert all(worst_error(found, outputs[0]) < SAME for found in outputs[1:])
    scaled = model()
    for node in nodes_of(scaled, "Attention"):
        node.attributes.add(ir.AttrFloat32("scale", 0.99))
    assert worst_error(run_onnx(save(scaled), image()), outputs[0]) > SAME  # the control


def test_a_scale_that_is_not_folded_stays(save: Save) -> None:
    """Attention with scale 0.25 as primitives: the query is scaled, once."""
    made = model()
    for node in nodes_of(made, "Attention"):
        node.attributes.add(ir.AttrFloat32("scale", 0.25))
    primitives = made.clone()
    lower(primitives, "fp32")
    assert attention_types(primitives)[0] == ("Mul", "fp32", "fp32")
    assert [core.scale for core in find_attentions(primitives.graph)] == [0.25] * 4
    assert worst_error(run_onnx(save(primitives), image()), run_onnx(save(made), image())) < SAME
    assert worst_error(run_onnx(save(primitives), image()), run_onnx(save(model()), image())) > SAME  # the control
    again = ir.load(save(primitives))
    lower(again, "fp16", spelling="operator")
    assert [node.attributes.get_float("scale") for node in nodes_of(again, "Attention")] == [0.25] * 4
    assert not [node for node in again.graph if node.name and node.name.endswith("/scale")]


def edges(made: ir.Model) -> set[tuple[object, ...]]:
    """Every node with where its inputs come from, by names that do not depend on the way of making; its types."""

    def origin(value: ir.Value | None) -> str:
        if value is None:
            return ""
        producer = value.producer()
        return f"{producer.name}:{value.index()}" if producer is not None else str(value.name)

    return {
        (
            node.name,
            node.op_type,
            module_of(node),
            *(origin(value) for value in node.inputs),
            *(v.dtype for v in node.outputs),
        )
        for node in made.graph
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_fp32_file_lowers_to_the_same_graph(form: str, save: Save) -> None:
    direct = lowered("fp16", attention=form)
    again = ir.load(save(lowered("fp32")))
    lower(again, "fp16", attention=form)  # type: ignore[arg-type]
    assert kinds(again) == kinds(direct)
    assert again.opset_imports == direct.opset_imports
    assert edges(again) == edges(direct)
    assert edges(again) != edges(lowered("bf16", attention=form))  # the control
    stored = [{name: value.const_value for name, value in made.graph.initializers.items()} for made in (again, direct)]
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        other = stored[1][name]
        assert tensor is not None and other is not None
        assert np.array_equal(tensor.numpy(), other.numpy()), name


def test_what_is_low_already_is_refused(save: Save) -> None:
    made = ir.load(save(lowered("fp16")))
    with pytest.raises(ExportError, match="converted to bf16, because the model already has weights in float16"):
        lower(made, "bf16")


@pytest.mark.parametrize(
    ("precision", "form", "expected"),
    [
        ("fp32", "auto", 20),
        ("bf16", "auto", 22),
        ("fp16", "auto", 20),
        ("fp16", "fp32acc", 20),
        ("bf16", "fp32acc", 22),
    ],
)
def test_the_opset_follows_the_form(precision: str, form: str, expected: int) -> None:
    assert lowered(precision, attention=form).opset_imports == {"": expected}


@pytest.mark.parametrize(
    ("precision", "form", "opset"),
    [("fp32", "auto", 17), ("fp16", "auto", 17), ("fp16", "fp32acc", 22), ("fp16", "auto", 24)],
)
def test_an_opset_that_is_asked_for(precision: str, form: str, opset: int, save: Save) -> None:
    path = check(lowered(precision, attention=form, opset=opset), save)
    assert ir.load(path).opset_imports == {"": opset}


@pytest.mark.parametrize("opset", [17, 19])
def test_gelu_as_erf_is_the_same(opset: int, save: Save) -> None:
    made = lowered("fp32", opset=opset)
    assert kinds(made)["Gelu"] == 0
    assert kinds(made)["Erf"] == 4 + 2
    assert worst_error(run_onnx(check(made, save), image()), load_golden("meta-dual").expected) < 2 * SAME


@pytest.mark.parametrize(
    ("opset", "said"),
    [
        (16, "opset 16 is not supported; use an opset from 17 to 24, or auto"),
        (25, "opset 25"),
        (0, "opset 0"),
    ],
)
def test_a_bad_opset_is_refused(opset: int, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        lowered("fp16", opset=opset)


def test_the_operator_needs_its_opset() -> None:
    with pytest.raises(ExportError, match="opset 22"):
        lowered("fp16", opset=22, spelling="operator")


def test_bf16_needs_the_opset_whose_convolutions_take_it(save: Save) -> None:
    with pytest.raises(ExportError, match="opset 20"):
        lowered("bf16", opset=20)
    check(lowered("bf16", opset=22), save)
    assert lowered("bf16", keep_fp32=["*"], attention="fused", output_precision="fp32").opset_imports == {"": 20}


def test_upsampling_forms_are_equal(save: Save) -> None:
    plain, conv = lowered("fp32", upsampling="deconv"), lowered("fp32", upsampling="conv")
    assert (kinds(plain)["ConvTranspose"], kinds(plain)["DepthToSpace"]) == (6, 0)
    assert (kinds(conv)["ConvTranspose"], kinds(conv)["DepthToSpace"]) == (0, 6)
    one, other = run_onnx(check(plain, save), image()), run_onnx(check(conv, save), image())
    assert worst_error(one, other) < 1e-6  # the sums are the same, in the order of another kernel
    for node in nodes_of(conv, "DepthToSpace"):
        node.attributes.add(ir.AttrString("mode", "DCR"))
    assert worst_error(run_onnx(save(conv), image()), one) > SAME  # the control


@pytest.mark.parametrize(
    ("precision", "form", "count"),
    [("bf16", "auto", 6), ("fp16", "auto", 0), ("bf16", "deconv", 0), ("fp16", "conv", 6)],
)
def test_the_upsampling_follows_the_precision(precision: str, form: str, count: int) -> None:
    assert kinds(lowered(precision, upsampling=form))["DepthToSpace"] == count


def hand_made(nodes: list[ir.Node], inputs: list[ir.Value], *weights: ir.Value) -> ir.Model:
    """A graph of a foreign trunk; its output is the last node's."""
    graph = ir.Graph(
        inputs, nodes[-1].outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="foreign"
    )
    for position, node in enumerate(nodes):
        node.name = f"node{position}"
        node.outputs[0].name = f"value{position}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=10)


def value(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


@pytest.mark.parametrize(
    ("more", "attributes", "heads"),
    [([value("mask", 8, 8)], {}, 2), ([], {"is_causal": 1}, 2), ([], {"softcap": 2.0}, 2), ([], {}, 1)],
)
def test_an_attention_that_is_more_is_refused(more: list[ir.Value], attributes: dict[str, Any], heads: int) -> None:
    query, key, values = value("q", 1, 2, 8, 4), value("k", 1, heads, 8, 4), value("v", 1, heads, 8, 4)
    node = ir.node("Attention", [query, key, values, *more], attributes)
    with pytest.raises(ExportError, match="node0 has a mask, a cache, grouped heads or a softcap"):
        find_attentions(hand_made([node], [query, key, values, *more]).graph)


@pytest.mark.parametrize(
    ("perm", "axis", "known"), [([0, 1, 3, 2], -1, True), ([0, 2, 3, 1], -1, False), ([0, 1, 3, 2], 2, False)]
)
def test_only_what_is_an_attention_is_taken_for_one(perm: list[int], axis: int, known: bool) -> None:
    query, key, values = value("q", 1, 4, 4, 4), value("k", 1, 4, 4, 4), value("v", 1, 4, 4, 4)
    turned = ir.node("Transpose", [key], {"perm": perm})
    scores = ir.node("MatMul", [query, turned.outputs[0]])
    softmax = ir.node("Softmax", [scores.outputs[0]], {"axis": axis})
    mixed = ir.node("MatMul", [softmax.outputs[0], values])
    found = find_attentions(hand_made([turned, scores, softmax, mixed], [query, key, values]).graph)
    assert bool(found) is known


@pytest.mark.parametrize(
    ("attributes", "count"), [({"strides": [2, 2]}, 1), ({"strides": [1, 1]}, 0), ({"strides": [2, 2], "group": 2}, 0)]
)
def test_only_a_doubling_is_taken_for_one(attributes: dict[str, Any], count: int) -> None:
    from export.lowering.upsampling import lower_upsampling

    x, weight, bias = value("x", 1, 4, 6, 6), value("w", 4, 4, 2, 2), value("b", 4)
    weight.const_value, bias.const_value = (
        ir.tensor(np.ones((4, 4, 2, 2), np.float32)),
        ir.tensor(np.ones(4, np.float32)),
    )
    node = ir.node("ConvTranspose", [x, weight, bias], attributes)
    node.outputs[0].shape = ir.Shape([1, 4, 12, 12])
    made = hand_made([node], [x], weight, bias)
    lower_upsampling(made.graph, "fp32", "conv")
    assert kinds(made)["DepthToSpace"] == count


def test_attention_is_softmax_of_scaled_products(save: Save) -> None:
    """The primitives of one Attention against the formula in float64."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 2, 8, 4, generator=generator) for _ in range(3)]
    query, key, values = (value(name, 1, 2, 8, 4) for name in "qkv")
    made = hand_made([ir.node("Attention", [query, key, values])], [query, key, values])
    made.graph.outputs[0].shape = ir.Shape([1, 2, 8, 4])
    lower(made, "fp32")
    (found,) = open_onnx(save(made)).run(None, {name: part.numpy() for name, part in zip("qkv", parts, strict=True)})
    q, k, v = (part.double() for part in parts)
    expected = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(4), dim=-1) @ v
    assert np.abs(found - expected.numpy()).max() < 1e-6
    assert np.abs(found - (torch.softmax(q @ k.transpose(2, 3), dim=-1) @ v).numpy()).max() > 1e-3  # the control
