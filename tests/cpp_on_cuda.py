"""The C++ library on CUDA itself with the fake of TensorRT: built where a compiler and CUDA's headers are, and run.

Of the library only what a bare machine can build: tests/cpp/real_cuda says what. No torch is needed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from engines.doctor import driver_version

SOURCE = Path(__file__).parent / "cpp" / "real_cuda"
NOT_RUN = 77
"""The program's exit status where it finds no driver or GPU."""

CONFIGURE_SECONDS, BUILD_SECONDS, RUN_SECONDS = 30.0, 45.0, 30.0
"""The build takes 32 s of processor time, 20 files beside each other (GCC 12); the stage has more."""

PROBE = """#include <cuda_runtime_api.h>
#if __cplusplus < 201703L || !__has_include(<filesystem>)
#error no C++17
#endif
"""


@dataclasses.dataclass(frozen=True)
class Toolkit:
    """CUDA's headers and runtime library.

    Attributes:
        includes: folders of headers, cuda_runtime_api.h in the first.
        runtime: libcudart.
    """

    includes: tuple[Path, ...]
    runtime: Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of it.

    Attributes:
        outcome: as in the results' `checks`.
        reason: why it failed or was not run.
    """

    outcome: Literal["passed", "failed", "not run"]
    reason: str | None = None


def run_on_cuda(folder: Path) -> Ended:
    """Builds and runs the program where the machine has a driver and the tools; else says what it lacks.

    Args:
        folder: for the build.
    """
    if driver_version() is None:
        return Ended("not run", "no NVIDIA driver")
    return build_and_run(folder)


def build_and_run(folder: Path, build_s: float = BUILD_SECONDS, program: str = "test_cuda") -> Ended:
    """The same, the driver left to the program to find.

    Args:
        folder: for the build.
        build_s: the build may take so many seconds.
        program: `test_cuda`, or `test_resize`, which needs nvcc.
    """
    toolkit = find_toolkit(cuda_roots(), [Path(path) for path in sys.path])
    lacks = missing_tool()
    if lacks or isinstance(toolkit, str):
        return Ended("not run", lacks or str(toolkit))
    if said := refused_headers(toolkit):
        return Ended("not run", said)
    includes = ";".join(str(path) for path in toolkit.includes)
    generator = ["-G", "Ninja" if shutil.which("ninja") else "Unix Makefiles"]
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), *generator]
    configure += [f"-DCUDA_INCLUDE={includes}", f"-DCUDART={toolkit.runtime}"]
    build = ["cmake", "--build", str(folder), "--target", program, "--parallel", str(os.cpu_count() or 1)]
    for what, command, seconds in (("cmake", configure, CONFIGURE_SECONDS), ("the build", build, build_s)):
        ended = _call(command, seconds)
        if ended.returncode:
            return Ended("failed", f"{what}: {_first_error(ended)}")
    return judged(_call([str(folder / program), str(folder)], RUN_SECONDS))


def missing_tool() -> str | None:
    """What of the tools is not there."""
    if shutil.which("cmake") is None:
        return "no cmake"
    if all(shutil.which(name) is None for name in ("c++", "g++", "clang++")):
        return "no C++ compiler"
    if all(shutil.which(name) is None for name in ("ninja", "make")):
        return "no make or ninja"
    return None


def cuda_roots() -> Iterator[Path]:
    """Folders that may be CUDA's, those that are named first; the last are of the wheels that torch brings."""
    named = (os.environ.get(name) for name in ("CUDAToolkit_ROOT", "CUDA_HOME", "CUDA_PATH"))
    yield from (Path(path) for path in named if path)
    if nvcc := shutil.which("nvcc"):
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    for path in sys.path:
        yield from sorted(Path(path).glob("nvidia/cu[0-9]*"), reverse=True)
        yield Path(path) / "nvidia" / "cuda_runtime"


def find_toolkit(roots: Iterator[Path] | Sequence[Path], paths: Sequence[Path]) -> Toolkit | str:
    """The first of the roots that has both headers and library, else what is missing.

    Args:
        roots: where it may be.
        paths: Python's: CUDA 13's wheel of the runtime lacks crt/, which triton's wheel has.
    """
    lacks = "no CUDA headers"
    for root in roots:
        include = _first(root, ("include", "targets/x86_64-linux/include"), "cuda_runtime_api.h")
        if include is None:
            continue
        library = _first(root, ("lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"), "libcudart.so*")
        if library is None:
            lacks = f"no CUDA runtime library beside {include}"
            continue
        spare = [path / "triton" / "backends" / "nvidia" / "include" for path in paths]
        further = next((path for path in (include, *spare) if (path / "crt" / "host_defines.h").is_file()), None)
        if further is None:
            lacks = f"CUDA's headers are not whole: no crt/host_defines.h beside {include}"
            continue
        return Toolkit(tuple(dict.fromkeys((include, further))), sorted(library.glob("libcudart.so*"))[0])
    return lacks


def refused_headers(toolkit: Toolkit) -> str | None:
    """That the compiler knows no C++17, or does not take these headers."""
    compiler = next(name for name in ("c++", "g++", "clang++") if shutil.which(name))
    includes = [f"-I{path}" for path in toolkit.includes]
    command = [compiler, "-std=c++17", *includes, "-xc++", "-fsyntax-only", "-"]
    ended = _call(command, CONFIGURE_SECONDS, PROBE)
    return f"{compiler} does not compile C++17 with CUDA's headers: {_first_error(ended)}" if ended.returncode else None


def judged(ended: subprocess.CompletedProcess[str]) -> Ended:
    """What the program's end means."""
    said = [line for line in ended.stderr.splitlines() if line.strip()]
    if ended.returncode == 0:
        return Ended("passed")
    if ended.returncode == NOT_RUN:
        return Ended("not run", said[-1] if said else "it found no GPU")
    how = f"exit status {ended.returncode}"
    if ended.returncode < 0:
        how = signal.Signals(-ended.returncode).name
    return Ended("failed", f"{how}: {'; '.join(said[:3])[:400] or 'it said nothing'}")


def _first(root: Path, folders: Sequence[str], pattern: str) -> Path | None:
    return next((root / one for one in folders if any((root / one).glob(pattern))), None)


def _first_error(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it said nothing")[:400]


def _call(command: list[str], seconds: float, given: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=given, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"error: not done after {seconds:g} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"error: {error}")
