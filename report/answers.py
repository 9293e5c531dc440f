"""Answers beside the expected calls."""
from __future__ import annotations

from collections import Counter
from typing import Any

from report.formatting import dump, part, text

MISSES, HITS = 24, 6              # answers shown


def answers(ends: list) -> str:
    """Answers of the last evaluation beside the expected ones: misses by cause, each cause in its turn, then hits."""
    found = [[answer for answer in part(evaluation, "answers", list) if isinstance(answer, dict)] for _, evaluation in ends] or [[]]
    before = {dump(answer["source"]): answer for answer in found[0] if answer.get("source") is not None} if len(found) == 2 else {}
    groups: dict[str, list[dict]] = {}
    for answer in found[-1]:
        groups.setdefault(str(answer.get("cause") or ("not to the letter" if answer.get("exact") is False else "")), []).append(answer)
    hits = groups.pop("", [])
    ordered = sorted(groups, key=lambda cause: -len(groups[cause]))
    turns = [cause for i in range(MISSES) for cause in ordered if i < len(groups[cause])]
    quota = Counter(turns[:MISSES])
    out = []
    for title, members, count in (*((f"Missed: {text(cause, 80)}", groups[cause], quota[cause]) for cause in quota), ("Right", hits, HITS)):
        if members:
            shown = f"{count} of {len(members):,}" if count < len(members) else f"{len(members):,}"
            out.append(f"<h3>{title} <small>{shown}</small></h3>")
            out += (sample(answer, before.get(dump(answer.get("source"))), ends) for answer in members[:count])
    return "\n".join(out)


def sample(answer: dict, before: dict | None, ends: list) -> str:
    """One query: the calls expected, given, and given before."""
    wanted, given = compare(answer.get("expected"), answer)
    sides = [("expected", wanted, None), (f"given, step {ends[-1][0]:,}", given, answer.get("text"))]
    if before:
        sides.append((f"before, step {ends[0][0]:,}", compare(answer.get("expected"), before)[1], before.get("text")))
    about = " · ".join(text(answer[key], 200) for key in ("source", "detail") if answer.get(key))
    raw = "".join(f"<h4>{name}</h4><pre>{text(said, 4_000)}</pre>" for name, _, said in sides if said)
    return (f'<article><p class="query">{text(answer.get("query") or "", 800)}</p><small>{about}</small>\n<div class="sides">'
            + "".join(f'<div class="side"><h4>{name}</h4>{calls}</div>' for name, calls, _ in sides) + "</div>"
            + (f"<details><summary>raw text</summary>{raw}</details>" if raw else "") + "</article>")


def compare(expected: Any, answer: dict) -> tuple[str, str]:
    """The expected and the given calls in HTML; every name and argument that differs, is missing or is too much is marked."""
    expected, given = ([call for call in calls if isinstance(call, dict)][:12] if isinstance(calls, list) else []
                       for calls in (expected, answer.get("given")))
    wanted, found, left = "", "", list(given)
    for call in expected:                                 # beside it the call most like it
        like = max(left, key=lambda other: (other.get("name") == call.get("name"), len(facts(other) & facts(call))), default=None)
        left = [other for other in left if other is not like]
        wanted += call_lines(call, like, "wanted")
        found += call_lines(like, call, "given") if like else f'<p class="none">no call of {text(call.get("name"), 120)}</p>'
    if not given:
        said = answer.get("text")
        found = '<p class="none">no call' + (f": {text(said, 120)}" if said else "") + "</p>"
    return wanted or '<p class="none">no call</p>', found + "".join(call_lines(call, None, "given") for call in left)


def arguments(call: dict) -> dict[str, Any]:
    given = call.get("arguments")
    return given if isinstance(given, dict) else {"arguments": given} if given else {}


def facts(call: dict) -> set[tuple[str, str]]:
    return {(key, dump(value)) for key, value in arguments(call).items()}


def call_lines(own: dict, other: dict | None, tone: str) -> str:
    """A call, one argument a line, marked where it is not as in the call of the other side."""
    mine, theirs = arguments(own), arguments(other or own)
    name = f"<b>{text(own.get('name'), 120)}</b>"
    if other is None or own.get("name") != other.get("name"):
        name = f'<mark class="{tone}">{"≠" if other else "+"} {name}</mark>'
    lines = []
    for key in [*mine, *(key for key in theirs if key not in mine and tone == "given")]:
        face = "−" if key not in mine else "+" if key not in theirs else "" if dump(mine[key]) == dump(theirs[key]) else "≠"
        shown = text(dump(mine[key]), 300) if key in mine else "absent"
        lines.append(f"<li><i>{face}</i>{text(key, 80)}: " + (f'<mark class="{tone}">{shown}</mark></li>' if face else f"{shown}</li>"))
    return f'<div class="call {tone}">{name}<ul>{"".join(lines)}</ul></div>'
