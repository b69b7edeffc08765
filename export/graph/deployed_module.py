"""The module that a file computes: one input, the outputs of the signature in their order."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from export.contract.options import Rewrites
from export.contract.signature import Signature, SignatureError
from export.graph.rewrite import rewrite
from neck.checkpoint_keys import NECK_MODULES
from neck.images import PIXEL_SCALE
from neck.necks import Sam3DualViTDetNeck, shallow_copy


class DeployEncoder(nn.Module):
    """An encoder behind the file's contract; its modules keep their paths (`trunk.blocks.3`, `convs.0`).

    Args:
        encoder: the encoder, set to the signature's image size.
        signature: which outputs, and what the input holds.
        rewrites: the rewrites to apply; `Rewrites.none()` is the plain module.
    """

    def __init__(self, encoder: Sam3DualViTDetNeck, signature: Signature, rewrites: Rewrites) -> None:
        super().__init__()
        encoder = rewrite(with_head(encoder, signature), rewrites)
        self.signature = signature
        self.trunk = encoder.trunk
        self.position_encoding = encoder.position_encoding
        for neck in signature.necks:
            setattr(self, NECK_MODULES[neck], encoder.necks[neck])
        self.sam2_head = encoder.sam2_head

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """image as the signature says -> the signature's outputs."""
        if self.signature.input == "uint8":
            # to float first: TensorRT's Transpose takes no uint8
            image = (image.float() * PIXEL_SCALE - 1).permute(0, 3, 1, 2)
        x = self.trunk(image)[-1]
        outputs: list[Tensor] = []
        for neck in self.signature.necks:
            convs = cast(nn.ModuleList, getattr(self, NECK_MODULES[neck]))
            feats = [convs[level](x) for level in self.signature.levels_of(neck)]
            if self.sam2_head is not None and self.signature.has_head(neck):
                feats = [
                    self.sam2_head(level, feat)
                    for level, feat in zip(self.signature.levels_of(neck), feats, strict=True)
                ]
            outputs += feats
            if self.signature.positions == "graph":
                outputs += [self.position_encoding(feat).to(feat.dtype) for feat in feats]
        return tuple(outputs)


def with_head(encoder: Sam3DualViTDetNeck, signature: Signature) -> Sam3DualViTDetNeck:
    """The encoder with the mask decoder's convolutions where the signature has them, else without.

    Raises:
        SignatureError: they are in the signature, and not in the encoder.
    """
    wanted = signature.sam2_outputs == "head"
    if wanted and encoder.sam2_head is None:
        raise SignatureError(
            "the encoder was loaded without the mask decoder's convolutions; load it with load_encoder(sam2_head=True)"
        )
    if wanted or encoder.sam2_head is None:
        return encoder
    encoder = shallow_copy(encoder)
    encoder.sam2_head = None
    return encoder
