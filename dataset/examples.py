"""`Conversation` → `Example`: token ids, and which of them carry loss."""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dataset.rows import Conversation
from dataset.tools import Tool
from tokenizer import Tokenizer, render_tool


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    ids: (n) int32; loss_mask: (n) bool, the ids that the model must predict; source: "file:line"
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    source: str

    def __len__(self) -> int:
        """Positions that the model computes, n - 1: the last id is only ever a target."""
        return len(self.ids) - 1

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss; the first id is never predicted."""
        return int(self.loss_mask[1:].sum())


def tokenize(conversation: Conversation, tokenizer: Tokenizer) -> Example:
    """Tokenize a conversation: the ids of `conversation.segments()`, and which of their segments carry loss.

    A tool's declaration is tokenized once for all rows that have it. That gives the same ids, because it
    stands between control tokens, which no piece of the vocabulary crosses.
    """
    before_tools, after_tools = conversation.segments_around_tools
    before, _ = tokenizer.encode_segments(before_tools)
    after, mask = tokenizer.encode_segments(after_tools)
    declarations = [_declaration_ids(tool, tokenizer) for tool in conversation.tools]
    ids = np.concatenate([np.array(before, np.int32), *declarations, np.array(after, np.int32)])
    no_loss = np.zeros(len(ids) - len(after), bool)
    return Example(ids, np.concatenate([no_loss, np.array(mask, bool)]), conversation.source)


def _declaration_ids(tool: Tool, tokenizer: Tokenizer) -> np.ndarray:
    if tool.declaration_ids is None or tool.declaration_ids[0] is not tokenizer:
        texts = tool.declaration_texts or render_tool(tool)
        ids, _ = tokenizer.encode_segments(zip(texts, itertools.repeat(False)))
        tool.declaration_ids = tokenizer, np.array(ids, np.int32)
        tool.declaration_texts = ()
    return tool.declaration_ids[1]


def text_runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The text of a row, split where the loss mask changes: (text, whether it carries loss)."""
    changes = np.flatnonzero(np.diff(example.loss_mask)) + 1
    borders = [0, *changes.tolist(), len(example.ids)]
    return [(tokenizer.decode(example.ids[start:stop].tolist()), bool(example.loss_mask[start]))
            for start, stop in itertools.pairwise(borders)]
