"""ops/weight_grad.py: PyTorch's way against the definition; C++ is in test_cpu.py."""
import pytest
import torch

from ops import weight_grad as module
from ops.weight_grad import weight_grad, weight_grad_reference


@pytest.mark.parametrize("chunk", [7, 1 << 14])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_pytorchs_sums_are_the_definitions_whatever_the_chunks(dtype, near, chunk, generator, poisoned, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_OUTPUTS", chunk)
    dy, x = (torch.randn(50, width, generator=generator).to(dtype) for width in (20, 12))
    exact = weight_grad_reference(dy, x)
    dw = weight_grad(dy, x)
    assert dw.dtype == torch.float32 and (dw - exact).norm() < near * exact.norm()
    out = torch.ones(20, 12)
    assert weight_grad(dy, x, out, add=True) is out and torch.equal(out, dw + 1)
    assert torch.equal(weight_grad(dy, x, out), dw)
