"""From the encoder in PyTorch to an ONNX file that is proved equal to it.

`export_encoder` is imported when it is asked for, so that modules of this package that need no torch load none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.api import export_encoder

__all__ = ["export_encoder"]


def __getattr__(name: str) -> object:
    if name == "export_encoder":
        from export.api import export_encoder

        return export_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
