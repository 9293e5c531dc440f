"""Fine-tune FunctionGemma, or any Gemma 3, to call your functions: LoRA or full, on one process or many.

    python train.py --model google/functiongemma-270m-it --data rows.jsonl --out runs/mine
    python train.py --model DIR --data rows.jsonl --preview 3      # look at what would be trained, and stop
    torchrun --nproc-per-node 8 train.py …                         # the same flags on eight processes

The file reads as the algorithm: flags, then `main` from rows to a trained model. A step's gradient is that of the mean
loss over all its trained tokens, however many rows, batches and processes share the work.
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import checkpoint
import data
import report
import survey
import token_cache
from evaluate import evaluate, table
from lora import TARGETS, LoRAConfig, choose_kernels, wrap
from loss_kernels import linear_cross_entropy
from model import Gemma3
from token_cache import Tokens
from tokenizer import Tokenizer
from tokenizer.chat import SCHEMA_KEYS


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, unless its own text speaks of it or it has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False and "default" not in action.help
        return super()._get_help_string(action) if shown else action.help

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "NAME")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], formatter_class=Help)
    add = parser.add_argument_group("what to train on").add_argument
    add("--model", required=True, help="folder in the published layout, or a name on the Hugging Face Hub")
    add("--data", required=True, metavar="A,B,…", help="files or folders of rows (JSONL, JSON, .gz), or dataset names on the Hub; A*2 "
        "takes each row of A twice an epoch, A*0.5 half of its rows in one epoch and the other half in the next")
    add("--eval-data", default=None, metavar="A,B,…", help="held-out rows; without it a share of --data is held out")
    add("--eval-fraction", type=float, default=0.05, help="share of queries to hold out, chosen by a hash of the query")
    add("--eval-rows", type=int, default=200, help="evaluate on at most this many held-out rows")
    add("--system", default=data.DEVELOPER_TEXT, metavar="TEXT", help="what the model is told before the tools, or @FILE that holds it; "
        "rows with a developer or system message of their own keep theirs (default: Google's sentence)")
    add("--max-tokens", type=int, default=4096, help="longest row, in tokens; longer ones are dropped and counted, never cut")
    add("--skip-invalid", action="store_true", help="drop rows that cannot be right and count them, instead of stopping")
    add("--survey", action="store_true", help="count and describe the rows of --data, bad ones too, here and in OUT/data.html, and stop")
    add("--data-cache", metavar="DIR", default=str(token_cache.FOLDER), help="where tokenized rows are kept; '' keeps none")
    add("--preview", type=int, default=0, metavar="N", help="print N rendered rows, trained tokens in green, and stop")

    add = parser.add_argument_group("how long").add_argument
    add("--steps", type=int, default=None, help="optimizer steps; 0 prepares and checks everything and stops")
    add("--epochs", type=float, default=None, help="passes over the training rows (default 1, unless --steps is given)")
    add("--batch-rows", type=int, default=None, help="rows a step, over all processes (default 32)")
    add("--batch-tokens", type=int, default=None, help="size a step in tokens instead, over all processes, e.g. 16896")
    add("--micro-tokens", type=int, default=None, help="tokens in one forward pass; a larger step accumulates "
        "(default 16896 on a GPU, 4096 on a CPU; changes memory and speed, not the result)")

    add("--share-beginnings", action=argparse.BooleanOptionalAction, default=True, help="compute a beginning that rows of a step have in "
        "common, such as the same tools, once for all of them (changes speed, not the result, but for what --lora-dropout draws)")

    add = parser.add_argument_group("optimizer (AdamW)").add_argument
    add("--lr", type=float, default=None, help="highest learning rate (default 1e-3 for LoRA, 2e-5 for --full)")
    add("--min-lr", type=float, default=0.0, help="what a decaying schedule ends at")
    add("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of the learning rate after warm-up")
    add("--warmup-steps", type=int, default=None, help="steps of linear warm-up (default a tenth of all, at most 50)")
    add("--beta2", type=float, default=0.999, help="decay of the second moment")
    add("--weight-decay", type=float, default=0.0, help="decoupled, on all that is trained")
    add("--clip", type=float, default=1.0, help="clip the gradient's norm to this; 0 does not clip")
    add("--max-grad-norm", type=float, default=1e4, help="stop, with the rows' names, when the norm before clipping exceeds this")
    add("--seed", type=int, default=0, help="of the order of rows, the adapters' start, and dropout")

    add = parser.add_argument_group("LoRA, or everything").add_argument
    add("--full", action="store_true", help="train every parameter (fp32 masters), not adapters")
    add("--lora-rank", type=int, default=16, help="width of the adapters")
    add("--lora-alpha", type=float, default=16.0, help="the adapter is scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.0, help="on the adapter's input")
    add("--lora-targets", default=",".join(TARGETS), metavar="A,B,…", help="linears that get an adapter")
    add("--rslora", action="store_true", help="scale by alpha / √rank instead")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="what the model computes in")
    add("--kernels", choices=("auto", "triton", "torch"), default="auto", help="who computes the adapters' linears: Triton's "
        "kernels, PyTorch, or whichever is faster on this GPU, timed at the start (on a CPU PyTorch)")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/last", help="the run's folder")
    add("--overwrite", action="store_true", help="start anew where --out holds an earlier run")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; the losses are those of an unbroken run")
    add("--save-every", type=int, default=100, help="steps between checkpoints; 0 saves at the end alone")
    add("--eval-every", type=int, default=100, help="steps between held-out losses; 0 takes them at the start and the end alone")
    add("--log-every", type=int, default=1, help="steps between lines on the console; log.jsonl has every step")
    add("--eval-calls", type=int, default=50, metavar="N", help="with each held-out loss, answer N held-out queries and count the right "
        "calls, 0 for none; OUT/calls has every answer")
    args = parser.parse_args(argv)

    if args.batch_rows is not None and args.batch_tokens is not None:
        parser.error("--batch-rows and --batch-tokens both size a step: give one of them")
    if args.batch_tokens is None and args.batch_rows is None:
        args.batch_rows = 32
    if args.steps is None and args.epochs is None:
        args.epochs = 1.0
    for name, least in (("steps", 0), ("batch_rows", 1), ("batch_tokens", 1), ("micro_tokens", 1), ("max_tokens", 2), ("preview", 0),
                        ("eval_rows", 0), ("eval_every", 0), ("eval_calls", 0), ("save_every", 0), ("log_every", 0), ("warmup_steps", 0),
                        ("seed", 0), ("clip", 0), ("weight_decay", 0), ("min_lr", 0), ("eval_fraction", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.epochs is not None and args.epochs <= 0:
        parser.error("--epochs must be more than 0")
    if args.eval_fraction >= 1:
        parser.error("--eval-fraction is a share of the queries, less than 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build of torch")
    if args.full and args.kernels == "triton":
        parser.error("--kernels is about adapters' linears, and --full has none")
    if args.batch_tokens:
        args.max_tokens = min(args.max_tokens, args.batch_tokens)        # no row is larger than a step
    args.system = data.system_text(args.system)
    args.lr = args.lr if args.lr is not None else 2e-5 if args.full else 1e-3
    args.micro_tokens = args.micro_tokens or (16_896 if args.device == "cuda" else 4_096)
    return args


# Flags that may differ between a run and its resumption; all others decide the losses.
FREE_FLAGS = {"out", "resume", "overwrite", "save_every", "eval_every", "eval_calls", "log_every", "preview", "data_cache", "max_grad_norm"}


def main(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else None)
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(args.out)

    # Rows → examples, some of them held out.
    model_folder = checkpoint.fetch_model(args.model)
    tokenizer = Tokenizer.load(model_folder)
    if args.survey:
        return survey_rows(args, model_folder, tokenizer, say)
    train, held_out_rows, surveyed = read_examples(args, model_folder, tokenizer, say)
    if args.preview:
        for i in range(min(args.preview, len(train))):
            say(survey.colored(data.runs(train[i], tokenizer)), end="\n\n")
        return 0
    if not train:
        raise ValueError("no row is left to train on; see the counts above, and --max-tokens, --eval-fraction")
    lengths = train.lengths
    eval_rows = [held_out_rows.conversation(i) for i in range(len(held_out_rows))]

    # From here on threads may start, such as torch.distributed's: nothing is forked any more.
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=timedelta(hours=2))     # rank 0 alone answers queries
    if args.device == "cuda":
        torch.cuda.set_device(device)

    def pack(examples: list[data.Example]) -> list[data.Batch]:
        """Batches of at most --micro-tokens, and so small that as many processes as possible get one."""
        if world == 1:
            return data.pack(examples, args.micro_tokens, args.share_beginnings)
        whole = sum(len(batch.tokens) for batch in data.pack(examples, sys.maxsize, args.share_beginnings))
        size = math.ceil(whole / world)
        while True:
            batches = data.pack(examples, min(size, args.micro_tokens), args.share_beginnings)
            if len(batches) <= world or size >= args.micro_tokens:
                return batches
            size = math.ceil(1.25 * size)

    held_out = pack(list(held_out_rows))

    # Model, optimizer, schedule.
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = checkpoint.load_model(model_folder, dtype, device, master_dtype=torch.float32 if args.full else dtype)
    if not args.full:
        lora = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets.split(",")), args.rslora)
        wrap(model, lora, torch.Generator().manual_seed(args.seed))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, args.beta2), weight_decay=args.weight_decay, fused=True)
    weights = train.weights
    plan = {"seed": args.seed, "batch_rows": args.batch_rows, "batch_tokens": args.batch_tokens, "epochs": args.epochs, "weights": weights}
    if (weights != 1).any():
        say(f"data   {weights.sum():,.0f} rows an epoch, by the weights of --data")
    total = args.steps if args.epochs is None else sum(1 for _ in itertools.islice(data.steps(lengths, **plan), args.steps))
    warmup = args.warmup_steps if args.warmup_steps is not None else min(50, total // 10)
    size, trained_size = (sum(p.numel() for p in ps) / 1e6 for ps in (model.parameters(), parameters))
    say(f"model  {size:.1f} M parameters, {trained_size:.2f} M trained ({'full' if args.full else f'LoRA rank {args.lora_rank}'}), "
        f"{args.dtype} on {checkpoint.device_name(device)}")
    chosen: list[str] = []
    if not args.full:
        began, on_gpu = time.perf_counter(), args.device == "cuda" and args.kernels != "torch"
        if on_gpu:
            say("kernels are compiled and timed; a first start takes a minute or two", flush=True)
        first, _ = next(data.steps(lengths, args.seed, batch_rows=args.batch_rows, batch_tokens=args.batch_tokens))
        chosen = choose_kernels(model, args.kernels, max(len(batch.tokens) for batch in pack([train[row] for row in first])))
        for line in chosen:
            say(f"kernels {line}")
        if on_gpu:
            say(f"kernels ready after {time.perf_counter() - began:.1f} s; kept on disk for the next start")
            torch.cuda.reset_peak_memory_stats()

    # A new run, or an old one from its last checkpoint.
    state = {"position": 0, "best_loss": None}
    step = 0
    found = checkpoint.find_checkpoints(out)
    flags = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS} | {"rows": len(train), "row_tokens": sum(lengths)}
    if args.resume and found:
        check_same_run(out, flags)
        state = checkpoint.load_run(found[-1], model, optimizer)
        step = state.pop("step")
        say(f"resume {found[-1]} at step {step}")
    elif rank == 0 and args.steps != 0 and (found or (out / "log.jsonl").exists()) and not (args.overwrite or args.resume):
        raise ValueError(f"{out} holds an earlier run; pass --resume to go on with it, --overwrite to lose it, or another --out")
    log = None
    if rank == 0 and args.steps != 0:
        log = open_log(out, step, flags, device, chosen)
        checkpoint.write_json(out / "data.json", surveyed)

    def held_out_loss() -> float | None:
        """Mean nats a trained token over the held-out rows, shared among the processes."""
        if not held_out:
            return None
        with torch.no_grad():
            model.eval()
            nats = torch.zeros((), device=device)
            for batch in held_out[rank::world]:
                nats += loss_sum(model, batch)
        if world > 1:
            dist.all_reduce(nats)
        return nats.item() / sum(batch.trained_tokens for batch in held_out)

    def evaluate_and_keep_best() -> None:
        loss = held_out_loss()
        if loss is None:
            return
        say(f"step {step:5d}/{total} | held-out loss {loss:.4f}")
        write(log, {"step": step, "eval_loss": loss})
        if step and (state["best_loss"] is None or loss < state["best_loss"]):
            state["best_loss"] = loss
            if rank == 0:
                save_result(model, args, model_folder, out)

    def count_calls(model: Gemma3) -> None:
        """Let the model call: figures to the log, every answer to out/calls/step-N.json."""
        if not (args.eval_calls and eval_rows and rank == 0):
            return
        result = evaluate(checkpoint.decoding_copy(model) if args.full else model.eval(), tokenizer, eval_rows[:args.eval_calls])
        say(f"step {step:5d}/{total} | exact match {result['exact_match']:.1%} | AST match {result['ast_match']:.1%} of {result['rows']} "
            "held-out queries", flush=True)
        write(log, {"step": step, **{key: result[key] for key in ("rows", "exact_match", "ast_match", "name_accuracy", "parse_failures")}})
        (out / "calls").mkdir(exist_ok=True)
        checkpoint.write_json(out / "calls" / f"step-{step:06d}.json", {"step": step, **result})

    if args.steps == 0:
        batch = data.pack([train[0]], args.micro_tokens)[0]
        with torch.no_grad():
            loss = loss_sum(model, batch).item() / batch.trained_tokens
        say(f"ready  first row's loss {loss:.4f}; --steps 0 stops here")
        return 0
    if step == 0:
        count_calls(model)
        evaluate_and_keep_best()

    # Ctrl-C and SIGTERM let the step finish, save and leave; the second one leaves at once.
    stop_signal: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note_signal(number: int, _) -> None:
        stop_signal.append(number)
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, note_signal)

    # The loop.
    started = time.perf_counter()
    first_step = step
    for rows, position in data.steps(lengths, start=state["position"], **plan):
        if step >= total:
            break
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, warmup, args)
        batches = pack([train[row] for row in rows])
        trained_tokens = sum(batch.trained_tokens for batch in batches)

        model.train()
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(batches[rank::world]):
            torch.manual_seed(hash_seed(args.seed, step, rank + i * world))        # dropout: the same after a resume
            share = loss_sum(model, batch) / trained_tokens
            share.backward()
            loss += share.detach()
        if world > 1:
            loss = sum_over_processes(loss, parameters)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
        if not (math.isfinite(loss.item()) and norm <= args.max_grad_norm):       # a NaN fails both
            raise FloatingPointError(describe_failure(model, [train[row] for row in rows], step, loss.item(), norm, out))
        if args.clip and norm > args.clip:
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], args.clip / norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, state["position"] = step + 1, position

        now = time.perf_counter()
        tokens_done = sum(lengths[row] for row in rows)
        record = {"step": step, "loss": loss.item(), "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens_done,
                  "computed_tokens": sum(len(batch.tokens) for batch in batches), "trained_tokens": trained_tokens,
                  "seconds": now - began, "tokens_per_second": tokens_done / (now - began), "peak_gib": peak_gib(device)}
        write(log, record)
        stopping = any_process(bool(stop_signal), device, world)
        if step == total or stopping or (args.log_every and (step == 1 or step % args.log_every == 0)):
            say(console_line(record, total, (now - started) / (step - first_step) * (total - step)), flush=True)
        if step == total or (args.eval_every and step % args.eval_every == 0):
            evaluate_and_keep_best()
            if step < total:
                count_calls(model)
        if rank == 0 and (step == total or stopping or (args.save_every and step % args.save_every == 0)):
            checkpoint.save_run(out, step, model, optimizer, state)
        if stopping:
            break

    for number, handler in usual.items():
        signal.signal(number, handler)
    if world > 1:
        dist.destroy_process_group()
    if step < total:
        number = stop_signal[0] if stop_signal else signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is saved, go on with --resume")
        return 128 + number
    if rank == 0 and state["best_loss"] is None:                                    # nothing held out: the last is the best
        save_result(model, args, model_folder, out)
    if rank == 0 and args.eval_calls and eval_rows:
        result = (str(out), None) if args.full else (str(model_folder), str(out))    # what the user gets, not what is at hand
        count_calls(checkpoint.load_tuned(*result, args.dtype, args.device)[0])
        say("\n" + before_and_after(out) + "\n")
    if rank == 0:
        say(f"report {report.write(out)}")
    best = "" if state["best_loss"] is None else f", best held-out loss {state['best_loss']:.4f}"
    say(f"done   {step} steps{best}; {'model' if args.full else 'adapter'} in {out / ('model' if args.full else 'adapter')}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of `main`, in its order


def read_tokens(args: argparse.Namespace, sources: str, model_folder: Path, tokenizer: Tokenizer, skip_invalid: bool) -> Tokens:
    cache = Path(args.data_cache) if args.data_cache else None
    return token_cache.read_sources(sources.split(","), model_folder, tokenizer, cache, max(args.eval_rows, args.eval_calls), skip_invalid,
                                    args.system)


def survey_rows(args: argparse.Namespace, model_folder: Path, tokenizer: Tokenizer, say) -> int:
    """Look at every row of `--data`, the bad ones too, and say what was seen."""
    found = read_tokens(args, args.data, model_folder, tokenizer, skip_invalid=True).figures(tokenizer, args.max_tokens)
    say(survey.console(found))
    say(f"\nreport {report.write_data(Path(args.out), args.data, found)}")
    return 0


def read_examples(args: argparse.Namespace, model_folder: Path, tokenizer: Tokenizer, say) -> tuple[Tokens, Tokens, dict]:
    """The training rows, those of the held-out rows that are evaluated, and the survey of the training rows."""
    evaluated = max(args.eval_rows, args.eval_calls)
    rows = read_tokens(args, args.data, model_folder, tokenizer, args.skip_invalid)
    if args.eval_data:
        _, held_out = read_tokens(args, args.eval_data, model_folder, tokenizer, args.skip_invalid).hold_out(1.0)
        train = rows.take(~np.isin(rows.hashes, held_out.hashes))
        if len(train) < len(rows):
            say(f"data   {len(rows) - len(train)} training rows left out: their query is among the held-out ones")
    else:
        train, held_out = rows.hold_out(args.eval_fraction)
    say(f"data   {len(train)} rows to train on, {len(held_out)} held out"
        + (f", of which {evaluated} are evaluated" if len(held_out) > evaluated else ""))
    for cause, entry in rows.skipped.items():
        say(f"data   {entry['rows']} rows skipped: {cause}; the first: {entry['first']}")
    if hidden := int(rows.column("hidden_parameters").sum()):
        say(f"data   {hidden} rows have a parameter that the official template leaves undeclared (named {', '.join(sorted(SCHEMA_KEYS))})")
    found = train.figures(tokenizer, args.max_tokens)
    train, held_out = (without_long(examples, args.max_tokens, name, say) for name, examples in
                       (("training", train), ("held-out", held_out.take(np.arange(min(evaluated, len(held_out)))))))
    for line in survey.headlines(found) if train else ():
        say(f"data   {line}")
    return train, held_out, found


def without_long(examples: Tokens, max_tokens: int, name: str, say) -> Tokens:
    """The examples that are not too long."""
    short = np.asarray(examples.lengths) < max_tokens                            # a length is one less than the row's tokens
    kept = examples.take(short)
    if len(kept) < len(examples):
        say(f"data   {len(examples) - len(kept)} {name} rows dropped: longer than {max_tokens} tokens (--max-tokens); the first: "
            f"{examples.source(int(short.argmin()))}")
    if kept:
        tokens = sum(kept.lengths)
        say(f"data   {name}: {tokens:,} tokens, {tokens / len(kept):.0f} a row, {kept.trained_tokens / tokens:.1%} of them trained")
    return kept


def learning_rate(step: int, total: int, warmup: int, args: argparse.Namespace) -> float:
    """Of step 0, 1, …: linear warm-up to `--lr`, then down to `--min-lr` by cosine or straight, or constant."""
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "constant":
        return args.lr
    progress = (step - warmup) / max(1, total - warmup)
    height = 1 - progress if args.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return args.min_lr + (args.lr - args.min_lr) * height


def loss_sum(model: Gemma3, batch: data.Batch) -> torch.Tensor:
    """Σ of the losses of a batch's trained tokens, in nats: a scalar on the model's device."""
    tokens, targets, positions, documents = batch.to(model.head.device)
    return linear_cross_entropy(model(tokens, positions, documents), model.head, targets)


def hash_seed(*numbers: int) -> int:
    """One seed out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def any_process(flag: bool, device: torch.device, world: int) -> bool:
    """Whether the flag is up in any process; all of them get the same answer."""
    if world == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


def sum_over_processes(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Add up gradients and loss over all processes, in one all-reduce; a process without a batch adds zeros."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), loss[None]])
    dist.all_reduce(flat)
    for parameter, grad in zip(parameters, flat[:-1].split([p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter)
    return flat[-1]


@torch.no_grad()
def describe_failure(model: Gemma3, examples: list[data.Example], step: int, loss: float, norm: float, out: Path) -> str:
    """What to tell the user about a step with a NaN or an exploding gradient: the rows, worst first."""
    losses = []
    for example in examples:
        batch = data.pack([example], len(example))[0]
        losses.append((loss_sum(model, batch).item() / batch.trained_tokens, example.source))
    worst = sorted(losses, key=lambda pair: (math.isfinite(pair[0]), -pair[0]))[:5]
    rows = ", ".join(f"{source} (loss {loss:.3g})" for loss, source in worst)
    return (f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not taken and no checkpoint was touched. "
            f"Its worst rows: {rows}. Mend or leave out these rows, or start anew with a lower --lr; a larger --max-grad-norm lets "
            f"--resume go on from the last checkpoint in {out}")


def save_result(model: Gemma3, args: argparse.Namespace, base: Path, out: Path) -> None:
    """The run's result, for other tools to load: out/adapter in PEFT's layout, or out/model in the published one."""
    if args.full:
        checkpoint.save_model(model, base, out / "model")
    else:
        checkpoint.save_adapter(model, args.model, out / "adapter")
    checkpoint.save_system(out / ("model" if args.full else "adapter"), args.system)


def before_and_after(out: Path) -> str:
    """The first and the last evaluation of a run side by side, and three of its answers."""
    files = sorted((out / "calls").glob("step-*.json"))
    before, after = checkpoint.read_json(files[0]), checkpoint.read_json(files[-1])
    earlier = {answer["source"]: answer["text"] for answer in before["answers"]}
    samples = [f"  query   {a['query']!r}\n  wanted  {json.dumps(a['expected'], ensure_ascii=False)}\n"
               f"  before  {earlier.get(a['source'], '')[:200]!r}\n  after   {a['text'][:200]!r}" for a in after["answers"][:3]]
    return "\n\n".join([*samples, table({"before": before, "after": after})])


def check_same_run(out: Path, flags: dict) -> None:
    """Refuse to resume with flags under which the losses would differ."""
    stored = checkpoint.read_json(out / "config.json")
    changed = [f"--{key.replace('_', '-')} {stored.get(key)} → {value}" for key, value in flags.items()
               if stored.get(key, value) != value]
    if changed:
        raise ValueError(f"{out} was made with other flags: {', '.join(changed)}; resume with the same ones, or choose another --out")


def open_log(out: Path, step: int, flags: dict, device: torch.device, kernels: list[str]):
    """out/config.json and out/log.jsonl, cut back to the records up to `step`; the first line says what ran on what."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_leftovers(out)
    lines = []
    if step:
        earlier = (out / "log.jsonl").read_text(encoding="utf-8") if (out / "log.jsonl").exists() else ""
        for line in earlier.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue                                  # the line that a kill tore
            if record.get("step", 0) <= step:
                lines.append(line)
    else:
        for folder in ("checkpoints", "adapter", "model", "calls"):
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / "report.html").unlink(missing_ok=True)
    checkpoint.write_json(out / "config.json", flags)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    lines.append(json.dumps({"flags": flags, "commit": commit.strip() or None, "python": platform.python_version(),
                             "torch": torch.__version__, "device": checkpoint.device_name(device), "kernels": kernels,
                             "resumed_at": step or None}))
    with checkpoint.whole_file(out / "log.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (out / "log.jsonl").open("a", encoding="utf-8")


def write(log, record: dict) -> None:
    if log:
        log.write(json.dumps(record) + "\n")
        log.flush()


def console_line(record: dict, total: int, seconds_left: float) -> str:
    speed = record["tokens_per_second"]
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return (f"step {record['step']:5d}/{total} | loss {record['loss']:.4f} | grad {record['grad_norm']:.2f} | lr {record['lr']:.1e} | "
            f"{f'{speed / 1e3:.1f}k' if speed >= 1e4 else f'{speed:.0f}'} tok/s | {record['peak_gib']:.1f} GiB | {left} left")


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def keep_memory() -> None:
    """On Linux, start this program again with a malloc that keeps what is freed, in large pages.

    A step on a CPU frees gigabytes and asks for them again. By default they go back to the system and return as pages of
    4 KiB, each zeroed on its first use, which takes an eighth of the time and more in a long run (docs/log.md).
    """
    ours = "__file__" in globals() and sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1:] == sys.argv[1:] \
        and Path(sys.argv[0]).resolve() == Path(__file__).resolve()          # not a notebook, nor another program that runs this file
    if ours and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        tunables = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0x1000000000"
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": tunables})


if __name__ == "__main__":
    try:
        arguments = parse_args()
        if arguments.device == "cpu":
            keep_memory()
        sys.exit(main(arguments))
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
