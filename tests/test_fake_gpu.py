"""The fakes themselves: they play nothing that NVIDIA or torch does not have, and no version more than it has."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_gpu import builder, device, play, runtime
from fake_gpu.state import Played
from fake_gpu.tensorrt import API, LISTINGS, new_module, read_listing

ROOT = Path(__file__).parent.parent
ARGUMENTS: dict[str, list[list[str]]] = json.loads((API / "arguments.json").read_text(encoding="utf-8"))
LISTED = [read_listing(version) for version in LISTINGS]
CONSTRUCTED = {"Builder", "OnnxParser", "Runtime"}
"""Classes that a user makes; the others come from a method, so what their __init__ takes is the fake's own."""


def classes(*modules: ModuleType) -> dict[str, type]:
    """The fake's classes of TensorRT."""
    found = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, Played) and value is not Played}


def invented(name: str, cls: type) -> list[str]:
    """What a class plays that no listed version has: itself, members, arguments."""
    known = {member for listing in LISTED for member in listing.get(name) or ()}
    if not any(name in listing for listing in LISTED):
        return [name]
    wrong = [f"{name}.{member}" for member in vars(cls) if not member.startswith("_") and member not in known]
    for member, value in vars(cls).items():
        if inspect.isfunction(value) and (not member.startswith("_") or (member == "__init__" and name in CONSTRUCTED)):
            given = [*inspect.signature(value).parameters][1:]
            if not any(set(given) <= set(names) for names in ARGUMENTS.get(f"{name}.{member}", [])):
                wrong.append(f"{name}.{member}({', '.join(given)})")
    return wrong


PLAYED = classes(builder, runtime)


@pytest.mark.parametrize("name", PLAYED)
def test_nothing_is_invented(name: str) -> None:
    assert invented(name, PLAYED[name]) == []


def test_a_name_or_an_argument_that_no_version_has_fails() -> None:
    """The control."""

    class Invented(Played):
        supports_model = 1

        def build_serialised_network(self, network: Any, config: Any) -> None:
            """Of another spelling."""

        def create_network(self, explicit_batch: bool) -> None:
            """Of another argument."""

    assert invented("Builder", Invented) == [
        "Builder.supports_model",
        "Builder.build_serialised_network",
        "Builder.build_serialised_network(network, config)",
        "Builder.create_network(explicit_batch)",
    ]
    assert invented("IBuilder", Invented) == ["IBuilder"]
    assert len(PLAYED) > 12


@pytest.mark.parametrize("version", LISTINGS)
def test_a_version_has_what_it_lists_and_no_more(version: str) -> None:
    state = play.new_state(version, device.Device())
    trt, listing = new_module(version, state), read_listing(version)
    assert {name for name in vars(trt) if not name.startswith("_")} <= set(listing)
    assert not hasattr(trt, "IInt8Calibrat0r")
    assert hasattr(trt, "EngineStat") == ("EngineStat" in listing) == (version not in ("10.3", "10.13"))
    assert hasattr(trt.BuilderFlag, "FP16") == version.startswith("10.")
    config = trt.IBuilderConfig()
    assert config.get_flag(trt.BuilderFlag.TF32)
    with pytest.raises(AttributeError):
        config.tf32 = False
    with pytest.raises(AttributeError):
        config.no_such_thing  # noqa: B018
    with pytest.raises(NotImplementedError, match="does not play IBuilderConfig"):
        config.reset()
    with pytest.raises(NotImplementedError, match="does not play Refitter"):
        trt.Refitter  # noqa: B018


def test_strong_typing_is_taken_by_name() -> None:
    """It is 1 in TensorRT 10 and 0 in 11: `1 << 1` would be weakly typed there."""
    numbers = {}
    for version in LISTINGS:
        trt = new_module(version, play.new_state(version, None))
        numbers[version] = int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert numbers == {version: int(version.startswith("10.")) for version in LISTINGS}


def test_torchs_surface_is_torchs() -> None:
    surface = device.cuda_surface(device.Device())
    for name, value in surface.items():
        real = getattr(torch.cuda, name)
        for member, function in vars(value).items() if isinstance(value, type) else ():
            if inspect.isfunction(function) and not member.startswith("__"):
                assert hasattr(real, member), f"torch.cuda.{name}.{member}"
    for name in ("Stream", "ExternalStream", "Event", "graph"):
        real, made = getattr(torch.cuda, name), surface[name]
        known = {*inspect.signature(real.__new__).parameters, *inspect.signature(real.__init__).parameters}
        assert set([*inspect.signature(made.__init__).parameters][1:]) <= known, name


def test_a_process_that_a_test_starts_plays_too() -> None:
    """By this hook `bench` is driven, whose backends have a process each."""
    program = "import tensorrt, torch; print(tensorrt.__version__, torch.ones(2, device='cuda').device)"
    variables = {**os.environ, **play.environment("10.16")}
    ran = subprocess.run([sys.executable, "-c", program], env=variables, cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == ["10.16.1.11", "cuda:0"], ran.stderr


def test_device_memory_is_told_from_the_hosts() -> None:
    with play.play("11.4") as state:
        assert state.device is not None
        free = state.device.free_bytes
        host, there = torch.ones(3), torch.ones(1000, 3, device="cuda")
        assert (host.device.type, there.device, there.is_cuda) == ("cpu", torch.device("cuda", 0), True)
        assert there.data_ptr() % device.ALIGNMENT == 0 and state.device.holds(there.data_ptr(), there.nbytes)
        assert state.device.free_bytes == free - there.nbytes == torch.cuda.mem_get_info()[0]
        assert host.to("cuda").is_cuda and host.cuda().is_cuda and there.clone().is_cuda
        assert torch.empty_like(there).is_cuda and there.half().is_cuda and (there[1:2]).is_cuda
        back = there.cpu()
        assert not back.is_cuda and not there.to("cpu").is_cuda and (back == 1).all()
        address = there.data_ptr()
        del there
        assert not state.device.holds(address)
        assert state.device.free_bytes == free
        state.device.free_bytes = 100
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1000, device="cuda")
    assert not torch.cuda.is_available()
