"""Rewrites the attention of a file for the installed TensorRT, and tries the next form if TensorRT refuses one.

TensorRT 10.14 and later get the form fp32acc as the Attention operator, for which NVIDIA's release notes promise FP32
accumulation. Older ones cannot read it, and TensorRT-RTX copies its result in a kernel of its own: they get MatMul,
Softmax, MatMul.
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast

import onnx_ir as ir

from engines.builder.build import BuildResult, build_plan
from engines.builder.flavor import Flavor
from engines.builder.onnx_graph import BuildError, RefusedError
from engines.builder.onnx_source import Source, lower_file
from engines.builder.options import BuildOptions
from export.contract.errors import ExportError
from export.contract.export_command import REPLACED_FORMS, export_again
from export.contract.onnx_file import OnnxFile
from export.contract.options import AttentionForm, Precision, Residual, Spelling, Upsampling
from export.contract.targets import TargetError, find_targets, prefers_attention, why_no_fp8_attention
from export.graph.cleanup import MODULE
from export.lowering.attention import AUTO, FORMS, attention_forms, fp8_attentions
from export.lowering.quantize import Quantization
from export.lowering.relower import relower
from export.verification.verify import Report

SPELLED = {"operator": "written as the Attention operator", "matmul": "written as MatMul, Softmax and MatMul"}


class Attempt(NamedTuple):
    """An attention form to build and its spelling; a form of None means that the file is built unchanged."""

    form: str | None
    spelling: Spelling = "matmul"

    @property
    def name(self) -> str:
        """The name of the form in messages."""
        return f"fp32acc ({SPELLED[self.spelling]})" if self.form == "fp32acc" else str(self.form)


@dataclasses.dataclass(frozen=True)
class LoweringOptions:
    """How an FP32 file is lowered to the precision of the plan; the arguments of export.lowering.precision.lower.

    Attributes:
        attention: the requested form; `auto` is the first one that TensorRT can build.
        spelling: the requested spelling of fp32acc; None tries the one that TensorRT prefers, then the other.
        upsampling, keep_fp32, residual, quantization: how an FP32 file is lowered.
        fp8_attention: whether quantized attentions become FP8 if TensorRT is known to fuse them.
    """

    attention: AttentionForm = "auto"
    spelling: Spelling | None = None
    upsampling: Upsampling = "auto"
    keep_fp32: tuple[str, ...] = ()
    residual: Residual = "auto"
    quantization: Quantization | None = None
    fp8_attention: bool = True


@dataclasses.dataclass(frozen=True)
class Built:
    """A built plan with the file that it was built from, its attention form, its residual type, and notes on both."""

    typed: OnnxFile
    result: BuildResult
    attention: Attempt
    residual: str
    notes: tuple[str, ...]


def build_forms(
    source: Source,
    plan: Path,
    build: BuildOptions,
    typing: LoweringOptions,
    flavor: Flavor,
    left: ExitStack,
    report: Report,
) -> Built:
    """Lowers the precision of a file if necessary and builds it; if TensorRT refuses an attention form, tries the next.

    Intermediate files are written beside the plan or are removed by `left`.

    Raises:
        BuildError: no form can be built, or another form would not help. The message lists why forms were refused.
    """
    precision, folder, typed = build.precision, plan.parent, source.file
    _check_residual(source, typing, precision)
    there = held_attention(typed) if source.precision != "fp32" else Attempt(None)
    unfused = no_fp8_attention(flavor)
    keep_fp8 = typing.fp8_attention and unfused is None
    drops = source.precision == precision and not keep_fp8 and bool(fp8_attentions(typed.model.graph))
    if drops:
        there = there._replace(form=there.form or AUTO[precision])
    preferred = (typing.spelling,) if typing.spelling else spellings(flavor)
    attempts = forms_to_try(there.form, precision, typing.attention, source.manifest, preferred)
    if precision != source.precision:
        report(f"lowering the precision from {source.precision} to {precision}")
        there = attempts[0]
        lowering = vars(typing) | {"attention": there.form or typing.attention, "spelling": there.spelling}
        lowering.pop("fp8_attention")
        if typing.quantization is not None and not keep_fp8:
            lowering["quantization"] = dataclasses.replace(typing.quantization, attentions={})
        typed = OnnxFile(lower_file(source, precision, folder, **lowering))
    notes: list[str] = []
    if drops:
        notes.append(
            f"the attention is computed in FP16, not in FP8; reason: {unfused or 'FP16 attention was requested'}"
        )
        report(notes[-1])
        first = attempts[0] if attempts[0].form else there
        typed, there = OnnxFile(relower_file(typed, precision, first, folder, left, keep_fp8=False)), first
    for attempt, later in zip(attempts, (*attempts[1:], None), strict=True):
        if attempt.form is not None and attempt != there and precision != "fp32":
            typed, there = OnnxFile(relower_file(typed, precision, attempt, folder, left)), attempt
            notes.append(meaning(attempt, precision))
            report(notes[-1])
        report(f"building the plan with {flavor.title}")
        try:
            result = build_plan(typed, plan, build, flavor=flavor)
            return Built(typed, result, attempt, typing.residual, tuple(notes))
        except RefusedError as error:
            if later is None or not error.by_form:
                raise BuildError("; ".join([str(error), *(note for note in notes if "refused" in note)])) from None
            notes.append(f"{flavor.title} refused to build the plan with --attention {attempt.name}: {error.reason}")
            report(notes[-1])
    raise AssertionError(
        "internal error: the list of --attention values to try is empty, so no plan was built; please report this error"
    )


def _check_residual(source: Source, typing: LoweringOptions, precision: Precision) -> None:
    held = (source.manifest or {}).get("residual", source.precision)
    if precision == source.precision != "fp32" and typing.residual not in ("auto", held):
        raise BuildError(
            f"{source.path}: the file computes the residual sums in {held}, but --residual {typing.residual} "
            "was requested;\n"
            f"export the file again: {export_again(source.path, residual=typing.residual)}"
        )


def no_fp8_attention(flavor: Flavor) -> str | None:
    """Returns why a TensorRT gets no FP8 attention, or None if it is known to fuse FP8 attention."""
    try:
        return why_no_fp8_attention(find_targets(flavor.target))
    except TargetError:  # a version that the table does not know
        return f"{flavor.title} is not known to fuse FP8 attention"


def spellings(flavor: Flavor) -> tuple[Spelling, ...]:
    """Returns the spellings of fp32acc to try with a TensorRT, the better one first (see `prefers_attention`)."""
    return ("operator", "matmul") if prefers_attention(flavor.name, flavor.version) else ("matmul",)


def held_attention(onnx: Path | OnnxFile) -> Attempt:
    """Returns the form and spelling of most attentions of a file; the form is None if the file cannot be rewritten."""
    model = OnnxFile.of(onnx).model
    if not any(MODULE in node.metadata_props for node in model.graph):
        return Attempt(None)
    counted = collections.Counter(attention_forms(model.graph))
    del counted["FP32"], counted["fp8"]  # of modules that are kept; FP8 attentions have one form
    operator = any(node.op_type == "Attention" for node in model.graph)
    return Attempt(counted.most_common(1)[0][0], "operator" if operator else "matmul") if counted else Attempt(None)


def forms_to_try(
    held: str | None,
    precision: Precision,
    asked: AttentionForm,
    source: Mapping[str, Any] | None,
    preferred: Sequence[Spelling] = ("matmul",),
) -> tuple[Attempt, ...]:
    """Returns the forms to try, in order; a form of None means that the file is built unchanged.

    Args:
        held: the form in the file; None if it is not a low-precision file written by neck-export.
        precision: the precision of the plan.
        asked: the requested form; unless it is `auto`, no other form is tried.
        source: the manifest of the file; a form that was requested for the export is the only one, too.
        preferred: the spellings of fp32acc to try, in order.
    """
    chosen: str = asked
    if asked == "auto" and source is not None and source["precision"] != "fp32":
        chosen = source.get("attention", "auto")
    if precision == "fp32":
        return (Attempt(asked),)
    if held is None and source is not None and source["precision"] == "fp32":
        held = AUTO[precision]
    held, chosen = REPLACED_FORMS.get(str(held), held), REPLACED_FORMS.get(chosen, chosen)
    forms: tuple[str | None, ...] = (held,) if chosen == "auto" else (chosen,)
    names = list(FORMS)
    if chosen == "auto" and held in names:
        later = names[names.index(held) :]  # `fused` only in BF16, which always accumulates in FP32
        forms = tuple(form for form in later if form == held or form != "fused" or precision == "bf16")
    attempts = []
    for form in forms:
        attempts += [Attempt(form, one) for one in preferred] if form == "fp32acc" else [Attempt(form)]
    return tuple(attempts)


def meaning(attempt: Attempt, precision: str) -> str:
    """Returns the note that says what a rewritten attention form means."""
    what = (
        "BF16 matrix multiplications accumulate in FP32 with every value of --attention"
        if precision == "bf16"
        else FORMS[cast(AttentionForm, attempt.form)].meaning
    )
    return f"the attention was rewritten to match --attention {attempt.name}: {what}; verification checks the accuracy"


def relower_file(
    file: Path | OnnxFile,
    precision: Precision,
    attempt: Attempt,
    folder: Path,
    left: ExitStack,
    keep_fp8: bool = True,
) -> Path:
    """Rewrites a low-precision file in another attention form: a new graph beside the weights, which are not copied.

    ONNX weights must lie in the graph's folder or below, and readers refuse links (onnx-ir 1.1, ONNX Runtime 1.32), so
    the graph is written beside the file under a hidden name; where the weights are links, it is written elsewhere.

    Args:
        file: the ONNX file.
        precision: the precision of the file.
        attempt: the form to write and its spelling.
        folder: the folder for the graph and a copy of the weights if the graph cannot be written beside the file.
        left: the stack whose callbacks remove the written graph.
        keep_fp8: whether FP8 attentions stay unchanged.


    Raises:
        BuildError: the nodes of the file do not name the modules that they come from.
    """
    file = OnnxFile.of(file)
    onnx, (model, weights) = file.path, file.load()
    try:
        relower(model, precision, cast(AttentionForm, attempt.form), attempt.spelling, keep_fp8)
    except ExportError as error:
        raise BuildError(f"{onnx}: {error}") from None
    name = f".{onnx.name.strip('.')}.{attempt.form}.{secrets.token_hex(4)}"
    proto = ir.to_proto(model).SerializeToString()  # external weights stay where they say
    written = onnx.with_name(name)
    left.callback(written.unlink, missing_ok=True)
    try:
        if weights == onnx.parent:
            written.write_bytes(proto)
            return written
    except OSError:
        pass
    written = folder / name
    external = (value.const_value for value in model.graph.initializers.values())
    for location in {tensor.location for tensor in external if isinstance(tensor, ir.ExternalTensor)}:
        copied = folder / location
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / location, copied)  # onnx-ir refuses hard links, too
    written.write_bytes(proto)
    return written
