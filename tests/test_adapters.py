"""LoRA adapters: merged as PEFT merges them, and whatever is not merged is refused or listed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA
from exporting import bench_module, checkpoint_of, config_of, listing, neck_export_cli, trace_quickly
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.measure.prepare import make_weights
from benchmarks.measure.work_folder import digest, identity
from benchmarks.options import BenchOptions
from export.contract.errors import ExportError
from export.contract.manifest import file_entry
from export.weights_origin import merged_adapter
from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig

CASE = DATA / "hf-variant"
ADAPTERS = CASE / "adapters"
"""Written by PEFT 0.21; `plain` adapts convolutions too, with rank and alpha patterns."""

PEFT_TOLERANCE = 1e-6
"""Of a weight's largest value: PEFT adds the same products in the same order."""

META = ("--checkpoint", checkpoint_of("meta-dual"), "--config", config_of("meta-dual"))

State = dict[str, Tensor]


def merged_by_peft(name: str) -> State:
    """The base's state dict with the weights that PEFT's merge_and_unload changed."""
    return {**load_file(CASE / "model.safetensors"), **load_file(ADAPTERS / name / "merged.safetensors")}


def weights_of(state: State, folder: Path) -> State:
    """What the encoder of a plain state dict holds."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    shutil.copy(CASE / "config.json", folder)
    return dict(load_encoder(folder).state_dict())


def assert_equal(found: State, wanted: State) -> None:
    assert list(found) == list(wanted)
    for name, want in wanted.items():
        assert (found[name] - want).abs().max() <= PEFT_TOLERANCE * want.abs().max(), name


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the plain adapter, to be changed."""
    return shutil.copytree(ADAPTERS / "plain", tmp_path / "adapter")


def change_config(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change_tensors(folder: Path, change: Callable[[State], State | None]) -> None:
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    save_file(change(state) or state, file)


def refused(folder: Path, base: Path = CASE, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(base, adapter=folder, **options)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_a_folder_is_merged_as_peft_does(name: str, tmp_path: Path) -> None:
    notes: list[str] = []
    found = load_encoder(CASE, adapter=ADAPTERS / name, notes=notes).state_dict()
    assert_equal(found, weights_of(merged_by_peft(name), tmp_path / "merged"))
    count = len(load_file(ADAPTERS / name / "merged.safetensors"))
    assert notes == [f"the adapter {ADAPTERS / name} was merged into {count} weights"]
    with pytest.raises(AssertionError):  # the control: the base alone
        assert_equal(dict(load_encoder(CASE).state_dict()), found)


@pytest.mark.parametrize("entries", [{"alpha_pattern": {}}, {"lora_alpha": 7}, {"use_rslora": True}])
def test_the_scaling_is_seen(entries: dict[str, Any], adapter: Path, tmp_path: Path) -> None:
    """The control of every part of it."""
    change_config(adapter, **entries)
    found = load_encoder(CASE, adapter=adapter).state_dict()
    with pytest.raises(AssertionError):
        assert_equal(found, weights_of(merged_by_peft("plain"), tmp_path / "merged"))


def test_fan_in_fan_out_changes_nothing_on_linear_layers(adapter: Path, tmp_path: Path) -> None:
    """PEFT turns it off there: it is for Conv1D, which this encoder does not have."""
    change_config(adapter, fan_in_fan_out=True)
    found = load_encoder(CASE, adapter=adapter).state_dict()
    assert_equal(found, weights_of(merged_by_peft("plain"), tmp_path / "merged"))


@pytest.mark.parametrize("prefix", ["", "base_model.model.detector_model.vision_encoder.", "base_model.model.x."])
def test_an_adapter_of_a_model_around_the_encoder(prefix: str, adapter: Path, tmp_path: Path) -> None:
    change_tensors(adapter, lambda state: {key.replace("base_model.model.", prefix): v for key, v in state.items()})
    change_config(adapter, rank_pattern={"fc1": 2, r".*layers\.1\.attention\.q_proj": 3})
    found = load_encoder(CASE, adapter=adapter).state_dict()
    assert_equal(found, weights_of(merged_by_peft("plain"), tmp_path / "merged"))


def test_an_adapter_of_the_backbone_alone(adapter: Path, tmp_path: Path) -> None:
    def inside(state: State) -> State:
        return {key.replace("model.backbone.", "model."): value for key, value in state.items() if "backbone" in key}

    change_tensors(adapter, inside)
    base, merged = load_file(CASE / "model.safetensors"), merged_by_peft("plain")
    wanted = {key: merged[key] if key.startswith("backbone") else base[key] for key in base}
    assert_equal(dict(load_encoder(CASE, adapter=adapter).state_dict()), weights_of(wanted, tmp_path / "merged"))


def test_half_precision_adapters_and_pickled_ones(adapter: Path) -> None:
    full = load_encoder(CASE, adapter=adapter).state_dict()
    state = {key: value.half() for key, value in load_file(adapter / "adapter_model.safetensors").items()}
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(state, adapter / "adapter_model.bin")
    half = load_encoder(CASE, adapter=adapter).state_dict()
    worst = max(float((half[name] - full[name]).abs().max()) for name in full)
    assert 0 < worst < 1e-2


# -- unmerged in the file --


def unmerged(name: str, wrapped: str = "") -> State:
    """The state dict of a model that still has its adapter, as `model.state_dict()` gives it."""
    base = load_file(CASE / "model.safetensors")
    factors = load_file(ADAPTERS / name / "adapter_model.safetensors")
    adapted = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in factors}
    state = {}
    for key, value in base.items():
        module, leaf = key.rsplit(".", 1)
        state[f"{wrapped}{module}.base_layer.{leaf}" if module in adapted else f"{wrapped}{key}"] = value
    for key, value in factors.items():
        inner = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        state[wrapped + inner] = value
    return state


def save_unmerged(folder: Path, name: str, wrapped: str = "") -> Path:
    folder.mkdir()
    save_file(unmerged(name, wrapped), folder / "model.safetensors")
    shutil.copy(CASE / "config.json", folder)
    return folder


@pytest.mark.parametrize("wrapped", ["", "base_model.model."])
@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_an_adapter_in_the_file_with_its_config_beside_it(name: str, wrapped: str, tmp_path: Path) -> None:
    folder, notes = save_unmerged(tmp_path / "x", name, wrapped), list[str]()
    shutil.copy(ADAPTERS / name / "adapter_config.json", folder)
    found = load_encoder(folder / "model.safetensors", notes=notes).state_dict()
    assert_equal(found, weights_of(merged_by_peft(name), tmp_path / "merged"))
    assert len(notes) == 1 and "merged into" in notes[0]


def test_an_adapter_in_the_file_by_its_alpha(tmp_path: Path) -> None:
    folder = save_unmerged(tmp_path / "x", "rslora")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_encoder(folder)
    # rsLoRA's 4 / sqrt(3) at rank 3 as a plain alpha
    found = load_encoder(folder, adapter_alpha=4 * 3**0.5).state_dict()
    assert_equal(found, weights_of(merged_by_peft("rslora"), tmp_path / "merged"))


def test_alpha_and_adapters_that_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--adapter-alpha"):
        load_encoder(CASE, adapter_alpha=8)
    folder = save_unmerged(tmp_path / "x", "plain")
    assert "adapter" in refused(ADAPTERS / "plain", folder, adapter_alpha=4.0)
    with pytest.raises(CheckpointError, match="--checkpoint and this folder with --adapter"):
        load_encoder(ADAPTERS / "plain")


@pytest.mark.parametrize("alpha", [0.0, -4.0, float("nan"), float("inf")])
def test_an_alpha_that_is_none(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"--adapter-alpha is {alpha}"):
        load_encoder(save_unmerged(tmp_path / "x", "rslora"), adapter_alpha=alpha)


def test_alpha_where_a_config_tells_it(tmp_path: Path) -> None:
    """It would drop the config's patterns and rsLoRA."""
    folder = save_unmerged(tmp_path / "x", "rslora")
    shutil.copy(ADAPTERS / "rslora" / "adapter_config.json", folder)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_encoder(folder, adapter_alpha=4)


def test_a_merge_that_overflows_is_refused(adapter: Path) -> None:
    change_tensors(adapter, lambda state: {key: value * 1e30 for key, value in state.items()})
    assert "16 of the encoder's tensors" in refused(adapter)


def test_a_base_whose_adapter_was_taken_out_is_said(tmp_path: Path) -> None:
    folder, notes = save_unmerged(tmp_path / "x", "rslora"), list[str]()
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "lora_" not in key}, folder / "model.safetensors")
    found = load_encoder(folder, notes=notes).state_dict()
    assert_equal(dict(found), dict(load_encoder(CASE).state_dict()))
    (note,) = notes
    assert note.startswith(f"{folder}: ") and "base_layer" in note
    with pytest.raises(CheckpointError, match="--adapter-alpha"):
        load_encoder(folder, adapter_alpha=4)
    found = load_encoder(folder, adapter=ADAPTERS / "rslora").state_dict()
    assert_equal(dict(found), weights_of(merged_by_peft("rslora"), tmp_path / "merged"))


def test_two_adapters_in_a_file_are_not_guessed_between(tmp_path: Path) -> None:
    folder = save_unmerged(tmp_path / "x", "rslora")
    state = load_file(folder / "model.safetensors")
    more = {key.replace(".default.", ".second."): value.clone() for key, value in state.items() if ".default." in key}
    save_file({**state, **more}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="default, second"):
        load_encoder(folder, adapter_alpha=4)


def test_dora_and_saved_modules_in_a_file_are_refused(tmp_path: Path) -> None:
    for extra in (
        "backbone.layers.0.attention.q_proj.lora_magnitude_vector.default.weight",
        "backbone.layer_norm.modules_to_save.default.weight",
    ):
        folder = save_unmerged(tmp_path / extra.split(".")[-3], "rslora")
        state = load_file(folder / "model.safetensors")
        save_file({**state, extra: torch.ones(16)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="a SAM 3 encoder"):
            load_encoder(folder, adapter_alpha=4)


def test_meta_names_and_their_adapter(tmp_path: Path) -> None:
    """qkv is one module there; B @ A in float64 is the second implementation."""
    config = EncoderConfig.from_file(config_of("meta-dual"))
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator) for shape in ((2, 32), (96, 2)))
    folder = tmp_path / "adapter"
    folder.mkdir()
    module = "base_model.model.detector.backbone.vision_backbone.trunk.blocks.2.attn.qkv"
    save_file(
        {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    plain = load_encoder(checkpoint_of("meta-dual"), config).state_dict()
    found = load_encoder(checkpoint_of("meta-dual"), config, adapter=folder).state_dict()
    wanted = plain["trunk.blocks.2.attn.qkv.weight"].double() + 1.5 * second.double() @ first.double()
    assert (found.pop("trunk.blocks.2.attn.qkv.weight") - wanted).abs().max() < 1e-5
    assert all(torch.equal(value, plain[name]) for name, value in found.items())


# -- what is not merged --


def test_modules_outside_the_encoder_are_listed(adapter: Path) -> None:
    outside = "base_model.model.detr_encoder.layers.0.mlp.fc1"

    def add(state: State) -> None:
        state[f"{outside}.lora_A.weight"], state[f"{outside}.lora_B.weight"] = torch.ones(2, 16), torch.ones(40, 2)
        state["base_model.model.mask_decoder.head.weight"] = torch.ones(3)

    change_tensors(adapter, add)
    notes: list[str] = []
    load_encoder(CASE, adapter=adapter, notes=notes)
    assert notes[1].startswith(f"these tensors of the adapter {adapter} ")
    assert notes[1].endswith("ignored: detr_encoder.layers.0.mlp.fc1, mask_decoder.head.weight")


def rename(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def spoil(value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[next(key for key in state if "lora_B" in key)].view(-1)[-1] = value

    return change


def cut(name: str, part: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def change(state: State) -> None:
        for key in [key for key in state if "layers.0.attention.q_proj" in key and name in key]:
            state[key] = part(state[key]).clone()

    return change


def add_transposed(state: State) -> None:
    """Factors of a transposed convolution, whose product has its weight's shape; PEFT makes none."""
    module = "base_model.model.neck.fpn_layers.0.scale_layers.0"
    state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = torch.ones(4, 8, 2, 2), torch.ones(16, 4, 1, 1)


def of_rank(factor: Tensor, rank: int) -> Tensor:
    """The first rows of an A of rank 4, or columns of a B."""
    return factor[:rank] if factor.shape[0] == 4 else factor[:, :rank]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rename("backbone.layers", "trunk.blocks"), "another base"),
        (rename("backbone.layers.2.", "backbone.layers.9."), "does not contain backbone.layers.9.attention.q_proj"),
        (rename("backbone.", "text."), "merged"),
        (
            cut("lora_A", lambda factor: factor[:, :8]),
            "backbone.layers.0.attention.q_proj",
        ),
        (cut("lora_B", lambda factor: factor[:8]), "(16, 16)"),
        (cut("lora_", lambda factor: factor[:0] if factor.shape[0] == 4 else factor[:, :0]), "have rank 0"),
        (
            cut("lora_", lambda factor: factor[:2] if factor.shape[0] == 4 else factor[:, :2]),
            "configuration says rank 4",
        ),
        (spoil(float("nan")), "lora_B"),
        (spoil(float("inf")), "lora_B"),
        (cut("lora_A", lambda factor: factor.to(torch.int8)), "has the type torch.int8"),
        (
            lambda state: {key: value for key, value in state.items() if "fc1.lora_B" not in key},
            "tensor lora_B.weight of the adapted module",
        ),
        (lambda state: {"x.weight": torch.ones(1)}, "no module of the encoder"),
        (add_transposed, "factors of neck.fpn_layers.0.scale_layers.0 have the shapes"),
    ],
)
def test_bad_adapters(change: Callable[[State], State | None], says: str, adapter: Path) -> None:
    change_tensors(adapter, change)
    if says == "merged":  # names that are no encoder's: the necks' remain, the others are listed
        notes: list[str] = []
        load_encoder(CASE, adapter=adapter, notes=notes)
        assert "text" in notes[1]
        return
    assert says in refused(adapter)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"r": 0}, "r is 0"),
        ({"r": 0, "rank_pattern": {"fc1": 0}}, "r is 0"),
        ({"rank_pattern": {"fc1": 0}}, "fc1 is 0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern contains the key '('"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1]"),
        ({"use_dora": True}, "also uses DoRA, use_dora True"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"use_qalora": True}, "use_qalora True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"an_entry_of_tomorrow": 1}, "an_entry_of_tomorrow 1"),
    ],
)
def test_bad_adapter_configs(entries: dict[str, Any], says: str, adapter: Path) -> None:
    change_config(adapter, **entries)
    message = refused(adapter)
    assert says in message and "adapter_config.json" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dora", "use_dora True"),
        ("bias", "q_proj.base_layer.bias"),
        ("saved", "backbone.layer_norm.bias, backbone.layer_norm.weight"),
    ],
)
def test_what_peft_saves_beyond_lora_is_refused(name: str, says: str) -> None:
    message = refused(ADAPTERS / name)
    assert says in message and "PEFT's merge_and_unload" in message


def test_folders_that_are_no_adapter(tmp_path: Path, adapter: Path) -> None:
    assert "contains no adapter_config.json" in refused(tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    assert "contains no adapter_model.safetensors or adapter_model.bin" in refused(adapter)


# -- the command line --


def test_an_export_says_what_was_merged_and_verify_merges_it_again(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_quickly(monkeypatch)
    output = tmp_path / "out" / "x.onnx"
    ran = neck_export_cli("onnx", "--checkpoint", CASE, "--adapter", adapter, "--output", output)
    assert ran.code == 0, ran
    assert f"note: the adapter {adapter} was merged into 16 weights" in ran.out
    files = [file_entry(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    manifest = json.loads(output.with_suffix(".json").read_text())
    assert manifest["weights"]["adapter"] == {"path": str(adapter.resolve()), "files": files}
    assert neck_export_cli("verify", output).code == 0
    assert f", adapter {adapter}" in neck_export_cli("inspect", output).out
    moved = adapter.rename(tmp_path / "moved")
    ran = neck_export_cli("verify", output)
    assert (
        ran.code == 1
        and f"{adapter}: this folder does not exist, but the manifest x.json names it as the adapter" in ran.err
    )
    assert neck_export_cli("verify", output, "--adapter", moved).code == 0
    change_config(moved, lora_alpha=7)
    ran = neck_export_cli("verify", output, "--adapter", moved)
    assert ran.code == 1 and "this is not the adapter that was merged" in ran.err
    output.with_suffix(".json").write_text(json.dumps({**manifest, "precision": "fp16"}))
    for given, says in (
        ((), "pass the adapter's new path with --adapter"),
        (("--adapter", moved), "is not the adapter"),
    ):
        ran = neck_export_cli("bisect", output, *given)
        assert ran.code == 1 and says in ran.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--checkpoint", "random", "--adapter", ADAPTERS / "plain"), "random weights"),
        (
            ("--checkpoint", "random", "--adapter-alpha", "8"),
            "--adapter-alpha",
        ),
        (("--checkpoint", CASE, "--adapter", ADAPTERS), "contains no adapter_config.json"),
        (("--checkpoint", CASE, "--adapter", ADAPTERS / "dora"), "DoRA"),
        (("--checkpoint", CASE, "--adapter-alpha", "8"), "--adapter-alpha"),
        (
            (
                "--checkpoint",
                checkpoint_of("meta-dual"),
                "--config",
                config_of("meta-dual"),
                "--adapter",
                ADAPTERS / "plain",
            ),
            "another base",
        ),
    ],
)
def test_bad_adapters_on_the_command_line(arguments: tuple[Any, ...], says: str, tmp_path: Path) -> None:
    ran = neck_export_cli("onnx", *arguments, "--output", tmp_path / "out" / "x.onnx")
    assert ran.code == 1 and ran.out == "" and says in ran.err
    assert 1 <= len(ran.err.splitlines()) <= 2
    assert listing(tmp_path) == {}


def test_a_file_without_adapters_takes_none_at_verify(tmp_path: Path) -> None:
    manifest = {"path": "w.pt", "random": False}
    with pytest.raises(ExportError, match=r"x\.json"):
        merged_adapter(tmp_path / "x.json", manifest, ADAPTERS / "plain")
    assert merged_adapter(tmp_path / "x.json", manifest) is None


def test_a_benchmark_merges_the_adapter(tmp_path: Path) -> None:
    weights = {}
    for adapter in (None, ADAPTERS / "rslora"):
        asked = BenchOptions(tmp_path, checkpoint=CASE, necks="all", positions="none", adapter=adapter)
        module = bench_module(make_weights(asked, tmp_path))
        weights[adapter] = module.state_dict()["trunk.blocks.0.mlp.fc2.weight"]
        wanted = load_encoder(CASE, adapter=adapter).state_dict()
        assert torch.equal(weights[adapter], wanted["trunk.blocks.0.mlp.fc2.weight"])
    assert not torch.equal(*weights.values())  # the control


def test_another_adapter_is_another_benchmark(adapter: Path) -> None:
    asked = BenchOptions(Path("report"), checkpoint=CASE, necks="all", positions="none", adapter=adapter)
    before = digest(identity(asked))
    assert digest(identity(asked)) == before != digest(identity(dataclasses.replace(asked, adapter=None)))
    change_config(adapter, lora_alpha=70)
    assert digest(identity(asked)) != before
    assert digest(identity(dataclasses.replace(asked, output=Path("other"), rounds=1))) == digest(identity(asked))
