"""Attention over documents that lie side by side: O = softmax(s Q Kᵀ) V, each token seeing its own document, itself and before.

The work is cut into tiles, some queries and the keys they may see, so that no score is computed outside a document or far
outside a window, and no (T, T) mask exists. Documents that begin alike may share that beginning, computed once: each then
continues it, and its tiles see the beginning's keys before their own. On a CPU a tile is a few matrix products, here with their
gradients; on a GPU it is one call of PyTorch's fused attention.

Source: the gradients are those of "FlashAttention-2" (arXiv 2307.08691, section 2.3); stacking the query heads that share
a kv head into one matrix is multi-query attention's own gain (arXiv 1911.02150).
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
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
    mask: Tensor | None             # (queries, keys seen): 0 where seen, else -inf; None on a GPU where query i sees just keys 0 to i
    beginning: slice | None = None  # of a shared beginning, the keys that stand before `keys`

    def seen(self, x: Tensor) -> Tensor:
        """The rows of all keys or values (…, keys, H) that the tile sees."""
        own = x[..., self.keys, :]
        return own if self.beginning is None else torch.cat((x[..., self.beginning, :], own), dim=-2)

    def add_to(self, x: Tensor, part: Tensor) -> None:
        """Add rows for what `seen` gives to where they come from."""
        before = 0 if self.beginning is None else self.beginning.stop - self.beginning.start
        x[..., self.keys, :] += part[before:]
        if before:
            x[..., self.beginning, :] += part[:before]


def tile(lengths: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device, starts: Sequence[int] | None = None,
         keys_only: int = 0) -> list[Tile]:
    """The tiles of documents of these lengths, one after another.

    window: tokens that a query sees, itself included (None: all). starts: each document's first position (default 0): one
    that starts at n > 0 continues the first n tokens of the last document before it that starts at 0. keys_only: so many
    documents at the beginning have keys but no queries.
    """
    firsts = list(itertools.accumulate(lengths, initial=0))                        # where each document's keys begin
    reach = window or firsts[-1] + max(starts or [0])                              # tokens seen, itself included
    masks: dict[tuple[int, int], Tensor] = {}
    tiles = []
    for root, run in _runs(starts or [0] * len(lengths)):
        if run[0] < keys_only:
            continue
        start, base = (starts or [0] * len(lengths))[run[0]], firsts[run[0]]
        documents = torch.tensor(run).repeat_interleave(torch.tensor([lengths[i] for i in run]))
        positions = torch.cat([torch.arange(start, start + lengths[i]) for i in run])
        at_once = QUERIES if device.type == "cpu" else len(positions) if window is None else window
        for first in range(0, len(positions), at_once):
            stop = min(first + at_once, len(positions))
            lowest = max(firsts[documents[first]] - base, first - reach + 1)           # the first of the run's keys seen by any query
            oldest = max(0, int(positions[first:stop].min()) - reach + 1)              # and of the beginning's
            beginning = slice(firsts[root] + oldest, firsts[root] + start) if oldest < start else None
            plain = beginning is None and len(run) == 1                                # query i stands at key i + keys - queries
            shape = stop - first, stop - lowest
            if plain and device.type != "cpu" and shape[0] == shape[1] <= reach:
                mask = None
            elif plain and shape in masks:
                mask = masks[shape]
            else:
                ago = positions[first:stop, None] - positions[lowest:stop]
                hidden = (ago < 0) | (ago >= reach) | (documents[first:stop, None] != documents[lowest:stop])
                if beginning:
                    hidden = torch.cat((positions[first:stop, None] - torch.arange(oldest, start) >= reach, hidden), dim=1)
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf).to(device)
                if plain:
                    masks[shape] = mask
            asked = base - firsts[keys_only]
            tiles.append(Tile(slice(asked + first, asked + stop), slice(base + lowest, base + stop), mask, beginning))
    return tiles


def _runs(starts: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(the document that is continued, the documents that continue it from one position), or a whole document and itself."""
    document = root = 0
    while document < len(starts):
        if starts[document] == 0:
            root, run = document, [document]
        else:
            others = (i for i in range(document, len(starts)) if starts[i] != starts[document])
            run = list(range(document, next(others, len(starts))))
        yield root, run
        document = run[-1] + 1


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
                scores = _stack(q[t.queries, heads]).to(wide) @ t.seen(k[:, head]).to(wide).T     # (N/K · queries, keys)
                scores.mul_(scale).view(-1, *t.mask.shape).add_(t.mask)
                p = torch.softmax(scores, -1).to(q.dtype)
                out[t.queries, heads] = _unstack(p @ t.seen(v[:, head]), heads)
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
                ds = (do @ t.seen(v[:, head]).T).to(wide).sub_(_stack(delta[t.queries, heads])).mul_(p).mul_(ctx.scale).to(q.dtype)
                t.add_to(dv[:, head], p.T @ do)
                t.add_to(dk[:, head], ds.T @ _stack(q[t.queries, heads]))
                dq[t.queries, heads] = _unstack(ds @ t.seen(k[:, head]), heads)
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
