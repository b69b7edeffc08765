"""Who reads a file: the table, the file that is written for a target, and what is claimed of one."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Save, Traced, load_golden, open_onnx, shared_encoder, traced
from exporting import golden_options, neck_export_cli, trace_quickly
from onnx import TensorProto, helper, numpy_helper

from export.contract.errors import ExportError
from export.contract.options import Precision
from export.contract.targets import (
    FP8,
    NEWEST,
    OTHER_EXPORTERS,
    TARGETS,
    TITLES,
    Target,
    TargetError,
    find_targets,
    line_of,
    target_names,
    version_numbers,
)
from export.contract.triton_containers import ONNX_RUNTIME, TENSORRT
from export.lowering.precision import OPSETS, lower
from export.lowering.resolve_target import resolve_target
from export.pipeline import export_onnx, verify_file
from export.verification.target_check import (
    INTEGERS,
    Needs,
    graph_needs,
    on_cpu,
    read_by,
    reading_lines,
    targets_entry,
    why_not,
)
from export.verification.verify import make_reference, verify_onnx
from neck.config import EncoderConfig

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
SIGNATURES = [("uint8", "graph"), ("float", "none")]
"""The input and the positions with the most operators, and with the fewest."""
FORMS: list[tuple[Precision, str]] = [
    ("fp32", "tensorrt-8.6"),
    ("fp32", "tensorrt-11.4"),
    ("fp16", "tensorrt-8.6"),
    ("fp16", "tensorrt-10.3"),
    ("fp16", "tensorrt-11.4"),
    ("bf16", "tensorrt-rtx"),
]
"""Every file that the table can ask for, but for opset 19, each by a target that asks for it."""

Dict = dict[str, Any]


def two_blocks() -> EncoderConfig:
    """A windowed block and a global one: all that differs between blocks."""
    return dataclasses.replace(load_golden("meta-dual").config, depth=2, global_blocks=(1,))


def tiny_trace(kind: str, positions: str) -> Traced:
    asked: Dict = {"necks": "sam3", "positions": positions, "input_kind": kind}
    return traced(shared_encoder(two_blocks()), two_blocks(), **asked)


def tiny(kind: str, positions: str) -> ir.Model:
    return tiny_trace(kind, positions).model


def written_for(targets: str, precision: Precision, model: ir.Model) -> ir.Model:
    form = resolve_target(find_targets(targets), precision)
    lower(model, precision, attention=form.attention, spelling=form.spelling, opset=form.opset)
    return model


Held = tuple[set[str], set[str], int]
"""Operators, types and opset of a file."""


def held(model: ir.Model) -> Held:
    """Written anew here, from the file's own protobuf."""
    proto = ir.to_proto(model)
    opset = {entry.domain: entry.version for entry in proto.opset_import}[""]
    names = {onnx.TensorProto.DataType.Name(number) for number in range(1, 20)}
    found = {info.type.tensor_type.elem_type for info in (*proto.graph.value_info, *proto.graph.output)}
    found |= {tensor.data_type for tensor in proto.graph.initializer}
    types = {onnx.TensorProto.DataType.Name(number) for number in found} & names
    return {node.op_type for node in proto.graph.node}, types, opset


def beyond(target: Target, file: Held) -> set[str]:
    """What of a file the table does not give a target."""
    operators, types, opset = file
    return (
        operators - target.operators
        | (types - target.types - INTEGERS)
        | ({f"opset {opset}"} if opset > target.opset else set())
    )


@pytest.mark.parametrize(("kind", "positions"), SIGNATURES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_target_gets_what_it_reads(kind: str, positions: str, precision: Precision) -> None:
    refused: list[Target] = []
    written: dict[object, tuple[Held, Needs]] = {}
    for target in TARGETS:
        name = target.full_name
        try:
            form = resolve_target([target], precision)
            if form not in written:  # targets share most of the forms
                model = written_for(name, precision, tiny(kind, positions))
                written[form] = held(model), graph_needs(model)
        except TargetError as error:
            refused.append(target)
            assert target.name in str(error) and re.search("use --precision fp(16|32)$", str(error)), error
            assert len(str(error).splitlines()) == 1
            continue
        file, needs = written[form]
        assert beyond(target, file) == set() and why_not(target, needs) is None, name
    assert refused == (
        [target for target in TARGETS if target.opset < 22 or "BFLOAT16" not in target.types]
        if precision == "bf16"
        else [target for target in TARGETS if precision == "fp16" and "FLOAT16" not in target.types]
    )


@pytest.mark.parametrize(("operator", "opset"), [("RotaryEmbedding", 23), ("Swish", 24), ("Attention", 23)])
def test_a_planted_newer_operator_is_seen(operator: str, opset: int) -> None:
    """The control: TensorRT 10.3 is known to read neither operator nor opset."""
    (target,) = find_targets("tensorrt-10.3")
    model = written_for("tensorrt-10.3", "fp16", tiny("float", "none"))
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    planted = ir.node(operator, [softmax.inputs[0]], name="planted")
    planted.outputs[0].type = softmax.outputs[0].type
    model.graph.insert_after(softmax, planted)
    needs = graph_needs(model)
    assert beyond(target, held(model)) == {operator}
    assert why_not(target, needs) == f"the runtime is not known to support the operator {operator} (1 nodes)"
    model.opset_imports[""] = opset
    assert f"opsets up to {target.opset}, but the file has opset {opset}" in str(why_not(target, graph_needs(model)))


@pytest.mark.parametrize(
    ("precision", "target", "signature"), [(*form, SIGNATURES[index % 2]) for index, form in enumerate(FORMS)]
)
def test_the_files_compute_what_pytorch_computes(
    save: Save, precision: Precision, target: str, signature: tuple[str, str]
) -> None:
    """In ONNX Runtime, FP16 and BF16 by their rounding simulation; FP32 and FP16 also load in it as they are."""
    whole = tiny_trace(*signature)
    path = save(written_for(target, precision, whole.model))
    reference = make_reference(shared_encoder(two_blocks()), whole.signature)
    assert verify_onnx(path, whole.signature, reference, precision).passed
    if precision != "bf16":
        assert open_onnx(path).get_outputs()


@pytest.mark.parametrize(("precision", "target"), FORMS)
def test_where_rtx_takes_them_the_real_builder_builds(save: Save, precision: Precision, target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    from engines.builder.build import build_plan
    from engines.builder.options import BuildOptions

    model = written_for(target, precision, tiny("uint8", "graph"))
    assert why_not(find_targets("tensorrt-rtx")[0], graph_needs(model)) is None
    path = save(model)
    result = build_plan(path, path.with_suffix(".plan"), BuildOptions(precision, compute_capabilities=("8.9",)))
    assert result.plan_bytes


@pytest.mark.parametrize(
    ("precision", "asked", "expected"),
    [
        (
            "fp16",
            {"opset": 23},
            "read by TensorRT 10.14 and later, TensorRT-RTX, "
            "ONNX Runtime 1.23 and later (to run on a GPU, the ONNX file needs ONNX Runtime 1.25 or later), "
            "OpenVINO 2026.4 and later",
        ),
        (
            "fp16",
            {},
            "read by TensorRT 10.0 and later, TensorRT-RTX, "
            "ONNX Runtime 1.18 and later (on a GPU too), OpenVINO 2026.4 and later",
        ),
        ("bf16", {}, "read by TensorRT 10.14 and later, TensorRT-RTX, OpenVINO 2026.4 and later"),
        ("bf16", {"upsampling": "deconv"}, "read by TensorRT 10.14 and later, OpenVINO 2026.4 and later"),
        (
            "fp32",
            {"opset": 17},
            "read by TensorRT 8.6 and later, TensorRT-RTX, ONNX Runtime 1.18 and later (on a GPU too), "
            "ONNX Runtime on WebGPU 1.31 and later, OpenVINO 2026.4 and later",
        ),
    ],
)
def test_the_line(precision: Precision, asked: Dict, expected: str) -> None:
    model = tiny("float", "none")
    lower(model, precision, **asked)
    assert read_by(graph_needs(model)) == expected


def test_a_graph_that_nobody_reads() -> None:
    model = tiny("float", "none")
    lower(model, "fp16")
    needs = graph_needs(model)
    refused = {**needs.operators, ("Attention", "FLOAT"): 1}  # by TensorRT; the others do not compute FP8
    versions = {**needs.versions, "Attention": 23}
    fp8 = dataclasses.replace(needs, operators=refused, versions=versions, types=needs.types | {FP8})
    assert read_by(fp8) == "not supported by any runtime that neck-export knows"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda needs: {"operators": {**needs.operators, ("com.example::Gelu", "FLOAT16"): 3}}, "com.example::Gelu"),
        (lambda needs: {"types": needs.types | {"INT16"}}, "INT16"),
        (lambda needs: {"opset": 26}, "opset 26"),
    ],
)
def test_what_the_table_does_not_know_is_unknown(change: Callable[[Needs], Dict], named: str) -> None:
    """Never `no target`; a file that holds it is not claimed for any target either."""
    model = tiny("float", "none")
    lower(model, "fp16")
    needs = graph_needs(model)
    assert read_by(needs).startswith("read by TensorRT 10.0")
    strange = dataclasses.replace(needs, **change(needs))
    assert re.search(
        rf"^not known to be supported by any runtime\. .* graph: .*{named}.*\. Everything else .* by TensorRT",
        read_by(strange),
    )
    assert targets_entry(strange, ())["from"] == []


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what ONNX Runtime's own tools make of an FP32 file."""
    ort = pytest.importorskip("onnxruntime")
    from onnxruntime import quantization as q

    folder = tmp_path_factory.mktemp("quantized")
    model = tiny("float", "none")
    lower(model, "fp32")
    ir.save(model, folder / "e.onnx")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 112, 112)).astype(np.float32)

    class Images(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = iter([{"image": pixels}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    def static(name: str, **asked: Any) -> None:
        q.quantize_static(folder / "e.onnx", folder / f"{name}.onnx", Images(), **asked)

    static("static")
    static("shifted", extra_options={"QuantizeBias": False})
    static("symmetric", extra_options={"QuantizeBias": False, "ActivationSymmetric": True})
    uint8 = {"QuantizeBias": False, "ActivationSymmetric": True}
    static("uint8", activation_type=q.QuantType.QUInt8, extra_options=uint8)
    q.quantize_dynamic(folder / "e.onnx", folder / "dynamic.onnx")
    for name, level in (("basic", "BASIC"), ("extended", "EXTENDED")):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
        options.optimized_model_filepath = str(folder / f"{name}.onnx")
        ort.InferenceSession(folder / "e.onnx", options, providers=["CPUExecutionProvider"])
    return folder


def reads(load: Callable[[], object]) -> bool:
    try:
        load()
    except Exception:  # of another kind in every runtime
        return False
    return True


SECOND_INPUT = {"Max", "Min", "Mean", "Pow", "Sum", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
TRUTHS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not"}


def one_operator(operator: str, kind: int) -> onnx.ModelProto:
    """A graph of one operator at opset 17 on images of 2 x 3 x 4 x 5."""
    dtype, shape = helper.tensor_dtype_to_np_dtype(kind), [2, 3, 4, 5]
    index, row = np.zeros((1, 3, 4, 5), np.int64), np.zeros((1, 3, 4, 5), dtype)
    constants: dict[str, list[Any]] = {
        "BatchNormalization": [np.ones(3, dtype)] * 4,
        "Clip": [np.array(0, dtype), np.array(1, dtype)],
        "GatherElements": [index],
        "GatherND": [np.array([[0, 1]])],
        "InstanceNormalization": [np.ones(3, dtype)] * 2,
        "Range": [np.array(9), np.array(1)],
        "ReduceSum": [np.array([2])],
        "ScatterElements": [index, row],
        "ScatterND": [np.array([[0, 1]]), np.zeros((1, 4, 5), dtype)],
    }
    attributes: dict[str, Any] = {"AveragePool": {"kernel_shape": [2, 2]}, "ArgMax": {"axis": 1}, "ArgMin": {"axis": 1}}
    if operator.startswith("Reduce") and operator != "ReduceSum":
        attributes[operator] = {"axes": [2]}
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    tensors = [numpy_helper.from_array(array, f"c{i}") for i, array in enumerate(constants.get(operator, ()))]
    if operator in SECOND_INPUT:
        inputs.append(helper.make_tensor_value_info("z", kind, shape))
    elif operator in ("And", "Or", "Xor", "Not"):
        names = "xz"[: 1 + (operator != "Not")]
        inputs = [helper.make_tensor_value_info(name, TensorProto.BOOL, shape) for name in names]
    elif operator == "Where":
        inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, shape), *inputs, *inputs]
    elif operator in ("ConstantOfShape", "Range"):  # as in a graph: of a shape and of numbers that are known
        inputs, first = [], np.array([2, 3]) if operator == "ConstantOfShape" else np.array(0)
        tensors = [numpy_helper.from_array(first, "c"), *tensors]
        if operator == "ConstantOfShape":
            attributes[operator] = {"value": numpy_helper.from_array(np.zeros(1, dtype))}
    elif operator == "Trilu":
        inputs = [helper.make_tensor_value_info("x", kind, [4, 4])]
    named = [one.name for one in (*inputs, *tensors)]
    output = TensorProto.BOOL if operator in TRUTHS else kind
    if operator in ("ArgMax", "ArgMin", "Range", "Size"):
        output = TensorProto.INT64
    node = helper.make_node(operator, named, ["y"], **attributes.get(operator, {}))
    unique = list({one.name: one for one in inputs}.values())
    graph = helper.make_graph([node], "one", unique, [helper.make_tensor_value_info("y", output, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16], ids=["fp32", "fp16"])
def test_operators_of_other_exporters_are_loaded_by_every_runtime_that_the_table_names(kind: int) -> None:
    """Each alone: ONNX Runtime and OpenVINO load it, TensorRT-RTX's parser parses it."""
    ort = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    log, core = trt.Logger(trt.Logger.INTERNAL_ERROR), openvino.Core()
    builder = trt.Builder(log)
    newest = {**NEWEST, "openvino": "2026.4"}
    for family in ("tensorrt", "tensorrt-rtx", "onnxruntime", "openvino"):
        target = line_of(cast(Any, family), newest[family])
        assert target is not None and target.operators >= OTHER_EXPORTERS

    def parses(data: bytes) -> bool:
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return bool(trt.OnnxParser(network, log).parse(data))

    failed, hint = [], {"INFERENCE_PRECISION_HINT": "f32"}
    for operator in sorted(OTHER_EXPORTERS):
        data = one_operator(operator, kind).SerializeToString()
        real = {
            "ONNX Runtime": reads(lambda data=data: ort.InferenceSession(data, providers=["CPUExecutionProvider"])),
            "OpenVINO": reads(lambda data=data: core.compile_model(core.read_model(data), "CPU", hint)),
            "TensorRT-RTX": parses(data),
        }
        failed += [f"{operator}: {runtime}" for runtime, loaded in real.items() if not loaded]
    assert failed == []
    assert not parses(one_operator("Trilu", kind).SerializeToString().replace(b"Trilu", b"Other"))


def test_a_graph_with_sines_is_read_by_tensorrt() -> None:
    """transformers' exporter computes the angles of the positions in the graph."""
    model = tiny("float", "none")
    lower(model, "fp16")
    needs = graph_needs(model)
    sines = dataclasses.replace(
        needs, operators={**needs.operators, ("Sin", "FLOAT16"): 2}, versions={**needs.versions, "Sin": 7}
    )
    line = read_by(sines)
    assert line.startswith("read by TensorRT 10.0 and later") and "not known to run on a GPU" in line


@pytest.mark.filterwarnings("ignore")  # of ONNX Runtime's quantizers
@pytest.mark.parametrize("name", ["e", "static", "shifted", "symmetric", "uint8", "dynamic", "basic", "extended"])
def test_what_onnx_runtimes_tools_write_is_read_by_whom_the_line_says(quantized: Path, name: str) -> None:
    """Each runtime here is asked: ONNX Runtime and OpenVINO load the file, TensorRT-RTX's parser parses it."""
    openvino = pytest.importorskip("openvino")
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")
    path = quantized / f"{name}.onnx"
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    real = {
        "ONNX Runtime": reads(lambda: open_onnx(path)),
        "OpenVINO": reads(lambda: openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})),
        "TensorRT-RTX": trt.OnnxParser(network, log).parse_from_file(str(path)),
    }
    if version_numbers(openvino.__version__)[:2] < (2026, 4):
        del real["OpenVINO"]  # of which the table says nothing
    assert real["TensorRT-RTX"] is (name in ("e", "symmetric", "basic"))
    needs, installed = graph_needs(ir.load(path)), importlib.metadata.version("onnxruntime")
    line = read_by(needs)
    if name == "extended":  # com.microsoft::FusedMatMul
        assert re.search(r"not known to be supported by any runtime\. .* graph: .*FusedMatMul.*\. ", line)
    else:
        told = {target: target in line for target in real}
        if version_numbers(installed) < (1, 24):  # 1.23 does not load what its own quantize_dynamic writes
            told["ONNX Runtime"] = why_not(cast(Target, line_of("onnxruntime", installed)), needs) is None
        assert told == real and (name == "dynamic" or real["ONNX Runtime"])


def test_attention_in_fp32_is_read_by_no_tensorrt() -> None:
    """The canonical graph: no TensorRT builds it, ONNX Runtime runs it."""
    line = read_by(graph_needs(tiny("float", "none")))
    assert "TensorRT" not in line and line.startswith("read by ONNX Runtime 1.23 and later")


def test_small_operators_on_the_cpu_are_no_reason() -> None:
    """ONNX Runtime 1.25 computes MaxPool of opset 22 on the CPU: one map of 72 x 72 a neck."""
    model = tiny("float", "none")
    lower(model, "fp16", opset=23)
    needs = graph_needs(model)
    gpu = cast(Target, line_of("onnxruntime-gpu", "1.25"))
    assert why_not(gpu, needs) is None and on_cpu(gpu, needs) == ["MaxPool"]
    older = cast(Target, line_of("onnxruntime-gpu", "1.24.4"))
    assert (
        why_not(older, needs)
        == "the runtime computes the operator Attention of opset 23 on the CPU, which is slow (2 nodes)"
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("tensorrt-10.3", ["tensorrt-10.3"]),
        ("TensorRT-10.13.3 , openvino", ["tensorrt-10.13.3", "openvino-2026.4"]),
        ("jetpack-6.2", ["tensorrt-10.3@8.7"]),
        ("jetpack-7.0", ["tensorrt-10.13"]),
        ("jetpack-7.2.1, jetpack-7.2.2@8.7", ["tensorrt-10.16", "tensorrt-10.16@8.7"]),
        ("tensorrt-11.3,tensorrt-11.4.1,tensorrt-11.5", ["tensorrt-11.3", "tensorrt-11.4.1", "tensorrt-11.5"]),
        ("triton-26.08", ["tensorrt-11.2.1", "onnxruntime-gpu-1.28.0"]),
        ("triton-25.09", ["tensorrt-10.13.3", "onnxruntime-gpu-1.23.0"]),
        ("triton-25.10", ["tensorrt-10.13.3", "onnxruntime-gpu-1.23.1"]),
        ("tensorrt-rtx,tensorrt-rtx-1.7", ["tensorrt-rtx-1.7"]),
    ],
)
def test_names(names: str, expected: list[str]) -> None:
    assert [target.full_name for target in find_targets(names)] == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "name",
    [
        *("tensorrt-11.3", "tensorrt-11.4.1", "tensorrt-11.5", "jetpack-7.2", "jetpack-7.2.1", "jetpack-7.2.2"),
        *("triton-26.08", "onnxruntime-1.32", "onnxruntime-gpu-1.32", "onnxruntime-webgpu"),
    ],
)
def test_the_newest_targets_get_what_they_read(name: str, precision: Precision) -> None:
    if name == "onnxruntime-webgpu" and precision == "fp16":
        with pytest.raises(TargetError, match="use --precision fp32"):
            written_for(name, precision, tiny("uint8", "graph"))
        return
    written = written_for(name, precision, tiny("uint8", "graph"))
    file, needs = held(written), graph_needs(written)
    for target in find_targets(name):
        assert beyond(target, file) == set() and why_not(target, needs) is None
        older = dataclasses.replace(target, operators=target.operators - {"LayerNormalization"})  # the control
        assert beyond(older, file) == {"LayerNormalization"} and why_not(older, needs)


PACKAGES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx-cu13",
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime-gpu",
    "openvino": "openvino",
}
"""Names on the package index of what the families are."""


def older_rows(published: Mapping[str, str]) -> list[str]:
    """The families of whose newest published version the table knows nothing yet."""
    return [
        f"{TITLES[family]}: the table ends at {NEWEST[family]}, published is {published[family]}"
        for family in TITLES
        if family in published and version_numbers(published[family])[:2] > version_numbers(NEWEST[family])[:2]
    ]


def test_rows_that_are_older_than_what_is_published_are_named() -> None:
    newest: dict[str, str] = dict(NEWEST)
    assert older_rows(newest) == [] and older_rows({}) == []
    assert older_rows(newest | {"openvino": f"{NEWEST['openvino']}.9"}) == []  # a patch release reads the same
    (row,) = older_rows(newest | {"tensorrt": "99.0.0.1"})
    assert "TensorRT: " in row and "99.0.0.1" in row and NEWEST["tensorrt"] in row


@pytest.mark.slow
def test_which_rows_are_older_than_the_package_index_says() -> None:
    """Asks the package index, and warns: a newer release is no fault of this one."""
    published = {}
    for family, package in PACKAGES.items():
        command = [sys.executable, "-m", "pip", "index", "versions", package]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.match(rf"{package} \((\S+)\)", asked.stdout)
        if found:
            published[family] = found[1]
    if not published:
        pytest.skip("the package index does not answer: run with a network and pip in the environment")
    for row in older_rows(published):
        warnings.warn(row, stacklevel=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tensort-10.3", r"'tensort-10\.3': there is no target with this name; similar names are tensorrt-10\.\d"),
        ("jetpack-6", "jetpack-6"),
        ("triton-25.13", r"triton-25\.1"),
        ("", "''"),
        ("nonsense", "there is no target with this name; similar names are "),
        ("tensorrt", r"the version is missing; write it as in tensorrt-11\.5; the known versions are 8\.6 to 11\.5"),
        ("onnxruntime-gpu", r"as in onnxruntime-gpu-1\.32; the known versions are 1\.18 to 1\.32"),
        ("tensorrt-", "version is missing"),
        ("tensorrt-12.0", r"tensorrt-12\.0 .*the known versions are 8\.6 to 11\.5"),
        ("tensorrt-7.2", r"the known versions are 8\.6 to 11\.5"),
        ("onnxruntime-1.16", r"known versions are 1\.18 to 1\.32"),
        ("tensorrt-rtx-1.2", r"known versions are 1\.7"),
        ("tensorrt-10.x", r"the known versions are 8\.6 to 11\.5"),
    ],
)
def test_unknown_targets_are_told(name: str, says: str) -> None:
    with pytest.raises(TargetError, match=says) as caught:
        find_targets(name)
    assert len(str(caught.value).splitlines()) == 1


def test_every_name_is_found() -> None:
    for name in target_names():
        assert find_targets(name), name


def test_the_table_is_in_order_and_says_where_from() -> None:
    for family in TITLES:
        lines = [target for target in TARGETS if target.family == family]
        keys = [version_numbers(target.since) for target in lines]
        assert keys == sorted(set(keys)) and keys[-1] <= version_numbers(NEWEST[family])
        opsets = [target.opset for target in lines]
        assert opsets == sorted(opsets) and all(target.opset in OPSETS for target in lines)
    for target in TARGETS:
        assert len(target.source) > 10 and not target.version
        known = {*target.operators, *(operator for operator, _ in target.refuses), *target.on_cpu}
        for operator in known:
            assert onnx.defs.get_schema(operator, 24).since_version
        for operator in target.operators:
            assert min(schema.since_version for schema in schemas(operator)) <= target.opset
    assert set(TENSORRT) | set(ONNX_RUNTIME)


@functools.cache
def every_schema() -> list[Any]:
    """With their documents: a third of a second."""
    return onnx.defs.get_all_schemas_with_history()


def schemas(operator: str) -> list[Any]:
    return [one for one in every_schema() if one.name == operator and not one.domain]


@pytest.mark.parametrize(
    ("targets", "precision", "asked", "says"),
    [
        ("tensorrt-8.6", "bf16", {}, r"--precision bf16 .*target TensorRT 8\.6 supports"),
        (
            "tensorrt-8.6,openvino",
            "bf16",
            {},
            r"target TensorRT 8\.6 supports .*; this precision is supported by OpenVINO 2026\.4; ",
        ),
        (
            "tensorrt-10.3,tensorrt-rtx",
            "bf16",
            {},
            r"opset 22 .*, but the target TensorRT 10\.3 is only known to support opsets up to 20; "
            r"opset 22 is supported by TensorRT-RTX 1\.7; ",
        ),
        (
            "tensorrt-8.6",
            "fp32",
            {"opset": 20},
            r"--opset 20: the target TensorRT 8\.6 is only known to support opsets up to 17",
        ),
        ("jetpack-6.2", "bf16", {"attention": "fp32acc"}, r"TensorRT 10\.3 is only known to support opsets up to 20"),
        (
            "jetpack-6.2",
            "fp16",
            {"attention": "fp32acc", "opset": 23},
            r"--opset 23: the target TensorRT 10\.3 is only known",
        ),
    ],
)
def test_what_targets_do_not_share_is_refused(targets: str, precision: Any, asked: Dict, says: str) -> None:
    with pytest.raises(TargetError, match=says) as caught:
        resolve_target(find_targets(targets), precision, **asked)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("targets", "asked", "spelling", "opset"),
    [
        ("tensorrt-11.4", None, "operator", None),
        ("tensorrt-10.14,tensorrt-11.4", 23, "operator", 23),
        ("tensorrt-11.4", 20, "matmul", 20),
        ("tensorrt-rtx", None, "matmul", None),
        ("tensorrt-rtx", 23, "matmul", 23),
        ("tensorrt-11.4,tensorrt-rtx", None, "matmul", None),
        ("tensorrt-10.14,onnxruntime-1.23", None, "matmul", None),
        ("tensorrt-11.4,onnxruntime-gpu-1.24", None, "matmul", None),
        ("triton-25.09", None, "matmul", None),
        ("jetpack-6.2,tensorrt-8.6", None, "matmul", 17),
    ],
)
def test_the_best_spelling_that_targets_share(
    targets: str, asked: int | None, spelling: str, opset: int | None
) -> None:
    form = resolve_target(find_targets(targets), "fp16", opset=asked)
    assert (form.attention, form.spelling, form.opset) == ("fp32acc", spelling, opset)


def test_one_default_file_for_every_target() -> None:
    """TensorRT from 10.0 on, JetPack 6 and 7, every Triton container of the table, ONNX Runtime from 1.18 on."""
    model = tiny("uint8", "graph")
    lower(model, "fp16")
    needs, old = graph_needs(model), ("tensorrt-8.6", "tensorrt-9.0")
    others = (*old, "onnxruntime-webgpu", "onnxruntime-webgpu-1.31")  # FP32 alone
    targets = [one for name in target_names() if name not in others for one in find_targets(name)]
    assert len(targets) > 40 and [(one.name, why_not(one, needs)) for one in targets if why_not(one, needs)] == []
    for name in old:  # the control: opset 20
        assert "the runtime is only known to support opsets up to" in str(why_not(find_targets(name)[0], needs))
    assert "FLOAT16" in str(why_not(find_targets("onnxruntime-webgpu")[0], needs))
    at_23 = tiny("uint8", "graph")
    lower(at_23, "fp16", opset=23)
    refusing = {one.full_name for one in targets if why_not(one, graph_needs(at_23))}
    assert {"tensorrt-10.3@8.7", "tensorrt-10.13", "onnxruntime-1.21", "onnxruntime-gpu-1.23"} <= refusing


def test_without_a_target_the_opset_decides() -> None:
    spellings = {opset: resolve_target((), "fp16", opset=opset).spelling for opset in (None, 17, 22, 23, 24)}
    assert spellings == {None: "matmul", 17: "matmul", 22: "matmul", 23: "operator", 24: "operator"}
    assert resolve_target((), "bf16", opset=23).attention == resolve_target((), "fp32").attention == "fused"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


def exported(folder: Path, **options: Any) -> Path:
    values = {"necks": "sam3", "positions": "none", "precision": "fp16", "verify": False, **options}
    return export_onnx(golden_options("meta-dual", folder / "x.onnx", **values)).path


@pytest.mark.usefixtures("quick")
def test_the_manifest_carries_it_and_inspect_shows_it(tmp_path: Path) -> None:
    path = exported(tmp_path, targets="triton-25.09")
    manifest = json.loads((tmp_path / "x.json").read_text())
    assert manifest["targets"]["asked"] == ["tensorrt-10.13.3", "onnxruntime-gpu-1.23.0"]
    assert manifest["attention_form"] == "fp32acc" and manifest["attention_spelling"] == "matmul"
    assert manifest["opset"] == 20
    ran = neck_export_cli("inspect", path)
    assert ran.code == 0 and "  read by TensorRT 10.0 and later, TensorRT-RTX, ONNX Runtime 1.18" in ran.out


Change = Callable[[Dict], object]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda targets: targets["asked"].append("tensorrt-10.3"),
            r"says that TensorRT 10\.3 can load the ONNX file, but .* contradicts the manifest: the runtime is",
        ),
        (lambda targets: targets.update({"from": ["tensorrt-8.6"]}), r"says that TensorRT 8\.6 can load"),
        (lambda targets: targets.update({"from": ["tensorrt-99"]}), "is damaged"),
        (lambda targets: targets.pop("asked"), "is damaged"),
    ],
)
def test_a_manifest_that_claims_more_than_its_graph(tmp_path: Path, change: Change, says: str) -> None:
    path = exported(tmp_path, opset=23)
    where = tmp_path / "x.json"
    manifest = json.loads(where.read_text())
    change(manifest["targets"])
    where.write_text(json.dumps(manifest))
    with pytest.raises(TargetError, match=says) as caught:
        verify_file(path)
    assert len(str(caught.value).splitlines()) <= 2
    ran = neck_export_cli("inspect", path)
    assert ran.code == 0 and "WRONG: " in ran.out


@pytest.mark.usefixtures("quick")
def test_verify_rechecks_from_the_graph(tmp_path: Path) -> None:
    path = exported(tmp_path, opset=23)
    assert "read by TensorRT 10.14 and later" in neck_export_cli("verify", path, "--target", "tensorrt-10.14").out
    refused = neck_export_cli("verify", path, "--target", "jetpack-6.2")
    assert (
        refused.code == 1
        and "TensorRT 10.3 cannot load the file: the runtime is only known to support opsets up to 20" in refused.err
    )
    # a file of another tool has no manifest: its numbers cannot be compared, who reads it can be told
    (tmp_path / "x.json").unlink()
    foreign = neck_export_cli("verify", path)
    assert foreign.code == 1 and "the manifest is missing" in foreign.err and "read by TensorRT 10.14" in foreign.err
    assert "cannot load the file" in neck_export_cli("verify", path, "--target", "jetpack-6.2").err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "tensort-10"], "there is no target with this name"),
        (["--target", "tensorrt-8.6", "--precision", "bf16"], "does not know whether the target TensorRT 8.6 supports"),
        (["--target", "tensorrt-8.6", "--opset", "20"], "--opset 20: the target TensorRT 8.6"),
        (["--residual", "fp16", "--precision", "bf16"], "--residual fp16 cannot be used for a file in bf16"),
        (["--residual", "fp16"], "--residual fp16 cannot be used for a file in fp32"),
    ],
)
def test_bad_options_are_told_before_the_work(tmp_path: Path, arguments: list[str], says: str) -> None:
    ran = neck_export_cli("onnx", "--checkpoint", "random", *arguments, "--output", tmp_path / "x.onnx")
    assert ran.code == 1 and says in ran.err and len(ran.err.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_values_without_types_are_inferred() -> None:
    model = tiny("float", "none")
    lower(model, "fp16")
    complete = graph_needs(model.clone())
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = None
    found: Mapping[tuple[str, str], int] = graph_needs(model).operators
    assert found == complete.operators


def test_what_an_entry_says() -> None:
    model = tiny("float", "none")
    lower(model, "fp16", opset=23)
    entry = targets_entry(graph_needs(model), find_targets("tensorrt-11.4"))
    assert entry["asked"] == ["tensorrt-11.4"] and "tensorrt-10.14" in entry["from"]
    with pytest.raises(ExportError):
        lower(tiny("float", "none"), "fp32", residual="fp16")


@pytest.mark.parametrize(("opset", "since"), [(20, "1.18"), (22, "1.21"), (23, "1.24")])
def test_onnx_runtime_1_23_quantizes_up_to_opset_22(opset: int, since: str) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    weights = [numpy_helper.from_array(np.float32(1), "s"), numpy_helper.from_array(np.int8(0), "z")]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    needs = graph_needs(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    assert reading_lines(needs)["onnxruntime"] == since
    refused = why_not(cast(Target, line_of("onnxruntime", "1.23.2")), needs)
    assert (refused is not None and "QuantizeLinear of opset 23" in refused) is (opset == 23)
