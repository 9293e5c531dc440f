"""loss_kernels.py: as accurate as the reference, gradients too, and never the full logits."""
import pytest
import torch

from loss_kernels import CHUNK_ROWS, IGNORE, linear_cross_entropy, linear_cross_entropy_reference


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def draw(tokens, width, vocabulary, generator, dtype=torch.float32, share=0.5):
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).mul(0.3).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) > share] = IGNORE
    return hidden, weight, targets


def gradients(function, hidden, weight, targets):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets)
    (loss * 0.25).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 3 * CHUNK_ROWS + 5])
def test_loss_and_gradients_are_as_accurate_as_the_reference(tokens, dtype, generator):
    hidden, weight, targets = draw(tokens, 32, 500, generator, dtype)
    targets[0] = 3
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.double(), targets)
    naive = gradients(linear_cross_entropy_reference, hidden, weight, targets)
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    for mine, reference, truth in zip(ours, naive, exact, strict=True):
        assert truth.norm() > 0 and mine.norm() > 0
        assert error(mine, truth) <= 2 * error(reference, truth) + 1e-7


def test_a_frozen_head_gets_no_gradient(generator):
    hidden, weight, targets = draw(20, 16, 50, generator)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None and hidden.grad.norm() > 0


def test_rows_without_loss_get_exactly_zero_gradient(generator):
    hidden, weight, targets = draw(20, 16, 50, generator)
    hidden.requires_grad_()
    linear_cross_entropy(hidden, weight, targets).backward()
    assert (hidden.grad[targets == IGNORE] == 0).all() and (hidden.grad[targets != IGNORE] != 0).any(dim=1).all()


def test_no_trained_row_gives_loss_zero(generator):
    hidden, weight, targets = draw(9, 16, 50, generator, share=-1)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0 and hidden.grad.norm() == 0


def test_full_precision_masters_get_full_precision_gradients(generator):
    hidden, weight, targets = draw(40, 16, 50, generator)
    weight.requires_grad_()
    linear_cross_entropy(hidden.bfloat16(), weight, targets).backward()
    assert weight.grad.dtype == torch.float32
    exact = gradients(linear_cross_entropy_reference, hidden.double(), weight.detach().double(), targets)[2]
    assert error(weight.grad * 0.25, exact) < 2e-2


def test_gradcheck(generator):
    hidden, weight, targets = (t.double() if t.is_floating_point() else t for t in draw(5, 4, 7, generator))
    # The function works in fp32 inside, so finite differences are taken coarsely.
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets), (hidden.requires_grad_(), weight.requires_grad_()),
                                    eps=1e-2, atol=1e-2, rtol=1e-2)
