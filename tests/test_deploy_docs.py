"""The commands of docs/deploy.md: they are run where that can be, else what they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from exporting import neck_export_cli
from test_triton import write_plan

import neck_export
from engines.service.kubernetes import PROXY_IMAGE

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")

NEEDS = {
    "neck-export": "",
    "python": "",
    "pip": "a clone of this repository",
    "docker": "docker and NVIDIA's container toolkit",
    "kubectl": "`kubectl` and a cluster",
    "apt": "",
    "cmake": "",
    "build/cpp/neck-engine": "",
    "build/cpp/neck-triton": "",
}
"""Programs that the commands begin with, and what the docs must say of them before."""


def commands() -> list[list[str]]:
    """Every command of the console blocks, as words; one behind `&&` by itself."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:].replace("$PWD/", ""), comments=True)
                while "&&" in words:
                    found.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                found.append(words)
    return found


def of(*beginning: str) -> list[list[str]]:
    found = [words for words in commands() if words[: len(beginning)] == list(beginning)]
    assert found
    return found


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_every_command_is_known_and_says_what_it_needs() -> None:
    assert len(commands()) > 20
    for words in commands():
        assert words[0] in NEEDS
        assert re.sub(r"\s+", " ", NEEDS[words[0]]) in re.sub(r"\s+", " ", TEXT)


@pytest.mark.parametrize("words", of("neck-export"), ids=" ".join)
def test_options_of_neck_export_exist(words: list[str]) -> None:
    group: Any = typer.main.get_command(neck_export.app)
    group.commands[words[1]].make_context(words[1], list(words[2:]))
    with pytest.raises(Exception, match="No such option"):  # the control
        group.commands[words[1]].make_context(words[1], [*words[2:], "--no-such-option"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with build/sam3-encoder.plan."""
    write_plan(tmp_path / "build" / "sam3-encoder.plan")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_neck_export_triton_work(here: Path) -> None:
    first, *others = of("neck-export", "triton")
    for words in (first, first, *others):  # `--activate 2` comes after the same command was run again
        ran = neck_export_cli(*words[1:])
        assert ran.code == 0, ran.err
    assert (here / "model_repository" / "sam3-encoder" / "5").is_dir()


def test_what_kubectl_and_docker_are_given_is_there(here: Path) -> None:
    plain, ensemble = (words for words in of("neck-export", "triton") if "--kubernetes" in words)
    assert neck_export_cli(*plain[1:]).code == 0
    named = {word for words in of("kubectl") for word in words if word.startswith("kubernetes")}
    assert named == {"kubernetes", "kubernetes/storage.yaml", "kubernetes/upload.yaml"}
    assert all((here / name).exists() for name in (*named, "kubernetes/kustomization.yaml"))
    upload = yaml.safe_load((here / "kubernetes" / "upload.yaml").read_text())
    pod = upload["metadata"]["name"]
    (wait,), (copy,) = of("kubectl", "wait"), of("kubectl", "cp")
    assert f"pod/{pod}" in wait
    source, target = copy[-2:]
    (mount,) = upload["spec"]["containers"][0]["volumeMounts"]
    assert target == f"{pod}:{mount['mountPath']}" and (here / source / "sam3-encoder" / "config.pbtxt").is_file()
    assert neck_export_cli(*ensemble[1:]).code == 0
    (build,), (push,) = of("docker", "build"), of("docker", "push")
    assert (here / build[-1] / "Dockerfile").is_file()
    documents = list(yaml.safe_load_all((here / "kubernetes" / "deployment.yaml").read_text()))
    images = [one["image"] for one in documents[1]["spec"]["template"]["spec"]["containers"]]
    assert images == [value(build, "-t"), PROXY_IMAGE] and push[-1] == images[0]


def test_docker_publishes_to_this_machine_alone() -> None:
    triton, proxy = of("docker", "run")
    published = [triton[index + 1] for index, word in enumerate(triton) if word in ("-p", "--publish")]
    assert published == ["127.0.0.1:8000:8000", "127.0.0.1:8001:8001"]
    assert proxy[-1] == PROXY_IMAGE and (ROOT / value(proxy, "-v").partition(":")[0]).is_file()
