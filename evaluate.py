"""Call accuracy: would the model, decoding greedily, answer a held-out query with exactly the expected calls?"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from data import Conversation, Example, pack
from generate import generate
from loss_kernels import CHUNK_ROWS, IGNORE
from model import Gemma3
from tokenizer import Tokenizer


@torch.no_grad()
def exact_rows(model: Gemma3, examples: Sequence[Example], micro_tokens: int) -> list[bool]:
    """For each row, whether greedy decoding reproduces every trained token.

    Greedy decoding gives the expected ids if and only if each of them is the best choice after the ones before it, so
    one forward pass over the expected rows tells it, and nothing has to be decoded. The format writes a call in one
    way only (arguments sorted), so these are the exact calls; parallel calls count in the order they were given.
    """
    exact: list[bool] = []
    for batch in pack(examples, micro_tokens):
        tokens, targets, positions, documents = batch.to(model.head.device)
        rows = (targets != IGNORE).nonzero().squeeze(1)
        hidden = model(tokens, positions, documents)[rows]
        head = model.head.to(hidden.dtype)
        best = torch.cat([F.linear(chunk, head).argmax(-1) for chunk in hidden.split(CHUNK_ROWS)])
        wrong = documents[rows.cpu()][(best != targets[rows]).cpu()]
        missed = set(wrong.tolist())
        exact += [i not in missed for i in range(len(batch.sources))]
    return exact


def answers(model: Gemma3, tokenizer: Tokenizer, conversations: Sequence[Conversation], max_new_tokens: int = 96) -> list[str]:
    """What the model says to the first query of each row."""
    prompts = [tokenizer.encode_segments(conversation.prompt())[0] for conversation in conversations]
    return [tokenizer.decode(ids) for ids in generate(model, prompts, max_new_tokens)]
