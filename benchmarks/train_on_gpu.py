"""Thirty steps of train.py on the demo's small model: does a GPU in bf16 reach the losses of a CPU in fp32?

    python benchmarks/train_on_gpu.py --save                        # on a CUDA device; also with --cuda-graph
    python benchmarks/train_on_gpu.py --device cpu --tiny           # anywhere: does it run?

All runs start at once; each is a process of its own. A loss may be off by `MOST`. bf16 rounds a number by up
to 2⁻⁸ of it: the first loss may be off by one such rounding, later ones by three, as weights drift apart.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clock import conditions  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

from examples import demo  # noqa: E402

ROUNDING = 2**-8
MOST = [ROUNDING, 3 * ROUNDING]         # of a relative difference: of the first loss, of each later one
WAYS = {"LoRA": ("--lora-rank", "16", "--lr", "2e-3"), "every parameter": ("--full", "--lr", "1e-3")}


def start(folder: Path, name: str, steps: int, flags: tuple[str, ...]) -> tuple[Path, subprocess.Popen]:
    out = folder / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(folder / "model"),
               "--data", str(folder / "rows.jsonl"), "--out", str(out), "--steps", str(steps),
               "--batch-rows", "16", "--eval-rows", "1", "--eval-every", "0", "--eval-calls", "0",
               "--save-every", "0", *flags]
    with (folder / f"{out.name}.txt").open("w") as said:
        return out, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)


def outcome(out: Path, process: subprocess.Popen) -> dict:
    """Losses and speed of a run that is waited for; {"failed": its last lines} of one that failed."""
    if process.wait():
        said = (out.parent / f"{out.name}.txt").read_text(encoding="utf-8")
        return {"failed": "\n".join(said.splitlines()[-8:])}
    records = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    steps = [record for record in records if "loss" in record]
    kept = "loss", "grad_norm", "tokens_per_second", "peak_gib"
    return {key: [record[key] for record in steps] for key in kept}


def compare(got: dict, exact: dict) -> dict:
    """`got` with its largest relative differences, first and later; "wrong" where one is too large or NaN."""
    if "failed" in got or "failed" in exact:
        return got
    off = [abs(mine - right) / right for mine, right in zip(got["loss"], exact["loss"], strict=True)]
    largest = [off[0], max(off[1:], key=lambda x: (x != x, x))]
    made = got | {"largest_difference": largest}
    if not all(x <= most for x, most in zip(largest, MOST, strict=True)):
        made["wrong"] = (f"losses are off by {largest[0]:.2%} at first and {largest[1]:.2%} later; "
                         f"{MOST[0]:.2%} and {MOST[1]:.2%} are rounding")
    return made


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    steps, result = 3 if args.tiny else 30, conditions(device) | {"tiny": args.tiny, "runs": {}}
    variants = {"CPU": ("--device", "cpu", "--dtype", "fp32"),
                "": ("--device", args.device, "--dtype", "bf16" if on_gpu else "fp32")}
    if on_gpu:
        variants["CUDA graph"] = (*variants[""], "--cuda-graph")
    with tempfile.TemporaryDirectory() as folder:
        demo.write_demo(Path(folder), rows=600)
        running = {(way, variant): start(Path(folder), f"{way} {variant}", steps, (*flags, *more))
                   for way, flags in WAYS.items() for variant, more in variants.items()}
        try:
            ends = {key: outcome(*run) for key, run in running.items()}
        finally:
            for _, process in running.values():
                process.kill()
    for (way, variant), made in ends.items():
        name = ", ".join(filter(None, (way, variant)))
        made = result["runs"][name] = compare(made, ends[way, "CPU"])
        verdict = made.get("failed") or made.get("wrong")
        verdict = verdict or f"off by at most {max(made['largest_difference']):.2%}"
        losses = f"loss {made['loss'][0]:.4f} → {made['loss'][-1]:.4f}, " if "loss" in made else ""
        print(f"{name:28} {losses}{verdict}", flush=True)
    keep_result(result, "training", device, args)
    bad = [name for name, made in result["runs"].items() if "failed" in made or "wrong" in made]
    print(f"{len(ends)} runs of {steps} steps, {len(bad)} not right{': ' if bad else ''}{'; '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="three steps")
    add_result_flags(parser)
    sys.exit(main(parser.parse_args()))
