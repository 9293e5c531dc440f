"""Recorded micro-batches, padded and computed in memory that stays in place, give plain losses and gradients."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, INTERPRETER
from test_train import BY_KERNELS

import train
from data import pack
from dataset.examples import Example
from lora import LoRAConfig, choose_kernels, flat_adapters, wrap
from ops.attention_tables import tables
from ops.cross_entropy import IGNORE, linear_cross_entropy
from storage import pretrained
from storage.pretrained import load_model
from training.cuda_graph import RecordedMicroBatches, Recording, pad_tables
from training.distributed import AllReduceGradients

MODES = {"lora": {"rank": 4, "dropout": 0.3}, "full": None}


def batches_of(lengths, without_loss=0.7):
    """A batch of two rows for each pair of lengths.  without_loss: share of a row before any loss."""
    generator = np.random.default_rng(0)

    def row(length):
        trained = np.arange(length + 1) > without_loss * length
        return Example(generator.integers(110, 1000, length + 1).astype(np.int32), trained, "a row")
    return [pack([row(length) for length in pair], 4096)[0] for pair in lengths]


@pytest.fixture
def batches():
    """Two of two short rows each, the one a little longer than the other."""
    return batches_of([(18, 11), (18, 12)])


def made(demo, mode, dtype, device, choice):
    model = load_model(demo / "model", dtype, device, master_dtype=torch.float32 if mode is None else dtype).train()
    if mode is not None:
        wrap(model, LoRAConfig(**mode), torch.Generator().manual_seed(0))
        choose_kernels(model, choice, 64)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():            # at its start an adapter's A has no gradient
            if name.endswith("lora_b"):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 100)
    return model


@pytest.mark.parametrize("tokens, first, later", [
    (20, 1000, 64), (900, 1000, 960), (961, 1000, 1000), (1000, 1000, 1000),            # 1000: a full micro-batch
    (1001, 1024, 1024), (1025, 1152, 1152)])                                            # a row that is larger
def test_a_full_micro_batch_is_padded_by_few_tokens(demo, tokens, first, later):
    recorded = RecordedMicroBatches(made(demo, None, torch.float32, "cpu", "torch"), max_tokens=1000)
    [batch] = batches_of([(tokens - 10, 10)])
    assert len(batch.tokens) == tokens and recorded._padded_tokens(tokens) == first
    recorded.recordings["a size"] = None
    assert recorded._padded_tokens(tokens) == later


@pytest.mark.parametrize("idle", [0, 1, 64, 150])
def test_a_batch_is_filled_by_short_documents_that_waste_no_block(batches, idle):
    [batch] = batches[:1]
    filled = batch.filled(len(batch.tokens) + idle)
    lengths, longer = (each.documents.unique_consecutive(return_counts=True)[1].tolist()
                       for each in (batch, filled))
    assert longer == lengths + [64] * (idle // 64) + [idle % 64] * (idle % 64 > 0)
    added = slice(len(batch.tokens), None)
    assert (filled.tokens[added] == 0).all() and (filled.loss_rows < len(batch.tokens)).all()
    for size in (16, 32, 64):
        plain, more = (tables(documents, None, torch.device("cpu"), block_q=size, block_k=size)
                       for documents in (lengths, longer))
        assert len(more.queries) - len(plain.queries) == len(more.keys) - len(plain.keys) == -(-idle // size)


def test_blocks_of_no_tokens_come_after_those_that_have_some():
    plan = tables([70, 200, 9], None, torch.device("cpu"), longest_first=True)
    padded = pad_tables(plan, 279)
    for mine, of_tokens in ((padded.queries, plan.queries), (padded.keys, plan.keys)):
        assert torch.equal(mine[:len(of_tokens)], of_tokens) and len(mine) > len(of_tokens) and not mine[len(of_tokens):].any()


@pytest.mark.parametrize("idle", [50, 150])
def test_a_filled_batch_gives_the_same_loss_and_gradients(demo, batches, idle):
    model, seen = made(demo, None, torch.float32, "cpu", "torch"), []
    for batch in (batches[0], batches[0].filled(len(batches[0].tokens) + idle)):
        model.zero_grad()
        loss = train.loss_sum(model, batch)
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(batch.tokens) == len(batches[0].tokens) + idle
    assert batch.loss_tokens == batches[0].loss_tokens
    for filled, plain in zip(*seen, strict=True):
        torch.testing.assert_close(filled, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


def test_a_row_that_is_there_again_without_loss_changes_nothing(demo):
    """Of a token that carries loss itself, in a batch where all do."""
    model, seen = made(demo, None, torch.float32, "cpu", "torch"), []
    [batch] = batches_of([(18, 11)], without_loss=0)
    tokens, positions, documents, rows, targets = batch.to(torch.device("cpu"))
    assert len(rows) == len(tokens) == 29
    for more in (0, 64):
        model.zero_grad()
        own = F.pad(rows, (0, more)), F.pad(targets, (0, more), value=IGNORE)
        loss = model(tokens, positions, documents, *own)
        loss.backward()
        seen.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for padded, plain in zip(*seen, strict=True):
        assert plain.any()
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("device", ["cpu", INTERPRETER, GPU], ids=["torch", "interpreted", "cuda"])
def test_rows_that_carry_no_loss_give_none_and_no_gradient(device, generator, request):
    backend = "torch" if "torch" in request.node.callspec.id else "triton"
    hidden, weight = torch.randn(9, 32, generator=generator).to(device), torch.randn(1100, 32, generator=generator).to(device)
    targets, carries = torch.randint(1100, (9,), generator=generator).to(device), torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool, device=device)
    seen = []
    for rows, every in ((torch.arange(9, device=device), True), (carries.nonzero().squeeze(1), False)):
        h, w = hidden[rows].requires_grad_(), weight.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, targets.masked_fill(~carries, IGNORE)[rows], backend=backend, every_row=every)
        loss.backward()
        dh = torch.zeros_like(hidden).index_copy(0, rows, h.grad)
        seen.append((loss.detach(), dh, w.grad))
    assert not seen[0][1][~carries].any()
    for every, those in zip(*seen, strict=True):
        torch.testing.assert_close(every, those, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("device", [INTERPRETER, GPU])
@pytest.mark.parametrize("mode, max_tokens", [("lora", 16), ("full", 16), ("lora", 30)])   # 30: one is full
def test_recorded_passes_add_the_gradients_of_plain_ones(demo, batches, monkeypatch, mode, max_tokens, device):
    """Batches of one size share a recording; on a CPU "recorded" is called again on memory that stays."""
    dtype, near = (torch.float32, 1e-4) if device == "cpu" else (torch.bfloat16, 0.03)      # the interpreter's bf16 products are wrong
    model = made(demo, MODES[mode], dtype, device, "triton")
    model.set_backends(BY_KERNELS)
    gradients = AllReduceGradients(model, 1, recorded=True)
    recorded = RecordedMicroBatches(model, max_tokens)
    monkeypatch.setattr("training.cuda_graph.size_for", lambda count, steps: -(-count // 16) * 16)

    def of_each(add):
        seen = []
        for seed, batch in enumerate([*batches, batches[0]]):
            loss = add(batch, seed)
            seen += [loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
            if seed == 1:                                                                   # a step ends
                gradients.zero()
        gradients.zero()
        return seen

    def plain(batch, seed):
        loss = train.loss_sum(model, batch, seed)
        loss.backward()
        return loss.detach()

    for mine, theirs in zip(of_each(recorded), of_each(plain), strict=True):
        scale = theirs.abs().max().item()
        assert scale > 0 and (mine.float() - theirs.float()).abs().max().item() <= near * scale
    assert len(recorded.recordings) == 1


def test_a_replay_finds_the_masters_rounded_after_each_step(demo, batches, monkeypatch):
    """A replay runs nothing of Python's, and so rounds nothing itself."""
    model = made(demo, MODES["lora"], torch.bfloat16, "cpu", "torch")
    model.set_backends(BY_KERNELS)
    gradients = AllReduceGradients(model, 1, recorded=True)
    flat, recorded, seen = flat_adapters(model), RecordedMicroBatches(model), []

    def recording(inputs):
        return Recording(inputs, torch.zeros(()), lambda: seen.append(flat.rounded.clone()))
    monkeypatch.setattr(recorded, "_record", recording)
    optimizer = torch.optim.AdamW(gradients.parameters, lr=0.1, fused=True)
    for step in range(3):
        recorded(batches[0])
        assert torch.equal(seen[-1], flat.masters.bfloat16()) and (step == 0 or not torch.equal(*seen[-2:]))
        flat.masters.grad.fill_(1.0)
        optimizer.step()
        gradients.zero()


def test_attention_without_kernels_is_refused(demo, batches):
    with pytest.raises(ValueError, match="--cuda-graph needs attention by kernels"):
        RecordedMicroBatches(made(demo, None, torch.float32, "cpu", "torch"))(batches[0])


@pytest.mark.parametrize("more", [["--device", "cpu"], ["--device", "cuda", "--full", "--shard"], ["--device", "cuda", "--dtype", "fp32"]])
def test_what_cannot_be_recorded_is_refused(monkeypatch, capsys, more):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(pretrained, "multiplies_bf16", lambda device: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.parse_args(["--model", "m", "--data", "d", "--cuda-graph", *more])
    assert "--cuda-graph needs --device cuda" in capsys.readouterr().err
