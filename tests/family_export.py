"""torch.onnx.export of Meta's or Ultralytics' own vision backbone, run with .families on PYTHONPATH.

python tests/family_export.py meta|ultralytics   in a folder with sam3.pt; writes FAMILY.onnx: both necks, FP32.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from family_models import SIZE, TRUNK, OnCpu, fake, load_torchvision, smaller
from torch import Tensor, nn


class Both(nn.Module):
    """Features and positions of both necks, as a script of a user names them."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, image: Tensor) -> tuple[list[Tensor], ...]:
        """image (1, 3, SIZE, SIZE) -> what the neck gives."""
        return tuple(self.neck(image))


def backbone(family: str) -> Any:
    """The package's own modules, with a tiny trunk."""
    if family == "meta":
        fake("triton", jit=lambda kernel: kernel)
        fake("triton.language", constexpr=int)
        import sam3.model_builder as builder

        del sys.modules["triton"], sys.modules["triton.language"]
        smaller(builder, "ViT", **TRUNK)
        trunk, encoding = builder._create_vit_backbone(), builder._create_position_encoding()
        return builder._create_vit_neck(encoding, trunk, enable_inst_interactivity=True)
    fake("clip")
    import ultralytics.models.sam.build_sam3 as other

    smaller(other, "ViT", **TRUNK)
    return other._create_vision_backbone()


if __name__ == "__main__":
    load_torchvision()
    name = sys.argv[1]
    with OnCpu(), torch.no_grad():
        neck = backbone(name).eval()
        state = torch.load("sam3.pt", weights_only=True)["model"]
        prefix = "detector.backbone.vision_backbone."
        missing = neck.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()}, strict=False)
        assert not [key for key in missing.missing_keys if not key.endswith("freqs_cis")], missing
        image = torch.zeros(1, 3, SIZE, SIZE)
        program = torch.onnx.export(Both(neck).eval(), (image,), dynamo=True, verbose=False)
    assert program is not None
    program.save(f"{name}.onnx", external_data=True)
