"""Which TensorRT is chosen, what it is asked for, and that every name used of it exists in each version."""

from __future__ import annotations

import ast
import json
import re
import sys
import types
from collections.abc import Collection
from pathlib import Path

import pytest

from engines.builder import flavor as flavor_module
from engines.builder.find_gpu import Gpu, find_gpu
from engines.builder.flavor import OLDEST, Flavor, FlavorError, choose_flavor, version_numbers
from engines.builder.options import BuildOptions
from engines.builder.timing_cache import timing_cache_path
from export.contract.dtypes import BY_TENSORRT

ENGINES = Path(__file__).parent.parent / "engines"
API = Path(__file__).parent / "data" / "tensorrt-api"
VERSIONS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(API.glob("tensorrt-*.json"))}

CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "layer": "ILayer",
    "tensor": "ITensor",
    "image": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
"""Which class a variable or attribute of that name has in engines/: names are all that tells, TensorRT has no stubs."""

OURS = {"profiling.py": {"layer"}}
"""Variables of such a name that are not TensorRT's."""

RTX_ONLY = {"ComputeCapability", "EngineValidity", "EngineInvalidityDiagnostics"}
RTX_ONLY |= {"Runtime.get_engine_validity", "Runtime.engine_header_size", "IExecutionContext.is_stream_capturable"}
RTX_ONLY |= {"DynamicShapesKernelSpecializationStrategy", "BuilderFlag.REQUIRE_USER_ALLOCATION"}
RTX_ONLY |= {"IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy", "ICudaEngine.create_runtime_config"}
RTX_ONLY |= {"IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache", "IRuntimeCache"}
RTX_ONLY |= {"IRuntimeConfig.cuda_graph_strategy", "CudaGraphStrategy"}
"""Reached behind Flavor's own question which one it is, nowhere else."""

GPU = Gpu("NVIDIA L4", "8.9", "580.95.05", "13.0")


def used_names(source: str, ours: Collection[str] = ()) -> set[str]:
    """Every `Class` and `Class.member` of TensorRT that a source names through `trt` or one of CLASSES' variables."""
    tree, names = ast.parse(source), set()
    roots = {"trt"} | {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr == "trt"
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node.attr.startswith("_"):
            continue
        owner = node.value
        variable = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        if _is_module(owner, roots):
            names.add(node.attr)
        elif isinstance(owner, ast.Attribute) and _is_module(owner.value, roots):
            names.add(f"{owner.attr}.{node.attr}")
        elif variable.lstrip("_") in CLASSES and variable not in ours:
            names.add(f"{CLASSES[variable.lstrip('_')]}.{node.attr}")
    return names


def _is_module(node: ast.expr, roots: set[str]) -> bool:
    if isinstance(node, ast.Name):
        return node.id in roots
    return isinstance(node, ast.Attribute) and node.attr == "trt"


def guarded(source: str) -> set[str]:
    """What a source asks for by hasattr before it names it: such a name may be missing in a version."""
    return set(re.findall(r'hasattr\(\w+(?:\.\w+)*, "(\w+)"\)', source))


def missing(names: set[str], api: dict[str, list[str]]) -> list[str]:
    """The names that a version does not have."""
    return sorted(
        name
        for name in names
        if name.partition(".")[0] not in api
        or ("." in name and name.partition(".")[2] not in api[name.partition(".")[0]])
    )


FILES = [path for path in sorted(ENGINES.rglob("*.py")) if re.search(r"\btrt\.", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_name_of_tensorrt_exists(path: Path, version: str) -> None:
    source = path.read_text(encoding="utf-8")
    names = {name for name in used_names(source, OURS.get(path.name, ())) if not guarded(source) & set(name.split("."))}
    special = {name for name in names if {name, name.partition(".")[0]} & RTX_ONLY}
    assert path.name == "flavor.py" or not special
    if "rtx" not in version:
        names -= special
    assert missing(names, VERSIONS[version]) == []


def test_the_files_that_use_tensorrt_are_seen() -> None:
    """The control: the check reads something, and what it reads includes what must be there."""
    names = set().union(*(used_names(path.read_text(encoding="utf-8")) for path in FILES))
    assert {"NetworkDefinitionCreationFlag.STRONGLY_TYPED", "OnnxParser.parse_from_file", "ILogger"} <= names
    assert len(names) > 30


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("config.set_flag(flavor.trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("parser.supports_model(data)", "OnnxParser.supports_model"),
        ("layer.precision = 1", "ILayer.precision"),
        ("trt.IInt8Calibrator", "IInt8Calibrator"),
    ],
)
def test_a_planted_wrong_name_fails(line: str, name: str) -> None:
    assert missing(used_names(line), VERSIONS["tensorrt-11.4.0.106"]) == [name]


def test_only_what_is_asked_for_first_may_be_missing() -> None:
    """The control: 10.3 has no EngineStat, and 10.14 has."""
    plain = "weights = engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE)"
    assert missing(used_names(plain), VERSIONS["tensorrt-10.3"])
    assert not missing(used_names(plain), VERSIONS["tensorrt-10.14"])
    assert guarded('if hasattr(trt, "EngineStat") and hasattr(flavor.trt.Builder, "reset"):') == {"EngineStat", "reset"}


def test_versions_are_compared_as_numbers() -> None:
    assert version_numbers("10.13.0.35") == (10, 13, 0, 35) > version_numbers("10.3.0") > version_numbers("9.3")
    assert version_numbers("10.3.0.post12") == (10, 3, 0)
    assert version_numbers("dev") == ()


def test_pyproject_asks_for_the_oldest_that_works() -> None:
    text = (ENGINES.parent / "pyproject.toml").read_text(encoding="utf-8")
    for name, distribution in (("tensorrt", "tensorrt"), ("rtx", "tensorrt-rtx-cu13")):
        found = re.search(rf'"{distribution}>=([\d.]+)"', text)
        assert found is not None and version_numbers(found[1]) == OLDEST[name]  # type: ignore[index]
        listed = [version for version in VERSIONS if ("rtx" in version) == (name == "rtx")]
        assert OLDEST[name] in {version_numbers(version.rpartition("-")[2])[:2] for version in listed}  # type: ignore[index]


def test_types_and_flags_taken_by_name_exist() -> None:
    for api in VERSIONS.values():
        assert set(BY_TENSORRT) <= set(api["DataType"])


def _install(monkeypatch: pytest.MonkeyPatch, gpu: Gpu | None, **modules: str | None) -> None:
    """Makes this process see a GPU, and modules of the given versions; None is a module that does not import."""
    monkeypatch.setattr(flavor_module, "find_gpu", lambda device: gpu)
    for name, version in modules.items():
        module = None
        if version is not None:
            module = types.ModuleType(name)
            module.__version__ = version  # type: ignore[attr-defined]
            members = {"SM89": 1, "SM120": 2, "NONE": 0, "CURRENT": 3}
            module.ComputeCapability = types.SimpleNamespace(__members__=members)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("polygraphy.backend")]:
        monkeypatch.delitem(sys.modules, name)
    config = pytest.importorskip("polygraphy").config
    monkeypatch.setattr(config, "USE_TENSORRT_RTX", config.USE_TENSORRT_RTX)
    monkeypatch.setenv(flavor_module.POLYGRAPHY_SWITCH, "0")


@pytest.mark.parametrize(
    ("asked", "gpu", "tensorrt", "chosen"),
    [
        ("auto", GPU, "10.16.1", "tensorrt"),
        ("auto", GPU, "11.4.0", "tensorrt"),
        ("auto", GPU, "10.3.0", "tensorrt"),
        ("auto", GPU, "10.2.0", "rtx"),
        ("auto", GPU, None, "rtx"),
        ("auto", GPU, "8.6.1", "rtx"),
        ("auto", None, "10.16.1", "rtx"),
        ("rtx", GPU, "10.16.1", "rtx"),
        ("tensorrt", GPU, "10.16.1", "tensorrt"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, asked: str, gpu: Gpu | None, tensorrt: str | None, chosen: str
) -> None:
    _install(monkeypatch, gpu, tensorrt=tensorrt, tensorrt_rtx="1.7")
    flavor = choose_flavor(asked)  # type: ignore[arg-type]
    assert (flavor.name, flavor.version) == (chosen, tensorrt if chosen == "tensorrt" else "1.7")
    assert flavor.capabilities == (() if chosen == "tensorrt" else ("8.9", "12.0"))
    assert (chosen == "rtx") == sys.modules["polygraphy"].config.USE_TENSORRT_RTX


@pytest.mark.parametrize(
    ("asked", "gpu", "tensorrt", "says"),
    [
        ("auto", None, None, r"'\.\[gpu\]' in .* or pip install '\.\[rtx\]'"),
        ("auto", GPU, None, r"tensorrt cannot be imported.*\n.*'\.\[gpu\]'"),
        ("auto", GPU, "8.6.1", "tensorrt has version 8.6.1"),
        ("auto", GPU, "10.2.0", "tensorrt has version 10.2.0"),
        ("tensorrt", None, "10.16.1", "needs an NVIDIA GPU.*--flavor rtx"),
        ("tensorrt", GPU, None, r"'\.\[gpu\]'"),
        ("rtx", None, None, r"'\.\[rtx\]'"),
    ],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, asked: str, gpu: Gpu | None, tensorrt: str | None, says: str
) -> None:
    _install(monkeypatch, gpu, tensorrt=tensorrt, tensorrt_rtx=None)
    with pytest.raises(FlavorError, match=says):
        choose_flavor(asked)  # type: ignore[arg-type]


def test_one_process_keeps_its_flavor(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, GPU, tensorrt="10.16.1", tensorrt_rtx="1.7")
    choose_flavor("rtx")
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", types.ModuleType("polygraphy.backend.trt"))
    with pytest.raises(FlavorError, match="start a new process for --flavor tensorrt"):
        choose_flavor("tensorrt")


def rtx(gpu: Gpu | None = None) -> Flavor:
    return Flavor("rtx", None, "1.7", ("8.6", "8.9", "12.0"), gpu)


TENSORRT = Flavor("tensorrt", None, "10.16", (), GPU)


def test_targets() -> None:
    assert rtx().check_targets(["8.9", "12.0", "8.9"]) == ("8.9", "12.0")
    assert rtx().check_targets([]) == ()
    assert TENSORRT.check_targets([]) == TENSORRT.check_targets(["8.9"]) == ("8.9",)
    with pytest.raises(FlavorError, match=r"9\.0: TensorRT-RTX 1\.7 only builds for .* 8\.6, 8\.9, 12\.0; for Hopper"):
        rtx().check_targets(["8.9", "9.0"])
    with pytest.raises(FlavorError, match=r"8\.9"):
        TENSORRT.check_targets(["8.6"])


def test_what_rtx_would_ignore_is_refused() -> None:
    nothing = {"timing_cache": False, "replay_timing": False, "hardware_compatible": False, "version_compatible": False}
    for name in nothing:
        with pytest.raises(
            FlavorError, match=f"--{name.replace('_', '-')}: .*leave the option out|--compute-capability"
        ):
            rtx().refuse(**{**nothing, name: True})
        TENSORRT.refuse(**{**nothing, name: True})
    rtx().refuse(**nothing)
    rtx(GPU).refuse(**{**nothing, "version_compatible": True})


def test_a_timing_cache_is_of_one_flavor_version_and_gpu(tmp_path: Path) -> None:
    options = BuildOptions(timing_cache=tmp_path / "times.cache")
    assert timing_cache_path(TENSORRT, options) == tmp_path / "times.tensorrt-10.16-NVIDIA-L4.cache"
    assert timing_cache_path(TENSORRT, BuildOptions()) is None


def test_a_plan_that_cannot_run_is_told_by_its_first_bytes() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    flavor = choose_flavor("rtx")
    assert flavor.why_invalid(b"not a plan" * 10) == "malformed engine"


@pytest.mark.gpu
@pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU or driver here")
def test_the_gpu_is_described() -> None:
    gpu = find_gpu()
    assert gpu is not None and gpu.name and gpu.driver != "unknown"
    assert float(gpu.compute_capability) >= 7.5 and float(gpu.cuda) >= 12
