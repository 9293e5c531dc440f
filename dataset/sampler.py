"""The order of rows, their steps, and which process computes them."""
from __future__ import annotations

import hashlib
import heapq
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dataset.examples import Example
from dataset.prefix_sharing import Group, _cut, shared_beginnings, tokens_of
from dataset.rows import Conversation

# So many rows may wait for a step of --batch-tokens with room for them; on real rows 32 leave 0.5 % of the tokens empty.
MOST_WAITING = 32


# At most so many processes share out rows among themselves; larger teams save few tokens more and take longer (docs/scaling.md).
TEAM = 16


def query_hash(query: str) -> float:
    """A number in [0, 1) that depends on the query's words alone, not on case or spaces.

    Queries with a hash below some fraction are held out: a row stays on its side whatever rows are added, and the same
    question never stands on both sides.
    """
    words = " ".join(query.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def hold_out(rows: Iterable[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """(the rows to train on, in their order; those whose query's hash is below `fraction`, by that hash).

    In the hash's order the first few held-out rows are a fair share of every source.
    """
    hashed = [(query_hash(row.query), row) for row in rows]
    kept_apart = sorted((pair for pair in hashed if pair[0] < fraction), key=lambda pair: pair[0])
    return [row for number, row in hashed if number >= fraction], [row for _, row in kept_apart]


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, shuffled, by the seed and the epoch alone: a row of weight w is there w times.

    Of a fraction every row gets its share over the epochs: with 0.5 half of the rows come in one, the other half in the next.
    """
    times = times_taken(weights, seed, epoch + 1) - times_taken(weights, seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(weights)), times))


def times_taken(weights: np.ndarray, seed: int, epochs: int) -> np.ndarray:
    """How often each row was there in the first epochs; rows of one weight reach a whole number in turn, evenly spread."""
    turns, rng = np.empty(len(weights)), np.random.default_rng([seed, 0, 1])
    for weight in np.unique(weights):
        same = np.flatnonzero(weights == weight)
        turns[same] = rng.permutation(len(same)) / len(same)
    return np.floor(weights * epochs + turns).astype(np.int64)


def epoch_at(weights: np.ndarray, seed: int, position: int) -> tuple[int, int]:
    """The epoch that a position in the stream of epochs is in, and the position where that epoch begins."""
    epoch = max(0, int(position / weights.sum()) - 1)               # never too late: epochs take no more than their weights
    begin, end = (int(times_taken(weights, seed, epochs).sum()) for epochs in (epoch, epoch + 1))
    while end <= position:
        epoch, begin, end = epoch + 1, end, int(times_taken(weights, seed, epoch + 2).sum())
    return epoch, begin


def epoch_orders(weights: np.ndarray, seed: int, epochs: float | None, first: int) -> Iterator[list[int]]:
    """The rows of each epoch from the `first` on: of `epochs` epochs, the last of which may be a part of one, or without end."""
    for epoch in itertools.count(first) if epochs is None else range(first, math.ceil(epochs)):
        order = epoch_order(weights, seed, epoch).tolist()
        yield order if epochs is None else order[:round(min(1.0, epochs - epoch) * len(order))]


def steps(lengths: Sequence[int], seed: int, *, batch_rows: int | None = None, batch_tokens: int | None = None,
          epochs: float | None = None, weights: np.ndarray | None = None, start: int = 0) -> Iterator[tuple[list[int], int]]:
    """Cut the endless stream of shuffled epochs into optimizer steps.

    lengths: tokens of each row; weights: how often an epoch takes each, once by default. A step is `batch_rows` rows, or as
    many as fit into `batch_tokens` tokens (`filled_steps`). `start` is the position to go on from: the rows consumed so far,
    as yielded. The stream ends after `epochs` epochs, or never. Yields (row indices of the step, rows consumed after it).
    """
    weights = np.ones(len(lengths)) if weights is None else weights
    epoch, position = epoch_at(weights, seed, start)
    orders = epoch_orders(weights, seed, epochs, epoch)
    if batch_rows:
        stream = itertools.islice(itertools.chain.from_iterable(orders), start - position, None)
        cut, position = iter(lambda: list(itertools.islice(stream, batch_rows)), []), start
    else:                                                           # what a step holds depends on those before it in the epoch
        sizes = np.asarray(lengths).tolist()
        cut = itertools.chain.from_iterable(filled_steps(order, sizes, batch_tokens) for order in orders)
    for rows in cut:
        position += len(rows)
        if position > start:
            yield rows, position


def filled_steps(rows: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut rows into steps of at most `batch_tokens` tokens, or of one row that is longer; the last is as full as it comes.

    A row that does not fit waits for the next step, and is first in line there. A step ends when `MOST_WAITING` rows wait.
    """
    stream, waiting = iter(rows), []
    while True:
        step, room, passed = [], batch_tokens, []
        for row in itertools.chain(waiting, stream):
            if lengths[row] <= room or not step:
                step.append(row)
                room -= lengths[row]
                continue
            passed.append(row)
            if len(passed) == MOST_WAITING:
                break
        if not step:
            return
        yield step
        waiting = passed


def team_of(rank: int, processes: int) -> tuple[int, int, int]:
    """(number of teams, this process's team, its members): of up to `TEAM` processes, every one whose rank leaves the same remainder."""
    teams = -(-processes // TEAM)
    return teams, rank % teams, len(range(rank % teams, processes, teams))


def team_rows(rows: Sequence[int], lengths: Sequence[int], places: np.ndarray, rank: int, processes: int) -> list[int]:
    """Of a step's rows those that this process's team computes, for `deal` to share out among its members.

    To look for shared beginnings among all rows of a thousand processes would take longer than to train on them. So the rows
    are put in lexicographic order, where those that begin alike are neighbours (`places`: of each row there), cut into as many
    pieces as there are processes, equal in tokens, and the pieces dealt to the teams in turn.
    """
    teams, team, _ = team_of(rank, processes)
    if teams == 1:
        return list(rows)
    ordered = np.array(rows)[np.argsort(places[rows], kind="stable")]
    tokens = np.array([lengths[row] for row in ordered])
    piece = (tokens.cumsum() - tokens / 2) / tokens.sum() * processes            # that the row's middle falls into
    return ordered[piece.astype(int) % teams == team].tolist()


def deal(examples: Sequence[Example], processes: int, share: bool = True) -> list[list[Group]]:
    """The groups of rows that each of so many processes computes, so that the most that one has to compute is little.

    share: whether a beginning that rows have in common is computed once. A group that is large beside a process's share of the
    tokens is cut, and its beginning computed in each piece; of several sizes of pieces the one with the best deal is taken.
    """
    groups = shared_beginnings(examples) if share else [(0, [example]) for example in examples]
    if processes == 1:
        return [groups]
    whole, deals = sum(map(tokens_of, groups)), []
    for finer in (1, 2, 4, sys.maxsize):
        cut = [piece for group in groups for piece in _cut(group, math.ceil(finer * processes * tokens_of(group) / whole))]
        shares: list[list[Group]] = [[] for _ in range(processes)]
        load = [(0, process) for process in range(processes)]
        for piece in sorted(cut, key=tokens_of, reverse=True):              # the largest first, each to whoever has least
            tokens, process = heapq.heappop(load)
            shares[process].append(piece)
            heapq.heappush(load, (tokens + tokens_of(piece), process))
        deals.append((max(load)[0], shares))
    return min(deals, key=lambda deal: deal[0])[1]
