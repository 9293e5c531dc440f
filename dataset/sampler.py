"""Which rows are held out, the order of the others, the steps they make, and the ranks that compute them."""
from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dataset.examples import Example
from dataset.prefix_sharing import PrefixGroup, group_by_prefix, split_group

# Rows that wait for a step of --batch-tokens that has room for them. With 32, real rows fill it to 99.5 %.
MAX_WAITING_ROWS = 32

# Ranks that divide rows among themselves. Larger groups save few tokens and take longer (docs/scaling.md).
MAX_GROUP_RANKS = 16


# ------------------------------------------------------------------------------------------------------------
# The held-out rows


def query_hash(query: str) -> float:
    """A number in [0, 1) that depends on the words of a query alone, not on case or spaces.

    Queries whose hash is below some fraction are held out. So a row stays on its side whatever rows are
    added, and the same question is never on both sides.
    """
    words = " ".join(query.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def split_held_out(hashes: Sequence[float] | np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(the rows to train on, in their order; the held-out rows, by their hash), as indices.

    hashes: `query_hash` of each row. In their order the first held-out rows are a fair sample of all sources.
    """
    hashes = np.asarray(hashes, np.float64)
    by_hash = np.argsort(hashes, kind="stable")
    return np.flatnonzero(hashes >= fraction), by_hash[hashes[by_hash] < fraction]


# ------------------------------------------------------------------------------------------------------------
# The order of rows


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, shuffled; it depends on the seed and the epoch alone.

    weights: how often an epoch takes each row. Of a fraction every row gets its share over the epochs: with a
    weight of 0.5 half of the rows come in one epoch and the other half in the next.
    """
    times = times_selected(weights, seed, epoch + 1) - times_selected(weights, seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(weights)), times))


def times_selected(weights: np.ndarray, seed: int, epochs: int) -> np.ndarray:
    """How often the first epochs have selected each row.

    Rows of one weight reach the next whole number at different times, evenly spaced and in random order.
    """
    offsets, rng = np.empty(len(weights)), np.random.default_rng([seed, 0, 1])
    for weight in np.unique(weights):
        rows = np.flatnonzero(weights == weight)
        offsets[rows] = rng.permutation(len(rows)) / len(rows)
    return np.floor(weights * epochs + offsets).astype(np.int64)


def epoch_at(weights: np.ndarray, seed: int, position: int) -> tuple[int, int]:
    """The epoch of a position in the stream of epochs, and the position where that epoch begins."""
    # Not too late, as no epoch has more rows than the sum of the weights, rounded up.
    epoch = max(0, int(position / weights.sum()) - 1)
    begin, end = (int(times_selected(weights, seed, epochs).sum()) for epochs in (epoch, epoch + 1))
    while end <= position:
        epoch, begin, end = epoch + 1, end, int(times_selected(weights, seed, epoch + 2).sum())
    return epoch, begin


def epoch_orders(weights: np.ndarray, seed: int, epochs: float | None, first: int) -> Iterator[list[int]]:
    """The rows of each epoch from the `first` on.

    epochs: how many in all, the last of them cut short where it is a fraction; None: without end
    """
    for epoch in itertools.count(first) if epochs is None else range(first, math.ceil(epochs)):
        order = epoch_order(weights, seed, epoch).tolist()
        yield order if epochs is None else order[:round(min(1.0, epochs - epoch) * len(order))]


# ------------------------------------------------------------------------------------------------------------
# Steps


def steps(lengths: Sequence[int], seed: int, *, batch_rows: int | None = None,
          batch_tokens: int | None = None, epochs: float | None = None, weights: np.ndarray | None = None,
          start: int = 0) -> Iterator[tuple[list[int], int]]:
    """Cut the stream of shuffled epochs into optimizer steps: (rows of the step, rows consumed after it).

    lengths: tokens of each row; weights: how often an epoch takes each row, once by default
    batch_rows, batch_tokens: a step is so many rows, or as many as `steps_of_tokens` fits into so many tokens
    epochs: where the stream ends; None: never; start: rows consumed so far, to go on from there
    """
    weights = np.ones(len(lengths)) if weights is None else weights
    epoch, position = epoch_at(weights, seed, start)
    orders = epoch_orders(weights, seed, epochs, epoch)
    if batch_rows:
        stream = itertools.islice(itertools.chain.from_iterable(orders), start - position, None)
        batches, position = iter(lambda: list(itertools.islice(stream, batch_rows)), []), start
    else:
        # What a step holds depends on the steps before it in the epoch: these are made too, and not yielded.
        sizes = np.asarray(lengths).tolist()
        batches = (rows for order in orders for rows in steps_of_tokens(order, sizes, batch_tokens))
    for rows in batches:
        position += len(rows)
        if position > start:
            yield rows, position


def steps_of_tokens(rows: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut rows into steps of at most `batch_tokens` tokens, or of one row that is longer.

    A row that does not fit waits, and is the first in the next step. A step ends when `MAX_WAITING_ROWS`
    wait, or with the last row.
    """
    stream, waiting = iter(rows), []
    while True:
        step, free_tokens, skipped = [], batch_tokens, []
        for row in itertools.chain(waiting, stream):
            if lengths[row] <= free_tokens or not step:
                step.append(row)
                free_tokens -= lengths[row]
                continue
            skipped.append(row)
            if len(skipped) == MAX_WAITING_ROWS:
                break
        if not step:
            return
        yield step
        waiting = skipped


# ------------------------------------------------------------------------------------------------------------
# Ranks


class RankGroup(NamedTuple):
    """A rank's group of up to `MAX_GROUP_RANKS` ranks, which divide their rows among themselves."""

    groups: int         # how many groups there are
    number: int         # of this rank's group, from 0
    size: int           # ranks in the group
    position: int       # of this rank in the group, from 0


def rank_group(rank: int, world_size: int) -> RankGroup:
    """The group of a rank: all ranks that leave the same remainder when divided by the number of groups."""
    groups = -(-world_size // MAX_GROUP_RANKS)
    number = rank % groups
    return RankGroup(groups, number, len(range(number, world_size, groups)), rank // groups)


def rank_group_rows(rows: Sequence[int], lengths: Sequence[int], order: np.ndarray | None, rank: int,
                    world_size: int) -> list[int]:
    """The rows of a step that the group of this rank computes.

    Looking for shared prefixes among the rows of a thousand ranks would take longer than training on them. So
    the rows are sorted, which makes rows that share a prefix neighbours, and cut into a piece a rank, with
    equally many tokens each. The pieces go to the groups in turn.

    lengths: tokens of each row of the data set
    order: the place of each row in `lexicographic_order`; None where there is one group
    """
    groups, number, *_ = rank_group(rank, world_size)
    if groups == 1:
        return list(rows)
    sorted_rows = np.array(rows)[np.argsort(order[rows], kind="stable")]
    tokens = np.array([lengths[row] for row in sorted_rows])
    middles = tokens.cumsum() - tokens / 2
    piece_of_row = (middles / tokens.sum() * world_size).astype(int)
    return sorted_rows[piece_of_row % groups == number].tolist()


def assign_to_ranks(examples: Sequence[Example], ranks: int,
                    share_prefixes: bool = True) -> list[list[PrefixGroup]]:
    """The groups of rows that each of so many ranks computes.

    Balances the groups over the ranks by the tokens to compute, longest first, each to the least loaded rank.
    A group that is large beside a rank's share is split, and its prefix is computed in each piece. Four sizes
    of pieces are tried, and the most even assignment is used.
    """
    if share_prefixes:
        groups = group_by_prefix(examples)
    else:
        groups = [PrefixGroup(0, [example]) for example in examples]
    if ranks == 1:
        return [groups]
    total = sum(group.computed_tokens for group in groups)
    assignments = []
    for pieces_per_rank in (1, 2, 4, sys.maxsize):
        pieces = []
        for group in groups:
            wanted = math.ceil(pieces_per_rank * ranks * group.computed_tokens / total)
            pieces += split_group(group, wanted)
        assignments.append(_balance(pieces, ranks))
    _, assignment = min(assignments, key=lambda entry: entry[0])
    return assignment


def _balance(groups: Iterable[PrefixGroup], ranks: int) -> tuple[int, list[list[PrefixGroup]]]:
    """(tokens of the most loaded rank, the groups of each rank): longest first, to the least loaded rank."""
    assignment: list[list[PrefixGroup]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for group in sorted(groups, key=lambda group: group.computed_tokens, reverse=True):
        tokens, rank = heapq.heappop(loads)
        assignment[rank].append(group)
        heapq.heappush(loads, (tokens + group.computed_tokens, rank))
    return max(loads)[0], assignment
