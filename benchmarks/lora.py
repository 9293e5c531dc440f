"""The linears of Gemma 3 270M with LoRA adapters, ours beside other ways: forward, backward and memory of a
layer's groups.

    python benchmarks/lora.py --save                                                # on a CUDA device
    TRITON_INTERPRET=1 python benchmarks/lora.py --device cpu --tiny --rows 64      # anywhere: does every way run, and is it right?

A group is what shares an input: qkv, o, gate_up with GeGLU, and mlp, which is gate_up and down. All ways get
the same operands; one whose outputs or gradients are not those of float64 is named and not timed.

    ours               lora_kernels.py by Triton, "ours, PyTorch" by its other choice. GeGLU's gradient ends down's dX in mlp,
                       as in the model, and is a pass of its own in gate_up alone
    unfused            PEFT's way: y + s B(A(x)) linear by linear, x cast to the adapter's dtype; also with bf16 adapters,
                       and those under torch.compile
    addmm_             Unsloth's way: adapters added in place to base products, GeGLU a pass each way, h made again
    shrink-expand      NeMo Automodel's way: a kernel makes s (x Aᵀ) Bᵀ, cuBLAS x Wᵀ, and a third pass adds them
    frozen             the floor, without adapters; "frozen, wide" makes linears that share x one product

The other ways are written here, for comparison. "ms" is a median of the device's own time: before each call
L2 is overwritten for as long as the host needs to queue the call, which is "host_ms". FLOPs are of base and
adapters; bytes are the fewest: operands, results and the gate and up that backward needs, once each.
"""
from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clock import Clock  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

import lora_kernels as kernels  # noqa: E402
from lora_kernels import BY_PYTORCH, BY_TRITON, Adapted, Choice, lora_linear_reference, lora_linears, lora_mlp  # noqa: E402
from ops import geglu as geglu_module  # noqa: E402
from ops.geglu import geglu_gradient, geglu_reference  # noqa: E402
from ops.triton_utils import INTERPRETED, can_run, jit, load_tile, precision, tl, triton, tuned  # noqa: E402
from training.host import device_name  # noqa: E402

SCALE = 1.5                                     # of the adapters
BOUND = 2e-2                                    # of a relative error; bf16 makes up to 1e-2
PHASES = ("forward", "backward", "both")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Group:
    inputs: int
    outputs: tuple[int, ...]                    # of the linears that share x
    gated: bool = False                         # they are gate and up, and GeGLU follows
    down: int = 0                               # outputs of the linear after that

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(outputs, self.inputs) for outputs in self.outputs] + [(self.down,
                                                                        self.outputs[0])] * (self.down > 0)

    @property
    def results(self) -> tuple[int, ...]:
        return (self.down,) if self.down else self.outputs[:1] if self.gated else self.outputs


GROUPS = {"qkv": Group(640, (1024, 256, 256)), "o": Group(1024, (640,)), "gate_up": Group(640, (2048, 2048),
                                                                                          True),
          "mlp": Group(640, (2048, 2048), True, 640)}
TINY = {"qkv": Group(64, (64, 32, 32)), "o": Group(64, (200,)), "gate_up": Group(64, (96, 96), True),
        "mlp": Group(64, (96, 96), True, 64)}


# ------------------------------------------------------------------------------------------------------------
# The kernels of other ways


TILES = [dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, SPAN=4096, num_warps=4, num_stages=4),
         dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, SPAN=4096, num_warps=8, num_stages=3),
         dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, SPAN=512, num_warps=4, num_stages=4),
         dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=128, SPAN=256, num_warps=4, num_stages=3)]


@tuned(TILES, key=("M_BUCKET", "K", "N", "R", "DOWN_R"), fits=lambda **_: True)
@jit
def _shrink_expand_kernel(x, down, up, out, narrow_out, scale, M, M_BUCKET, K: tl.constexpr, N: tl.constexpr,
                          R: tl.constexpr, DOWN_K: tl.constexpr, DOWN_R: tl.constexpr, UP_R: tl.constexpr,
                          UP_N: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                          SPAN: tl.constexpr):
    """out (M, N) = narrow U, narrow (M, R) = s x D;  x (M, K); D (K, R) and U (R, N) by strides.

    A program owns BLOCK_M rows: it multiplies them down once, then up to SPAN of the outputs, BLOCK_N at a
    time. Full tiles have no mask, so that their loads stay wide and asynchronous.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_R: tl.constexpr = R == BLOCK_R
    SPANS: tl.constexpr = (N + SPAN - 1) // SPAN
    span = tl.program_id(0) % SPANS
    rows = (tl.program_id(0) // SPANS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks, ranks, outs = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    x_tiles = x + tl.minimum(rows, M - 1)[:, None] * K + ks[None, :]
    down_tiles = down + ks[:, None] * DOWN_K + ranks[None, :] * DOWN_R
    narrow = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = k + ks < K
        x_tile = load_tile(x_tiles + k, inside[None, :], EVEN_K)
        down_tile = load_tile(down_tiles + k * DOWN_K, inside[:, None] & (ranks < R)[None, :], EVEN_K
                              and EVEN_R)
        narrow = tl.dot(x_tile, down_tile, narrow, input_precision=PRECISION)
    narrow = (narrow * scale).to(x.dtype.element_ty)
    if span == 0:
        tl.store(
            narrow_out + rows[:, None] * R + ranks[None, :],
            narrow,
            mask=(rows < M)[:, None] & (ranks < R)[None, :],
        )
    up_tiles = up + ranks[:, None] * UP_R + outs[None, :] * UP_N
    for n in range(span * SPAN, tl.minimum((span + 1) * SPAN, N), BLOCK_N):
        inside = n + outs < N
        up_tile = load_tile(up_tiles + n * UP_N, (ranks < R)[:, None] & inside[None, :], EVEN_R
                            and N % BLOCK_N == 0)
        tile = tl.dot(narrow, up_tile, input_precision=PRECISION).to(x.dtype.element_ty)
        tl.store(out + rows[:, None] * N + (n + outs)[None, :], tile, mask=(rows < M)[:, None] & inside[None,
                                                                                                        :])


def shrink_expand(x: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """s x D U and s x D."""
    (M, K), (R, N) = x.shape, up.shape
    out, narrow = x.new_empty(M, N), x.new_empty(M, R)
    _shrink_expand_kernel[lambda sizes: (triton.cdiv(M, sizes["BLOCK_M"]) * triton.cdiv(N, sizes["SPAN"]),)](
        x, down, up, out, narrow, SCALE, M, triton.next_power_of_2(M), K=K, N=N, R=R, DOWN_K=down.stride(0),
        DOWN_R=down.stride(1), UP_R=up.stride(0), UP_N=up.stride(1), PRECISION=precision(x.dtype),
        BLOCK_R=max(16, triton.next_power_of_2(R)))
    return out, narrow


def geglu_backend(x: Tensor) -> str:
    """Of the gate, where PyTorch computes the linears."""
    return "triton" if x.is_cuda else "torch"


def geglu_pass(
    gate: Tensor, up: Tensor, dh: Tensor | None = None, again: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """h (M, N), unless not again, and of dh [dgate | dup] (M, 2N): in one pass where Triton runs."""
    return geglu_module.geglu_pass(gate, up, dh, again, "triton" if can_run(gate.device) else "torch")


# ------------------------------------------------------------------------------------------------------------
# The ways: (group, x, its linears) -> results, under autograd


def each(group: Group, x: Tensor, linears: Sequence[Adapted], linear: Callable[..., Tensor]) -> list[Tensor]:
    """Linear by linear."""
    made = [linear(x, *of) for of in linears[:len(group.outputs)]]
    made = [geglu_reference(*made)] if group.gated else made
    return [linear(made[0], *linears[-1])] if group.down else made


def frozen(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x, weight)


def frozen_wide(group: Group, x: Tensor, linears: Sequence[Adapted]) -> Sequence[Tensor]:
    made = F.linear(x, kernels._fused_weight([of[0]
                                              for of in linears[:len(group.outputs)]])).split(group.outputs,
                                                                                              dim=1)
    made = [geglu_reference(*made)] if group.gated else made
    return [F.linear(made[0], linears[-1][0])] if group.down else made


def unfused(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, weight)
    return (y + F.linear(F.linear(x.to(a.dtype), a), b) * SCALE).to(y.dtype)


def ours(group: Group, x: Tensor, linears: Sequence[Adapted], choice: Choice) -> Sequence[Tensor]:
    if group.down:
        return [lora_mlp(x, *linears, SCALE, choices=(choice, choice), geglu_backend=geglu_backend(x))]
    return [OurGateUp.apply(x, linears, choice, *(t for of in linears for t in of[1:]))] if group.gated else \
        lora_linears(x, linears, SCALE, choice=choice)


class OurGateUp(torch.autograd.Function):
    """The first half of lora_kernels._LoRAMLP."""

    @staticmethod
    def forward(ctx, x, linears, choice, *adapters):
        ctx.group, ctx.choice = kernels._group(linears, SCALE, None, len(x)), choice
        weight, a, b = kernels._fused_weight([of[0] for of in linears]), *kernels._low_rank(adapters, None,
                                                                                            x.dtype)
        gate_up, s, h = kernels._forward(x, weight, a, b, ctx.group, choice.forward, gated=True,
                                         geglu_backend=geglu_backend(x))
        ctx.save_for_backward(x, weight, a, b, gate_up, s)
        return h

    @staticmethod
    def backward(ctx, dh):
        x, weight, a, b, gate_up, s = ctx.saved_tensors
        halves = gate_up.chunk(2, dim=1)
        dgate_up = (
            geglu_pass(*halves, dh, again=False)[1]
            if ctx.choice == BY_TRITON
            else geglu_gradient(dh, *halves, geglu_backend(dh))
        )
        dx, t = kernels._input_gradient(dgate_up, weight, a, b, ctx.group, ctx.choice.input_gradient)
        gradients = kernels._adapter_gradients(x, dgate_up, s, t, ctx.group, ctx.choice.sums)
        return dx, None, None, *(gradient.float() for gradient in gradients)


class ShrinkExpand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, a, b):
        a, b = a.to(x.dtype), b.to(x.dtype)
        added, s = shrink_expand(x, a.T, b.T)
        ctx.save_for_backward(x, weight, a, b, s)
        return F.linear(x, weight).add_(added)

    @staticmethod
    def backward(ctx, dy):
        x, weight, a, b, s = ctx.saved_tensors
        added, t = shrink_expand(dy, b, a)
        return (dy @ weight).add_(added), None, (t.T @ x).float(), (dy.T @ s).float()


class Addmm(torch.autograd.Function):
    """A group as one function, whose backward adds up dX in place."""

    @staticmethod
    def forward(ctx, x, group, *tensors):
        linears = Addmm.linears(x, tensors)
        made = y = [Addmm.product(x, *of) for of in linears[:len(group.outputs)]]
        y = [geglu_pass(*made)[0]] if group.gated else y
        y = [Addmm.product(y[0], *linears[-1])] if group.down else y
        ctx.group = group
        ctx.save_for_backward(x, *tensors, *(made if group.gated else ()))
        return tuple(y)

    @staticmethod
    def backward(ctx, *dys):
        group, (x, *tensors), dx, gradients, of_down = ctx.group, ctx.saved_tensors, None, [], []
        linears = Addmm.linears(x, tensors[:3 * len(group.shapes)])
        if group.gated:
            dh, t = Addmm.input_gradient(None, dys[0], *linears[-1]) if group.down else (dys[0], None)
            h, dgate_up = geglu_pass(*tensors[-2:], dh, again=group.down > 0)
            of_down = Addmm.sums(h, dys[0], t, *linears[-1]) if group.down else []
            dys = dgate_up.chunk(2, dim=1)
        for dy, of in zip(dys, linears, strict=False):
            dx, t = Addmm.input_gradient(dx, dy, *of)
            gradients += Addmm.sums(x, dy, t, *of)
        return dx, None, *gradients, *of_down

    @staticmethod
    def linears(x, tensors):
        return [tuple(t.to(x.dtype) for t in tensors[i:i + 3]) for i in range(0, len(tensors), 3)]

    @staticmethod
    def product(x, weight, a, b):
        return (x @ weight.T).addmm_(x @ a.T, b.T, alpha=SCALE)

    @staticmethod
    def input_gradient(dx, dy, weight, a, b):
        t = dy @ b
        return (dy @ weight if dx is None else dx.addmm_(dy, weight)).addmm_(t, a, alpha=SCALE), t

    @staticmethod
    def sums(x, dy, t, weight, a, b):
        return [None, torch.empty_like(a).addmm_(t.T, x, beta=0, alpha=SCALE).float(),
                torch.empty_like(b).addmm_(dy.T, x @ a.T, beta=0, alpha=SCALE).float()]


# What runs it, and its adapters' dtype where it has some.
WAYS = {"ours": (partial(ours, choice=BY_TRITON), torch.float32),
        "ours, PyTorch": (partial(ours, choice=BY_PYTORCH), torch.float32),
        "unfused": (partial(each, linear=unfused), torch.float32),
        "unfused, bf16 adapters": (partial(each, linear=unfused), torch.bfloat16),
        "unfused, bf16, compiled": (partial(each, linear=unfused), torch.bfloat16),
        "addmm_": (lambda group, x, linears: Addmm.apply(x, group, *(t for of in linears for t in of)),
                   torch.float32),
        "shrink-expand": (partial(each, linear=ShrinkExpand.apply), torch.float32),
        "frozen": (partial(each, linear=frozen), None),
        "frozen, wide": (frozen_wide, None)}
BY_KERNEL = "ours", "shrink-expand"             # cannot do without Triton


# ------------------------------------------------------------------------------------------------------------
# Right first, then timed


def operands(
    group: Group, M: int, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Adapted], list[Tensor]]:
    """x (M, I), the linears with fp32 adapters, and the gradients of the results.

    Weights that share x lie below each other.
    """
    generator = torch.Generator(device).manual_seed(M)
    draw = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    weights = [*draw(sum(group.outputs),
                     group.inputs).to(dtype).split(group.outputs)] + [draw(*group.shapes[-1]).to(dtype)]
    linears = [(weight.div_(I**0.5), draw(rank, I) / I**0.5, draw(O, rank) / rank**0.5)
               for weight, (O, I) in zip(weights, group.shapes, strict=False)]
    return draw(M, group.inputs).to(dtype), linears, [draw(M, O).to(dtype)
                                                      for O in group.results]


def leaves(x: Tensor, linears: Sequence[Adapted], adapters: torch.dtype | None) -> tuple[Tensor,
                                                                                         list[Adapted],
                                                                                         list[Tensor]]:
    """x and the linears, which record gradients now, and the list of what gets one."""
    x, linears = x.detach().requires_grad_(), list(linears)
    if adapters is None:
        return x, linears, [x]
    linears = [(weight, *(t.detach().to(adapters).requires_grad_() for t in narrow)) for weight,
               *narrow in linears]
    return x, linears, [x, *(t for _, *narrow in linears for t in narrow)]


def reference(group: Group, x: Tensor, linears: Sequence[Adapted], dys: Sequence[Tensor],
              adapted: bool) -> list[Tensor]:
    """Results and gradients in float64, by the definition."""
    x, linears, wanted = leaves(x.double(), [tuple(t.double() for t in of) for of in linears], torch.float64
                                if adapted else None)
    results = each(group, x, linears, partial(lora_linear_reference, scale=SCALE) if adapted else frozen)
    return [*(y.detach() for y in results), *torch.autograd.grad(results, wanted, [dy.double()
                                                                                   for dy in dys])]


def errors(got: Sequence[Tensor], exact: Sequence[Tensor], results: int) -> dict[str, float]:
    """The largest relative error of y, dx, da and db; NaN where there is one."""
    names, largest = ["y"] * results + ["dx"] + ["da", "db"] * len(got), {}
    for name, mine, right in zip(names, got, exact, strict=False):
        error = ((mine.detach().double() - right).norm() / right.norm()).item()
        largest[name] = largest[name] if error <= largest.get(name, -1.0) else error
    return largest


def measure(run: Callable, compiled: bool, adapters: torch.dtype | None, group: Group, x: Tensor,
            linears: Sequence[Adapted], dys: Sequence[Tensor], exact: Sequence[Tensor], clock: Clock,
            peaks: tuple[float, float]) -> dict:
    """Errors, memory and times of a way; {"wrong": …} of one that is."""
    M, rank = len(x), len(linears[0][1]) if adapters else 0
    x, linears, wanted = leaves(x, linears, adapters)
    if compiled:
        torch.compiler.reset()
    product = lambda x, linears: tuple(run(group, x, linears))  # noqa: E731
    product = torch.compile(product, dynamic=False) if compiled else product
    forward, backward = lambda: product(x, linears), lambda ys: torch.autograd.grad(ys, wanted, dys)
    backward(forward())                                                                 # compiles and tunes
    torch.use_deterministic_algorithms(not compiled, warn_only=True)  # memory nobody wrote is NaN
    ys = forward()
    off = errors([*ys, *backward(ys)], exact, len(ys))
    torch.use_deterministic_algorithms(False)
    if not all(error <= BOUND for error in off.values()):
        return {"wrong": ", ".join(f"{name} {error:.1e}" for name, error in off.items())}
    del ys
    result, work = {"errors": off}, least(group, M, rank, x.element_size())
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        backward(forward())
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    for phase, call, before in (("forward", lambda _: forward(), None), ("backward", backward, forward),
                                ("both", lambda _: backward(forward()), None)):
        times = clock(call, before)
        flops, moved = (amount / times["ms"] for amount in work[phase])
        result[phase] = times | {"tflops": flops / 1e9, "gb_a_second": moved / 1e6,
                                 "of_peak_flops": flops / peaks[0], "of_peak_bytes": moved / peaks[1]}
    return result


def least(group: Group, M: int, rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Of each phase the FLOPs and the fewest bytes."""
    base, narrow = (sum(O * I for O, I in group.shapes), sum(rank * (O + I) for O,
                                                             I in group.shapes))
    ends = sum(group.results) + (sum(group.outputs) if group.gated else 0)
    forward = 2 * M * (base + narrow), size * (M * (group.inputs + ends) + base) + 4 * narrow
    backward = (
        2 * M * (base + 2 * narrow),
        size * (M * (group.inputs * (1 + (rank > 0)) + ends) + base) + 8 * narrow,
    )
    return {"forward": forward, "backward": backward, "both": (forward[0] + backward[0],
                                                               forward[1] + backward[1])}


def main(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
    device, dtype, sizes = torch.device(args.device), DTYPES[args.dtype], args.rows.split(",")
    clock = Clock(device, args.milliseconds / 1e3)
    peaks = clock.ceilings(device, dtype)
    result = {"device": device_name(device),
              "versions": {"torch": torch.__version__, "triton": getattr(triton, "__version__", None),
                           "python": platform.python_version()},
              "dtype": args.dtype, "rank": args.rank, "peak_tflops": peaks[0] / 1e9,
              "peak_gb_a_second": peaks[1] / 1e6, "rows": {}}
    print(json.dumps(result), flush=True)
    for M in sizes:
        result["rows"][M] = {name: {} for name in GROUPS}
        for name, group in (TINY if args.tiny else GROUPS).items():
            given = operands(group, int(M), args.rank, dtype, device)
            exact = {adapted: reference(group, *given, adapted) for adapted in (True, False)}
            for way, (run, adapters) in WAYS.items():
                compiled = way.endswith("compiled")
                if compiled and M not in args.compile_rows.split(","):
                    continue
                try:
                    if way in BY_KERNEL and not can_run(device):
                        raise RuntimeError(f"Triton's kernels do not run on {result['device']}")
                    made = measure(run, compiled, adapters, group, *given, exact[adapters is not None], clock,
                                   peaks)
                except Exception as error:  # what cannot run here is recorded, and the others go on
                    torch.use_deterministic_algorithms(False)
                    made = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
                result["rows"][M][name][way] = made
                print(f"{M:>6} {name:8} {way:24}", line(made), flush=True)
                keep_result(result, "lora", device, args)               # at once: time may be short
    print(summary(sizes[0], result["rows"][sizes[0]]))


def line(made: dict) -> str:
    if "both" not in made:
        return next(f"{how.upper()}: {why}" for how, why in made.items())
    both = made["both"]
    return (" ".join(f"{phase} {made[phase]['ms']:7.3f}"
                     for phase in PHASES) + f" ms (host {both.get('host_ms', 0):.2f}), "
            f"{both['tflops']:.1f} TFLOP/s ({both['of_peak_flops']:.0%}), {both['gb_a_second']:.0f} GB/s "
            f"({both['of_peak_bytes']:.0%}), "
            f"{made.get('peak_mib', 0):.0f} MiB, error {max(made['errors'].values()):.1e}")


def summary(M: str, groups: dict) -> str:
    """Our time over that of others."""
    lines = [f"\nOurs over others at M = {M}: {' / '.join(PHASES)}"]
    for name, ways in groups.items():
        cells = [f"{way} " + " / ".join(f"{ways['ours'][phase]['ms'] / ways[way][phase]['ms']:.2f}"
                                        for phase in PHASES)
                 for way in ("unfused", "addmm_", "shrink-expand", "frozen") if "both" in ways[way]
                 and "both" in ways["ours"]]
        lines.append(f"{name:8} " + "    ".join(cells or ["(not timed)"]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="16896,1024,2048,4096,8192,33792,65536",
                        help="M, separated by commas, in this order")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32" if INTERPRETED else "bf16",
                        help="the interpreter cannot multiply bf16")
    parser.add_argument("--compile-rows", default="16896", help="the M for which torch.compile is tried")
    parser.add_argument("--milliseconds", type=float, default=50, help="at least so long for each figure")
    parser.add_argument("--tiny", action="store_true", help="small linears, to see that everything runs")
    add_result_flags(parser)
    main(parser.parse_args())
