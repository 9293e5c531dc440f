"""Numbers and text for HTML."""
from __future__ import annotations

import html
import json
import re
from typing import Any

# What has no face, or turns the line around.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def number(value: Any) -> float | None:
    """`value` as a float; None for what is no number, NaN and infinity among it."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 else None


def part(evaluation: dict, key: str, kind: type = dict) -> Any:
    """What an evaluation has under `key`, empty where it is absent or of another kind."""
    return evaluation[key] if isinstance(evaluation.get(key), kind) else kind()


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def text(value: Any, limit: int = 400) -> str:
    """`value` for HTML: JSON unless it is a string, cut at `limit` characters, escaped; what is UNSAFE by its number."""
    whole = value if isinstance(value, str) else dump(value)
    cut = whole if len(whole) <= limit else f"{whole[:limit]} … ({len(whole):,} characters)"
    return html.escape(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", cut))


def percent(value: Any) -> str:
    return "–" if number(value) is None else f"{100 * value:.1f}\u202f%"


def bounds(evaluation: dict, key: str) -> list[float]:
    """Both ends of the metric's 95 % interval; empty where there is none."""
    ends = [number(end) for end in part(part(evaluation, "intervals"), key, list)]
    return ends if len(ends) == 2 and None not in ends else []


def interval(evaluation: dict, key: str) -> str:
    """The same as "93.0–98.5 %"."""
    return "–".join(f"{100 * end:.1f}" for end in bounds(evaluation, key)) + "\u202f%" * bool(bounds(evaluation, key))


def short(value: float) -> str:
    """12.5k, 950, 0.011, 3e-4."""
    size = abs(value)
    if size >= 1e4:
        return f"{value / 1e3:.3g}k" if size < 1e6 else f"{value / 1e6:.3g}M"
    if size >= 1e-3 or not value:
        return f"{value:.0f}" if size >= 1e3 else f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
