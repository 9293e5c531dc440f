"""Compare an answer's calls with the expected ones, and sum up many comparisons."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CAUSES = ("no call", "unparsable", "wrong count", "wrong function", "missing argument", "extra argument", "wrong type", "wrong argument",
          "unwanted call")


# ---------------------------------------------------------------------------------------------------------------------
# One value, one call, one answer


def kind(value: Any) -> str:
    """The JSON Schema type of a value; bool is no int."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def accepts(wanted: Any, given: Any, schema: dict, exact: bool) -> bool:
    """Whether `given` is what was wanted.

    wanted: a value, in which an object holds a list of accepted values for each key ("" among them: it may be left out)
    schema: how the parameter is declared; exact: equal to the letter, not by the leaderboard's rules
    """
    if not exact and schema.get("type") == "number":                        # an int counts for a declared float
        wanted, given = (float(x) if kind(x) == "integer" and abs(x) < 1e308 else x for x in (wanted, given))
    if kind(wanted) != kind(given):
        return False
    if isinstance(wanted, str):
        return wanted == given if exact else bare(wanted) == bare(given)
    if isinstance(wanted, list):
        items = schema.get("items")
        return len(wanted) == len(given) and all(accepts(w, g, items if isinstance(items, dict) else {}, exact)
                                                 for w, g in zip(wanted, given, strict=True))
    if isinstance(wanted, dict):
        schemas = properties(schema)
        return (all(any_accepts(wanted.get(key, []), value, schemas.get(key, {}), exact) for key, value in given.items())
                and all(key in given or "" in values for key, values in wanted.items()))
    return wanted == given


def any_accepts(values: list, given: Any, schema: dict, exact: bool) -> bool:
    """Whether `given` is one of the accepted values; "" among others than strings only says that it may be left out."""
    if not all(isinstance(w, str) for w in values):
        values = [w for w in values if w != ""]
    return any(accepts(w, given, schema, exact) for w in values)


def properties(schema: dict) -> dict[str, dict]:
    """The schemas of an object's parts, as far as they are any."""
    found = schema.get("properties")
    return {name: part for name, part in found.items() if isinstance(part, dict)} if isinstance(found, dict) else {}


def bare(text: str) -> str:
    """A string as the leaderboard compares it: lower case, no spaces and none of ,./-_*^, one kind of quote."""
    return text.translate(_BARE).lower()


_BARE = str.maketrans("'", '"', " ,./-_*^")


def accepted_values(call: dict) -> dict:
    """A call {"name", "arguments"} in the leaderboard's form of an answer: {name: {parameter: [its one accepted value]}}."""
    def wrap(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: [wrap(item)] for key, item in value.items()}
        return [wrap(item) for item in value] if isinstance(value, list) else value

    return {call["name"]: wrap(call["arguments"])}


@dataclass(frozen=True)
class Fault:
    cause: str          # one of CAUSES
    detail: str = ""


def call_fault(wanted: dict, given: dict, functions: dict[str, dict], exact: bool) -> Fault | None:
    """What is wrong with a call, first things first; None: nothing.

    A row may want an argument that its function does not declare, or leave out one that it requires: then what the row
    wants is right, though the leaderboard, whose rows are clean, would refuse it.

    wanted: {name: {parameter: [accepted, …]}}; given: {"name", "arguments"}; functions: the declared ones by name
    """
    [(name, parameters)] = wanted.items()
    if given["name"] != name:
        return Fault("wrong function", f"{given['name']}, wanted {name}")
    declared = functions.get(name, {}).get("parameters", {})
    schemas, arguments = properties(declared), given["arguments"]
    required = declared.get("required") if isinstance(declared.get("required"), list) and not exact else []
    for key, values in parameters.items():
        if key not in arguments and ("" not in values or key in required):
            return Fault("missing argument", key)
    for key in arguments:
        if key not in parameters:
            return Fault("extra argument", f"{key} is {shown(arguments[key])}")
    for key, value in arguments.items():
        schema = schemas.get(key, {})
        if not any_accepts(parameters[key], value, schema, exact):
            kinds = {kind(w) for w in parameters[key] if w != ""} | ({"integer", "number"} if schema.get("type") == "number" else set())
            cause = "wrong argument" if kind(value) in kinds else "wrong type"
            return Fault(cause, f"{key} is {shown(value)}, wanted {shown(parameters[key][0])}")
    return None


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"


def paired(wanted: Sequence[dict], given: Sequence[dict], functions: dict[str, dict], exact: bool) -> list[int | None]:
    """For each wanted call the given one that answers it, none twice, as many as can be (augmenting paths)."""
    fits = [[call_fault(w, g, functions, exact) is None for g in given] for w in wanted]
    taken: dict[int, int] = {}                            # given → wanted

    def find(w: int, tried: set[int]) -> bool:
        for g in range(len(given)):
            if fits[w][g] and g not in tried:
                tried.add(g)
                if g not in taken or find(taken[g], tried):
                    taken[g] = w
                    return True
        return False

    for w in range(len(wanted)):
        find(w, set())
    of_wanted = {w: g for g, w in taken.items()}
    return [of_wanted.get(w) for w in range(len(wanted))]


@dataclass(frozen=True)
class Score:
    """How one answer compares with what was wanted."""

    silent: bool                    # no call was wanted
    exact: bool
    ast: bool
    names: bool                     # the right functions, each as often as wanted
    fault: Fault | None             # why it is no AST match
    readable: bool                  # nothing in it was left unread
    right_arguments: int
    given_arguments: int
    wanted_arguments: int


def score(wanted: Sequence[dict], given: Sequence[dict], tools: Sequence[dict], unread: Sequence[str] = ()) -> Score:
    """Compare an answer's calls, [{"name", "arguments"}], with the wanted ones, [{name: {parameter: [accepted, …]}}].

    tools: the declared functions, in OpenAI's envelope; unread: what `parse_calls` could not read in the answer
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    wanted_names, given_names = Counter(next(iter(w)) for w in wanted), Counter(g["name"] for g in given)
    pairs = paired(wanted, given, functions, exact=False)
    ast = len(wanted) == len(given) and None not in pairs and not unread
    exact = len(wanted) == len(given) and None not in paired(wanted, given, functions, exact=True) and not unread
    fault, right, optional = None, 0, 0
    free = [g for i, g in enumerate(given) if i not in pairs]
    for w, pair in zip(wanted, pairs, strict=True):
        [(name, parameters)] = w.items()
        if pair is not None:
            right += len(given[pair]["arguments"])
            optional += sum("" in parameters[key] for key in given[pair]["arguments"])
            continue
        like = [g for g in free if g["name"] == name]      # of a missed call's namesakes, the one that is least wrong
        if like:
            best = max(like, key=lambda g: right_arguments(parameters, g, functions))
            free.remove(best)
            right += right_arguments(parameters, best, functions)
            fault = fault or call_fault(w, best, functions, exact=False)
    if not ast:
        if not wanted:
            fault = Fault("unwanted call", ", ".join(given_names)) if given else Fault("unparsable", unread[0])
        elif unread and len(given) <= len(wanted):
            fault = Fault("unparsable", unread[0])
        elif not given:
            fault = Fault("no call")
        elif len(wanted) != len(given):                    # also where the one too many is cut off and unreadable
            fault = Fault("wrong count", f"{len(given)} calls, wanted {len(wanted)}")
        elif wanted_names != given_names:
            fault = Fault("wrong function", f"{', '.join(given_names - wanted_names)}, wanted {', '.join(wanted_names - given_names)}")
    return Score(not wanted, exact, ast, wanted_names == given_names and not unread, None if ast else fault, not unread, right,
                 sum(len(g["arguments"]) for g in given),
                 optional + sum("" not in values for w in wanted for parameters in w.values() for values in parameters.values()))


def right_arguments(parameters: dict[str, list], given: dict, functions: dict[str, dict]) -> int:
    """How many of a call's arguments are as wanted."""
    schemas = properties(functions.get(given["name"], {}).get("parameters", {}))
    return sum(any_accepts(parameters.get(key, []), value, schemas.get(key, {}), exact=False) for key, value in given["arguments"].items())


def summary(scores: Sequence[Score]) -> dict:
    """The figures over some rows."""
    def share(flags: Sequence[bool]) -> float | None:
        return sum(flags) / len(flags) if flags else None

    flags = {"exact_match": [s.exact for s in scores], "ast_match": [s.ast for s in scores], "name_accuracy": [s.names for s in scores]}
    right = sum(s.right_arguments for s in scores)
    given, wanted = sum(s.given_arguments for s in scores), sum(s.wanted_arguments for s in scores)
    silence = [s.ast for s in scores if s.silent]
    counted = Counter(s.fault.cause for s in scores if s.fault)
    return {"rows": len(scores), **{name: share(of) for name, of in flags.items()},
            "argument_precision": right / given if given else None, "argument_recall": min(1.0, right / wanted) if wanted else None,
            "parse_failures": share([not s.readable for s in scores]), "no_call_rows": len(silence),
            "correct_silence": share(silence), "counts": {name: sum(of) for name, of in flags.items()},
            "intervals": {name: interval(of) for name, of in flags.items()}, "causes": {c: counted[c] for c in CAUSES if counted[c]}}


def interval(flags: Sequence[bool], resamples: int = 2000) -> list[float] | None:
    """The bootstrap's 95 % interval of a share."""
    if not flags:
        return None
    drawn = np.random.default_rng(0).binomial(len(flags), np.mean(flags), resamples) / len(flags)      # the shares of rows drawn anew
    return [float(x) for x in np.percentile(drawn, (2.5, 97.5))]


def table(results: dict[str, dict]) -> str:
    """The figures of one or more evaluations side by side, for the terminal; keys head the columns."""
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    wide = {head: max(10, len(head) + 2) for head in results}
    lines = [f"{'':<26}" + "".join(f"{head:>{wide[head]}}" for head in results)]
    for key, label in (("exact_match", "exact match"), ("ast_match", "AST match"), ("name_accuracy", "right functions"),
                       ("argument_precision", "arguments, precision"), ("argument_recall", "arguments, recall"),
                       ("parse_failures", "unreadable answers"), ("correct_silence", "silent where right")):
        if any(r[key] is not None for r in results.values()):
            lines.append(f"{label:<26}" + "".join(f"{percent(r[key]):>{wide[head]}}" for head, r in results.items()))
    lines.append(f"{'rows':<26}" + "".join(f"{r['rows']:>{wide[head]}}" for head, r in results.items()))
    for cause in CAUSES:
        if any(cause in r["causes"] for r in results.values()):
            lines.append(f"{'missed: ' + cause:<26}" + "".join(f"{r['causes'].get(cause, 0):>{wide[head]}}" for head, r in results.items()))
    return "\n".join(lines)
