"""`--write-manifest`: a foreign file that passed becomes one that trt, triton, attach and masks take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from export.contract.atomic import disk_errors, new_folder, publish, staging
from export.contract.dtypes import BY_ONNX
from export.contract.errors import ExportError
from export.contract.manifest import manifest_path, seen, write_manifest
from export.contract.onnx_file import OnnxFile
from export.contract.signature import BATCH, BatchRange, Signature, SignatureError, encoder_signature
from export.foreign.image_input import CLIP, IMAGENET, Encoding, ImageInput
from export.foreign.judge import ForeignVerdict
from export.foreign.matching import Match
from export.foreign.references import parts
from export.foreign.running import prepared_model
from export.graph.rewrite import Rewrites
from export.manifest_values import graph_facts
from export.output_files import check_targets
from export.verification.target_check import graph_needs
from export.verification.verify import Reference, Report, verify_onnx
from export.weights_origin import encoder_config, package_versions, tool_version, weights_origin
from neck.checkpoint_keys import NECK_MODULES
from neck.necks import Sam3DualViTDetNeck
from neck.source import Origin
from neck.weights.fingerprint import fingerprints

DYNAMIC = BatchRange(1, 4, 8)
"""The batch range that is written for a file whose batch is not fixed."""


def adopt(
    file: OnnxFile,
    verdict: ForeignVerdict,
    encoder: Sam3DualViTDetNeck,
    origin: Origin,
    reference: Reference,
    report: Report = lambda line: None,
) -> Path:
    """Writes a manifest for a foreign file that passed.

    A file whose input and outputs are named and laid out as neck-export's gets a manifest beside it. Of any other,
    X.onnx, a copy of the graph with such an input and outputs is written, X.neck.onnx, which reads the same weights
    files, and the manifest beside that; the copy is verified before it gets its name.

    Args:
        file: the file.
        verdict: of judge_file, passed.
        encoder: the plain encoder, with all of its necks.
        origin: where its weights were read.
        reference: what the encoder gives, by its own names.
        report: told of every step.

    Returns:
        The ONNX file that the manifest speaks of.

    Raises:
        ExportError: it failed, or has no set of outputs that neck-export's commands take.
    """
    if not verdict.passed or verdict.image is None:
        raise ExportError(
            f"{file.path}: the file failed verification, so no manifest was written; to see which outputs differ "
            "and why, call lines() on the verdict that judge_file returned, and print the result"
        )
    encoder = encoder.at_size(verdict.image.size)
    model, _ = prepared_model(file)
    signature = contract_of(file, verdict)
    own = _is_ours(file.model, signature, verdict)
    target = file.path if own else file.path.with_name(f"{file.path.stem}.neck.onnx")
    check_targets(target)
    if not own and target.exists() and not manifest_path(target).exists():
        raise ExportError(
            f"{target}: this file already exists without a manifest and would be overwritten; move this file, and "
            "repeat the command"
        )
    with disk_errors(ExportError, target.parent), new_folder(target.parent), staging(target) as folder:
        staged = folder / target.name
        if not own:
            report(
                f"writing {target.name}, a copy of {file.path.name} whose inputs and outputs have the names, layouts "
                "and types that neck-export uses"
            )
            _adapt(model, signature, verdict)
            ir.save(model, staged)
        needs = graph_needs(model)
        proof = verdict.to_dict()
        if not own:
            adapted = OnnxFile(file.path)  # the graph that was written, with the weights where they lie
            adapted.model = model
            checked = verify_onnx(adapted, signature, reference, verdict.precision, report=report)
            if not checked.passed:
                raise ExportError(
                    f"{target}: this copy of {file.path.name} was not saved. neck-export adapted the inputs and "
                    f"outputs of the copy, but the adapted copy failed verification: {checked.summary}. Please report "
                    "this bug in neck-export"
                )
            proof = checked.to_dict() | {"adapted_from": file.path.name}
        files = [staged if not own else target, *(target.with_name(data.name) for data in _weights_files(model))]
        values = _facts(verdict, encoder, signature, origin) | graph_facts(model, needs, ())
        values |= {"verification": proof | {"files": seen(files)}}
        write_manifest(manifest_path(staged), "onnx", values, files)
        publish(folder, manifest_path(target) if own else target)
    return target


def _facts(
    verdict: ForeignVerdict, encoder: Sam3DualViTDetNeck, signature: Signature, origin: Origin
) -> dict[str, Any]:
    """What a manifest says of an export, as far as it is known of a foreign file."""
    wanted = {"trunk", *(NECK_MODULES[neck] for neck in signature.necks)}
    wanted |= {"sam2_head"} if signature.sam2_outputs == "head" else set()
    tensors = ((name, tensor) for name, tensor in encoder.state_dict().items() if name.split(".")[0] in wanted)
    low = verdict.precision if verdict.precision in ("fp32", "fp16", "bf16") else "fp32"
    return {
        "versions": {"neck-export": tool_version(), **package_versions()},
        "encoder": encoder_config(encoder).to_dict(),
        "signature": signature.to_dict(),
        "weights_sha256": fingerprints(tensors),
        "precision": verdict.precision,
        "attention": "auto",
        "attention_form": "fused",
        "attention_spelling": "matmul",
        "upsampling": "auto",
        "keep_fp32": [],
        "rewrites": dataclasses.asdict(Rewrites.none()),
        "residual": low,
        "weights": weights_origin(origin),
        "notes": [
            "the ONNX file was written by another tool, and this manifest by `neck-export verify --write-manifest`"
        ],
    }


def contract_of(file: OnnxFile, verdict: ForeignVerdict) -> Signature:
    """The largest contract that the outputs of a judged file fulfil.

    Raises:
        ExportError: none of its outputs is a level of a neck.
    """
    image, encoder, path = verdict.image, verdict.encoder, file.path
    assert image is not None and encoder is not None
    have = {match.tensor for match in verdict.matches}
    positions = {parts(name)[2] for name in have if "_pos_" in name}
    necks = [
        neck for neck in encoder.necks if any(name.startswith(f"{neck}_") and "_pos_" not in name for name in have)
    ]
    batch = DYNAMIC if image.dynamic_batch else BatchRange(image.count, image.count, image.count)
    config = encoder_config(encoder)
    feature = next(match for match in verdict.matches if "_pos_" not in match.tensor)
    value = next(value for value in file.model.graph.outputs if value.name == feature.output)
    best: Signature | None = None
    for count in range(len(necks), 0, -1):
        for some in itertools.combinations(necks, count):
            for head in ("head", "features") if "sam2" in some and config.sam2_head else ("features",):
                for size in range(len(config.scale_factors), 0, -1):
                    for levels in itertools.combinations(range(len(config.scale_factors)), size):
                        try:
                            made = encoder_signature(
                                config,
                                necks=",".join(some),
                                levels=",".join(map(str, levels)),
                                positions="graph" if positions >= {*levels} and not _shared(verdict) else "none",
                                input_kind="uint8" if image.dtype == "uint8" else "float",
                                batch=batch,
                                dtype=_dtype(value) or "float32",
                                sam2_outputs=head,
                            )
                        except SignatureError:
                            continue
                        if {*made.features} <= have and (best is None or len(made.features) > len(best.features)):
                            best = made
    if best is None:
        raise ExportError(
            f"{path}: none of the file's outputs is a feature level of a neck, so the commands of neck-export "
            "cannot use the file; export an encoder with its neck"
        )
    return best


def _shared(verdict: ForeignVerdict) -> bool:
    """Whether a position encoding has one image's batch though the file takes any."""
    image = verdict.image
    assert image is not None
    return image.dynamic_batch and any("_pos_" in one.tensor and len(one.array) == 1 for one in verdict.matches)


def _dtype(value: ir.Value) -> str | None:
    """NumPy's name of a value's type; None if no output of ours has it, or the graph does not tell it."""
    known = BY_ONNX.get(value.dtype.name) if value.dtype else None
    return known.name if known and known.precision else None


def _is_ours(model: ir.Model, signature: Signature, verdict: ForeignVerdict) -> bool:
    """Whether a file has the contract's input and outputs already."""
    image = verdict.image
    assert image is not None
    kinds = {match.output: match for match in verdict.matches}
    names = [str(value.name) for value in model.graph.outputs]
    layout = "NHWC" if image.dtype == "uint8" else "NCHW"
    return (
        (image.name, image.layout, image.dtype) == ("image", layout, signature.image.dtype)
        and verdict.encoding == Encoding("bytes" if image.dtype == "uint8" else "sam3")
        and names == [spec.name for spec in signature.outputs]
        and all(kinds[name].layout == "NCHW" for name in names)
        and all(_dtype(value) == signature.dtype for value in model.graph.outputs if value.dtype)
        and not image.dynamic_size
    )


def _weights_files(model: ir.Model) -> list[Path]:
    """The files beside the file in which its weights lie."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sorted({Path(one.path) for one in tensors if isinstance(one, ir.ExternalTensor)})


class _Builder:
    """Nodes that are added to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.count = graph, 0

    def constant(self, array: Any, dtype: Any) -> ir.Value:
        self.count += 1
        name = f"neck.constant_{self.count}"
        given = np.asarray(array, dtype)
        tensor = ir.tensor(given, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(given.shape), type=ir.TensorType(tensor.dtype))
        self.graph.register_initializer(value)
        return value

    def node(
        self, operator: str, inputs: Sequence[ir.Value], dtype: ir.DataType, shape: Any, **attributes: Any
    ) -> ir.Node:
        self.count += 1
        node = ir.node(operator, list(inputs), attributes, name=f"neck.{operator.lower()}_{self.count}")
        node.outputs[0].name, node.outputs[0].type = f"neck.value_{self.count}", ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape(shape)
        return node


def _adapt(model: ir.Model, signature: Signature, verdict: ForeignVerdict) -> None:
    """Gives a graph the contract's input and outputs, in place."""
    image = verdict.image
    assert image is not None
    builder = _Builder(model.graph)
    if image.dynamic_size or image.dynamic_batch:
        _fix_sides(model.graph, image, signature)
    _adapt_outputs(builder, signature, verdict.matches)
    common_passes.RemoveUnusedNodesPass()(model)
    _adapt_input(builder, image, verdict.encoding, signature)
    common_passes.TopologicalSortPass()(model)


def _fix_sides(graph: ir.Graph, image: ImageInput, signature: Signature) -> None:
    value = next(value for value in graph.inputs if value.name == image.name)
    sides = {"N": signature.batch.dim, "C": 3, "H": image.size[0], "W": image.size[1]}
    value.shape = ir.Shape([sides[axis] for axis in image.layout])


def _adapt_input(builder: _Builder, image: ImageInput, encoding: Encoding, signature: Signature) -> None:
    graph, spec = builder.graph, signature.image
    old = next(value for value in graph.inputs if value.name == image.name)
    bytes_in = image.dtype == "uint8"
    if (image.layout, image.dtype) == ("NHWC" if bytes_in else "NCHW", spec.dtype) and encoding == Encoding(
        "bytes" if bytes_in else "sam3"
    ):
        old.name = spec.name
        return
    dtype = ir.DataType.UINT8 if bytes_in else ir.DataType.FLOAT
    new = ir.Value(name=spec.name, type=ir.TensorType(dtype), shape=ir.Shape(spec.shape))
    chain: list[ir.Node] = []

    def add(
        operator: str, *more: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, shape: Any = spec.shape, **kept: Any
    ) -> None:
        value = chain[-1].outputs[0] if chain else new
        chain.append(builder.node(operator, [value, *more], dtype, shape, **kept))

    batch, (height, width) = spec.shape[0], image.size
    planes = [batch, 3, height, width]
    if bytes_in:  # to float first: TensorRT's Transpose takes no uint8
        add("Cast", to=ir.DataType.FLOAT.value)
        add("Transpose", shape=planes, perm=[0, 3, 1, 2])
    elif encoding.values != "sam3":
        scale, shift = _affine(encoding.values)
        add("Mul", builder.constant(scale.reshape(1, 3, 1, 1), np.float32))
        add("Add", builder.constant(shift.reshape(1, 3, 1, 1), np.float32))
    if encoding.channels != (0, 1, 2):
        add("Gather", builder.constant(encoding.channels, np.int64), shape=planes, axis=1)
    if image.layout.endswith("C"):
        add("Transpose", shape=[batch, height, width, 3], perm=[0, 2, 3, 1])
    if "N" not in image.layout:
        sides = {"C": 3, "H": height, "W": width}
        shape = [sides[axis] for axis in image.layout]
        add("Reshape", builder.constant(shape, np.int64), shape=shape)
    if old.dtype is not None and old.dtype != ir.DataType.FLOAT:
        add("Cast", dtype=old.dtype, shape=old.shape, to=old.dtype.value)
    for user, position in list(old.uses()):
        user.replace_input_with(position, chain[-1].outputs[0])
    graph.inputs[list(graph.inputs).index(old)] = new
    graph.insert_before(graph[0], chain)


def _affine(values: str) -> tuple[np.ndarray, np.ndarray]:
    """Factor and summand of each channel that bring SAM 3's numbers into others."""
    if values in ("imagenet", "clip"):
        mean, deviation = IMAGENET if values == "imagenet" else CLIP
        return 0.5 / deviation, (0.5 - mean) / deviation
    half = np.full(3, 127.5 if values == "bytes" else 0.5)
    return half, half


def _adapt_outputs(builder: _Builder, signature: Signature, matches: Sequence[Match]) -> None:
    graph = builder.graph
    values = {str(value.name): value for value in graph.outputs}
    by_tensor: dict[str, Match] = {}
    for match in matches:  # of a map that is there twice the first
        _, kind, level = parts(match.tensor) if match.tensor != "trunk" else ("", "trunk", 0)
        by_tensor.setdefault(f"pos_{level}" if kind == "pos" else match.tensor, match)
    wanted = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}[signature.dtype]]
    made = []
    for spec in signature.outputs:
        _, kind, level = parts(spec.name)
        match = by_tensor[f"pos_{level}" if kind == "pos" else spec.name]
        made.append((spec, _in_planes(builder, values[match.output], match, spec.shape, wanted)))
    for value in values.values():
        value.name = f"{value.name}.foreign"
    graph.outputs[:] = []
    for spec, value in made:
        last = builder.node("Identity", [value], wanted, spec.shape)
        last.outputs[0].name = spec.name
        graph.append(last)
        graph.outputs.append(last.outputs[0])


def _in_planes(
    builder: _Builder, value: ir.Value, match: Match, shape: Sequence[int | str], wanted: ir.DataType
) -> ir.Value:
    """An output as NCHW in a type."""
    batch, channels, height, width = shape
    n = -1 if batch == BATCH else batch
    rows, columns = [height, width], [n, height, width, channels]
    forms: dict[str, list[tuple[str, Sequence[int | str]]]] = {
        "NCHW": [],
        "NHWC": [("Transpose", [0, 3, 1, 2])],
        "tokens (N, HW, C)": [("Reshape", columns), ("Transpose", [0, 3, 1, 2])],
        "tokens (HW, N, C)": [("Reshape", [*rows, n, channels]), ("Transpose", [2, 3, 0, 1])],
        "tokens (N, C, HW)": [("Reshape", [n, channels, *rows])],
        "CHW": [("Reshape", [1, channels, *rows])],
        "HWC": [("Reshape", [1, *rows, channels]), ("Transpose", [0, 3, 1, 2])],
        "tokens (HW, C)": [("Reshape", [1, *rows, channels]), ("Transpose", [0, 3, 1, 2])],
        "tokens (C, HW)": [("Reshape", [1, channels, *rows])],
    }
    dtype = value.dtype or ir.DataType.FLOAT
    for operator, axes in forms[match.layout]:
        more = [builder.constant(axes, np.int64)] if operator == "Reshape" else []
        kept = {"perm": axes} if operator == "Transpose" else {}
        sides = axes if operator == "Reshape" else shape
        node = builder.node(operator, [value, *more], dtype, [BATCH if side == -1 else side for side in sides], **kept)
        builder.graph.append(node)
        value = node.outputs[0]
    if dtype != wanted:
        node = builder.node("Cast", [value], wanted, shape, to=wanted.value)
        builder.graph.append(node)
        value = node.outputs[0]
    return value
