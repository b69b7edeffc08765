"""A name on the Hugging Face Hub as checkpoint: downloads from a hub that this test serves, and the cache offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DATA
from exporting import ROOT, checkpoint_of, neck_export_cli, trace_quickly
from fake_hub import COMMIT, TOKEN, Hub, serving_hub
from listening import listening
from safetensors.torch import load_file, save_file

from export.contract.export_command import export_command
from export.contract.manifest import read_manifest, sha256
from neck.checkpoint import load_encoder
from neck.hub import HubError, HubName, choose_weights, hub_name, hub_origin, local_checkpoint
from neck.progress import Count
from neck.weightfile import CheckpointError, find_file

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="huggingface_hub is not installed: pip install '.[hub]'"
)

MODEL = DATA / "hf-variant"
NAME = "someone/sam3-small"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a small model, an empty cache, and no token."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving_hub() as served:
        served.add(NAME, MODEL, "config.json", "model.safetensors")
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        yield served


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody answers


def test_a_fresh_cache_is_filled_and_told_by_bytes(hub: Hub, tmp_path: Path) -> None:
    told: list[Count] = []
    with listening(told.append):
        path = local_checkpoint(NAME)
    assert sha256(path) == sha256(MODEL / "model.safetensors")
    assert path.is_relative_to(tmp_path / "cache") and (path.parent / "config.json").is_file()
    assert hub_origin(path) == HubName(NAME, COMMIT, "model.safetensors")
    size = (MODEL / "model.safetensors").stat().st_size
    weights = [one for one in told if one.step == "downloading model.safetensors"]
    assert weights[0].done == 0 and weights[-1] == Count("downloading model.safetensors", size, size, "bytes")
    assert load_encoder(path).trunk is not None
    before = len(hub.downloads("model.safetensors"))
    assert local_checkpoint(f"hf://{NAME}@{COMMIT}/model.safetensors") == path
    assert local_checkpoint(Path(f"hf://{NAME}")) == path  # a Path keeps one slash
    assert len(hub.downloads("model.safetensors")) == before == 1


def test_a_filled_cache_serves_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local_checkpoint(NAME)
    go_offline(monkeypatch)
    assert local_checkpoint(NAME) == path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_checkpoint(NAME) == path
    assert local_checkpoint(f"{NAME}@{COMMIT}") == path
    with pytest.raises(HubError, match="other/model"):
        local_checkpoint("other/model")
    path.unlink()
    with pytest.raises(HubError, match=NAME):
        local_checkpoint(NAME)


def test_a_download_that_breaks_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)  # it goes on after the last whole one
    hub.breaks["model.safetensors"] = 2
    path = local_checkpoint(NAME)
    first = path.stat().st_size // 2 // 4096 * 4096
    second = first + (path.stat().st_size - first) // 2 // 4096 * 4096
    assert hub.downloads("model.safetensors") == ["", f"bytes={first}-", f"bytes={second}-"]
    assert sha256(path) == sha256(MODEL / "model.safetensors")


def test_a_download_that_stays_broken_is_one_line_and_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.breaks["model.safetensors"] = 1000
    with pytest.raises(HubError, match=r"model\.safetensors") as caught:
        local_checkpoint(NAME)
    assert hub.endpoint in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not list(
        (tmp_path / "cache").rglob("*.incomplete")
    )
    hub.breaks.clear()
    assert local_checkpoint(NAME).is_file()


@pytest.mark.parametrize("token", [None, "hf_of_somebody_else"])
def test_a_gate_is_told_with_the_page_and_opens_with_a_token(
    token: str | None, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add(NAME)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        local_checkpoint(NAME)
    said = str(caught.value)
    assert f"{hub.endpoint}/{NAME}" in said and "hf auth login" in said and len(said.splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert local_checkpoint(NAME).is_file()


def test_what_is_not_there_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add("someone/private")
    hub.repos["someone/private"] = {}
    hub.repos["someone/llama"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"much"}
    hub.repos["someone/empty"] = {"README.md": b"hello"}
    hub.repos["someone/two"] = {"a.pt": b"", "b.pt": b""}
    for given, subjects in (
        ("nobody/nothing", ("nobody/nothing", "HF_TOKEN")),
        ("someone/private", ("someone/private", "HF_TOKEN")),
        (f"{NAME}@v9", (NAME, "v9")),
        (f"{NAME}/sam3.pt", ("sam3.pt", "model.safetensors")),
        ("someone/llama", ("llama", "facebook/sam3")),
        ("someone/empty", ("README.md",)),
        ("someone/two", ("a.pt, b.pt", "someone/two/a.pt")),
        ("hf://someone/-/x", ("someone/-",)),
    ):
        if hub_name(given) is None:
            with pytest.raises(CheckpointError):
                find_file(local_checkpoint(given))
            continue
        with pytest.raises(HubError) as caught:
            local_checkpoint(given)
        said = str(caught.value)
        assert all(subject in said for subject in subjects) and len(said.splitlines()) == 1, said
    assert not hub.downloads("llama/resolve/main/model.safetensors")  # told before the gigabytes
    go_offline(monkeypatch)
    with pytest.raises(HubError, match="someone/unseen"):
        local_checkpoint("someone/unseen")


def test_shards_and_files_in_folders(hub: Hub, tmp_path: Path) -> None:
    tensors = load_file(MODEL / "model.safetensors")
    names = sorted(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    place = tmp_path / "sharded"
    place.mkdir()
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, place / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(MODEL / "config.json", place)
    files = {f"vision/{path.name}": path.read_bytes() for path in place.iterdir()}
    hub.repos["someone/sharded"] = files | {"config.json": b"{}"}
    path = local_checkpoint("someone/sharded/vision")
    assert path.name == "model.safetensors.index.json"
    ours, theirs = load_encoder(path).state_dict(), load_encoder(MODEL / "model.safetensors").state_dict()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    bare = HubName("a/b")
    assert choose_weights(bare, ["sam3.pt", "config.json", "x/y.pt"]) == "sam3.pt"
    assert choose_weights(bare, ["sam3.pt", "model.safetensors"]) == "model.safetensors"
    assert choose_weights(HubName("a/b", "main", "sam3.pt"), ["sam3.pt", "model.safetensors"]) == "sam3.pt"


def test_paths_are_told_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("facebook/sam3") == HubName("facebook/sam3")
    assert hub_name("facebook/sam3.1@main/sam3.1_multiplex.pt") == HubName(
        "facebook/sam3.1", "main", "sam3.1_multiplex.pt"
    )
    assert hub_name("a/b@refs/pr/3/x.pt") == HubName("a/b", "refs/pr/3", "x.pt")
    for path in ("sam3.pt", "weights/sam3.pt", "./facebook/sam3", "/facebook/sam3", "../a/b", "random", "a/b.onnx"):
        assert hub_name(path) is None
    (tmp_path / "facebook").mkdir()
    assert hub_name("facebook/sam3") is None and hub_name("hf://facebook/sam3") is not None
    assert hub_origin(tmp_path / "sam3.pt") is None


def test_the_manifest_keeps_name_and_commit_and_the_bytes_decide(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_quickly(monkeypatch)
    output = tmp_path / "e.onnx"
    ran = neck_export_cli("onnx", "--checkpoint", NAME, "--output", output)
    assert ran.code == 0, ran
    manifest = read_manifest(tmp_path / "e.json", "onnx")
    weights = manifest["weights"]
    assert weights["hub"] == {"repository": NAME, "commit": COMMIT, "file": "model.safetensors"}
    assert weights["name"] == "model.safetensors" and weights["sha256"] == sha256(MODEL / "model.safetensors")
    pinned = f"{NAME}@{COMMIT}/model.safetensors"
    assert f"--checkpoint {pinned}" in export_command(manifest, tmp_path / "e.json", output)
    assert pinned in neck_export_cli("inspect", output).out
    shutil.rmtree(tmp_path / "cache")
    gone = neck_export_cli("verify", output)
    assert gone.code == 1 and pinned in gone.err
    assert neck_export_cli("verify", output, "--checkpoint", pinned).code == 0
    other = load_file(MODEL / "model.safetensors")
    other = {name: tensor * 1.5 for name, tensor in other.items()}
    save_file(other, tmp_path / "other.safetensors")
    hub.repos[NAME]["model.safetensors"] = (tmp_path / "other.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "cache")
    changed = neck_export_cli("verify", output, "--checkpoint", NAME)
    assert changed.code == 1 and "model.safetensors" in changed.err


def test_the_environment_is_the_hubs_own(hub: Hub, tmp_path: Path) -> None:
    """A process of its own, with HF_HOME and HF_ENDPOINT alone."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN}
    hub.gated.add(NAME)
    code = f"from neck.hub import local_checkpoint; print(local_checkpoint({NAME!r}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")


def test_without_the_package_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match="pip install huggingface_hub"):
        local_checkpoint(NAME)
    assert local_checkpoint(checkpoint_of("meta-dual")) == checkpoint_of("meta-dual")
