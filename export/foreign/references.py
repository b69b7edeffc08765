"""Everything that the plain encoder gives on some images, by the names that a file of ours would use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from export.verification.verify import exact_fp32
from neck.config import HEAD_PARTS
from neck.necks import Sam3DualViTDetNeck
from neck.trunk import ViTDetTrunk

Arrays = dict[str, np.ndarray]

TRUNK = "trunk"
"""The name of the trunk's own map (B, embed_dim, H, W)."""


def encoder_tensors(encoder: Sam3DualViTDetNeck, images: np.ndarray) -> Arrays:
    """Runs the plain module in FP32, without TF32, where its weights lie.

    Args:
        encoder: the plain encoder, set to the images' size.
        images: float32 (B, 3, H, W), normalized.

    Returns:
        `sam3_feat_0` and so on of every neck, its positions, `sam2_high_res_0` and `_1` where the encoder has the mask
        decoder's convolutions, and `trunk`: float32, each (B, channels, h, w).
    """
    found: dict[str, Any] = {}
    with exact_fp32(), torch.inference_mode():
        given = torch.from_numpy(np.ascontiguousarray(images)).to(next(encoder.parameters()).device)
        found[TRUNK] = encoder.trunk(given)[-1]
        for neck, convs in encoder.necks.items():
            feats, positions = encoder.sam_forward_feature_levels(found[TRUNK], convs)
            found |= {f"{neck}_feat_{level}": feat for level, feat in enumerate(feats)}
            found |= {f"{neck}_pos_{level}": position for level, position in enumerate(positions)}
            if neck == "sam2" and encoder.sam2_head is not None:
                for level in range(len(HEAD_PARTS)):
                    found[f"sam2_high_res_{level}"] = encoder.sam2_head(level, feats[level])
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def patch_embedding(encoder: Sam3DualViTDetNeck, images: np.ndarray) -> np.ndarray:
    """What the patch projection gives of float32 images (B, 3, H, W): (B, embed_dim, h, w)."""
    project = cast(ViTDetTrunk, encoder.trunk).patch_embed.proj
    with exact_fp32(), torch.inference_mode():
        given = torch.from_numpy(np.ascontiguousarray(images)).to(project.weight.device)
        found: np.ndarray = project(given).float().cpu().numpy()
        return found


def describe(name: str) -> str:
    """What a tensor is, in words: `level 2 of neck sam3`."""
    if name == TRUNK:
        return "the trunk's feature map"
    neck, kind, level = parts(name)
    if kind == "pos":
        return f"the position encoding of level {level}"
    return f"level {level} of neck {neck}" + (" after the mask decoder's convolution" if kind == "high_res" else "")


def parts(name: str) -> tuple[str, str, int]:
    """Neck, kind and level of a name such as `sam2_high_res_0`."""
    neck, _, rest = name.partition("_")
    kind, _, level = rest.rpartition("_")
    return neck, kind, int(level)


def only_needed(tensors: Mapping[str, np.ndarray]) -> Arrays:
    """Without the positions that several necks share: those of the first neck stay."""
    first = next((parts(name)[0] for name in tensors if "_pos_" in name), "")
    return {name: array for name, array in tensors.items() if "_pos_" not in name or name.startswith(f"{first}_")}
