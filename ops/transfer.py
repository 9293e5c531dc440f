"""Copies to the device that the host does not wait for."""
from __future__ import annotations

import torch


def to_device_async(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device.  To a GPU it goes out of pinned memory, so the host does not wait for what is queued
    there."""
    on_host = device.type == "cuda" and x.device.type == "cpu"
    return (x.pin_memory() if on_host else x).to(device, non_blocking=True)
