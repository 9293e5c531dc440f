"""A whole training step, technique by technique and beside the peers: real tokens a second, memory, share of
the card's peak.

    python benchmarks/step.py --save                                  # on a CUDA device; random weights of full size
    python benchmarks/step.py --device cpu --tiny --tokens 300 --steps 2

The ladder starts with PyTorch for everything and exchanges one technique a rung; every rung takes the same
rows and must reach the same losses. So must the peers: transformers with PEFT or alone on the same rows,
weights and adapters, from the usual recipe to the strongest mixture of packages; what is not installed is
named. Rows are as long as xLAM's (400 tokens on average); a tenth is trained.

The first step of each is compared with fp32, token by token where the way is not ours (`fault`): a way that
computes something else is kept, marked as wrong, and gets no figure in any table. MFU counts the operations
that the step needs (`train.flops`), the same for all ways, over the peak that the card's maker states.
"""
from __future__ import annotations

import argparse
import gc
import json
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

from clock import conditions  # noqa: E402
from cpu_vs_peft import padded  # noqa: E402
from tables import add_result_flags, keep_result, result_file  # noqa: E402

from data import pack  # noqa: E402
from dataset.examples import Example  # noqa: E402
from lora import LoRAConfig, choose_kernels, wrap  # noqa: E402
from model import Gemma3, GemmaConfig  # noqa: E402
from ops.backend import Backends, choose_backends  # noqa: E402
from storage.adapters import save_adapter  # noqa: E402
from train import loss_sum  # noqa: E402
from training.cuda_graph import RecordedMicroBatches  # noqa: E402
from training.distributed import AllReduceGradients  # noqa: E402
from training.host import peak_gib  # noqa: E402
from training.metrics import flops, utilization  # noqa: E402

# A rung of the ladder: the operations that use the device's fastest backend, the others PyTorch; and who
# computes the adapters.
SIMPLE = ("rms_norm", "geglu")
EVERY = (*SIMPLE, "attention", "cross_entropy", "weight_grad")
LADDER = {"PyTorch": ((), "torch"), "+ norms, GeGLU": (SIMPLE, "torch"), "+ attention": ((*SIMPLE,
                                                                                          "attention"),
                                                                                          "torch"),
          "+ loss": (EVERY, "torch"), "+ LoRA, whichever is faster": (EVERY, "auto"),
          "LoRA by Triton alone": (EVERY, "triton")}
TINY = GemmaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
SIZES = (1_024, 4_096, 8_192, 33_792, 65_536)          # tokens of a step


def rows(tokens: int, vocabulary: int, seed: int) -> list[Example]:
    """Random rows of together `tokens` tokens, 400 on average, the last tenth of each trained."""
    rng, made, left = np.random.default_rng(seed), [], tokens
    while left > 0:
        size = min(left, int(rng.integers(150, 650)))
        ids = rng.integers(110, vocabulary, size + 1).astype(np.int32)
        made.append(Example(ids, np.arange(size + 1) > 0.9 * size, f"row {len(made)}"))
        left -= size
    return made


def timed(step: Callable[[int], tuple[Tensor, Tensor]], steps: int, device: torch.device,
          reserved: bool = False) -> dict:
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
    return {"losses": losses, "grad_norms": norms, "seconds": statistics.median(seconds[-steps:]),
            "peak_gib": peak}


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
    model.load_state_dict({name: tensor.to(device, dtype, copy=True) for name,
                           tensor in weights(config).items()}, assign=True)
    return model.train()


def training_step(config: GemmaConfig, device: torch.device, tokens: int, full: bool, lora: str,
                  recorded: bool = False, fastest: tuple[str, ...] = EVERY) -> tuple[Callable[[int],
                                                                                              tuple[Tensor,
                                                                                                    Tensor]],
                                                                                                    float]:
    """A function that takes the step of a number and returns loss and gradient norm; and a step's FLOPs."""
    model = start(config, device, full, fastest)
    if not full:
        wrap(model, LoRAConfig(), torch.Generator().manual_seed(0))
        choose_kernels(model, lora if device.type == "cuda" else "torch", tokens)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5 if full else 1e-3, fused=True)
    batches = [pack(rows(tokens, config.vocab_size, seed), tokens)[0] for seed in range(4)]
    gradients = AllReduceGradients(model, 1, recorded)
    passes = RecordedMicroBatches(model, tokens) if recorded else None

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
        gradients.zero()
        return loss.detach(), norm

    return step, flops(model, batches[0])


def ours(config: GemmaConfig, args: argparse.Namespace, tokens: int, full: bool, fastest: tuple[str, ...],
         lora: str, recorded: bool = False) -> dict:
    device = torch.device(args.device)
    step, work = training_step(config, device, tokens, full, lora, recorded, fastest)
    made = timed(step, args.steps, device, reserved=recorded)
    wrong = fault(config, device, tokens, made["losses"][0])
    return made | rates(tokens, work, made["seconds"], device) | wrong


def rates(tokens: int, work: float, seconds: float, device: torch.device) -> dict:
    """What a step's median time means."""
    tflops = work / seconds / 1e12
    return {"tokens_per_second": tokens / seconds, "tflops": tflops, "mfu": utilization(tflops, device)}


# ---------------------------------------------------------------------------------------------------------
# Is it the same step?


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The loss of each hidden state, in fp32.  hidden (M, D), head (V, D), targets (M) → (M)."""
    logits = F.linear(hidden.detach().float(), head.detach().float())
    return F.cross_entropy(logits, targets, reduction="none")


@cache
@torch.no_grad()
def first_losses(config: GemmaConfig, device: torch.device, tokens: int) -> tuple[Tensor, float]:
    """Losses (M) of the first step's tokens that carry loss, in fp32; and how far bf16 is from them.

    By PyTorch alone, row after row, each computed by itself. How far is a root mean square, in nats.
    """
    def losses(dtype: torch.dtype) -> Tensor:
        model = start(config, device, full=False, fastest=())
        model.compute_dtype = dtype
        model.to(dtype)
        made = []
        for row in rows(tokens, config.vocab_size, seed=0):
            *inputs, targets = pack([row], tokens)[0].to(device)
            made.append(token_losses(model(*inputs), model.head, targets))
        return torch.cat(made)

    exact = losses(torch.float32)
    return exact, rms(losses(torch.bfloat16) - exact)


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def fault(config: GemmaConfig, device: torch.device, tokens: int, first_loss: float,
          of_tokens: Tensor | None = None) -> dict:
    """{"wrong": …} where a first step is not the one that fp32 takes; else nothing.

    A way in bf16 may be three times as far from fp32 as the model in bf16 is, token by token; so may the mean
    over tokens, for a mean of errors is at most their root mean square. The mean alone would not do: where
    rows attend to each other, it moves by a hundredth of what the tokens do.
    """
    exact, error = first_losses(config, device, tokens)
    off = {"loss": abs(first_loss - exact.mean().item())}
    if of_tokens is not None:
        off["losses of tokens"] = rms(of_tokens - exact) if of_tokens.shape == exact.shape else float("inf")
    wrong = [f"{what} {far:.2g} nats from fp32" for what, far in off.items() if not far <= 3 * error]
    return {"wrong": f"{', '.join(wrong)}; bf16 explains {3 * error:.2g}"} if wrong else {}


# ---------------------------------------------------------------------------------------------------------
# Peers


@dataclass(frozen=True)
class Peer:
    """A way to train with transformers."""

    attention: str = "sdpa"
    rows: int = 4  # of a padded batch; 0: all rows of the step side by side, without padding
    loss: str = "logits"  # of all tokens in fp32; "trained": of trained ones alone; or a package's fused loss
    compiled: bool = False
    liger: bool = False                     # norms, GeGLU and rotation by Liger's kernels
    bf16_adapters: bool = False             # PEFT keeps them in fp32 unless asked
    full: bool = False                      # every parameter, in bf16 alone
    use_cache: bool = False                 # with a cache transformers lets packed rows attend to each other


PEERS = {
    "transformers + PEFT, eager, 4 rows, as NeMo's recipe": Peer("eager", bf16_adapters=True),
    "transformers + PEFT, 4 rows": Peer(),
    "transformers + PEFT, 16 rows": Peer(rows=16),
    "transformers + PEFT, 16 rows, bf16 adapters": Peer(rows=16, bf16_adapters=True),
    "transformers + PEFT, 16 rows, compiled": Peer(rows=16, compiled=True),
    "transformers + PEFT, 16 rows, logits of trained tokens": Peer(rows=16, loss="trained"),
    "Liger + PEFT, 16 rows": Peer(rows=16, loss="liger_kernel", liger=True),
    "packed, FlexAttention, logits of trained tokens, compiled": Peer("flex_attention", 0, "trained",
                                                                      compiled=True, bf16_adapters=True),
    "packed, FlexAttention, Liger, CCE, compiled": Peer("flex_attention", 0, "cut_cross_entropy", True,
                                                        liger=True, bf16_adapters=True),
    "every parameter: transformers, 4 rows": Peer(full=True),
    "every parameter: packed, FlexAttention, logits of trained tokens, compiled": Peer("flex_attention", 0,
                                                                                       "trained", True,
                                                                                       full=True),
}
FEW_PEERS = ("transformers + PEFT, 4 rows", "transformers + PEFT, 16 rows, logits of trained tokens",
             "packed, FlexAttention, logits of trained tokens, compiled",
             "transformers + PEFT, eager, 4 rows, as NeMo's recipe")    # in this order, where time is short
# run anywhere
SMALL_PEERS = {"padded": Peer("eager"), "packed": Peer(rows=0, loss="trained"), "full": Peer(loss="trained",
                                                                                             full=True)}


def peer(config: GemmaConfig, args: argparse.Namespace, tokens: int, way: Peer) -> dict:
    """transformers, with PEFT unless every parameter is trained, from the same weights and adapters as ours.
    """
    from peft import PeftModel
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.models.gemma3 import modeling_gemma3
    device, usual_rotation = torch.device(args.device), modeling_gemma3.apply_rotary_pos_emb
    torch.compiler.reset()          # compiled peers share code, of which torch.compile keeps eight variants
    gc.collect()
    shape = {key: value for key, value in asdict(config).items() if not key.startswith("rope")}
    shape |= {"layer_types": list(config.layer_types),
              "query_pre_attn_scalar": int(config.query_pre_attn_scalar)}
    with device:  # its own random weights take long on a CPU
        base = Gemma3ForCausalLM(Gemma3TextConfig(**shape, attn_implementation=way.attention))
    mine = start(config, torch.device("cpu"), full=True)
    base.load_state_dict(mine.state_dict(), strict=False)  # but for lm_head, which is tied
    base = base.to(device, torch.bfloat16).train()
    try:
        if way.liger:
            from liger_kernel.transformers import apply_liger_kernel_to_gemma3_text
            apply_liger_kernel_to_gemma3_text(fused_linear_cross_entropy=False, model=base)
        if not way.full:
            wrap(mine, LoRAConfig(), torch.Generator().manual_seed(0))
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(mine, "base", Path(folder))
                # changes base
                PeftModel.from_pretrained(base, folder, is_trainable=True,
                                          autocast_adapter_dtype=not way.bf16_adapters)
        parameters = [p for p in base.parameters() if p.requires_grad]
        run = torch.compile(base.model) if way.compiled else base.model
        optimizer = torch.optim.AdamW(parameters, lr=1e-5 if way.full else 1e-3, fused=True)
        examples = [rows(tokens, config.vocab_size, seed) for seed in range(4)]
        steps = [[padded(some[first:first + way.rows], device) if way.rows else packed(some, device)
                  # there before time counts
                  for first in range(0, len(some), way.rows or len(some))] for some in examples]

        work = flops(mine, pack(examples[0], tokens)[0])
        first = []                                                      # losses of the first step's tokens

        def step(i: int) -> tuple[Tensor, Tensor]:
            total, trained = torch.zeros((), device=device), sum(row.loss_tokens
                                                                 for row in examples[i % len(examples)])
            for one in steps[i % len(steps)]:
                batch = dict(one)
                labels = batch.pop("labels")[:, 1:]
                hidden = run(**batch, use_cache=way.use_cache).last_hidden_state[:, :-1]
                if i == 0:
                    carrying = labels != -100
                    first.append(token_losses(hidden[carrying], base.lm_head.weight, labels[carrying]))
                loss = peer_loss(way.loss, hidden, base.lm_head.weight, labels) / trained
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total, norm

        made = timed(step, max(2, args.steps // 4), device)
    finally:
        modeling_gemma3.apply_rotary_pos_emb = usual_rotation  # Liger puts its own there for all models
    wrong = fault(config, device, tokens, made["losses"][0], torch.cat(first))
    return made | rates(tokens, work, made["seconds"], device) | wrong


def packed(some: list[Example], device: torch.device) -> dict[str, Tensor]:
    """Rows as transformers takes them without padding.

    (1, all their tokens); a row's first token is not to be foreseen.
    """
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
    except Exception as error:  # what cannot run here is recorded, and the others go on
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    config = TINY if args.tiny else GemmaConfig()
    result = conditions(device) | {"steps": args.steps, "tokens": args.tokens}
    result |= {part: earlier(result, args, device).get(part, {}) for part in ("ladder", "sizes", "peers")}

    def measure(part: str, name: str, call: Callable[..., dict], *arguments) -> None:
        """One row of the result, unless it is there."""
        if "seconds" not in result[part].get(name, {}):
            result[part][name] = attempt(partial(call, config, args, *arguments), device)
            print(f"{part:7} {name:44}", line(result[part][name]), flush=True)
            keep_result(result, "step", device, args)

    parts = args.parts.split(",")
    for name, (kernels, lora) in LADDER.items() if "ladder" in parts else ():
        measure("ladder", name, ours, args.tokens, False, kernels, lora)
    if "ladder" in parts:
        measure("ladder", "every parameter", ours, args.tokens, True, EVERY, "auto")
    for tokens in () if args.tiny or "sizes" not in parts else SIZES:
        measure("sizes", str(tokens), ours, tokens, False, EVERY, "auto")
    peers = SMALL_PEERS if args.tiny else PEERS
    names = FEW_PEERS if args.few_peers and not args.tiny else peers
    for name, way in ((name, peers[name]) for name in names) if "peers" in parts else ():
        measure("peers", name, peer, args.tokens, way)
    # last: what a failed recording leaves would touch the others
    if device.type == "cuda" and "ladder" in parts:
        for name, full in (("+ CUDA graph", False), ("every parameter, CUDA graph", True)):
            measure("ladder", name, ours, args.tokens, full, EVERY, "auto", True)


def earlier(result: dict, args: argparse.Namespace, device: torch.device) -> dict:
    """With --continue what an earlier call measured on such a device, with the same versions and sizes."""
    file = result_file("step", device, args)
    if not (args.go_on and file and file.exists()):
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    same = all(found[key] == result[key] for key in ("device", "versions", "steps", "tokens"))
    return found if same else {}


def line(made: dict) -> str:
    if "failed" in made:
        return made["failed"]
    mfu = "" if made["mfu"] is None else f" {made['mfu']:5.1%} MFU"
    wrong = f"  WRONG: {made['wrong']}" if "wrong" in made else ""
    speed = f"{made['tokens_per_second']:9.0f} tok/s {made['seconds'] * 1e3:8.1f} ms{mfu}"
    losses = f"loss {made['losses'][0]:.3f} → {made['losses'][-1]:.3f}"
    return f"{speed} {made['peak_gib']:6.2f} GiB, {losses}{wrong}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16_896, help="of a step")
    parser.add_argument("--steps", type=int, default=20, help="measured ones, after up to ten that warm up")
    parser.add_argument("--parts", default="ladder,sizes,peers",
                        help="which of the three to measure, for where time is short")
    parser.add_argument("--few-peers", action="store_true", help="four that stand for all")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="what the result file lacks")
    parser.add_argument("--tiny", action="store_true",
                        help="a small model and few peers, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
