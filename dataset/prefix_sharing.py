"""Rows that share a prefix: groups whose common first tokens are computed once.

An application's rows declare the same tools, so their first thousand tokens are often the same. The prefix of
a group becomes a document of its own, which each of the group's rows continues (`data.Batch`). Losses and
gradients stay the same.
"""
from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dataset.examples import Example

# A shorter shared prefix is not worth a document of its own.
MIN_PREFIX_TOKENS = 32


class PrefixGroup(NamedTuple):
    """Rows, and how many tokens they share as a prefix: 0 for rows that share none."""

    prefix_tokens: int
    examples: list[Example]

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model computes for the group, its prefix once."""
        return self.prefix_tokens + sum(len(example) - self.prefix_tokens for example in self.examples)


def group_by_prefix(examples: Sequence[Example]) -> list[PrefixGroup]:
    """Put rows that share a prefix into groups, so that as few tokens as possible are left to compute.

    A prefix ends before the position that predicts the first token with loss of any of its rows, so that each
    row computes all of its losses itself. A row that shares less than `MIN_PREFIX_TOKENS` is a group of its
    own. Groups, and the rows in each, keep the order of the examples.
    """
    order = lexicographic_order(examples)
    shared = [_shared_tokens(examples[a], examples[b]) for a, b in itertools.pairwise(order)]

    # Dynamic programming over the sorted rows. best[n]: for the first n of them, the most tokens that can be
    # saved, and where the last group of that solution begins and how long its prefix is.
    best = [(0, 0, 0)]
    for last in range(len(order)):
        choice, prefix = (best[last][0], last, 0), sys.maxsize
        for first in range(last - 1, -1, -1):
            prefix = min(prefix, shared[first])
            if not prefix:
                break
            saved = best[first][0] + prefix * (last - first)
            choice = max(choice, (saved, first, prefix))
        best.append(choice)

    groups, stop = [], len(order)
    while stop:
        _, first, prefix = best[stop]
        groups.append((prefix, sorted(order[first:stop])))
        stop = first
    groups.sort(key=lambda group: group[1][0])
    return [PrefixGroup(prefix, [examples[i] for i in rows]) for prefix, rows in groups]


def lexicographic_order(examples: Sequence[Example]) -> list[int]:
    """The indices of the examples in order of their ids, in which rows that share a prefix are neighbours."""
    keys = [example.ids.astype(">u4").tobytes() for example in examples]
    return sorted(range(len(examples)), key=keys.__getitem__)


def _shared_tokens(a: Example, b: Example) -> int:
    """How long a prefix two rows may share; 0 where it is too short."""
    limit = min(_max_prefix(a), _max_prefix(b))
    if limit < MIN_PREFIX_TOKENS:
        return 0
    different = a.ids[:limit] != b.ids[:limit]
    shared = int(different.argmax()) if different.any() else limit
    return shared if shared >= MIN_PREFIX_TOKENS else 0


def _max_prefix(example: Example) -> int:
    """Tokens before the position that predicts the first token with loss."""
    return int(example.loss_mask.argmax()) - 1 if example.loss_mask.any() else len(example) - 1


def split_group(group: PrefixGroup, pieces: int) -> list[PrefixGroup]:
    """Split a group into about so many pieces, whose rows have about equally many tokens after the prefix."""
    prefix, examples = group
    own = np.array([len(example) - prefix for example in examples])
    middles = np.cumsum(own) - own / 2
    piece_of_row = (middles / own.sum() * min(pieces, len(examples))).astype(int).tolist()
    rows_of_pieces = itertools.groupby(range(len(examples)), piece_of_row.__getitem__)
    split = [[examples[i] for i in rows] for _, rows in rows_of_pieces]
    return [PrefixGroup(prefix if len(piece) > 1 else 0, piece) for piece in split]
