"""Which Triton container carries which TensorRT and ONNX Runtime, and whether it can serve a file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import onnx_ir as ir

from engines.service.served_model import Source, TritonError
from export.contract.export_command import AS_AUTO, export_again
from export.contract.targets import CODES, line_of, release_numbers, triton_containers, version_numbers
from export.contract.triton_containers import ONNX_RUNTIME, TENSORRT
from export.verification.target_check import graph_needs, on_cpu, why_not

BF16_CONTAINER = "26.04"
"""The onnxruntime backend takes bfloat16 since March 2026 (its pull request 335), so containers after that month's."""

COMPATIBLE = "--backend-config=tensorrt,version-compatible=true"


def image(container: str) -> str:
    """The image of a container such as 25.09."""
    return f"nvcr.io/nvidia/tritonserver:{container}-py3"


def choose_container(sources: Sequence[Source], asked: str | None) -> tuple[str | None, list[str]]:
    """The container that can serve the files, and notes for the user.

    Args:
        sources: an ONNX file, or plans of one model.
        asked: such as `25.09`; None chooses the newest that is known to fit.

    Returns:
        The container, None where none was asked and none is known; and notes.

    Raises:
        TritonError: the asked one is known not to fit, or plans need different ones.
    """
    if asked is not None and not re.fullmatch(r"2\d\.(0[1-9]|1[0-2])", asked):
        raise TritonError(f"container {asked!r} is invalid; expected a year and month such as 25.09")
    if sources[0].kind == "onnx":
        return _for_onnx(sources[0], asked)
    versions = {str(source.manifest["tensorrt_version"]) for source in sources}
    numbers = [release_numbers(version) for version in versions]
    known = min(map(len, numbers))
    if len({one[:known] for one in numbers}) > 1:
        paths, built = ", ".join(str(source.path) for source in sources), ", ".join(sorted(versions))
        raise TritonError(
            f"{paths}: these plans were built by TensorRT {built}, but a container has only one TensorRT version; "
            "build all of these plans with the same version"
        )
    exact = next((source for source in sources if not has_lean_runtime(source)), sources[0])
    container, notes = _for_plan(exact, str(exact.manifest["tensorrt_version"]), asked)
    if any(map(has_lean_runtime, sources)):
        notes.append(
            f"a version-compatible plan brings its own runtime: start Triton with {COMPATIBLE}, otherwise Triton "
            "refuses the plan"
        )
    return container, notes


def has_lean_runtime(source: Source) -> bool:
    """Whether a file is a version-compatible plan, which contains a lean runtime.

    TensorRT runs such code only with consent, also in the version that built the plan (trtexec, `loader.cc` of Triton's
    tensorrt_backend, triton-inference-server/server #6129), so the server must be started with COMPATIBLE.
    """
    return source.kind == "plan" and source.manifest["options"]["version_compatible"] is True


def _for_plan(source: Source, version: str, asked: str | None) -> tuple[str | None, list[str]]:
    compatible = has_lean_runtime(source)
    needed = f"TensorRT {version}" + (" or later" if compatible else " exactly")
    if asked is None:
        fitting = [name for name, carried in TENSORRT.items() if carried == _short(version)]
        if not fitting and compatible:
            later = [name for name, carried in TENSORRT.items() if version_numbers(carried) > version_numbers(version)]
            fitting = [
                name for name in later if version_numbers(TENSORRT[name])[0] == version_numbers(version)[0]
            ] or later
        if not fitting:
            return None, [
                f"neck-export knows no Triton container with {needed}; look for such a container in NVIDIA's support "
                "matrix"
            ]
        asked = fitting[-1]
    carried = TENSORRT.get(asked)
    if carried is None:
        return asked, [
            f"neck-export does not know the TensorRT version of container {asked}; check that this container has the "
            f"version that {source.path.name} needs: {needed}"
        ]
    if carried == _short(version):
        return asked, [f"container {image(asked)} has TensorRT {carried}, the version that the plan needs"]
    if compatible and version_numbers(carried) > version_numbers(version):
        return asked, [
            f"container {image(asked)} has TensorRT {carried}, which can load a plan built with TensorRT {version}"
        ]
    fitting = [name for name, other in TENSORRT.items() if other == _short(version)]
    remedy = (
        f"use container {fitting[-1]}"
        if fitting
        else f"use the Triton container that has TensorRT {_short(version)} according to NVIDIA's support matrix"
    )
    name = (source.manifest.get("onnx") or {}).get("name", f"{source.path.stem}.onnx")
    onnx, precision = source.path.with_name(name), source.manifest.get("precision", "fp16")
    kind = ["--precision", precision] if precision in ("fp8", "int8") else [f"--{precision}"]
    words = ["neck-export", "trt", str(onnx), *kind, "--flavor", "tensorrt", "--output", str(source.path)]
    raise TritonError(
        f"{source.path}: the plan needs {needed}, but container {asked} has {carried}; {remedy}, or build the "
        f"plan again in container {asked}:\n"
        f"{shlex.join(words)}"
    )


def _for_onnx(source: Source, asked: str | None) -> tuple[str | None, list[str]]:
    container = asked or _requested(source) or max(ONNX_RUNTIME, key=version_numbers)
    carried = ONNX_RUNTIME.get(container)
    if any(spec.dtype == "bfloat16" for spec in source.outputs) and version_numbers(container) < version_numbers(
        BF16_CONTAINER
    ):
        raise TritonError(
            f"{source.path}: the outputs are bfloat16, which Triton in container {container} does not accept "
            f"from ONNX Runtime; use container {BF16_CONTAINER} or later, or export the file again:\n"
            f"{export_again(source.path, output_dtype='fp32')}"
        )
    if carried is None:
        return container, [
            f"neck-export does not know the ONNX Runtime version of container {container}. Check that container "
            f"{container} has ONNX Runtime 1.25 or later. An earlier version may be unable to serve the ONNX file "
            f"{source.path.name}"
        ]
    notes = _check_readable(source, container, carried)
    return container, [f"container {image(container)} has ONNX Runtime {carried}", *notes]


def _requested(source: Source) -> str | None:
    """The newest container that `--target triton-NN.NN` of the export named, None if it named none."""
    named = (source.manifest.get("targets") or {}).get("products", ())
    return max((container for container in triton_containers() if f"triton-{container}" in named), default=None)


def _check_readable(source: Source, container: str, carried: str) -> list[str]:
    """Refuses a file that the container's ONNX Runtime does not read, or computes on the CPU; else what is small there.

    Raises:
        TritonError: why, the containers that serve it, and the command that exports it for the asked one.
    """
    try:
        needs = graph_needs(ir.load(source.path))
    except Exception as error:  # protobuf and onnx-ir raise many kinds
        raise TritonError(
            f"{source.path}: the ONNX file is incomplete or damaged ({type(error).__name__}); copy the file again"
        ) from None
    target = line_of("onnxruntime-gpu", carried)
    unknown = f"neck-export does not know which ONNX files ONNX Runtime {carried} can load"
    reason = why_not(target, needs) if target else unknown
    if target and reason is None:
        small = ", ".join(on_cpu(target, needs))
        return (
            [
                f"ONNX Runtime runs {small} on the CPU; these operators are cheap, but copying their data from the GPU "
                "and back adds latency"
            ]
            if small
            else []
        )
    lines = {name: line_of("onnxruntime-gpu", version) for name, version in ONNX_RUNTIME.items()}
    fitting = [name for name, line in lines.items() if line and why_not(line, needs) is None]
    remedy = (
        f"use container {fitting[0]} or later, or export the file again for container {container}"
        if fitting
        else f"export the ONNX file again with --target triton-{container}, as in the following command"
    )
    changes = {"target": f"triton-{container}", "attention": "auto", "opset": "auto"}
    if needs.types & {"BFLOAT16", *CODES}:
        changes |= {**AS_AUTO, "precision": "fp16"}
    raise TritonError(
        f"{source.path}: container {container} has ONNX Runtime {carried}, which cannot serve the file: "
        f"{reason}; {remedy}:\n"
        f"{export_again(source.path, **changes)}"
    )


def _short(version: str) -> str:
    return ".".join(map(str, release_numbers(version)[:3]))
