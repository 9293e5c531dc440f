"""Conversations → token ids."""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dataset.rows import Conversation
from dataset.tools import Tool
from tokenizer import Tokenizer, render_tool


@dataclass(frozen=True)
class Example:
    """One tokenized row: ids (n) int32, trained (n) bool."""

    ids: np.ndarray
    trained: np.ndarray
    source: str

    def __len__(self) -> int:
        """Positions that the model computes: the last id is only ever a target."""
        return len(self.ids) - 1

    @property
    def trained_tokens(self) -> int:
        return int(self.trained[1:].sum())


def tokenize(conversation: Conversation, tokenizer: Tokenizer) -> Example:
    """The ids of `conversation.segments()`, each tool's found but once: it stands between control tokens, so no piece crosses."""
    (before, _), (after, trained) = map(tokenizer.encode_segments, conversation.around_tools)
    declared = [_encoded(tool, tokenizer) for tool in conversation.tools]
    ids = np.concatenate([np.array(before, np.int32), *declared, np.array(after, np.int32)])
    return Example(ids, np.concatenate([np.zeros(len(ids) - len(after), bool), np.array(trained, bool)]), conversation.source)


def _encoded(tool: Tool, tokenizer: Tokenizer) -> np.ndarray:
    if tool.encoded is None or tool.encoded[0] is not tokenizer:
        texts = tool.rendered or render_tool(tool)
        tool.encoded = tokenizer, np.array(tokenizer.encode_segments(zip(texts, itertools.repeat(False)))[0], np.int32)
        tool.rendered = ()
    return tool.encoded[1]


def runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The row's text, parted where it turns from trained to not trained or back: (text, trained)."""
    borders = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist(), len(example.ids)]
    return [(tokenizer.decode(example.ids[start:stop].tolist()), bool(example.trained[start]))
            for start, stop in itertools.pairwise(borders)]
