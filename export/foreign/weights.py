"""Whose weights a foreign file has: its initializers against a checkpoint's tensors, by value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import numpy as np
import onnx_ir as ir
import torch

from export.foreign.image_input import numpy_type
from export.graph.rewrite import DeployProjection, Rewrites, rewrite
from neck.necks import Sam3DualViTDetNeck
from neck.trunk import ViTDetTrunk

UNCHANGED = "unchanged"
SMALLEST = 16
"""Elements; a smaller tensor is found by chance."""
SAMPLED = 1 << 12
"""Elements by which the tensor that an initializer may be is looked for; all are compared after that."""
SAME = 1e-6
"""Relative L2 below which two tensors are the same: a product with a scale rounds by 6e-8."""
ROUNDED = {"float16": 1e-3, "bfloat16": 8e-3, "codes": 0.1}
"""Relative L2 that a type's rounding may leave, twice what it leaves of normal numbers; `codes` are FP8 or INT8."""
NEAR = 0.5
"""Relative L2 below which a tensor is another version of the checkpoint's; tensors of another training are at 1.4."""

Known = dict[tuple[int, ...], list[Any]]
"""Shape without ones -> form, name, values and a sample of every tensor of that shape."""

Origin = Literal["the checkpoint's", "another fine-tune's", "other weights", "undecidable"]


@dataclasses.dataclass(frozen=True)
class WeightsFound:
    """Whose weights a file has.

    Attributes:
        origin: in a word.
        forms: how many initializers are the checkpoint's tensors in each form: as it is, transposed, cast, ...
        near: initializers that are near a tensor of the checkpoint, and not it; with the relative L2.
        unknown: initializers that are like no tensor of the checkpoint.
        share: part of the compared elements that is the checkpoint's.
    """

    origin: Origin
    forms: Mapping[str, int]
    near: Mapping[str, float]
    unknown: tuple[str, ...]
    share: float

    def __str__(self) -> str:
        forms = ", ".join(f"{count} {form}" for form, count in self.forms.items())
        count = sum(self.forms.values())
        total = count + len(self.near) + len(self.unknown)
        if self.origin == "the checkpoint's":
            more = (
                f". The other {len(self.unknown)} tensors match no tensor of the checkpoint and may be constants that "
                "the exporter computed"
                if self.unknown
                else ""
            )
            return (
                f"{count} of {total} tensors in the ONNX file match tensors of the checkpoint, so the weights come "
                f"from the checkpoint. How the ONNX file stores the matching tensors: {forms}{more}"
            )
        if self.origin == "another fine-tune's":
            name, error = max(self.near.items(), key=lambda pair: pair[1])
            return (
                f"{len(self.near)} of {total} weight tensors in the ONNX file are close, but not equal, to tensors in "
                "the checkpoint, so the weights come from another fine-tuned version of the model. The "
                f"relative L2 difference is largest in the tensor {name}: {error:.2g}"
            )
        if self.origin == "other weights":
            return (
                f"{len(self.unknown)} of {total} tensors in the ONNX file resemble no tensor of the checkpoint, so the "
                "weights do not come from the checkpoint"
            )
        return (
            f"{count} of {total} tensors in the ONNX file match tensors of the checkpoint, which is not enough to "
            "decide whether the weights come from the checkpoint"
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = dataclasses.asdict(self)
        return values | {"near": dict(self.near), "unknown": list(self.unknown)[:20], "says": str(self)}


def compare_weights(model: ir.Model, encoder: Sam3DualViTDetNeck) -> WeightsFound:
    """Compares the weights of a graph with an encoder's, whatever the names.

    Args:
        model: the file's graph, its functions inlined.
        encoder: the plain encoder, set to the file's image size.
    """
    known = _by_shape(encoder)
    forms: dict[str, int] = {}
    near: dict[str, float] = {}
    unknown: list[str] = []
    compared = same = 0
    for name, values, kind in file_weights(model):
        shape = tuple(side for side in values.shape if side != 1)
        if not math.prod(shape) >= SMALLEST or not np.isfinite(values.reshape(-1)[:SAMPLED].astype(np.float32)).all():
            continue
        found = _nearest(values, shape, kind, known)
        if found is None:
            continue
        form, error, scaled = found
        compared += values.size
        if error <= max(SAME, ROUNDED.get(kind, 0)):
            words = [form] * (form != UNCHANGED) + ["scaled"] * scaled
            words += ["quantized"] if kind == "codes" else [f"cast to {kind}"] * (kind in ROUNDED)
            word = " and ".join(words) or UNCHANGED
            forms[word] = forms.get(word, 0) + 1
            same += values.size
        elif error <= ROUNDED["float16"] and _is_rounded(values):
            forms[f"{form} and rounded"] = forms.get(f"{form} and rounded", 0) + 1
            same += values.size
        elif len(shape) < 2:  # biases and norms are too alike to tell anything when they differ
            continue
        elif error <= NEAR:
            near[name] = error
        else:
            unknown.append(name)
    total = compared or 1
    return WeightsFound(_origin(forms, near, unknown, same / total), forms, near, tuple(unknown), same / total)


def _origin(forms: Mapping[str, int], near: Mapping[str, float], unknown: list[str], share: float) -> Origin:
    count = sum(forms.values())
    if near:
        return "another fine-tune's"
    if count >= 4 and count >= 2 * len(unknown):
        return "the checkpoint's"
    return "other weights" if len(unknown) >= 4 and count < len(unknown) / 2 else "undecidable"


def file_weights(model: ir.Model) -> Iterator[tuple[str, np.ndarray, str]]:
    """Name, values and type of every weight of a graph; quantized ones as the numbers that their codes stand for."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or value.dtype is None:
            continue
        if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
            kinds = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
            yield name, tensor.numpy(), kinds.get(value.dtype, "float32")
        elif (codes := _dequantized(value)) is not None:
            yield name, codes, "codes"


def _dequantized(value: ir.Value) -> np.ndarray | None:
    """What the codes of a weight stand for, where a DequantizeLinear or an integer product reads them."""
    for node, position in value.uses():
        if node.op_type == "DequantizeLinear" and position == 0:
            scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
            known = [ir.convenience.get_const_tensor(one) if one is not None else None for one in (scale, zero)]
            if known[0] is None or value.const_value is None or (zero is not None and known[1] is None):
                return None
            codes, scales = value.const_value.numpy().astype(np.float32), known[0].numpy().astype(np.float32)
            shift = known[1].numpy().astype(np.float32) if known[1] is not None else np.float32(0)
            if scales.size > 1:
                axis = node.attributes.get_int("axis", 1) % codes.ndim
                along = [-1 if index == axis else 1 for index in range(codes.ndim)]
                if scales.ndim != 1 or scales.size != codes.shape[axis]:
                    return None
                scales, shift = scales.reshape(along), shift.reshape(along) if shift.size > 1 else shift
            return np.asarray((codes - shift) * scales)
        if node.op_type in ("MatMulInteger", "ConvInteger") and position == 1 and value.const_value is not None:
            zero = node.inputs[3] if len(node.inputs) > 3 else None
            known_zero = ir.convenience.get_const_tensor(zero) if zero is not None else None
            codes = value.const_value.numpy().astype(np.float32)
            return codes - (known_zero.numpy().astype(np.float32) if known_zero is not None else 0)
    return None


def _by_shape(encoder: Sam3DualViTDetNeck) -> Known:
    """Shape without ones -> the tensors of that shape, in every form that a file may hold."""
    known: Known = {}

    def add(form: str, name: str, tensor: torch.Tensor) -> None:
        array = tensor.detach().float().cpu().numpy()
        shape = tuple(side for side in array.shape if side != 1)
        array = array.reshape(shape)
        known.setdefault(shape, []).append((form, name, array, _sample(array)))
        if len(shape) == 2:
            known.setdefault(shape[::-1], []).append(
                ("transposed" if form == UNCHANGED else f"{form} and transposed", name, array.T, _sample(array.T))
            )

    for name, tensor in encoder.state_dict().items():
        add(UNCHANGED, name, tensor)
        if ".qkv." in name:
            for part in tensor.chunk(3):
                add("split", name, part)
        if name == "trunk.pos_embed":
            add("without its class token", name, tensor[:, 1:])
            add("tiled", name, cast(ViTDetTrunk, encoder.trunk).position())
    plain = {tensor.data_ptr() for tensor in encoder.state_dict().values()}
    deployed = rewrite(encoder, Rewrites())
    for module in deployed.modules():
        if isinstance(module, DeployProjection):
            for name, tensor in zip(("weight", "bias"), module.rewritten(), strict=True):
                add("folded", name, tensor)
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.data_ptr() not in plain:
                add("folded", name, tensor)
    return known


def _sample(array: np.ndarray) -> np.ndarray:
    """Some of an array's elements, the same for arrays of one shape, as a vector of length 1."""
    step = max(1, array.size // SAMPLED) | 1
    vector = array.reshape(-1)[::step][:SAMPLED].astype(np.float64)
    norm = np.linalg.norm(vector)
    return vector / norm if norm else vector


def _nearest(values: np.ndarray, shape: tuple[int, ...], kind: str, known: Known) -> tuple[str, float, bool] | None:
    """Form and relative L2 of the tensor that is most like some values, and whether one is the other times a number."""
    candidates = known.get(shape)
    if not candidates:
        return None
    values = values.reshape(shape)
    sample = _sample(values)
    best = max(candidates, key=lambda candidate: float(sample @ candidate[3]))
    form, _, array, _ = best
    a, b = values.astype(np.float32).reshape(-1), array.reshape(-1)
    norm = float(np.linalg.norm(b.astype(np.float64)))
    if not norm:
        return None
    error = float(np.linalg.norm((a - b).astype(np.float64))) / norm
    if error <= SAME:
        return form, error, False
    if kind in ("float16", "bfloat16") and np.array_equal(a, b.astype(numpy_type(kind)).astype(np.float32)):
        return form, 0.0, False
    scale = float(np.dot(a, b)) / norm**2
    if scale > 0 and abs(scale - 1) > 1e-2:
        scaled = float(np.linalg.norm((a / scale - b).astype(np.float64))) / norm
        if scaled < error and scaled <= ROUNDED["codes"]:
            return form, scaled, True
    return form, error, False


def _is_rounded(values: np.ndarray) -> bool:
    """Whether FP32 values are those of a shorter type."""
    single = values.astype(np.float32)
    return any(
        bool((single.astype(numpy_type(kind)).astype(np.float32) == single).all()) for kind in ("float16", "bfloat16")
    )
