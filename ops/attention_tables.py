"""Which keys each query may see, cut into tiles: packed documents, some of which continue a shared prefix.

No score is computed outside a document or far outside a window, and no (T, T) mask exists. A shared prefix is
computed once: each document that continues it has tiles that see the prefix's keys before their own.
docs/derivations.md draws the tiles.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ops.transfer import to_device_async
from ops.triton_utils import cdiv

QUERIES = 256           # of a tile by PyTorch on a CPU: its scores stay in the cache
CPP_ROWS = 192          # of a block of kernels.cpp, query heads of all tokens together: 16 of its strips
ROWS, KEYS = 128, 64    # of the kernels' tiles on Hopper: query heads of all tokens together, and keys
OLDER_ROWS, OLDER_KEYS = 64, 32         # on older cards
NO_WINDOW = 1 << 30     # the window of a layer that has none


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
    mask: Tensor | None     # (queries, keys seen): 0 where seen, else -inf; None: query i sees keys 0 to i
    prefix: slice | None = None     # keys of a shared prefix, which come before `keys`

    def select(self, x: Tensor) -> Tensor:
        """The rows of all keys or values (…, keys, H) that the tile sees."""
        own = x[..., self.keys, :]
        return own if self.prefix is None else torch.cat((x[..., self.prefix, :], own), dim=-2)

    def add_to(self, x: Tensor, rows: Tensor) -> None:
        """Add to x the gradient of what `select` returned."""
        prefix_length = 0 if self.prefix is None else self.prefix.stop - self.prefix.start
        x[..., self.keys, :] += rows[prefix_length:]
        if prefix_length:
            x[..., self.prefix, :] += rows[:prefix_length]


@dataclass(frozen=True)
class Tables:
    """The tiles as the kernels and C++ take them.  All int32, on the device.

    queries (blocks, 6): of a few tokens of one run (see `tables`) the first query and their number, the first
    key and the end of the keys of its own run that any of them sees, and the same of the prefix's keys. keys
    (blocks, 4): of a few tokens the first key and their number, and the first and the end of the queries that
    may see them. seen (3, keys): each token sees of its own document the keys from the first number on up to
    itself, and of the prefix that this continues those from the second to the third.

    The rows of queries and keys are in the order of their tokens, or those that take longest come first.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    first_query: int        # the first query's place among the keys
    block_q: int            # tokens of a block of queries
    block_k: int            # and of keys


def tables(lengths: Sequence[int], window: int | None, device: torch.device,
           starts: Sequence[int] | None = None, keys_only: int = 0, block_q: int = ROWS // 4,
           block_k: int = KEYS, longest_first: bool = False) -> Tables:
    """Documents of these lengths, one after another, cut into blocks of queries and of keys.

    window: tokens that a query sees, itself included (None: all). starts: each document's first position
    (default 0): one that starts at n > 0 continues the first n tokens of the last document before it that
    starts at 0. keys_only: the number of documents, of the first ones, that have keys but no queries.
    longest_first: whether the blocks are sorted by the number of tiles that they go over. A GPU starts them
    in this order, so that none of the last ones is a long one that the others wait for.

    Raises ValueError for a document that continues more tokens than there are.
    """
    lengths = np.array(lengths, dtype=np.int64)
    starts = np.array(starts or [0] * len(lengths), dtype=np.int64)
    firsts = np.concatenate(([0], np.cumsum(lengths)))          # each document's first token
    reach = window or NO_WINDOW
    documents = np.arange(len(lengths)).repeat(lengths)
    is_root = starts == 0
    positions = np.arange(firsts[-1]) - firsts[documents] + starts[documents]
    # The document that each continues, or is.
    roots = np.maximum.accumulate(np.where(is_root, np.arange(len(lengths)), 0))
    available = np.where(is_root[roots], lengths[roots], 0)
    if len(wrong := np.flatnonzero(starts > available)):
        raise ValueError(f"document {wrong[0]} starts at position {starts[wrong[0]]}, but the last one that "
                         f"starts at 0 has {available[wrong[0]]} tokens to continue")

    # A run: a document that starts at 0, or documents side by side that continue one from the same position.
    runs = np.flatnonzero(is_root | (np.diff(starts, prepend=-1) != 0))
    base, end = firsts[runs], firsts[np.append(runs[1:], len(lengths))]
    start, root = starts[runs], firsts[roots[runs]]

    # A family: a document and all that continue it: where they end, and at which position the first of them
    # continues.
    families = np.flatnonzero(is_root)
    family_ends = firsts[np.append(families[1:], len(lengths))]
    continued_from = families
    if len(families):
        continued_from = np.minimum.reduceat(np.where(is_root, 2 * NO_WINDOW, starts), families)
    family = np.cumsum(is_root)[runs] - 1
    last_query_end = np.where(start == 0, family_ends[family], end)
    continuation = np.where(start == 0, continued_from[family], 2 * NO_WINDOW)

    def blocks(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The run of each block of so many tokens, its first token and its end."""
        counts = cdiv(end - base, size)
        of = np.arange(len(runs)).repeat(counts)
        first = base[of] + size * (np.arange(len(of)) - (counts.cumsum() - counts)[of])
        return of, first, np.minimum(first + size, end[of])

    of, first, stop = blocks(block_q)
    has_queries = base[of] >= firsts[keys_only]
    of, first, stop = of[has_queries], first[has_queries], stop[has_queries]
    lowest = np.minimum.reduceat(positions, first) if len(first) else first
    queries = np.stack((
        first - firsts[keys_only], stop - first,
        np.maximum(firsts[documents[first]], first - reach + 1), stop,
        root[of] + np.clip(lowest - reach + 1, 0, start[of]), root[of] + start[of]), axis=1)

    of, first, stop = blocks(block_k)
    within_window = np.minimum(firsts[documents[stop - 1] + 1], stop - 1 + reach)
    last = np.where(continuation[of] - positions[stop - 1] < reach, last_query_end[of], within_window)
    keys = np.stack((first, stop - first, np.maximum(first, firsts[keys_only]), last), axis=1)
    if longest_first:
        tiles_of_queries = (cdiv(queries[:, 3] - queries[:, 2], block_k)
                            + cdiv(queries[:, 5] - queries[:, 4], block_k))
        tiles_of_keys = cdiv(keys[:, 3] - keys[:, 2], block_q)
        queries = queries[np.argsort(-tiles_of_queries, kind="stable")]
        keys = keys[np.argsort(-tiles_of_keys, kind="stable")]

    prefix, prefix_length = firsts[roots[documents]], starts[documents]
    seen = np.stack((
        np.maximum(firsts[documents], np.arange(len(documents)) - reach + 1),
        prefix + np.clip(positions - reach + 1, 0, prefix_length), prefix + prefix_length))
    on_device = [to_device_async(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)), device)
                 for x in (queries, keys, seen)]
    return Tables(*on_device, int(firsts[keys_only]), block_q, block_k)


def tile(lengths: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device,
         starts: Sequence[int] | None = None, keys_only: int = 0) -> list[Tile]:
    """The blocks of queries of `tables`, arguments as there, with their masks in `dtype`."""
    at_once = QUERIES if device.type == "cpu" else window or max(lengths, default=1)
    table = tables(lengths, window, torch.device("cpu"), starts, keys_only, at_once)
    masks: dict[tuple, Tensor] = {}
    tiles = []
    for first, count, key, end, prefix, prefix_end in table.queries.tolist():
        offsets = torch.tensor([key, prefix, prefix])
        own_first, prefix_first, prefix_last = table.seen[:, end - count:end, None] - offsets[:, None, None]
        causal = prefix == prefix_end and not own_first.any()   # query i sees keys 0 to i + keys - queries
        mask = None
        if device.type == "cpu" or not causal or count != end - key:
            visible = own_first, prefix_first, prefix_last
            mask_key = end - key, prefix_end - prefix, *(x.numpy().tobytes() for x in visible)
            if mask_key not in masks:
                prefix_keys, own_keys = torch.arange(prefix_end - prefix), torch.arange(end - key)
                seen = torch.cat(((prefix_keys >= prefix_first) & (prefix_keys < prefix_last),
                                  (own_keys >= own_first) & (own_keys <= own_keys[-count:, None])), dim=1)
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
                masks[mask_key] = mask.to(device)
            mask = masks[mask_key]
        tiles.append(Tile(slice(first, first + count), slice(key, end), mask,
                          slice(prefix, prefix_end) if prefix < prefix_end else None))
    return tiles


def plan(lengths: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device,
         heads: tuple[int, int, int], starts: Sequence[int] | None = None, keys_only: int = 0,
         backend: str = "torch") -> Sequence[Tile] | Tables:
    """What `attention` needs to know of documents of these lengths: `tables`, or for backend "torch" `tile`.

    heads: N, K and H; the others as for `tables` and `tile`.
    """
    N, K, _ = heads
    if backend == "cpp":
        return tables(lengths, window, device, starts, keys_only, max(1, CPP_ROWS * K // N))
    if backend == "triton":
        hopper = device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9
        rows, keys = (ROWS, KEYS) if hopper else (OLDER_ROWS, OLDER_KEYS)
        return tables(lengths, window, device, starts, keys_only, rows * K // N, keys, longest_first=True)
    return tile(lengths, window, dtype, device, starts, keys_only)
