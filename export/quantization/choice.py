"""Which products a budget allows: each one's own error is measured once; they are taken by time saved per error added.

Errors of products are nearly independent, so their squares add. The order is told by trials at 336 pixels; how many are
taken, by trials of whole sets at the export's own size. Where all of them stay within the budget no order is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from export.contract.atomic import replacing
from export.contract.manifest import parse_json, to_json
from export.lowering.codes import Kind
from export.lowering.quantize import RESULT
from export.quantization.calibration import CalibrationError
from export.quantization.rates import PUBLISHED, PUBLISHED_BYTES, product_rates
from export.verification.fidelity import TOLERANCES, Comparison, Tolerance, tolerance_for
from export.verification.verify import Report
from neck.config import EncoderConfig
from neck.progress import counted

PROXY = 336
"""Pixels of a side of the images that single products are tried on: a ninth of the work at 1008."""

FILL = 0.95
"""Of the budget, for products: what FP16 rounds adds to their error in squares (2e-3 on its own)."""


@dataclasses.dataclass(frozen=True)
class Product:
    """What quantizing one product, attention or result costs and saves.

    Attributes:
        name: its layer's path, that of an attention, or a layer's and `.result`.
        operations: 2 x multiply-add for one image; of a result 0.
        errors: relative L2 of each feature with this one alone quantized; empty where that is not measured.
        bytes: that are written and read less for one image; of a product 0, since its kernel writes FP16 as before.
    """

    name: str
    operations: int
    errors: Mapping[str, float]
    bytes: int = 0

    @property
    def saved_s(self) -> float:
        """Seconds that it saves at an L4's published rates."""
        return self.operations * (1 / PUBLISHED["fp16"] - 1 / PUBLISHED["fp8"]) + self.bytes / PUBLISHED_BYTES

    @property
    def worst(self) -> float:
        """The error of the feature that suffers most."""
        return max(self.errors.values())


@dataclasses.dataclass(frozen=True)
class Choice:
    """The products that are quantized, and the curve that they were read from."""

    names: tuple[str, ...]
    curve: tuple[dict[str, Any], ...]


def order_products(products: Sequence[Product]) -> list[Product]:
    """Most time saved per square of the error first; a result not before its product, of which it is a part."""
    by_gain = sorted(products, key=lambda one: -one.saved_s / max(one.worst, 1e-12) ** 2)
    names, ordered = {one.name for one in products}, list[Product]()
    waiting: dict[str, Product] = {}
    for one in by_gain:
        owner = one.name.removesuffix(RESULT)
        if owner != one.name and owner in names and owner not in {other.name for other in ordered}:
            waiting[owner] = one
            continue
        ordered.append(one)
        if one.name in waiting:
            ordered.append(waiting.pop(one.name))
    return ordered


def expected_error(products: Sequence[Product]) -> float:
    """The error of a set, by what its products do alone."""
    names = products[0].errors if products else ()
    return max((math.sqrt(sum(one.errors[name] ** 2 for one in products)) for name in names), default=0.0)


def expected_ms(products: Sequence[Product], quantized: int, kind: Kind) -> float:
    """Milliseconds of all products with the first few quantized, at the rates of product_rates."""
    rates = product_rates(kind).per_s
    seconds = [one.operations / rates[kind if index < quantized else "fp16"] for index, one in enumerate(products)]
    return 1e3 * (sum(seconds) + sum(one.bytes for one in products[quantized:]) / PUBLISHED_BYTES)


class Record:
    """What was measured, kept in a file as it grows, so that an interrupted choice goes on.

    Args:
        path: the file; None keeps nothing.
        key: everything that the figures depend on; those that the file holds for another key are measured again.

    Attributes:
        outdated: why the figures of a file that is there are not used; None where they are, or where there is no file.
    """

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self.path, self.key = path, parse_json(to_json(key))
        self.rows: dict[str, list[Comparison]] = {}
        self.outdated: str | None = None
        if path is None or not path.exists():
            return
        try:
            held = parse_json(path.read_text(encoding="utf-8"))
            rows = {name: [_comparison(row) for row in rows] for name, rows in held["rows"].items()}
            differing = [part for part in self.key if held["key"].get(part) != self.key[part]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            self.outdated = f"{path}: the file with earlier quantization trials is damaged, so the trials are repeated"
            return
        if differing:
            self.outdated = (
                f"{path}: the recorded quantization trials were made with different values of "
                f"{', '.join(differing)}, so the trials are repeated"
            )
        else:
            self.rows = rows

    def figures(self, name: str, run: Callable[[], Sequence[Comparison]]) -> list[Comparison]:
        """The figures under a name, run where the record does not hold them."""
        if name not in self.rows:
            self.rows[name] = list(run())
            if self.path is not None:
                rows = {name: [row.to_dict() for row in rows] for name, rows in self.rows.items()}
                with replacing(self.path) as staged:
                    staged.write_text(to_json({"key": self.key, "rows": rows}), encoding="utf-8")
        return self.rows[name]


def _comparison(row: Mapping[str, Any]) -> Comparison:
    """The figures that `Comparison.to_dict` wrote; null stands for one that was not finite.

    Raises:
        LookupError, TypeError: they are no figures.
    """
    values: dict[str, Any] = {name: value for name, value in row.items() if name != "passed"}
    for name in ("max_abs", "mean_abs", "relative_l2", "cosine", "non_finite"):
        values[name] = math.inf if values[name] is None else values[name]
        if not isinstance(values[name], int | float):
            raise TypeError(
                f"the JSON file with the earlier quantization trials is damaged: the value of {name} must be a number, "
                f"but is {values[name]!r}. neck-export repeats the trials, so nothing needs to be done"
            )
    return Comparison(**values | {"tolerance": Tolerance(**values["tolerance"])})


def unmeasured(layers: Mapping[str, nn.Linear], tokens: int) -> list[Product]:
    """The products of layers on so many tokens of one image, none of whose errors are known."""
    return [Product(name, 2 * tokens * one.in_features * one.out_features, {}) for name, one in layers.items()]


def unmeasured_attentions(config: EncoderConfig, names: Collection[str]) -> list[Product]:
    """The attentions of an encoder on one image, none of whose errors are known."""
    height, width = config.grid
    window = config.window_size
    padded = -(-height // window) * -(-width // window) * window**2
    found = []
    for name in names:
        whole = int(name.split(".")[2]) in config.global_blocks
        pairs = (height * width) ** 2 if whole else padded * window**2
        found.append(Product(name, 4 * pairs * config.embed_dim, {}))
    return found


def unmeasured_results(layers: Mapping[str, nn.Linear], tokens: int) -> list[Product]:
    """The results of layers on so many tokens: written and read as one byte for each number instead of two."""
    return [Product(f"{name}{RESULT}", 0, {}, 2 * tokens * one.out_features) for name, one in layers.items()]


def measure_products(
    products: Sequence[Product], run: Callable[[str], Sequence[Comparison]], record: Record
) -> list[Product]:
    """Tries every product alone.

    Args:
        products: those that may be quantized.
        run: the figures with one product quantized.
        record: of what was measured before.
    """
    found = []
    for one in counted(
        products,
        f"measuring the quantization error of each linear layer with images of at most {PROXY} pixels per side",
        len(products),
        "layers",
    ):
        rows = record.figures(f"alone: {one.name}", functools.partial(run, one.name))
        found.append(dataclasses.replace(one, errors={row.name: row.relative_l2 for row in rows}))
    return found


def budget_overrides(budget: float | None, features: Iterable[str]) -> dict[str, float]:
    """A budget as overrides of the features' tolerances; none for the default, whose own cosine is stricter."""
    return {} if budget is None or budget == TOLERANCES["fp8"].relative_l2 else dict.fromkeys(features, budget)


def within(rows: Sequence[Comparison], budget: float, kind: Kind) -> bool:
    """Whether the figures of a set leave room for what FP16 rounds."""
    overrides = budget_overrides(budget, [row.name for row in rows])
    cosines = [tolerance_for(row.name, kind, overrides).cosine for row in rows]
    return all(
        row.relative_l2 <= FILL * budget and row.cosine >= cosine for row, cosine in zip(rows, cosines, strict=True)
    )


def choose_all(products: Sequence[Product], rows: Sequence[Comparison], kind: Kind) -> Choice:
    """All products, whose figures as a set are within the budget."""
    measured = {len(products): max(row.relative_l2 for row in rows)}
    return Choice(tuple(one.name for one in products), tuple(_curve(products, kind, measured)))


def choose(
    products: Sequence[Product],
    budget: float,
    run: Callable[[Sequence[str]], Sequence[Comparison]],
    kind: Kind,
    report: Report = lambda line: None,
) -> Choice:
    """The most products, in their order, that stay within the budget when they are quantized together.

    Args:
        products: what was measured.
        budget: relative L2 that every feature may err.
        run: the figures of a set at the export's own size.
        kind: fp8 or int8.
        report: told of every trial.

    Raises:
        CalibrationError: not even one product stays within it.
    """
    ordered, measured = order_products(products), dict[int, float]()

    def fits(count: int) -> bool:
        report(f"trial {len(measured) + 1}: quantizing {count} of {len(ordered)} linear layers")
        rows = run([one.name for one in ordered[:count]])
        measured[count] = max(row.relative_l2 for row in rows)
        return within(rows, budget, kind)

    guess = sum(expected_error(ordered[:count]) <= FILL * budget for count in range(1, len(ordered) + 1))
    inside, outside = 0, len(ordered) + 1
    at, step = max(1, guess), max(1, len(ordered) // 16)
    while outside - inside > 1:
        if fits(at):
            inside, at = at, at + step
        else:
            outside, at = at, at - step
        step *= 2  # near the guess first: the squares add well
        at = at if inside < at < outside else (inside + outside) // 2
    if not inside:
        raise CalibrationError(
            f"no trial stayed within --budget {budget:g}, not even with {ordered[0].name} as the only quantized layer; "
            f"the smallest relative L2 error of all trials was {min(measured.values()):.3g}. Raise --budget or use "
            "--precision fp16"
        )
    return Choice(tuple(one.name for one in ordered[:inside]), tuple(_curve(ordered, kind, measured)))


def _curve(ordered: Sequence[Product], kind: Kind, measured: Mapping[int, float]) -> list[dict[str, Any]]:
    """Eighths of the products, and the sets that were tried."""
    whole, known = sum(one.operations for one in ordered), bool(ordered[0].errors)
    counts = sorted({round(len(ordered) * eighth / 8) for eighth in range(9)} | set(measured))
    return [
        {
            "products": count,
            "share": sum(one.operations for one in ordered[:count]) / whole,
            "expected_ms": expected_ms(ordered, count, kind),
            "expected_error": expected_error(ordered[:count]) if known or not count else None,
            "error": measured.get(count),
        }
        for count in counts
    ]


def curve_lines(curve: Sequence[Mapping[str, Any]], count: int, rates: str) -> list[str]:
    """The curve for a screen, with whose rates its times are by; the row of the choice is marked."""
    head = f"{'layers':>8} {'operations':>10} {'time':>9} {'expected L2':>12} {'measured L2':>12}"
    lines = [
        "the table below shows the effect of quantizing more or fewer layers. The columns of the table:\n"
        "`layers`: number of quantized layers\n"
        "`operations`: arithmetic operations in the quantized layers, in percent of the operations in all layers that "
        "can be quantized\n"
        "`time`: estimated computing time of all layers that can be quantized, in milliseconds\n"
        "`expected L2`: largest relative L2 error of any feature map, predicted from the errors of the single layers\n"
        "`measured L2`: largest relative L2 error of any feature map, measured with the given number of quantized "
        "layers\n"
        f"Note on the column `time`: {rates}",
        head,
    ]
    for row in curve:
        expected, error = ("" if row[name] is None else f"{row[name]:.2e}" for name in ("expected_error", "error"))
        mark = "  <- chosen" if row["products"] == count else ""
        figures = f"{row['share']:10.1%} {row['expected_ms']:6.2f} ms {expected:>12} {error:>12}"
        lines.append(f"{row['products']:8} {figures}{mark}")
    return lines
