"""Layer reports from the engine inspector's JSON, in the shapes of TensorRT 10.1 to 11."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import load_golden, traced

from engines.builder.flavor import Flavor
from engines.layers.layer_report import LayerReport
from engines.layers.read_layers import LayerReportError, layers_from_inspector, read_families
from export.lowering.precision import lower


def _layer(name: str, datatype: dict[str, str], **more: object) -> dict[str, object]:
    tensor = {"Name": "t", "Dimensions": [1, 64, 8], "Location": "Device", **datatype}
    return {"Name": name, "LayerType": "kgen", "Inputs": [tensor], "Outputs": [tensor], **more}


@pytest.mark.parametrize(
    ("datatype", "io"),
    [
        ({"Format/Datatype": "Row major linear FP16 format"}, "Bindings"),
        ({"Datatype": "Half", "Format": "Linear"}, "I/O Tensors"),
        ({"DataType": "Half", "Format": "Linear"}, "I/O Tensors"),
    ],
)
def test_the_inspectors_json_is_read(datatype: dict[str, str], io: str) -> None:
    """Hand-made after NVIDIA's documentation: TensorRT 10 and 11; no GPU was at hand to make one."""
    metadata = "[ONNX Layer: trunk.blocks.0.attn/attention]"
    layers = [
        _layer("_gemm_mha_v2", datatype, TacticName="fmha_v2_flash_attention_fp16_64", Metadata=metadata),
        _layer("conv", datatype, Weights={"Type": "Half", "Count": 9}, Bias={"Type": "Half", "Count": 0}),
    ]
    layers = layers_from_inspector(json.dumps({"Layers": layers, io: []}), {})
    mha, conv = layers.kernels
    assert (layers.source, layers.attentions, len(layers.fused)) == ("engine inspector", 1, 1)
    assert mha.modules == ("trunk.blocks.0.attn",) and mha.bytes == 2 * 512 * 2
    assert conv.bytes == 2 * 512 * 2 + 9 * 2
    assert "does not show" in str(layers.warning())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "without a list"),
        ("{}", "without a list"),
        ("[]", "without a list"),
        ('{"Layers": null}', "without a list"),
        ('{"Layers": 3}', "without a list"),
        ('{"Layers": ["conv_1"]}', "names"),
        ('{"Layers": []}', "no kernel"),
    ],
)
def test_an_inspector_that_tells_nothing_is_an_error(text: str, says: str) -> None:
    with pytest.raises(LayerReportError, match=says):
        layers_from_inspector(text, {})


@pytest.mark.parametrize(
    "odd",
    [
        {"Inputs": None},
        {"Inputs": 3},
        {"Inputs": ["t"]},
        {"Inputs": [{"Name": "t"}]},
        {"Inputs": [{"Name": "t", "Dimensions": ["a", None], "Datatype": 7}]},
        {"Outputs": [{"Name": None, "Dimensions": 64, "Format/Datatype": ["Half"]}]},
        {"Weights": {"Count": "many"}},
        {"Weights": {"Count": 3}},
        {"Bias": [1]},
        {"TacticName": None, "Metadata": None},
        {"Metadata": ["[ONNX Layer: x]"]},
        {"Name": None, "LayerType": None},
    ],
    ids=str,
)
def test_odd_json_is_not_told(odd: dict[str, object]) -> None:
    """Every one of these was an AttributeError, a TypeError or a KeyError."""
    layers = [_layer("gemm", {"Datatype": "Half"}), _layer("odd", {"Datatype": "Half"}) | odd]
    gemm, other = layers_from_inspector(json.dumps({"Layers": layers}), {}).kernels
    assert gemm.bytes == 2 * 512 * 2
    assert other.bytes is None or other.bytes >= 2 * 512


def test_waiting_is_no_kernel() -> None:
    layers = [_layer(kind, {"Datatype": "Half"}, LayerType=kind) for kind in ("wait", "kgen", "signal")]
    assert [kernel.kind for kernel in layers_from_inspector(json.dumps({"Layers": layers}), {}).kernels] == ["kgen"]


def test_a_node_that_two_kernels_name_gives_its_operations_to_none() -> None:
    layers = [
        _layer(name, {"Datatype": "Half"}, Metadata=f"[ONNX Layer: {name}][ONNX Layer: shared]") for name in ("a", "b")
    ]
    operations = {"a": 1, "b": 2, "shared": 4}
    found = layers_from_inspector(json.dumps({"Layers": layers}), {}, operations=operations)
    assert [kernel.operations for kernel in found.kernels] == [1, 2] and found.operations == 7


@pytest.mark.gpu
def test_the_inspector_and_the_log_agree(tmp_path: Path, gpu_flavor: Flavor) -> None:
    """On a GPU: an engine's JSON gives the attentions that its build counted."""
    from engines.builder.build import build_plan
    from engines.builder.options import BuildOptions

    golden = load_golden("meta-dual")
    model = traced(golden.encoder, golden.config, necks="sam3", positions="none").model
    lower(model, "fp16")
    ir.save(model, tmp_path / "x.onnx", external_data="x.onnx.data")
    flavor, trt = gpu_flavor, gpu_flavor.trt
    result = build_plan(tmp_path / "x.onnx", tmp_path / "x.plan", BuildOptions(), flavor=flavor)
    runtime = trt.Runtime(flavor.new_logger(lambda severity, line: None))
    engine = runtime.deserialize_cuda_engine((tmp_path / "x.plan").read_bytes())
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    layers = layers_from_inspector(text, read_families(tmp_path / "x.plan"))
    assert layers.attentions == 4
    if result.layers is not None:
        assert len(layers.fused) == len(result.layers.fused)


INSPECTED = Path(__file__).parent / "data" / "inspector"
"""What the engine inspector prints, in its shapes and our names, by hand: NVIDIA/TensorRT #4020 (10.1), #4397 (10.10,
there as a log), the logs of NVIDIA/trt-samples-for-hackathon-cn (10.16: cookbook/04-Feature/EngineInspector, 07-Tool/
trtexec). Of 11 no output was found: it is after NVIDIA's guide `Migrating IEngineInspector Usage from TensorRT 10.x to
11.x` (I/O Tensors; Format/Datatype in two)."""


def inspected(version: str) -> LayerReport:
    return layers_from_inspector((INSPECTED / f"tensorrt-{version}.json").read_text(encoding="utf-8"), {})


def test_an_inspector_of_10_1_tells_types_in_words() -> None:
    layers = inspected("10.1")
    assert [kernel.kind for kernel in layers.kernels] == ["Reformat", "CaskConvolution", "CaskPooling"]
    convolution = layers.kernels[1]
    assert [tensor.dtype for tensor in (*convolution.inputs, *convolution.constants)] == ["Half"] * 3
    assert convolution.bytes == 2 * (3 * 112 * 112 + 16 * 8 * 8 + 9408 + 16)
    assert convolution.onnx == ("trunk.patch_embed.proj/Conv",) and convolution.tactic.startswith("sm80_xmma_fprop")
    assert (layers.attentions, len(layers.fused)) == (0, 0) and layers.bytes_moved is not None


def test_an_inspector_of_10_10_tells_fused_attentions() -> None:
    """A Myelin block that is taken apart: two fused attentions under both names, one in three kernels, and waits."""
    layers = inspected("10.10")
    assert len(layers.kernels) == 7 and layers.by_kind == {"kgen": 4, "gemm": 3}
    assert (layers.attentions, len(layers.fused)) == (3, 2) and layers.accumulation is None
    assert layers.fused[0].onnx[0] == "trunk.blocks.0.attn/scores" and len(layers.fused[0].onnx) == 5
    assert layers.summary().startswith("fused attentions 2 of 3, accumulation unknown, 7 kernels, ")
    assert layers.bytes_moved is not None and "does not show" in str(layers.warning())


def test_an_inspector_of_10_16_tells_types_in_words_and_in_names() -> None:
    """Cask layers and a Myelin block that is taken apart, in one engine; a batch that is not told for some kernels."""
    layers = inspected("10.16")
    assert layers.by_kind == {"kgen": 3, "Reformat": 1, "CaskConvolution": 1, "gemm": 1}
    assert (layers.attentions, len(layers.fused), layers.bytes_moved) == (1, 0, None)
    reformat, convolution, reshape, product, softmax, last = layers.kernels
    assert [tensor.dtype for tensor in (*reformat.inputs, *reformat.outputs)] == ["Float", "Half"]
    assert (reformat.bytes, reshape.bytes, product.bytes) == (None, None, 2 * 64 * (16 + 48))
    assert convolution.onnx == ("trunk.patch_embed.proj/Conv", "trunk/Add") and len(convolution.constants) == 2
    assert softmax.modules == ("trunk.blocks.0.attn",) and last.bytes == 64 * 16 * (2 + 4) and last.onnx == ()


def test_an_inspector_of_11_tells_no_insides_of_a_block() -> None:
    """A ForeignNode that stays whole: how many attentions it fuses, and what it moves, is not told."""
    text = (INSPECTED / "tensorrt-11.json").read_text(encoding="utf-8")
    layers = layers_from_inspector(text, {}, attentions=32)
    assert [kernel.opaque for kernel in layers.kernels] == [False, True] and layers.bytes_moved is None
    line = (
        "number of fused attentions unknown (the graph has 32 attention layers, but 1 Myelin blocks do not show "
        "which kernels they contain), 2 kernels, bytes moved: unknown (Myelin blocks)"
    )
    assert layers.summary() == line
    assert "FP16 attention accumulates" in str(layers.warning())
    assert LayerReport.from_dict(json.loads(json.dumps(layers.to_dict()))) == layers
