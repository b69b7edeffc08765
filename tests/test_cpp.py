"""The C++ library and neck-engine against stand-ins of TensorRT and CUDA, with sanitizers."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_build import (
    PLAN,
    TESTS,
    VERSION,
    Programs,
    build,
    cmake,
    settings,
    shared_programs,
    spoil,
    stand_in_outputs,
    why_missing,
    write_plan,
)
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from serving import pictures_of
from test_session import TARGETS, StandIn
from typer.testing import CliRunner

import neck_export
from engines.builder.flavor import Flavor
from engines.builder.gpu import Gpu
from engines.run.plan_checks import SessionError, check_plan
from export.contract.manifest import manifest_path
from export.proof.fidelity import compare
from neck.pictures import load_pictures, normalise, read_picture

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

L4 = Gpu("NVIDIA L4", "8.9", "570.86", "12.8")
MUTANTS = 250


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return shared_programs(tmp_path_factory)


def write_picture(path: Path, size: int = 16, mode: str = "RGB", **options: Any) -> Path:  # noqa: ANN401
    Image.fromarray(pictures_of(1, 1, size)[0]).convert(mode).save(path, **options)
    return path


def write_reference(folder: Path, count: int = 2, change: float = 0.0, **more: np.ndarray) -> Path:
    """A reference of `count` pictures for the stand-in's plan; `change` is added to its first output."""
    pixels = pictures_of(2, count, 16)
    outputs = stand_in_outputs(pixels)
    outputs["sam3_feat_0"] = outputs["sam3_feat_0"] + np.float32(change)
    path = folder / "reference.safetensors"
    save_file({"pixels": pixels, **outputs, **more}, path)
    return path


def small_plan(folder: Path) -> Path:
    """What tests/cpp/test_engine.cpp and test_pool.cpp expect."""
    text = b"stand-in\ninput image float32 -1,3,2,2 1,2,4\noutput half float16 -1,5,2,2\noutput full float32 -1,5,2,2\n"
    sides = ["batch", 5, 2, 2]
    return write_plan(
        folder,
        text + b"scratch 1000\n",
        inputs=[{"name": "image", "dtype": "float32", "shape": ["batch", 3, 2, 2]}],
        outputs=[
            {"name": "half", "dtype": "float16", "shape": sides},
            {"name": "full", "dtype": "float32", "shape": sides},
        ],
    )


def test_the_engine_does_right_and_every_call_may_fail(programs: Programs, tmp_path: Path) -> None:
    """Order on streams, CUDA graphs, batches, refusals; then each call of CUDA and TensorRT fails in its turn."""
    ran = programs.run("test_engine", small_plan(tmp_path))
    assert (ran.code, ran.err) == (0, "")
    assert "cudaMalloc: 4 calls failed" in ran.out  # scratch, input, two outputs
    assert "cudaGraphInstantiateWithFlags (graph): 1 calls failed" in ran.out


def test_a_pool_serves_many_threads(programs: Programs, tmp_path: Path) -> None:
    """Four contexts, 16 threads; first come, first served; leases that throw; closed with requests in flight."""
    ran = programs.run("test_pool", small_plan(tmp_path), 16, 30)
    assert (ran.code, ran.err) == (0, "")
    assert "480 requests of 16 threads answered, 30 or more of each" in ran.out


@pytest.mark.slow
def test_a_pool_is_clean_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """The same for 60 s; a build of its own."""
    folder = tmp_path / "build"
    assert cmake(TESTS, folder, "-DNECK_SANITIZE=thread").returncode == 0
    build(folder, "test_pool")
    ran = Programs(folder).run("test_pool", small_plan(tmp_path), 16, 30, 60)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("fault", "seen"), [("leak", "stand-in: 1 things were left"), ("overflow", "AddressSanitizer")]
)
def test_leaks_and_overflows_are_seen(programs: Programs, fault: str, seen: str) -> None:
    """The control."""
    ran = programs.run("probe", fault)
    assert ran.code != 0
    assert seen in ran.err


Spoil = Callable[[Path], object]
FILES: list[tuple[str, Spoil]] = [
    ("no plan", lambda plan: plan.unlink()),
    ("a rejected plan", lambda plan: plan.rename(plan.with_name("x.plan.rejected"))),
    ("an empty plan", lambda plan: plan.write_bytes(b"")),
    ("a folder", lambda plan: (plan.unlink(), plan.mkdir())),
    ("a changed plan", lambda plan: plan.write_bytes(PLAN.replace(b"1000", b"1001"))),
    ("a cut plan", lambda plan: plan.write_bytes(PLAN[:-1])),
    ("no manifest", lambda plan: manifest_path(plan).unlink()),
    ("a manifest that is a list", lambda plan: manifest_path(plan).write_text("[]")),
    ("a manifest of another kind", lambda plan: spoil(plan, kind="onnx")),
    ("a newer manifest", lambda plan: spoil(plan, format=2)),
    ("a manifest without format", lambda plan: spoil(plan, format=None)),
    ("a manifest without files", lambda plan: spoil(plan, files=None)),
    ("files without names", lambda plan: spoil(plan, files=[{"bytes": 1}])),
    ("no file at all", lambda plan: spoil(plan, files=[])),
    ("a file elsewhere", lambda plan: spoil(plan, files=[{"name": "../x", "bytes": 1, "sha256": "0"}])),
    ("a file that is missing", lambda plan: spoil(plan, files=[{"name": "y", "bytes": 1, "sha256": "0"}])),
    ("no inputs", lambda plan: spoil(plan, inputs=None)),
    ("no flavour", lambda plan: spoil(plan, flavor=None)),
    ("no version", lambda plan: spoil(plan, tensorrt_version=None)),
    ("no options", lambda plan: spoil(plan, options=None)),
    ("no compute capabilities", lambda plan: spoil(plan, compute_capabilities=None)),
    ("the magic of another flavour", lambda plan: spoil(plan, flavor="rtx")),
    ("an older TensorRT's plan", lambda plan: spoil(plan, tensorrt_version="10.9.0.34")),
    ("a newer TensorRT's plan", lambda plan: spoil(plan, tensorrt_version="11.4.0.106")),
    ("a later compatible plan", lambda plan: later(plan, "11.4.0.106")),
    ("another GPU's plan", lambda plan: spoil(plan, compute_capabilities=["8.6", "12.0"])),
]


def later(plan: Path, version: str) -> None:
    options = {"version_compatible": True, "hardware_compatible": "none"}
    spoil(plan, tensorrt_version=version, options=options)


def tensorrt(gpu: Gpu = L4, version: str = VERSION) -> Flavor:
    return Flavor("tensorrt", None, version, (), gpu)


def python_says(plan: Path, flavor: Flavor | None = None) -> str | None:
    """What Python's check of a plan raises."""
    try:
        check_plan(plan, flavor or tensorrt())
    except SessionError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("name", "change"), FILES, ids=[name for name, _ in FILES])
def test_a_bad_plan_is_refused_in_pythons_words(programs: Programs, tmp_path: Path, name: str, change: Spoil) -> None:
    plan = write_plan(tmp_path)
    assert python_says(plan) is None
    change(plan)
    ran = programs.run("neck-engine", plan)
    assert ran.code == 1
    assert ran.error == python_says(plan)
    assert ran.out == ""


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"kind": "plan", "format": 1e999}'])
def test_a_manifest_that_is_no_json_is_refused(programs: Programs, tmp_path: Path, text: bytes) -> None:
    plan = write_plan(tmp_path)
    manifest_path(plan).write_bytes(text)
    ran = programs.run("neck-engine", plan)
    assert ran.code == 1
    assert ran.error.startswith(f"{plan}.json: the manifest cannot be read (")
    assert ran.error.endswith("); write the file again")


BAD_VALUES: list[tuple[str, Any]] = [
    ("inputs", 3),
    ("inputs", [3]),
    ("inputs", [{"name": "image", "dtype": "float32", "shape": [1.5]}]),
    ("outputs", [{"name": 1, "dtype": "float32", "shape": []}]),
    ("options", []),
    ("options", {"version_compatible": True}),
    ("compute_capabilities", "8.9"),
    ("tensorrt_version", 10),
    ("tensorrt_version", "10.x"),
    ("batch", 1),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_a_manifest_with_odd_values_is_refused(programs: Programs, tmp_path: Path, key: str, value: Any) -> None:  # noqa: ANN401
    plan = write_plan(tmp_path)
    spoil(plan, **{key: value})
    ran = programs.run("neck-engine", plan)
    assert ran.code == 1
    assert ran.error.startswith(f"{plan}.json: not as neck-export writes it (")
    assert ran.error.endswith("; build x.plan again")


def test_a_machine_that_cannot_run_it_is_told_in_pythons_words(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    ran = programs.run("neck-engine", plan, STAND_IN_DEVICES="0")
    assert ran.code == 1
    wanted = f"{plan}: no NVIDIA GPU with a driver here; without one a plan can be built, not run"
    assert ran.error == f"{wanted} (CUDA driver version is insufficient for CUDA runtime version)"
    ran = programs.run("neck-engine", plan, STAND_IN_CAPABILITY="7.5")
    assert ran.error == python_says(plan, tensorrt(Gpu("NVIDIA L4", "7.5", "", "")))
    ran = programs.run("neck-engine", plan, STAND_IN_VERSION="11.4.0.106")
    assert ran.error == python_says(plan, tensorrt(version="11.4.0.106"))
    assert (
        programs.run("neck-engine", plan, "--device", 1).error
        == f"{plan}: there is no GPU 1; here are 1, counted from 0"
    )


@pytest.mark.parametrize(
    ("plan_of", "capability", "runs"),
    [
        ({"options": {"version_compatible": False, "hardware_compatible": "ampere+"}}, "8.0", True),
        ({"options": {"version_compatible": False, "hardware_compatible": "ampere+"}}, "7.5", False),
        ({"compute_capabilities": []}, "12.1", True),
        ({"compute_capabilities": []}, "7.5", False),
        ({"compute_capabilities": ["8.6", "8.9"]}, "8.6", True),
        (
            {"options": {"version_compatible": True, "hardware_compatible": "none"}, "tensorrt_version": "10.2.0.1"},
            "8.9",
            True,
        ),
    ],
)
def test_other_gpus_and_versions(
    programs: Programs, tmp_path: Path, plan_of: dict[str, Any], capability: str, runs: bool
) -> None:
    plan = write_plan(tmp_path, **plan_of)
    said = python_says(plan, tensorrt(Gpu("NVIDIA L4", capability, "", "")))
    ran = programs.run("neck-engine", plan, "--runs", 1, STAND_IN_CAPABILITY=capability)
    assert (said is None, ran.code) == (runs, 0 if runs else 1)
    if not runs:
        assert ran.error == said


RTX = {"flavor": "rtx", "tensorrt_version": "1.7.1.116"}


@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        ("8.9", {}),
        ("8.6", {}),
        ("9.0", {}),
        ("9.0", {"compute_capabilities": []}),
        ("10.0", {"compute_capabilities": []}),
        ("10.3", {"compute_capabilities": ["10.3"]}),
        ("11.0", {"compute_capabilities": []}),
        ("8.7", {"compute_capabilities": []}),
        ("12.1", {"compute_capabilities": []}),
        ("8.0", {"compute_capabilities": []}),
        ("7.5", {"compute_capabilities": []}),
        ("8.9", {"flavor": "tensorrt"}),
        ("8.9", {"tensorrt_version": "1.2.0.3"}),  # RTX tells itself which it loads
    ],
)
def test_rtx_plans_are_checked_as_python_does(
    programs: Programs, tmp_path: Path, capability: str, changes: dict[str, Any]
) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **{**RTX, **changes})
    gpu = Gpu("NVIDIA L4", capability, "", "")
    said = python_says(plan, StandIn("rtx", None, "1.7.1.116", TARGETS, gpu))
    environment = {"STAND_IN_VERSION": "1.7.1.116", "STAND_IN_CAPABILITY": capability}
    ran = programs.run("neck-engine-rtx", plan, "--runs", 1, **environment)
    assert ran.code == (0 if said is None else 1)
    if said is None:
        assert "TensorRT-RTX 1.7.1.116 on NVIDIA L4" in ran.out
    else:
        assert ran.error == said
    assert programs.run("neck-engine", plan).code == 1  # the other flavour's program


def run_rtx(programs: Programs, folder: Path, lines: bytes = b"", fail: str = "") -> Any:  # noqa: ANN401
    """Runs a TensorRT-RTX plan by a CUDA graph."""
    plan, reference = write_plan(folder, b"vtrt " + PLAN + lines, **RTX), write_reference(folder)
    environment = {"STAND_IN_VERSION": "1.7.1.116", "STAND_IN_FAIL": fail}
    return programs.run("neck-engine-rtx", plan, "--graph", "--compare", reference, "--runs", 1, **environment)


def test_a_graph_of_an_rtx_plan_holds_its_specialised_kernels(programs: Programs, tmp_path: Path) -> None:
    """The stand-in aborts where a graph is captured while kernels are still compiled in the background."""
    ran = run_rtx(programs, tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert "a run, CUDA graph, batch 2" in ran.out
    assert "no context to run it can be made (Error Code 2: OutOfMemory (runtime config))" in (
        run_rtx(programs, tmp_path, fail="createRuntimeConfig").error
    )


def test_an_rtx_plan_that_cannot_be_captured_is_told_before(programs: Programs, tmp_path: Path) -> None:
    ran = run_rtx(programs, tmp_path, b"allocates\n")
    assert ran.code == 1
    wanted = "no CUDA graph can be captured (TensorRT-RTX allocates while it runs this plan); run it without one, or "
    assert ran.error == f"{tmp_path / 'x.plan'}: {wanted}build it again by `neck-export trt`"


def start_rtx(programs: Programs, plan: Path, *options: Any, **environment: str) -> Any:  # noqa: ANN401
    """Times the start of a TensorRT-RTX plan."""
    environment = {"STAND_IN_VERSION": "1.7.1.116", **environment}
    return programs.run("neck-engine-rtx", plan, "--startup", "--batch", 2, *options, **environment)


COMPILED = "stand-in: compiles kernels of batch 2\n"


@pytest.mark.parametrize("options", [[], ["--graph"], ["--rtx-graph"]])
def test_kernels_of_an_earlier_start_are_used(programs: Programs, tmp_path: Path, options: list[str]) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    cold = start_rtx(programs, plan, *options)
    assert (cold.code, cold.err) == (0, "")
    assert "on NVIDIA L4 (compute capability 8.9), cold\n" in cold.out
    assert COMPILED in cold.out
    assert [line.split("  ")[0] for line in cold.out.splitlines() if line.endswith(" ms")] == [
        "loading",
        "first run, batch 2",
        "second run",
    ]
    warm = start_rtx(programs, plan, *options)
    assert ", warm: kernels of an earlier start\n" in warm.out
    assert COMPILED not in warm.out
    other = start_rtx(programs, plan, *options, "--batch", 4)
    assert "stand-in: compiles kernels of batch 4\n" in other.out
    assert "compiles" not in start_rtx(programs, plan, *options, "--batch", 4).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


CACHES: list[tuple[str, Callable[[Path], object], dict[str, str], str]] = [
    ("damaged", lambda cache: cache.write_bytes(cache.read_bytes()[:-1]), {}, "is damaged"),
    ("changed", lambda cache: cache.write_bytes(cache.read_bytes().replace(b"batch 2", b"batch 3")), {}, "is damaged"),
    ("empty", lambda cache: cache.write_bytes(b""), {}, "is no runtime cache"),
    ("another file", lambda cache: cache.write_bytes(b"\0" * 999), {}, "is no runtime cache"),
    ("a folder", lambda cache: (cache.unlink(), cache.mkdir()), {}, "cannot be read (Is a directory)"),
    ("another driver", lambda cache: None, {"STAND_IN_DRIVER": "12080"}, "driver 13.0, plan "),
    ("another RTX", lambda cache: None, {"STAND_IN_VERSION": "1.7.2.9"}, "is of TensorRT-RTX 1.7.1.116 on NVIDIA L4"),
    ("refused", lambda cache: None, {"STAND_IN_FAIL": "deserialize"}, "the runtime cache was refused by TensorRT-RTX"),
]


@pytest.mark.parametrize(("name", "change", "environment", "message"), CACHES, ids=[case[0] for case in CACHES])
def test_a_damaged_or_foreign_cache_is_dropped_with_one_line(
    programs: Programs,
    tmp_path: Path,
    name: str,
    change: Callable[[Path], object],
    environment: dict[str, str],
    message: str,
) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    start_rtx(programs, plan)
    change(plan.with_name("x.plan.cache"))
    ran = start_rtx(programs, plan, **environment)
    assert (ran.code, ", cold\n" in ran.out) == (0, True)
    line, *more = ran.err.splitlines()
    assert message in line
    assert line.endswith("; kernels are compiled anew")
    assert len(more) == (1 if name == "a folder" else 0)  # and it cannot be written
    if name not in ("a folder", "refused"):
        assert ", warm" in start_rtx(programs, plan, **environment).out  # written anew


def test_a_cache_of_another_plan_is_dropped(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    start_rtx(programs, plan)
    write_plan(tmp_path, b"vtrt " + PLAN + b"scratch 2000\n", **RTX)
    assert "; kernels are compiled anew" in start_rtx(programs, plan).err


def test_a_cache_that_cannot_be_written_is_told_once(programs: Programs, tmp_path: Path) -> None:
    """A folder in its place stands for a folder that is read-only: root may write to those."""
    plan = write_plan(tmp_path / "plans", b"vtrt " + PLAN, **RTX)
    plan.with_name("x.plan.cache").mkdir()
    ran = start_rtx(programs, plan)
    assert ran.code == 0
    wanted = (
        f"{plan}.cache: the runtime cache cannot be written (Is a directory); the next start compiles its kernels again"
    )
    assert ran.err.splitlines()[-1] == f"neck-engine: {wanted}"
    assert sorted(path.name for path in plan.parent.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


def test_two_starts_at_once_leave_one_whole_cache(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrt " + PLAN, **RTX)
    command = [programs.path("neck-engine-rtx"), plan, "--startup", "--batch"]
    environment = settings({"STAND_IN_VERSION": "1.7.1.116"})
    started = [
        subprocess.Popen([*command, str(batch)], env=environment, stdout=subprocess.DEVNULL) for batch in (1, 2, 3, 4)
    ]
    assert [process.wait(120) for process in started] == [0, 0, 0, 0]
    assert ", warm" in start_rtx(programs, plan).out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.plan", "x.plan.cache", "x.plan.json"]


def test_rtx_graphs_are_for_rtx_alone(programs: Programs, tmp_path: Path) -> None:
    ran = programs.run("neck-engine", write_plan(tmp_path), "--rtx-graph")
    assert "CUDA graphs of TensorRT-RTX's own need TensorRT-RTX, this program is of tensorrt" in ran.error
    plan = write_plan(tmp_path / "rtx", b"vtrt " + PLAN, **RTX)
    assert "need cuda_graph to be off" in start_rtx(programs, plan, "--rtx-graph", "--graph").error
    ran = start_rtx(programs, plan, "--rtx-graph", STAND_IN_FAIL="setCudaGraphStrategy")
    assert "no context to run it can be made" in ran.error


LOAD_FAILURES = [
    (
        "deserializeCudaEngine",
        f"TensorRT {VERSION} cannot load it (Error Code 4: Internal Error (the plan is corrupt)); ",
    ),
    ("createInferRuntime", f"TensorRT {VERSION} cannot load it (CUDA initialization failure); "),
    ("cudaMalloc:2", "out of device memory; "),
    ("enqueueV3", "the run failed (Error Code 1: Cuda Runtime (out of memory)); "),
]


@pytest.mark.parametrize(("call", "message"), LOAD_FAILURES)
def test_a_load_or_run_that_fails_is_told_in_pythons_words(
    programs: Programs, tmp_path: Path, call: str, message: str
) -> None:
    plan = write_plan(tmp_path)
    memory = "20.0 of 24.0 GB of device memory are free; if too little, end other programs or take a smaller batch"
    ran = programs.run("neck-engine", plan, STAND_IN_FAIL=call)
    assert (ran.code, ran.error) == (1, f"{plan}: {message}{memory}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.replace(b"8,4,4", b"8,4,2"), "x.plan.json: its tensors are not the engine's; build x.plan again"),
        (PLAN.replace(b"float16", b"int8"), "sam3_feat_0 is of another type (-1, 8, 4, 4); expected a batch of"),
        (PLAN.replace(b"-1,8,4,4", b"-1,-1,4,4"), "sam3_feat_0 is float16 (-1, -1, 4, 4); expected a batch of"),
    ],
)
def test_an_engine_that_is_not_its_manifests_is_refused(
    programs: Programs, tmp_path: Path, text: bytes, message: str
) -> None:
    ran = programs.run("neck-engine", write_plan(tmp_path, text))
    assert ran.code == 1
    assert message in ran.error


def test_a_picture_is_run(programs: Programs, tmp_path: Path) -> None:
    plan, picture = write_plan(tmp_path, PLAN + b"warn other GPU\n"), noise(tmp_path / "a.png", 40, 24)
    ran = programs.run("neck-engine", plan, picture, "--batch", 3, "--runs", 7, "--graph")
    assert ran.code == 0
    assert ran.err == "neck-engine: TensorRT warns: other GPU\n"
    lines = ran.out.splitlines()
    assert lines[0] == f"{plan}: fp16, TensorRT {VERSION} on NVIDIA L4 (compute capability 8.9)"
    assert [line.split(maxsplit=1) for line in lines[1:5]] == [
        ["picture", "40 x 24 pixels (height x width), 2.500000 x 1.500000 of them to one of the model's"],
        ["image", "float32 (3, 3, 16, 16)"],
        ["sam3_feat_0", "float16 (3, 8, 4, 4)"],
        ["sam3_pos_0", "float32 (3, 8, 4, 4)"],
    ]
    assert lines[5].split()[-6:] == ["p50", "p90", "p95", "p99", "mean", "runs"]
    assert lines[6] == "a run, CUDA graph, batch 3                1.500    1.500    1.500    1.500    1.500     7"


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
    found = stand_in_outputs(expected.pop("pixels"))
    found["sam3_feat_0"] = found["sam3_feat_0"].astype(np.float16)
    verdict = compare(expected, found, "fp16", "method")
    shown = CliRunner().invoke(_app(verdict))
    assert shown.output.splitlines()[1:] == ran.out.splitlines()[5:8]


def _app(verdict: Any) -> Any:  # noqa: ANN401
    """A command that prints a verdict as `neck-export verify` does."""
    import typer

    app = typer.Typer()
    app.command()(lambda: neck_export.show_verdict(verdict))
    return app


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((1, 16, 16, 3), np.float32)}, "is no reference, which has uint8 `pixels`"),
        ({"sam3_pos_0": np.zeros((2, 8, 4, 5), np.float32)}, "is (2, 8, 4, 4), the reference (2, 8, 4, 5)"),
        ({"sam3_pos_0": np.zeros((3, 8, 4, 4), np.float32)}, "is (3, 8, 4, 4), but pixels are (2, 16, 16, 3)"),
        ({"sam3_pos_0": np.zeros((2, 8, 4, 4))}, "'sam3_pos_0' is of type 'F64'; expected U8"),
        (
            {"sam3_pos_0": np.zeros((2, 8, 4, 4), np.uint8)},
            "output sam3_pos_0 is not in the reference, which has sam3_feat_0",
        ),
        ({"pixels": np.zeros((2, 8, 16, 3), np.uint8)}, "pixels are uint8 (2, 8, 16, 3); the model takes 16 x 16"),
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
        "2 pictures in batches of 5: the model takes image: float32 (1 to 4, 3, 16, 16); "
        "give another --batch or number of pictures"
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, depth: int, color: int, samples: np.ndarray, extra: bytes = b"") -> Path:
    """A PNG that Pillow does not write, such as 16-bit colour."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if depth == 16 else "u1").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def deep(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (9, 7, channels))


def turned(path: Path, orientation: int = 6, size: int = 13) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pictures_of(1, 1, 20)[0, :size, :16]).save(path, exif=exif)
    return path


Write = Callable[[Path], Path]
PICTURES: list[tuple[str, Write]] = [
    *[
        (f"{mode}.png", lambda path, mode=mode: write_picture(path, 20, mode))
        for mode in ("RGB", "RGBA", "L", "LA", "1", "P")
    ],
    ("grey-16.png", lambda path: write_png(path, 16, 0, deep(1))),
    ("colour-16.png", lambda path: write_png(path, 16, 2, deep(3))),
    ("alpha-16.png", lambda path: write_png(path, 16, 6, deep(4))),
    ("clear.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))),
    ("gamma.png", lambda path: write_png(path, 8, 2, deep(3) >> 8, chunk(b"gAMA", struct.pack(">I", 20000)))),
    ("P-clear.png", lambda path: write_picture(path, 20, "P", transparency=3)),
    ("RGB.jpg", lambda path: write_picture(path, 33)),
    ("sub.jpg", lambda path: write_picture(path, 33, subsampling=2, quality=60)),
    ("grey.jpg", lambda path: write_picture(path, 33, "L")),
    ("progressive.jpg", lambda path: write_picture(path, 33, progressive=True)),
    ("CMYK.jpg", lambda path: write_picture(path, 33, "CMYK")),
    ("grey-clear.png", lambda path: write_png(path, 8, 0, deep(1) >> 8, chunk(b"tRNS", bytes([0, 5])))),
    ("animated.png", lambda path: write_picture(path, 20, save_all=True, append_images=[Image.new("RGB", (20, 20))])),
    ("trailing.jpg", lambda path: longer(write_picture(path, 33))),
    *[(f"turned-{turn}.jpg", lambda path, turn=turn: turned(path, turn)) for turn in range(1, 9)],
    *[(f"turned-{turn}.png", lambda path, turn=turn: turned(path, turn)) for turn in (3, 6)],
]


def longer(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"something else")
    return path


@pytest.mark.parametrize(("name", "write"), PICTURES, ids=[name for name, _ in PICTURES])
def test_pixels_are_pythons(programs: Programs, tmp_path: Path, name: str, write: Write) -> None:
    """Bit for bit, before and after the normalisation."""
    path = write(tmp_path / name)
    pixels = read_picture(path)
    ended = subprocess.run([programs.path("probe"), "picture", path], capture_output=True, env=settings({}))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout[: pixels.size] == pixels.tobytes()
    assert ended.stdout[pixels.size :] == normalise(pixels[None]).numpy().tobytes()


BAD_PICTURES: list[tuple[str, Write, str]] = [
    ("none.png", lambda path: path, "cannot be opened (No such file or directory); check the path"),
    ("folder.png", lambda path: (path.mkdir(), path)[1], "cannot be opened (Is a directory); check the path"),
    ("pipe.png", lambda path: (os.mkfifo(path), path)[1], "cannot be opened (Invalid argument); check the path"),
    ("empty.png", lambda path: (path.touch(), path)[1], "is empty (0 bytes); fetch or save it again."),
    ("a.gif", write_picture, "is damaged or in no known format (PNG, JPEG); fetch it again or convert it to PNG."),
    ("cut.png", lambda path: cut(write_picture(path)), "is damaged ("),
    ("cut.jpg", lambda path: cut(write_picture(path)), "is damaged ("),
    ("short.jpg", lambda path: cut(write_picture(path), 2), "is damaged (it ends too early); "),
    ("zero.png", lambda path: write_png(path, 8, 2, np.zeros((16, 0, 3))), "is damaged (it tells no size, or has no "),
    (
        "bomb.png",
        lambda path: bomb(path),
        "has more than the 89478485 pixels that are safe to unpack; make it smaller.",
    ),
]


def bomb(path: Path) -> Path:
    """A few bytes that unpack to 10 GB."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def cut(path: Path, missing: int | None = None) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - (missing or len(data) // 4)])
    return path


@pytest.mark.parametrize(("name", "write", "message"), BAD_PICTURES, ids=[name for name, _, _ in BAD_PICTURES])
def test_a_bad_picture_is_refused(programs: Programs, tmp_path: Path, name: str, write: Write, message: str) -> None:
    picture = write(tmp_path / name)
    ran = programs.run("neck-engine", write_plan(tmp_path / "plan"), picture)
    assert (ran.code, ran.out) == (1, "")
    assert ran.error.startswith(f"{picture} {message}")


def noise(path: Path, height: int, width: int) -> Path:
    """Pixels without any order, where a wrong weight shows most, over a slope."""
    chance = np.random.default_rng(height * 10_000 + width)
    slope = np.linspace(0, 200, width)[None, :, None] + chance.integers(0, 56, (height, width, 3))
    Image.fromarray(slope.astype(np.uint8)).save(path, compress_level=1)
    return path


def resized(programs: Programs, size: tuple[int, int], threads: int, paths: list[Path]) -> np.ndarray:
    ended = subprocess.run(
        [programs.path("probe"), "resize", *map(str, size), str(threads), *paths], capture_output=True, env=settings({})
    )
    assert ended.returncode == 0, ended.stderr
    return np.frombuffer(ended.stdout, np.uint8).reshape(len(paths), *size, 3)


def levels_off(found: np.ndarray, paths: list[Path]) -> int:
    """The largest difference from neck/pictures.py, in levels of 255."""
    return int(np.abs(found.astype(int) - load_pictures(paths, found.shape[1:3])).max())


SIDES = [1, 2, 3, 5, 14, 27, 28, 29, 31, 56, 57, 97, 111, 260, 333]


def test_any_picture_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    """196 sizes, up and down, odd ratios, with one thread and with three; the control is another picture."""
    chance = random.Random(3)
    sizes = [(height, width) for height in SIDES for width in SIDES if height * width < 333 * 260]
    sizes += [(1, 6000), (4000, 1), (700, 900)]
    paths = [noise(tmp_path / f"{index}.{chance.choice(['png', 'jpg'])}", *size) for index, size in enumerate(sizes)]
    assert len(paths) > 190
    found = resized(programs, (28, 56), 1, paths)
    assert levels_off(found, paths) <= 1
    assert levels_off(found[:9], paths[1:10]) > 20
    assert levels_off(resized(programs, (42, 28), 3, paths[::4]), paths[::4]) <= 1


@pytest.mark.slow
def test_a_large_picture_is_resized_as_python_does_it(programs: Programs, tmp_path: Path) -> None:
    paths = [noise(tmp_path / "large.png", 6000, 4000), noise(tmp_path / "large.jpg", 4000, 6000)]
    for size in ((1008, 1008), (1008, 672)):
        assert levels_off(resized(programs, size, 2, paths), paths) <= 1


def serve(programs: Programs, folder: Path, *options: Any, **environment: str) -> Any:  # noqa: ANN401
    arguments = (folder / "plan" / "x.plan", "--serve-folder", folder / "in", folder / "out", *options)
    return programs.run("neck-engine", *arguments, **environment)


def folder_of(folder: Path, count: int) -> list[Path]:
    """A plan and pictures of it, every tenth damaged."""
    write_plan(folder / "plan")
    (folder / "in").mkdir()
    paths = [noise(folder / "in" / f"{index:03}.{('png', 'jpg')[index % 2]}", 20, 16 + index) for index in range(count)]
    for path in paths[::10]:
        cut(path)
    (folder / "in" / "notes.txt").touch()
    (folder / "in" / ".hidden.png").touch()
    return paths


def check_features(folder: Path, paths: list[Path]) -> None:
    """Every picture that can be read has its own features, whole, with its size; nothing else is there."""
    good = [path for index, path in enumerate(paths) if index % 10]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [f"{path.name}.safetensors" for path in good]
    wanted = stand_in_outputs(load_pictures(good, (16, 16)))
    for index, path in enumerate(good):
        with safe_open(folder / "out" / f"{path.name}.safetensors", "np") as stored:
            told = stored.metadata()
            assert (told["height"], told["width"]) == ("20", str(read_picture(path).shape[1]))
            assert float(told["scale_y"]) == 1.25
            for name, values in wanted.items():
                found = stored.get_tensor(name)
                assert found.shape == (1, 8, 4, 4)
                assert (
                    np.abs(found - values[index]).max() < 4.3 / 255
                )  # one level of 2 / 255, doubled, and a half's step


MOMENTS = ["enqueueV3:1", "cudaMemcpyAsync:4", "cudaStreamSynchronize:2", "enqueueV3:3", "cudaEventRecord:9"]


@pytest.mark.parametrize(
    ("count", "moments"), [(61, MOMENTS), pytest.param(500, [*MOMENTS, *MOMENTS], marks=pytest.mark.slow)]
)
def test_a_folder_is_served_and_resumed_after_kills(
    programs: Programs, tmp_path: Path, count: int, moments: list[str]
) -> None:
    paths = folder_of(tmp_path, count)
    before: dict[Path, int] = {}
    for moment in moments:
        assert serve(programs, tmp_path, STAND_IN_KILL=moment).code == -9
        found = list((tmp_path / "out").glob("*.safetensors"))
        assert all(len(load_file(path)) == 2 for path in found)  # whole
        now = {path: path.stat().st_ino for path in found}
        assert now.items() >= before.items()  # what was done is not done again
        before = now
    ran = serve(programs, tmp_path)
    bad = (count + 9) // 10
    assert ran.code == 0
    assert ran.out == (
        f"{tmp_path / 'out'}: features of {count - bad - len(before)} pictures written, {len(before)} were there, "
        f"{bad} cannot be read\n"
    )
    assert len(ran.err.splitlines()) == bad
    assert all(line.startswith(f"neck-engine: left out: {tmp_path / 'in'}") for line in ran.err.splitlines())
    check_features(tmp_path, paths)
    assert {path: path.stat().st_ino for path in before} == before


def test_a_folder_that_cannot_be_served_is_told(programs: Programs, tmp_path: Path) -> None:
    paths = folder_of(tmp_path, 3)
    assert serve(programs, tmp_path, "--batch", 3).code == 0  # two pictures that can be read: not filled
    check_features(tmp_path, paths)
    wrong = serve(programs, tmp_path, "--batch", 5)
    assert wrong.code == 1
    assert "batches of 5 pictures; expected image: float32 (1 to 4, 3, 16, 16)" in wrong.err.splitlines()[-1]
    write_plan(tmp_path / "plan", PLAN + b"scratch 2000\n")
    ran = serve(programs, tmp_path)
    assert (ran.code, ran.out) == (1, "")
    assert ran.error.endswith("has features of another plan; give another folder, or remove them")
    for path in paths:
        path.unlink()
    assert serve(programs, tmp_path).error.endswith("put files there that end in .png, .jpg or .jpeg")
    assert "cannot be listed" in programs.run("neck-engine", tmp_path, "--serve-folder", "none", tmp_path).error
    assert programs.run("neck-engine", tmp_path, "--serve-folder", tmp_path).code == 2


def test_a_plan_of_a_fixed_batch_serves_fewer(programs: Programs, tmp_path: Path) -> None:
    """One picture for a plan that takes two."""
    paths = folder_of(tmp_path, 2)
    text = PLAN.replace(b"-1,3,16,16 1,2,4", b"2,3,16,16 2,2,2").replace(b"-1,8", b"2,8")
    facts = {"inputs": [{"name": "image", "dtype": "float32", "shape": [2, 3, 16, 16]}]}
    shapes = [{"name": name, "dtype": kind, "shape": [2, 8, 4, 4]} for name, kind in OUTPUT_TYPES.items()]
    write_plan(tmp_path / "plan", text, **facts, outputs=shapes, batch="2")
    ran = serve(programs, tmp_path)
    assert ran.code == 0, ran.err
    check_features(tmp_path, paths)


OUTPUT_TYPES = {"sam3_feat_0": "float16", "sam3_pos_0": "float32"}


def test_halves_are_numpys(programs: Programs) -> None:
    ended = subprocess.run([programs.path("probe"), "half"], capture_output=True, env=settings({}))
    found = np.frombuffer(ended.stdout, np.float32)
    with np.errstate(invalid="ignore"):
        wanted = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(wanted))


def mutants(data: bytes, seed: int, count: int = MUTANTS) -> list[bytes]:
    """The file cut anywhere, with bytes changed, removed, repeated, or with the largest numbers in it."""
    chance, made = random.Random(seed), []
    for number in range(count):
        copy = bytearray(data)
        place = chance.randrange(len(copy))
        if number % 5 == 0:
            del copy[place:]
        elif number % 5 == 1:
            copy[place : place + 4] = b"\xff" * chance.choice([1, 2, 4, 8])
        elif number % 5 == 2:
            del copy[place : place + chance.randrange(1, 9)]
        elif number % 5 == 3:
            copy[place:place] = copy[place : place + 40]
        else:
            for _ in range(chance.randrange(1, 6)):
                copy[chance.randrange(len(copy))] = chance.randrange(256)
        made.append(bytes(copy))
    return made


def small_safetensors(path: Path) -> Path:
    save_file({"pixels": np.zeros((1, 2, 2, 3), np.uint8), "a": np.arange(6, dtype=np.float32)}, path)
    return path


def one_plan(path: Path) -> Path:
    return manifest_path(write_plan(path.parent))


@pytest.mark.parametrize(
    ("kind", "write"),
    [
        ("safetensors", lambda folder: small_safetensors(folder / "x.safetensors")),
        ("pictures", lambda folder: write_picture(folder / "x.png")),
        ("pictures", lambda folder: write_picture(folder / "x.jpg")),
        ("pictures", lambda folder: turned(folder / "x.png", size=16)),
        ("plan", lambda folder: one_plan(folder / "x")),
    ],
    ids=["safetensors", "png", "jpeg", "exif", "manifest"],
)
def test_damaged_files_do_no_harm(programs: Programs, tmp_path: Path, kind: str, write: Write) -> None:
    """Each is read or refused in one line; the sanitizers see the rest."""
    whole = write(tmp_path)
    files = []
    for number, data in enumerate([whole.read_bytes(), *mutants(whole.read_bytes(), seed=7)]):
        folder = tmp_path / f"mutant{number}"
        folder.mkdir()
        files.append(folder / (whole.name if kind != "plan" else "x.plan"))
        files[-1].write_bytes(data if kind != "plan" else PLAN)
        if kind == "plan":
            manifest_path(files[-1]).write_bytes(data)
    ran = programs.run("probe", kind, *files)
    assert ran.code == 0
    assert all(line.startswith("libpng warning: ") for line in ran.err.splitlines())  # GD leaves them on stderr
    lines = ran.out.splitlines()
    assert len(lines) == len(files)
    assert lines[0].startswith("read:")
    errors = [line for line in lines[1:] if line.startswith("error: ")]
    assert len(errors) > MUTANTS // 2
    assert all(line.startswith("read:") for line in lines[1:] if line not in errors)


def test_arrays_are_numpys(programs: Programs, tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(3, np.int64),
        "c": np.zeros((0, 4), np.uint8),
        "d": np.arange(5, dtype=np.int32),
        "e": np.array([1.5, -2], np.float16),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"made": "by hand"})
    ran = programs.run("probe", "safetensors", tmp_path / "x.safetensors")
    wanted = {f"{name} {value.dtype} {value.shape} sum {float(value.sum()):.6f}" for name, value in arrays.items()}
    assert set(ran.out.strip().removeprefix("read: ").removesuffix(";").split("; ")) == wanted


def raw(header: str, data: bytes = bytes(8)) -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def entry(begin: int, end: int, shape: str = "[1]", dtype: str = '"F32"') -> str:
    return f'{{"dtype": {dtype}, "shape": {shape}, "data_offsets": [{begin}, {end}]}}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234567", "is damaged: it ends too early"),
        (struct.pack("<Q", 2**63), "is no safetensors file, or its end is missing"),
        (raw("[1]"), "its header is no JSON object"),
        (raw(f'{{"a": {entry(0, 4)}}}'), "is damaged: it has 4 bytes more than its tensors"),
        (raw(f'{{"a": {entry(0, 4)}, "b": {entry(0, 4)}}}'), "is damaged: 'b' is not where it should be"),
        (raw(f'{{"a": {entry(0, 4)}, "b": {entry(8, 12)}}}'), "is damaged: 'b' is not where it should be"),
        (raw(f'{{"a": {entry(4, 0)}}}'), "'a' has no place in the file"),
        (raw(f'{{"a": {entry(0, 8)}}}'), "'a' has 8 bytes, not those of float32 (1,)"),
        (raw(f'{{"a": {entry(0, 8, "[-2]")}}}'), "'a' has sides or offsets that are no numbers"),
        (raw(f'{{"a": {entry(0, 8, "[4294967296, 4294967296, 4294967296]")}}}'), "'a': a tensor cannot be float32"),
        (raw(f'{{"a": {entry(0, 8, dtype="3")}}}'), "'a' is of type '3'; expected U8"),
        (raw('{"a": 3}'), "'a' is not described as it should be"),
        (raw(f'{{"\\u001b[2J": {entry(0, 4)}}}'), "has a tensor with the odd name '\\x1b[2J'"),
    ],
)
def test_a_safetensors_file_that_is_not_whole_is_refused(
    programs: Programs, tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    ran = programs.run("probe", "safetensors", tmp_path / "x.safetensors")
    assert ran.out.startswith(f"error: {tmp_path / 'x.safetensors'}: {message}")
    assert ran.out.endswith("; `neck-export verify --save-reference` writes such a file\n")


def test_a_closed_or_full_standard_output_is_an_error(programs: Programs, tmp_path: Path) -> None:
    command, plan = programs.path("neck-engine"), write_plan(tmp_path)
    for target, message in ((">&-", "standard output is closed"), (">/dev/full", "standard output cannot be written")):
        shell = f'exec "$0" "$1" --runs 1 {target}'
        ended = subprocess.run(["sh", "-c", shell, command, plan], capture_output=True, text=True, env=settings({}))
        assert ended.returncode == 1
        assert message in ended.stderr
        assert plan.read_bytes() == PLAN
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([command, plan, "--runs", "1"], stdout=writer, stderr=subprocess.PIPE, env=settings({}))
    os.close(writer)
    assert ended.returncode == 1
    assert b"standard output cannot be written" in ended.stderr


USAGE: list[list[Any]] = [[], ["a", "b", "c"], ["x", "--batch", "0"], ["x", "--runs", "many"], ["x", "--other"]]


@pytest.mark.parametrize("arguments", [*USAGE, ["x", "--compare"], ["x", "--batch", "99999999999999999999"]])
def test_wrong_usage_is_told(programs: Programs, arguments: list[Any]) -> None:
    ran = programs.run("neck-engine", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("neck-engine: ")
    assert "Usage: neck-engine PLAN" in ran.err


def test_the_help_and_the_manifest_need_no_gpu(programs: Programs, tmp_path: Path) -> None:
    assert programs.run("neck-engine", "--help", STAND_IN_DEVICES="0").out.startswith("Usage: neck-engine PLAN")
    plan = write_plan(tmp_path)
    ran = programs.run("neck-engine", plan, "--manifest", STAND_IN_DEVICES="0")
    assert ran.code == 0
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[1:5] == [f"TensorRT tensorrt {VERSION}", "compute capability 8.9", "precision fp16", "batch 1:2:4"]
    assert lines[7:] == ["verification verified: by hand", "files whole: x.plan"]
    spoil(plan, files=[])
    assert programs.run("neck-engine", plan, "--manifest").code == 1
