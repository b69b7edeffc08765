"""The command neck-engine: what it prints, compares and refuses."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_build import (
    PLAN,
    VERSION,
    Programs,
    fake_outputs,
    settings,
    spoil,
    why_missing,
    write_plan,
    write_reference,
)
from cpp_images import noise
from safetensors.numpy import load_file
from typer.testing import CliRunner

import neck_export
from export.verification.fidelity import compare

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def test_a_image_is_run(programs: Programs, tmp_path: Path) -> None:
    plan, image = write_plan(tmp_path, PLAN + b"warn other GPU\n"), noise(tmp_path / "a.png", 40, 24)
    ran = programs.run("neck-engine", plan, image, "--batch", 3, "--runs", 7, "--graph")
    assert ran.code == 0
    assert ran.err == "neck-engine: TensorRT warning: other GPU\n"
    lines = ran.out.splitlines()
    assert lines[0] == f"{plan}: fp16, TensorRT {VERSION} on NVIDIA L4 (compute capability 8.9)"
    assert [line.split(maxsplit=1) for line in lines[1:5]] == [
        [
            "image",
            "40 x 24 pixels (height x width); one pixel of the model input covers 2.500000 x 1.500000 pixels of the "
            "image",
        ],
        ["image", "float32 (3, 3, 16, 16)"],
        ["sam3_feat_0", "float16 (3, 8, 4, 4)"],
        ["sam3_pos_0", "float32 (3, 8, 4, 4)"],
    ]
    assert lines[5].split()[-6:] == ["p50", "p90", "p95", "p99", "mean", "runs"]
    assert lines[6] == "inference with CUDA graph, batch 3        1.500    1.500    1.500    1.500    1.500     7"


@pytest.mark.parametrize("options", [[], ["--graph"], ["--batch", 1], ["--batch", 2]])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_outputs_are_compared_with_the_reference(
    programs: Programs, tmp_path: Path, options: list[Any], count: int
) -> None:
    plan, reference = write_plan(tmp_path), write_reference(tmp_path, count)
    ran = programs.run("neck-engine", plan, "--compare", reference, "--runs", 1, *options)
    assert (ran.code, ran.err) == (0, "")
    wrong = programs.run("neck-engine", plan, "--compare", reference, "--runs", 1, *options, STAND_IN_NUDGE="0.05")
    assert wrong.code == 3
    assert wrong.out.count("FAILED") == 2
    assert "p50" not in wrong.out  # a wrong engine is not timed


def test_the_figures_are_pythons(programs: Programs, tmp_path: Path) -> None:
    reference = write_reference(tmp_path, change=1e-3)
    ran = programs.run("neck-engine", write_plan(tmp_path), "--compare", reference, "--runs", 1)
    assert ran.code == 0
    expected = load_file(reference)
    found = fake_outputs(expected.pop("pixels"))
    found["sam3_feat_0"] = found["sam3_feat_0"].astype(np.float16)
    verdict = compare(expected, found, "fp16", "method")
    shown = CliRunner().invoke(_app(verdict))
    assert shown.output.splitlines()[1:] == ran.out.splitlines()[5:8]


def _app(verdict: Any) -> Any:
    """A command that prints a verdict as `neck-export verify` does."""
    import typer

    app = typer.Typer()
    app.command()(lambda: neck_export.show_verdict(verdict))
    return app


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"pixels": np.zeros((1, 16, 16, 3), np.float32)},
            "the file is not a reference that outputs can be compared with",
        ),
        (
            {"sam3_pos_0": np.zeros((2, 8, 4, 5), np.float32)},
            "has the shape (2, 8, 4, 4), but its shape in the reference is (2, 8, 4, 5)",
        ),
        (
            {"sam3_pos_0": np.zeros((3, 8, 4, 4), np.float32)},
            "has the shape (3, 8, 4, 4), but the tensor `pixels` has the shape (2, 16, 16, 3)",
        ),
        ({"sam3_pos_0": np.zeros((2, 8, 4, 4))}, "tensor 'sam3_pos_0' has type 'F64', but only U8"),
        (
            {"sam3_pos_0": np.zeros((2, 8, 4, 4), np.uint8)},
            "output sam3_pos_0 is missing from the reference, which contains sam3_feat_0",
        ),
        (
            {"pixels": np.zeros((2, 8, 16, 3), np.uint8)},
            "the reference are uint8 (2, 8, 16, 3), but the model needs 16 x 16",
        ),
    ],
)
def test_a_reference_of_another_kind_is_refused(
    programs: Programs, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = write_reference(tmp_path, **arrays)
    ran = programs.run("neck-engine", write_plan(tmp_path), "--compare", path)
    assert ran.code == 1
    assert message in ran.error


def test_a_reference_that_is_not_finite_or_left_out_fails(programs: Programs, tmp_path: Path) -> None:
    plan, path = write_plan(tmp_path), write_reference(tmp_path)
    assert programs.run("neck-engine", plan, "--compare", path, STAND_IN_NUDGE="nan").code == 3
    ran = programs.run("neck-engine", plan, "--compare", path, STAND_IN_NUDGE="inf")
    assert ran.code == 3
    assert "256 non-finite" in ran.out
    assert "2" in ran.out
    ran = programs.run("neck-engine", plan, "--compare", path, "--batch", 5)
    assert ran.error == (
        "--batch is 5, but the model's smallest batch size is 1 and the model's largest batch size is 4. "
        "Set --batch to a value within these limits"
    )


def test_a_closed_or_full_standard_output_is_an_error(programs: Programs, tmp_path: Path) -> None:
    command, plan = programs.path("neck-engine"), write_plan(tmp_path)
    for target, message in ((">&-", "standard output is closed"), (">/dev/full", "cannot write to standard output")):
        shell = f'exec "$0" "$1" --runs 1 {target}'
        ended = subprocess.run(["sh", "-c", shell, command, plan], capture_output=True, text=True, env=settings({}))
        assert ended.returncode == 1
        assert message in ended.stderr
        assert plan.read_bytes() == PLAN
    target, writer = os.pipe()
    os.close(target)
    ended = subprocess.run([command, plan, "--runs", "1"], stdout=writer, stderr=subprocess.PIPE, env=settings({}))
    os.close(writer)
    assert ended.returncode == 1
    assert b"cannot write to standard output" in ended.stderr


USAGE: list[list[Any]] = [[], ["a", "b", "c"], ["x", "--batch", "0"], ["x", "--runs", "many"], ["x", "--other"]]


@pytest.mark.parametrize("arguments", [*USAGE, ["x", "--compare"], ["x", "--batch", "99999999999999999999"]])
def test_wrong_usage_is_told(programs: Programs, arguments: list[Any]) -> None:
    ran = programs.run("neck-engine", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("neck-engine: ")
    assert all(option in ran.err.splitlines()[0] for option in arguments if option.startswith("--"))
    assert "Usage: neck-engine PLAN" in ran.err


def test_the_help_and_the_manifest_need_no_gpu(programs: Programs, tmp_path: Path) -> None:
    assert programs.run("neck-engine", "--help", STAND_IN_DEVICES="0").out.startswith("Usage: neck-engine PLAN")
    plan = write_plan(tmp_path)
    ran = programs.run("neck-engine", plan, "--manifest", STAND_IN_DEVICES="0")
    assert ran.code == 0
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[1:5] == [f"TensorRT tensorrt {VERSION}", "compute capability 8.9", "precision fp16", "batch 1:2:4"]
    assert lines[7:] == ["verification verified: by hand", "files complete: x.plan"]
    spoil(plan, files=[])
    assert programs.run("neck-engine", plan, "--manifest").code == 1
