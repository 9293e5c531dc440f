"""Wrap a model's linears in LoRA adapters, list them, merge them. The model itself never hears of LoRA.

An adapter's folder is PEFT's: adapter_config.json and adapter_model.safetensors, with PEFT's names
(checkpoint.py reads and writes it).
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_kernels import lora_linear
from model import Linear

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
            raise ValueError(f"LoRA targets {', '.join(unknown) or '(none)'}: choose from {', '.join(TARGETS)}"
                             " (the head is tied to the embedding and takes no adapter)")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA needs rank ≥ 1 and 0 ≤ dropout < 1; got rank {self.rank}, dropout {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear with an adapter: `weight` (O, I) as it was, `lora_a` (R, I) and `lora_b` (O, R) in fp32."""

    def __init__(self, base: Linear, config: LoRAConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.weight, self.config = base.weight, config
        # A as PEFT starts it (Kaiming uniform with a = √5 is ±1/√I), B zero: training begins at the base model.
        a = torch.empty(config.rank, inputs).uniform_(-inputs ** -0.5, inputs ** -0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, config.rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        return lora_linear(x, self.weight, self.lora_a, self.lora_b, self.config.scale, dropout)


def wrap(model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    """Freeze `model` and put an adapter around each of its target linears, in place.  `generator` draws the A's."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in config.targets and isinstance(child, Linear):
                setattr(parent, name, LoRALinear(child, config, generator))


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
        merged.weight = nn.Parameter((adapter.weight.float() + delta).to(adapter.weight.dtype), requires_grad=False)
        setattr(model.get_submodule(parent), leaf, merged)
