"""Examples → the packed batches of each optimizer step. No token is padding, and no row is cut.

    row (dict)
    ── dataset/rows ──────▶ Conversation
    ── dataset/examples ──▶ Example(ids, loss_mask)
    ── this file ─────────▶ Batch(tokens, positions, documents, loss_rows, targets)

A step's rows are divided among the ranks. Each rank packs its rows side by side into batches of at most
--micro-tokens tokens, as documents that do not attend to each other. Rows that share a prefix hold it once
(dataset/prefix_sharing.py).
"""
from __future__ import annotations

import functools
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset import sampler
from dataset.examples import Example
from dataset.prefix_sharing import PrefixGroup, lexicographic_order
from dataset.token_dataset import TokenDataset
from ops.transfer import to_device_async

# The length of the documents that fill up a batch. Attention's blocks have 16 to 64 tokens for Gemma 3 270M,
# so all blocks but the last are full.
FILLING_TOKENS = 64


class Span(NamedTuple):
    """A document of a batch: the tokens of an example from `start` to `stop`."""

    example: Example
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Documents side by side: T tokens, M of which predict a next token that carries loss.  All int64.

    tokens (T)
    positions (T)     of each token in its row
    documents (T)     the number of each token's document
    loss_rows (M)     the indices of the tokens that predict with loss
    targets (M)       the tokens that they predict
    spans             the documents, in order

    A prefix that several rows share is a document of its own. Each of these rows continues it, as a document
    whose positions do not begin at 0 (`Gemma3.forward`).
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor
    loss_rows: Tensor
    targets: Tensor
    spans: list[Span]

    @property
    def loss_tokens(self) -> int:
        """M, the tokens that carry loss."""
        return len(self.targets)

    def keys(self) -> Tensor:
        """(T) int32: for each token a hash of its row up to it, which LoRA's dropout depends on."""
        hashes = [prefix_hashes(example.ids)[start:stop] for example, start, stop in self.spans]
        return torch.from_numpy(np.concatenate(hashes))

    @property
    def sources(self) -> list[str]:
        """"file:line" of each row."""
        return [example.source for example, _, stop in self.spans if stop == len(example)]

    def filled(self, tokens: int) -> Batch:
        """The batch, filled up to so many tokens with documents that carry no loss; itself if it is as large.

        The documents are short: the longer a document, the longer its last tokens take in attention.
        """
        missing = tokens - len(self.tokens)
        if not missing:
            return self
        lengths = [min(FILLING_TOKENS, missing - start) for start in range(0, missing, FILLING_TOKENS)]
        return build_batch([*self.spans, *map(_no_loss, lengths)])

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(tokens, positions, documents, loss_rows, targets), for the model.

        Positions and documents stay on the CPU, where the model reads the borders of documents. Nothing waits
        for the device.
        """
        tokens, loss_rows, targets = (to_device_async(x, device) for x in (self.tokens, self.loss_rows,
                                                                           self.targets))
        return tokens, self.positions, self.documents, loss_rows, targets


# ------------------------------------------------------------------------------------------------------------
# Packing


def pack(examples: Sequence[Example], max_tokens: int, share_prefixes: bool = True) -> list[Batch]:
    """Pack the examples, in their order, into few batches of at most `max_tokens` tokens.

    No example is cut: one that is longer gets a batch of its own.
    share_prefixes: compute a prefix that rows share once; losses and gradients are the same
    """
    return pack_groups(sampler.assign_to_ranks(examples, 1, share_prefixes)[0], max_tokens)


def pack_groups(groups: Sequence[PrefixGroup], max_tokens: int) -> list[Batch]:
    """Pack groups of rows that share a prefix into few batches of at most `max_tokens` tokens.

    The batches are about equally large, because the largest one decides how much memory a step takes: 4,700
    tokens with a maximum of 4,096 become 2 × 2,350. For this, bisection finds the smallest maximum that needs
    neither more batches nor more tokens. (A prefix is computed in each batch that needs it, so that smaller
    batches may compute more tokens.)
    """
    batches = _fill(groups, max_tokens)
    count, tokens = _cost(batches)
    if count > 1:
        limits = range(-(-tokens // count), max_tokens)
        smallest = bisect_left(limits, True, key=lambda limit: _cost(_fill(groups, limit)) <= (count, tokens))
        batches = _fill(groups, limits[smallest]) if smallest < len(limits) else batches
    return [build_batch(spans) for spans in batches]


def _cost(batches: list[list[Span]]) -> tuple[int, int]:
    """(batches, tokens to compute)."""
    return len(batches), sum(stop - start for spans in batches for _, start, stop in spans)


def _fill(groups: Iterable[PrefixGroup], max_tokens: int) -> list[list[Span]]:
    """The spans of each batch: the groups one after another, each batch as full as it gets."""
    batches: list[list[Span]] = []
    free_tokens = 0
    for group in groups:
        prefix, group_tokens = group.prefix_tokens, group.computed_tokens
        has_prefix = False                                   # whether the last batch holds the group's prefix
        for example in group.examples:
            needed = len(example) - (prefix if has_prefix else 0)
            is_split = not has_prefix and free_tokens < group_tokens <= max_tokens
            if not batches or needed > free_tokens or is_split:
                batches.append([])
                free_tokens, has_prefix = max_tokens, False
            if prefix and not has_prefix:
                batches[-1].append(Span(example, 0, prefix))
                free_tokens, has_prefix = free_tokens - prefix, True
            batches[-1].append(Span(example, prefix, len(example)))
            free_tokens -= len(example) - prefix
    return batches


def build_batch(spans: list[Span]) -> Batch:
    """Put documents side by side.  One that does not begin at 0 continues the last one that does."""
    tokens = np.concatenate([example.ids[start:stop] for example, start, stop in spans])
    next_tokens = np.concatenate([example.ids[start + 1:stop + 1] for example, start, stop in spans])
    loss_mask = np.concatenate([example.loss_mask[start + 1:stop + 1] for example, start, stop in spans])
    loss_rows = np.flatnonzero(loss_mask)
    lengths, starts = [span.stop - span.start for span in spans], [span.start for span in spans]
    positions, documents = side_by_side(lengths, starts)
    targets = next_tokens[loss_rows].astype(np.int64)
    return Batch(torch.from_numpy(tokens.astype(np.int64)), positions, documents, torch.from_numpy(loss_rows),
                 torch.from_numpy(targets), spans)


def side_by_side(lengths: Sequence[int], starts: Sequence[int] | int = 0) -> tuple[Tensor, Tensor]:
    """(positions, documents), (Σ lengths) int64 each, of documents one after another.

    starts: the position that each document begins with
    """
    offsets = np.cumsum(lengths) - lengths
    documents = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(documents)) - np.repeat(offsets - starts, lengths)
    return torch.from_numpy(positions), torch.from_numpy(documents)


def _no_loss(tokens: int) -> Span:
    """A document without loss."""
    example = Example(np.zeros(tokens + 1, np.int32), np.zeros(tokens + 1, bool), "")
    return Span(example, 0, tokens)


# One token without loss: what a rank computes that has no batch left while others have one (FSDP).
IDLE = build_batch([_no_loss(1)])


def prefix_hashes(ids: np.ndarray) -> np.ndarray:
    """(n) int32: for each id a hash of all up to it, the upper half of Σ (id + 1) c^position in 64 bits."""
    powers = _powers(1 << len(ids).bit_length())[:len(ids)]
    return (np.cumsum((ids.astype(np.uint64) + 1) * powers) >> 32).astype(np.uint32).view(np.int32)


@functools.lru_cache
def _powers(count: int) -> np.ndarray:
    return np.cumprod(np.full(count, 6364136223846793005, np.uint64))


# ------------------------------------------------------------------------------------------------------------
# The loader of steps


class Step(NamedTuple):
    """One optimizer step: what this rank computes of it, and what all ranks together train on."""

    rows: list[int]             # of the data set, over all ranks
    position: int               # rows consumed after the step
    batches: list[Batch]        # of this rank
    loss_tokens: int            # tokens that carry loss, over all ranks


class StepLoader:
    """Packs what this rank computes of each optimizer step.

    Every rank selects the same rows for a step. Large runs divide the ranks into groups; the rows go to the
    groups first, and then to the ranks of a group (`sampler.rank_group`).
    """

    def __init__(self, dataset: TokenDataset, rank: int, world_size: int, micro_tokens: int,
                 share_prefixes: bool) -> None:
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self.micro_tokens, self.share_prefixes = micro_tokens, share_prefixes
        self.group = sampler.rank_group(rank, world_size)
        self.order = np.argsort(lexicographic_order(dataset)) if self.group.groups > 1 else None
        self.loss_tokens = dataset.column("loss_tokens").tolist()

    def steps(self, count: int, start: int, **plan) -> Iterator[Step]:
        """The next `count` steps, packed one at a time.

        start: rows consumed so far; plan: further arguments of `sampler.steps`
        """
        steps = sampler.steps(self.dataset.lengths, start=start, **plan)
        for rows, position in itertools.islice(steps, count):
            loss_tokens = sum(self.loss_tokens[row] for row in rows)
            yield Step(rows, position, self.pack_step(rows), loss_tokens)

    def pack_step(self, rows: list[int]) -> list[Batch]:
        """This rank's batches of a step.  rows: all rows of the step"""
        own = sampler.rank_group_rows(rows, self.dataset.lengths, self.order, self.rank, self.world_size)
        return self._pack([self.dataset[row] for row in own])

    def pack_held_out(self, examples: Sequence[Example]) -> list[Batch]:
        """This rank's batches of the held-out rows."""
        return self._pack(list(examples)[self.group.number::self.group.groups])

    def _pack(self, examples: list[Example]) -> list[Batch]:
        groups = sampler.assign_to_ranks(examples, self.group.size, self.share_prefixes)
        return pack_groups(groups[self.group.position], self.micro_tokens)


def shared_prefix_fraction(examples: Sequence[Example], step_rows: int, max_tokens: int) -> float:
    """The fraction of tokens that steps of so many rows need not compute, as their rows share prefixes."""
    if not examples:
        return 0.0
    lengths, computed = [len(example) for example in examples], 0
    for rows, _ in sampler.steps(lengths, 0, batch_rows=step_rows, epochs=1):
        computed += sum(len(batch.tokens) for batch in pack([examples[row] for row in rows], max_tokens))
    return 1 - computed / sum(lengths)
