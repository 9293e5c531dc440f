"""Attention over packed documents, O = softmax(s Q Kᵀ) V: a token sees its own document up to itself.

The work is cut into tiles (attention_tables.py), so no (T, T) mask exists. On a GPU three kernels walk
through tables of the tiles, and no two programs write to one place; on a CPU with AVX512-BF16 cpu/kernels.cpp
does; elsewhere a tile is a few matrix products, here with their gradients. docs/derivations.md derives the
gradients and draws the tiles.

    T tokens   N query heads   K kv heads   H head dim

Source: the gradients are those of "FlashAttention-2" (arXiv 2307.08691, section 2.3); stacking the query
heads that share a kv head into one matrix is multi-query attention's own gain (arXiv 1911.02150).
"""
from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.attention_tables import Tables, Tile
from ops.backend import pick
from ops.cpu.build import call, check
from ops.triton_utils import can_run, jit, next_power_of_2, precision, tile_sizes, tl, tuned

LOG2_E = math.log2(math.e)


# ----------------------------------------------------------------------------------------------------------
# The reference


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
    """O = softmax(s Q Kᵀ + mask) V, tile by tile.  The definition; shapes as for `attention`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                     # (1, heads, T, H)
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    outs = []
    for t in tiles:
        outs.append(F.scaled_dot_product_attention(
            q[:, :, t.queries], t.select(k), t.select(v), attn_mask=t.mask, scale=scale,
            is_causal=t.mask is None))
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


# ----------------------------------------------------------------------------------------------------------
# The kernels.  G query heads share a kv head and are rows of one tile with it; scores are in powers of two.


@jit
def _rows(first, count, head, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """A tile's rows, G for each token: their tokens, whether they exist, and their places among all rows."""
    G: tl.constexpr = N // K
    rows = tl.arange(0, BLOCK_Q * G)
    tokens, valid = first + rows // G, rows // G < count
    places = tokens.to(tl.int64) * N + head * G + rows % G
    return tokens, valid, places


@jit
def _visible(tokens, valid, keys, inside, seen, T):
    """Which of the keys each query sees.

    tokens and valid are a column and keys and inside a row, or vice versa.
    """
    own = tl.load(seen + tokens, mask=valid, other=0)
    prefix = tl.load(seen + T + tokens, mask=valid, other=0)
    prefix_end = tl.load(seen + 2 * T + tokens, mask=valid, other=0)
    return valid & inside & (((own <= keys) & (keys <= tokens)) | ((prefix <= keys) & (keys < prefix_end)))


@jit
def _tiles_of(key, end, prefix, prefix_end, BLOCK_K: tl.constexpr):
    """How many tiles of keys some queries see: of the prefix, and in all."""
    prefix_tiles = tl.cdiv(prefix_end - prefix, BLOCK_K)
    return prefix_tiles, prefix_tiles + tl.cdiv(end - key, BLOCK_K)


@jit
def _keys_of(i, prefix_tiles, key, end, prefix, prefix_end, BLOCK_K: tl.constexpr):
    """The keys of the i-th of these tiles, and which of them exist."""
    at = tl.where(i < prefix_tiles, prefix + i * BLOCK_K, key + (i - prefix_tiles) * BLOCK_K)
    keys = at + tl.arange(0, BLOCK_K)
    return keys, keys < tl.where(i < prefix_tiles, prefix_end, end)


_ATTENTION_KEY = ("M_BUCKET", "N", "K", "H")


def _forward_fits(PARTS: int, num_stages: int, CAPABILITY: int, N: int, K: int, **_) -> bool:
    if CAPABILITY < 90:
        return (PARTS, num_stages) == (1, 2)
    return PARTS == 1 or N // K != 2        # half a block of two heads spills registers


@tuned(tile_sizes(("PARTS", "BLOCK_K"), (2, 32, 4, 2), (1, 32, 8, 3), (1, 32, 8, 2)), key=_ATTENTION_KEY,
       fits=_forward_fits)
@jit
def _forward_kernel(q, k, v, out, lse, table, seen, scale, offset, T, M_BUCKET,
                    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr,
                    PARTS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """O and each row's log-sum of scores (of base 2).

    q, out (queries, N, H); k, v (T, K, H); lse (queries, N) fp32. A program owns the N/K heads of one kv head
    for a part of a block of queries (all of it, or a half), and reads each of the keys they see once: first
    those of the prefix that they continue, then of their own run.
    """
    TOKENS: tl.constexpr = BLOCK_Q // PARTS
    block = table + tl.program_id(0) // PARTS * 6
    head = tl.program_id(1)
    skipped = tl.program_id(0) % PARTS * TOKENS
    first = tl.load(block) + skipped
    count = tl.load(block + 1) - skipped        # a short block's second half has none
    key, end = tl.load(block + 2), tl.load(block + 3)
    prefix, prefix_end = tl.load(block + 4), tl.load(block + 5)
    tokens, valid, places = _rows(first, count, head, N, K, H, TOKENS)
    if PARTS > 1:       # only the keys that this part sees; of the prefix those of the block, hardly more
        end = tl.minimum(end, first + offset + TOKENS)
        key = tl.load(seen + first + offset, mask=count > 0, other=end)
        prefix = tl.where(count > 0, prefix, prefix_end)
    columns = tl.arange(0, H)
    q_tile = tl.load(q + places[:, None] * H + columns[None, :], mask=valid[:, None], other=0.0)
    ROWS: tl.constexpr = TOKENS * (N // K)
    sums, total = tl.zeros((ROWS, H), tl.float32), tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)
    prefix_tiles, tiles = _tiles_of(key, end, prefix, prefix_end, BLOCK_K)
    for i in range(0, tiles):
        keys, inside = _keys_of(i, prefix_tiles, key, end, prefix, prefix_end, BLOCK_K)
        at = (keys.to(tl.int64) * K + head)[:, None] * H + columns[None, :]
        k_tile = tl.load(k + at, mask=inside[:, None], other=0.0)
        v_tile = tl.load(v + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = _visible(
            (tokens + offset)[:, None], valid[:, None], keys[None, :], inside[None, :], seen, T)
        scores = tl.where(visible, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        p, rescale = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * rescale + tl.sum(p, 1)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * rescale[:, None], input_precision=PRECISION)
        top = higher
    out_tile = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + places[:, None] * H + columns[None, :], out_tile, mask=valid[:, None])
    tl.store(lse + places, top + tl.log2(total), mask=valid)


@tuned([{"BLOCK_K": 32, "num_warps": 8, "num_stages": 2}, {"BLOCK_K": 32, "num_warps": 8, "num_stages": 1}],
       key=_ATTENTION_KEY, fits=lambda **_: True)
@jit
def _query_gradient_kernel(q, k, v, out, do, dq, lse, delta, table, seen, scale, factor, offset, T, M_BUCKET,
                           N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                           BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """dQ = s dS K, and delta = rowsum(dO ∘ O) for the kernel after it.

    A program owns what it owns in the forward pass; factor is the scale of the scores, scale that of base 2.
    """
    block = table + tl.program_id(0) * 6
    head = tl.program_id(1)
    first, count = tl.load(block), tl.load(block + 1)
    tokens, valid, places = _rows(first, count, head, N, K, H, BLOCK_Q)
    at = places[:, None] * H + tl.arange(0, H)[None, :]
    q_tile = tl.load(q + at, mask=valid[:, None], other=0.0)
    do_tile = tl.load(do + at, mask=valid[:, None], other=0.0)
    lse_tile = tl.load(lse + places, mask=valid, other=0.0)
    out_tile = tl.load(out + at, mask=valid[:, None], other=0.0)
    delta_tile = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + places, delta_tile, mask=valid)
    sums = tl.zeros((BLOCK_Q * (N // K), H), tl.float32)
    key, end = tl.load(block + 2), tl.load(block + 3)
    prefix, prefix_end = tl.load(block + 4), tl.load(block + 5)
    prefix_tiles, tiles = _tiles_of(key, end, prefix, prefix_end, BLOCK_K)
    for i in range(0, tiles):
        keys, inside = _keys_of(i, prefix_tiles, key, end, prefix, prefix_end, BLOCK_K)
        at_keys = (keys.to(tl.int64) * K + head)[:, None] * H + tl.arange(0, H)[None, :]
        k_tile = tl.load(k + at_keys, mask=inside[:, None], other=0.0)
        v_tile = tl.load(v + at_keys, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = _visible(
            (tokens + offset)[:, None], valid[:, None], keys[None, :], inside[None, :], seen, T)
        p = tl.where(visible, tl.exp2(scores - lse_tile[:, None]), 0.0)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_tile[:, None])
        sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision=PRECISION)
    tl.store(dq + at, (sums * factor).to(dq.dtype.element_ty), mask=valid[:, None])


@tuned([{"ROWS": 32, "num_warps": 8, "num_stages": 2}, {"ROWS": 64, "num_warps": 8, "num_stages": 2}],
       key=_ATTENTION_KEY,
       fits=lambda ROWS, CAPABILITY, **_: (32 if CAPABILITY >= 90 else 64) == ROWS)
@jit
def _key_gradient_kernel(q, k, v, do, dk, dv, lse, delta, table, seen, scale, factor, offset, T, M_BUCKET,
                         N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """dV = Pᵀ dO, dK = s dSᵀ Q, with all the documents that continue a key's own.

    A program owns a block of keys of one kv head and goes over the queries that see them, the kv head's N/K
    query heads together: no two programs write to one place.
    """
    BLOCK_Q: tl.constexpr = ROWS // (N // K)
    block = table + tl.program_id(0) * 4
    head = tl.program_id(1)
    keys = tl.load(block) + tl.arange(0, BLOCK_K)
    inside = tl.arange(0, BLOCK_K) < tl.load(block + 1)
    at = (keys.to(tl.int64) * K + head)[:, None] * H + tl.arange(0, H)[None, :]
    k_tile = tl.load(k + at, mask=inside[:, None], other=0.0)
    v_tile = tl.load(v + at, mask=inside[:, None], other=0.0)
    dk_sums, dv_sums = tl.zeros((BLOCK_K, H), tl.float32), tl.zeros((BLOCK_K, H), tl.float32)
    end = tl.load(block + 3)
    for first in range(tl.load(block + 2), end, BLOCK_Q):
        tokens, valid, places = _rows(first - offset, end - first, head, N, K, H, BLOCK_Q)
        at_rows = places[:, None] * H + tl.arange(0, H)[None, :]
        q_tile = tl.load(q + at_rows, mask=valid[:, None], other=0.0)
        do_tile = tl.load(do + at_rows, mask=valid[:, None], other=0.0)
        lse_tile = tl.load(lse + places, mask=valid, other=0.0)
        delta_tile = tl.load(delta + places, mask=valid, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale     # (keys, rows)
        visible = _visible(
            (tokens + offset)[None, :], valid[None, :], keys[:, None], inside[:, None], seen, T)
        p = tl.where(visible, tl.exp2(scores - lse_tile[None, :]), 0.0)
        dv_sums = tl.dot(p.to(do_tile.dtype), do_tile, dv_sums, input_precision=PRECISION)
        ds = p * (tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) - delta_tile[None, :])
        dk_sums = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sums, input_precision=PRECISION)
    tl.store(dk + at, (dk_sums * factor).to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + at, dv_sums.to(dv.dtype.element_ty), mask=inside[:, None])


# ----------------------------------------------------------------------------------------------------------
# The autograd functions


class _AttentionByTriton(torch.autograd.Function):
    """Saved are the inputs, O, and a number for each row of scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Tables) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        sizes = _sizes(q, k, plan)
        if len(plan.queries):
            _forward_kernel[lambda config: (len(plan.queries) * config["PARTS"], k.shape[1])](
                q, k, v, out, lse, plan.queries, plan.seen, scale * LOG2_E, plan.first_query,
                *sizes.pop("counts"), BLOCK_Q=plan.block_q, **sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, plan, dout = ctx.scale, ctx.plan, dout.contiguous()
        delta, dq, dk, dv = (torch.empty_like(x) for x in (lse, q, k, v))
        sizes = _sizes(q, k, plan)
        counts = sizes.pop("counts")
        if len(plan.queries):
            _query_gradient_kernel[(len(plan.queries), k.shape[1])](
                q, k, v, out, dout, dq, lse, delta, plan.queries, plan.seen, scale * LOG2_E, scale,
                plan.first_query, *counts, BLOCK_Q=plan.block_q, **sizes)
        if len(plan.keys):
            _key_gradient_kernel[(len(plan.keys), k.shape[1])](
                q, k, v, dout, dk, dv, lse, delta, plan.keys, plan.seen, scale * LOG2_E, scale,
                plan.first_query, *counts, BLOCK_K=plan.block_k, **sizes)
        return dq, dk, dv, None, None


def _sizes(q: Tensor, k: Tensor, plan: Tables) -> dict:
    return {"counts": (len(k), next_power_of_2(len(k))), "N": q.shape[1], "K": k.shape[1], "H": q.shape[2],
            "PRECISION": precision(q.dtype)}


class _Call(ctypes.Structure):
    """`Call` in cpu/kernels.cpp: the sizes and tables of a call."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("N", "K", "H", "keys", "first_query", "blocks")),
                ("queries", ctypes.c_void_p), ("seen", ctypes.c_void_p), ("scale", ctypes.c_float)]

    def __init__(self, q: Tensor, k: Tensor, scale: float, plan: Tables) -> None:
        super().__init__(q.shape[1], k.shape[1], k.shape[2], len(k), plan.first_query, len(plan.queries),
                         plan.queries.data_ptr(), plan.seen.data_ptr(), scale)


class _AttentionByCpp(torch.autograd.Function):
    """Saved are the inputs and P, in bf16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Tables) -> Tensor:
        q, k, v, out = q.contiguous(), k.contiguous(), v.contiguous(), q.new_empty(q.shape)
        sizes = _Call(q, k, scale, plan)
        weights = None
        if any(ctx.needs_input_grad):
            weights = q.new_empty(call("attention_weights", sizes), dtype=torch.int32)
        buffer = q.new_empty(call("attention_room", sizes, False), dtype=torch.int32)
        call("attention_forward", sizes, q, k, v, out, weights, buffer)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        sizes, (dq, dk, dv) = _Call(q, k, ctx.scale, ctx.plan), map(torch.empty_like, (q, k, v))
        buffer = q.new_empty(call("attention_room", sizes, True), dtype=torch.int32)
        call("attention_backward", sizes, q, k, v, dout.contiguous(), weights, dq, dk, dv, buffer)
        return dq, dk, dv, None, None


class _AttentionByTorch(torch.autograd.Function):
    """Tile by tile, with P = softmax(s Q Kᵀ + mask):

        dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP − rowsum(P ∘ dP))      dQ = s dS K      dK = s dSᵀ Q

    The N/K query heads of one kv head are rows of one matrix, so that its keys and values are read once for
    all of them. Scores are fp32: in bf16 a large one would lose a few per cent of its weight. Saved is P, in
    the inputs' dtype. s is multiplied into Q, dQ and dK, which are smaller than the scores.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, weights = torch.empty_like(q), []
        for t in tiles:
            for head, heads in _kv_heads(q, k):
                rows = _stack(q[t.queries, heads]).to(wide) * scale
                scores = rows @ t.select(k[:, head]).to(wide).T                     # (N/K · queries, keys)
                scores.view(-1, *t.mask.shape).add_(t.mask)
                p = torch.softmax(scores, -1).to(q.dtype)
                out[t.queries, heads] = _unstack(p @ t.select(v[:, head]), heads)
                if any(ctx.needs_input_grad):
                    weights.append(p)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *weights = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        saved = iter(weights)
        for t in ctx.tiles:
            for head, heads in _kv_heads(q, k):
                p, do = next(saved), _stack(dout[t.queries, heads])
                ds = torch.ops.aten._softmax_backward_data(do @ t.select(v[:, head]).T, p, -1, p.dtype)
                t.add_to(dv[:, head], p.T @ do)
                t.add_to(dk[:, head], ds.T @ _stack(q[t.queries, heads]))
                dq[t.queries, heads] = _unstack(ds @ t.select(k[:, head]), heads)
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale).to(k.dtype), dv.to(v.dtype), None, None


def _kv_heads(q: Tensor, k: Tensor) -> list[tuple[int, slice]]:
    """Each kv head, and the query heads that it serves."""
    groups = q.shape[1] // k.shape[1]
    return [(head, slice(head * groups, (head + 1) * groups)) for head in range(k.shape[1])]


def _stack(x: Tensor) -> Tensor:
    """(queries, heads, H) → (heads · queries, H)."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _unstack(x: Tensor, heads: slice) -> Tensor:
    return x.view(heads.stop - heads.start, -1, x.shape[-1]).transpose(0, 1)


# ----------------------------------------------------------------------------------------------------------
# The public function


def _by_triton(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Sequence[Tile] | Tables) -> Tensor:
    _check_plan(q, k, v, plan)
    if not can_run(q.device):
        raise ValueError(f'attention\'s backend "triton" takes the current CUDA device; got {q.device}')
    return _AttentionByTriton.apply(q, k, v, scale, plan)


def _by_cpp(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Sequence[Tile] | Tables) -> Tensor:
    _check_plan(q, k, v, plan)
    fits = k.shape == v.shape and q.shape[2] == k.shape[2] and q.shape[2] % 32 == q.shape[1] % k.shape[1] == 0
    check("H a multiple of 32 and N of K", fits, q, k, v)
    return _AttentionByCpp.apply(q, k, v, scale, plan)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Sequence[Tile] | Tables) -> Tensor:
    if isinstance(plan, Tables):
        raise ValueError('attention\'s backend "torch" takes tiles: make the plan for the same backend')
    return (attention_reference if q.is_cuda else _AttentionByTorch.apply)(q, k, v, scale, plan)


def _check_plan(q: Tensor, k: Tensor, v: Tensor, plan: Sequence[Tile] | Tables) -> None:
    """Raises ValueError where kernels or C++ would read outside the operands."""
    if not isinstance(plan, Tables):
        raise ValueError('attention\'s backends "triton" and "cpp" take tables: make the plan for the same '
                         "backend")
    keys = plan.seen.shape[1]
    if (len(q), len(k), len(v)) != (keys - plan.first_query, keys, keys):
        raise ValueError(f"q, k and v have {len(q)}, {len(k)} and {len(v)} tokens, the plan is for "
                         f"{keys - plan.first_query} queries and {keys} keys; make it from the lengths of "
                         "these documents")


BACKENDS = {"triton": _by_triton, "cpp": _by_cpp, "torch": _by_torch}


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Sequence[Tile] | Tables,
              backend: str = "torch") -> Tensor:
    """O = softmax(s Q Kᵀ) V; gradients for q, k and v.

    q (T, N, H); k and v (keys, K, H), each kv head serving N/K query heads; plan: of `attention_tables.plan`,
    for the same backend; backend: of `BACKENDS`. Returns (T, N, H). Raises ValueError for operands that the
    plan is not for or that the backend does not take.
    """
    return pick(BACKENDS, backend)(q, k, v, scale, plan)
