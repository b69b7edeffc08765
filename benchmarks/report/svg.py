"""A plot with two axes as inline SVG, drawn once: the page scales it. Own code, where matplotlib would add 40 MB,
glyphs as outlines and colors that no dark mode reaches.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from xml.etree import ElementTree

TEXT = 12.0
"""Size of the text in units of the drawing, which are pixels on a phone; the style sheet says the same."""

WIDTH_OF_EM = 0.6
"""Mean advance of a letter; DejaVu Sans, the widest of the usual system fonts, has 0.59 for these words."""

WIDTH, HEIGHT = 390.0, 316.0
LEFT, TOP, RIGHT, BOTTOM = 48.0, 26.0, 380.0, 276.0
"""The plot's frame inside the drawing."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values to places, linear or logarithmic.

    Attributes:
        low, high: the values at both ends; above 0 if the scale is logarithmic.
        start, end: their places.
        log: whether the scale is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; one that lies outside is drawn at the end."""
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
    return _round_down(min(values) / 1.15), 1 / _round_down(1 / (max(values) * 1.15))


def _round_down(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return power * max(factor for factor in (1, 2, 5) if factor * power <= value * (1 + 1e-9))


def mark(shape: int, css: str, x: float = 7, y: float = 7) -> ElementTree.Element:
    """A point: circle, square, diamond or one of two triangles, so that color is not needed to tell points apart."""
    if shape % 5 == 0:
        return ElementTree.Element("circle", {"cx": _number(x), "cy": _number(y), "r": "5", "class": css})
    corners = (
        [(-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)],
        [(0, -6.5), (6.5, 0), (0, 6.5), (-6.5, 0)],
        [(0, -6), (6, 5), (-6, 5)],
        [(0, 6), (6, -5), (-6, -5)],
    )[shape % 5 - 1]
    return ElementTree.Element("path", {"d": f"{_steps([(x + dx, y + dy) for dx, dy in corners])} Z", "class": css})


class Plot:
    """One inline SVG. Colors come from the page's style sheet by class, so no style attribute is needed.

    Args:
        label: told to a screen reader.
        across, up: the scales; `up` begins at the bottom.
    """

    def __init__(self, label: str, across: Scale, up: Scale) -> None:
        self.across, self.up = across, up
        size = f"0 0 {_number(WIDTH)} {_number(HEIGHT)}"
        self.root = ElementTree.Element("svg", {"class": "chart", "role": "img", "aria-label": label, "viewBox": size})
        # what numbers keep clear of: texts, marks, and all that lies outside the frame
        self._taken: list[Box] = [(-1e3, -1e3, LEFT, 1e3), (RIGHT, -1e3, 1e3, 1e3)]
        self._taken += [(-1e3, -1e3, 1e3, TOP), (-1e3, BOTTOM, 1e3, 1e3)]
        self._numbers: list[tuple[float, float, int]] = []

    def axes(self, across: str, up: str, across_ticks: dict[float, str], up_ticks: dict[float, str]) -> None:
        """Names of both axes, and grid lines at ticks with their texts; one that would run into another has none."""
        last = -math.inf
        for tick, text in across_ticks.items():
            x, half = self.across(tick), text_width(text) / 2
            self.line([(x, TOP), (x, BOTTOM)], "grid")
            if x - half > last + 6:
                self.text(min(x, WIDTH - half), BOTTOM + 16, text, "middle")
                last = x + half
        for tick, text in up_ticks.items():
            y = self.up(tick)
            self.line([(LEFT, y), (RIGHT, y)], "grid")
            self.text(LEFT - 6, y + 4, text, "end")
        self.text(RIGHT, BOTTOM + 34, across, "end")
        self.text(2, 12, up)

    def text(self, x: float, y: float, content: str, anchor: str = "start", css: str = "") -> None:
        """Text on a baseline."""
        place = {"x": _number(x), "y": _number(y), "text-anchor": anchor, "class": css}
        ElementTree.SubElement(self.root, "text", place).text = content
        width = text_width(content)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        self._taken.append((left, y - TEXT, left + width, y + 2))

    def line(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through places of the drawing."""
        ElementTree.SubElement(self.root, "path", {"d": _steps(points), "class": css})

    def curve(self, points: Sequence[tuple[float, float]], css: str) -> None:
        """A line through values."""
        self.line([(self.across(x), self.up(y)) for x, y in points], css)

    def point(self, x: float, y: float, shape: int, css: str, title: str, number: int | None = None) -> None:
        """A mark at a place; its title is shown where the pointer rests, its number beside it."""
        element = mark(shape, css, x, y)
        ElementTree.SubElement(element, "title").text = title
        self.root.append(element)
        self._taken.append((x - 6, y - 6, x + 6, y + 6))
        if number is not None:
            self._numbers.append((x, y, number))

    def markup(self) -> str:
        """The element as text, each number where it is free; every name and label is escaped."""
        for x, y, number in self._numbers:
            width = text_width(str(number))
            dx, dy = free_place(x, y, width, 13, self._taken)
            left = x + dx - (width if dx < 0 else 0)
            if dy or abs(dx) > 9:
                self.line([(x, y), (left + width / 2, y + dy)], "leader")
            self.text(left, y + dy + 4, str(number), css="value")
        return ElementTree.tostring(self.root, encoding="unicode")


def text_width(content: str) -> float:
    """About how wide a text is."""
    return len(content) * TEXT * WIDTH_OF_EM


PLACES = [
    (dx * side, dy)
    for dx, dy, side in itertools.product((9, 24, 39, 54), (0, -14, 14, -28, 28, -42, 42, -56, 56), (1, -1))
]
"""Offsets of a label's near side from its point, best first."""


def free_place(x: float, y: float, width: float, height: float, taken: Sequence[Box]) -> tuple[float, float]:
    """The one of PLACES beside a point that overlaps least with the occupied areas."""

    def overlap(place: tuple[float, float]) -> float:
        left, top = x + place[0] - (width if place[0] < 0 else 0), y + place[1] - height / 2
        sides = ((min(left + width, b[2]) - max(left, b[0]), min(top + height, b[3]) - max(top, b[1])) for b in taken)
        return round(sum(max(0.0, wide) * max(0.0, high) for wide, high in sides), 3)

    return min(PLACES, key=overlap)  # of equal ones the first


def _steps(points: Sequence[tuple[float, float]]) -> str:
    return "M" + " L".join(f"{_number(x)} {_number(y)}" for x, y in points)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
