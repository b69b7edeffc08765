"""Runs a foreign graph in ONNX Runtime: its low-precision roundings written out where the simulation knows how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from export.contract.errors import ExportError
from export.contract.onnx_file import OnnxFile
from export.verification.fidelity import FidelityError
from export.verification.rounding_simulation import LOW, is_low_precision, simulate
from export.verification.verify import SIMULATED, open_model, run_session


class CannotRunError(ExportError):
    """A file that ONNX Runtime does not load or cannot compute."""


AS_IT_IS = (
    "the file was run without simulating FP16 rounding: ONNX Runtime may keep values in FP32 that a GPU rounds to "
    "FP16, so errors on a GPU can be larger"
)


@dataclasses.dataclass
class Runner:
    """A session of a file.

    Attributes:
        model: what runs: the simulation, or the graph as it is.
        session: of ONNX Runtime.
        outputs: names of the file's outputs; `watched` are further ones, of scalars.
        rounded: values of the simulation, where to look for the first that is not finite.
        how: what is to be said of the way in which it runs.
    """

    model: ir.Model
    session: Any
    outputs: list[str]
    watched: list[str]
    rounded: list[ir.Value]
    how: str
    file: OnnxFile

    def run(self, feeds: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Runs the file; the values of `watched` come apart from its outputs.

        Raises:
            CannotRunError: ONNX Runtime cannot compute it.
        """
        feeds = {name: array.astype(self._type(name)) for name, array in feeds.items()}
        try:
            values = run_session(self.session, feeds)
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise CannotRunError(
                f"ONNX Runtime failed while running the file: {' '.join(str(error).split())[:300]}"
            ) from None
        found = dict(zip([*self.outputs, *self.watched], values, strict=True))
        return {name: found[name] for name in self.outputs}, {name: float(found[name]) for name in self.watched}

    def _type(self, name: str) -> np.dtype:
        kinds = {"tensor(float16)": "float16", "tensor(double)": "float64", "tensor(uint8)": "uint8"}
        kind = next(one.type for one in self.session.get_inputs() if one.name == name)
        return np.dtype(kinds.get(kind, "float32"))


def prepared_model(file: OnnxFile) -> tuple[ir.Model, Any]:
    """A copy of a file's model with its functions inlined, its constants as initializers and all types inferred."""
    model, folder = file.load()
    if model.functions:
        common_passes.InlinePass()(model)
    common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer_types(model)
    return model, folder


def infer_types(model: ir.Model) -> None:
    """Infers types that the file does not tell; an operator of another domain gives the type of its first input."""
    for _ in range(8):
        if all(output.dtype for node in model.graph for output in node.outputs if output.name):
            return
        common_passes.ShapeInferencePass()(model)
        for node in model.graph:
            given = next((value.dtype for value in node.inputs if value is not None and value.dtype), None)
            for output in node.outputs[:1]:
                if output.dtype is None and node.domain not in ("", "ai.onnx") and given is not None:
                    output.type = ir.TensorType(given)


def open_file(file: OnnxFile, watch: bool = False) -> Runner:
    """Opens a foreign file; an FP16 or BF16 file through its rounding simulation.

    Args:
        file: the file.
        watch: whether the largest inputs of LayerNorm and Softmax are computed too (`Runner.watched`).

    Raises:
        CannotRunError: ONNX Runtime does not load it.
    """
    model, folder = prepared_model(file)
    outputs = [str(value.name) for value in model.graph.outputs]
    low = is_low_precision(model) or any(value.dtype in LOW for value in model.graph.inputs)
    problem = ""
    if low:
        try:
            watched = watch_largest(model) if watch else []
            rounded = simulate_foreign(model)
            return Runner(model, open_model(model, folder), outputs, watched, rounded, SIMULATED, file)
        except (FidelityError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            problem = f"the FP16 rounding simulation does not support this graph ({' '.join(str(error).split())[:120]})"
        model, folder = prepared_model(file)
    watched = watch_largest(model) if watch and not low else []
    try:
        session = open_model(model, folder)
    except FidelityError as error:
        raise CannotRunError(why_not_loaded(file.model, str(error))) from None
    return Runner(model, session, outputs, watched, [], f"{problem}; {AS_IT_IS}" if low else "", file)


def why_not_loaded(model: ir.Model, error: str) -> str:
    """What to say of a file that ONNX Runtime does not load: its custom operators, if it has any."""
    known = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
    functions = {(key[0], key[1]) for key in model.functions}
    own = {(node.domain, node.op_type) for node in model.graph.all_nodes() if node.domain not in known} - functions
    if own:
        named = ", ".join(sorted(f"{domain}::{operator}" for domain, operator in own))
        return (
            f"the file contains custom operators ({named}) that ONNX Runtime does not know, so the file cannot "
            "be verified here; export the model with standard ONNX operators"
        )
    return f"the file cannot be verified, because {error.splitlines()[0]}"


def simulate_foreign(model: ir.Model) -> list[ir.Value]:
    """`simulate` for a graph whose inputs may be FP16 or BF16 and whose weights may be outputs.

    Raises:
        ValueError: a tensor whose type is unknown, or a nested graph.
    """
    for node in model.graph:
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            raise ValueError(
                f"a node of type {node.op_type} contains a subgraph, and the FP16 rounding simulation does not support "
                "subgraphs"
            )
        used = [output for output in node.outputs if output.name and list(output.uses())]
        untyped = next((output.name for output in used if output.dtype is None), None)
        if untyped is not None:
            raise ValueError(
                f"the data type of the tensor {untyped}, computed by a {node.op_type} node, is unknown; add the type "
                "to value_info in the ONNX file"
            )
    for node in list(model.graph):
        _retype_attributes(model.graph, node)
    for value in model.graph.inputs:
        if value.dtype in LOW:
            _round_input(model.graph, value)
    return simulate(model)


def _retype_attributes(graph: ir.Graph, node: ir.Node) -> None:
    """Writes operators that name a low-precision type in an attribute or by another tensor so that they name FP32."""
    if node.op_type == "CastLike":
        like = node.outputs[0].dtype
        assert like is not None
        cast = ir.node("Cast", [node.inputs[0]], {"to": like.value}, name=node.name)
        cast.outputs[0].type, cast.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        cast.outputs[0].name = node.outputs[0].name
        ir.convenience.replace_nodes_and_values(graph, node, [node], [cast], node.outputs, cast.outputs)
    elif node.op_type == "ConstantOfShape" and node.outputs[0].dtype in LOW:
        tensor = node.attributes["value"].as_tensor()
        node.attributes.add(ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float32))))


def _round_input(graph: ir.Graph, value: ir.Value) -> None:
    """Takes an FP16 or BF16 input as FP32 and rounds it."""
    low, users = value.dtype, list(value.uses())
    assert low is not None
    value.type = ir.TensorType(ir.DataType.FLOAT)
    down = ir.node("Cast", [value], {"to": low.value})
    down.outputs[0].name, down.outputs[0].shape = f"{value.name}/rounded", value.shape
    down.outputs[0].type = ir.TensorType(low)
    for user, position in users:
        user.replace_input_with(position, down.outputs[0])
    graph.insert_before(graph[0], down)


WATCHED = {"LayerNormalization": 0, "Softmax": 0, "SkipLayerNormalization": 0}
"""Operators whose inputs' range decides whether they survive in FP16."""


def watch_largest(model: ir.Model) -> list[str]:
    """Adds, as outputs of the graph, the largest magnitude of every low-precision input of LayerNorm and Softmax."""
    names, seen = [], set()
    for node in list(model.graph):
        value = node.inputs[WATCHED[node.op_type]] if node.op_type in WATCHED else None
        if value is None or value.dtype not in LOW or value in seen:
            continue
        seen.add(value)
        up = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})
        size, most = ir.node("Abs", up.outputs), None
        most = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        for one in (up, size, most):
            one.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        most.outputs[0].name, most.outputs[0].shape = f"{node.op_type}|{node.name or value.name}", ir.Shape([])
        model.graph.insert_before(node, [up, size, most])
        model.graph.outputs.append(most.outputs[0])
        names.append(str(most.outputs[0].name))
    return names


def cut(file: OnnxFile, at: str) -> Runner | None:
    """The part of a file that computes one of its tensors, in FP32 where it can be; None where it does not run."""
    try:
        model, folder = prepared_model(file)
        value = next(value for node in model.graph for value in node.outputs if value.name == at)
        model.graph.outputs[:] = [value]
        common_passes.RemoveUnusedNodesPass()(model)
        if is_low_precision(model) or any(one.dtype in LOW for one in model.graph.inputs):
            simulate_foreign(model)
        return Runner(model, open_model(model, folder), [at], [], [], "", file)
    except (FidelityError, ValueError, TypeError, KeyError, AttributeError, IndexError, StopIteration):
        return None


def first_non_finite(runner: Runner, feeds: Mapping[str, np.ndarray]) -> str | None:
    """The first tensor in the order of computation that is not finite; of a simulation, of those that it rounds."""
    model, folder = prepared_model(runner.file)
    if runner.rounded:
        values = simulate_foreign(model)
    else:
        values = [output for node in model.graph for output in node.outputs if output.dtype == ir.DataType.FLOAT]
    names = []
    for value in values:
        total = ir.node("ReduceL1", [value], {"keepdims": 0})
        total.outputs[0].name, total.outputs[0].type = f"{value.name}/finite", ir.TensorType(ir.DataType.FLOAT)
        total.outputs[0].shape = ir.Shape([])
        names.append((str(value.name), total))
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, total)
    model.graph.outputs[:] = [total.outputs[0] for _, total in names]
    sums = Runner(model, open_model(model, folder), [f"{name}/finite" for name, _ in names], [], [], "", runner.file)
    found, _ = sums.run(feeds)
    return next((name for name, _ in names if not np.isfinite(found[f"{name}/finite"])), None)


def patch_embedding(model: ir.Model, patch: int) -> str | None:
    """The name of what the patch embedding gives: of the first convolution of 3 channels whose taps are a patch."""
    for node in model.graph:
        if node.op_type == "Conv" and node.inputs[1] is not None and node.inputs[1].shape is not None:
            shape: Sequence[Any] = list(node.inputs[1].shape)
            strides = node.attributes.get_ints("strides", [1])
            if shape[1:] == [3, patch, patch] and list(strides) == [patch, patch]:
                return str(node.outputs[0].name)
    return None
