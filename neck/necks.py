"""The ViTDet necks: one trunk map in, feature maps at up to four scales with sine positions out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

from torch import Tensor, nn

from neck.checkpoint_keys import NECK_MODULES
from neck.config import HEAD_PARTS, LEVEL_SCALES, EncoderConfig
from neck.position import PositionEmbeddingSine
from neck.trunk import ViTDetTrunk

Module = TypeVar("Module", bound=nn.Module)
Outputs = tuple[list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor] | None]


def level_convs(scale: float, channels: int, d_model: int) -> nn.Sequential:
    """The convolutions of one level: (B, channels, H, W) -> (B, d_model, scale H, scale W).

    Raises:
        NotImplementedError: a scale other than 4, 2, 1 and 0.5.
    """
    convs = nn.Sequential()
    out = channels
    if scale == 4.0:
        convs.add_module("dconv_2x2_0", nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        convs.add_module("gelu", nn.GELU())
        convs.add_module("dconv_2x2_1", nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2))
        out = channels // 4
    elif scale == 2.0:
        convs.add_module("dconv_2x2", nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2))
        out = channels // 2
    elif scale == 0.5:
        convs.add_module("maxpool_2x2", nn.MaxPool2d(kernel_size=2, stride=2))
    elif scale != 1.0:
        raise NotImplementedError(f"the scale factor {scale} is not supported; use 4.0, 2.0, 1.0 or 0.5")
    convs.add_module("conv_1x1", nn.Conv2d(out, d_model, kernel_size=1))
    convs.add_module("conv_3x3", nn.Conv2d(d_model, d_model, kernel_size=3, padding=1))
    return convs


class Sam2Head(nn.Module):
    """The first step of SAM 2's mask decoder for the two finer levels of its neck: a 1x1 convolution each.

    Args:
        d_model: channels of every feature map.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.conv_s0, self.conv_s1 = (nn.Conv2d(d_model, d_model // part, kernel_size=1) for part in HEAD_PARTS)

    def forward(self, level: int, feat: Tensor) -> Tensor:
        """A level's map (B, d_model, H, W) -> what the decoder reads: d_model/8 and d_model/4 channels, then all."""
        convs = (self.conv_s0, self.conv_s1)
        return convs[level](feat) if level < len(convs) else feat


class Sam3DualViTDetNeck(nn.Module):
    """A trunk with SAM 3's neck and, for the tracker, SAM 2's neck of the same shape.

    Args:
        trunk: any module with `channel_list`, `set_imgsz` and a forward whose last entry is (B, C, H, W).
        position_encoding: maps a feature map (B, C, H, W) to its positions (B, d_model, H, W).
        d_model: channels of every feature map.
        scale_factors: scale of each level against the trunk's grid, finest first.
        add_sam2_neck: whether to add the second neck.

    Raises:
        NotImplementedError: a scale factor other than 4, 2, 1 and 0.5.
    """

    def __init__(
        self,
        trunk: nn.Module,
        position_encoding: nn.Module,
        d_model: int,
        scale_factors: Sequence[float] = LEVEL_SCALES,
        add_sam2_neck: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.position_encoding = position_encoding
        self.scale_factors = scale_factors
        self.convs = self._new_convs(d_model)
        self.sam2_convs = self._new_convs(d_model) if add_sam2_neck else None
        self.sam2_head: Sam2Head | None = None  # no part of the forward; see new_encoder

    def _new_convs(self, d_model: int) -> nn.ModuleList:
        channels: int = self.trunk.channel_list[-1]  # type: ignore[index,assignment]
        return nn.ModuleList(level_convs(scale, channels, d_model) for scale in self.scale_factors)

    @property
    def necks(self) -> dict[str, nn.ModuleList]:
        """The convolutions of each neck by the neck's name, in the order of the file's outputs."""
        necks = {"sam3": self.convs}
        if self.sam2_convs is not None:
            necks["sam2"] = self.sam2_convs
        return necks

    def forward(self, images: Tensor) -> Outputs:
        """images (B, 3, H, W), normalized -> (sam3_feats, sam3_poss, sam2_feats, sam2_poss), finest level first."""
        x = self.trunk(images)[-1]
        sam3 = self.sam_forward_feature_levels(x, self.convs)
        sam2 = self.sam_forward_feature_levels(x, self.sam2_convs) if self.sam2_convs is not None else (None, None)
        return *sam3, *sam2

    def sam_forward_feature_levels(self, x: Tensor, convs: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
        """Runs one neck on the trunk's map x (B, C, H, W); each position takes its feature's dtype."""
        feats = [conv(x) for conv in convs]
        return feats, [self.position_encoding(feat).to(feat.dtype) for feat in feats]

    def set_imgsz(self, imgsz: int | tuple[int, int] | list[int] = (1008, 1008)) -> None:
        """Sets the trunk's image size in pixels."""
        self.trunk.set_imgsz(imgsz)  # type: ignore[operator]

    def at_size(self, imgsz: int | tuple[int, int] | list[int]) -> Sam3DualViTDetNeck:
        """A copy that is set to another image size and shares all modules below the trunk; this one stays as it is.

        Of a foreign trunk, `set_imgsz` must change the trunk's own attributes and buffers alone, as ViTDetTrunk's does.
        """
        twin, trunk = shallow_copy(self), shallow_copy(self.trunk)
        twin.trunk = trunk
        twin.set_imgsz(imgsz)
        return twin


def shallow_copy(module: Module) -> Module:
    """A module with its own registry of children and buffers, the children, weights and buffers being shared."""
    twin = copy.copy(module)
    twin._modules = module._modules.copy()
    twin._buffers = module._buffers.copy()
    return twin


class Sam3AnyViTDetNeck(Sam3DualViTDetNeck):
    """A trunk with any set of necks, such as a tracker's `sam2` alone or some of SAM 3.1's.

    The forward of the seed knows `sam3` and `sam2`; the others are reached through `necks` and `forward_necks`.
    Without `sam3` the module `convs` is there and empty, so that forward's first two lists are empty too.

    Args:
        trunk, position_encoding, d_model, scale_factors: as in Sam3DualViTDetNeck.
        necks: names of the necks, keys of NECK_MODULES.
    """

    def __init__(
        self,
        trunk: nn.Module,
        position_encoding: nn.Module,
        d_model: int,
        scale_factors: Sequence[float] = LEVEL_SCALES,
        necks: Sequence[str] = ("sam2",),
    ) -> None:
        super().__init__(trunk, position_encoding, d_model, scale_factors, add_sam2_neck="sam2" in necks)
        self._neck_names = tuple(necks)
        if "sam3" not in necks:
            self.convs = nn.ModuleList()
        for name in necks:
            if name not in ("sam3", "sam2"):
                setattr(self, NECK_MODULES[name], self._new_convs(d_model))

    @property
    def necks(self) -> dict[str, nn.ModuleList]:
        """The convolutions of each neck by the neck's name."""
        return {name: cast(nn.ModuleList, getattr(self, NECK_MODULES[name])) for name in self._neck_names}


class Sam3TriViTDetNeck(Sam3AnyViTDetNeck):
    """SAM 3.1's arrangement: necks `sam3`, `interactive` and `propagation`, three levels each."""

    def __init__(
        self,
        trunk: nn.Module,
        position_encoding: nn.Module,
        d_model: int,
        scale_factors: Sequence[float] = LEVEL_SCALES[:3],
    ) -> None:
        super().__init__(trunk, position_encoding, d_model, scale_factors, ("sam3", "interactive", "propagation"))


def forward_necks(
    encoder: Sam3DualViTDetNeck,
    images: Tensor,
    necks: Iterable[str] | None = None,
    levels: Sequence[int] | None = None,
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Runs the named necks, by default all that the encoder has, at the given levels, by default all.

    Returns:
        Name -> (features, positions), finest level first; each (B, d_model, scale H, scale W).
    """
    x = encoder.trunk(images)[-1]
    outputs = {}
    for name in encoder.necks if necks is None else necks:
        convs = encoder.necks[name]
        chosen = convs if levels is None else [convs[level] for level in levels]
        outputs[name] = encoder.sam_forward_feature_levels(x, chosen)
    return outputs


def new_encoder(config: EncoderConfig) -> Sam3DualViTDetNeck:
    """Builds the encoder of a config with untrained weights, and the mask decoder's convolutions where it has them.

    Raises:
        NotImplementedError: a neck that is not known, or is named twice.
    """
    encoder = _with_necks(config)
    if config.sam2_head:
        encoder.sam2_head = Sam2Head(config.d_model)
    return encoder


def _with_necks(config: EncoderConfig) -> Sam3DualViTDetNeck:
    trunk, position = ViTDetTrunk(config), PositionEmbeddingSine(config.d_model)
    if config.necks in (("sam3",), ("sam3", "sam2")):
        with_sam2 = "sam2" in config.necks
        return Sam3DualViTDetNeck(trunk, position, config.d_model, config.scale_factors, with_sam2)
    if config.necks == ("sam3", "interactive", "propagation"):
        return Sam3TriViTDetNeck(trunk, position, config.d_model, config.scale_factors)
    if len(set(config.necks) & set(NECK_MODULES)) < len(config.necks):
        raise NotImplementedError(
            f"these necks are not supported: {config.necks}; use {', '.join(NECK_MODULES)}, each at most once"
        )
    return Sam3AnyViTDetNeck(trunk, position, config.d_model, config.scale_factors, config.necks)
