"""The checks before a plan is loaded, and the session; the engine is a fake on the CPU where no GPU is needed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import itertools
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from engines.builder.build import build_plan
from engines.builder.find_gpu import Gpu, find_gpu
from engines.builder.flavor import Flavor, RuntimeConfig, choose_flavor
from engines.builder.options import BuildOptions
from engines.run.inputs import Port, SessionError
from engines.run.loaded_plan import TYPES, LoadedPlan
from engines.run.open_plan import open_plan
from engines.run.outputs import ALIGNMENT
from engines.run.plan_checks import check_gpu, check_plan, check_version, manifest_specs
from engines.run.session import Session
from export.contract.manifest import manifest_path, write_manifest
from export.contract.signature import BatchRange

L4 = Gpu("NVIDIA L4", "8.9", "570.86", "12.8")
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")


class FakeFlavor(Flavor):
    """A flavor whose runtime is ours."""

    def why_invalid(self, header: bytes) -> str | None:
        return "malformed engine" if b"BAD" in header else None

    def new_logger(self, take: Callable[[int, str], None]) -> Any:
        return take

    def create_runtime_config(self, engine: Any, cached: bytes, own_graphs: bool) -> RuntimeConfig | None:
        return RuntimeConfig()

    def create_context(self, engine: Any, made_with: RuntimeConfig) -> Any:
        return engine.create_execution_context()


class Context:
    """Computes output = 2 * image at the addresses that it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shape, self.addresses, self.works = engine, (), {}, True
        self.addressable = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return self.works

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self.addressable

    def execute_async_v3(self, stream: int) -> bool:
        if not self.works:
            self.engine.runtime.take(1, "Error Code 1: Cuda Runtime\n(out of memory)")
            return False
        count = math.prod(self.shape)
        image, twice = (
            torch.frombuffer(
                (ctypes.c_byte * (count * dtype.itemsize)).from_address(self.addresses[name]), dtype=dtype, count=count
            )
            for name, (dtype, _) in self.engine.tensors.items()
        )
        twice.copy_(image * 2)
        return True


class Engine:
    def __init__(self, runtime: Runtime, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self.runtime, self.tensors, self.num_io_tensors = runtime, tensors, len(tensors)

    def create_execution_context(self) -> Context:
        return Context(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name="INPUT" if name == "image" else "OUTPUT")

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name={dtype: kind for kind, dtype in TYPES.items()}[self.tensors[name][0]])

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return 1000

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *self.tensors[name][1][1:]) for size in (1, 2, 3)]


class Runtime:
    """Loads any plan: one input, one output of the given type, dynamic batch."""

    def __init__(self, take: Callable[[int, str], None], *, output: torch.dtype, loads: bool) -> None:
        self.take, self.output, self.loads, self.engine_host_code_allowed = take, output, loads, False

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        self.take(2, "Using an engine plan file across different models of devices is not recommended")
        if not self.loads:
            self.take(1, "Error Code 2: OutOfMemory")
            return None
        return Engine(self, {"image": (torch.float32, (-1, 2, 3)), "twice": (self.output, (-1, 2, 3))})


def fake(*, output: torch.dtype = torch.float16, loads: bool = True, **changes: Any) -> FakeFlavor:
    trt = SimpleNamespace(Runtime=functools.partial(Runtime, output=output, loads=loads))
    return FakeFlavor(
        **{"name": "rtx", "trt": trt, "version": "1.7.1.116", "capabilities": CAPABILITIES, "gpu": L4, **changes}
    )


def facts(**changes: Any) -> dict[str, Any]:
    """What a plan's manifest says."""
    image = {"name": "image", "dtype": "float32", "shape": ["batch", 2, 3]}
    values = {
        "flavor": "rtx",
        "tensorrt_version": "1.7.1.116",
        "compute_capabilities": ["8.6", "8.9"],
        "options": {"version_compatible": False, "hardware_compatible": "none"},
        "inputs": [image],
        "outputs": [image | {"name": "twice", "dtype": "float16"}],
        "precision": "fp16",
        "signature": None,
        "onnx_manifest": None,
    }
    return {**values, **changes}


def write_plan(folder: Path, data: bytes = b"vtrt" + bytes(100), **changes: Any) -> Path:
    plan = folder / "x.plan"
    plan.write_bytes(data)
    write_manifest(manifest_path(plan), "plan", facts(**changes), [plan])
    return plan


def open_fake(folder: Path, *, output: torch.dtype = torch.float16, loads: bool = True) -> Session:
    image = facts()["inputs"][0]
    plan = write_plan(folder, outputs=[image | {"name": "twice", "dtype": str(output).removeprefix("torch.")}])
    flavor, manifest = check_plan(plan, fake(output=output, loads=loads))
    return Session(LoadedPlan(plan, manifest, flavor, torch.device("cpu")), stream=None)


def convolution(folder: Path, batch: str) -> Path:
    """An ONNX file of one convolution with known weights: image (B, 3, 8, 8) -> sum of each pixel's channels."""
    sides = ["batch" if ":" in batch else int(batch), 3, 8, 8]
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [1, 3, 1, 1], [1.0, 1.0, 1.0])
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "weights"], ["sum"])],
        "sum",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [sides[0], 1, 8, 8])],
        [weights],
    )
    path = folder / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def build_convolution(folder: Path, flavor: Flavor, batch: str = "1:2:3") -> Path:
    """Builds it and writes the plan's manifest."""
    sizes = BatchRange.parse(batch)
    options = BuildOptions(precision="fp32", batch=sizes)
    result = build_plan(convolution(folder, batch), folder / "sum.plan", options, flavor=flavor)
    values = facts(
        flavor=result.flavor,
        tensorrt_version=result.version,
        compute_capabilities=list(result.compute_capabilities),
        options=options.to_dict(),
        inputs=[dataclasses.asdict(spec) for spec in result.inputs],
        outputs=[dataclasses.asdict(spec) for spec in result.outputs],
        precision="fp32",
    )
    write_manifest(manifest_path(result.plan), "plan", values, [result.plan])
    return result.plan


def test_a_whole_plan_passes_the_checks(tmp_path: Path) -> None:
    flavor = fake()
    found, manifest = check_plan(write_plan(tmp_path), flavor)
    assert found is flavor
    assert manifest["flavor"] == "rtx"


def spoil(plan: Path, **changes: Any) -> None:
    """Edits a manifest; None takes a key out."""
    where = manifest_path(plan)
    content = {**json.loads(where.read_text()), **changes}
    where.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing", lambda plan: plan.unlink(), "No such file: .*x.plan; build it with `neck-export trt`"),
    (
        "rejected",
        lambda plan: plan.rename(f"{plan}.rejected"),
        r"the plan failed verification .*; see .*x\.plan\.rejected\.json",
    ),
    ("empty", lambda plan: plan.write_bytes(b""), "x.plan: the file is empty"),
    ("folder", lambda plan: (plan.unlink(), plan.mkdir()), "cannot be read .*directory"),
    ("truncated", lambda plan: plan.write_bytes(b"vtrt" + bytes(50)), "has 54 bytes, but its manifest says 104"),
    ("corrupt", lambda plan: plan.write_bytes(b"vtrt" + bytes(99) + b"\1"), "was changed after its manifest"),
    ("no plan", lambda plan: plan.write_bytes(b"PK\3\4" + bytes(100)), "a plan for rtx, but the file begins with b'PK"),
    ("no manifest", lambda plan: manifest_path(plan).unlink(), "x.plan.json: the manifest is missing"),
    ("damaged", lambda plan: manifest_path(plan).write_text('{"format": 1,'), "manifest cannot be read"),
    ("onnx's", lambda plan: spoil(plan, kind="onnx"), "not a neck-export manifest of type 'plan'"),
    ("newer", lambda plan: spoil(plan, format=99), "format 99"),
    ("no version", lambda plan: spoil(plan, tensorrt_version=None), "'tensorrt_version' is missing"),
    ("bad version", lambda plan: spoil(plan, tensorrt_version="new"), "the manifest is damaged .*'new'"),
    ("number", lambda plan: spoil(plan, tensorrt_version=10), "the manifest is damaged"),
    ("no options", lambda plan: spoil(plan, options={}), "'version_compatible' is missing"),
    ("options", lambda plan: spoil(plan, options="none"), "the manifest is damaged"),
    ("no files", lambda plan: spoil(plan, files=[]), r"not list the plan x\.plan\. .*: none\."),
    ("no hash", lambda plan: spoil(plan, files=[{"name": "x.plan", "bytes": 104}]), "SHA-256"),
    ("no inputs", lambda plan: spoil(plan, inputs=None), "'inputs' is missing"),
    (
        "inputs",
        lambda plan: spoil(plan, inputs=[{"name": "image", "dtype": "float32", "shape": 3}]),
        "the manifest is damaged",
    ),
    (
        "flavor",
        lambda plan: spoil(plan, flavor="tensorrt"),
        "a plan for tensorrt, but the file begins with b'vtrt'",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_a_bad_file_is_a_sentence(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    plan = write_plan(tmp_path)
    check_plan(plan, fake())  # the control
    change(plan)
    with pytest.raises(SessionError, match=message):
        check_plan(plan, fake())


def test_what_rtx_says_of_a_plan_is_told(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, b"vtrtBAD" + bytes(100))
    with pytest.raises(SessionError, match=r"here \(malformed engine\)"):
        check_plan(plan, fake())


def test_another_flavor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="use --flavor rtx"):
        check_plan(write_plan(tmp_path), fake(name="tensorrt", capabilities=(), version="11.4.0.106"))


@pytest.mark.parametrize(
    ("built", "here", "compatible", "message"),
    [
        ("11.4.0.106", "11.4.0.106", False, None),
        ("10.16.1.11", "11.4.0.106", True, None),
        ("10.9.0.1", "10.16.1.11", True, None),
        (
            "11.4.0.106",
            "11.4.0.107",
            False,
            "needs TensorRT 11.4.0.106 exactly, but 11.4.0.107 is installed.*version-compatible",
        ),
        ("10.16.1.11", "11.4.0.106", False, "needs TensorRT 10.16.1.11 exactly"),
        ("10.5.0", "10.5.0.18", False, None),
        ("10.7.0.post1", "10.7.0.post1", False, None),
        ("10.7.0.post1", "10.8.0.43", True, None),
        ("10.7.0.post1", "10.8.0.43", False, "needs TensorRT 10.7.0.post1 exactly, but 10.8.0.43 is installed"),
        ("10.5.0", "10.6.0", False, "needs TensorRT 10.5.0 exactly, but 10.6.0 is installed"),
        (
            "10.16.1.11",
            "10.9.0.1",
            True,
            "needs TensorRT 10.16.1.11 or later, but 10.9.0.1 is installed; build the plan again$",
        ),
    ],
)
def test_versions_of_tensorrt(built: str, here: str, compatible: bool, message: str | None) -> None:
    options = {"version_compatible": compatible, "hardware_compatible": "none"}
    manifest = facts(flavor="tensorrt", tensorrt_version=built, options=options)
    flavor = fake(name="tensorrt", capabilities=(), version=here)
    if message is None:
        return check_version(Path("x.plan"), manifest, flavor)
    with pytest.raises(SessionError, match=message):
        check_version(Path("x.plan"), manifest, flavor)


def test_another_rtx_version_is_left_to_rtx() -> None:
    check_version(Path("x.plan"), facts(tensorrt_version="1.6.0.1"), fake())


@pytest.mark.parametrize(
    ("name", "built", "level", "here", "message"),
    [
        ("tensorrt", ["8.9"], "none", "8.9", None),
        (
            "tensorrt",
            ["8.9"],
            "none",
            "8.6",
            (
                r"for compute capability 8.9, but the GPU is a GPU \(compute capability 8.6\); build the "
                r"plan again on this GPU"
            ),
        ),
        ("tensorrt", ["8.9"], "same", "8.9", None),
        ("tensorrt", ["8.9"], "same", "8.6", "is for compute capability 8.9"),
        ("tensorrt", ["8.9"], "ampere+", "9.0", None),
        ("tensorrt", ["8.9"], "ampere+", "8.0", None),
        ("tensorrt", ["8.9"], "ampere+", "7.5", "is for compute capability 8.0 or later"),
        ("rtx", ["8.6", "8.9"], "none", "8.9", None),
        ("rtx", ["8.6", "8.9"], "none", "12.0", "is for compute capability 8.6, 8.9.*--compute-capability 12.0"),
        ("rtx", [], "none", "12.0", None),
        (
            "rtx",
            [],
            "none",
            "7.5",
            (
                "8.0 or later, but the GPU is a GPU .compute capability 7.5.; build the plan again with "
                "--compute-capability 7.5"
            ),
        ),
        ("rtx", ["7.5"], "none", "7.5", None),
        (
            "rtx",
            [],
            "none",
            "9.0",
            r"TensorRT-RTX 1\.7\.1\.116 does not support a GPU \(compute capability 9.0\); .* --flavor tensorrt",
        ),
    ],
)
def test_compute_capabilities(name: str, built: list[str], level: str, here: str, message: str | None) -> None:
    manifest = facts(compute_capabilities=built, options={"hardware_compatible": level})
    flavor = fake(name=name, capabilities=CAPABILITIES if name == "rtx" else (), gpu=Gpu("a GPU", here, "570", "12.8"))
    if message is None:
        return check_gpu(Path("x.plan"), manifest, flavor)
    with pytest.raises(SessionError, match=message):
        check_gpu(Path("x.plan"), manifest, flavor)


def test_no_gpu_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        SessionError, match=r"x\.plan: this machine has no NVIDIA GPU .* run the plan on another machine"
    ):
        check_plan(write_plan(tmp_path), fake(gpu=None))


@pytest.mark.skipif(find_gpu() is not None, reason="shows what a machine without a GPU says")
def test_a_real_plan_without_a_gpu(tmp_path: Path) -> None:
    """NVIDIA's own runtime refuses with a null pointer here; the session says why."""
    flavor = choose_flavor("rtx")
    plan = build_convolution(tmp_path, flavor)
    with pytest.raises(SessionError, match="this machine has no NVIDIA GPU that CUDA can use"):
        open_plan(plan)
    pretended = dataclasses.replace(flavor, gpu=L4)
    with pytest.raises(SessionError, match=r"cannot run the plan here \(.+\)"):
        open_plan(plan, pretended)
    manifest = json.loads(manifest_path(plan).read_text())
    with pytest.raises(SessionError, match=r"cannot load the plan .*cudaError 35"):
        LoadedPlan(plan, manifest, pretended, torch.device("cpu"))


def test_numpy_in_numpy_out_of_any_batch(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        assert session.inputs == (Port("image", torch.float32, (-1, 2, 3), (1, 3)),)
        for size in (1, 3, 2):
            image = np.random.default_rng(size).normal(size=(size, 2, 3)).astype(np.float32)
            outputs = session.infer({"image": image})
            assert list(outputs) == ["twice"]
            assert outputs["twice"].dtype == np.float16
            np.testing.assert_array_equal(outputs["twice"], (image * 2).astype(np.float16))


def test_bfloat16_comes_as_float32(tmp_path: Path) -> None:
    with open_fake(tmp_path, output=torch.bfloat16) as session:
        (twice,) = session.infer({"image": np.full((1, 2, 3), 1.5, np.float32)}).values()
    assert twice.dtype == np.float32
    assert (twice == 3).all()


def test_numpy_that_is_read_only_or_strided(tmp_path: Path) -> None:
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4)[:, :, ::2].transpose(0, 2, 1)
    image.flags.writeable = False
    with open_fake(tmp_path) as session:
        np.testing.assert_array_equal(session.infer({"image": image})["twice"], image * 2)


def at(offset: int, value: torch.Tensor) -> torch.Tensor:
    """A copy that lies so many bytes behind a multiple of 256."""
    room = torch.empty(value.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT + offset
    return room[start : start + value.nbytes].view(value.dtype).reshape(value.shape).copy_(value)


def test_an_address_that_tensorrt_does_not_take_is_copied_once(tmp_path: Path) -> None:
    """A view such as batch[1:2] of 350 x 350 pixels lies at no multiple of 256 bytes."""
    with open_fake(tmp_path) as session:
        for offset in (0, 64, ALIGNMENT - 4):
            image = at(offset, torch.full((2, 2, 3), 3.0))
            assert (session.infer({"image": image})["twice"] == 6).all()
            assert (session.context.addresses["image"] == image.data_ptr()) == (offset == 0)


def test_an_address_that_is_refused_is_an_error(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        session.context.addressable = False
        with pytest.raises(
            SessionError,
            match=r"does not accept the address of the tensor image: .* at the address 0x[0-9a-f]+\. .*of 256",
        ):
            session.infer({"image": np.zeros((1, 2, 3), np.float32)})


def test_what_is_bound_is_held(tmp_path: Path) -> None:
    """Outputs that a caller drops stay until others are bound: a run into freed memory would write another's."""
    with open_fake(tmp_path) as session:
        session.bind({"image": torch.ones(1, 2, 3)})
        assert session._bound["twice"].data_ptr() == session.context.addresses["twice"]
        session.enqueue()
        assert (session._bound["twice"] == 2).all()
    assert session._bound == {}


def test_torch_is_read_where_it_is_and_outputs_are_the_callers(tmp_path: Path) -> None:
    with open_fake(tmp_path) as session:
        image = at(0, torch.ones(2, 2, 3))
        first = session.infer({"image": image})["twice"]
        assert session.context.addresses == {"image": image.data_ptr(), "twice": first.data_ptr()}
        second = session.infer({"image": image * 5})["twice"]
    assert (first == 2).all()
    assert (second == 10).all()


INPUTS: list[tuple[dict[str, Any], str]] = [
    ({}, "Given names: none. Pass exactly .* image: float32 .1 to 3, 2, 3."),
    ({"pixels": np.zeros((1, 2, 3), np.float32)}, "Given names: pixels. Pass exactly .* image: float32"),
    (
        {"image": np.zeros((4, 2, 3), np.float32)},
        r"image is float32 \(4, 2, 3\); expected image: float32 \(1 to 3, 2, 3\)",
    ),
    ({"image": np.zeros((0, 2, 3), np.float32)}, r"image is float32 \(0, 2, 3\)"),
    ({"image": np.zeros((1, 3, 2), np.float32)}, r"image is float32 \(1, 3, 2\)"),
    ({"image": np.zeros((2, 3), np.float32)}, r"image is float32 \(2, 3\)"),
    ({"image": np.zeros((), np.float32)}, r"image is float32 \(\)"),
    ({"image": np.zeros((1, 2, 3))}, r"image is float64 \(1, 2, 3\)"),
    ({"image": torch.zeros(1, 2, 3, dtype=torch.float16)}, r"image is float16"),
    ({"image": torch.zeros(1, 3, 2).mT}, "not contiguous, but must be on cpu and contiguous"),
    ({"image": torch.zeros(1, 2, 3, device="meta")}, "image is on meta"),
    ({"image": [[[0.0] * 3] * 2]}, "inputs of type list were given; .* torch tensors on cpu"),
]


@pytest.mark.parametrize(("inputs", "message"), INPUTS, ids=[message[:30] for _, message in INPUTS])
def test_wrong_inputs_name_what_is_expected(tmp_path: Path, inputs: dict[str, Any], message: str) -> None:
    with open_fake(tmp_path) as session, pytest.raises(SessionError, match=message):
        session.infer(inputs)


def test_a_plan_that_does_not_load_tells_the_loggers_last_error(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match=r"cannot load the plan \(Error Code 2: OutOfMemory\)"):
        open_fake(tmp_path, loads=False)


def test_a_run_that_fails_tells_the_loggers_last_error(tmp_path: Path) -> None:
    image = np.zeros((1, 2, 3), np.float32)
    with open_fake(tmp_path) as session:
        session.infer({"image": image})
        session.context.works = False
        session.context.set_input_shape = lambda name, shape: True
        with pytest.raises(SessionError, match=r"run failed \(Error Code 1: Cuda Runtime \(out of memory\)\)"):
            session.infer({"image": image})
        session.context.set_input_shape = lambda name, shape: False
        with pytest.raises(SessionError, match=r"image cannot have the shape \(1, 2, 3\)"):
            session.infer({"image": image})


def test_out_of_device_memory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with open_fake(tmp_path) as session:
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(SessionError, match=r"x\.plan: out of device memory"):
            session.infer({"image": np.zeros((1, 2, 3), np.float32)})


def test_an_edited_manifest_that_hides_the_true_tensors(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, outputs=[{"name": "twice", "dtype": "float32", "shape": ["batch", 2, 3]}])
    flavor, manifest = check_plan(plan, fake())
    assert manifest_specs(manifest)[1] == ("twice", "float32", (-1, 2, 3))
    with pytest.raises(SessionError, match="the tensors in the manifest differ from the engine's"):
        Session(LoadedPlan(plan, manifest, flavor, torch.device("cpu")), stream=None)


def test_a_session_is_closed_and_freed(tmp_path: Path) -> None:
    session = open_fake(tmp_path)
    assert session.warnings == ["Using an engine plan file across different models of devices is not recommended"]
    with session:
        pass
    with pytest.raises(SessionError, match="the session is closed"):
        session.infer({"image": np.zeros((1, 2, 3), np.float32)})
    kept = open_fake(tmp_path)
    seen = weakref.ref(kept)
    gc.disable()
    try:
        del kept
        assert seen() is None, "the logger must not hold the session"
    finally:
        gc.enable()


def images(sizes: tuple[int, ...] = (1, 3, 2)) -> list[np.ndarray]:
    return [np.random.default_rng(size).normal(size=(size, 3, 8, 8)).astype(np.float32) for size in sizes]


FP32_SUM = 1e-5
"""Of three numbers near 1 in FP32."""


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_plan_runs_on_the_gpu(tmp_path: Path, gpu_flavor: Flavor, cuda_graph: bool) -> None:
    plan = build_convolution(tmp_path, gpu_flavor)
    with open_plan(plan, gpu_flavor, cuda_graph=cuda_graph) as session:
        assert session.loaded_bytes >= 0
        for image in itertools.chain(images(), images()):
            expected = image.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(session.infer({"image": image})["sum"], expected, atol=FP32_SUM)
            tensor = torch.from_numpy(image).cuda()
            found = session.infer({"image": tensor})["sum"]
            assert found.is_cuda
            assert found.add(0).cpu().numpy() == pytest.approx(expected, abs=FP32_SUM)
            assert not np.allclose(found.cpu().numpy(), 2 * expected, atol=FP32_SUM)  # the control


@pytest.mark.gpu
def test_torch_cuda_tensors_are_not_copied(tmp_path: Path, gpu_flavor: Flavor) -> None:
    with open_plan(build_convolution(tmp_path, gpu_flavor), gpu_flavor) as session:
        image = torch.ones(2, 3, 8, 8, device="cuda")
        first = session.infer({"image": image})["sum"]
        assert session.context.get_tensor_address("image") == image.data_ptr()
        assert session.context.get_tensor_address("sum") == first.data_ptr()
        second = session.infer({"image": image * 2})["sum"]
        assert (first == 3).all()
        assert (second == 6).all()
        with pytest.raises(SessionError, match="image is on cpu"):
            session.infer({"image": image.cpu()})


@pytest.mark.gpu
def test_out_of_device_memory_on_the_gpu(tmp_path: Path, gpu_flavor: Flavor, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_plan(build_convolution(tmp_path, gpu_flavor), gpu_flavor) as session:
        monkeypatch.setattr(session, "outputs", [dataclasses.replace(session.outputs[0], name="sum")])
        monkeypatch.setattr(
            session,
            "context",
            SimpleNamespace(set_input_shape=lambda name, shape: True, get_tensor_shape=lambda name: (1 << 50,)),
        )
        with pytest.raises(SessionError, match="out of device memory"):
            session.infer({"image": images((1,))[0]})
