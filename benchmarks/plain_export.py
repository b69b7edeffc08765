"""What a user would write without this package: torch.onnx.export of the unrewritten module, saved in FP32."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from neck.checkpoint import load_encoder
from neck.necks import Sam3DualViTDetNeck


class OneNeck(nn.Module):
    """Features and positions of the sam3 neck."""

    def __init__(self, encoder: Sam3DualViTDetNeck) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """image (B, 3, H, W) -> (features, positions)."""
        return self.encoder.sam_forward_feature_levels(self.encoder.trunk(image)[-1], self.encoder.convs)


def plain_export(checkpoint: Path, output: Path, opset: int = 20) -> None:
    """Exports a checkpoint's sam3 neck at 1008 x 1008."""
    module = OneNeck(load_encoder(checkpoint)).eval()
    image = torch.zeros(1, 3, 1008, 1008)
    with torch.no_grad():
        program = torch.onnx.export(module, (image,), dynamo=True, opset_version=opset, verbose=False)
    assert program is not None
    program.save(output, external_data=True)


if __name__ == "__main__":
    plain_export(Path(sys.argv[1]), Path(sys.argv[2]))
