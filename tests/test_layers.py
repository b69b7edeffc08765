"""The layer report: what the builder makes of each attention form, and both sources read alike."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from pathlib import Path

import onnx_ir as ir
import pytest
from conftest import load_golden, traced

from engines.layers.layer_report import LayerReport
from engines.layers.read_layers import LayerReportError, layers_from_log, read_families
from export.contract.options import AttentionForm, Precision, Rewrites
from export.lowering.precision import lower


@functools.cache
def layers_of(precision: Precision, form: AttentionForm, rewrites: Rewrites | None = None) -> LayerReport:
    """The layer report of a golden encoder of four blocks."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from engines.builder.build import build_plan
    from engines.builder.options import BuildOptions

    golden = load_golden("meta-dual")
    model = traced(golden.encoder, golden.config, rewrites, necks="sam3", positions="none").model
    lower(model, precision, attention=form)
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder, "x.onnx")
        ir.save(model, onnx, external_data="x.onnx.data")
        options = BuildOptions(precision=precision, compute_capabilities=("8.9",))
        layers = build_plan(onnx, Path(folder, "x.plan"), options).layers
    assert layers is not None
    return layers


FORMS = [
    ("fp16", "fp32acc", 4, ("fp32", "fp32")),
    ("fp16", "fused", 4, ("fp16", "fp16")),
    ("fp16", "unfused", 0, None),
    ("bf16", "fused", 4, ("fp32", "fp32")),
    ("fp32", "fused", 0, None),
]
"""DESIGN's table: precision, form, fused attentions of 4, what their two products accumulate in."""


@pytest.mark.parametrize(("precision", "form", "fused", "accumulation"), FORMS)
def test_each_form_becomes_what_the_design_says(
    precision: Precision, form: AttentionForm, fused: int, accumulation: tuple[str, str] | None
) -> None:
    layers = layers_of(precision, form)
    assert (layers.attentions, len(layers.fused), layers.accumulation) == (4, fused, accumulation)
    assert {kernel.accumulation for kernel in layers.fused} == ({accumulation} if fused else set())
    blocks = [module for kernel in layers.fused for module in kernel.modules]
    assert blocks == ([f"trunk.blocks.{index}.attn" for index in range(4)] if fused else [])
    assert bool(layers.warning()) == ("fp16" in (accumulation or ()))
    assert layers.fusable == fused


@pytest.mark.parametrize("form", ["fp32acc", "fused"])
def test_the_plain_module_fuses_too(form: AttentionForm) -> None:
    """`--no-rewrite`: its rotary is FP32 up to the attention, which must not cost the fusion."""
    assert len(layers_of("fp16", form, Rewrites.none()).fused) == 4


def test_rewrites_save_kernels_and_bytes() -> None:
    plain, rewritten = layers_of("fp16", "fused", Rewrites.none()), layers_of("fp16", "fused")
    assert len(rewritten.kernels) <= len(plain.kernels)
    assert rewritten.bytes_moved is not None and plain.bytes_moved is not None
    assert rewritten.bytes_moved < plain.bytes_moved


def test_tokens_are_permuted_once_and_back() -> None:
    """Sequence first, as the fused kernel writes them: no kernel but the last of the trunk moves tokens alone."""

    def moves(layers: LayerReport) -> list[str]:
        names = [re.sub(r"_myl\d+_\d+$", "", kernel.name) for kernel in layers.kernels]
        return [name for name in names if re.fullmatch(r"__myl_(Resh|Tran)*Resh(Resh|Tran)*", name)]

    assert moves(layers_of("fp16", "fp32acc")) == ["__myl_ReshTran"]
    plain = layers_of("fp16", "fp32acc", Rewrites.none())  # the control: permuted in every block, inside other kernels
    assert moves(plain) == [] and len(plain.kernels) > len(layers_of("fp16", "fp32acc").kernels)


def test_summary_and_warning() -> None:
    good, bad = layers_of("fp16", "fp32acc"), layers_of("fp16", "fused")
    assert good.summary().startswith("fused attentions 4 of 4, accumulation FP32, ")
    assert f"{len(good.kernels)} kernels" in good.summary() and "GB moved" in good.summary()
    assert good.warning() is None
    assert "#4837" in str(bad.warning()) and "accumulation FP16" in bad.summary()
    narrow = dataclasses.replace(good.fused[0], accumulation=("fp32", "fp16"))
    one_narrow = dataclasses.replace(good, kernels=(narrow, *good.fused[1:]))
    assert "accumulation FP32 then FP16" in one_narrow.summary() and "#4837" in str(one_narrow.warning())
    assert layers_of("fp16", "unfused").summary().startswith("fused attentions 0 of 4, ")


def test_table_and_file() -> None:
    layers = layers_of("fp16", "fp32acc")
    lines = layers.table().splitlines()
    assert sum("  attention  " in line for line in lines) == 4
    assert "attention families: 4 Ampere_hmma_fp32" in lines and any("trunk.blocks.3.mlp.fc1" in line for line in lines)
    assert len(layers.table(3).splitlines()) == len(lines) - len(layers.kernels) + 3
    saved = json.loads(json.dumps(layers.to_dict()))
    assert LayerReport.from_dict(saved) == layers
    assert saved["fused"] == 4 and saved["bytes_moved"] == layers.bytes_moved
    saved["kernels"][0]["name"] = "another"
    assert LayerReport.from_dict(saved) != layers


def _listed(name: str, dims: str) -> str:
    layout = "Strides: [1], StrideOrder: [0], Datatype: Half, Format: (Arbitrary) Format with stride order = [1,2,0]"
    return f"{{ Name: {name}, Dimensions: [{dims}], {layout} }}"


ATTENTION = "[ONNX Layer: trunk.blocks.0.attn/attention/to_float16]\x1f[ONNX Layer: trunk.blocks.0.attn/attention]"
LOG = "\n".join(
    [
        "Layers:",
        "Name: s, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: ",
        f"Name: _gemm_mha_v2_myl0_5, LayerType: kgen, Inputs: [ {_listed('q', '16,576,64')}, "
        f"{_listed('k', '16,64,576')}], Constants: [ {_listed('c', '')}], Outputs: [ {_listed('o', '16,576,64')}], "
        f"TacticName: _gemm_mha_v2_0x71, StreamId: 0, Metadata: {ATTENTION}",
        f"Name: fc, LayerType: gemm, Inputs: [ {_listed('x', '-1,64')}], Constants: [], "
        f"Outputs: [ {_listed('y', '-1,64')}], TacticName: , StreamId: 0, "
        "Metadata: [ONNX Layer: trunk.blocks.0.mlp.fc1/MatMul]",
        "",
        "I/O Tensors:",
    ]
)
"""As TensorRT-RTX 1.7 prints it."""


def test_the_builders_listing_is_read() -> None:
    layers = layers_from_log(LOG, {"_gemm_mha_v2_0x71": ("Ampere_hmma_fp16", "Ampere_hmma_fp32")})
    mha, fc = layers.kernels
    assert layers.families == {"Ampere_hmma_fp16 then Ampere_hmma_fp32": 1}
    assert (mha.attention, mha.accumulation, mha.modules) == (True, ("fp16", "fp32"), ("trunk.blocks.0.attn",))
    assert mha.bytes == 3 * 16 * 576 * 64 * 2 + 2
    assert not fc.attention and fc.bytes is None and fc.modules == ("trunk.blocks.0.mlp.fc1",)
    assert layers.attentions == 1 and layers.accumulation == ("fp16", "fp32")
    assert layers.bytes_moved is None and "dynamic batch" in layers.summary()


OLD_LOG = "\n".join(
    [
        "Layers:",
        "Name: __mye1_myl0_0, LayerType: wait, Inputs: [], Outputs: [], TacticName: , StreamId: 1, Metadata: ",
        "Name: __myl_CastMulAdd_myl0_1, LayerType: kgen, Inputs: [ { Name: ids, Dimensions: [1,40], "
        "Format/Datatype: Half }], Outputs: [ { Name: o, Dimensions: [1,40], Format/Datatype: Row major linear FP16 "
        "format }], TacticName: __myl_CastMulAdd_0xd5, StreamId: 0, Metadata: [ONNX Layer: trunk.ln_pre/Mul]",
        "Name: conv, LayerType: CaskConvolution, Inputs: [ { Name: x, Location: Device, Dimensions: [1,3,8,8], "
        "Format/Datatype: Half }], Outputs: [ { Name: y, Location: Device, Dimensions: [1,4,8,8], Format/Datatype: "
        "Half }], ParameterType: Convolution, Kernel: [3,3], TacticName: sm80_xmma, TacticValue: 0x1b, StreamId: 0, "
        "Metadata: ",
        "Name: signal_1, LayerType: signal",
        "",
        "Bindings:",
        "ids",
    ]
)
"""In the form of TensorRT 10 (NVIDIA/TensorRT #4397): no Constants, other fields, waits between the kernels."""


def test_the_listing_of_tensorrt_10_is_read() -> None:
    layers = layers_from_log(OLD_LOG, {})
    first, conv = layers.kernels  # a wait and a signal are no kernels
    assert (first.name, first.kind, first.tactic) == ("__myl_CastMulAdd_myl0_1", "kgen", "__myl_CastMulAdd_0xd5")
    assert (first.bytes, first.modules) == (2 * 40 * 2, ("trunk.ln_pre",))
    assert (conv.kind, conv.tactic, conv.bytes) == ("CaskConvolution", "sm80_xmma", (3 + 4) * 64 * 2)
    assert conv.inputs[0].name == "x"


def test_an_fp16_attention_that_does_not_tell_is_warned_of() -> None:
    layers = layers_from_log(LOG, {})
    assert "accumulation" in layers.summary() and "does not show" in str(layers.warning())


def test_a_log_without_the_engine_is_an_error() -> None:
    with pytest.raises(LayerReportError, match="lists no kernels of the plan"):
        layers_from_log("Layers:\n\nI/O Tensors:\n", {})


def test_families_are_read_from_the_kernels_source(tmp_path: Path) -> None:
    plan = tmp_path / "x.plan"
    kernel = "fmha::Ampere_hmma_{}_traits,\n\tfmha::Ampere_hmma_{}_traits,\n\tfalse,\n extern __global__ void {}(\n"
    plan.write_bytes(
        b"\0\xff" + kernel.format("fp32", "fp16", "a").encode() + b"\0" + kernel.format("bf16", "bf16", "b").encode()
    )
    names = ("Ampere_hmma_fp32", "Ampere_hmma_fp16", "Ampere_hmma_bf16")
    assert read_families(plan) == {"a": names[:2], "b": (names[2], names[2])}
    plan.write_bytes(b"\0\xff")
    assert read_families(plan) == {}
