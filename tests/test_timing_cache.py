"""`trt --replay-timing`: the kernels of a saved timing cache again, or no plan; TensorRT is a fake."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from exporting import neck_export_cli
from fake_gpu.device import Device
from fake_gpu.plan import unpack
from fake_gpu.play import play
from fake_gpu.tensorrt import LISTINGS
from test_session import convolution

import engines.builder.timing_cache
from engines.builder.build import BuildResult, build_plan
from engines.builder.flavor import Flavor, FlavorError, choose_flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.onnx_source import read_source
from engines.builder.options import BuildOptions, PlanOptions
from engines.builder.timing_cache import replay_timing
from engines.plan import BuildRequest
from engines.tune import TuneError, tune_plan
from export.contract.manifest import manifest_path, read_manifest

FP32 = BuildOptions("fp32")
SAVED = "times.tensorrt-11.4.0.106-NVIDIA-L4.cache"


def tactics(plan: Path) -> dict[str, int]:
    """Which kernels the played builder chose."""
    found = unpack("tensorrt", plan.read_bytes())
    assert found is not None and found[0]["tactics"]
    return dict(found[0]["tactics"])


def saved(folder: Path) -> tuple[Path, Path]:
    """A file and the timing cache that a build of it left; call it in a play of 11.4."""
    onnx = convolution(folder, "1")
    build_plan(onnx, folder / "first.plan", dataclasses.replace(FP32, timing_cache=folder / "times.cache"))
    return onnx, folder / SAVED


def replay(onnx: Path, cache: Path, **changes: Any) -> BuildResult:
    options = dataclasses.replace(FP32, replay_timing=cache, **changes)
    return build_plan(onnx, onnx.with_name("again.plan"), options)


@pytest.mark.parametrize("version", [version for version in LISTINGS if not version.startswith("rtx")])
def test_two_builds_choose_the_same_kernels(tmp_path: Path, version: str) -> None:
    with play(version) as state:
        onnx = convolution(tmp_path, "1")
        words = ("trt", onnx, "--no-verify", "--flavor", "tensorrt")
        first, again, other = (tmp_path / f"{name}.plan" for name in ("first", "again", "other"))
        ran = neck_export_cli(*words, "--timing-cache", tmp_path / "times.cache", "--output", first)
        assert ran.code == 0, ran.err
        (cache,) = tmp_path.glob("times.tensorrt-*.cache")
        before = cache.read_bytes()
        assert neck_export_cli(*words, "--replay-timing", cache, "--output", again).code == 0
        flags = [config.get_flag(type(config).trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS) for config in state.configs]
        assert flags == [False, True]
        assert neck_export_cli(*words, "--output", other).code == 0
        told = [read_manifest(manifest_path(plan), "plan")["timing_cache"] for plan in (first, again, other)]
        assert f"timing cache {cache.name}: the build read " in neck_export_cli("inspect", again).out
        assert f"timing cache {cache.name}: the build saved " in neck_export_cli("inspect", first).out
    assert tactics(first) == tactics(again)
    assert tactics(first) != tactics(other)  # the control: measured anew, others were the fastest
    sha256 = hashlib.sha256(before).hexdigest()
    entry = {"file": cache.name, "sha256": sha256}
    assert told == [entry | {"replayed": False}, entry | {"replayed": True}, None]
    assert cache.read_bytes() == before


BAD: list[tuple[str, Any, str]] = [
    (
        "missing",
        lambda path: path.unlink(),
        r"No such file: .*\.cache; create a timing cache with `neck-export trt --timing-cache FILE`",
    ),
    ("empty", lambda path: path.write_bytes(b""), "the timing cache is empty"),
    ("folder", lambda path: (path.unlink(), path.mkdir()), r"cannot be read: Is a directory"),
    ("damaged", lambda path: path.write_bytes(b"\x00" * 99), r"TensorRT 11\.4\.0\.106"),
    (
        "no kernels",
        lambda path: path.write_text(json.dumps([json.loads(path.read_text())[0], {}])),
        "no kernel",
    ),
    (
        "others",
        lambda path: path.write_text(json.dumps([json.loads(path.read_text())[0], {"gemm": 1}])),
        r"timing cache miss: __myl_Conv_myl0_0\)\n.* a kernel time is missing in the timing cache .*times.*\. .* "
        r"--timing-cache .* instead of --replay-timing",
    ),
]


@pytest.mark.parametrize(("change", "says"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_cache_that_cannot_be_replayed_gives_no_plan(tmp_path: Path, change: Any, says: str) -> None:
    with play("11.4"):
        onnx, cache = saved(tmp_path)
        replay(onnx, cache)  # the control
        onnx.with_name("again.plan").unlink()
        change(cache)
        with pytest.raises(BuildError, match=says):
            replay(onnx, cache)
    assert not onnx.with_name("again.plan").exists() and not list(tmp_path.glob(".*"))


def test_a_cache_of_another_gpu_or_version_is_refused(tmp_path: Path) -> None:
    with play("11.4"):
        onnx, cache = saved(tmp_path)
    for version, device in (("11.4", Device(name="NVIDIA A10", capability="8.6")), ("10.16", Device())):
        with (
            play(version, device),
            pytest.raises(BuildError, match="valid for one GPU model and one TensorRT version"),
        ):
            replay(onnx, cache)


def test_a_cache_that_tensorrt_refuses_costs_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another GPU under this one's name, and a disk that is full: the plan was minutes of work."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    words = ("--no-verify", "--flavor", "tensorrt", "--timing-cache", tmp_path / "times.cache")
    with play("11.4", Device(name="NVIDIA A10", capability="8.6")):
        onnx = convolution(tmp_path, "1")
        build_plan(onnx, tmp_path / "first.plan", dataclasses.replace(FP32, timing_cache=tmp_path / "times.cache"))
    (other,) = tmp_path.glob("times.*.cache")
    foreign = other.rename(tmp_path / SAVED).read_bytes()
    with play("11.4") as state:
        ran = neck_export_cli("trt", onnx, *words, "--output", tmp_path / "second.plan")
        assert ran.code == 0, ran.err
        assert state.configs[-1].get_timing_cache() is None
        manifest = read_manifest(manifest_path(tmp_path / "second.plan"), "plan")
        assert manifest["timing_cache"] is None and SAVED in manifest["notes"][0] and SAVED in ran.out
        assert (tmp_path / SAVED).read_bytes() == foreign and tactics(tmp_path / "second.plan")
        (tmp_path / SAVED).unlink()
        (tmp_path / SAVED).mkdir()
        ran = neck_export_cli("trt", onnx, *words, "--output", tmp_path / "third.plan")
        assert ran.code == 1 and SAVED in ran.err  # before the build, when nothing is lost
        (tmp_path / SAVED).rmdir()
        with monkeypatch.context() as patch:
            patch.setattr(engines.builder.timing_cache, "replacing", full)
            ran = neck_export_cli("trt", onnx, *words, "--output", tmp_path / "third.plan")
        assert ran.code == 0 and SAVED in ran.out, ran.err
        assert neck_export_cli("trt", onnx, *words, "--output", tmp_path / "fourth.plan").code == 0  # the control
        assert read_manifest(manifest_path(tmp_path / "fourth.plan"), "plan")["timing_cache"]["file"] == SAVED


def test_a_file_of_another_graph_is_a_miss(tmp_path: Path) -> None:
    with play("11.4"):
        _, cache = saved(tmp_path)
        (tmp_path / "other").mkdir()
        with pytest.raises(BuildError, match="timing cache miss"):
            replay(convolution(tmp_path / "other", "2"), cache)


def test_the_name_that_was_given_to_timing_cache_is_explained(tmp_path: Path) -> None:
    with play("11.4"):
        onnx, cache = saved(tmp_path)
        with pytest.raises(BuildError, match=rf"No such file: .*times\.cache; use {cache}"):
            replay(onnx, tmp_path / "times.cache")


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with play("11.4"):
        onnx, cache = saved(tmp_path)
        with pytest.raises(BuildError, match="--replay-timing and --timing-cache cannot be used together"):
            replay(onnx, cache, timing_cache=cache)
        build = dataclasses.replace(FP32, replay_timing=cache)
        with pytest.raises(TuneError, match="--tune and --replay-timing cannot be used together"):
            tune_plan(PlanOptions(onnx, tmp_path / "t.plan", build=build))
    with play("rtx-1.7"):
        ran = neck_export_cli("trt", onnx, "--replay-timing", cache, "--output", tmp_path / "r.plan")
        assert ran.code == 1 and "--replay-timing: TensorRT-RTX chooses kernels" in ran.err
        with pytest.raises(FlavorError, match="leave the option out"):
            replay(onnx, cache)


def test_another_cache_is_another_plan(tmp_path: Path) -> None:
    """The plan that is there is kept while the cache's bytes are the same, whatever its name."""
    with play("11.4"):
        onnx, cache = saved(tmp_path)
        moved = cache.rename(tmp_path / "moved.cache")
        flavor = choose_flavor()

        def key(build: BuildOptions) -> dict[str, Any]:
            options = PlanOptions(onnx, tmp_path / "p.plan", build=build)
            return BuildRequest(options, flavor, read_source(onnx, print), "fp32", print).key

        first = key(dataclasses.replace(FP32, replay_timing=moved))
        again = key(dataclasses.replace(FP32, replay_timing=moved.rename(cache)))
        cache.write_bytes(cache.read_bytes() + b" ")
        other = key(dataclasses.replace(FP32, replay_timing=cache))
        assert first == again != other
        assert {name for name in first if first[name] != other[name]} == {"replay_timing"}
        assert key(FP32)["replay_timing"] is None


def test_what_the_real_builder_makes_of_a_damaged_cache() -> None:
    """TensorRT-RTX here, whose builder needs no driver: it takes anything, as an empty cache."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    builder = trt.Builder(trt.Logger(trt.Logger.Severity.INTERNAL_ERROR))
    config = builder.create_builder_config()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # RTX calls timing caches deprecated since 1.2
        with pytest.raises(BuildError, match=f"x.cache: .*TensorRT {trt.__version__}"):
            replay_timing(trt, config, Path("x.cache"), b"\x00" * 99)
    assert not config.get_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


@pytest.mark.gpu
def test_a_real_timing_cache_is_replayed(tmp_path: Path, gpu_flavor: Flavor) -> None:
    """On TensorRT itself: a replay builds, and a graph that the cache does not know is a miss."""
    if gpu_flavor.name != "tensorrt":
        pytest.skip("needs TensorRT; TensorRT-RTX has no timing cache")
    onnx = convolution(tmp_path, "1")
    options = dataclasses.replace(FP32, timing_cache=tmp_path / "times.cache")
    first = build_plan(onnx, tmp_path / "first.plan", options, flavor=gpu_flavor)
    (cache,) = tmp_path.glob("times.tensorrt-*.cache")
    again = dataclasses.replace(FP32, replay_timing=cache)
    second = build_plan(onnx, tmp_path / "again.plan", again, flavor=gpu_flavor)
    assert first.layers and second.layers and first.timing_cache and second.timing_cache
    assert [kernel.name for kernel in first.layers.kernels] == [kernel.name for kernel in second.layers.kernels]
    assert first.timing_cache["sha256"] == second.timing_cache["sha256"]
    cache.write_bytes(b"\x00" * 100)
    with pytest.raises(BuildError, match="no kernel"):
        build_plan(onnx, tmp_path / "again.plan", again, flavor=gpu_flavor)
