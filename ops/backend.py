"""The one place that chooses which backend computes each operation: Triton, C++, compiled PyTorch or PyTorch.

The choice is made once, when a model is built, and passed to the operations by name. Each operation's file
has a table of its backends, `BACKENDS`; "torch" is in all of them and takes every device, dtype and shape.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from ops.cpu import build
from ops.triton_utils import can_run

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_SHARED_BYTES = 163 * 1024    # of shared memory that a program of attention's kernels needs
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Backends:
    """The backend of each operation, by its name in that operation's table."""

    attention: str = "torch"        # "triton", "cpp" or "torch"
    rms_norm: str = "torch"         # "triton", "cpp", "compiled" or "torch"
    geglu: str = "torch"            # "triton", "cpp", "compiled" or "torch"
    cross_entropy: str = "torch"    # "triton", "cpp" or "torch"
    weight_grad: str = "torch"      # "cpp" or "torch": of linears with fp32 weights and bf16 inputs


class Sizes(Protocol):
    """What of a model's config the choice depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: tuple[int, int, int]     # query heads, kv heads, head dim


def choose_backends(device: torch.device, dtype: torch.dtype, config: Sizes,
                    compiled: bool = False) -> Backends:
    """The fastest backends for a model of these sizes that computes in `dtype` on `device`.

    compiled: whether torch.compile may make one loop of what neither Triton nor C++ computes.
    """
    if device.type == "cuda" and can_run(device) and dtype in TRITON_DTYPES:
        attention = "triton" if _triton_attention_fits(device, dtype, config) else "torch"
        return Backends(attention, rms_norm="triton", geglu="triton", cross_entropy="triton")
    backends = Backends(rms_norm="compiled", geglu="compiled") if compiled else Backends()
    if device.type == "cpu" and dtype == torch.bfloat16 and build.is_preferred():
        return _with_cpp(backends, config)
    return backends


def _triton_attention_fits(device: torch.device, dtype: torch.dtype, config: Sizes) -> bool:
    N, K, H = config.heads
    shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    heads_fit = H in (16, 32, 64, 128, 256) and N // K in (1, 2, 4, 8)
    return (dtype in (torch.bfloat16, torch.float16) and heads_fit
            and shared_bytes >= TRITON_SHARED_BYTES)


def _with_cpp(backends: Backends, config: Sizes) -> Backends:
    """C++ for each operation whose sizes are multiples of its vectors."""
    N, K, H = config.heads
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    fits = {"attention": H % 32 == 0,
            "rms_norm": D % 32 == H % 32 == 0,
            "geglu": F % 16 == 0,
            "cross_entropy": V % 16 == D % 32 == 0,
            "weight_grad": all(size % 16 == 0 for size in (D, F, N * H, K * H))}
    return replace(backends, **{operation: "cpp" for operation, it_fits in fits.items() if it_fits})


def pick(backends: Mapping[str, Entry], name: str) -> Entry:
    """The entry of an operation's table.  Raises ValueError for a name that is not in it."""
    if name not in backends:
        raise ValueError(f"no backend {name!r} for this operation; it has {', '.join(backends)}")
    return backends[name]
