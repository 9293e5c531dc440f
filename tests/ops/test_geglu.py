"""ops/geglu.py: the gate, its gradients, and the functions that other kernels end in, against PyTorch."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, INTERPRETED, INTERPRETER, NEEDS_COMPILER

from ops import compiled
from ops import geglu as geglu_module
from ops.geglu import geglu, geglu_gradient, geglu_reference, gelu, gelu_slope
from ops.triton_utils import jit, tl


def test_geglus_gradient_is_autograds(generator):
    dh, gate, up = (torch.randn(7, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.autograd.grad(geglu_reference(gate.requires_grad_(), up.requires_grad_()), (gate, up), dh)
    torch.testing.assert_close(geglu_gradient(dh, gate.detach(), up.detach()), torch.cat(expected, dim=1))
    both = torch.cat((gate.detach(), up.detach()), dim=1)                   # as lora_kernels.py keeps them
    torch.testing.assert_close(geglu_gradient(dh, *both.chunk(2, dim=1)), torch.cat(expected, dim=1))


WAYS = [pytest.param("cpu", dtype, "torch", id=f"pytorch-{dtype}".replace("torch.", "")) for dtype in (torch.float32, torch.bfloat16)]
WAYS += [pytest.param(*INTERPRETER.values, dtype, "triton", id=f"interpreted-{dtype}".replace("torch.", ""), marks=INTERPRETER.marks)
         for dtype in (torch.float32, torch.float16)]
WAYS += [pytest.param(*GPU.values, dtype, "triton", id=f"cuda-{dtype}".replace("torch.", ""), marks=GPU.marks)
         for dtype in (torch.float32, torch.float16, torch.bfloat16)]


def faults(geglu, M, F, halves, dtype, device, generator):
    """Of h, dgate, dup: those that are further from float64 than twice the definition's."""
    both, dh = torch.randn(M, 2 * F, generator=generator).to(dtype).to(device), torch.randn(M, F, generator=generator).to(dtype).to(device)
    gate, up = both.chunk(2, dim=1) if halves else (half.contiguous() for half in both.chunk(2, dim=1))

    def all_of(geglu, *operands):
        *operands, dh = (x.detach().requires_grad_() for x in operands)
        h = geglu(*operands)
        return h.detach(), *torch.autograd.grad(h, operands, dh)

    exact = all_of(geglu_reference, *(x.double() for x in (gate, up, dh)))
    plain, ours = all_of(geglu_reference, gate, up, dh), all_of(geglu, gate, up, dh)
    assert all(x.dtype == dtype and x.shape == (M, F) for x in ours)
    return [name for name, x, reference, true in zip(("h", "dgate", "dup"), ours, plain, exact, strict=True)
            if not (x - true).norm() <= 2 * (reference - true).norm() + 1e-7 * true.norm()]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("device", "dtype", "backend"), WAYS)
@pytest.mark.parametrize(("M", "F", "halves"), [(1, 64, False), (7, 90, False), (7, 90, True), (33, 2048, True)])
def test_results_and_gradients_are_as_near_as_the_definitions(M, F, halves, device, dtype, backend, generator):
    assert faults(lambda gate, up: geglu(gate, up, backend), M, F, halves, dtype, device, generator) == []


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("numbers", [1, 5 * 90])
def test_rows_a_few_at_a_time_give_the_same(numbers, generator, monkeypatch):
    monkeypatch.setattr(compiled, "CHUNK_NUMBERS", numbers)
    assert faults(geglu, 33, 90, True, torch.bfloat16, "cpu", generator) == []


@NEEDS_COMPILER
def test_one_loop_is_as_accurate(generator):
    """As train.py --compile has it."""
    for M in (7, 33):
        assert faults(partial(geglu, backend="compiled"), M, 90, True, torch.bfloat16, "cpu", generator) == []


@INTERPRETED
@pytest.mark.parametrize(("sound", "broken", "wrong"), [
    ("d * u * gelu_slope(g)", "d * gelu_slope(g)", "dgate"), ("d * gelu(g)", "d * gelu(u)", "dup"), ("row * up_row", "row * gate_row", "h"),
    ("inside = columns < N", "inside = columns < N - 1", "h"), ("dgate_up + row * (2 * N) + N +", "dgate_up + row * (2 * N) + N - 1 +", "dup")])
def test_the_tests_see_a_broken_kernel(sound, broken, wrong, mutant, generator, poisoned):
    made = mutant(geglu_module, sound, broken)
    strided = lambda gate, up: made.geglu(gate.contiguous(), up, "triton")                                  # noqa: E731
    assert wrong in faults(strided, 7, 90, True, torch.float32, "cpu", generator)


def test_gate_and_up_alone_are_kept(generator):
    kept = []
    gate, up = (torch.randn(7, 12, generator=generator, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()), lambda _: None):
        geglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_the_kernel_refuses_what_it_would_get_wrong(generator):
    gate, up = (torch.randn(12, 7, generator=generator).T for _ in range(2))
    with pytest.raises(ValueError, match=r"side by side; got torch\.float32 on cpu, strides \(1, 7\)"):
        geglu(gate, up, backend="triton")


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
