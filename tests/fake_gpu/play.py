"""Puts a GPU and a TensorRT into this process, and takes them out again."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_gpu.device import Device, Mode, cuda_surface
from fake_gpu.state import State
from fake_gpu.tensorrt import library_version, new_module

ROOTS = ("tensorrt", "tensorrt_rtx", "polygraphy")
SMI = "#!/bin/sh\nprintf 'P0, 2040, 2040, 6251, 70.12, 72.00, 61'\n"


@contextlib.contextmanager
def play(version: str, device: Device | None = None, *, gpu: bool = True, beside: str | None = None) -> Iterator[State]:
    """A machine with a GPU and one TensorRT; everything is as before when it ends.

    Args:
        version: a key of tensorrt.LISTINGS or tensorrt.BETWEEN, such as "10.3" or "rtx-1.7".
        device: the GPU, by default an L4.
        gpu: whether there is one.
        beside: another version that is installed too, of the other flavor.
    """
    here = (device or Device()) if gpu else None
    state = new_state(version, here)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        _forget_modules(patch)
        for name in ("tensorrt", "tensorrt_rtx"):
            patch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
        for each, its in ((version, state), *([(beside, new_state(beside, here))] if beside else [])):
            module = new_module(each, its)
            patch.setitem(sys.modules, module.__name__, module)
        stack.callback(_forget_modules)  # those of the play, before the old ones come back
        patch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "0")
        _put_driver_in(patch, here)
        if here is not None:
            for name, value in cuda_surface(here).items():
                patch.setattr(torch.cuda, name, value)
            patch.setattr("engines.run.streams._spare", collections.defaultdict(list))  # those of this device
            patch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            stack.enter_context(Mode(here))
        _make_short(patch)
        yield state


def new_state(version: str, device: Device | None) -> State:
    """The state of a play of one version."""
    return State(library_version(version), "rtx" if version.startswith("rtx") else "tensorrt", device)


def environment(version: str, without: Sequence[str] = ()) -> dict[str, str]:
    """Variables with which a Python process that a test starts, and every one that it starts, plays a version too.

    Args:
        version: as of play.
        without: modules that cannot be imported there, such as TensorRT's own on a bare machine with a GPU.
    """
    site, tests = Path(__file__).parent / "site", Path(__file__).parent.parent
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"NECK_PLAYED": version, "NECK_PLAYED_TESTS": str(tests), "NECK_PLAYED_WITHOUT": ",".join(without)}
    return {"PYTHONPATH": os.pathsep.join(paths), **told}


def put_smi(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Puts an nvidia-smi onto the path."""
    command = folder / "nvidia-smi"
    command.write_text(SMI)
    command.chmod(0o755)
    patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def _forget_modules(patch: pytest.MonkeyPatch | None = None) -> None:
    """Takes modules out, so that Polygraphy imports the TensorRT of then; with a patch they come back at its end."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        if patch is None:
            del sys.modules[name]
        else:
            patch.delitem(sys.modules, name)


def _make_short(patch: pytest.MonkeyPatch) -> None:
    """What is large or long for a GPU's sake is small here."""
    from engines.run import latency, profiling, startup, timing

    patch.setattr(latency, "WARM_UP_SECONDS", 0.0)
    patch.setattr(latency, "WARM_UP_RUNS", 1)
    patch.setattr(profiling, "PEAK_SIDE", 16)
    patch.setattr(profiling, "start_process", startup.time_start)  # a process takes seconds to import torch
    patch.setattr(profiling, "COPY_BYTES", 1 << 12)
    for function in (profiling.profile_plan, timing.median_ms):
        patch.setitem(function.__kwdefaults__, "runs", 3)


class Driver:
    """libcuda.so.1 and libnvidia-ml.so.1, as ctypes would load them."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the driver has no symbol {name}")

    def cuInit(self, flags: int) -> int:
        """Success."""
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        """How many."""
        count._obj.value = len(self.device.capabilities)
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        """The one of that index."""
        device._obj.value = ordinal
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        """Its name."""
        name.value = self.device.name.encode()[: length - 1]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        """The newest CUDA that it serves."""
        version._obj.value = self.device.cuda
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        """Major and minor compute capability (75 and 76 in cuda.h)."""
        capability = self.device.capabilities[device.value]
        value._obj.value = int(capability.split(".")[{75: 0, 76: 1}[attribute]])
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        """A stream of the current GPU."""
        stream._obj.value = self.device.create_stream()
        return 0

    def nvmlInit_v2(self) -> int:
        """Success."""
        return 0

    def nvmlSystemGetDriverVersion(self, version: Any, length: int) -> int:
        """The driver's version."""
        version.value = self.device.driver.encode()[: length - 1]
        return 0


def _put_driver_in(patch: pytest.MonkeyPatch, device: Device | None) -> None:
    load = ctypes.CDLL

    def find(name: Any, *more: Any, **options: Any) -> Any:
        if name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            if device is None:
                raise OSError(f"{name}: cannot open shared object file")
            return Driver(device)
        return load(name, *more, **options)

    patch.setattr(ctypes, "CDLL", find)
