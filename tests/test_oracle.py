"""A hundred exports by chance, graph and manifest, against an encoder of the tests' own in float64, tests/oracle.py"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import GOLDEN_CASES, NEWEST_OPSET, load_golden, tiny_config, worst_error
from exporting import trace_quickly
from oracle import Array, Facts, encode

import export.pipeline
import export.verification.verify
from export.contract.errors import ExportError
from export.contract.options import ExportOptions, QuantizeOptions, Rewrites
from export.contract.signature import BatchRange
from export.graph.cleanup import MODULE
from export.options import load, sign
from export.pipeline import RejectedError, export_onnx
from export.verification.fidelity import Comparison
from export.verification.verify import reference_pixels
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck

DEFINITION = 3e-6
"""Of an output's largest value: what the public implementations, in float32, differ from the definition in float64."""

SEED, COMBINATIONS, SHARES = 20261129, 100, 4

FIGURES = 0.03, 3e-6
"""Relative and absolute difference of two error figures: one has the plain module in float32, the other the oracle."""

DTYPES = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16", "fp8": "FLOAT16", "int8": "FLOAT16"}
CODES = {"fp8": "FLOAT8E4M3FN", "int8": "INT8"}
LIMITS = {"fp32": (1e-4, 0.99999), "fp16": (1e-2, 0.9995), "bf16": (5e-2, 0.998)} | dict.fromkeys(CODES, (5e-2, 0.998))
"""DESIGN's default tolerances, relative L2 and cosine; its largest differences of positions:"""
POSITIONS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": None, "fp8": 2e-3, "int8": 2e-3}
LEAVES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
NECKS = {"sam3": "convs", "sam2": "sam2_convs", "interactive": "interactive_convs", "propagation": "propagation_convs"}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_oracle_computes_what_the_public_implementations_gave(case: str) -> None:
    golden = load_golden(case)
    state = golden.encoder.state_dict()
    levels = range(len(golden.config.scale_factors))

    def error(**changes: Any) -> float:
        facts = dataclasses.replace(facts_of(golden.config), **changes)
        found = encode(state, golden.image.double().numpy(), facts, golden.config.necks, levels)
        return worst_error({name: torch.from_numpy(array.copy()) for name, array in found.items()}, golden.expected)

    assert error() < DEFINITION
    for change in ({"eps": 1e-3}, {"theta": 9000.0}, {"heads": 1}, {"global_blocks": ()}):
        assert error(**change) > 10 * DEFINITION, change  # the controls


def facts_of(config: EncoderConfig) -> Facts:
    numbers = (config.num_heads, config.window_size, config.global_blocks, config.layer_norm_eps, config.rope_theta)
    return Facts(config.grid, *numbers, tuple(config.scale_factors))


def base(**changes: Any) -> dict[str, Any]:
    return {"output": Path(), "seed": 3, **changes}


SMALL = tiny_config(image_size=56, window_size=2, depth=2, global_blocks=(1,))
SHARED = tiny_config(depth=2, global_blocks=(1,))
BASES: dict[str, dict[str, Any]] = {
    "plain": base(config=SHARED),
    "as upstream": base(config=SHARED, rewrites=Rewrites.none()),
    "padded, uint8": base(
        config=dataclasses.replace(SMALL, window_size=3, global_blocks=(0,)),
        necks="both",
        levels="0,2",
        positions="none",
        input_kind="uint8",
    ),
    "three necks": base(
        config=dataclasses.replace(SMALL, scale_factors=(4.0, 2.0, 1.0)),
        necks="all",
        levels="2",
        batch=BatchRange(1, 2, 3),
    ),
    "head": base(config=SMALL, necks="both", sam2_outputs="head", levels="0,1,2", positions="file"),
    "oblong": base(
        config=dataclasses.replace(
            SMALL,
            image_size=(70, 98),
            num_heads=4,
            rope_theta=300.0,
            layer_norm_eps=1e-3,
            mlp_ratio=2.3,
            pretrain_image_size=28,
        ),
    ),
}
"""Each is traced once, the first two as other tests trace them; three necks are of a random encoder by naming one of
SAM 3.1's."""
BASES["three necks"]["necks"] = "sam3,interactive,propagation"


KEPT = ["trunk.blocks.0", "*.attn.qkv", "*.1.mlp", "trunk.blocks.1.attn", "*_convs.*", "trunk.*.fc2", "convs.2"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination: a base and what is drawn for it."""

    number: int
    name: str
    drawn: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return BASES[self.name] | self.drawn


def draw(number: int, chance: random.Random) -> Case:
    """What the combination with this number is; every choice is drawn whether it is used or not."""
    name = chance.choice(list(BASES))
    precision = chance.choice(["fp32", "fp16", "bf16", "fp8", "int8"])
    attention = chance.choice(["auto", "auto", "fused", "unfused", "fp32acc"])
    residual = chance.choice(["auto", "auto", "fp32"])
    drawn: dict[str, Any] = {
        "precision": precision,
        "attention": "auto" if (attention, precision) == ("fp32acc", "fp32") else attention,
        "upsampling": chance.choice(["auto", "deconv", "conv"]),
        "residual": residual,
        "output_precision": chance.choice([None, None, "fp32", "fp16", "bf16"]),
        "opset": chance.choice([None, None, 23, NEWEST_OPSET]),
        "keep_fp32": tuple(chance.sample(KEPT, chance.choice([0, 0, 1, 2]))),
    }
    products = chance.choice([("all",), ("auto",), ("*.0.mlp", "*.1.attn.proj"), ("trunk.blocks.1",), ("*.attn.qkv",)])
    budget = chance.choice([0.2, 0.6] if products == ("auto",) else [None, 0.2, 0.6])
    if precision in CODES:
        drawn["quantize"] = QuantizeOptions(products, budget)
    modules = [NECKS[neck] for neck in necks_of(name)]
    levels = encoder_of(name)[1].levels
    there = {"*_convs.*": len(modules) > 1, "convs.2": "convs" in modules and 2 in levels}
    drawn["keep_fp32"] = tuple(pattern for pattern in drawn["keep_fp32"] if there.get(pattern, True))
    return Case(number, name, drawn)


@functools.cache
def encoder_of(name: str) -> tuple[Sam3DualViTDetNeck, Any]:
    options = ExportOptions(**BASES[name])
    encoder = load(options).encoder
    return encoder, sign(options, encoder)


def necks_of(name: str) -> tuple[str, ...]:
    asked = BASES[name].get("necks", "sam3")
    return ("sam3", "sam2") if asked == "both" else tuple(asked.split(","))


@functools.cache
def wanted(name: str) -> dict[str, Array]:
    """What the oracle gives for a base, on the image that the package ships."""
    encoder, signature = encoder_of(name)
    config = BASES[name]["config"]
    pixels = reference_pixels(signature, None, 2 if BASES[name].get("batch") else 1)
    images = pixels.transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1
    asked = BASES[name].get("levels", "0,1,2,3")
    levels = [int(level) for level in asked.split(",")]
    positions = BASES[name].get("positions", "graph") != "none"
    head = BASES[name].get("sam2_outputs") == "head"
    return encode(encoder.state_dict(), images, facts_of(config), necks_of(name), levels, positions, head)


@functools.cache
def cases() -> list[Case]:
    chance = random.Random(SEED)
    return [draw(number, chance) for number in range(COMBINATIONS)]


@dataclasses.dataclass(frozen=True)
class Made:
    """What an export wrote, what was judged, and what is told of it; the manifest is None where it was rejected."""

    rows: list[Comparison]
    outputs: list[np.ndarray]
    graph: ir.Graph
    manifest: dict[str, Any] | None


Make = Callable[[Case], Made | None]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Exports a case; None where it is refused because no product is left to quantize."""
    kept: dict[str, Any] = {}

    def keep(*arguments: Any, **named: Any) -> ir.Model:
        kept["model"] = write(*arguments, **named)
        return kept["model"]

    def run(model: ir.Model, folder: Path, image: np.ndarray) -> list[np.ndarray]:
        kept["outputs"] = compute(model, folder, image)
        return kept["outputs"]

    write, compute = export.pipeline.write_lowered, export.verification.verify.run_model
    monkeypatch.setattr(export.pipeline, "write_lowered", keep)
    monkeypatch.setattr(export.verification.verify, "run_model", run)
    trace_quickly(monkeypatch)

    def make(case: Case) -> Made | None:
        kept.clear()
        output = tmp_path / f"{case.number}.onnx"
        try:
            result = export_onnx(ExportOptions(**case.options | {"output": output}))
        except RejectedError as error:
            return Made(list(error.verdict.comparisons), kept["outputs"], kept["model"].graph, None)
        except ExportError:
            assert case.drawn["precision"] in CODES and not to_quantize(case), case
            return None
        assert result.verdict is not None
        return Made(list(result.verdict.comparisons), kept["outputs"], ir.load(output).graph, result.manifest)

    return make


@pytest.mark.parametrize("share", [0, *(pytest.param(share, marks=pytest.mark.slow) for share in range(1, SHARES))])
def test_exports_by_chance(share: int, make: Make) -> None:
    """What is quantized, every type and island, the outputs' contract, and every error figure of the manifest."""
    for case in cases()[share::SHARES]:
        if (made := make(case)) is not None:
            try:
                check_errors(case, made)
                check_graph(case, made)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error


def test_the_comparison_sees_what_is_wrong(make: Make) -> None:
    """The controls: one output a thousandth larger, one product more in FP32 or not quantized, one untrue figure."""
    drawn = {
        "precision": "int8",
        "attention": "auto",
        "upsampling": "auto",
        "residual": "auto",
        "output_precision": None,
    }
    case = Case(0, "plain", drawn | {"opset": None, "keep_fp32": (), "quantize": QuantizeOptions(("all",), 0.6)})
    made = make(case)
    assert made is not None and made.manifest is not None
    check_errors(case, made)
    check_graph(case, made)
    wrong = [array * 1.05 if place == 1 else array for place, array in enumerate(made.outputs)]
    rows = [dataclasses.replace(row, max_abs=row.max_abs * 1.1) for row in made.rows]
    quantization = made.manifest["quantization"]
    fewer = dict(list(quantization["products"].items())[1:])
    for other in (dataclasses.replace(made, outputs=wrong), dataclasses.replace(made, rows=rows)):
        with pytest.raises(AssertionError):
            check_errors(case, other)
    for changes in ({"keep_fp32": ("*.fc2",)}, {"quantize": QuantizeOptions(("*.mlp",), 0.6)}, {"precision": "fp8"}):
        with pytest.raises(AssertionError):
            check_graph(Case(0, "plain", case.drawn | changes), made)
    for said in ({"quantization": quantization | {"products": fewer}}, {"precision": "fp8"}, {"residual": "fp32"}):
        with pytest.raises(AssertionError):
            check_graph(case, dataclasses.replace(made, manifest=made.manifest | said))


def base_precision(case: Case) -> tuple[str, str]:
    """The precision, and the one whose type the outputs have."""
    precision = case.drawn["precision"]
    return precision, case.drawn["output_precision"] or precision


def is_feature(name: str) -> bool:
    return "_pos_" not in name


def tolerance_of(case: Case, name: str) -> tuple[float, float, float | None]:
    """Relative L2, cosine and largest difference that an output may have, by DESIGN and the options."""
    both = base_precision(case)
    relative, cosine = max(LIMITS[one][0] for one in both), min(LIMITS[one][1] for one in both)
    budget = case.drawn["quantize"].budget if "quantize" in case.drawn else None
    if budget is not None and is_feature(name):
        relative, cosine = budget, min(cosine, 1 - budget**2)
    limits = [POSITIONS[one] for one in both]
    largest = None if is_feature(name) or None in limits else max(limit for limit in limits if limit is not None)
    return relative, cosine, largest


def check_errors(case: Case, made: Made) -> None:
    """The verdict's figures and tolerances against what the oracle says of the very outputs that were judged."""
    want, rows, outputs, manifest = wanted(case.name), made.rows, made.outputs, made.manifest
    assert sorted(row.name for row in rows) == sorted(want)
    in_graph = [name for name in want if is_feature(name) or BASES[case.name].get("positions", "graph") == "graph"]
    assert len(outputs) == len(in_graph)
    found = dict(zip(in_graph, outputs, strict=True))
    clear, inside = True, True
    for row in rows:
        tolerance = tolerance_of(case, row.name)
        assert (row.tolerance.relative_l2, row.tolerance.cosine, row.tolerance.max_abs) == tolerance, row
        if row.name in found:
            exact, given = want[row.name], found[row.name].astype(np.float64)
            relative = float(np.linalg.norm(given - exact) / np.linalg.norm(exact))
            largest = float(np.abs(given - exact).max())
            cosine = float((given * exact).sum() / np.linalg.norm(given) / np.linalg.norm(exact))
            mean = float(np.abs(given - exact).mean())
            size = float(np.abs(exact).max())
            assert row.relative_l2 == pytest.approx(relative, rel=FIGURES[0], abs=FIGURES[1]), row
            assert row.max_abs == pytest.approx(largest, rel=FIGURES[0], abs=FIGURES[1] * size), row
            assert row.mean_abs == pytest.approx(mean, rel=FIGURES[0], abs=FIGURES[1] * size), row
            assert row.cosine == pytest.approx(cosine, abs=FIGURES[0] * (1 - cosine) + FIGURES[1]), row
            assert row.non_finite == 0
            clear &= abs(relative / tolerance[0] - 1) > FIGURES[0]
            inside &= relative <= tolerance[0] and cosine >= tolerance[1]
            inside &= tolerance[2] is None or largest <= tolerance[2]
    if clear:
        assert inside == all(row.passed for row in rows)
    if manifest is None:
        assert not all(row.passed for row in rows)
        return
    assert manifest["verification"]["verified"] is True
    assert manifest["verification"]["outputs"] == [row.to_dict() for row in rows]


def named(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, one) or fnmatch.fnmatchcase(path, f"{one}.*") for one in patterns)


def products_of(case: Case) -> list[str]:
    return [f"trunk.blocks.{block}.{leaf}" for block in range(BASES[case.name]["config"].depth) for leaf in LEAVES]


def to_quantize(case: Case) -> set[str]:
    """The products that are asked for and not kept in FP32; with `auto` the file may have fewer."""
    if "quantize" not in case.drawn:
        return set()
    patterns = case.drawn["quantize"].products
    asked = [name for name in products_of(case) if patterns in (("all",), ("auto",)) or named(name, patterns)]
    return {name for name in asked if not named(name, case.drawn["keep_fp32"])}


def producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def dtype_of(value: ir.Value | None) -> str:
    assert value is not None and value.dtype is not None
    return value.dtype.name


def form_of(case: Case) -> str:
    """What of attention is FP32, as the option's help and DESIGN have it."""
    precision, asked = case.drawn["precision"], case.drawn["attention"]
    if precision == "fp32":
        return "fused"
    return {"bf16": "fused"}.get(precision, "fp32acc") if asked == "auto" else asked


def check_graph(case: Case, made: Made) -> None:
    """Contract, quantized products, types and islands of a written graph, and what the manifest says of them."""
    graph, manifest = made.graph, made.manifest
    precision, of_outputs = base_precision(case)
    low, kept_patterns = DTYPES[precision], case.drawn["keep_fp32"]
    want = wanted(case.name)
    in_graph = [name for name in want if is_feature(name) or BASES[case.name].get("positions", "graph") == "graph"]
    assert [value.name for value in graph.outputs] == in_graph
    batch = BASES[case.name].get("batch") is not None
    for value in graph.outputs:
        assert dtype_of(value) == DTYPES[of_outputs]
        shape = [side if isinstance(side, int) else "batch" for side in value.shape or ()]
        assert shape == ["batch" if batch else 1, *want[str(value.name)].shape[1:]], value

    def module(node: ir.Node) -> str:
        return node.metadata_props.get(MODULE, "")

    def kept(node: ir.Node) -> bool:
        return precision == "fp32" or named(module(node), kept_patterns)

    quantized = set()
    for name in products_of(case):
        (node,) = [
            one
            for one in graph
            if one.op_type == "MatMul" and module(one) == name and not str(one.name).endswith(("/scores", "/mixed"))
        ]
        reads = [producer(value) for value in node.inputs]
        if all(one is not None and one.op_type == "DequantizeLinear" for one in reads):
            quantized.add(name)
            codes = [one.inputs[0] for one in reads if one is not None]
            assert {dtype_of(value) for value in codes} == {CODES[precision]}
            quantize = producer(codes[0])
            assert (
                quantize is not None
                and quantize.op_type == "QuantizeLinear"
                and codes[1] in graph.initializers.values()
            )
        assert dtype_of(node.outputs[0]) == ("FLOAT" if kept(node) else low), name
    auto = "quantize" in case.drawn and case.drawn["quantize"].products == ("auto",)
    assert quantized <= to_quantize(case) if auto else quantized == to_quantize(case)
    assert bool(quantized) == (precision in CODES)
    stored = [value for value in graph.initializers.values() if dtype_of(value) in CODES.values() and value.shape]
    assert len(stored) == len(quantized)

    residual = manifest["residual"] if manifest else "unknown"
    form, sums = form_of(case), list[str]()
    attended, eight = set(), set[str]()
    for node in graph:
        path, kind, dtype = module(node), node.op_type, dtype_of(node.outputs[0])
        if dtype not in ("FLOAT", "FLOAT16", "BFLOAT16") or kind == "Cast":
            continue
        if kind in ("Conv", "ConvTranspose"):
            assert dtype == ("FLOAT" if kept(node) else low), node
        elif kind == "LayerNormalization":
            assert {dtype, *map(dtype_of, node.inputs)} == {"FLOAT"}, node
        elif kind in ("Softmax", "Attention"):
            attended.add(path)
            island = kept(node) or form != "fused"
            inside = dtype_of(node.inputs[0]) if kind == "Attention" else dtype
            assert inside == ("FLOAT" if island else low), node
            if kind == "Softmax" and is_eight(node):
                assert precision == "fp8" and form == "fp32acc" and not kept(node), node
                eight.add(f"{path}.attention")
            elif kind == "Softmax":
                scores, mixed = scores_and_mixed(node)
                exact = ("unfused",) if scores else ()
                assert dtype_of(scores.outputs[0]) == ("FLOAT" if kept(node) or form in exact else low), node
                assert dtype_of(mixed.outputs[0]) == ("FLOAT" if kept(node) or form == "fp32acc" else low), node
        elif kind == "Add" and path.startswith("trunk.blocks.") and path.count(".") == 2:
            sums.append(dtype)
        elif dtype == "FLOAT" and not kept(node):
            allowed = path.endswith(".rope") or path == "input" or in_attention(node, path, form)
            allowed |= residual in ("fp32", "unknown") and in_stream(node, path)
            assert allowed, f"{node.name} is an island that nobody asked for"
    depth = BASES[case.name]["config"].depth
    assert attended == {f"trunk.blocks.{block}.attn" for block in range(depth)}
    blocks = [named(f"trunk.blocks.{block}", kept_patterns) for block in range(depth)]
    plain = ["FLOAT" if precision == "fp32" or blocks[index // 2] else low for index in range(2 * depth)]
    stream = ["FLOAT", "FLOAT", plain[2], "FLOAT"]  # the sum that reads the first block's result is stored low
    assert sums in ([stream] if residual == "fp32" else [plain, stream] if residual == "unknown" else [plain])
    if manifest is None:
        return
    if case.drawn["residual"] == "fp32":
        assert residual == "fp32"
    elif residual == "fp32":
        assert precision == "fp16" and any("tolerance" in note for note in manifest["notes"])
    assert manifest["precision"] == precision
    assert manifest["keep_fp32"] == list(kept_patterns)
    assert [(spec["name"], spec["dtype"].upper()) for spec in manifest["signature"]["outputs"]] == [
        (name, DTYPES[of_outputs].replace("FLOAT", "FLOAT32") if of_outputs == "fp32" else DTYPES[of_outputs])
        for name in in_graph
    ]
    facts = manifest.get("quantization")
    assert (set(facts["products"]) if facts else set()) == quantized
    assert set(facts.get("attentions", {}) if facts else ()) == eight <= eight_asked(case)
    assert not facts or case.drawn["quantize"].products == ("auto",) or eight == eight_asked(case)
    if facts:
        assert facts["of"] == len(products_of(case)) and facts["kind"] == precision and not facts["left_out"]
        assert facts["asked"] == list(case.drawn["quantize"].products)
    assert manifest["graph"]["nodes"] == len(graph)


def is_eight(softmax: ir.Node) -> bool:
    """Whether a Softmax is part of an FP8 attention: both products multiply codes, its result times 448 among them."""
    users = [user for user, _ in softmax.outputs[0].uses()]
    while [user.op_type for user in users] == ["Cast"]:
        users = [user for user, _ in users[0].outputs[0].uses()]
    if [user.op_type for user in users] != ["QuantizeLinear"]:
        return False
    scale = users[0].inputs[1]
    assert scale is not None and scale.const_value is not None
    assert float(scale.const_value.numpy()) == float(np.float16(1 / 448))
    (softmaxs,) = [user for user, _ in users[0].outputs[0].uses()]
    (mixed,) = [user for user, _ in softmaxs.outputs[0].uses()]
    before = producer(softmax.inputs[0])
    while before is not None and before.op_type == "Cast":
        before = producer(before.inputs[0])
    assert before is not None and before.op_type == mixed.op_type == "MatMul"
    for value in (*before.inputs, *mixed.inputs):
        read = producer(value)
        while read is not None and read.op_type in ("Transpose", "Reshape"):
            read = producer(read.inputs[0])
        assert read is not None and read.op_type == "DequantizeLinear" and dtype_of(read.inputs[0]) == CODES["fp8"]
    return True


def eight_asked(case: Case) -> set[str]:
    """The attentions that may be FP8: named, not kept in FP32, and of the form that FP8 attention has."""
    if case.drawn["precision"] != "fp8" or form_of(case) != "fp32acc":
        return set()
    patterns = case.drawn["quantize"].products
    depth = BASES[case.name]["config"].depth
    every = [f"trunk.blocks.{block}.attn.attention" for block in range(depth)]
    asked = {name for name in every if patterns in (("all",), ("auto",)) or named(name, patterns)}
    return {name for name in asked if not named(name, case.drawn["keep_fp32"])}


def scores_and_mixed(softmax: ir.Node) -> tuple[ir.Node, ir.Node]:
    """The products before and after a Softmax, past Casts."""
    before = producer(softmax.inputs[0])
    while before is not None and before.op_type == "Cast":
        before = producer(before.inputs[0])
    (after,) = [user for user, _ in softmax.outputs[0].uses()]
    while after.op_type == "Cast":
        (after,) = [user for user, _ in after.outputs[0].uses()]
    assert before is not None and before.op_type == after.op_type == "MatMul"
    return before, after


def in_attention(node: ir.Node, path: str, form: str) -> bool:
    """Whether a node belongs to what a form has in FP32: products around the Softmax, and scaling of theirs."""
    if not path.endswith(".attn") or form == "fused":
        return False
    return node.op_type == "MatMul" or (form == "unfused" and node.op_type in ("Transpose", "Mul"))


def in_stream(node: ir.Node, path: str) -> bool:
    """What `--residual fp32` has in FP32 besides the sums: biases and GELU behind products, and the position's sum."""
    leaf = path.split(".", 3)[-1]
    if path.startswith("trunk.blocks."):
        return (node.op_type, leaf) in {("Add", leaf) for leaf in LEAVES[1:]} or (node.op_type, leaf) == ("Gelu", "mlp")
    return node.op_type == "Add" and path == "trunk"
