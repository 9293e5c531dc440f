"""RMSNorm, then the residual stream added or queries and keys rotated: what stands between the linears.

    n = x r (1 + w)                  r = 1 / √(mean(x²) + ε)      y = n,  or  residual + n,  or  rotate(n)
    dn = dy, or dy rotated back      g = dn (1 + w)
    dx = r (g − x r · mean(g · x r))      dw = Σ over rows dn · x r

x also goes past the norm, into the residual stream. With `return_input` it is returned along with y, and its
gradient there, dskip, is added to dx before dx is rounded: one pass over memory less than autograd's sum of
the two.

Saved for the backward pass are x, which is kept anyway, and r, one number a row; autograd alone would keep x
three times in fp32. All of it is fp32 inside and rounded once.

    rows (…, D), normalised over D;  with a rotation rows are (T, heads, D) and the tables (T, 1, D)

Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467); "RoFormer" (arXiv 2104.09864); Gemma scales
by 1 + w.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ops.backend import TRITON_DTYPES, pick
from ops.compiled import cache_sized_chunks, maybe_compile
from ops.cpu import build
from ops.triton_utils import can_run, cdiv, jit, next_power_of_2, tl

PROGRAMS = 512          # of a backward pass with a trained weight: each sums dw over its rows

Rope = tuple[Tensor, Tensor] | None     # cosines and sines, (T, 1, D) each


# ----------------------------------------------------------------------------------------------------------
# The references


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x r (1 + w) over the last axis, in fp32, rounded once to x's dtype.  x (…, D), weight (D).  The
    definition."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * (1.0 + weight.to(x32.dtype))).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: pairs (x[i], x[i + H/2]) turned by their angle.  x (T, heads, H), cos and
    sin (T, 1, H)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


# ----------------------------------------------------------------------------------------------------------
# The kernels.  A row is taken in two halves, low and high, which a rotation turns into each other. A row of x
# is at (row // HEADS) · stride_t + (row % HEADS) · D, so that q and k are read where they are.


@jit
def _halves(row, columns, mask, D: tl.constexpr):
    """The halves of rows, fp32."""
    return (tl.load(row + columns[None, :], mask=mask, other=0.0).to(tl.float32),
            tl.load(row + D // 2 + columns[None, :], mask=mask, other=0.0).to(tl.float32))


@jit
def _store_halves(row, columns, low, high, mask, D: tl.constexpr):
    tl.store(row + columns[None, :], low.to(row.dtype.element_ty), mask=mask)
    tl.store(row + D // 2 + columns[None, :], high.to(row.dtype.element_ty), mask=mask)


@jit
def _forward_kernel(x, w, residual, cos, sin, y, r, eps, stride_t, M, HEADS: tl.constexpr, D: tl.constexpr,
                    BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, ADD: tl.constexpr, ROTATE: tl.constexpr):
    """y and r of BLOCK_M rows.

    x by strides, the others row-major: y, residual (M, D), r (M) fp32, tables (M / HEADS, D).
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_H)
    mask = (rows < M)[:, None] & (columns < D // 2)[None, :]
    low, high = _halves(x + (rows // HEADS * stride_t + rows % HEADS * D)[:, None], columns, mask, D)
    scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / D + eps)
    w_low, w_high = _halves(w, columns, (columns < D // 2)[None, :], D)
    low, high = low * scale[:, None] * (1.0 + w_low), high * scale[:, None] * (1.0 + w_high)
    if ADD:
        add_low, add_high = _halves(residual + rows[:, None] * D, columns, mask, D)
        low, high = low + add_low, high + add_high
    if ROTATE:
        angles = (rows // HEADS)[:, None] * D + columns[None, :]        # both halves of a table are the same
        c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
        low, high = low * c - high * s, high * c + low * s
    _store_halves(y + rows[:, None] * D, columns, low, high, mask, D)
    tl.store(r + rows, scale, mask=rows < M)


@jit
def _backward_kernel(x, w, cos, sin, dy, dskip, r, dx, dw, stride_t, M, rows_a_program, HEADS: tl.constexpr,
                     D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, ADD: tl.constexpr,
                     ROTATE: tl.constexpr, WEIGHT: tl.constexpr):
    """dx (M, D) of a program's rows, BLOCK_M at a time, and their sum for dw: a row of dw (programs, D) fp32.

    rows_a_program is a multiple of BLOCK_M. Where the weight is frozen there is nothing to add up, and it is
    BLOCK_M.
    """
    columns = tl.arange(0, BLOCK_H)
    w_low, w_high = _halves(w, columns, (columns < D // 2)[None, :], D)
    start = tl.program_id(0).to(tl.int64) * rows_a_program
    dw_low, dw_high = tl.zeros((1, BLOCK_H), tl.float32), tl.zeros((1, BLOCK_H), tl.float32)
    for first in range(0, rows_a_program if WEIGHT else BLOCK_M, BLOCK_M):
        rows = start + first + tl.arange(0, BLOCK_M)
        inside = rows < M
        mask = inside[:, None] & (columns < D // 2)[None, :]
        low, high = _halves(dy + rows[:, None] * D, columns, mask, D)
        if ROTATE:
            angles = (rows // HEADS)[:, None] * D + columns[None, :]
            c = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
            s = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
            low, high = low * c + high * s, high * c - low * s
        scale = tl.load(r + rows, mask=inside, other=0.0)[:, None]
        x_low, x_high = _halves(x + (rows // HEADS * stride_t + rows % HEADS * D)[:, None], columns, mask, D)
        x_low, x_high = x_low * scale, x_high * scale
        if WEIGHT:
            dw_low += tl.sum(low * x_low, 0, keep_dims=True)
            dw_high += tl.sum(high * x_high, 0, keep_dims=True)
        low, high = low * (1.0 + w_low), high * (1.0 + w_high)
        projection = ((tl.sum(low * x_low, 1) + tl.sum(high * x_high, 1)) / D)[:, None]
        low, high = scale * (low - x_low * projection), scale * (high - x_high * projection)
        if ADD:
            skip_low, skip_high = _halves(dskip + rows[:, None] * D, columns, mask, D)
            low, high = low + skip_low, high + skip_high
        _store_halves(dx + rows[:, None] * D, columns, low, high, mask, D)
    if WEIGHT:
        mask = (columns < D // 2)[None, :]
        _store_halves(dw + tl.program_id(0) * D, columns, dw_low, dw_high, mask, D)


# ----------------------------------------------------------------------------------------------------------
# Forward and backward by each backend
#
# forward (x, weight, eps, residual, rope) → (y, r), and backward (x, weight, rope, dy, dskip, r, whether dw
# is wanted) → (dx, dw or None). r and dw are fp32.


def _sizes(x: Tensor) -> dict:
    """Where the rows of x (M, D) or (T, heads, D) are, for the kernels."""
    BLOCK_H = next_power_of_2(x.shape[-1] // 2)
    return {"HEADS": x.shape[1] if x.dim() == 3 else 1, "D": x.shape[-1], "BLOCK_H": BLOCK_H,
            "BLOCK_M": max(1, 1024 // BLOCK_H)}


def _check_triton(x: Tensor, *others: Tensor | None) -> None:
    others = [other for other in others if other is not None]
    contiguous = all(other.is_contiguous() for other in others)
    if x.dtype not in TRITON_DTYPES or not contiguous or not can_run(x.device):
        raise ValueError('RMSNorm\'s backend "triton" takes fp32, bf16, fp16 on the current CUDA device, and '
                         f"weight, residual and tables contiguous; got {x.dtype} on {x.device}, strides "
                         f"{[other.stride() for other in others]}")
    if not _rows_fit(x) or x.shape[-1] % 2:
        raise ValueError("RMSNorm takes (M, D) or (T, heads, D), D even and a token's heads side by side; "
                         f"got {tuple(x.shape)}, strides {x.stride()}")


def _rows_fit(x: Tensor) -> bool:
    """Whether x is (M, D) or (T, heads, D), where each token's heads are side by side."""
    return x.dim() in (2, 3) and x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])


def _forward_by_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None,
                       rope: Rope) -> tuple[Tensor, Tensor]:
    cos, sin = rope or (None, None)
    _check_triton(x, weight, residual, cos, sin)
    sizes, M = _sizes(x), x.numel() // x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if M:
        _forward_kernel[(cdiv(M, sizes["BLOCK_M"]),)](
            x, weight, residual, cos, sin, y, r, eps, x.stride(0), M, **sizes, ADD=residual is not None,
            ROTATE=rope is not None)
    return y, r


def _backward_by_triton(x: Tensor, weight: Tensor, rope: Rope, dy: Tensor, dskip: Tensor | None, r: Tensor,
                        need_weight: bool) -> tuple[Tensor, Tensor | None]:
    sizes, M = _sizes(x), x.numel() // x.shape[-1]
    dy, dskip = dy.contiguous(), None if dskip is None else dskip.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = sizes["BLOCK_M"] * (cdiv(cdiv(M, PROGRAMS), sizes["BLOCK_M"]) if need_weight else 1)
    programs = cdiv(M, rows) if M else 0
    dw = torch.empty(programs, sizes["D"], dtype=torch.float32, device=x.device) if need_weight else None
    if M:
        cos, sin = rope or (None, None)
        _backward_kernel[(programs,)](
            x, weight, cos, sin, dy, dskip, r, dx, dw, x.stride(0), M, rows, **sizes, ADD=dskip is not None,
            ROTATE=rope is not None, WEIGHT=need_weight)
    return dx, dw.sum(0) if need_weight else None


def _check_cpp(x: Tensor, weight: Tensor, *others: Tensor) -> None:
    fits = (_rows_fit(x) and x.shape[-1] % 32 == 0 and weight.shape == x.shape[-1:]
            and all(other.is_contiguous() for other in (weight, *others)))
    build.check("D a multiple of 32, a token's heads side by side, the others contiguous", fits, x, *others)


def _forward_by_cpp(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None,
                    rope: Rope) -> tuple[Tensor, Tensor]:
    _check_cpp(x, weight, *(rope or ()), *(() if residual is None else (residual,)))
    y, r = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    build.call("norm_forward", x, weight.float(), residual, *(rope or (None, None)), y, r, float(eps),
               x.stride(0), x.shape[1] if x.dim() == 3 else 1, r.numel(), x.shape[-1])
    return y, r


def _backward_by_cpp(x: Tensor, weight: Tensor, rope: Rope, dy: Tensor, dskip: Tensor | None, r: Tensor,
                     need_weight: bool) -> tuple[Tensor, Tensor | None]:
    dx, dw = x.new_empty(x.shape), x.new_empty(x.shape[-1], dtype=torch.float32) if need_weight else None
    build.call("norm_backward", x, weight.float(), *(rope or (None, None)), dy.contiguous(),
               None if dskip is None else dskip.contiguous(), r, dx, dw, x.stride(0),
               x.shape[1] if x.dim() == 3 else 1, r.numel(), x.shape[-1])
    return dx, dw


def _forward_by_torch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, rope: Rope,
                      compiled: bool = False) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    r = torch.empty(*x.shape[:-1], 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for rows in cache_sized_chunks(x, compiled):
        _write_forward(x[rows], weight, eps, None if residual is None else residual[rows],
                       rope and [table[rows] for table in rope], y[rows], r[rows], compiled=compiled)
    return y, r


def _backward_by_torch(x: Tensor, weight: Tensor, rope: Rope, dy: Tensor, dskip: Tensor | None, r: Tensor,
                       need_weight: bool, compiled: bool = False) -> tuple[Tensor, Tensor | None]:
    dx, dw = x.new_empty(x.shape), torch.zeros_like(weight, dtype=r.dtype) if need_weight else None
    for rows in cache_sized_chunks(x, compiled):
        _write_backward(x[rows], weight, rope and [table[rows] for table in rope], dy[rows],
                        None if dskip is None else dskip[rows], r[rows], dx[rows], dw, compiled=compiled)
    return dx, dw


@maybe_compile
def _write_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, rope: list[Tensor] | None,
                   y: Tensor, r: Tensor) -> None:
    """Write y and r."""
    x32 = x.to(r.dtype)
    r.copy_(torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(eps)))
    n = (x32 * r).mul_(1.0 + weight.to(r.dtype))
    n = n if rope is None else rotate(n, *rope)
    y.copy_(n if residual is None else n.add_(residual))


@maybe_compile
def _write_backward(x: Tensor, weight: Tensor, rope: list[Tensor] | None, dy: Tensor, dskip: Tensor | None,
                    r: Tensor, dx: Tensor, dw: Tensor | None) -> None:
    """Write dx and add to dw."""
    dn = dy.to(r.dtype) if rope is None else rotate(dy.to(r.dtype), rope[0], -rope[1])
    unit = x.to(r.dtype) * r
    if dw is not None:
        dw.add_((dn * unit).flatten(0, -2).sum(0))
    g = dn * (1.0 + weight.to(r.dtype))
    g.sub_(unit.mul_((g * unit).mean(-1, keepdim=True))).mul_(r)
    dx.copy_(g if dskip is None else g.add_(dskip))


class Backend(NamedTuple):
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor | None]]


BACKENDS = {
    "triton": Backend(_forward_by_triton, _backward_by_triton),
    "cpp": Backend(_forward_by_cpp, _backward_by_cpp),
    "compiled": Backend(partial(_forward_by_torch, compiled=True),
                        partial(_backward_by_torch, compiled=True)),
    "torch": Backend(_forward_by_torch, _backward_by_torch),
}


# ----------------------------------------------------------------------------------------------------------
# The autograd function


class _RMSNorm(torch.autograd.Function):
    """Saved are x, weight, r and the tables."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, rope: Rope,
                return_input: bool, backend: Backend) -> Tensor | tuple[Tensor, Tensor]:
        y, r = backend.forward(x, weight, eps, residual, rope)
        ctx.save_for_backward(x, weight, r, *(rope or ()))
        ctx.backend = backend
        if not return_input:
            return y
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(x)
        return y, x

    @staticmethod
    def backward(ctx, dy: Tensor, dskip: Tensor | None = None) -> tuple[Tensor | None, ...]:
        x, weight, r, *rope = ctx.saved_tensors
        need_x, need_weight, _, need_residual = ctx.needs_input_grad[:4]
        dx, dw = ctx.backend.backward(x, weight, rope or None, dy, dskip, r, need_weight)
        dx, dw = dx if need_x else None, dw.to(weight.dtype) if need_weight else None
        return dx, dw, None, dy if need_residual else None, None, None, None


# ----------------------------------------------------------------------------------------------------------
# The public function


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, rope: Rope = None,
             return_input: bool = False, backend: str = "torch") -> Tensor | tuple[Tensor, Tensor]:
    """x r (1 + w) over the last axis; plus `residual`, or rotated by `rope`.  Gradients for x, weight and
    residual.

    x (M, D), or (T, heads, D) with rope, where each token's heads are side by side and tokens may be further
    apart (a part of a wider row); weight (D) of any floating dtype; residual (M, D) of x's dtype; rope:
    cosines and sines, (T, 1, D) each. Returns x's shape and dtype; with return_input also x itself, for its
    other uses: the backward pass then adds the gradients of both uses in fp32 and rounds once. backend: of
    `BACKENDS`.

    Raises ValueError for operands that do not fit together, or that the backend does not take.
    """
    if residual is not None and (rope is not None or residual.shape != x.shape):
        raise ValueError(f"RMSNorm adds a residual of x's shape {tuple(x.shape)} or rotates, not both")
    if rope is not None and (x.dim() != 3 or x.shape[-1] % 2
                             or any(table.shape != (len(x), 1, x.shape[-1]) for table in rope)):
        raise ValueError("a rotation takes x (T, heads, D), D even, and tables (T, 1, D); got "
                         f"{tuple(x.shape)} and {tuple(rope[0].shape)}")
    return _RMSNorm.apply(x, weight, eps, residual, rope, return_input, pick(BACKENDS, backend))
