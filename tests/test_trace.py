"""Module -> canonical ONNX graph: it computes what the module computes, and holds nothing that trips a builder."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import (
    GOLDEN_CASES,
    GOLDEN_TOLERANCE,
    Save,
    Traced,
    load_golden,
    named_outputs,
    run_onnx,
    shared_encoder,
    tiny_config,
    traced,
    worst_error,
)
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch.onnx._internal.exporter._core import TorchTensor as TorchsOwnTensor
from torch.torch_version import TorchVersion

import export.graph.trace
from export.contract.errors import ExportError
from export.contract.options import Rewrites
from export.contract.signature import encoder_signature
from export.graph.constant_folding import LAZY_BYTES
from export.graph.deployed_module import DeployEncoder
from export.graph.trace import OLDEST_TORCH, trace
from export.lowering.precision import lower
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck
from neck.position import PositionEmbeddingSine

SIZE_TOLERANCE = 1e-5
"""Relative L2 of an output in FP32: sums in another order give up to 2e-6 over 2 blocks of a 9216-token grid."""
SAME_TOLERANCE = 1e-6
"""Of an output's largest value, between two graphs of the same nodes in ONNX Runtime."""
OVERHEAD = 1.02
"""File over weights: what the house allows."""

FORBIDDEN = {
    "Shape",
    "If",
    "Loop",
    "Scan",
    "Gather",
    "GatherND",
    "GatherElements",
    "NonZero",
    "Size",
    "ConstantOfShape",
}


def bad_operators(model: ir.Model) -> set[str]:
    """Operators that a builder takes badly or not at all; also nodes of another domain and subgraphs."""
    found = {node.op_type for node in model.graph if node.op_type in FORBIDDEN or node.domain}
    found |= {node.op_type for node in model.graph if node.op_type.startswith(("Scatter", "Sequence"))}
    found |= {node.op_type for node in model.graph if "Sequence" in node.op_type or "Random" in node.op_type}
    return found | {f"function {name}" for name in model.functions}


def odd_types(model: ir.Model) -> set[ir.DataType | None]:
    """Types of values besides FP32, integers of shapes, and pixels."""
    known = {ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.UINT8}
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    return {value.dtype for value in values} - known


def kinds(model: ir.Model) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph)


def contract(model: ir.Model) -> list[tuple[str | None, str, tuple[int | str, ...]]]:
    """Name, type and shape of every input and output."""
    return [
        (value.name, value.dtype.numpy().name, tuple(d if isinstance(d, int) else str(d) for d in value.shape))
        for value in (*model.graph.inputs, *model.graph.outputs)
        if value.dtype is not None and value.shape is not None
    ]


def check(made: Traced, save: Save) -> Path:
    """Lowers to FP32, saves, and looks at what every file must be."""
    assert {node.op_type for node in made.model.graph} >= {"Attention"}
    lower(made.model, "fp32")
    path = save(made.model)
    onnx.checker.check_model(path, full_check=True)
    loaded = ir.load(path)
    specs = (made.signature.image, *made.signature.outputs)
    assert contract(loaded) == [(spec.name, spec.dtype, spec.shape) for spec in specs]
    # positions of a batch that is not known repeat themselves as often as the image's first dimension says
    needs_shape = made.signature.batch.dynamic and made.signature.positions == "graph"
    assert bad_operators(loaded) <= ({"Shape"} if needs_shape else set())
    assert not odd_types(loaded)
    names = [node.name for node in loaded.graph]
    assert len(set(names)) == len(names)
    return path


# hf-dual's structure is meta-dual's but for epsilon, which hf-tracker has too; ultralytics-resized is padded and set
# to another size as meta-padded is
RARE = ("hf-dual", "ultralytics-resized")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in RARE else []) for case in GOLDEN_CASES]
)
def test_golden(case: str, save: Save) -> None:
    golden = load_golden(case)
    path = check(traced(golden.encoder, golden.config, batch=str(len(golden.image))), save)
    assert worst_error(run_onnx(path, golden.image), golden.expected) < GOLDEN_TOLERANCE
    image = golden.image.clone()
    image[:, 0, 40, 40] += 1 / 127.5  # the control: one pixel moved by one level
    assert worst_error(run_onnx(path, image), golden.expected) > GOLDEN_TOLERANCE


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "meta-padded" else pytest.mark.slow) for case in GOLDEN_CASES]
)
def test_golden_without_rewrites(case: str, save: Save) -> None:
    golden = load_golden(case)
    path = check(traced(golden.encoder, golden.config, Rewrites.none(), batch=str(len(golden.image))), save)
    assert worst_error(run_onnx(path, golden.image), golden.expected) < GOLDEN_TOLERANCE


@pytest.mark.parametrize(
    ("case", "rewrites"),
    [
        ("meta-padded", Rewrites()),
        pytest.param("meta-dual", Rewrites(), marks=pytest.mark.slow),
        pytest.param("meta-padded", Rewrites.none(), marks=pytest.mark.slow),
    ],
)
def test_stamped_blocks_are_traced_blocks(
    case: str, rewrites: Rewrites, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_golden(case)
    stamped = traced(golden.encoder, golden.config, rewrites, batch="2")
    monkeypatch.setattr(export.graph.trace, "block_kinds", lambda module: [])
    full = trace(DeployEncoder(golden.encoder, stamped.signature, rewrites))
    assert kinds(stamped.model) == kinds(full)
    assert sorted(node.name or "" for node in stamped.model.graph) == sorted(node.name or "" for node in full.graph)
    paths = [
        {node.metadata_props[export.graph.trace.MODULE] for node in model.graph} for model in (stamped.model, full)
    ]
    assert paths[0] == paths[1]
    assert {f"trunk.blocks.{index}.attn" for index in range(4)} <= paths[0]
    for model in (stamped.model, full):
        lower(model, "fp32")
    one, other = (run_onnx(save(model), golden.image) for model in (stamped.model, full))
    assert worst_error(one, other) < SAME_TOLERANCE


def test_more_than_two_kinds_of_order_are_stamped(save: Save) -> None:
    """Global first and last, two windowed in a row: the first kind traced is not the first of the published encoder."""
    config = tiny_config(depth=5, global_blocks=(0, 3, 4))
    encoder = shared_encoder(config)
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    found = run_onnx(check(traced(encoder, config, positions="none", levels="2"), save), image)
    assert worst_error(found, {"sam3_feat_2": named_outputs(encoder, image)["sam3_feat_2"]}) < GOLDEN_TOLERANCE


@pytest.mark.parametrize(("blocks", "batch"), [((), "3:4:8"), pytest.param((0, 1), "1:1:2", marks=pytest.mark.slow)])
def test_one_kind_of_block_and_any_minimum_of_the_batch(blocks: tuple[int, ...], batch: str, save: Save) -> None:
    config = tiny_config(depth=2, global_blocks=blocks)
    encoder = shared_encoder(config)
    made = traced(encoder, config, batch=batch, positions="none", levels="2")
    assert contract(made.model)[0] == ("image", "float32", ("batch", 3, 112, 112))
    path = check(made, save)
    for count in (made.signature.batch.minimum, made.signature.batch.maximum):
        images = torch.randn(count, 3, 112, 112, generator=torch.Generator().manual_seed(0))
        wanted = {"sam3_feat_2": named_outputs(encoder, images)["sam3_feat_2"]}
        assert worst_error(run_onnx(path, images), wanted) < GOLDEN_TOLERANCE


def test_pixels_levels_and_one_neck(save: Save) -> None:
    """uint8 input, two of four levels, the second of two necks, no positions."""
    golden = load_golden("meta-dual")
    made = traced(golden.encoder, golden.config, necks="sam2", levels="0,3", positions="none", input_kind="uint8")
    assert not [name for name in made.model.graph.initializers if name.startswith("convs.")]
    path = check(made, save)
    pixels = torch.randint(0, 256, (1, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    expected = named_outputs(golden.encoder, image)
    wanted = {name: expected[name] for name in ("sam2_feat_0", "sam2_feat_3")}
    assert worst_error(run_onnx(path, pixels), wanted) < GOLDEN_TOLERANCE
    assert worst_error(run_onnx(path, 255 - pixels), wanted) > GOLDEN_TOLERANCE  # the control


DYNAMIC: list[Any] = [
    pytest.param(Rewrites(), "meta-dual", "graph", id="rewritten"),
    pytest.param(Rewrites(), "meta-padded", "none", id="padded"),
    pytest.param(Rewrites.none(), "meta-padded", "graph", id="plain", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("rewrites", "case", "positions"), DYNAMIC)
def test_dynamic_batch(rewrites: Rewrites, case: str, positions: str, save: Save) -> None:
    config, encoder = load_golden(case).config, load_golden(case).encoder
    made = traced(encoder, config, rewrites, batch="1:4:8", necks="sam3", positions=positions)
    path = check(made, save)
    images = torch.randn(8, 3, *config.image_size, generator=torch.Generator().manual_seed(0))
    names = {spec.name for spec in made.signature.outputs}
    expected = {name: value for name, value in named_outputs(encoder, images).items() if name in names}
    for batch in (1, 2, 8):
        wanted = {name: value[:batch] for name, value in expected.items()}
        assert worst_error(run_onnx(path, images[:batch]), wanted) < GOLDEN_TOLERANCE
        if batch > 1:  # the control: each image has its own outputs
            assert worst_error(run_onnx(path, images[:batch].flip(0)), wanted) > GOLDEN_TOLERANCE


def sized(size: tuple[int, int]) -> EncoderConfig:
    """The published encoder, narrow and of two blocks: its patch, window, pretraining size and levels."""
    return EncoderConfig(image_size=size, embed_dim=64, depth=2, num_heads=1, global_blocks=(1,), d_model=32)


SIZED: list[Any] = [
    pytest.param((336, 336), id="336", marks=pytest.mark.slow),  # else as the file of test_file_is_the_weights
    pytest.param((560, 560), id="560"),
    pytest.param((644, 644), id="644", marks=pytest.mark.slow),
    pytest.param((672, 672), id="672", marks=pytest.mark.slow),
    pytest.param((1008, 1008), id="1008", marks=pytest.mark.slow),
    pytest.param((1344, 1344), id="1344", marks=pytest.mark.slow),
    pytest.param((1008, 672), id="1008x672", marks=pytest.mark.slow),
]


def test_positions_of_the_plain_module_are_no_doubles(save: Save) -> None:
    """Its tables are computed in float64, and too large to be folded as shapes are."""
    config = tiny_config(image_size=280, depth=1, global_blocks=(), d_model=64)
    encoder = shared_encoder(config)
    made = traced(encoder, config, Rewrites.none(), levels="0")
    weights = sum(value.nbytes for value in encoder.parameters())
    path = check(made, save)
    assert path.with_name(f"{path.name}.data").stat().st_size < weights + 64 * 80 * 4 * 4  # tables, not maps
    image = torch.randn(1, 3, 280, 280, generator=torch.Generator().manual_seed(0))
    expected = named_outputs(encoder, image)
    assert (
        worst_error(run_onnx(path, image), {name: expected[name] for name in ("sam3_feat_0", "sam3_pos_0")})
        < GOLDEN_TOLERANCE
    )


@pytest.mark.parametrize("size", SIZED)
def test_image_sizes(size: tuple[int, int], save: Save) -> None:
    config = sized(size)
    encoder = shared_encoder(config)
    check_numbers(check(traced(encoder, config), save), encoder, size)


def check_numbers(path: Path, encoder: Sam3DualViTDetNeck, size: tuple[int, int]) -> None:
    """Whether a file computes what the encoder does, in the published window and pretraining size."""
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    found, expected = run_onnx(path, image), named_outputs(encoder, image)
    assert list(found) == list(expected)
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    assert max(errors.values()) < SIZE_TOLERANCE
    turned = named_outputs(encoder, image.flip(2))  # the control
    assert all((found[name] - turned[name]).norm() / turned[name].norm() > 0.01 for name in errors if "feat" in name)


@pytest.mark.parametrize("size", [(336, 336), pytest.param((560, 560), marks=pytest.mark.slow)])
def test_file_is_the_weights(size: tuple[int, int], tmp_path: Path) -> None:
    """In the published proportions: both necks, positions in the graph, FP32 and FP16."""
    config = EncoderConfig(
        image_size=size, embed_dim=256, depth=4, num_heads=4, global_blocks=(1, 3), d_model=64, necks=("sam3", "sam2")
    )
    encoder = shared_encoder(config)
    count = sum(value.numel() for value in encoder.parameters())
    tables = sum(value.numel() for value in encoder.buffers()) * 4  # rotary, FP32; 0.15 % in the published encoder
    for precision, width in (("fp32", 4), ("fp16", 2)):
        model = traced(encoder, config).model
        lower(model, precision)  # type: ignore[arg-type]
        path = tmp_path / f"{precision}.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        onnx.checker.check_model(path, full_check=True)
        if precision == "fp32":
            check_numbers(path, encoder, size)
        written = path.stat().st_size + path.with_name(f"{path.name}.data").stat().st_size
        assert 0.9 * width * count < written < OVERHEAD * (width * count + tables)  # merged convolutions are smaller


class Evaluated(AssertionError):
    """A large weight was read."""


def test_weights_are_referred_to_and_nothing_is_printed(
    save: Save, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """No large weight is read before the file is written, so a weight changed after tracing is in the file."""
    config = tiny_config(embed_dim=144, num_heads=4)
    encoder = random_encoder(config)
    lazy_kinds = (TorchTensor, TorchsOwnTensor, ir.LazyTensor)
    real = {kind: getattr(kind, "numpy") for kind in lazy_kinds}  # noqa: B009 - for mypy

    def watched(tensor: Any) -> Any:
        if tensor.nbytes > LAZY_BYTES:
            raise Evaluated
        return real[type(tensor)](tensor)

    with monkeypatch.context() as patch:
        for kind in real:
            patch.setattr(kind, "numpy", watched)
        model = trace(DeployEncoder(encoder, encoder_signature(config, positions="none"), Rewrites()))
        low, full = model.clone(), model
        lower(low, "fp16")
        lower(full, "fp32")
        weights = [value.const_value for graph in (low.graph, full.graph) for value in graph.initializers.values()]
        large = [tensor for tensor in weights if tensor is not None and tensor.nbytes > LAZY_BYTES]
        assert len(large) > 2 * 3 * 4  # of both graphs: three and more of each block
        assert {type(tensor) for tensor in large} <= set(lazy_kinds)
        with pytest.raises(Evaluated):  # the control: the watch sees a reading
            large[0].numpy()
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    before = named_outputs(encoder, image)
    for name in ("blocks.0.attn.qkv", "blocks.3.mlp.fc1"):
        encoder.get_parameter(f"trunk.{name}.weight").mul_(1.5)
    after = named_outputs(encoder, image)
    found = run_onnx(save(full), image)
    assert worst_error(found, {name: after[name] for name in found}) < GOLDEN_TOLERANCE
    assert worst_error(found, {name: before[name] for name in found}) > GOLDEN_TOLERANCE


def test_nodes_and_weights_carry_their_modules_path() -> None:
    golden = load_golden("meta-dual")
    graph = traced(golden.encoder, golden.config, batch="2").model.graph
    by_name = {node.name: node for node in graph}
    assert by_name["trunk.blocks.2.attn/Attention"].metadata_props[export.graph.trace.MODULE] == "trunk.blocks.2.attn"
    assert {
        "trunk.patch_embed.proj/Conv",
        "trunk.ln_pre/LayerNormalization",
        "sam2_convs.3.maxpool_2x2/MaxPool",
    } <= set(by_name)
    assert {"trunk.blocks.3.mlp.fc1.bias", "trunk.patch_embed.proj.weight", "convs.0.conv_3x3.bias"} <= set(
        graph.initializers
    )
    known = {name for name, _ in golden.encoder.named_modules()} | {""}
    assert {node.metadata_props[export.graph.trace.MODULE] for node in graph} <= known
    assert all(name and not name.startswith("stamped.") for name in graph.initializers)


def test_one_attention_a_block_with_its_scale() -> None:
    golden = load_golden("meta-padded")
    for rewrites, scale in ((Rewrites(), 1.0), (Rewrites.none(), 0.25)):
        graph = traced(golden.encoder, golden.config, rewrites, batch="2").model.graph
        attentions = [node for node in graph if node.op_type == "Attention"]
        assert [node.attributes.get_float("scale") for node in attentions] == [scale] * 4
        assert [node.metadata_props[export.graph.trace.MODULE] for node in attentions] == [
            f"trunk.blocks.{index}.attn" for index in range(4)
        ]


class ForeignTrunk(nn.Module):
    """Not ours: a convolution and one attention written with chunk, which torch exports as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.channel_list = [16]
        self.patches = nn.Conv2d(3, 16, 14, 14)
        self.qkv = nn.Linear(16, 48)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patches(images)
        query, key, value = self.qkv(x.flatten(2).transpose(1, 2)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        mixed = self.attend(query, key, value).transpose(1, 2).flatten(2)
        return [x + mixed.transpose(1, 2).view_as(x)]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int]) -> None:
        """Takes any size."""


class MaskedTrunk(ForeignTrunk):
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.arange(64)[:, None] >= torch.arange(64)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class BranchingTrunk(ForeignTrunk):
    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(images if images.sum() > 0 else -images)


def foreign_encoder(trunk: nn.Module) -> Sam3DualViTDetNeck:
    torch.manual_seed(0)
    return Sam3DualViTDetNeck(trunk, PositionEmbeddingSine(8), 8).eval().requires_grad_(False)


def test_a_foreign_trunk_is_exported(save: Save) -> None:
    encoder = foreign_encoder(ForeignTrunk())
    path = check(traced(encoder, tiny_config()), save)
    image = torch.randn(1, 3, 112, 112)
    assert worst_error(run_onnx(path, image), named_outputs(encoder, image)) < GOLDEN_TOLERANCE
    assert worst_error(run_onnx(path, -image), named_outputs(encoder, image)) > GOLDEN_TOLERANCE  # the control


@pytest.mark.slow
def test_a_masked_attention_is_not_lowered_without_its_mask() -> None:
    encoder = foreign_encoder(MaskedTrunk())
    model = traced(encoder, tiny_config()).model
    with pytest.raises(ExportError, match=r"attention trunk.* has a mask"):
        lower(model, "fp32")


def test_what_cannot_be_traced_is_said_in_a_line() -> None:
    encoder = foreign_encoder(BranchingTrunk())
    with pytest.raises(ExportError, match="cannot trace the encoder: ") as caught:
        traced(encoder, tiny_config())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("version", "serves"), [("2.9.1+cu128", False), ("2.10.0a0+b4e4ee81d3.nv25.12", True)])
def test_a_torch_that_is_too_old_is_named(version: str, serves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of NVIDIA hold builds of their own, beside which pyproject's bound is not looked at."""
    config = tiny_config()
    module = DeployEncoder(shared_encoder(config), encoder_signature(config), Rewrites())
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))

    def reached(module: DeployEncoder) -> None:
        raise ZeroDivisionError("reached")

    monkeypatch.setattr(export.graph.trace, "_export", reached)
    with pytest.raises(
        ZeroDivisionError if serves else ExportError, match="reached" if serves else r"PyTorch 2\.9\.1.*2\.10"
    ):
        trace(module)
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={OLDEST_TORCH.removesuffix(".0a0")}"' in text
