"""Rows → conversations → token ids → packed batches.

    dict ──read_rows──▶ Conversation ──tokenize──▶ Example(ids, trained) ──pack──▶ Batch(tokens, targets, positions, documents)

Rows come as JSONL or as a JSON array, gzipped or not, in one of three shapes:
    xLAM         {"query": …, "tools": […] or its JSON string, "answers": [{"name", "arguments"}] or its JSON string}; [] is for
                 silence, and "answers" may also be a text, which the model says instead of calling
    messages     {"messages": […], "tools": […]}   OpenAI's chat format; every assistant turn is trained
    leaderboard  {"question", "function", "ground_truth": [{name: {parameter: [accepted, …]}}]}, one turn; "ground_truth"
                 may also stand for "answers" in xLAM's columns. Training takes the first accepted value of each
A tool is xLAM's {name, description, parameters: {p: {type, description, default?}}}, the same with a JSON Schema as its
parameters, or OpenAI's envelope {"type": "function", "function": …}.

A row that cannot be right is an error that names file:line and the remedy; nothing is cut or guessed silently. Files are read
piece by piece, arrays too, and no row may be longer than 1 MiB: whatever a file holds, memory is bounded (docs/hostile.md).
"""
from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# What is imported here and not used is what other files import from here for now.
from dataset.errors import MAX_ROW_BYTES, RowError, Skipped, placed  # noqa: F401
from dataset.examples import Example, runs, tokenize  # noqa: F401
from dataset.files import _array_rows, _raw_rows, fetch, files_with_rows, named_files, parse_weight, system_text  # noqa: F401
from dataset.prefix_sharing import Group, lexicographic, shared_beginnings, tokens_of  # noqa: F401
from dataset.rows import DEVELOPER_TEXT, Conversation, called, parse_row, read_rows, read_sources, said  # noqa: F401
from dataset.sampler import (  # noqa: F401
    TEAM,
    deal,
    epoch_at,
    epoch_order,
    hold_out,
    query_hash,
    steps,
    team_of,
    team_rows,
)
from dataset.tools import _known_tools, json_type, parse_tools  # noqa: F401
from loss_kernels import IGNORE
from triton_support import sent

# Of a batch's parts: (example, its tokens from, to).
Parts = list[tuple[Example, int, int]]


@dataclass(frozen=True)
class Batch:
    """Whole documents side by side. Each is (T): tokens, targets (`IGNORE` where no loss), positions, documents.

    A beginning that several rows share is there once, as a document of its own; each row then continues it, as a document
    whose positions go on from there (`Gemma3.forward`).
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    trained_tokens: int
    parts: Parts

    def keys(self) -> Tensor:
        """(T) int32, of each token a hash of its row up to it, the same wherever the row stands: LoRA's dropout draws by it."""
        return torch.from_numpy(np.concatenate([prefix_keys(example.ids)[start:stop] for example, start, stop in self.parts]))

    @property
    def sources(self) -> list[str]:
        """Of each row."""
        return [example.source for example, _, stop in self.parts if stop == len(example)]

    def filled(self, tokens: int) -> Batch:
        """The batch, and after it a document without loss that makes it as large as that."""
        idle = tokens - len(self.tokens)
        return _batch([*self.parts, (Example(np.zeros(idle + 1, np.int32), np.zeros(idle + 1, bool), ""), 0, idle)])

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(tokens, positions, documents, rows, targets): the rows that carry loss (M), and their targets (M).

        Positions and documents stay on the CPU, where borders are read; nothing waits for the device.
        """
        rows = (self.targets != IGNORE).nonzero().squeeze(1)
        tokens, rows, targets = (sent(tensor, device) for tensor in (self.tokens, rows, self.targets[rows]))
        return tokens, self.positions, self.documents, rows, targets


def side_by_side(lengths: Sequence[int], firsts: Sequence[int] | int = 0) -> tuple[Tensor, Tensor]:
    """positions and documents, (Σ lengths) each, of documents one after another.  firsts: the position each begins with"""
    starts = np.cumsum(lengths) - lengths
    documents = np.repeat(np.arange(len(lengths)), lengths)
    return torch.from_numpy(np.arange(len(documents)) - np.repeat(starts - firsts, lengths)), torch.from_numpy(documents)


def pack(examples: Sequence[Example], max_tokens: int, share: bool = True) -> list[Batch]:
    """Put the examples into few batches of at most `max_tokens` tokens, in their order, rows that begin alike together.

    No example is cut: one that is longer than `max_tokens` gets a batch of its own. share: compute a beginning that rows of
    a batch have in common once; losses and gradients are the same.
    """
    return pack_groups(deal(examples, 1, share)[0], max_tokens)


def pack_groups(groups: Sequence[Group], max_tokens: int) -> list[Batch]:
    """As `pack`, of groups that were found before.

    The batches are about equally large, as the largest one decides how much memory a step takes: 4,700 tokens in passes of at
    most 4,096 are 2 × 2,350.
    """
    def size(batches: list[Parts]) -> tuple[int, int]:
        """What must not grow: passes, and tokens to compute (a beginning is computed in each batch that needs it)."""
        return len(batches), sum(stop - start for parts in batches for _, start, stop in parts)

    batches = _filled(groups, max_tokens)
    passes, tokens = size(batches)
    if passes > 1:
        limits = range(-(-tokens // passes), max_tokens)
        first = bisect_left(limits, True, key=lambda limit: size(_filled(groups, limit)) <= (passes, tokens))
        batches = _filled(groups, limits[first]) if first < len(limits) else batches
    return [_batch(parts) for parts in batches]


def _filled(groups: Iterable[Group], max_tokens: int) -> list[Parts]:
    """The groups one after another in batches of at most so many tokens, each as full as it gets."""
    batches: list[Parts] = []
    room = 0
    for shared, group in groups:
        whole = tokens_of((shared, group))
        begun = False
        for example in group:
            own = len(example) - shared
            if not batches or own + (0 if begun else shared) > room or (not begun and room < whole <= max_tokens):
                batches.append([])
                room, begun = max_tokens, False
            if shared and not begun:
                batches[-1].append((example, 0, shared))
                room, begun = room - shared, True
            batches[-1].append((example, shared, len(example)))
            room -= own
    return batches


def _batch(parts: Parts) -> Batch:
    """The parts side by side; one that does not begin at 0 continues the last that does."""
    def ids(ahead: int) -> np.ndarray:
        return np.concatenate([example.ids[start + ahead:stop + ahead] for example, start, stop in parts], dtype=np.int64)

    trained = np.concatenate([example.trained[start + 1:stop + 1] for example, start, stop in parts])
    targets = np.where(trained, ids(1), IGNORE)
    positions, documents = side_by_side([stop - start for _, start, stop in parts], [start for _, start, _ in parts])
    return Batch(torch.from_numpy(ids(0)), torch.from_numpy(targets), positions, documents, np.count_nonzero(trained), parts)


# A token without loss: what a process computes that has to go along with others and has no batch left.
IDLE = _batch([(Example(np.zeros(2, np.int32), np.zeros(2, bool), ""), 0, 1)])


def prefix_keys(ids: np.ndarray) -> np.ndarray:
    """Of each id a hash of all up to it, (n) int32: the upper half of Σ (id + 1) c^position in 64 bits."""
    powers = _powers(1 << len(ids).bit_length())[:len(ids)]
    return (np.cumsum((ids.astype(np.uint64) + 1) * powers) >> 32).astype(np.uint32).view(np.int32)


@functools.lru_cache
def _powers(most: int) -> np.ndarray:
    return np.cumprod(np.full(most, 6364136223846793005, np.uint64))
