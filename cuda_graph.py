"""CUDA graphs: kernels that were launched once are launched again all at once, for where the host is slower than the GPU.

A training pass launches some 2,000 kernels, and launching one takes the host as long as a GPU takes for a small one. Recorded,
they are one launch; but then they read and write always the same memory. So what goes into a pass is copied there, and
each pass is filled up to a size that others have too: its tokens with short documents that carry no loss, its
rows that carry loss with some of target `IGNORE`, attention's tables with blocks of no tokens. None of that
changes a loss or a gradient.
"""
from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from lora import flat_adapters, hash_tokens, set_token_hashes
from model import Gemma3, Plans
from ops.attention_tables import Tables
from ops.cross_entropy import IGNORE
from ops.transfer import to_device_async
from ops.triton_utils import cdiv, next_power_of_2

MOST = 64           # recorded sizes that are kept, the last ones used; each takes some MB

# Sizes between two powers of two, of tokens and of rows that carry loss. They fill a pass up by 4 % on
# average, twice as many would by 2 %; but steps of few rows would meet half as many sizes again, and each
# takes seconds to record.
STEPS = 8


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    """For trial runs, for recordings that share memory, and for others: always the same, as each stream keeps memory of its own."""
    return [torch.cuda.Stream(device) for _ in range(3)]


def record(run: Callable[[], object], device: torch.device, pool: tuple[int, int] | None = None) -> Callable[[], object]:
    """A function that does what `run` does, its kernels launched as one.  `run` must read and write tensors that stay where they are.

    It is run twice first, in which kernels are compiled and tuned. pool: memory that recordings share whose calls never overlap.
    On a CPU, which has nothing to record, it is `run` itself.
    """
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        trial, shared, other = _streams(torch.cuda.current_device())
        trial.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(trial):
            run()
            run()
        torch.cuda.current_stream().wait_stream(trial)
        gc.collect()                        # a trial's autograd graph that still lived would bring its stream into the recording
        graph = torch.cuda.CUDAGraph()
        stream = shared if pool else other
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):      # other threads, as NCCL's, go on
            run()
    return graph.replay


def size_for(count: int, steps: int) -> int:
    """The next of the sizes that are recorded: so many between two powers of two, and none below 64."""
    step = max(64, next_power_of_2(count) // (2 * steps))
    return cdiv(count, step) * step


@dataclass(frozen=True)
class _Recorded:
    inputs: list[Tensor]
    loss: Tensor
    replay: Callable[[], object]


class RecordedPasses:
    """Forward and backward passes of a model, each size of them recorded once.  Each `.grad`, which they add to, must stay in its place."""

    def __init__(self, model: Gemma3, largest: int = 0) -> None:
        """largest: tokens of the largest pass, a size of its own that full passes are filled up to.

        The first pass is filled up to it too, so that the others find room in its memory.
        """
        self.model, self.device, self.largest, self.recorded = model, model.head.device, largest, dict[tuple, _Recorded]()
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.adapters = flat_adapters(model)

    def __call__(self, batch: Batch, seed: int = 0) -> Tensor:
        """Add the gradients of a batch's summed loss, and return that loss, in nats, a scalar.  seed: of dropout.

        Raises ValueError where attention is not computed by kernels.
        """
        batch = batch.filled(self._size(batch))
        tokens, positions, documents, rows, targets = batch.to(self.device)
        plans = self.model.plans(positions, documents, self.device)
        if self.model.backends.attention != "triton":
            raise ValueError("--cuda-graph needs attention by kernels: bf16, a GPU of Ampere or newer, the triton package; leave it out")
        carrying = size_for(len(rows), STEPS)
        more = carrying - len(rows)
        # The rows that are added may be of any token, here the first: what they give back to it is zero.
        rows, targets = F.pad(rows, (0, more)), F.pad(targets, (0, more), value=IGNORE)
        plans = {window: _filled(plan, len(tokens)) for window, plan in plans.items()}
        own = tokens, to_device_async(positions, self.device), rows, targets, hash_tokens(self.model, batch.keys, seed)

        inputs = _tensors(own, plans)
        key = tuple(len(x) for x in inputs)
        made = self.recorded.pop(key, None)
        if made is None:
            made = self._record(own, plans)
            if len(self.recorded) == MOST:
                del self.recorded[next(iter(self.recorded))]
        self.recorded[key] = made                                                       # the last one used is the last one
        for place, x in zip(made.inputs, inputs, strict=True):
            place.copy_(x)
        if self.adapters:
            self.adapters.refresh()                     # no recording holds it: their trial runs have it done
        made.replay()
        return made.loss.clone()

    def _size(self, batch: Batch) -> int:
        """How many tokens a batch is filled up to."""
        tokens = len(batch.tokens)
        if tokens > self.largest:
            return size_for(tokens, STEPS)
        return min(size_for(tokens, STEPS), self.largest) if self.recorded else self.largest

    def _record(self, own: tuple[Tensor | None, ...], plans: Plans) -> _Recorded:
        own = tokens, positions, rows, targets, numbers = tuple(x if x is None else x.clone() for x in own)
        plans = {window: replace(plan, queries=plan.queries.clone(), keys=plan.keys.clone(), seen=plan.seen.clone())
                 for window, plan in plans.items()}
        loss = torch.zeros((), device=self.device)

        def run() -> None:
            set_token_hashes(self.model, numbers, rows)
            nats = self.model(tokens, positions, None, rows, targets, plans=plans)
            nats.backward()
            loss.copy_(nats.detach())

        grads = [p.grad for p in self.model.parameters() if p.requires_grad]
        before = [grad.clone() for grad in grads] if self.device.type == "cuda" else []            # its trial runs add to them
        replay = record(run, self.device, self.pool)
        for grad, kept in zip(grads, before, strict=False):
            grad.copy_(kept)
        return _Recorded(_tensors(own, plans), loss, replay)


def _tensors(own: tuple[Tensor | None, ...], plans: Plans) -> list[Tensor]:
    """All that a pass reads and that another pass has otherwise."""
    return [*(x for x in own if x is not None), *(x for plan in plans.values() for x in (plan.queries, plan.keys, plan.seen))]


def _filled(plan: Tables, tokens: int) -> Tables:
    """Its tables, filled up with blocks of no tokens: there are as many blocks as such tokens make, and some for each document's end."""
    queries, keys = cdiv(tokens, plan.block_q), cdiv(tokens, plan.block_k)
    ends = size_for(max(len(plan.queries) - queries, len(plan.keys) - keys), steps=2)
    return replace(plan, queries=F.pad(plan.queries, (0, 0, 0, queries + ends - len(plan.queries))),
                   keys=F.pad(plan.keys, (0, 0, 0, keys + ends - len(plan.keys))))
