"""Every rewrite is an identity: float64, each alone and all together, against the plain module."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from conftest import named_outputs, tiny_config
from torch import Tensor, nn

from export.contract.options import Rewrites
from export.graph.rewrite import (
    DeployAttention,
    DeployProjection,
    PositionTables,
    WindowMajorTrunk,
    merge_upsampling,
    rewrite,
)
from neck.checkpoint import random_encoder
from neck.necks import Sam3DualViTDetNeck
from neck.position import PositionEmbeddingSine
from neck.trunk import ViTDetTrunk

TOLERANCE = 1e-12
"""Relative L2 in float64: sums in another order give up to 1e-15 here."""

FIELDS = tuple(field.name for field in dataclasses.fields(Rewrites))
REWRITES = {
    **{name: dataclasses.replace(Rewrites.none(), **{name: True}) for name in FIELDS},
    "all": Rewrites(),
    "none": Rewrites.none(),
}
SIZES = [(112, 112), (84, 84), (112, 168), (84, 140)]
"""In windows of 4 x 4 patches: whole, padded, oblong, oblong and padded."""
WINDOW, SMALLER = 56, 42
"""Pretraining sizes whose grid is the window, and is not."""


@functools.cache
def plain(size: tuple[int, int], pretrain: int, necks: tuple[str, ...]) -> tuple[Sam3DualViTDetNeck, Tensor]:
    """A float64 encoder and an image, shared by tests that leave it as it is."""
    levels = (4.0, 2.0, 1.0, 0.5)[: 3 if len(necks) == 3 else 4]
    config = tiny_config(image_size=size, pretrain_image_size=pretrain, necks=necks, scale_factors=levels)
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return random_encoder(config).double(), image


def difference(found: Sam3DualViTDetNeck, expected: Sam3DualViTDetNeck, image: Tensor) -> float:
    """Largest relative L2 of any output."""
    one, other = named_outputs(found, image), named_outputs(expected, image)
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("pretrain", [WINDOW, SMALLER])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", REWRITES)
def test_identity(name: str, size: tuple[int, int], pretrain: int) -> None:
    encoder, image = plain(size, pretrain, ("sam3",))
    assert difference(rewrite(encoder, REWRITES[name]), encoder, image) < TOLERANCE


@pytest.mark.parametrize("name", ["merge_upsampling", "position_tables", "all"])
@pytest.mark.parametrize("necks", [("sam3", "sam2"), ("sam3", "interactive", "propagation"), ("sam2",)])
def test_identity_of_more_necks(necks: tuple[str, ...], name: str) -> None:
    encoder, image = plain((112, 112), WINDOW, necks)
    assert difference(rewrite(encoder, REWRITES[name]), encoder, image) < TOLERANCE


def test_identity_at_another_theta() -> None:
    config = tiny_config(rope_theta=100.0)
    encoder, other = random_encoder(config).double(), random_encoder(tiny_config()).double()
    image = torch.randn(1, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert difference(rewrite(encoder, Rewrites()), encoder, image) < TOLERANCE
    assert difference(rewrite(other, Rewrites()), encoder, image) > TOLERANCE  # the control: the plain theta


@pytest.mark.parametrize("size", SIZES)
def test_identity_sees_a_small_change(size: tuple[int, int]) -> None:
    """The control: one weight of one attention changed by 1e-9 of its size."""
    encoder, image = plain(size, WINDOW, ("sam3",))
    config = encoder.trunk.config
    assert not isinstance(config, Tensor | nn.Module)
    changed = random_encoder(config).double()
    changed.get_parameter("trunk.blocks.0.attn.qkv.weight")[0] *= 1 + 1e-9
    assert difference(rewrite(changed, Rewrites()), encoder, image) > TOLERANCE


@pytest.mark.parametrize(("size", "whole"), [*zip(SIZES, [True, False, True, False], strict=True)])
def test_every_rewrite_is_there(size: tuple[int, int], whole: bool) -> None:
    """That the identities above are not those of a rewrite that did nothing."""
    encoder, _ = plain(size, WINDOW, ("sam3",))
    full, none = rewrite(encoder, Rewrites()), rewrite(encoder, Rewrites.none())
    assert type(full.trunk) is (WindowMajorTrunk if whole else ViTDetTrunk)
    assert isinstance(full.get_submodule("trunk.blocks.1.attn"), DeployAttention)
    assert isinstance(full.position_encoding, PositionTables)
    assert [name for name, _ in full.convs[0].named_children()] == ["dconv_2x2_0", "gelu", "dconv_2x2_1", "conv_3x3"]
    assert [name for name, _ in full.convs[1].named_children()] == ["dconv_2x2", "conv_3x3"]
    kinds = {type(module) for module in full.modules()} - {type(module) for module in encoder.modules()}
    assert not kinds & {type(module) for module in none.modules()}


def test_scale_and_order_go_into_the_projection() -> None:
    encoder, _ = plain((112, 112), WINDOW, ("sam3",))
    attention = rewrite(encoder, Rewrites()).get_submodule("trunk.blocks.0.attn")
    assert isinstance(attention, DeployAttention)
    assert isinstance(attention.qkv, DeployProjection)
    weight, bias = attention.qkv.rewritten()
    given, given_bias = (encoder.get_parameter(f"trunk.blocks.0.attn.qkv.{kind}") for kind in ("weight", "bias"))
    assert torch.equal(weight[1], given[2] * 8**-0.5)  # q of head 0: (0, 2, 4, 6, 1, ...)
    assert torch.equal(weight[16 + 4], given[16 + 1])  # k
    assert torch.equal(bias[32:], given_bias[32:])  # v as it is
    assert attention.scale == 1.0


@pytest.mark.parametrize("name", REWRITES)
def test_the_given_encoder_is_untouched(name: str) -> None:
    config = tiny_config(necks=("sam3", "sam2"))
    encoder, image = random_encoder(config), torch.ones(1, 3, 112, 112)
    modules = [(path, id(module), type(module)) for path, module in encoder.named_modules()]
    tensors = [(path, id(value)) for path, value in (*encoder.named_parameters(), *encoder.named_buffers())]
    state = {path: value.clone() for path, value in encoder.state_dict().items()}
    before = named_outputs(encoder, image)
    rewritten = rewrite(encoder, REWRITES[name])
    named_outputs(rewritten, image)
    assert rewritten is not encoder
    assert [(path, id(module), type(module)) for path, module in encoder.named_modules()] == modules
    assert [(path, id(value)) for path, value in (*encoder.named_parameters(), *encoder.named_buffers())] == tensors
    assert all(torch.equal(value, state[path]) for path, value in encoder.state_dict().items())
    assert all(torch.equal(value, before[path]) for path, value in named_outputs(encoder, image).items())
    encoder.set_imgsz(84)  # the plain encoder goes on living
    assert rewritten.trunk.grid == (8, 8)
    assert named_outputs(rewritten, image)["sam3_feat_0"].shape == (1, 8, 32, 32)


def test_large_weights_are_shared() -> None:
    encoder, _ = plain((112, 112), WINDOW, ("sam3",))
    rewritten = rewrite(encoder, Rewrites())
    shared = {value.data_ptr() for value in encoder.parameters()}
    own = [path for path, value in rewritten.named_parameters() if value.data_ptr() not in shared]
    assert sorted(own) == [
        f"convs.{name}.{kind}" for name in ("0.dconv_2x2_1", "1.dconv_2x2") for kind in ("bias", "weight")
    ]


class ForeignTrunk(nn.Module):
    """Not ours; its one map has the grid of 14 x 14 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.channel_list = [16]
        self.patches = nn.Conv2d(3, 16, 14, 14)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.patches(images)]

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int]) -> None:
        """Takes any size."""


def test_a_foreign_trunk_is_kept() -> None:
    torch.manual_seed(0)
    encoder = Sam3DualViTDetNeck(ForeignTrunk(), PositionEmbeddingSine(8), 8, add_sam2_neck=True).double()
    rewritten = rewrite(encoder, Rewrites())
    assert rewritten.trunk is encoder.trunk
    assert rewritten.position_encoding is encoder.position_encoding
    assert not hasattr(rewritten.convs[0], "conv_1x1")
    for size in (56, 84):
        image = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert difference(rewritten, encoder, image) < TOLERANCE


def test_a_foreign_position_encoding_is_kept() -> None:
    encoder = random_encoder(tiny_config())
    encoder.position_encoding = nn.Identity()
    assert rewrite(encoder, Rewrites()).position_encoding is encoder.position_encoding


def test_levels_without_upsampling_are_kept() -> None:
    level = random_encoder(tiny_config()).convs[2]
    assert isinstance(level, nn.Sequential)
    assert merge_upsampling(level) is level


def test_position_tables_hold_one_row_and_column_per_length() -> None:
    tables = PositionTables(PositionEmbeddingSine(8), [(8, 8), (4, 6)])
    assert {name: tuple(table.shape) for name, table in tables.named_buffers()} == {
        "table_4": (4, 4),
        "table_6": (4, 6),
        "table_8": (4, 8),
    }
    x = torch.zeros(2, 3, 4, 6)
    assert torch.equal(tables(x), PositionEmbeddingSine(8)(x))
    with pytest.raises(AttributeError, match="table_5"):
        tables(torch.zeros(1, 3, 5, 8))
