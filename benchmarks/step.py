"""A whole training step, technique by technique and beside the peers: real tokens a second, memory, share of the card's peak.

    python benchmarks/step.py --save                                  # on a CUDA device; random weights of full size
    python benchmarks/step.py --device cpu --tiny --tokens 300 --steps 2

The ladder starts with PyTorch for everything and exchanges one technique a rung; every rung takes the same rows and must
reach the same losses. So must the peers: transformers with PEFT or alone on the same rows, weights and adapters, from the
usual recipe to the strongest mixture of packages; what is not installed is named. Rows are as long as xLAM's (400 tokens
on average); a tenth is trained.
"""
from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cpu_vs_peft import padded  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

from cuda_graph import RecordedPasses  # noqa: E402
from data import pack  # noqa: E402
from dataset.examples import Example  # noqa: E402
from lora import LoRAConfig, choose_kernels, wrap  # noqa: E402
from model import Gemma3, GemmaConfig  # noqa: E402
from ops.backend import Backends, choose_backends  # noqa: E402
from storage.adapters import save_adapter  # noqa: E402
from train import loss_sum  # noqa: E402
from training.distributed import AllReduceGradients  # noqa: E402
from training.host import device_name, peak_gib  # noqa: E402

# A rung of the ladder: the operations that use the device's fastest backend, the others PyTorch; and who computes the adapters.
SIMPLE = ("rms_norm", "geglu")
EVERY = (*SIMPLE, "attention", "cross_entropy", "weight_grad")
LADDER = {"PyTorch": ((), "torch"), "+ norms, GeGLU": (SIMPLE, "torch"), "+ attention": ((*SIMPLE, "attention"), "torch"),
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


def timed(step: Callable[[int], tuple[Tensor, Tensor]], steps: int, device: torch.device, reserved: bool = False) -> dict:
    """Losses and gradients' norms of all steps, and seconds and memory of those after the warm-up.

    reserved: count all the memory that PyTorch holds, as what is recorded asks for none when it is replayed.
    """
    losses, norms, seconds = [], [], []
    for i in range(steps + min(10, steps)):
        if device.type == "cuda":
            if i == min(10, steps):
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss, norm = step(i)
        losses.append(loss.item())                                  # waits for the device
        norms.append(norm.item())
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_reserved(device) / 2**30 if reserved else peak_gib(device)
    return {"losses": losses, "grad_norms": norms, "seconds": statistics.median(seconds[-steps:]), "peak_gib": peak}


@cache
def weights(config: GemmaConfig) -> dict[str, Tensor]:
    """What all sides start from, drawn once."""
    model = Gemma3(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.state_dict()


def start(config: GemmaConfig, device: torch.device, full: bool, fastest: tuple[str, ...] = EVERY) -> Gemma3:
    """Our model with these weights, in fp32 where every parameter is trained.

    fastest: the operations that use the device's fastest backend; the others use PyTorch.
    """
    chosen = choose_backends(device, torch.bfloat16, config)
    with torch.device("meta"):
        model = Gemma3(config, torch.bfloat16, Backends(**{name: getattr(chosen, name) for name in fastest}))
    dtype = torch.float32 if full else torch.bfloat16
    model.load_state_dict({name: tensor.to(device, dtype, copy=True) for name, tensor in weights(config).items()}, assign=True)
    return model.train()


def ours(config: GemmaConfig, args: argparse.Namespace, tokens: int, full: bool, fastest: tuple[str, ...], lora: str,
         recorded: bool = False) -> dict:
    device = torch.device(args.device)
    model = start(config, device, full, fastest)
    if not full:
        wrap(model, LoRAConfig(), torch.Generator().manual_seed(0))
        choose_kernels(model, lora if device.type == "cuda" else "torch", tokens)
    gradients = AllReduceGradients(model, 1, recorded)
    parameters = gradients.parameters
    optimizer = torch.optim.AdamW(parameters, lr=1e-5 if full else 1e-3, fused=True)
    batches = [pack(rows(tokens, config.vocab_size, seed), tokens)[0] for seed in range(4)]
    passes = RecordedPasses(model, tokens) if recorded else None

    def step(i: int) -> tuple[Tensor, Tensor]:
        batch = batches[i % len(batches)]
        if passes:
            loss = passes(batch) / batch.loss_tokens
            torch._foreach_div_([p.grad for p in parameters], batch.loss_tokens)
        else:
            loss = loss_sum(model, batch) / batch.loss_tokens
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        gradients.clear()
        return loss.detach(), norm

    made = timed(step, args.steps, device, reserved=recorded)
    return made | {"tokens_per_second": tokens / made["seconds"],
                   "tflops": FLOPS_A_TOKEN["full" if full else "lora"] * tokens / made["seconds"] / 1e12}


@dataclass(frozen=True)
class Peer:
    """A way to train with transformers."""

    attention: str = "sdpa"
    rows: int = 4                           # of a padded batch; 0: all rows of the step side by side, without padding
    loss: str = "logits"                    # of all tokens in fp32; "trained": of trained ones alone; or a package's fused loss
    compiled: bool = False
    liger: bool = False                     # norms, GeGLU and rotation by Liger's kernels
    bf16_adapters: bool = False             # PEFT keeps them in fp32 unless asked
    full: bool = False                      # every parameter, in bf16 alone


PEERS = {
    "transformers + PEFT, eager, 4 rows, as NeMo's recipe": Peer("eager", bf16_adapters=True),
    "transformers + PEFT, 4 rows": Peer(),
    "transformers + PEFT, 16 rows": Peer(rows=16),
    "transformers + PEFT, 16 rows, bf16 adapters": Peer(rows=16, bf16_adapters=True),
    "transformers + PEFT, 16 rows, compiled": Peer(rows=16, compiled=True),
    "transformers + PEFT, 16 rows, logits of trained tokens": Peer(rows=16, loss="trained"),
    "Liger + PEFT, 16 rows": Peer(rows=16, loss="liger_kernel", liger=True),
    "packed, FlexAttention, logits of trained tokens, compiled": Peer("flex_attention", 0, "trained", compiled=True, bf16_adapters=True),
    "packed, FlexAttention, Liger, CCE, compiled": Peer("flex_attention", 0, "cut_cross_entropy", True, liger=True, bf16_adapters=True),
    "every parameter: transformers, 4 rows": Peer(full=True),
    "every parameter: packed, FlexAttention, logits of trained tokens, compiled": Peer("flex_attention", 0, "trained", True, full=True),
}
SMALL_PEERS = {"padded": Peer("eager"), "packed": Peer(rows=0, loss="trained"), "full": Peer(loss="trained", full=True)}     # run anywhere


def peer(config: GemmaConfig, args: argparse.Namespace, tokens: int, way: Peer) -> dict:
    """transformers, with PEFT unless every parameter is trained, from the same weights and adapters as ours."""
    from peft import PeftModel
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.models.gemma3 import modeling_gemma3
    device, usual_rotation = torch.device(args.device), modeling_gemma3.apply_rotary_pos_emb
    shape = {key: value for key, value in asdict(config).items() if not key.startswith("rope")}
    shape |= {"layer_types": list(config.layer_types), "query_pre_attn_scalar": int(config.query_pre_attn_scalar)}
    with device:                                                                        # its own random weights take long on a CPU
        base = Gemma3ForCausalLM(Gemma3TextConfig(**shape, attn_implementation=way.attention))
    mine = start(config, torch.device("cpu"), full=True)
    base.load_state_dict(mine.state_dict(), strict=False)                               # but for lm_head, which is tied
    base = base.to(device, torch.bfloat16).train()
    try:
        if way.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_gemma3_text
            apply_liger_kernel_to_gemma3_text(fused_linear_cross_entropy=False, model=base)
        if not way.full:
            wrap(mine, LoRAConfig(), torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(mine, "base", Path(folder))
                PeftModel.from_pretrained(base, folder, is_trainable=True, autocast_adapter_dtype=not way.bf16_adapters)   # changes base
        parameters = [p for p in base.parameters() if p.requires_grad]
        run = torch.compile(base.model) if way.compiled else base.model
        optimizer = torch.optim.AdamW(parameters, lr=1e-5 if way.full else 1e-3, fused=True)
        examples = [rows(tokens, config.vocab_size, seed) for seed in range(4)]
        steps = [[padded(some[first:first + way.rows], device) if way.rows else packed(some, device)
                  for first in range(0, len(some), way.rows or len(some))] for some in examples]          # there before time counts

        def step(i: int) -> tuple[Tensor, Tensor]:
            total, trained = torch.zeros((), device=device), sum(row.loss_tokens for row in examples[i % len(examples)])
            for one in steps[i % len(steps)]:
                batch = dict(one)
                labels = batch.pop("labels")[:, 1:]
                hidden = run(**batch).last_hidden_state[:, :-1]
                loss = peer_loss(way.loss, hidden, base.lm_head.weight, labels) / trained
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total, norm

        made = timed(step, max(2, args.steps // 4), device)
    finally:
        modeling_gemma3.apply_rotary_pos_emb = usual_rotation                           # Liger puts its own there for all models
    return made | {"tokens_per_second": tokens / made["seconds"]}


def packed(some: list[Example], device: torch.device) -> dict[str, Tensor]:
    """Rows as transformers takes them without padding: (1, all their tokens); a row's first token is not to be foreseen."""
    each = [padded([row], device) for row in some]
    batch = {name: torch.cat([one[name] for one in each], dim=1) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([one["attention_mask"].cumsum(1) - 1 for one in each], dim=1)
    batch["labels"][batch["position_ids"] == 0] = -100
    return batch


def peer_loss(kind: str, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Σ of the losses of the labels (rows, T) that are not -100."""
    if kind == "liger_kernel":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
        return liger_fused_linear_cross_entropy(hidden.flatten(0, 1), head, labels.flatten(), reduction="sum")
    if kind == "cut_cross_entropy":
        from cut_cross_entropy import linear_cross_entropy
        return linear_cross_entropy(hidden, head, labels, reduction="sum")
    if kind == "trained":
        hidden, labels = hidden[labels != -100], labels[labels != -100]
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, -2), labels.flatten(), reduction="sum")


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

    parts = args.parts.split(",")
    for name, (kernels, lora) in LADDER.items() if "ladder" in parts else ():
        keep("ladder", name, attempt(partial(ours, config, args, args.tokens, False, kernels, lora), device))
    if "ladder" in parts:
        keep("ladder", "every parameter", attempt(partial(ours, config, args, args.tokens, True, EVERY, "auto"), device))
    for tokens in () if args.tiny or "sizes" not in parts else (1_024, 4_096, 8_192, 33_792, 65_536):
        keep("sizes", str(tokens), attempt(partial(ours, config, args, tokens, False, EVERY, "auto"), device))
    for name, way in (SMALL_PEERS if args.tiny else PEERS).items() if "peers" in parts else ():
        keep("peers", name, attempt(partial(peer, config, args, args.tokens, way), device))
    if device.type == "cuda" and "ladder" in parts:                         # last: what a failed recording leaves would touch the others
        for name, full in (("+ CUDA graph", False), ("every parameter, CUDA graph", True)):
            keep("ladder", name, attempt(partial(ours, config, args, args.tokens, full, EVERY, "auto", True), device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16_896, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="measured ones, after up to ten that warm up")
    parser.add_argument("--parts", default="ladder,sizes,peers", help="which of the three to measure, for where time is short")
    parser.add_argument("--tiny", action="store_true", help="a small model and few peers, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
