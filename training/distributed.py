"""Several processes: joining them, and the gradients of a step that they share.

A process computes some of a step's micro-batches; the step's gradient is the sum over all of them. Both
classes reduce it in the same way:

    for i, batch in enumerate(batches):
        gradients.set_sync(last=i == len(batches) - 1)
        loss(batch).backward()
    extra = gradients.all_reduce(extra)     # gradients, and a few numbers, are now sums over all processes
    optimizer.step()                        # an optimizer of `gradients.parameters`
    gradients.zero()

`AllReduceGradients` keeps all parameters in every process. The gradients of adapters (15 MB) are in one
buffer and go through one all-reduce, with `extra` at its end. In full fine-tuning (1.07 GB) a bucket of
layers is reduced as soon as the last backward pass is done with it, while the layers below are still
computing.

`FSDPGradients` is PyTorch's FSDP2: each process keeps a shard of every parameter, of its gradient and of its
moments, and gathers the weights of a layer when it needs them.
"""
from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from data import IDLE, Batch
from lora import flat_adapters
from model import Gemma3

TIMEOUT = timedelta(minutes=30)     # of a collective: rank 0 may be building the token cache meanwhile
BUCKET = 8_000_000  # fewest numbers in an all-reduce, 32 MB of fp32: latency no longer matters
EXTRA = 16                          # most numbers that travel with the adapters' gradients


class AllReduceGradients:
    """Gradients summed over `world` processes, each of which keeps all parameters.

    On a CPU the gradients keep their memory from step to step: new ones would be allocated between the
    activations and fragment the memory (docs/log.md). They also keep it where micro-batches are recorded as
    CUDA graphs, which always add to the same memory. A graph that is replayed calls no hooks, so there
    nothing is reduced before the last backward pass has ended.
    """

    def __init__(self, model: Gemma3, world: int, recorded: bool = False) -> None:
        self.model, self.world = model, world
        self.buckets: list[list[nn.Parameter]] = []
        self.sent: list[tuple[Tensor, dist.Work]] = []              # buckets that are being reduced, in order
        self.missing: list[int] | None = None  # gradients that each bucket still waits for
        self.flat = flat_adapters(model)
        if self.flat:
            self.flat.start_training(model.compute_dtype, EXTRA)
            self.parameters = [self.flat.masters]                   # all adapters as one
            return
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kept = recorded or model.head.device.type == "cpu"
        self.buckets = self._make_buckets()
        if self.kept:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        if world > 1 and not recorded:
            for number, bucket in enumerate(self.buckets[:-1]):     # the last one waits for `extra`
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(partial(self._gradient_ready, number))

    def _make_buckets(self) -> list[list[nn.Parameter]]:
        """The trained parameters in the order in which a backward pass finishes them, several layers
        together.
        """
        layers = [list(block.parameters()) for block in reversed(self.model.model["layers"])]
        in_layers = {parameter for layer in layers for parameter in layer}
        others = [p for p in self.model.parameters() if p not in in_layers]
        buckets: list[list[nn.Parameter]] = [[]]
        for layer in [*layers, others]:
            if sum(p.numel() for p in buckets[-1]) >= BUCKET:
                buckets.append([])
            buckets[-1] += [p for p in layer if p.requires_grad]
        return buckets

    def equalize(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of a step, or of an evaluation.  Processes may have different numbers of them."""
        return batches

    @property
    def weight_grad_out(self) -> Tensor | None:
        """Where the tied embedding's gradient can be added directly, which saves 0.67 GB (`Gemma3.forward`).
        """
        return self.model.head.grad if self.model.head.device.type == "cpu" else None

    def set_sync(self, last: bool) -> None:
        """Call before each forward and backward pass.  last: no other micro-batch follows in this step."""
        self.missing = [len(bucket) for bucket in self.buckets] if last else None

    def _gradient_ready(self, bucket: int, _: Tensor) -> None:
        """Reduce the buckets that are complete, in the same order in all processes."""
        if self.missing is None:
            return
        self.missing[bucket] -= 1
        while len(self.sent) < len(self.buckets) - 1 and self.missing[len(self.sent)] == 0:
            self._reduce_next()

    def _reduce_next(self, *extra: Tensor) -> None:
        """Start the all-reduce of the next bucket, with `extra` behind it."""
        grads = []
        for parameter in self.buckets[len(self.sent)]:  # no gradient: this process had no micro-batch
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grads.append(grad.flatten())
        flat = torch.cat([*grads, *extra])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def all_reduce(self, extra: Tensor) -> Tensor:
        """Sum the gradients over all processes, after the last backward pass; returns the sum of `extra` (n).
        """
        if self.flat and not self.flat.in_place():
            raise RuntimeError("an adapter or its .grad has left the flat buffer: end steps with "
                               "gradients.zero(), "
                               "not zero_grad(), and create AllReduceGradients after moving the model")
        if self.world == 1:
            return extra
        if self.flat:
            sent = self.flat.gradients[:len(self.flat.masters) + len(extra)]
            sent[-len(extra):] = extra
            dist.all_reduce(sent)
            return sent[-len(extra):].clone()
        while len(self.sent) < len(self.buckets) - 1:
            self._reduce_next()
        self._reduce_next(extra)
        for bucket, (flat, reducing) in zip(self.buckets, self.sent, strict=True):
            reducing.wait()
            sizes = [p.numel() for p in bucket]
            for parameter, grad in zip(bucket, flat[:sum(sizes)].split(sizes), strict=True):
                grad = grad.view_as(parameter)
                parameter.grad = parameter.grad.copy_(grad) if self.kept else grad
        extra = self.sent[-1][0][-len(extra):]
        self.sent, self.missing = [], None
        return extra

    def zero(self) -> None:
        """Set all gradients to zero, after the optimizer's step."""
        if self.flat:
            self.flat.clear()
        elif self.kept:
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            self.model.zero_grad()

    def norm(self) -> Tensor:
        """The norm of all gradients together.

        On a CPU it is the norm of the parameters' norms: a sum over millions of numbers in fp32 would be off
        by 1e-4.
        """
        on_cpu = self.model.head.device.type == "cpu"
        return total_norm(self.model.parameters() if on_cpu else self.parameters)


class FSDPGradients:
    """Parameters, gradients and moments in shards, one per process (FSDP2).

    All processes must compute the same number of micro-batches: see `equalize`.
    """

    weight_grad_out = None

    def __init__(self, model: Gemma3) -> None:
        from torch.distributed.fsdp import fully_shard
        self.model, mesh = model, init_device_mesh(model.head.device.type, (dist.get_world_size(),))
        for module in [*model.model["layers"], model]:
            fully_shard(module, mesh=mesh)
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)              # a sum, not a mean
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def equalize(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches, and as many idle ones as all processes need to go through the layers together.
        """
        return batches + [IDLE] * (all_reduce_max(len(batches), self.model.head.device) - len(batches))

    def set_sync(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)

    def all_reduce(self, extra: Tensor) -> Tensor:
        dist.all_reduce(extra)
        return extra

    def zero(self) -> None:
        self.model.zero_grad()

    def norm(self) -> Tensor:
        return total_norm(self.parameters)


def init_distributed(kind: str) -> tuple[int, int, torch.device]:
    """Join torchrun's other processes, if any; returns this one's rank, their number, and this one's device.

    kind: of the device, "cuda" or "cpu". torchrun keeps one store of addresses for all its restarts, so each
    restart gets a key prefix of its own; else a process could read there the address of one that died.
    Several machines count their restarts separately, and so cannot agree on such a prefix.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if kind == "cuda" else None)
    if world > 1:
        store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
        one_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0) if one_machine else 0
        store = dist.PrefixStore(f"start-{restarts}", store)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    if kind == "cuda":
        torch.cuda.set_device(device)
    return rank, world, device


def shutdown_distributed(exit_code: int) -> int:
    """Wait for the other processes and leave their group; returns `exit_code`."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return exit_code


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor that a shard is of; all processes must call it.  Any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """`full` on the device of `tensor`; this process's shard of it if `tensor` is one."""
    full = full.to(tensor.device)
    if isinstance(tensor, DTensor):
        return distribute_tensor(full, tensor.device_mesh, tensor.placements)
    return full


def all_reduce_max(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if not dist.is_initialized():
        return number
    largest = torch.tensor(number, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of all gradients together: a scalar, the same in all processes."""
    return full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


def decoding_copy(model: Gemma3) -> Gemma3:
    """A copy to decode with, of a model without adapters: fp32 masters are rounded once, not at every token.

    Under FSDP all processes must call it, as it gathers the shards.
    """
    with torch.device("meta"):
        copy = Gemma3(model.config, model.compute_dtype, model.backends)
    weights = {}
    for name, tensor in model.state_dict().items():
        weights[name] = full_tensor(tensor.detach()).to(model.compute_dtype)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()
