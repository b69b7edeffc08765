"""Which tensor of the encoder each output of a file is, in which layout: first by shape, then by value."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from export.foreign.references import TRUNK, describe, parts

FINEST_FIRST = re.compile(r"fpn_hidden_states|backbone_fpn|vision_pos_enc|fpn_position_encoding|high_res_feat")
"""Names of outputs whose numbers count from the finest level: transformers', Meta's and SAM 2's exporters."""

MOST_SAMPLED = 1 << 18
"""Elements by which a layout is chosen; the verdict compares all."""

LIKE = 0.5
"""Relative L2 up to which a value says what an output is; two maps that have nothing in common are at 1.4."""


@dataclasses.dataclass(frozen=True)
class Match:
    """An output of a file and what it is.

    Attributes:
        output: its name.
        tensor: the encoder's, such as sam3_feat_0.
        layout: NCHW, NHWC, `tokens (N, HW, C)` and so on.
        array: what the file gave, as (B, C, h, w).
        error: relative L2 on a sample.
    """

    output: str
    tensor: str
    layout: str
    array: np.ndarray
    error: float

    def __str__(self) -> str:
        return f"{self.output}: {describe(self.tensor)}, {self.layout}"


def layouts(array: np.ndarray, shape: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Every layout in which an array can hold a map of a shape (B, C, h, w), with the map; B may be 1 of positions."""
    _, channels, height, width = shape
    tokens = height * width
    for batch in dict.fromkeys((shape[0], 1)):
        if array.size != batch * channels * tokens:
            continue
        n, c, hw = batch, channels, tokens
        forms: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "NCHW": ((n, c, height, width), (0, 1, 2, 3)),
            "NHWC": ((n, height, width, c), (0, 3, 1, 2)),
        }
        flat: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
            "tokens (N, HW, C)": ((n, hw, c), (n, height, width, c), (0, 3, 1, 2)),
            "tokens (HW, N, C)": ((hw, n, c), (height, width, n, c), (2, 3, 0, 1)),
            "tokens (N, C, HW)": ((n, c, hw), (n, c, height, width), (0, 1, 2, 3)),
        }
        single: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
            "CHW": ((c, height, width), (1, c, height, width), (0, 1, 2, 3)),
            "HWC": ((height, width, c), (1, height, width, c), (0, 3, 1, 2)),
            "tokens (HW, C)": ((hw, c), (1, height, width, c), (0, 3, 1, 2)),
            "tokens (C, HW)": ((c, hw), (1, c, height, width), (0, 1, 2, 3)),
        }
        for name, (given, axes) in forms.items():
            if array.shape == given:
                yield name, array.transpose(axes)
        for name, (given, split, axes) in {**flat, **(single if n == 1 else {})}.items():
            if array.shape == given:
                yield name, array.reshape(split).transpose(axes)


def sampled_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 on a regular sample; infinity where anything is not finite or the sample has another shape."""
    stride = max(1, math.ceil((found.size / MOST_SAMPLED) ** 0.5))
    a = found[..., ::stride, ::stride].astype(np.float64)
    b = expected[: len(found), ..., ::stride, ::stride].astype(np.float64)
    norm = float((b * b).sum())
    with np.errstate(invalid="ignore", over="ignore"):
        error = float(((a - b) ** 2).sum())
    if not math.isfinite(error):
        return math.inf
    return math.sqrt(error / norm) if norm else (0.0 if not error else math.inf)


def match_output(name: str, array: np.ndarray, tensors: Mapping[str, np.ndarray]) -> Match | None:
    """The tensor that an output is nearest to, of those whose shape it has; None where its shape is none's."""
    found = [
        Match(name, tensor, layout, given, sampled_error(given, expected))
        for tensor, expected in tensors.items()
        for layout, given in layouts(array, expected.shape)
        if len(given) == len(expected) or "_pos_" in tensor
    ]
    best = min(found, key=lambda match: (match.error, match.tensor == TRUNK), default=None)
    if best is None or best.error <= LIKE:
        return best
    neck, _, _ = claimed(name)  # no value tells: take what the name says, and the commonest layout
    position = "pos" in name.lower()

    def unlikely(match: Match) -> tuple[bool, ...]:
        other = match.tensor == TRUNK or (neck is not None and not match.tensor.startswith(f"{neck}_"))
        return ("_pos_" in match.tensor) != position, match.tensor == TRUNK, other

    return min(found, key=unlikely)


def claimed(name: str) -> tuple[str | None, str | None, int | None]:
    """Neck, kind and level that an output's name tells: of files of ours all three, of others at most the neck."""
    ours = re.fullmatch(r"(sam3|sam2|interactive|propagation)_(feat|pos|high_res)_(\d)", name)
    if ours:
        return ours[1], ours[2], int(ours[3])
    neck = next((neck for neck in ("sam2", "interactive", "propagation", "sam3") if neck in name.lower()), None)
    return ("sam2" if "tracker" in name.lower() else neck), None, None


def inconsistencies(matches: Sequence[Match]) -> list[tuple[str, str, str]]:
    """What the names and the order of outputs contradict: (output, kind of fault, sentence).

    Only of outputs whose values say what they are.
    """
    found = []
    matches = [match for match in matches if match.tensor != TRUNK and match.error <= LIKE / 5]
    for match in matches:
        neck, kind, level = claimed(match.output)
        is_neck, is_kind, is_level = parts(match.tensor)
        if kind is not None and kind != is_kind:
            found.append(
                (
                    match.output,
                    "levels",
                    f"the output {match.output} contains {describe(match.tensor)}, but neck-export expects "
                    f"{describe(match.output)} in an output with the name {match.output}. Correct the names or the "
                    "order of the outputs in the program that exported the ONNX file",
                )
            )
        elif level is not None and level != is_level:
            sentence = (
                f"the levels are swapped: the output {match.output} is {describe(match.tensor)}, but the name "
                f"{match.output} stands for level {level}"
            )
            found.append((match.output, "levels", sentence))
        elif neck is not None and is_kind != "pos" and neck != is_neck:
            sentence = (
                f"the necks are swapped. The output {match.output} contains {describe(match.tensor)}, but an output "
                f"with the name {match.output} should belong to neck {neck}. Correct the names or the order of the "
                "outputs in the program that exported the ONNX file"
            )
            found.append((match.output, "neck", sentence))
    told = {output for output, _, _ in found}
    for group in _numbered(match for match in matches if match.output not in told):
        kinds = [parts(match.tensor) for match in group]
        levels = [level for _, _, level in kinds]
        if len({kind for _, kind, _ in kinds}) > 1 or len(set(levels)) < len(levels) or len(levels) < 2:
            continue
        necks = [neck for neck, _, _ in kinds]
        usual = max(dict.fromkeys(necks), key=necks.count)
        if kinds[0][1] != "pos" and len(set(necks)) > 1:
            odd = next(match for match, neck in zip(group, necks, strict=True) if neck != usual)
            other = group[necks.index(usual)]
            sentence = (
                f"the names of the outputs {other.output} and {odd.output} differ only in the number at the end, so "
                f"the outputs should belong to the same neck. However, the output {other.output} contains "
                f"{describe(other.tensor)}, and the output {odd.output} contains {describe(odd.tensor)}. Correct the "
                "names or the order of the outputs in the program that exported the ONNX file"
            )
            found.append((odd.output, "neck", sentence))
        wanted = sorted(levels)
        if levels != wanted and (levels != wanted[::-1] or FINEST_FIRST.search(group[0].output)):
            odd = next(match for match, level, want in zip(group, levels, wanted, strict=True) if level != want)
            sentence = (
                f"the levels are swapped: the output {odd.output} is {describe(odd.tensor)}, but the number "
                f"at the end of the name {odd.output} suggests another level"
            )
            found.append((odd.output, "levels", sentence))
    return found


def _numbered(matches: Iterator[Match]) -> Iterator[list[Match]]:
    """Outputs that share a name but for a number at its end, which counts up by one, in the order of the numbers."""
    groups: dict[str, list[tuple[int, Match]]] = {}
    for match in matches:
        if told := re.fullmatch(r"(.*?)(\d+)", match.output):
            groups.setdefault(told[1], []).append((int(told[2]), match))
    for members in groups.values():
        members.sort(key=lambda pair: pair[0])
        numbers = [number for number, _ in members]
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            yield [match for _, match in members]
