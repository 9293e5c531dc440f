"""Decoding: answers to many prompts at once, with cached keys and values.

Rows of a batch run independently: when one is done, the next prompt takes its place. A step computes several
tokens of each row. It drafts how the answer might continue, runs the draft along with the last token, and
keeps as much of it as the model would have produced anyway. The draft is what followed the same two tokens
before, in other answers or in the prompt: calls repeat names from the declarations, words from the query, and
each other's form. Answers are the same, in half as many steps.

Source: drafting from the prompt is "prompt lookup decoding" (Saxena, 2023), after "Fast Inference from
Transformers via Speculative Decoding" (arXiv 2211.17192).
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.kv_cache import KVCache, empty_prefix, prefill_into_cache
from model import Gemma3
from ops.graph_capture import record, size_for
from tokenizer import Tokenizer

STOP_IDS = (1, 50, 106)         # <eos>, <start_function_response>, <end_of_turn>
MAX_RECORDED_STEPS = 4          # kept at a time, each with its cache: 0.2 GB for 16 rows of 1,000


# ----------------------------------------------------------------------------------------------------------
# Rows and their drafts


class NgramLookup:
    """What came last after a token, and after a pair of tokens, in some sequences of ids."""

    def __init__(self, sequences: Sequence[list[int]] = ()) -> None:
        # (ids, index) for each token and pair: ids[index] came last after it.
        self.last_seen: dict[int | tuple[int, int], tuple[list[int], int]] = {}
        for ids in sequences:
            for index in range(1, len(ids)):
                self.add(ids, index)

    def add(self, ids: list[int], index: int) -> None:
        """Remember that `ids[index]` came after the tokens before it.  `ids` is kept, and may grow."""
        self.last_seen[ids[index - 1]] = ids, index
        if index > 1:
            self.last_seen[ids[index - 2], ids[index - 1]] = ids, index

    def continuation(self, ngram: int | tuple[int, int], tokens: int) -> list[int]:
        """Up to `tokens` tokens that came last after this token or pair of tokens."""
        ids, index = self.last_seen.get(ngram, ((), 0))
        return list(ids[index:index + tokens])


class Row:
    """A prompt that is being answered.  `ids`: the prompt, and after it the answer as far as it has come."""

    def __init__(self, index: int, prompt: Sequence[int], max_new_tokens: int) -> None:
        """index: of the prompt among all prompts"""
        self.index, self.ids, self.prompt_length = index, list(prompt), len(prompt)
        self.max_length = len(prompt) + max_new_tokens
        self.prompt_lookup = NgramLookup([self.ids])

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_length:]

    def draft(self, tokens: int, answers: NgramLookup) -> list[int]:
        """Up to `tokens` tokens that may come next.

        They are what followed the last two tokens in an answer, or else in the prompt, or else what followed
        the last token alone.
        """
        if not tokens:
            return []
        pair, last = tuple(self.ids[-2:]), self.ids[-1]
        return (answers.continuation(pair, tokens) or self.prompt_lookup.continuation(pair, tokens)
                or answers.continuation(last, tokens) or self.prompt_lookup.continuation(last, tokens))

    def accept(self, sampled: Sequence[int], drafts: Sequence[int], answers: NgramLookup) -> bool:
        """Append the sampled tokens, up to the first that differs from its draft.

        Returns whether the answer is complete. What was computed after a wrong draft does not count.

        sampled: a token for each draft, and one after the last
        """
        for token, draft in itertools.zip_longest(sampled[:len(drafts) + 1], drafts):
            self.ids.append(token)
            answers.add(self.ids, len(self.ids) - 1)
            if token in STOP_IDS or len(self.ids) == self.max_length:
                return True
            if token != draft:
                break
        return False


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """A token for each row of logits (…, V): the likeliest at temperature 0, otherwise a random one.

    top_p: sample among the likeliest tokens whose probabilities add up to this
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature, -1).flatten(0, -2)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).view(logits.shape[:-1])


# ----------------------------------------------------------------------------------------------------------
# Recorded steps


class RecordedStep:
    """`KVCache.step` recorded as a CUDA graph: the host launches it at once, not each of its 1,500 kernels.
    """

    def __init__(self, model: Gemma3, rows: int, step_tokens: int, max_length: int) -> None:
        self.size = rows, step_tokens, max_length
        self.model_state: tuple | None = None               # set by `RecordedSteps`

        def project(hidden: Tensor) -> Tensor:
            """As `output_projection`, but reads the head when the step runs: it may have changed in place."""
            return F.linear(hidden, model.head.to(hidden.dtype))

        self.cache = cache = KVCache(model, rows, max_length, step_tokens, project)
        self.tokens = torch.zeros(rows, step_tokens, dtype=torch.int64, device=cache.device)
        self.positions = torch.zeros_like(self.tokens) + torch.arange(step_tokens, device=cache.device)
        max_position = max(keys.shape[2] for keys in cache.keys)

        def run() -> None:
            self.logits = cache.step(model, self.tokens, self.positions, max_position)

        self.replay = record(run, cache.device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """As `KVCache.step`, for as many rows as the cache has."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        return self.logits


class RecordedSteps:
    """The `MAX_RECORDED_STEPS` steps used last, kept from call to call: recording one takes 0.3 to 0.5 s.

    A recording reads the weights where they lay when it was made. It sees weights that change in place. When
    any was replaced, as by `merge` or a load, all recordings are dropped.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int, int], RecordedStep] = {}
        self.model_state: tuple | None = None       # of the model that was recorded
        self.tensors: list[Tensor] = []             # its weights, kept so that no others get their memory

    def take(self, model: Gemma3, rows: int, step_tokens: int, max_length: int) -> RecordedStep:
        """A step with an empty cache, the caller's alone until `keep`.  Arguments as of `KVCache`.

        max_length is rounded up to one of a few sizes, so that prompts of similar lengths share a recording.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        addresses = [(name, id(tensor), tensor.data_ptr()) for name, tensor in named]
        state = model.config, model.compute_dtype, model.training, addresses
        if state != self.model_state:
            self.steps.clear()
            self.model_state, self.tensors = state, [tensor for _, tensor in named]
        size = rows, step_tokens, size_for(max_length, steps=2)
        step = self.steps.pop(size, None)
        if step is None:
            step = RecordedStep(model, *size)
            step.model_state = self.model_state
        step.cache.clear()                          # the recording, or an earlier call, has written to it
        return step

    def keep(self, step: RecordedStep) -> None:
        """Take back a step for the next call."""
        if step.model_state is self.model_state:
            self.steps[step.size] = step
        if len(self.steps) > MAX_RECORDED_STEPS:
            del self.steps[next(iter(self.steps))]  # used longest ago


# ----------------------------------------------------------------------------------------------------------
# Answers


def token_limits(prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int],
                 batch_rows: int) -> list[int]:
    """The most tokens of each prompt's answer.  Raises ValueError where `stream` does."""
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if batch_rows < 1 or len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise ValueError("batch_rows and every max_new_tokens must be at least 1, one limit for all prompts "
                         "or one for each")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; it needs one token at least")
    return limits


def step_inputs(running: Sequence[Row], drafts: Sequence[list[int]], rows: int, step_tokens: int,
                device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens, positions), (rows, step_tokens) int64 each: the last token of each row and its drafts.

    rows: at least as many as are running. Missing drafts, and the tokens of idle rows, are zeros.
    """
    tokens = [[row.ids[-1], *draft, *[0] * (step_tokens - 1 - len(draft))]
              for row, draft in zip(running, drafts, strict=True)]
    first_positions = [len(row.ids) - 1 for row in running]
    idle = rows - len(running)
    tokens += [[0] * step_tokens] * idle
    first_positions += [0] * idle
    starts = torch.tensor(first_positions, device=device)
    positions = starts[:, None] + torch.arange(step_tokens, device=device)
    return torch.tensor(tokens, device=device), positions


def retire(i: int, running: list[Row], cache: KVCache) -> None:
    """Remove row i.  The last row takes its place, so that the rows that are running stay the first ones."""
    last = running.pop()
    if i < len(running):
        running[i] = last
        cache.move(len(running), to=i)


def call_phrases(tokenizer: Tokenizer) -> list[list[int]]:
    """What every call consists of, whatever its function: `phrases` of `stream`."""
    texts = (
        "<start_of_turn>model\n<start_function_call>call:",
        ":<escape>",
        "<escape>}<end_function_call><start_function_response>",
    )
    return [tokenizer.encode(text, control=True) for text in texts]


@torch.no_grad()
def stream(model: Gemma3, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int] = 128, *,
           temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, batch_rows: int = 16,
           look_ahead: int | None = None, phrases: Sequence[Sequence[int]] = (),
           recorded: RecordedSteps | None = None) -> Iterator[tuple[int, list[int]]]:
    """Answer prompts; yields (index of the prompt, answer) as soon as an answer is complete.

    An answer ends with its first stop id, or after max_new_tokens. Raises ValueError for an empty prompt and
    for limits below 1.

    prompts: token ids of each, of any lengths
    max_new_tokens: of all answers, or of each
    temperature, top_p, seed: of the sampling; temperature 0 takes the likeliest token each time
    batch_rows: prompts that are answered at a time
    look_ahead: tokens to draft in a step; by default 7, or as many as make 32 tokens with the batch's rows
    phrases: token ids that answers are likely to hold, for the first drafts
    recorded: keeps what is recorded on a GPU for the next call; without it each call there records anew

    At temperature 0 neither batch_rows nor drafts change an answer, except where logits tie up to rounding.
    """
    limits = token_limits(prompts, max_new_tokens, batch_rows)
    if not prompts:
        return
    device = model.head.device
    batch_rows = min(batch_rows, len(prompts))
    if look_ahead is None:
        look_ahead = max(0, min(8, 32 // batch_rows) - 1)
    step_tokens = 1 + look_ahead
    max_length = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + step_tokens
    if recorded is None and device.type == "cuda":
        recorded = RecordedSteps()
    step = recorded.take(model, batch_rows, step_tokens, max_length) if recorded else None
    cache = step.cache if step else KVCache(model, batch_rows, max_length, step_tokens)
    generator = torch.Generator(device).manual_seed(seed) if temperature else None

    # Prompts with a common prefix follow each other. They are taken from the end.
    waiting = sorted(range(len(prompts)), key=lambda i: list(prompts[i]), reverse=True)
    running: list[Row] = []                     # running[i] is the cache's row i
    cached_prefix, answers = empty_prefix(model), NgramLookup([list(phrase) for phrase in phrases])
    while waiting or running:
        # Admit prompts, several at a time: only when a quarter of the rows are free.
        if waiting and len(running) <= batch_rows * 3 // 4:
            new = [waiting.pop() for _ in range(min(len(waiting), batch_rows - len(running)))]
            next_prompt = prompts[waiting[-1]] if waiting else None
            cached_prefix = prefill_into_cache(model, cache, cached_prefix, [prompts[i] for i in new],
                                               next_prompt, first_row=len(running))
            running += [Row(i, prompts[i], limits[i]) for i in new]

        # Run the last token of each row and its drafts.
        drafts = [row.draft(look_ahead, answers) for row in running]
        rows = batch_rows if step else len(running)         # a CUDA graph has one shape
        tokens, positions = step_inputs(running, drafts, rows, step_tokens, device)
        if step:
            logits = step(tokens, positions)
        else:
            max_position = max(len(row.ids) for row in running) + step_tokens
            logits = cache.step(model, tokens, positions, max_position)

        # Keep the sampled tokens as far as they confirm the drafts.
        sampled = sample(logits, temperature, top_p, generator).tolist()
        for i in reversed(range(len(running))):
            row = running[i]
            if row.accept(sampled[i], drafts[i], answers):
                yield row.index, row.answer
                retire(i, running, cache)
    if step:
        recorded.keep(step)


def generate(model: Gemma3, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int] = 128,
             **options) -> list[list[int]]:
    """The answer to each prompt, in the order of the prompts.  Arguments and errors as of `stream`."""
    answers = dict(stream(model, prompts, max_new_tokens, **options))
    return [answers[i] for i in range(len(prompts))]
