"""A model's accuracy on rows: how many queries it answers with the right calls, and why it misses others.

    python evaluate.py --model DIR --adapter runs/mine --data rows.jsonl --json result.json
    python evaluate.py --adapter runs/mine --data rows.jsonl --held-out 0.05   # those train.py held out
    torchrun --nproc-per-node 8 evaluate.py …                                  # 8 processes share the rows
    python evaluate.py --report runs/mine                                      # runs/mine/report.html

inference/scoring.py says which answers are right, by exact match and by AST match.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import report
from dataset.errors import SkippedRows
from dataset.examples import tokenize
from dataset.files import read_system_text
from dataset.rows import Conversation, message_calls, message_text, read_sources
from dataset.sampler import query_hash, split_held_out
from inference.decoding import STOP_IDS, call_phrases, stream
from inference.flags import add_machine_flags, add_model_flags
from inference.scoring import Score, accepted_values, results_table, score, summarize
from model import Gemma3
from storage.adapters import load_tuned, system_prompt_of
from storage.atomic import write_json
from storage.pretrained import check_device, choose_dtype, load_tokenizer
from tokenizer import Tokenizer, parse_calls
from training.distributed import init_distributed
from training.host import device_name

# ----------------------------------------------------------------------------------------------------------
# A model on many rows


class AnsweredRow(NamedTuple):
    """A row with the model's answer to it. record: its entry in the result's `answers`."""

    record: dict
    score: Score
    generated_tokens: int
    cut: bool                    # the answer had no end within max_new_tokens


def evaluate(model: Gemma3, tokenizer: Tokenizer, rows: Sequence[Conversation], *,
             max_new_tokens: int | None = None, batch_rows: int = 16,
             say: Callable[[str], None] = lambda _: None, processes: tuple[int, int] = (0, 1)) -> dict:
    """Answer every row greedily and compare the answers with the rows' own; returns what `--json` writes.

    In a conversation the first answer counts and each later one that has calls. Each is given after the
    conversation's own messages before it.

    max_new_tokens: of an answer; by default twice the length of the row's own, at least 64. say: receives
    progress lines. processes: (rank, count) of those that share the rows; each returns the whole result.
    """
    rank, world = processes
    rows = [turn for row in rows for turn in row.answers()]
    prompts, limits = tokenize_prompts(rows, tokenizer, max_new_tokens)
    own_rows = range(rank, len(rows), world)
    answered: dict[int, AnsweredRow] = {}
    started = reported = time.perf_counter()
    answers = stream(model, prompts[rank::world], limits[rank::world], batch_rows=batch_rows,
                     phrases=call_phrases(tokenizer))
    for n, ids in answers:
        i = own_rows[n]
        answered[i] = compare_answer(rows[i], ids, tokenizer)
        if time.perf_counter() - reported > 10:
            reported = time.perf_counter()
            say(progress_line(answered, len(own_rows), reported - started))
    if world > 1:
        parts: list = [None] * world
        dist.all_gather_object(parts, answered)
        answered = {i: row for part in parts for i, row in part.items()}

    seconds = time.perf_counter() - started
    in_order = [answered[i] for i in range(len(rows))]
    generated_tokens = sum(row.generated_tokens for row in in_order)
    result = summarize([row.score for row in in_order])
    files = summarize_files(in_order)
    if len(files) > 1:
        result["files"] = files
    return result | {
        "prompt_tokens": sum(map(len, prompts)),
        "generated_tokens": generated_tokens,
        "seconds": seconds,
        "tokens_per_second": generated_tokens / max(seconds, 1e-9),
        "cut_answers": sum(row.cut for row in in_order),
        "answers": [row.record for row in in_order],
    }


def tokenize_prompts(rows: Sequence[Conversation], tokenizer: Tokenizer,
                     max_new_tokens: int | None) -> tuple[list[list[int]], list[int]]:
    """The ids of each row up to its last answer, and the most tokens to generate after them."""
    prompts, limits = [], []
    for row in rows:
        example = tokenize(row, tokenizer)
        # The answer is the run of tokens with loss at the row's end.
        answer_start = int(np.flatnonzero(~example.loss_mask)[-1]) + 1
        answer_tokens = len(example.ids) - answer_start
        prompts.append(example.ids[:answer_start].tolist())
        limits.append(max_new_tokens or max(64, 2 * answer_tokens))
    return prompts, limits


def compare_answer(row: Conversation, ids: list[int], tokenizer: Tokenizer) -> AnsweredRow:
    """Compare a generated answer with the row's own."""
    text = tokenizer.decode(ids)
    given, expected = parse_calls(text), message_calls(row.messages[-1])
    accepted = row.accepted or [accepted_values(call) for call in expected]
    result = score(accepted, given, row.tools, given.unread)
    queries = (message_text(message) for message in reversed(row.messages) if message["role"] == "user")
    record = {
        "source": row.source,
        "query": next(queries, ""),
        "expected": expected,
        "given": list(given),
        "text": text,
        "cause": result.fault and result.fault.cause,
        "detail": result.fault and result.fault.detail,
        "exact": result.exact,
        "ast": result.ast,
    }
    if row.accepted:
        record["accepted"] = list(row.accepted)
    return AnsweredRow(record, result, len(ids), cut=ids[-1] not in STOP_IDS)


def progress_line(answered: dict[int, AnsweredRow], total: int, seconds: float) -> str:
    exact = sum(row.score.exact for row in answered.values()) / len(answered)
    speed = sum(row.generated_tokens for row in answered.values()) / seconds
    return f"{len(answered)}/{total} answered | {exact:.1%} exact | {speed:.0f} tok/s"


def summarize_files(answered: Sequence[AnsweredRow]) -> dict[str, dict]:
    """The summary of each file of rows, by its name."""
    scores: dict[str, list[Score]] = {}
    for row in answered:
        file = row.record["source"].rpartition(":")[0]
        scores.setdefault(file, []).append(row.score)
    return {file: summarize(scores[file]) for file in sorted(scores)}


# ----------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Count how many queries a model answers with the right calls, and why it misses others.")
    add = parser.add_argument_group("what to evaluate on").add_argument
    add("--data", default=None, metavar="A,B,…",
        help="files or folders of rows, or datasets on the Hub, as for train.py; or the leaderboard's, with "
             "several accepted values for an argument")
    add("--held-out", type=float, default=None, metavar="F",
        help="only the rows that train.py holds out with --eval-fraction F")
    add("--system", default=None, metavar="TEXT",
        help="what the model is told before the tools, or @FILE that holds it; rows with a developer or "
             "system message of their own keep theirs (default: what it was told in training)")
    add("--limit", type=int, default=None, metavar="N", help="at most N rows, chosen by a hash of the query")
    add("--skip-invalid", action="store_true",
        help="leave out rows that cannot be right, instead of stopping")
    add("--max-new-tokens", type=int, default=None, metavar="N",
        help="longest answer, in tokens (default: twice the expected one, at least 64)")
    add("--batch-rows", type=int, default=16, metavar="N",
        help="rows answered at a time (default: %(default)s)")
    add = parser.add_argument_group("what to write").add_argument
    add("--json", default=None, metavar="OUT", help="write the results and every answer to this file")
    add("--report", nargs="?", const="", default=None, metavar="RUN",
        help="write report.html into this run's folder, from what the run itself left there (default: the "
             "--adapter's, or runs/last)")
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
    check_device(args.device)
    rank, world, device = 0, 1, torch.device(args.device)
    if args.data is not None:
        rank, world, device = init_distributed(args.device)
    if rank:                                               # rank 0 prints and writes for all
        with contextlib.redirect_stdout(None):
            evaluate_files(args, (rank, world), device)
        return 0
    out = Path(args.json) if args.json else None
    if out:
        check_writable(out)
    if args.data is not None:
        result = evaluate_files(args, (rank, world), device)
        if out:
            write_json(out, result)
    if args.report is not None:
        run = Path(args.report or args.adapter or args.model or "runs/last")
        if run.name in ("adapter", "model"):
            run = run.parent
        print(f"report {report.write_run_report(run)}")
    return 0


def check_writable(path: Path) -> None:
    """Fail before the work, and not after it, if a file cannot be written there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; --json names a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def evaluate_files(args: argparse.Namespace, processes: tuple[int, int], device: torch.device) -> dict:
    """Evaluate on `--data`, a share of the rows in each process, and print the result; returns it."""
    if args.system is None:
        system = system_prompt_of(args.model, args.adapter)
    else:
        system = read_system_text(args.system)
    rows = read_rows(args, system)
    model, folder = load_tuned(args.model, args.adapter, args.dtype, device)
    tokenizer = load_tokenizer(folder)
    result = evaluate(model, tokenizer, rows, max_new_tokens=args.max_new_tokens, batch_rows=args.batch_rows,
                      say=lambda text: print(text, flush=True), processes=processes)
    print_result(result)
    return result | {
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "held_out": args.held_out,
        "system": system,
        "dtype": choose_dtype(args.dtype, args.device),
        "device": device_name(torch.device(args.device)),
        "torch": torch.__version__,
    }


def read_rows(args: argparse.Namespace, system: str) -> list[Conversation]:
    """The rows of `--data` that are left after `--held-out` and `--limit`; at least one."""
    skipped = SkippedRows() if args.skip_invalid else None
    found = list(read_sources(args.data.split(","), skipped, system))
    fraction = 1.0 if args.held_out is None else args.held_out
    _, held_out = split_held_out([query_hash(row.query) for row in found], fraction)
    rows = [found[i] for i in held_out[:args.limit]]
    for line in skipped.lines() if skipped else ():
        print(line)
    if not rows:
        raise ValueError(f"{args.data}: none of its {len(found)} rows is left to evaluate on; see --held-out")
    return rows


def print_result(result: dict) -> None:
    files = result.get("files", {})
    columns = {"all": result}
    if len(files) <= 6:
        columns = files | columns
    print(results_table(columns))
    for name, (low, high) in result["intervals"].items():
        print(f"{name:<26}{low:>9.1%} to {high:.1%} (95 % of bootstrap samples)")
    tokens, seconds, speed = (result[key] for key in ("generated_tokens", "seconds", "tokens_per_second"))
    print(f"{tokens} tokens in {seconds:.0f} s, {speed:.0f} tok/s")


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
