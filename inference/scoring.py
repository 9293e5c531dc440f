"""Compare the calls of an answer with the expected calls, and sum up many comparisons. Pure functions.

Two measures. *Exact match*: the same calls, in any order, with equal names and arguments. *AST match*: the
Berkeley Function-Calling Leaderboard's rules for Python, under which strings compare without case, spaces and
punctuation, an int may stand for a float, and an argument may have several accepted values.

A given call is {"name": …, "arguments": {…}}. An expected call has the leaderboard's form of an answer,
{name: {parameter: [accepted value, …]}}; the value "" says that the argument may be left out. Each key of an
accepted object has such a list too. `accepted_values` turns the first form into the second.

Source: the leaderboard's rules (gorilla.cs.berkeley.edu/leaderboard.html), written anew.
"""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Why an answer is no AST match.
CAUSES = (
    "no call",
    "unparsable",
    "wrong count",
    "wrong function",
    "missing argument",
    "extra argument",
    "wrong type",
    "wrong argument",
    "unwanted call",
)
# The rows of `results_table`: the key of each fraction in `summarize`, and its label.
FRACTIONS = (
    ("exact_match", "exact match"),
    ("ast_match", "AST match"),
    ("name_accuracy", "right functions"),
    ("argument_precision", "arguments, precision"),
    ("argument_recall", "arguments, recall"),
    ("parse_failures", "unreadable answers"),
    ("correct_silence", "silent where right"),
)
NORMALIZATION = str.maketrans("'", '"', " ,./-_*^")       # one kind of quote; no spaces and none of ,./-_*^


# ----------------------------------------------------------------------------------------------------------
# One value


def json_type_name(value: Any) -> str:
    """The JSON Schema type of a value; a bool is no integer."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def normalize_string(text: str) -> str:
    """A string as the leaderboard compares it.

    >>> normalize_string("New-York's")
    'newyork"s'
    """
    return text.translate(NORMALIZATION).lower()


def format_value(value: Any) -> str:
    """A value as JSON of at most 80 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def property_schemas(schema: dict) -> dict[str, dict]:
    """The schemas of an object's properties, without those that are malformed."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: part for name, part in properties.items() if isinstance(part, dict)}


def value_matches(expected: Any, given: Any, schema: dict, exact: bool) -> bool:
    """Whether `given` is the expected value.

    expected: a value, in which an object has a list of accepted values for each key. schema: the parameter's
    declaration. exact: whether values must be equal; otherwise the leaderboard's rules decide.
    """
    if schema.get("type") == "number" and not exact:
        expected, given = integer_to_float(expected), integer_to_float(given)
    if json_type_name(expected) != json_type_name(given):
        return False
    if isinstance(expected, str):
        return expected == given if exact else normalize_string(expected) == normalize_string(given)
    if isinstance(expected, list):
        return array_matches(expected, given, schema, exact)
    if isinstance(expected, dict):
        return object_matches(expected, given, schema, exact)
    return expected == given


def integer_to_float(value: Any) -> Any:
    """An integer as a float if it fits; any other value as it is."""
    return float(value) if json_type_name(value) == "integer" and abs(value) < 1e308 else value


def array_matches(expected: list, given: list, schema: dict, exact: bool) -> bool:
    items = schema.get("items")
    item_schema = items if isinstance(items, dict) else {}
    if len(expected) != len(given):
        return False
    return all(value_matches(e, g, item_schema, exact) for e, g in zip(expected, given, strict=True))


def object_matches(expected: dict[str, list], given: dict, schema: dict, exact: bool) -> bool:
    schemas = property_schemas(schema)
    for key, value in given.items():
        if not matches_any(expected.get(key, []), value, schemas.get(key, {}), exact):
            return False
    return all(key in given or "" in accepted for key, accepted in expected.items())


def matches_any(accepted: list, given: Any, schema: dict, exact: bool) -> bool:
    """Whether `given` is one of the accepted values.

    Among strings "" is a value like the others; among values of other types it only says that the argument
    may be left out.
    """
    if not all(isinstance(value, str) for value in accepted):
        accepted = [value for value in accepted if value != ""]
    return any(value_matches(value, given, schema, exact) for value in accepted)


# ----------------------------------------------------------------------------------------------------------
# One call


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer. cause: one of CAUSES."""

    cause: str
    detail: str = ""


def accepted_values(call: dict) -> dict:
    """A given call as an expected call in which every argument has one accepted value.

    >>> accepted_values({"name": "book", "arguments": {"city": "Rome", "guest": {"age": 3}}})
    {'book': {'city': ['Rome'], 'guest': [{'age': [3]}]}}
    """
    return {call["name"]: wrap_values(call["arguments"])}


def wrap_values(value: Any) -> Any:
    """A value in which each key of an object has a list of its one accepted value."""
    if isinstance(value, dict):
        return {key: [wrap_values(item)] for key, item in value.items()}
    if isinstance(value, list):
        return [wrap_values(item) for item in value]
    return value


def call_fault(expected: dict, given: dict, functions: dict[str, dict], exact: bool) -> Fault | None:
    """The first fault of a given call; None if it matches the expected one.

    A row may expect an argument that its function does not declare, or leave out one that is required. Then
    the row decides, though the leaderboard, whose rows are clean, would refuse it.

    functions: the declared functions by name.
    """
    [(name, parameters)] = expected.items()
    arguments = given["arguments"]
    if given["name"] != name:
        return Fault("wrong function", f"{given['name']}, wanted {name}")
    declaration = functions.get(name, {}).get("parameters", {})
    schemas, required = property_schemas(declaration), declaration.get("required")
    if exact or not isinstance(required, list):
        required = []
    for key, accepted in parameters.items():
        optional = "" in accepted and key not in required
        if key not in arguments and not optional:
            return Fault("missing argument", key)
    for key, value in arguments.items():
        if key not in parameters:
            return Fault("extra argument", f"{key} is {format_value(value)}")
    for key, value in arguments.items():
        schema = schemas.get(key, {})
        if not matches_any(parameters[key], value, schema, exact):
            detail = f"{key} is {format_value(value)}, wanted {format_value(parameters[key][0])}"
            right_type = json_type_name(value) in accepted_types(parameters[key], schema)
            return Fault("wrong argument" if right_type else "wrong type", detail)
    return None


def accepted_types(accepted: list, schema: dict) -> set[str]:
    """The JSON types that an argument may have."""
    types = {json_type_name(value) for value in accepted if value != ""}
    return types | {"integer", "number"} if schema.get("type") == "number" else types


def correct_arguments(parameters: dict[str, list], given: dict, functions: dict[str, dict]) -> int:
    """How many arguments of a given call match. parameters: the accepted values of each."""
    schemas = property_schemas(functions.get(given["name"], {}).get("parameters", {}))
    correct = 0
    for key, value in given["arguments"].items():
        correct += matches_any(parameters.get(key, []), value, schemas.get(key, {}), exact=False)
    return correct


# ----------------------------------------------------------------------------------------------------------
# One answer


@dataclass(frozen=True)
class Score:
    """How one answer compares with the expected calls."""

    silence_expected: bool          # no call was expected
    exact: bool                     # exact match
    ast: bool                       # AST match
    names: bool                     # the expected functions, each as often as expected
    fault: Fault | None             # why it is no AST match
    readable: bool                  # every call in it could be parsed
    correct_arguments: int
    given_arguments: int
    expected_arguments: int


def score(expected: Sequence[dict], given: Sequence[dict], tools: Sequence[dict],
          unread: Sequence[str] = ()) -> Score:
    """Compare the calls of an answer with the expected ones.

    tools: the declared functions, in OpenAI's envelope. unread: what `parse_calls` could not read.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    matches = match_calls(expected, given, functions, exact=False)
    exact_matches = match_calls(expected, given, functions, exact=True)
    complete = len(expected) == len(given) and not unread
    ast = complete and None not in matches
    closest = closest_calls(expected, given, matches, functions)

    correct, expected_arguments = 0, 0
    for call, match, other in zip(expected, matches, closest, strict=True):
        [parameters] = call.values()
        expected_arguments += sum("" not in accepted for accepted in parameters.values())
        if other is not None:
            correct += correct_arguments(parameters, other, functions)
        if match is not None:                          # optional arguments count if they were given
            expected_arguments += sum("" in parameters[key] for key in other["arguments"])

    return Score(
        silence_expected=not expected,
        exact=complete and None not in exact_matches,
        ast=ast,
        names=expected_names(expected) == given_names(given) and not unread,
        fault=None if ast else answer_fault(expected, given, matches, closest, functions, unread),
        readable=not unread,
        correct_arguments=correct,
        given_arguments=sum(len(call["arguments"]) for call in given),
        expected_arguments=expected_arguments,
    )


def expected_names(expected: Sequence[dict]) -> Counter[str]:
    return Counter(next(iter(call)) for call in expected)


def given_names(given: Sequence[dict]) -> Counter[str]:
    return Counter(call["name"] for call in given)


def match_calls(expected: Sequence[dict], given: Sequence[dict], functions: dict[str, dict],
                exact: bool) -> list[int | None]:
    """For each expected call the index of a given call that matches it, none twice, as many as possible.

    A maximum bipartite matching, found by augmenting paths: taking the first match that is free can fail if
    calls have several accepted values.
    """
    fits = [[call_fault(e, g, functions, exact) is None for g in given] for e in expected]
    expected_of: dict[int, int] = {}                   # index of a given call → index of the expected one

    def find_match(e: int, tried: set[int]) -> bool:
        """Match the expected call `e`, if need be by finding another match for the one that has its own."""
        for g in range(len(given)):
            if fits[e][g] and g not in tried:
                tried.add(g)
                if g not in expected_of or find_match(expected_of[g], tried):
                    expected_of[g] = e
                    return True
        return False

    for e in range(len(expected)):
        find_match(e, set())
    given_of = {e: g for g, e in expected_of.items()}
    return [given_of.get(e) for e in range(len(expected))]


def closest_calls(expected: Sequence[dict], given: Sequence[dict], matches: list[int | None],
                  functions: dict[str, dict]) -> list[dict | None]:
    """For each expected call its match, or the unmatched call of its name with the most correct arguments."""
    unmatched = [call for i, call in enumerate(given) if i not in matches]
    closest = []
    for call, match in zip(expected, matches, strict=True):
        [(name, parameters)] = call.items()
        if match is not None:
            closest.append(given[match])
            continue
        namesakes = [other for other in unmatched if other["name"] == name]
        counts = [correct_arguments(parameters, other, functions) for other in namesakes]
        best = namesakes[counts.index(max(counts))] if namesakes else None
        if best is not None:
            unmatched.remove(best)
        closest.append(best)
    return closest


def answer_fault(expected: Sequence[dict], given: Sequence[dict], matches: list[int | None],
                 closest: list[dict | None], functions: dict[str, dict], unread: Sequence[str]) -> Fault:
    """Why an answer is no AST match."""
    if not expected and given:
        return Fault("unwanted call", ", ".join(given_names(given)))
    if unread and len(given) <= len(expected):
        return Fault("unparsable", unread[0])
    if not given:
        return Fault("no call")
    if len(expected) != len(given):                    # also if one more call is cut off and unreadable
        return Fault("wrong count", f"{len(given)} calls, wanted {len(expected)}")
    missing = expected_names(expected) - given_names(given)
    extra = given_names(given) - expected_names(expected)
    if missing:
        return Fault("wrong function", f"{', '.join(extra)}, wanted {', '.join(missing)}")
    # The right number of calls of the right names: at least one of them has a fault.
    faults = (call_fault(call, other, functions, exact=False)
              for call, match, other in zip(expected, matches, closest, strict=True) if match is None)
    return next(faults)


# ----------------------------------------------------------------------------------------------------------
# Many answers


def summarize(scores: Sequence[Score]) -> dict:
    """Figures over many answers, for JSON. Fractions are of 1, and None where there is nothing to count."""
    flags = {
        "exact_match": [s.exact for s in scores],
        "ast_match": [s.ast for s in scores],
        "name_accuracy": [s.names for s in scores],
    }
    correct = sum(s.correct_arguments for s in scores)
    given = sum(s.given_arguments for s in scores)
    expected = sum(s.expected_arguments for s in scores)
    silences = [s.ast for s in scores if s.silence_expected]
    causes = Counter(s.fault.cause for s in scores if s.fault)
    return {
        "rows": len(scores),
        **{name: fraction(values) for name, values in flags.items()},
        "argument_precision": correct / given if given else None,
        "argument_recall": min(1.0, correct / expected) if expected else None,
        "parse_failures": fraction([not s.readable for s in scores]),
        "no_call_rows": len(silences),
        "correct_silence": fraction(silences),
        "counts": {name: sum(values) for name, values in flags.items()},
        "intervals": {name: bootstrap_interval(values) for name, values in flags.items()},
        "causes": {cause: causes[cause] for cause in CAUSES if causes[cause]},
    }


def fraction(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def bootstrap_interval(flags: Sequence[bool], resamples: int = 2000) -> list[float] | None:
    """The 95 % bootstrap interval of the fraction of `flags` that are true; None if there are none.

    The number of true flags in a resample has a binomial distribution, so it is drawn directly.
    """
    if not flags:
        return None
    counts = np.random.default_rng(0).binomial(len(flags), np.mean(flags), resamples)
    low, high = np.percentile(counts / len(flags), (2.5, 97.5))
    return [float(low), float(high)]


def results_table(results: dict[str, dict]) -> str:
    """The figures of one or more evaluations side by side, for the terminal; keys head the columns."""
    widths = [max(10, len(head) + 2) for head in results]

    def line(label: str, cells: Sequence[Any]) -> str:
        return f"{label:<26}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [line("", list(results))]
    for key, label in FRACTIONS:
        values = [result[key] for result in results.values()]
        if any(value is not None for value in values):
            lines.append(line(label, ["–" if value is None else f"{value:.1%}" for value in values]))
    lines.append(line("rows", [result["rows"] for result in results.values()]))
    for cause in CAUSES:
        counts = [result["causes"].get(cause, 0) for result in results.values()]
        if any(cause in result["causes"] for result in results.values()):
            lines.append(line(f"missed: {cause}", counts))
    return "\n".join(lines)
