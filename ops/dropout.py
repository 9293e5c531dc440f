"""Dropout of LoRA adapters' inputs: a mask that follows from a hash of each token and one of each feature.

A token loses the same however rows are packed, share prefixes or are assigned to ranks, and in a recomputed
pass: nothing is drawn from a generator. One multiplication gives an element's mask, wherever it is computed.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ops.triton_utils import jit, tl


@dataclass(frozen=True)
class Dropout:
    """The mask of x (M, I): element (m, i) is kept where tokens[m] · features[i], in 32 bits, is at least
    `threshold`.

    p: share of the elements that are dropped, 0 ≤ p < 1; tokens (M) and features (I): odd hashes, int32
    (`odd_hashes`), whose products are as good as independent.
    """

    p: float
    tokens: Tensor
    features: Tensor

    @property
    def threshold(self) -> int:
        """A share p of all int32 is less."""
        return min(round(self.p * 2**32), 2**32 - 1) - 2**31

    def apply(self, x: Tensor) -> Tensor:
        """x (M, I) with zeros where it is dropped; the kept elements are yet to be divided by 1 - p."""
        return x.masked_fill(self.tokens[:, None] * self.features < self.threshold, 0.0)


@jit
def apply_dropout(tile, token_hashes, feature_hashes, threshold):
    """`Dropout.apply` of a tile of x."""
    return tl.where(token_hashes[:, None] * feature_hashes[None, :] < threshold, tl.zeros_like(tile), tile)


class TokenHashes:
    """The hashes of the coming pass's tokens, one object for all adapters of a model."""

    def __init__(self) -> None:
        self.all: Tensor | None = None          # (T) int32, of all tokens
        self.selected: Tensor | None = None     # (M) int32, of those that the last layer continues with

    def set(self, hashes: Tensor, rows: Tensor | None = None) -> None:
        """hashes (T) int32 of all tokens; rows (M): those that the last layer continues with (None: all)."""
        self.all = hashes
        self.selected = hashes if rows is None else hashes[rows]


def odd_hashes(low: np.ndarray, high: int) -> Tensor:
    """A hash (n) int32 of each pair of 32-bit numbers, low[i] and high, made odd."""
    mixed = low.astype(np.uint64) | np.uint64(high << 32)
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9                  # the last steps of splitmix64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB
    return torch.from_numpy((mixed >> 32 | 1).astype(np.uint32).view(np.int32))
