"""Each kernel alone at a LoRA step's shapes, beside its floor: the time that its bytes and products take.

    python benchmarks/floors.py --save                                      # on a CUDA device
    TRITON_INTERPRET=1 python benchmarks/floors.py --device cpu --tiny      # anywhere: does everything run?

Bytes are the fewest: each input read once and each output written once. Products are those of the
definition. The floor is the longer of the two times, at the speed of a large copy and a large product
measured here. "count" is how often a step launches the kernel; what follows attention in the last layer sees
the rows that carry loss alone. LoRA's operations are timed by kernel and by PyTorch, of which
`--kernels auto` takes the faster. The tiles that the autotuner chose are listed.
"""
from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import kernel_cases as make  # noqa: E402
from clock import Clock, conditions  # noqa: E402
from kernel_cases import TINY, Case, Draw, Sizes  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

import lora_kernels  # noqa: E402

LAYERS, GLOBAL_LAYERS = 18, 3
KERNEL_FILES = ("ops.attention", "lora_kernels", "ops.cross_entropy", "ops.rms_norm", "ops.geglu")


@dataclass(frozen=True)
class Work:
    """How often a step does an operation, and the least it takes: numbers moved and FLOPs."""

    count: float
    numbers: float
    flops: float = 0


def pairs(lengths: list[int], window: int | None) -> int:
    """Of a query and a key that it sees."""
    return sum(min(i + 1, window or i + 1) for length in lengths for i in range(length))


def late_layers(s: Sizes) -> float:
    """How many layers compute what follows attention, the last one for the rows that carry loss alone."""
    return LAYERS - 1 + s.M / s.T


def timed_cases(draw: Draw, s: Sizes) -> dict[str, tuple[Callable[[], Case], dict[str, Work]]]:
    """What a step computes by one function of ours, and its work by direction; LoRA's linears apart.

    The first layer's norm has no backward pass. The key heads' norm counts as the part of the query heads'
    that it is. Cross-entropy does all in its forward pass.
    """
    x, q, k = s.T * s.D, s.T * s.heads[0] * s.heads[2], s.T * s.heads[1] * s.heads[2]
    late, norms = late_layers(s), LAYERS + late_layers(s) + s.M / s.T
    of_heads = LAYERS * (1 + s.heads[1] / s.heads[0])
    lengths, _ = make.documents(s)

    def attention(local: bool) -> tuple[Callable[[], Case], dict[str, Work]]:
        count = LAYERS - GLOBAL_LAYERS if local else GLOBAL_LAYERS
        product = 2 * s.heads[0] * s.heads[2] * pairs(lengths, s.window if local else None)
        return (lambda: make.packed_attention(draw, s, local, "packed", lengths),
                {"forward": Work(count, 2 * q + 2 * k, 2 * product),
                 "backward": Work(count, 4 * q + 4 * k, 5 * product)})

    return {
        "norm": (lambda: make.norm(draw, s),
                 {"forward": Work(norms, 2 * x), "backward": Work(norms - 1, 3 * x)}),
        "norm + residual": (lambda: make.norm(draw, s, residual=True),
                            {"forward": Work(2 * late, 3 * x), "backward": Work(2 * late, 3 * x)}),
        "q norm + rotation": (lambda: make.rotated_norm(draw, s),
                              {"forward": Work(of_heads, 2 * q), "backward": Work(of_heads, 3 * q)}),
        "attention, local": attention(local=True),
        "attention, global": attention(local=False),
        "cross-entropy": (lambda: make.head(draw, s, trained=False, idle=0),
                          {"forward": Work(1, 2 * s.M * s.D + s.V * s.D, 4 * s.M * s.V * s.D)}),
    }


def lora_work(s: Sizes, group: str, I: int, O: int) -> dict[str, Work]:
    """Of each operation of a group; the first layer needs no gradient of its input.

    GeGLU writes h beside gate and up. Its gradient is a part of down's input gradient, which reads gate
    and up and writes their gradients in place of h's.
    """
    count, product = LAYERS if group == "qkv" else late_layers(s), 2 * s.T * I * O
    written = s.T * O // 2 if group == "gate, up" else 0
    of_geglu = 3 * s.T * I if group == "down" else 0
    return {"forward": Work(count, s.T * (I + O) + I * O + written, product),
            "input_gradient": Work(count - (group == "qkv"), s.T * (O + I) + I * O + of_geglu, product),
            "sums": Work(count, s.T * (I + O))}


class Table:
    """Rows of the result, printed as they come and kept at once."""

    def __init__(self, args: argparse.Namespace, draw: Draw) -> None:
        self.args, self.device, self.clock = args, draw.device, Clock(draw.device, args.milliseconds / 1e3)
        self.flops, self.bytes = self.clock.ceilings(draw.device, draw.dtype)           # a millisecond
        self.size = torch.finfo(draw.dtype).bits // 8
        self.result = conditions(draw.device) | {
            "dtype": str(draw.dtype).removeprefix("torch."), "tiny": args.tiny, "kernels": {},
            "peak_tflops": self.flops / 1e9, "peak_gb_a_second": self.bytes / 1e6}
        print(f"{self.flops / 1e9:.0f} TFLOP/s, {self.bytes / 1e6:.0f} GB/s")

    def add(self, name: str, work: Work, measure: Callable[[], dict[str, dict]]) -> None:
        """measure: times by way (`Clock`), of which the fastest counts."""
        floor = max(work.numbers * self.size / self.bytes, work.flops / self.flops)
        made = {"count": work.count, "floor_ms": floor}
        try:
            ways = measure()
            made["ways"] = {way: times["ms"] for way, times in ways.items()}
            made |= min(ways.values(), key=lambda times: times["ms"])
            by = ", ".join(f"{way} {ms * 1e3:.1f}" for way, ms in made["ways"].items())
            print(f"{name:28} {made['ms'] * 1e3:8.1f} µs, floor {made['floor_ms'] * 1e3:7.1f} "
                  f"({made['floor_ms'] / made['ms']:4.0%}), host {made.get('host_ms', 0) * 1e3:5.0f}, "
                  f"× {work.count:.1f}  {by}", flush=True)
        except Exception as error:                              # what fails is recorded, and the others go on
            made["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"{name:28} FAILED: {made['failed']}", flush=True)
        self.result["kernels"][name] = made
        self.keep()

    def keep(self) -> None:
        keep_result(self.result, "floors", self.device, self.args)


def time_case(table: Table, name: str, make_case: Callable[[], Case], work: dict[str, Work]) -> None:
    def forward(_: object = None) -> Tensor:
        return case.kernel(*leaves)

    def forward_and_dout() -> tuple[Tensor, Tensor]:
        out = forward()
        return out, torch.randn_like(out)

    def backward(state: tuple[Tensor, Tensor]) -> object:
        return torch.autograd.grad(state[0], wanted, state[1])

    case = make_case()
    leaves = [x.requires_grad_(key in case.trained) for key, x in case.tensors.items()]
    wanted = [x for x in leaves if x.requires_grad]
    table.add(f"{name}, forward", work["forward"], lambda: {"kernel": table.clock(forward)})
    if "backward" in work:
        table.add(f"{name}, backward", work["backward"],
                  lambda: {"kernel": table.clock(backward, forward_and_dout)})


def time_lora(table: Table, draw: Draw, s: Sizes, group: str) -> None:
    (inputs, outputs), ends = make.lora_groups(s)[group], {"gate, up": "gated", "down": "gate"}.get(group, "")
    operations = lora_kernels.operations(s.T, inputs, outputs, s.R, draw.dtype, draw.device, ends)
    for operation, work in lora_work(s, group, inputs, sum(outputs)).items():
        def measure(run: Callable[[bool], object] = operations[operation]) -> dict[str, dict]:
            return {"kernel": table.clock(lambda _: run(True)), "PyTorch": table.clock(lambda _: run(False))}

        table.add(f"LoRA {group}, {operation.replace('_', ' ')}", work, measure)


def chosen_tiles() -> list[str]:
    """What the autotuner took for each kernel and key so far."""
    lines = []
    for file in KERNEL_FILES:
        for name, kernel in vars(importlib.import_module(file)).items():
            for key, config in getattr(kernel, "cache", {}).items() if hasattr(kernel, "configs") else ():
                lines.append(f"{file.removesuffix('_kernels')}{name.removesuffix('_kernel')} {key}: {config}")
    return lines


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    s = TINY if args.tiny else Sizes()
    draw = Draw(device, torch.float16 if device.type == "cpu" else torch.bfloat16)
    table = Table(args, draw)
    for name, of in timed_cases(draw, s).items():
        time_case(table, name, *of)
    for group in make.lora_groups(s):
        time_lora(table, draw, s, group)
    rows = table.result["kernels"].values()
    table.result |= {"tiles": chosen_tiles(),
                     "step_floor_ms": sum(row["count"] * row["floor_ms"] for row in rows),
                     "step_kernels_ms": sum(row["count"] * row["ms"] for row in rows if "ms" in row)}
    table.keep()
    print("\n".join(table.result["tiles"]))
    print(f"a LoRA step of {s.T} tokens: kernels {table.result['step_kernels_ms']:.2f} ms, "
          f"floor {table.result['step_floor_ms']:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--milliseconds", type=float, default=20, help="at least so long for each figure")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    add_result_flags(parser)
    main(parser.parse_args())
