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
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import data
import report
from data import Conversation
from generate import STOP_IDS, add_machine_flags, add_model_flags, call_phrases, stream
from gradients import meet
from inference.scoring import Score, accepted_values, score, summary, table
from model import Gemma3
from tokenizer import Tokenizer, parse_calls

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
    examples = [data.tokenize(row, tokenizer) for row in rows]
    begins = [int(np.flatnonzero(~example.trained)[-1]) + 1 for example in examples]        # the answer is what is trained at the end
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
        calls, wanted = parse_calls(text), data.called(row.messages[-1])
        scores[i] = score(row.accepted or [accepted_values(call) for call in wanted], calls, row.tools, calls.unread)
        fault = scores[i].fault
        asked = next((data.said(message) for message in reversed(row.messages) if message["role"] == "user"), "")
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
        print(f"report {report.write_run_report(run.parent if run.name in ('adapter', 'model') else run)}")
    return 0


def evaluate_files(args: argparse.Namespace, processes: tuple[int, int], device: torch.device) -> dict:
    """Evaluate on `--data`, a share of the rows in each of the processes, and print the figures; returns them."""
    skipped = data.Skipped() if args.skip_invalid else None
    system = checkpoint.system_of(args.model, args.adapter) if args.system is None else data.system_text(args.system)
    found = list(data.read_sources(args.data.split(","), skipped, system))
    rows = data.hold_out(found, 1.0 if args.held_out is None else args.held_out)[1][:args.limit]
    for cause, count in (skipped or {}).items():
        print(f"{count} rows skipped: {cause}; the first: {skipped.first[cause]}")
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
