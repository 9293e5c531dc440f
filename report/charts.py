"""SVG line charts and bars."""
from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from report.formatting import short

POINTS = 400                      # at most so many in a line


class Line(NamedTuple):
    """Points (step, value), None where there is no value; the name is written at the line's end."""

    name: str
    tone: str
    points: list[tuple[float, float | None]]
    faint: bool = False
    dots: bool = False


def smooth(points: list) -> list:
    """The running mean over a thirtieth of the points, 100 at most; narrower at the start, where losses fall fast."""
    ys = [y for _, y in points if y is not None]
    half = min(50, len(ys) // 60 + 1)
    means = iter([statistics.fmean(ys[i - min(i, half):i + min(i, half) + 1]) for i in range(len(ys))])
    return [(x, None if y is None else next(means)) for x, y in points]


def thin(points: list) -> list:
    """At most POINTS points, of each stretch the lowest and the highest, so that spikes stay."""
    stretch = 2 * math.ceil(len(points) / POINTS)
    if len(points) <= POINTS:
        return points
    kept = []
    for start in range(0, len(points), stretch):
        finite = sorted((y, x) for x, y in points[start:start + stretch] if y is not None)
        kept += sorted({(x, y) for y, x in (finite[0], finite[-1])}) if finite else [(points[start][0], None)]
    return kept


def ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """About `count` round numbers of one distance, from at or below `low` to at or above `high`."""
    size = 10 ** math.floor(math.log10((high - low) / count))
    size = max(least, next(size * factor for factor in (1, 2, 5, 10, 20) if high - low <= count * size * factor))
    return [i * size for i in range(math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low … high; where there are fewer than three, twice and five times these too."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [(factor, factor * 10.0**i) for i in exponents for factor in (1, 2, 5) if low <= factor * 10.0**i <= high]
    whole = [value for factor, value in fine if factor == 1]
    return whole if len(whole) > 2 else [value for _, value in fine]


def figure(title: str, unit: str, lines: list[Line], note: str = "", band: Sequence[tuple] = (), log: bool = False) -> str:
    """A chart over the steps, empty where no line has a value. band: (step, low, high) to shade behind the lines.

    log: for a logarithmic scale where the values span more than a factor of 8; otherwise the axis starts at 0.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return ""
    names = [line.name for line in lines if line.name] if len(lines) > 1 else []
    left, right, top, bottom = 44, 404 - max((7 * len(name) for name in names), default=0), 26, 214
    xs, ys = zip(*((x, y) for line in lines for x, y in line.points if y is not None), strict=True)
    first = 0 if 0 <= min(xs) < max(xs) / 2 else min(xs)
    last = max(*xs, first + 1)
    lines = [line._replace(points=thin(line.points)) for line in lines]
    positive = min((y for y in ys if y > 0), default=0)
    log = log and min(ys) >= 0 and max(ys) > 8 * positive > 0
    low, high = max(positive, max(ys) * 1e-6) if log else min(0, *ys), max(0, *ys)
    rows = log_ticks(low, high) if log else ticks(low, high if high - low > 1e-12 else low + 1, 5)
    low, high = (low, high) if log else (rows[0], rows[-1])

    def across(x: float) -> float:
        return left + (x - first) / (last - first) * (right - left)

    def up(y: float) -> float:
        share = math.log(max(y, low) / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - share * (bottom - top)

    def path(points: Sequence[tuple]) -> str:
        runs = [list(run) for drawn, run in itertools.groupby(points, key=lambda point: point[1] is not None) if drawn]
        return "".join("M" + "L".join(f"{across(x):.1f},{up(y):.1f}" for x, y in run) + "h0" * (len(run) == 1) for run in runs)

    unit += " (log scale)" if log else ""
    spoken = f"{title} against step" + (f", {unit}" if unit else "") + (f": {', '.join(names)}" if names else "")
    out = [f'<svg class="chart" viewBox="0 0 420 252" role="img" aria-label="{spoken}"><title>{spoken}</title><text y="11">{unit}</text>',
           f'<text x="{(left + right) / 2}" y="248" text-anchor="middle">step</text>']
    out += (f'<path class="grid" d="M{left},{up(y):.1f}H{right}"/>'
            f'<text x="{left - 7}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>' for y in rows)
    out += (f'<text x="{across(x):.1f}" y="{bottom + 17}" text-anchor="middle">{x:,.0f}</text>'
            for x in ticks(first, last, 5, least=1) if first <= x <= last)
    if len(band) > 1:
        out.append(f'<path class="band first" d="{path([(x, y) for x, y, _ in band] + [(x, y) for x, _, y in reversed(band)])}Z"/>')
    for line in lines:
        out.append(f'<path class="line {line.tone}{" faint" if line.faint else ""}" d="{path(line.points)}"/>')
        out += (f'<circle class="mark {line.tone}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5"><title>step {x:,}: {short(y)}</title>'
                "</circle>" for x, y in line.points if line.dots and y is not None)
    below = bottom + 13.0
    ends = ((up([y for _, y in line.points if y is not None][-1]), line) for line in lines if line.name in names)
    for y, line in sorted(ends, key=lambda end: -end[0]):
        below = min(y + 4, below - 13)                    # never over the one below
        out.append(f'<text class="label {line.tone}" x="{right + 8}" y="{below:.1f}">{line.name}</text>')
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<figure><figcaption><h3>{title}</h3></figcaption>{''.join(out)}</svg>{note}</figure>"


def bar(count: float, most: float, tone: str) -> str:
    """A number over a bar, as long as it is of the most."""
    return (f'{count:,.0f}<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect class="mark {tone}" width="{100 * count / most:.2f}" height="8"/></svg>')
