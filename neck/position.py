"""Sine position encoding of a feature map; it depends on the map's shape alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionEmbeddingSine(nn.Module):
    """The sine encoding of DETR (Carion et al. 2020) with normalized coordinates.

    Channels are the row's encoding, then the column's. Each is separable, so two small tables hold all of it.

    Args:
        num_pos_feats: channels of the encoding, half for y and half for x; a multiple of 4.
        temperature: base of the geometric series of wavelengths.
    """

    def __init__(self, num_pos_feats: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if num_pos_feats % 4:
            raise ValueError(
                f"num_pos_feats is {num_pos_feats}, but the sine position encoding needs a multiple of 4; pass "
                "another number"
            )
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        # a table made on the CPU in every run is copied to a GPU in every run, and the run waits for it
        self._tables: dict[tuple[int, str], Tensor] = {}

    def table(self, length: int, device: torch.device | None = None) -> Tensor:
        """Encoding of the coordinates 1..length along one axis: float64 (num_pos_feats / 2, length)."""
        channels = self.num_pos_feats // 2
        coordinate = torch.arange(1, length + 1, dtype=torch.float64, device=device) / (length + 1e-6) * (2 * math.pi)
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        angle = coordinate[None, :] / self.temperature ** exponent[:, None]  # (channels / 2, length)
        return torch.stack((angle.sin(), angle.cos()), dim=1).flatten(0, 1)  # sin and cos interleaved

    def forward(self, x: Tensor) -> Tensor:
        """Returns float32 (B, num_pos_feats, H, W) for a feature map x (B, C, H, W)."""
        batch, _, height, width = x.shape
        rows = self._kept(height, x.device)[:, :, None].expand(-1, -1, width)
        columns = self._kept(width, x.device)[:, None, :].expand(-1, height, -1)
        return torch.cat((rows, columns)).expand(batch, -1, -1, -1)

    def _kept(self, length: int, device: torch.device) -> Tensor:
        """The table in float32 on a device, made once; an exported graph makes its own, whatever ran before."""
        key = (length, str(device))
        # inside torch.compile torch 2.10 says that it is exporting, too
        exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
        if exporting or key not in self._tables:
            table = self.table(length, device).to(torch.float32)
            if torch.compiler.is_compiling() or type(table) is not Tensor:  # a trace's own
                return table
            self._tables[key] = table
        return self._tables[key]
