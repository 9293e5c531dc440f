"""GeGLU, the gate of Gemma's MLP: h = gelu(gate) · up, with gelu's tanh form, and its gradients.

    gelu(g) = g σ(2z)    z = √(2/π) (g + 0.044715 g³)         as (1 + tanh z) / 2 = σ(2z)
    gelu'(g) = σ(2z) + 2 g z' σ(2z) (1 − σ(2z))

One pass over memory each way. Only gate and up are saved, and both gradients share one σ; autograd's own
formula also writes and keeps gelu(gate). A CPU takes as many rows at a time as its cache holds. Where
adapters are trained, the linears' kernels end in the same functions and no pass is left (lora_kernels.py).

    M tokens   F width of the MLP

Source: "GLU Variants Improve Transformer" (arXiv 2002.05202); "Gaussian Error Linear Units" (arXiv
1606.08415).
"""
from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.backend import TRITON_DTYPES, pick
from ops.compiled import cache_sized_chunks, maybe_compile
from ops.cpu import build
from ops.triton_utils import can_run, jit, next_power_of_2, tl

SLOPE, CUBIC = 1.5957691216057308, 0.044715         # 2z = SLOPE (g + CUBIC g³), and SLOPE = 2 √(2/π)


# ----------------------------------------------------------------------------------------------------------
# The reference


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, (M, F) each.  The definition; every backend must equal it."""
    return F.gelu(gate, approximate="tanh") * up


# ----------------------------------------------------------------------------------------------------------
# The kernel


@jit
def gelu(gate):
    """gelu(gate), fp32."""
    return gate * tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))  # SLOPE and CUBIC


@jit
def gelu_slope(gate):
    """gelu'(gate), fp32."""
    cubic = 0.044715 * gate * gate
    sigma = tl.sigmoid(1.5957691216057308 * gate * (1 + cubic))
    return sigma + 1.5957691216057308 * gate * (1 + 3 * cubic) * sigma * (1 - sigma)


@jit
def _kernel(gate, up, dh, h, dgate_up, gate_row, up_row, N: tl.constexpr, BLOCK: tl.constexpr,
            VALUE: tl.constexpr, GRADIENT: tl.constexpr):
    """A row of h (N) if VALUE, and of dgate_up = [dgate | dup] (2N) if GRADIENT.

    Rows of gate and up are gate_row and up_row numbers apart.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < N
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    if VALUE:
        tl.store(h + row * N + columns, (gelu(g) * u).to(gate.dtype.element_ty), mask=inside)
    if GRADIENT:
        d = tl.load(dh + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        dgate, dup = d * u * gelu_slope(g), d * gelu(g)
        tl.store(dgate_up + row * (2 * N) + columns, dgate.to(gate.dtype.element_ty), mask=inside)
        tl.store(dgate_up + row * (2 * N) + N + columns, dup.to(gate.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------------------------------
# One pass by each backend: (gate, up, dh or None, whether h is wanted) → (h or None, [dgate | dup] or None)

Pass = tuple[Tensor | None, Tensor | None]


def _outputs(gate: Tensor, dh: Tensor | None, value: bool) -> Pass:
    M, F = gate.shape
    return gate.new_empty(M, F) if value else None, None if dh is None else gate.new_empty(M, 2 * F)


def _by_triton(gate: Tensor, up: Tensor, dh: Tensor | None, value: bool) -> Pass:
    strides_fit = gate.stride(-1) == up.stride(-1) == 1
    if gate.dtype not in TRITON_DTYPES or not strides_fit or not can_run(gate.device):
        raise ValueError('GeGLU\'s backend "triton" takes fp32, bf16, fp16 on the current CUDA device, a '
                         f"row's numbers side by side; got {gate.dtype} on {gate.device}, strides "
                         f"{gate.stride()} and {up.stride()}")
    M, F = gate.shape
    h, dgate_up = _outputs(gate, dh, value)
    dh = None if dh is None else dh.contiguous()
    if M:
        _kernel[(M,)](gate, up, dh, h, dgate_up, gate.stride(0), up.stride(0), N=F, BLOCK=next_power_of_2(F),
                      VALUE=value, GRADIENT=dh is not None)
    return h, dgate_up


def _by_cpp(gate: Tensor, up: Tensor, dh: Tensor | None, value: bool) -> Pass:
    build.check("F a multiple of 16", gate.shape == up.shape and gate.shape[1] % 16 == 0, gate, up)
    h, dgate_up = _outputs(gate, dh, value)
    dh = None if dh is None else dh.contiguous()
    build.call("geglu", gate, up, h, dh, dgate_up, gate.stride(0), up.stride(0), *gate.shape)
    return h, dgate_up


def _by_torch(gate: Tensor, up: Tensor, dh: Tensor | None, value: bool, compiled: bool = False) -> Pass:
    h, dgate_up = _outputs(gate, dh, value)
    dgate, dup = (None, None) if dh is None else dgate_up.chunk(2, dim=1)
    for rows in cache_sized_chunks(gate, compiled):
        if value:
            _write_value(gate[rows], up[rows], h[rows], compiled=compiled)
        if dh is not None:
            _write_gradients(dh[rows], gate[rows], up[rows], dgate[rows], dup[rows], compiled=compiled)
    return h, dgate_up


@maybe_compile
def _write_value(gate: Tensor, up: Tensor, h: Tensor) -> None:
    """Write h, all (M, F)."""
    g = gate.to(torch.promote_types(gate.dtype, torch.float32))
    sigma = g.square().mul_(SLOPE * CUBIC).add_(SLOPE).mul_(g).sigmoid_()
    h.copy_(sigma.mul_(g).mul_(up))


@maybe_compile
def _write_gradients(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write dgate and dup, all (M, F)."""
    g, d = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, dh))
    cubic = g.square().mul_(SLOPE * CUBIC)
    sigma = (cubic + SLOPE).mul_(g).sigmoid_()
    dup.copy_((g * sigma).mul_(d))
    slope = cubic.mul_(3).add_(SLOPE).mul_(g).mul_(torch.addcmul(sigma, sigma, sigma, value=-1)).add_(sigma)
    dgate.copy_(slope.mul_(d).mul_(up))


BACKENDS = {"triton": _by_triton, "cpp": _by_cpp, "compiled": partial(_by_torch, compiled=True),
            "torch": _by_torch}


# ----------------------------------------------------------------------------------------------------------
# The autograd function


class _GeGLU(torch.autograd.Function):
    """Saved are gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return geglu_pass(gate, up, backend=backend)[0]

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor, Tensor, None]:
        return *geglu_gradient(dh, *ctx.saved_tensors, ctx.backend).chunk(2, dim=1), None


# ----------------------------------------------------------------------------------------------------------
# The public functions


def geglu(gate: Tensor, up: Tensor, backend: str = "torch") -> Tensor:
    """gelu(gate) · up, (M, F) each, of one dtype; rows may be further apart (halves of a wider row).

    backend: of `BACKENDS`. Raises ValueError for operands that the backend does not take.
    """
    return _GeGLU.apply(gate, up, backend)


def geglu_gradient(dh: Tensor, gate: Tensor, up: Tensor, backend: str = "torch") -> Tensor:
    """[dgate | dup] = [dh · up · gelu'(gate) | dh · gelu(gate)], (M, 2F), of (M, F) each; else as `geglu`."""
    return geglu_pass(gate, up, dh, value=False, backend=backend)[1]


def geglu_pass(gate: Tensor, up: Tensor, dh: Tensor | None = None, value: bool = True,
               backend: str = "torch") -> Pass:
    """In one pass, without autograd: h (M, F) if `value`, and of dh (M, F), if given, [dgate | dup] (M,
    2F)."""
    return pick(BACKENDS, backend)(gate, up, dh, value)
