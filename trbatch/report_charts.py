"""Charts as figures of HTML around an SVG.

The SVG is stretched to whatever width there is, and so holds shapes only: lines keep their width
(`vector-effect`), and all text stands in HTML around it, as large on a telephone as on a screen.
Values can be read by pointing (`title`) and from the table below each chart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trbatch.report_html import Child, Markup, brief, joined, tag

WIDE, HIGH = 1000.0, 200.0  # the units of every SVG


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis covers, in words and numbers."""

    low: float
    high: float
    unit: str  # its title
    ticks: Sequence[tuple[float, str]]  # value and label

    def part(self, value: float) -> float:
        """Where a value lies: 0 at the begin, 1 at the end."""
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.0

    def x(self, value: float) -> float:
        """In the SVG's units from the left."""
        return self.part(value) * WIDE

    def y(self, value: float) -> float:
        """In the SVG's units from above."""
        return (1 - self.part(value)) * HIGH


def axis(low: float, high: float, unit: str, *, most: int = 5, suffix: str = "") -> Axis:
    """An axis with round numbers; upwards it goes on to the next one."""
    if high <= low:
        high = low + 1
    step = _round_step((high - low) / most)
    top = math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, round(top / step) + 1)]
    return Axis(low, top, unit, [(value, brief(round(value, 10)) + suffix) for value in values])


def exact_axis(low: float, high: float, unit: str, *, most: int = 6, suffix: str = "") -> Axis:
    """The same, but it ends where its values end."""
    made = axis(low, high, unit, most=most, suffix=suffix)
    return Axis(low, high, unit, [tick for tick in made.ticks if tick[0] <= high + 1e-9])


def time_axis(length_s: float) -> Axis:
    """Decoding time from 0, in the largest unit that says something."""
    unit, size = next(
        (name, size)
        for name, size in (
            ("days", 86400.0),
            ("hours", 3600.0),
            ("minutes", 60.0),
            ("seconds", 1.0),
        )
        if length_s >= 2 * size or size == 1.0
    )
    made = exact_axis(0.0, length_s / size, f"decoding time, {unit}")
    return Axis(0.0, length_s, made.unit, [(value * size, text) for value, text in made.ticks])


def figure(
    title: str,
    note: Child,
    x: Axis,
    y: Axis,
    shapes: Child,
    *,
    data: Markup | None = None,
    legend: Child = None,
    low: bool = False,
) -> Markup:
    """A chart with its axes.

    Args:
        shapes: SVG elements in units of `WIDE` and `HIGH`.
        data: the same as a table, folded up.
        low: make it less high.
    """
    grid = [_line(0.0, y.y(value), WIDE, y.y(value), "grid") for value, _ in y.ticks]
    svg = tag(
        "svg", grid, shapes,
        viewBox=f"0 0 {WIDE:g} {HIGH:g}", preserveAspectRatio="none", role="img", aria_label=title,
    )  # fmt: skip
    above = [_label(text, f"bottom:{100 * y.part(value):.2f}%") for value, text in y.ticks]
    below = [
        _label(text, f"left:{100 * x.part(value):.2f}%", index)
        for index, (value, text) in enumerate(x.ticks)
    ]
    plot = tag(
        "div",
        tag("div", y.unit, class_="unit"),
        tag("div", above, class_="y", aria_hidden="true"),
        tag("div", svg, class_="area"),
        tag("div", below, class_="x", aria_hidden="true"),
        tag("div", x.unit, class_="xunit"),
        class_="plot low" if low else "plot",
    )
    folded = tag("details", tag("summary", "Figures"), data) if data else None
    caption = tag("figcaption", tag("h3", title), tag("p", note), legend)
    return tag("figure", caption, plot, folded)


def bars(x: Axis, y: Axis, values: Sequence[tuple[float, float, float, str, str]]) -> Markup:
    """Bars (from, to, height, class, words), with a little room between them."""
    made = []
    for start, end, height, kind, words in values:
        left, right, top = x.x(start), x.x(end), y.y(height)
        gap = min(3.0, 0.15 * (right - left))
        made.append(_rect(left + gap, top, right - left - 2 * gap, HIGH - top, kind, words))
    return joined(made)


def stacked(
    x: Axis, y: Axis, values: Sequence[tuple[float, float, Sequence[float], str]]
) -> Markup:
    """Bars (from, to, heights of their parts, words), the parts of classes `s0`, `s1`, …"""
    made = []
    for start, end, heights, words in values:
        left, right, below = x.x(start), x.x(end), y.low
        gap = min(1.5, 0.1 * (right - left))
        for index, height in enumerate(heights):
            top, bottom = y.y(below + height), y.y(below)
            below += height
            if bottom - top > 0.05:
                wide = right - left - 2 * gap
                made.append(_rect(left + gap, top, wide, bottom - top, f"s{index}", words))
    return joined(made)


def steps(x: Axis, y: Axis, values: Sequence[tuple[float, float, float, str]]) -> Markup:
    """An area with a line on top that goes from step to step: (from, to, height, words)."""
    if not values:
        return Markup("")
    way = " ".join(
        f"{x.x(start):.1f},{y.y(height):.1f} {x.x(end):.1f},{y.y(height):.1f}"
        for start, end, height, _ in values
    )
    first, last = x.x(values[0][0]), x.x(values[-1][1])
    area = tag("path", d=f"M{first:.1f},{HIGH:g} {way} {last:.1f},{HIGH:g}Z", class_="fill")
    line = tag("path", d=f"M{way}", class_="line")
    spots = [
        _rect(x.x(start), 0.0, x.x(end) - x.x(start), HIGH, "spot", words)
        for start, end, _, words in values
    ]
    return joined(area, line, spots)


def line(x: Axis, y: Axis, points: Sequence[tuple[float, float, str]]) -> Markup:
    """A line through points (x, y, words), each with a dot."""
    places = [(x.x(across), y.y(up), words) for across, up, words in points]
    way = tag("path", d="M" + " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in places), class_="line")
    # A path without length and with round ends is a dot that stays round when it is stretched.
    dots = [
        tag("path", tag("title", words), d=f"M{a:.1f},{b:.1f}h0.01", class_="dot")
        for a, b, words in places
    ]
    return joined(way, dots)


def upright(x: Axis, value: float, kind: str, words: str) -> Markup:
    """A line from below to above at a value."""
    return _line(x.x(value), 0.0, x.x(value), HIGH, kind, words)


def level(y: Axis, value: float, kind: str, words: str) -> Markup:
    """A line across at a value."""
    return _line(0.0, y.y(value), WIDE, y.y(value), kind, words)


def legend(names: Sequence[tuple[str, str]]) -> Markup:
    """What colours mean: (class, words)."""
    return tag(
        "ul",
        [tag("li", tag("i", class_=kind, aria_hidden="true"), words) for kind, words in names],
        class_="legend",
    )


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return float(next(size * n for n in (1, 2, 5, 10) if size * n >= rough * (1 - 1e-9)))


def _label(text: str, style: str, index: int = 0) -> Markup:
    return tag("span", text, style=style, class_="odd" if index % 2 else None)


def _rect(x: float, y: float, width: float, height: float, kind: str, words: str) -> Markup:
    numbers = {"x": x, "y": y, "width": max(width, 0.2), "height": max(height, 0.0)}
    written = {name: f"{value:.1f}" for name, value in numbers.items()}
    return tag("rect", tag("title", words), class_=kind, **written)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, words: str = "") -> Markup:
    written = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return tag("line", tag("title", words) if words else None, class_=kind, **written)
