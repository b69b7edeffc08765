"""What is no checkpoint, or no plain one, is told what it is and what turns it into one."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from exporting import checkpoint_of, config_of, golden_state, neck_export_cli
from safetensors.torch import save_file
from torch import Tensor

from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig

CONFIG = EncoderConfig.from_file(config_of("meta-dual"))
START = "detector.backbone.vision_backbone."
FC1 = f"{START}trunk.blocks.0.mlp.fc1."


def error_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, CONFIG)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2 and path.name in message
    return message


# -- files and folders --

FILES: dict[str, tuple[bytes, str]] = {
    "lfs.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1848\n",
        "a Git LFS pointer and not the weights",
    ),
    "login.pt": (b"<!DOCTYPE html><html><head><title>Log in</title>", "a web page"),
    "spaces.pt": (b"\n\n  <HTML lang=en>", "a web page"),
    "denied.safetensors": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "a web page"),
    "gated.pt": (b"Access to model facebook/sam3 is restricted. You must have access to it", "a login"),
    "gated.safetensors": (b'{"error":"Repository facebook/sam3 is gated"}', "a login"),
    "message.pt": (b'{\n "message": "Not Found", "status": 404}', "a login"),
    "index.json": (b'{"metadata": {"error": 0}, "weight_map": {}}', "SAM 3 image encoder"),  # the control
    "sam3.gguf": (b"GGUF\x03\x00\x00\x00", "GGUF"),
    "packed.pt.gz": (gzip.compress(b"x" * 100), "an archive (tar, gzip, ...)"),
    "notes.pt": (b"these are not weights", "not a checkpoint (its first bytes are b'these are'"),  # the control
}


def test_a_shard_of_several(tmp_path: Path) -> None:
    state = {name: value for name, value in golden_state("meta-dual").items() if not value.is_complex()}
    names, shards = sorted(state), [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    half = {name: shards[index * 2 // len(names)] for index, name in enumerate(names)}
    for shard in shards:
        save_file({name: state[name].clone() for name in names if half[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": half}))
    for number, shard in enumerate(shards, 1):
        message = error_of(tmp_path / shard)
        assert f"shard {number} of 2" in message and f"pass the folder {tmp_path}" in message
    load_encoder(tmp_path, CONFIG)  # the control
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "whole-00001-of-00002.safetensors")
    load_encoder(tmp_path / "whole-00001-of-00002.safetensors", CONFIG)  # nothing of the encoder is elsewhere


def test_the_caches_folder_of_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--facebook--sam3"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "blobs").mkdir()
    assert str(folder / "snapshots" / "abc") in error_of(folder)


def test_a_path_that_is_not_utf_8_is_blamed(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    for suffix in (".pt", ".safetensors"):
        state = {name: value.clone() for name, value in golden_state("meta-dual").items() if not value.is_complex()}
        torch.save(state, tmp_path / "x.pt") if suffix == ".pt" else save_file(state, tmp_path / "x.safetensors")
        load_encoder(tmp_path / f"x{suffix}", CONFIG)  # the control
        (tmp_path / f"x{suffix}").rename(folder / f"x{suffix}")
        message = error_of(folder / f"x{suffix}")
        assert "UTF-8" in message and "damaged" not in message


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_checkpoint(name: str, tmp_path: Path) -> None:
    content, says = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert says in error_of(tmp_path / name)


def test_tar_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        archive.add(checkpoint_of("meta-dual"), "checkpoint.pt")
    assert "an archive (tar" in error_of(tmp_path / "x.pt")


def test_pointer_in_the_place_of_a_shard(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(FILES["lfs.safetensors"][0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: this is a Git LFS pointer"):
        load_encoder(tmp_path, CONFIG)


def test_a_name_on_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = error_of(Path("facebook/sam3"))
    assert message.startswith("facebook/sam3: this file does not exist") and "hf download facebook/sam3" in message
    assert "--checkpoint hf://facebook/sam3" in message
    (tmp_path / "facebook").mkdir()  # a folder of that name: it is taken for a path
    done = neck_export_cli("onnx", "--checkpoint", "facebook/sam3", "--output", "build/x.onnx")
    assert done.code == 1 and done.err.startswith(
        "error: facebook/sam3: this file does not exist. If facebook/sam3 is a repository on"
    )
    assert len(done.err.splitlines()) == 1
    for path in ("weights/sam3.pt", "sam3.pt", "a/b/c", "/facebook/sam3"):  # the control
        assert error_of(Path(path)) == f"{path}: this file does not exist; check the path"


def test_folder_of_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """Written by the library; the command that the message names turns it into a file that loads."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = tmp_path / "step-100"
    with pytest.warns(UserWarning):  # that it runs in one process
        dcp.save({"model": golden_state("meta-dual")}, checkpoint_id=folder)
    for path in (folder, folder / ".metadata", folder / "__0_0.distcp"):
        with pytest.raises(CheckpointError) as caught:
            load_encoder(path, CONFIG)
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pt"
        assert "torch.distributed.checkpoint" in str(caught.value) and command in str(caught.value)
    dcp_to_torch_save(folder, tmp_path / "weights.pt")
    expected = load_encoder(checkpoint_of("meta-dual"), CONFIG).state_dict()
    found = load_encoder(tmp_path / "weights.pt", CONFIG).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("asked", ["", "global_step9", "global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_folder_of_deepspeed(asked: str, tmp_path: Path) -> None:
    inner = tmp_path / "global_step9"
    inner.mkdir()
    (tmp_path / "latest").write_text("global_step9")
    for name in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
        (inner / name).write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tmp_path / asked, CONFIG)
    assert "DeepSpeed ZeRO" in str(caught.value)
    assert f"python {tmp_path}/zero_to_fp32.py {tmp_path} weights" in str(caught.value)


# -- shards of pickles --


@pytest.mark.parametrize("by", ["index", "folder", "one file"])
def test_pickled_shards(by: str, tmp_path: Path) -> None:
    state = {name: value for name, value in golden_state("meta-dual").items() if not value.is_complex()}
    if by == "one file":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
        weight_map = {key: names[index % 2] for index, key in enumerate(state)}
        for name in names:
            torch.save({key: value for key, value in state.items() if weight_map[key] == name}, tmp_path / name)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = load_encoder(tmp_path / "pytorch_model.bin.index.json" if by == "index" else tmp_path, CONFIG).state_dict()
    expected = load_encoder(checkpoint_of("meta-dual"), CONFIG).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    shutil.copy(checkpoint_of("meta-dual"), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no SAM 3 image encoder"):
        load_encoder(tmp_path, CONFIG)


def test_hostile_shard_runs_nothing(tmp_path: Path) -> None:
    from hostile import bodies

    (tmp_path / "a.bin").write_bytes(dict(bodies(str(tmp_path / "ran"), 0))["os.system"])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    with pytest.raises(
        CheckpointError,
        match=r"a\.bin: the file was refused, because the file is a pickle that torch.save did not "
        r"write",
    ):
        load_encoder(tmp_path, CONFIG)
    assert not (tmp_path / "ran").exists()


# -- quantized weights, other layouts --


def codes(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the products as codes of a type."""
    return {
        name: value.to(dtype) if name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")) else value
        for name, value in state.items()
    }


def beside(state: dict[str, Tensor], **more: Tensor) -> dict[str, Tensor]:
    """The state with tensors beside every MLP's first weight."""
    starts = [name.removesuffix("bias") for name in state if name.endswith("fc1.bias")]
    return {**state, **{start + name: value for start in starts for name, value in more.items()}}


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
ONE = torch.ones(1)

QUANTIZED: dict[str, tuple[Change, str]] = {
    "INT8 with weight_scale": (lambda s: beside(codes(s, torch.int8), weight_scale=ONE), f"{FC1}weight_scale"),
    "bitsandbytes INT8": (
        lambda s: beside(codes(s, torch.int8), SCB=ONE, weight_format=torch.zeros((), dtype=torch.uint8)),
        f"{FC1}SCB",
    ),
    "bitsandbytes NF4": (
        lambda s: beside(
            codes(s, torch.uint8), **{"weight.absmax": ONE, "weight.quant_state.bitsandbytes__nf4": ONE}
        ),
        "has the type torch.uint8",
    ),
    "FP8 with weight_scale_inv": (
        lambda s: beside(codes(s, torch.float8_e4m3fn), weight_scale_inv=ONE), "has the type torch.float8_e4m3fn"
    ),
    "INT8 alone": (lambda s: codes(s, torch.int8), "has the type torch.int8"),
    "GPTQ": (
        lambda s: beside(
            {name: value for name, value in s.items() if not name.endswith("fc1.weight")},
            qweight=torch.zeros(2, dtype=torch.int32), qzeros=torch.zeros(2, dtype=torch.int32), scales=ONE,
        ),
        f"{FC1}qweight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights(kind: str, suffix: str, tmp_path: Path) -> None:
    change, says = QUANTIZED[kind]
    state = change({name: value for name, value in golden_state("meta-dual").items() if not value.is_complex()})
    path = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        torch.save({"model": state}, path)
    else:
        save_file({name: value.clone() for name, value in state.items()}, path)
    message = error_of(path)
    assert "quantized" in message and says in message and "the original" in message
    assert "adapter" not in message
    signs = message[message.index("(") + 1 : message.index(")")].split(", ")
    assert len(set(signs)) == len(signs)  # each named once


def test_integers_outside_the_encoder_do_not_matter(tmp_path: Path) -> None:
    state = {**golden_state("meta-dual"), "decoder.weight": torch.ones(2, dtype=torch.int8), "decoder.SCB": ONE}
    torch.save(state, tmp_path / "x.pt")
    load_encoder(tmp_path / "x.pt", CONFIG)


def test_channels_last(tmp_path: Path) -> None:
    """As MLX keeps convolutions: (out, height, width, in)."""
    state: dict[str, Any] = {
        name: value.permute(0, 2, 3, 1).contiguous() if value.dim() == 4 else value
        for name, value in golden_state("meta-dual").items()
        if not value.is_complex()
    }
    save_file(state, tmp_path / "x.safetensors")
    message = error_of(tmp_path / "x.safetensors")
    assert "channels last, as" in message
    assert (
        f"{START}trunk.patch_embed.proj.weight has the shape (32, 14, 14, 3), but PyTorch needs (32, 3, 14, 14)"
        in message
    )
