"""Keys and values of the tokens so far, kept so that each token goes through the model once.

`prefill` runs prompts through the model, many side by side; a prefix that they share is run once
(`prefill_into_cache`). `KVCache.step` then runs a few more tokens of every row.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data import side_by_side
from model import Gemma3
from ops.attention import attention
from ops.attention_tables import plan
from ops.onednn import pack_onednn_weight

PREFILL_TOKENS = 8_192          # tokens of a forward pass over prompts, unless one prompt alone is longer
MIN_SHARED_PREFIX_TOKENS = 64   # a shared prefix of fewer tokens is not worth a forward pass of its own


# ----------------------------------------------------------------------------------------------------------
# Prefixes and prefill


@dataclass
class Prefix:
    """P token ids, and each layer's keys and values for them, (P, K, H) each."""

    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    def truncated(self, length: int) -> Prefix:
        """The first `length` tokens."""
        return Prefix(self.ids[:length], [k[:length] for k in self.keys], [v[:length] for v in self.values])

    def extended(self, continuation: Prefix) -> Prefix:
        """These tokens, and after them those of a continuation that was computed for this prefix."""
        keys = [torch.cat(pair) for pair in zip(self.keys, continuation.keys, strict=True)]
        values = [torch.cat(pair) for pair in zip(self.values, continuation.values, strict=True)]
        return Prefix(self.ids + continuation.ids, keys, values)


def empty_prefix(model: Gemma3) -> Prefix:
    config = model.config
    empty = torch.empty(0, config.num_key_value_heads, config.head_dim, dtype=model.compute_dtype,
                        device=model.head.device)
    return Prefix([], [empty] * config.num_hidden_layers, [empty] * config.num_hidden_layers)


def shared_prefix_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with.

    >>> shared_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2]])
    2
    """
    first, last = min(rows), max(rows)      # in lexicographic order; what these two share, all share
    for length, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return length
    return min(len(first), len(last))


def prefill(model: Gemma3, prefix: Prefix, rows: Sequence[Sequence[int]]) -> list[Prefix]:
    """Run continuations of a prefix through the model, in one forward pass.

    rows: the token ids of each continuation, none empty. Returns the ids, keys and values of each, without
    the prefix.
    """
    lengths = [len(row) for row in rows]
    device, windows, start = model.head.device, model.config.windows, len(prefix.ids)
    keys: list[tuple[Tensor, ...]] = []             # of each layer and row, (length, K, H)
    values: list[tuple[Tensor, ...]] = []
    if start:                                       # the prefix is a document that has keys, but no queries
        documents, starts, keys_only = [start, *lengths], [0] + [start] * len(lengths), 1
    else:
        documents, starts, keys_only = lengths, None, 0
    plans = {
        window: plan(documents, window, model.compute_dtype, device, model.config.heads, starts, keys_only,
                     model.backends.attention)
        for window in set(windows)}

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        keys.append(k.split(lengths))
        values.append(v.split(lengths))
        k = torch.cat((prefix.keys[layer], k))
        v = torch.cat((prefix.values[layer], v))
        return attention(q, k, v, scale, plans[windows[layer]], model.backends.attention)

    tokens = torch.tensor(list(itertools.chain(*rows)), device=device)
    positions, _ = side_by_side(lengths, start)
    model.run(tokens, positions.to(device), [partial(attend, layer=layer) for layer in range(len(windows))])
    return [Prefix(list(row), [k[i] for k in keys], [v[i] for v in values]) for i, row in enumerate(rows)]


def prefill_into_cache(model: Gemma3, cache: KVCache, cached_prefix: Prefix, prompts: Sequence[Sequence[int]],
                       next_prompt: Sequence[int] | None, first_row: int) -> Prefix:
    """Fill rows of the cache with all but the last token of each prompt; the first step runs the last one.

    Returns the prefix that these prompts share, and the next one if there is one, for the next call.

    cached_prefix: returned by the call before, or empty; what the prompts share with it is not computed again
    next_prompt: the first one of the next call; None if there is none
    first_row: the cache's row of the first prompt; the others follow
    """
    bodies = [list(prompt[:-1]) for prompt in prompts]
    prefix = cached_prefix.truncated(shared_prefix_length([cached_prefix.ids, *bodies]))
    shared = 0
    if next_prompt or len(prompts) > 1:
        shared = shared_prefix_length([*bodies, list(next_prompt[:-1])] if next_prompt else bodies)
    if shared >= len(prefix.ids) + MIN_SHARED_PREFIX_TOKENS:
        [continuation] = prefill(model, prefix, [bodies[0][len(prefix.ids):shared]])
        prefix = prefix.extended(continuation)

    remaining: list[tuple[int, list[int]]] = []     # (the cache's row, its tokens after the prefix)
    for row, body in enumerate(bodies, start=first_row):
        if len(body) > len(prefix.ids):
            remaining.append((row, body[len(prefix.ids):]))
        else:
            cache.fill(row, prefix)
    while remaining:
        sizes = itertools.accumulate(len(tokens) for _, tokens in remaining)
        count = max(1, sum(size <= PREFILL_TOKENS for size in sizes))
        continuations = prefill(model, prefix, [tokens for _, tokens in remaining[:count]])
        for (row, _), continuation in zip(remaining[:count], continuations, strict=True):
            cache.fill(row, prefix, continuation)
        remaining = remaining[count:]
    return prefix


# ----------------------------------------------------------------------------------------------------------
# The cache


def output_projection(model: Gemma3) -> Callable[[Tensor], Tensor]:
    """Hidden states (M, D) → logits (M, V).

    On a CPU most of a step's time goes into reading the output matrix. oneDNN reads it twice as fast once it
    is packed in oneDNN's own layout, and gives the same logits; packing takes 0.2 s and makes a second copy.
    """
    head = model.head.to(model.compute_dtype)
    return pack_onednn_weight(head) or (lambda hidden: F.linear(hidden, head))


class KVCache:
    """Keys and values of every layer for B rows of different lengths.

    A layer has S slots a row, (B, K, S, H), and position p lies in slot p mod S. A global layer has a slot
    for every position; a local layer has as many as its window, and one for each drafted token of a step.
    """

    def __init__(self, model: Gemma3, rows: int, max_length: int, step_tokens: int,
                 project: Callable[[Tensor], Tensor] | None = None) -> None:
        """An empty cache.

        max_length: positions of a row
        step_tokens: tokens of a row in a step, its last one and the drafts
        project: hidden states → logits, by default `output_projection`
        """
        self.windows, self.device = model.config.windows, model.head.device
        self.project = project or output_projection(model)
        K, H, dtype = model.config.num_key_value_heads, model.config.head_dim, model.compute_dtype
        self.keys: list[Tensor] = []                # of each layer, (B, K, S, H)
        self.values: list[Tensor] = []
        for window in self.windows:
            slots = max_length if window is None else min(max_length, window + step_tokens - 1)
            self.keys.append(torch.zeros(rows, K, slots, H, dtype=dtype, device=self.device))
            self.values.append(torch.zeros_like(self.keys[-1]))

    def fill(self, row: int, prefix: Prefix, continuation: Prefix | None = None) -> None:
        """Overwrite a row with the keys and values of a prefix, and of its continuation if there is one."""
        self._fill(self.keys, row, prefix.keys, continuation and continuation.keys)
        self._fill(self.values, row, prefix.values, continuation and continuation.values)

    def _fill(self, cached: list[Tensor], row: int, prefix: list[Tensor], own: list[Tensor] | None) -> None:
        for layer, slots in enumerate(cached):
            computed = torch.cat((prefix[layer], own[layer])) if own else prefix[layer]     # (length, K, H)
            length, S = len(computed), slots.shape[2]
            kept_positions = torch.arange(max(0, length - S), length, device=self.device)
            slots[row][:, kept_positions % S] = computed[kept_positions].transpose(0, 1)

    def clear(self) -> None:
        """Zero all keys and values, as in a new cache."""
        for slots in (*self.keys, *self.values):
            slots.zero_()

    def move(self, row: int, to: int) -> None:
        """Copy a row over another one."""
        for slots in (*self.keys, *self.values):
            slots[to] = slots[row]

    def step(self, model: Gemma3, tokens: Tensor, positions: Tensor, max_position: int) -> Tensor:
        """Logits (B, Q, V) of the next token after each of `tokens` (B, Q) at `positions` (B, Q).

        Their keys and values are written to the cache.

        max_position: no position is larger, so that the slots after it need not be read
        """
        B, Q = tokens.shape
        rows = torch.arange(B, device=self.device)[:, None]
        slots_and_masks = self._slots_and_masks(positions, max_position)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            (K, S, H), N = keys.shape[1:], q.shape[1]
            slots, visible = slots_and_masks[S, self.windows[layer]]
            keys[rows, :, slots] = k.view(B, Q, K, H)
            values[rows, :, slots] = v.view(B, Q, K, H)
            # The query heads that share a kv head become queries of one head, so that its keys are read once.
            q = q.view(B, Q, K, N // K, H).transpose(1, 2).reshape(B, K, -1, H)
            used = visible.shape[-1]
            mask = visible[:, None, :, None].expand(-1, -1, -1, N // K, -1).reshape(B, 1, -1, used)
            keys, values = keys[:B, :, :used], values[:B, :, :used]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
            return out.view(B, K, Q, N // K, H).transpose(1, 2).reshape(B * Q, N, H)

        attends = [partial(attend, layer=layer) for layer in range(len(self.keys))]
        hidden = model.run(tokens.flatten(), positions.flatten(), attends)
        return self.project(hidden).view(B, Q, -1)

    def _slots_and_masks(self, positions: Tensor, max_position: int) -> dict[tuple, tuple[Tensor, Tensor]]:
        """{(S, window): (slots, visible)}, once for each kind of layer.

        slots (B, Q): where the tokens at `positions` (B, Q) lie. visible (B, Q, used): which of the slots in
        use each of them attends to. A slot holds the latest position that lies in it.
        """
        found: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        for keys, window in zip(self.keys, self.windows, strict=True):
            S = keys.shape[2]
            if (S, window) not in found:
                used = min(S, max_position + 1)
                tokens_ago = (positions[:, :, None] - torch.arange(used, device=self.device)) % S
                most_ago = positions if window is None else positions.clamp(max=window - 1)
                found[S, window] = positions % S, tokens_ago <= most_ago[:, :, None]
        return found
