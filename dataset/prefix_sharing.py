"""Rows that share a beginning."""
from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np

from dataset.examples import Example

# Rows share a beginning of so many tokens at least; fewer are not worth a document of its own.
SHORTEST_BEGINNING = 32


# Rows, and how many tokens they begin with alike; those tokens are computed once where the rows stay together.
Group = tuple[int, list[Example]]


def shared_beginnings(examples: Sequence[Example]) -> list[Group]:
    """(tokens that a group's examples begin with alike, the group), so that few tokens are left to compute.

    A beginning ends before the token that predicts its row's first trained one, so that every loss is its own row's. A row
    that shares too little stands alone, with 0. Groups and rows keep the order of the examples.
    """
    order = lexicographic(examples)
    common = [_begin_alike(examples[a], examples[b]) for a, b in itertools.pairwise(order)]

    # Of the first rows in order: tokens saved at best, and where the last group begins and how much it shares.
    best = [(0, 0, 0)]
    for last in range(len(order)):
        choice, least = (best[last][0], last, 0), sys.maxsize
        for first in range(last - 1, -1, -1):
            least = min(least, common[first])
            if not least:
                break
            choice = max(choice, (best[first][0] + least * (last - first), first, least))
        best.append(choice)
    groups, stop = [], len(order)
    while stop:
        _, first, length = best[stop]
        groups.append((length, sorted(order[first:stop])))
        stop = first
    return [(length, [examples[i] for i in rows]) for length, rows in sorted(groups, key=lambda group: group[1][0])]


def lexicographic(examples: Sequence[Example]) -> list[int]:
    """The examples' indices in order of their ids, in which those that begin alike are neighbours."""
    keys = [example.ids.astype(">u4").tobytes() for example in examples]
    return sorted(range(len(examples)), key=keys.__getitem__)


def _begin_alike(a: Example, b: Example) -> int:
    """How many tokens two rows may share, 0 for too few."""
    most = min(*(int(example.trained.argmax()) - 1 if example.trained.any() else len(example) - 1 for example in (a, b)))
    differ = a.ids[:most] != b.ids[:most] if most > 0 else np.array([True])
    alike = int(differ.argmax()) if differ.any() else most
    return alike if alike >= SHORTEST_BEGINNING else 0


def tokens_of(group: Group) -> int:
    """Tokens to compute for a group."""
    shared, examples = group
    return shared + sum(len(example) - shared for example in examples)


def _cut(group: Group, pieces: int) -> list[Group]:
    """The group in about so many pieces of about equally many tokens of their own."""
    shared, examples = group
    own = np.array([len(example) - shared for example in examples])
    place = (np.cumsum(own) - own / 2) / own.sum() * min(pieces, len(examples))
    cut = [[examples[i] for i in rows] for _, rows in itertools.groupby(range(len(examples)), lambda i: int(place[i]))]
    return [(shared if len(piece) > 1 else 0, piece) for piece in cut]
