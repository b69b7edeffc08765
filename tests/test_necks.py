"""The seed's contract of Sam3DualViTDetNeck, and its outputs against the public implementations'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import GOLDEN_TOLERANCE, Golden, load_golden, named_outputs, tiny_config, worst_error
from torch import Tensor, nn

from neck.checkpoint import random_encoder
from neck.config import ConfigError
from neck.necks import Sam3AnyViTDetNeck, Sam3DualViTDetNeck, Sam3TriViTDetNeck, forward_necks, new_encoder
from neck.position import PositionEmbeddingSine


class ForeignTrunk(nn.Module):
    """Not ours: two maps, of which the last counts."""

    def __init__(self) -> None:
        super().__init__()
        self.channel_list = [4, 8]
        self.asked: list[Any] = []
        self.patches = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.patches(images)
        return [x[:, :4], x]

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int]) -> None:
        self.asked.append(imgsz)


class Ones(nn.Module):
    """A position encoding in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(x.shape, dtype=torch.float64)


def foreign(**options: Any) -> Sam3DualViTDetNeck:
    return Sam3DualViTDetNeck(ForeignTrunk(), PositionEmbeddingSine(12), 12, **options)


def test_attributes_and_names_of_modules() -> None:
    encoder = foreign(add_sam2_neck=True)
    assert isinstance(encoder, nn.Module)
    assert isinstance(encoder.convs, nn.ModuleList) and isinstance(encoder.sam2_convs, nn.ModuleList)
    assert tuple(encoder.scale_factors) == (4.0, 2.0, 1.0, 0.5)
    names = [[name for name, _ in level.named_children()] for level in encoder.convs]
    assert names == [
        ["dconv_2x2_0", "gelu", "dconv_2x2_1", "conv_1x1", "conv_3x3"],
        ["dconv_2x2", "conv_1x1", "conv_3x3"],
        ["conv_1x1", "conv_3x3"],
        ["maxpool_2x2", "conv_1x1", "conv_3x3"],
    ]
    assert [name for name, _ in encoder.named_children()] == ["trunk", "position_encoding", "convs", "sam2_convs"]
    assert foreign().sam2_convs is None


def test_shapes_of_weights() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in foreign().convs.state_dict().items()}
    assert shapes["0.dconv_2x2_0.weight"] == (8, 4, 2, 2)
    assert shapes["0.dconv_2x2_1.weight"] == (4, 2, 2, 2)
    assert shapes["0.conv_1x1.weight"] == (12, 2, 1, 1)
    assert shapes["1.dconv_2x2.weight"] == (8, 4, 2, 2)
    assert shapes["3.conv_1x1.weight"] == (12, 8, 1, 1)
    assert shapes["3.conv_3x3.weight"] == (12, 12, 3, 3)
    layers = {name.rpartition(".")[0] for name in shapes}
    assert all(f"{layer}.bias" in shapes for layer in layers)


@pytest.mark.parametrize("with_sam2", [False, True])
def test_forward_gives_four_with_a_foreign_trunk(with_sam2: bool) -> None:
    encoder = foreign(add_sam2_neck=with_sam2)
    outputs = encoder(torch.randn(2, 3, 64, 96))
    assert isinstance(outputs, tuple) and len(outputs) == 4
    for group in outputs[: 4 if with_sam2 else 2]:
        assert isinstance(group, list)
        assert [tuple(tensor.shape) for tensor in group] == [
            (2, 12, 16, 24),
            (2, 12, 8, 12),
            (2, 12, 4, 6),
            (2, 12, 2, 3),
        ]
    if with_sam2:
        assert not torch.equal(outputs[0][0], outputs[2][0])
    else:
        assert outputs[2] is None and outputs[3] is None


def test_the_two_necks_read_one_trunk_map() -> None:
    encoder = foreign(add_sam2_neck=True)
    assert encoder.sam2_convs is not None
    encoder.sam2_convs.load_state_dict(encoder.convs.state_dict())
    sam3, _, sam2, _ = encoder(torch.randn(1, 3, 64, 64))
    assert sam2 is not None
    assert all(torch.equal(one, other) for one, other in zip(sam3, sam2, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_positions_take_the_features_dtype(dtype: torch.dtype) -> None:
    encoder = Sam3DualViTDetNeck(ForeignTrunk(), Ones(), 12).to(dtype)
    feats, poss = encoder.sam_forward_feature_levels(torch.randn(1, 8, 4, 4, dtype=dtype), encoder.convs)
    assert {tensor.dtype for tensor in (*feats, *poss)} == {dtype}


@pytest.mark.parametrize("scale", [3.0, 8.0, 0.25, 0.0])
def test_another_scale_is_refused_by_its_name(scale: float) -> None:
    with pytest.raises(NotImplementedError, match=str(scale)):
        foreign(scale_factors=(4.0, scale))


def test_fewer_levels_in_any_order() -> None:
    feats, poss, _, _ = foreign(scale_factors=[0.5, 4])(torch.randn(1, 3, 64, 64))
    assert [tuple(feat.shape[2:]) for feat in feats] == [tuple(pos.shape[2:]) for pos in poss] == [(2, 2), (16, 16)]


@pytest.mark.parametrize("size", [84, (84, 112), [84, 112]])
def test_set_imgsz_reaches_the_trunk(size: Any) -> None:
    encoder = foreign()
    encoder.set_imgsz(size)
    assert encoder.trunk.asked == [size]
    ours = random_encoder(tiny_config())
    ours.set_imgsz(size)
    width = 84 if size == 84 else 112
    assert ours(torch.zeros(1, 3, 84, width))[0][2].shape[2:] == (6, width // 14)


def test_set_imgsz_has_the_published_default() -> None:
    encoder = foreign()
    encoder.set_imgsz()
    assert encoder.trunk.asked == [(1008, 1008)]


@pytest.mark.parametrize(("size", "said"), [(100, "98 and 112"), (0, "at least"), (14_000, "GB")])
def test_set_imgsz_refuses_through_the_neck(size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        random_encoder(tiny_config()).set_imgsz(size)


def test_golden(golden: Golden) -> None:
    assert worst_error(named_outputs(golden.encoder, golden.image), golden.expected) < GOLDEN_TOLERANCE


def test_golden_by_the_forward_of_the_seed() -> None:
    golden = load_golden("meta-dual")
    with torch.no_grad():
        groups = golden.encoder(golden.image)
    names = ("sam3_feat", "sam3_pos", "sam2_feat", "sam2_pos")
    found = {
        f"{name}_{level}": tensor
        for name, group in zip(names, groups, strict=True)
        for level, tensor in enumerate(group)
    }
    assert worst_error(found, golden.expected) < GOLDEN_TOLERANCE


def test_golden_sees_a_small_change(golden: Golden) -> None:
    """The control: one pixel moved by one level of a uint8 image."""
    image = golden.image.clone()
    image[:, 0, 40, 40] += 1 / 127.5
    assert worst_error(named_outputs(golden.encoder, image), golden.expected) > GOLDEN_TOLERANCE


@pytest.mark.parametrize(
    ("necks", "kind"),
    [
        (("sam3",), Sam3DualViTDetNeck),
        (("sam3", "sam2"), Sam3DualViTDetNeck),
        (("sam3", "interactive", "propagation"), Sam3TriViTDetNeck),
        (("sam2",), Sam3AnyViTDetNeck),
        (("interactive", "propagation"), Sam3AnyViTDetNeck),
        (("sam3", "sam2", "interactive"), Sam3AnyViTDetNeck),
    ],
)
def test_new_encoder_has_the_necks_of_its_config(necks: tuple[str, ...], kind: type) -> None:
    encoder = new_encoder(tiny_config(necks=necks))
    assert type(encoder) is kind
    assert tuple(encoder.necks) == necks
    assert tuple(forward_necks(encoder, torch.zeros(1, 3, 112, 112))) == necks


@pytest.mark.parametrize("necks", [("other",), ("sam3", "other"), ("sam2", "sam2")])
def test_new_encoder_refuses_other_necks(necks: tuple[str, ...]) -> None:
    with pytest.raises(NotImplementedError, match=necks[-1]):
        new_encoder(tiny_config(necks=necks))


def test_forward_necks_takes_some_necks_and_levels() -> None:
    encoder = random_encoder(tiny_config(necks=("sam3", "sam2")))
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    every, some = forward_necks(encoder, image), forward_necks(encoder, image, necks=["sam2"], levels=[3, 1])
    assert list(some) == ["sam2"]
    for kind in (0, 1):
        assert [torch.equal(*pair) for pair in zip(some["sam2"][kind], every["sam2"][kind][3::-2], strict=True)] == [
            True,
            True,
        ]


def test_sam31_has_three_levels_and_the_seeds_forward() -> None:
    encoder = Sam3TriViTDetNeck(ForeignTrunk(), PositionEmbeddingSine(12), 12)
    feats, poss, sam2_feats, sam2_poss = encoder(torch.zeros(1, 3, 64, 64))
    assert (len(feats), len(poss), sam2_feats, sam2_poss) == (3, 3, None, None)
    assert {name.partition(".")[0] for name in encoder.state_dict()} == {
        "trunk",
        "convs",
        "interactive_convs",
        "propagation_convs",
    }


def test_a_copy_at_another_size_shares_the_weights_and_leaves_the_encoder_as_it_is() -> None:
    config = tiny_config()
    encoder, alone = random_encoder(config), random_encoder(tiny_config(image_size=(56, 112)))
    small, image = encoder.at_size((56, 112)), torch.rand(1, 3, 56, 112)
    found, wanted = named_outputs(small, image), named_outputs(alone, image)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    pairs = zip(small.parameters(), encoder.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in pairs)
    with pytest.raises(ValueError, match="the trunk is set to 112x112"):  # the control: the encoder itself has its size
        encoder(image)
