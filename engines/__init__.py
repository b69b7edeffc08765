"""From the ONNX file to a TensorRT engine, verified, profiled and deployed.

`build_engine` is imported when it is asked for, so that modules of this package that need no torch load none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engines.api import build_engine

__all__ = ["build_engine"]


def __getattr__(name: str) -> object:
    if name == "build_engine":
        from engines.api import build_engine

        return build_engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
