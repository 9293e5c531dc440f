"""A step's operations on random tensors, by kernel and by definition: for correctness.py and floors.py."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from lora_kernels import (  # noqa: E402
    BY_PYTORCH,
    BY_TRITON,
    Choice,
    lora_linear_reference,
    lora_linears,
    lora_mlp,
    lora_mlp_reference,
)
from ops.attention import attention, attention_reference  # noqa: E402
from ops.attention_tables import plan, tables, tile  # noqa: E402
from ops.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference  # noqa: E402
from ops.geglu import geglu, geglu_reference  # noqa: E402
from ops.rms_norm import rms_norm, rms_norm_reference, rotate  # noqa: E402

SCALE = 1.5             # of the adapters


@dataclass(frozen=True)
class Sizes:
    """Shapes, named as in model.py: M rows that carry loss of T tokens."""

    T: int = 16_896
    M: int = 1_710
    V: int = 262_144
    D: int = 640
    F: int = 2_048
    heads: tuple[int, int, int] = (4, 1, 256)
    R: int = 16
    window: int = 512
    long: int = 600             # tokens of a document, about


TINY = Sizes(T=70, M=9, V=1_100, D=32, F=48, heads=(4, 1, 16), R=4, window=8, long=30)


@dataclass(frozen=True)
class Case:
    """An operation on tensors: the kernels' and its definition, which give one output or several.

    trained: the names of the tensors that get a gradient. definition_in_64: the definition for float64 where
    that needs other code.
    """

    kernel: Callable[..., Tensor | Sequence[Tensor]]
    definition: Callable[..., Tensor | Sequence[Tensor]]
    tensors: dict[str, Tensor]
    trained: Sequence[str]
    definition_in_64: Callable[..., Tensor | Sequence[Tensor]] | None = None


class Draw:
    """Random tensors of a dtype on a device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __call__(self, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, `size` times the unit, that are exact in the dtype, then kept in another."""
        return (torch.randn(shape, device=self.device) * size).to(self.dtype).to(dtype or self.dtype)


# ---------------------------------------------------------------------------------------------------------
# The cases: (draw, sizes) → Case


def norm(draw: Draw, s: Sizes, trained: bool = False, residual: bool = False) -> Case:
    tensors = {"x": draw(s.T, s.D, size=3), "weight": draw(s.D, dtype=torch.float32 if trained else None)}
    if residual:
        tensors["residual"] = draw(s.T, s.D)

    def kernel(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, 1e-6, residual, backend="triton")

    def definition(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        y = rms_norm_reference(x, weight, 1e-6)
        return y if residual is None else residual + y

    return Case(kernel, definition, tensors, ["x", *["weight"] * trained, *["residual"] * residual])


def rotated_norm(draw: Draw, s: Sizes) -> Case:
    """The query heads, which are a part of wider rows."""
    N, K, H = s.heads
    angles = torch.rand(s.T, 1, H // 2, device=draw.device).mul(6).repeat(1, 1, 2)
    tensors = {"qkv": draw(s.T, (N + 2 * K) * H), "weight": draw(H),
               "cos": angles.cos().to(draw.dtype), "sin": angles.sin().to(draw.dtype)}

    def queries(qkv: Tensor) -> Tensor:
        return qkv[:, :N * H].view(s.T, N, H)

    def kernel(qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rms_norm(queries(qkv), weight, 1e-6, rope=(cos, sin), backend="triton")

    def definition(qkv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(rms_norm_reference(queries(qkv), weight, 1e-6), cos, sin)

    return Case(kernel, definition, tensors, ["qkv"])


def gate(draw: Draw, s: Sizes) -> Case:
    return Case(lambda wide: geglu(*wide.chunk(2, 1), backend="triton"),
                lambda wide: geglu_reference(*wide.chunk(2, 1)), {"wide": draw(s.T, 2 * s.F)}, ["wide"])


def adapted(draw: Draw, name: str, O: int, I: int, R: int) -> dict[str, Tensor]:
    """A linear's weight, A and B by name; adapters are kept in fp32."""
    return {f"{name} weight": draw(O, I, size=I**-0.5),
            f"{name} A": draw(R, I, size=I**-0.5, dtype=torch.float32),
            f"{name} B": draw(O, R, size=R**-0.5, dtype=torch.float32)}


def linears(draw: Draw, s: Sizes, inputs: int, outputs: Sequence[int], choice: Choice) -> Case:
    """Adapted linears that share x."""
    tensors = {"x": draw(s.T, inputs)}
    for i, O in enumerate(outputs):
        tensors |= adapted(draw, str(i), O, inputs, s.R)

    def triples(of: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return [of[i:i + 3] for i in range(0, len(of), 3)]

    return Case(lambda x, *of: lora_linears(x, triples(of), SCALE, choice=choice),
                lambda x, *of: [lora_linear_reference(x, *linear, SCALE) for linear in triples(of)],
                tensors, [name for name in tensors if "weight" not in name])


def mlp(draw: Draw, s: Sizes, choice: Choice) -> Case:
    """gate and up with GeGLU in the forward kernel, down with its gradient in the input gradient's kernel."""
    tensors = {"x": draw(s.T, s.D), **adapted(draw, "gate", s.F, s.D, s.R),
               **adapted(draw, "up", s.F, s.D, s.R), **adapted(draw, "down", s.D, s.F, s.R)}
    return Case(lambda x, *of: lora_mlp(x, of[:3], of[3:6], of[6:], SCALE, choices=(choice, choice)),
                lambda x, *of: lora_mlp_reference(x, of[:3], of[3:6], of[6:], SCALE),
                tensors, [name for name in tensors if "weight" not in name])


def packed_attention(draw: Draw, s: Sizes, local: bool, layout: str, lengths: Sequence[int] = ()) -> Case:
    """Of documents laid out so, or of these lengths."""
    lengths, starts = (list(lengths), None) if lengths else LAYOUTS[layout](s)
    N, K, H = s.heads
    T, window, scale = sum(lengths), s.window if local else None, H**-0.5
    if draw.device.type == "cpu":               # for the interpreter: `plan` is for PyTorch there
        kernels = tables(lengths, window, draw.device, starts)
    else:
        kernels = plan(lengths, window, draw.dtype, draw.device, s.heads, starts, backend="triton")

    def definition(dtype: torch.dtype) -> Callable[..., Tensor]:
        tiles = tile(lengths, window, dtype, draw.device, starts)
        return lambda q, k, v: attention_reference(q, k, v, scale, tiles)

    return Case(lambda q, k, v: attention(q, k, v, scale, kernels, "triton"), definition(draw.dtype),
                {"q": draw(T, N, H), "k": draw(T, K, H), "v": draw(T, K, H)}, ["q", "k", "v"],
                definition(torch.float64))


def documents(s: Sizes) -> tuple[list[int], None]:
    """Documents of T tokens together, from a fourth of a long one's length to all of it."""
    lengths: list[int] = []
    while (left := s.T - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(s.long // 4, s.long + 1, ()))))
    return lengths, None


# Lengths of documents, and the position each begins with where it continues another.
LAYOUTS: dict[str, Callable[[Sizes], tuple[list[int], list[int] | None]]] = {
    "packed": documents,
    "ragged": lambda s: ([1, s.window - 1, s.window, s.window + 1, 2, 3 * s.window + 5, 63, 64, 65], None),
    "shared prefix": lambda s: ([2 * s.long, 40, 1, s.long, 70, 9, 30],
                                [0, 2 * s.long, 2 * s.long, s.long, 2 * s.long, 0, 9]),
}


def head(draw: Draw, s: Sizes, trained: bool, idle: float = 0.2) -> Case:
    """Cross-entropy. idle: the share of rows that carry no loss."""
    targets = torch.randint(s.V, (s.M,), device=draw.device)
    targets[torch.rand(s.M, device=draw.device) < idle] = IGNORE
    weight = draw(s.V, s.D, size=2 * s.D**-0.5, dtype=torch.float32 if trained else None)

    def in_64(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")

    return Case(lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, backend="triton"),
                lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, targets),
                {"hidden": draw(s.M, s.D), "weight": weight}, ["hidden", *["weight"] * trained], in_64)


def lora_groups(s: Sizes) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Inputs and outputs of the linears that share an input."""
    N, K, H = s.heads
    return {"qkv": (s.D, (N * H, K * H, K * H)), "o": (N * H, (s.D,)), "gate, up": (s.D, (s.F, s.F)),
            "down": (s.F, (s.D,))}


def lora_group(draw: Draw, s: Sizes, name: str, choice: Choice) -> Case:
    return linears(draw, s, *lora_groups(s)[name], choice)


def cases() -> Iterator[tuple[str, Callable[[Draw, Sizes], Case]]]:
    """Every case by its name, to be made when it is wanted."""
    yield "norm", norm
    yield "norm, trained weight", partial(norm, trained=True)
    yield "norm + residual", partial(norm, residual=True)
    yield "q norm + rotation", rotated_norm
    yield "GeGLU", gate
    for way, choice in (("", BY_TRITON), (" by PyTorch", BY_PYTORCH)):
        for group in lora_groups(TINY):
            yield f"LoRA {group}{way}", partial(lora_group, name=group, choice=choice)
        yield f"LoRA MLP{way}", partial(mlp, choice=choice)
    for layout in LAYOUTS:
        for kind, local in (("local", True), ("global", False)):
            yield f"attention, {kind}, {layout}", partial(packed_attention, local=local, layout=layout)
    yield "cross-entropy, frozen head", partial(head, trained=False)
    yield "cross-entropy, trained head", partial(head, trained=True)
