"""neck::Engine and neck::Pool against fakes of TensorRT and CUDA, with sanitizers."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from cpp_build import (
    TESTS,
    Programs,
    build,
    cmake,
    why_missing,
    write_plan,
)

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))


def small_plan(folder: Path) -> Path:
    """What tests/cpp/test_engine.cpp and test_pool.cpp expect."""
    text = b"fake\ninput image float32 -1,3,2,2 1,2,4\noutput half float16 -1,5,2,2\noutput full float32 -1,5,2,2\n"
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
    ran = programs.run("neck-tests", "engine", small_plan(tmp_path))
    assert (ran.code, ran.err) == (0, "")
    assert "cudaMalloc: 4 calls failed" in ran.out  # scratch, input, two outputs
    assert "cudaGraphInstantiateWithFlags (graph): 1 calls failed" in ran.out


def test_what_cannot_be_right_is_refused(programs: Programs, tmp_path: Path) -> None:
    """Tensors, files and options that do not fit, and objects that were moved from."""
    ran = programs.run("neck-tests", "checks", small_plan(tmp_path), tmp_path)
    assert (ran.code, ran.err) == (0, "")


def test_a_pool_serves_many_threads(programs: Programs, tmp_path: Path) -> None:
    """Four contexts, 16 threads; first come, first served; leases that throw; closed with requests in flight."""
    ran = programs.run("neck-tests", "pool", small_plan(tmp_path), 16, 30)
    assert (ran.code, ran.err) == (0, "")
    assert "480 requests of 16 threads answered, 30 or more of each" in ran.out


@pytest.mark.slow
def test_a_pool_is_clean_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """The same for 60 s; a build of its own."""
    folder = tmp_path / "build"
    assert cmake(TESTS, folder, "-DNECK_SANITIZE=thread").returncode == 0
    build(folder, "neck-tests")
    ran = Programs(folder).run("neck-tests", "pool", small_plan(tmp_path), 16, 30, 60)
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(("fault", "seen"), [("leak", "fake: 1 things were left"), ("overflow", "AddressSanitizer")])
def test_leaks_and_overflows_are_seen(programs: Programs, fault: str, seen: str) -> None:
    """The control."""
    ran = programs.run("neck-tests", fault)
    assert ran.code != 0
    assert seen in ran.err


def test_two_threads_in_one_context_are_seen(programs: Programs, tmp_path: Path) -> None:
    """The control of the pool's test: a lease whose context two threads use, as by a pool that is broken."""
    ran = programs.run("neck-tests", "share", small_plan(tmp_path))
    assert ran.code == -signal.SIGABRT
    assert "fake: two threads use one context" in ran.err
