"""The gradient of a linear's weight, dW = dYᵀ X, in fp32 from 16-bit operands.

    M rows   I in   O out      dy (M, O)   x (M, I)   dW (O, I)
"""
from __future__ import annotations

import torch
from torch import Tensor

from ops.backend import pick
from ops.cpu import build

CHUNK_OUTPUTS = 1 << 14      # that PyTorch multiplies out at once: 16,384 · I numbers of the operands' dtype


def weight_grad_reference(dy: Tensor, x: Tensor) -> Tensor:
    """dYᵀ X in fp32.  The definition."""
    return dy.float().T @ x.float()


def _by_cpp(dy: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    x = x.contiguous()
    fits = (x.dim() == 2 and x.shape[1] % 16 == dy.shape[1] % 16 == 0 and out.dtype == torch.float32
            and out.is_contiguous())
    build.check("multiples of 16 columns, and writes contiguous fp32", fits, dy, x)
    build.call("weight_gradient", dy, x, out, dy.stride(0), *dy.shape, x.shape[1], add)


def _by_torch(dy: Tensor, x: Tensor, out: Tensor, add: bool) -> None:
    """Each product is rounded to the operands' dtype first."""
    for first in range(0, len(out), CHUNK_OUTPUTS):
        chunk = slice(first, first + CHUNK_OUTPUTS)
        product = dy[:, chunk].T @ x
        if add:
            out[chunk].add_(product)
        else:
            out[chunk].copy_(product)


BACKENDS = {"cpp": _by_cpp, "torch": _by_torch}


def weight_grad(dy: Tensor, x: Tensor, out: Tensor | None = None, add: bool = False,
                backend: str = "torch") -> Tensor:
    """dYᵀ X (O, I) in fp32, of dY (M, O) and X (M, I).

    out: where it is written, or with `add` added. backend: of `BACKENDS`. Raises ValueError for operands that
    the backend does not take.
    """
    if out is None:
        out = dy.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32)
    pick(BACKENDS, backend)(dy, x, out, add)
    return out
