"""Values as text for HTML, whatever type and size they have."""
from __future__ import annotations

import html
import json
import re
from typing import Any

# Characters that are invisible or change the direction of the text after them.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def as_number(value: Any) -> float | None:
    """`value` as a float; None if it is not a number, NaN or infinite (1e100 and more count as infinite)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e100 else None


def get_typed(mapping: dict, key: str, kind: type = dict) -> Any:
    """`mapping[key]`, or an empty `kind` if it is absent or of another type."""
    value = mapping.get(key)
    return value if isinstance(value, kind) else kind()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def html_text(value: Any, limit: int = 400) -> str:
    """Escape `value` for HTML: a string as it is, anything else as JSON.

    Text longer than `limit` characters is cut. Unsafe characters are shown as their code, such as \\u202e.
    """
    text = value if isinstance(value, str) else to_json(value)
    if len(text) > limit:
        text = f"{text[:limit]} … ({len(text):,} characters)"
    return html.escape(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def percent(value: Any) -> str:
    """A fraction as "96.5 %", or a dash if it is not a number."""
    return "–" if as_number(value) is None else f"{100 * value:.1f}\u202f%"


def compact_number(value: float) -> str:
    """A number in a few characters: 12.5k, 950, 0.011, 3e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:.0f}"
    if size >= 1e-3 or value == 0:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
