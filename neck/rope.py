"""Axial rotary position embedding with real numbers (RoPE, Su et al. 2021, along two axes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neck.config import ROPE_THETA


def axial_angles(
    height: int, width: int, head_dim: int, scale: tuple[float, float] = (1.0, 1.0), theta: float = ROPE_THETA
) -> Tensor:
    """Angle by which each pair of channels turns at each token.

    The first half of the pairs turns with the column x, the second with the row y; pair i of either half has the
    frequency theta^(-4i / head_dim).

    Args:
        height, width: grid in tokens.
        head_dim: channels of a head, a multiple of 4.
        scale: factor on the coordinate of (rows, columns); window / grid in global blocks, 1 in windowed ones.
        theta: base of the frequencies.

    Returns:
        float64 (height * width, head_dim / 2), tokens in row-major order.
    """
    # on the CPU whatever the default device: a module made on `meta` still has real tables
    exponent = torch.arange(0, head_dim, 4, dtype=torch.float64, device="cpu") / head_dim
    frequency = theta**-exponent  # (head_dim / 4,)
    rows = torch.arange(height, dtype=torch.float64, device="cpu") * scale[0]
    columns = torch.arange(width, dtype=torch.float64, device="cpu") * scale[1]
    by_column = (columns[:, None] * frequency).expand(height, width, -1)
    by_row = (rows[:, None, None] * frequency).expand(height, width, -1)
    return torch.cat((by_column, by_row), dim=-1).flatten(0, 1)


class Rotary(nn.Module):
    """Rotates interleaved pairs of channels; a module without weights, so that its path names the graph's nodes."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the pairs (2i, 2i + 1) of x (..., N, D) by the angles of cos, sin (N, D / 2), in their dtype."""
        even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
        return turned.flatten(-2).to(x.dtype)
