"""Element-wise passes on a CPU: one loop made by torch.compile, or a few rows at a time."""
from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator

import torch

CHUNK_NUMBERS = 1 << 18     # that a CPU passes over at a time: 1 MB in fp32


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU: $CXX, g++ or clang++."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def maybe_compile(function: Callable) -> Callable:
    """function(*operands), or with compiled=True the one loop that torch.compile makes of it.

    It is compiled at its first call. For chains of element-wise operations and sums by row, where no kernel
    runs.
    """
    @functools.cache
    def compiled_function() -> Callable:
        return torch.compile(function, dynamic=True)

    def detach(operand):
        """Operands that require gradients would be another variant, and torch.compile makes only eight."""
        if isinstance(operand, list):
            return [detach(one) for one in operand]
        return operand.detach() if isinstance(operand, torch.Tensor) else operand

    @functools.wraps(function)
    def run(*operands, compiled: bool = False):
        if compiled:
            return compiled_function()(*map(detach, operands))
        return function(*operands)
    return run


def cache_sized_chunks(x: torch.Tensor, compiled: bool = False) -> Iterator[slice]:
    """x's rows (its first dimension), a few at a time on a CPU, so that what is written stays in its cache.

    All at once where they need not: on a GPU, or in one compiled loop.
    """
    if compiled or x.device.type != "cpu":
        rows = len(x)
    else:
        rows = CHUNK_NUMBERS // max(1, x[:1].numel())
    rows = max(1, rows)
    return (slice(first, first + rows) for first in range(0, len(x), rows))
