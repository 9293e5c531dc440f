"""Element-wise passes on a CPU: one loop made by torch.compile, or a few rows at a time."""
from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator

import torch

CHUNK_NUMBERS = 1 << 18     # that a CPU passes over at a time: 1 MB in fp32

_compiling = False


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU: $CXX, g++ or clang++."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def compile_passes() -> None:
    """From now on torch.compile makes one loop of each `maybe_compile`.

    On a CPU that saves a few per cent of a step, for a C++ compiler's work.
    """
    global _compiling
    _compiling = True


def maybe_compile(function: Callable) -> Callable:
    """A chain of element-wise operations and sums by row that would rather be one loop, for where no kernel runs."""
    @functools.cache
    def compiled() -> Callable:
        return torch.compile(function, dynamic=True)

    def detached(operand):
        """It without its history: whether an operand requires gradients would make another variant of the same loop, of
        which torch.compile makes eight and no more."""
        if isinstance(operand, list):
            return [detached(one) for one in operand]
        return operand.detach() if isinstance(operand, torch.Tensor) else operand

    @functools.wraps(function)
    def run(*operands):
        return compiled()(*map(detached, operands)) if _compiling else function(*operands)
    return run


def cache_sized_chunks(x: torch.Tensor) -> Iterator[slice]:
    """x's rows (its first dimension), a few at a time on a CPU, so that what a pass over them writes stays in the cache.

    All at once where they need not: on a GPU, or where a pass is compiled.
    """
    rows = len(x) if _compiling or x.device.type != "cpu" else max(1, CHUNK_NUMBERS // max(1, x[:1].numel()))
    return (slice(first, first + rows) for first in range(0, len(x), max(1, rows)))
