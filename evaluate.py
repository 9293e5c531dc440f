"""Call accuracy: generate an answer to each held-out query and compare its calls with the expected ones."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from data import Conversation
from generate import generate
from model import Gemma3
from tokenizer import Tokenizer, parse_calls

ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """What the model said to one row's query."""

    conversation: Conversation
    text: str

    @property
    def exact(self) -> bool:
        """The same calls, in any order, with equal names and arguments (1 is not 1.0 and not true)."""
        given = parse_calls(self.text)
        return not given.unread and _canonical(given) == _canonical(self.conversation.calls)


def _canonical(calls: Sequence[dict]) -> list[str]:
    return sorted(json.dumps(call, sort_keys=True, ensure_ascii=False) for call in calls)


def answer(model: Gemma3, tokenizer: Tokenizer, rows: Sequence[Conversation], max_new_tokens: int = 128) -> list[Answer]:
    """The model's greedy answer to the first query of each row."""
    answers = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start:start + ROWS_AT_ONCE]
        prompts = [tokenizer.encode_segments(row.prompt())[0] for row in chunk]
        answers += [Answer(row, tokenizer.decode(ids))
                    for row, ids in zip(chunk, generate(model, prompts, max_new_tokens), strict=True)]
    return answers
