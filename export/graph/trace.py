"""The deployed module as a canonical ONNX graph: FP32, opset 23, one Attention node a block.

Tracing costs time for every operator, and the trunk's blocks repeat. So one windowed and one global block are traced,
and the graph's part of each is stamped out for all blocks of its kind, with that block's weights.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import logging
import warnings
from collections.abc import Iterable, Iterator
from typing import cast

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import nn

from export.contract.errors import ExportError
from export.graph.cleanup import INPUT, MODULE, tidy
from export.graph.constant_folding import add_initializer, fold_constants
from export.graph.deployed_module import DeployEncoder
from neck.necks import shallow_copy
from neck.trunk import Block, ViTDetTrunk

CANONICAL_OPSET = 23

OLDEST_TORCH = "2.10.0a0"
"""With a dynamic batch and padded windows PyTorch 2.9 refuses and 2.8 silently fixes the batch; the graphs of 2.5 to
2.7 cannot be cut into blocks. `a0` lets NVIDIA's own builds of 2.10 pass."""

SCOPES = "pkg.torch.onnx.name_scopes"
BLOCKS = "trunk.blocks."


def trace(module: DeployEncoder) -> ir.Model:
    """Traces the module; its weights are referred to, not copied, until the file is written.

    Raises:
        ExportError: torch cannot trace the module (a foreign trunk may do what ONNX cannot), or is too old.
    """
    if torch.__version__ < OLDEST_TORCH:  # compared as versions
        raise ExportError(
            f"PyTorch {torch.__version__} is too old: the export needs PyTorch 2.10 or later. Upgrade PyTorch. If "
            "PyTorch cannot be upgraded on this machine, export on a machine with a newer PyTorch, and copy the "
            "exported files to this machine"
        )
    kinds = block_kinds(module)
    model = _export(_with_blocks(module, [same[0] for same in kinds]))
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
        node.metadata_props.clear()
        node.metadata_props[MODULE] = (scopes[-2] if len(scopes) > 1 else "") or INPUT
    stamp_blocks(model.graph, kinds, module)
    fold_constants(model)
    tidy(model)
    return model


def block_kinds(module: DeployEncoder) -> list[list[int]]:
    """Indices of the trunk's blocks that compute alike, kind by kind; empty for a trunk that is not ours."""
    if not isinstance(module.trunk, ViTDetTrunk):
        return []
    kinds: dict[int, list[int]] = {}
    for index, block in enumerate(cast("list[Block]", module.trunk.blocks)):
        kinds.setdefault(block.window_size, []).append(index)
    return list(kinds.values())


def _with_blocks(module: DeployEncoder, indices: list[int]) -> DeployEncoder:
    """The module with only some of its trunk's blocks."""
    if not indices:
        return module
    short = shallow_copy(module)
    short.trunk = shallow_copy(cast(ViTDetTrunk, module.trunk))
    short.trunk.blocks = nn.ModuleList(cast(ViTDetTrunk, module.trunk).blocks[index] for index in indices)
    return short


def _export(module: DeployEncoder) -> ir.Model:
    signature = module.signature
    batch = signature.batch
    # torch.export takes a dimension of 1 as fixed, so a dynamic batch is traced with 2
    shape = (max(2, batch.minimum) if batch.dynamic else batch.optimum, *signature.image.shape[1:])
    image = torch.zeros(cast("tuple[int, ...]", shape), dtype=getattr(torch, signature.image.dtype))
    dim = torch.export.Dim("batch", min=batch.minimum, max=batch.maximum) if batch.dynamic else None
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (image,),
                dynamo=True,
                opset_version=CANONICAL_OPSET,
                input_names=["image"],
                output_names=[spec.name for spec in signature.outputs],
                dynamic_shapes={"image": {0: dim}} if dim else None,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch.export cannot trace the encoder: {reason}") from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says about itself while it exports, and keeps the garbage collector out of it.

    Collecting while torch makes a million small objects is an eighth of tracing's processor time (torch 2.13).
    """
    collecting = gc.isenabled()
    gc.disable()
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if collecting:
                gc.enable()


def stamp_blocks(graph: ir.Graph, kinds: list[list[int]], module: DeployEncoder) -> None:
    """Puts every block of the trunk in the place of the traced ones, in order."""
    if not kinds:
        return
    pattern = {index: traced for traced, same in enumerate(kinds) for index in same}
    live = dependent_values(graph, graph.inputs)
    parts = [_part(graph, traced, live) for traced in range(len(kinds))]
    entries = [_entry(part, live) for part in parts]
    exits = [_exit(part) for part in parts]
    first, last = entries[0], exits[-1]
    users = list(last.uses())
    anchor = parts[-1][-1]
    x = first
    for index in range(len(pattern)):
        traced = pattern[index]
        copies, x = _stamp(graph, parts[traced], traced, index, {entries[traced]: x}, exits[traced], module)
        graph.insert_after(anchor, copies)
        anchor = copies[-1]
    for node, position in users:
        node.replace_input_with(position, x)
    graph.remove([node for part in parts for node in part], safe=True)


def _part(graph: ir.Graph, index: int, live: set[ir.Value]) -> list[ir.Node]:
    """The nodes of one traced block that depend on the image or on the block's weights; constants serve all blocks."""
    prefix = f"{BLOCKS}{index}."
    weights = [value for name, value in graph.initializers.items() if name.startswith(prefix)]
    own = live | dependent_values(graph, weights)
    return [node for node in graph if (node.metadata_props[MODULE] + ".").startswith(prefix) and node.outputs[0] in own]


def dependent_values(graph: ir.Graph, roots: Iterable[ir.Value]) -> set[ir.Value]:
    """The roots and every value computed from their numbers; a shape is the same for every block."""
    values = set(roots)
    for node in graph:
        if node.op_type != "Shape" and any(value in values for value in node.inputs if value is not None):
            values.update(node.outputs)
    return values


def _entry(part: list[ir.Node], live: set[ir.Value]) -> ir.Value:
    """The one value from outside, dependent on the image, that a block's nodes read."""
    inside = {value for node in part for value in node.outputs}
    outside = {value for node in part for value in node.inputs if value in live and value not in inside}
    if len(outside) != 1:
        raise ExportError(
            f"a traced transformer block reads {len(outside)} tensors that depend on the image, but only 1 "
            "is expected, so the graph cannot be rewritten; use --no-rewrite"
        )
    return outside.pop()


def _exit(part: list[ir.Node]) -> ir.Value:
    """The one value of a block's nodes that is read outside."""
    inside = set(part)
    leaving = [value for node in part for value in node.outputs if any(user not in inside for user, _ in value.uses())]
    if len(leaving) != 1:
        raise ExportError(
            f"a traced transformer block returns {len(leaving)} tensors, but only 1 is expected, so the graph "
            "cannot be rewritten; use --no-rewrite"
        )
    return leaving[0]


def _stamp(
    graph: ir.Graph,
    part: list[ir.Node],
    traced: int,
    index: int,
    values: dict[ir.Value, ir.Value],
    leaving: ir.Value,
    module: DeployEncoder,
) -> tuple[list[ir.Node], ir.Value]:
    """Copies a traced block's nodes for block `index`; returns them and the value that leaves them."""
    old, new = f"{BLOCKS}{traced}.", f"{BLOCKS}{index}."

    def mapped(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in values:
            return None if value is None else values[value]
        name = cast(str, value.name)
        if value.is_initializer() and name.startswith(old):
            values[value] = _weight(graph, module, name.replace(old, new, 1))
            return values[value]
        return value

    copies = []
    for node in part:
        outputs = [
            ir.Value(name=f"block{index}_{value.name}", shape=value.shape, type=value.type) for value in node.outputs
        ]
        inputs = [mapped(value) for value in node.inputs]
        twin = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), outputs=outputs)
        twin.metadata_props[MODULE] = (node.metadata_props[MODULE] + ".").replace(old, new, 1)[:-1]
        values.update(zip(node.outputs, outputs, strict=True))
        copies.append(twin)
    return copies, values[leaving]


def _weight(graph: ir.Graph, module: DeployEncoder, name: str) -> ir.Value:
    """The initializer of a parameter or buffer, made where it is not there yet."""
    stamped = f"stamped.{name}"  # the traced blocks' own initializers are still in the graph
    if stamped in graph.initializers:
        return graph.initializers[stamped]
    owner, _, leaf = name.rpartition(".")
    return add_initializer(graph, stamped, TorchTensor(getattr(module.get_submodule(owner), leaf).detach()))
