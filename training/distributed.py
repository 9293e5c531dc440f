"""The gradients of a step that several processes share: summed, or summed and kept in shards.

A process has some of a step's batches; the step's gradient is the sum over all of them. Both classes give it the same way:

    gradients.begin_pass(last=False); loss.backward(); …; gradients.begin_pass(last=True); loss.backward()
    extra = gradients.finish(extra)         # the gradients are the step's; `extra`, a few numbers, is summed along with them
    optimizer.step(); gradients.clear()     # an optimizer of `gradients.parameters`

`AllReduceGradients` keeps every parameter whole in every process. Adapters (15 MB) have their gradients in one buffer,
and that goes through one all-reduce with `extra` at its end. Where everything is trained (1.07 GB) a bucket
of layers is sent as soon as the last backward pass has finished with it, while the layers below are still
being computed. `FSDPGradients` is PyTorch's FSDP2: each process keeps a share of every parameter, of its gradient
and of the optimizer's moments, and gathers a layer's weights when it comes to that layer.
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

from lora import flat_adapters
from model import Gemma3

TIMEOUT = timedelta(minutes=30)         # for the slowest process between two meetings, such as rank 0 building the token cache
BUCKET = 8_000_000          # numbers sent together at least: large enough that latency does not count (32 MB of fp32)
EXTRA = 16                  # numbers that may travel with the adapters' gradients


class AllReduceGradients:
    """Gradients added up over `world` processes.  Between `begin_pass(last=True)` and `finish` parts of them are on their way.

    On a CPU they keep their memory from step to step: made anew in each they would lie among what a pass leaves again, and
    large pieces would find no room between them (docs/log.md). So they must where passes are recorded, which always add to the
    same memory (cuda_graph.py); what is replayed asks no hook, and so nothing is sent before the last pass has ended.
    """

    def __init__(self, model: Gemma3, world: int, recorded: bool = False) -> None:
        self.model, self.world, self.sent, self.open, self.buckets = model, world, [], None, []
        self.flat = flat_adapters(model)
        if self.flat:
            self.flat.start_training(model.compute_dtype, EXTRA)
            self.parameters = [self.flat.masters]                                   # all adapters as one
            return
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kept = recorded or model.head.device.type == "cpu"
        layers = [list(block.parameters()) for block in reversed(model.model["layers"])]       # as a backward pass finishes them
        inside = {parameter for layer in layers for parameter in layer}
        self.buckets = [[]]
        for layer in [*layers, [p for p in model.parameters() if p not in inside]]:
            if sum(p.numel() for p in self.buckets[-1]) >= BUCKET:
                self.buckets.append([])
            self.buckets[-1] += [p for p in layer if p.requires_grad]
        for parameter in filter(lambda p: self.kept and p.requires_grad, model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
        if world > 1 and not recorded:
            for number, bucket in enumerate(self.buckets[:-1]):              # the last one waits for `extra`
                for parameter in bucket:
                    parameter.register_post_accumulate_grad_hook(partial(self._finished, number))

    @property
    def weight_grad_out(self) -> Tensor | None:
        """Where the tied embedding's gradient may be added to directly (Gemma3.forward), 0.67 GB less; None: nowhere."""
        return self.model.head.grad if self.model.head.device.type == "cpu" else None

    def begin_pass(self, last: bool) -> None:
        """Before each forward and backward pass; last: whether no other follows in this step."""
        self.open = [len(bucket) for bucket in self.buckets] if last else None

    def _finished(self, bucket: int, _: Tensor) -> None:
        if self.open is None:
            return
        self.open[bucket] -= 1
        while len(self.sent) < len(self.buckets) - 1 and self.open[len(self.sent)] == 0:        # in one order in all processes
            self._send()

    def _send(self, *extra: Tensor) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.buckets[len(self.sent)]]     # none: no batch here
        flat = torch.cat([*(grad.flatten() for grad in grads), *extra])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self, extra: Tensor) -> Tensor:
        """After the last pass, or where a process has none: gradients and `extra` (n) become those of all processes."""
        if self.flat and not self.flat.in_place():
            raise RuntimeError("an adapter or its .grad is no longer in the buffer of all: end steps with "
                               "gradients.clear(), not with zero_grad, and make AllReduceGradients after moving")
        if self.world == 1:
            return extra
        if self.flat:
            sent = self.flat.gradients[:len(self.flat.masters) + len(extra)]
            sent[-len(extra):] = extra
            dist.all_reduce(sent)
            return sent[-len(extra):].clone()
        while len(self.sent) < len(self.buckets) - 1:
            self._send()
        self._send(extra)
        for bucket, (flat, sending) in zip(self.buckets, self.sent, strict=True):
            sending.wait()
            sizes = [p.numel() for p in bucket]
            for parameter, grad in zip(bucket, flat[:sum(sizes)].split(sizes), strict=True):
                grad = grad.view_as(parameter)
                parameter.grad = parameter.grad.copy_(grad) if self.kept else grad
        extra = self.sent[-1][0][-len(extra):]
        self.sent, self.open = [], None
        return extra

    def clear(self) -> None:
        """After the optimizer's step."""
        if self.flat:
            self.flat.clear()
        elif self.kept:
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])
        else:
            self.model.zero_grad()

    def norm(self) -> Tensor:
        """The norm of all gradients together.

        On a CPU it is that of the parameters' norms: its sum over millions of numbers in fp32 is off by 1e-4.
        """
        on_cpu = self.model.head.device.type == "cpu"
        return total_norm(self.model.parameters() if on_cpu else self.parameters)


class FSDPGradients:
    """Parameters, gradients and moments in shards, one a process (FSDP2).

    All processes must make the same number of passes.
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

    def begin_pass(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)

    def finish(self, extra: Tensor) -> Tensor:
        dist.all_reduce(extra)
        return extra

    def clear(self) -> None:
        self.model.zero_grad()

    def norm(self) -> Tensor:
        return total_norm(self.parameters)


def init_distributed(kind: str) -> tuple[int, int, torch.device]:
    """Join torchrun's other processes, if any; returns this one's rank, their number, and this one's device.

    kind: of the device, "cuda" or "cpu". torchrun keeps one store of addresses for all its restarts, so each
    restart gets a key prefix of its own; else a process could read there the address of one that died. Several
    machines count their restarts separately, and so cannot agree on such a prefix.
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
