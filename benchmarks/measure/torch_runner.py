"""PyTorch as a backend: eager or compiled, the plain module or the rewritten one, in FP32, FP16 or BF16."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure.backends import Runner, RunRequest
from benchmarks.options import SELECTION
from export.contract.dtypes import BY_PRECISION
from export.contract.options import Rewrites
from export.graph.deployed_module import DeployEncoder
from export.graph.rewrite import DeployAttention, DeployProjection, RotaryHalves
from neck.checkpoint import load_encoder
from neck.checkpoint_keys import NECK_MODULES
from neck.config import HEAD_PARTS
from neck.position import PositionEmbeddingSine
from neck.trunk import Block, ViTDetTrunk

MODES = {"compile": "default", "compile-max": "max-autotune"}
OTHER = "other"
"""What no part of `part_modules` holds: ln_pre, the position embedding, the windows' permutations."""


class RotaryBack(RotaryHalves):
    """Rotary with FP32 tables whatever the tokens are, as the plain module and the exported file compute it."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(..., N, D) -> (..., N, D) of x's type."""
        return super().forward(x, cos, sin).to(x.dtype)


def make_module(job: RunRequest) -> DeployEncoder:
    """The encoder of a job on its device; weights in its precision, rotary and position tables in FP32."""
    config, signature, backend = job.config, job.signature, job.backend
    chosen: dict[str, Any] = {name: getattr(job.encoder, name) for name in SELECTION}
    assert job.encoder.checkpoint is not None
    encoder = load_encoder(job.encoder.checkpoint, config, necks=config.necks, sam2_head=config.sam2_head, **chosen)
    encoder.set_imgsz(signature.image_size)
    module = DeployEncoder(encoder, signature, Rewrites() if backend.module == "rewritten" else Rewrites.none())
    for part in module.modules():
        if isinstance(part, DeployAttention):
            fold(part)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(backend.device, getattr(torch, BY_PRECISION[backend.precision].name))
    module = module.to(backend.device).eval()
    if isinstance(module.position_encoding, PositionEmbeddingSine):
        for size in signature.level_sizes:  # its tables are there before it is compiled, as the rewritten module's are
            module.position_encoding(torch.empty(1, device=backend.device).expand(1, 1, *size))
    return module


def fold(attention: DeployAttention) -> None:
    """Puts the rewritten projection into weights, as a file has it, so that no forward rewrites it again."""
    weight, bias = cast(DeployProjection, attention.qkv).rewritten()
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = (nn.Parameter(value, requires_grad=False) for value in (weight, bias))
    attention.qkv = linear
    attention.rope.__class__ = RotaryBack


class TorchRunner(Runner):
    """Runs the module on one input."""

    def __init__(self, job: RunRequest) -> None:
        self.job, self.cuda = job, job.backend.device == "cuda"
        self._results: tuple[Tensor, ...] = ()

    def load(self) -> float | None:
        """Reads the weights; a compiled module is built by its first run."""
        backend = self.job.backend
        # what is called FP32 is FP32: cuDNN's convolutions take TF32 by default
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        self.module = make_module(self.job)
        self.image = torch.from_numpy(np.load(self.job.image)).to(
            backend.device, getattr(torch, BY_PRECISION[backend.precision].name)
        )
        self.names = [spec.name for spec in self.module.signature.outputs]
        self._call: Callable[[Tensor], tuple[Tensor, ...]] = self.module
        if backend.runtime == "eager":
            return None
        self._call = torch.compile(self.module, mode=MODES[backend.runtime], dynamic=False)
        start = time.perf_counter()
        self.run()
        seconds = time.perf_counter() - start
        if self.cuda:  # what was tried while it was built is no part of what a run holds
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return seconds

    def run(self) -> None:
        """One run; the last one's outputs are freed first, as a service would."""
        self._results = ()
        with torch.no_grad():
            self._results = self._call(self.image)
        if self.cuda:
            torch.cuda.synchronize()

    def outputs(self) -> dict[str, np.ndarray]:
        """The last run's outputs."""
        return {name: value.float().cpu().numpy() for name, value in zip(self.names, self._results, strict=True)}

    def device_bytes(self) -> int | None:
        """Most memory that torch's allocator held since the module was loaded or built."""
        return torch.cuda.max_memory_reserved() if self.cuda else None

    def parts_ms(self) -> dict[str, float] | None:
        """Milliseconds of each part in one eager run, measured by hooks, each of which waits for the GPU."""
        if self.job.backend.runtime != "eager":
            return None
        times: dict[str, float] = {}
        hooks = [hook for part, module in part_modules(self.module) for hook in self._timed(part, module, times)]
        start = self._now()
        self.run()
        total = (self._now() - start) * 1e3
        for hook in hooks:
            hook.remove()
        return {**times, OTHER: total - sum(times.values())}

    def _timed(self, part: str, module: nn.Module, times: dict[str, float]) -> list[Any]:
        started: list[float] = []

        def before(*_: object) -> None:
            started.append(self._now())

        def after(*_: object) -> None:
            times[part] = times.get(part, 0.0) + (self._now() - started.pop()) * 1e3

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def part_modules(module: DeployEncoder) -> Iterator[tuple[str, nn.Module]]:
    """The modules of each part, by roofline's names."""
    if isinstance(module.trunk, ViTDetTrunk):
        yield "patch", module.trunk.patch_embed
        for block in module.trunk.blocks:
            yield "windowed" if cast(Block, block).window_size else "global", block
    for neck in module.signature.necks:
        convs = cast(nn.ModuleList, getattr(module, NECK_MODULES[neck]))
        for level in module.signature.levels_of(neck):
            yield f"level {level}", convs[level]
            if module.sam2_head is not None and neck == "sam2" and level < len(HEAD_PARTS):
                yield f"level {level}", module.sam2_head.get_submodule(f"conv_s{level}")
    yield "positions", module.position_encoding
