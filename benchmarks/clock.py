"""The clock of the benchmarks: what a call takes the device, and what it takes the host to queue it.

    python benchmarks/clock.py --save       # device and versions, and how fast a large copy and product are
"""
from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tables import add_result_flags, keep_result  # noqa: E402

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft")


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


def conditions(device: torch.device) -> dict:
    """What a figure depends on beside the code it measures: device, versions, commit."""
    from training.host import device_name
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__                               # with its CUDA version or +cpu
    return {"device": device_name(device), "versions": versions, "commit": commit()}


def commit() -> str | None:
    """Of this checkout: from $COMMIT where git is not at hand, else as `git describe` names it."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    result = conditions(device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        result["card"] = {
            "multiprocessors": card.multi_processor_count, "memory_gib": card.total_memory / 2**30,
            "l2_mib": card.L2_cache_size / 2**20, "shared_kib": card.shared_memory_per_block_optin / 1024}
    flops, moved = Clock(device, 0.5 if device.type == "cuda" else 0).ceilings(device, torch.bfloat16)
    result |= {"peak_tflops": flops / 1e9, "peak_gb_a_second": moved / 1e6}
    keep_result(result, "ceilings", device, args)
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    print(f"{result['device']}; {versions}; commit {result['commit']}")
    print(f"a large product in bf16 {result['peak_tflops']:.0f} TFLOP/s, "
          f"a large copy {result['peak_gb_a_second']:.0f} GB/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_result_flags(parser)
    main(parser.parse_args())
