"""Attention over documents side by side, ours beside PyTorch's three: forward and backward, checked against
float64 first.

    python benchmarks/attention.py --save                                # on a CUDA device
    TRITON_INTERPRET=1 python benchmarks/attention.py --device cpu --tiny    # anywhere: does every way run, and is it right?

Documents are as long as xLAM's rows, 400 tokens on average; heads are Gemma 3 270M's, four of 256 on one kv
head. Operands are the same, each way's in its own layout, made before the clock starts; so are plans and
masks.

    ours       ops/attention.py by Triton; "ours, PyTorch" by its tiles
    varlen     torch.nn.attention.varlen: FlashAttention with the documents' borders
    flex       FlexAttention, compiled (not on a CPU), with a mask of blocks from documents and window
    padded     scaled_dot_product_attention on rows padded to the longest

FLOPs are of the scores that a query may see, two products forward and five backward; what is computed beyond
does not count.
"""
from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clock import Clock  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

from ops.attention import attention, attention_reference  # noqa: E402
from ops.attention_tables import plan, tables, tile  # noqa: E402
from ops.triton_utils import INTERPRETED, triton  # noqa: E402
from training.host import device_name  # noqa: E402

BOUND = 2e-2                                    # of a relative error; bf16 makes up to 1e-2
NAMES = "o", "dq", "dk", "dv"
PHASES = {"forward": 2, "backward": 5, "both": 7}       # products of a query and a key's size


@dataclass(frozen=True)
class Case:
    """Documents, what they see, and whose attention it is."""

    lengths: Sequence[int]
    window: int | None
    heads: tuple[int, int, int]                 # N, K and H
    dtype: torch.dtype
    device: torch.device
    scale = 1 / 16

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        return sum(min(i + 1, self.window or i + 1) for length in self.lengths for i in range(length))


@dataclass(frozen=True)
class Way:
    """How a way wants (T, heads, H) laid out, the way back, and O of q, k and v so laid out."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    layout: Callable[[Tensor], Tensor] = lambda x: x
    back: Callable[[Tensor], Tensor] = lambda x: x


def ours(case: Case) -> Way:
    interpreted = case.device.type == "cpu"
    return Way(partial(attention, scale=case.scale, plan=tables(case.lengths, case.window, case.device)
                       if interpreted else
                       plan(case.lengths, case.window, case.dtype, case.device, case.heads, backend="triton"),
                       backend="triton"))


def ours_by_pytorch(case: Case) -> Way:
    return Way(partial(attention, scale=case.scale, plan=tile(case.lengths, case.window, case.dtype,
                                                              case.device)))


def varlen(case: Case) -> Way:
    from torch.nn.attention.varlen import varlen_attn
    borders = torch.tensor(np.cumsum([0, *case.lengths]), dtype=torch.int32, device=case.device)
    of = borders, borders, max(case.lengths), max(case.lengths)
    window = (case.window - 1 if case.window else -1, 0)
    # before torch 2.12 unasked
    shared = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return Way(lambda q, k, v: varlen_attn(q, k, v, *of, scale=case.scale, window_size=window, **shared))


def flex(case: Case) -> Way:
    documents = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths)).to(case.device)
    reach, T = case.window or len(documents), len(documents)
    mask = create_block_mask(lambda b, h, i, j: (documents[i] == documents[j]) & (i >= j) & (i - j < reach),
                             None, None, T, T, case.device)
    torch.compiler.reset()
    run = flex_attention if case.device.type == "cpu" else torch.compile(flex_attention, dynamic=False)
    return Way(lambda q, k, v: run(q, k, v, block_mask=mask, scale=case.scale, enable_gqa=True),
               lambda x: x.transpose(0, 1)[None].contiguous(), lambda x: x[0].transpose(0, 1))


def padded(case: Case) -> Way:
    (N, K, _), i = case.heads, torch.arange(max(case.lengths), device=case.device)
    ago = i[:, None] - i
    mask = None if not case.window or case.window >= len(i) else (ago >= 0) & (ago < case.window)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # or a mask would rule the fused kernels out
        k, v = (x.repeat_interleave(N // K, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=case.scale)

    return Way(run, lambda x: pad_sequence(x.split(case.lengths), batch_first=True).transpose(1,
                                                                                              2).contiguous(),
               lambda x: torch.cat([row[:, :length].transpose(0, 1) for row, length in zip(x, case.lengths,
                                                                                           strict=True)]))


WAYS = {"ours": ours, "ours, PyTorch": ours_by_pytorch, "varlen": varlen, "flex": flex, "padded": padded}


def gradients(run: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[Tensor]:
    """O, dQ, dK and dV."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def measure(way: Way, given: Sequence[Tensor], exact: Sequence[Tensor], case: Case, clock: Clock) -> dict:
    """Errors, memory and times of a way; {"wrong": …} of one that is."""
    *inputs, dout = (way.layout(x) for x in given)
    gradients(way.run, inputs, dout)                                                    # compiles and tunes
    got = [way.back(x).double() for x in gradients(way.run, inputs, dout)]
    off = {name: ((mine - right).norm() / right.norm()).item() for name, mine, right in zip(NAMES, got, exact,
                                                                                            strict=True)}
    if not all(error <= BOUND for error in off.values()):
        return {"wrong": ", ".join(f"{name} {error:.1e}" for name, error in off.items())}
    del got
    result = {"errors": off}
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        gradients(way.run, inputs, dout)
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    inputs = [x.detach().requires_grad_() for x in inputs]
    forward, backward = lambda _=None: way.run(*inputs), lambda out: torch.autograd.grad(out, inputs, dout)
    for phase, call, before in (
        ("forward", forward, None),
        ("backward", backward, forward),
        ("both", lambda _: backward(forward()), None),
    ):
        times = clock(call, before)
        result[phase] = times | {
            "tflops": PHASES[phase] * 2 * case.pairs * case.heads[0] * case.heads[2] / times["ms"] / 1e9
        }
    return result


def documents(tokens: int, tiny: bool) -> list[int]:
    """Lengths of documents of together so many tokens."""
    rng, made = np.random.default_rng(0), []
    while (left := tokens - sum(made)) > 0:
        made.append(min(left, int(rng.integers(*((10, 30) if tiny else (150, 650))))))
    return made


def main(args: argparse.Namespace) -> None:
    device, dtype = torch.device(args.device), torch.float32 if INTERPRETED or args.tiny else torch.bfloat16
    clock = Clock(device, seconds=0.05)
    lengths, heads = documents(30 if args.tiny else args.tokens, args.tiny), (4, 1, 16 if args.tiny else 256)
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", None),
                "python": platform.python_version()}
    result = {"device": device_name(device), "versions": versions,
              "dtype": str(dtype).removeprefix("torch."), "heads": heads, "tokens": sum(lengths),
              "documents": len(lengths), "windows": {}}
    print(json.dumps(result), flush=True)
    generator = torch.Generator(device).manual_seed(0)
    given = [torch.randn(sum(lengths), n, heads[2], generator=generator, device=device).to(dtype)
             for n in (*heads[:2], heads[1], heads[0])]
    for window in (8 if args.tiny else 512, None):
        case = Case(lengths, window, heads, dtype, device)
        tiles = tile(lengths, window, torch.float64, device)
        *doubled, dout = (x.double() for x in given)
        exact = gradients(lambda q, k, v, case=case, tiles=tiles: attention_reference(q, k, v, case.scale,
                                                                                      tiles), doubled, dout)
        made = result["windows"][str(window or "full")] = {}
        for name, way in WAYS.items():
            if name in args.without.split(","):
                continue
            try:
                made[name] = measure(way(case), given, exact, case, clock)
            except Exception as error:  # what cannot run here is recorded, and the others go on
                made[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            print(f"window {window or 'full':>5} {name:14}", line(made[name]), flush=True)
            keep_result(result, "attention", device, args)              # at once: time may be short


def line(made: dict) -> str:
    if "both" not in made:
        return next(f"{how.upper()}: {why}" for how, why in made.items())
    return " ".join(f"{phase} {made[phase]['ms']:8.3f} ms {made[phase]['tflops']:5.1f} TFLOP/s"
                    for phase in PHASES) \
        + f" {made.get('peak_mib', 0):.0f} MiB, error {max(made['errors'].values()):.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16_896)
    parser.add_argument("--without", default="", help="ways to leave out, separated by commas")
    parser.add_argument("--tiny", action="store_true",
                        help="30 tokens and small heads in fp32, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
