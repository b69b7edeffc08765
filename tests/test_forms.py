"""The file is written again for the TensorRT that is there: a parser or builder that refuses a form gets the next."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import pytest
import typer
from conftest import load_golden
from exporting import golden_options, neck_export_cli, trace_quickly

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install '.[rtx]'")

import engines.plan
import neck_export
from engines.builder import attention_forms as forms
from engines.builder import build
from engines.builder.attention_forms import Attempt, forms_to_try, held_attention, relower_file, spellings
from engines.builder.flavor import Flavor, choose_flavor
from engines.builder.onnx_graph import BuildError, RefusedError
from engines.builder.options import BuildOptions, PlanOptions
from engines.builder.parsed_network import keep_attentions_whole
from engines.plan import make_plan
from export.contract.errors import ExportError
from export.contract.export_command import export_again
from export.contract.manifest import manifest_path, read_manifest
from export.contract.signature import BatchRange
from export.lowering.attention import FORMS
from export.pipeline import export_onnx
from neck.checkpoint import random_encoder, save_meta_checkpoint

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An exported file of one neck without positions, once for each set of options; tests leave it as it is.

    Two blocks, one of them windowed: a builder takes as long as there are blocks.
    """
    made: dict[str, Path] = {}
    config = dataclasses.replace(load_golden("meta-dual").config, depth=2, global_blocks=(1,))
    checkpoint = tmp_path_factory.mktemp("weights") / "sam3.pt"
    save_meta_checkpoint(random_encoder(config), checkpoint)
    two: dict[str, Any] = {"config": config, "checkpoint": checkpoint}

    def export(**options: Any) -> Path:
        key = repr(sorted(options.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                trace_quickly(patch)
                values = {**two, "necks": "sam3", "positions": "none", "precision": "fp16", **options}
                made[key] = export_onnx(
                    golden_options("meta-dual", tmp_path_factory.mktemp("onnx") / "x.onnx", **values)
                ).path
        return made[key]

    return export


def without_attention(flavor: Flavor, **played: Any) -> Flavor:
    """The real TensorRT-RTX with the parser of TensorRT 10.3, which knows no Attention, as another flavor plays it."""
    real = flavor.trt

    class Parser:
        def __init__(self, network: Any, logger: Any) -> None:
            self.real, self.refused = real.OnnxParser(network, logger), ""

        def parse_from_file(self, path: str) -> bool:
            names = [node.name for node in ir.load(path).graph if node.op_type == "Attention"]
            self.refused = str(names[0]) if names else ""
            return not names and bool(self.real.parse_from_file(path))

        @property
        def num_errors(self) -> int:
            return 1 if self.refused else int(self.real.num_errors)

        def get_error(self, index: int) -> Any:
            told = {"node_name": self.refused, "node_operator": "Attention", "desc": "No importer registered for op"}
            return SimpleNamespace(**{key: lambda value=value: value for key, value in told.items()})

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    trt = SimpleNamespace(**{**names, "OnnxParser": Parser})
    return dataclasses.replace(flavor, trt=trt, **played)


@pytest.fixture
def old_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    flavor = without_attention(choose_flavor("rtx"), version="10.3.0")
    monkeypatch.setattr(engines.plan, "choose_flavor", lambda asked: flavor)


def options_of(onnx: Path, tmp_path: Path, **changes: Any) -> PlanOptions:
    return PlanOptions(onnx, tmp_path / "out" / "x.plan", **{"precision": "fp16", "flavor": "rtx", **changes})


def played(flavor: Flavor, name: str, version: str) -> Flavor:
    """The real TensorRT-RTX under the name and version of another TensorRT; it is built and run as RTX all the same."""

    class Played(Flavor):
        def create_config(self, *arguments: Any) -> Any:
            return dataclasses.replace(flavor).create_config(*arguments)

    values = {field.name: getattr(flavor, field.name) for field in dataclasses.fields(flavor)}
    return Played(**{**values, "name": name, "version": version})


def play(monkeypatch: pytest.MonkeyPatch, flavor: Flavor) -> None:
    monkeypatch.setattr(engines.plan, "choose_flavor", lambda asked: flavor)


@pytest.mark.usefixtures("old_parser")
def test_a_parser_without_attention_builds_the_default_as_it_is(exported: Exported, tmp_path: Path) -> None:
    made = make_plan(options_of(exported(), tmp_path, attention="fp32acc"))
    assert made.notes == [] and made.manifest["attention_form"] == "fp32acc"
    assert made.manifest["attention_spelling"] == "matmul"
    assert made.layers is not None and made.layers.accumulation == ("fp32", "fp32") and made.layers.warning() is None


@pytest.mark.usefixtures("old_parser")
def test_a_file_with_the_operator_is_written_again(exported: Exported, tmp_path: Path) -> None:
    """For TensorRT-RTX and TensorRT before 10.14, also where its export was asked for the form, which stays."""
    onnx = exported(opset=23, attention="fp32acc")
    before = {path.name: path.read_bytes() for path in onnx.parent.iterdir()}
    made = make_plan(options_of(onnx, tmp_path))
    assert len(made.notes) == 1 and "\n" not in made.notes[0]
    assert (
        "--attention fp32acc (written as MatMul, Softmax and MatMul): both matrix multiplications in each "
        "attention layer accumulate in FP32"
    ) in made.notes[0]
    assert made.manifest["verification"]["onnx"]["verified"] is True
    assert (made.manifest["attention_form"], made.manifest["attention_spelling"]) == ("fp32acc", "matmul")
    assert made.layers is not None and made.layers.accumulation == ("fp32", "fp32")
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["x.plan", "x.plan.json", "x.plan.layers.json"]
    assert {path.name: path.read_bytes() for path in onnx.parent.iterdir()} == before
    again = make_plan(options_of(onnx, tmp_path))
    assert again.reused and again.notes == made.notes


@pytest.mark.parametrize("options", [{}, {"precision": "fp32"}, {"opset": 23}], ids=str)
def test_tensorrt_10_14_gets_the_operator(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """NVIDIA's release notes promise FP32 accumulation for it."""
    play(monkeypatch, played(choose_flavor("rtx"), "tensorrt", "10.14.1.48"))
    made = make_plan(options_of(exported(**options), tmp_path, verify=False))
    assert (made.manifest["attention_form"], made.manifest["attention_spelling"]) == ("fp32acc", "operator")
    assert ["to match --attention fp32acc (written as the Attention operator)" in note for note in made.notes] == [
        True
    ] * (not options)
    assert made.layers is not None and made.layers.accumulation == ("fp32", "fp32")


def test_where_the_operator_is_refused_the_other_spelling_is_built(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA/TensorRT #4705: 10.14 refuses it on some GPUs. A form that was asked for is kept: both spell it."""
    refusing = without_attention(choose_flavor("rtx"))
    play(monkeypatch, played(refusing, "tensorrt", "10.14.1.48"))
    made = make_plan(options_of(exported(), tmp_path, attention="fp32acc", verify=False))
    assert (made.manifest["attention_form"], made.manifest["attention_spelling"]) == ("fp32acc", "matmul")
    told = (
        "was rewritten to match --attention fp32acc (written as the Attention",
        "10.14.1.48 refused to build the plan with --attention fp32acc (written as the",
        "rewritten to match --attention fp32acc (written as M",
    )
    assert len(made.notes) == 3 and all(part in note for part, note in zip(told, made.notes, strict=True))


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("rtx", "1.7.1.116", ("matmul",)),
        ("tensorrt", "10.3.0", ("matmul",)),
        ("tensorrt", "10.7.0.post1", ("matmul",)),
        ("tensorrt", "10.13.3.9", ("matmul",)),
        ("tensorrt", "10.14.1.48", ("operator", "matmul")),
        ("tensorrt", "11.4.0.106", ("operator", "matmul")),
        ("tensorrt", "12.0", ("operator", "matmul")),
    ],
)
def test_the_spellings_of_a_tensorrt(name: Any, version: str, expected: tuple[str, ...]) -> None:
    assert spellings(Flavor(name, None, version, (), None)) == expected


@pytest.mark.parametrize("where", ["trt", "onnx"])
def test_an_asked_form_is_never_replaced(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(onnx: Path, *_: object, **__: object) -> None:
        raise RefusedError(f"{onnx}cannot parse the file: node x (Softmax)", "node x")

    monkeypatch.setattr(forms, "build_plan", refuse)
    onnx = exported(attention="fp32acc") if where == "onnx" else exported()
    asked = {"attention": "fp32acc"} if where == "trt" else {}
    with pytest.raises(BuildError, match=r"cannot parse the file: node x") as caught:
        make_plan(options_of(onnx, tmp_path, **asked))
    assert "unfused" not in str(caught.value) and not list(tmp_path.glob("out/*"))


def test_an_asked_form_is_written_from_an_fp16_file(exported: Exported, tmp_path: Path) -> None:
    made = make_plan(options_of(exported(), tmp_path, attention="fused"))
    assert made.manifest["attention_form"] == "fused" and len(made.notes) == 1
    assert made.layers is not None and made.layers.accumulation == ("fp16", "fp16")


def scores32(onnx: Path, folder: Path) -> Path:
    """The file as an older version wrote it in the form scores32: its softmax alone in FP32."""
    folder.mkdir()
    for file in onnx.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / onnx.name
    model = ir.load(path)
    for node in [node for node in model.graph if (node.name or "").endswith("/mixed")]:
        for position, value in enumerate(node.inputs):
            node.replace_input_with(position, value.producer().inputs[0])
        (cast, _), *_ = node.outputs[0].uses()
        node.outputs[0].type = cast.outputs[0].type
        ir.convenience.replace_all_uses_with(cast.outputs[0], node.outputs[0])
    common_passes.RemoveUnusedNodesPass()(model)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    where = manifest_path(path)
    manifest = json.loads(where.read_text())
    del manifest["attention_spelling"]
    manifest |= {"attention": "scores32", "attention_form": "scores32"}
    entry = next(entry for entry in manifest["files"] if entry["name"] == path.name)
    entry |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    where.write_text(json.dumps(manifest))
    return path


def test_a_file_of_an_older_version_becomes_fp32acc(exported: Exported, tmp_path: Path) -> None:
    onnx = scores32(exported(), tmp_path / "old")
    assert held_attention(onnx) == Attempt("scores32")
    made = make_plan(options_of(onnx, tmp_path))
    assert (made.manifest["attention_form"], made.manifest["attention_spelling"]) == ("fp32acc", "matmul")
    assert made.layers is not None and made.layers.accumulation == ("fp32", "fp32") and len(made.notes) == 1
    assert "scores32" not in export_again(onnx) and "--attention" in export_again(onnx)


def test_the_default_is_built_as_it_is(exported: Exported, tmp_path: Path) -> None:
    made = make_plan(options_of(exported(), tmp_path))
    assert made.notes == [] and made.manifest["attention_form"] == "fp32acc"
    assert made.layers is not None and made.layers.accumulation == ("fp32", "fp32")


@pytest.mark.parametrize("fault", [None, "not fused", "FP16"])
def test_trt_reports_what_became_of_attention(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None
) -> None:
    """A builder that fuses none, or whose second product accumulates in FP16: played, by the real one's listing."""
    read_log, read_plan = build.layers_from_log, build.read_families
    if fault == "not fused":
        monkeypatch.setattr(build, "layers_from_log", lambda log, *more: read_log(log.replace("_mha_", "_"), *more))
    if fault == "FP16":
        monkeypatch.setattr(build, "read_families", lambda plan: dict.fromkeys(read_plan(plan), ("a_fp32", "a_fp16")))
    words = ("trt", exported(), "--flavor", "rtx", "--no-verify", "--output", tmp_path / "x.plan")
    ran = neck_export_cli(*words)
    assert ran.code == 0, ran.err
    warnings = [line for line in ran.err.splitlines() if line.startswith("warning: ")]
    if fault == "not fused":
        assert "fused attentions 0 of 2, " in ran.out and "2 of 2 attention layers are not fused" in warnings[0]
    elif fault == "FP16":
        assert "accumulation FP32 then FP16" in ran.out and "accumulates in FP16" in warnings[0]
    else:
        assert "fused attentions 2 of 2, accumulation FP32, " in ran.out and not warnings
    told = neck_export_cli("inspect", tmp_path / "x.plan").out
    assert all(line.removeprefix("warning: ") in told for line in warnings)


def test_parsed_attentions_may_not_be_taken_apart(exported: Exported) -> None:
    """By the real parser: two attentions, each told so; a module without attention layers has none."""
    trt = choose_flavor("rtx").trt
    logger = choose_flavor("rtx").new_logger(lambda severity, line: None)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(exported(opset=23)))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    entries = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for entry in entries:
        entry.__class__ = trt.IAttentionInputLayer
        entry.attention.decomposable = True
    assert keep_attentions_whole(trt, network) == len(entries) == 2
    assert not any(entry.attention.decomposable for entry in entries)
    assert keep_attentions_whole(SimpleNamespace(), network) == 0


@pytest.mark.parametrize(("refused", "last"), [(1, "unfused"), (2, None)])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_builder_that_fails_gets_the_next_form(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int, last: str | None, precision: str
) -> None:
    """NVIDIA/TensorRT #4705: Attention parses, and does not build."""
    tried: list[str | None] = []
    real = forms.build_plan

    def fail(onnx: Path, *arguments: Any, **options: Any) -> Any:
        tried.append(held_attention(onnx).form)
        if len(tried) <= refused:
            raise RefusedError("TensorRT could not build the plan: IAttention failure", "IAttention failure")
        return real(onnx, *arguments, **options)

    monkeypatch.setattr(forms, "build_plan", fail)
    options = options_of(exported(precision=precision), tmp_path, verify=False)
    if last is None:
        with pytest.raises(BuildError, match=r"could not build the plan.*refused to build .* --attention fp32acc"):
            make_plan(options)
    else:
        made = make_plan(options)
        assert made.manifest["attention_form"] == last and len(made.notes) == 2 * refused
    assert tried == ["fp32acc", "unfused"][: refused + 1]


def test_what_no_form_mends_is_told_at_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(onnx: Path, *_: object, **__: object) -> None:
        calls.append(onnx)
        raise RefusedError("cannot parse the file: node x (NoSuchOperator)", "node x", by_form=False)

    monkeypatch.setattr(forms, "build_plan", fail)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        make_plan(options_of(exported(), tmp_path, verify=False))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("held", "precision", "asked", "source", "expected"),
    [
        ("fp32acc", "fp16", "auto", "auto", ("fp32acc", "unfused")),
        ("scores32", "fp16", "auto", "auto", ("fp32acc", "unfused")),
        ("scores32", "fp16", "auto", "scores32", ("fp32acc",)),
        ("fp32acc", "fp16", "fused", "auto", ("fused",)),
        ("fp32acc", "fp16", "auto", "fp32acc", ("fp32acc",)),
        ("fused", "fp16", "auto", None, ("fused", "unfused")),
        ("fused", "bf16", "auto", "auto", ("fused", "unfused")),
        (None, "fp32", "auto", "auto", ("auto",)),
        (None, "fp16", "auto", None, (None,)),
    ],
)
def test_forms_to_try(held: str, precision: Any, asked: Any, source: str | None, expected: tuple[str, ...]) -> None:
    manifest = None if source is None else {"attention": source, "precision": precision}
    assert tuple(attempt.form for attempt in forms_to_try(held, precision, asked, manifest)) == expected
    both = forms_to_try(held, precision, asked, manifest, ("operator", "matmul"))
    assert len(both) == len(expected) + ("fp32acc" in expected)
    assert set(expected) <= {*FORMS, "auto", None}


def test_weights_are_not_copied(exported: Exported, tmp_path: Path) -> None:
    onnx, direct = exported(), exported(opset=23)
    before = sorted(onnx.parent.iterdir())
    with ExitStack() as left:
        written = relower_file(onnx, "fp16", Attempt("fp32acc", "operator"), tmp_path, left)
        assert written.parent == onnx.parent and written.stat().st_size < direct.stat().st_size * 1.01
        assert weights_of(written) == weights_of(direct)
        assert written not in onnx.parent.glob("*.onnx")  # which `trt` without a file looks through
    assert sorted(onnx.parent.iterdir()) == before and not list(tmp_path.iterdir())


def weights_of(path: Path) -> dict[str, bytes]:
    initializers = ir.load(path).graph.initializers.items()
    return {name: value.const_value.numpy().tobytes() for name, value in initializers if value.const_value is not None}


def test_beside_a_folder_that_cannot_be_written_weights_are_copied_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx, write = exported(), Path.write_bytes

    def refuse(path: Path, data: bytes) -> int:
        if path.parent == onnx.parent:
            raise PermissionError(13, "Permission denied")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with ExitStack() as left:
        written = relower_file(onnx, "fp16", Attempt("unfused"), tmp_path, left)
        assert written.parent == tmp_path and weights_of(written) == weights_of(exported(attention="unfused"))


def test_another_residual_of_an_fp16_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(
        BuildError, match=r"residual sums in fp16, but --residual fp32 was requested;\n.*--residual fp32"
    ):
        make_plan(options_of(exported(), tmp_path, residual="fp32"))


def test_foreign_files_cannot_be_lowered_again(exported: Exported, tmp_path: Path) -> None:
    model = ir.load(exported())
    for node in model.graph:
        node.metadata_props.clear()
    path = tmp_path / "foreign.onnx"
    ir.save(model, path, external_data="foreign.onnx.data")
    assert held_attention(path) == Attempt(None)
    with ExitStack() as left, pytest.raises(BuildError, match="not written by neck-export"):
        relower_file(path, "fp16", Attempt("unfused"), tmp_path, left)


def test_the_manifest_tells_the_forms(exported: Exported) -> None:
    manifest = read_manifest(manifest_path(exported()), "onnx")
    assert (manifest["attention"], manifest["attention_form"], manifest["residual"]) == ("auto", "fp32acc", "fp16")
    assert json.dumps(manifest["targets"])


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        ({}, {"precision": "bf16"}, "--precision bf16 --attention auto"),
        ({}, {"build": BuildOptions(batch=BatchRange(1, 4, 8))}, "--batch 1:4:8"),
        ({}, {"residual": "fp32"}, "--residual fp32"),
    ],
)
def test_messages_that_say_export_again_name_a_command_that_works(
    exported: Exported, tmp_path: Path, options: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises((BuildError, ExportError)) as caught:
        make_plan(options_of(exported(**options), tmp_path, **{"verify": False, **change}))
    message = str(caught.value)
    assert says in message and len(message.splitlines()) <= 2
    if "neck-export onnx" in message:
        words = shlex.split(message[message.index("neck-export onnx") :])[2:]
        command = typer.main.get_command(neck_export.app).commands["onnx"]  # type: ignore[attr-defined]
        parsed = command.make_context("onnx", words).params
        assert Path(parsed["output"]) == exported(**options) and parsed["checkpoint"]  # typer 0.26 keeps a str here
