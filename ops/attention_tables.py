"""Which keys each query may see, cut into tiles: documents side by side, some of which continue a shared prefix.

No score is computed outside a document or far outside a window, and no (T, T) mask exists. docs/derivations.md draws the
tiles.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ops.cpu.build import takes
from ops.transfer import to_device_async
from ops.triton_utils import can_run, cdiv

QUERIES = 256           # of a tile by PyTorch on a CPU: its scores stay in the cache
CPP_ROWS = 192          # of ops/cpu/kernels.cpp's blocks, query heads of all tokens together: 16 of its strips
ROWS, KEYS = 128, 64    # of the kernels' tiles on Hopper: query heads of all tokens together, and keys
OLDER_ROWS, OLDER_KEYS, OLDER_SHARED = 64, 32, 163 * 1024       # on older cards, and the bytes of shared memory that these take
EVERYTHING = 1 << 30    # the window of a layer that has none


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
    """The blocks of queries of `tables`, arguments as there, with their masks."""
    at_once = QUERIES if device.type == "cpu" else window or max(lengths, default=1)
    table = tables(lengths, window, torch.device("cpu"), starts, keys_only, at_once)
    masks: dict[tuple, Tensor] = {}
    tiles = []
    for first, count, key, end, old, old_end in table.queries.tolist():
        own_first, old_first, old_last = table.seen[:, end - count:end, None] - torch.tensor([key, old, old])[:, None, None]
        mask, plain = None, old == old_end and not own_first.any()                  # query i sees just keys 0 to i + keys - queries
        if device.type == "cpu" or not plain or count != end - key:
            shape = end - key, old_end - old, *(x.numpy().tobytes() for x in (own_first, old_first, old_last))
            if shape not in masks:
                older, own = torch.arange(old_end - old), torch.arange(end - key)
                seen = torch.cat(((older >= old_first) & (older < old_last), (own >= own_first) & (own <= own[-count:, None])), dim=1)
                masks[shape] = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf).to(device)
            mask = masks[shape]
        tiles.append(Tile(slice(first, first + count), slice(key, end), mask, slice(old, old_end) if old < old_end else None))
    return tiles


@dataclass(frozen=True)
class Tables:
    """The tiles as the kernels take them.  All int32, on the device.

    queries (blocks, 6): of a few tokens of one run the first query and how many there are, the first key and the end of the
    keys of its own run that any of them sees, and of the beginning's. keys (blocks, 4): of a few tokens the first key and
    how many, and the first and the end of the queries that may see them. seen (3, keys): each token sees of its own document
    the keys from the first number on up to itself, and of the beginning that this continues those from the second to the third.
    The rows of queries and keys stand in the order of their tokens, or those that take longest come first.
    """

    queries: Tensor
    keys: Tensor
    seen: Tensor
    first_query: int        # the first query's place among the keys
    block_q: int            # tokens of a block of queries
    block_k: int            # and of keys
    by_cpp: bool = False    # whether ops/cpu/kernels.cpp takes them


def tables(lengths: Sequence[int], window: int | None, device: torch.device, starts: Sequence[int] | None = None, keys_only: int = 0,
           block_q: int = ROWS // 4, block_k: int = KEYS, longest_first: bool = False) -> Tables:
    """Documents of these lengths, one after another, cut into blocks of queries and of keys.

    window: tokens that a query sees, itself included (None: all). starts: each document's first position (default 0): one
    that starts at n > 0 continues the first n tokens of the last document before it that starts at 0. keys_only: so many
    documents at the beginning have keys but no queries. longest_first: whether the blocks are sorted by the number of tiles that
    they go over. A GPU starts them in this order, and none of the last ones then is a long one that the others wait for.
    """
    lengths, starts = np.array(lengths, dtype=np.int64), np.array(starts or [0] * len(lengths), dtype=np.int64)
    firsts, reach = np.concatenate(([0], np.cumsum(lengths))), window or EVERYTHING
    documents, whole = np.arange(len(lengths)).repeat(lengths), starts == 0
    positions = np.arange(firsts[-1]) - firsts[documents] + starts[documents]
    roots = np.maximum.accumulate(np.where(whole, np.arange(len(lengths)), 0))                  # the document that each continues, or is
    there = np.where(whole[roots], lengths[roots], 0)
    if len(wrong := np.flatnonzero(starts > there)):
        raise ValueError(f"document {wrong[0]} starts at position {starts[wrong[0]]}, but the last one that starts at 0 has "
                         f"{there[wrong[0]]} tokens to continue")

    # A run: a whole document, or documents side by side that continue one from the same position.
    runs = np.flatnonzero(whole | (np.diff(starts, prepend=-1) != 0))
    base, end, start, root = firsts[runs], firsts[np.append(runs[1:], len(lengths))], starts[runs], firsts[roots[runs]]
    families = np.flatnonzero(whole)                # of a whole document and all that continue it: where they end, and first go on
    family_ends = firsts[np.append(families[1:], len(lengths))]
    family_goes_on = np.minimum.reduceat(np.where(whole, 2 * EVERYTHING, starts), families) if len(families) else families
    family = np.cumsum(whole)[runs] - 1
    ends, goes_on = np.where(start == 0, family_ends[family], end), np.where(start == 0, family_goes_on[family], 2 * EVERYTHING)

    def blocks(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The run of each block of so many tokens, its first token and its end."""
        counts = cdiv(end - base, size)
        of = np.arange(len(runs)).repeat(counts)
        first = base[of] + size * (np.arange(len(of)) - (counts.cumsum() - counts)[of])
        return of, first, np.minimum(first + size, end[of])

    of, first, stop = blocks(block_q)
    asking = base[of] >= firsts[keys_only]
    of, first, stop = of[asking], first[asking], stop[asking]
    lowest = np.minimum.reduceat(positions, first) if len(first) else first
    queries = np.stack((first - firsts[keys_only], stop - first, np.maximum(firsts[documents[first]], first - reach + 1), stop,
                        root[of] + np.clip(lowest - reach + 1, 0, start[of]), root[of] + start[of]), axis=1)
    of, first, stop = blocks(block_k)
    last = np.where(goes_on[of] - positions[stop - 1] < reach, ends[of], np.minimum(firsts[documents[stop - 1] + 1], stop - 1 + reach))
    keys = np.stack((first, stop - first, np.maximum(first, firsts[keys_only]), last), axis=1)
    if longest_first:
        of_queries = cdiv(queries[:, 3] - queries[:, 2], block_k) + cdiv(queries[:, 5] - queries[:, 4], block_k)
        of_keys = cdiv(keys[:, 3] - keys[:, 2], block_q)
        queries = queries[np.argsort(-of_queries, kind="stable")]
        keys = keys[np.argsort(-of_keys, kind="stable")]
    goes_on_from, where = firsts[roots[documents]], starts[documents]
    seen = np.stack((np.maximum(firsts[documents], np.arange(len(documents)) - reach + 1),
                     goes_on_from + np.clip(positions - reach + 1, 0, where), goes_on_from + where))
    on_device = [to_device_async(torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32)), device) for x in (queries, keys, seen)]
    return Tables(*on_device, int(firsts[keys_only]), block_q, block_k)


def plan(lengths: Sequence[int], window: int | None, dtype: torch.dtype, device: torch.device, heads: tuple[int, int, int],
         starts: Sequence[int] | None = None, keys_only: int = 0) -> Sequence[Tile] | Tables:
    """What `attention` needs to know of documents of these lengths: `tables` where kernels or C++ compute it, otherwise `tile`.

    heads: N, K and H. The kernels take bf16 and fp16, H of 16, 32, 64, 128 or 256, N/K of 1, 2, 4 or 8, and 163 KiB of shared
    memory; C++ takes bf16 on a CPU that multiplies it by AVX-512, and multiples of 32 for H; anything else goes tile by tile
    through PyTorch.
    """
    N, K, H = heads
    if device.type == "cpu" and dtype == torch.bfloat16 and H % 32 == 0 and takes():
        return replace(tables(lengths, window, device, starts, keys_only, max(1, CPP_ROWS * K // N)), by_cpp=True)
    if device.type == "cuda" and can_run(device) and dtype in (torch.bfloat16, torch.float16) \
            and H in (16, 32, 64, 128, 256) and N // K in (1, 2, 4, 8):
        card = torch.cuda.get_device_properties(device)
        if card.shared_memory_per_block_optin >= OLDER_SHARED:
            rows, keys = (ROWS, KEYS) if card.major >= 9 else (OLDER_ROWS, OLDER_KEYS)
            return tables(lengths, window, device, starts, keys_only, rows * K // N, keys, longest_first=True)
    return tile(lengths, window, dtype, device, starts, keys_only)
