"""LoRA linears, y = x Wᵀ + s (x Aᵀ) Bᵀ with W frozen: base and adapter in one pass over x.

    forward      S = s x Aᵀ      y = x Wᵀ + S Bᵀ
    backward     T = s dY B     dX = dY W + T A      dA = Tᵀ x      dB = dYᵀ S         (W gets no gradient)

Forward and dX have one form: a product with W, a low-rank product of the same left operand, and a second one
from rank R back to the full width. So a kernel reads each tile of x (of dY) once and multiplies it twice.
Linears that share x, as q, k and v or gate and up do, are one launch: the parts of one fused linear.
docs/derivations.md derives the gradients and draws the tiles.

    M rows   I in   O out, of all parts together   P parts   R rank
    x (M, I)   weight (O, I)   y (M, O)   S and T (M, P·R)
    lora_a (R, I) and lora_b (O of the part, R) of each part, fp32

Dropout is on the adapters' input (ops/dropout.py). Linears that share x share its mask (PEFT draws one for
each): S and dA stay one product each.

In this order: definitions, Triton kernels, operations (by kernel or by PyTorch), autograd functions, public
functions, and the choice between kernel and PyTorch.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ops.disk_cache import remembered
from ops.dropout import Dropout, apply_dropout
from ops.geglu import geglu, geglu_gradient, geglu_reference, gelu, gelu_slope
from ops.onednn import pack_onednn_weight
from ops.triton_utils import (
    can_run,
    cdiv,
    jit,
    load_tile,
    milliseconds,
    next_power_of_2,
    precision,
    tile_sizes,
    tl,
    tuned,
)

# A frozen weight (O, I) and its adapter's lora_a (R, I) and lora_b (O, R).
Adapted = tuple[Tensor, Tensor, Tensor]


# ------------------------------------------------------------------------------------------------------------
# The definitions


def lora_linear_reference(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float,
                          dropout: Dropout | None = None) -> Tensor:
    """y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ.  The definition; every other way must equal it.

    x (M, I), weight (O, I), lora_a (R, I), lora_b (O, R); returns (M, O).
    """
    dropped = dropout.apply(x) / (1 - dropout.p) if dropout else x
    return x @ weight.T + scale * (dropped @ lora_a.to(x.dtype).T) @ lora_b.to(x.dtype).T


def lora_mlp_reference(x: Tensor, gate: Adapted, up: Adapted, down: Adapted, scale: float,
                       dropouts: tuple[Dropout | None, Dropout | None] = (None, None)) -> Tensor:
    """down(gelu(gate(x)) · up(x)), each a `lora_linear_reference`.  x (M, D); returns (M, D)."""
    h = geglu_reference(*(lora_linear_reference(x, *linear, scale, dropouts[0]) for linear in (gate, up)))
    return lora_linear_reference(h, *down, scale, dropouts[1])


# ------------------------------------------------------------------------------------------------------------
# The kernels.  Products are of x's dtype and add up in fp32; S and T are rounded to x's dtype once.
#
# O0, O1, O2 are the parts' outputs, 0 for those that are not there. BLOCK_R is R rounded up to what the
# tensor cores take.


@jit
def _part_of(tile, TILES0: tl.constexpr, TILES1: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
             N2: tl.constexpr):
    """Of a tile that is numbered through all parts: its part, that part's first column and how many it has,
    the tile's number there."""
    part = (tile >= TILES0).to(tl.int32) + (tile >= TILES0 + TILES1).to(tl.int32)
    first = tl.where(part == 0, 0, tl.where(part == 1, N0, N0 + N1))
    size = tl.where(part == 0, N0, tl.where(part == 1, N1, N2))
    return part, first, size, tile - tl.where(part == 0, 0, tl.where(part == 1, TILES0, TILES0 + TILES1))


@jit
def _store_low_rank(out, tile, rows, ranks, part, M, R: tl.constexpr, P: tl.constexpr):
    """A tile of S or T to the columns of its part."""
    tl.store(
        out + rows[:, None] * (P * R) + part * R + ranks[None, :],
        tile,
        mask=(rows[:, None] < M) & (ranks[None, :] < R),
    )


def _room(numbers: int, num_warps: int, PRECISION: str, CAPABILITY: int, **_) -> bool:
    """Whether so many fp32 numbers leave a program registers for the rest, of the 255 a thread has (`make
    check-kernels`).

    Products of fp32 do without tensor cores and want the smallest tiles there are.
    """
    return PRECISION == "tf32" and numbers / (32 * num_warps) <= (80 if CAPABILITY < 90 else 144)


def _cap_fits(BLOCK_R: int, GEGLU: bool, DROPOUT: bool, CAPABILITY: int, maxnreg: int | None = None,
              **_) -> bool:
    """Whether 128 registers a thread are enough where `maxnreg` allows no more, for two programs an SM.

    They are on Hopper for ranks to 16 without dropout (`make check-kernels`); elsewhere some tile spills.
    """
    return maxnreg is None or (CAPABILITY >= 90 and BLOCK_R <= 16 and not GEGLU and not DROPOUT)


def _forward_fits(BLOCK_M: int, BLOCK_O: int, BLOCK_R: int, GEGLU: bool, DROPOUT: bool, **more) -> bool:
    numbers = BLOCK_M * ((BLOCK_O + BLOCK_R) * (1 + GEGLU) + 16 * (DROPOUT > GEGLU))
    return _room(numbers, **more) and _cap_fits(BLOCK_R, GEGLU, DROPOUT, **more)


def _input_gradient_fits(BLOCK_M: int, BLOCK_I: int, BLOCK_R: int, GEGLU: bool, DROPOUT: bool,
                         **more) -> bool:
    numbers = BLOCK_M * (BLOCK_I * (1 + GEGLU + DROPOUT) + BLOCK_R)
    return _room(numbers, **more) and _cap_fits(BLOCK_R, GEGLU, DROPOUT, **more)


@tuned(tile_sizes(("BLOCK_M", "BLOCK_O", "BLOCK_I"), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3, 128),
                  (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4),
                  (64, 32, 32, 8, 3)),
       key=("M_BUCKET", "I", "O0", "O1", "O2", "R", "GEGLU", "DROPOUT"), fits=_forward_fits)
@jit
def _forward_kernel(x, w, a, b, y, s, h, scale, tokens, features, threshold, M, M_BUCKET,
                    I: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr, R: tl.constexpr,
                    P: tl.constexpr,
                    GEGLU: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
                    BLOCK_I: tl.constexpr):
    """y = x Wᵀ + S Bᵀ, S = s x Aᵀ;  with GEGLU y is [gate | up], and h = gelu(gate) · up.

    x (M, I), w (O, I), a (P·R, I), b (O, R), y (M, O), s (M, P·R), h (M, O0); all row-major, x's dtype. A
    program owns BLOCK_M rows and BLOCK_O outputs of one part, with GEGLU those of gate and of up. Programs
    that share rows run side by side, so that x comes from memory once; a part's first one writes its columns
    of S.
    """
    TILES0: tl.constexpr = (O0 + BLOCK_O - 1) // BLOCK_O
    TILES1: tl.constexpr = 0 if GEGLU else (O1 + BLOCK_O - 1) // BLOCK_O
    TILES2: tl.constexpr = (O2 + BLOCK_O - 1) // BLOCK_O
    EVEN_I: tl.constexpr = I % BLOCK_I == 0
    EVEN_O: tl.constexpr = O0 % BLOCK_O == 0 and O1 % BLOCK_O == 0 and O2 % BLOCK_O == 0
    O: tl.constexpr = O0 + O1 + O2
    dtype = x.dtype.element_ty
    tile = tl.program_id(0) % (TILES0 + TILES1 + TILES2)
    rows = (tl.program_id(0) // (TILES0 + TILES1 + TILES2)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if P == 1 or GEGLU:
        part, first, last = 0, 0, O0
    else:
        part, first, size, tile = _part_of(tile, TILES0, TILES1, O0, O1, O2)
        last = first + size
    outs = first + tile * BLOCK_O + tl.arange(0, BLOCK_O)
    ins, ranks = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_R)

    x_tiles = x + rows[:, None] * I + ins[None, :]
    w_tiles = w + outs[None, :] * I + ins[:, None]
    a_tiles = a + (part * R + ranks)[None, :] * I + ins[:, None]
    sums, low_rank = tl.zeros((BLOCK_M, BLOCK_O), tl.float32), tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        token_hashes = tl.load(tokens + rows, mask=rows < M, other=0)
    if GEGLU:
        up_sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
        up_low_rank = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for i in range(0, I, BLOCK_I):
        inside = i + ins < I
        x_tile = load_tile(x_tiles + i, (rows < M)[:, None] & inside[None, :], False)
        w_tile = load_tile(w_tiles + i, inside[:, None] & (outs < last)[None, :], EVEN_I and EVEN_O)
        a_tile = load_tile(a_tiles + i, inside[:, None] & (ranks < R)[None, :], EVEN_I and R == BLOCK_R)
        dropped = x_tile
        if DROPOUT:
            feature_hashes = load_tile(features + i + ins, inside, EVEN_I)
            dropped = apply_dropout(x_tile, token_hashes, feature_hashes, threshold)
        sums = tl.dot(x_tile, w_tile, sums, input_precision=PRECISION)
        low_rank = tl.dot(dropped, a_tile, low_rank, input_precision=PRECISION)
        if GEGLU:
            w_tile = load_tile(w_tiles + O0 * I + i, inside[:, None] & (outs < last)[None, :],
                               EVEN_I and EVEN_O)
            a_tile = load_tile(a_tiles + R * I + i, inside[:, None] & (ranks < R)[None, :],
                               EVEN_I and R == BLOCK_R)
            up_sums = tl.dot(x_tile, w_tile, up_sums, input_precision=PRECISION)
            up_low_rank = tl.dot(dropped, a_tile, up_low_rank, input_precision=PRECISION)

    b_tiles = b + outs[None, :] * R + ranks[:, None]
    low_rank = (low_rank * scale).to(dtype)
    b_tile = load_tile(b_tiles, (ranks < R)[:, None] & (outs < last)[None, :], R == BLOCK_R and EVEN_O)
    sums = tl.dot(low_rank, b_tile, sums, input_precision=PRECISION).to(dtype)
    if tile == 0:
        _store_low_rank(s, low_rank, rows, ranks, part, M, R, P)
    mask = (rows < M)[:, None] & (outs < last)[None, :]
    tl.store(y + rows[:, None] * O + outs[None, :], sums, mask=mask)
    if GEGLU:
        up_low_rank = (up_low_rank * scale).to(dtype)
        b_tile = load_tile(b_tiles + O0 * R, (ranks < R)[:, None] & (outs < last)[None, :],
                           R == BLOCK_R and EVEN_O)
        up_sums = tl.dot(up_low_rank, b_tile, up_sums, input_precision=PRECISION).to(dtype)
        if tile == 0:
            _store_low_rank(s, up_low_rank, rows, ranks, 1, M, R, P)
        tl.store(y + rows[:, None] * O + O0 + outs[None, :], up_sums, mask=mask)
        gated = gelu(sums.to(tl.float32)) * up_sums.to(tl.float32)
        tl.store(h + rows[:, None] * O0 + outs[None, :], gated.to(dtype), mask=mask)


@jit
def _add_part(sums, dy, w, a, b, t, rows, ins, scale, tokens, features, threshold, M,
              PART: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, O: tl.constexpr, I: tl.constexpr,
              R: tl.constexpr,
              P: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    """sums + dYp Wp + Tp Ap of one part, the outputs FIRST to LAST.

    The tile of the first inputs writes Tp = s dYp Bp.
    """
    EVEN_O: tl.constexpr = (LAST - FIRST) % BLOCK_O == 0
    EVEN_I: tl.constexpr = I % BLOCK_I == 0
    outs, ranks = FIRST + tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_R)
    dy_tiles = dy + rows[:, None] * O + outs[None, :]
    w_tiles = w + outs[:, None] * I + ins[None, :]
    b_tiles = b + outs[:, None] * R + ranks[None, :]
    low_rank = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for o in range(0, LAST - FIRST, BLOCK_O):
        inside = o + outs < LAST
        dy_tile = load_tile(dy_tiles + o, (rows < M)[:, None] & inside[None, :], False)
        w_tile = load_tile(w_tiles + o * I, inside[:, None] & (ins < I)[None, :], EVEN_O and EVEN_I)
        b_tile = load_tile(b_tiles + o * R, inside[:, None] & (ranks < R)[None, :], EVEN_O and R == BLOCK_R)
        sums = tl.dot(dy_tile, w_tile, sums, input_precision=PRECISION)
        low_rank = tl.dot(dy_tile, b_tile, low_rank, input_precision=PRECISION)
    low_rank = (low_rank * scale).to(dy.dtype.element_ty)
    if tl.program_id(0) % tl.cdiv(I, BLOCK_I) == 0:
        _store_low_rank(t, low_rank, rows, ranks, PART, M, R, P)
    a_tiles = a + (PART * R + ranks)[:, None] * I + ins[None, :]
    a_tile = load_tile(a_tiles, (ranks < R)[:, None] & (ins < I)[None, :], R == BLOCK_R and EVEN_I)
    if DROPOUT:
        token_hashes = tl.load(tokens + rows, mask=rows < M, other=0)
        feature_hashes = load_tile(features + ins, ins < I, EVEN_I)
        adapter = tl.dot(low_rank, a_tile, input_precision=PRECISION)
        return sums + apply_dropout(adapter, token_hashes, feature_hashes, threshold)
    else:
        return tl.dot(low_rank, a_tile, sums, input_precision=PRECISION)


@tuned(tile_sizes(("BLOCK_M", "BLOCK_I", "BLOCK_O"), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3, 128),
                  (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4),
                  (64, 32, 32, 8, 3)),
       key=("M_BUCKET", "I", "O0", "O1", "O2", "R", "GEGLU", "DROPOUT"), fits=_input_gradient_fits)
@jit
def _input_gradient_kernel(dy, w, a, b, dx, t, gate_up, scale, tokens, features, threshold, M, M_BUCKET,
                           I: tl.constexpr, O0: tl.constexpr, O1: tl.constexpr, O2: tl.constexpr,
                           R: tl.constexpr, P: tl.constexpr,
                           GEGLU: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                           BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
                           BLOCK_I: tl.constexpr):
    """dX = Σ over parts of dYp Wp + Tp Ap, Tp = s dYp Bp;  with GEGLU dx is [dgate | dup], of dh = dX.

    dy (M, O), w (O, I), a (P·R, I), b (O, R), t (M, P·R), dx (M, I), with GEGLU dx and gate_up (M, 2I); all
    row-major, dy's dtype. A program owns BLOCK_M rows and BLOCK_I inputs and adds up the parts in one
    accumulator.
    """
    TILES: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    O: tl.constexpr = O0 + O1 + O2
    rows = (tl.program_id(0) // TILES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = tl.program_id(0) % TILES * BLOCK_I + tl.arange(0, BLOCK_I)
    sums = tl.zeros((BLOCK_M, BLOCK_I), tl.float32)
    sums = _add_part(sums, dy, w, a, b, t, rows, ins, scale, tokens, features, threshold, M, 0, 0, O0, O, I,
                     R, P, DROPOUT, PRECISION, BLOCK_R, BLOCK_M, BLOCK_O, BLOCK_I)
    if P > 1:
        sums = _add_part(sums, dy, w, a, b, t, rows, ins, scale, tokens, features, threshold, M, 1, O0,
                         O0 + O1, O, I, R, P, DROPOUT, PRECISION, BLOCK_R, BLOCK_M, BLOCK_O, BLOCK_I)
    if P > 2:
        sums = _add_part(sums, dy, w, a, b, t, rows, ins, scale, tokens, features, threshold, M, 2, O0 + O1,
                         O, O, I, R, P, DROPOUT, PRECISION, BLOCK_R, BLOCK_M, BLOCK_O, BLOCK_I)
    mask = (rows < M)[:, None] & (ins < I)[None, :]
    if GEGLU:
        places = rows[:, None] * (2 * I) + ins[None, :]
        gate = tl.load(gate_up + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + places + I, (sums * gelu(gate)).to(dx.dtype.element_ty), mask=mask)
        up = tl.load(gate_up + places + I, mask=mask, other=0.0).to(tl.float32)
        # gate is loaded twice: to keep it would take registers.
        gate = tl.load(gate_up + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + places, (sums * up * gelu_slope(gate)).to(dx.dtype.element_ty), mask=mask)
    else:
        tl.store(dx + rows[:, None] * I + ins[None, :], sums.to(dx.dtype.element_ty), mask=mask)


@tuned(tile_sizes(("BLOCK_M", "BLOCK_N"), (64, 128, 4, 3), (128, 64, 4, 3), (64, 64, 4, 4)),
       key=("M_BUCKET", "N0", "N1", "N2", "C", "DROPOUT"),
       fits=lambda BLOCK_N, BLOCK_C, **more: _room(BLOCK_N * (BLOCK_C + 32), **more))
@jit
def _token_sum_kernel(wide, low_rank, partial, tokens, features, threshold, M, M_BUCKET, rows_a_split,
                      N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, LOW_RANK: tl.constexpr,
                      C: tl.constexpr, TRANSPOSED: tl.constexpr, DROPOUT: tl.constexpr,
                      PRECISION: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):
    """Over the tokens of a split, Σ wide[m, n] low_rank[m, c]: dB = dYᵀ S, and dA = Tᵀ x (TRANSPOSED).

    wide (M, N): its columns are parts of N0, N1 and N2; with DROPOUT what adapters see of it counts. low_rank
    (M, LOW_RANK): C columns a part. partial (splits, N·C) fp32: each as (N, C), or TRANSPOSED, of one part,
    as (C, N). A program owns BLOCK_N columns of a part, BLOCK_C of its low_rank columns, and one split's
    tokens, in their order; the splits are added up after it (`_add_splits_kernel`), so that no two programs
    write to one place.
    """
    TILES0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    TILES1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N
    N: tl.constexpr = N0 + N1 + N2
    if N1 == 0:
        part, first, size, tile = 0, 0, N0, tl.program_id(0)
    else:
        part, first, size, tile = _part_of(tl.program_id(0), TILES0, TILES1, N0, N1, N2)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(1).to(tl.int64) * rows_a_split
    count = (tl.minimum(M - start, rows_a_split)).to(tl.int32)
    rows = tl.arange(0, BLOCK_M)
    wide_tiles = (wide + start * N) + (rows[:, None] * N + (first + columns)[None, :])
    low_rank_tiles = low_rank + start * LOW_RANK + rows[:, None] * LOW_RANK + (part * C + places)[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if DROPOUT:
        feature_hashes = tl.load(features + columns, mask=columns < size, other=0)
    for m in range(0, count, BLOCK_M):
        inside = m + rows < count
        wide_tile = tl.load(wide_tiles, mask=inside[:, None] & (columns < size)[None, :], other=0.0)
        low_rank_tile = tl.load(low_rank_tiles, mask=inside[:, None] & (places < C)[None, :], other=0.0)
        if DROPOUT:
            wide_tile = apply_dropout(wide_tile, tl.load(tokens + start + m + rows, mask=inside, other=0),
                                      feature_hashes, threshold)
        sums = tl.dot(tl.trans(wide_tile), low_rank_tile, sums, input_precision=PRECISION)
        wide_tiles += BLOCK_M * N
        low_rank_tiles += BLOCK_M * LOW_RANK
    if TRANSPOSED:
        out = partial + places[None, :] * N + columns[:, None]
    else:
        out = partial + (first + columns)[:, None] * C + places[None, :]
    tl.store(
        out + tl.program_id(1).to(tl.int64) * (N * C),
        sums,
        mask=(columns < size)[:, None] & (places < C)[None, :],
    )


@jit
def _add_splits_kernel(partial, gradient, splits_a, splits_b, A: tl.constexpr, B: tl.constexpr,
                       ADD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """gradient = Σ over splits of partial, or with ADD gradient += that sum.  Always in one order.

    gradient (A + B) fp32: the A numbers of dA, then the B numbers of dB. partial fp32: dA's sums (splits_a,
    A), then dB's (splits_b, B). A program owns BLOCK numbers of the gradient, and takes BLOCK_S splits
    at a time.
    """
    places, splits = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_S)
    of_a = places < A
    count = tl.where(of_a, splits_a, splits_b)
    first = tl.where(of_a, places, splits_a * A + places - A)
    step = tl.where(of_a, A, B)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tl.maximum(splits_a, splits_b), BLOCK_S):
        rows = start + splits
        inside = (rows[:, None] < count[None, :]) & (places < A + B)[None, :]
        tile = tl.load(partial + first[None, :] + rows[:, None] * step[None, :], mask=inside, other=0.0)
        sums += tl.sum(tile, axis=0)
    if ADD:
        sums += tl.load(gradient + places, mask=places < A + B, other=0.0)
    tl.store(gradient + places, sums, mask=places < A + B)


# ------------------------------------------------------------------------------------------------------------
# The operations, each by kernel or by PyTorch


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The products of a group's frozen weight (O, I) in oneDNN's own layout: two copies, made once."""

    forward: Callable[[Tensor], Tensor]             # x (M, I) → x Wᵀ
    input_gradient: Callable[[Tensor], Tensor]      # dY (M, O) → dY W

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> PackedWeight | None:
        """Of the weights that share x; None where there is no such layout (`pack_onednn_weight`)."""
        weight = _fused_weight(weights)
        forward = pack_onednn_weight(weight)
        return forward and cls(forward, pack_onednn_weight(weight.T))


@dataclass(frozen=True)
class Choice:
    """Which operations of a group of linears run by Triton kernels; the others run by PyTorch."""

    forward: bool = False           # y and S
    input_gradient: bool = False    # dX and T
    sums: bool = False              # dA and dB
    packed: PackedWeight | None = None    # the group's own, where PyTorch multiplies by them

    @property
    def by_triton(self) -> bool:
        return self.forward or self.input_gradient or self.sums


BY_PYTORCH, BY_TRITON = Choice(), Choice(True, True, True)


@dataclass(frozen=True)
class _Group:
    """Linears that share x, with adapters of one rank, as parts of one wide linear."""

    outputs: tuple[int, ...]        # of each part
    rank: int
    scale: float                    # of S and T: what dropout divides by is in it
    dropout: Dropout | None = None

    def apply_dropout(self, x: Tensor) -> Tensor:
        """What the adapters see of x (M, I), and the way back: what x gets of their gradient."""
        return self.dropout.apply(x) if self.dropout else x

    def constants(self, x: Tensor) -> dict:
        """The kernels' constants."""
        O0, O1, O2 = (*self.outputs, 0, 0)[:3]
        return {
            "O0": O0,
            "O1": O1,
            "O2": O2,
            "R": self.rank,
            "P": len(self.outputs),
            "BLOCK_R": max(16, next_power_of_2(self.rank)),
            "DROPOUT": self.dropout is not None,
            "PRECISION": precision(x.dtype),
        }

    def numbers(self, M: int) -> dict:
        """The kernels' other arguments; timings are compared anew only where the rows double."""
        tokens, features, threshold = None, None, 0
        if self.dropout:
            tokens, features, threshold = self.dropout.tokens, self.dropout.features, self.dropout.threshold
        return {"tokens": tokens, "features": features, "threshold": threshold, "M": M,
                "M_BUCKET": next_power_of_2(M)}


@dataclass(frozen=True, eq=False)
class Flat:
    """A group's adapters that lie in one buffer with all others (lora.FlatAdapters) and are trained there."""

    a: Tensor                   # the A's, concatenated (P·R, I), in x's dtype
    b: Tensor                   # the B's (O, R)
    masters: nn.Parameter       # the buffer: autograd sees it, not the adapters, if there is a `gradient`
    gradient: Tensor | None     # (P·R·I + O·R) fp32, a's, then b's, to add to; None: return them


def _concat_columns(wide: Tensor, low_rank: Tensor) -> Tensor:
    return torch.cat((wide, low_rank), dim=1)


def _forward(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, group: _Group, by_triton: bool,
             gated: bool = False, packed: PackedWeight | None = None,
             geglu_backend: str = "torch") -> tuple[Tensor, Tensor, Tensor | None]:
    """y (M, O), S (M, P·R) and, where gated, h (M, O/2); a (P·R, I) and b (O, R) in x's dtype.

    geglu_backend: of the gate, where the linear is computed by PyTorch.
    """
    (M, I), O = x.shape, len(weight)
    if by_triton:
        y, s, h = x.new_empty(M, O), x.new_empty(M, len(a)), x.new_empty(M, O // 2) if gated else None
        if M:
            parts = group.outputs[:1] if gated else group.outputs
            _forward_kernel[lambda sizes: (cdiv(M, sizes["BLOCK_M"]) * sum(cdiv(part, sizes["BLOCK_O"])
                                                                           for part in parts),)](
                x, weight, a, b, y, s, h, group.scale, **group.numbers(M), I=I, GEGLU=gated,
                **group.constants(x))
        return y, s, h
    diagonal = torch.block_diag(*b.split(group.outputs))  # (O, P·R): each part's B at its place
    s = torch.addmm(x.new_empty(()), group.apply_dropout(x), a.T, beta=0, alpha=group.scale)
    # Base and adapter in one product, [x | S] [W | B]ᵀ, where copying x (and W) costs less than another pass
    # over y.
    if I < O < M and not packed:
        y = _concat_columns(x, s) @ _concat_columns(weight, diagonal).T
    else:
        y = (packed.forward(x) if packed else x @ weight.T).addmm_(s, diagonal.T)
    return y, s, geglu(*y.chunk(2, dim=1), geglu_backend) if gated else None


def _input_gradient(dy: Tensor, weight: Tensor, a: Tensor, b: Tensor, group: _Group, by_triton: bool,
                    gate_up: Tensor | None = None, packed: PackedWeight | None = None,
                    geglu_backend: str = "torch") -> tuple[Tensor, Tensor]:
    """dX (M, I), or [dgate | dup] (M, 2I) where the linear's input was gated, and T (M, P·R)."""
    M, (O, I) = len(dy), weight.shape
    if by_triton:
        dx, t = torch.empty_like(gate_up) if gate_up is not None else dy.new_empty(M, I), dy.new_empty(M,
                                                                                                       len(a))
        if M:
            _input_gradient_kernel[lambda sizes: (cdiv(M, sizes["BLOCK_M"]) * cdiv(I, sizes["BLOCK_I"]),)](
                dy, weight, a, b, dx, t, gate_up, group.scale, **group.numbers(M), I=I,
                GEGLU=gate_up is not None, **group.constants(dy))
        return dx, t
    t = _low_rank_gradient(dy, b, group)
    if O < I < M and not packed and not group.dropout:
        dx = _concat_columns(dy, t) @ torch.cat((weight, a))
    else:
        dx = packed.input_gradient(dy) if packed else dy @ weight
        dx = dx.add_(group.apply_dropout(t @ a)) if group.dropout else dx.addmm_(t, a)
    return dx if gate_up is None else geglu_gradient(dx, *gate_up.chunk(2, dim=1), geglu_backend), t


def _low_rank_gradient(dy: Tensor, b: Tensor, group: _Group) -> Tensor:
    """T = s dY B (M, P·R)."""
    return torch.addmm(dy.new_empty(()), dy, torch.block_diag(*b.split(group.outputs)), beta=0,
                       alpha=group.scale)


def _token_sums(wide: Tensor, low_rank: Tensor, parts: tuple[int, ...], splits: int, partial: Tensor,
                group: _Group, of_x: bool) -> None:
    """Write Σ over the tokens of each split of wide[m, n] low_rank[m, c] to `partial`, fp32.

    A split's sums are (N, columns of a part), part by part, or where wide is x (columns, I).
    """
    M, columns = len(wide), low_rank.shape[1] // len(parts)
    N0, N1, N2 = (*parts, 0, 0)[:3]
    BLOCK_C = min(64, max(16, next_power_of_2(columns)))
    _token_sum_kernel[lambda sizes: (sum(cdiv(part, sizes["BLOCK_N"]) for part in parts), splits,
                                     cdiv(columns, BLOCK_C))](
        wide, low_rank, partial, **group.numbers(M), rows_a_split=cdiv(M, splits), N0=N0, N1=N1, N2=N2,
        LOW_RANK=low_rank.shape[1], C=columns, TRANSPOSED=of_x, DROPOUT=of_x and group.dropout is not None,
        BLOCK_C=BLOCK_C,
        PRECISION=precision(wide.dtype))


def _splits(M: int, parts: tuple[int, ...], columns: int) -> int:
    """Into how many a sum over M tokens is split: enough programs for any GPU, the same on each."""
    programs = sum(cdiv(part, 128) for part in parts) * cdiv(columns, 64)
    return max(1, min(cdiv(M, 256), 512 // programs))


def _adapter_gradients(x: Tensor, dy: Tensor, s: Tensor, t: Tensor, group: _Group, by_triton: bool,
                       gradient_out: Tensor | None = None) -> list[Tensor]:
    """dA (R, I) and dB (O, R) of each part in turn, fp32 from the kernel, else x's dtype.

    gradient_out: `Flat.gradient`, which they are added to; then none are returned.
    """
    (M, I), parts, R = x.shape, group.outputs, group.rank
    A, B = t.shape[1] * I, sum(parts) * R
    if by_triton and M:
        splits_a, splits_b = _splits(M, (I,), t.shape[1]), _splits(M, parts, R)
        partial = torch.empty(splits_a * A + splits_b * B, dtype=torch.float32, device=x.device)
        _token_sums(x, t, (I,), splits_a, partial, group, of_x=True)
        _token_sums(dy, s, parts, splits_b, partial[splits_a * A:], group, of_x=False)
        gradient = torch.empty(A + B, dtype=torch.float32,
                               device=x.device) if gradient_out is None else gradient_out
        _add_splits_kernel[(cdiv(A + B, 256),)](
            partial, gradient, splits_a, splits_b, A=A, B=B, ADD=gradient_out is not None, BLOCK_S=16,
            BLOCK=256)
        if gradient_out is not None:
            return []
        da, db = gradient[:A].view(-1, I), gradient[A:].view(-1, R).split(parts)
    else:
        da = t.T @ group.apply_dropout(x)
        db = [(shrunk.T @ y).T for y, shrunk in zip(dy.split(parts, dim=1), s.split(R, dim=1), strict=True)]
        if gradient_out is not None:
            gradient_out[:A].view_as(da).add_(da)
            for place, part in zip(gradient_out[A:].view(-1, R).split(parts), db, strict=True):
                place.add_(part)
            return []
    return list(itertools.chain(*zip(da.split(R), db, strict=True)))


# ------------------------------------------------------------------------------------------------------------
# The autograd functions


def _low_rank(adapters: Sequence[Tensor], flat: Flat | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The A's (P·R, I) and the B's (O, R), concatenated, in the dtype of the products."""
    if flat:
        return flat.a, flat.b
    return torch.cat(list(adapters[0::2])).to(dtype), torch.cat(list(adapters[1::2])).to(dtype)


def _returned(gradients: Sequence[Tensor], leaves: int, dtype: torch.dtype) -> list[Tensor | None]:
    """What backward returns for its leaves: gradients, or nothing where they went to `Flat.gradient`."""
    return [gradient.to(dtype) for gradient in gradients] or [None] * leaves


class _LoRALinears(torch.autograd.Function):
    """Saved are x, which other linears may share, and S. Masters and gradients of the adapters are fp32.

    leaves: lora_a and lora_b of each linear in turn, or the masters of a `flat` that has a gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, group: _Group, choice: Choice, flat: Flat | None,
                *leaves: Tensor) -> Tensor:
        a, b = _low_rank(leaves, flat, x.dtype)
        y, s, _ = _forward(x, weight, a, b, group, choice.forward, packed=choice.packed)
        ctx.save_for_backward(x, weight, a, b, s)
        ctx.group, ctx.choice, ctx.master_dtype, ctx.leaves = group, choice, leaves[0].dtype, len(leaves)
        ctx.gradient_out = flat.gradient if flat else None
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, s = ctx.saved_tensors
        dy = dy.contiguous()
        if ctx.needs_input_grad[0]:
            dx, t = _input_gradient(dy, weight, a, b, ctx.group, ctx.choice.input_gradient,
                                    packed=ctx.choice.packed)
        else:
            dx, t = None, _low_rank_gradient(dy, b, ctx.group)
        gradients = _adapter_gradients(x, dy, s, t, ctx.group, ctx.choice.sums, ctx.gradient_out)
        return dx, None, None, None, None, *_returned(gradients, ctx.leaves, ctx.master_dtype)


class _LoRAMLP(torch.autograd.Function):
    """gate and up as one group, GeGLU at its end; down, whose dX ends in GeGLU's gradient.

    Saved are x, [gate | up] and h. leaves: as for `_LoRALinears`, of gate, up and down.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, down: Tensor, groups: tuple[_Group, _Group],
                choices: tuple[Choice, Choice], geglu_backend: str, flats: tuple[Flat, Flat] | None,
                *leaves: Tensor) -> Tensor:
        flat, flat_down = flats or (None, None)
        low_rank = (*_low_rank(leaves[:4], flat, x.dtype), *_low_rank(leaves[4:], flat_down, x.dtype))
        gate_up, s, h = _forward(x, weight, *low_rank[:2], groups[0], choices[0].forward, gated=True,
                                 packed=choices[0].packed, geglu_backend=geglu_backend)
        y, s_down, _ = _forward(h, down, *low_rank[2:], groups[1], choices[1].forward,
                                packed=choices[1].packed)
        ctx.save_for_backward(x, weight, down, *low_rank, gate_up, s, h, s_down)
        ctx.groups, ctx.choices, ctx.master_dtype, ctx.leaves = groups, choices, leaves[0].dtype, len(leaves)
        ctx.geglu_backend = geglu_backend
        ctx.gradient_out = [flat.gradient for flat in flats] if flats else [None, None]
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, a, b, a_down, b_down, gate_up, s, h, s_down = ctx.saved_tensors
        (group, group_down), (choice, choice_down), (gradient_out, gradient_out_down) = (
            ctx.groups,
            ctx.choices,
            ctx.gradient_out,
        )
        dy = dy.contiguous()
        dgate_up, t_down = _input_gradient(dy, down, a_down, b_down, group_down, choice_down.input_gradient,
                                           gate_up, choice_down.packed, ctx.geglu_backend)
        of_down = _adapter_gradients(h, dy, s_down, t_down, group_down, choice_down.sums, gradient_out_down)
        if ctx.needs_input_grad[0]:
            dx, t = _input_gradient(dgate_up, weight, a, b, group, choice.input_gradient,
                                    packed=choice.packed)
        else:
            dx, t = None, _low_rank_gradient(dgate_up, b, group)
        gradients = _adapter_gradients(x, dgate_up, s, t, group, choice.sums, gradient_out) + of_down
        return dx, None, None, None, None, None, None, *_returned(gradients, ctx.leaves, ctx.master_dtype)


# ------------------------------------------------------------------------------------------------------------
# The public functions


def lora_linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float,
                dropout: Dropout | None = None, choice: Choice = BY_PYTORCH) -> Tensor:
    """y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ (M, O); as `lora_linears` with one linear."""
    return lora_linears(x, [(weight, lora_a, lora_b)], scale, dropout, choice)[0]


def lora_linears(x: Tensor, linears: Sequence[Adapted], scale: float, dropout: Dropout | None = None,
                 choice: Choice = BY_PYTORCH, flat: Flat | None = None) -> tuple[Tensor, ...]:
    """The outputs (M, O) of each of up to three adapted linears that share x (M, I); gradients for x and the
    adapters.

    Operands are row-major (contiguous), x and the frozen weights of one dtype: fp32, bf16, fp16. Weights that
    follow each other in memory (lora.py puts them so) are read in place, others are copied. All the adapters
    share one dropout mask. flat: the same adapters, where they lie in one buffer.

    Raises ValueError for operands that do not fit.
    """
    _check(x, linears, choice)
    group = _group(linears, scale, dropout, len(x))
    weight = _fused_weight([weight for weight, *_ in linears])
    y = _LoRALinears.apply(x, weight, group, choice, flat, *_leaves(linears, flat))
    return y.split(group.outputs, dim=1) if len(linears) > 1 else (y,)


def lora_mlp(x: Tensor, gate: Adapted, up: Adapted, down: Adapted, scale: float,
             dropouts: tuple[Dropout | None, Dropout | None] = (None, None),
             choices: tuple[Choice, Choice] = (BY_PYTORCH, BY_PYTORCH),
             flats: tuple[Flat, Flat] | None = None, geglu_backend: str = "torch") -> Tensor:
    """down(gelu(gate(x)) · up(x)) (M, D), each an adapted linear.

    dropouts, choices, flats: of gate and up, and of down. Both flats have a gradient, or none has.
    geglu_backend: of the gate, where PyTorch computes the linears. Else as `lora_linears`.
    """
    _check(x, (gate, up), choices[0])
    if len(gate[0]) != len(up[0]):
        raise ValueError(
            f"LoRA MLP: gate and up must give equally many outputs; got {len(gate[0])} and {len(up[0])}"
        )
    _check(x.new_empty(0, len(gate[0])), (down,), choices[1])
    groups = _group((gate, up), scale, dropouts[0], len(x)), _group((down,), scale, dropouts[1], len(x))
    leaves = _leaves((gate, up, down), flats and flats[0])
    return _LoRAMLP.apply(x, _fused_weight((gate[0], up[0])), down[0], groups, choices, geglu_backend, flats,
                          *leaves)


def _leaves(linears: Sequence[Adapted], flat: Flat | None) -> list[Tensor]:
    """What autograd sees of the adapters: themselves, or their buffer if backward adds to its gradient."""
    if flat and flat.gradient is not None:
        return [flat.masters]
    return [low_rank for linear in linears for low_rank in linear[1:]]


def _group(linears: Sequence[Adapted], scale: float, dropout: Dropout | None, M: int) -> _Group:
    """Linears that were checked, as one.  Raises ValueError for a dropout that does not fit them and M
    rows."""
    weight, lora_a, _ = linears[0]
    if dropout:
        if not 0 <= dropout.p < 1:
            raise ValueError(f"LoRA dropout needs 0 ≤ p < 1; got {dropout.p}")
        for name, numbers, length in (("tokens", dropout.tokens, M), ("features", dropout.features,
                                                                      weight.shape[1])):
            got = tuple(numbers.shape), numbers.stride(), numbers.dtype, numbers.device
            if got != ((length,), (1,), torch.int32, weight.device):
                raise ValueError(
                    f"LoRA dropout: {name} must be ({length},) int32 on {weight.device}, contiguous; got "
                    f"shape {got[0]}, "
                    f"strides {got[1]}, {got[2]} on {got[3]}"
                )
        scale /= 1 - dropout.p
    return _Group(tuple(len(weight) for weight, *_ in linears), len(lora_a), scale, dropout)


def _fused_weight(weights: Sequence[Tensor]) -> Tensor:
    """(O, I): the weights of linears that share x as one; not copied where they follow each other in
    memory."""
    first, places = weights[0], [weight.data_ptr() for weight in weights]
    steps = [weight.numel() * weight.element_size() for weight in weights[:-1]]
    if len(weights) > 1 and places[1:] == [place + step for place, step in zip(places, steps, strict=False)] \
            and all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                    for weight in weights):
        return first.as_strided((sum(map(len, weights)), first.shape[1]), (first.shape[1], 1))
    return torch.cat(list(weights)) if len(weights) > 1 else first


def _check(x: Tensor, linears: Sequence[Adapted], choice: Choice) -> None:
    """Raises ValueError, saying what was given, for operands that the products do not take."""
    def fail(what: str) -> None:
        raise ValueError(f"LoRA linear: {what}")
    if x.dim() != 2 or not x.is_contiguous():
        fail(f"x must be (M, I) and contiguous; got shape {tuple(x.shape)}, strides {x.stride()}")
    if not 1 <= len(linears) <= 3:
        fail(f"one to three linears share x; got {len(linears)}")
    for weight, lora_a, lora_b in linears:
        O, I, R = len(weight), x.shape[1], len(linears[0][1])
        for name, tensor, shape in (("weight", weight, (O, I)), ("lora_a", lora_a, (R, I)), ("lora_b", lora_b,
                                                                                             (O, R))):
            if tuple(tensor.shape) != shape or not tensor.is_contiguous():
                fail(f"{name} must be {shape} for {I} inputs, and contiguous; got shape "
                     f"{tuple(tensor.shape)}, strides {tensor.stride()}")
            if tensor.device != x.device:
                fail(f"{name} is on {tensor.device}, x on {x.device}")
        if weight.dtype != x.dtype:
            fail(f"weight is {weight.dtype}, x {x.dtype}; convert one of them")
        if weight.requires_grad:
            fail("weight is frozen here; to train it, use a plain linear")
    if choice.by_triton:
        if not 1 <= R <= 128 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            fail(f"the kernels take ranks 1 to 128 and fp32, bf16, fp16; got rank {R}, {x.dtype}; use "
                 f"PyTorch's way (--kernels torch)")
        if not can_run(x.device):
            fail(f"the Triton kernels run on a CUDA device, x is on {x.device}; use PyTorch's way "
                 f"(--kernels torch)")


# ------------------------------------------------------------------------------------------------------------
# The choice, once at the start


def choose(kernels: str, M: int, I: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype,
           device: torch.device,
           ends: str = "", dropout: float = 0.0,
           geglu_backend: str = "torch") -> tuple[Choice, dict[str, tuple[float, float]]]:
    """Kernel or PyTorch for each operation of a group of linears, and the milliseconds of both where they
    were compared.

    kernels: "triton", "torch", or "auto": on a CUDA device whichever is faster for M rows of this shape,
    remembered on disk; elsewhere PyTorch. ends: "gated" where the group's outputs are gate and up, "gate"
    where its input is gated. geglu_backend: of the gate, where PyTorch computes the linears.
    """
    if kernels == "torch" or (kernels == "auto" and not (device.type == "cuda" and can_run(device))):
        return BY_PYTORCH, {}
    if not can_run(device):
        raise ValueError(
            f"--kernels triton: Triton's kernels need a CUDA device and the triton package; this is "
            f"{device}; "
            "use --kernels auto"
        )
    if not 1 <= rank <= 128:
        if kernels == "auto":
            return BY_PYTORCH, {}
        raise ValueError(
            f"--kernels triton: the kernels take ranks 1 to 128, this is {rank}; use --kernels auto"
        )
    if kernels == "triton":
        if device.type == "cuda":
            for run in operations(M, I, outputs, rank, dtype, device, ends, dropout, geglu_backend).values():
                run(True)                       # compiles and tunes now, not in the first step
        return BY_TRITON, {}

    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # other kernels, other times
    times = remembered("lora", device, [source, str(dtype), M, I, outputs, rank, ends, dropout,
                                        geglu_backend], lambda: {
        name: [milliseconds(lambda: run(True)), milliseconds(lambda: run(False))]              # noqa: B023
        for name, run in operations(M, I, outputs, rank, dtype, device, ends, dropout,
                                    geglu_backend).items()})
    return Choice(**{name: kernel < pytorch for name, (kernel, pytorch) in times.items()}), times


def operations(M: int, I: int, outputs: tuple[int, ...], rank: int, dtype: torch.dtype, device: torch.device,
               ends: str = "", dropout: float = 0.0,
               geglu_backend: str = "torch") -> dict[str, Callable[[bool], object]]:
    """Each operation of a group of linears on random operands, to be timed: by its name in `Choice`,
    by_triton → result."""
    numbers = [torch.randint(2**31, (length,), dtype=torch.int32, device=device) | 1 for length in (M, I)]
    group, O = _Group(outputs, rank, 1.0, Dropout(dropout, *numbers) if dropout
                      else None), sum(outputs)
    draw = lambda *shape: torch.randn(shape, dtype=dtype, device=device)  # noqa: E731
    x, dy, weight, a, b = draw(M, I), draw(M, O), draw(O, I), draw(len(outputs) * rank, I), draw(O, rank)
    s, t, gate_up = draw(M, len(a)), draw(M, len(a)), draw(M, 2 * I) if ends == "gate" else None
    gradient = torch.zeros(a.numel() + b.numel(), device=device)
    return {"forward": lambda by_triton: _forward(
                x, weight, a, b, group, by_triton, gated=ends == "gated", geglu_backend=geglu_backend),
            "input_gradient": lambda by_triton: _input_gradient(
                dy, weight, a, b, group, by_triton, gate_up, geglu_backend=geglu_backend),
            "sums": lambda by_triton: _adapter_gradients(x, dy, s, t, group, by_triton, gradient)}
