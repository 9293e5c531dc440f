"""The section "Answers" of a run's report: expected and given calls side by side, every difference marked."""
from __future__ import annotations

from collections import Counter
from typing import Any

from report.formatting import get_typed, html_text, to_json

MAX_MISSES, MAX_HITS = 24, 6              # answers shown
MAX_CALLS = 12                            # calls shown of an answer
EXACT_MISS = "not to the letter"          # the heading of AST matches that are no exact matches


def answers_section(before_after: list[tuple[int, dict]]) -> str:
    """Answers of the last evaluation beside the expected calls: misses by cause, then hits."""
    evaluations = [evaluation for _, evaluation in before_after]
    answers = answers_of(evaluations[-1]) if evaluations else []
    before = {}
    if len(evaluations) == 2:
        before = {to_json(answer["source"]): answer for answer in answers_of(evaluations[0])
                  if answer.get("source") is not None}

    by_cause: dict[str, list[dict]] = {}
    for answer in answers:
        by_cause.setdefault(cause_of(answer), []).append(answer)
    hits = by_cause.pop("", [])
    groups = [(f"Missed: {html_text(cause, 80)}", by_cause[cause], count)
              for cause, count in share_places(by_cause, MAX_MISSES).items()]
    groups.append(("Right", hits, MAX_HITS))

    out = []
    for title, members, count in groups:
        if members:
            number = f"{count} of {len(members):,}" if count < len(members) else f"{len(members):,}"
            out.append(f"<h3>{title} <small>{number}</small></h3>")
            for answer in members[:count]:
                out.append(article(answer, before.get(to_json(answer.get("source"))), before_after))
    return "\n".join(out)


def answers_of(evaluation: dict) -> list[dict]:
    return [answer for answer in get_typed(evaluation, "answers", list) if isinstance(answer, dict)]


def cause_of(answer: dict) -> str:
    """Why the answer is a miss; "" for a hit."""
    if answer.get("cause"):
        return str(answer["cause"])
    return EXACT_MISS if answer.get("exact") is False else ""


def share_places(groups: dict[str, list], places: int) -> Counter[str]:
    """How many members of each group to show, `places` in all: one of each in turn, largest group first."""
    largest_first = sorted(groups, key=lambda name: -len(groups[name]))
    turns = [name for i in range(places) for name in largest_first if i < len(groups[name])]
    return Counter(turns[:places])


def article(answer: dict, before: dict | None, before_after: list[tuple[int, dict]]) -> str:
    """One query: the calls expected, given, and given before training."""
    expected, given = compare_calls(answer.get("expected"), answer)
    first_step, last_step = before_after[0][0], before_after[-1][0]
    panels = [("expected", expected, None), (f"given, step {last_step:,}", given, answer.get("text"))]
    if before:
        _, given_before = compare_calls(answer.get("expected"), before)
        panels.append((f"before, step {first_step:,}", given_before, before.get("text")))

    query = html_text(answer.get("query") or "", 800)
    caption = " · ".join(html_text(answer[key], 200) for key in ("source", "detail") if answer.get(key))
    sides = "".join(f'<div class="side"><h4>{title}</h4>{calls}</div>' for title, calls, _ in panels)
    raw = "".join(f"<h4>{title}</h4><pre>{html_text(text, 4_000)}</pre>" for title, _, text in panels if text)
    details = f"<details><summary>raw text</summary>{raw}</details>" if raw else ""
    return (f'<article><p class="query">{query}</p><small>{caption}</small>\n'
            f'<div class="sides">{sides}</div>{details}</article>')


def compare_calls(expected: Any, answer: dict) -> tuple[str, str]:
    """The expected and the given calls as HTML, with a mark on every name and argument that differs.

    An expected call is compared with the given call that is most like it. No given call is used twice.
    """
    expected_calls, given_calls = calls_of(expected), calls_of(answer.get("given"))
    expected_html, given_html = "", ""
    unmatched = list(given_calls)
    for call in expected_calls:
        match = most_similar(call, unmatched)
        unmatched = [other for other in unmatched if other is not match]
        expected_html += call_html(call, match, "wanted")
        if match:
            given_html += call_html(match, call, "given")
        else:
            given_html += f'<p class="none">no call of {html_text(call.get("name"), 120)}</p>'
    if not given_calls:
        text = answer.get("text")
        given_html = '<p class="none">no call' + (f": {html_text(text, 120)}" if text else "") + "</p>"
    given_html += "".join(call_html(call, None, "given") for call in unmatched)
    return expected_html or '<p class="none">no call</p>', given_html


def calls_of(value: Any) -> list[dict]:
    """The first calls of a list; none if `value` is no list."""
    calls = value if isinstance(value, list) else []
    return [call for call in calls if isinstance(call, dict)][:MAX_CALLS]


def most_similar(call: dict, others: list[dict]) -> dict | None:
    """The call with the most equal arguments, if possible one of the same name; None if `others` is empty."""
    def similarity(other: dict) -> tuple[bool, int]:
        return other.get("name") == call.get("name"), len(argument_items(other) & argument_items(call))

    return max(others, key=similarity, default=None)


def arguments_of(call: dict) -> dict[str, Any]:
    arguments = call.get("arguments")
    if isinstance(arguments, dict):
        return arguments
    return {"arguments": arguments} if arguments else {}


def argument_items(call: dict) -> set[tuple[str, str]]:
    return {(key, to_json(value)) for key, value in arguments_of(call).items()}


def call_html(call: dict, other: dict | None, tone: str) -> str:
    """A call, one argument a line, with a mark wherever it differs from `other`.

    other: the matching call of the other side, or None. tone: "wanted" or "given", a CSS class; a given call
    also lists the arguments that it lacks.
    """
    arguments, other_arguments = arguments_of(call), arguments_of(other or call)
    name = f"<b>{html_text(call.get('name'), 120)}</b>"
    if other is None or call.get("name") != other.get("name"):
        name = f'<mark class="{tone}">{"≠" if other else "+"} {name}</mark>'

    missing = [key for key in other_arguments if key not in arguments] if tone == "given" else []
    lines = []
    for key in [*arguments, *missing]:
        sign = difference_sign(key, arguments, other_arguments)
        value = html_text(to_json(arguments[key]), 300) if key in arguments else "absent"
        if sign:
            value = f'<mark class="{tone}">{value}</mark>'
        lines.append(f"<li><i>{sign}</i>{html_text(key, 80)}: {value}</li>")
    return f'<div class="call {tone}">{name}<ul>{"".join(lines)}</ul></div>'


def difference_sign(key: str, arguments: dict, other_arguments: dict) -> str:
    """How an argument compares with the other call's: − missing, + extra, ≠ different, "" equal."""
    if key not in arguments:
        return "−"
    if key not in other_arguments:
        return "+"
    return "" if to_json(arguments[key]) == to_json(other_arguments[key]) else "≠"
