"""The machine that a session begins on: whether it can serve, what it reaches, who else is there."""

from __future__ import annotations

import subprocess
import warnings
from typing import Any

import torch

from benchmarks.gpu.time_plan import Device
from benchmarks.measure.environment import describe_machine
from engines.doctor import driver_version, report_lines
from engines.doctor import examine as ask_doctor

NEEDED_BYTES = 30 << 30
"""Of device memory: eight backends at full size stay loaded side by side, 2 to 4 GB each."""

OTHERS_BYTES = 2 << 30
"""Held by others from so much on, it is told: CUDA's own context takes half a gigabyte."""

SECONDS = 20.0


def examine(device: Device) -> dict[str, Any]:
    """The machine's facts; `fatal` is set, in one or two lines, if nothing can be measured here."""
    problem = gpu_problem() if device == "cuda" else None
    if problem:
        return {"fatal": problem}
    doctor = ask_doctor()
    memory = device_memory() if device == "cuda" else None
    return {
        "environment": describe_machine(),
        "doctor": report_lines(doctor),
        "memory": memory,
        "warning": others(memory["free"], memory["total"], memory["programs"]) if memory else None,
        "fatal": too_little(memory["free"], memory["total"], memory["programs"]) if memory else None,
    }


def gpu_problem() -> str | None:
    """Why torch can use no GPU, and what to do."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            return None
    driver = driver_version()
    rehearse = "to run the GPU benchmark on the CPU as a test, run `make gpu GPU_DEVICE=cpu`"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is not a CUDA build; run `make gpu PYTHON=...` with a Python that has a CUDA "
            f"build of torch; {rehearse}"
        )
    said = next(
        (" ".join(str(one.message).split()).partition(" (Triggered")[0] for one in told), "torch gave no reason"
    )
    if driver is None:
        return (
            "`make gpu` needs a GPU, but this machine has no NVIDIA driver (neither /proc/driver/nvidia nor NVML "
            f"reports one); install the driver; {rehearse}"
        )
    return (
        f"torch {torch.__version__} cannot use a GPU with driver {driver} ({said[:200]}); install a driver for CUDA "
        f"{torch.version.cuda} or later, or an older torch"
    )


def device_memory() -> dict[str, Any]:
    """Free and total bytes of the first GPU, and the programs on it as nvidia-smi names them."""
    free, total = torch.cuda.mem_get_info()
    query = ["nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"]
    programs: list[str] = []
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=False)
        programs = done.stdout.strip().splitlines() if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        pass  # it is a courtesy
    return {"free": free, "total": total, "programs": programs}


def others(free: int, total: int, programs: list[str]) -> str | None:
    """A warning that other programs use the GPU."""
    if total - free < OTHERS_BYTES:
        return None
    return f"other programs use this GPU ({_room(free, total, programs)}), so the measured times include their load"


def too_little(free: int, total: int, programs: list[str]) -> str | None:
    """A message that the GPU has too little free memory."""
    if free >= NEEDED_BYTES:
        return None
    return (
        f"the GPU has too little free memory: {NEEDED_BYTES / 1e9:.0f} GB are needed, but "
        f"{_room(free, total, programs)}; "
        "close other programs or use another GPU"
    )


def _room(free: int, total: int, programs: list[str]) -> str:
    told = f", used by: {'; '.join(programs[:3])}" if programs else ""
    return f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of device memory are free{told}"
