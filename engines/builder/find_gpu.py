"""Finds the GPU of this machine through NVIDIA's driver, without torch."""

from __future__ import annotations

import ctypes
import dataclasses

COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
"""CUdevice_attribute values (cuda.h)."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU; `driver` is the driver version or `unknown`, `cuda` the newest CUDA version that it supports."""

    name: str
    compute_capability: str
    driver: str
    cuda: str


def find_gpu(index: int = 0) -> Gpu | None:
    """Asks the CUDA driver for the GPU with an index, without torch; returns None if there is no such GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, version, count, major, minor = (ctypes.c_int() for _ in range(5))
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or index >= count.value:
        return None
    name = ctypes.create_string_buffer(128)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(
        name=name.value.decode(),
        compute_capability=f"{major.value}.{minor.value}",
        driver=nvml_driver_version() or "unknown",
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def nvml_driver_version() -> str | None:
    """Returns NVML's driver version, which also exists without /proc/driver (WSL2); None without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    text = ctypes.create_string_buffer(80)
    failed = nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text))
    return None if failed else text.value.decode()
