"""lora.py: wrapping, the choice of kernels, and merging."""
import copy

import numpy as np
import pytest
import torch
from conftest import GPU, INTERPRETED, INTERPRETER
from torch.utils.checkpoint import checkpoint as recomputed

import lora
import lora_kernels
from data import pack
from dataset.examples import Example
from lora import (
    LoRAAttention,
    LoRAConfig,
    LoRAMLP,
    adapters,
    choose_kernels,
    flat_adapters,
    merge,
    set_dropout_masks,
    wrap,
)
from lora_kernels import BY_PYTORCH, BY_TRITON, Choice
from model import Linear
from ops.dropout import odd_hashes
from ops.onednn import pack_onednn_weight
from storage.pretrained import load_model
from training.distributed import AllReduceGradients


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


def wrapped(demo, device="cpu", **config):
    model = load_model(demo / "model", torch.float32, device)
    wrap(model, LoRAConfig(rank=4, **config), torch.Generator().manual_seed(0))
    for _, adapter in adapters(model):
        adapter.lora_b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model


def test_linears_that_share_their_input_lie_below_each_other_in_memory(demo):
    for module in wrapped(demo).modules():
        if isinstance(module, LoRAAttention | LoRAMLP):
            group = [module.q_proj, module.k_proj, module.v_proj] if isinstance(module, LoRAAttention) else [module.gate_proj, module.up_proj]
            below = lora_kernels._fused_weight([linear.weight for linear in group])
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
    assert [(kernels, rows, inputs, outputs, ends) for kernels, rows, inputs, outputs, _, _, _, ends, *_ in asked] == [
        ("auto", 64, D, (q, k, k), ""), ("auto", 64, q, (D,), ""), ("auto", 64, D, (F, F), "gated"), ("auto", 64, F, (D,), "gate")]
    assert len(lines) == 4 and "torch (2.000 against 1.000 ms)" in lines[0] and "triton (1.000 against 2.000 ms)" in lines[1]
    block = model.model.layers[-1]
    assert [block.self_attn.choice.forward, block.self_attn.o_proj.choice.forward, *(c.forward for c in block.mlp.choices)] == [
        False, True, False, True]


@INTERPRETED
def test_a_cpu_computes_by_pytorch_unless_told_otherwise(demo, monkeypatch):
    model = wrapped(demo)
    assert choose_kernels(model, "auto", 64) == [] and model.model.layers[0].self_attn.choice == BY_PYTORCH
    choose_kernels(model, "triton", 64)                    # under the interpreter
    assert model.model.layers[0].mlp.choices == (BY_TRITON, BY_TRITON)
    monkeypatch.setattr("ops.triton_utils.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"--kernels triton: .* need a CUDA device .* this is cpu; use --kernels auto"):
        choose_kernels(model, "triton", 64)


@pytest.mark.skipif(pack_onednn_weight(torch.zeros(1, 1, dtype=torch.bfloat16)) is None, reason="this CPU or PyTorch has no products in oneDNN's blocks")
def test_a_cpu_multiplies_by_weights_in_blocks_unless_told_otherwise_or_to_save_memory(demo):
    model = wrapped(demo).to(torch.bfloat16)
    block = model.model.layers[0]
    for kernels, checkpoint_activations, wanted in (("auto", False, True), ("torch", False, False), ("auto", True, False)):
        model.checkpoint_activations = checkpoint_activations
        choose_kernels(model, kernels, 64)
        choices = block.self_attn.choice, block.self_attn.o_proj.choice, *block.mlp.choices
        assert [choice.packed is not None for choice in choices] == [wanted] * 4 and not any(choice.by_triton for choice in choices)


@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_a_model_computes_the_same_with_kernels_and_with_pytorch(demo, generator, dropout, device):
    """Logits and every gradient."""
    model, ids = wrapped(demo, device, dropout=dropout).train(), torch.randint(110, 1000, (1, 24), generator=generator).to(device)
    set_dropout_masks(model, lambda: torch.arange(24, dtype=torch.int32), 0)
    results = []
    for kernels in ("torch", "triton"):
        choose_kernels(model, kernels, 24)
        logits = model.logits(ids)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item())


# All adapters in one buffer


def with_adapters_apart(model):
    """A copy whose adapters are parameters like any others."""
    apart = copy.deepcopy(model)
    assert flat_adapters(apart) is None and flat_adapters(model) is not None
    return apart


@pytest.mark.parametrize("targets", [
    lora.TARGETS, ("q_proj", "down_proj"), ("gate_proj", "k_proj", "v_proj", "o_proj")],
    ids=["all", "some", "others"])
def test_adapters_and_their_gradients_lie_group_by_group_in_one_buffer(demo, targets):
    model = wrapped(demo, targets=targets)
    flat = flat_adapters(model)
    gradients = AllReduceGradients(model, 1)
    named = dict(model.named_parameters())
    trained = [p for p in named.values() if p.requires_grad]
    assert all(p is not flat.masters for p in named.values()) and gradients.parameters[0] is flat.masters
    assert len(flat.masters) == len(flat.masters.grad) == sum(p.numel() for p in trained)
    layers = "model.layers.0.self_attn", "model.layers.0.mlp"
    groups = [[f"{layers[0]}.{part}_proj" for part in "qkv"], [f"{layers[0]}.o_proj"],
              [f"{layers[1]}.gate_proj", f"{layers[1]}.up_proj"], [f"{layers[1]}.down_proj"]]
    if targets != lora.TARGETS:
        groups = [[name] for names in groups for name in names if name.rpartition(".")[2] in targets]
    first = 0
    for names in groups:
        for part in ("lora_a", "lora_b"):
            masters = [named[f"{name}.{part}"] for name in names]
            for buffer, parts in ((flat.masters, masters), (flat.masters.grad, [p.grad for p in masters])):
                own = buffer[first:first + sum(p.numel() for p in masters)]
                assert torch.equal(own, torch.cat([p.flatten() for p in parts]))
                assert own.data_ptr() == parts[0].data_ptr()
            first += sum(p.numel() for p in masters)
    assert first == len(flat.masters) // len(model.model.layers)
    seen = torch.zeros_like(flat.masters)
    for p, part in flat.of_each(seen.detach()):
        assert part.shape == p.shape
        part.add_(1)
    assert (seen == 1).all()


CONFIGS = {"plain": {}, "dropout": {"dropout": 0.25},
           "some": {"targets": ("q_proj", "down_proj"), "rslora": True}}


@pytest.mark.parametrize(("choice", "config"), [
    *(("torch", config) for config in CONFIGS),
    *(pytest.param("triton", config, marks=INTERPRETER.marks) for config in ("dropout", "some"))])
def test_gradients_added_in_the_buffer_are_those_that_autograd_adds(demo, generator, choice, config):
    """Bit for bit, over two micro-batches."""
    model = wrapped(demo, **CONFIGS[config]).train()
    apart = with_adapters_apart(model)
    AllReduceGradients(model, 1)
    wanted = [name for name, p in model.named_parameters() if p.requires_grad]
    views = [p.grad for p in model.parameters() if p.requires_grad]
    for one in (model, apart):
        choose_kernels(one, choice, 24)
    for tokens in (24, 9):
        ids = torch.randint(110, 1000, (1, tokens), generator=generator)
        for one in (model, apart):
            set_dropout_masks(one, lambda tokens=tokens: torch.arange(tokens, dtype=torch.int32), tokens)
            one.logits(ids).square().mean().backward()
    for name, view in zip(wanted, views, strict=True):
        mine, theirs = (one.get_parameter(name).grad for one in (model, apart))
        assert mine is view and theirs.any() and torch.equal(mine, theirs), name


@pytest.mark.parametrize("gone", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_where_a_gradient_left_the_buffer_autograd_adds_its_groups(demo, generator, gone):
    model = wrapped(demo)
    apart, ids = with_adapters_apart(model), torch.randint(110, 1000, (1, 20), generator=generator)
    AllReduceGradients(model, 1)
    for one in (model, apart):
        one.get_parameter(f"model.layers.1.{gone}.lora_a").grad = None
        one.logits(ids).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, apart.get_parameter(name).grad), name


def test_adapters_of_a_group_can_be_asked_for_alone_and_in_another_dtype(demo, generator):
    model = in_bf16(demo)
    flat = AllReduceGradients(model, 1).flat
    attention = model.model.layers[0].self_attn
    x = torch.randn(5, model.config.hidden_size, generator=generator)
    q, k, v = attention.project(x.bfloat16())
    for linear, y in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
        torch.testing.assert_close(linear(x.bfloat16()), y, rtol=2e-2, atol=2e-2)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        a, b = flat.operands(flat.groups[0], dtype)
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        assert torch.equal(a, torch.cat([linear.lora_a for linear in linears]).to(dtype))
        assert torch.equal(b, torch.cat([linear.lora_b for linear in linears]).to(dtype))


def test_without_a_buffer_of_gradients_autograd_gets_them(demo, generator):
    model = wrapped(demo)
    ids = torch.randint(110, 1000, (1, 20), generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model.logits(ids).square().mean(), trained)
    model.logits(ids).square().mean().backward()
    assert all(torch.equal(p.grad, grad) and grad.any() for p, grad in zip(trained, found, strict=True))


def in_bf16(demo):
    model = load_model(demo / "model", torch.bfloat16)
    wrap(model, LoRAConfig(rank=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _, adapter in adapters(model):
            adapter.lora_b.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model


def step_of(optimizer, gradients, model):
    for p in model.parameters():
        if p.requires_grad:
            p.grad.fill_(1.0)
    optimizer.step()
    gradients.zero()


def first(model):
    return next(adapters(model))[1]


CHANGES = {
    "fused AdamW of the buffer": lambda model, gradients: step_of(
        torch.optim.AdamW(gradients.parameters, lr=0.3, fused=True), gradients, model),
    "fused AdamW of the adapters": lambda model, gradients: step_of(
        torch.optim.AdamW([p for _, one in adapters(model) for p in one.adapted[1:]], lr=0.3, fused=True),
        gradients, model),
    "SGD": lambda model, gradients: step_of(torch.optim.SGD(gradients.parameters, lr=0.3), gradients, model),
    "in place": lambda model, _: first(model).lora_b.add_(1.0),
    "copy_": lambda model, _: first(model).lora_b.copy_(torch.ones_like(first(model).lora_b)),
    "the buffer": lambda model, _: flat_adapters(model).masters.mul_(2.0),
    "a state dict": lambda model, _: model.load_state_dict(
        {name: 2 * tensor for name, tensor in model.state_dict().items() if "lora" in name}, strict=False),
    "init": lambda model, _: torch.nn.init.ones_(first(model).lora_b),
    "another parameter": lambda model, _: setattr(
        first(model), "lora_b", torch.nn.Parameter(torch.ones_like(first(model).lora_b))),
    "another memory": lambda model, _: setattr(
        first(model).lora_b, "data", torch.ones_like(first(model).lora_b))}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
def test_products_are_of_the_masters_as_they_are_whatever_changed_them(demo, generator, change, trained):
    if not trained and ("AdamW" in change or change == "SGD"):
        pytest.skip("a step is training")
    model, ids = in_bf16(demo), torch.randint(110, 1000, (1, 20), generator=generator)
    gradients = AllReduceGradients(model, 1) if trained else None
    before = model.logits(ids)
    assert torch.equal(before, with_adapters_apart(model).logits(ids))
    with torch.no_grad():
        CHANGES[change](model, gradients)
        after = model.logits(ids)
        assert torch.equal(after, copy.deepcopy(model).logits(ids))
    assert not torch.equal(after, before)


def test_masters_are_rounded_once_a_step(demo, generator, monkeypatch):
    model, ids = in_bf16(demo), torch.randint(110, 1000, (1, 20), generator=generator)
    gradients = AllReduceGradients(model, 1)
    rounded, copy_ = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other, *more: (
        rounded.append(1) if other is gradients.flat.masters else None, copy_(self, other, *more))[1])
    for steps in (1, 2):
        for _ in range(3):
            model.logits(ids).square().mean().backward()
        assert len(rounded) == steps
        step_of(torch.optim.AdamW(gradients.parameters, lr=0.1, fused=True), gradients, model)


def test_a_moved_model_is_computed_without_the_buffer(demo, generator):
    model, ids = wrapped(demo), torch.randint(110, 1000, (1, 20), generator=generator)
    logits = model.logits(ids)
    model.double()
    assert flat_adapters(model) is None
    model.float()
    assert torch.equal(model.logits(ids), logits)
    assert len(AllReduceGradients(model, 1).parameters) == 2 * 7 * len(model.model.layers)


def test_gradients_that_left_the_buffer_are_noticed(demo, generator):
    model = wrapped(demo)
    gradients = AllReduceGradients(model, 1)
    model.logits(torch.randint(110, 1000, (1, 20), generator=generator)).square().mean().backward()
    gradients.all_reduce(torch.zeros(3))
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"has left the flat buffer: end steps with gradients\.zero\(\)"):
        gradients.all_reduce(torch.zeros(3))


# Dropout


def masks(adapters, rows):
    """(adapters, rows, features): what is dropped."""
    return torch.stack([adapter.dropout(rows).apply(torch.ones(rows, len(adapter.features))) == 0 for adapter in adapters]).double()


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout_is_unbiased_and_uncorrelated_between_features_tokens_layers_and_steps(demo, share):
    """Sums of products of ±1-like numbers, in their standard deviations: a fair mask stays below 4.5 in all but one run of 20,000."""
    model = wrapped(demo, dropout=share).train()
    steps = []
    for step in range(3):
        set_dropout_masks(model, lambda: torch.arange(1500, dtype=torch.int32), step)
        steps.append(masks([layer.self_attn.q_proj for layer in model.model.layers], 1500))
    x = (torch.stack(steps) - share) / (share * (1 - share)) ** 0.5                 # (steps, layers, tokens, features)
    def sigmas(products):
        return abs(products.sum().item()) / products.numel() ** 0.5
    assert sigmas(x) < 4.5
    for axis in range(4):
        for apart in (1, 2):
            assert sigmas(x.narrow(axis, 0, x.shape[axis] - apart) * x.narrow(axis, apart, x.shape[axis] - apart)) < 4.5, (axis, apart)
    assert sigmas(x[..., 1:, 1:] * x[..., :-1, 1:] * x[..., 1:, :-1] * x[..., :-1, :-1]) < 4.5
    for sums, count in ((x.sum(2), 1500), (x.sum(3), x.shape[3])):                  # of a feature, of a token: spread as if each were drawn
        assert (sums.square().mean() / count).item() == pytest.approx(1, abs=4.5 * (2 / sums.numel()) ** 0.5)
    largest = torch.linalg.matrix_norm(x, 2).max().item()                           # no pattern in the whole: random matrices' largest
    assert largest < 1.05 * (1500 ** 0.5 + x.shape[3] ** 0.5)


def test_odd_hashes_are_odd_and_differ_and_do_not_change():
    numbers = odd_hashes(np.arange(50_000), 3)
    assert (numbers % 2 == 1).all() and numbers.dtype == torch.int32 and len(numbers.unique()) > 49_990
    def mixed(low, high):
        z = high << 32 | low
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ z >> shift) * factor % 2**64
        return z >> 32 | 1
    pairs = [(0, 0), (5, 2**32 - 1), (2**32 - 1, 7)]
    assert [odd_hashes(np.array([low]), high).item() % 2**32 for low, high in pairs] == [mixed(*pair) for pair in pairs]


def test_linears_that_share_their_input_lose_the_same_and_others_lose_something_else(demo):
    model = wrapped(demo, dropout=0.5).train()
    set_dropout_masks(model, lambda: torch.arange(30, dtype=torch.int32), 0)
    seen = {name.rpartition("layers.")[2]: adapter.dropout(30).features for name, adapter in adapters(model)}
    alike = {}
    for name, features in seen.items():
        alike.setdefault(tuple(features.tolist()), []).append(name.rpartition(".")[2])
    groups = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(alike.values()) == groups * len(model.model.layers)
    some = wrapped(demo, dropout=0.5, targets=("k_proj", "up_proj"))
    assert all(torch.equal(adapter.features, seen[name.rpartition("layers.")[2]]) for name, adapter in adapters(some))


def test_a_token_loses_the_same_alone_packed_shared_and_recomputed(demo):
    """The hidden states of two rows that begin alike, each alone, side by side, and with their beginning computed once."""
    ids = np.random.default_rng(0).integers(110, 1000, 90).astype(np.int32)
    rows = [Example(np.concatenate((ids[:60], more)), np.arange(75) >= 70, "row") for more in (ids[60:75], ids[75:])]
    model = wrapped(demo, dropout=0.5).train()

    def hidden(batch):
        set_dropout_masks(model, batch.keys, 5)
        return recomputed(model, batch.tokens, batch.positions, batch.documents, use_reentrant=False)

    alone = torch.cat([hidden(pack([row], 1000)[0]) for row in rows])
    torch.testing.assert_close(hidden(pack(rows, 1000, share_prefixes=False)[0]), alone)
    [shared] = pack(rows, 1000)
    assert len(shared.tokens) == 60 + 14 + 14
    once = hidden(shared)
    torch.testing.assert_close(torch.cat((once[:74], once[:60], once[74:])), alone)
    [first] = pack(rows[:1], 1000)
    assert not torch.allclose(model.eval()(first.tokens, first.positions, first.documents), alone[:74], rtol=0.1)

    gradients = []
    model.train()
    for again in (True, False):
        set_dropout_masks(model, shared.keys, 5)
        arguments = shared.tokens, shared.positions, shared.documents
        (recomputed(model, *arguments, use_reentrant=False) if again else model(*arguments)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_a_layer_that_goes_on_with_some_tokens_drops_what_those_tokens_lose(demo, generator):
    model = wrapped(demo, dropout=0.5).train()
    x, rows = torch.randn(20, model.config.hidden_size, generator=generator), torch.tensor([3, 4, 11])
    last, keys = model.model.layers[-1], lambda: torch.arange(20, dtype=torch.int32)
    heads = torch.randn(20, last.self_attn.o_proj.weight.shape[1], generator=generator)
    for function, given in ((last.mlp, x), (last.self_attn.o_proj, heads)):
        set_dropout_masks(model, keys, 0)
        everything = function(given)
        for some in (rows, torch.arange(20).flip(0), torch.arange(20)):
            set_dropout_masks(model, keys, 0, some)
            torch.testing.assert_close(function(given[some]), everything[some])
    first = model.model.layers[0].mlp
    with_rows = first(x)                                                    # other layers go on with all tokens
    set_dropout_masks(model, keys, 0)
    assert torch.equal(first(x), with_rows) and torch.equal(last.mlp(x), last.mlp(x))


def test_training_with_dropout_and_no_keys_or_others_is_refused_and_evaluation_needs_none(demo):
    model, ids = wrapped(demo, dropout=0.1), torch.arange(110, 130)[None]
    assert not model.training and torch.equal(model.logits(ids), model.logits(ids))                 # as it was loaded
    model.train()
    with pytest.raises(ValueError, match=r"an adapter got 20 tokens, keys were given for none; call lora\.set_dropout_masks\(model, batch\.keys, seed\)"):
        model.logits(ids)
    set_dropout_masks(model, lambda: torch.arange(19, dtype=torch.int32), 0, torch.arange(3))
    with pytest.raises(ValueError, match="an adapter got 20 tokens, keys were given for 19"):
        model.logits(ids)
    model.eval().logits(ids)
