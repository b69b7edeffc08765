"""EncoderConfig: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config

from neck.config import ConfigError, EncoderConfig, check_image_size, exact_ratio


def test_the_defaults_are_the_published_encoder() -> None:
    config = EncoderConfig()
    assert (config.grid, config.head_dim, config.mlp_hidden, config.pretrain_grid) == ((72, 72), 64, 4736, 24)
    assert (config.image_size, config.scale_factors, config.necks) == ((1008, 1008), (4.0, 2.0, 1.0, 0.5), ("sam3",))


@pytest.mark.parametrize(("hidden", "embed_dim"), [(4736, 1024), (49, 11), (63, 13)])
def test_a_ratio_gives_its_hidden_channels_again(hidden: int, embed_dim: int) -> None:
    """11 * (49 / 11) is less than 49 in floating point."""
    assert int(embed_dim * exact_ratio(hidden, embed_dim)) == hidden


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().depth = 3  # type: ignore[misc]


@pytest.mark.parametrize("size", [(112, 56), [112, 56]])
def test_json_gives_the_same_config_again(size: Any) -> None:
    config = tiny_config(image_size=size, necks=("sam3", "sam2"))
    again = EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again != dataclasses.replace(config, image_size=(112, 112))  # the control


@pytest.mark.parametrize("size", [336, (336, 336), [336, 336]])
def test_an_int_is_a_square(size: Any) -> None:
    assert check_image_size(size, 14) == (336, 336)


def test_height_comes_first() -> None:
    assert check_image_size((1008, 672), 14) == (1008, 672)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1000, ["1000", "14", "994 and 1008"]),
        ((1008, 700 + 1), ["701", "700 and 714"]),
        (13, ["13", "nearest multiple: 14"]),
        (0, ["0", "at least 14 pixels", "14"]),
        (-14, ["-14", "at least 14 pixels"]),
        ((1008, 0), ["0", "at least 14 pixels"]),
        (14_000, ["14000x14000", "GB"]),
        (100_000, ["100000x100000", "GB"]),  # no multiple of 14 either, but the nearest would not do
        ((14, 100_002), ["14x100002", "GB"]),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_a_remedy(size: Any, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_image_size(size, 14)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_the_memory_of_a_huge_size_is_that_of_its_tensors() -> None:
    with pytest.raises(ConfigError, match=r"17 GB, and .* 4,398 GB") as caught:
        check_image_size(32 * 1024, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [True, 1008.0, "1008", None, (), (1008,), (1008, 1008, 3), (1008, 1008.0), (True, 14)])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"is invalid; use one whole number of pixels"):
        check_image_size(size, 14)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("depth", 0, "depth is 0"),
        ("depth", 4.0, "depth is 4.0"),
        ("embed_dim", True, "embed_dim is True"),
        ("window_size", -1, "window_size is -1"),
        ("mlp_ratio", 0, "mlp_ratio is 0"),
        ("mlp_ratio", 0.01, "mlp_ratio 0.01"),
        ("mlp_ratio", math.nan, "mlp_ratio is nan"),
        ("mlp_ratio", math.inf, "mlp_ratio is inf"),
        ("layer_norm_eps", "1e-5", "layer_norm_eps is '1e-5'"),
        ("num_heads", 3, "multiple of 4"),
        ("num_heads", 8, "head_dim of 2"),
        ("pretrain_image_size", 57, "a multiple of patch_size 14"),
        ("d_model", 6, "d_model is 6"),
        ("global_blocks", (1, 4), r"\[4\]"),
        ("global_blocks", (-1,), r"\[-1\]"),
        ("global_blocks", (1.5,), r"global_blocks is \[1.5\]; it must be a list of whole numbers"),
        ("global_blocks", (True,), r"global_blocks is \[True\]"),
        ("global_blocks", ("1",), r"global_blocks is \['1'\]"),
        ("scale_factors", (4.0, "2"), r"scale_factors is \[4.0, '2'\]; it must be a list of numbers"),
        ("necks", (1,), r"necks is \[1\]; it must be a list of names"),
        ("necks", (), "neck"),
        ("scale_factors", (), "scale_factors"),
        ("image_size", 100, "nearest multiple: 98 and 112"),
    ],
)
def test_a_value_that_cannot_work_is_named(field: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_config(**{field: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[1]", "contains a list"),
        ("[" * 100_000, "JSON"),
        ('{"depth": 1' + "0" * 5000 + "}", "JSON"),
        ('{"model_type": "sam3_video", "detector_config": {}}', "config.json"),
        ('{"dept": 3}', r"does not know: dept\. .*depth"),
        ('{"global_blocks": 3}', "wrong type"),
        ('{"image_size": 100}', "nearest multiple: 98 and 112"),
        ("\ud83d".encode("utf-8", "surrogatepass").decode("latin-1"), "JSON"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "encoder.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=said) as caught:
        EncoderConfig.from_file(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        EncoderConfig.from_file(tmp_path / "none.json")
