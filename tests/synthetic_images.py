"""Images that tests make themselves; what imports this needs no client of Triton's."""

from __future__ import annotations

import numpy as np
import torch


def images_of(seed: int, count: int, size: int = 112) -> np.ndarray:
    """Smooth random images, no two alike: uint8 (count, size, size, 3)."""
    coarse = torch.rand((count, 3, 7, 7), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
