"""The file is written again for the TensorRT that is there: a parser or builder that refuses a form gets the next."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import typer
from exporting import golden_options, trace_quickly

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'neck-export[rtx]'")

import engines.plan
import neck_export
from engines.builder import attention_forms as forms
from engines.builder.attention_forms import ORDER, forms_to_try, held_form, relower_file
from engines.builder.flavor import Flavor, choose_flavor
from engines.builder.onnx_graph import BuildError, RefusedError
from engines.builder.options import BuildOptions
from engines.builder.parsed_network import keep_attentions_whole
from engines.plan import PlanOptions, make_plan
from export.contract.errors import ExportError
from export.contract.manifest import manifest_path, read_manifest
from export.contract.signature import BatchRange
from export.pipeline import export_onnx

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """An exported file of one neck without positions, once for each set of options; tests leave it as it is."""
    made: dict[str, Path] = {}

    def export(**options: Any) -> Path:  # noqa: ANN401 - ExportOptions' own
        key = repr(sorted(options.items()))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                trace_quickly(patch)
                values = {"necks": "sam3", "positions": "none", "precision": "fp16", **options}
                made[key] = export_onnx(
                    golden_options("meta-dual", tmp_path_factory.mktemp("onnx") / "x.onnx", **values)
                ).path
        return made[key]

    return export


def without_attention(flavor: Flavor) -> Flavor:
    """The real TensorRT-RTX with the parser of TensorRT 10.3, which knows no Attention."""
    real = flavor.trt

    class Parser:
        def __init__(self, network: Any, logger: Any) -> None:  # noqa: ANN401
            self.real, self.refused = real.OnnxParser(network, logger), ""

        def parse_from_file(self, path: str) -> bool:
            names = [node.name for node in ir.load(path).graph if node.op_type == "Attention"]
            self.refused = str(names[0]) if names else ""
            return not names and bool(self.real.parse_from_file(path))

        @property
        def num_errors(self) -> int:
            return 1 if self.refused else int(self.real.num_errors)

        def get_error(self, index: int) -> Any:  # noqa: ANN401
            told = {"node_name": self.refused, "node_operator": "Attention", "desc": "No importer registered for op"}
            return SimpleNamespace(**{key: lambda value=value: value for key, value in told.items()})

    names = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    return dataclasses.replace(flavor, trt=SimpleNamespace(**{**names, "OnnxParser": Parser}), version="10.3.0")


@pytest.fixture
def old_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    flavor = without_attention(choose_flavor("rtx"))
    monkeypatch.setattr(engines.plan, "choose_flavor", lambda asked: flavor)


def options_of(onnx: Path, tmp_path: Path, **changes: Any) -> PlanOptions:  # noqa: ANN401 - PlanOptions' own
    return PlanOptions(onnx, tmp_path / "out" / "x.plan", **{"precision": "fp16", "flavor": "rtx", **changes})


@pytest.mark.usefixtures("old_parser")
def test_a_parser_without_attention_gets_scores32(exported: Exported, tmp_path: Path) -> None:
    onnx = exported()
    before = {path.name: path.read_bytes() for path in onnx.parent.iterdir()}
    made = make_plan(options_of(onnx, tmp_path))
    assert len(made.notes) == 2 and all("\n" not in line for line in made.notes)
    assert "10.3.0 refused attention as fp32acc: node trunk.blocks." in made.notes[0]
    assert "as scores32: the first product of each attention accumulates in FP32, the second in FP16" in made.notes[1]
    assert made.manifest["verification"]["onnx"]["verified"] is True
    assert made.manifest["attention_form"] == "scores32"
    assert made.sheet is not None and made.sheet.accumulation == ("fp32", "fp16")
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["x.plan", "x.plan.json", "x.plan.layers.json"]
    assert {path.name: path.read_bytes() for path in onnx.parent.iterdir()} == before
    again = make_plan(options_of(onnx, tmp_path))
    assert again.reused and again.notes == made.notes


@pytest.mark.usefixtures("old_parser")
@pytest.mark.parametrize("where", ["trt", "onnx"])
def test_an_asked_form_is_never_replaced(exported: Exported, tmp_path: Path, where: str) -> None:
    onnx = exported(attention="fp32acc") if where == "onnx" else exported()
    asked = {"attention": "fp32acc"} if where == "trt" else {}
    with pytest.raises(BuildError, match=r"cannot parse it: node trunk.*Attention") as caught:
        make_plan(options_of(onnx, tmp_path, **asked))
    message = str(caught.value)
    assert len(message.splitlines()) == 2 and not list(tmp_path.glob("out/*"))
    # the command of the message works, as far as the command line is concerned
    words = message.splitlines()[1].removeprefix("export it again: ")
    assert words.startswith("neck-export onnx --config ") and "--reader tensorrt-rtx" in words


def test_an_asked_form_is_written_from_an_fp16_file(exported: Exported, tmp_path: Path) -> None:
    made = make_plan(options_of(exported(), tmp_path, attention="scores32"))
    assert made.manifest["attention_form"] == "scores32" and len(made.notes) == 1
    assert made.sheet is not None and made.sheet.accumulation == ("fp32", "fp16")


def test_the_default_is_built_as_it_is(exported: Exported, tmp_path: Path) -> None:
    made = make_plan(options_of(exported(), tmp_path))
    assert made.notes == [] and made.manifest["attention_form"] == "fp32acc"
    assert made.sheet is not None and made.sheet.accumulation == ("fp32", "fp32")


def test_parsed_attentions_may_not_be_taken_apart(exported: Exported) -> None:
    """By the real parser: four attentions, each told so; a module without attention layers has none."""
    trt = choose_flavor("rtx").trt
    logger = choose_flavor("rtx").new_logger(lambda severity, line: None)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(exported()))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    entries = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for entry in entries:
        entry.__class__ = trt.IAttentionInputLayer
        entry.attention.decomposable = True
    assert keep_attentions_whole(trt, network) == len(entries) == 4
    assert not any(entry.attention.decomposable for entry in entries)
    assert keep_attentions_whole(SimpleNamespace(), network) == 0


@pytest.mark.parametrize(("refused", "last"), [(1, "scores32"), (2, "unfused"), (3, None)])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_builder_that_fails_gets_the_next_form(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int, last: str | None, precision: str
) -> None:
    """NVIDIA/TensorRT #4705: Attention parses, and does not build."""
    tried: list[str | None] = []
    build = forms.build_plan

    def fail(onnx: Path, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        tried.append(held_form(onnx))
        if len(tried) <= refused:
            raise RefusedError("TensorRT built nothing: IAttention failure", "IAttention failure")
        return build(onnx, *arguments, **options)

    monkeypatch.setattr(forms, "build_plan", fail)
    options = options_of(exported(precision=precision), tmp_path, verify=False)
    if last is None:
        with pytest.raises(BuildError, match=r"built nothing.*refused attention as fp32acc.*as scores32"):
            make_plan(options)
    else:
        made = make_plan(options)
        assert made.manifest["attention_form"] == last and len(made.notes) == 2 * refused
    assert tried == ["fp32acc", "scores32", "unfused"][: refused + 1]


def test_what_no_form_mends_is_told_at_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(onnx: Path, *_: object, **__: object) -> None:
        calls.append(onnx)
        raise RefusedError("cannot parse it: node x (NoSuchOperator)", "node x", by_form=False)

    monkeypatch.setattr(forms, "build_plan", fail)
    with pytest.raises(BuildError, match="NoSuchOperator"):
        make_plan(options_of(exported(), tmp_path, verify=False))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("held", "precision", "asked", "source", "expected"),
    [
        ("fp32acc", "fp16", "auto", "auto", ("fp32acc", "scores32", "unfused")),
        ("scores32", "fp16", "auto", "auto", ("scores32", "unfused")),
        ("fp32acc", "fp16", "scores32", "auto", ("scores32",)),
        ("fp32acc", "fp16", "auto", "fp32acc", ("fp32acc",)),
        ("fused", "bf16", "auto", "auto", ("fused", "scores32", "unfused")),
        (None, "fp32", "auto", "auto", ("auto",)),
        (None, "fp16", "auto", None, (None,)),
    ],
)
def test_forms_to_try(held: str, precision: Any, asked: Any, source: str | None, expected: tuple[str, ...]) -> None:  # noqa: ANN401
    manifest = None if source is None else {"attention": source, "precision": precision}
    assert forms_to_try(held, precision, asked, manifest) == expected
    assert set(expected) <= {*ORDER, "auto", None}


def test_weights_are_not_copied(exported: Exported, tmp_path: Path) -> None:
    onnx, direct = exported(), exported(attention="scores32")
    before = sorted(onnx.parent.iterdir())
    with ExitStack() as left:
        written = relower_file(onnx, "fp16", "scores32", tmp_path, left)
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
        written = relower_file(onnx, "fp16", "scores32", tmp_path, left)
        assert written.parent == tmp_path and weights_of(written) == weights_of(exported(attention="scores32"))


def test_another_residual_of_an_fp16_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"residual sums are fp16, asked was fp32;\n.*--residual fp32"):
        make_plan(options_of(exported(), tmp_path, residual="fp32"))


def test_foreign_files_cannot_be_lowered_again(exported: Exported, tmp_path: Path) -> None:
    model = ir.load(exported())
    for node in model.graph:
        node.metadata_props.clear()
    path = tmp_path / "foreign.onnx"
    ir.save(model, path, external_data="foreign.onnx.data")
    assert held_form(path) is None
    with ExitStack() as left, pytest.raises(BuildError, match="not written by neck-export"):
        relower_file(path, "fp16", "scores32", tmp_path, left)


def test_the_manifest_tells_the_forms(exported: Exported) -> None:
    manifest = read_manifest(manifest_path(exported()), "onnx")
    assert (manifest["attention"], manifest["attention_form"], manifest["residual"]) == ("auto", "fp32acc", "fp16")
    assert json.dumps(manifest["readers"])


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
        assert parsed["output"] == exported(**options) and parsed["checkpoint"]
