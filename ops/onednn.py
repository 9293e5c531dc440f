"""oneDNN's products of bf16 on a CPU."""
from __future__ import annotations

from collections.abc import Callable

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products, or fast ones that serve for them.

    A GPU before Ampere has none. A CPU needs AVX-512 or ARM's bf16; on another, PyTorch multiplies bf16
    number by number, tens to hundreds of times slower than fp32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    ops = torch.ops.mkldnn
    return hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported()


def pack_onednn_weight(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The function x (M, I) → x Wᵀ (M, O), with W (O, I) copied once to oneDNN's own layout: the same
    numbers, sooner.

    None where oneDNN has no such product; it has one for bf16 on a CPU that can multiply it.
    """
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None
    if not hasattr(ops, "_reorder_linear_weight") or not multiplies_bf16(weight.device):
        return None
    packed = ops._reorder_linear_weight(weight.contiguous(), 8)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")
