"""model.py: transformers' logits on the real weights, and every branch on small random ones."""
import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dataset.rows import read_rows
from model import Gemma3, GemmaConfig, _TiedEmbedding
from ops.attention import attention
from ops.attention_tables import plan
from ops.cross_entropy import linear_cross_entropy
from ops.rms_norm import rms_norm, rotate
from storage.pretrained import load_model
from tokenizer import Tokenizer

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, query_pre_attn_scalar=16.0, sliding_window=8, layer_types=("sliding_attention", "full_attention", "sliding_attention"))


@pytest.fixture(scope="module")
def small():
    model = Gemma3(GemmaConfig(**SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def both(real_model):
    """(ours, transformers', a text of at least 1,500 tokens) in fp32 on the real weights."""
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    ours = load_model(real_model, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    text = ("In the beginning there was a small model, and it called no function at all. Then somebody trained it on rows of tools, "
            "queries and answers; slowly it learned to copy a city's name, 3.75 % of a price, or the 14th of May. ") * 40
    return ours, theirs, torch.tensor([[2, *Tokenizer.load(real_model).encode(text)]])


@pytest.mark.slow
def test_logits_equal_transformers_beyond_the_window(both):
    ours, theirs, ids = both
    ids = ids[:, :1600]
    assert ids.shape[1] >= 1500
    with torch.no_grad():
        got, want = ours.logits(ids), theirs(ids).logits
    assert (got - want).abs().max() <= 2e-3
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_packed_rows_give_the_same_logits_as_each_row_alone(both):
    ours, theirs, ids = both
    rows = [ids[0, :700], ids[0, 5:60], ids[0, 100:101], ids[0, 300:900]]
    lengths = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        hidden = ours(torch.cat(rows), torch.cat([torch.arange(n) for n in lengths]), torch.arange(4).repeat_interleave(lengths))
        for row, packed in zip(rows, hidden.split(lengths.tolist()), strict=True):
            want = theirs(row[None]).logits[0]
            got = torch.nn.functional.linear(packed, ours.head)
            assert (got - want).abs().max() <= 2e-3
            assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_bf16_stays_within_the_references_own_rounding(both, real_model):
    from transformers import AutoModelForCausalLM
    ours, _, ids = both
    ids = ids[:, :560]
    with torch.no_grad():
        exact = ours.logits(ids).double()
        got = load_model(real_model, torch.bfloat16).logits(ids).double()
        theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.bfloat16)(ids).logits.double()
    assert 0 < (got - exact).norm() <= 2 * (theirs - exact).norm()


def test_gradients_equal_transformers(real_model):
    """Of a packed batch's loss by every weight of two layers, in fp32."""
    from transformers import AutoModelForCausalLM

    ours = load_model(real_model, torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    watched = ("model.layers.0.", "model.layers.17.", "model.norm", "model.embed_tokens")
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(watched))
    ids = torch.randint(1000, 50_000, (2, 40), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, dims=1)
    targets[:, ::3] = -100
    documents = torch.arange(2).repeat_interleave(40)
    linear_cross_entropy(ours(ids.flatten(), torch.arange(40).repeat(2), documents), ours.head, targets.flatten()).backward()
    torch.nn.functional.cross_entropy(theirs(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(got) > 20 and set(got) == set(want)
    for name, grad in got.items():
        assert want[name].norm() > 0
        assert (grad - want[name]).norm() <= 1e-3 * want[name].norm(), name


def test_the_tied_embedding_gets_both_gradients_in_one_tensor(small):
    """As autograd adds them up, words that stand there twice among them; either use may also be missing."""
    small = copy.deepcopy(small).requires_grad_()
    tokens, positions, documents = torch.tensor([3, 5, 3, 7, 7, 1]), torch.arange(3).repeat(2), torch.arange(2).repeat_interleave(3)
    targets, rows = torch.tensor([5, -100, 2, -100, 9, 4]), torch.tensor([0, 2, 4, 5])
    small.zero_grad()
    attend = [partial(attention, plan=plan([3, 3], window, torch.float32, tokens.device, small.config.heads)) for window in small.config.windows]
    apart = linear_cross_entropy(small.run(tokens, positions, attend), small.head, targets)
    apart.backward()
    wanted = {name: p.grad for name, p in small.named_parameters()}
    for given in ({"targets": targets}, {"rows": rows, "targets": targets[rows]}):
        small.zero_grad()
        together = small(tokens, positions, documents, **given)
        together.backward()
        torch.testing.assert_close(together, apart)
        for name, parameter in small.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    small.zero_grad()
    small.head.grad = torch.ones_like(small.head)
    small(tokens, positions, documents, rows, targets[rows], weight_grad_out=small.head.grad).backward()
    torch.testing.assert_close(small.head.grad, wanted["model.embed_tokens.weight"] + 1, rtol=1e-4, atol=1e-5)
    weight = torch.randn(10, 4, requires_grad=True)
    for used in (0, 1):
        made = torch.autograd.grad(_TiedEmbedding.apply(weight, tokens, None)[used].square().sum(), weight)[0]
        plain = torch.autograd.grad((F.embedding(tokens, weight), weight)[used].square().sum(), weight)[0]
        torch.testing.assert_close(made, plain)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
def test_the_last_layer_for_some_rows_gives_their_hidden_states_and_the_same_gradients(small, again):
    generator = torch.Generator().manual_seed(4)
    ids, rows = torch.randint(97, (40,), generator=generator), torch.tensor([3, 4, 24, 30, 39])
    documents, positions = torch.tensor([0] * 25 + [1] * 15), torch.cat((torch.arange(25), torch.arange(15)))
    weight = torch.randn(len(rows), small.config.hidden_size, generator=generator)

    def run(of_rows, again):
        small.checkpoint_activations = again
        hidden = small(ids, positions, documents, rows) if of_rows else small(ids, positions, documents)[rows]
        small.zero_grad()
        (hidden * weight).sum().backward()
        return [hidden.detach(), *(p.grad.clone() for p in small.parameters())]

    small.requires_grad_(True)
    want, got = run(False, False), run(True, again)
    small.checkpoint_activations = False
    for a, b in zip(got, want, strict=True):
        assert b.norm() > 0 and (a - b).norm() <= 1e-5 * b.norm()


def test_computing_activations_again_keeps_fewer_bytes(small):
    """What autograd saves for the backward pass."""
    def saved(again):
        sizes = {}
        small.checkpoint_activations = again
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t):
            small(torch.arange(60), torch.arange(60), torch.zeros(60))
        small.checkpoint_activations = False
        return sum(sizes.values())

    small.requires_grad_(True)
    assert saved(True) < 0.5 * saved(False)


def test_a_document_never_sees_another(small):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(97, (40,), generator=generator)
    documents, positions = torch.tensor([0] * 25 + [1] * 15), torch.cat((torch.arange(25), torch.arange(15)))
    before = small(ids, positions, documents)
    changed = ids.clone()
    changed[:25] = torch.randint(97, (25,), generator=generator)
    after = small(changed, positions, documents)
    assert torch.equal(before[25:], after[25:]) and not torch.equal(before[:25], after[:25])


def test_a_token_never_sees_a_later_one(small):
    ids = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 97
    torch.testing.assert_close(small.logits(ids)[:, :20], small.logits(changed)[:, :20])


def test_rope_turns_by_position_and_keeps_length(generator):
    from model import rope_tables
    x = torch.randn(5, 2, 16, generator=generator)
    cos, sin = rope_tables(torch.arange(5), 16, 1e4, 1.0, torch.float32)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[0], x[0]) and not torch.allclose(turned[1:], x[1:])


def test_rms_norm_works_in_full_precision_whatever_the_input(generator):
    x, weight = torch.randn(4, 64, generator=generator) * 300, torch.randn(64, generator=generator)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).add(1e-6).sqrt() * (1 + weight.double())
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), exact, rtol=1e-5, atol=1e-5)
    assert rms_norm(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16


# Configurations and weights


def test_every_real_row_fits_the_vocabulary(real_model, shared):
    from dataset.examples import tokenize
    tokenizer = Tokenizer.load(real_model)
    for conversation in list(read_rows([shared / "data" / "toolrl.jsonl"]))[:50]:
        assert tokenize(conversation, tokenizer).ids.max() < 262_144
