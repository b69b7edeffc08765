"""Which Triton container carries which TensorRT and ONNX Runtime, and whether it can serve a file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from engines.service.served_model import Source, TritonError

TENSORRT = {
    "24.05": "10.0.1",
    "24.07": "10.2.0",
    "24.08": "10.3.0",
    "24.12": "10.7.0",
    "25.01": "10.8.0",
    "25.06": "10.11.0",
    "25.08": "10.13.2",
    "25.09": "10.13.3",
    "25.11": "10.14.1",
    "25.12": "10.14.1",
    "26.07": "11.1.0",
}
"""TensorRT of Triton's containers, as far as it could be read on 2026-11-22.

NVIDIA's own list (docs.nvidia.com/deeplearning/frameworks/support-matrix) was out of reach. The versions are what
public projects wrote of nvcr.io/nvidia/tensorrt of the same month, which has the TensorRT of Triton's container (said
by a maintainer in triton-inference-server/server issue 5812); months with contradicting or no statements are left
out. The table in Triton's docs/introduction/compatibility.md is of the `trtllm` images, whose TensorRT is another.
"""

ONNX_RUNTIME = {
    "24.04": "1.17.3",
    "24.05": "1.18.0",
    "24.06": "1.18.0",
    "24.07": "1.18.1",
    "24.08": "1.18.1",
    "24.09": "1.19.2",
    "24.10": "1.19.2",
    "24.11": "1.19.2",
    "24.12": "1.20.1",
    "25.01": "1.20.1",
    "25.02": "1.20.1",
    "25.03": "1.21.0",
    "25.04": "1.21.0",
    "25.05": "1.22.0",
    "25.06": "1.22.0",
    "25.07": "1.22.0",
    "25.08": "1.23.0",
    "25.09": "1.23.0",
    "25.10": "1.23.1",
    "25.11": "1.23.2",
    "25.12": "1.23.2",
    "26.01": "1.23.2",
    "26.02": "1.24.1",
    "26.03": "1.24.2",
    "26.04": "1.24.4",
    "26.05": "1.24.4",
    "26.06": "1.24.4",
    "26.07": "1.27.0",
}
"""ONNX Runtime of Triton's containers: triton-inference-server/server, docs/introduction/compatibility.md, 2026-08."""

OPSET_23_RUNTIME = "1.23"
"""Oldest ONNX Runtime for opset 23, whose Attention the default FP16 export has."""

BF16_CONTAINER = "26.04"
"""The onnxruntime backend takes bfloat16 since March 2026 (its pull request 335), so containers after that month's."""

COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


def image(container: str) -> str:
    """The image of a container such as 25.09."""
    return f"nvcr.io/nvidia/tritonserver:{container}-py3"


def choose_container(sources: Sequence[Source], asked: str | None) -> tuple[str | None, list[str]]:
    """The container that serves the files, and what a user must know of it.

    Args:
        sources: an ONNX file, or plans of one model.
        asked: such as `25.09`; None chooses the newest that is known to fit.

    Returns:
        The container, None where none was asked and none is known; and notes.

    Raises:
        TritonError: the asked one is known not to fit, or plans need different ones.
    """
    if asked is not None and not re.fullmatch(r"2\d\.(0[1-9]|1[0-2])", asked):
        raise TritonError(f"container {asked!r}: expected a year and month such as 25.09")
    if sources[0].kind == "onnx":
        return _for_onnx(sources[0], asked)
    versions = {str(source.manifest["tensorrt_version"]) for source in sources}
    if len(versions) > 1:
        paths, built = ", ".join(str(source.path) for source in sources), ", ".join(sorted(versions))
        raise TritonError(f"{paths}: built by TensorRT {built}; one container has one, so build all plans alike")
    return _for_plan(sources[0], versions.pop(), asked)


def needs_compatible(source: Source, container: str | None) -> bool:
    """Whether the server must be told to load plans of older TensorRT versions."""
    carried = TENSORRT.get(container or "")
    compatible = source.kind == "plan" and source.manifest["options"]["version_compatible"] is True
    return compatible and (carried is None or carried != _short(source.manifest["tensorrt_version"]))


def _for_plan(source: Source, version: str, asked: str | None) -> tuple[str | None, list[str]]:
    compatible = source.manifest["options"]["version_compatible"] is True
    needed = f"TensorRT {version}" + (" or later" if compatible else " exactly")
    if asked is None:
        fitting = [name for name, carried in TENSORRT.items() if carried == _short(version)]
        if not fitting and compatible:
            later = [name for name, carried in TENSORRT.items() if _key(carried) > _key(version)]
            fitting = [name for name in later if _key(TENSORRT[name])[0] == _key(version)[0]] or later
        if not fitting:
            return None, [f"no Triton container with {needed} is known here; NVIDIA's support matrix names it"]
        asked = fitting[-1]
    carried = TENSORRT.get(asked)
    if carried is None:
        notes = [f"which TensorRT is in container {asked} is not known here; {source.path.name} needs {needed}"]
        return asked, notes + ([f"start Triton with {COMPATIBLE} if it is a later one"] if compatible else [])
    if carried == _short(version):
        return asked, [f"container {image(asked)} has TensorRT {carried}, as the plan needs"]
    if compatible and _key(carried) > _key(version):
        return asked, [f"container {image(asked)} has TensorRT {carried}; start Triton with {COMPATIBLE}"]
    fitting = [name for name, other in TENSORRT.items() if other == _short(version)]
    remedy = f"take container {fitting[-1]}" if fitting else "take the container that NVIDIA's support matrix names"
    raise TritonError(
        f"{source.path}: needs {needed}, container {asked} has {carried}; {remedy}, or build the plan again in this one"
    )


def _for_onnx(source: Source, asked: str | None) -> tuple[str | None, list[str]]:
    container = asked or max(ONNX_RUNTIME, key=_key)
    carried, opset = ONNX_RUNTIME.get(container), source.manifest.get("opset", 0)
    if carried and opset >= 23 and _key(carried) < _key(OPSET_23_RUNTIME):
        raise TritonError(
            f"{source.path}: has opset {opset}, which needs ONNX Runtime {OPSET_23_RUNTIME}, container {container} has "
            f"{carried}; take 25.08 or later, or export again with --opset 20 --attention scores32"
        )
    if any(spec.dtype == "bfloat16" for spec in source.outputs) and _key(container) < _key(BF16_CONTAINER):
        raise TritonError(
            f"{source.path}: has bfloat16 outputs, which container {container} does not take from ONNX Runtime; "
            f"export again with --output-dtype fp32, or take {BF16_CONTAINER} or later"
        )
    if carried is None:
        return container, [f"which ONNX Runtime is in container {container} is not known here; 1.23 or later serves"]
    return container, [f"container {image(container)} has ONNX Runtime {carried}"]


def _short(version: str) -> str:
    return ".".join(version.split(".")[:3])


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])
