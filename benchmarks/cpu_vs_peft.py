"""Our LoRA training beside transformers + PEFT: speed, memory and learning, on the same rows in the same
order.

    python benchmarks/cpu_vs_peft.py --save                 # speed and memory: ours and theirs in turn
    python benchmarks/cpu_vs_peft.py --full --save          # the same with every parameter trained, without PEFT
    python benchmarks/cpu_vs_peft.py --parity 60 --save     # held-out loss after 60 steps on both sides (long)
    python benchmarks/cpu_vs_peft.py --one-set --save       # rows that all have the same tools, as an application's have

Ours is `train.py` itself, read from its log.jsonl. Theirs is AutoModelForCausalLM in the same dtype (bf16,
but for a CPU that cannot multiply it) with PEFT adapters (fp32, as PEFT makes them), padded batches of 4 rows
and all logits, as their own loss does it (in fp32 of 2: four do not fit into 24 GiB). Both start from the
same adapter, take the same rows, count the same real tokens (no padding), and use the same AdamW, schedule
and clipping; theirs also gets memory settings: train.py's own, but that pieces of 32 MiB and more go back
(else it does not fit into 24 GiB). Where there is a C++ compiler ours runs with --compile too, as a figure of
its own; and, training adapters, as a process for each core (torchrun), its memory that of all of them: theirs
would not fit into 24 GiB twice. A run's speed is all its tokens by all its seconds, but for the first step.
Parity lets theirs project trained rows alone (`selected`), which changes its speed and not its result. With
--full theirs is trained in one dtype alone, ours with fp32 masters. With --one-set every row is given all of
the file's tools in one order: ours takes 32 of them a step, with the shared beginning computed once and
without; theirs 2 of them, one by one, as all logits of four would not fit into 24 GiB.

--save writes benchmarks/results/DEVICE_vs_peft.json or DEVICE_parity.json, with _fp32 after it where that is
the dtype. Where the real weights and rows are not at hand, speed is measured on random weights of the same
size and the demo's rows, and the report says so.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from dataset import sampler  # noqa: E402
from dataset.examples import Example  # noqa: E402
from ops.compiled import has_compiler  # noqa: E402
from ops.cpu import build  # noqa: E402
from storage.adapters import save_adapter  # noqa: E402
from storage.pretrained import DTYPES, choose_dtype, load_model  # noqa: E402
from training.host import MALLOC, PRIMITIVE_CACHES, device_name  # noqa: E402
from training.load_data import load_datasets  # noqa: E402
from training.run import Run  # noqa: E402

WARMUP_STEPS = 1


def batch_rows(args: argparse.Namespace, side: str) -> int:
    return 8 if not args.one_set else 32 if side == "ours" else 2


def flags(args: argparse.Namespace, steps: int, out: Path, side: str) -> list[str]:
    """The flags of train.py that both sides follow."""
    trained = ["--full", "--lr", "2e-5"] if args.full else ["--lora-rank", "16", "--lr", "3e-4"]
    return ["--model", args.model, "--data", args.data, "--out", str(out), "--overwrite", *trained, "--steps",
            str(steps), "--batch-rows", str(batch_rows(args, side)), "--dtype", args.dtype, "--device",
            args.device, "--save-every", "0", "--eval-every", "0", "--eval-calls", "0", "--eval-rows",
            str(args.eval_rows if args.parity else 1), "--seed", "0"]


def run_ours(args: argparse.Namespace, steps: int, folder: Path, *more: str, processes: int = 1) -> dict:
    out = folder / "ours"
    many = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if many else {})
    subprocess.run([sys.executable, *many, str(ROOT / "train.py"), *flags(args, steps, out, "ours"), *more],
                   check=True, stdout=sys.stderr, env=environment)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    taken = [record for record in records if "loss" in record]
    return {"seconds": [r["seconds"] for r in taken], "tokens": [r["tokens"] for r in taken],
            "losses": [r["loss"] for r in taken],
            "row_tokens": [r["tokens"] / (records[0]["flags"]["batch_rows"]) for r in taken],
            "peak_gib": processes * max(r["peak_gib"] for r in taken), "held_out": [r["eval_loss"]
                                                                                    for r in records
                                                                                    if "eval_loss" in r]}


def run_theirs(args: argparse.Namespace, steps: int, folder: Path, mode: str) -> dict:
    command = [sys.executable, __file__, "--worker", mode, "--folder", str(folder), "--steps", str(steps),
               "--parity", str(args.parity), "--model", args.model, "--data", args.data, "--device",
               args.device, "--dtype", args.dtype, "--eval-rows", str(args.eval_rows),
               *(["--one-set"] if args.one_set else []), *(["--full"] if args.full else [])]
    # as ours, with which padded fours do not fit
    large = "mmap_max=0" if args.one_set else "mmap_threshold=0x2000000"
    malloc = f"{MALLOC}:glibc.malloc.{large}"
    environment = os.environ | (PRIMITIVE_CACHES | {"GLIBC_TUNABLES": malloc} if args.device == "cpu" else {})
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def padded(rows: list[Example], device: str | torch.device) -> dict[str, torch.Tensor]:
    """Rows as transformers takes them: (rows, longest) each."""
    width = max(len(row.ids) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width,
                                                                             dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        row_ids = torch.from_numpy(row.ids).long()
        ids[i, :len(row_ids)], mask[i, :len(row_ids)] = row_ids, 1
        labels[i, :len(row_ids)] = torch.where(torch.from_numpy(row.loss_mask), row_ids, -100)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def worker(args: argparse.Namespace) -> None:
    """transformers + PEFT over the same steps; prints one JSON line."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from storage.pretrained import DTYPES, fetch_model
    from tokenizer import Tokenizer

    ours = train.parse_args(flags(args, args.steps, Path(args.folder), "theirs"))
    folder = fetch_model(args.model)
    run = Run(ours, 1, 2, torch.device("cpu"))                      # rank 1 is silent
    examples, held_out, _ = load_datasets(run, folder, Tokenizer.load(folder))

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    model = base if args.full else PeftModel.from_pretrained(base, str(Path(args.folder) / "start"),
                                                             is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=ours.lr, betas=(0.9, ours.beta2), weight_decay=0.0)

    def loss_sum(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Σ of the trained tokens' losses."""
        if args.worker == "peft":
            return model(**batch, num_items_in_batch=torch.tensor(1.0)).loss
        hidden = base.model(input_ids=batch["input_ids"],
                            attention_mask=batch["attention_mask"]).last_hidden_state[:, :-1]
        labels = batch["labels"][:, 1:]
        rows = labels >= 0
        return F.cross_entropy(base.lm_head(hidden[rows]).float(), labels[rows], reduction="sum")

    result: dict = {"seconds": [], "tokens": [], "losses": [], "row_tokens": []}
    lengths = [len(example) for example in examples]
    plan = sampler.steps(lengths, ours.seed, batch_rows=ours.batch_rows)
    together = 1 if args.one_set else 2 if args.dtype == "fp32" else 4
    model.train()
    for step in range(args.steps):
        began = time.perf_counter()
        rows = [examples[i] for i in next(plan)[0]]
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, args.steps, ours)
        trained = sum(row.loss_tokens for row in rows)
        total = 0.0
        for start in range(0, len(rows), together):
            loss = loss_sum(padded(rows[start:start + together], args.device)) / trained
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, ours.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        result["seconds"].append(time.perf_counter() - began)
        result["tokens"].append(sum(len(row) for row in rows))
        result["losses"].append(total)
        result["row_tokens"].append(result["tokens"][-1] / len(rows))
        print(f"{args.worker}: step {step + 1}/{args.steps} loss {total:.4f} "
              f"{result['tokens'][-1] / result['seconds'][-1]:.0f} tok/s",
              file=sys.stderr, flush=True)
    result["peak_gib"] = (torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda"
                          else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    if args.worker == "selected":
        model.eval()
        with torch.no_grad():
            nats = sum(loss_sum(padded([row], args.device)).item() for row in held_out)
        result["held_out"] = [nats / held_out.loss_tokens]
    print(json.dumps(result))


def write_start(args: argparse.Namespace, folder: Path) -> None:
    """The adapter that both sides start from, as train.py draws it for seed 0."""
    from lora import LoRAConfig, wrap
    model = load_model(args.model)
    wrap(model, LoRAConfig(), torch.Generator().manual_seed(0))
    save_adapter(model, args.model, folder / "start")


def with_one_set_of_tools(file: str, out: Path) -> None:
    """The file's first 2,000 rows, each with all of the file's tools in one order."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    every = {tool["name"]: tool for row in rows for tool in (json.loads(row["tools"])
                                                             if isinstance(row["tools"], str)
                                                             else row["tools"])}
    tools = [every[name] for name in sorted(every)]
    out.write_text("".join(json.dumps(row | {"tools": tools}) + "\n" for row in rows[:2_000]),
                   encoding="utf-8")


def speed(result: dict) -> float:
    """Tokens a second of the steps after the first, which both sides take with the same rows."""
    return sum(result["tokens"][WARMUP_STEPS:]) / sum(result["seconds"][WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=os.environ.get("REAL_MODEL", str(Path.home() / ".cache/nano-functiongemma/gemma-3-270m")),
    )
    parser.add_argument("--data", default=",".join(str(ROOT.parent / "shared/data" / f)
                                                   for f in ("seal.jsonl", "toolrl.jsonl")))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu",
                                                                                                     "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", *DTYPES),
                        help="of both sides (default: train.py's)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each run; the first warms up")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, in turn")
    parser.add_argument("--parity", type=int, default=0, metavar="STEPS",
                        help="compare held-out losses after so many steps instead")
    parser.add_argument("--one-set", action="store_true",
                        help="rows that all have the same tools (of --data's first file, or snips.jsonl)")
    parser.add_argument("--full", action="store_true", help="train every parameter instead of adapters")
    parser.add_argument("--eval-rows", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="keep the report in benchmarks/results")
    parser.add_argument("--worker", choices=("peft", "selected"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype, args.device)
    if args.worker:
        return worker(args)
    if args.one_set and (args.parity or args.full):
        parser.error("--one-set takes steps of another size on each side, so that --parity means nothing; "
                     "it is measured with adapters")
    if args.one_set and args.data == parser.get_default("data"):
        args.data = str(ROOT.parent / "shared/data/snips.jsonl")
    if args.one_set:
        args.data = args.data.split(",")[0]
    missing = [path for path in (f"{args.model}/config.json", *args.data.split(","))
               if not Path(path).exists()]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if missing:
            from examples import demo
            print(f"{', '.join(missing)}: not here; random weights of full size and the demo's rows "
                  f"instead", file=sys.stderr)
            demo.write_demo(folder / "demo", rows=2_000, config=demo.FULL_SIZE)
            args.model, args.data = str(folder / "demo/model"), str(folder / "demo/rows.jsonl")
        if args.one_set:
            with_one_set_of_tools(args.data, folder / Path(args.data).name)
            args.data = str(folder / Path(args.data).name)
        write_start(args, folder)
        if args.parity:
            ours, theirs = run_ours(args, args.parity, folder), run_theirs(args, args.parity, folder,
                                                                           "selected")
            report = {"what": "held-out loss after the same steps", "steps": args.parity,
                      "ours": {"held_out_before": ours["held_out"][0], "held_out": ours["held_out"][-1],
                               "losses": ours["losses"]},
                      "peft": {"held_out": theirs["held_out"][-1], "losses": theirs["losses"]},
                      "held_out_ratio": ours["held_out"][-1] / theirs["held_out"][-1],
                      "seconds": {"ours": sum(ours["seconds"]), "peft_selected": sum(theirs["seconds"])},
                      "peak_gib": {"ours": ours["peak_gib"], "peft_selected": theirs["peak_gib"]}}
        else:
            # steps, flags, processes
            ways: dict[str, tuple[int, list[str], int]] = {"ours": (args.steps, [], 1)}
            if args.one_set:
                ways["ours, each alone"] = (1 + WARMUP_STEPS, ["--no-share-prefixes", "--batch-rows", "8"], 1)
            elif args.device == "cpu":
                if (cores := torch.get_num_threads()) > 1 and not args.full:
                    ways["ours, a process a core"] = (args.steps, [], cores)
                # or it has nothing to do
                if has_compiler() and not (args.dtype == "bf16" and build.is_preferred()):
                    ways |= {
                        f"{name}, --compile": (steps, ["--compile"], processes)
                        for name, (steps, _, processes) in ways.items()
                    }
            runs: dict[str, list] = {name: [] for name in (*ways, "peft")}
            for _ in range(args.repeats):
                for name, (steps, more, processes) in ways.items():
                    runs[name].append(run_ours(args, steps, folder, *more, processes=processes))
                runs["peft"].append(run_theirs(args, args.steps, folder, "peft"))
            report = {
                "what": f"{'every parameter' if args.full else 'LoRA rank 16'}, {args.dtype}: real tokens a second and peak memory"
            }
            for name, results in runs.items():
                report[name] = {"tokens_per_second": [round(speed(r), 1) for r in results],
                                "rows_per_second": [round(speed(r) / statistics.mean(r["row_tokens"]), 3)
                                                    for r in results],
                                "of_each_step": [[round(t / s, 1) for t, s in zip(r["tokens"], r["seconds"],
                                                                                  strict=True)]
                                                 for r in results],
                                "peak_gib": round(max(r["peak_gib"] for r in results), 2)}
            for name in ways:
                pairs = zip(report[name]["tokens_per_second"], report["peft"]["tokens_per_second"],
                            strict=True)
                report[name]["times_peft"] = [round(ours / theirs, 2) for ours, theirs in pairs]
            if args.one_set:
                report["times_each_alone"] = [round(ours / alone, 2) for ours, alone in zip(
                    report["ours"]["rows_per_second"], report["ours, each alone"]["rows_per_second"],
                    strict=True)]
            report["memory_ratio"] = report["ours"]["peak_gib"] / report["peft"]["peak_gib"]

    import peft
    import transformers
    report |= {"batch_rows": {side: batch_rows(args, side) for side in ("ours", "theirs")},
               "data": [Path(f).name for f in args.data.split(",")], "device": args.device,
               "dtype": args.dtype, "weights": "random, of full size" if missing else "real",
               "machine": device_name(torch.device(args.device)) + f", {platform.machine()}",
               "versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                            "peft": peft.__version__}}
    print(json.dumps(report, indent=2))
    if args.save:
        kind = "parity" if args.parity else "one_set" if args.one_set else "full" if args.full else "vs_peft"
        path = ROOT / f"benchmarks/results/{args.device}_{kind}{'_fp32' if args.dtype == 'fp32' else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
