"""What torch exports for the tests, once for each structure: a trace takes 3 s of processor time inside torch.

torch.export does not look at weights, so an encoder of the same structure gets the graph that is there, with its own
weights in the place of those that were traced. Graphs are shared between the processes of a run by a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from export.contract.signature import BatchRange, Positions
from export.graph.deployed_module import DeployEncoder
from neck.config import EncoderConfig

MOST_BYTES = 1 << 26
"""Weights that are written with their graph; a larger encoder is traced anew."""

TOLD_BY_MODULES = ("image_size", "depth", "global_blocks", "necks", "scale_factors", "sam2_head")
"""Of an encoder's config: what its forward does not read, since grid, blocks and necks are modules and attributes."""

Export = Callable[[DeployEncoder], ir.Model]


def structure(module: DeployEncoder) -> str:
    """All that a trace depends on: classes, plain attributes, names, shapes and types, but no number of a tensor."""
    batch = module.signature.batch
    if batch.dynamic:  # its size is a name in the graph, whatever the range's other ends
        batch = BatchRange(batch.minimum, batch.minimum, 1 << 16)
    # the graph is FP32 whatever the file will be, and has no positions wherever else they are
    positions: Positions = "graph" if module.signature.positions == "graph" else "none"
    parts = [repr(dataclasses.replace(module.signature, dtype="float32", batch=batch, positions=positions))]
    for path, child in module.named_modules():
        tensors = {**child._parameters, **child._buffers}
        plain = {name: _plain(value) for name, value in vars(child).items() if _is_plain(value) and name != "signature"}
        shapes = {name: (value.shape, value.dtype) for name, value in tensors.items() if value is not None}
        parts.append(f"{path} {type(child)!r} {plain} {shapes}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype)) or dataclasses.is_dataclass(value)


def _plain(value: object) -> str:
    if isinstance(value, EncoderConfig):
        return repr({name: part for name, part in vars(value).items() if name not in TOLD_BY_MODULES})
    return repr(value)


def _is_foreign(module: DeployEncoder) -> bool:
    """Whether a test's own class is in it: what that computes is not in its attributes."""
    return any(type(child).__module__.split(".")[0] not in ("neck", "export", "torch") for child in module.modules())


class SharedTraces:
    """`export.graph.trace._export` with a memory.

    Args:
        export: the real one.
        folder: where the processes of this run meet.
    """

    def __init__(self, export: Export, folder: Path) -> None:
        self.export, self.folder = export, folder

    def __call__(self, module: DeployEncoder) -> ir.Model:
        """The graph of a module, its weights referred to as `_export` does."""
        if _is_foreign(module) or sum(value.nbytes for value in module.state_dict().values()) > MOST_BYTES:
            return self.export(module)
        path = self.folder / f"{structure(module)}.onnx"
        if not path.exists():
            model = self.export(module)
            written = path.with_suffix(f".{os.getpid()}")
            written.write_bytes(ir.to_proto(model).SerializeToString())
            written.rename(path)
            return model
        model = ir.from_proto(onnx.load_model_from_string(path.read_bytes()))
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in model.graph.initializers.items():
            if name in state:
                value.const_value = TorchTensor(state[name].detach(), name=name)
        return model
