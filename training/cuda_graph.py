"""Forward and backward passes recorded as CUDA graphs, for steps so small that the GPU waits for the host.

A forward and backward pass launches some 2,000 kernels, and launching one takes the host as long as a small
one takes the GPU. Recorded as a graph they are one launch. But a graph always reads and writes the same
memory, and its shapes never change. Therefore

- the inputs of a micro-batch are copied to where the graph reads them, and gradients stay where it adds to
  them;
- a micro-batch is padded to one of a few sizes, so that many share a recording: its tokens with short
  documents that carry no loss, the tokens that carry loss with some of target `IGNORE`, attention's tables
  with blocks of no tokens. None of this changes a loss or a gradient.
"""
from __future__ import annotations

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
from ops.graph_capture import record, size_for
from ops.transfer import to_device_async
from ops.triton_utils import cdiv

MAX_RECORDINGS = 64         # kept at a time, those used last; each takes some MB

# Sizes between two powers of two, of tokens and of tokens that carry loss. With 8 of them padding adds 4 % on
# average; 16 would halve that, but steps of few rows would meet half as many sizes again, and each takes
# seconds to record.
SIZES_PER_DOUBLING = 8


@dataclass(frozen=True)
class Inputs:
    """All that a micro-batch of T tokens, M of which predict with loss, is computed from.  On the device.

    tokens, positions (T) int64
    loss_rows, targets (M) int64     as in `Batch`
    token_hashes (T) int32          what dropout depends on; None without dropout
    tables                           attention's, for each window
    """

    tokens: Tensor
    positions: Tensor
    loss_rows: Tensor
    targets: Tensor
    token_hashes: Tensor | None
    tables: dict[int | None, Tables]

    def tensors(self) -> list[Tensor]:
        """Every tensor, in a fixed order."""
        tensors = [self.tokens, self.positions, self.loss_rows, self.targets]
        if self.token_hashes is not None:
            tensors.append(self.token_hashes)
        for table in self.tables.values():
            tensors += [table.queries, table.keys, table.seen]
        return tensors

    def clone(self) -> Inputs:
        """The same values in memory of their own."""
        numbers = self.token_hashes
        tables = {}
        for window, table in self.tables.items():
            queries, keys, seen = table.queries.clone(), table.keys.clone(), table.seen.clone()
            tables[window] = replace(table, queries=queries, keys=keys, seen=seen)
        return Inputs(
            tokens=self.tokens.clone(),
            positions=self.positions.clone(),
            loss_rows=self.loss_rows.clone(),
            targets=self.targets.clone(),
            token_hashes=None if numbers is None else numbers.clone(),
            tables=tables,
        )


@dataclass(frozen=True)
class Recording:
    """The graph of a forward and backward pass, the inputs that it reads, and the scalar loss it writes."""

    inputs: Inputs
    loss: Tensor
    replay: Callable[[], object]


class RecordedMicroBatches:
    """Forward and backward passes of a model, recorded once for each size of a micro-batch.

    The passes add to each parameter's `.grad`, which must stay in its place.
    """

    def __init__(self, model: Gemma3, max_tokens: int = 0) -> None:
        """max_tokens: the size of a full micro-batch, which is a size to pad to as well.

        The first micro-batch is padded to it too, so that later recordings find room in its memory.
        """
        self.model, self.device, self.max_tokens = model, model.head.device, max_tokens
        self.recordings: dict[tuple[int, ...], Recording] = {}          # by the lengths of the inputs
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.adapters = flat_adapters(model)

    def __call__(self, batch: Batch, seed: int = 0) -> Tensor:
        """Add the gradients of a micro-batch's summed loss; returns that loss, in nats, a scalar.

        seed: of dropout. Raises ValueError where attention is not computed by kernels.
        """
        inputs = self._inputs(batch, seed)
        size = tuple(len(tensor) for tensor in inputs.tensors())
        recording = self.recordings.pop(size, None)
        if recording is None:
            recording = self._record(inputs.clone())
            if len(self.recordings) == MAX_RECORDINGS:
                del self.recordings[next(iter(self.recordings))]       # used longest ago
        self.recordings[size] = recording                               # used last, and so the last one
        for recorded, tensor in zip(recording.inputs.tensors(), inputs.tensors(), strict=True):
            recorded.copy_(tensor)
        if self.adapters:
            # Round the adapters for the products. A recording does not: its warm-up has already done so.
            self.adapters.refresh()
        recording.replay()
        return recording.loss.clone()

    def _inputs(self, batch: Batch, seed: int) -> Inputs:
        """A micro-batch, padded, on the device."""
        batch = batch.filled(self._padded_tokens(len(batch.tokens)))
        tokens, positions, documents, loss_rows, targets = batch.to(self.device)
        tables = self._tables(positions, documents)
        loss_tokens = size_for(len(loss_rows), SIZES_PER_DOUBLING)
        padding = loss_tokens - len(loss_rows)
        # Any token may stand for the added ones, here the first: the gradient that they give it is zero.
        loss_rows = F.pad(loss_rows, (0, padding))
        targets = F.pad(targets, (0, padding), value=IGNORE)
        hashes = hash_tokens(self.model, batch.keys, seed)
        return Inputs(tokens, to_device_async(positions, self.device), loss_rows, targets, hashes, tables)

    def _padded_tokens(self, tokens: int) -> int:
        """How many tokens a micro-batch is padded to."""
        size = size_for(tokens, SIZES_PER_DOUBLING)
        if tokens > self.max_tokens:
            return size                     # one row that is longer than a full micro-batch
        return min(size, self.max_tokens) if self.recordings else self.max_tokens

    def _tables(self, positions: Tensor, documents: Tensor) -> dict[int | None, Tables]:
        """Attention's tables for each window, padded."""
        if self.model.backends.attention != "triton":
            raise ValueError("--cuda-graph needs attention by kernels: bf16, a GPU of Ampere or newer, the "
                             "triton package; leave it out")
        plans: Plans = self.model.plans(positions, documents, self.device)
        return {window: pad_tables(plan, len(positions)) for window, plan in plans.items()}

    def _record(self, inputs: Inputs) -> Recording:
        """Record the pass that reads these inputs; gradients are as before."""
        loss = torch.zeros((), device=self.device)

        def forward_and_backward() -> None:
            set_token_hashes(self.model, inputs.token_hashes, inputs.loss_rows)
            nats = self.model(inputs.tokens, inputs.positions, None, inputs.loss_rows, inputs.targets,
                              plans=inputs.tables)
            nats.backward()
            loss.copy_(nats.detach())

        grads = [parameter.grad for parameter in self.model.parameters() if parameter.requires_grad]
        # The warm-up before the capture adds to the gradients.
        grads_before = [grad.clone() for grad in grads] if self.device.type == "cuda" else []
        replay = record(forward_and_backward, self.device, self.pool)
        for grad, before in zip(grads, grads_before, strict=False):
            grad.copy_(before)
        return Recording(inputs, loss, replay)


def pad_tables(tables: Tables, tokens: int) -> Tables:
    """Tables of `tokens` tokens, padded with blocks of no tokens.

    Tokens without borders make `tokens / block` blocks, and each document's end may make one more. How many
    more depends on the documents, so this number is rounded up.
    """
    queries, keys = cdiv(tokens, tables.block_q), cdiv(tokens, tables.block_k)
    ends = size_for(max(len(tables.queries) - queries, len(tables.keys) - keys), steps=2)
    missing_queries = queries + ends - len(tables.queries)
    missing_keys = keys + ends - len(tables.keys)
    return replace(tables, queries=F.pad(tables.queries, (0, 0, 0, missing_queries)),
                   keys=F.pad(tables.keys, (0, 0, 0, missing_keys)))
