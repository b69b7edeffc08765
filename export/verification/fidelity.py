"""Whether two sets of outputs agree: error figures, tolerances, verdict. The one place that decides."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.contract.dtypes import BY_NAME

CHUNK = 1 << 20
"""Elements that are compared at a time in float64; sums in float32 gave a cosine of 1.00008."""


class FidelityError(ValueError):
    """Outputs that cannot be compared, or a tolerance that names none."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """What an output may differ from the reference.

    Attributes:
        relative_l2: largest norm of the difference over the norm of the reference.
        cosine: smallest cosine between both.
        max_abs: largest difference of one element, or None.
    """

    relative_l2: float
    cosine: float
    max_abs: float | None = None


TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.99999),
    "fp16": Tolerance(1e-2, 0.9995),
    "bf16": Tolerance(5e-2, 0.998),
    "fp8": Tolerance(5e-2, 0.998),
    "int8": Tolerance(5e-2, 0.998),
}
POSITION_MAX_ABS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": None, "fp8": 2e-3, "int8": 2e-3}
"""Positions lie in -1..1, where FP16 rounds by 2.4e-4 at most; BF16 by 2e-3, which its relative L2 judges."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The error figures of one output and whether they are within tolerance."""

    name: str
    max_abs: float
    mean_abs: float
    relative_l2: float
    cosine: float
    non_finite: int
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether every number is finite and every figure within its tolerance."""
        limit = self.tolerance.max_abs
        return (
            self.non_finite == 0
            and self.relative_l2 <= self.tolerance.relative_l2
            and self.cosine >= self.tolerance.cosine
            and (limit is None or self.max_abs <= limit)
        )

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values; a figure that is not finite is null."""
        values = dataclasses.asdict(self) | {"passed": self.passed}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The comparison of every output.

    Attributes:
        comparisons: one per output, in the file's order.
        method: what was compared with what, for the manifest and the screen.
    """

    comparisons: tuple[Comparison, ...]
    method: str
    first_bad: str | None = None

    @property
    def passed(self) -> bool:
        """Whether there are outputs and all of them passed."""
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def failed_names(self) -> list[str]:
        """Names of the outputs that left tolerance."""
        return [comparison.name for comparison in self.comparisons if not comparison.passed]

    @property
    def summary(self) -> str:
        """Why it failed, in a few words."""
        return f"the outputs {', '.join(self.failed_names)} exceeded the tolerance"

    def lines(self) -> list[str]:
        """Lines for the user besides the figures."""
        return [f"the first tensor with NaN or infinity is {self.first_bad}"] if self.first_bad else []

    def to_dict(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        outputs = [comparison.to_dict() for comparison in self.comparisons]
        bad = {"first_bad": self.first_bad} if self.first_bad else {}
        return {"verified": self.passed, "method": self.method, **bad, "outputs": outputs}


def tolerance_for(
    name: str, precision: str, overrides: Mapping[str, float] | None = None, dtype: str | None = None
) -> Tolerance:
    """The tolerance of an output.

    Args:
        name: the output, such as `sam3_feat_0`.
        precision: fp32, fp16, bf16, fp8 or int8.
        overrides: relative L2 by name or wildcard; the cosine follows where it is looser, as 1 - L2^2, twice what an
            error orthogonal to the reference takes from it.
        dtype: numpy name of the output's type; where that rounds more than the precision, its tolerance holds.
    """
    tolerance = _default_tolerance(name, precision)
    if dtype is not None:
        tolerance = _looser(tolerance, _default_tolerance(name, str(BY_NAME[dtype].precision)))
    for pattern, value in (overrides or {}).items():
        if fnmatch.fnmatchcase(name, pattern):
            tolerance = Tolerance(value, min(tolerance.cosine, 1 - value**2), tolerance.max_abs)
    return tolerance


def _default_tolerance(name: str, precision: str) -> Tolerance:
    tolerance = TOLERANCES[precision]
    return dataclasses.replace(tolerance, max_abs=POSITION_MAX_ABS[precision]) if "_pos_" in name else tolerance


def _looser(one: Tolerance, other: Tolerance) -> Tolerance:
    largest = None if one.max_abs is None or other.max_abs is None else max(one.max_abs, other.max_abs)
    return Tolerance(max(one.relative_l2, other.relative_l2), min(one.cosine, other.cosine), largest)


def check_overrides(overrides: Mapping[str, float], names: Sequence[str]) -> None:
    """Raises FidelityError where an override names no output or is not positive."""
    for pattern, value in overrides.items():
        if not fnmatch.filter(names, pattern):
            raise FidelityError(f"--tolerance {pattern!r} matches no output; the outputs are {', '.join(names)}")
        if not 0 < value < math.inf:
            raise FidelityError(
                f"--tolerance {pattern}={value:g} is invalid; the value must be a finite relative L2 error above 0"
            )


def compare(
    reference: Mapping[str, np.ndarray],
    candidate: Mapping[str, np.ndarray],
    precision: str,
    method: str,
    overrides: Mapping[str, float] | None = None,
    dtype: str | None = None,
) -> Verdict:
    """Compares every output of the candidate with the reference's, within the tolerances of `tolerance_for`.

    Raises:
        FidelityError: an output that the reference lacks, or of another shape; an override that names no output.
    """
    check_overrides(overrides or {}, list(candidate))
    comparisons = []
    for name, array in candidate.items():
        if name not in reference:
            raise FidelityError(
                f"the output {name} is missing from the reference, which contains {', '.join(reference)}; "
                "compute the reference again by calling make_reference with the signature (the inputs and outputs) "
                "of the file that is being verified"
            )
        if reference[name].shape != array.shape:
            raise FidelityError(
                f"the output {name} has the shape {array.shape}, but the shape in the reference is "
                f"{reference[name].shape}; compute the reference again by calling make_reference with the signature "
                "(the inputs and outputs) of the file that is being verified"
            )
        tolerance = tolerance_for(name, precision, overrides, dtype)
        comparisons.append(compare_output(name, reference[name], array, tolerance))
    return Verdict(tuple(comparisons), method)


def compare_output(name: str, reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance) -> Comparison:
    """The error figures of one output, with sums in float64."""
    largest = total = error = norm = other = dot = 0.0
    non_finite = 0
    left, right = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, left.size, CHUNK):
        a = left[start : start + CHUNK].astype(np.float64)
        b = right[start : start + CHUNK].astype(np.float64)
        non_finite += b.size - int(np.isfinite(b).sum())
        with np.errstate(invalid="ignore"):  # infinity less infinity: counted above, or the reference's own
            difference = np.abs(a - b)
        largest, total = max(largest, float(difference.max(initial=0.0))), total + float(difference.sum())
        error, norm = error + float(difference @ difference), norm + float(a @ a)
        other, dot = other + float(b @ b), dot + float(a @ b)
    if non_finite:
        return Comparison(name, math.inf, math.inf, math.inf, 0.0, non_finite, tolerance)
    relative = math.sqrt(error / norm) if norm else (0.0 if not error else math.inf)
    cosine = dot / math.sqrt(norm * other) if norm and other else (1.0 if norm == other else 0.0)
    return Comparison(name, largest, total / max(1, left.size), relative, cosine, 0, tolerance)
