"""Steps on 1, 2, … processes of this machine: seconds, communication, how much of it is hidden; and how
evenly rows are dealt.

    python benchmarks/scaling.py --data rows.jsonl --model DIR --save       # without --model a model of 33 M parameters alone
    python benchmarks/scaling.py --tiny

Strong scaling keeps the step's tokens, weak scaling keeps those of a process. On a CPU every process, a lone
one too, has one core and one thread and speaks gloo; GPUs have a process each and speak NCCL. Full
fine-tuning is also measured with all gradients sent after the backward pass, by which it shows what sending
them during it hides. Communication is the time that the process which comes last spends in it, so that
waiting for others is not counted; a process is busy for the seconds of CPU that it uses. With --data the rows
are also dealt to up to 1,024 processes, on paper.
"""
from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from step import rows as random_rows  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

import data  # noqa: E402
from dataset import sampler  # noqa: E402
from dataset.examples import Example, tokenize  # noqa: E402
from dataset.prefix_sharing import lexicographic_order  # noqa: E402
from dataset.rows import read_sources  # noqa: E402
from lora import LoRAConfig, wrap  # noqa: E402
from model import Gemma3, GemmaConfig  # noqa: E402
from ops.backend import choose_backends  # noqa: E402
from storage.pretrained import load_model  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import loss_sum  # noqa: E402
from training.distributed import AllReduceGradients, FSDPGradients, all_reduce_max  # noqa: E402
from training.host import device_name, peak_gib  # noqa: E402

SHAPES = {"small": GemmaConfig(vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
                               head_dim=128),
          "tiny": GemmaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                              head_dim=32)}
WAYS = ("lora", "full", "full, sent at the end", "full --shard")
MICRO_TOKENS = 16_896                                                   # in one forward pass
# How often every byte of the whole tensor passes a ring; the last two names are those of earlier PyTorch.
RING = {"all_reduce": 2, "all_gather_single": 1, "reduce_scatter_single": 1, "all_gather_into_tensor": 1,
        "reduce_scatter_tensor": 1}


def build(model: str, way: str, device: torch.device) -> Gemma3:
    dtype = torch.bfloat16 if way == "lora" else torch.float32
    if model in SHAPES:
        made = Gemma3(SHAPES[model], torch.bfloat16, choose_backends(device, torch.bfloat16, SHAPES[model]))
        made.init_weights(torch.Generator().manual_seed(0))
        made = made.to(device, dtype)
    else:
        made = load_model(Path(model), torch.bfloat16, device, master_dtype=dtype)
    if way == "lora":
        wrap(made, LoRAConfig(), torch.Generator().manual_seed(0))
    return made.train()


def count_bytes(world: int) -> list[float]:
    """From now on every collective adds to the list what it sends."""
    sent = []

    def counted(name: str, collective):
        def call(*args, **more):
            tensors = [x for x in (*args, *more.values()) if isinstance(x, torch.Tensor)]
            sent.append(RING[name] * (world - 1) / world * max(x.numel() * x.element_size() for x in tensors))
            return collective(*args, **more)
        return call

    for name in RING.keys() & vars(dist):
        setattr(dist, name, counted(name, getattr(dist, name)))
    return sent


def process(rank: int, world: int, args: argparse.Namespace, runs: list[tuple], folder: str) -> None:
    """One of `world` processes: measures each of the runs (model, way, rows) and writes what it saw to
    FOLDER/RANK.json.
    """
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        torch.set_num_threads(1)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    sent = count_bytes(world)
    seen = [take_steps(rank, world, args, device, sent, *run) for run in runs]
    Path(folder, f"{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def take_steps(rank: int, world: int, args: argparse.Namespace, device: torch.device, sent: list[float],
               model_name: str, way: str, examples: list[Example]) -> dict:
    """What this process sees of steps over the examples.

    Seconds of each, its tokens, the bytes that it sends.
    """
    model = build(model_name, way, device)
    examples = [Example(row.ids % model.config.vocab_size, row.loss_mask, row.source) for row in examples]
    batches = data.pack_groups(sampler.assign_to_ranks(examples, world)[rank], MICRO_TOKENS)
    tokens, trained = sum(len(batch.tokens) for batch in batches), sum(example.loss_tokens
                                                                       for example in examples)
    if way == "full --shard":
        batches += [data.IDLE] * (all_reduce_max(len(batches), device) - len(batches))
    gradients = FSDPGradients(model) if way == "full --shard" else AllReduceGradients(model, world)
    optimizer = torch.optim.AdamW(gradients.parameters, lr=1e-6, fused=True)

    def now() -> float:
        if args.device == "cuda":
            torch.cuda.current_stream().synchronize()  # what is being sent has a stream of its own
        return time.perf_counter()

    seconds, sending, busy = [], [], []
    for _ in range(args.steps + 1):
        dist.barrier()
        sent.clear()
        began, began_busy = now(), time.process_time()
        for i, batch in enumerate(batches):
            gradients.set_sync(last=i == len(batches) - 1 and way != "full, sent at the end")
            (loss_sum(model, batch) / trained).backward()
        computed = now()
        gradients.all_reduce(torch.zeros(3, device=device))
        sending.append(now() - computed)
        gradients.norm().item()
        optimizer.step()
        gradients.zero()
        seconds.append(now() - began)
        busy.append(time.process_time() - began_busy)
    return {"seconds": seconds, "sending": sending, "busy": busy, "tokens": tokens, "bytes": sum(sent),
            "peak_gib": peak_gib(device)}


def measure(model: str, world: int, args: argparse.Namespace, examples: list[Example]) -> list[dict]:
    """The figures of each way and scaling on so many processes."""
    lengths, runs = [len(example) for example in examples], []
    for way, scaling in itertools.product(WAYS, ("strong", "weak")) if world > 1 else (("lora", "strong"),
                                                                                       ("full", "strong")):
        rows, _ = next(sampler.steps(lengths, 0, batch_tokens=args.tokens * (world if scaling == "weak"
                                                                             else 1)))
        runs.append((model, way, [examples[row] for row in rows], scaling))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (world, args, [run[:3] for run in runs], folder), nprocs=world)
        seen = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    return [figures(*run, [of_rank[i] for of_rank in seen]) for i, run in enumerate(runs)]


def figures(model: str, way: str, examples: list[Example], scaling: str, seen: list[dict]) -> dict:
    """One run's figures out of what its processes saw; of seconds the median over all steps but the first."""
    def median(key: str, of_processes) -> float:
        return statistics.median([of_processes(step) for step in zip(*(one[key] for one in seen),
                                                                     strict=True)][1:])

    seconds, loads, tokens = median("seconds", max), [one["tokens"] for one in seen], sum(map(len, examples))
    return {"model": model if model in SHAPES else "270M", "way": way, "processes": len(seen),
            "scaling": scaling, "rows": len(examples), "tokens": tokens, "seconds": seconds,
            "tokens_per_second": tokens / seconds, "busy_seconds": median("busy", max),
            "communication_seconds": None if way == "full --shard" else median("sending", min),
            "bytes": seen[0]["bytes"], "largest_over_mean": max(loads) * len(seen) / sum(loads),
            "peak_gib": max(one["peak_gib"] for one in seen)}


def dealt(examples: list[Example], processes: int) -> dict:
    """How evenly so many processes share a step of `MICRO_TOKENS` each, or of all rows, and the seconds of
    CPU for which one packs it.
    """
    lengths, places = [len(example) for example in examples], np.argsort(lexicographic_order(examples))
    rows, _ = next(sampler.steps(lengths, 0, batch_tokens=min(processes * MICRO_TOKENS, sum(lengths))))
    teams, loads, seconds = sampler.rank_group(0, processes).groups, [], []
    for team in range(teams):  # the first `teams` ranks are of one team each
        began = time.process_time()
        groups = sampler.assign_to_ranks([examples[row] for row in sampler.rank_group_rows(rows, lengths,
                                                                                           places, team,
                                                                                           processes)],
                           sampler.rank_group(team, processes).size)
        data.pack_groups(groups[0], MICRO_TOKENS)
        seconds.append(time.process_time() - began)
        loads += [sum(group.computed_tokens for group in some) for some in groups]
    began = time.process_time()
    assignment = sampler.assign_to_ranks([examples[row] for row in rows], processes)
    together = sum(group.computed_tokens for some in assignment for group in some)
    tokens = sum(lengths[row] for row in rows)
    return {"processes": processes, "rows": len(rows), "tokens": tokens,
            "largest_over_mean": max(loads) / (sum(loads) / processes), "computed": sum(loads) / tokens,
            "seconds": statistics.median(seconds), "without_teams": {
                "computed": together / tokens, "seconds": time.process_time() - began}}


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    counts = [int(count) for count in args.processes.split(",")]
    result = {
        "device": "a core and a thread each, " + platform.machine()
        if args.device == "cpu"
        else device_name(device),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "steps": args.steps,
        "load_average": os.getloadavg()[0],
        "data": [Path(source).name for source in (args.data or "random rows").split(",")],
        "measured": [],
        "dealt": [],
    }
    if args.data:
        tokenizer = Tokenizer.load(args.model or args.tokenizer)
        examples = [tokenize(row, tokenizer) for row in read_sources(args.data.split(","))]
    else:
        examples = random_rows(args.tokens * 2 * max(counts), 400, 0)

    def keep(part: str, made: dict, line: str) -> None:
        result[part].append(made)
        print(line, flush=True)
        keep_result(result, "scaling", device, args)

    for processes in (2, 8, 16, 32, 64, 128, 256, 1024) if args.data else ():
        made = dealt(examples, processes)
        keep(
            "dealt",
            made,
            f"{processes:4} processes: {made['rows']} rows, largest share {made['largest_over_mean']:.3f} "
            f"of the mean, "
            f"{made['seconds'] * 1e3:.0f} ms (all together {made['without_teams']['seconds'] * 1e3:.0f} ms)",
        )
    models = ["tiny"] if args.tiny else ["small", *([args.model] if args.model else [])]
    for made in itertools.chain.from_iterable(
        measure(model, world, args, examples) for model in models for world in counts
    ):
        sending = (
            ""
            if made["communication_seconds"] is None
            else f", communication {made['communication_seconds'] * 1e3:.1f} ms"
        )
        keep(
            "measured",
            made,
            f"{made['model']:5} {made['way']:22} {made['processes']} {made['scaling']:6} {made['tokens']:6} "
            f"tokens "
            f"{made['seconds'] * 1e3:8.1f} ms, busy {made['busy_seconds'] * 1e3:.1f} ms{sending}, "
            f"{made['bytes'] / 1e6:.1f} MB",
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", help="rows, for their lengths and prefixes; without it random ones")
    parser.add_argument("--model", help="a model's folder, measured after the small one")
    parser.add_argument("--tokenizer", help="the folder that has the rows' tokenizer, without --model")
    parser.add_argument("--processes", default="1,2" if not torch.cuda.is_available() else
                        ",".join(str(2**i) for i in range(torch.cuda.device_count().bit_length())))
    parser.add_argument("--tokens", type=int, default=2_048, help="of a step; of weak scaling, of a process")
    parser.add_argument("--steps", type=int, default=5, help="measured ones, after one that warms up")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
