"""What a file tells beside its weights: rotary tables, blocks with gaps, positions with or without a class row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DATA, GOLDEN_TOLERANCE, load_golden, named_outputs, worst_error
from exporting import PREFIX, checkpoint_of, config_of, save_state
from safetensors.torch import load_file, save_file
from torch import Tensor

import neck.checkpoint
from neck.checkpoint import CheckpointError, load_encoder
from neck.config import EncoderConfig
from neck.rope import axial_angles
from neck.trunk import ViTDetTrunk

CONFIG = EncoderConfig.from_file(config_of("meta-dual"))
"""Window 4, grid 8, head_dim 16, blocks 1 and 3 global."""

State = dict[str, Tensor]


def table_key(block: int) -> str:
    return f"{PREFIX}trunk.blocks.{block}.attn.freqs_cis"


def table(block: int, grid: int = 8, theta: float = 10000.0, scale: float | None = None) -> Tensor:
    """Meta's table of a block, by the formula of its loader in float32."""
    side = grid if block in (1, 3) else 4
    factor = 4 / side if scale is None else scale
    angles = axial_angles(side, side, 16, (factor, factor), theta).float()
    return torch.polar(torch.ones_like(angles), angles)


def put_tables(state: State, **options: Any) -> None:
    for block in range(4):
        state[table_key(block)] = table(block, **options)


def error_of(path: Path, config: EncoderConfig | None = CONFIG) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, config)
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize("make", [lambda state: None, put_tables])
def test_the_plain_tables_pass(make: Callable[[State], None], tmp_path: Path) -> None:
    """The control: Meta's own tables, and those that the tests make."""
    notes: list[str] = []
    encoder = load_encoder(save_state(tmp_path / "x.pt", make), CONFIG, notes=notes)
    golden = load_golden("meta-dual")
    assert worst_error(named_outputs(encoder, golden.image), golden.expected) < GOLDEN_TOLERANCE
    assert notes == []


def test_tables_of_another_theta_are_refused_with_both_named(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x.pt", lambda state: put_tables(state, theta=100.0))
    message = error_of(path)
    assert table_key(0) in message
    assert "about 100" in message and "rope_theta" in message
    encoder = load_encoder(path, EncoderConfig.from_dict({**CONFIG.to_dict(), "rope_theta": 100.0}))
    assert isinstance(encoder.trunk, ViTDetTrunk)
    stored = torch.view_as_real(table(3, theta=100.0))
    assert (torch.stack((encoder.trunk.global_cos, encoder.trunk.global_sin), -1) - stored).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("block", "planted", "says"),
    [
        (1, table(1, theta=9000.0), "about 9000"),
        (3, table(3, scale=1.0), "but 0.5 rad"),
        (2, table(1), "window"),
        (1, table(1)[:-1], "8), but one row for each token"),
        (1, table(1)[:, :4], "shape (64, 4) instead of (64, 8"),
        (1, table(1).flip(0), "rotary table"),
        (1, table(1) * float("nan"), "differ by up to nan"),
        (1, table(1).conj().resolve_conj(), "differ by up to 2"),
        (3, table(3, grid=10), "different image sizes: 8x8"),
    ],
)
def test_a_planted_table_is_refused(block: int, planted: Tensor, says: str, tmp_path: Path) -> None:
    message = error_of(save_state(tmp_path / "x.pt", lambda state: state.update({table_key(block): planted})))
    assert says in message and (table_key(block) in message)


@pytest.mark.parametrize(("field", "value"), [("num_heads", 4), ("window_size", 2), ("global_blocks", (1,))])
def test_tables_tell_a_config_that_no_shape_contradicts(field: str, value: Any, tmp_path: Path) -> None:
    config = EncoderConfig.from_dict({**CONFIG.to_dict(), field: value})
    assert "rotary table" in error_of(save_state(tmp_path / "x.pt"), config)


def test_tables_of_another_grid_are_said(tmp_path: Path) -> None:
    path, notes = save_state(tmp_path / "x.pt", lambda state: put_tables(state, grid=10)), list[str]()
    encoder = load_encoder(path, CONFIG, notes=notes)
    (note,) = notes
    assert note.startswith(f"{path}: ") and "140x140" in note and "112x112" in note
    assert encoder.trunk.grid == (8, 8)


def test_tables_tell_the_default_size_where_no_config_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neck.checkpoint, "published_config", lambda path, layout, facts: CONFIG)
    path, notes = save_state(tmp_path / "x.pt", lambda state: put_tables(state, grid=10)), list[str]()
    assert load_encoder(path, notes=notes).trunk.grid == (10, 10)
    (note,) = notes
    assert note.startswith(f"{path}: ") and "140x140" in note


@pytest.mark.parametrize("form", ["real", "cos and sin", "half", "double"])
def test_other_forms_of_metas_table(form: str, tmp_path: Path) -> None:
    def change(state: State, theta: float = 10000.0) -> None:
        for block in range(4):
            made = table(block, theta=theta)
            key = table_key(block)
            del state[key]
            if form == "real":
                state[key] = torch.view_as_real(made)
            elif form == "half":  # what a cast of the whole module leaves of a complex table
                state[key] = made.real.half()
            elif form == "double":
                state[key] = made.to(torch.complex128)
            else:
                state |= {f"{key}_real": made.real.clone(), f"{key}_imag": made.imag.clone()}

    load_encoder(save_state(tmp_path / "x.pt", change), CONFIG)
    assert "theta" in error_of(save_state(tmp_path / "y.pt", lambda state: change(state, 100.0)))


def hf_state(kind: str, theta: float) -> State:
    """hf-dual's checkpoint with the buffers that transformers 5.0 or 5.24 would write; window 4, grid 8."""
    state = load_file(checkpoint_of("hf-dual"))
    own = json.loads((DATA / "hf-dual" / "case.json").read_text())["key_prefix"]
    for block in range(4):
        side = 8 if block in (1, 3) else 4
        start = f"{own}backbone.layers.{block}."
        angles = axial_angles(side, side, 16, (4 / side, 4 / side), theta).float()
        if kind == "5.0":
            doubled = angles.repeat_interleave(2, dim=-1)
            state[f"{start}rotary_emb.rope_embeddings_cos"] = doubled.cos()
            state[f"{start}rotary_emb.rope_embeddings_sin"] = doubled.sin()
        else:
            index = torch.arange(side * side)
            state[f"{start}rotary_emb.inv_freq"] = theta ** (-torch.arange(0, 8, 2).float() / 8)
            state[f"{start}rotary_emb.original_inv_freq"] = theta ** (-torch.arange(0, 8, 2).float() / 8)
            state[f"{start}position_ids"] = torch.stack((index % side, index // side), dim=-1).float() * (4 / side)
    return state


@pytest.mark.parametrize("kind", ["5.0", "5.24"])
def test_hugging_faces_rotary_buffers(kind: str, tmp_path: Path) -> None:
    config = EncoderConfig.from_file(config_of("hf-dual"))
    save_file(hf_state(kind, 10000.0), tmp_path / "x.safetensors")
    load_encoder(tmp_path / "x.safetensors", config)
    save_file(hf_state(kind, 100.0), tmp_path / "y.safetensors")
    assert "about 100" in error_of(tmp_path / "y.safetensors", config)


def test_positions_of_tokens_that_are_others_are_refused(tmp_path: Path) -> None:
    state = hf_state("5.24", 10000.0)
    key = next(key for key in state if key.endswith("layers.2.position_ids"))
    state[key] = state[key].flip(-1)
    save_file(state, tmp_path / "x.safetensors")
    message = error_of(tmp_path / "x.safetensors", EncoderConfig.from_file(config_of("hf-dual")))
    assert f"{key} " in message and "differ by up to 3" in message


# -- the position embedding --


@pytest.mark.parametrize("case", ["meta-dual", "hf-dual"])
def test_the_class_row_may_be_there_or_not(case: str, tmp_path: Path) -> None:
    """Meta keeps it and Hugging Face drops it; here each is saved by the other's rule."""
    golden, config = load_golden(case), EncoderConfig.from_file(config_of(case))
    state = dict(load_file(checkpoint_of(case))) if case == "hf-dual" else {}
    if case == "meta-dual":
        path = save_state(tmp_path / "x.pt", lambda state: state.update(positions_without_row(state)))
    else:
        key = next(key for key in state if key.endswith("position_embeddings"))
        state[key] = torch.cat((torch.full_like(state[key][:, :1], 9.0), state[key]), dim=1)
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    encoder = load_encoder(path, config)
    encoder.set_imgsz(golden.config.image_size)
    assert worst_error(named_outputs(encoder, golden.image), golden.expected) < GOLDEN_TOLERANCE


def positions_without_row(state: State) -> State:
    return {f"{PREFIX}trunk.pos_embed": state[f"{PREFIX}trunk.pos_embed"][:, 1:].clone()}


@pytest.mark.parametrize("rows", [7, 12])
def test_positions_that_are_no_square_quote_the_given_config(rows: int, tmp_path: Path) -> None:
    path = save_state(
        tmp_path / "x.pt", lambda state: state.update({f"{PREFIX}trunk.pos_embed": torch.zeros(1, rows, 32)})
    )
    assert f"pos_embed has the shape (1, {rows}, 32) instead of (1, 17, 32)" in error_of(path)


# -- blocks with gaps --


def pruned(state: State) -> None:
    """Blocks 0 to 3 under the indices 0, 2, 4, 5 that they had in a deeper trunk."""
    for old, new in ((3, 5), (2, 4), (1, 2)):
        for key in [key for key in state if key.startswith(f"{PREFIX}trunk.blocks.{old}.")]:
            state[key.replace(f"blocks.{old}.", f"blocks.{new}.")] = state.pop(key)


def test_blocks_with_gaps_load_in_order(tmp_path: Path) -> None:
    path, notes = save_state(tmp_path / "x.pt", pruned), list[str]()
    encoder, golden = load_encoder(path, CONFIG, notes=notes), load_golden("meta-dual")
    assert worst_error(named_outputs(encoder, golden.image), golden.expected) < GOLDEN_TOLERANCE
    (note,) = notes
    assert "blocks (0, 2, 4, 5) get the numbers 0 to 3" in note


def test_blocks_with_gaps_need_a_config_that_knows_of_them(tmp_path: Path) -> None:
    path = save_state(tmp_path / "x.pt", pruned)
    assert "blocks 1" in error_of(path, None)
    whole = EncoderConfig.from_dict({**CONFIG.to_dict(), "depth": 6})
    assert "(blocks 1, 3 are missing in the checkpoint)" in error_of(path, whole)
    far = save_state(tmp_path / "far.pt", lambda state: state.update({f"{PREFIX}trunk.blocks.9999.x": torch.ones(1)}))
    message = error_of(far, CONFIG)
    assert "(blocks 4, 5, 6, 7, 8, 9, 10, 11 and 9987 more are missing in the checkpoint)" in message
