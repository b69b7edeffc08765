"""What an FP8 or INT8 file says of its products is what its graph has; what it is chosen by belongs to this encoder."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from conftest import load_golden, tiny_config, traced
from exporting import golden_options, neck_export_cli, trace_quickly
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.bisect import Search
from export.contract.errors import ExportError
from export.contract.manifest import ManifestError, data_path, manifest_path, read_manifest, write_manifest
from export.contract.options import QuantizeOptions, Rewrites
from export.contract.signature import Signature, encoder_signature
from export.inspect import inspect_onnx, quantized_products, summary_lines
from export.lowering.attention import find_attentions
from export.lowering.precision import lower
from export.lowering.relower import relower
from export.options import check_options
from export.pipeline import RejectedError, export_onnx, verify_file
from export.quantization.calibration import METADATA, CalibrationError, calibrate, read_calibration, save_calibration
from export.quantization.select_quantization import QuantizationPlan, record_path, select_quantization
from export.verification.fidelity import TOLERANCES
from export.verification.verify import References, reference_pixels
from neck.checkpoint import random_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck

SMALL: dict[str, Any] = {"necks": "sam3", "positions": "none"}
LEAVES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ALL = [f"trunk.blocks.{block}.{leaf}" for block in range(4) for leaf in LEAVES]


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


@pytest.mark.parametrize(("kind", "asked"), [("fp8", ("auto",)), ("int8", ("all",))])
def test_what_stays_in_fp32_is_neither_quantized_nor_counted(kind: str, asked: tuple[str, ...], tmp_path: Path) -> None:
    kept = ("trunk.blocks.2", "trunk.blocks.0.attn.qkv", "*.3.mlp.fc1")
    quantize = QuantizeOptions(asked, budget=0.3, calibration=tmp_path / "c.safetensors")
    options = golden_options("meta-dual", tmp_path / "a.onnx", precision=kind, keep_fp32=kept, quantize=quantize)
    result = export_onnx(dataclasses.replace(options, **SMALL))
    graph = ir.load(result.path).graph
    there = [name for name in ALL if not name.startswith("trunk.blocks.2.")]
    there = [name for name in there if name not in ("trunk.blocks.0.attn.qkv", "trunk.blocks.3.mlp.fc1")]
    assert sorted(quantized_products(graph)) == sorted(there) == sorted(result.manifest["quantization"]["products"])
    assert f"{len(there)} of 16 linear layers" in "\n".join(summary_lines(inspect_onnx(result.path)))
    names = list(there)
    if kind == "fp8":  # attentions and results of fc1, too
        names += [f"trunk.blocks.{block}.attn.attention" for block in (0, 1, 3)]
        names += [f"trunk.blocks.{block}.mlp.fc1.result" for block in (0, 1)]
        assert len(result.manifest["quantization"]["attentions"]) == 3
        assert len(result.manifest["quantization"]["results"]) == 2
    if asked == ("auto",):
        tried = json.loads(record_path(tmp_path / "c.safetensors", kind).read_text())["rows"]
        assert list(tried) == [f"together: {' '.join(sorted(names))}"]
        assert [row["products"] for row in result.manifest["quantization"]["curve"]][-1] == len(names)


@pytest.mark.parametrize("kept", [("trunk",), ("trunk.blocks.*",), ("*.attn", "*.mlp")])
def test_a_file_without_a_product_to_quantize_is_refused(kept: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--keep-fp32"):
        export_onnx(golden_options("meta-dual", tmp_path / "a.onnx", precision="int8", keep_fp32=kept, verify=False))
    assert not list(tmp_path.iterdir())


def test_a_pattern_that_names_no_module_is_refused_before_the_calibration(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(ExportError, match=r"trunk\.blocks\.9"):
        export_onnx(
            golden_options("meta-dual", tmp_path / "a.onnx", precision="int8", keep_fp32=("trunk.blocks.9",)),
            told.append,
        )
    assert told and not any("calibration" in line for line in told)


@pytest.mark.parametrize("rewrite", [True, False])
def test_the_names_of_quantize_serve_keep_fp32(rewrite: bool, tmp_path: Path) -> None:
    """One leaf of each block: a name that kept more, or another's leaf, would be seen."""
    names = [f"trunk.blocks.{block}.{leaf}" for block, leaf in enumerate(LEAVES)]
    words = ["onnx", "--checkpoint", "random", "--config", Path(__file__).parent / "data/meta-dual/encoder.json"]
    words += [word for name in names for word in ("--keep-fp32", name)]
    words += ["--precision", "fp16", "--no-verify", "--positions", "none"]
    ran = neck_export_cli(*words, *([] if rewrite else ["--no-rewrite"]), "--output", tmp_path / "a.onnx")
    assert ran.code == 0, ran.err
    types = {}
    for node in ir.load(tmp_path / "a.onnx").graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            types[str(weight.name).removesuffix(".float16").removesuffix(".weight")] = str(node.outputs[0].dtype)
    assert [one for one, dtype in types.items() if dtype == "FLOAT"] == names
    assert len(types) == 16


HEAD: dict[str, Any] = {"necks": "sam2", "positions": "none", "sam2_outputs": "head"}


@functools.cache
def head_signature(levels: str = "0,1,2") -> Signature:
    config = tiny_config(necks=("sam2",), sam2_head=True, image_size=56)
    return encoder_signature(config, necks="sam2", levels=levels, positions="none", sam2_outputs="head")


def test_the_signature_tells_the_features() -> None:
    assert head_signature().features == ("sam2_high_res_0", "sam2_high_res_1", "sam2_feat_2")
    both = encoder_signature(tiny_config(necks=("sam3", "sam2")), necks="both", levels="2")
    assert both.features == ("sam3_feat_2", "sam2_feat_2")


def head_export(output: Path, **changes: Any) -> dict[str, Any]:
    quantize = QuantizeOptions(changes.pop("products", ("all",)), changes.pop("budget", None))
    values = {**HEAD, "precision": "fp8", "quantize": quantize, **changes}
    return export_onnx(golden_options("hf-tracker", output, **values)).manifest


def test_a_budget_holds_for_the_outputs_of_a_head(tmp_path: Path) -> None:
    wide = head_export(tmp_path / "a.onnx", budget=0.4, levels="0,1")["verification"]["outputs"]
    assert [row["name"] for row in wide] == list(head_signature("0,1").features)
    assert {row["tolerance"]["relative_l2"] for row in wide} == {0.4}
    worst = max(wide, key=lambda row: row["relative_l2"])
    assert "high_res" in worst["name"] and worst["relative_l2"] > 0.01
    with pytest.raises(RejectedError) as caught:
        head_export(tmp_path / "b.onnx", budget=0.01, levels="0,1")
    assert worst["name"] in caught.value.verdict.failed_names
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize(("kind", "budget"), [("fp8", 0.3), ("int8", None)])
def test_a_head_without_level_2_is_quantized(kind: str, budget: float | None, tmp_path: Path) -> None:
    changes = {"levels": "0,1", "precision": kind, "products": ("auto",), "budget": budget}
    manifest = head_export(tmp_path / "a.onnx", **changes)
    assert [row["name"] for row in manifest["verification"]["outputs"]] == ["sam2_high_res_0", "sam2_high_res_1"]
    assert manifest["quantization"]["products"]


TINY = tiny_config(image_size=56, depth=2, global_blocks=(1,))


def selected(encoder: Sam3DualViTDetNeck, config: EncoderConfig, path: Path | None, **changes: Any) -> QuantizationPlan:
    """Settles a tiny encoder; `notes` of the changes takes what is told."""
    signature = encoder_signature(config, levels="2", positions="none")
    notes = changes.pop("notes", [])
    options = QuantizeOptions(changes.pop("products", ("auto",)), 0.5, path)
    return select_quantization(References(encoder), signature, changes.pop("kind", "int8"), options, notes)


OTHERS: dict[str, dict[str, Any]] = {
    "window": {"window_size": 2},
    "global blocks": {"global_blocks": ()},
    "heads": {"num_heads": 4},
    "theta": {"rope_theta": 100.0},
    "eps": {"layer_norm_eps": 1e-2},
}


@pytest.fixture(scope="module")
def settled_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The calibration and the record of TINY, to be left as they are, and what was chosen by them."""
    path = tmp_path_factory.mktemp("settled") / "c.safetensors"
    return path, selected(random_encoder(TINY), TINY, path).facts


@pytest.fixture
def settled(settled_once: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of that calibration, the record beside it."""
    return shutil.copytree(settled_once[0].parent, tmp_path / "settled") / settled_once[0].name


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_figures_of_another_architecture_are_not_used(change: dict[str, Any], settled: Path, tmp_path: Path) -> None:
    """The weights are the same to the bit; the calibration and the trials are made again, and it is told."""
    path, notes = settled, list[str]()
    config = dataclasses.replace(TINY, **change)
    fresh = selected(random_encoder(config), config, None)
    again = selected(random_encoder(config), config, path, notes=notes)
    assert again.facts["products"] == fresh.facts["products"] and again.facts["curve"] == fresh.facts["curve"]
    assert len([note for note in notes if str(path) in note]) == 1
    assert len([note for note in notes if str(record_path(path, "int8")) in note]) == 1
    quiet: list[str] = []
    selected(random_encoder(config), config, path, notes=quiet)  # the control: now they are this encoder's
    assert not [note for note in quiet if str(tmp_path) in note]


def test_trials_of_another_neck_are_not_used(settled: Path) -> None:
    """The calibration is the trunk's, so it stays."""
    path, notes = settled, list[str]()
    encoder = random_encoder(TINY)
    encoder.get_submodule("convs.2.conv_1x1").weight.data[1:] = 0  # type: ignore[union-attr]
    again = selected(encoder, TINY, path, notes=notes)
    assert again.facts["curve"] == selected(encoder, TINY, None).facts["curve"]
    assert [str(record_path(path, "int8")) in note for note in notes] == [True]


def dead(encoder: Sam3DualViTDetNeck) -> None:
    """No token reaches the second product of the first MLP's; the other products have weights that are zero or tiny."""
    for leaf in ("weight", "bias"):
        encoder.get_parameter(f"trunk.blocks.0.mlp.fc1.{leaf}").data.zero_()
    encoder.get_parameter("trunk.blocks.1.attn.proj.weight").data *= 1e-5


@pytest.mark.parametrize(("kind", "products"), [("fp8", ("auto",)), ("int8", ("all",))])
def test_products_that_cannot_be_quantized_are_left_out_and_named(kind: str, products: tuple[str, ...]) -> None:
    encoder, notes = random_encoder(TINY), list[str]()
    dead(encoder)
    found = selected(encoder, TINY, None, kind=kind, products=products, notes=notes)
    left = {"trunk.blocks.0.mlp.fc1", "trunk.blocks.0.mlp.fc2", "trunk.blocks.1.attn.proj"}
    assert set(found.facts["left_out"]) == left
    assert set(found.quantization.scales) == set(found.facts["products"]) == set(ALL[:8]) - left
    assert all(sum(name in note for note in notes) == 1 for name in left)
    assert not selected(random_encoder(TINY), TINY, None, kind=kind, products=products).facts["left_out"]


def test_where_no_product_can_be_quantized_it_is_refused() -> None:
    encoder = random_encoder(TINY)
    dead(encoder)
    with pytest.raises(ExportError, match=r"trunk\.blocks\.0\.mlp\.fc1"):
        selected(encoder, TINY, None, products=("trunk.blocks.0.mlp",))


def test_a_left_out_product_is_in_no_count_of_the_file(tmp_path: Path) -> None:
    """From end to end: a checkpoint whose product has tiny weights."""
    from exporting import PREFIX, save_state

    def shrink(state: dict[str, Tensor]) -> None:
        state[f"{PREFIX}trunk.blocks.1.attn.proj.weight"] *= 1e-6

    weights = save_state(tmp_path / "w.pt", shrink)
    options = golden_options("meta-dual", tmp_path / "a.onnx", precision="int8", checkpoint=weights)
    result = export_onnx(dataclasses.replace(options, **SMALL, quantize=QuantizeOptions(("all",))))
    assert set(ALL) - set(quantized_products(ir.load(result.path).graph)) == {"trunk.blocks.1.attn.proj"}
    assert len(result.manifest["quantization"]["products"]) == 15
    assert any("trunk.blocks.1.attn.proj" in note for note in result.manifest["notes"])


Damage = Callable[[dict[str, Tensor], dict[str, Any]], None]
NAME = "trunk.blocks.1.mlp.fc1"


def fill(field: str, value: float) -> Damage:
    def damage(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors[f"{NAME}.{field}"][0] = value

    return damage


def put(field: str, make: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        tensors[f"{NAME}.{field}"] = make(tensors[f"{NAME}.{field}"]).contiguous()

    return damage


def drop(*names: str) -> Damage:
    def damage(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return damage


DAMAGES: dict[str, Damage] = {
    "rows of NaN": fill("rows", float("nan")),
    "infinite channel": fill("channels", float("inf")),
    "no weight": fill("weights", 0.0),
    "negative weight": fill("weights", -1.0),
    "channel too small": fill("channels", 0.0),
    "no tokens": put("rows", lambda rows: rows[:0]),
    "tokens without weights": put("weights", lambda weights: weights[:-1]),
    "too few channels": put("rows", lambda rows: rows[:, 1:]),
    "one dimension": put("rows", torch.flatten),
    "a number": put("channels", lambda channels: channels[0]),
    "integers": put("rows", lambda rows: rows.to(torch.int32)),
    "half": put("rows", torch.Tensor.half),
    "missing layer": drop(f"{NAME}.rows", f"{NAME}.weights", f"{NAME}.channels"),
    "missing field": drop(f"{NAME}.weights"),
    "images in words": lambda tensors, about: about.update(images="8"),
    "no images": lambda tensors, about: about.update(images=0),
}


@functools.cache
def kept_calibration() -> Any:
    signature = encoder_signature(TINY, levels="2", positions="none")
    return calibrate(random_encoder(TINY), reference_pixels(signature, None, 2))


def rewritten(path: Path, damage: Damage) -> None:
    from safetensors import safe_open

    save_calibration(path, kept_calibration())
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[METADATA])
    tensors = load_file(path)
    damage(tensors, about)
    save_file(tensors, path, {METADATA: json.dumps(about)})


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_calibration_is_one_error(damage: Damage, tmp_path: Path) -> None:
    path, encoder = tmp_path / "c.safetensors", random_encoder(TINY)
    rewritten(path, lambda tensors, about: None)
    read_calibration(path, encoder, (56, 56))  # the control
    rewritten(path, damage)
    before = path.read_bytes()
    with pytest.raises(CalibrationError) as caught:
        selected(encoder, TINY, path)
    assert str(path) in str(caught.value) and "--calibration" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": 1, "rows": {}}', '{"rows": {"a": [1]}, "key": {}}'])
def test_a_damaged_record_is_measured_again_and_told(
    text: str, settled_once: tuple[Path, dict[str, Any]], settled: Path
) -> None:
    path, notes = settled, list[str]()
    record_path(path, "int8").write_text(text)
    again = selected(random_encoder(TINY), TINY, path, notes=notes)
    assert again.facts == {**settled_once[1], "calibration": str(path)}
    assert [str(record_path(path, "int8")) in note for note in notes] == [True]
    assert json.loads(record_path(path, "int8").read_text())["rows"]


def test_bisect_judges_by_the_files_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = QuantizeOptions(("all",), budget=0.3)
    result = export_onnx(golden_options("meta-dual", tmp_path / "a.onnx", precision="fp8", quantize=quantize, **SMALL))
    assert max(row["relative_l2"] for row in result.manifest["verification"]["outputs"]) > 0.05
    ran = neck_export_cli("bisect", result.path)
    assert "block and output is within tolerance" in ran.out, ran.err
    monkeypatch.setattr(Search, "_mended", lambda search, figures: True)  # what mends is test_bisect.py's
    manifest = read_manifest(manifest_path(result.path), "onnx")
    manifest["quantization"]["budget"] = 0.05  # the control
    manifest_path(result.path).write_text(json.dumps(manifest))
    assert "first module outside tolerance: trunk.blocks." in neck_export_cli("bisect", result.path).out
    given = ("--tolerance", "*=0.3", "--tolerance", "sam3_feat_2=1e-4")
    assert "first module outside tolerance: convs.2" in neck_export_cli("bisect", result.path, *given).out


def test_meta_dual_has_these_products() -> None:
    """What ALL says of the golden encoder."""
    golden = load_golden("meta-dual")
    names = {name for name, module in golden.encoder.named_modules() if isinstance(module, torch.nn.Linear)}
    assert names == set(ALL)
    assert traced(golden.encoder, golden.config, necks="sam3", positions="none").model.graph


# --- files, JSON, verdicts and types: the rest of what is said


@pytest.mark.parametrize(
    ("output", "calibration", "positions"),
    [("c.fp8.onnx", "c.safetensors", "none"), ("d.onnx", "d.positions.safetensors", "file")],
)
@pytest.mark.parametrize("folder", ["", "link/"])
def test_files_of_one_command_that_collide_are_refused_before_any_work(
    output: str, calibration: str, positions: str, folder: str, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    told: list[str] = []
    quantize = QuantizeOptions(calibration=tmp_path / folder / calibration)
    changes = {"precision": "fp8", "positions": positions, "quantize": quantize}
    with pytest.raises(ExportError, match=re.escape(str(tmp_path))):
        export_onnx(golden_options("meta-dual", tmp_path / output, **changes), told.append)
    assert not told and [path.name for path in tmp_path.iterdir()] == ["link"]
    check_options(golden_options("meta-dual", tmp_path / f"other-{output}", **changes))  # the control


def test_a_calibration_takes_no_others_place(tmp_path: Path) -> None:
    weights, mine = tmp_path / "w.safetensors", tmp_path / "c.int8.json"
    save_file({"a": torch.zeros(1)}, weights)
    mine.write_text('{"kind": "onnx", "format": 1}')
    for calibration, subject in ((weights, "w.safetensors"), (tmp_path / "c.safetensors", "c.int8.json")):
        options = golden_options("meta-dual", tmp_path / "a.onnx", precision="int8", checkpoint=weights)
        with pytest.raises(ExportError, match=subject):
            check_options(dataclasses.replace(options, quantize=QuantizeOptions(calibration=calibration)))
    mine.write_text('{"key": {}, "rows": {}}')  # the control: a record
    check_options(dataclasses.replace(options, quantize=QuantizeOptions(calibration=tmp_path / "c.safetensors")))


def test_an_export_removes_only_what_its_manifest_names(tmp_path: Path) -> None:
    mine = tmp_path / "a.positions.safetensors"
    mine.write_bytes(b"mine")
    export_onnx(golden_options("meta-dual", tmp_path / "a.onnx", verify=False))
    assert mine.read_bytes() == b"mine"


def test_a_saved_reference_takes_no_files_place(tmp_path: Path) -> None:
    export_onnx(golden_options("meta-dual", tmp_path / "a.onnx", verify=False, **{**SMALL, "positions": "file"}))
    before = (tmp_path / "a.positions.safetensors").read_bytes()
    with pytest.raises(ExportError, match=r"a\.positions\.safetensors"):
        verify_file(tmp_path / "a.onnx", save=tmp_path / "a.positions.safetensors")
    assert (tmp_path / "a.positions.safetensors").read_bytes() == before


def test_manifests_are_strict_json(tmp_path: Path) -> None:
    values = {"a": [1.5, float("nan"), {"b": -float("inf")}], "c": (1, None, "NaN")}
    content = write_manifest(tmp_path / "x.json", "onnx", values, [])
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == content
    assert content["a"] == [1.5, None, {"b": None}] and content["c"] == [1, None, "NaN"]
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        (tmp_path / "y.json").write_text(text.replace("1.5", number))
        with pytest.raises(ManifestError, match=r"y\.json"):
            read_manifest(tmp_path / "y.json", "onnx")
    read_manifest(tmp_path / "x.json", "onnx")  # the control


def test_inspect_repeats_a_verdict_only_for_bytes_that_it_knows(tmp_path: Path) -> None:
    result = export_onnx(golden_options("meta-dual", tmp_path / "a.onnx", precision="fp16", **SMALL))

    def told(*options: str) -> tuple[bool, str]:
        ran = neck_export_cli("inspect", result.path, *options)
        found = json.loads(neck_export_cli("inspect", result.path, *options, "--json").out)["manifest"]
        return bool(found and found["verification"]["verified"]), ran.out

    assert told()[0] and "relative L2" in told()[1]
    data = data_path(result.path)
    weights = bytearray(data.read_bytes())
    sound = bytes(weights)
    weights[100] ^= 64
    data.write_bytes(weights)
    assert not told()[0] and "relative L2" not in told()[1]
    assert not told("--check")[0]
    data.write_bytes(sound)  # the bytes of then, at another time
    assert not told()[0] and told("--check")[0] and "relative L2" in told("--check")[1]
    verify_file(result.path)
    assert told()[0]


@pytest.mark.parametrize(("precision", "outputs"), [("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "fp32")])
def test_the_tolerance_follows_the_outputs_type(precision: str, outputs: str, tmp_path: Path) -> None:
    options = golden_options("meta-dual", tmp_path / "a.onnx", precision=precision, output_precision=outputs)
    result = export_onnx(dataclasses.replace(options, **SMALL))
    assert result.verdict is not None and result.verdict.passed
    wider = TOLERANCES[max(precision, outputs, key=lambda one: TOLERANCES[one].relative_l2)]
    assert result.verdict.comparisons[0].tolerance == wider
    assert verify_file(result.path).passed


@pytest.mark.parametrize(
    ("field", "value"),
    [("output_precision", "int8"), ("output_precision", "fp8"), ("precision", "fp64"), ("positions", "x")],
)
def test_a_value_that_a_field_does_not_have_is_refused(field: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"{field} is '{value}'"):
        check_options(golden_options("meta-dual", tmp_path / "a.onnx", **{field: value}))
    golden = load_golden("meta-dual")
    if field == "output_precision":
        with pytest.raises(ExportError, match=f"{value}.*--output-dtype"):
            lower(traced(golden.encoder, golden.config).model, "fp32", output_precision=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_file_is_lowered_again_with_the_exact_scale(precision: str) -> None:
    """Without the folded scale; the constant holds it in the file's type, off by up to 1.5e-3 in BF16."""
    config = tiny_config()  # traced without rewrites by other tests, too
    encoder, exact = random_encoder(config), config.head_dim**-0.5
    model = traced(encoder, config, Rewrites.none()).model
    lower(model, precision, attention="unfused")  # type: ignore[arg-type]
    constants = [value for name, value in model.graph.initializers.items() if "attention_scale" in name]
    assert constants and all(float(value.const_value.numpy()) != exact for value in constants)  # type: ignore[union-attr]
    for form in ("fused", "unfused", "fused", "fp32acc"):
        model = ir.from_proto(ir.to_proto(model))
        relower(model, precision, form)  # type: ignore[arg-type]
        if form == "fused":
            found = [core.scale for core in find_attentions(model.graph)]
            assert found == pytest.approx([exact] * config.depth, rel=1e-7)  # of a trace that was read back, FP32
    scales = [node.attributes["scale"].as_float() for node in model.graph if node.op_type == "Attention"]
    assert not scales or scales == pytest.approx([exact] * config.depth, rel=1e-7)


def test_a_folded_bias_keeps_its_name() -> None:
    golden = load_golden("meta-dual")
    names = list(traced(golden.encoder, golden.config, necks="sam3", positions="none").model.graph.initializers)
    assert "trunk.blocks.0.attn.qkv.bias" in names and not [
        name for name in names if name.endswith((".order", ".factor"))
    ]
