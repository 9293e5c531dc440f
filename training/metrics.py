"""What is measured of a step: its FLOPs, their share of the GPU's peak, and a profile of where the time goes.
"""
from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch

from data import Batch
from model import Gemma3

# TFLOP/s of dense bf16 matrix products, as the makers state them. The first name that is part of the device's
# name counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70,
    "4090": 165,
}


def flops(model: Gemma3, batch: Batch) -> float:
    """Floating-point operations of a batch's forward and backward pass.

    What activation checkpointing computes a second time counts once.
    """
    config, tokens, loss_rows = model.config, len(batch.tokens), batch.loss_tokens
    full = model.head.requires_grad
    D, F, N, K, H = config.hidden_size, config.intermediate_size, *config.heads

    # Weights of a layer: q, k and v before attention; o, gate, up and down after it. The last layer computes
    # the latter only for the tokens that carry loss, and so does the head.
    before_attention, after_attention = D * (N + 2 * K) * H, D * (N * H + 3 * F)
    products = config.num_hidden_layers * tokens * (before_attention + after_attention)
    products += loss_rows * config.vocab_size * D - (tokens - loss_rows) * after_attention

    # A product of a weight is 2 operations forward and 2 for dX, and where the weight is trained 2 for dW.
    weights = (6 if full else 4) * products
    adapters = 0 if full else 6 * tokens * sum(p.numel() for p in model.parameters() if p.requires_grad)

    # Attention: pairs of a token and one that it attends to, over all layers; QKᵀ and PV, forward and twice
    # backward.
    pairs = 0
    for window, layers in Counter(config.windows).items():
        pairs += layers * int((batch.positions + 1).clamp(max=window or sys.maxsize).sum())
    return weights + adapters + 12 * N * H * pairs


def utilization(tflops: float, device: torch.device) -> float | None:
    """Model FLOP/s utilization: `tflops` as a share of the GPU's peak; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = [peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name]
    return tflops / peaks[0] if peaks else None


def step_profiler(steps: int, out: Path, device: torch.device) -> torch.profiler.profile:
    """A profiler that skips two steps and records the next `steps`.

    Then it writes out/trace.json and prints the ten kernels that took longest.
    """
    on_gpu = device.type == "cuda"
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"

    def write_trace(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(out / "trace.json"))
        events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in events) or 1
        print(f"profile of {steps} steps in {out / 'trace.json'}; the ten that took longest:")
        for event in events[:10]:
            microseconds = getattr(event, key)
            share, ms_a_step, calls = microseconds / total, microseconds / steps / 1e3, event.count // steps
            print(f"  {share:6.1%} {ms_a_step:9.2f} ms a step {calls:6d} calls  {event.key[:80]}")

    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    return torch.profiler.profile(activities=activities, on_trace_ready=write_trace, schedule=schedule)
