"""The C++ library on CUDA itself with the fake of TensorRT: what decides whether it is built, and the run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cpp_on_cuda
import pytest
from cpp_on_cuda import (
    NOT_RUN,
    Ended,
    Toolkit,
    build_and_run,
    cuda_roots,
    find_toolkit,
    judged,
    missing_tool,
    refused_headers,
    run_on_cuda,
)

from benchmarks.gpu.gpu_tests import ON_CUDA, checks, files_with_gpu_tests
from engines.doctor import driver_version


def put(root: Path, *names: str) -> Path:
    """Empty files of a toolkit."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


HEADER, CRT = "include/cuda_runtime_api.h", "include/crt/host_defines.h"


def test_a_toolkit_is_found_whole_or_what_it_lacks_is_told(tmp_path: Path) -> None:
    empty, bare = tmp_path / "empty", put(tmp_path / "bare", HEADER)
    whole = put(tmp_path / "whole", HEADER, CRT, "lib64/libcudart.so", "lib64/libcudart.so.13")
    assert find_toolkit([empty], []) == "no CUDA headers"
    assert find_toolkit([bare, empty], []) == f"no CUDA runtime library beside {bare / 'include'}"
    assert find_toolkit([empty, bare, whole], []) == Toolkit((whole / "include",), whole / "lib64" / "libcudart.so")


def test_the_wheels_of_torch_serve_with_the_headers_of_tritons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = put(tmp_path / "nvidia" / "cu13", HEADER, "lib/libcudart.so.13")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    assert wheel in list(cuda_roots())
    assert find_toolkit([wheel], [tmp_path]) == (
        f"CUDA's headers are not whole: no crt/host_defines.h beside {wheel / 'include'}"
    )
    triton = put(tmp_path / "triton" / "backends" / "nvidia", CRT) / "include"
    assert find_toolkit([wheel], [tmp_path]) == Toolkit((wheel / "include", triton), wheel / "lib" / "libcudart.so.13")


@pytest.mark.parametrize(
    ("there", "lacks"),
    [
        ((), "no cmake"),
        (("cmake",), "no C++ compiler"),
        (("cmake", "g++"), "no make or ninja"),
        (("cmake", "clang++", "make"), None),
    ],
)
def test_the_tools_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: tuple[str, ...], lacks: str | None
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    assert missing_tool() == lacks
    if lacks:
        assert build_and_run(tmp_path / "build") == Ended("not run", lacks)


def test_without_a_driver_nothing_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_on_cuda, "driver_version", lambda: None)
    assert run_on_cuda(tmp_path / "build") == Ended("not run", "no NVIDIA driver")
    assert not (tmp_path / "build").exists()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++; apt install g++ cmake ninja-build")
def test_headers_that_do_not_compile_are_told(tmp_path: Path) -> None:
    include = put(tmp_path, HEADER) / "include"
    (include / "cuda_runtime_api.h").write_text("#define CUDART_VERSION 13000\n", encoding="utf-8")
    assert refused_headers(Toolkit((include,), tmp_path)) is None
    (include / "cuda_runtime_api.h").write_text("#error an odd one\n", encoding="utf-8")
    assert "C++17 with CUDA's headers" in (refused_headers(Toolkit((include,), tmp_path)) or "")


def test_the_end_of_the_program_is_a_check(tmp_path: Path) -> None:
    def after(code: int, said: str) -> Ended:
        return judged(subprocess.CompletedProcess([], code, "", said))

    assert after(0, "") == Ended("passed")
    assert after(NOT_RUN, "no NVIDIA driver\n") == Ended("not run", "no NVIDIA driver")
    assert after(1, "not so: DLPack's device\n") == Ended("failed", "exit status 1: not so: DLPack's device")
    assert after(-6, "fake: an input to the host: x\n").reason == "SIGABRT: fake: an input to the host: x"
    log = tmp_path / "tests.txt"
    name = "tests/test_cpp_on_cuda.py::test_the_engine_runs_on_cuda"
    log.write_text(f"{name} SKIPPED (no NVIDIA driver) [ 10%]\n", encoding="utf-8")
    assert checks(log) == [{"name": name, "outcome": "not run", "reason": "no NVIDIA driver"}]


def test_the_tests_of_a_session_do_not_repeat_its_stage() -> None:
    """A stage of `make gpu` runs the C++ library on CUDA itself."""
    files = files_with_gpu_tests()
    assert files and "tests/test_cpp_on_cuda.py" not in files
    for name in ON_CUDA.values():
        file, _, test = name.partition("::")
        assert f"def {test}(" in (Path(__file__).parent.parent / file).read_text(encoding="utf-8")


@pytest.mark.gpu
def test_the_engine_runs_on_cuda(tmp_path: Path) -> None:
    """Batches over streams, CUDA graphs, the caller's memory, finished(), DLPack, a pool of 2 over 4 threads."""
    ended = run_on_cuda(tmp_path)
    if ended.outcome == "not run":
        pytest.skip(str(ended.reason))
    assert ended.outcome == "passed", ended.reason


NO_NVCC = "needs nvcc on PATH; install CUDA's toolkit"


@pytest.mark.gpu
@pytest.mark.skipif(driver_version() is None, reason="no NVIDIA driver")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason=NO_NVCC)
def test_the_resize_kernel_is_the_processors_on_the_gpu(tmp_path: Path) -> None:
    """Within one level of neck::Preprocessor, which tests/test_cpp_images.py compares with neck/images.py."""
    ended = build_and_run(tmp_path, build_s=120.0, program="test_resize")
    assert ended.outcome == "passed", ended.reason


@pytest.mark.slow
@pytest.mark.skipif(driver_version() is not None, reason="shows what a machine without a GPU says")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason=NO_NVCC)
def test_the_resize_kernel_is_compiled_by_nvcc(tmp_path: Path) -> None:
    assert build_and_run(tmp_path, build_s=900.0, program="test_resize").reason == "no NVIDIA driver or GPU"


@pytest.mark.slow
@pytest.mark.skipif(driver_version() is not None, reason="shows what a machine without a GPU says")
def test_it_builds_and_says_that_there_is_no_driver(tmp_path: Path) -> None:
    """A minute; against the real CUDA runtime, where that is."""
    toolkit = find_toolkit(cuda_roots(), [])
    if missing_tool() or isinstance(toolkit, str):
        pytest.skip(f"needs cmake, a C++ compiler and CUDA's toolkit: {missing_tool() or toolkit}")
    assert build_and_run(tmp_path, build_s=900.0) == Ended("not run", "no NVIDIA driver")
