"""The verdict on an ONNX file that another tool wrote: what each output is, whether it is right, and what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.contract.dtypes import BY_ONNX
from export.contract.errors import ExportError
from export.contract.onnx_file import OnnxFile
from export.contract.signature import BatchRange, encoder_signature
from export.foreign.causes import Cause, input_cause, network_causes, output_cause
from export.foreign.image_input import Encoding, ImageInput, find_input
from export.foreign.matching import Match, inconsistencies, match_output, sampled_error
from export.foreign.recognize import NotEncoderError, refuse
from export.foreign.references import TRUNK, Arrays, encoder_tensors, only_needed, parts, patch_embedding
from export.foreign.risks import graph_risks, value_risks
from export.foreign.running import CannotRunError, Runner, cut, first_non_finite, open_file, prepared_model
from export.foreign.running import patch_embedding as find_patch_embedding
from export.foreign.weights import WeightsFound, compare_weights
from export.lowering.attention import attention_forms
from export.verification.fidelity import Comparison, Verdict, check_overrides, compare_output, tolerance_for
from export.verification.target_check import graph_needs, read_by
from export.verification.verify import Reference, Report, check_memory, reference_pixels, require_runtime
from export.weights_origin import encoder_config
from neck.images import ImageFolder
from neck.necks import Sam3DualViTDetNeck
from neck.trunk import ViTDetTrunk

EMBEDDED = 2e-2
"""Relative L2 of the patch embedding up to which a file has the right image; FP16 and BF16 differ by up to 5e-3."""

CODE_TYPES = {"FLOAT8E4M3FN": "fp8", "FLOAT8E5M2": "fp8", "INT8": "int8", "UINT8": "int8"}


@dataclasses.dataclass(frozen=True)
class ForeignVerdict(Verdict):
    """A verdict on a file without a manifest, and what was found out about it.

    Attributes:
        image: its input, and `encoding`, what it expects there.
        matches: what each output is.
        unmatched: outputs that are nothing of the encoder.
        missing: what the encoder gives and the file does not.
        precision: whose tolerances apply.
        weights: whose weights it has.
        causes: what is wrong, the most certain first.
        risks: what may go wrong in another runtime.
        read_by: which runtimes load it.
        images: how many it was judged on.
        encoder: the plain encoder at the file's size.
    """

    image: ImageInput | None = None
    encoding: Encoding = dataclasses.field(default_factory=Encoding)
    matches: tuple[Match, ...] = ()
    unmatched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    precision: str = "fp32"
    weights: WeightsFound | None = None
    causes: tuple[Cause, ...] = ()
    risks: tuple[str, ...] = ()
    read_by: str = ""
    images: int = 1
    encoder: Sam3DualViTDetNeck | None = None

    @property
    def passed(self) -> bool:
        """Whether a feature map is among the outputs, every comparison passed, and no name says otherwise."""
        features = any("_pos_" not in match.tensor for match in self.matches)
        return features and super().passed and not self.causes

    @property
    def failed_names(self) -> list[str]:
        """Names of the outputs that left tolerance, or that are not what their names say."""
        wrong = [cause.output for cause in self.causes if cause.output]
        return list(dict.fromkeys([*super().failed_names, *wrong])) or [cause.kind for cause in self.causes]

    @property
    def summary(self) -> str:
        """Why it failed."""
        return self.causes[0].sentence if self.causes else super().summary

    def lines(self) -> list[str]:
        """What was found, for a screen; the table of figures is printed apart."""
        return [
            f"input   {self.image}. The ONNX file expects pixels in this encoding: {self.encoding}",
            *(f"output  {match}" for match in self.matches),
            *(f"output  {name}" for name in self.unmatched),
            *([f"absent  the ONNX file has no output for {' and '.join(self.missing)}"] if self.missing else []),
            f"type    {self.precision} is the lowest precision in the ONNX file, so the tolerances for "
            f"{self.precision} are used",
            *([f"weights {self.weights}"] if self.weights else []),
            *([f"runtime {self.read_by}"] if self.read_by else []),
            *(f"risk    {risk}" for risk in self.risks),
            *super().lines(),
            *(f"WRONG   {cause.sentence}" for cause in self.causes),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return super().to_dict() | {
            "input": dataclasses.asdict(self.image) if self.image else None,
            "expects": str(self.encoding),
            "matches": [{"output": one.output, "tensor": one.tensor, "layout": one.layout} for one in self.matches],
            "unmatched": list(self.unmatched),
            "missing": list(self.missing),
            "precision": self.precision,
            "weights": self.weights.to_dict() if self.weights else None,
            "causes": [dataclasses.asdict(cause) for cause in self.causes],
            "risks": list(self.risks),
            "read_by": self.read_by,
        }


def judge_file(
    file: OnnxFile,
    encoder: Sam3DualViTDetNeck,
    images: Path | ImageFolder | None = None,
    tolerances: Mapping[str, float] | None = None,
    report: Report = lambda line: None,
) -> tuple[ForeignVerdict, Reference]:
    """Compares a foreign file with the plain module: finds its input and what its outputs are, and names what is wrong.

    Args:
        file: the ONNX file.
        encoder: the plain encoder, with all of its necks.
        images: a folder of images; without one the shipped image.
        tolerances: relative L2 by name or wildcard, of the file's outputs or of the encoder's tensors.
        report: told of every step.

    Returns:
        The verdict, and the pixels with all that the encoder gives for them, by its own names.

    Raises:
        ExportError: it is not SAM 3's encoder, or cannot be judged; FidelityError, ImageError: as in verify_file.
    """
    config = encoder_config(encoder)
    try:
        image = find_input(file.model.graph, config)
        return _Judge(file, encoder, images, dict(tolerances or {}), report, image).judge()
    except NotEncoderError as error:
        refuse(file.path, file.model, config, str(error))
    except CannotRunError as error:
        raise ExportError(f"{file.path}: {error}") from None


class _Judge:
    """One judgement: the runs and references that several of its steps share."""

    def __init__(
        self,
        file: OnnxFile,
        encoder: Sam3DualViTDetNeck,
        images: Path | ImageFolder | None,
        tolerances: dict[str, float],
        report: Report,
        image: ImageInput,
    ) -> None:
        self.file, self.report, self.image, self.tolerances = file, report, image, tolerances
        self.encoder = encoder.at_size(image.size)
        config = encoder_config(self.encoder)
        signature = encoder_signature(config, necks="all", batch=BatchRange(image.count, image.count, image.count))
        check_memory(signature, self.encoder)
        self.notes: list[str] = []
        self.pixels = reference_pixels(signature, images, image.count, self.notes.append)
        self.images = Encoding().encode(self.pixels)

    def judge(self) -> tuple[ForeignVerdict, Reference]:
        self.report("running the file in ONNX Runtime")
        runner = open_file(self.file, watch=True)
        embedded = self._embedded()
        encoding = self._fitting(embedded) if embedded else None
        arrays, largest = self._run(runner, encoding or self.image.encodings()[0])
        self.report("computing the reference outputs in PyTorch FP32")
        tensors = encoder_tensors(self.encoder, self.images)
        shared = only_needed(tensors)
        matches, unmatched = self._match(arrays, shared)
        if encoding is None and not embedded:
            encoding, arrays, largest, matches, unmatched = self._search(
                runner, shared, arrays, largest, matches, unmatched
            )
        encoding = encoding or self.image.encodings()[0]
        if not any("_pos_" not in match.tensor for match in matches):
            raise NotEncoderError(_no_feature(arrays, shared))
        precision = file_precision(runner.file.model)
        comparisons = self._compare(matches, shared, precision, arrays)
        weights = compare_weights(prepared_model(self.file)[0], self.encoder)
        bad = self._first_bad(runner, encoding, comparisons)
        failed = [match for match, one in zip(matches, comparisons, strict=True) if not one.passed]
        causes = [Cause(kind, name, sentence) for name, kind, sentence in inconsistencies(matches)]
        causes += self._misshapen(arrays, unmatched, shared)
        if failed:
            causes += self._causes(failed, comparisons, bad, embedded, shared, weights, precision)
        method = self._method(runner, shared)
        forms = collections.Counter(attention_forms(self.file.model.graph))
        known = {match.tensor for match in matches} | {TRUNK}
        verdict = ForeignVerdict(
            tuple(comparisons),
            method,
            bad,
            self.image,
            encoding,
            tuple(matches),
            tuple(
                (
                    f"{name}: this output of shape {shape_text(arrays[name])} matches no output of the encoder "
                    "and was not compared"
                )
                for name in unmatched
            ),
            tuple(missing_tensors(known, tensors)),
            precision,
            weights,
            tuple(causes),
            (*graph_risks(self.file.model, forms, self.image.dynamic_size), *value_risks(largest)),
            read_by(graph_needs(self.file.model)),
            len(self.pixels),
            self.encoder,
        )
        reference = Reference(self.pixels, tensors, "cpu", tuple(self.notes))
        return verdict, reference

    def _run(self, runner: Runner, encoding: Encoding) -> tuple[Arrays, dict[str, float]]:
        return runner.run({self.image.name: self.image.array(encoding.encode(self.pixels))})

    def _embedded(self) -> dict[Encoding, np.ndarray]:
        """What the file's patch embedding gives of the images in each encoding; nothing where it has no such layer."""
        trunk = self.encoder.trunk
        if not isinstance(trunk, ViTDetTrunk):
            return {}
        name = find_patch_embedding(self.file.model, trunk.config.patch_size)
        part = cut(self.file, name) if name else None
        if name is None or part is None:
            return {}
        height, width = trunk.grid
        shape = (len(self.pixels), trunk.config.embed_dim, height, width)
        found = {}
        for encoding in self.image.encodings():
            array = self._run(part, encoding)[0][name]
            if array.shape != shape:
                return {}
            found[encoding] = array
        return found

    def _fitting(self, embedded: Mapping[Encoding, np.ndarray]) -> Encoding | None:
        """The encoding at which the patch embedding gives what the encoder's gives."""
        expected = patch_embedding(self.encoder, self.images)
        errors = {encoding: sampled_error(array, expected) for encoding, array in embedded.items()}
        best = min(errors, key=lambda encoding: errors[encoding])
        return best if errors[best] <= EMBEDDED else None

    def _match(self, arrays: Arrays, tensors: Arrays) -> tuple[list[Match], list[str]]:
        found = {
            name: match_output(name, array, tensors)
            for name, array in arrays.items()
            if array.dtype.kind == "f" or array.dtype.name == "bfloat16"
        }
        matches = [match for match in found.values() if match]
        return matches, [name for name in arrays if not found.get(name)]

    def _search(self, runner: Runner, tensors: Arrays, *first: Any) -> tuple[Any, ...]:
        """Runs the file on every encoding, where no patch embedding tells which it expects."""
        best: tuple[float, Any] = (_feature_error(first[2]), (self.image.encodings()[0], *first))
        for encoding in self.image.encodings()[1:]:
            if best[0] <= EMBEDDED:
                break
            self.report(f"testing whether the ONNX file expects pixels as {encoding}")
            arrays, largest = self._run(runner, encoding)
            matches, unmatched = self._match(arrays, tensors)
            error = _feature_error(matches)
            if error < best[0]:
                best = error, (encoding, arrays, largest, matches, unmatched)
        return best[1] if best[0] <= 5 * EMBEDDED else (self.image.encodings()[0], *first)

    def _compare(self, matches: Sequence[Match], tensors: Arrays, precision: str, arrays: Arrays) -> list[Comparison]:
        check_overrides(self.tolerances, [*(match.output for match in matches), *(match.tensor for match in matches)])
        found = []
        for match in matches:
            names = (match.output, match.tensor)
            asked = [
                value
                for pattern, value in self.tolerances.items()
                if any(fnmatch.fnmatchcase(name, pattern) for name in names)
            ]
            overrides = {match.tensor: asked[-1]} if asked else {}
            tolerance = tolerance_for(match.tensor, precision, overrides, self._output_dtype(match.output))
            if asked:  # what the user allows of a position is all that it must keep
                tolerance = dataclasses.replace(tolerance, max_abs=None)
            expected = tensors[match.tensor][: len(match.array)]
            found.append(compare_output(match.output, expected, match.array, tolerance))
        return found

    def _output_dtype(self, name: str) -> str | None:
        value = next(value for value in self.file.model.graph.outputs if value.name == name)
        kinds = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
        return kinds.get(value.dtype) if value.dtype else None

    def _first_bad(self, runner: Runner, encoding: Encoding, comparisons: Sequence[Comparison]) -> str | None:
        if not any(one.non_finite for one in comparisons):
            return None
        self.report("searching for the first tensor with NaN or infinity")
        return first_non_finite(runner, {self.image.name: self.image.array(encoding.encode(self.pixels))})

    def _misshapen(self, arrays: Arrays, unmatched: Sequence[str], tensors: Arrays) -> list[Cause]:
        """Outputs that look like maps of the encoder, of another size or with other channels."""
        causes = []
        channels = {array.shape[1] for array in tensors.values()}
        sides = {array.shape[2:] for array in tensors.values()}
        tokens = {height * width for height, width in sides}
        sizes = ", ".join(dict.fromkeys(f"{height}x{width}" for height, width in sides))
        for name in unmatched:
            shape = arrays[name].shape
            kind = "positions" if "pos" in name.lower() else "levels"
            told = f"the output {name} has the shape {shape_text(arrays[name])}"
            pairs = set(itertools.pairwise(shape))
            if sum(side > 1 for side in shape) < 2 or len(shape) > 4 or arrays[name].dtype.kind not in "fV":
                continue
            if len(shape) > 2 and channels & {*shape}:
                causes.append(
                    Cause(
                        kind,
                        name,
                        f"{told}, which looks like a feature map of the wrong size; the feature maps of this "
                        f"encoder have the sizes {sizes}",
                    )
                )
            elif pairs & sides or tokens & {*shape}:
                told += ", but no output of the encoder has this number of channels"
                hint = "; to compare SAM 2's high-resolution maps, use a checkpoint that contains the mask decoder"
                causes.append(Cause(kind, name, told + hint * (self.encoder.sam2_head is None)))
        return causes

    def _causes(
        self,
        failed: Sequence[Match],
        comparisons: Sequence[Comparison],
        bad: str | None,
        embedded: Mapping[Encoding, np.ndarray],
        tensors: Arrays,
        weights: WeightsFound,
        precision: str,
    ) -> list[Cause]:
        """Why outputs failed, the most certain first; always at least one."""
        causes: list[Cause] = []
        overflown = [one.name for one in comparisons if one.non_finite]
        if overflown:
            where = f"; the first tensor with NaN or infinity is {bad}" if bad else ""
            causes.append(
                Cause(
                    "overflow",
                    overflown[0],
                    f"overflow: the outputs {', '.join(overflown)} contain NaN or infinity{where}",
                )
            )
        if embedded and not self._fitting(embedded):
            self.report(
                "searching for the reason why the outputs of the ONNX file differ from the outputs of PyTorch: testing "
                "whether the ONNX file expects another normalization or channel order of the input image"
            )
            embed = functools.partial(patch_embedding, self.encoder)
            if cause := input_cause(embedded, embed, self.images, moved=weights.origin != "other weights"):
                return [*causes, cause]
        if weights.origin in ("another fine-tune's", "other weights"):
            causes.append(
                Cause(
                    "weights",
                    None,
                    f"the weights in the ONNX file differ from the weights in the checkpoint: {weights}. Use "
                    "--checkpoint to pass the checkpoint that the ONNX file was exported from, or export the ONNX file "
                    "again from the given checkpoint",
                )
            )
        rest = []
        for match in failed:
            if match.output in overflown:
                continue
            cause = output_cause(match, tensors, self.encoder)
            if cause:
                causes.append(cause)
            else:
                rest.append(match)
        if rest and weights.origin not in ("another fine-tune's", "other weights"):
            cause = network_causes(rest, self.images, self.encoder, self.report)
            causes += [cause] if cause else [_unknown(rest, embedded, weights, precision)]
        return causes

    def _method(self, runner: Runner, tensors: Arrays) -> str:
        how = f", {runner.how}" if runner.how else ""
        reference = Reference(self.pixels, tensors, "cpu", tuple(self.notes))
        return reference.method(f"ONNX Runtime {require_runtime().__version__}", how)


def _unknown(
    failed: Sequence[Match], embedded: Mapping[Encoding, np.ndarray], weights: WeightsFound, precision: str
) -> Cause:
    """What is said where no variant of the reference gives what the file gives."""
    names = ", ".join(match.output for match in failed)
    worst = max(match.error for match in failed)
    if "rounded" in " ".join(weights.forms) and precision == "fp32":
        return Cause(
            "rounding",
            None,
            "the ONNX file is an FP32 file, but some of its weights were rounded to a type with fewer bits. The "
            f"numerical errors of the outputs {names} are therefore outside the tolerance for FP32. Export the ONNX "
            "file again with FP32 weights, or raise the tolerance with --tolerance",
        )
    if any("quantized" in form for form in weights.forms):
        return Cause(
            "rounding",
            None,
            "some weights in the ONNX file are quantized, so the numerical errors of the outputs "
            f"{names} are outside the tolerance. Compared with PyTorch and unquantized weights, the relative L2 error "
            f"is up to {worst:.2g}. To accept the error, raise the tolerance with --tolerance",
        )
    if worst < 0.1:
        return Cause(
            "rounding",
            None,
            f"the outputs {names} differ from those of PyTorch by up to {worst:.2g} (relative L2), which "
            "suggests a loss of precision inside the network",
        )
    return Cause(
        "unknown",
        None,
        f"the relative L2 difference between the ONNX file and PyTorch is up to {worst:.2g} in the outputs {names}. "
        "The cause is unknown, because none of the export mistakes that neck-export can recognize explains the "
        "difference. Check the model code from which the ONNX file was exported, or export the encoder again with "
        "`neck-export onnx`",
    )


def _feature_error(matches: Sequence[Match]) -> float:
    """The smallest error of a feature: where one is right, the image was."""
    return min((match.error for match in matches if "_pos_" not in match.tensor), default=float("inf"))


def _no_feature(arrays: Arrays, tensors: Arrays) -> str:
    given = ", ".join(f"{name} {shape_text(array)}" for name, array in arrays.items())
    features = [name for name in tensors if "_pos_" not in name and name != TRUNK][:4]
    wanted = ", ".join(f"{parts(name)[2]}: {shape_text(tensors[name])}" for name in features)
    return (
        "none of the file's outputs has the shape of a feature map of the checkpoint's encoder; the outputs "
        f"are {given}, but the encoder's levels are {wanted}"
    )


def shape_text(array: np.ndarray) -> str:
    """A shape such as (1, 256, 72, 72)."""
    return f"({', '.join(map(str, array.shape))})"


def missing_tensors(known: set[str], tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What the encoder gives and no output is; positions by their level alone, since all necks share them."""
    levels = {parts(name)[2] for name in known if "_pos_" in name}
    found: dict[str, list[str]] = {}
    for name in tensors:
        if name not in known and name != TRUNK:
            neck, kind, level = parts(name)
            if kind == "feat" and f"{neck}_high_res_{level}" not in known:
                found.setdefault(f"features of neck {neck}", []).append(str(level))
            elif kind == "pos" and level not in levels:
                found.setdefault("position encodings", []).append(str(level))
    return [f"the {what} at level {', '.join(dict.fromkeys(levels))}" for what, levels in found.items()]


def file_precision(model: ir.Model) -> str:
    """Whose tolerances apply: the shortest type in which the file holds codes, weights or results."""
    types = {value.dtype.name for value in model.graph.initializers.values() if value.dtype}
    operators = {node.op_type for node in model.graph.all_nodes()}
    types |= {output.dtype.name for node in model.graph.all_nodes() for output in node.outputs if output.dtype}
    if operators & {
        "DequantizeLinear",
        "QLinearMatMul",
        "QLinearConv",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeLinear",
    }:
        return next((CODE_TYPES[name] for name in CODE_TYPES if name in types and name.startswith("FLOAT8")), "int8")
    return next((str(BY_ONNX[name].precision) for name in ("BFLOAT16", "FLOAT16") if name in types), "fp32")
