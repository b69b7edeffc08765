"""What a build is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from export.contract.signature import BatchRange
from export.lowering.precision import Precision

DEFAULT_BATCH = BatchRange(1, 4, 8)
"""Optimization profile of a dynamic batch whose range nobody said."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        precision: type that the graph's matrix products and convolutions must have; of fp8 and int8 their results.
        batch: optimization profile of a file with dynamic batch; by default from 1 through 4 to 8.
        compute_capabilities: GPUs to build for (RTX), such as ("8.9", "12.0"); empty is the flavor's default.
        keep_fp32: paths of modules that are in FP32 all the same, with wildcards.
        optimization_level: 0 (fast build) to 5; None is TensorRT's default.
        workspace_bytes: limit of scratch memory on the GPU; None is no limit.
        version_compatible: the plan loads in later TensorRT versions too.
        hardware_compatible: `none`, `ampere+` (8.0 and later) or `same` (GPUs of this one's compute capability).
        timing_cache: file that keeps measured kernels between builds; flavor, version and GPU enter its name.
        replay_timing: such a file, by its own name: every kernel is taken as it says, or the build fails.
    """

    precision: Precision = "fp16"
    batch: BatchRange | None = None
    compute_capabilities: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace_bytes: int | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["none", "ampere+", "same"] = "none"
    timing_cache: Path | None = None
    replay_timing: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values; two builds are alike where these are (the timing caches' places aside)."""
        values = dataclasses.asdict(self)
        values["batch"] = None if self.batch is None else str(self.batch)
        values["compute_capabilities"], values["keep_fp32"] = list(self.compute_capabilities), list(self.keep_fp32)
        del values["timing_cache"], values["replay_timing"]
        return values
