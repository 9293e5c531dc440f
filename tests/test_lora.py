"""lora.py: wrapping, the choice of kernels, and merging."""
import pytest
import torch

import lora
import lora_kernels
from checkpoint import load_model
from lora import LoRAAttention, LoRAConfig, LoRAMLP, adapters, choose_kernels, merge, wrap
from lora_kernels import BY_PYTORCH, BY_TRITON, Choice
from model import Linear


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


# What runs where


def wrapped(demo, **config):
    model = load_model(demo / "model", torch.float32)
    wrap(model, LoRAConfig(rank=4, **config), torch.Generator().manual_seed(0))
    for _, adapter in adapters(model):
        adapter.lora_b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def test_linears_that_share_their_input_lie_below_each_other_in_memory(demo):
    for module in wrapped(demo).modules():
        if isinstance(module, LoRAAttention | LoRAMLP):
            group = [module.q_proj, module.k_proj, module.v_proj] if isinstance(module, LoRAAttention) else [module.gate_proj, module.up_proj]
            below = lora_kernels._below([linear.weight for linear in group])
            assert below.data_ptr() == group[0].weight.data_ptr()
            assert torch.equal(below, torch.cat([linear.weight for linear in group]))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("gate_proj",), ("o_proj", "down_proj")], ids="-".join)
def test_some_adapters_alone_give_what_all_of_them_with_the_others_at_zero_give(demo, targets, generator):
    ids = torch.randint(110, 1000, (1, 40), generator=generator)
    everything, some = wrapped(demo), wrapped(demo, targets=targets)
    few = dict(adapters(some))
    for name, adapter in adapters(everything):
        if name in few:
            adapter.lora_a.data.copy_(few[name].lora_a)
            adapter.lora_b.data.copy_(few[name].lora_b)
        else:
            adapter.lora_b.data.zero_()
    torch.testing.assert_close(some.logits(ids), everything.logits(ids), rtol=1e-4, atol=1e-4)


def test_every_operation_of_a_model_can_be_chosen(demo, monkeypatch):
    asked = []
    monkeypatch.setattr(lora, "choose", lambda *what: asked.append(what) or (Choice(forward=len(asked) % 2 == 0),
                                                                           {"forward": (2.0, 1.0) if len(asked) % 2 else (1.0, 2.0)}))
    model = wrapped(demo)
    lines = choose_kernels(model, "auto", 64)
    D, F = model.config.hidden_size, model.config.intermediate_size
    q, k = (heads * model.config.head_dim for heads in (model.config.num_attention_heads, model.config.num_key_value_heads))
    assert [(kernels, rows, inputs, outputs, ends) for kernels, rows, inputs, outputs, _, _, _, ends, _ in asked] == [
        ("auto", 64, D, (q, k, k), ""), ("auto", 64, q, (D,), ""), ("auto", 64, D, (F, F), "gated"), ("auto", 64, F, (D,), "gate")]
    assert len(lines) == 4 and "torch (2.000 against 1.000 ms)" in lines[0] and "triton (1.000 against 2.000 ms)" in lines[1]
    block = model.model.layers[-1]
    assert [block.self_attn.choice.forward, block.self_attn.o_proj.choice.forward, *(c.forward for c in block.mlp.choices)] == [
        False, True, False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted where there is no CUDA device")
def test_a_cpu_computes_by_pytorch_unless_told_otherwise(demo, monkeypatch):
    model = wrapped(demo)
    assert choose_kernels(model, "auto", 64) == [] and model.model.layers[0].self_attn.choice == BY_PYTORCH
    choose_kernels(model, "triton", 64)                    # under the interpreter
    assert model.model.layers[0].mlp.choices == (BY_TRITON, BY_TRITON)
    monkeypatch.setattr("triton_support.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"--kernels triton: .* need a CUDA device .* this is cpu; use --kernels auto"):
        choose_kernels(model, "triton", 64)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_model_computes_the_same_with_kernels_and_with_pytorch(demo, generator, dropout):
    """Logits and every gradient; with dropout the draws differ, so only the eval pass is compared."""
    model = wrapped(demo, dropout=dropout)
    model.train(dropout == 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = model.to(device), torch.randint(110, 1000, (1, 24), generator=generator).to(device)
    results = []
    for kernels in ("torch", "triton"):
        choose_kernels(model, kernels, 24)
        logits = model.logits(ids)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())
