"""What a model is worth: the share of queries that it answers with the right calls, and why it misses the others.

    python evaluate.py --model DIR --adapter runs/mine --data rows.jsonl --json result.json
    python evaluate.py --adapter runs/mine --data rows.jsonl --held-out 0.05      # only what train.py held out of them
    torchrun --nproc-per-node 8 evaluate.py …                                     # the rows shared among eight processes
    python evaluate.py --report runs/mine                                         # runs/mine/report.html

Two measures, beside each other. *Exact match*: the same calls, in any order, with equal names and arguments. *AST match*:
the Berkeley Function-Calling Leaderboard's rules for Python, under which strings compare without case, spaces and
punctuation, an int may stand for a float, and an argument may have several accepted values.

Source: the leaderboard's rules (gorilla.cs.berkeley.edu/leaderboard.html), written anew.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import report
from dataset.errors import SkippedRows
from dataset.examples import tokenize
from dataset.files import read_system_text
from dataset.rows import Conversation, message_calls, message_text, read_sources
from dataset.sampler import query_hash, split_held_out
from generate import STOP_IDS, add_machine_flags, add_model_flags, call_phrases, stream
from gradients import meet
from model import Gemma3
from tokenizer import Tokenizer, parse_calls

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


# ---------------------------------------------------------------------------------------------------------------------
# A model on many rows


def evaluate(model: Gemma3, tokenizer: Tokenizer, rows: Sequence[Conversation], *, max_new_tokens: int | None = None,
             batch_rows: int = 16, say: Callable[[str], None] = lambda _: None, processes: tuple[int, int] = (0, 1)) -> dict:
    """Answer every row greedily, and compare; returns what `--json` writes.

    Of a conversation the first answer counts and each later one that has calls, after what was truly said until then.
    max_new_tokens: of an answer; by default twice as many as are wanted, and 64 at least: a longer one is wrong. say:
    hears of the progress. processes: (rank, number) of those that share the rows; each gets the whole result. Fractions are
    of 1; `answers` has an entry for each of them, in order.
    """
    rank, world = processes
    rows = [answer for row in rows for answer in row.answers()]
    examples = [tokenize(row, tokenizer) for row in rows]
    begins = [int(np.flatnonzero(~example.loss_mask)[-1]) + 1 for example in examples]        # the answer is what carries loss at the end
    prompts = [example.ids[:begin].tolist() for example, begin in zip(examples, begins, strict=True)]
    limits = [max_new_tokens or max(64, 2 * (len(example.ids) - begin)) for example, begin in zip(examples, begins, strict=True)]
    answers: list[dict] = [{} for _ in rows]
    scores: dict[int, Score] = {}
    generated, cut = 0, 0
    began = told = time.perf_counter()
    own = range(rank, len(rows), world)
    for n, ids in stream(model, prompts[rank::world], limits[rank::world], batch_rows=batch_rows, phrases=call_phrases(tokenizer)):
        i = own[n]
        text, row = tokenizer.decode(ids), rows[i]
        calls, wanted = parse_calls(text), message_calls(row.messages[-1])
        scores[i] = score(row.accepted or [accepted_values(call) for call in wanted], calls, row.tools, calls.unread)
        fault = scores[i].fault
        asked = next((message_text(message) for message in reversed(row.messages) if message["role"] == "user"), "")
        answers[i] = {"source": row.source, "query": asked, "expected": wanted, "given": list(calls), "text": text,
                      "cause": fault and fault.cause, "detail": fault and fault.detail, "exact": scores[i].exact, "ast": scores[i].ast}
        if row.accepted:
            answers[i]["accepted"] = list(row.accepted)
        generated, cut = generated + len(ids), cut + (ids[-1] not in STOP_IDS)
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            say(f"{len(scores)}/{len(own)} answered | {sum(s.exact for s in scores.values()) / len(scores):.1%} exact | "
                f"{generated / (told - began):.0f} tok/s")
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, ({i: answers[i] for i in own}, scores, generated, cut))
        generated, cut = sum(part[2] for part in parts), sum(part[3] for part in parts)
        for its_answers, its_scores, *_ in parts:
            scores |= its_scores
            for i, answer in its_answers.items():
                answers[i] = answer
    seconds = time.perf_counter() - began
    result = summary([scores[i] for i in range(len(rows))])
    of_file: dict[str, list[Score]] = {}
    for i, row in enumerate(rows):
        of_file.setdefault(row.source.rpartition(":")[0], []).append(scores[i])
    if len(of_file) > 1:
        result["files"] = {file: summary(of_file[file]) for file in sorted(of_file)}
    return result | {"prompt_tokens": sum(map(len, prompts)), "generated_tokens": generated, "seconds": seconds,
                     "tokens_per_second": generated / max(seconds, 1e-9), "cut_answers": cut, "answers": answers}


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


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Count how many queries a model answers with the right calls, and why it misses others.")
    add = parser.add_argument_group("what to evaluate on").add_argument
    add("--data", default=None, metavar="A,B,…", help="files or folders of rows, or datasets on the Hub, as for train.py; or the "
        "leaderboard's, with several accepted values for an argument")
    add("--held-out", type=float, default=None, metavar="F", help="only the rows that train.py holds out with --eval-fraction F")
    add("--system", default=None, metavar="TEXT", help="what the model is told before the tools, or @FILE that holds it; rows with a "
        "developer or system message of their own keep theirs (default: what it was told in training)")
    add("--limit", type=int, default=None, metavar="N", help="at most N rows, chosen by a hash of the query")
    add("--skip-invalid", action="store_true", help="leave out rows that cannot be right, instead of stopping")
    add("--max-new-tokens", type=int, default=None, metavar="N", help="longest answer (default: twice as long as the wanted one)")
    add("--batch-rows", type=int, default=16, metavar="N", help="rows answered at a time (default: %(default)s)")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", default=None, metavar="OUT", help="write the figures and every answer to this file")
    add("--report", nargs="?", const="", default=None, metavar="RUN", help="write report.html into this run's folder, from what the run "
        "itself left there (default: the --adapter's, or runs/last)")
    add_model_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    if args.data is None and args.report is None:
        parser.error("give --data to evaluate on, or --report to write a run's report")
    if args.held_out is not None and not 0 < args.held_out < 1:
        parser.error("--held-out is a share of the queries, between 0 and 1")
    for name in ("limit", "max_new_tokens", "batch_rows"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def main(args: argparse.Namespace) -> int:
    checkpoint.check_device(args.device)
    rank, world, device = meet(args.device) if args.data is not None else (0, 1, torch.device(args.device))
    if rank:                                             # answers its share of the rows, and is silent
        with contextlib.redirect_stdout(None):
            evaluate_files(args, (rank, world), device)
        return 0
    out = Path(args.json) if args.json else None
    if out and out.is_dir():
        raise ValueError(f"{out} is a folder; --json names a file")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):                     # better refused now than after the work
            pass
    if args.data is not None:
        result = evaluate_files(args, (rank, world), device)
        if out:
            checkpoint.write_json(out, result)
    if args.report is not None:
        run = Path(args.report or args.adapter or args.model or "runs/last")
        print(f"report {report.write(run.parent if run.name in ('adapter', 'model') else run)}")
    return 0


def evaluate_files(args: argparse.Namespace, processes: tuple[int, int], device: torch.device) -> dict:
    """Evaluate on `--data`, a share of the rows in each of the processes, and print the figures; returns them."""
    skipped = SkippedRows() if args.skip_invalid else None
    system = checkpoint.system_of(args.model, args.adapter) if args.system is None else read_system_text(args.system)
    found = list(read_sources(args.data.split(","), skipped, system))
    _, held_out = split_held_out([query_hash(row.query) for row in found], 1.0 if args.held_out is None else args.held_out)
    rows = [found[i] for i in held_out[:args.limit]]
    for line in skipped.lines() if skipped else ():
        print(line)
    if not rows:
        raise ValueError(f"{args.data}: none of its {len(found)} rows is left to evaluate on; see --held-out")
    model, folder = checkpoint.load_tuned(args.model, args.adapter, args.dtype, device)
    result = evaluate(model, checkpoint.load_tokenizer(folder), rows, max_new_tokens=args.max_new_tokens, batch_rows=args.batch_rows,
                      say=lambda text: print(text, flush=True), processes=processes)
    files = result.get("files", {})
    print(table({**(files if len(files) <= 6 else {}), "all": result}))
    for name, (low, high) in result["intervals"].items():
        print(f"{name:<26}{low:>9.1%} to {high:.1%} (95 % of bootstrap samples)")
    print(f"{result['generated_tokens']} tokens in {result['seconds']:.0f} s, {result['tokens_per_second']:.0f} tok/s")
    return result | {"model": args.model, "adapter": args.adapter, "data": args.data, "held_out": args.held_out, "system": system,
                     "dtype": checkpoint.choose_dtype(args.dtype, args.device), "device": checkpoint.device_name(torch.device(args.device)),
                     "torch": torch.__version__}


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
