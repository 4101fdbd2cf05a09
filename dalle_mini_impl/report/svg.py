"""Charts as SVG elements: lines with levels drawn in, shares with intervals, a falling histogram."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dalle_mini_impl.report.elements import Element, Node, tag
from dalle_mini_impl.report.memorisation import Share

WIDTH, HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 50
_MIN_LABEL_GAP = 17
_MAX_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. colour: 0 to 4. pale: drawn thin, as training curves are. low, high: a band around it."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    pale: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Level:
    """A horizontal line that says what a value means: chance, a floor."""

    label: str
    value: float


class _Frame:
    """From values to places in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], log_x: bool = False) -> None:
        self.log_x = log_x
        self.xs = (self._x(xs[0]), self._x(xs[1]) if xs[1] > xs[0] else self._x(xs[0]) + 1)
        self.ys = ys if ys[1] > ys[0] else (ys[0] - 0.5, ys[0] + 0.5)

    def _x(self, value: float) -> float:
        return math.log2(value) if self.log_x else value

    def x(self, value: float) -> float:
        share = (self._x(value) - self.xs[0]) / (self.xs[1] - self.xs[0])
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[1] - self.ys[0])
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)


def line_chart(
    lines: Iterable[Line],
    *,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    percent: bool = False,
) -> Element:
    """Curves over x, with levels as dashed lines and a legend below; points beyond the usual range are cut off."""
    lines = [thinned(line) for line in lines if len(line.xs)]
    every_x = [x for line in lines for x in line.xs] or [1.0]
    first_x = min(every_x) if log_x else min(0.0, *every_x)
    origin = [[0.0]] if percent else []  # so that a single share, of 100 %, isn't where the axis begins
    low, high = _range([*(_usual(line) for line in lines), *([level.value] for level in levels), *origin])
    y_ticks = ticks(low, high)
    frame = _Frame((first_x, max(every_x)), (min(low, y_ticks[0]), max(high, y_ticks[-1])), log_x)
    x_ticks = ticks(*frame.xs) if x_ticks is None else x_ticks
    description = f"{y_label} over {x_label}: {', '.join(line.label for line in lines)}"
    image = _image(
        description,
        _axes(frame, x_ticks, y_ticks, x_label, y_label, percent),
        [_curve(frame, line, percent) for line in lines],
        _levels(frame, levels, percent),
    )
    return tag("div", image, _legend(lines), class_="chart")


def thinned(line: Line) -> Line:
    """A line of at most _MAX_POINTS points: each is the mean of some neighbours. Values that aren't finite go."""
    finite = [index for index, y in enumerate(line.ys) if math.isfinite(y)]
    if len(finite) == len(line.ys) <= _MAX_POINTS:
        return line
    parts = np.array_split(np.array(finite, dtype=np.int64), max(1, min(_MAX_POINTS, len(finite))))
    parts = [part for part in parts if len(part)]

    def mean(values: Sequence[float] | None) -> list[float] | None:
        return None if values is None else [float(np.mean(np.asarray(values)[part])) for part in parts]

    xs, ys = mean(line.xs), mean(line.ys)
    assert xs is not None and ys is not None
    return Line(
        label=line.label, xs=xs, ys=ys, colour=line.colour, pale=line.pale, low=mean(line.low), high=mean(line.high)
    )


def _usual(line: Line) -> list[float]:
    """The range that has to be seen: all of a bold line, and of a pale one what isn't an outlier."""
    if line.pale and len(line.ys) > 20:
        return [float(value) for value in np.percentile(line.ys, [1, 97])]
    return [*line.ys, *(line.low or []), *(line.high or [])]


def _range(parts: Sequence[Sequence[float]]) -> tuple[float, float]:
    values = [value for part in parts for value in part] or [0.0, 1.0]
    low, high = min(values), max(values)
    if 0 < low < 0.4 * high:
        low = 0.0
    return low, high if high > low else low + 1.0


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span low to high; the first and last may lie outside of it by less than a step."""
    raw = max(high - low, 1e-12) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def number(value: float) -> str:
    """A number in as few characters as it needs: 47,500 or 0.276."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def percent_of(share: float, digits: int = 0) -> str:
    """A share as this project writes it: 54 %, not broken between lines."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def _image(description: str, *children: Node, height: int = HEIGHT) -> Element:
    return tag(
        "svg", tag("title", description), *children, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=description
    )


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str, percent: bool
) -> list[Element]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in y_ticks:
        y = frame.y(value)
        text = percent_of(value) if percent else number(value)
        parts.append(tag("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", text, x=_LEFT - 7, y=y + 5, class_="tick", text_anchor="end"))
    for value in x_ticks:
        x = frame.x(value)
        if _LEFT - 1 <= x <= right + 1:
            anchor = "end" if x > right - 12 else "middle"
            parts.append(tag("text", number(value), x=x, y=bottom + 18, class_="tick", text_anchor=anchor))
    parts.append(tag("text", x_label, x=(_LEFT + right) / 2, y=HEIGHT - 6, class_="axis", text_anchor="middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        tag("text", y_label, x=14, y=middle, class_="axis", text_anchor="middle", transform=f"rotate(-90 14 {middle})")
    )
    return parts


def _curve(frame: _Frame, line: Line, percent: bool) -> list[Element]:
    """Band, line and, where the line is bold, a dot for each value that names it when pointed at."""
    top, bottom = _TOP, HEIGHT - _BOTTOM
    points = [(frame.x(x), min(max(frame.y(y), top), bottom)) for x, y in zip(line.xs, line.ys, strict=True)]
    parts = []
    if line.low is not None and line.high is not None:
        edge = [*zip(line.xs, line.high, strict=True), *reversed(list(zip(line.xs, line.low, strict=True)))]
        outline = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in edge)
        parts.append(tag("polygon", points=outline, class_=f"band c{line.colour}"))
    path = " ".join(f"{x},{y}" for x, y in points)
    parts.append(tag("polyline", points=path, class_=f"{'pale' if line.pale else 'bold'} c{line.colour}"))
    if not line.pale:
        for (x, y), x_value, y_value in zip(points, line.xs, line.ys, strict=True):
            text = f"{line.label}: {percent_of(y_value, 1) if percent else f'{y_value:.4g}'} at {number(x_value)}"
            parts.append(tag("circle", tag("title", text), cx=x, cy=y, r=3, class_=f"dot c{line.colour}"))
    return parts


def _levels(frame: _Frame, levels: Sequence[Level], percent: bool = False) -> list[Element]:
    """Dashed lines with their names at the right end, above the line, or below where another name is in the way."""
    parts, taken = [], -math.inf
    for level in sorted(levels, key=lambda level: -level.value):
        y = frame.y(level.value)
        above = y - 6 - taken >= _MIN_LABEL_GAP and y - 6 > _TOP + 8
        place = y - 6 if above else y + 16
        taken = place
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, class_="level"))
        text = f"{level.label}: {percent_of(level.value, 1) if percent else number(level.value)}"
        parts.append(tag("text", text, x=WIDTH - _RIGHT - 4, y=place, class_="level-name", text_anchor="end"))
    return parts


def _legend(lines: Sequence[Line]) -> Element:
    kinds = [("pale" if line.pale else "bold", line) for line in lines]
    return tag(
        "p",
        [tag("span", tag("i", class_=f"{kind} c{line.colour}"), line.label, class_="key") for kind, line in kinds],
        class_="legend",
    )


def share_chart(rows: Sequence[tuple[str, Share]], *, chance: float, x_label: str) -> Element:
    """Shares from 0 to 100 % with their intervals, one below the other, and what chance would make of them."""
    step, top = 66, 24
    height = top + step * len(rows) + 50
    left, right = 14, WIDTH - 16
    bottom = top + step * len(rows)

    def x(share: float) -> float:
        return round(left + share * (right - left), 1)

    parts: list[Element] = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        anchor = {0.0: "start", 1.0: "end"}.get(value, "middle")
        parts.append(tag("line", x1=x(value), x2=x(value), y1=top, y2=bottom, class_="grid"))
        parts.append(tag("text", percent_of(value), x=x(value), y=bottom + 18, class_="tick", text_anchor=anchor))
    parts.append(tag("line", x1=x(chance), x2=x(chance), y1=top, y2=bottom, class_="level"))
    parts.append(
        tag("text", f"chance: {percent_of(chance)}", x=x(chance), y=15, class_="level-name", text_anchor="middle")
    )
    for index, (label, share) in enumerate(rows):
        y = top + step * index + 38
        colour = min(index, 4)
        if share.chance is not None:
            start, end = x(share.chance[0]), x(share.chance[1])
            zone = f"chance alone: {percent_of(share.chance[0])} to {percent_of(share.chance[1])}"
            parts.append(tag("rect", x=start, y=y - 9, width=end - start, height=18, class_="zone"))
            parts.append(tag("text", zone, x=(start + end) / 2, y=y + 23, class_="level-name", text_anchor="middle"))
        words = f"{label}: {percent_of(share.mean)}"
        interval = f"95 % interval {percent_of(share.low)} to {percent_of(share.high)}, {share.num_samples} pictures"
        parts.append(tag("text", words, x=left, y=y - 14, class_="name"))
        parts.append(tag("line", x1=x(share.low), x2=x(share.high), y1=y, y2=y, class_=f"interval c{colour}"))
        dot = tag("circle", tag("title", f"{words}, {interval}"), cx=x(share.mean), cy=y, r=6, class_=f"dot c{colour}")
        parts.append(dot)
    parts.append(tag("text", x_label, x=(left + right) / 2, y=bottom + 42, class_="axis", text_anchor="middle"))
    return tag("div", _image(f"{x_label}, chance is {percent_of(chance)}", parts, height=height), class_="chart")


def falling_histogram(shares: Sequence[float], *, even: float, x_label: str, y_label: str, even_label: str) -> Element:
    """Shares, the largest first, as a filled outline, beside the level that they would have if all were the same."""
    ordered = sorted(shares, reverse=True)
    y_ticks = ticks(0.0, max(ordered[0], even))
    frame = _Frame((0.0, float(len(ordered))), (0.0, y_ticks[-1]))
    corners = [f"{frame.x(0)},{frame.y(0)}"]
    for index, share in enumerate(ordered):
        corners += [f"{frame.x(index)},{frame.y(share)}", f"{frame.x(index + 1)},{frame.y(share)}"]
    corners.append(f"{frame.x(len(ordered))},{frame.y(0)}")
    axes = _axes(frame, ticks(0.0, float(len(ordered))), y_ticks, x_label, y_label, percent=False)
    outline = tag("polygon", points=" ".join(corners), class_="area c0")
    return tag(
        "div",
        _image(f"{y_label} by {x_label}", axes, outline, _levels(frame, [Level(even_label, even)])),
        class_="chart",
    )
