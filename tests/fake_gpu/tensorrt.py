"""TensorRT's Python module as one version has it: what its listing lacks is not there, as with the real one.

A name that NVIDIA has and nobody here plays raises NotImplementedError, so that a new use of it is seen.
"""

from __future__ import annotations

import enum
import json
import types
from pathlib import Path
from typing import Any

from fake_gpu import builder, runtime
from fake_gpu.state import State

API = Path(__file__).parent.parent / "data" / "tensorrt-api"
LISTINGS = {
    "10.3": "tensorrt-10.3",
    "10.13": "tensorrt-10.13",
    "10.14": "tensorrt-10.14",
    "10.16": "tensorrt-10.16.1.11",
    "11.4": "tensorrt-11.4.0.106",
    "rtx-1.7": "tensorrt-rtx-1.7.1.116",
}
"""The versions that can be played."""

BETWEEN = {"10.5": "10.3", "10.7": "10.3"}
"""Versions without a listing of their own: they are played with the names of the nearest older one."""

WHEELS = {"10.3": "10.3.0", "10.5": "10.5.0", "10.7": "10.7.0.post1", "10.13": "10.13.0.35", "10.14": "10.14.1.48"}
"""What the module's __version__ says: those of 10.3 to 10.7 say less than their libraries."""

LIBRARIES = {"10.3": "10.3.0.26", "10.5": "10.5.0.18", "10.7": "10.7.0.23"}
"""What the library says, and plans hold, where the wheel says something else."""

INTERFACES = ("ILogger", "IProgressMonitor", "IStreamWriter", "IProfiler")
"""Classes that users derive from."""

VALUES = {
    "Severity": ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"),
    "TensorIOMode": ("NONE", "INPUT", "OUTPUT"),
}
"""Enums whose numbers matter, in their order."""


class PlayedEnum(enum.Enum):
    """An enum as pybind11 makes it: no int, but it turns into one."""

    def __int__(self) -> int:
        return int(self.value)


def read_listing(version: str) -> dict[str, list[str] | None]:
    """What a version offers: the members of every class."""
    listing = LISTINGS[BETWEEN.get(version, version)]
    values: dict[str, list[str] | None] = json.loads((API / f"{listing}.json").read_text(encoding="utf-8"))
    return values


def wheel_version(version: str) -> str:
    """What the module's __version__ says."""
    return WHEELS.get(version) or LISTINGS[version].rpartition("-")[2]


def library_version(version: str) -> tuple[int, ...]:
    """The four numbers of the library."""
    return tuple(int(part) for part in (LIBRARIES.get(version) or wheel_version(version)).split("."))


def new_enum(name: str, members: list[str], version: str) -> Any:
    """An enum of a listing; STRONGLY_TYPED is 1 in TensorRT 10 and 0 in 11 and RTX."""
    order = [member for member in VALUES.get(name, sorted(members)) if member in members]
    numbers = {member: index for index, member in enumerate(order)}
    if name == "NetworkDefinitionCreationFlag":
        numbers = {member: int(version.startswith("10.") and member != "EXPLICIT_BATCH") for member in members}
        numbers = {member: value + (member == "PREFER_AOT_PYTHON_PLUGINS") for member, value in numbers.items()}
    if name == "EngineInvalidityDiagnostics":
        numbers = {member: 1 << index for index, member in enumerate(order)}
    return PlayedEnum(name, numbers)


def is_enum(members: list[str]) -> bool:
    """Whether a listing's entry is an enum: its members are in capitals."""
    return bool(members) and all(member == member.upper() for member in members)


def new_module(version: str, state: State) -> types.ModuleType:
    """The module `tensorrt` or `tensorrt_rtx` of a version."""
    listing = read_listing(version)
    module = types.ModuleType("tensorrt_rtx" if version.startswith("rtx") else "tensorrt")
    module.__version__ = wheel_version(version)  # type: ignore[attr-defined]
    played = {**vars(builder), **vars(runtime)}
    for name, members in listing.items():
        if members and is_enum(members):
            setattr(module, name, new_enum(name, members, version))
        elif name in INTERFACES:
            setattr(module, name, _interface(name))
        elif isinstance(played.get(name), type):
            offers = {"offers": frozenset(members or ()), "trt": module, "state": state}
            setattr(module, name, type(name, (played[name],), offers))

    def missing(name: str) -> Any:
        if name in listing:
            raise NotImplementedError(f"the fake does not play {name} of TensorRT {version}")
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


def _interface(name: str) -> type:
    """A class to derive from, whose own __init__ must be called, as pybind11 demands."""

    def __init__(self: Any) -> None:
        self._begun = True

    return type(name, (), {"__init__": __init__})
