"""The SAM 3 image encoder in plain PyTorch: trunk, necks, checkpoints, pictures."""

from neck.config import ConfigError, EncoderConfig
from neck.necks import Sam3DualViTDetNeck, Sam3TriViTDetNeck
from neck.position import PositionEmbeddingSine
from neck.trunk import ViTDetTrunk

__all__ = [
    "ConfigError",
    "EncoderConfig",
    "PositionEmbeddingSine",
    "Sam3DualViTDetNeck",
    "Sam3TriViTDetNeck",
    "ViTDetTrunk",
]
