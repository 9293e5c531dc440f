"""Wrap a model's linears in LoRA adapters, list them, merge them. The model itself never hears of LoRA.

An adapter's folder is PEFT's: adapter_config.json and adapter_model.safetensors, with PEFT's names
(storage/adapters.py reads and writes it).
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lora_kernels import BY_PYTORCH, Adapted, Choice, Flat, PackedWeight, choose, lora_linears, lora_mlp
from model import MLP, Attention, Linear
from ops.dropout import Dropout, TokenHashes, odd_hashes
from ops.transfer import to_device_async

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoRAConfig:
    rank: int = 16                              # R
    alpha: float = 16.0
    dropout: float = 0.0                        # on the adapter's input
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False                        # scale by alpha / √rank, so that large ranks learn as fast

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"LoRA targets {', '.join(unknown) or '(none)'}: choose from {', '.join(TARGETS)}"
                " (the head is tied to the embedding and takes no adapter)"
            )
        if self.rank < 1 or not 0 <= self.dropout < 1 or not math.isfinite(self.alpha):
            raise ValueError(
                f"LoRA needs rank ≥ 1, 0 ≤ dropout < 1 and a finite alpha; got rank {self.rank}, dropout "
                f"{self.dropout}, "
                f"alpha {self.alpha}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear with an adapter: `weight` (O, I) as it was, `lora_a` (R, I) and `lora_b` (O, R) in
    fp32.

    Dropout hashes the tokens of the coming forward pass, token_hashes (`set_dropout_masks`), and the features
    of the input, of which input_number says which of the model's inputs it is. of_selected: whether the input
    is of the tokens that the last layer continues with.
    """

    def __init__(self, base: Linear, config: LoRAConfig, generator: torch.Generator | None, input_number: int,
                 token_hashes: TokenHashes, of_selected: bool) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.weight, self.config = base.weight, config
        # A as PEFT starts it (Kaiming uniform with a = √5 is ±1/√I), B zero: training begins at the base
        # model.
        a = torch.empty(config.rank, inputs).uniform_(-inputs ** -0.5, inputs ** -0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, config.rank, device=base.weight.device))
        self.choice = BY_PYTORCH
        self.flat_group: FlatGroup | None = None            # the first of its group has it
        self.token_hashes, self.of_selected = token_hashes, of_selected
        features = odd_hashes(np.arange(inputs), input_number).to(base.weight.device)
        self.register_buffer("features", features, persistent=False)

    @property
    def adapted(self) -> Adapted:
        return self.weight, self.lora_a, self.lora_b

    def dropout(self, rows: int) -> Dropout | None:
        """The mask of an input of so many rows; None in evaluation, or without dropout.

        Raises ValueError where the hashes are of another number of tokens.
        """
        if not (self.training and self.config.dropout):
            return None
        hashes = self.token_hashes.selected if self.of_selected else self.token_hashes.all
        if hashes is None or len(hashes) != rows:
            given = "none" if hashes is None else len(hashes)
            raise ValueError(
                f"LoRA dropout follows from the tokens' keys: an adapter got {rows} tokens, keys were given "
                f"for {given}; call lora.set_dropout_masks(model, batch.keys, seed) before "
                f"each training pass"
            )
        return Dropout(self.config.dropout, hashes, self.features)

    def forward(self, x: Tensor) -> Tensor:
        flat = _flat([self], x.dtype)
        return lora_linears(x, [self.adapted], self.config.scale, self.dropout(len(x)), self.choice, flat)[0]


class LoRAAttention(Attention):
    """Attention whose q, k and v come from one pass over x, where all three have adapters."""

    def __init__(self, base: Attention) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.scale, self.choice = base.head_dim, base.scale, BY_PYTORCH
        for name, child in base.named_children():
            self.add_module(name, child)
        if self.together:
            _fuse_weights(self.q_proj, self.k_proj, self.v_proj)

    @property
    def together(self) -> bool:
        return all(isinstance(linear, LoRALinear) for linear in (self.q_proj, self.k_proj, self.v_proj))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.together:
            return super().project(x)
        linears = self.q_proj, self.k_proj, self.v_proj
        return lora_linears(x, [linear.adapted for linear in linears], self.q_proj.config.scale,
                            self.q_proj.dropout(len(x)), self.choice, _flat(linears, x.dtype))


class LoRAMLP(MLP):
    """The MLP as one function, where all three linears have adapters.

    GeGLU ends gate and up, its gradient ends down's.
    """

    def __init__(self, base: MLP) -> None:
        nn.Module.__init__(self)
        self.backends = base.backends
        self.choices = BY_PYTORCH, BY_PYTORCH               # of gate and up, and of down
        for name, child in base.named_children():
            self.add_module(name, child)
        if self.together:
            _fuse_weights(self.gate_proj, self.up_proj)

    @property
    def together(self) -> bool:
        return all(isinstance(linear, LoRALinear) for linear in self.children())

    def forward(self, x: Tensor) -> Tensor:
        if not self.together:
            return super().forward(x)
        flats = _flat((self.gate_proj, self.up_proj), x.dtype), _flat((self.down_proj,), x.dtype)
        alike = all(flats) and (flats[0].gradient is None) == (flats[1].gradient is None)
        dropouts = self.gate_proj.dropout(len(x)), self.down_proj.dropout(len(x))
        return lora_mlp(x, self.gate_proj.adapted, self.up_proj.adapted, self.down_proj.adapted,
                        self.gate_proj.config.scale, dropouts, self.choices, flats if alike else None,
                        self.backends.geglu)


def _fuse_weights(*linears: LoRALinear) -> None:
    """Put the frozen weights one after another in memory, as one fused weight."""
    together = torch.cat([linear.weight for linear in linears])
    for linear, weight in zip(linears, together.split([len(linear.weight) for linear in linears]),
                              strict=True):
        linear.weight = nn.Parameter(weight, requires_grad=False)


class FlatGroup:
    """The adapters of linears that are computed together, in the buffer of all: their A's, then their B's."""

    def __init__(self, owner: FlatAdapters, linears: Sequence[LoRALinear], first: int) -> None:
        """Move the linears' masters into the buffer, from its number `first` on, as new parameters."""
        self.owner = owner
        self.rank, self.outputs = len(linears[0].lora_a), [len(linear.lora_b) for linear in linears]
        self.a_shape = len(linears) * self.rank, linears[0].lora_a.shape[1]         # (P·R, I)
        self.b_shape = sum(self.outputs), self.rank                                 # (O, R)
        self.slice = slice(first, first + math.prod(self.a_shape) + math.prod(self.b_shape))
        own = owner.masters.detach()[self.slice]            # it and its views share the masters' `_version`
        self.masters = self.stacked(own)
        self.rounded: tuple[Tensor, Tensor] | None = None   # a and b in `FlatAdapters.rounded`
        self.gradient: Tensor | None = None                 # in `FlatAdapters.gradients`
        self.grads: list[Tensor] = []                       # its views, of each parameter

        parts = self.parts(own)
        self.parameters: list[nn.Parameter] = []            # lora_a and lora_b of each linear in turn
        for linear, a, b in zip(linears, parts[0::2], parts[1::2], strict=True):
            with torch.no_grad():
                a.copy_(linear.lora_a)
                b.copy_(linear.lora_b)
            linear.lora_a, linear.lora_b = nn.Parameter(a), nn.Parameter(b)
            self.parameters += [linear.lora_a, linear.lora_b]
        self.addresses = [parameter.data_ptr() for parameter in self.parameters]
        linears[0].flat_group = self

    def stacked(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The A's (P·R, I) and the B's (O, R) in the group's slice of a buffer."""
        a, b = own.split([math.prod(self.a_shape), math.prod(self.b_shape)])
        return a.view(self.a_shape), b.view(self.b_shape)

    def parts(self, own: Tensor) -> list[Tensor]:
        """Of the group's slice of a buffer what belongs to each of `parameters`."""
        a, b = self.stacked(own)
        return list(itertools.chain(*zip(a.split(self.rank), b.split(self.outputs), strict=True)))

    def holds(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these are the group's parameters, and still where it has put them."""
        return len(parameters) == len(self.parameters) and all(
            given is own and own.data_ptr() == address
            for given, own, address in zip(parameters, self.parameters, self.addresses, strict=True))

    def holds_grads(self) -> bool:
        """Whether each `.grad` is the group's part of the buffer of gradients."""
        return self.gradient is not None and all(
            parameter.grad is grad for parameter, grad in zip(self.parameters, self.grads, strict=True))

    def flat(self, linears: Sequence[LoRALinear], dtype: torch.dtype) -> Flat | None:
        """The linears' adapters for products in `dtype`; None where they were moved or replaced."""
        if not self.holds([parameter for linear in linears for parameter in (linear.lora_a, linear.lora_b)]):
            return None
        gradient = self.gradient if self.holds_grads() else None
        return Flat(*self.owner.operands(self, dtype), self.owner.masters, gradient)


class FlatAdapters:
    """The masters of a model's adapters in one fp32 tensor, by groups, and in training their gradients too.

    Each adapter's `lora_a` and `lora_b` are parameters that lie in `masters`. That is no parameter of the
    model: an optimizer takes it, or them. A group with a parameter that was moved or replaced, as by
    `model.to`, is computed without the buffer.

    After `start_training` the masters are rounded to the dtype of the products once after each change, not
    in every pass. A change shows in `_version`, which all views share. That of a fused optimizer does not
    (seen in PyTorch 2.13): `clear`, which follows its step, forgets what was rounded. Nor does a change by
    way of `.data`, which must not be used then.
    """

    def __init__(self, groups: Sequence[Sequence[LoRALinear]]) -> None:
        adapters = [p for linears in groups for linear in linears for p in (linear.lora_a, linear.lora_b)]
        numbers = sum(parameter.numel() for parameter in adapters)
        self.masters = nn.Parameter(torch.empty(numbers, device=adapters[0].device))
        self.gradients: Tensor | None = None                # as `masters`, and some numbers more
        self.rounded: Tensor | None = None                  # as `masters`, in the dtype of the products
        self.rounded_version: int | None = None             # of the masters then; None: round them anew
        self.groups: list[FlatGroup] = []
        for linears in groups:
            first = self.groups[-1].slice.stop if self.groups else 0
            self.groups.append(FlatGroup(self, linears, first))

    def of_each(self, buffer: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """(parameter, its part) of a buffer laid out as `masters`, such as an optimizer's moments."""
        for group in self.groups:
            yield from zip(group.parameters, group.parts(buffer[group.slice]), strict=True)

    def start_training(self, dtype: torch.dtype, extra: int = 0) -> None:
        """From now on backward passes add to one buffer of gradients; `extra` numbers more are at its end.

        dtype: of the products.
        """
        numbers = len(self.masters)
        self.gradients = torch.zeros(numbers + extra, device=self.masters.device)
        self.masters.grad = self.gradients[:numbers]
        masters = self.masters.detach()
        self.rounded = None if dtype == masters.dtype else torch.empty_like(masters, dtype=dtype)
        self.rounded_version = None
        for group in self.groups:
            group.gradient = self.gradients[group.slice]
            group.grads = group.parts(group.gradient)
            group.rounded = None if self.rounded is None else group.stacked(self.rounded[group.slice])
            for parameter, grad in zip(group.parameters, group.grads, strict=True):
                parameter.grad = grad

    def in_place(self) -> bool:
        """Whether every parameter lies here, and in training its gradient."""
        return all(group.holds(group.parameters) and (self.gradients is None or group.holds_grads())
                   for group in self.groups)

    def clear(self) -> None:
        """After the optimizer's step: zero the gradients, and round the masters before their next use."""
        self.gradients.zero_()
        self.rounded_version = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters if they may have changed.  Every pass does, but no replayed one."""
        if self.rounded is not None and self.rounded_version != self.masters._version:
            self.rounded.copy_(self.masters)
            self.rounded_version = self.masters._version

    def operands(self, group: FlatGroup, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The group's A's (P·R, I) and B's (O, R) in this dtype."""
        if dtype == self.masters.dtype:
            return group.masters
        if self.rounded is None or dtype != self.rounded.dtype:     # no training: not all changes are known
            return group.stacked(self.masters.detach()[group.slice].to(dtype))
        self.refresh()
        return group.rounded


def _flat(linears: Sequence[LoRALinear], dtype: torch.dtype) -> Flat | None:
    group = linears[0].flat_group
    return group.flat(linears, dtype) if group else None


def flat_adapters(model: nn.Module) -> FlatAdapters | None:
    """The buffer of a model's adapters.  None where it has none, or trains something outside of it."""
    owner = next((adapter.flat_group.owner for _, adapter in adapters(model) if adapter.flat_group), None)
    if owner is None or not owner.in_place():
        return None
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    held = {id(parameter) for group in owner.groups for parameter in group.parameters}
    return owner if trained == held else None


def wrap(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    """Freeze `model` and put an adapter around each of its target linears, in place.

    `generator` draws the A's.
    """
    model.requires_grad_(False)
    token_hashes = TokenHashes()
    last = model.model["layers"][-1]
    for number, parent in enumerate(list(model.modules())):
        for name, child in list(parent.named_children()):
            if name in config.targets and isinstance(child, Linear):
                # the others of a parent share their input
                input_number = 2 * number + (name in ("o_proj", "down_proj"))
                of_selected = parent is last.mlp or (parent is last.self_attn and name == "o_proj")
                adapter = LoRALinear(child, config, generator, input_number, token_hashes, of_selected)
                setattr(parent, name, adapter)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention | MLP):
                setattr(parent, name, LoRAAttention(child) if isinstance(child, Attention)
                        else LoRAMLP(child))
    FlatAdapters([linears for _, linears, _ in _groups(model)])
    model.train(model.training)


def _groups(model: nn.Module) -> Iterator[tuple[nn.Module, list[LoRALinear], str]]:
    """Adapters that are computed together: by which module, the linears, and `ends` as for `choose`."""
    grouped: set[nn.Module] = set()
    for module in model.modules():
        groups: list[tuple[list[LoRALinear], str]] = []
        if isinstance(module, LoRAAttention) and module.together:
            groups = [([module.q_proj, module.k_proj, module.v_proj], "")]
        elif isinstance(module, LoRAMLP) and module.together:
            groups = [([module.gate_proj, module.up_proj], "gated"), ([module.down_proj], "gate")]
        elif isinstance(module, LoRALinear) and module not in grouped:
            groups = [([module], "")]
        for linears, ends in groups:
            grouped |= set(linears)
            yield module, linears, ends


def set_dropout_masks(model: nn.Module, keys: Callable[[], Tensor], seed: int,
                      rows: Tensor | None = None) -> None:
    """Decide what dropout takes from the coming forward pass, and from its backward pass.

    It follows from the seed and each token's key alone: however rows are packed, share prefixes or are
    assigned to ranks, a token loses the same. keys: as `data.Batch.keys`, (T) int32, called only where there
    is dropout; seed: 32 bits; rows: the tokens that the last layer continues with, where they are not all.
    """
    set_token_hashes(model, hash_tokens(model, keys, seed), rows)


def hash_tokens(model: nn.Module, keys: Callable[[], Tensor], seed: int) -> Tensor | None:
    """(T) int32 on the model's device, for dropout; None where there is none.

    Arguments as for `set_dropout_masks`.
    """
    adapter = next((adapter for _, adapter in adapters(model)), None)
    if adapter is None or not adapter.config.dropout:
        return None
    return to_device_async(odd_hashes(keys().numpy().view(np.uint32), seed), adapter.weight.device)


def set_token_hashes(model: nn.Module, hashes: Tensor | None, rows: Tensor | None) -> None:
    """Give the adapters the hashes of the coming pass's tokens; rows: as for `set_dropout_masks`."""
    if hashes is not None:
        next(adapter for _, adapter in adapters(model)).token_hashes.set(hashes, rows)


def choose_kernels(model: nn.Module, kernels: str, rows: int) -> list[str]:
    """Decide, once, which operations of the adapters run by Triton kernels; a line about each shape that was
    compared.

    kernels: "triton", "torch" or "auto", as for `lora_kernels.choose`; rows: tokens of a forward pass. With
    "auto" on a CPU the frozen weights are laid out anew as well (`lora_kernels.PackedWeight`), which takes
    twice their memory, unless the model saves memory (`checkpoint_activations`); they must not change after
    that.
    """
    pack = kernels == "auto" and not getattr(model, "checkpoint_activations", False)
    chosen: dict[tuple, tuple[Choice, dict]] = {}

    def pick(linears: Sequence[LoRALinear], ends: str) -> Choice:
        outputs, inputs, rank = (
            tuple(len(linear.weight) for linear in linears),
            linears[0].weight.shape[1],
            linears[0].config.rank,
        )
        key = inputs, outputs, ends
        if key not in chosen:
            weight, config = linears[0].weight, linears[0].config
            chosen[key] = choose(
                kernels,
                rows,
                inputs,
                outputs,
                rank,
                weight.dtype,
                weight.device,
                ends,
                config.dropout,
                model.backends.geglu,
            )
        choice = chosen[key][0]
        packed = (
            PackedWeight.of([linear.weight for linear in linears]) if pack and not choice.by_triton else None
        )
        return replace(choice, packed=packed)

    picked: dict[nn.Module, list[Choice]] = {}
    for module, linears, ends in _groups(model):
        picked.setdefault(module, []).append(pick(linears, ends))
    for module, choices in picked.items():
        if isinstance(module, LoRAMLP):
            module.choices = tuple(choices)
        else:
            [module.choice] = choices
    return [
        f"{inputs} → {' + '.join(map(str, outputs))}{f' ({ends})' if ends else ''}, {rows} rows: "
        + ", ".join(
            f"{name} {'triton' if ours < theirs else 'torch'} ({ours:.3f} against {theirs:.3f} ms)"
            for name, (ours, theirs) in times.items()
        )
        for (inputs, outputs, ends), (_, times) in chosen.items()
        if times
    ]


def adapters(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, module) of every adapter, in the model's order; names as "model.layers.0.self_attn.q_proj"."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every adapter by one linear with W + s B A, summed in fp32 and rounded once, in place.

    For the end of training only: in bf16 the small steps of an adapter would vanish in W.
    """
    for name, adapter in list(adapters(model)):
        delta = adapter.config.scale * (adapter.lora_b.float() @ adapter.lora_a.float())
        outputs, inputs = adapter.weight.shape
        parent, _, leaf = name.rpartition(".")
        merged = Linear(inputs, outputs)
        merged.weight = nn.Parameter(
            (adapter.weight.float() + delta).to(adapter.weight.dtype), requires_grad=False
        )
        setattr(model.get_submodule(parent), leaf, merged)
