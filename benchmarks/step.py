"""A whole training step, technique by technique and beside the peers: real tokens a second, memory, share of the card's peak.

    python benchmarks/step.py --save                                  # on a CUDA device; random weights of full size
    python benchmarks/step.py --device cpu --tiny --tokens 300 --steps 2

The ladder starts with PyTorch for everything and exchanges one technique a rung; every rung takes the same rows and must
reach the same losses. The peers are transformers + PEFT in padded batches of the same rows, all logits, each at several
batch sizes; what is not installed is named. Rows are as long as xLAM's (400 tokens on average); a tenth is trained.
"""
from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_vs_peft import padded  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

import attention_kernels  # noqa: E402
import geglu_kernels  # noqa: E402
import loss_kernels  # noqa: E402
import norm_kernels  # noqa: E402
from checkpoint import device_name  # noqa: E402
from data import Example, pack  # noqa: E402
from lora import TARGETS, LoRAConfig, choose_kernels, wrap  # noqa: E402
from model import Gemma3, GemmaConfig  # noqa: E402
from train import loss_sum, peak_gib  # noqa: E402

# A rung of the ladder: the kernel files that may use Triton, and who computes the adapters.
SIMPLE = (norm_kernels, geglu_kernels)
EVERY = (*SIMPLE, attention_kernels, loss_kernels)
LADDER = {"PyTorch": ((), "torch"), "+ norms, GeGLU": (SIMPLE, "torch"), "+ attention": ((*SIMPLE, attention_kernels), "torch"),
          "+ loss": (EVERY, "torch"), "+ LoRA, whichever is faster": (EVERY, "auto"), "LoRA by Triton alone": (EVERY, "triton")}
FLOPS_A_TOKEN = {"lora": 424e6 + 51.6e6, "full": 602e6 + 51.6e6}       # layers and attention, forward and backward; the head apart


def rows(tokens: int, vocabulary: int, seed: int) -> list[Example]:
    """Random rows of together `tokens` tokens, 400 on average, the last tenth of each trained."""
    rng, made, left = np.random.default_rng(seed), [], tokens
    while left > 0:
        size = min(left, int(rng.integers(150, 650)))
        ids = rng.integers(110, vocabulary, size + 1).astype(np.int32)
        made.append(Example(ids, np.arange(size + 1) > 0.9 * size, f"row {len(made)}"))
        left -= size
    return made


def timed(step: Callable[[int], torch.Tensor], steps: int, device: torch.device) -> dict:
    """Losses of all steps, and seconds and memory of those after the warm-up."""
    losses, seconds = [], []
    for i in range(steps + min(10, steps)):
        if device.type == "cuda":
            if i == min(10, steps):
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss = step(i)
        losses.append(loss.item())                                  # waits for the device
        seconds.append(time.perf_counter() - began)
    return {"losses": losses, "seconds": statistics.median(seconds[-steps:]), "peak_gib": peak_gib(device)}


def ours(config: GemmaConfig, args: argparse.Namespace, tokens: int, full: bool, kernels: tuple, lora: str) -> dict:
    device, dtype = torch.device(args.device), torch.bfloat16
    usual = norm_kernels.can_run
    for module in EVERY:
        module.can_run = usual if module in kernels else lambda device: False
    try:
        torch.manual_seed(0)
        model = Gemma3(config, dtype)
        model.init_weights(torch.Generator().manual_seed(0))
        model = model.to(device, torch.float32 if full else dtype).train()
        if not full:
            wrap(model, LoRAConfig(), torch.Generator().manual_seed(0))
            choose_kernels(model, lora if device.type == "cuda" else "torch", tokens)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-5 if full else 1e-3, fused=True)
        batches = [pack(rows(tokens, config.vocab_size, seed), tokens)[0] for seed in range(4)]

        def step(i: int) -> torch.Tensor:
            batch = batches[i % len(batches)]
            loss = loss_sum(model, batch) / batch.trained_tokens
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        made = timed(step, args.steps, device)
    finally:
        for module in EVERY:
            module.can_run = usual
    return made | {"tokens_per_second": tokens / made["seconds"],
                   "tflops": FLOPS_A_TOKEN["full" if full else "lora"] * tokens / made["seconds"] / 1e12}


def peer(config: GemmaConfig, args: argparse.Namespace, tokens: int, attention: str, batch_rows: int, compiled: bool) -> dict:
    """transformers + PEFT: padded batches of so many rows, all logits in fp32, until the step's rows are through."""
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    device = torch.device(args.device)
    shape = {key: value for key, value in asdict(config).items() if not key.startswith("rope")}
    shape |= {"layer_types": list(config.layer_types), "query_pre_attn_scalar": int(config.query_pre_attn_scalar)}
    base = Gemma3ForCausalLM(Gemma3TextConfig(**shape, attn_implementation=attention)).to(device, torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules=list(TARGETS))).train()
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    examples = [rows(tokens, config.vocab_size, seed) for seed in range(4)]

    def step(i: int) -> torch.Tensor:
        some, total = examples[i % len(examples)], torch.zeros((), device=device)
        trained = sum(int(row.trained[1:].sum()) for row in some)
        for start in range(0, len(some), batch_rows):
            batch = padded(some[start:start + batch_rows], device)
            labels = batch.pop("labels")
            logits = run(**batch).logits
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / trained
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    made = timed(step, max(2, args.steps // 4), device)
    return made | {"tokens_per_second": tokens / made["seconds"]}


def attempt(call: Callable[[], dict], device: torch.device) -> dict:
    """What a measurement gave, or why it gave nothing."""
    try:
        return call()
    except Exception as error:                                       # what cannot run here is recorded, and the others go on
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    tiny = GemmaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    config = tiny if args.tiny else GemmaConfig()
    result = {"device": device_name(device), "versions": {"torch": torch.__version__, "python": platform.python_version()},
              "steps": args.steps, "tokens": args.tokens, "ladder": {}, "sizes": {}, "peers": {}}

    def keep(part: str, name: str, made: dict) -> None:
        result[part][name] = made
        print(f"{part:7} {name:44}", made.get("failed") or (
            f"{made['tokens_per_second']:9.0f} tok/s {made['seconds'] * 1e3:8.1f} ms {made['peak_gib']:6.2f} GiB, "
            f"loss {made['losses'][0]:.3f} → {made['losses'][-1]:.3f}"), flush=True)
        keep_result(result, "step", device, args)

    for name, (kernels, lora) in LADDER.items():
        keep("ladder", name, attempt(partial(ours, config, args, args.tokens, False, kernels, lora), device))
    keep("ladder", "every parameter", attempt(partial(ours, config, args, args.tokens, True, EVERY, "auto"), device))
    for tokens in () if args.tiny else (1_024, 4_096, 8_192, 33_792, 65_536):
        keep("sizes", str(tokens), attempt(partial(ours, config, args, tokens, False, EVERY, "auto"), device))
    for attention, compiled in () if args.tiny else (("eager", False), ("sdpa", False), ("sdpa", True)):
        for batch_rows in (4, 16):
            name = f"transformers + PEFT, {attention}{', compiled' if compiled else ''}, {batch_rows} rows"
            keep("peers", name, attempt(partial(peer, config, args, args.tokens, attention, batch_rows, compiled), device))
    for package in ("liger_kernel", "cut_cross_entropy", "nemo_automodel"):
        try:
            __import__(package)
        except ImportError:
            print(f"peers   {package}: not installed, left out")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16_896, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="measured ones, after up to ten that warm up")
    parser.add_argument("--tiny", action="store_true", help="a small model and no peers, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
