"""The trunk against a second implementation: float64, complex rotary, windows one by one."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from torch import Tensor

from neck.checkpoint import random_encoder
from neck.config import ConfigError, EncoderConfig
from neck.rope import Rotary, axial_angles
from neck.trunk import ViTDetTrunk, cut_windows, join_windows

TOLERANCE = 1e-6
"""Relative L2 of the float64 module, whose rotary tables are FP32 values (rounded by up to 6e-8)."""
TABLE_TOLERANCE = 1e-12
"""Absolute, of float64 cosines and sines of angles below 100."""


def new_trunk(config: EncoderConfig) -> ViTDetTrunk:
    trunk = random_encoder(config).trunk
    assert isinstance(trunk, ViTDetTrunk)
    return trunk


def turns(height: int, width: int, head_dim: int, scale_y: float, scale_x: float) -> Tensor:
    """The rotary factors e^(i angle), token by token: complex (height * width, head_dim / 2)."""
    pairs = head_dim // 4
    frequencies = [10000.0 ** (-4 * index / head_dim) for index in range(pairs)]
    rows = []
    for y in range(height):
        for x in range(width):
            angles = [x * scale_x * f for f in frequencies] + [y * scale_y * f for f in frequencies]
            rows.append([cmath.exp(1j * angle) for angle in angles])
    return torch.tensor(rows, dtype=torch.complex128)


def attend(x: Tensor, state: dict[str, Tensor], prefix: str, heads: int, factors: Tensor) -> Tensor:
    """One attention over x (N, C), head by head, with rotary by complex multiplication."""
    dim = x.shape[1] // heads
    query, key, value = (x @ state[f"{prefix}.qkv.weight"].T + state[f"{prefix}.qkv.bias"]).chunk(3, dim=1)
    mixed = []
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        q, k = (
            torch.view_as_real(torch.view_as_complex(whole[:, part].reshape(-1, dim // 2, 2)) * factors).flatten(1)
            for whole in (query, key)
        )
        mixed.append(torch.softmax(q @ k.T / math.sqrt(dim), dim=1) @ value[:, part])
    return torch.cat(mixed, dim=1) @ state[f"{prefix}.proj.weight"].T + state[f"{prefix}.proj.bias"]


def attend_windows(
    normed: Tensor, state: dict[str, Tensor], prefix: str, config: EncoderConfig, pad: float = 0.0
) -> Tensor:
    """Windowed attention over the grid (H, W, C): every window filled up at the bottom and right."""
    height, width, channels = normed.shape
    side = config.window_size
    factors = turns(side, side, config.head_dim, 1, 1)
    attended = torch.empty_like(normed)
    for top in range(0, height, side):
        for left in range(0, width, side):
            cut = normed[top : top + side, left : left + side]
            window = torch.full((side, side, channels), pad, dtype=normed.dtype)
            window[: cut.shape[0], : cut.shape[1]] = cut
            result = attend(window.flatten(0, 1), state, prefix, config.num_heads, factors).view(side, side, channels)
            attended[top : top + side, left : left + side] = result[: cut.shape[0], : cut.shape[1]]
    return attended


def reference(trunk: ViTDetTrunk, images: Tensor, size: tuple[int, int], pad: float = 0.0) -> Tensor:
    """What a trunk of these weights gives for images (B, 3, *size): (B, C, H, W)."""
    config, state = trunk.config, {name: tensor.double() for name, tensor in trunk.state_dict().items()}
    patch, channels = config.patch_size, config.embed_dim
    height, width = size[0] // patch, size[1] // patch
    side = config.pretrain_grid
    trained = state["pos_embed"][0, 1:].view(side, side, channels)
    global_factors = turns(height, width, config.head_dim, config.window_size / height, config.window_size / width)

    def norm(x: Tensor, name: str) -> Tensor:
        spread = (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * state[f"{name}.weight"] + state[f"{name}.bias"]

    maps = []
    for image in images.double():
        patches = F.unfold(image[None], patch, stride=patch)[0].T  # (H * W, 3 * patch * patch)
        x = (patches @ state["patch_embed.proj.weight"].flatten(1).T).view(height, width, channels)
        for y in range(height):
            for column in range(width):
                x[y, column] += trained[y % side, column % side]
        x = norm(x, "ln_pre")
        for index in range(config.depth):
            block = f"blocks.{index}"
            normed = norm(x, f"{block}.norm1")
            if index in config.global_blocks:
                flat = attend(normed.flatten(0, 1), state, f"{block}.attn", config.num_heads, global_factors)
                x = x + flat.view_as(x)
            else:
                x = x + attend_windows(normed, state, f"{block}.attn", config, pad)
            hidden = norm(x, f"{block}.norm2") @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + hidden @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
        maps.append(x.permute(2, 0, 1))
    return torch.stack(maps)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


SIZES = [(112, 112), (84, 84), (112, 168), (84, 140), (28, 56), (14, 14)]
"""In windows of 4 x 4 patches: whole, padded, oblong, oblong and padded, smaller than a window, one patch."""


@pytest.mark.parametrize("pretrain", [56, 42])
@pytest.mark.parametrize("size", SIZES)
def test_parity(size: tuple[int, int], pretrain: int) -> None:
    trunk = new_trunk(tiny_config(image_size=size, pretrain_image_size=pretrain)).double()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        (found,) = trunk(images)
    expected = reference(trunk, images, size)
    assert found.shape == expected.shape == (2, 16, size[0] // 14, size[1] // 14)
    assert relative(found, expected) < TOLERANCE


def test_parity_sees_the_padding_and_the_axes() -> None:
    """The controls: windows padded with 1e-2, an image turned, and one weight changed by 1e-3."""
    size = (84, 140)
    trunk = new_trunk(tiny_config(image_size=size)).double()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        (found,) = trunk(images)
    assert relative(found, reference(trunk, images, size, pad=1e-2)) > 10 * TOLERANCE
    turned = reference(trunk, images.transpose(2, 3), (size[1], size[0])).transpose(2, 3)
    assert relative(found, turned) > 0.1
    with torch.no_grad():
        trunk.get_parameter("blocks.0.attn.qkv.weight")[0, 0] += 1e-3
    assert relative(found, reference(trunk, images, size)) > 10 * TOLERANCE


@pytest.mark.parametrize("size", [(4, 4), (6, 6), (3, 5), (5, 3)])
def test_rotary_tables(size: tuple[int, int]) -> None:
    scale = (4 / size[0], 4 / size[1])
    angles = axial_angles(*size, 16, scale)
    assert angles.dtype == torch.float64
    expected = turns(*size, 16, *scale)
    assert (torch.polar(torch.ones_like(angles), angles) - expected).abs().max() < TABLE_TOLERANCE
    exchanged = turns(*size, 16, *scale).view(*size, 8).roll(4, dims=-1).flatten(0, 1)  # rows first: the control
    assert (torch.polar(torch.ones_like(angles), angles) - exchanged).abs().max() > 0.1


@pytest.mark.parametrize("side", [4, 6])
def test_rotary_tables_of_square_grids_are_upstreams(side: int) -> None:
    """Meta's formula for a square grid: token t lies at x = t mod side, y = t div side, times 4 / side."""
    token = torch.arange(side * side, dtype=torch.float64)
    frequency = 1.0 / 10000.0 ** (torch.arange(0, 16, 4, dtype=torch.float64) / 16)
    x, y = (token % side) * 4 / side, token.div(side, rounding_mode="floor") * 4 / side
    expected = torch.cat((torch.outer(x, frequency), torch.outer(y, frequency)), dim=1)
    assert (axial_angles(side, side, 16, (4 / side, 4 / side)) - expected).abs().max() < TABLE_TOLERANCE


def test_an_oblong_grid_scales_each_axis_by_its_own_length() -> None:
    trunk = new_trunk(tiny_config(image_size=(56, 112)))
    corner = trunk.global_cos.view(4, 8, -1)[2, 6]  # (y, x) = (2, 6) of (4, 8) lies at (2, 3) of the 4 x 4 window
    frequency = 10000.0 ** -(torch.arange(0, 8, 4) / 8)
    assert torch.allclose(corner, torch.cat((3 * frequency, 2 * frequency)).cos(), atol=1e-6)
    assert not torch.allclose(corner, torch.cat((6 * frequency, 2 * frequency)).cos(), atol=1e-6)  # the control


def test_rotary_turns_interleaved_pairs() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    cos, sin = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.8, 0.6]])
    assert torch.allclose(Rotary()(x, cos, sin), torch.tensor([[0.6, 0.8, -0.6, 0.8]]))
    low = Rotary()(x.half(), cos, sin)
    assert low.dtype == torch.float16


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (3, 3)])
def test_windows_come_back(size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 3, generator=torch.Generator().manual_seed(0))
    windows = cut_windows(x, 4)
    assert windows.shape == (2 * math.ceil(size[0] / 4) * math.ceil(size[1] / 4), 16, 3)
    assert windows.ne(0).sum() == x.ne(0).sum()  # nothing but zeros was added
    assert torch.equal(join_windows(windows, 4, *size), x)


def test_windows_do_not_mix_images() -> None:
    x = torch.stack((torch.zeros(8, 8, 1), torch.ones(8, 8, 1)))
    assert cut_windows(x, 4)[:, :, 0].mean(1).tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("given", [84, (84, 84), [84, 84]])
def test_set_imgsz(given: Any) -> None:
    trunk = new_trunk(tiny_config())
    fresh = new_trunk(tiny_config(image_size=84))
    trunk.set_imgsz(given)
    images = torch.randn(1, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    assert trunk.grid == (6, 6)
    assert torch.equal(trunk(images)[0], fresh(images)[0])
    trunk.set_imgsz(112)
    with pytest.raises(ValueError, match=r"84x84 pixels, but the trunk is set to 112x112; call set_imgsz"):
        trunk(images)


def test_set_imgsz_has_the_published_default() -> None:
    trunk = new_trunk(tiny_config(embed_dim=8, num_heads=1, depth=1, global_blocks=()))
    trunk.set_imgsz()
    assert trunk.grid == (72, 72)


@pytest.mark.parametrize(
    ("size", "said"), [(100, "98 and 112"), (0, "at least"), (-14, "at least"), ((112, 99), "98"), (14_000, "GB")]
)
def test_set_imgsz_refuses(size: Any, said: str) -> None:
    trunk = new_trunk(tiny_config())
    with pytest.raises(ConfigError, match=said):
        trunk.set_imgsz(size)
    assert trunk.grid == (8, 8)  # as it was


def test_tables_are_not_saved() -> None:
    assert not [name for name in new_trunk(tiny_config()).state_dict() if "cos" in name or "sin" in name]
