"""Attention over documents that lie side by side: O = softmax(s Q Kᵀ) V, each token seeing its own document, itself and before.

The work is cut into tiles, some queries and the keys they may see, so that no score is computed outside a document or far
outside a window, and no (T, T) mask exists. Documents that begin alike may share that beginning, computed once: each then
continues it, and its tiles see the beginning's keys before their own. On a GPU three kernels walk through tables of the tiles,
with no number shared between two programs; on a CPU with AVX512-BF16 ops/cpu/kernels.cpp does; elsewhere a tile is a few matrix
products, here with their gradients. docs/derivations.md derives the gradients and draws the tiles.

Source: the gradients are those of "FlashAttention-2" (arXiv 2307.08691, section 2.3); stacking the query heads that share
a kv head into one matrix is multi-query attention's own gain (arXiv 1911.02150).
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
from ops.cpu.build import call, takes
from ops.triton_utils import jit, next_power_of_2, precision, tile_sizes, tl, tuned

LOG2_E = math.log2(math.e)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
    """O = softmax(s Q Kᵀ + mask) V, tile by tile.  The definition, by PyTorch's fused attention; shapes as for `attention`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                     # (1, heads, T, H)
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    outs = []
    for t in tiles:
        outs.append(F.scaled_dot_product_attention(q[:, :, t.queries], t.seen(k), t.seen(v), attn_mask=t.mask, scale=scale,
                                                   is_causal=t.mask is None))
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels.  G query heads share a kv head and are rows of one tile with it; scores are in powers of two.


@jit
def _rows(first, count, head, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, BLOCK_Q: tl.constexpr):
    """A tile's rows, G for each token: their tokens, whether they are there, and where they and their numbers lie."""
    G: tl.constexpr = N // K
    rows = tl.arange(0, BLOCK_Q * G)
    tokens, there = first + rows // G, rows // G < count
    places = tokens.to(tl.int64) * N + head * G + rows % G
    return tokens, there, places


@jit
def _seen(tokens, there, keys, inside, seen, T):
    """Which of the keys each query sees.  tokens and there are a column and keys and inside a row, or the other way about."""
    own, old = tl.load(seen + tokens, mask=there, other=0), tl.load(seen + T + tokens, mask=there, other=0)
    old_end = tl.load(seen + 2 * T + tokens, mask=there, other=0)
    return there & inside & (((own <= keys) & (keys <= tokens)) | ((old <= keys) & (keys < old_end)))


@jit
def _tiles_of(key, end, old, old_end, BLOCK_K: tl.constexpr):
    """How many tiles of keys some queries see: of the beginning, and of both."""
    shared = tl.cdiv(old_end - old, BLOCK_K)
    return shared, shared + tl.cdiv(end - key, BLOCK_K)


@jit
def _keys_of(i, shared, key, end, old, old_end, BLOCK_K: tl.constexpr):
    """The i-th of these tiles, and which of its keys are there."""
    at = tl.where(i < shared, old + i * BLOCK_K, key + (i - shared) * BLOCK_K)
    keys = at + tl.arange(0, BLOCK_K)
    return keys, keys < tl.where(i < shared, old_end, end)


_ATTENTION_KEY = ("M_BUCKET", "N", "K", "H")


@tuned(tile_sizes(("PARTS", "BLOCK_K"), (2, 32, 4, 2), (1, 32, 8, 3), (1, 32, 8, 2)), key=_ATTENTION_KEY,
       fits=lambda PARTS, num_stages, CAPABILITY, N, K, **_:
       (PARTS, num_stages) == (1, 2) if CAPABILITY < 90 else PARTS == 1 or N // K != 2)        # a half of two heads spills
@jit
def _forward_kernel(q, k, v, out, lse, table, seen, scale, offset, T, M_BUCKET, N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                    BLOCK_Q: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """O and each row's log-sum of scores (of base 2).

    q, out (queries, N, H); k, v (T, K, H); lse (queries, N) fp32. A program owns the N/K heads of one kv head for a part of a
    block of queries (all of it, or a half), and reads each of the keys they see once: first of the beginning that they continue,
    then of their own run.
    """
    TOKENS: tl.constexpr = BLOCK_Q // PARTS
    block = table + tl.program_id(0) // PARTS * 6
    head = tl.program_id(1)
    skipped = tl.program_id(0) % PARTS * TOKENS
    first, count = tl.load(block) + skipped, tl.load(block + 1) - skipped   # a short block's second half has none
    key, end, old, old_end = tl.load(block + 2), tl.load(block + 3), tl.load(block + 4), tl.load(block + 5)
    tokens, there, places = _rows(first, count, head, N, K, H, TOKENS)
    if PARTS > 1:       # only the keys that this part sees; of the beginning those of the block, hardly more
        end = tl.minimum(end, first + offset + TOKENS)
        key = tl.load(seen + first + offset, mask=count > 0, other=end)
        old = tl.where(count > 0, old, old_end)
    columns = tl.arange(0, H)
    q_tile = tl.load(q + places[:, None] * H + columns[None, :], mask=there[:, None], other=0.0)
    ROWS: tl.constexpr = TOKENS * (N // K)
    sums, total, top = tl.zeros((ROWS, H), tl.float32), tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -1e30, tl.float32)
    shared, tiles = _tiles_of(key, end, old, old_end, BLOCK_K)
    for i in range(0, tiles):
        keys, inside = _keys_of(i, shared, key, end, old, old_end, BLOCK_K)
        at = (keys.to(tl.int64) * K + head)[:, None] * H + columns[None, :]
        k_tile, v_tile = tl.load(k + at, mask=inside[:, None], other=0.0), tl.load(v + at, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = _seen((tokens + offset)[:, None], there[:, None], keys[None, :], inside[None, :], seen, T)
        scores = tl.where(visible, scores, -1e30)
        higher = tl.maximum(top, tl.max(scores, 1))
        p, fade = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * fade + tl.sum(p, 1)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * fade[:, None], input_precision=PRECISION)
        top = higher
    tl.store(out + places[:, None] * H + columns[None, :], (sums / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])
    tl.store(lse + places, top + tl.log2(total), mask=there)


@tuned([{"BLOCK_K": 32, "num_warps": 8, "num_stages": 2}, {"BLOCK_K": 32, "num_warps": 8, "num_stages": 1}], key=_ATTENTION_KEY,
       fits=lambda **_: True)
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
    tokens, there, places = _rows(first, count, head, N, K, H, BLOCK_Q)
    at = places[:, None] * H + tl.arange(0, H)[None, :]
    q_tile, do_tile = tl.load(q + at, mask=there[:, None], other=0.0), tl.load(do + at, mask=there[:, None], other=0.0)
    lse_tile, out_tile = tl.load(lse + places, mask=there, other=0.0), tl.load(out + at, mask=there[:, None], other=0.0)
    delta_tile = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + places, delta_tile, mask=there)
    sums = tl.zeros((BLOCK_Q * (N // K), H), tl.float32)
    key, end, old, old_end = tl.load(block + 2), tl.load(block + 3), tl.load(block + 4), tl.load(block + 5)
    shared, tiles = _tiles_of(key, end, old, old_end, BLOCK_K)
    for i in range(0, tiles):
        keys, inside = _keys_of(i, shared, key, end, old, old_end, BLOCK_K)
        at_keys = (keys.to(tl.int64) * K + head)[:, None] * H + tl.arange(0, H)[None, :]
        k_tile, v_tile = tl.load(k + at_keys, mask=inside[:, None], other=0.0), tl.load(v + at_keys, mask=inside[:, None], other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = _seen((tokens + offset)[:, None], there[:, None], keys[None, :], inside[None, :], seen, T)
        p = tl.where(visible, tl.exp2(scores - lse_tile[:, None]), 0.0)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION) - delta_tile[:, None])
        sums = tl.dot(ds.to(k_tile.dtype), k_tile, sums, input_precision=PRECISION)
    tl.store(dq + at, (sums * factor).to(dq.dtype.element_ty), mask=there[:, None])


@tuned([{"ROWS": 32, "num_warps": 8, "num_stages": 2}, {"ROWS": 64, "num_warps": 8, "num_stages": 2}], key=_ATTENTION_KEY,
       fits=lambda ROWS, CAPABILITY, **_: (32 if CAPABILITY >= 90 else 64) == ROWS)
@jit
def _key_gradient_kernel(q, k, v, do, dk, dv, lse, delta, table, seen, scale, factor, offset, T, M_BUCKET,
                         N: tl.constexpr, K: tl.constexpr, H: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    """dV = Pᵀ dO, dK = s dSᵀ Q, with all the documents that continue a key's own.

    A program owns a block of keys of one kv head and goes over the queries that see them, the kv head's N/K query heads
    together: nothing is shared with another program, and nothing added in memory.
    """
    BLOCK_Q: tl.constexpr = ROWS // (N // K)
    block = table + tl.program_id(0) * 4
    head = tl.program_id(1)
    keys = tl.load(block) + tl.arange(0, BLOCK_K)
    inside = tl.arange(0, BLOCK_K) < tl.load(block + 1)
    at = (keys.to(tl.int64) * K + head)[:, None] * H + tl.arange(0, H)[None, :]
    k_tile, v_tile = tl.load(k + at, mask=inside[:, None], other=0.0), tl.load(v + at, mask=inside[:, None], other=0.0)
    dk_sums, dv_sums = tl.zeros((BLOCK_K, H), tl.float32), tl.zeros((BLOCK_K, H), tl.float32)
    end = tl.load(block + 3)
    for first in range(tl.load(block + 2), end, BLOCK_Q):
        tokens, there, places = _rows(first - offset, end - first, head, N, K, H, BLOCK_Q)
        at_rows = places[:, None] * H + tl.arange(0, H)[None, :]
        q_tile, do_tile = tl.load(q + at_rows, mask=there[:, None], other=0.0), tl.load(do + at_rows, mask=there[:, None], other=0.0)
        lse_tile, delta_tile = tl.load(lse + places, mask=there, other=0.0), tl.load(delta + places, mask=there, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale                       # (keys, rows)
        visible = _seen((tokens + offset)[None, :], there[None, :], keys[:, None], inside[:, None], seen, T)
        p = tl.where(visible, tl.exp2(scores - lse_tile[None, :]), 0.0)
        dv_sums = tl.dot(p.to(do_tile.dtype), do_tile, dv_sums, input_precision=PRECISION)
        ds = p * (tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) - delta_tile[None, :])
        dk_sums = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sums, input_precision=PRECISION)
    tl.store(dk + at, (dk_sums * factor).to(dk.dtype.element_ty), mask=inside[:, None])
    tl.store(dv + at, dv_sums.to(dv.dtype.element_ty), mask=inside[:, None])


class _AttentionByTriton(torch.autograd.Function):
    """Saved are the inputs, O, and a number for each row of scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Tables) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        sizes = _sizes(q, k, plan)
        if len(plan.queries):
            _forward_kernel[lambda config: (len(plan.queries) * config["PARTS"], k.shape[1])](
                q, k, v, out, lse, plan.queries, plan.seen, scale * LOG2_E, plan.first_query, *sizes.pop("numbers"),
                BLOCK_Q=plan.block_q, **sizes)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, plan, dout = ctx.scale, ctx.plan, dout.contiguous()
        delta, dq, dk, dv = torch.empty_like(lse), torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        sizes = _sizes(q, k, plan)
        numbers = sizes.pop("numbers")
        if len(plan.queries):
            _query_gradient_kernel[(len(plan.queries), k.shape[1])](
                q, k, v, out, dout, dq, lse, delta, plan.queries, plan.seen, scale * LOG2_E, scale, plan.first_query, *numbers,
                BLOCK_Q=plan.block_q, **sizes)
        if len(plan.keys):
            _key_gradient_kernel[(len(plan.keys), k.shape[1])](
                q, k, v, dout, dk, dv, lse, delta, plan.keys, plan.seen, scale * LOG2_E, scale, plan.first_query, *numbers,
                BLOCK_K=plan.block_k, **sizes)
        return dq, dk, dv, None, None


def _sizes(q: Tensor, k: Tensor, plan: Tables) -> dict:
    return {"numbers": (len(k), next_power_of_2(len(k))), "N": q.shape[1], "K": k.shape[1], "H": q.shape[2],
            "PRECISION": precision(q.dtype)}


# ---------------------------------------------------------------------------------------------------------------------
# On a CPU, by C++


class _Call(ctypes.Structure):
    """What ops/cpu/kernels.cpp knows of a call (`Call` there)."""

    _fields_ = [*((name, ctypes.c_int64) for name in ("N", "K", "H", "keys", "first_query", "blocks")),
                ("queries", ctypes.c_void_p), ("seen", ctypes.c_void_p), ("scale", ctypes.c_float)]

    def __init__(self, q: Tensor, k: Tensor, scale: float, plan: Tables) -> None:
        super().__init__(q.shape[1], k.shape[1], k.shape[2], len(k), plan.first_query, len(plan.queries), plan.queries.data_ptr(),
                         plan.seen.data_ptr(), scale)


class _AttentionByCpp(torch.autograd.Function):
    """Saved are the inputs and P, in bf16."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Tables) -> Tensor:
        q, k, v, out = q.contiguous(), k.contiguous(), v.contiguous(), q.new_empty(q.shape)
        own = _Call(q, k, scale, plan)
        weights = q.new_empty(call("attention_weights", own), dtype=torch.int32) if any(ctx.needs_input_grad) else None
        call("attention_forward", own, q, k, v, out, weights, q.new_empty(call("attention_room", own, False), dtype=torch.int32))
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        own, (dq, dk, dv) = _Call(q, k, ctx.scale, ctx.plan), map(torch.empty_like, (q, k, v))
        call("attention_backward", own, q, k, v, dout.contiguous(), weights, dq, dk, dv,
             q.new_empty(call("attention_room", own, True), dtype=torch.int32))
        return dq, dk, dv, None, None


# ---------------------------------------------------------------------------------------------------------------------
# On a CPU, by PyTorch


class _Attention(torch.autograd.Function):
    """With P = softmax(s Q Kᵀ + mask):  dV = Pᵀ dO,  dS = P ∘ (dP − rowsum(P ∘ dP)) of dP = dO Vᵀ,  dQ = s dS K,  dK = s dSᵀ Q.

    The N/K query heads of one kv head stand below each other as rows of one matrix, so that its keys and values are read
    once for all of them. Scores are fp32: as bf16 they would lose a few per cent of a large one's weight. Saved is P, in
    the inputs' dtype. s is multiplied in where the matrices are narrow.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, weights = torch.empty_like(q), []
        for t in tiles:
            for head, heads in _kv_heads(q, k):
                scores = (_stack(q[t.queries, heads]).to(wide) * scale) @ t.seen(k[:, head]).to(wide).T     # (N/K · queries, keys)
                scores.view(-1, *t.mask.shape).add_(t.mask)
                p = torch.softmax(scores, -1).to(q.dtype)
                out[t.queries, heads] = _unstack(p @ t.seen(v[:, head]), heads)
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
                ds = torch.ops.aten._softmax_backward_data(do @ t.seen(v[:, head]).T, p, -1, p.dtype)
                t.add_to(dv[:, head], p.T @ do)
                t.add_to(dk[:, head], ds.T @ _stack(q[t.queries, heads]))
                dq[t.queries, heads] = _unstack(ds @ t.seen(k[:, head]), heads)
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


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Sequence[Tile] | Tables) -> Tensor:
    """O = softmax(s Q Kᵀ) V; gradients for q, k and v.

    q (T, N, H); k and v (keys, K, H), each kv head serving N/K query heads; plan: of `plan`. Returns (T, N, H). Raises
    ValueError where kernels or C++ would read what is not there.
    """
    if isinstance(plan, Tables):
        keys = plan.seen.shape[1]
        if (len(q), len(k), len(v)) != (keys - plan.first_query, keys, keys):
            raise ValueError(f"q, k and v have {len(q)}, {len(k)} and {len(v)} tokens, the plan is for {keys - plan.first_query} queries "
                             f"and {keys} keys; make it from the lengths of these documents")
        if plan.by_cpp and not (takes(q, k, v) and k.shape == v.shape and q.shape[2] == k.shape[2]
                                and q.shape[2] % 32 == q.shape[1] % k.shape[1] == 0):
            raise ValueError(f"C++ takes bf16 on a CPU, H a multiple of 32 and N of K; got {q.dtype}, {tuple(q.shape)}, {tuple(k.shape)} "
                             f"and {tuple(v.shape)}")
        return (_AttentionByCpp if plan.by_cpp else _AttentionByTriton).apply(q, k, v, scale, plan)
    return (attention_reference if q.is_cuda else _Attention.apply)(q, k, v, scale, plan)
