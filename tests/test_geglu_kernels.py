"""geglu_kernels.py: the gate's gradient, and the functions that kernels end in, against PyTorch."""
import torch
import torch.nn.functional as F
from conftest import INTERPRETED

from geglu_kernels import geglu, geglu_gradient, gelu, gelu_slope
from triton_support import jit, tl


def test_geglus_gradient_is_autograds(generator):
    dh, gate, up = (torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.autograd.grad(geglu(gate.requires_grad_(), up.requires_grad_()), (gate, up), dh)
    torch.testing.assert_close(geglu_gradient(dh, gate.detach(), up.detach()), torch.cat(expected, dim=1))
    both = torch.cat((gate.detach(), up.detach()), dim=1)                   # as lora_kernels.py keeps them
    torch.testing.assert_close(geglu_gradient(dh, *both.chunk(2, dim=1)), torch.cat(expected, dim=1))


@jit
def _apply(x, value, slope):
    places = tl.arange(0, 256)
    tl.store(value + places, gelu(tl.load(x + places)))
    tl.store(slope + places, gelu_slope(tl.load(x + places)))


@INTERPRETED
def test_the_kernels_gelu_and_its_slope_are_pytorchs():
    x = torch.linspace(-30, 30, 256, dtype=torch.float32, requires_grad=True)
    value, slope = torch.empty(256), torch.empty(256)
    _apply[(1,)](x.detach(), value, slope)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-5, atol=1e-6)
