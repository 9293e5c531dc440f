"""Fine-tune FunctionGemma, or any Gemma 3, to call your functions: LoRA or full, on one process or many.

    python train.py --model google/functiongemma-270m-it --data rows.jsonl --out runs/mine
    python train.py --model DIR --data rows.jsonl --preview 3      # look at what would be trained, and stop
    torchrun --nproc-per-node 8 train.py …                         # the same flags on eight processes

The file reads as the algorithm: flags, then `main` from rows to a trained model. A step's gradient is that of the mean
loss over all its trained tokens, however many rows, batches and processes share the work.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import data
import report
from cuda_graph import RecordedPasses
from dataset import sampler, stats, token_cache
from dataset.examples import Example, text_runs
from dataset.files import parse_weight, read_system_text
from dataset.token_dataset import TokenDataset
from evaluate import evaluate
from inference.scoring import results_table
from lora import TARGETS, LoRAConfig, choose_kernels, set_dropout_masks, wrap
from model import Gemma3
from ops.compiled import has_compiler
from ops.onednn import multiplies_bf16
from storage import hub
from storage.adapters import load_tuned, save_adapter
from storage.atomic import read_json, write_json
from storage.pretrained import (
    DTYPES,
    check_device,
    choose_dtype,
    fetch_model,
    load_model,
    load_tokenizer,
    save_model,
    save_system_prompt,
)
from tokenizer import DEVELOPER_TEXT, Tokenizer
from training.distributed import (
    AllReduceGradients,
    FSDPGradients,
    all_reduce_max,
    decoding_copy,
    init_distributed,
    shutdown_distributed,
)
from training.host import device_name, peak_gib, restart_with_memory_settings
from training.metrics import flops, step_profiler, utilization
from training.run_folder import (
    RunFolder,
    adamw_state,
    broadcast_start,
    check_same_run,
    checkpoint_folder,
    find_checkpoints,
    find_last,
    load_run,
    restarted_by_torchrun,
    snapshot,
)
from training.run_log import before_and_after, console_line, open_log, write_record


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
    add("--model", required=True, help="folder in the published layout, or a name on the Hugging Face Hub, owner/name or "
        "owner/name@revision (branch, tag, commit)")
    add("--data", required=True, metavar="A,B,…", help="files or folders of rows (JSONL, JSON, .gz), or datasets on the "
        "Hub, owner/name[@revision][:split] or owner/name[@revision][:file]; A*2 takes each row of A twice an epoch, A*0.5 half of its "
        "rows in one epoch and the other half in the next")
    add("--eval-data", default=None, metavar="A,B,…", help="held-out rows; without it a share of --data is held out")
    add("--eval-fraction", type=float, default=0.05, help="share of queries to hold out, chosen by a hash of the query")
    add("--eval-rows", type=int, default=200, help="evaluate on at most this many held-out rows")
    add("--system", default=DEVELOPER_TEXT, metavar="TEXT", help="what the model is told before the tools, or @FILE that holds it; "
        "rows with a developer or system message of their own keep theirs (default: Google's sentence)")
    add("--max-tokens", type=int, default=4096, help="longest row, in tokens; longer ones are dropped and counted, never cut")
    add("--skip-invalid", action="store_true", help="drop rows that cannot be right and count them, instead of stopping")
    add("--survey", action="store_true", help="count and describe the rows of --data, bad ones too, here and in OUT/data.html, and stop")
    add("--data-cache", metavar="DIR", default=str(token_cache.DEFAULT_CACHE), help="where tokenized rows are kept; '' keeps none")
    add("--preview", type=int, default=0, metavar="N", help="print N rendered rows, the tokens that carry loss in green, and stop")

    add = parser.add_argument_group("how long").add_argument
    add("--steps", type=int, default=None, help="optimizer steps; 0 prepares and checks everything and stops")
    add("--epochs", type=float, default=None, help="passes over the training rows (default 1, unless --steps is given)")
    add("--batch-rows", type=int, default=None, help="rows a step, over all processes (default 32)")
    add("--batch-tokens", type=int, default=None, help="size a step in tokens instead, over all processes, e.g. 16896")
    add("--micro-tokens", type=int, default=None, help="tokens in one forward pass; a larger step accumulates "
        "in passes of equal size (default 16896 on a GPU, 4096 on a CPU; changes memory and speed, not the result)")

    add("--checkpoint-activations", action="store_true", help="keep only what enters each layer and compute the layer again in the "
        "backward pass: half the memory or less, a third more arithmetic")
    add("--share-prefixes", action=argparse.BooleanOptionalAction, default=True, help="compute a prefix that rows of a step have in "
        "common, such as the same tools, once for all of them (changes speed, not the result)")
    add("--share-beginnings", action=argparse.BooleanOptionalAction, dest="share_prefixes", default=argparse.SUPPRESS,
        help=argparse.SUPPRESS)                                  # the flag's old name

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
    add("--lora-dropout", type=float, default=0.0, help="share of its input that an adapter does not see, drawn by --seed, step and "
        "the row's text up to each token: anew each step, and alike however a step is cut, shared or dealt among processes")
    add("--lora-targets", default=",".join(TARGETS), metavar="A,B,…", help="linears that get an adapter")
    add("--rslora", action="store_true", help="scale by alpha / √rank instead")

    add = parser.add_argument_group("machine (several processes: torchrun --nproc-per-node N train.py …)").add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where to train")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="what the model computes in (default: bf16, or fp32 on a "
        "device that has no instructions for bf16 products, such as a CPU without AVX-512)")
    add("--kernels", choices=("auto", "triton", "torch"), default="auto", help="who computes the adapters' linears: Triton's "
        "kernels, PyTorch, or whichever is faster on this GPU, timed at the start (on a CPU PyTorch; auto lays the frozen bf16 weights out "
        "in oneDNN's blocks first, some per cent faster for twice their memory, unless activations are checkpointed)")
    add("--compile", action="store_true", help="let torch.compile make one loop of each norm and gate that no kernel of ours computes: "
        "some per cent faster on a CPU without AVX512-BF16, or in fp32; the first start takes half a minute more and needs a C++ compiler")

    add("--cuda-graph", action="store_true", help="record passes as CUDA graphs and launch each as one, for steps so small that the GPU "
        "waits for the host; the first pass of each size takes seconds, all are filled up to one, by an eighth at most, and memory doubles")
    add("--shard", action="store_true", help="with --full on several processes: keep parameters, gradients and moments in shards (FSDP2)")
    add("--profile", type=int, default=0, metavar="N", help="write a trace of steps 3 to N + 2 to OUT/trace.json (for chrome://tracing or "
        "ui.perfetto.dev) and print the ten kernels that took longest")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/last", help="the run's folder")
    add("--overwrite", action="store_true", help="start anew where --out holds an earlier run")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out; the losses are those of an unbroken run")
    add("--save-every", type=int, default=100, help="steps between checkpoints; 0 saves at the end alone")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints to keep, the newest ones")
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
                        ("eval_rows", 0), ("eval_every", 0), ("eval_calls", 0), ("save_every", 0), ("log_every", 0), ("keep", 1),
                        ("profile", 0), ("warmup_steps", 0), ("seed", 0), ("clip", 0), ("weight_decay", 0), ("min_lr", 0),
                        ("eval_fraction", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.epochs is not None and args.epochs <= 0:
        parser.error("--epochs must be more than 0")
    if args.eval_fraction >= 1:
        parser.error("--eval-fraction is a share of the queries, less than 1")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.full and args.kernels == "triton":
        parser.error("--kernels is about adapters' linears, and --full has none")
    if args.compile and not has_compiler():
        parser.error("--compile needs a C++ compiler: install g++ or clang++, or name yours in CXX")
    if args.shard and not (args.full and int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--shard divides all that --full trains among several processes: use it with --full, under torchrun")
    if args.batch_tokens:
        args.max_tokens = min(args.max_tokens, args.batch_tokens)        # no row is larger than a step
    args.system = read_system_text(args.system)
    args.lr = args.lr if args.lr is not None else 2e-5 if args.full else 1e-3
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.cuda_graph and (args.device != "cuda" or args.shard or args.dtype != "bf16"):
        parser.error("--cuda-graph records what a CUDA device does, by kernels and in one piece: not --device cpu, --dtype fp32, --shard")
    args.micro_tokens = args.micro_tokens or (16_896 if args.device == "cuda" else 4_096)
    return args


# Flags that may differ between a run and its resumption; all others decide the losses.
FREE_FLAGS = {"out", "resume", "overwrite", "save_every", "eval_every", "eval_calls", "log_every", "preview", "max_grad_norm", "keep",
              "profile", "shard", "checkpoint_activations", "micro_tokens", "share_prefixes", "data_cache", "cuda_graph"}


def main(args: argparse.Namespace) -> int:
    with contextlib.ExitStack() as closing:
        return run(args, closing)


def run(args: argparse.Namespace, closing: contextlib.ExitStack) -> int:
    rank, world, device = init_distributed(args.device)
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    restarts = all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device)               # each machine counts its own

    # Rows → examples, some of them held out.
    pin_sources(args, rank, world, restarts)
    model_folder = fetch_model(args.model)
    tokenizer = load_tokenizer(model_folder)
    if args.survey:
        return survey_rows(args, model_folder, tokenizer, say)
    train, eval_examples, surveyed = read_examples(args, model_folder, tokenizer, say)
    if args.preview:
        for i in range(min(args.preview, len(train))):
            say(stats.color_runs(text_runs(train[i], tokenizer)), end="\n\n")
        return 0
    if not train:
        raise ValueError("no row is left to train on; see the counts above, and --max-tokens, --eval-fraction")
    lengths = train.lengths
    eval_rows = [eval_examples.conversation(i) for i in range(len(eval_examples))]
    loader = data.StepLoader(train, rank, world, args.micro_tokens, args.share_prefixes)
    held_out = loader.pack_held_out(eval_examples)

    # Model, optimizer, schedule.
    dtype = DTYPES[args.dtype]
    model = load_model(model_folder, dtype, device, torch.float32 if args.full else dtype, args.compile)
    if not args.full:
        lora = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, tuple(args.lora_targets.split(",")), args.rslora)
        wrap(model, lora, torch.Generator().manual_seed(args.seed))
    model.checkpoint_activations = args.checkpoint_activations
    size, trained_size = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) / 1e6 for frozen in (True, False))
    gradients = FSDPGradients(model) if args.shard else AllReduceGradients(model, world, recorded=args.cuda_graph)
    optimizer = torch.optim.AdamW(gradients.parameters, lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=args.weight_decay, fused=True)
    if device.type == "cpu":                # before the first pass: see training/distributed.py
        for parameter in gradients.parameters:
            optimizer.state[parameter] = adamw_state(parameter)
    weights = train.weights
    plan = {"seed": args.seed, "batch_rows": args.batch_rows, "batch_tokens": args.batch_tokens, "epochs": args.epochs, "weights": weights}
    if (weights != 1).any():
        say(f"data   {weights.sum():,.0f} rows an epoch, by the weights of --data")
    total = args.steps if args.epochs is None else sum(1 for _ in itertools.islice(sampler.steps(lengths, **plan), args.steps))
    warmup = args.warmup_steps if args.warmup_steps is not None else min(50, total // 10)
    say(f"model  {size:.1f} M parameters, {trained_size:.2f} M trained ({'full' if args.full else f'LoRA rank {args.lora_rank}'}), "
        f"{args.dtype} on {device_name(device)}")
    if args.dtype == "bf16" and not multiplies_bf16(device):
        say("model  this device has no instructions for bf16 products and takes very long for them; --dtype fp32 does not")
    chosen: list[str] = []
    if not args.full:
        began, on_gpu = time.perf_counter(), args.device == "cuda" and args.kernels != "torch"
        if on_gpu:
            say("kernels are compiled and timed; a first start takes a minute or two", flush=True)
        first, _ = next(sampler.steps(lengths, args.seed, batch_rows=args.batch_rows, batch_tokens=args.batch_tokens))
        sizes = [len(batch.tokens) for batch in loader.pack_step(first)]
        chosen = choose_kernels(model, args.kernels, max(sizes, default=1))
        for line in chosen:
            say(f"kernels {line}")
        if on_gpu:
            say(f"kernels ready after {time.perf_counter() - began:.1f} s; kept on disk for the next start")
            torch.cuda.reset_peak_memory_stats()

    # A new run, or an old one from its last checkpoint. When a process dies, torchrun starts all of them anew with the same flags.
    state = {"position": 0, "best_loss": None}
    step, log, folder = 0, None, None
    flags = {key: value for key, value in vars(args).items() if key not in FREE_FLAGS} | {"rows": fingerprint(train)}
    if rank == 0:
        if args.steps != 0:
            folder = RunFolder(out, args.keep)
            closing.callback(folder.close)
        resume = args.resume or restarted_by_torchrun(out, restarts)
        if folder and not (resume or args.overwrite) and (find_checkpoints(out) or (out / "log.jsonl").exists()):
            raise ValueError(f"{out} holds an earlier run; pass --resume to go on with it, --overwrite to lose it, or another --out")
        last = find_last(out, say) if resume else None
        step = int(last.name.removeprefix("step-")) if last else 0
    step = broadcast_start(step, flags["rows"], device) if world > 1 else step
    if step:
        last = checkpoint_folder(out, step)
        if not last.exists():
            raise FileNotFoundError(f"{last} is not here, but where rank 0 runs: --out must be one folder that all machines see")
        check_same_run(out, flags)
        state = load_run(last, model, optimizer)
        step = state.pop("step")
        say(f"resume {out} at step {step}")
    if folder:
        log = closing.enter_context(open_log(out, step, flags, device, {"kernels": chosen, "processes": world}))
        write_json(out / "data.json", surveyed)

    def forward_and_backward(batch: data.Batch, seed: int) -> torch.Tensor:
        """Add a batch's gradients; returns its loss."""
        loss = loss_sum(model, batch, seed, gradients.weight_grad_out)
        loss.backward()
        return loss.detach()

    add_gradients = RecordedPasses(model, args.micro_tokens) if args.cuda_graph else forward_and_backward

    def passes(batches: list[data.Batch]) -> list[data.Batch]:
        """The batches, and with --shard so many idle ones that all processes go through the layers together."""
        if not args.shard:
            return batches
        return batches + [data.IDLE] * (all_reduce_max(len(batches), device) - len(batches))

    def held_out_loss() -> float | None:
        """Mean nats a token that carries loss over the held-out rows, shared among the processes."""
        if not eval_examples:
            return None
        with torch.no_grad():
            model.eval()
            nats = torch.zeros((), device=device)
            for batch in passes(held_out):
                nats += loss_sum(model, batch)
        if world > 1:
            dist.all_reduce(nats)
        return nats.item() / eval_examples.loss_tokens

    def evaluate_and_keep_best() -> None:
        loss = held_out_loss()
        if loss is None:
            return
        say(f"step {step:5d}/{total} | held-out loss {loss:.4f}")
        write_record(log, {"step": step, "eval_loss": loss})
        if step and (state["best_loss"] is None or loss < state["best_loss"]):
            state["best_loss"] = loss
            keep_result()

    def keep_result() -> None:
        """The run's result, for other tools to load: out/adapter in PEFT's layout, or out/model in the published one."""
        result = decoding_copy(model) if args.shard else model
        if rank == 0 and args.full:
            save_model(result, model_folder, out / "model")
        elif rank == 0:
            save_adapter(result, args.model, out / "adapter")
        if rank == 0:
            save_system_prompt(out / ("model" if args.full else "adapter"), args.system)

    def count_calls(model: Gemma3) -> None:
        """Let the model call: figures to the log, every answer to out/calls/step-N.json."""
        if not (args.eval_calls and eval_rows):
            return
        tuned = decoding_copy(model) if args.full else model.eval()
        result = evaluate(tuned, tokenizer, eval_rows[:args.eval_calls], processes=(rank, world))
        say(f"step {step:5d}/{total} | exact match {result['exact_match']:.1%} | AST match {result['ast_match']:.1%} of {result['rows']} "
            "held-out queries", flush=True)
        figures = {key: result[key] for key in ("rows", "exact_match", "ast_match", "name_accuracy", "parse_failures")}
        write_record(log, {"step": step, **figures})
        if rank == 0:
            (out / "calls").mkdir(exist_ok=True)
            write_json(out / "calls" / f"step-{step:06d}.json", {"step": step, **result})

    if args.steps == 0:
        batch = data.pack([train[0]], args.micro_tokens)[0]
        with torch.no_grad():
            loss = loss_sum(model, batch).item() / batch.loss_tokens
        say(f"ready  first row's loss {loss:.4f}; --steps 0 stops here")
        return 0
    if step == 0:
        count_calls(model)
        evaluate_and_keep_best()

    # Ctrl-C and SIGTERM let the step finish, save and leave; a second one leaves at once. What comes within three seconds is the
    # first one again: torchrun passes on to its processes what a terminal or a scheduler has sent them already.
    stop_signal: list[int] = []
    stop_times: list[float] = []

    def note_signal(number: int, _) -> None:
        stop_signal.append(number)
        stop_times.append(time.monotonic())
        if stop_times[-1] - stop_times[0] > 3:
            signal.signal(number, usual[number])
            signal.raise_signal(number)

    usual = {number: signal.signal(number, note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in usual.items():
        closing.callback(signal.signal, number, handler)

    # The loop.
    profiler = closing.enter_context(step_profiler(args.profile, out, device)) if args.profile and rank == 0 else None
    first_step, started = step, time.perf_counter()
    coming, ended, stopping = loader.steps(total - step, state["position"], **plan), started, False
    upcoming = next(coming, None)
    while upcoming:
        rows, position, batches, trained_tokens = upcoming
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, warmup, args)

        model.train()
        seed = hash_seed(args.seed, step)
        nats = torch.zeros((), device=device)
        own_tokens, batches = sum(len(batch.tokens) for batch in batches), passes(batches)
        for i, batch in enumerate(batches):
            gradients.begin_pass(last=i == len(batches) - 1)
            nats += add_gradients(batch, seed)
        work = sum(flops(model, batch) for batch in batches)
        shared = gradients.finish(torch.stack([nats, *(torch.full_like(nats, x) for x in (bool(stop_signal), own_tokens))]))
        loss, norm = shared[0] / trained_tokens, gradients.norm() / trained_tokens
        optimizer.grad_scale = trained_tokens * ((norm / args.clip).clamp(min=1) if args.clip else torch.ones_like(norm))      # a divisor
        optimizer.found_inf = 1 - (loss.isfinite() & (norm <= args.max_grad_norm)).float()       # 1 leaves the step out; a NaN fails both
        optimizer.step()
        gradients.clear()
        packing = time.perf_counter()
        upcoming = next(coming, None)                                      # made while a GPU still works on what was launched
        packing = time.perf_counter() - packing
        left_out, loss, norm, stopping, computed_tokens = torch.stack([optimizer.found_inf, loss, norm, *shared[1:]]).tolist()    # waits
        if left_out:
            raise FloatingPointError(describe_failure(model, [train[row] for row in rows], step, seed, loss, norm, out))
        step, state["position"] = step + 1, position

        now = time.perf_counter()
        seconds, tokens_done = now - ended, sum(lengths[row] for row in rows)
        tflops = work / seconds / 1e12
        record = {"step": step, "loss": loss, "grad_norm": norm, "lr": optimizer.param_groups[0]["lr"], "tokens": tokens_done,
                  "computed_tokens": round(computed_tokens), "trained_tokens": trained_tokens, "seconds": seconds,
                  "tokens_per_second": tokens_done / seconds, "trained_tokens_per_second": trained_tokens / seconds,
                  "data_wait": packing / seconds, "tflops": tflops, "mfu": utilization(tflops, device),
                  "peak_gib": peak_gib(device)}
        write_record(log, record)
        if step == total or stopping or (args.log_every and (step == 1 or step % args.log_every == 0)):
            say(console_line(record, total, (now - started) / (step - first_step) * (total - step)), flush=True)
        if step == total or (args.eval_every and step % args.eval_every == 0):
            evaluate_and_keep_best()
            if step < total:
                count_calls(model)
        if step == total or stopping or (args.save_every and step % args.save_every == 0):
            saved = snapshot(model, optimizer)                           # of shards, by all processes together
            if folder:
                folder.save(step, *saved, dict(state))
        elif folder:
            folder.check()
        if profiler:
            profiler.step()
        ended = time.perf_counter()
        if stopping:
            break

    if folder:
        folder.wait()
    if step < total:
        number = stop_signal[0] if stop_signal else signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name} after step {step}; the checkpoint is saved, go on with --resume")
        return shutdown_distributed(128 + number)
    if state["best_loss"] is None:                                                  # nothing held out: the last is the best
        keep_result()
    if args.eval_calls and eval_rows:
        if world > 1:
            dist.barrier()                                                          # rank 0 has written the result
        result = (str(out), None) if args.full else (str(model_folder), str(out))   # what the user gets, not what is at hand
        count_calls(load_tuned(*result, args.dtype, args.device)[0])
        if rank == 0:
            say("\n" + before_and_after(out, results_table) + "\n")
    if rank == 0:
        say(f"report {report.write_run_report(out)}")
    best = "" if state["best_loss"] is None else f", best held-out loss {state['best_loss']:.4f}"
    say(f"done   {step} steps{best}; {'model' if args.full else 'adapter'} in {out / ('model' if args.full else 'adapter')}")
    return shutdown_distributed(0)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces of `main`, in its order


def pin_sources(args: argparse.Namespace, rank: int, world: int, restarts: int) -> None:
    """Give each name on the Hub in the flags its commit: a resumed run's own, or the one that rank 0 finds there now."""
    def pin(sources: str | None) -> str | None:
        weighted = [parse_weight(source) for source in sources.split(",")] if sources else []
        return ",".join(hub.pin(name, "dataset") + (f"*{weight:g}" if weight != 1 else "") for name, weight in weighted) or None

    args.asked = [args.model, args.data, args.eval_data]
    pinned = [None] * 3
    if rank == 0:
        out = Path(args.out)
        resume = (args.resume and (out / "config.json").exists()) or restarted_by_torchrun(out, restarts)
        stored = read_json(out / "config.json") if resume else {}
        if stored.get("asked") == args.asked:
            pinned = [stored["model"], stored["data"], stored["eval_data"]]
        else:
            pinned = [hub.pin(args.model, "model"), pin(args.data), pin(args.eval_data)]
    if world > 1:
        dist.broadcast_object_list(pinned)
    args.model, args.data, args.eval_data = pinned


def read_tokens(args: argparse.Namespace, sources: str, model_folder: Path, tokenizer: Tokenizer, skip_invalid: bool) -> TokenDataset:
    cache = Path(args.data_cache) if args.data_cache else None
    return token_cache.read_tokens(sources.split(","), model_folder, tokenizer, cache, max(args.eval_rows, args.eval_calls), skip_invalid,
                                   args.system)


def survey_rows(args: argparse.Namespace, model_folder: Path, tokenizer: Tokenizer, say) -> int:
    """Look at every row of `--data`, the bad ones too, and say what was seen."""
    rows = read_tokens(args, args.data, model_folder, tokenizer, skip_invalid=True)
    found = stats.statistics(rows, tokenizer, args.max_tokens, data.shared_prefix_fraction)
    say(stats.console(found))
    say(f"\nreport {report.write_data_report(Path(args.out), args.data, found)}")
    return 0


def read_examples(args: argparse.Namespace, model_folder: Path, tokenizer: Tokenizer, say) -> tuple[TokenDataset, TokenDataset, dict]:
    """The training rows, those of the held-out rows that are evaluated, and the statistics of the training rows."""
    evaluated = max(args.eval_rows, args.eval_calls)
    rows = read_tokens(args, args.data, model_folder, tokenizer, args.skip_invalid)
    if args.eval_data:
        _, held_out = read_tokens(args, args.eval_data, model_folder, tokenizer, args.skip_invalid).split(1.0)
        train = rows.select(~np.isin(rows.hashes, held_out.hashes))
        if len(train) < len(rows):
            say(f"data   {len(rows) - len(train)} training rows left out: their query is among the held-out ones")
    else:
        train, held_out = rows.split(args.eval_fraction)
    say(f"data   {len(train)} rows to train on, {len(held_out)} held out"
        + (f", of which {evaluated} are evaluated" if len(held_out) > evaluated else ""))
    for line in rows.skipped.lines():
        say(f"data   {line}")
    found = stats.statistics(train, tokenizer, args.max_tokens, data.shared_prefix_fraction)
    train, held_out = (without_long(examples, args.max_tokens, name, say) for name, examples in
                       (("training", train), ("held-out", held_out.select(slice(evaluated)))))
    for line in stats.headlines(found) if train else ():
        say(f"data   {line}")
    return train, held_out, found


def without_long(examples: TokenDataset, max_tokens: int, name: str, say) -> TokenDataset:
    """The examples that are not too long."""
    short = np.asarray(examples.lengths) < max_tokens                            # a length is one less than the row's tokens
    kept = examples.select(short)
    if len(kept) < len(examples):
        say(f"data   {len(examples) - len(kept)} {name} rows dropped: longer than {max_tokens} tokens (--max-tokens); the first: "
            f"{examples.source(int(short.argmin()))}")
    if kept:
        tokens = sum(kept.lengths)
        say(f"data   {name}: {tokens:,} tokens, {tokens / len(kept):.0f} a row, {kept.loss_tokens / tokens:.1%} of them carry loss")
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


def loss_sum(model: Gemma3, batch: data.Batch, seed: int = 0, into: torch.Tensor | None = None) -> torch.Tensor:
    """Σ of the losses of a batch's tokens that carry loss, in nats: a scalar on the model's device.

    seed: of dropout, in training. into: as for the model.
    """
    tokens, positions, documents, rows, targets = batch.to(model.head.device)
    set_dropout_masks(model, batch.keys, seed, rows)
    return model(tokens, positions, documents, rows, targets, into)


def hash_seed(*numbers: int) -> int:
    """One seed out of several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@torch.no_grad()
def describe_failure(model: Gemma3, examples: list[Example], step: int, seed: int, loss: float, norm: float, out: Path) -> str:
    """What to tell the user about a step with a NaN or an exploding gradient: the rows, worst first."""
    losses = []
    for example in examples:
        batch = data.pack([example], len(example))[0]
        losses.append((loss_sum(model, batch, seed).item() / batch.loss_tokens, example.source))
    worst = sorted(losses, key=lambda pair: (math.isfinite(pair[0]), -pair[0]))[:5]
    rows = ", ".join(f"{source} (loss {loss:.3g})" for loss, source in worst)
    return (f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not taken and no checkpoint was touched. "
            f"Its worst rows: {rows}. Fix or remove these rows, or start over with a lower --lr; a larger --max-grad-norm lets "
            f"--resume go on from the last checkpoint in {out}")


def fingerprint(rows: TokenDataset) -> str:
    """How many training rows, of how many tokens, and a hash of what they say and in which order."""
    content = hashlib.sha256(rows.column("row_hash").tobytes() + rows.column("tokens").tobytes())
    return f"{len(rows)} of {sum(rows.lengths):,} tokens, SHA-256 {content.hexdigest()[:15]}"


def fail(message: str) -> None:
    """Leave with a line that names the rank. Where all ranks meet the same fault, rank 0 alone gets to say so: torchrun ends the others."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        time.sleep(2)
    print(f"train.py: {f'rank {rank}: ' if world > 1 else ''}{message}", file=sys.stderr, flush=True)
    os._exit(1) if world > 1 else sys.exit(1)            # at once: what other processes would still have to answer is not waited for


def cli() -> None:
    """`main` with the command line's flags; errors that a user can fix are one line, without a traceback."""
    try:
        arguments = parse_args()
        if arguments.device == "cpu":
            restart_with_memory_settings(globals().get("__file__"))
        sys.exit(main(arguments))
    except torch.OutOfMemoryError as error:
        fail(f"{str(error).partition('. ')[0]}; a lower --micro-tokens or --checkpoint-activations takes less; --resume goes on with it")
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        fail(str(error))
    except Exception as error:
        lost = isinstance(error, dist.DistError) or "Connection closed" in str(error) or "gloo" in str(error)
        fail(f"another process is gone ({str(error).splitlines()[0]:.200}); its own message says why" if lost else traceback.format_exc())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
