"""Files as other tools write them: one graph of ours, edited into other layouts, forms and faults; no manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from conftest import load_golden, traced

from export.graph.rewrite import Rewrites
from neck.necks import Sam3DualViTDetNeck

CASE = "meta-dual"
FLOAT = ir.DataType.FLOAT


def plain_model(case: str = CASE, encoder: Sam3DualViTDetNeck | None = None, **asked: Any) -> ir.Model:
    """The unrewritten module's graph in FP32, with every neck, and constants that can be changed."""
    golden = load_golden(case)
    rewrites, config = asked.pop("rewrites", Rewrites.none()), asked.pop("config", golden.config)
    model = traced(encoder or golden.encoder, config, rewrites, **asked).model
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def write(model: ir.Model, path: Path) -> Path:
    """Writes a model with its weights inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ir.save(model, path)
    return path


class Edit:
    """Changes of a graph that a tool or a mistake makes.

    Args:
        model: changed in place.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph, self.count = model, model.graph, 0

    def constant(self, value: Any, dtype: Any = np.float32) -> ir.Value:
        """An initializer."""
        self.count += 1
        array = np.asarray(value, dtype)
        name = f"edit_constant_{self.count}"
        made = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        made.type = ir.TensorType(made.const_value.dtype)  # type: ignore[union-attr]
        self.graph.register_initializer(made)
        return made

    def node(
        self, operator: str, inputs: Sequence[ir.Value], shape: Any = None, dtype: Any = FLOAT, **attributes: Any
    ) -> ir.Node:
        """A node with one output."""
        self.count += 1
        made = ir.node(operator, list(inputs), attributes, name=f"edit_{self.count}")
        made.outputs[0].name, made.outputs[0].type = f"edit_value_{self.count}", ir.TensorType(dtype)
        made.outputs[0].shape = None if shape is None else ir.Shape(shape)
        return made

    def before(self, chain: Callable[[ir.Value], Sequence[ir.Node]], shape: Any = None, dtype: Any = FLOAT) -> Edit:
        """Puts nodes between the image and the graph; the input may get another shape and type."""
        image = self.graph.inputs[0]
        users = list(image.uses())
        if shape is not None:
            image.shape = ir.Shape(shape)
        image.type = ir.TensorType(dtype)
        nodes = chain(image)
        for user, position in users:
            user.replace_input_with(position, nodes[-1].outputs[0])
        self.graph.insert_before(self.graph[0], list(nodes))
        return self

    def after(self, name: str, chain: Callable[[ir.Value], Sequence[ir.Node]]) -> Edit:
        """Puts nodes behind an output, which keeps its name."""
        index = self.names.index(name)
        value = self.graph.outputs[index]
        nodes = chain(value)
        self.graph.extend(list(nodes))
        value.name = f"{name}_inner"
        nodes[-1].outputs[0].name = name
        self.graph.outputs[index] = nodes[-1].outputs[0]
        return self

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return [str(value.name) for value in self.graph.outputs]

    def keep(self, *names: str) -> Edit:
        """Leaves these outputs alone, in this order."""
        values = {str(value.name): value for value in self.graph.outputs}
        self.graph.outputs[:] = [values[name] for name in names]
        return self

    def rename(self, **names: str) -> Edit:
        """Gives outputs other names; two may be exchanged."""
        values = {str(value.name): value for value in self.graph.outputs}
        for name in names:
            values[name].name = f"{name}_old"
        for name, new in names.items():
            values[name].name = new
        return self

    def transpose(self, name: str, *axes: int) -> Edit:
        """Another order of an output's axes."""
        return self.after(name, lambda value: [self.node("Transpose", [value], perm=list(axes))])

    def reshape(self, name: str, *sides: int, first: Sequence[int] = ()) -> Edit:
        """Another shape of an output, its axes brought into another order first."""

        def chain(value: ir.Value) -> list[ir.Node]:
            moved = [self.node("Transpose", [value], perm=list(first))] if first else []
            source = moved[0].outputs[0] if moved else value
            return [*moved, self.node("Reshape", [source, self.constant(sides, np.int64)])]

        return self.after(name, chain)

    def affine(self, scale: Any, shift: Any) -> Edit:
        """The image times and plus a number for each channel."""
        factors = [
            self.constant(np.reshape(np.broadcast_to(np.asarray(one, np.float64), 3), (1, 3, 1, 1)))
            for one in (scale, shift)
        ]
        first: list[ir.Node] = []

        def chain(image: ir.Value) -> list[ir.Node]:
            first.append(self.node("Mul", [image, factors[0]], image.shape))
            return [*first, self.node("Add", [first[0].outputs[0], factors[1]], image.shape)]

        return self.before(chain)

    def channels(self, *order: int) -> Edit:
        """The image's channels in another order."""
        return self.before(
            lambda image: [self.node("Gather", [image, self.constant(order, np.int64)], image.shape, axis=1)]
        )

    def weight(self, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
        """Other values of an initializer."""
        value = self.graph.initializers[name]
        assert value.const_value is not None
        array = change(value.const_value.numpy())
        value.const_value = ir.tensor(np.ascontiguousarray(array.astype(np.float32)), name=name)
        return self


def perturbed(encoder: Sam3DualViTDetNeck, share: float, seed: int = 0) -> Sam3DualViTDetNeck:
    """A fine-tune: every matrix moved by a share of its own size."""
    import copy

    twin = copy.deepcopy(encoder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += share * parameter.std() * noise
    return twin


def swap_weights(model: ir.Model, other: Callable[[np.ndarray], np.ndarray | None]) -> int:
    """Other values of the initializers for which `other` gives some; says of how many."""
    count = 0
    for value in model.graph.initializers.values():
        if value.dtype == FLOAT and value.const_value is not None:
            array = value.const_value.numpy()
            new = other(array)
            if new is not None:
                made = np.ascontiguousarray(new.reshape(array.shape).astype(np.float32))
                value.const_value = ir.tensor(made, name=value.name)
                count += 1
    return count


def weights_of(
    edit: Edit, parameter: torch.Tensor, change: Callable[[np.ndarray], np.ndarray], several: bool = False
) -> None:
    """Changes the initializer that holds a parameter, transposed or not, whatever its name."""
    wanted = parameter.detach().numpy()

    def other(array: np.ndarray) -> np.ndarray | None:
        if array.size != wanted.size:
            return None
        for form in (wanted, wanted.T):
            if array.squeeze().shape == form.squeeze().shape and np.array_equal(array.reshape(form.shape), form):
                return change(array)
        return None

    count = swap_weights(edit.model, other)
    assert several or count == 1, f"{count} initializers hold it"


def half(edit: Edit) -> None:
    """Everything in FP16, as `module.half()` exports it: image, outputs, LayerNorm and attention."""
    low = ir.DataType.FLOAT16
    for value in edit.graph.initializers.values():
        if value.dtype == FLOAT and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.type = ir.TensorType(low)
    for value in [*edit.graph.inputs, *(output for node in edit.graph for output in node.outputs)]:
        if value.dtype == FLOAT:
            value.type = ir.TensorType(low)
    for node in edit.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == FLOAT.value:
            node.attributes.add(ir.AttrInt64("to", low.value))
