"""neck-engine's checks of a plan, its manifest and the machine, in Python's words; loads that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cpp_build import (
    PLAN,
    RTX,
    VERSION,
    Programs,
    spoil,
    why_missing,
    write_plan,
)
from test_session import CAPABILITIES, FakeFlavor

from engines.builder.find_gpu import Gpu
from engines.builder.flavor import Flavor
from engines.run.inputs import SessionError
from engines.run.plan_checks import check_plan
from export.contract.manifest import manifest_path

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


L4 = Gpu("NVIDIA L4", "8.9", "570.86", "12.8")

Spoil = Callable[[Path], object]


def later(plan: Path, version: str) -> None:
    options = {"version_compatible": True, "hardware_compatible": "none"}
    spoil(plan, tensorrt_version=version, options=options)


def with_another_file(plan: Path, entry: dict[str, object]) -> None:
    spoil(plan, files=[*json.loads(manifest_path(plan).read_text())["files"], entry])


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
    ("a file that is missing", lambda plan: with_another_file(plan, {"name": "y", "bytes": 1, "sha256": "0"})),
    ("no inputs", lambda plan: spoil(plan, inputs=None)),
    ("no flavor", lambda plan: spoil(plan, flavor=None)),
    ("no version", lambda plan: spoil(plan, tensorrt_version=None)),
    ("no options", lambda plan: spoil(plan, options=None)),
    ("no compute capabilities", lambda plan: spoil(plan, compute_capabilities=None)),
    ("the magic of another flavor", lambda plan: spoil(plan, flavor="rtx")),
    ("an older TensorRT's plan", lambda plan: spoil(plan, tensorrt_version="10.9.0.34")),
    ("a newer TensorRT's plan", lambda plan: spoil(plan, tensorrt_version="11.4.0.106")),
    ("a later compatible plan", lambda plan: later(plan, "11.4.0.106")),
    ("three numbers of another release", lambda plan: spoil(plan, tensorrt_version="10.16.0")),
    ("a suffix on another release", lambda plan: spoil(plan, tensorrt_version="10.15.1.post1")),
    ("three numbers of a later release, compatible", lambda plan: later(plan, "10.17.0")),
    ("two numbers", lambda plan: spoil(plan, tensorrt_version="10.16")),
    ("another GPU's plan", lambda plan: spoil(plan, compute_capabilities=["8.6", "12.0"])),
]


def tensorrt(gpu: Gpu | None = L4, version: str = VERSION) -> Flavor:
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


@pytest.mark.parametrize(
    ("built", "library"),
    [
        ("10.5.0", "10.5.0.18"),  # as NVIDIA's wheels 10.3 to 10.6 report themselves
        ("10.3.0", "10.3.0.26"),
        ("10.7.0.post1", "10.7.0.23"),
        ("10.16.1.11", "10.16.1.11"),
    ],
)
def test_a_wheels_version_is_its_librarys(programs: Programs, tmp_path: Path, built: str, library: str) -> None:
    plan = write_plan(tmp_path, tensorrt_version=built)
    assert python_says(plan, tensorrt(version=built)) is None
    assert python_says(plan, tensorrt(version=library)) is None
    ran = programs.run("neck-engine", plan, "--runs", 1, STAND_IN_VERSION=library)
    assert ran.code == 0, ran.err
    refused = programs.run("neck-engine", plan, "--runs", 1, STAND_IN_VERSION="10.6.0.26")  # the control
    assert (refused.code, refused.error) == (1, python_says(plan, tensorrt(version="10.6.0.26")))
    later(plan, built)
    assert programs.run("neck-engine", plan, "--runs", 1, STAND_IN_VERSION="11.4.0.106").code == 0


def test_a_plan_with_a_lean_runtime_is_loaded_with_consent(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, PLAN + b"lean\n", options={"version_compatible": True, "hardware_compatible": "none"})
    assert programs.run("neck-engine", plan, "--runs", 1).code == 0
    refused = programs.run("neck-engine", write_plan(tmp_path, PLAN + b"lean\n"), "--runs", 1)  # the control
    assert refused.code == 1 and "host code is not allowed" in refused.err


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"kind": "plan", "format": 1e999}'])
def test_a_manifest_that_is_no_json_is_refused(programs: Programs, tmp_path: Path, text: bytes) -> None:
    plan = write_plan(tmp_path)
    manifest_path(plan).write_bytes(text)
    ran = programs.run("neck-engine", plan)
    assert ran.code == 1
    assert ran.error.startswith(f"{plan}.json: the manifest cannot be read (")
    assert ran.error.endswith("); build the plan again")


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
def test_a_manifest_with_odd_values_is_refused(programs: Programs, tmp_path: Path, key: str, value: Any) -> None:
    plan = write_plan(tmp_path)
    spoil(plan, **{key: value})
    ran = programs.run("neck-engine", plan)
    assert ran.code == 1
    assert ran.error.startswith(f"{plan}.json: the manifest is damaged (")
    assert ran.error.endswith("; build x.plan again")


def test_a_machine_that_cannot_run_it_is_told_in_pythons_words(programs: Programs, tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    ran = programs.run("neck-engine", plan, STAND_IN_DEVICES="0")
    assert ran.code == 1
    why = " CUDA reports: CUDA driver version is insufficient for CUDA runtime version."
    assert why in ran.error and ran.error.replace(why, "") == python_says(plan, tensorrt(None))
    ran = programs.run("neck-engine", plan, STAND_IN_CAPABILITY="7.5")
    assert ran.error == python_says(plan, tensorrt(Gpu("NVIDIA L4", "7.5", "", "")))
    ran = programs.run("neck-engine", plan, STAND_IN_VERSION="11.4.0.106")
    assert ran.error == python_says(plan, tensorrt(version="11.4.0.106"))
    assert (
        programs.run("neck-engine", plan, "--device", 1).error
        == f"{plan}: there is no GPU 1; the number of GPUs in this machine is 1, and they are numbered from 0"
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
    said = python_says(plan, FakeFlavor("rtx", None, "1.7.1.116", CAPABILITIES, gpu))
    environment = {"STAND_IN_VERSION": "1.7.1.116", "STAND_IN_CAPABILITY": capability}
    ran = programs.run("neck-engine-rtx", plan, "--runs", 1, **environment)
    assert ran.code == (0 if said is None else 1)
    if said is None:
        assert "TensorRT-RTX 1.7.1.116 on NVIDIA L4" in ran.out
    else:
        assert ran.error == said
    assert programs.run("neck-engine", plan).code == 1  # the other flavor's program


LOAD_FAILURES = [
    (
        "deserializeCudaEngine",
        f"TensorRT {VERSION} cannot load the plan (Error Code 4: Internal Error (the plan is corrupt)); ",
    ),
    ("createInferRuntime", f"TensorRT {VERSION} cannot load the plan (CUDA initialization failure); "),
    ("cudaMalloc:2", "allocating device memory failed: out of device memory; "),
    ("enqueueV3", "the run failed (Error Code 1: Cuda Runtime (out of memory)); "),
]


@pytest.mark.parametrize(("call", "message"), LOAD_FAILURES)
def test_a_load_or_run_that_fails_is_told_in_pythons_words(
    programs: Programs, tmp_path: Path, call: str, message: str
) -> None:
    plan = write_plan(tmp_path)
    memory = (
        "20.0 of 24.0 GB of device memory are free; if that is too little, close other programs or use a smaller batch"
    )
    ran = programs.run("neck-engine", plan, STAND_IN_FAIL=call)
    assert (ran.code, ran.error) == (1, f"{plan}: {message}{memory}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            PLAN.replace(b"8,4,4", b"8,4,2"),
            "x.plan.json: the tensors in the manifest differ from the engine's; build x.plan again",
        ),
        (
            PLAN.replace(b"float16", b"int8"),
            "the data type of the plan's tensor sam3_feat_0 is not supported",
        ),
        (
            PLAN.replace(b"-1,8,4,4", b"-1,-1,4,4"),
            "the plan's tensor sam3_feat_0 has the shape (-1, -1, 4, 4), which is not supported",
        ),
    ],
)
def test_an_engine_that_is_not_its_manifests_is_refused(
    programs: Programs, tmp_path: Path, text: bytes, message: str
) -> None:
    ran = programs.run("neck-engine", write_plan(tmp_path, text))
    assert ran.code == 1
    assert message in ran.error
