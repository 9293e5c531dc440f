"""The loss of a batch, and which rows to blame where it is not finite."""
from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from data import Batch, pack
from dataset.examples import Example
from lora import set_dropout_masks
from model import Gemma3


def loss_sum(model: Gemma3, batch: Batch, seed: int = 0, weight_grad_out: Tensor | None = None) -> Tensor:
    """The summed loss of a batch's tokens that carry loss, in nats: a scalar on the model's device.

    seed: of dropout, in training. weight_grad_out (V, D): see `Gemma3.forward`.
    """
    tokens, positions, documents, loss_rows, targets = batch.to(model.head.device)
    set_dropout_masks(model, batch.keys, seed, loss_rows)
    return model(tokens, positions, documents, loss_rows, targets, weight_grad_out)


@torch.no_grad()
def describe_failure(
    model: Gemma3, examples: list[Example], step: int, seed: int, loss: float, grad_norm: float, out: Path
) -> str:
    """What to tell the user about a step with a NaN or an exploding gradient: its rows, the worst first."""
    losses = []
    for example in examples:
        batch = pack([example], len(example))[0]
        losses.append((loss_sum(model, batch, seed).item() / batch.loss_tokens, example.source))
    worst = sorted(losses, key=lambda pair: (math.isfinite(pair[0]), -pair[0]))[:5]
    rows = ", ".join(f"{source} (loss {loss:.3g})" for loss, source in worst)
    return (f"step {step + 1}: loss {loss:.4g}, gradient norm {grad_norm:.4g}; the step was not taken and no "
            f"checkpoint was touched. Its worst rows: {rows}. Fix or remove these rows, or start over with "
            f"a lower "
            f"--lr; with a larger --max-grad-norm, --resume continues from the last checkpoint in {out}")
