"""The LoRA linear: y = x Wᵀ + s (x Aᵀ) Bᵀ, with W frozen and the low-rank A and B trained.

Here are the definition and its gradients in plain PyTorch.

Source: "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear_reference(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float,
                          x_adapter: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + s (x Aᵀ) Bᵀ.  The definition; every other way must equal it.

    x (M, I), weight (O, I), lora_a (R, I), lora_b (O, R); returns (M, O). `x_adapter` (M, I), where given, is what the
    adapter sees instead of x: x after dropout.
    """
    shrunk = (x if x_adapter is None else x_adapter) @ lora_a.to(x.dtype).T
    return x @ weight.T + scale * shrunk @ lora_b.to(x.dtype).T


class _LoRALinear(torch.autograd.Function):
    """With S = x Aᵀ and T = dY B:  dX = dY W + s T A,  dA = s Tᵀ X,  dB = s dYᵀ S.  W gets no gradient.

    Saved are x, which the linears that share it share as well, and S (M, R). The adapter's masters and their gradients
    are fp32; the products run in x's dtype.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        shrunk = x @ a.T                                                       # (M, R)
        ctx.save_for_backward(x, weight, a, b, shrunk)
        ctx.scale, ctx.master_dtype = scale, lora_a.dtype
        return torch.addmm(x @ weight.T, shrunk, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b, shrunk = ctx.saved_tensors
        dshrunk = dy @ b                                                       # (M, R)
        dx = torch.addmm(dy @ weight, dshrunk, a, alpha=ctx.scale) if ctx.needs_input_grad[0] else None
        da = (dshrunk.T @ x).to(ctx.master_dtype).mul_(ctx.scale)
        db = (dy.T @ shrunk).to(ctx.master_dtype).mul_(ctx.scale)
        return dx, None, da, db, None


def lora_linear(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """y = x Wᵀ + s (dropout(x) Aᵀ) Bᵀ.  Shapes as in `lora_linear_reference`; W must not require a gradient."""
    if dropout:
        return lora_linear_reference(x, weight, lora_a, lora_b, scale, F.dropout(x, dropout))
    return _LoRALinear.apply(x, weight, lora_a, lora_b, scale)
