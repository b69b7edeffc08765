"""Which state of a training file is read, under which names, and which encoder of it."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import random
import sys
import types
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import bench_module, checkpoint_of, config_of, golden_state, neck_export_cli, trace_quickly
from mapped import MAPS, are_mapped
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.measure.prepare import make_weights
from benchmarks.options import BenchOptions
from export.contract.errors import ExportError
from export.contract.manifest import ManifestError
from export.contract.options import ExportOptions
from export.options import check_options
from export.weights_origin import encoder_config, manifest_encoder, state_line, weights_origin
from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig
from neck.necks import Sam3DualViTDetNeck
from neck.source import EncoderSource
from neck.trunk import Block
from neck.weightfile import read_state

State = dict[str, Tensor]
CONFIG = EncoderConfig.from_file(config_of("meta-dual"))
PREFIX = "detector.backbone.vision_backbone."


def plain(factor: float = 1.0) -> State:
    """The encoder's own tensors of meta-dual, all multiplied."""
    state = golden_state("meta-dual")
    return {
        name.removeprefix(PREFIX): value.clone() * factor
        for name, value in state.items()
        if name.startswith(PREFIX) and not value.is_complex()
    }


def load(path: Path, **options: Any) -> Sam3DualViTDetNeck:
    return load_encoder(path, CONFIG, **options)


def assert_is(encoder: Sam3DualViTDetNeck, state: State) -> None:
    """Checks that the weights are equal to the bit."""
    found = encoder.state_dict()
    assert sorted(found) == sorted(state)
    assert all(torch.equal(found[name], value.float()) for name, value in state.items())


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert 1 <= len(message.splitlines()) <= 2 and path.name in message
    return message


# -- names as training leaves them --


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """Names as torch's own wrappers give them, one process; values are those of `plain`."""
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import FullyShardedDataParallel

    def fresh() -> nn.Module:
        encoder = load(checkpoint_of("meta-dual")).requires_grad_(True)
        return encoder

    def checkpointed() -> nn.Module:
        encoder = fresh()
        apply_activation_checkpointing(encoder, check_fn=lambda module: isinstance(module, Block))
        return encoder

    def blocks_compiled() -> nn.Module:
        encoder = checkpointed()
        blocks = encoder.trunk.blocks  # type: ignore[union-attr]
        for index, block in enumerate(blocks):  # type: ignore[arg-type]
            blocks[index] = torch.compile(block, backend="eager")  # type: ignore[operator,index]
        return encoder

    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP says that one process has nothing to cut
            wrapped = {
                "DDP": nn.parallel.DistributedDataParallel(fresh()),
                "compile": torch.compile(fresh(), backend="eager"),
                "checkpoint": checkpointed(),
                "FSDP": FullyShardedDataParallel(fresh(), use_orig_params=True, device_id=torch.device("cpu")),
                "all": nn.parallel.DistributedDataParallel(torch.compile(blocks_compiled(), backend="eager")),  # type: ignore[arg-type]
            }
        return {
            name: {key: value.detach() for key, value in module.named_parameters()} for name, module in wrapped.items()
        }
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        ("DDP", ("module.trunk",)),
        ("compile", ("_orig_mod.trunk",)),
        ("checkpoint", ("blocks.1._checkpoint_wrapped_module.",)),
        ("FSDP", ("_fsdp_wrapped_module.trunk",)),
        ("all", ("module._orig_mod.trunk.blocks.0._orig_mod._checkpoint_wrapped_module.",)),
    ],
)
def test_wrappers_of_torch(kind: str, marks: tuple[str, ...], trained: dict[str, State], tmp_path: Path) -> None:
    assert all(any(mark in name for name in trained[kind]) for mark in marks)
    path = save({"model": trained[kind]}, tmp_path / "x.pt")
    assert_is(load(path), plain())


@pytest.mark.parametrize(
    ("wrapper", "case", "suffix"),
    [
        ("module", "meta-dual", "pt"),
        ("_orig_mod", "hf-dual", "pt"),
        ("_fsdp_wrapped_module", "meta-dual", "safetensors"),
        ("_checkpoint_wrapped_module", "hf-dual", "safetensors"),
        ("_module", "meta-dual", "pt"),
        ("module._orig_mod", "hf-dual", "safetensors"),
    ],
)
def test_wrappers_anywhere_in_a_name(wrapper: str, case: str, suffix: str, tmp_path: Path) -> None:
    path = checkpoint_of(case)
    state = load_file(path) if case == "hf-dual" else plain()
    randomly = random.Random(0)
    named = {}
    for name, value in state.items():
        parts = name.split(".")
        parts.insert(randomly.randrange(len(parts)), wrapper)
        named[".".join(parts)] = value
    target = tmp_path / f"x.{suffix}"
    if suffix == "pt":
        save(named, target)
    else:
        save_file(named, target)
    config = EncoderConfig.from_file(config_of(case))
    assert_is(load_encoder(target, config), load_encoder(path, config).state_dict())
    if MAPS.exists() and case == "meta-dual":
        assert all(are_mapped(load_encoder(target, config).parameters(), target))


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    one, two = "trunk.blocks.0.norm1.weight", "trunk.module.blocks.0.norm1.weight"
    state = plain()
    message = error_of(save({**state, two: state[one] + 1}, tmp_path / "x.pt"))
    assert one in message and two in message
    assert_is(load(save({**state, two: state[one]}, tmp_path / "same.pt")), state)  # the same tensor twice


def test_names_are_one_line_in_a_message(tmp_path: Path) -> None:
    """Line ends and a terminal's control letters, which a hostile file may put into a name."""
    state = {**plain(), "trunk.blocks.0.a\nb\x1b[31m": torch.ones(1)}
    for path in (save(state, tmp_path / "x.pt"), tmp_path / "x.safetensors"):
        if not path.exists():
            save_file({name: value.clone() for name, value in state.items()}, path)
        assert error_of(path).endswith(r": trunk.blocks.0.a\nb\x1b[31m")
    message = error_of(save({"a\nb": plain(), "\x1b[31m": plain(2.0)}, tmp_path / "states.pt"))
    assert "(a?b, ?[31m); choose one of them with --state" in message


def test_names_elsewhere_may_be_alike(tmp_path: Path) -> None:
    state = {**plain(), "decoder.weight": torch.ones(1), "decoder.module.weight": torch.zeros(1)}
    path = save(state, tmp_path / "x.pt")
    assert_is(load(path), plain())
    assert {"decoder.weight", "decoder.module.weight"} <= set(read_state(path).tensors)


def test_flat_parameters_of_fsdp(tmp_path: Path) -> None:
    message = error_of(save({"trunk._fsdp_wrapped_module._flat_param": torch.ones(9)}, tmp_path / "x.pt"))
    assert "FSDP's flattened parameters" in message and "FULL_STATE_DICT" in message


# -- states --


@pytest.mark.parametrize(
    ("places", "taken", "others"),
    [
        ("model ema", "model", "ema"),
        ("ema model", "model", "ema"),
        ("model_state_dict ema_state_dict", "model_state_dict", "ema_state_dict"),
        ("ema_state_dict", "ema_state_dict", ""),
        ("state_dict_ema state_dict", "state_dict", "state_dict_ema"),
        ("state_dict_ema", "state_dict_ema", ""),
        ("net best", "net", "best"),
        ("teacher", "teacher", ""),
        ("state_dict.model state_dict.ema", "state_dict.model", "state_dict.ema"),
        ("ema.state_dict", "ema.state_dict", ""),
        ("a.b.c.d", "a.b.c.d", ""),
        ("model.student model.teacher model.module", "model.module", "model.student model.teacher"),
        ("student optimizer.exp_avg", "student", "optimizer.exp_avg"),
    ],
)
def test_the_state_that_is_taken(places: str, taken: str, others: str, tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3, "loss": torch.tensor(0.5), "schedule": {"steps": [1, 2]}}
    states = {place: plain(1 + index / 8) for index, place in enumerate(places.split())}
    for place, state in states.items():
        node = content
        *above, last = place.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = state
    path = save(content, tmp_path / "last.pt")
    found = read_state(path)
    assert (found.name, set(found.others)) == (taken, set(others.split()))
    assert_is(load(path), states[taken])
    for place in others.split():
        assert_is(load(path, state=place), states[place])
    if not others:
        assert_is(load(path, state=taken), states[taken])


def test_the_bare_state_dict_comes_before_what_lies_in_it(tmp_path: Path) -> None:
    path = save({**plain(), "ema": plain(2.0)}, tmp_path / "x.pt")
    assert (read_state(path).name, read_state(path).others) == ("", ("ema",))
    assert_is(load(path), plain())


def test_a_state_may_be_named_by_what_holds_it(tmp_path: Path) -> None:
    content = {"model": plain(), "ema": {"decay": 0.9, "state_dict": plain(2.0)}}
    assert_is(load(save(content, tmp_path / "x.pt"), state="ema"), plain(2.0))


def test_one_state_under_two_names_is_one(tmp_path: Path) -> None:
    state = plain()
    found = read_state(save({"student": state, "teacher": state}, tmp_path / "x.pt"))
    assert (found.name, found.others) == ("student", ())


@pytest.mark.parametrize("names", [("teacher", "student"), ("first", "second")])
def test_two_states_and_no_known_word(names: tuple[str, str], tmp_path: Path) -> None:
    path = save({name: plain(index + 1) for index, name in enumerate(names)}, tmp_path / "x.pt")
    message = error_of(path)
    assert all(name in message for name in names) and "--state" in message
    for index, name in enumerate(names):
        assert_is(load(path, state=name), plain(index + 1))


def test_state_of_nothing(tmp_path: Path) -> None:
    path = save({"model": plain(), "ema": plain(2.0), "optimizer": {"lr": 0.1}}, tmp_path / "x.pt")
    for asked in ("emma", "em", "optimizer", "model.x", ""):
        message = error_of(path, state=asked)
        assert f"no state dict named {asked!r}" in message and "model (" in message and "ema (" in message


def test_state_of_what_is_no_encoder(tmp_path: Path) -> None:
    path = save({"model": plain(), "head": {"weight": torch.ones(2)}}, tmp_path / "x.pt")
    assert "no SAM 3 image encoder" in error_of(path, state="head")


def test_moments_of_an_optimizer_are_no_weights(tmp_path: Path) -> None:
    path = save({"optimizer": {"exp_avg": plain()}}, tmp_path / "x.pt")
    assert "optimizer.exp_avg" in error_of(path)


def test_no_state_has_an_encoder(tmp_path: Path) -> None:
    path = save({"model": {"a.weight": torch.ones(2)}, "ema": {"b.weight": torch.ones(2)}}, tmp_path / "x.pt")
    message = error_of(path)
    assert "SAM 3 image encoder" in message
    assert "model (1 tensors: a.weight, ...)" in message and "ema (1 tensors: b.weight, ...)" in message


@pytest.mark.parametrize("name", ["x.safetensors", "model.safetensors.index.json"])
def test_files_of_one_state(name: str, tmp_path: Path) -> None:
    save_file(plain(), tmp_path / "x.safetensors")
    if name.endswith(".json"):
        (tmp_path / name).write_text('{"weight_map": {"a": "x.safetensors"}}')
    assert_is(load(tmp_path / name), plain())
    read = read_state(tmp_path / name)
    assert (read.name, read.others) == ("", ())
    assert "only one state dict" in error_of(tmp_path / name, state="model")


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x80)
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert path.read_bytes()[:2] == b"\x80\x00"
    read = read_state(path)
    assert (read.name, read.others) == ("", ()) and read.tensors["x"].tolist() == [0.0]


# -- what lies beside the tensors, and modules --


class Color(enum.Enum):
    RED = 1


def throw_away(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of Python's that is there while a file is saved, as a trainer's package is, and not when it is read."""
    module = types.ModuleType("throw_away_trainer")

    class DetectionModel(nn.Module):
        """The shape of Ultralytics' models: the network under `model`, and a good deal beside it."""

        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Identity(), encoder)
            self.names = {0: "person"}
            self.args = types.SimpleNamespace(imgsz=112)
            self.stride = torch.tensor([14.0])
            self.register_buffer("anchors", torch.ones(2), persistent=False)
            self.register_parameter("nothing", None)

    class DictConfig:
        """The shape of OmegaConf's: an object that holds objects that hold it."""

        def __init__(self, content: dict[str, Any]) -> None:
            self._content = content
            self._parent = self

    for kind in (DetectionModel, DictConfig):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_objects_beside_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {
        "args": argparse.Namespace(lr=1e-4, out=Path("runs"), nested=argparse.Namespace(x=1)),
        "config": throw_away(monkeypatch).DictConfig({"a": 1}),
        "optimizer": optimizer.state_dict(),
        "optimizer itself": optimizer,
        "numpy": [np.float64(1.5), np.int32(3), np.arange(6.0), np.array(["a"]), np.dtype("f4")],
        "best": np.float32(0.7),
        "when": [
            datetime.datetime(2026, 1, 1),
            datetime.timedelta(seconds=3),
            uuid.UUID(int=3),
            decimal.Decimal("1.5"),
        ],
        "generators": (torch.get_rng_state(), random.getstate(), np.random.default_rng(0)),
        "containers": [
            collections.Counter("aab"),
            collections.deque([1]),
            {1, 2},
            frozenset({3}),
            1 + 2j,
            range(3),
            ...,
        ],
        "color": Color.RED,
        "types": [int, torch.float16, torch.device("cpu"), torch.Size([2]), nn.Linear],
        "model": plain(),
    }
    path = save(content, tmp_path / "last.pt")
    monkeypatch.delitem(sys.modules, "throw_away_trainer")
    assert_is(load(path), plain())
    assert read_state(path).name == "model"
    if MAPS.exists():
        assert all(are_mapped(load(path).parameters(), path))


@pytest.mark.parametrize(("half", "old"), [(True, False), (False, False), (True, True)])
def test_modules_as_ultralytics_trainer_writes_them(
    half: bool, old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = throw_away(monkeypatch)
    module = trainer.DetectionModel(load(checkpoint_of("meta-dual")))
    expected = {name: value.half() if half else value for name, value in plain().items()}
    content = {"epoch": 3, "model": None, "ema": module.half() if half else module, "updates": 7, "date": "2026-01-01"}
    path = tmp_path / "best.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old file has the source of its classes, and these have none
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    names = set(module.state_dict())
    monkeypatch.delitem(sys.modules, "throw_away_trainer")
    found = read_state(path)
    assert found.name == "ema" and set(found.tensors) == names
    assert_is(load(path), expected)
    assert_is(load(path, state="ema"), expected)
    message = error_of(path, state="model")
    assert (
        "no state dict named 'model'; the file contains ema (a module throw_away_trainer.DetectionModel with "
        in message
    )
    if MAPS.exists() and not old:  # an old file's storages are aligned by chance: its keys are addresses
        assert all(are_mapped((value for value in found.tensors.values() if value.numel()), path))


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"model": module, "ema": module}])
def test_a_module_alone_or_twice(wrap: Callable[[nn.Module], object], tmp_path: Path) -> None:
    encoder = load(checkpoint_of("meta-dual"))
    path = save(wrap(encoder), tmp_path / "module.pt")
    assert_is(load(path), plain())


def test_shared_parts_of_a_module_have_both_names(tmp_path: Path) -> None:
    inner = nn.Linear(2, 2)
    module = nn.ModuleDict({"a": inner, "b": nn.Sequential(inner)})
    found = read_state(save(module, tmp_path / "x.pt")).tensors
    assert list(found) == list(module.state_dict()) == ["a.weight", "a.bias", "b.0.weight", "b.0.bias"]
    assert found["a.weight"].data_ptr() == found["b.0.weight"].data_ptr()


def test_modules_without_an_encoder(tmp_path: Path) -> None:
    path = save(
        {"model": nn.Sequential(nn.Linear(2, 2)), "ema": nn.ReLU(), "x": {"y": torch.ones(1)}}, tmp_path / "x.pt"
    )
    message = error_of(path)
    assert "SAM 3 image encoder" in message
    assert "model (a module torch.nn.modules.container.Sequential with 2 tensors: 0.weight, 0.bias, ...)" in message
    assert (
        "ema (a module torch.nn.modules.activation.ReLU with no tensors)" in message
        and "x (1 tensors: y, ...)" in message
    )


# -- several encoders in one state --

COPY = "tracker.inst_interactive_predictor.model.backbone.vision_backbone."


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("necks", ["convs sam2_convs", "sam2_convs", "convs"])
def test_identical_copies_are_one(necks: str, shared: bool, tmp_path: Path) -> None:
    state = plain()
    kept = ("trunk.", *(f"{neck}." for neck in necks.split()))
    copy = {name: value if shared else value.clone() for name, value in state.items() if name.startswith(kept)}
    both = {COPY + name: value for name, value in copy.items()} | {
        PREFIX + name: value for name, value in state.items()
    }
    assert_is(load(save(both, tmp_path / "x.pt")), state)


def test_copies_that_differ_are_listed_and_the_prefix_chooses(tmp_path: Path) -> None:
    state, other = plain(), plain()
    other["convs.0.conv_1x1.bias"][0] += 1e-6
    both = {
        f"{start}{name}": value for start, part in (("model.", state), ("ema.", other)) for name, value in part.items()
    }
    path = save(both, tmp_path / "both.pt")
    message = error_of(path)
    assert "several encoders" in message and "ema.trunk.*" in message and "model.trunk.*" in message
    assert "--prefix" in message
    for prefix in ("ema.", "ema", "module.ema"):  # a wrapper that the file has is no part of it
        assert_is(load(path, prefix=prefix), other)
    assert_is(load(path, prefix="model."), state)
    message = error_of(path, prefix="emma.")
    assert "the prefix 'emma.'" in message and "'ema.', 'model.'" in message


def test_a_tracker_neck_goes_with_the_trunk_of_its_own_model(tmp_path: Path) -> None:
    """Two of transformers' trackers in one state: four pairs of names, two encoders."""
    config, state = EncoderConfig.from_file(config_of("hf-tracker")), load_file(checkpoint_of("hf-tracker"))
    other = {name: value * 2 for name, value in state.items()}
    both = {f"{start}.{name}": value for start, part in (("b", state), ("a", other)) for name, value in part.items()}
    path = save(both, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="several encoders") as caught:
        load_encoder(path, config)
    assert str(caught.value).count("* with ") == 2
    for prefix, part in (("a", other), ("b", state)):
        expected = load_encoder(save(part, tmp_path / f"{prefix}.pt"), config).state_dict()
        assert_is(load_encoder(path, config, prefix=prefix), expected)


def test_an_exact_prefix_comes_first(tmp_path: Path) -> None:
    both = {**plain(), **{f"ema.{name}": value for name, value in plain(2.0).items()}}
    path = save(both, tmp_path / "both.pt")
    assert "several encoders" in error_of(path)
    assert_is(load(path, prefix=""), plain())
    assert_is(load(path, prefix="ema."), plain(2.0))


# -- manifest and command line --


def test_the_manifest_tells_the_state_and_finds_it_again(tmp_path: Path) -> None:
    path = save(
        {"model": plain(), "ema": {f"a.{name}": value for name, value in plain(2.0).items()}}, tmp_path / "x.pt"
    )
    weights = weights_origin(EncoderSource(path, state="ema", prefix="a.", config=CONFIG).load().origin)
    assert (weights["state"], weights["other_states"], weights["prefix"]) == ("ema", ["model"], "a.")
    assert state_line(weights) == (
        "the weights are from the state dict ema of x.pt; the file also contains other state dicts with an encoder: "
        "model (choose one with --state)"
    )
    manifest = {"encoder": encoder_config(load(path)).to_dict(), "weights": weights}
    assert_is(manifest_encoder(tmp_path / "x.json", manifest), plain(2.0))
    weights["state"] = "model"  # the control
    del weights["prefix"]
    assert_is(manifest_encoder(tmp_path / "x.json", manifest), plain())
    weights["state"] = 3
    with pytest.raises(
        ManifestError, match=r"x.json: `state` and `prefix` in the manifest's entry `weights` are not strings"
    ):
        manifest_encoder(tmp_path / "x.json", manifest)


def test_the_manifest_is_silent_where_there_is_one_state(tmp_path: Path) -> None:
    for content, state in ((plain(), None), ({"model": plain()}, "model")):
        source = EncoderSource(save(content, tmp_path / "x.pt"), config=CONFIG)
        weights = weights_origin(source.load().origin)
        assert weights.get("state") == state and not {"other_states", "prefix"} & set(weights)
    assert state_line({"name": "x.safetensors", "random": False}) is None


def test_a_benchmark_maps_the_state_that_was_asked_for(tmp_path: Path) -> None:
    ema = {f"a.{name}": value for name, value in plain(2.0).items()}
    path = save({"model": plain(), "ema": ema}, tmp_path / "x.pt")
    asked = BenchOptions(tmp_path, checkpoint=path, config=CONFIG, necks="all", positions="none")
    for chosen, factor in (({"state": "ema", "prefix": "a."}, 2.0), ({"state": None, "prefix": None}, 1.0)):
        module = bench_module(make_weights(dataclasses.replace(asked, **chosen), tmp_path))  # type: ignore[arg-type]
        assert torch.equal(module.trunk.pos_embed, plain(factor)["trunk.pos_embed"])  # type: ignore[arg-type]


def test_random_weights_have_no_state(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="random weights have no state dicts"):
        check_options(ExportOptions(tmp_path / "x.onnx", state="ema"))


def test_onnx_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace_quickly(monkeypatch)
    path, output = save({"model": plain(), "ema": plain(1.5)}, tmp_path / "x.pt"), tmp_path / "x.onnx"
    options = [
        "--checkpoint",
        path,
        "--config",
        config_of("meta-dual"),
        "--positions",
        "none",
        "--no-verify",
        "--output",
        output,
    ]
    done = neck_export_cli("onnx", *options, "--state", "ema")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        "the weights are from the state dict ema of x.pt; the file also contains other state dicts with an encoder: "
        "model"
    )
    assert ", state ema, fp32" in neck_export_cli("inspect", output).out
    for asked, says in (("emma", "no state dict named 'emma'"), ("ema.x", "no state dict named 'ema.x'")):
        done = neck_export_cli("onnx", *options, "--state", asked)
        assert done.code == 1 and says in done.err and len(done.err.splitlines()) <= 2
