"""lora.py and lora_kernels.py: the LoRA linear against its definition in float64, wrapping and merging."""
import pytest
import torch

from checkpoint import load_model
from lora import LoRAConfig, adapters, merge, wrap
from lora_kernels import lora_linear, lora_linear_reference
from model import Linear


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def operands(M, I, O, R, generator, dtype):  # noqa: E741
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return draw(M, I).to(dtype), (draw(O, I) / I**0.5).to(dtype), draw(R, I) / I**0.5, draw(O, R) / R**0.5


def outputs_and_gradients(function, x, weight, a, b, scale, dy):
    x, a, b = (t.detach().clone().requires_grad_() for t in (x, a, b))
    y = function(x, weight, a, b, scale)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def faults(function, x, weight, a, b, scale, dy):
    """The names of outputs that are further from float64 than twice the reference's own rounding, or that are all zero."""
    exact = outputs_and_gradients(lora_linear_reference, *(t.double() for t in (x, weight, a, b)), scale, dy.double())
    naive = outputs_and_gradients(lora_linear_reference, x, weight, a, b, scale, dy)
    ours = outputs_and_gradients(function, x, weight, a, b, scale, dy)
    return [name for name in exact if not ours[name].norm() > 0 or ours[name].dtype != naive[name].dtype
            or not error(ours[name], exact[name]) <= 2 * error(naive[name], exact[name]) + 1e-7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "I", "O", "R"), [(1, 64, 32, 1), (33, 640, 256, 16), (257, 256, 640, 5)])
def test_lora_linear_and_its_gradients_are_as_accurate_as_the_reference(M, I, O, R, dtype, generator):  # noqa: E741
    x, weight, a, b = operands(M, I, O, R, generator, dtype)
    assert faults(lora_linear, x, weight, a, b, 1.5, torch.randn(M, O, generator=generator).to(dtype)) == []


@pytest.mark.parametrize("broken", ["dx", "da", "db"])
def test_a_broken_gradient_is_caught(broken, generator):
    """Mutation: the check above fails if one gradient is zeroed, halved or flipped."""
    x, weight, a, b = operands(33, 64, 32, 4, generator, torch.float32)
    dy = torch.randn(33, 32, generator=generator)
    for damage in (lambda g: g * 0, lambda g: g * 0.5, lambda g: g.flip(0)):
        def function(x, weight, a, b, scale, damage=damage):
            {"dx": x, "da": a, "db": b}[broken].register_hook(damage)
            return lora_linear(x, weight, a, b, scale)
        assert faults(function, x, weight, a, b, 1.5, dy) == [broken]


def test_gradcheck(generator):
    x, weight, a, b = (t.double() for t in operands(3, 5, 4, 2, generator, torch.float64))
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, weight, a, b, 0.7),
                                    tuple(t.requires_grad_() for t in (x, a, b)))


def test_dropout_touches_the_adapter_alone(generator):
    x, weight, a, b = operands(64, 32, 16, 4, generator, torch.float32)
    plain = x @ weight.T
    torch.manual_seed(0)
    once = lora_linear(x, weight, a, b, 2.0, dropout=0.5) - plain
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(once, 2.0 * (kept @ a.T) @ b.T, rtol=1e-4, atol=1e-5)


def test_wrapping_trains_adapters_alone_and_starts_at_the_base_model(demo, generator):
    base = load_model(demo / "model", torch.float32)
    ids = torch.randint(110, 1000, (1, 40), generator=generator)
    before = base.logits(ids)
    wrap(base, LoRAConfig(rank=4, targets=("q_proj", "down_proj")), generator)
    assert torch.equal(base.logits(ids), before)
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * base.config.num_hidden_layers and all("lora_" in name for name in trained)
    assert {name.rpartition(".")[2] for name, _ in adapters(base)} == {"q_proj", "down_proj"}


def test_merging_gives_the_same_logits(demo, generator):
    model = load_model(demo / "model", torch.float32)
    wrap(model, LoRAConfig(rank=4, alpha=8), generator)
    for _, adapter in adapters(model):
        adapter.lora_b.data.normal_(0, 0.1, generator=generator)
    ids = torch.randint(110, 1000, (1, 40), generator=generator)
    adapted = model.logits(ids)
    merge(model)
    assert not list(adapters(model)) and all(type(m) is Linear for m in model.modules() if isinstance(m, torch.nn.Linear))
    torch.testing.assert_close(model.logits(ids), adapted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flags", [{"targets": ("lm_head",)}, {"targets": ()}, {"rank": 0}, {"dropout": 1.0}])
def test_impossible_adapters_are_refused(flags):
    with pytest.raises(ValueError, match="LoRA"):
        LoRAConfig(**flags)


def test_rank_stabilised_scale_divides_by_the_root():
    assert LoRAConfig(rank=16, alpha=16).scale == 1 and LoRAConfig(rank=16, alpha=16, rslora=True).scale == 4
