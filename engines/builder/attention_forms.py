"""Attention forms for the TensorRT that is there: the file is written again in the next one where it refuses one."""

from __future__ import annotations

import collections
import dataclasses
import secrets
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from engines.builder.build import BuildResult, build_plan
from engines.builder.flavor import Flavor
from engines.builder.onnx_graph import BuildError, RefusedError
from engines.builder.onnx_source import Source, lower_file
from engines.builder.options import BuildOptions
from export.contract.errors import ExportError
from export.contract.export_command import export_again
from export.contract.onnx_file import load_onnx
from export.graph.cleanup import MODULE
from export.inspect import attention_forms
from export.lowering.attention import AUTO, AttentionForm
from export.lowering.precision import Precision, Residual
from export.lowering.quantise import Quantisation
from export.lowering.relower import relower
from export.lowering.upsampling import Upsampling
from export.proof.verify import Report

ORDER: tuple[AttentionForm, ...] = ("fp32acc", "fused", "scores32", "unfused")
"""Best first; `fused` is a form of BF16 alone, whose products accumulate in FP32 whatever the form."""

MEANINGS = {
    "fp32acc": "both products of each attention accumulate in FP32",
    "scores32": "the first product of each attention accumulates in FP32, the second in FP16",
    "fused": "both products of each attention accumulate in FP16",
    "unfused": "each attention is several kernels: exact, and slow",
}
"""What a form means in FP16, as TensorRT-RTX 1.7 built it."""


@dataclasses.dataclass(frozen=True)
class Typing:
    """How a file comes to the plan's types, as export.lowering.precision.lower takes it.

    Attributes:
        attention: the form that was asked for; `auto` is the first that TensorRT takes.
        upsampling, keep_fp32, residual, quantisation: how an FP32 file is lowered.
    """

    attention: AttentionForm = "auto"
    upsampling: Upsampling = "auto"
    keep_fp32: tuple[str, ...] = ()
    residual: Residual = "auto"
    quantisation: Quantisation | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """A plan that was built: from which file, in which forms, and how it came to them."""

    typed: Path
    result: BuildResult
    attention: str | None
    residual: str
    notes: tuple[str, ...]


def build_forms(
    source: Source,
    plan: Path,
    build: BuildOptions,
    typing: Typing,
    flavor: Flavor,
    left: ExitStack,
    report: Report,
) -> Built:
    """Types a file where it must be and builds it, in the next attention form where TensorRT refuses one.

    Files that are written on the way lie beside the plan, or are removed by `left`.

    Raises:
        BuildError: no form builds, or something that no form mends; with the reasons that forms were refused for.
    """
    precision, folder, typed = build.precision, plan.parent, source.path
    _check_residual(source, typing, precision)
    there = held_form(typed) if source.precision != "fp32" else None
    forms = forms_to_try(there, precision, typing.attention, source.manifest)
    if precision != source.precision:
        report(f"precision pass: {source.precision} to {precision}")
        lowering = vars(typing) | {"attention": forms[0] or typing.attention}
        typed, there = lower_file(source, precision, folder, **lowering), forms[0]
    notes: list[str] = []
    for form, later in zip(forms, (*forms[1:], None), strict=True):
        if form is not None and form != there and precision != "fp32":
            typed, there = relower_file(typed, precision, form, folder, left), form
            notes.append(meaning(form, precision))
            report(notes[-1])
        report(f"build: {flavor.name} {flavor.version}")
        try:
            result = build_plan(typed, plan, build, flavor=flavor)
            return Built(typed, result, form, typing.residual, tuple(notes))
        except RefusedError as error:
            if later is None or not error.by_form:
                raise BuildError("; ".join([str(error), *(note for note in notes if "refused" in note)])) from None
            notes.append(f"{flavor.title} refused attention as {form}: {error.reason}")
            report(notes[-1])
    raise AssertionError("unreachable: the last form returns or raises")


def _check_residual(source: Source, typing: Typing, precision: Precision) -> None:
    held = (source.manifest or {}).get("residual", source.precision)
    if precision == source.precision != "fp32" and typing.residual not in ("auto", held):
        raise BuildError(
            f"{source.path}: its residual sums are {held}, asked was {typing.residual};\n"
            f"export it again: {export_again(source.path, residual=typing.residual)}"
        )


def held_form(onnx: Path) -> str | None:
    """The form of most attentions of a file; None for one that cannot be written again, or has none."""
    model = ir.load(onnx)
    if not any(MODULE in node.metadata_props for node in model.graph):
        return None
    counted = collections.Counter(attention_forms(model.graph))
    del counted["FP32"]  # of modules that are kept
    return counted.most_common(1)[0][0] if counted else None


def forms_to_try(
    held: str | None, precision: Precision, asked: AttentionForm, source: Mapping[str, Any] | None
) -> tuple[str | None, ...]:
    """The forms to build in turn, None for the file as it is.

    Args:
        held: the file's form, None where it is not a low-precision file of ours.
        precision: of the plan.
        asked: the form that was asked for; one that was is the only one.
        source: the file's manifest; a form that its export was asked for is the only one, too.
    """
    if asked != "auto" or precision == "fp32":
        return (asked,)
    chosen = cast(str, source.get("attention", "auto")) if source and source["precision"] != "fp32" else "auto"
    if held is None and source is not None and source["precision"] == "fp32":
        held = AUTO[precision]
    if chosen != "auto" or held not in ORDER:
        return (held,)
    later = ORDER[ORDER.index(held) :]
    return tuple(form for form in later if form != "fused" or precision == "bf16")


def meaning(form: str, precision: str) -> str:
    """What it means that attention is written in a form."""
    what = MEANINGS[form] if precision != "bf16" else "BF16 products accumulate in FP32 in every form"
    return f"attention lowered again as {form}: {what}; the verdict judges it"


def relower_file(onnx: Path, precision: Precision, form: str, folder: Path, left: ExitStack) -> Path:
    """Writes a low-precision file in another attention form: a new graph beside the weights, which are not copied.

    ONNX weights must lie in the graph's folder or below, and readers refuse links (onnx-ir 1.1, ONNX Runtime 1.32), so
    the graph is written beside the file under a hidden name; where the weights are links, it is written elsewhere.

    Args:
        onnx: the file.
        precision, form: as of relower.
        folder: where the graph and a copy of the weights go if they cannot stay where they are.
        left: removes what was written.

    Raises:
        BuildError: the file is not one whose nodes tell their modules.
    """
    model, weights = load_onnx(onnx)
    try:
        relower(model, precision, cast(AttentionForm, form))
    except ExportError as error:
        raise BuildError(f"{onnx}: {error}") from None
    name = f".{onnx.name.strip('.')}.{form}.{secrets.token_hex(4)}"
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
        file = folder / location
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(weights / location, file)  # onnx-ir refuses hard links, too
    written.write_bytes(proto)
    return written
