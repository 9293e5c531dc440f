"""The machine that a run is on: its memory and its name."""
from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

# Large pages, and what is freed is kept.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=0x1000000000"
# How many products of different shapes oneDNN and PyTorch keep their plans of, 0.6 and 0.2 MB each: enough for a pass, of 1,024.
PLANS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def keep_memory(program: str | None) -> None:
    """On Linux, start this program again with a malloc that keeps what is freed, in large pages, and with few plans of products.

    A step on a CPU frees gigabytes and asks for them again. By default they go back to the system and return as pages of
    4 KiB, each zeroed on its first use, which takes an eighth of the time and more in a long run. Each step has products of new
    shapes, whose plans would come to lie among that memory, which then grows by 50 MiB a step (docs/log.md).

    program: the file of the program that asks; None in a notebook, which is never started again.
    """
    ours = program and sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1:] == sys.argv[1:] \
        and Path(sys.argv[0]).resolve() == Path(program).resolve()          # not a notebook, nor another program that runs this file
    if ours and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, PLANS | os.environ | {"GLIBC_TUNABLES": f"{MALLOC}:glibc.malloc.mmap_max=0"})


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
