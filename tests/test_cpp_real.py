"""engines/cpp against what is real here: ONNX Runtime, NVIDIA's headers and libraries, an installation, a GPU.

What must be at hand, else the test is skipped: NECK_ORT_INCLUDE names the folder of onnxruntime_c_api.h (Debian's
libonnxruntime-dev), NECK_TENSORRT_INCLUDE those of NvInferRuntime.h with colons between them, NECK_CUDA_ROOT the CUDA
runtime's include and lib; TensorRT_ROOT and CUDAToolkit_ROOT a whole SDK, for the test that runs a plan on a GPU.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from cpp_build import (
    SOURCES,
    TESTS,
    Programs,
    build,
    cmake,
    ort_include,
    ort_library,
    rtx_library,
    why_missing,
    write_plan,
)
from exporting import neck_export_cli
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_session import build_convolution

from engines.builder.find_gpu import find_gpu
from engines.builder.flavor import Flavor, choose_flavor

pytestmark = pytest.mark.skipif(why_missing() is not None, reason=str(why_missing()))

ENGINE_SOURCES = (
    *("gpu/cuda", "plan/checks", "plan/flavor", "plan/load"),
    *("engine/engine", "engine/outputs", "engine/pool", "engine/runs", "commands/neck_engine"),
)
"""Those that include NVIDIA's headers."""


def nvidia_includes() -> list[Path]:
    """Folders of NVIDIA's TensorRT headers; skips where there is none, or none of CUDA's."""
    named = [Path(path) for path in os.environ.get("NECK_TENSORRT_INCLUDE", "").split(os.pathsep) if path]
    found = [path for path in named if (path / "NvInferRuntime.h").is_file()]
    if not found or not (cuda_root() / "include" / "cuda_runtime_api.h").is_file():
        pytest.skip("needs NVIDIA's headers: NECK_TENSORRT_INCLUDE (NvInferRuntime.h) and NECK_CUDA_ROOT")
    return found


RTX_CLASSES = """
enum class DynamicShapesKernelSpecializationStrategy : int32_t { kLAZY = 0, kEAGER = 1, kNONE = 2 };
enum class CudaGraphStrategy : int32_t { kDISABLED = 0, kWHOLE_GRAPH_CAPTURE = 1 };
class IRuntimeCache
{
public:
    IHostMemory* serialize() const noexcept { return nullptr; }
    bool deserialize(void const*, size_t) noexcept { return false; }
};
"""
RTX_MEMBERS = {
    "IRuntimeConfig": """
    void setDynamicShapesKernelSpecializationStrategy(DynamicShapesKernelSpecializationStrategy) noexcept {}
    bool setCudaGraphStrategy(CudaGraphStrategy) noexcept { return true; }
    IRuntimeCache* createRuntimeCache() const noexcept { return nullptr; }
    bool setRuntimeCache(IRuntimeCache const&) noexcept { return true; }
""",
    "IExecutionContext": "bool isStreamCapturable(cudaStream_t) const { return true; }",
}
"""What TensorRT-RTX's headers have beside TensorRT's; they come with its SDK alone. The listings of its Python
bindings and NVIDIA's documentation name them."""


def rtx_includes(folder: Path) -> Path:
    """TensorRT's headers with what RTX's have beside it; nothing of that is called before a driver is found."""
    newest = nvidia_includes()[-1]
    text = (newest / "NvInferRuntime.h").read_text()
    for name, members in RTX_MEMBERS.items():
        start = f"class {name} : public INoCopy\n{{\npublic:"
        assert text.count(start) == 1, name
        text = text.replace(start, f"{RTX_CLASSES if name == 'IRuntimeConfig' else ''}{start}\n{members}")
    folder.mkdir()
    for header in newest.glob("*.h"):
        (folder / header.name).write_bytes(header.read_bytes())
    (folder / "NvInferRuntime.h").write_text(text)
    return folder


def cuda_root() -> Path:
    return Path(os.environ.get("NECK_CUDA_ROOT", "/usr/local/cuda"))


@pytest.mark.parametrize("name", ENGINE_SOURCES)
def test_the_sources_compile_with_nvidias_headers(name: str, tmp_path: Path) -> None:
    rtx = rtx_includes(tmp_path / "rtx")
    for include in [*nvidia_includes(), rtx]:
        folders = [
            f"-I{SOURCES / 'include'}",
            f"-I{SOURCES / 'src'}",
            "-isystem",
            include,
            "-isystem",
            cuda_root() / "include",
        ]
        flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        flags += ["-DNECK_TENSORRT_RTX"] if include == rtx else []
        ended = subprocess.run(
            ["c++", *flags, *folders, SOURCES / "src" / f"{name}.cpp"], capture_output=True, text=True
        )
        assert (ended.returncode, ended.stderr) == (0, ""), include


def test_a_real_rtx_plan_without_a_gpu_is_told(tmp_path: Path) -> None:
    """Linked with TensorRT-RTX's own library."""
    include, library = rtx_includes(tmp_path / "rtx"), rtx_library()
    cudart = sorted((cuda_root() / "lib").glob("libcudart.so*"))
    if library is None or not cudart:
        pytest.skip("needs the tensorrt_rtx wheel, and NECK_CUDA_ROOT/lib/libcudart.so")
    if find_gpu() is not None:
        pytest.skip("is for machines without a GPU")
    configured = cmake(
        SOURCES,
        tmp_path / "build",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DNECK_BUILD_CLIENT=OFF",
        f"-DNECK_TENSORRT_INCLUDE_DIR={include}",
        f"-DNECK_TENSORRT_LIBRARY={library}",
        f"-DNECK_CUDA_INCLUDE_DIR={cuda_root() / 'include'}",
        f"-DNECK_CUDART_LIBRARY={cudart[0]}",
    )
    assert configured.returncode == 0, configured.stderr
    assert "neck-engine: rtx" in configured.stdout
    build(tmp_path / "build")
    plan = build_convolution(tmp_path, choose_flavor("rtx"))
    environment = os.environ | {"LD_LIBRARY_PATH": f"{library.parent}:{cudart[0].parent}"}
    ended = subprocess.run([tmp_path / "build" / "neck-engine", plan], capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    wanted = f"{plan}: this machine has no NVIDIA GPU that CUDA can use. CUDA reports: "
    assert ended.stderr.startswith(f"neck-engine: {wanted}")
    other = write_plan(tmp_path / "other")
    ended = subprocess.run([tmp_path / "build" / "neck-engine", other], capture_output=True, text=True, env=environment)
    assert "the plan was built for --flavor tensorrt, but this program was built for rtx" in ended.stderr


@pytest.mark.parametrize("input_kind", ["float", "uint8"])
def test_a_plan_that_computes_equals_pytorch(programs: Programs, tmp_path: Path, input_kind: str) -> None:
    """An encoder as the fake's plan, run by ONNX Runtime, against what `verify --save-reference` saved."""
    if ort_include() is None:
        pytest.skip("needs onnxruntime_c_api.h; apt install libonnxruntime-dev (Debian 13), or give NECK_ORT_INCLUDE")
    pytest.importorskip("tritonclient.http", reason="needs tritonclient; pip install '.[triton]'")
    from triton_server import fake_plan

    plan = fake_plan(tmp_path, input_kind=input_kind)
    reference = tmp_path / "reference.safetensors"
    assert neck_export_cli("verify", plan.with_suffix(".onnx"), "--save-reference", reference).code == 0
    environment = {"STAND_IN_VERSION": "10.13.3.9", "STAND_IN_ORT": str(ort_library())}
    for options in ([], ["--graph"], ["--batch", "1"]):
        ran = programs.run("neck-engine", plan, "--compare", reference, "--runs", 1, *options, **environment)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.count("  ok\n") == 16
    arrays = load_file(reference)
    arrays["sam2_feat_3"] = arrays["sam2_feat_3"] * np.float32(1.001)  # the planted error: relative L2 1e-3
    save_file(arrays, reference)
    ran = programs.run("neck-engine", plan, "--compare", reference, **environment)
    assert ran.code == 3
    failed = [line.split()[0] for line in ran.out.splitlines() if line.endswith("FAILED")]
    assert failed == ["sam2_feat_3"]


CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES CXX)
find_package(neck 0.1 REQUIRED)
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE neck::engine neck::client)
add_executable(service ${EXAMPLES}/service.cpp)
target_link_libraries(service PRIVATE neck::engine TensorRT::cudart)
add_executable(readme readme.cpp)
target_link_libraries(readme neck::engine TensorRT::cudart)
"""
MAIN = """
#include <iostream>
#include <neck/engine.hpp>
#include <neck/image.hpp>
#include <neck/triton.hpp>
int main(int, char** values) {
    try {
        const neck::Engine engine(values[1]);
        std::cout << engine.input().describe() << "\\n";
        neck::TritonClient("localhost:1").model("x");
    } catch (const neck::Error& error) {
        std::cout << error.what() << "\\n";
    }
}
"""


def test_what_is_installed_can_be_built_with(programs: Programs, tmp_path: Path) -> None:
    """A project of another's finds the package, both libraries in it, and the commands."""
    there, source = tmp_path / "there", tmp_path / "consumer"
    subprocess.run(
        ["cmake", "--install", programs.folder / "engines_cpp", "--prefix", there], check=True, capture_output=True
    )
    source.mkdir()
    (source / "CMakeLists.txt").write_text(CONSUMER)
    (source / "main.cpp").write_text(MAIN)
    (snippet,) = re.findall(
        r"```cpp\n(.*?)```", (SOURCES.parent.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    (source / "readme.cpp").write_text(snippet.replace("build/sam3-encoder.plan", "x.plan"))
    fake, library = TESTS / "fake", programs.folder / "libfake.a"
    configured = cmake(
        source,
        tmp_path / "built",
        f"-DCMAKE_PREFIX_PATH={there}",
        f"-DEXAMPLES={SOURCES / 'examples'}",
        "-DCMAKE_CXX_FLAGS=-fsanitize=address,undefined",
        f"-DNECK_TENSORRT_INCLUDE_DIR={fake}",
        f"-DNECK_TENSORRT_LIBRARY={library}",
        f"-DNECK_CUDA_INCLUDE_DIR={fake}",
        f"-DNECK_CUDART_LIBRARY={library}",
    )
    assert configured.returncode == 0, configured.stderr
    build(tmp_path / "built")
    ended = subprocess.run([tmp_path / "built" / "consumer", write_plan(tmp_path)], capture_output=True, text=True)
    assert ended.stdout.startswith("image: float32 (1 to 4, 3, 16, 16)\nhttp://localhost:1/v2/models/x/config: ")
    images = [tmp_path / f"{name}.png" for name in ("a", "b", "none")]
    for path in images[:2]:
        Image.new("RGB", (40, 20)).save(path)
    plan = write_plan(tmp_path)
    ended = subprocess.run([tmp_path / "built" / "service", plan, *images], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (0, 1)
    assert f"{images[2]}: the image cannot be opened" in ended.stderr
    assert (
        ended.stdout.count(
            "the output sam3_feat_0 was computed from the resized image. To convert coordinates from the resized image "
            "to the original image, multiply x by 2.5 and y by 1.25"
        )
        == 2
    )
    images[0].rename(tmp_path / "image.png")
    readme = tmp_path / "built" / "readme"
    ended = subprocess.run([readme], capture_output=True, text=True, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "") and "sam3_feat_0: " in ended.stdout
    ended = subprocess.run([readme], capture_output=True, text=True, cwd=source)
    assert ended.returncode == 1 and "x.plan" in ended.stderr
    for name in ("neck-triton", "neck-engine"):
        helped = subprocess.run([there / "bin" / name, "--help"], capture_output=True, text=True)
        assert helped.stdout.startswith(f"Usage: {name}")


PARENT = """
cmake_minimum_required(VERSION 3.21)
project(parent LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
add_subdirectory(${SOURCES} neck)
install(FILES CMakeLists.txt DESTINATION share/parent)
"""


def test_a_project_around_it_keeps_its_own(tmp_path: Path) -> None:
    """add_subdirectory: the later C++ standard is used, and the project's installation has none of our files."""
    (tmp_path / "CMakeLists.txt").write_text(PARENT)
    built, there = tmp_path / "built", tmp_path / "there"
    options = [f"-DSOURCES={SOURCES}", "-DNECK_BUILD_ENGINE=OFF", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    assert cmake(tmp_path, built, *options).returncode == 0
    commands = [entry["command"] for entry in json.loads((built / "compile_commands.json").read_text())]
    assert commands and all("++20" in command for command in commands)
    subprocess.run(["cmake", "--install", built, "--prefix", there], check=True, capture_output=True)
    assert [path.name for path in there.rglob("*") if path.is_file()] == ["CMakeLists.txt"]


CLIENT = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES CXX)
find_package(neck 0.1 REQUIRED COMPONENTS client)
if(TARGET neck::engine)
  message(FATAL_ERROR "nobody asked for the engine")
endif()
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE neck::client)
find_package(neck 0.1 COMPONENTS engine QUIET)
if(neck_FOUND)
  message(FATAL_ERROR "the engine was not built")
endif()
"""
CLIENT_MAIN = """
#include <iostream>
#include <neck/image.hpp>
#include <neck/triton.hpp>
int main() {
    try {
        neck::TritonClient("localhost:1").model("x");
    } catch (const neck::Error& error) {  // across the boundary of a library with hidden symbols
        std::cout << error.what() << "\\n";
    }
}
"""


@pytest.mark.slow
def test_packagers_get_what_they_expect(tmp_path: Path) -> None:
    """Shared libraries with hidden symbols, versions in their names, and a package whose client stands alone."""
    library, there, consumer = tmp_path / "library", tmp_path / "there", tmp_path / "consumer"
    options = [
        "-DNECK_BUILD_ENGINE=OFF",
        "-DBUILD_SHARED_LIBS=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_UNITY_BUILD=ON",
    ]
    options += ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0", "-DCMAKE_CXX_VISIBILITY_PRESET=hidden"]
    options += ["-DCMAKE_CXX_FLAGS=-g0"]
    assert cmake(SOURCES, library, *options).returncode == 0
    build(library)
    subprocess.run(["cmake", "--install", library, "--prefix", there], check=True, capture_output=True)
    (shared,) = there.rglob("libneck_client.so.0.1.0")
    assert {path.name for path in shared.parent.glob("libneck_*")} == {
        f"libneck_{name}.so{version}" for name in ("client", "common") for version in ("", ".0.1", ".0.1.0")
    }
    names = subprocess.run(["nm", "-DC", "--defined-only", shared], capture_output=True, text=True, check=True).stdout
    assert "neck::TritonClient::model(" in names
    assert "neck::Http::" not in names  # the control: what is not offered is hidden
    consumer.mkdir()
    (consumer / "CMakeLists.txt").write_text(CLIENT)
    (consumer / "main.cpp").write_text(CLIENT_MAIN)
    configured = cmake(consumer, tmp_path / "built", f"-DCMAKE_PREFIX_PATH={there}")
    assert configured.returncode == 0, configured.stderr
    build(tmp_path / "built")
    ran = subprocess.run([tmp_path / "built" / "consumer"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("http://localhost:1/v2/models/x/config: ")
    helped = subprocess.run([there / "bin" / "neck-triton", "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith("Usage: neck-triton")


def test_a_missing_sdk_is_told_with_what_to_give(tmp_path: Path) -> None:
    configured = cmake(SOURCES, tmp_path, f"-DTensorRT_ROOT={TESTS / 'fake'}", "-DCUDAToolkit_ROOT=/nothing")
    if "neck-engine: " in configured.stdout:
        pytest.skip("CUDA and TensorRT are found here whatever is said")
    assert configured.returncode != 0
    text = " ".join(configured.stderr.split())
    assert "set -DTensorRT_ROOT=... -DCUDAToolkit_ROOT=..., or build only the Triton client" in text


@pytest.mark.gpu
def test_a_plan_runs_on_the_gpu(gpu_flavor: Flavor, tmp_path: Path) -> None:
    """The convolution's known sums, by the real library, with CUDA graphs and without."""
    roots = [os.environ.get(name) for name in ("TensorRT_ROOT", "CUDAToolkit_ROOT")]
    if not all(roots):
        pytest.skip("needs TensorRT's SDK and CUDA's: TensorRT_ROOT, CUDAToolkit_ROOT")
    configured = cmake(SOURCES, tmp_path / "build", f"-DNECK_FLAVOR={gpu_flavor.name}", "-DNECK_BUILD_CLIENT=OFF")
    assert configured.returncode == 0, configured.stderr
    build(tmp_path / "build")
    plan = build_convolution(tmp_path, gpu_flavor)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    image = pixels.astype(np.float32) * np.float32(2 / 255) - np.float32(1)
    reference = tmp_path / "reference.safetensors"
    save_file({"pixels": pixels, "sum": image.sum(axis=3, dtype=np.float32)[:, None]}, reference)
    wrong = tmp_path / "wrong.safetensors"
    save_file({"pixels": pixels, "sum": image.sum(axis=3, dtype=np.float32)[:, None] + 0.01}, wrong)
    for options in ([], ["--graph"], ["--batch", "1"]):
        command = [tmp_path / "build" / "neck-engine", plan, *options, "--compare"]
        ended = subprocess.run([*command, reference], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr + ended.stdout
        assert subprocess.run([*command, wrong], capture_output=True).returncode == 3
