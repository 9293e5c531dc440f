"""GeGLU, the gate of Gemma's MLP: h = gelu(gate) · up, with gelu's tanh form, and its gradients.

    gelu(g) = g σ(2z)    z = √(2/π) (g + 0.044715 g³)         as (1 + tanh z) / 2 = σ(2z)
    gelu'(g) = σ(2z) + 2 g z' σ(2z) (1 − σ(2z))

One pass over memory each way, with gate and up alone saved and one σ for both gradients: autograd's own formula writes and
keeps gelu(gate) besides. A CPU takes as many rows at a time as its cache holds. Where adapters are trained, the linears' kernels
end in the same functions and no pass is left (lora_kernels.py).

    M tokens   F width of the MLP

Source: "GLU Variants Improve Transformer" (arXiv 2002.05202); "Gaussian Error Linear Units" (arXiv 1606.08415).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.compiled import cache_sized_chunks, maybe_compile
from ops.cpu import build
from ops.triton_utils import can_run, jit, next_power_of_2, tl

STEEP, CUBIC = 1.5957691216057308, 0.044715         # 2z = STEEP (g + CUBIC g³); the first is 2 √(2/π)


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, (M, F) each.  The definition; what follows must equal it."""
    return F.gelu(gate, approximate="tanh") * up


# ---------------------------------------------------------------------------------------------------------------------
# The kernel


@jit
def gelu(gate):
    """gelu(gate), fp32."""
    return gate * tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))          # STEEP and CUBIC


@jit
def gelu_slope(gate):
    """gelu'(gate), fp32."""
    cubic = 0.044715 * gate * gate
    share = tl.sigmoid(1.5957691216057308 * gate * (1 + cubic))
    return share + 1.5957691216057308 * gate * (1 + 3 * cubic) * share * (1 - share)


@jit
def _kernel(gate, up, dh, h, made, gate_row, up_row, N: tl.constexpr, BLOCK: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr):
    """A row of h (N) and of made = [dgate | dup] (2N), each if asked for.  Rows of gate and up lie gate_row and up_row numbers apart."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < N
    g = tl.load(gate + row * gate_row + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=inside, other=0.0).to(tl.float32)
    if VALUE:
        tl.store(h + row * N + columns, (gelu(g) * u).to(gate.dtype.element_ty), mask=inside)
    if GRADIENT:
        d = tl.load(dh + row * N + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(made + row * (2 * N) + columns, (d * u * gelu_slope(g)).to(gate.dtype.element_ty), mask=inside)
        tl.store(made + row * (2 * N) + N + columns, (d * gelu(g)).to(gate.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Where no kernel runs


@maybe_compile
def _value(gate: Tensor, up: Tensor, h: Tensor) -> None:
    """Write h, all (M, F)."""
    g = gate.to(torch.promote_types(gate.dtype, torch.float32))
    share = g.square().mul_(STEEP * CUBIC).add_(STEEP).mul_(g).sigmoid_()
    h.copy_(share.mul_(g).mul_(up))


@maybe_compile
def _gradients(dh: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """Write dgate and dup, all (M, F)."""
    g, d = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, dh))
    steep = g.square().mul_(STEEP * CUBIC)
    share = (steep + STEEP).mul_(g).sigmoid_()
    dup.copy_((g * share).mul_(d))
    slope = steep.mul_(3).add_(STEEP).mul_(g).mul_(torch.addcmul(share, share, share, value=-1)).add_(share)
    dgate.copy_(slope.mul_(d).mul_(up))


# ---------------------------------------------------------------------------------------------------------------------
# The functions


def geglu_pass(gate: Tensor, up: Tensor, dh: Tensor | None = None, value: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """The kernel's one pass: h (M, F), unless not `value`, and of dh (M, F) [dgate | dup] (M, 2F)."""
    M, N = gate.shape
    dh = None if dh is None else dh.contiguous()
    h, made = gate.new_empty(M, N) if value else None, None if dh is None else gate.new_empty(M, 2 * N)
    if M:
        _kernel[(M,)](gate, up, dh, h, made, gate.stride(0), up.stride(0), N=N, BLOCK=next_power_of_2(N), VALUE=value,
                      GRADIENT=dh is not None)
    return h, made


def geglu_gradient(dh: Tensor, gate: Tensor, up: Tensor, by_triton: bool | None = None) -> Tensor:
    """[dgate | dup] = [dh · up · gelu'(gate) | dh · gelu(gate)], (M, 2F), of (M, F) each; arguments as for `geglu`."""
    if _use_triton(by_triton, gate, up):
        return geglu_pass(gate, up, dh, value=False)[1]
    made = dh.new_empty(len(dh), 2 * dh.shape[1])
    if _takes_cpp(gate, up):
        build.call("geglu", gate, up, None, dh.contiguous(), made, gate.stride(0), up.stride(0), *gate.shape)
        return made
    dgate, dup = made.chunk(2, dim=1)
    for rows in cache_sized_chunks(gate):
        _gradients(dh[rows], gate[rows], up[rows], dgate[rows], dup[rows])
    return made


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, by_triton: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.by_triton = by_triton
        if by_triton:
            return geglu_pass(gate, up)[0]
        h = gate.new_empty(gate.shape)
        if _takes_cpp(gate, up):
            build.call("geglu", gate, up, h, None, None, gate.stride(0), up.stride(0), *gate.shape)
            return h
        for rows in cache_sized_chunks(gate):
            _value(gate[rows], up[rows], h[rows])
        return h

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        return *geglu_gradient(dh, *ctx.saved_tensors, ctx.by_triton).chunk(2, dim=1), None


def _takes_cpp(gate: Tensor, up: Tensor) -> bool:
    return gate.shape == up.shape and gate.shape[1] % 16 == 0 and build.takes(gate, up)


def _use_triton(by_triton: bool | None, gate: Tensor, up: Tensor) -> bool:
    takes = gate.dtype != torch.float64 and gate.stride(-1) == up.stride(-1) == 1
    if by_triton and not takes:
        raise ValueError("GeGLU by kernels takes fp32, bf16, fp16, a row's numbers side by side; "
                         f"got {gate.dtype}, strides {gate.stride()} and {up.stride()}")
    return gate.is_cuda and can_run(gate.device) and takes if by_triton is None else by_triton


def geglu(gate: Tensor, up: Tensor, by_triton: bool | None = None) -> Tensor:
    """gelu(gate) · up, (M, F) each, of one dtype; rows may lie further apart (halves of a wider one).

    by_triton: whether the kernel computes it (default: on a CUDA device).
    """
    return _GeGLU.apply(gate, up, _use_triton(by_triton, gate, up))
