"""Builds engines/cpp for its tests, against the fakes or what is at hand, and runs what it built."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from synthetic_images import images_of

from export.contract.atomic import locked
from export.contract.manifest import manifest_path, write_manifest

ROOT = Path(__file__).parent.parent
SOURCES, TESTS = ROOT / "engines" / "cpp", ROOT / "tests" / "cpp"
VERSION = "10.16.1.11"
TOOLS = ("cmake", "ninja", "c++")
HEADERS = ("jpeglib.h", "zlib.h", "openssl/evp.h", "curl/curl.h", "nlohmann/json.hpp")

PLAN = b"""fake
input image float32 -1,3,16,16 1,2,4
output sam3_feat_0 float16 -1,8,4,4
output sam3_pos_0 float32 -1,8,4,4
scratch 1000
"""
"""A plan of the fake: output 0 is twice the input's first values, output 1 that and 0.25."""


RTX = {"flavor": "rtx", "tensorrt_version": "1.7.1.116"}
"""What the manifest of a TensorRT-RTX plan says."""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a program gave."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its one line of error, without the program's name."""
        (line,) = self.err.splitlines()
        return line.partition(": ")[2]


@dataclasses.dataclass(frozen=True)
class Programs:
    """A build folder."""

    folder: Path

    def run(self, name: str, *arguments: str | Path | int, **environment: str) -> Ran:
        """Runs a program with the sanitizers' and the fakes' leak checks on."""
        ended = subprocess.run(
            [self.path(name), *map(str, arguments)], capture_output=True, timeout=600, env=settings(environment)
        )
        return Ran(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    def path(self, name: str) -> Path:
        """Where a program lies."""
        return next(path for path in (self.folder / name, self.folder / "engines_cpp" / name) if path.exists())


def settings(changes: dict[str, str]) -> dict[str, str]:
    """The environment of a program that is tested."""
    return os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"} | changes


@functools.cache
def why_missing() -> str | None:
    """Why nothing can be built here, or None."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return f"needs {', '.join(tools)}; apt install g++ cmake ninja-build"
    lines = [f"#if !__has_include(<{header}>)\n#error missing: {header}\n#endif" for header in HEADERS]
    checked = subprocess.run(
        ["c++", "-std=c++17", "-xc++", "-fsyntax-only", "-"], input="\n".join(lines), capture_output=True, text=True
    )
    if checked.returncode == 0:
        return None
    missing = [line.rpartition(": ")[2] for line in checked.stderr.splitlines() if "missing: " in line]
    packages = "libjpeg-dev zlib1g-dev libssl-dev libcurl4-openssl-dev nlohmann-json3-dev"
    return f"needs {', '.join(sorted(set(missing)))}; apt install {packages}"


def cmake(source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures a build folder."""
    return subprocess.run(
        ["cmake", "-G", "Ninja", "-S", source, "-B", folder, *options], capture_output=True, text=True, timeout=600
    )


def build(folder: Path, *capabilities: str) -> None:
    """Builds what is configured; raises with the compiler's words where it fails."""
    built = subprocess.run(["ninja", "-C", folder, *capabilities], capture_output=True, text=True, timeout=1800)
    if built.returncode:
        raise RuntimeError(built.stdout[-6000:] + built.stderr[-2000:])


def shared_programs() -> Programs:
    """All that tests/cpp builds, once for all processes of a test session; what did not change is not built again.

    NECK_CPP_BUILD names another folder than build/cpp-tests.
    """
    folder = Path(os.environ.get("NECK_CPP_BUILD") or ROOT / "build" / "cpp-tests").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return build_programs(folder)


def build_programs(folder: Path) -> Programs:
    """Builds all against the fakes."""
    configured = cmake(TESTS, folder, f"-DNECK_ORT_INCLUDE={ort_include() or ''}")
    if configured.returncode:
        raise RuntimeError(configured.stdout[-3000:] + configured.stderr[-3000:])
    build(folder)
    return Programs(folder)


def ort_include() -> Path | None:
    """Where ONNX Runtime's C header lies."""
    named = os.environ.get("NECK_ORT_INCLUDE")
    places = [named] if named else ["/usr/include/onnxruntime", "/usr/local/include/onnxruntime"]
    return next((Path(place) for place in places if (Path(place) / "onnxruntime_c_api.h").is_file()), None)


def ort_library() -> Path:
    """ONNX Runtime's library, which its wheel brings."""
    import onnxruntime

    return next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def rtx_library() -> Path | None:
    """TensorRT-RTX's library, which its wheel brings."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in Path(folder).glob("libtensorrt_rtx.so.*")), None)


def facts(**changes: Any) -> dict[str, Any]:
    """What the manifest of `PLAN` says."""
    feat = {"name": "sam3_feat_0", "dtype": "float16", "shape": ["batch", 8, 4, 4]}
    values = {
        "flavor": "tensorrt",
        "tensorrt_version": VERSION,
        "compute_capabilities": ["8.9"],
        "options": {"version_compatible": False, "hardware_compatible": "none"},
        "precision": "fp16",
        "batch": "1:2:4",
        "inputs": [{"name": "image", "dtype": "float32", "shape": ["batch", 3, 16, 16]}],
        "outputs": [feat, {**feat, "name": "sam3_pos_0", "dtype": "float32"}],
        "verification": {"verified": True, "method": "by hand"},
    }
    return {**values, **changes}


def write_plan(folder: Path, data: bytes = PLAN, **changes: Any) -> Path:
    """Writes x.plan and its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "x.plan"
    plan.write_bytes(data)
    write_manifest(manifest_path(plan), "plan", facts(**changes), [plan])
    return plan


def spoil(plan: Path, **changes: Any) -> None:
    """Edits a manifest; None takes a key out."""
    where = manifest_path(plan)
    content = {**json.loads(where.read_text()), **changes}
    where.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def fake_outputs(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What `PLAN` gives for images, in float32 before it is rounded."""
    image = pixels.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(2 / 255) - np.float32(1)
    twice = 2 * image.reshape(len(pixels), -1)[:, :128].reshape(len(pixels), 8, 4, 4)
    return {"sam3_feat_0": twice, "sam3_pos_0": twice + np.float32(0.25)}


def write_reference(folder: Path, count: int = 2, change: float = 0.0, **more: np.ndarray) -> Path:
    """A reference of `count` images for the fake's plan; `change` is added to its first output."""
    pixels = images_of(2, count, 16)
    outputs = fake_outputs(pixels)
    outputs["sam3_feat_0"] = outputs["sam3_feat_0"] + np.float32(change)
    path = folder / "reference.safetensors"
    save_file({"pixels": pixels, **outputs, **more}, path)
    return path
