"""Capture of any function as a CUDA graph.

A graph launches all kernels of a function at once, for work that is so small that the host takes longer to
launch a kernel than the GPU takes to run it. It always reads and writes the same memory: inputs are copied
there before each replay, and their sizes are rounded up, so that a few graphs serve all.
"""
from __future__ import annotations

import functools
import gc
from collections.abc import Callable

import torch


def record(run: Callable[[], object], device: torch.device,
           pool: tuple[int, int] | None = None) -> Callable[[], object]:
    """Capture what `run` does; returns a function that replays it.

    `run` must read and write tensors whose memory stays in place. It is called twice before the capture, so
    that kernels are compiled and tuned. On a CPU, where nothing can be captured, `run` itself is returned.

    pool: memory for graphs that are never replayed at the same time
    """
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        warm_up, pooled, separate = _streams(torch.cuda.current_device())
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            run()
            run()
        torch.cuda.current_stream().wait_stream(warm_up)
        gc.collect()        # an autograd graph of the warm-up would bring its stream into the capture
        graph = torch.cuda.CUDAGraph()
        stream = pooled if pool else separate
        # "thread_local": other threads, such as NCCL's, may call CUDA during the capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run()
    return graph.replay


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    """For warm-up, for graphs that share memory, and for others.

    They are made once, because PyTorch keeps memory for each stream.
    """
    return [torch.cuda.Stream(device) for _ in range(3)]


def size_for(count: int, steps: int) -> int:
    """`count` rounded up to a multiple of 64, and to one of `steps` sizes between two powers of two.

    >>> [size_for(count, steps=2) for count in (1, 64, 65, 400, 600)]
    [64, 64, 128, 512, 768]
    """
    next_power_of_2 = 1 << (count - 1).bit_length()
    step = max(64, next_power_of_2 // (2 * steps))
    return -(-count // step) * step
