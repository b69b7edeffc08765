"""The whole GPU side from the command line to its end, on a CPU: TensorRT and torch.cuda are fakes.

A played plan carries its ONNX file, and a run is its rounding simulation in ONNX Runtime. What only a GPU can show
(speed, what a fused kernel accumulates in, what a driver says) is marked `gpu` elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import shared_encoder, tiny_config
from exporting import golden_options, neck_export_cli, plant_in_trunk, save_state, trace_quickly
from fake_gpu.device import Device
from fake_gpu.play import play, put_smi
from fake_gpu.runtime import LAYER_MS
from fake_gpu.state import State
from fake_gpu.tensorrt import LISTINGS
from safetensors.numpy import load_file
from test_session import build_convolution, convolution

import engines.bisect
from engines.builder.flavor import choose_flavor
from engines.layers.layer_report import read_layers
from engines.run.inputs import SessionError
from engines.run.open_plan import open_plan
from engines.run.profiling import LAYER_RUNS, LAYER_WARM_UP_RUNS
from engines.run.verify import why_not_run
from engines.tune import FORMS, ROUNDS
from export.contract.manifest import manifest_path, read_manifest
from export.contract.signature import BatchRange
from export.pipeline import export_onnx
from neck.checkpoint import save_meta_checkpoint

BLOCKS = 2
CONFIG = tiny_config(embed_dim=32, d_model=16, depth=BLOCKS, global_blocks=(1,))
"""meta-dual's with half of its blocks, so that its trace serves."""

OLD = ("10.3", "10.13")
"""Their parser has no Attention."""

HOPPER = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}


@pytest.fixture(scope="module", autouse=True)
def _quick_traces() -> Any:
    """One trace serves every export and every search of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch, engines.bisect)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of one neck by name: of a dynamic batch, which one trace serves, and of meta-dual, a fixed batch."""
    folder = tmp_path_factory.mktemp("played")
    save_meta_checkpoint(shared_encoder(CONFIG), folder / "checkpoint.pt")
    same = {"necks": "sam3", "batch": BatchRange(1, 2, 3), "checkpoint": folder / "checkpoint.pt", "verify": False}
    same["config"] = CONFIG
    forms: dict[str, dict[str, Any]] = {
        "half": {**same, "precision": "fp16"},
        "operator": {**same, "precision": "fp16", "opset": 23},
        "single": {**same, "verify": True},
        "faulty": {"necks": "sam3", "precision": "fp16", "verify": False},
    }
    forms["faulty"]["checkpoint"] = save_state(folder / "faulty.pt", plant_in_trunk)
    return {
        name: export_onnx(golden_options("meta-dual", folder / f"{name}.onnx", **values)).path
        for name, values in forms.items()
    }


def built(files: dict[str, Path], folder: Path, version: str = "11.4") -> Path:
    """A verified plan of the version that is played."""
    plan = folder / "e.plan"
    ran = neck_export_cli("trt", files["half"], "--output", plan)
    assert ran.code == 0, ran.err
    return plan


def copied(files: dict[str, Path], folder: Path, version: str = "11.4") -> Path:
    """A copy of a plan that one test has built, where the build itself is not what is tested."""
    kept = files["half"].parent.parent / f"built-{version}"  # as deep as a test's folder: the manifest names the file
    if not kept.exists():
        kept.mkdir()
        built(files, kept, version)
    for file in kept.iterdir():
        shutil.copy(file, folder)
    return folder / "e.plan"


def refused(state: State, folder: Path, *words: str | Path, code: int = 1) -> str:
    """What a command says that fails, in one or two lines; nothing of its output is left but what was rejected."""
    ran = neck_export_cli(*words)
    assert ran.code == code, (ran.out, ran.err)
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and len(ran.err.splitlines()) - ran.err.splitlines().index(errors[0]) <= 2
    assert not (folder / "e.plan").exists() and not list(folder.glob(".*"))
    return ran.err


def flag_of(config: Any, name: str) -> bool:
    """Whether a builder's config has a flag."""
    return bool(config.get_flag(type(config).trt.BuilderFlag[name]))


@pytest.mark.parametrize("version", LISTINGS)
def test_every_version_builds_verifies_and_profiles(files: dict[str, Path], tmp_path: Path, version: str) -> None:
    with play(version) as state:
        plan = built(files, tmp_path, version)
        manifest = read_manifest(manifest_path(plan), "plan")
        assert manifest["verification"]["verified"] is True
        assert "NVIDIA L4 (compute capability 8.9, driver 580.95.05)" in manifest["verification"]["method"]
        assert manifest["layers"].startswith(f"fused attentions {BLOCKS} of {BLOCKS}, ")
        assert manifest["no_layers"] is None
        verified = neck_export_cli("verify", plan)
        assert verified.code == 0 and "sam3_feat_0" in verified.out and verified.out.count(" ok") == 8
        profile = neck_export_cli("profile", plan, "--json")
        assert profile.code == 0, profile.err
        told = json.loads(profile.out)
        assert told["graph_latency"] is not None and told["graph_problem"] is None
        assert (told["weights_bytes"] is None) == (version in OLD)
        assert neck_export_cli("inspect", plan).code == 0
        assert state.configs and not any(flag_of(config, "TF32") for config in state.configs)


@pytest.mark.parametrize(("version", "told"), [("10.3", "10.3.0"), ("10.5", "10.5.0"), ("10.7", "10.7.0.post1")])
def test_a_wheel_whose_version_is_not_four_numbers(tmp_path: Path, version: str, told: str) -> None:
    """The wheels of 10.3 to 10.6 report three numbers, and one of 10.7 a suffix."""
    with play(version) as state:
        flavor = choose_flavor()
        plan = build_convolution(tmp_path, flavor)
        assert len(state.version) == 4 and (flavor.version, flavor.target) == (told, f"tensorrt-{version}")
        image = np.ones((2, 3, 8, 8), np.float32)
        with open_plan(plan) as session:
            assert (session.infer({"image": image})["sum"] == 3).all()
    with play("10.13"), pytest.raises(SessionError, match=told):  # the control
        open_plan(plan)


def test_a_driver_that_is_too_old_for_tensorrt_is_told(tmp_path: Path) -> None:
    """The bindings say `factory function returned nullptr`; the `gpu` extra brings TensorRT 11, which needs CUDA 13."""
    old = {"driver": "550.54.15", "cuda": 12040}
    onnx = convolution(tmp_path, "1")
    with play("11.4"):
        plan = build_convolution(tmp_path, choose_flavor())
    words: list[tuple[str | Path, ...]] = [("trt", onnx, "--flavor", "tensorrt", "--output", tmp_path / "e.plan")]
    words += [("verify", plan), ("profile", plan)]
    with play("11.4", Device(**old)) as state:  # type: ignore[arg-type]
        for command in words:
            said = refused(state, tmp_path, *command)
            assert "driver 550.54.15 supports CUDA 12.4" in said and "needs CUDA 13" in said
            assert "pip install tensorrt-cu12" in said and "nullptr" not in said
        flavor = choose_flavor("tensorrt")
        assert flavor.driver_problem() and why_not_run(plan, read_manifest(manifest_path(plan), "plan"), flavor) is None
    with play("10.16", Device(**old)):  # type: ignore[arg-type]
        assert choose_flavor("tensorrt").driver_problem() is None
        build_convolution(tmp_path, choose_flavor("tensorrt"))  # the control
    with play("rtx-1.7", Device(**old)) as state:  # type: ignore[arg-type]
        rtx = choose_flavor("rtx")
        plan = build_convolution(tmp_path, rtx)  # it builds without a driver, too
        why = why_not_run(plan, read_manifest(manifest_path(plan), "plan"), rtx)
        assert why and "needs CUDA 13" in why and "tensorrt-rtx-cu12" in why
        assert "needs CUDA 13" in refused(state, tmp_path, "profile", plan)


def test_a_version_compatible_plan_runs_with_consent_alone(files: dict[str, Path], tmp_path: Path) -> None:
    """Also in the TensorRT that built it, and for the engine inspector, which loads the plan to read its layers."""
    words = ("trt", files["half"], "--version-compatible", "--output", tmp_path / "e.plan")
    with play("11.4") as state:
        state.faults.log = ""
        ran = neck_export_cli(*words)
        assert ran.code == 0, ran.err
        layers = read_layers(tmp_path / "e.plan")
        assert layers and layers.source == "engine inspector"
        import tensorrt as trt

        runtime = trt.Runtime(choose_flavor().new_logger(lambda severity, line: None))
        assert runtime.deserialize_cuda_engine((tmp_path / "e.plan").read_bytes()) is None  # the control
        runtime.engine_host_code_allowed = True
        assert runtime.deserialize_cuda_engine((tmp_path / "e.plan").read_bytes()) is not None
    with play("11.4") as state:
        plan = built(files, tmp_path)
        assert state.configs and neck_export_cli("profile", plan, "--json").code == 0


def test_rtx_is_built_and_run_so_that_a_graph_can_be_captured(files: dict[str, Path], tmp_path: Path) -> None:
    with play("rtx-1.7") as state:
        plan = built(files, tmp_path)
        (config,) = state.configs
        assert flag_of(config, "REQUIRE_USER_ALLOCATION")
        (context,) = state.contexts
        strategy = context._config.dynamic_shapes_kernel_specialization_strategy
        assert strategy.name == "EAGER"
        state.faults.capturable = False
        told = json.loads(neck_export_cli("profile", plan, "--json").out)
        assert told["graph_latency"] is None and "TensorRT-RTX reports that no CUDA graph" in told["graph_problem"]


@pytest.mark.parametrize(
    ("version", "file", "spelling", "told"),
    [
        (
            "10.13",
            "operator",
            "matmul",
            "the attention was rewritten to match --attention fp32acc (written as MatMul, Softmax and MatMul): both",
        ),
        ("10.13", "half", "matmul", None),
        (
            "11.4",
            "half",
            "operator",
            "the attention was rewritten to match --attention fp32acc (written as the Attention operator): both",
        ),
        ("rtx-1.7", "half", "matmul", None),
    ],
)
def test_every_version_gets_its_spelling(
    files: dict[str, Path], tmp_path: Path, version: str, file: str, spelling: str, told: str | None
) -> None:
    with play(version):
        ran = neck_export_cli("trt", files[file], "--output", tmp_path / "e.plan")
    assert ran.code == 0, ran.err
    assert read_manifest(manifest_path(tmp_path / "e.plan"), "plan")["attention_spelling"] == spelling
    assert (
        any(line.startswith(told) for line in ran.out.splitlines())
        if told
        else "attention was rewritten" not in ran.out
    )


def test_a_version_that_is_too_old_is_not_taken(files: dict[str, Path], tmp_path: Path) -> None:
    with play("10.3") as state:
        state.device = None
        import tensorrt

        tensorrt.__version__ = "10.2.0"
        words = ("trt", files["half"], "--flavor", "tensorrt", "--output", tmp_path / "e.plan")
        assert "tensorrt has version 10.2.0" in refused(state, tmp_path, *words)
        tensorrt.__version__ = "10.3.0"
        options = ("--hardware-compatible", "same")
        assert "same needs TensorRT 10.9 or later, but the plan is built with TensorRT 10.3.0" in refused(
            state, tmp_path, *words, *options
        )
        tensorrt.__version__ = "11.0.0.1"


@pytest.mark.parametrize(
    ("log", "inspector", "source"),
    [
        (None, "{}", "builder log"),
        ("", None, "engine inspector"),
        ("Layers:\nsomething else\n", None, "engine inspector"),
        ("", "{}", None),
        ("", '{"Layers": [{"Inputs": 3, "LayerType": []}]}', None),
        ("Layers:\nName: x, LayerType: kgen, Inputs: [{ Name: , Dimensions: [-], Datatype: }]", "[1", "builder log"),
    ],
)
def test_a_layers_that_cannot_be_read_costs_no_plan(
    files: dict[str, Path], tmp_path: Path, log: str | None, inspector: str | None, source: str | None
) -> None:
    with play("10.16") as state:
        state.faults.log, state.faults.inspector = log, inspector
        ran = neck_export_cli("trt", files["half"], "--output", tmp_path / "e.plan")
        assert ran.code == 0, ran.err
        shown = neck_export_cli("inspect", tmp_path / "e.plan")
    layers, manifest = read_layers(tmp_path / "e.plan"), read_manifest(manifest_path(tmp_path / "e.plan"), "plan")
    assert (layers.source if layers else None) == source
    if layers is None:
        assert manifest["layers"] is None
        assert "builder log gave no information" in ran.out and "engine inspector" in ran.out
        assert f"no layer report: {manifest['no_layers']}" in shown.out
    else:
        assert layers.operations and not {kernel.kind for kernel in layers.kernels} & {"wait", "signal"}


FAULTS: list[tuple[str, dict[str, Any], int, str]] = [
    (
        "builder",
        {"builder": "Error Code 10: no implementation for node fc1"},
        1,
        "Error",
    ),
    ("memory", {"builder": "Error Code 2: OutOfMemory (bad_alloc)"}, 1, "out of host memory"),
    (
        "load",
        {"load": "Error Code 1: Cuda Runtime (out of memory)"},
        1,
        "cannot load the plan (Error Code 1",
    ),
    ("run", {"run": "Error Code 1: Cuda Runtime (launch failed)"}, 1, "the run failed (Error Code 1: Cuda Runtime"),
    ("address", {"address": True}, 1, "TensorRT does not accept the address of the tensor image: Error Code 3"),
    ("outputs", {"distort": lambda name, value: -value if name == "sam3_feat_2" else value}, 3, "sam3_feat_2"),
    ("infinite", {"distort": lambda name, value: value / np.float32(0)}, 3, "non-finite"),
]


@pytest.mark.parametrize(("faults", "code", "says"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_what_goes_wrong_is_told(
    files: dict[str, Path], tmp_path: Path, faults: dict[str, Any], code: int, says: str
) -> None:
    with play("11.4") as state, np.errstate(all="ignore"):
        for name, value in faults.items():
            setattr(state.faults, name, value)
        said = refused(state, tmp_path, "trt", files["half"], "--output", tmp_path / "e.plan", code=code)
    assert says in said
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"e.plan.rejected", "e.plan.rejected.json"} if code == 3 else set())


def test_too_little_device_memory_is_told(files: dict[str, Path], tmp_path: Path) -> None:
    with play("11.4") as state:
        assert state.device is not None
        plan = copied(files, tmp_path)
        state.device.free_bytes = 1000
        ran = neck_export_cli("verify", plan)
        assert ran.code == 1 and "out of device memory; 0.0 of 25.8 GB of device memory are free" in ran.err
        ran = neck_export_cli("profile", plan)
        assert ran.code == 1 and "out of device memory; profiling needs" in ran.err


@pytest.mark.parametrize(
    ("device", "words", "says"),
    [
        (
            {},
            ("--compute-capability", "12.0"),
            "the plan is for compute capability 12.0, but the GPU is NVIDIA L4 (compute capability 8.9)",
        ),
        (HOPPER, (), "TensorRT-RTX 1.7.1.116 does not support NVIDIA H100 80GB HBM3 (compute capability 9.0)"),
        (HOPPER, ("--compute-capability", "8.9,12.0"), "TensorRT-RTX 1.7.1.116 does not support NVIDIA H100 80GB HBM3"),
        ({}, ("--compute-capability", "8.9,12.0"), None),
    ],
)
def test_a_plan_for_another_gpu_is_kept_with_the_reason(
    files: dict[str, Path], tmp_path: Path, device: dict[str, str], words: tuple[str, ...], says: str | None
) -> None:
    plan = tmp_path / "e.plan"
    with play("rtx-1.7", Device(**device)):  # type: ignore[arg-type]
        ran = neck_export_cli("trt", files["single"], "--fp16", *words, "--output", plan)
        assert ran.code == 0, ran.err
        checked = read_manifest(manifest_path(plan), "plan")["verification"]
        assert neck_export_cli("trt", files["single"], "--fp16", *words, "--output", plan).out.startswith(
            "the existing plan is kept"
        )
        again = neck_export_cli("verify", plan)
    assert checked["verified"] == (says is None) == (again.code == 0)
    if says:
        assert checked["onnx"]["verified"] and checked["reason"].startswith(f"not verified: {says}")
        assert f"the plan is not verified: {says}" in ran.out
        assert "the ONNX graph that the plan was built from is verified" in ran.out
        assert says in again.err and again.code == 1


def test_a_plan_that_was_carried_to_another_gpu_is_refused_in_a_sentence(
    files: dict[str, Path], tmp_path: Path
) -> None:
    with play("11.4"):
        plan = copied(files, tmp_path)
    with play("11.4", Device(**HOPPER)):  # type: ignore[arg-type]
        for command in ("verify", "profile"):
            ran = neck_export_cli(command, plan)
            assert ran.code == 1 and "is for compute capability 8.9, but the GPU is NVIDIA H100" in ran.err
    with play("10.16"):
        assert "needs TensorRT 11.4.0.106 exactly, but 10.16.1.11 is installed" in neck_export_cli("verify", plan).err
    with play("11.4", gpu=False):
        assert "needs an NVIDIA GPU" in neck_export_cli("verify", plan).err


def test_verify_writes_its_verdict(files: dict[str, Path], tmp_path: Path) -> None:
    with play("11.4") as state:
        plan = copied(files, tmp_path)
        saved = tmp_path / "reference.safetensors"
        assert neck_export_cli("verify", plan, "--save-reference", saved).code == 0
        assert "sam3_feat_0" in load_file(saved)
        state.faults.distort = lambda name, value: value * np.float32(1.1)
        ran = neck_export_cli("verify", plan)
        assert ran.code == 3 and "FAILED" in ran.err
        assert read_manifest(manifest_path(plan), "plan")["verification"]["verified"] is False
        assert neck_export_cli("verify", plan, "--tolerance", "sam3_*=0.5").code == 3  # the cosine is another matter
        assert neck_export_cli("verify", plan, "--tolerance", "none=0.5").code == 1


def test_a_batch_that_is_dynamic(files: dict[str, Path], tmp_path: Path) -> None:
    with play("11.4"):
        plan = copied(files, tmp_path)
        assert "2 images" in neck_export_cli("verify", plan).out
        for batch in (1, 3):
            assert json.loads(neck_export_cli("profile", plan, "--batch", str(batch), "--json").out)["batch"] == batch
        ran = neck_export_cli("profile", plan, "--batch", "4")
        assert ran.code == 1 and "a batch size of 1 to 3, but 4 was requested" in ran.err


def test_the_profile_of_layers_is_warm_and_writes_where_it_may(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_smi(tmp_path, monkeypatch)
    with play("11.4") as state:
        assert state.device is not None
        told = json.loads(neck_export_cli("profile", copied(files, tmp_path), "--json").out)
        assert [layer["ms"] for layer in told["layers"]] == pytest.approx([LAYER_MS] * len(told["layers"]))
        assert told["layers"] and all(layer["kind"] for layer in told["layers"])
        assert told["state"]["sm_mhz"] == "2040"
        assert state.device.launches[-(LAYER_WARM_UP_RUNS + LAYER_RUNS) :] == ["run"] * (
            LAYER_WARM_UP_RUNS + LAYER_RUNS
        )


@pytest.mark.parametrize("flaw", ["capture", "stream"])
def test_without_a_graph_the_profile_goes_on(files: dict[str, Path], tmp_path: Path, flaw: str) -> None:
    version = "rtx-1.7" if flaw == "stream" else "11.4"
    with play(version) as state:
        assert state.device is not None
        plan = copied(files, tmp_path, version)
        state.device.capture_fails, state.faults.capturable = flaw == "capture", flaw != "stream"
        ran = neck_export_cli("profile", plan)
        assert ran.code == 0 and "no CUDA graph: " in ran.out and "layers; it is shown as ?" in ran.out


@pytest.mark.parametrize(("version", "beside"), [("rtx-1.7", "11.4"), ("10.14", "rtx-1.7")])
def test_a_plan_is_searched_by_its_own_tensorrt(
    files: dict[str, Path], tmp_path: Path, version: str, beside: str
) -> None:
    """`auto` would take TensorRT where both are, and a trial in FP32 was refused for its own island."""
    flavor = "rtx" if version.startswith("rtx") else "tensorrt"
    with play(version, beside=beside) as state:
        words = ("trt", files["faulty"], "--no-verify", "--flavor", flavor, "--output", tmp_path / "e.plan")
        assert neck_export_cli(*words).code == 0
        before = len(state.configs)
        ran = neck_export_cli("bisect", tmp_path / "e.plan")
        assert ran.code == 0, ran.err
        assert "first module outside tolerance: trunk.blocks.2" in ran.out
        command = shlex.split(ran.out.splitlines()[-1].partition("corrected file: ")[2])
        assert command[command.index("--keep-fp32") + 1] == "trunk.blocks.2.attn"
        assert len(state.configs) > before + 2  # the trials were built by this very TensorRT
    assert not list(tmp_path.glob(".bisect*"))


def test_a_sound_plan_has_nothing_to_mend(files: dict[str, Path], tmp_path: Path) -> None:
    with play("11.4") as state:
        plan = copied(files, tmp_path)
        assert "within tolerance" in neck_export_cli("bisect", plan).out
        state.faults.builder = "Error Code 10: planted"
        assert "TensorRT could not build the plan: Error Code 10: planted" in neck_export_cli("bisect", plan).err


def test_tune_measures_the_finalists_in_turn(files: dict[str, Path], tmp_path: Path) -> None:
    words = ("trt", files["single"], "--fp16", "--tune", "--no-verify", "--output", tmp_path / "e.plan")
    with play("11.4") as state:
        loads: list[int] = []

        def cost(facts: dict[str, Any]) -> float:
            """The last built is truly the fastest; the GPU slows down by a tenth while the candidates are built."""
            loads.append(facts["number"])
            return (10.0 - 0.2 * facts["number"]) * min(1.2, 1 + len(loads) / 100)

        state.faults.cost_ms = cost
        ran = neck_export_cli(*words)
    assert ran.code == 0, ran.err
    manifest = read_manifest(manifest_path(tmp_path / "e.plan"), "plan")
    assert (manifest["key"]["attention"], manifest["key"]["upsampling"]) == ("fused", "conv")
    assert "kept: fused, matmul, conv" in ran.out and "ms again" in ran.out
    turns = [number for number, before in zip(loads[1:], loads, strict=False) if number != before]
    assert len(turns) >= 3 * ROUNDS - 1  # a plan after another, and not all runs of one before those of the next
    assert not (tmp_path / "e.plan.tuning").exists()


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"builder": "Error Code 10: planted"}, "no candidate passed"),
        ({"distort": lambda name, value: -value}, "no candidate passed"),
        ({"run": "Error Code 1: planted"}, "no candidate passed"),
    ],
)
def test_tune_that_finds_nothing(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr("engines.tune.FORMS", {"fused": FORMS["fused"]})
    with play("11.4") as state:
        for name, value in faults.items():
            setattr(state.faults, name, value)
        ran = neck_export_cli("trt", files["single"], "--fp16", "--tune", "--output", tmp_path / "e.plan")
    assert ran.code == 1 and says in ran.err and not (tmp_path / "e.plan").exists()


def test_doctor_names_what_runs_here() -> None:
    with play("rtx-1.7", Device(**HOPPER)):  # type: ignore[arg-type]
        ran = neck_export_cli("doctor")
    assert "NVIDIA H100 80GB HBM3, compute capability 9.0" in ran.out
    assert "compute capability 9.0 as supported" in ran.out and "run pip" in ran.out


def test_triton_needs_pythons_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launchers are C that includes Python.h: without it every compiled row failed, and late."""
    found = importlib.util.find_spec
    for name in ("cc", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("json" if name == "triton" else name))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with play("11.4"):
        from benchmarks.measure.environment import capabilities

        assert capabilities()["compilers"]["cuda"] == (
            "torch.compile needs Python.h, but it was not found; run apt-get install python3-dev"
        )
        (tmp_path / "Python.h").touch()
        assert capabilities()["compilers"]["cuda"] is None
        assert capabilities()["plans"]["tensorrt"] is None
