"""A small writer of inline SVG: shapes by class, scales and ticks, text that does not run into other text.

Own code of 200 lines, where matplotlib would add 40 MB, glyphs as outlines and colours that no dark mode reaches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal
from xml.etree import ElementTree

TEXT, SMALL = 13.0, 11.5
"""Sizes of text, in pixels of the drawing."""

WIDTH_OF_EM = 0.6
"""Mean advance of a letter; DejaVu Sans, the widest of the usual system fonts, has 0.59 for these words."""

Anchor = Literal["start", "middle", "end"]


class Drawing:
    """One inline SVG. Colours come from the page's style sheet by class, so no style attribute is needed."""

    def __init__(self, width: float, css: str, label: str) -> None:
        self.width = width
        self.height = 0.0
        self.root = ElementTree.Element("svg", {"class": f"chart {css}", "role": "img", "aria-label": label})

    def text(self, x: float, y: float, content: str, css: str = "", anchor: Anchor = "start") -> None:
        """Text on a baseline; `css` with `small` is set in the small size."""
        attributes = {"x": _number(x), "y": _number(y)}
        if css:
            attributes["class"] = css
        if anchor != "start":
            attributes["text-anchor"] = anchor
        ElementTree.SubElement(self.root, "text", attributes).text = content
        self.height = max(self.height, y + 5)

    def rect(self, x: float, y: float, width: float, height: float, css: str, title: str = "") -> None:
        """A bar; its title is shown where the pointer rests."""
        place = {"x": x, "y": y, "width": max(0.0, width), "height": height}
        self._shape("rect", {key: _number(value) for key, value in place.items()} | {"rx": "1.5"}, css, title)
        self.height = max(self.height, y + height)

    def line(self, x1: float, y1: float, x2: float, y2: float, css: str) -> None:
        """A straight line."""
        place = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        self._shape("line", {key: _number(value) for key, value in place.items()}, css, "")
        self.height = max(self.height, y1, y2)

    def path(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through points."""
        steps = " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        self._shape("path", {"d": f"M{steps}"}, css, "")

    def mark(self, x: float, y: float, shape: int, css: str, title: str = "", size: float = 5) -> None:
        """A point; shapes are circle, square, diamond and two triangles: colour is not needed to tell them apart."""
        shape %= 5
        if shape == 0:
            place = {"cx": _number(x), "cy": _number(y), "r": _number(size)}
            return self._shape("circle", place, css, title)
        corners = (
            [(-1, -1), (1, -1), (1, 1), (-1, 1)],
            [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)],
            [(0, -1.2), (1.2, 1), (-1.2, 1)],
            [(0, 1.2), (1.2, -1), (-1.2, -1)],
        )[shape - 1]
        scale = size * (0.9 if shape == 1 else 1)
        steps = " L".join(f"{_number(x + scale * dx)} {_number(y + scale * dy)}" for dx, dy in corners)
        return self._shape("path", {"d": f"M{steps} Z"}, css, title)

    def _shape(self, tag: str, attributes: dict[str, str], css: str, title: str) -> None:
        element = ElementTree.SubElement(self.root, tag, {**attributes, "class": css})
        if title:
            ElementTree.SubElement(element, "title").text = title

    def markup(self) -> str:
        """The element as text; every name and label is escaped."""
        size = f"0 0 {_number(self.width)} {_number(math.ceil(self.height) + 2)}"
        self.root.set("viewBox", size)
        return ElementTree.tostring(self.root, encoding="unicode")


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values to pixels, linear or logarithmic.

    Attributes:
        low, high: the values at both ends; above 0 where it is logarithmic.
        start, end: their pixels.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; one that lies outside is drawn at the end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    def ticks(self, most: int) -> list[float]:
        """Round values within it, `most` at the most."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most)) if high > low else 1.0
    steps = (power * factor for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= most - 1 or step >= power * 20)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; with 2 and 5 between them where there is room."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]


def log_range(values: Sequence[float]) -> tuple[float, float]:
    """Round ends (1, 2, 5 times a power of ten) around values, with a little room."""
    low, high = min(values) / 1.15, max(values) * 1.15
    return _round_down(low), 1 / _round_down(1 / high)


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return power * max(factor for factor in (1, 2, 5) if factor * power <= value * (1 + 1e-9))


def text_width(content: str, size: float = TEXT) -> float:
    """About how wide a text is."""
    return len(content) * size * WIDTH_OF_EM


def fitted(content: str, width: float, size: float = TEXT) -> str:
    """A text cut in its middle to fit a width: names often differ at the end."""
    most = max(8, int(width / (size * WIDTH_OF_EM)))
    if len(content) <= most:
        return content
    tail = (most - 3) // 2
    return f"{content[: most - 3 - tail].rstrip(' ,')}...{content[-tail:].lstrip(' ,')}"


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, `gap` apart at least and within the limits as far as there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    blocks: list[list[int]] = []  # of neighbours that touch; each is centred on what its members want
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _start(blocks[-1], wanted, gap) < _start(blocks[-2], wanted, gap) + gap * len(
            blocks[-2]
        ):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    found = [0.0] * len(wanted)
    for block in blocks:
        start = _start(block, wanted, gap)
        for place, index in enumerate(block):
            found[index] = start + gap * place
    return _within([found[index] for index in order], order, gap, low, high)


def _start(block: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[index] for index in block) / len(block) - gap * (len(block) - 1) / 2


def _within(places: list[float], order: Sequence[int], gap: float, low: float, high: float) -> list[float]:
    """Ascending places pushed inside the limits, given back in the order that was asked for."""
    for index, place in enumerate(places):
        places[index] = max(place, low + gap * index)
    last = len(places) - 1
    found = [0.0] * len(places)
    for index, place in enumerate(places):
        found[order[index]] = min(place, high - gap * (last - index))
    return found


def free_place(x: float, y: float, width: float, height: float, taken: list[tuple[float, float, float, float]]) -> int:
    """Which of the places beside a point (`PLACES`) overlaps least with boxes (left, top, right, bottom)."""

    def overlap(index: int) -> float:
        left, top = x + PLACES[index][0] - (width if PLACES[index][0] < 0 else 0), y + PLACES[index][1] - height / 2
        right, bottom = left + width, top + height
        return sum(
            max(0.0, min(right, box[2]) - max(left, box[0])) * max(0.0, min(bottom, box[3]) - max(top, box[1]))
            for box in taken
        )

    return min(range(len(PLACES)), key=lambda index: (round(overlap(index), 3), index))


PLACES = [
    (dx, dy) for distance in (9, 22, 36, 50) for dy in (0, -14, 14, -28, 28, -42, 42) for dx in (distance, -distance)
]
"""Offsets of a label's near side from its point, best first."""


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
