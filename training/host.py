"""The machine of a run: memory settings for a CPU, peak memory, the device's name, signals to stop."""
from __future__ import annotations

import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path

import torch

# glibc's malloc: huge pages, and freed memory is kept.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=0x1000000000"
# For how many shapes of matrix products oneDNN and PyTorch keep a primitive, 0.6 and 0.2 MB each (their
# default: 1,024). One micro-batch needs fewer than these.
PRIMITIVE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}


def restart_with_memory_settings(program: str | None) -> None:
    """On Linux, start this program again with other settings of malloc and of primitive caches.

    The malloc keeps freed memory, in huge pages; the caches are small.

    A step on a CPU frees gigabytes and allocates them again. By default they go back to the system and return
    as pages of 4 KiB, each zeroed on first use, which takes an eighth of the time and more in a long run.
    Every step has matrix products of new shapes; their cached primitives would fragment that memory, which
    then grows by 50 MiB a step (docs/log.md).

    program: the file that calls this; None in a notebook. Does nothing in a notebook, in another program that
    imports the file, or where GLIBC_TUNABLES is set already.
    """
    flags_as_given = sys.orig_argv[len(sys.orig_argv) - len(sys.argv) + 1:] == sys.argv[1:]
    is_main = program and flags_as_given and Path(sys.argv[0]).resolve() == Path(program).resolve()
    if is_main and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        malloc = {"GLIBC_TUNABLES": f"{MALLOC}:glibc.malloc.mmap_max=0"}
        os.execve(sys.executable, sys.orig_argv, PRIMITIVE_CACHES | os.environ | malloc)


def peak_gib(device: torch.device) -> float:
    """The most memory used so far, in GiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU (2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.get_num_threads()} threads)"


def launch_id() -> str:
    """The torchrun that started this process: the id it was given or generated, or else its PID and host."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"process {os.getppid()} on {platform.node()}"


class StopSignal:
    """Notes SIGINT and SIGTERM while in the `with` block, so that a run can finish its step and save.

    A second signal, three seconds or more after the first, ends the process at once. What arrives earlier
    counts as the first one: torchrun forwards to its processes what a terminal or a scheduler has already
    sent to them.
    """

    def __init__(self) -> None:
        self.number: int | None = None          # of the first signal
        self.time = 0.0

    @property
    def received(self) -> bool:
        return self.number is not None

    def __enter__(self) -> StopSignal:
        self.previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        if self.number is None:
            self.number, self.time = number, time.monotonic()
        elif time.monotonic() - self.time > 3:
            signal.signal(number, self.previous[number])
            signal.raise_signal(number)
