"""From the flags to the training rows and the held-out rows: sources pinned to commits, rows tokenized and
split.
"""
from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data import shared_prefix_fraction
from dataset import stats, token_cache
from dataset.files import parse_weight
from dataset.token_dataset import TokenDataset
from storage import hub
from storage.atomic import read_json
from tokenizer import Tokenizer
from training.run import Run
from training.run_folder import restarted_by_torchrun


def pin_sources(run: Run, restarts: int) -> None:
    """Replace each Hub name in the flags by the name at a commit.

    A resumed run keeps its commits. A new one takes those that rank 0 finds now, so that all ranks read the
    same.

    restarts: how often torchrun has restarted the processes.
    """
    args = run.args
    args.asked = [args.model, args.data, args.eval_data]
    pinned = [None] * 3
    if run.rank == 0:
        config = run.out / "config.json"
        resume = (args.resume and config.exists()) or restarted_by_torchrun(run.out, restarts)
        stored = read_json(config) if resume else {}
        if stored.get("asked") == args.asked:
            pinned = [stored["model"], stored["data"], stored["eval_data"]]
        else:
            pinned = [hub.pin(args.model, "model"), _pin_datasets(args.data), _pin_datasets(args.eval_data)]
    if run.world_size > 1:
        dist.broadcast_object_list(pinned)
    args.model, args.data, args.eval_data = pinned


def _pin_datasets(sources: str | None) -> str | None:
    """`--data` with each name on the Hub at its commit; weights stay."""
    pinned = []
    for source in sources.split(",") if sources else []:
        name, weight = parse_weight(source)
        pinned.append(hub.pin(name, "dataset") + (f"*{weight:g}" if weight != 1 else ""))
    return ",".join(pinned) or None


def read_source(args: argparse.Namespace, sources: str, model_folder: Path, tokenizer: Tokenizer,
                skip_invalid: bool) -> TokenDataset:
    """The tokenized rows of comma-separated sources."""
    cache = Path(args.data_cache) if args.data_cache else None
    evaluated = max(args.eval_rows, args.eval_calls)
    return token_cache.read_tokens(
        sources.split(","), model_folder, tokenizer, cache, evaluated, skip_invalid, args.system
    )


def survey(run: Run, model_folder: Path, tokenizer: Tokenizer) -> dict:
    """Print and return the statistics of all rows of `--data`, invalid ones too."""
    rows = read_source(run.args, run.args.data, model_folder, tokenizer, skip_invalid=True)
    found = stats.statistics(rows, tokenizer, run.args.max_tokens, shared_prefix_fraction)
    run.say(stats.console(found))
    return found


def load_datasets(
    run: Run, model_folder: Path, tokenizer: Tokenizer
) -> tuple[TokenDataset, TokenDataset, dict]:
    """(training rows, held-out rows to evaluate, statistics of the training rows), as the flags ask."""
    args = run.args
    evaluated = max(args.eval_rows, args.eval_calls)
    rows = read_source(args, args.data, model_folder, tokenizer, args.skip_invalid)
    if args.eval_data:
        _, held_out = read_source(args, args.eval_data, model_folder, tokenizer, args.skip_invalid).split(1.0)
        train = rows.select(~np.isin(rows.hashes, held_out.hashes))
        if len(train) < len(rows):
            run.say(f"data   {len(rows) - len(train)} training rows left out: their query is among the "
                    f"held-out ones")
    else:
        train, held_out = rows.split(args.eval_fraction)
    limit = f", of which {evaluated} are evaluated" if len(held_out) > evaluated else ""
    run.say(f"data   {len(train)} rows to train on, {len(held_out)} held out{limit}")
    for line in rows.skipped.lines():
        run.say(f"data   {line}")

    found = stats.statistics(train, tokenizer, args.max_tokens, shared_prefix_fraction)
    train = _without_long_rows(run, train, "training")
    held_out = _without_long_rows(run, held_out.select(slice(evaluated)), "held-out")
    for line in stats.headlines(found) if train else ():
        run.say(f"data   {line}")
    return train, held_out, found


def _without_long_rows(run: Run, examples: TokenDataset, name: str) -> TokenDataset:
    """The rows of at most `--max-tokens` tokens; what was dropped is reported."""
    max_tokens = run.args.max_tokens
    fits = np.asarray(examples.lengths) < max_tokens  # a length is one less than the row's tokens
    kept = examples.select(fits)
    if len(kept) < len(examples):
        run.say(f"data   {len(examples) - len(kept)} {name} rows dropped: longer than {max_tokens} tokens "
                f"(--max-tokens); the first: {examples.source(int(fits.argmin()))}")
    if kept:
        tokens = sum(kept.lengths)
        run.say(f"data   {name}: {tokens:,} tokens, {tokens / len(kept):.0f} per row, "
                f"{kept.loss_tokens / tokens:.1%} of them carry loss")
    return kept


def fingerprint(rows: TokenDataset) -> str:
    """The number of rows and tokens, and a hash of their content and order."""
    content = hashlib.sha256(rows.column("row_hash").tobytes() + rows.column("tokens").tobytes())
    return f"{len(rows)} of {sum(rows.lengths):,} tokens, SHA-256 {content.hexdigest()[:15]}"
