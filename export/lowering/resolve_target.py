"""The attention form and opset of a file that several targets shall read: the best that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from export.contract.options import AttentionForm, Precision, Spelling
from export.contract.targets import FP8, NO_FP8, Target, TargetError, has_fp8, prefers_attention
from export.lowering.attention import AUTO, OPERATOR_OPSET, spelling_at
from export.lowering.codes import CODES
from export.lowering.precision import TYPES, check_form


@dataclasses.dataclass(frozen=True)
class Form:
    """The arguments of `export.lowering.precision.lower` and the targets; opset None is chosen there."""

    attention: AttentionForm
    opset: int | None
    targets: tuple[Target, ...] = ()
    spelling: Spelling = "matmul"


def resolve_target(
    targets: Sequence[Target], precision: Precision, attention: AttentionForm = "auto", opset: int | None = None
) -> Form:
    """The form that all targets can load: the Attention operator only if every target prefers it.

    Args:
        targets: who shall read the file; none leaves everything as asked.
        precision: what the graph is lowered to.
        attention, opset: as asked; only `auto` and None are chosen here.

    Raises:
        TargetError: no file of that kind is read by all of them; it says who cannot, why, and what to ask instead.
        ExportError: no graph of the precision has the form.
    """
    form = AUTO[precision] if attention == "auto" else attention
    check_form(precision, form, opset)
    if not targets:
        return Form(form, opset, spelling=spelling_at(opset))
    _check_types(targets, precision)
    oldest = min(targets, key=lambda target: target.opset)
    if opset is not None and opset > oldest.opset:
        raise TargetError(
            f"--opset {opset}: the target {oldest.name} is only known to support opsets up to {oldest.opset}; "
            "use --opset auto"
        )
    operator = form == "fp32acc" and (opset or OPERATOR_OPSET) >= OPERATOR_OPSET
    operator = operator and all(prefers_attention(one.family, one.version or one.since) for one in targets)
    needed = OPERATOR_OPSET if operator else 22 if precision == "bf16" else 20
    if precision == "bf16" and needed > oldest.opset:
        able = [target.name for target in targets if target.opset >= needed]
        others = f"opset {needed} is supported by {', '.join(able)}; " if able else ""
        raise TargetError(
            f"--precision bf16 needs opset 22 (for convolutions in BF16), but the target {oldest.name} is only known "
            f"to support opsets up to {oldest.opset}; {others}choose another --target, or use --precision fp16"
        )
    chosen = opset if opset is not None or needed <= oldest.opset else oldest.opset
    return Form(form, chosen, tuple(targets), "operator" if operator else "matmul")


def _check_types(targets: Sequence[Target], precision: Precision) -> None:
    wanted = CODES[precision].name if precision in CODES else TYPES[precision].name
    small = [one for one in targets if not has_fp8(one.capability)]
    if wanted == FP8 and small:
        where = f"the target {small[0].name} with compute capability {small[0].capability}"
        raise TargetError(f"--precision fp8: {where}: {NO_FP8}; use --precision int8")
    unable = [target.name for target in targets if wanted not in target.types]
    if unable:
        able = [target.name for target in targets if wanted in target.types]
        others = f"this precision is supported by {', '.join(able)}; " if able else ""
        remedy = "fp16" if all("FLOAT16" in target.types for target in targets) else "fp32"
        raise TargetError(
            f"--precision {precision} was refused, because neck-export does not know whether the target "
            f"{', '.join(unable)} supports the precision {precision}; {others}choose another --target, or use "
            f"--precision {remedy}"
        )
