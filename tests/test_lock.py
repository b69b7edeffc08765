"""The locks name all that `make` installs, in versions that pyproject allows, and nothing of one machine."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
LOCKS = {"requirements": ROOT, "families": ROOT / "tests", "server": ROOT / "tests"}
EXTRAS = ("cpu", "rtx", "triton", "bench", "sam3", "dev")
"""What the Makefile installs; `gpu` needs NVIDIA's own index."""


def named(name: str) -> list[Requirement]:
    """The lines of a lock."""
    lines = (LOCKS[name] / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


@functools.cache
def versions(name: str, python: str) -> dict[str, Version]:
    """What a lock names for one Python on Linux, by distribution."""
    where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    chosen = [one for one in named(name) if one.marker is None or one.marker.evaluate(where)]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in chosen}


def asked(project: Mapping[str, Any]) -> Iterator[tuple[str, Requirement]]:
    """What pyproject asks for, each with the lock that has to name it."""
    extras, groups = project["project"]["optional-dependencies"], project["dependency-groups"]
    lines = [*project["project"]["dependencies"], *groups["build"], *project["build-system"]["requires"]]
    yield from (
        ("requirements", Requirement(line)) for line in [*lines, *(one for name in EXTRAS for one in extras[name])]
    )
    yield from (("families", Requirement(line)) for line in groups["families"])
    yield from (("server", Requirement(line)) for line in [*groups["server"], *groups["pytriton"]])


def unnamed(project: Mapping[str, Any]) -> set[str]:
    """What pyproject asks for and no lock names in a version that serves, with its Python."""
    return {
        f"{one} on Python {python}"
        for lock, one in asked(project)
        for python in PYTHONS
        if one.marker is None or one.marker.evaluate({"python_version": python})
        if versions(lock, python).get(canonicalize_name(one.name)) not in one.specifier
    }


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_all_that_is_asked_for_is_named(project: dict[str, Any]) -> None:
    assert unnamed(project) == set()
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"EXTRAS := {','.join(EXTRAS)}\n" in text


@pytest.mark.parametrize("line", ["torch>=99", "einops-exts>=0", "transformers>=5.24"])
def test_what_is_not_named_is_seen(line: str, project: dict[str, Any]) -> None:
    """The control: transformers 5.24 is for Python 3.11 and later."""
    changed = {**project["project"], "dependencies": [line]}
    assert unnamed({**project, "project": changed})


@pytest.mark.parametrize("name", LOCKS)
def test_nothing_but_versions_is_named(name: str) -> None:
    """No address of an index and no path: a lock serves on every machine."""
    text = (LOCKS[name] / f"{name}.lock").read_text(encoding="utf-8")
    assert not re.search(r"://|@|--|(^|\s)[./~]*/", text)
    assert all(re.fullmatch(r"==[\w.]+", str(one.specifier)) and not one.url for one in named(name))
    assert versions("requirements", "3.12")["torch"] == Version("2.13.0")


def foreign(installed: Mapping[str, str], locked: Mapping[str, Version]) -> set[str]:
    """The distributions of an environment that its lock does not name; a build of torch has a suffix (2.13.0+cpu)."""
    return {name for name, version in installed.items() if locked.get(name) != Version(Version(version).public)}


def test_what_is_installed_is_named() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this environment was not made by `make .venv/ready`, which installs from the lock")
    installed = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()}
    assert installed.pop("neck-export")
    locked = versions("requirements", f"{sys.version_info.major}.{sys.version_info.minor}")
    assert foreign(installed, locked) == set()
    assert foreign({**installed, "numpy": "1.26.0", "einops-exts": "1"}, locked) == {
        "numpy",
        "einops-exts",
    }  # the control
