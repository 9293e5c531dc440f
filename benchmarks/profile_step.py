"""Where a LoRA step's time goes: the longest kernels, launches a step, and how long the GPU works.

    python benchmarks/profile_step.py --save                    # on a CUDA device, with random weights
    python benchmarks/profile_step.py --device cpu --tiny       # anywhere: does it run?
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import step  # noqa: E402
from clock import conditions  # noqa: E402
from tables import add_result_flags, keep_result  # noqa: E402

from model import GemmaConfig  # noqa: E402

STEPS = 3
SHOWN = 40              # kernels


def main(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    config = step.TINY if args.tiny else GemmaConfig()
    take, _ = step.training_step(config, device, args.tokens, full=False, lora="auto")
    for i in range(1 if args.tiny else 6):              # they compile and tune
        take(i)[0].item()
    began = time.perf_counter()
    for i in range(STEPS):
        take(i)[0].item()
    step_ms = 1e3 * (time.perf_counter() - began) / STEPS
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(STEPS):
            take(i)[0].item()

    kind, microseconds = DeviceType.CPU, "self_cpu_time_total"
    if on_gpu:
        kind, microseconds = DeviceType.CUDA, "self_device_time_total"
    kernels = [{"name": event.key, "ms": getattr(event, microseconds) / STEPS / 1e3,
                "launches": event.count / STEPS}
               for event in profile.key_averages() if event.device_type == kind]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    busy_ms, launches = (sum(kernel[key] for kernel in kernels) for key in ("ms", "launches"))
    result = conditions(device) | {"tokens": args.tokens, "tiny": args.tiny, "step_ms": step_ms,
                                   "gpu_ms": busy_ms, "launches": launches, "kernels": kernels}
    keep_result(result, "profile", device, args)
    for kernel in kernels[:SHOWN]:
        each = 1e3 * kernel["ms"] / kernel["launches"]
        print(f"{kernel['ms']:8.3f} ms {kernel['launches']:7.1f} × {each:8.1f} µs  {kernel['name'][:100]}")
    print(f"a step: {step_ms:.2f} ms, of which the GPU works {busy_ms:.2f}; {launches:.0f} launches")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16_896, help="of a step")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    add_result_flags(parser)
    main(parser.parse_args())
