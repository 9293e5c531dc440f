"""The clock of the benchmarks: what a call takes the device, and what it takes the host to queue it."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


class Clock:
    """Milliseconds of a call: the device's own, and what the host needs to queue it."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.cuda, self.seconds, self.pause = device.type == "cuda", seconds, 0.1
        if self.cuda:
            self.other = torch.empty(2**28, dtype=torch.int8, device=device)        # more than any L2 holds
            self.pause = self(lambda _: self.other.zero_())["ms"]

    def __call__(self, call: Callable[[object], object], before: Callable[[], object] | None = None) -> dict[str, float]:
        """`before` makes what the call takes and is not timed."""
        hosts, times = [], []
        for _ in range(4 if self.cuda else 3):
            state = before() if before else None
            self.wait()
            start = time.perf_counter()
            call(state)
            hosts.append(1e3 * (time.perf_counter() - start))
        if not self.cuda:
            return {"ms": statistics.median(hosts)}
        end = time.perf_counter() + self.seconds
        while not times or time.perf_counter() < end:
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
            for started, ended in events:
                state = before() if before else None
                for _ in range(1 + int(1.5 * min(hosts) / self.pause)):         # here the device waits while the call is queued
                    self.other.zero_()
                started.record()
                call(state)
                ended.record()
            self.wait()
            times += [started.elapsed_time(ended) for started, ended in events]
        return {"ms": statistics.median(times), "host_ms": min(hosts)}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ceilings(self, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
        """FLOPs and bytes a millisecond of a large product and a large copy."""
        side, numbers = (8192, 2**28) if self.cuda else (256, 2**22)
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        source, target = (torch.randn(numbers, device=device) for _ in range(2))
        return 2 * side**3 / self(lambda _: left @ right)["ms"], 8 * numbers / self(lambda _: target.copy_(source))["ms"]
