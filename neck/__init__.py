"""The SAM 3 image encoder in plain PyTorch: trunk, necks, checkpoints, images.

Names are imported when they are asked for, so that `neck.config` and what stands on it alone does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neck.config import ConfigError, EncoderConfig
    from neck.necks import Sam3AnyViTDetNeck, Sam3DualViTDetNeck, Sam3TriViTDetNeck
    from neck.position import PositionEmbeddingSine
    from neck.trunk import ViTDetTrunk

_HOMES = {
    "ConfigError": "neck.config",
    "EncoderConfig": "neck.config",
    "PositionEmbeddingSine": "neck.position",
    "Sam3AnyViTDetNeck": "neck.necks",
    "Sam3DualViTDetNeck": "neck.necks",
    "Sam3TriViTDetNeck": "neck.necks",
    "ViTDetTrunk": "neck.trunk",
}

__all__ = [
    "ConfigError",
    "EncoderConfig",
    "PositionEmbeddingSine",
    "Sam3AnyViTDetNeck",
    "Sam3DualViTDetNeck",
    "Sam3TriViTDetNeck",
    "ViTDetTrunk",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
