"""GeGLU, the gate of Gemma's MLP: h = gelu(gate) · up, with gelu's tanh form, and its gradients.

    gelu(g) = g σ(2z)    z = √(2/π) (g + 0.044715 g³)         as (1 + tanh z) / 2 = σ(2z)
    gelu'(g) = σ(2z) + 2 g z' σ(2z) (1 − σ(2z))

The functions of Triton here are what other kernels put at their ends (lora_kernels.py).

Source: "GLU Variants Improve Transformer" (arXiv 2002.05202); "Gaussian Error Linear Units" (arXiv 1606.08415).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_support import jit, tl


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up, (M, F) each.  The definition."""
    return F.gelu(gate, approximate="tanh") * up


def geglu_gradient(dh: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """[dgate | dup] = [dh · up · gelu'(gate) | dh · gelu(gate)], (M, 2F), of (M, F) each."""
    made = dh.new_empty(len(dh), 2 * dh.shape[1])
    dgate, dup = made.chunk(2, dim=1)
    torch.mul(dh, F.gelu(gate, approximate="tanh"), out=dup)
    torch.mul(dh, up, out=dgate)
    torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate="tanh", grad_input=dgate)
    return made


@jit
def gelu(gate):
    """gelu(gate), fp32."""
    return gate * tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * gate * gate))          # 2 √(2/π)


@jit
def gelu_slope(gate):
    """gelu'(gate), fp32."""
    cubic = 0.044715 * gate * gate
    share = tl.sigmoid(1.5957691216057308 * gate * (1 + cubic))
    return share + 1.5957691216057308 * gate * (1 + 3 * cubic) * share * (1 - share)
