"""What is measured of a step: arithmetic, its share of the card's peak, and a profile."""
from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

from data import Batch
from model import Gemma3

# bf16 TFLOP/s of dense matrix products, as the maker states them.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70, "4090": 165}


def flops(model: Gemma3, batch: Batch) -> float:
    """Floating-point operations that a batch's forward and backward pass need; what is computed twice counts once."""
    config, tokens, rows, full = model.config, len(batch.tokens), batch.trained_tokens, model.head.requires_grad
    D, F, N, K, H = config.hidden_size, config.intermediate_size, *config.heads
    after_attention = D * (N * H + 3 * F)                                       # weights of o, gate, up and down
    frozen_or_full = 2 * (3 if full else 2)                                     # forward, dX, and dW where it is wanted
    linears = config.num_hidden_layers * tokens * (D * (N + 2 * K) * H + after_attention) - (tokens - rows) * after_attention
    adapters = 0 if full else 6 * tokens * sum(p.numel() for p in model.parameters() if p.requires_grad)
    seen = sum(layers * int((batch.positions + 1).clamp(max=window or sys.maxsize).sum())
               for window, layers in Counter(config.windows).items())
    return frozen_or_full * (linears + rows * config.vocab_size * D) + adapters + 12 * N * H * seen


def utilization(tflops: float, device: torch.device) -> float | None:
    """The share of the card's peak ("model FLOP/s utilization"); None where the peak is not known."""
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name(device)]
    return tflops / peaks[0] if peaks else None


def profiled(steps: int, out: Path, device: torch.device) -> torch.profiler.profile:
    """A profiler that skips two steps, records so many, writes OUT/trace.json and prints where the time went."""
    def write_trace(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(out / "trace.json"))
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
        whole = sum(getattr(event, key) for event in events) or 1
        print(f"profile of {steps} steps in {out / 'trace.json'}; the ten that took longest:")
        for event in events[:10]:
            spent = getattr(event, key)
            print(f"  {spent / whole:6.1%} {spent / steps / 1e3:9.2f} ms a step {event.count // steps:6d} calls  {event.key[:80]}")

    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    return torch.profiler.profile(activities=kinds, on_trace_ready=write_trace,
                                  schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1))
