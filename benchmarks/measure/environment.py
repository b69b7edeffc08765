"""The machine that a benchmark runs on: what it is, and which backends it has."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from benchmarks.measure.worker_process import SETTINGS
from engines.doctor import driver_version, installed_version

VERSIONS = {
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx-cu13",),
    "triton": ("triton",),
    "neck-export": ("neck-export",),
}
"""Name in the results -> distributions that bring it."""

CPU_FLAGS = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
"""Flags in /proc/cpuinfo, any of which says that the CPU multiplies in a precision (x86-64, aarch64)."""

MEMORY = Path("/proc/meminfo")


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def available_bytes() -> int:
    """Memory that is available without swapping."""
    found = re.search(r"MemAvailable: *(\d+) kB", MEMORY.read_text()) if MEMORY.is_file() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that can run an encoder; None if one is not installed."""
    found = {name: [installed_version(one) for one in names] for name, names in VERSIONS.items()}
    return {name: next(filter(None, versions), None) for name, versions in found.items()}


def describe_machine() -> dict[str, Any]:
    """The environment of a result: processor, memory, system, GPU, versions."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": _gpu(),
        "versions": package_versions(),
        "settings": dict(SETTINGS),
    }


def _gpu() -> dict[str, Any] | None:
    """The first GPU, its clocks while it multiplies; None where torch has none."""
    import torch

    from engines.run.profiling import read_state

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    left = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)

    def work() -> None:
        for _ in range(20):
            torch.mm(left, left)
        torch.cuda.synchronize()

    return {
        "name": properties.name,
        "driver": driver_version(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "clocks": read_state(work),
    }


def machine_name(environment: dict[str, Any]) -> str:
    """The machine's name in tables."""
    if environment["gpu"]:
        return str(environment["gpu"]["name"])
    return f"{environment['processor']}, {environment['cores']} cores"


def capabilities() -> dict[str, Any]:
    """The facts about this machine that `backends.why_unavailable` needs, as JSON values."""
    import torch

    flags = set(re.findall(r"[^\s:]+", _cpu_flags()))
    return {
        "cuda": torch.cuda.is_available(),
        "cpu_computes": {precision: bool(names & flags) for precision, names in CPU_FLAGS.items()},
        "compilers": {"cpu": _cpu_compiler(), "cuda": _gpu_compiler()},
        "providers": _providers(),
        "openvino": _openvino(),
        "plans": {flavor: _plan_problem(flavor) for flavor in ("tensorrt", "rtx")},
    }


def _cpu_flags() -> str:
    file = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else ""


def _cpu_compiler() -> str | None:
    """What torch.compile lacks on the CPU."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++")):
        return "torch.compile needs a C++ compiler, but none was found; run apt-get install g++"
    return _header_problem()


def _header_problem() -> str | None:
    """What is said where Python's headers are missing: Inductor's C++ and Triton's launchers include them."""
    found = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return None if found else "torch.compile needs Python.h, but it was not found; run apt-get install python3-dev"


def _gpu_compiler() -> str | None:
    """What torch.compile lacks on a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs the Python package triton, which is not installed; run pip install triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang", "cc")):
        return "torch.compile needs a C compiler for the Triton language, but none was found; run apt-get install gcc"
    return _header_problem()


def _providers() -> list[str] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    return list(onnxruntime.get_available_providers())


def _openvino() -> list[str] | None:
    """What OpenVINO's CPU plugin computes in, such as FP32 and BF16."""
    try:
        import openvino
    except ImportError:
        return None
    return [str(name) for name in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")]


def _plan_problem(flavor: str) -> str | None:
    """Why no plan of a flavor can be built and run here."""
    from engines.builder.find_gpu import find_gpu
    from engines.builder.flavor import FlavorError, choose_flavor

    if find_gpu() is None:
        return "this machine has no NVIDIA GPU, or no driver for it, so a plan cannot be run here"
    try:
        chosen = choose_flavor(flavor)  # type: ignore[arg-type]
    except FlavorError as error:
        return str(error)
    assert chosen.gpu is not None
    if chosen.capabilities and chosen.gpu.compute_capability not in chosen.capabilities:
        return f"{flavor} {chosen.version} does not support {chosen.gpu.name} ({chosen.gpu.compute_capability})"
    return None
