"""Greedy decoding: what a model answers to a prompt.

Source: every step runs the whole sequences, packed side by side, and keeps the last position's best token.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from data import side_by_side
from model import Gemma3

STOP_IDS = (1, 50, 106)      # <eos>, <start_function_response>, <end_of_turn>


@torch.no_grad()
def generate(model: Gemma3, prompts: Sequence[Sequence[int]], max_new_tokens: int = 128) -> list[list[int]]:
    """The greedy continuation of each prompt, up to and with its first stop id.

    prompts: token ids of each, of any lengths. Returns as many lists of at most `max_new_tokens` ids.
    """
    device = model.head.device
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        rows = [torch.tensor([*prompts[i], *answers[i]]) for i in running]
        lengths = [len(row) for row in rows]
        positions, documents = side_by_side(lengths)
        hidden = model(torch.cat(rows).to(device), positions.to(device), documents)
        last = hidden[torch.tensor(lengths, device=device).cumsum(0) - 1]
        best = F.linear(last, model.head.to(last.dtype)).argmax(-1).tolist()
        for i, token in zip(running, best, strict=True):
            answers[i].append(token)
        running = [i for i in running if answers[i][-1] not in STOP_IDS]
        if not running:
            break
    return answers
