"""Charts as SVG: lines over the steps of a run, and bars within tables."""
from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from report.formatting import compact_number

Points = Sequence[tuple[float, float | None]]          # (step, value), None where there is no value

MAX_POINTS = 400                                       # drawn of a line
WIDTH, HEIGHT = 420, 252                               # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 44, 404, 26, 214            # the frame within it
LABEL_HEIGHT, CHARACTER_WIDTH = 13, 7                  # of a line's name at its end


class Line(NamedTuple):
    """A line of a chart; its name is written at its end. tone: a CSS class, "first", "second" or "third"."""

    name: str
    tone: str
    points: Points
    faint: bool = False
    dots: bool = False


class Axes(NamedTuple):
    """What the frame shows: steps first … last, values low … high. right: the frame's right border."""

    right: int
    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (self.right - LEFT)

    def y(self, value: float) -> float:
        if self.log:
            fraction = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            fraction = (value - self.low) / (self.high - self.low)
        return BOTTOM - fraction * (BOTTOM - TOP)

    def path(self, points: Points) -> str:
        """The `d` of an SVG path, with a gap wherever a value is None."""
        path = ""
        for has_value, run in itertools.groupby(points, key=lambda point: point[1] is not None):
            if has_value:
                corners = [f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in run]
                path += "M" + "L".join(corners)
                if len(corners) == 1:
                    path += "h0"                       # a lone point is drawn as a dot
        return path


# ------------------------------------------------------------------------------------------------------------
# Points and ticks


def running_mean(points: Points) -> Points:
    """The mean over a thirtieth of the points, at most 101; narrower at the start, where losses fall fast."""
    values = [y for _, y in points if y is not None]
    half_width = min(50, len(values) // 60 + 1)
    means = []
    for i in range(len(values)):
        half = min(i, half_width)
        means.append(statistics.fmean(values[i - half:i + half + 1]))
    following = iter(means)
    return [(x, None if y is None else next(following)) for x, y in points]


def downsample(points: Points) -> Points:
    """At most MAX_POINTS points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = 2 * math.ceil(len(points) / MAX_POINTS)
    kept = []
    for start in range(0, len(points), stretch):
        finite = sorted((y, x) for x, y in points[start:start + stretch] if y is not None)
        if finite:
            lowest, highest = finite[0], finite[-1]
            kept += sorted({(x, y) for y, x in (lowest, highest)})
        else:
            kept.append((points[start][0], None))
    return kept


def linear_ticks(low: float, high: float, count: int, min_distance: float = 0.0) -> list[float]:
    """About `count` round numbers at equal distances, from at or below `low` to at or above `high`."""
    power = 10 ** math.floor(math.log10((high - low) / count))
    distances = (power * factor for factor in (1, 2, 5, 10, 20))
    distance = max(min_distance, next(d for d in distances if high - low <= count * d))
    first, last = math.floor(low / distance + 1e-9), math.ceil(high / distance - 1e-9)
    return [i * distance for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The powers of ten within low … high; if fewer than three, their doubles and fivefolds too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [(factor, factor * 10.0**i) for i in exponents for factor in (1, 2, 5)]
    ticks = [(factor, value) for factor, value in ticks if low <= value <= high]
    powers = [value for factor, value in ticks if factor == 1]
    return powers if len(powers) > 2 else [value for _, value in ticks]


# ------------------------------------------------------------------------------------------------------------
# Charts


def bar(count: float, longest: float, tone: str) -> str:
    """A number over a bar; `longest` is the count whose bar is as wide as the cell."""
    return (f'{count:,.0f}<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="mark {tone}" width="{100 * count / longest:.2f}" height="8"/></svg>')


def line_chart(title: str, unit: str, lines: list[Line], note: str = "",
               band: Sequence[tuple[float, float, float]] = (), log: bool = False) -> str:
    """A chart over the steps as HTML; "" if no line has a value.

    band: (step, low, high), an area to shade behind the lines. note: HTML below the chart.
    log: use a logarithmic scale if the values span more than a factor of 8; otherwise the axis starts at 0.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    names = [line.name for line in lines if line.name] if len(lines) > 1 else []
    axes, y_ticks = choose_axes(lines, names, log)
    lines = [line._replace(points=downsample(line.points)) for line in lines]
    if axes.log:
        unit += " (log scale)"
    label = f"{title} against step"
    if unit:
        label += f", {unit}"
    if names:
        label += f": {', '.join(names)}"

    svg = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">',
           f'<title>{label}</title><text y="11">{unit}</text>']
    svg += axes_svg(axes, y_ticks)
    if len(band) > 1:
        outline = [(step, low) for step, low, _ in band] + [(step, high) for step, _, high in reversed(band)]
        svg.append(f'<path class="band first" d="{axes.path(outline)}Z"/>')
    for line in lines:
        svg += line_svg(line, axes)
    svg += labels_svg([line for line in lines if line.name in names], axes)
    caption = f'<p class="note">{note}</p>' if note else ""
    return f"<figure><figcaption><h3>{title}</h3></figcaption>{''.join(svg)}</svg>{caption}</figure>"


def choose_axes(lines: list[Line], names: list[str], log: bool) -> tuple[Axes, list[float]]:
    """The axes that hold every value and leave room for the names, and the values to draw grid lines at."""
    right = RIGHT - max((CHARACTER_WIDTH * len(name) for name in names), default=0)
    points = [(x, y) for line in lines for x, y in line.points if y is not None]
    steps, values = [x for x, _ in points], [y for _, y in points]
    starts_near_0 = 0 <= min(steps) < max(steps) / 2
    first = 0 if starts_near_0 else min(steps)
    last = max(*steps, first + 1)

    smallest_positive = min((y for y in values if y > 0), default=0)
    log = log and min(values) >= 0 and max(values) > 8 * smallest_positive > 0
    if log:
        low, high = max(smallest_positive, max(values) * 1e-6), max(values)
        ticks = log_ticks(low, high)
    else:
        low, high = min(0, *values), max(0, *values)
        ticks = linear_ticks(low, high if high - low > 1e-12 else low + 1, 5)
        low, high = ticks[0], ticks[-1]
    return Axes(right, first, last, low, high, log), ticks


def axes_svg(axes: Axes, y_ticks: list[float]) -> list[str]:
    """The grid lines and the numbers along both axes."""
    svg = [f'<text x="{(LEFT + axes.right) / 2}" y="248" text-anchor="middle">step</text>']
    for value in y_ticks:
        y = axes.y(value)
        svg.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{axes.right}"/>'
                   f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{compact_number(value)}</text>')
    for step in linear_ticks(axes.first, axes.last, 5, min_distance=1):
        if axes.first <= step <= axes.last:
            x = axes.x(step)
            svg.append(f'<text x="{x:.1f}" y="{BOTTOM + 17}" text-anchor="middle">{step:,.0f}</text>')
    return svg


def line_svg(line: Line, axes: Axes) -> list[str]:
    css_class = f"line {line.tone}" + (" faint" if line.faint else "")
    svg = [f'<path class="{css_class}" d="{axes.path(line.points)}"/>']
    if line.dots:
        for step, value in line.points:
            if value is not None:
                x, y = axes.x(step), axes.y(value)
                svg.append(f'<circle class="mark {line.tone}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
                           f"<title>step {step:,}: {compact_number(value)}</title></circle>")
    return svg


def labels_svg(lines: list[Line], axes: Axes) -> list[str]:
    """The lines' names at their ends, from the lowest up, moved up where they would overlap the one below."""
    ends = []
    for line in lines:
        last_value = [y for _, y in line.points if y is not None][-1]
        ends.append((axes.y(last_value), line))
    svg, y = [], BOTTOM + float(LABEL_HEIGHT)
    for end, line in sorted(ends, key=lambda end: -end[0]):
        y = min(end + 4, y - LABEL_HEIGHT)
        svg.append(f'<text class="label {line.tone}" x="{axes.right + 8}" y="{y:.1f}">{line.name}</text>')
    return svg
