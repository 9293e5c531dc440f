"""Fine-tune FunctionGemma, or any Gemma 3, to call your functions: LoRA or full, on one process or many.

    python train.py --model google/functiongemma-270m-it --data rows.jsonl --out runs/mine
    python train.py --model DIR --data rows.jsonl --preview 3      # print what would be trained, and stop
    torchrun --nproc-per-node 8 train.py …                         # the same flags on eight processes

The file reads as the algorithm: flags, then `train` from rows to a trained model. A step's gradient is that
of the mean loss over all its tokens that carry loss, however many rows, micro-batches and processes share it.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import report
from data import Batch, StepLoader, pack
from dataset import sampler, stats, token_cache
from dataset.examples import text_runs
from dataset.files import read_system_text
from evaluate import evaluate
from inference.scoring import results_table
from lora import TARGETS, LoRAConfig, choose_kernels, wrap
from model import Gemma3
from ops.compiled import has_compiler
from ops.onednn import multiplies_bf16
from storage.atomic import write_json
from storage.pretrained import DTYPES, check_device, choose_dtype, fetch_model, load_model, load_tokenizer
from tokenizer import DEVELOPER_TEXT
from training.cuda_graph import RecordedMicroBatches
from training.distributed import (
    AllReduceGradients,
    FSDPGradients,
    all_reduce_max,
    init_distributed,
    shutdown_distributed,
)
from training.evaluator import Evaluator
from training.host import StopSignal, device_name, peak_gib, restart_with_memory_settings
from training.load_data import fingerprint, load_datasets, pin_sources, survey
from training.loss import describe_failure, loss_sum
from training.metrics import flops, step_profiler, utilization
from training.run import Run
from training.run_folder import adamw_state, open_run, snapshot
from training.run_log import DivergenceCheck, before_and_after, console_line, open_log

# ------------------------------------------------------------------------------------------------------------
# Flags


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, unless its help mentions one or there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        show = has_default and "default" not in action.help
        return super()._get_help_string(action) if show else action.help

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "NAME")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], formatter_class=Help)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, help="model folder, or owner/name[@revision] on the Hugging Face Hub")
    add("--data", required=True, metavar="A,B,…", help="rows: files, folders, or "
        "owner/name[@revision][:split or :file] on the Hub; A*2 takes each row of A twice per epoch, A*0.5 "
        "half of them")
    add("--eval-data", metavar="A,B,…", help="held-out rows (default: a share of --data)")
    add("--eval-fraction", type=float, default=0.05, help="share of queries held out, chosen by a hash of "
        "the query")
    add("--eval-rows", type=int, default=200, help="held-out rows whose loss is measured, at most")
    add("--system", default=DEVELOPER_TEXT, metavar="TEXT", help="system prompt, or @FILE that contains it; "
        "rows with their own keep it (default: Google's sentence)")
    add("--max-tokens", type=int, default=4096, help="longest row, in tokens; longer ones are dropped and "
        "counted")
    add("--skip-invalid", action="store_true", help="drop and count invalid rows instead of stopping")
    add("--survey", action="store_true", help="print statistics of all rows, write them to OUT/data.html, "
        "and stop")
    add("--preview", type=int, default=0, metavar="N", help="print N rendered rows, tokens that carry loss "
        "in green, and stop")
    add("--data-cache", metavar="DIR", default=str(token_cache.DEFAULT_CACHE), help="cache of tokenized "
        "rows; '' for none")

    add = parser.add_argument_group("length and batches").add_argument
    add("--epochs", type=float, help="passes over the training rows (default 1, unless --steps is given)")
    add("--steps", type=int, help="optimizer steps; 0 loads and checks everything, then stops")
    add("--batch-rows", type=int, help="rows per step, over all processes (default 32)")
    add("--batch-tokens", type=int, help="tokens per step instead, over all processes, e.g. 16896; rows "
        "longer than a step are dropped")
    add("--micro-tokens", type=int, help="tokens per micro-batch: changes memory and speed, not the result "
        "(default 16896 on a GPU, 4096 on a CPU)")
    add("--checkpoint-activations", action="store_true", help="recompute each layer in the backward pass: "
        "half the memory or less, a third more arithmetic")
    add("--share-prefixes", action=argparse.BooleanOptionalAction, default=True, help="compute a prefix that "
        "rows of a step share, such as their tools, only once")
    add("--share-beginnings", action=argparse.BooleanOptionalAction, dest="share_prefixes",
        default=argparse.SUPPRESS, help=argparse.SUPPRESS)                  # the flag's old name

    add = parser.add_argument_group("optimizer (AdamW)").add_argument
    add("--lr", type=float, help="peak learning rate (default 1e-3 for LoRA, 2e-5 for --full)")
    add("--min-lr", type=float, default=0.0, help="learning rate that the schedule decays towards")
    add("--schedule", choices=("cosine", "linear", "constant"), default="cosine", help="of the learning rate "
        "after warm-up")
    add("--warmup-steps", type=int, help="steps of linear warm-up (default: a tenth of all, at most 50)")
    add("--beta2", type=float, default=0.999, help="decay of the second moment")
    add("--weight-decay", type=float, default=0.0, help="decoupled weight decay of all trained parameters")
    add("--clip", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")
    add("--max-grad-norm", type=float, default=1e4, help="stop and name the rows if the norm before clipping "
        "exceeds this")
    add("--seed", type=int, default=0, help="random seed of row order, adapters and dropout")

    add = parser.add_argument_group("LoRA or full fine-tuning").add_argument
    add("--full", action="store_true", help="train all parameters (fp32 masters) instead of adapters")
    add("--lora-rank", type=int, default=16, help="rank of the adapters")
    add("--lora-alpha", type=float, default=16.0, help="adapters are scaled by alpha / rank")
    add("--lora-dropout", type=float, default=0.0, help="dropout of the adapters' input; independent of "
        "packing and processes")
    add(
        "--lora-targets", default=",".join(TARGETS), metavar="A,B,…", help="linear layers that get an adapter"
    )
    add("--rslora", action="store_true", help="scale by alpha / √rank instead (rsLoRA)")

    add = parser.add_argument_group("device and processes (several: torchrun --nproc-per-node N train.py "
                                    "…)").add_argument
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="where to train")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="compute dtype (default: bf16, or fp32 on "
        "a device without bf16 instructions)")
    add("--kernels", choices=("auto", "triton", "torch"), default="auto", help="LoRA linears by Triton "
        "kernels, by PyTorch, or whichever is faster on this GPU")
    add("--compile", action="store_true", help="fuse norms and GeGLU by torch.compile, on a CPU without "
        "kernels for them")
    add("--cuda-graph", action="store_true", help="record micro-batches as CUDA graphs, for small steps that "
        "wait for the host; doubles memory")
    add("--shard", action="store_true", help="with --full on several processes: shard parameters, gradients, "
        "moments (FSDP2)")
    add("--profile", type=int, default=0, metavar="N", help="trace steps 3 to N + 2 to OUT/trace.json, print "
        "the slowest kernels")

    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/last", metavar="DIR", help="folder of the run")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out, to the same "
        "losses")
    add("--overwrite", action="store_true", help="start over in an --out that holds an earlier run")
    add("--save-every", type=int, default=100, help="steps between checkpoints; 0 saves at the end only")
    add("--keep", type=int, default=2, metavar="N", help="number of checkpoints to keep")
    add("--eval-every", type=int, default=100, help="steps between evaluations; 0 evaluates at the start and "
        "the end only")
    add("--eval-calls", type=int, default=50, metavar="N", help="held-out queries to answer at each "
        "evaluation; 0 for none")
    add("--log-every", type=int, default=1, help="steps between lines on the console; OUT/log.jsonl has "
        "every step")
    return parser


MINIMUM = {
    "steps": 0, "batch_rows": 1, "batch_tokens": 1, "micro_tokens": 1, "max_tokens": 2, "warmup_steps": 0,
    "min_lr": 0, "weight_decay": 0, "clip": 0, "seed": 0, "eval_fraction": 0, "eval_rows": 0, "eval_every": 0,
    "eval_calls": 0, "save_every": 0, "keep": 1, "log_every": 0, "preview": 0, "profile": 0,
}

# Flags that may differ between a run and its resumption; all others decide the losses.
FREE_FLAGS = {
    "out", "resume", "overwrite", "keep", "save_every", "eval_every", "eval_calls", "log_every", "preview",
    "profile", "max_grad_norm", "micro_tokens", "checkpoint_activations", "share_prefixes", "data_cache",
    "cuda_graph", "shard",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked, with defaults that depend on other flags filled in."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.batch_rows is not None and args.batch_tokens is not None:
        parser.error("--batch-rows and --batch-tokens both size a step: give one of them")
    for name, minimum in MINIMUM.items():
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}")
    if args.epochs is not None and args.epochs <= 0:
        parser.error("--epochs must be more than 0")
    if args.eval_fraction >= 1:
        parser.error("--eval-fraction is a share of the queries, less than 1")
    try:
        check_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.full and args.kernels == "triton":
        parser.error("--kernels is for the linears of adapters, and --full has none")
    if args.compile and not has_compiler():
        parser.error("--compile needs a C++ compiler: install g++ or clang++, or name yours in CXX")
    if args.shard and not (args.full and int(os.environ.get("WORLD_SIZE", 1)) > 1):
        parser.error("--shard divides what --full trains among several processes: use it with --full, under "
                     "torchrun")

    if args.batch_tokens is None and args.batch_rows is None:
        args.batch_rows = 32
    if args.steps is None and args.epochs is None:
        args.epochs = 1.0
    if args.batch_tokens:
        args.max_tokens = min(args.max_tokens, args.batch_tokens)           # no row is larger than a step
    if args.lr is None:
        args.lr = 2e-5 if args.full else 1e-3
    args.system = read_system_text(args.system)
    args.dtype = choose_dtype(args.dtype, args.device)
    args.micro_tokens = args.micro_tokens or (16_896 if args.device == "cuda" else 4_096)
    if args.cuda_graph and (args.device != "cuda" or args.shard or args.dtype != "bf16"):
        parser.error("--cuda-graph needs --device cuda and --dtype bf16, and excludes --shard")
    return args


# ------------------------------------------------------------------------------------------------------------
# The run


def main(args: argparse.Namespace) -> int:
    """Train as the flags say; returns the exit code."""
    with contextlib.ExitStack() as stack:
        return train(args, stack)


def train(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    run = Run(args, *init_distributed(args.device))
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    restarts = all_reduce_max(restarts, run.device)                         # each machine counts its own

    # --------------------------------------------------------------------------------------------------------
    # Data: rows become examples, some of them held out.

    pin_sources(run, restarts)
    model_folder = fetch_model(args.model)
    tokenizer = load_tokenizer(model_folder)
    if args.survey:
        statistics = survey(run, model_folder, tokenizer)
        run.say(f"\nreport {report.write_data_report(run.out, args.data, statistics)}")
        return 0
    examples, held_out, statistics = load_datasets(run, model_folder, tokenizer)
    if args.preview:
        for i in range(min(args.preview, len(examples))):
            run.say(stats.color_runs(text_runs(examples[i], tokenizer)), end="\n\n")
        return 0
    if not examples:
        raise ValueError("no row is left to train on; see the counts above, --max-tokens and --eval-fraction")

    loader = StepLoader(examples, run.rank, run.world_size, args.micro_tokens, args.share_prefixes)
    sampling = {"seed": args.seed, "batch_rows": args.batch_rows, "batch_tokens": args.batch_tokens,
                "epochs": args.epochs, "weights": examples.weights}
    run.total_steps = count_steps(args, examples.lengths, sampling)
    if run.total_steps == 0 and args.steps != 0:
        raise ValueError(f"--epochs {args.epochs:g} of {len(examples)} rows is less than one row; train for "
                         f"longer")
    if (examples.weights != 1).any():
        run.say(f"data   {examples.weights.sum():,.0f} rows per epoch, by the weights of --data")

    # --------------------------------------------------------------------------------------------------------
    # Model and optimizer

    model = build_model(run, model_folder)
    kernels = [] if args.full else tune_kernels(run, model, loader, sampling)
    if args.shard:
        gradients = FSDPGradients(model)
    else:
        gradients = AllReduceGradients(model, run.world_size, recorded=args.cuda_graph)
    optimizer = torch.optim.AdamW(gradients.parameters, lr=args.lr, betas=(0.9, args.beta2),
                                  weight_decay=args.weight_decay, fused=True)
    if run.device.type == "cpu":  # allocated before the activations, else memory fragments (docs/log.md)
        for parameter in gradients.parameters:
            optimizer.state[parameter] = adamw_state(parameter)

    def forward_backward(batch: Batch, seed: int) -> torch.Tensor:
        loss = loss_sum(model, batch, seed, gradients.weight_grad_out)  # --full on a CPU: adds dW in place
        loss.backward()
        return loss.detach()

    micro_step = RecordedMicroBatches(model, args.micro_tokens) if args.cuda_graph else forward_backward
    loss_examples, answered = held_out.select(slice(args.eval_rows)), min(args.eval_calls, len(held_out))
    evaluator = Evaluator(run, model, model_folder, tokenizer,
                          batches=gradients.equalize(loader.pack_held_out(loss_examples)),
                          loss_tokens=loss_examples.loss_tokens,
                          conversations=[held_out.conversation(i) for i in range(answered)],
                          evaluate=evaluate)

    # --------------------------------------------------------------------------------------------------------
    # A new run, or an earlier one from its last checkpoint

    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    flags["rows"] = fingerprint(examples)
    folder = open_run(run, model, optimizer, flags, restarts, stack)
    if args.steps == 0:
        batch = pack([examples[0]], args.micro_tokens)[0]
        with torch.no_grad():
            loss = loss_sum(model, batch).item() / batch.loss_tokens
        run.say(f"check  model, rows and flags are valid; the first row's loss is {loss:.4f}; --steps 0 "
                f"stops here")
        return 0
    if folder:
        more = {"kernels": kernels, "processes": run.world_size}
        run.log_file = stack.enter_context(open_log(run.out, run.step, flags, run.device, more))
        write_json(run.out / "data.json", statistics)
    if run.step == 0:
        evaluator.answer_queries()
        evaluator.measure_loss()

    # --------------------------------------------------------------------------------------------------------
    # The loop

    stop = stack.enter_context(StopSignal())
    profiler = None
    if args.profile and run.rank == 0:
        profiler = stack.enter_context(step_profiler(args.profile, run.out, run.device))
    divergence = DivergenceCheck()
    first_step, started = run.step, time.perf_counter()
    steps = loader.steps(run.total_steps - run.step, run.position, **sampling)
    step, step_ended, stopping = next(steps, None), started, False
    while step and not stopping:
        lr = learning_rate(run.step, run.total_steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward: gradients of the *sum* of the token losses over this rank's micro-batches.
        model.train()
        seed = hash_seed(args.seed, run.step)
        micro_batches = gradients.equalize(step.batches)
        total_loss = torch.zeros((), device=run.device)
        for i, batch in enumerate(micro_batches):
            gradients.set_sync(last=i == len(micro_batches) - 1)  # --full: all-reduce during the last one
            total_loss += micro_step(batch, seed)

        # Sum over the ranks. Loss, stop request and number of tokens travel along with the gradients.
        own_tokens = sum(len(batch.tokens) for batch in step.batches)
        extra = [torch.full_like(total_loss, value) for value in (stop.received, own_tokens)]
        total_loss, *totals = gradients.all_reduce(torch.stack([total_loss, *extra]))

        # Mean, clipping and skipping a bad step happen inside the fused AdamW kernel, so that the host need
        # not wait for the GPU to decide: it divides the gradients by `grad_scale`, and updates nothing if
        # `found_inf` is 1.
        loss, grad_norm = total_loss / step.loss_tokens, gradients.norm() / step.loss_tokens
        clip_factor = (grad_norm / args.clip).clamp(min=1) if args.clip else torch.ones_like(grad_norm)
        is_good = loss.isfinite() & (grad_norm <= args.max_grad_norm)       # False for a NaN
        optimizer.grad_scale = step.loss_tokens * clip_factor
        optimizer.found_inf = 1 - is_good.float()
        optimizer.step()
        gradients.zero()

        # Pack the next step while the GPU works on this one. Then read the numbers: the step's only
        # synchronisation.
        packing_started = time.perf_counter()
        next_step = next(steps, None)
        packing_seconds = time.perf_counter() - packing_started
        step_flops = sum(flops(model, batch) for batch in micro_batches)
        numbers = torch.stack([optimizer.found_inf, loss, grad_norm, *totals])
        is_bad, loss, grad_norm, stopping, computed_tokens = numbers.tolist()
        if is_bad:
            rows = [examples[row] for row in step.rows]
            raise FloatingPointError(describe_failure(model, rows, run.step, seed, loss, grad_norm, run.out))
        run.step, run.position = run.step + 1, step.position

        # Log, evaluate, save.
        now = time.perf_counter()
        seconds, tokens = now - step_ended, sum(examples.lengths[row] for row in step.rows)
        tflops = step_flops / seconds / 1e12
        record = {
            "step": run.step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "tokens": tokens,
            "computed_tokens": round(computed_tokens), "trained_tokens": step.loss_tokens, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "trained_tokens_per_second": step.loss_tokens / seconds,
            "data_wait": packing_seconds / seconds, "tflops": tflops, "mfu": utilization(tflops, run.device),
            "peak_gib": peak_gib(run.device),
        }
        run.log(record)
        is_last = run.step == run.total_steps
        if is_last or stopping or is_due(args.log_every, run.step) or (run.step == 1 and args.log_every):
            seconds_left = (now - started) / (run.step - first_step) * (run.total_steps - run.step)
            run.say(console_line(record, run.total_steps, seconds_left))
        if warning := divergence.warning(loss, lr):
            run.say(warning)
        if is_last or is_due(args.eval_every, run.step):
            evaluator.measure_loss()
            if not (is_last or stopping):
                evaluator.answer_queries()
        if is_last or stopping or is_due(args.save_every, run.step):
            tensors = snapshot(model, optimizer)                            # all ranks, as it gathers shards
            if folder:
                folder.save(run.step, *tensors, run.state)
        elif folder:
            folder.check()
        if profiler:
            profiler.step()
        step, step_ended = next_step, time.perf_counter()

    # --------------------------------------------------------------------------------------------------------
    # The result

    if folder:
        folder.wait()
    if run.step < run.total_steps:
        number = stop.number or signal.SIGTERM  # no number: another rank received the signal
        run.say(f"stopped by {signal.Signals(number).name} after step {run.step}; the checkpoint is saved, "
                "continue with --resume")
        return shutdown_distributed(128 + number)
    if run.best_loss is None:  # nothing held out: the last model is the result
        evaluator.save_result()
    if evaluator.conversations:
        evaluator.answer_queries_with_result()
        if run.rank == 0:
            run.say("\n" + before_and_after(run.out, results_table) + "\n")
    if run.rank == 0:
        run.say(f"report {report.write_run_report(run.out)}")
    best = "" if run.best_loss is None else f", best held-out loss {run.best_loss:.4f}"
    run.say(f"done   {run.total_steps} steps{best}; the {run.result.name} is in {run.result}")
    return shutdown_distributed(0)


# ------------------------------------------------------------------------------------------------------------
# The pieces of `train`, in its order


def count_steps(args: argparse.Namespace, lengths: list[int], sampling: dict) -> int:
    """Optimizer steps of the run.  lengths: tokens of each training row"""
    if args.epochs is None:
        return args.steps
    return sum(1 for _ in itertools.islice(sampler.steps(lengths, **sampling), args.steps))


def build_model(run: Run, model_folder: Path) -> Gemma3:
    """The model to train: with fp32 masters for `--full`, otherwise frozen and wrapped in adapters."""
    args, dtype = run.args, DTYPES[run.args.dtype]
    master_dtype = torch.float32 if args.full else dtype
    model = load_model(model_folder, dtype, run.device, master_dtype, compiled=args.compile)
    method = "full"
    if not args.full:
        targets = tuple(args.lora_targets.split(","))
        lora = LoRAConfig(args.lora_rank, args.lora_alpha, args.lora_dropout, targets, args.rslora)
        wrap(model, lora, torch.Generator().manual_seed(args.seed))
        method = f"LoRA rank {args.lora_rank}"
    model.checkpoint_activations = args.checkpoint_activations
    size = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    run.say(f"model  {size:.1f} M parameters, {trained:.2f} M trained ({method}), "
            f"{args.dtype} on {device_name(run.device)}")
    if args.dtype == "bf16" and not multiplies_bf16(run.device):
        run.say("model  this device has no bf16 instructions and is very slow in bf16; use --dtype fp32")
    return model


def tune_kernels(run: Run, model: Gemma3, loader: StepLoader, sampling: dict) -> list[str]:
    """Choose between kernel and PyTorch for the adapters' linears; returns a line about each choice.

    On a GPU both are timed, with as many tokens as the largest micro-batch of a first step has (without
    weights and epochs, so that there is one).
    """
    started = time.perf_counter()
    on_gpu = run.args.device == "cuda" and run.args.kernels != "torch"
    if on_gpu:
        run.say("kernels are compiled and timed; the first start takes a minute or two")
    rows, _ = next(sampler.steps(loader.dataset.lengths, **sampling | {"epochs": None, "weights": None}))
    tokens = max((len(batch.tokens) for batch in loader.pack_step(rows)), default=1)
    lines = choose_kernels(model, run.args.kernels, tokens)
    for line in lines:
        run.say(f"kernels {line}")
    if on_gpu:
        run.say(f"kernels ready after {time.perf_counter() - started:.1f} s; kept on disk for the next start")
        torch.cuda.reset_peak_memory_stats()
    return lines


def learning_rate(step: int, total: int, args: argparse.Namespace) -> float:
    """The learning rate of step 0, 1, …: linear warm-up to `--lr`, then the schedule down to `--min-lr`."""
    warmup = min(50, total // 10) if args.warmup_steps is None else args.warmup_steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    if args.schedule == "constant":
        return args.lr
    progress = (step - warmup) / max(1, total - warmup)
    height = 1 - progress if args.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return args.min_lr + (args.lr - args.min_lr) * height


def hash_seed(*numbers: int) -> int:
    """One seed from several numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def is_due(every: int, step: int) -> bool:
    """Whether something happens at this step that happens every so many; 0: never."""
    return every > 0 and step % every == 0


# ------------------------------------------------------------------------------------------------------------
# The command


def fail(message: str) -> NoReturn:
    """Exit with one line on stderr.

    If all ranks meet the same error, rank 0 alone reports it: torchrun ends the others while they wait here.
    With several processes the exit is immediate: at a normal exit this one could wait for the others forever.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank:
        time.sleep(2)
    where = f"rank {rank}: " if world_size > 1 else ""
    print(f"train.py: {where}{message}", file=sys.stderr, flush=True)
    os._exit(1) if world_size > 1 else sys.exit(1)


def cli() -> None:
    """`main` with the command line's flags. Errors that a user can fix are one line, without a traceback."""
    try:
        args = parse_args()
        if args.device == "cpu":
            restart_with_memory_settings(globals().get("__file__"))
        sys.exit(main(args))
    except torch.OutOfMemoryError as error:
        first_sentence = str(error).partition(". ")[0]
        fail(f"{first_sentence}; a lower --micro-tokens or --checkpoint-activations takes less memory; "
             "--resume continues with it")
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        fail(str(error))
    except Exception as error:
        lost_connection = any(words in str(error) for words in ("Connection closed", "gloo"))
        if not (lost_connection or isinstance(error, dist.DistError)):
            fail(traceback.format_exc())
        first_line = str(error).partition("\n")[0]
        fail(f"another process is gone ({first_line:.200}); its own message says why")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    cli()
