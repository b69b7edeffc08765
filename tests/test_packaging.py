"""The wheel and the container files: what is published is complete and fits together; no container is started."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from test_lock import tomllib

import neck_export
from export.contract.targets import find_targets
from export.contract.triton_containers import TENSORRT

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
OURS = ("neck", "export", "engines", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the project's own backend."""
    pytest.importorskip("hatchling", reason="needs hatchling: pip install '.[dev]'")
    backend = importlib.import_module("hatchling.build")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return folder / backend.build_wheel(str(folder))


def test_the_wheel_has_every_file_that_the_code_reads(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    tracked = [ROOT / "neck_export.py", *(path for one in OURS for path in (ROOT / one).rglob("*") if path.is_file())]
    wanted = {path.relative_to(ROOT).as_posix() for path in tracked if "__pycache__" not in path.parts}
    assert wanted - names == set()
    assert {f"{one}/py.typed" for one in OURS} <= names
    assert not any(name.startswith(("tests/", "docs/")) for name in names)
    # the code in the wheel, away from the repository, which is in this environment as an editable package
    code = (
        "import neck_export, sys; print(neck_export.__file__); sys.argv = ['neck-export', 'doctor']; neck_export.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(tmp_path / "neck_export.py") and "export to ONNX" in done.stdout


def test_the_wheel_describes_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        head, _, description = archive.read(name).decode().partition("\n\n")
    assert description.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert "Description-Content-Type: text/markdown" in head and "Project-URL: " in head
    assert {f"Classifier: {one}" for one in PROJECT["project"]["classifiers"]} <= set(head.splitlines())


def default(text: str) -> str:
    """Compose's `${NAME:-VALUE}` as VALUE."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("name", ["export", "build", "repository"])
def test_commands_of_compose_parse(name: str) -> None:
    words = shlex.split(default(COMPOSE[name]["command"]))
    group: Any = typer.main.get_command(neck_export.app)
    group.commands[words[0]].make_context(words[0], words[1:])
    with pytest.raises(Exception, match="No such option"):  # the control
        group.commands[words[0]].make_context(words[0], [*words[1:], "--no-such-option"])
    if "--target" in words:
        assert find_targets(words[words.index("--target") + 1])


def test_every_container_is_of_one_month() -> None:
    month, tensorrt = (re.search(rf"(?m)^ARG {name}=(\S+)$", DOCKERFILE) for name in ("MONTH", "TENSORRT"))
    assert month and tensorrt and TENSORRT[month[1]] == tensorrt[1]
    arguments = COMPOSE["build"]["build"]["args"]
    assert (default(arguments["MONTH"]), default(arguments["TENSORRT"])) == (month[1], tensorrt[1])
    assert default(COMPOSE["triton"]["image"]) == f"nvcr.io/nvidia/tritonserver:{month[1]}-py3"
    assert f"--container {month[1]}" in default(COMPOSE["repository"]["command"])


def test_the_steps_of_compose_follow_each_other() -> None:
    before = {name: list(service.get("depends_on", {})) for name, service in COMPOSE.items()}
    assert before == {"export": [], "build": ["export"], "repository": ["build"], "triton": ["repository"]}
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["triton"]["ports"])
    assert {"build", "triton"} == {name for name, service in COMPOSE.items() if "deploy" in service}


def test_the_dockerfile_copies_what_the_package_is_made_of() -> None:
    copied = [word for line in re.findall(r"(?m)^COPY (.*)$", DOCKERFILE) for word in line.split()[:-1]]
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert set(copied) == {*included, "pyproject.toml", "README.md", "LICENSE"}
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {f"!{name}" for name in copied} <= set(ignored) and ignored[0] == "*"
