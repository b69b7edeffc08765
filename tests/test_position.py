"""The sine positions against DETR's formula, written a second time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neck.position import PositionEmbeddingSine

TOLERANCE = 1e-6
"""Values of at most 1, computed in float64 and rounded to FP32: half an ulp is 6e-8."""


def reference(channels: int, height: int, width: int) -> Tensor:
    """DETR's formula, pixel by pixel, in float64: (channels, height, width)."""
    half = channels // 2
    position = torch.empty(channels, height, width, dtype=torch.float64)
    for channel in range(half):
        wave = math.sin if channel % 2 == 0 else math.cos
        divisor = 10000.0 ** (2 * (channel // 2) / half)
        for y in range(height):
            position[channel, y, :] = wave((y + 1) / (height + 1e-6) * 2 * math.pi / divisor)
        for x in range(width):
            position[half + channel, :, x] = wave((x + 1) / (width + 1e-6) * 2 * math.pi / divisor)
    return position


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (5, 9), (9, 5)])
@pytest.mark.parametrize("channels", [4, 16, 256])
def test_values(channels: int, size: tuple[int, int]) -> None:
    found = PositionEmbeddingSine(channels)(torch.zeros(1, 3, *size))
    assert found.shape == (1, channels, *size)
    assert error(found[0], reference(channels, *size)) < TOLERANCE


def test_axes_are_not_exchangeable() -> None:
    """The control: the column's encoding put first is far away."""
    found = PositionEmbeddingSine(16)(torch.zeros(1, 3, 5, 9))[0]
    assert error(torch.cat((found[8:], found[:8])), reference(16, 5, 9)) > 0.1


def test_every_image_of_a_batch_has_the_same() -> None:
    found = PositionEmbeddingSine(8)(torch.randn(3, 2, 4, 6))
    assert found.shape == (3, 8, 4, 6)
    assert torch.equal(found[0], found[2])


def test_it_depends_on_the_shape_alone() -> None:
    encoding = PositionEmbeddingSine(8)
    low = encoding(torch.full((1, 2, 4, 6), torch.nan, dtype=torch.float16))
    assert low.dtype == torch.float32
    assert torch.equal(low, encoding(torch.zeros(1, 2, 4, 6)))
    assert not torch.equal(low[..., :5], encoding(torch.zeros(1, 2, 4, 5)))  # the control


def test_the_temperature_is_used() -> None:
    found = PositionEmbeddingSine(16, temperature=20.0)(torch.zeros(1, 3, 6, 6))
    assert error(found[0], reference(16, 6, 6)) > 0.1


@pytest.mark.parametrize("channels", [2, 6, 255])
def test_channels_come_in_fours(channels: int) -> None:
    with pytest.raises(ValueError, match=f"num_pos_feats is {channels}"):
        PositionEmbeddingSine(channels)


def test_a_table_is_made_once_for_each_length_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in every run it costs the plain module alone, on a GPU by a copy that waits."""
    encoding, made = PositionEmbeddingSine(8), []
    table = PositionEmbeddingSine.table

    def counted(own: PositionEmbeddingSine, length: int, device: torch.device) -> Tensor:
        made.append((length, device.type))
        return table(own, length, device)

    monkeypatch.setattr(PositionEmbeddingSine, "table", counted)
    first = encoding(torch.zeros(1, 2, 4, 6))
    assert torch.equal(first, encoding(torch.zeros(1, 2, 4, 6)))
    assert made == [(4, "cpu"), (6, "cpu")]
    encoding(torch.zeros(1, 2, 4, 6, device="meta"))
    assert made[2:] == [(4, "meta"), (6, "meta")]


def test_an_exported_graph_does_not_depend_on_what_ran_before() -> None:
    x = torch.zeros(1, 2, 4, 6)
    fresh, used = PositionEmbeddingSine(8), PositionEmbeddingSine(8)
    expected = used(x)
    graphs = [torch.export.export(one, (x,)) for one in (fresh, used)]
    assert str(graphs[0].graph) == str(graphs[1].graph) and not graphs[1].constants
    assert torch.equal(fresh(x), expected)  # and leaves no tensor of its own behind
    with FakeTensorMode():
        PositionEmbeddingSine.forward(fake := PositionEmbeddingSine(8), torch.zeros(1, 2, 4, 6))
    assert not fake._tables
