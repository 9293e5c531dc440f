"""data.py: packing loses nothing and keeps its bounds; rows that share a prefix hold it once; each row is one rank's."""
import itertools

import numpy as np
import pytest
import torch
from sample_rows import examples, rows_with_prefixes

from data import StepLoader, pack, shared_prefix_fraction
from dataset.examples import Example
from dataset.token_cache import read_tokens
from tokenizer import Tokenizer

NO_LOSS = -1           # in `targets_of`

# Packing


def test_packing_cuts_nothing_loses_nothing_and_keeps_the_bound():
    made = examples(30, 50, 20, 90, 10, 10)
    batches = pack(made, 100)
    assert [len(batch.tokens) for batch in batches] == [100, 100, 10]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), torch.from_numpy(np.concatenate([e.ids[:-1] for e in made])).long())
    assert [source for batch in batches for source in batch.sources] == [e.source for e in made]


def test_batches_are_equally_large_and_no_more_than_they_need_be():
    made = examples(*np.random.default_rng(0).integers(5, 60, 200).tolist())
    tokens = sum(map(len, made))
    for most in (100, 1_000, 2_000, tokens - 1, tokens, 10 * tokens):
        sizes = [len(batch.tokens) for batch in pack(made, most, share_prefixes=False)]
        assert sum(sizes) == tokens and len(sizes) <= tokens / (most - 60) + 1 and max(sizes) <= most
        assert len(sizes) > 20 or max(sizes) - min(sizes) <= 2 * 60
    alike = rows_with_prefixes((300, [320] * 20), (0, [200, 200]))                 # equal sizes would part the twenty, and compute 300 tokens again
    assert [len(batch.tokens) for batch in pack(alike, 800)] == [700, 400]


def test_targets_are_the_next_ids_that_carry_loss_and_never_cross_a_document():
    made = examples(4, 3)
    batch = pack(made, 100)[0]
    first, second = made
    assert batch.loss_rows.tolist() == [2, 3, 5, 6] and batch.targets.tolist() == [*first.ids[3:], *second.ids[2:]]
    tokens, positions, documents, rows, targets = batch.to(torch.device("cpu"))
    assert all(map(torch.equal, (tokens, positions, documents, rows, targets),
                   (batch.tokens, batch.positions, batch.documents, batch.loss_rows, batch.targets)))
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2] and batch.documents.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.loss_tokens == 4


def test_a_document_longer_than_the_bound_stands_alone():
    assert [len(batch.tokens) for batch in pack(examples(5, 200, 5), 100)] == [5, 200, 5]


def targets_of(batch):
    """The target of every token of a batch."""
    return torch.full_like(batch.tokens, NO_LOSS).index_copy(0, batch.loss_rows, batch.targets)


def unpacked(batch):
    """Of every row of a batch its whole tokens and its own targets, by the model's rule for documents that continue others."""
    rows, prefix = [], None
    lengths = torch.unique_consecutive(batch.documents, return_counts=True)[1].tolist()
    parts = [list(zip(*(x.tolist() for x in part), strict=True)) for part in
             zip(batch.tokens.split(lengths), targets_of(batch).split(lengths), batch.positions.split(lengths), strict=True)]
    for i, part in enumerate(parts):
        first = part[0][2]
        assert [p for _, _, p in part] == list(range(first, first + len(part)))
        if first == 0:
            prefix = part
        if first or i + 1 == len(parts) or parts[i + 1][0][2] == 0:             # a shared prefix is no row itself
            rows.append(([t for t, _, _ in (prefix[:first] if first else []) + part], [target for _, target, _ in part]))
    return rows


def test_rows_that_share_a_prefix_hold_it_once():
    made = rows_with_prefixes((50, [60, 70, 65]), (0, [40]), (40, [45, 80]))
    rng = np.random.default_rng(3)
    made = [made[i] for i in rng.permutation(len(made))]
    [batch] = pack(made, 1000)
    assert len(batch.tokens) == 50 + 10 + 20 + 15 + 40 + 40 + 5 + 40 and len(pack(made, 1000, share_prefixes=False)[0].tokens) == 360
    rows = unpacked(batch)
    by_source = {e.source: e for e in made}
    assert sorted(batch.sources) == sorted(by_source) and len(rows) == len(made)
    for (tokens, targets), source in zip(rows, batch.sources, strict=True):
        example = by_source[source]
        assert tokens == example.ids[:-1].tolist()
        assert [t for t in targets if t != NO_LOSS] == example.ids[example.loss_mask].tolist()
    assert batch.loss_tokens == 2 * len(made)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bound", [90, 200, 1000])
def test_sharing_loses_no_row_and_no_loss_whatever_rows_share(seed, bound, monkeypatch):
    """Random trees of prefixes: rows that branch off one another anywhere."""
    monkeypatch.setattr("dataset.prefix_sharing.MIN_PREFIX_TOKENS", 3)
    rng = np.random.default_rng(seed)
    made = []
    for i in range(40):
        parent = made[rng.integers(len(made))].ids if made and rng.random() < 0.8 else np.zeros(0, np.int32)
        kept = parent[:rng.integers(len(parent) + 1)]
        ids = np.concatenate((kept, rng.integers(3, 6, rng.integers(2, 60)))).astype(np.int32)
        first = rng.integers(1, len(ids))
        made.append(Example(ids, (np.arange(len(ids)) >= first) & (rng.random(len(ids)) < 0.7), f"f:{i}"))
    batches, by_source = pack(made, bound), {e.source: e for e in made}
    assert sorted(source for batch in batches for source in batch.sources) == sorted(by_source)
    assert all(len(batch.tokens) <= max(bound, *(len(by_source[source]) for source in batch.sources)) for batch in batches)
    assert sum(len(batch.tokens) for batch in batches) < sum(map(len, made))
    for batch in batches:
        for (tokens, targets), source in zip(unpacked(batch), batch.sources, strict=True):
            example = by_source[source]
            assert tokens == example.ids[:-1].tolist()
            own = example.ids[len(example.ids) - len(targets):][example.loss_mask[len(example.ids) - len(targets):]]
            assert [t for t in targets if t != NO_LOSS] == own.tolist() and example.loss_mask[1:].sum() == len(own)


def test_thousands_of_unlike_rows_are_packed():
    made = rows_with_prefixes(*((0, [40]) for _ in range(3_000)), (50, [60, 70]))
    assert sum(len(batch.tokens) for batch in pack(made, 10_000)) == 3_000 * 40 + 80


def test_rows_that_share_little_or_nothing_are_packed_as_they_come():
    made = rows_with_prefixes((20, [30, 50, 20]), (0, [90, 10, 10]))
    for shared, plain in zip(pack(made, 100), pack(made, 100, share_prefixes=False), strict=True):
        assert all(torch.equal(getattr(shared, name), getattr(plain, name)) for name in ("tokens", "positions", "documents", "loss_rows", "targets"))
        assert torch.equal(shared.keys(), plain.keys())


def test_a_tokens_key_depends_on_its_row_up_to_it_alone():
    """By Python's own integers; a row's tokens stand side by side, or go on where a shared prefix ends."""
    made = rows_with_prefixes((40, [50, 60]), (0, [9]))
    for share, tokens in ((True, 40 + 10 + 20 + 9), (False, 119)):
        [batch] = pack(made, 1000, share)
        before, sums = [], {}
        for token, position, key in zip(batch.tokens.tolist(), batch.positions.tolist(), batch.keys().tolist(), strict=True):
            before = [*before[:position], token]
            total = sum((t + 1) * pow(6364136223846793005, n, 2**64) for n, t in enumerate(before, start=1)) % 2**64
            assert key % 2**32 == total >> 32
            assert sums.setdefault(key, total) == total
        assert len(batch.keys()) == tokens and len(sums) == 40 + 10 + 20 + 9


# The loader of steps


@pytest.fixture(scope="module")
def dataset(demo):
    return read_tokens([str(demo / "rows.jsonl")], demo / "model", Tokenizer.load(demo / "model"), None, 100, False)


def loaders(dataset, world_size, share_prefixes=True):
    return [StepLoader(dataset, rank, world_size, 2_000, share_prefixes) for rank in range(world_size)]


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_a_loader_gives_every_row_of_a_step_to_one_rank_alone(dataset, world_size, share_prefixes):
    """Of 20 ranks there are two groups."""
    ranks = [list(loader.steps(3, 0, seed=1, batch_rows=60)) for loader in loaders(dataset, world_size, share_prefixes)]
    for steps in zip(*ranks, strict=True):
        rows, position = steps[0].rows, steps[0].position
        assert all((step.rows, step.position, step.loss_tokens) == (rows, position, steps[0].loss_tokens) for step in steps)
        batches = [batch for step in steps for batch in step.batches]
        assert sorted(source for batch in batches for source in batch.sources) == sorted(dataset.source(row) for row in rows)
        assert sum(batch.loss_tokens for batch in batches) == steps[0].loss_tokens == sum(dataset[row].loss_tokens for row in rows)
        tokens = sum(len(batch.tokens) for batch in batches)
        assert tokens < sum(dataset.lengths[row] for row in rows) if share_prefixes else tokens == sum(dataset.lengths[row] for row in rows)
        assert max(len(batch.tokens) for batch in batches) <= 2_000


@pytest.mark.parametrize("world_size", [1, 20])
def test_a_loader_goes_on_from_any_position(dataset, world_size):
    loader = loaders(dataset, world_size)[-1]
    steps = list(loader.steps(6, 0, seed=1, batch_tokens=3_000))
    for i, step in enumerate(steps[:-1]):
        later = list(loader.steps(5 - i, step.position, seed=1, batch_tokens=3_000))
        assert [(a.rows, a.position) for a in later] == [(b.rows, b.position) for b in steps[i + 1:]]
        for a, b in itertools.zip_longest(later[0].batches, steps[i + 1].batches):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_every_held_out_row_is_one_ranks(dataset, world_size):
    examples = dataset.split(0.2)[1]
    packed = [source for loader in loaders(dataset, world_size) for batch in loader.pack_held_out(examples) for source in batch.sources]
    assert sorted(packed) == sorted(example.source for example in examples) and len(packed) > 60


def test_the_fraction_of_shared_prefixes_is_what_steps_need_not_compute():
    made = rows_with_prefixes((60, [70] * 4))
    assert shared_prefix_fraction(made, 4, 1000) == pytest.approx(1 - (60 + 4 * 10) / 280)
    assert shared_prefix_fraction(made, 2, 1000) == pytest.approx(1 - 2 * (60 + 2 * 10) / 280)
    assert shared_prefix_fraction(made, 4, 80) == pytest.approx(1 - 2 * (60 + 2 * 10) / 280), "a prefix is computed in each batch that needs it"
    assert shared_prefix_fraction([], 4, 1000) == 0
