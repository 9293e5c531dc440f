"""Attention over documents that lie side by side: O = softmax(s Q Kᵀ) V, each token seeing its own document, itself and before.

The work is cut into tiles, some queries of one document and the keys they may see, so that no score is computed outside
a document or far outside a window, and no (T, T) mask exists. On a CPU a tile is a few matrix products, here with their
gradients; on a GPU it is one call of PyTorch's fused attention.

Source: the gradients are those of "FlashAttention-2" (arXiv 2307.08691, section 2.3); stacking the query heads that share
a kv head into one matrix is multi-query attention's own gain (arXiv 1911.02150).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 256           # of a tile on a CPU: its scores stay in the cache


@dataclass(frozen=True)
class Tile:
    """Some queries and the keys they may see, as rows of all the queries and all the keys.

    A local layer with a window of 4 sees of a document of 10 tokens, cut into tiles of 4 queries:

        keys     0 1 2 3 4 5 6 7 8 9
        query 0  ■ . . .                   ┐
              1  ■ ■ . .                   │ tile 0: keys 0 to 3
              2  ■ ■ ■ .                   │
              3  ■ ■ ■ ■                   ┘
              4    ■ ■ ■ ■ . . .           ┐
              5      ■ ■ ■ ■ . .           │ tile 1: keys 1 to 7
              6        ■ ■ ■ ■ .           │
              7          ■ ■ ■ ■           ┘
              8            ■ ■ ■ ■ .       ┐ tile 2: keys 5 to 9
              9              ■ ■ ■ ■       ┘
    """

    queries: slice
    keys: slice
    mask: Tensor | None     # (queries, keys): 0 where seen, else -inf; None on a GPU where query i sees just keys 0 to i


def tile(lengths: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device, before: int = 0) -> list[Tile]:
    """The tiles of documents of these lengths, one after another.

    window: tokens that a query sees, itself included (None: all). before: keys that stand before each document's own and
    are seen by it as well (a prefix computed earlier); the keys then lie as before + length, before + length, …
    """
    masks: dict[tuple[int, int], Tensor] = {}
    tiles, first_query, first_key = [], 0, 0
    for length in lengths:
        at_once = QUERIES if device.type == "cpu" else length if window is None else window
        for start in range(0, length, at_once):
            size = min(at_once, length - start)
            lowest = 0 if window is None else max(0, before + start - window + 1)
            keys = before + start + size - lowest
            causal = device.type != "cpu" and size == keys and size <= (window or size)
            if not causal and (size, keys) not in masks:     # the tile's query i stands at its key i + keys - size
                ago = torch.arange(size, device=device)[:, None] + keys - size - torch.arange(keys, device=device)
                hidden = (ago < 0) | (ago >= (window or keys + size))
                masks[size, keys] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -math.inf)
            tiles.append(Tile(slice(first_query + start, first_query + start + size),
                              slice(first_key + lowest, first_key + lowest + keys), None if causal else masks[size, keys]))
        first_query, first_key = first_query + length, first_key + before + length
    return tiles


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
    """O = softmax(s Q Kᵀ + mask) V, tile by tile.  The definition, by PyTorch's fused attention; shapes as for `attention`."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))                     # (1, heads, T, H)
    k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    outs = []
    for t in tiles:
        outs.append(F.scaled_dot_product_attention(q[:, :, t.queries], k[:, :, t.keys], v[:, :, t.keys], attn_mask=t.mask, scale=scale,
                                                   is_causal=t.mask is None))
    return torch.cat(outs, dim=2)[0].transpose(0, 1)


class _Attention(torch.autograd.Function):
    """With P = softmax(s Q Kᵀ + mask):  dV = Pᵀ dO,  dS = s P ∘ (dO Vᵀ − rowsum(dO ∘ O)),  dQ = dS K,  dK = dSᵀ Q.

    The N/K query heads of one kv head stand below each other as rows of one matrix, so that its keys and values are read
    once for all of them. Scores are fp32: as bf16 they would lose a few per cent of a large one's weight. Saved is P, in
    the inputs' dtype.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, weights = torch.empty_like(q), []
        for t in tiles:
            for head, heads in _kv_heads(q, k):
                scores = _stack(q[t.queries, heads]).to(wide) @ k[t.keys, head].to(wide).T        # (N/K · queries, keys)
                scores.mul_(scale).view(-1, *t.mask.shape).add_(t.mask)
                p = torch.softmax(scores, -1).to(q.dtype)
                out[t.queries, heads] = _unstack(p @ v[t.keys, head], heads)
                if any(ctx.needs_input_grad):
                    weights.append(p)
        ctx.save_for_backward(q, k, v, out, *weights)
        ctx.scale, ctx.tiles = scale, tiles
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, *weights = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)                              # (T, N, 1)
        saved = iter(weights)
        for t in ctx.tiles:
            for head, heads in _kv_heads(q, k):
                p, do = next(saved), _stack(dout[t.queries, heads])
                ds = (do @ v[t.keys, head].T).to(wide).sub_(_stack(delta[t.queries, heads])).mul_(p).mul_(ctx.scale).to(q.dtype)
                dv[t.keys, head] += p.T @ do
                dk[t.keys, head] += ds.T @ _stack(q[t.queries, heads])
                dq[t.queries, heads] = _unstack(ds @ k[t.keys, head], heads)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _kv_heads(q: Tensor, k: Tensor) -> list[tuple[int, slice]]:
    """Each kv head, and the query heads that it serves."""
    groups = q.shape[1] // k.shape[1]
    return [(head, slice(head * groups, (head + 1) * groups)) for head in range(k.shape[1])]


def _stack(x: Tensor) -> Tensor:
    """(queries, heads, H) → (heads · queries, H)."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _unstack(x: Tensor, heads: slice) -> Tensor:
    return x.view(heads.stop - heads.start, -1, x.shape[-1]).transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Sequence[Tile]) -> Tensor:
    """O = softmax(s Q Kᵀ) V over the tiles' queries and keys; gradients for q, k and v.

    q (T, N, H); k and v (keys, K, H), each kv head serving N/K query heads; tiles: every query in one of them. Returns
    (T, N, H).
    """
    return (attention_reference if q.is_cuda else _Attention.apply)(q, k, v, scale, tiles)
