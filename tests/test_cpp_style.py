"""engines/cpp by other eyes: gcc and clang with warnings as errors, each file by itself, clang-tidy: `make lint-cpp`.

Minutes of processor time, so all of it is `slow`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cpp_build import SOURCES, TESTS, cmake, why_missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))]

TIDY = "clang-tidy"


def configured(folder: Path, compiler: str) -> Path:
    """A build folder against the fakes' headers, optimized: gcc sees more then."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}; apt install g++ clang")
    fake = TESTS / "fake"
    ended = cmake(
        SOURCES,
        folder,
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_CXX_FLAGS=-Werror",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        "-DNECK_CUDA_KERNELS=OFF",
        f"-DNECK_TENSORRT_INCLUDE_DIR={fake}",
        f"-DNECK_TENSORRT_LIBRARY={fake}/none.so",
        f"-DNECK_CUDA_INCLUDE_DIR={fake}",
        f"-DNECK_CUDART_LIBRARY={fake}/none.so",
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def objects(folder: Path) -> list[str]:
    """What is compiled; nothing is linked, for the fakes are headers alone here."""
    told = subprocess.run(["ninja", "-C", folder, "-t", "targets", "all"], capture_output=True, text=True, check=True)
    return [line.partition(":")[0] for line in told.stdout.splitlines() if line.partition(":")[0].endswith(".o")]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_compiler_warns(compiler: str, tmp_path: Path) -> None:
    names = objects(configured(tmp_path, compiler))
    assert len(names) == len(list((SOURCES / "src").rglob("*.cpp")))
    ended = subprocess.run(["ninja", "-C", tmp_path, *names], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:]


@pytest.mark.skipif(shutil.which(TIDY) is None, reason=f"needs {TIDY}; apt install {TIDY}")
def test_clang_tidy_is_quiet_with_the_committed_profile(tmp_path: Path) -> None:
    configured(tmp_path, "clang++" if shutil.which("clang++") else "g++")
    files = sorted((SOURCES / "src").rglob("*.cpp"))

    def tidy(path: Path) -> str:
        command = [TIDY, "--quiet", "-p", tmp_path, path]
        ended = subprocess.run(command, capture_output=True, text=True)
        return "" if ended.returncode == 0 and not ended.stdout.strip() else ended.stdout + ended.stderr

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        said = [text for text in threads.map(tidy, files) if text]
    assert not said, "\n".join(said)


@pytest.mark.skipif(shutil.which(TIDY) is None, reason=f"needs {TIDY}; apt install {TIDY}")
def test_clang_tidy_sees_what_is_wrong(tmp_path: Path) -> None:
    """The control: two things of the profile's."""
    wrong = tmp_path / "wrong.cpp"
    wrong.write_text("int* nothing() { return 0; }\nint odd() { int value; return value; }\n")
    command = [TIDY, f"--config-file={SOURCES / '.clang-tidy'}", wrong, "--", "-std=c++17"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "modernize-use-nullptr" in ended.stdout
    assert "cppcoreguidelines-init-variables" in ended.stdout
