"""Linear cross-entropy: the last projection and the loss in one, on trained rows only. Full logits never exist.

One row of logits is V = 262,144 numbers, so 16,896 tokens of them would take 8.9 GB in bf16. Only 3 to 22 % of the
tokens carry loss; their hidden states are gathered and projected a chunk at a time, and the gradient of a chunk's
logits is turned into the gradient of its hidden states while it is still there.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100        # target of a token that carries no loss
CHUNK_ROWS = 256     # rows of logits alive at once: 256 · V · (4 + 2 bytes) = 0.4 GB


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Σ over rows with target ≥ 0 of −log softmax(hidden Wᵀ)[target].  The definition; what follows must equal it."""
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    """With l = h Wᵀ and p = softmax(l):  dl = p − onehot(target),  dh = dl W,  dW = dlᵀ h.

    Both gradients are finished in the forward pass, chunk by chunk, and only scaled in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        matrix = weight.to(hidden.dtype)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            target = targets[rows, None]
            logits = F.linear(hidden[rows], matrix).float()              # (chunk, V)
            log_sum = logits.logsumexp(dim=-1, keepdim=True)
            total += (log_sum - logits.gather(1, target)).sum()
            if not (need_hidden or need_weight):
                continue
            dlogits = logits.sub_(log_sum).exp_().scatter_add_(1, target, -torch.ones_like(log_sum)).to(hidden.dtype)
            if need_hidden:
                torch.mm(dlogits, matrix, out=dhidden[rows])
            if need_weight:
                dweight += dlogits.T @ hidden[rows]
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dhidden, dweight = ctx.saved_tensors
        return (None if dhidden is None else dhidden * grad.to(dhidden.dtype),
                None if dweight is None else (dweight * grad).to(ctx.weight_dtype), None)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token, summed over the rows that carry loss, in nats.

    hidden (T, D); weight (V, D), the tied embedding; targets (T) int64, `IGNORE` where there is no loss.
    Returns an fp32 scalar, 0 where no row carries loss.
    """
    rows = (targets != IGNORE).nonzero().squeeze(1)
    if not torch.is_grad_enabled():          # or the forward pass would work out a gradient that nobody takes
        weight = weight.detach()
    return _LinearCrossEntropy.apply(hidden.index_select(0, rows), weight, targets.index_select(0, rows))
