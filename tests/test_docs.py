"""README and docs: commands and snippets run as written on small encoders, links and tables are right.

Names in commands are replaced: `sam3.pt` and `tuned.pt` by a small encoder of transformers (with `--batch` by the
golden one of Meta, which has both necks), `random` by a small architecture, 336 by 112, `my-lora` by an adapter of
tests/data with its base, 1008x672 by 112x112. Torch exports those encoders at that size anyway; the README's snippet
runs at 112x56. What needs a GPU, docker, kubectl or another machine is not run: its options must exist.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import typer.main
import yaml
from conftest import DATA, tiny_config
from exporting import checkpoint_of, config_of, neck_export_cli, trace_quickly
from safetensors.torch import load_file, save_file
from test_triton import write_plan

import neck_export
from benchmarks import exporters
from engines.builder.flavor import FlavorError, choose_flavor
from engines.service.kubernetes import PROXY_IMAGE
from neck.checkpoint import random_encoder, save_meta_checkpoint

ROOT = Path(__file__).parent.parent
SERVE = ROOT / "docs" / "serve.md"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "engines" / "cpp" / "README.md")
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}

PROGRAMS = {
    "neck-export": "",
    ".venv/bin/neck-export": "",
    "python": "",
    "python3": "",
    "pip": "",
    ".venv/bin/pip": "",
    "make": "",
    "scp": "",
    "apt": "",
    "cmake": "",
    "trtexec": "",
    "build/cpp/neck-engine": "",
    "build/cpp/neck-triton": "",
    "neck-engine": "",
    "neck-triton": "",
    "docker": "docker and NVIDIA's container toolkit",
    "kubectl": "`kubectl` and a cluster",
}
"""Programs that commands begin with, and what docs/serve.md must say that they need."""

NOT_RUN = {"profile": "a GPU", "bench": "minutes; tests/test_bench.py runs it"}
"""Commands of neck-export of which the options are checked alone, and why."""

MODULES = {"benchmarks.exporters", "engines.service.triton_client"}


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's console blocks, as words; one behind `&&` by itself."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", TEXTS[page], re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.lstrip().startswith("$ "):
                words = shlex.split(line.lstrip()[2:].replace("$PWD/", ""), comments=True)
                while "&&" in words:
                    found.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                found.append(words)
    return found


ALL = list(dict.fromkeys(tuple(words) for page in PAGES for words in commands(page)))
OURS = [words for words in ALL if words[0].endswith("neck-export")]


def of(*beginning: str) -> list[list[str]]:
    """The commands of docs/serve.md that begin so."""
    found = [words for words in commands(SERVE) if words[: len(beginning)] == list(beginning)]
    assert found
    return found


def value(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_every_command_is_known_and_says_what_it_needs() -> None:
    assert len(ALL) > 50
    for words in ALL:
        assert words[0] in PROGRAMS
        if words[0] in ("python", "python3") and words[1:2] == ("-m",):
            assert words[2] in MODULES | {"venv"}
    for words in commands(SERVE):
        assert re.sub(r"\s+", " ", PROGRAMS[words[0]]) in re.sub(r"\s+", " ", TEXTS[SERVE])


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_options_of_neck_export_exist(words: tuple[str, ...]) -> None:
    group: Any = typer.main.get_command(neck_export.app)
    group.commands[words[1]].make_context(words[1], list(words[2:]))
    with pytest.raises(Exception, match="No such option"):  # the control
        group.commands[words[1]].make_context(words[1], [*words[2:], "--no-such-option"])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, images, and the files that commands read: FP16 exports, and a plan as TensorRT would have built it."""
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[sam3]'")
    from tiny_sam3 import save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("docs")
    from transformers import Sam3VisionModel

    save_tokenizer(save_model(folder / "sam3"))
    config = tiny_config(depth=2, global_blocks=(1,))
    torch.manual_seed(0)
    vision = Sam3VisionModel(exporters.vision_config(config)).eval()
    with torch.no_grad():
        for parameter in vision.parameters():
            if parameter.dim() > 1:  # as tiny_sam3 does
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    vision.save_pretrained(folder / "encoder")
    (folder / "encoder.json").write_text(json.dumps({**vars(config)}))
    save_meta_checkpoint(random_encoder(config), folder / "meta.pt")
    state = torch.load(folder / "meta.pt", weights_only=True)["model"]
    torch.save({"model": state, "ema": {name: 0.9 * one for name, one in state.items()}}, folder / "training.ckpt")
    for name in ("photos", "others"):
        (folder / name).mkdir()
    for name in (
        "image.png",
        "others/0.png",
        *(f"photos/{number}.png" for number in range(8)),
    ):  # calibration takes 8 at least
        shutil.copy(DATA / "preprocess" / "image_0.png", folder / name)
    with pytest.MonkeyPatch.context() as patch:
        trace_quickly(patch)
        patch.chdir(folder)
        made = ("--checkpoint", "sam3", "--neck", "both", "--precision", "fp16", "--no-verify")
        assert neck_export_cli("onnx", *made, "--output", "masks/sam3-encoder.onnx").code == 0
        for name in ("sam3-encoder", "tuned", "int8"):
            made = ("--checkpoint", "encoder", "--precision", "fp16", "--no-verify", "--output", f"build/{name}.onnx")
            assert neck_export_cli("onnx", *made).code == 0
        lora = ("--checkpoint", ADAPTERS.parent, "--adapter", ADAPTERS / "plain", "--output", "build/my-lora.onnx")
        assert neck_export_cli("onnx", *map(str, lora)).code == 0
        made = ("--checkpoint", "encoder", "--output", "other/encoder.onnx", "--no-verify")
        assert neck_export_cli("onnx", *made).code == 0
    shutil.copytree(ADAPTERS.parent, folder / "merged")
    merged = load_file(ADAPTERS.parent / "model.safetensors") | load_file(ADAPTERS / "plain" / "merged.safetensors")
    save_file(merged, folder / "merged" / "model.safetensors")
    onnx.save(onnx.load(folder / "other" / "encoder.onnx"), folder / "vision_encoder.onnx")  # without a manifest
    write_plan(folder / "build" / "sam3-encoder.plan")
    return folder


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a test's own with all of it."""
    for path in workshop.iterdir():
        if path.name == "build":
            shutil.copytree(path, tmp_path / "build")
        else:
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    trace_quickly(monkeypatch)
    return tmp_path


def small(words: tuple[str, ...]) -> list[str]:
    """A command of neck-export for the small encoders."""
    small_names = {
        "sam3.pt": "encoder",
        "tuned.pt": "encoder",
        "1008x672": "112x112",
        "336": "112",
        "my-lora": str(ADAPTERS / "plain"),
    }
    found = [small_names.get(word, word) for word in words[1:]]
    if "my-lora" in words:
        found[found.index("--checkpoint") + 1] = str(ADAPTERS.parent)
    if "--batch" in words:
        found[found.index("--checkpoint") + 1] = str(checkpoint_of("meta-dual"))
        found += ["--config", str(config_of("meta-dual"))]
    if {"random", "training.ckpt"} & set(words):
        found += ["--config", "encoder.json"]
    return found


def take_the_models_file(place: Path) -> None:
    """Both necks of the whole SAM 3, for what runs that; all else runs the smaller encoder."""
    for file in (place / "masks").iterdir():
        shutil.copy(file, place / "build")


ADAPTERS = DATA / "hf-variant" / "adapters"
SERVED = of("neck-export", "triton")
NEEDS_GPU = {"tensorrt", "verify build/sam3-encoder.plan", "masks build/sam3-encoder.plan"}
RUN = [
    words
    for words in OURS
    if words[1] not in NOT_RUN and not NEEDS_GPU & {*words, " ".join(words[1:3])} and list(words) not in SERVED
]


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_commands_of_neck_export_run(words: tuple[str, ...], place: Path) -> None:
    if words[1] in ("trt", "inspect"):
        try:
            choose_flavor("rtx")
        except FlavorError:
            pytest.skip("needs TensorRT-RTX: pip install '.[rtx]'")
        for file in (place / "build").glob("*.plan*"):
            file.unlink()
    if words[1] == "inspect":  # of a plan that is a real one
        assert neck_export_cli("trt", "build/sam3-encoder.onnx", "--flavor", "rtx").code == 0
    if words[1] == "masks":
        take_the_models_file(place)
    ran = neck_export_cli(*small(words))
    assert ran.code == 0, ran.err
    assert ran.out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with build/sam3-encoder.plan."""
    write_plan(tmp_path / "build" / "sam3-encoder.plan")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_neck_export_triton_work(here: Path) -> None:
    first, *others = of("neck-export", "triton")
    for words in (first, *others):  # `--activate 2` comes after the same command was run again
        ran = neck_export_cli(*words[1:])
        assert ran.code == 0, ran.err
        if words == first:
            assert "container nvcr.io/nvidia/tritonserver:25.09-py3 has TensorRT 10.13.3" in TEXTS[SERVE] and ran.out
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
    for words in ALL:
        if words[:2] == ("docker", "run"):
            assert all(words[index + 1].startswith("127.0.0.1:") for index, word in enumerate(words) if word == "-p")


def snippets(page: Path) -> list[str]:
    found = re.findall(r"(?m)^ *```python\n((?s:.)*?)```", TEXTS[page])
    return [textwrap.dedent(snippet) for snippet in found]


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_what_snippets_import_is_there(page: Path) -> None:
    for snippet in snippets(page):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("neck", "export", "engines"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize("word", ["vision_embeds", "export_encoder"])
def test_snippets_of_the_readme_run(word: str, place: Path) -> None:
    """One encoding for many prompts, and the export from Python."""
    (snippet,) = [one for one in snippets(PAGES[0]) if word in one]
    text = snippet.replace('"sam3.pt"', '"encoder"').replace("1008, 672", "112, 56")
    if word == "vision_embeds":
        take_the_models_file(place)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(compile(text, "README.md", "exec"), names)
    if word == "export_encoder":
        assert names["result"].verdict.passed and len(names["features"]) == 4
    else:
        assert [mask.shape[1:] for mask in names["masks"].values()] == [(32, 32)] * 3


@pytest.mark.parametrize("name", ["export", "build"])
def test_snippets_of_one_call_run(name: str, place: Path) -> None:
    (snippet,) = [one for one in snippets(ROOT / "docs" / f"{name}.md") if f"import {CALLS[name]}" in one]
    text = snippet.replace('"sam3.pt"', '"encoder"').replace("1008, 672", "112, 56")
    if name == "build":
        try:
            choose_flavor("rtx")
        except FlavorError:
            pytest.skip("needs TensorRT-RTX: pip install '.[rtx]'")
        text = text.replace('precision="fp16"', 'precision="fp16", flavor="rtx"')
    names: dict[str, Any] = {}
    exec(compile(text, f"{name}.md", "exec"), names)
    assert names["result"].path.is_file()


CALLS = {"export": "export_encoder", "build": "build_engine"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"(?m)^#+ (.*)$", file.read_text(encoding="utf-8"))
            assert anchor in [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads], target


def test_the_reference_is_what_the_command_line_says() -> None:
    """`python docs/reference.py` writes it anew."""
    locked = re.findall(r"(?m)^typer==(\S+)", (ROOT / "requirements.lock").read_text())
    if importlib.metadata.version("typer") not in locked:
        pytest.skip("typer is not of the lock, and other versions of typer spell the types of options in another way")
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        reference = importlib.import_module("reference").reference()
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert reference == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert all(f"## neck-export {name}\n" in reference for name in NOT_RUN)


def test_the_glossary_is_short() -> None:
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")][2:]
    assert 10 < len(rows) <= 25 and rows == sorted(rows, key=str.lower)


def test_the_exporters_are_compared(tmp_path: Path) -> None:
    """Ours accumulates attention in FP32, the two others in FP16, in plans of the same builder."""
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[sam3]'")
    try:
        flavor = choose_flavor("rtx")
    except FlavorError:
        pytest.skip("needs TensorRT-RTX: pip install '.[rtx]'")
    config = tiny_config(embed_dim=32, d_model=16, depth=2, global_blocks=(1,))
    (tmp_path / "encoder.json").write_text(json.dumps(vars(config)))
    found = {}
    for name in exporters.EXPORTERS:
        file = tmp_path / name / "encoder.onnx"
        file.parent.mkdir()
        command = exporters.command(name, tmp_path / "encoder.json", file)
        if name == "neck-export":
            assert neck_export_cli(*command[3:]).code == 0
        else:
            assert command[-3:] == ["--export", name, str(file)]
            exporters.write_file(name, file, config)
        found[name] = exporters.plan_facts(file, "8.9", flavor)
    assert {name: facts["fused"] for name, facts in found.items()} == dict.fromkeys(found, 2)
    narrowest = {name: "fp16" in facts["accumulation"] for name, facts in found.items()}
    assert narrowest == {"neck-export": False, "torch": True, "transformers": True}
