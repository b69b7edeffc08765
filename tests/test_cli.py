"""The front door: help at once, the right exit codes, quiet where nobody watches, and it prints what was done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from exporting import (
    DATA,
    ROOT,
    checkpoint_of,
    config_of,
    golden_options,
    neck_export_cli,
    plant_in_neck,
    save_state,
    trace_quickly,
)

import export.pipeline
import neck_export
from benchmarks.masks.options import MasksOptions, Prompts
from benchmarks.options import BenchOptions
from engines.builder.options import PlanOptions
from engines.service.options import RepositoryOptions
from export.contract.manifest import read_manifest
from export.contract.options import BisectOptions, ExportOptions, VerifyOptions
from export.pipeline import ExportResult, export_onnx
from neck.option import build

HEAVY = {"torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "rich", "PIL", "safetensors", "tensorrt", "polygraphy"}
COMMANDS = [command.callback.__name__ for command in neck_export.app.registered_commands if command.callback]
GOLDEN = ("--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"))


@pytest.fixture(autouse=True)
def _trace_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)


def imported_by(*arguments: str) -> tuple[set[str], str]:
    """Runs the front door and returns the modules that it imported, and what it printed."""
    command = [sys.executable, "-X", "importtime", "neck_export.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"\| +([A-Za-z_]+)[\w.]*$", done.stderr, re.MULTILINE)), done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_path_that_the_code_page_lacks_is_escaped(encoding: str, exported: Path, tmp_path: Path) -> None:
    """Once the work is done, as on Windows with a Western code page, or for a pipe in a container."""
    folder = tmp_path / "모델"  # Hangul: in neither
    folder.mkdir()
    path = copied(exported, folder)
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [sys.executable, "neck_export.py", "inspect", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    utf_8 = str(folder).encode() in done.stdout and encoding == "ascii"  # which click takes for a wrong setting
    assert b"\\ubaa8\\ub378" in done.stdout or utf_8


def test_a_home_that_the_shell_leaves_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["neck-export", "onnx", "--checkpoint=~/sam3.pt", "--images", "~/images", "--output", "a~/b", "--x=y~/z"]
    monkeypatch.setattr(sys, "argv", given)
    neck_export.prepare_text()
    assert sys.argv[2:] == [
        *("--checkpoint=/home/me/sam3.pt", "--images", "/home/me/images", "--output", "a~/b", "--x=y~/z"),
    ]


@pytest.mark.parametrize("arguments", [("--help",), ("onnx", "--help")])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """Under 0.4 s: torch alone takes longer."""
    modules, out = imported_by(*arguments)
    assert out.startswith("Usage: ")
    assert "typer" in modules
    assert not modules & HEAVY


def test_a_heavy_import_would_be_seen(exported: Path) -> None:
    """The control."""
    modules, _ = imported_by("inspect", str(exported))
    assert {"numpy", "onnx_ir"} <= modules


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str) -> None:
    ran = neck_export_cli(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: root {command} ")
    assert "--help" in ran.out


def test_help_names_every_command() -> None:
    assert {"onnx", "verify", "inspect", "doctor"} <= set(COMMANDS)
    ran = neck_export_cli("--help")
    assert ran.code == 0
    assert all(re.search(rf"^  {command} +\w", ran.out, re.MULTILINE) for command in COMMANDS)
    assert neck_export_cli("onnxx").code == 2
    assert neck_export_cli().code == 2


def options_of(command: str) -> tuple[Any, dict[str, Any]]:
    group: Any = typer.main.get_command(neck_export.app)
    made = group.commands[command]
    context = made.make_context(command, [], resilient_parsing=True)
    return made, {one.name: (one, one.get_help_record(context)[1]) for one in made.params if one.name != "help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_sentences_with_a_default_under_a_heading(command: str) -> None:
    _, options = options_of(command)
    out = neck_export_cli(command, "--help").out
    for name, (one, told) in options.items():
        assert re.match(r"[A-Z].*[.]( \[|$)", one.help, re.DOTALL), f"{name}: {one.help}"
        if one.param_type_name == "option":
            assert f"\n{one.rich_help_panel}:\n" in out
            assert one.is_flag or "[default: " in told or "required" in told, f"{name}: {told}"


def test_help_says_what_comes_after_what() -> None:
    lines = neck_export_cli("--help").out.split("The usual sequence:\n\n")[1].splitlines()[:4]
    assert [line.split()[:2] for line in lines] == [["neck-export", name] for name in ("onnx", "trt", "triton")] + [[]]


@pytest.mark.parametrize(
    ("command", "options", "arguments"),
    [
        ("onnx", ExportOptions(), ["--checkpoint", "random"]),
        ("trt", PlanOptions(Path("x.onnx"), Path("x.plan")), ["x.onnx", "--output", "x.plan"]),
        ("triton", RepositoryOptions(Path("x.plan")), ["x.plan"]),
        ("bench", BenchOptions(), ["--checkpoint", "random"]),
        ("verify", VerifyOptions(Path("x.onnx")), ["x.onnx"]),
        ("bisect", BisectOptions(Path("x.onnx")), ["x.onnx"]),
        (
            "masks",
            MasksOptions(Path("x.onnx"), Path("m"), DATA, Prompts(points=((0.5, 0.25),))),
            ["x.onnx", "--model", "m", "--images", str(DATA), "--points", "0.5,0.25"],
        ),
    ],
)
def test_defaults_of_the_command_line_are_those_of_python(command: str, options: Any, arguments: list[str]) -> None:
    made, _ = options_of(command)
    assert build(type(options), made.make_context(command, arguments).params) == options


# --- onnx


class Stub:
    """Takes the place of export_onnx and keeps what it was asked."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.options = ExportOptions(Path())
        patch.setattr(export.pipeline, "export_onnx", self)

    def __call__(self, options: ExportOptions, report: object) -> ExportResult:
        self.options = options
        files = [{"name": "sam3-encoder.onnx", "bytes": 5_000_000}]
        return ExportResult(options.output, {"files": files, "weights": {"seed": 0}}, None)


def test_bare_onnx_says_that_the_weights_are_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    ran = neck_export_cli("onnx")
    assert ran.code == 0
    assert "the current folder contains no sam3.pt" in ran.err and ran.err.count("\n") == 1
    assert ran.out.splitlines() == [
        "not verified: --no-verify",
        "build/sam3-encoder.onnx  5.0 MB",
        "build/sam3-encoder.json",
    ]
    assert stub.options == ExportOptions(Path("build/sam3-encoder.onnx"))  # the defaults of both are the same

    assert neck_export_cli("onnx", "--checkpoint", "random").err == ""  # asked for: nothing to say
    assert stub.options.checkpoint is None
    Path("sam3.pt").touch()
    assert neck_export_cli("onnx").err == ""
    assert stub.options.checkpoint == Path("sam3.pt")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--image-size", "1008x672"), {"image_size": (1008, 672)}),
        (("--image-size", "672"), {"image_size": 672}),
        (("--batch", "1:4:8"), {"batch": ExportOptions(Path()).batch.parse("1:4:8")}),
        (("--neck", "both", "--levels", "0,1"), {"necks": "both", "levels": "0,1"}),
        (("--positions", "file", "--input", "uint8"), {"positions": "file", "input_kind": "uint8"}),
        (("--precision", "fp16", "--attention", "unfused"), {"precision": "fp16", "attention": "unfused"}),
        (("--upsampling", "conv", "--output-dtype", "fp32"), {"upsampling": "conv", "output_precision": "fp32"}),
        (("--keep-fp32", "a", "--keep-fp32", "b.*"), {"keep_fp32": ("a", "b.*")}),
        (("--opset", "20"), {"opset": 20}),
        (("--opset", "auto"), {"opset": None}),
        (("--no-rewrite",), {"rewrites": ExportOptions(Path()).rewrites.none()}),
        (("--no-verify", "--seed", "7"), {"verify": False, "seed": 7}),
        (("--images", "images"), {"images": Path("images")}),
        (("--tolerance", "a=0.5", "--tolerance", "b*=1e-3"), {"tolerances": {"a": 0.5, "b*": 1e-3}}),
        (("--checkpoint", "x.pt"), {"checkpoint": Path("x.pt")}),
    ],
)
def test_options_arrive(arguments: tuple[str, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stub = Stub(monkeypatch)
    ran = neck_export_cli("onnx", "--checkpoint", "random", *arguments)
    assert ran.code == 0, ran
    assert {key: getattr(stub.options, key) for key in expected} == expected


def test_onnx_prints_figures_and_files(tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    ran = neck_export_cli("onnx", *GOLDEN, "--precision", "fp16", "--output", output)
    assert (ran.code, ran.err) == (0, "")
    state, method, header, *rows = ran.out.splitlines()
    assert state == "the weights are from the state dict model of checkpoint.pt"
    assert method.startswith("PyTorch FP32 compared with ONNX Runtime ")
    assert "simulated" in method
    assert header.split() == ["output", "max", "abs", "mean", "abs", "rel.", "L2", "cosine", "verdict"]
    figures = read_manifest(tmp_path / "x.json", "onnx")["verification"]["outputs"]
    assert [row.split()[0] for row in rows[:8]] == [row["name"] for row in figures]
    assert [row.split()[-1] for row in rows[:8]] == ["ok"] * 8
    assert float(rows[0].split()[3]) == pytest.approx(figures[0]["relative_l2"], rel=0.01)
    assert rows[8].startswith(
        "read by TensorRT 10.0 and later, TensorRT-RTX, ONNX Runtime 1.18 and later (on a GPU too)"
    )
    assert [Path(row.split("  ")[0]) for row in rows[9:]] == [output, tmp_path / "x.onnx.data", tmp_path / "x.json"]

    verified = neck_export_cli("verify", output)
    assert (verified.code, verified.err) == (0, "")
    assert verified.out.splitlines() == ran.out.splitlines()[1:12]


def test_exit_codes(tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    assert neck_export_cli("onnx", *GOLDEN, "--output", output).code == 0
    assert neck_export_cli("verify", output).code == 0
    failed = neck_export_cli("verify", output, "--tolerance", "sam3_feat_1=1e-12")
    assert failed.code == 3
    assert failed.out == ""
    assert "FAILED" in failed.err
    assert failed.err.splitlines()[-1].startswith(f"error: {output}: ") and "sam3_feat_1" in failed.err.splitlines()[-1]
    assert neck_export_cli("verify", tmp_path / "no.onnx").code == 1
    assert neck_export_cli("verify").code == 2


# --- inspect


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FP16 file that is left as it is."""
    path = tmp_path_factory.mktemp("exported") / "x.onnx"
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        export_onnx(golden_options("meta-dual", path, precision="fp16"))
    return path


def copied(exported: Path, folder: Path) -> Path:
    for file in exported.parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder / exported.name


def test_inspect(exported: Path) -> None:
    ran = neck_export_cli("inspect", exported)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"{exported}  ")
    assert lines[0].endswith("by neck-export, opset 20")
    assert "  input   image: float (1, 3, 112, 112)" in lines
    assert "  output  sam3_feat_0: float16 (1, 16, 32, 32)" in lines
    assert "  output  sam2_pos_3: float16 (1, 16, 4, 4)" in lines
    assert "  attention 4 fp32acc" in lines
    assert f"  from    {checkpoint_of('meta-dual')}, state model, fp16, " in ran.out
    assert "\n  verified: PyTorch FP32 compared with ONNX Runtime " in ran.out


def test_inspect_as_json(exported: Path) -> None:
    ran = neck_export_cli("inspect", exported, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["nodes"] == sum(found["operators"].values()) > 100
    assert found["bytes"] == exported.stat().st_size + exported.with_name("x.onnx.data").stat().st_size
    assert found["manifest"]["precision"] == "fp16"
    assert found["manifest"]["verification"]["verified"] is True
    assert found["attention"] == {"fp32acc": 4}
    assert found["weight_bytes"]["float16"] > found["weight_bytes"].get("float", 0)


@pytest.mark.parametrize("form", ["fp32acc", "fused", "unfused"])
def test_inspect_tells_the_attention_form(form: str, tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    ran = neck_export_cli(
        "onnx", *GOLDEN, "--precision", "fp16", "--attention", form, "--no-verify", "--output", output
    )
    assert ran.code == 0, ran
    assert json.loads(neck_export_cli("inspect", output, "--json").out)["attention"] == {form: 4}
    assert "NOT VERIFIED: not asked: --no-verify" in neck_export_cli("inspect", output).out


def test_inspect_without_a_manifest(exported: Path, tmp_path: Path) -> None:
    path = copied(exported, tmp_path)
    path.with_suffix(".json").unlink()
    ran = neck_export_cli("inspect", path)
    assert ran.code == 0
    assert ran.out.splitlines()[-1].startswith(f"  not verified: {path.with_suffix('.json')}: the manifest is missing")
    assert json.loads(neck_export_cli("inspect", path, "--json").out)["manifest"] is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "is not a neck-export manifest of type 'onnx'"),
        ('{"kind": "onnx", "format": 1, "files": []}', "'created'"),
        ("{", "cannot be read"),
    ],
)
def test_inspect_with_a_damaged_manifest(content: str, words: str, exported: Path, tmp_path: Path) -> None:
    path = copied(exported, tmp_path)
    path.with_suffix(".json").write_text(content)
    ran = neck_export_cli("inspect", path)
    assert ran.code == 0
    assert words in ran.out.splitlines()[-1]


def test_inspect_of_files_that_cannot_be_read(exported: Path, tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        ran = neck_export_cli("inspect", path)
        assert ran.code == 1
        assert ran.out == ""
        assert len(ran.err.splitlines()) == 1
        assert ran.err.startswith("error: ")
        assert words in ran.err

    path = copied(exported, tmp_path)
    data = path.with_name("x.onnx.data")
    weights = data.read_bytes()
    data.write_bytes(weights[:-1])
    refused(path, f"{len(weights) - 1:,} bytes, but the ONNX file needs {len(weights):,}")
    data.unlink()
    refused(path, f"weights file {data}, which is missing")
    refused(tmp_path / "no.onnx", "there is no file with this name")
    refused(tmp_path, "there is no file with this name")
    graph = path.read_bytes()
    for content in (b"", b"text, no graph", graph[: len(graph) // 2], (DATA / "images" / "chelsea.png").read_bytes()):
        path.write_bytes(content)
        refused(path, "incomplete or damaged")


def test_a_rejected_file_is_told_by_inspect(exported: Path, tmp_path: Path) -> None:
    path = copied(exported, tmp_path)
    assert neck_export_cli("verify", path, "--tolerance", "*_feat_*=1e-9").code == 3
    ran = neck_export_cli("inspect", path)
    assert ran.code == 0
    assert "\n  NOT VERIFIED: PyTorch FP32 compared with" in ran.out


def test_verify_of_a_planted_overflow_names_the_module(tmp_path: Path) -> None:
    checkpoint, output = save_state(tmp_path / "planted.pt", plant_in_neck), tmp_path / "x.onnx"
    arguments = ("--checkpoint", checkpoint, *GOLDEN[2:], "--neck", "all", "--precision", "fp16")
    made = neck_export_cli("onnx", *arguments, "--no-verify", "--output", output)
    assert made.code == 0, made
    ran = neck_export_cli("verify", output)
    assert ran.code == 3
    assert "convs.2.conv_1x1/Conv" in ran.err
    assert re.search(r"^sam3_feat_2 .* \d+ non-finite$", ran.err, re.MULTILINE)
    assert read_manifest(tmp_path / "x.json", "onnx")["verification"]["first_bad"].startswith("convs.2.conv_1x1")
