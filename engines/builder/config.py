"""Translates the options of a build into TensorRT's builder config, including the optimization profile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from engines.builder.flavor import Flavor
from engines.builder.onnx_graph import BuildError
from engines.builder.options import DEFAULT_BATCH, BuildOptions
from engines.builder.timing_cache import timing_cache_path
from export.contract.export_command import export_again


def common_options(onnx: Path, flavor: Flavor, network: Any, options: BuildOptions, monitor: Any) -> dict[str, Any]:
    """Returns the arguments that both of Polygraphy's config classes accept.

    Raises:
        BuildError: this TensorRT does not support an option, or the file does not support the requested batch.
    """
    trt = flavor.trt
    values: dict[str, Any] = {"progress_monitor": monitor, "profiling_verbosity": trt.ProfilingVerbosity.DETAILED}
    profile = _profile(onnx, network, options)
    if profile is not None:
        values["profiles"] = [profile]
    if options.optimization_level is not None:
        if not 0 <= options.optimization_level <= 5:
            raise BuildError(f"--optimization-level {options.optimization_level} is invalid; expected 0 to 5")
        values["builder_optimization_level"] = options.optimization_level
    if options.workspace_bytes is not None:
        values["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace_bytes}
    if options.version_compatible:
        values["version_compatible"] = True
    if options.hardware_compatible != "none":
        values["hardware_compatibility_level"] = _level(flavor, options.hardware_compatible)
    cache = timing_cache_path(flavor, options)
    if cache is not None and cache.exists():
        if not (cache.is_file() and os.access(cache, os.R_OK)):
            raise BuildError(
                f"{cache}: the timing cache is not a readable file; choose another file with --timing-cache"
            )
        values["load_timing_cache"] = str(cache)
    return values


def _level(flavor: Flavor, asked: str) -> Any:
    trt = flavor.trt
    if asked == "ampere+":
        return trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if not hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
        raise BuildError(
            f"--hardware-compatible same needs TensorRT 10.9 or later, but the plan is built with {flavor.title}; "
            "update TensorRT, or leave the option out"
        )
    return trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY


def _profile(onnx: Path, network: Any, options: BuildOptions) -> Any:
    """Returns the optimization profile of a dynamic batch, or None for a fixed one."""
    image = network.get_input(0)
    if network.num_inputs != 1:
        raise BuildError(
            f"{onnx}: the file has {network.num_inputs} inputs, but an image encoder has exactly one, the "
            "image; export the encoder with `neck-export onnx`"
        )
    shape = tuple(image.shape)
    if -1 in shape[1:]:
        raise BuildError(
            f"{onnx}: input {image.name} has the shape {shape}, but only the batch may be dynamic; export the file "
            "with a fixed image size"
        )
    if shape[0] != -1:
        if options.batch is not None and str(options.batch) != str(shape[0]):
            raise BuildError(
                f"{onnx}: the file has the fixed batch size {shape[0]}, but {options.batch} was requested; "
                f"export the file again: {export_again(onnx, batch=str(options.batch))}"
            )
        return None
    from polygraphy.backend.trt import Profile

    batch = options.batch or DEFAULT_BATCH
    sizes = ((size, *shape[1:]) for size in (batch.minimum, batch.optimum, batch.maximum))
    return Profile().add(image.name, *sizes)
