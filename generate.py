"""What a model answers: decoding with cached keys and values, many prompts at once.

    python generate.py --model DIR --adapter runs/mine --tools tools.json "weather in Rome?"     # prints the calls as JSON
    python generate.py --model DIR --adapter runs/mine --tools tools.json                        # a session: you play user and tools

Rows of a batch run independently. When one is done the next prompt takes its place; prompts with the same beginning, as an
application's have, compute it once. A step looks several tokens ahead: it guesses that the answer goes on as other
answers and the prompt did after the same two tokens (calls repeat names out of the declarations, words out of the query,
and each other's form), runs the guess along, and keeps what the model would have chosen anyway. The answer is the same; it
comes in half as many steps.

Source: looking ahead in the prompt is "prompt lookup decoding" (Saxena, 2023), after "Fast Inference from Transformers via
Speculative Decoding" (arXiv 2211.17192).
"""
from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_graph import record, size_for
from data import side_by_side
from dataset.errors import RowError
from dataset.files import read_system_text
from dataset.tools import parse_tools
from model import Gemma3
from ops.attention import attention
from ops.attention_tables import plan
from ops.onednn import pack_onednn_weight
from storage.adapters import load_tuned, system_prompt_of
from storage.atomic import read_json
from storage.pretrained import DTYPES, load_tokenizer
from tokenizer import Tokenizer, parse_calls, render_segments

STOP_IDS = (1, 50, 106)      # <eos>, <start_function_response>, <end_of_turn>
READ_TOKENS = 8_192          # prompts are read side by side until they make this many
SHORTEST_PREFIX = 64         # a shared beginning of fewer tokens is not worth a forward pass of its own
MOST_STEPS = 4               # recorded steps that are kept, each with its cache: 0.2 GB for 16 rows of 1,000


# ---------------------------------------------------------------------------------------------------------------------
# Reading prompts


@dataclass
class Prefix:
    """The beginning of some prompts, and each layer's keys and values for it: (P, K, H)."""

    ids: list[int]
    keys: list[Tensor]
    values: list[Tensor]

    def first(self, length: int) -> Prefix:
        return Prefix(self.ids[:length], [k[:length] for k in self.keys], [v[:length] for v in self.values])


def read(model: Gemma3, prefix: Prefix, rows: Sequence[Sequence[int]]) -> list[Prefix]:
    """Run the tokens `rows` that come after `prefix`, side by side; returns each row's own keys and values."""
    lengths = [len(row) for row in rows]
    device, start = model.head.device, len(prefix.ids)
    positions, _ = side_by_side(lengths, start)
    keys, values, windows = [], [], model.config.windows
    documents, starts, keys_only = ([start, *lengths], [0] + [start] * len(lengths), 1) if start else (lengths, None, 0)
    plans = {window: plan(documents, window, model.compute_dtype, device, model.config.heads, starts, keys_only,
                          model.backends.attention) for window in set(windows)}

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
        keys.append(k.split(lengths))
        values.append(v.split(lengths))
        k, v = torch.cat((prefix.keys[layer], k)), torch.cat((prefix.values[layer], v))
        return attention(q, k, v, scale, plans[windows[layer]], model.backends.attention)

    tokens = torch.tensor(list(itertools.chain(*rows)), device=device)
    model.run(tokens, positions.to(device), [partial(attend, layer=layer) for layer in range(len(windows))])
    return [Prefix(list(row), [k[i] for k in keys], [v[i] for v in values]) for i, row in enumerate(rows)]


def empty_prefix(model: Gemma3) -> Prefix:
    nothing = torch.empty(0, model.config.num_key_value_heads, model.config.head_dim, dtype=model.compute_dtype, device=model.head.device)
    return Prefix([], [nothing] * model.config.num_hidden_layers, [nothing] * model.config.num_hidden_layers)


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)           # in lexicographic order, what these two share all share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def projection(model: Gemma3) -> Callable[[Tensor], Tensor]:
    """Hidden states (M, D) → scores (M, V).

    Most of a step's time on a CPU goes into reading the head. oneDNN reads it twice as fast once it is laid out in its own
    blocks, to the same scores; that takes 0.2 s and a second copy, for as long as the answers last.
    """
    head = model.head.to(model.compute_dtype)
    return pack_onednn_weight(head) or (lambda x: F.linear(x, head))


class Cache:
    """Keys and values of every layer for B rows, each as far as it has come.

    A layer has S slots a row, (B, K, S, H), and position p lies in slot p mod S. A global layer has a slot for every
    position; a local layer has as many as its window, and one more for each token that a step looks ahead.
    """

    def __init__(self, model: Gemma3, rows: int, room: int, width: int,
                 project: Callable[[Tensor], Tensor] | None = None) -> None:
        """room: positions of a row; width: tokens of a step; project: as from `projection`, the default."""
        self.windows, self.device = model.config.windows, model.head.device
        self.project = project or projection(model)
        slots = [room if window is None else min(room, window + width - 1) for window in self.windows]
        K, H = model.config.num_key_value_heads, model.config.head_dim
        self.keys = [torch.zeros(rows, K, s, H, dtype=model.compute_dtype, device=self.device) for s in slots]
        self.values = [torch.zeros_like(k) for k in self.keys]

    def fill(self, row: int, prefix: Prefix, own: Prefix | None) -> None:
        """Begin a row anew: after a shared prefix and its own tokens (None: it has none)."""
        for store, shared, mine in ((self.keys, prefix.keys, own and own.keys), (self.values, prefix.values, own and own.values)):
            for layer, slots in enumerate(store):
                whole = torch.cat((shared[layer], mine[layer])) if mine else shared[layer]         # (length, K, H)
                kept = torch.arange(max(0, len(whole) - slots.shape[2]), len(whole), device=self.device)
                slots[row][:, kept % slots.shape[2]] = whole[kept].transpose(0, 1)

    def clear(self) -> None:
        """Make it as new."""
        for slots in (*self.keys, *self.values):
            slots.zero_()

    def move(self, row: int, to: int) -> None:
        for slots in (*self.keys, *self.values):
            slots[to] = slots[row]

    def step(self, model: Gemma3, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Scores of the next token after each of `tokens` (B, width) at `positions` (B, width): (B, width, V).

        longest: no position is beyond it, so slots beyond it need not be looked at.
        """
        B, width = tokens.shape
        rows = torch.arange(B, device=self.device)[:, None]
        placed: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        for slots, window in zip(self.keys, self.windows, strict=True):        # once for each of the two kinds of layers
            S = slots.shape[2]
            if (S, window) not in placed:
                used = min(S, longest + 1)
                ago = (positions[:, :, None] - torch.arange(used, device=self.device)) % S
                visible = ago <= (positions if window is None else positions.clamp(max=window - 1))[:, :, None]      # (B, width, used)
                placed[S, window] = positions % S, visible

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, layer: int) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            (K, S, H), N = keys.shape[1:], q.shape[1]
            slots, visible = placed[S, self.windows[layer]]
            keys[rows, :, slots] = k.view(B, width, K, H)
            values[rows, :, slots] = v.view(B, width, K, H)
            # The query heads of one kv head stand as rows before it, so that it is read once.
            q = q.view(B, width, K, N // K, H).transpose(1, 2).reshape(B, K, -1, H)
            mask = visible[:, None, :, None].expand(-1, -1, -1, N // K, -1).reshape(B, 1, -1, visible.shape[-1])
            used = visible.shape[-1]
            out = F.scaled_dot_product_attention(q, keys[:B, :, :used], values[:B, :, :used], attn_mask=mask, scale=scale)
            return out.view(B, K, width, N // K, H).transpose(1, 2).reshape(B * width, N, H)

        hidden = model.run(tokens.flatten(), positions.flatten(), [partial(attend, layer=i) for i in range(len(self.keys))])
        return self.project(hidden).view(B, width, -1)


class Followed:
    """What came last after a token, and after a pair of tokens, in some texts' ids."""

    def __init__(self, texts: Sequence[list[int]] = ()) -> None:
        self.places: dict[int | tuple[int, int], tuple[list[int], int]] = {}
        for ids in texts:
            for at in range(1, len(ids)):
                self.note(ids, at)

    def note(self, ids: list[int], at: int) -> None:
        """`ids[at]` came after what stands before it."""
        self.places[ids[at - 1]] = ids, at
        if at > 1:
            self.places[ids[at - 2], ids[at - 1]] = ids, at

    def after(self, key: int | tuple[int, int], tokens: int) -> list[int]:
        ids, at = self.places.get(key, ((), 0))
        return list(ids[at:at + tokens])


class Row:
    """A prompt that is being answered: `ids` grows, and holds the answer at its end."""

    def __init__(self, index: int, prompt: Sequence[int]) -> None:
        self.index, self.ids, self.length = index, list(prompt), len(prompt)
        self.prompt = Followed([self.ids])

    def guess(self, tokens: int, answers: Followed) -> list[int]:
        """Up to `tokens` tokens that may come next: what followed the latest pair of tokens in an answer, or in the
        prompt, or what followed the latest token alone."""
        if not tokens:
            return []
        pair, last = tuple(self.ids[-2:]), self.ids[-1]
        return (answers.after(pair, tokens) or self.prompt.after(pair, tokens)
                or answers.after(last, tokens) or self.prompt.after(last, tokens))


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """A token for each row of scores (…, V): the best, or one drawn among the likeliest that make up `top_p`."""
    if temperature == 0:
        return logits.argmax(-1)
    chances = torch.softmax(logits.float() / temperature, -1).flatten(0, -2)
    if top_p < 1:
        ordered, order = chances.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        chances = torch.zeros_like(chances).scatter_(-1, order, ordered)
    return torch.multinomial(chances, 1, generator=generator).view(logits.shape[:-1])


@torch.no_grad()
def stream(model: Gemma3, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int] = 128, *,
           temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, batch_rows: int = 16, look_ahead: int | None = None,
           phrases: Sequence[Sequence[int]] = (),
           recorded: RecordedSteps | None = None) -> Iterator[tuple[int, list[int]]]:
    """Answer every prompt; yields (its index, the answer up to and with its first stop id), each as soon as it is done.

    prompts: token ids of each, of any lengths, none empty. max_new_tokens: of all, or of each. At temperature 0 the best
    token is taken, otherwise one is drawn with `seed`. batch_rows: prompts at a time. look_ahead: tokens guessed in a step
    (default: 7, or as many as make 32 tokens with the batch's rows); phrases: token ids that answers are likely to hold,
    for the first guesses. Neither changes an answer, but for scores that tie up to rounding. recorded: keeps
    what is recorded on a GPU for the next call; without it each call there records anew.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if batch_rows < 1 or len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise ValueError("batch_rows and every max_new_tokens must be at least 1, one limit for all prompts or one for each")
    if not all(prompts):
        raise ValueError(f"prompt {next(i for i, prompt in enumerate(prompts) if not prompt)} is empty; it needs one token at least")
    if not prompts:
        return
    device = model.head.device
    B = min(batch_rows, len(prompts))
    width = 1 + (max(0, min(8, 32 // B) - 1) if look_ahead is None else look_ahead)
    room = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) + width
    if recorded is None and device.type == "cuda":
        recorded = RecordedSteps()
    step = recorded.take(model, B, width, room) if recorded else None
    cache = step.cache if step else Cache(model, B, room, width)
    generator = torch.Generator(device).manual_seed(seed) if temperature else None
    waiting = sorted(range(len(prompts)), key=lambda i: list(prompts[i]), reverse=True)       # like beginnings in turn; taken from the end
    running: list[Row] = []
    held, answers = empty_prefix(model), Followed([list(phrase) for phrase in phrases])
    while waiting or running:
        if waiting and len(running) <= B * 3 // 4:                # take in new rows, several at a time
            new = [waiting.pop() for _ in range(min(len(waiting), B - len(running)))]
            held = admit(model, cache, held, [prompts[i] for i in new], prompts[waiting[-1]] if waiting else None, len(running))
            running += [Row(i, prompts[i]) for i in new]
        guesses = [row.guess(width - 1, answers) for row in running]
        idle = B - len(running) if step else 0                      # a CUDA graph has one shape
        tokens = [row.ids[-1:] + guess + [0] * (width - 1 - len(guess)) for row, guess in zip(running, guesses, strict=True)]
        tokens = torch.tensor(tokens + [[0] * width] * idle, device=device)
        starts = torch.tensor([len(row.ids) - 1 for row in running] + [0] * idle, device=device)
        positions = starts[:, None] + torch.arange(width, device=device)
        if step:
            logits = step(tokens, positions)
        else:
            logits = cache.step(model, tokens, positions, longest=max(len(row.ids) for row in running) + width)
        chosen = choose(logits, temperature, top_p, generator).tolist()
        for place in reversed(range(len(running))):
            row = running[place]
            for token, guess in itertools.zip_longest(chosen[place], guesses[place]):
                row.ids.append(token)
                answers.note(row.ids, len(row.ids) - 1)
                if token in STOP_IDS or len(row.ids) == row.length + limits[row.index]:
                    yield row.index, row.ids[row.length:]
                    last = running.pop()
                    if last is not row:                            # the last row moves into the free place
                        cache.move(len(running), to=place)
                        running[place] = last
                    break
                if token != guess:                                 # what was run after it does not count
                    break
    if step:
        recorded.keep(step)


def admit(model: Gemma3, cache: Cache, held: Prefix, rows: Sequence[Sequence[int]], following: Sequence[int] | None, at: int) -> Prefix:
    """Fill the cache's rows from `at` on, with all but the last token of each; returns the prefix they shared, for the next ones.

    held: what the rows before began with. following: the row to come, whose beginning is worth keeping too.
    """
    bodies = [list(row[:-1]) for row in rows]
    shared = shared_length([*bodies, list(following[:-1])] if following else bodies) if following or len(rows) > 1 else 0
    held = held.first(shared_length([held.ids, *bodies]))
    if shared >= len(held.ids) + SHORTEST_PREFIX:
        more = read(model, held, [bodies[0][len(held.ids):shared]])[0]
        held = Prefix(held.ids + more.ids, *([torch.cat(pair) for pair in zip(a, b, strict=True)]
                                             for a, b in ((held.keys, more.keys), (held.values, more.values))))
    own = []                                                      # (row, its own tokens)
    for row, body in enumerate(bodies, start=at):
        if len(body) > len(held.ids):
            own.append((row, body[len(held.ids):]))
        else:
            cache.fill(row, held, None)
    while own:
        sizes = itertools.accumulate(len(tokens) for _, tokens in own)
        taken = max(1, sum(size <= READ_TOKENS for size in sizes))
        for (row, _), part in zip(own[:taken], read(model, held, [tokens for _, tokens in own[:taken]]), strict=True):
            cache.fill(row, held, part)
        own = own[taken:]
    return held


class RecordedStep:
    """`Cache.step` recorded as a CUDA graph, and replayed: the host no longer launches each of its 1,500 kernels."""

    def __init__(self, model: Gemma3, rows: int, width: int, room: int) -> None:
        def project(hidden: Tensor) -> Tensor:
            """As `projection`, but of the head as it is when the step runs: it may have changed in place."""
            return F.linear(hidden, model.head.to(hidden.dtype))

        self.size, self.model_state = (rows, width, room), None
        self.cache = cache = Cache(model, rows, room, width, project)
        self.tokens = torch.zeros(rows, width, dtype=torch.int64, device=cache.device)
        self.positions = torch.zeros_like(self.tokens) + torch.arange(width, device=cache.device)
        longest = max(keys.shape[2] for keys in cache.keys)
        self.replay = record(lambda: vars(self).update(logits=cache.step(model, self.tokens, self.positions, longest)), cache.device)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.replay()
        return self.logits


class RecordedSteps:
    """The last `MOST_STEPS` recorded steps, kept from call to call: recording one takes 0.3 to 0.5 s.

    A recording reads the weights where they were. Those that change in place count. When any has been
    replaced, as by `merge` or a load, all recordings are dropped.
    """

    def __init__(self) -> None:
        self.steps: dict[tuple[int, int, int], RecordedStep] = {}
        self.model_state: tuple | None = None       # of the model that was recorded
        self.tensors: list[Tensor] = []             # its weights: while held, no others can take their places

    def take(self, model: Gemma3, rows: int, width: int, room: int) -> RecordedStep:
        """A step of `width` tokens for each of so many rows, its cache empty; the caller's until `keep`.

        Room is rounded up to few sizes, so that prompts of similar lengths share a recording.
        """
        named = [*model.named_parameters(), *model.named_buffers()]
        places = [(name, id(tensor), tensor.data_ptr()) for name, tensor in named]
        state = model.config, model.compute_dtype, model.training, places
        if state != self.model_state:
            self.steps.clear()
            self.model_state, self.tensors = state, [tensor for _, tensor in named]
        size = rows, width, size_for(room, steps=2)
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
        if len(self.steps) > MOST_STEPS:
            del self.steps[next(iter(self.steps))]  # used longest ago


def generate(model: Gemma3, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int] = 128, **options) -> list[list[int]]:
    """The answer to each prompt, in their order.  Options as for `stream`."""
    answers = dict(stream(model, prompts, max_new_tokens, **options))
    return [answers[i] for i in range(len(prompts))]


def call_phrases(tokenizer: Tokenizer) -> list[list[int]]:
    """What every call is made of, whatever its function."""
    return [tokenizer.encode(text, control=True) for text in ("<start_of_turn>model\n<start_function_call>call:", ":<escape>",
                                                              "<escape>}<end_function_call><start_function_response>")]


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that reads a tuned model; `base_of` and `load_adapter` take their values."""
    add = parser.add_argument_group("model").add_argument
    add("--model", default=None, help="folder in the published layout, a run's folder of full fine-tuning, or a name on the Hugging Face "
        "Hub, owner/name or owner/name@revision (default: what the adapter was trained on)")
    add("--adapter", default=None, metavar="RUN", help="a run's folder, or an adapter's in PEFT's layout")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every program that runs one; with the model's, what `load_tuned` takes."""
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="what the model computes in (default: bf16, or fp32 on a "
        "device that has no instructions for bf16 products)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a model; print the calls it makes, as JSON.")
    parser.add_argument("query", nargs="?", help="the question; without it a session begins, in which you also answer for the tools")
    add = parser.add_argument_group("what to ask").add_argument
    add("--tools", default=None, metavar="FILE", help="JSON list of tools: xLAM's columns, JSON Schema, or OpenAI's envelope")
    add("--system", default=None, metavar="TEXT", help="what the model is told before the tools, or @FILE that holds it (default: with "
        "tools, what it was told in training)")
    add("--raw", action="store_true", help="print the model's text instead, control tokens and all")
    add = parser.add_argument_group("how to answer").add_argument
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest token each time (default), 1 draws by chance")
    add("--top-p", type=float, default=1.0, metavar="X", help="draw among the likeliest tokens that make up this share (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (default: %(default)s)")
    add_model_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    if not (args.temperature == 0 or 1e-3 <= args.temperature < math.inf) or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature is 0, or at least 0.001; --top-p in (0, 1], --max-new-tokens at least 1")
    return args


def main(args: argparse.Namespace) -> int:
    tools = []
    if args.tools:
        try:
            tools = read_json(Path(args.tools))
            tools = parse_tools([tools] if isinstance(tools, dict) else tools)
        except RowError as error:
            raise ValueError(f"{args.tools}: {error}") from None
    model, folder = load_tuned(args.model, args.adapter, args.dtype, args.device)
    tokenizer = load_tokenizer(folder)
    recorded = RecordedSteps() if args.device == "cuda" else None

    def ask(messages: list[dict]) -> str:
        ids, _ = tokenizer.encode_segments(render_segments(messages, tools, add_generation_prompt=True))
        [answer] = generate(model, [ids], args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                            phrases=call_phrases(tokenizer), recorded=recorded)
        return tokenizer.decode(answer)

    system = read_system_text(args.system) if args.system is not None else system_prompt_of(args.model, args.adapter) if tools else ""
    messages = [{"role": "developer", "content": system}] if system else []
    if args.query is None:
        return session(ask, messages, args.raw)
    text = ask([*messages, {"role": "user", "content": args.query}])
    calls = parse_calls(text)
    if args.raw:
        print(text)
        return 0
    for fault in calls.unread:
        print(f"generate.py: {fault}", file=sys.stderr)
    if not calls or calls.unread:
        print(f"generate.py: {'unreadable' if calls.unread else 'no call'}; the model says: {spoken(text)!r}", file=sys.stderr)
    print(json.dumps([] if calls.unread else calls, ensure_ascii=False))        # another call may stand inside the unreadable one
    return 1 if calls.unread else 0


def spoken(text: str) -> str:
    """An answer without the token that ends it."""
    for stop in ("<eos>", "<start_function_response>", "<end_of_turn>"):
        text = text.removesuffix(stop)
    return text.strip()


def session(ask: Callable[[list[dict]], str], messages: list[dict], raw: bool) -> int:
    """Questions from the terminal until it ends; for each call, the user pastes what the tool returns."""
    print("Ask something; after a call, paste what the tool returns (JSON or text; an empty line: null). Ctrl-D ends.")
    try:
        while True:
            query = input("you> ").strip()
            if not query:
                continue
            messages.append({"role": "user", "content": query})
            while True:
                text = ask(messages)
                calls = parse_calls(text)
                for fault in calls.unread:
                    print(f"unreadable> {fault}")
                if calls.unread:
                    calls.clear()                              # what else looks like a call may stand inside the unreadable one
                if raw or not calls:
                    print(f"model> {text if raw else spoken(text)}")
                if not calls:
                    messages.append({"role": "assistant", "content": spoken(text)})
                    break
                messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]})
                for call in calls:
                    print(f"call>  {json.dumps(call, ensure_ascii=False)}")
                messages.append({"role": "tool", "content": [
                    {"name": call["name"], "response": json_or_text(input(f"{call['name']} returns> ").strip())} for call in calls]})
    except EOFError:
        print()
        return 0


def json_or_text(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
