"""What this machine can do for the exporter, and what to install for the rest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.builder.find_gpu import nvml_driver_version
from export.contract.extras import install

ITSELF = "pip install . in a checkout of neck-export"

PACKAGES = {
    "torch": ITSELF,
    "onnx": ITSELF,
    "onnx-ir": ITSELF,
    "onnxruntime": install("cpu"),
    "onnxruntime-gpu": install("gpu"),
    "tensorrt": install("gpu"),
    "tensorrt-rtx-cu13": install("rtx"),
    "polygraphy": install("rtx"),
}
"""Distribution -> what installs it."""

OTHER_NAMES = {
    "tensorrt": ("tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx-cu13": ("tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""Distributions that bring the same module."""

DRIVER = Path("/proc/driver/nvidia/version")


def examine() -> dict[str, Any]:
    """Facts of this machine as JSON values: packages, GPU, driver, memory, disk, and what each step lacks."""
    packages = {name: installed_version(name) for name in PACKAGES}
    gpus = gpu_names()
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "disk_free_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "driver": driver_version(),
        "gpus": gpus,
        "packages": packages,
    }
    capabilities = [name.rpartition(" ")[2] for name in gpus]
    found["can"] = abilities(packages, capabilities, rtx_targets() if packages["tensorrt-rtx-cu13"] else ())
    return found


def installed_version(name: str) -> str | None:
    """The version of an installed distribution or one that brings the same module, or None."""
    for one in (name, *OTHER_NAMES.get(name, ())):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(one)
    return None


def driver_version() -> str | None:
    """The version of NVIDIA's driver, or None: the kernel module's, else what NVML tells (WSL2 has no /proc/driver)."""
    with contextlib.suppress(OSError):
        # `... Kernel Module  535.161.08  ...`, or of the open driver `... Kernel Module for x86_64  550.54.15  ...`
        match = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", DRIVER.read_text())
        if match:
            return match.group(1)
    return nvml_driver_version()


def gpu_names() -> list[str]:
    """Names and compute capabilities of the GPUs that torch sees."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver is told by the lines below, not by torch
        if not torch.cuda.is_available():
            return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{one.name}, compute capability {one.major}.{one.minor}" for one in properties]


def rtx_targets() -> tuple[str, ...]:
    """Compute capabilities that the installed TensorRT-RTX runs on; empty where it does not import."""
    from engines.builder.flavor import find_targets

    return find_targets("rtx")


def abilities(
    packages: Mapping[str, str | None], capabilities: Sequence[str], rtx_targets: Sequence[str]
) -> dict[str, str]:
    """For each step `yes`, or what it lacks.

    Args:
        packages: version of each of PACKAGES, None where it is missing.
        capabilities: compute capability of every GPU; the first is the one that is used.
        rtx_targets: compute capabilities that TensorRT-RTX runs on.
    """
    runtime = packages["onnxruntime"] or packages["onnxruntime-gpu"]
    tensorrt, rtx = packages["tensorrt"], packages["tensorrt-rtx-cu13"]
    no_gpu = "torch finds no NVIDIA GPU that it can use; check the driver, or install the CUDA build of torch"
    building = (
        f"TensorRT is not installed; run {PACKAGES['tensorrt']}, or, to build without a GPU, "
        f"{PACKAGES['tensorrt-rtx-cu13']}"
    )
    running = "TensorRT is not installed (see above)"
    if tensorrt or rtx:
        building = "yes" if rtx or capabilities else no_gpu
        running = "yes" if capabilities else no_gpu
    if running == "yes" and not tensorrt and capabilities[0] not in rtx_targets:
        running = (
            f"TensorRT-RTX does not list compute capability {capabilities[0]} as supported. To run engines on this "
            f"GPU, install TensorRT: run {PACKAGES['tensorrt']}"
        )
    return {
        "export to ONNX": "yes",
        "verify ONNX": "yes" if runtime else f"onnxruntime is not installed; run {PACKAGES['onnxruntime']}",
        "build engines": building,
        "run, verify and profile engines": running,
    }


def report_lines(found: dict[str, Any]) -> list[str]:
    """The facts for a screen."""
    return [
        f"Python {found['python']}, {found['system']}, {found['cores']} CPU cores, {found['memory_gb']} GB of "
        f"memory, {found['disk_free_gb']} GB free on the disk of the current folder",
        f"GPU      {'; '.join(found['gpus']) or 'none found'}, driver {found['driver'] or 'not found'}",
        *(
            f"package  {name} {version or 'is not installed; run ' + PACKAGES[name]}"
            for name, version in found["packages"].items()
        ),
        *(f"{step:32} {answer}" for step, answer in found["can"].items()),
    ]
