"""dataset/sampler.py: the held-out rows, the order of the others, steps, and ranks."""
import itertools
import time

import numpy as np
import pytest
import torch
from sample_rows import examples

from data import pack
from dataset.examples import Example
from dataset.sampler import assign_to_ranks, epoch_at, epoch_order, query_hash, steps

# Held-out rows


def test_a_query_stays_on_its_side_whatever_its_case_and_spaces():
    queries = [f"What is {i} plus {i}?" for i in range(2000)]
    hashes = [query_hash(query) for query in queries]
    assert 150 < sum(number < 0.1 for number in hashes) < 250 and all(0 <= number < 1 for number in hashes)
    assert hashes == [query_hash("  " + query.upper().replace(" ", "\n ")) for query in queries]


# Steps


@pytest.mark.parametrize("size", [{"batch_rows": 4}, {"batch_tokens": 300}])
def test_every_row_comes_exactly_once_an_epoch(size):
    lengths = [50 + 7 * i % 90 for i in range(23)]
    seen = [row for rows, _ in steps(lengths, 3, **size, epochs=2) for row in rows]
    assert sorted(seen[:23]) == sorted(seen[23:]) == list(range(23)) and seen[:23] != seen[23:]


@pytest.mark.parametrize("size", [{"batch_rows": 4}, {"batch_tokens": 300}])
def test_a_stream_that_is_resumed_anywhere_goes_on_the_same(size):
    lengths = [50 + 7 * i % 90 for i in range(23)]
    whole = list(steps(lengths, 3, **size, epochs=3))
    for i, (_, position) in enumerate(whole):
        assert list(steps(lengths, 3, **size, epochs=3, start=position)) == whole[i + 1:]


WEIGHTS = np.array([1.0] * 9 + [2.0] * 3 + [0.5] * 7 + [0.3] * 10 + [2.75] * 4)


def test_an_epoch_takes_each_row_as_often_as_its_weight_says():
    counts = np.stack([np.bincount(epoch_order(WEIGHTS, 5, epoch), minlength=len(WEIGHTS)) for epoch in range(200)])
    assert (counts[:, :9] == 1).all() and (counts[:, 9:12] == 2).all()
    assert (counts[0::2, 12:19] + counts[1::2, 12:19] == 1).all(), "of two epochs one has the row"
    assert (np.abs(counts.sum(0) - 200 * WEIGHTS) <= 1).all() and (np.abs(np.cumsum(counts, 0) - np.arange(1, 201)[:, None] * WEIGHTS) < 1 + 1e-9).all()
    assert (np.abs(counts[:, 19:29].sum(1) - 3) <= 1).all(), "the choice is spread evenly over the epochs"
    first, other = epoch_order(WEIGHTS, 5, 0), epoch_order(WEIGHTS, 6, 0)
    assert (first == epoch_order(WEIGHTS, 5, 0)).all() and set(first) != set(other)


def test_weights_of_one_leave_the_order_as_it_is_without_weights():
    assert list(steps([5] * 23, 3, batch_rows=4, epochs=2.5, weights=np.ones(23))) == list(steps([5] * 23, 3, batch_rows=4, epochs=2.5))
    assert (epoch_order(np.ones(23), 3, 1) == np.random.default_rng([3, 1]).permutation(23)).all()


@pytest.mark.parametrize("size", [{"batch_rows": 4}, {"batch_tokens": 300}])
@pytest.mark.parametrize("epochs", [3, 2.4, None])
def test_a_weighted_stream_that_is_resumed_anywhere_goes_on_the_same(size, epochs):
    lengths = [50 + 7 * i % 90 for i in range(len(WEIGHTS))]
    whole = list(itertools.islice(steps(lengths, 3, **size, epochs=epochs, weights=WEIGHTS), 40))
    for i, (_, position) in enumerate(whole):
        assert list(itertools.islice(steps(lengths, 3, **size, epochs=epochs, weights=WEIGHTS, start=position), 39 - i)) == whole[i + 1:]
    seen = [row for rows, _ in whole for row in rows]
    orders = [epoch_order(WEIGHTS, 3, epoch) for epoch in range(3)]
    ends = np.cumsum([len(order) for order in orders])
    assert sorted(seen[:ends[0]]) == sorted(orders[0]) and sorted(seen[ends[0]:ends[1]]) == sorted(orders[1])
    assert epochs is None or len(seen) == len(orders[0]) + len(orders[1]) + round((epochs - 2) * len(orders[2]))


def test_a_stream_is_resumed_far_from_its_start_at_once():
    assert next(steps([9] * 1000, 0, batch_rows=32, start=10**12))[1] == 10**12 + 32
    weights = np.array([0.3] * 7 + [2.0] * 3)
    for position in (0, 1, 7, 8, 16, 10**6, 10**6 + 5):
        epoch, begin = epoch_at(weights, 4, position)
        assert begin <= position < begin + len(epoch_order(weights, 4, epoch)) and (epoch == 0) == (begin == 0)
    assert epoch_at(np.array([0.001]), 0, 3) == (3999, 3)


def test_a_step_keeps_its_size():
    lengths = [50, 400, 60, 70] * 5
    assert all(len(rows) == 4 for rows, _ in steps(lengths, 0, batch_rows=4, epochs=1))
    for rows, _ in steps(lengths, 0, batch_tokens=300, epochs=1):
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= 300


def simply_cut(lengths, seed, batch_rows, epochs):
    """Steps of `batch_rows`, row by row."""
    stream = [int(row) for epoch in range(epochs + 1) for row in epoch_order(np.ones(len(lengths)), seed, epoch)][:epochs * len(lengths)]
    return [(stream[i:i + batch_rows], min(i + batch_rows, len(stream))) for i in range(0, len(stream), batch_rows)]


@pytest.mark.parametrize("batch_rows", [1, 4, 23, 60])
def test_steps_of_rows_are_cut_from_one_epoch_after_the_other(batch_rows):
    assert list(steps([9] * 23, 5, batch_rows=batch_rows, epochs=3)) == simply_cut([9] * 23, 5, batch_rows, 3)


def test_steps_of_tokens_are_full_and_no_row_waits_for_long():
    """Lengths as in real rows; a step of 16,896 tokens, as in the reference recipe."""
    lengths = np.random.default_rng(0).gamma(4, 190, 20_000).astype(int).clip(100, 4096)
    made = [rows for rows, _ in steps(lengths, 0, batch_tokens=16_896, epochs=1)]
    assert all(sum(lengths[rows]) <= 16_896 for rows in made) and lengths.sum() > 0.99 * 16_896 * len(made)
    step_of = {row: i for i, rows in enumerate(made) for row in rows}
    late = [step_of[int(row)] - at * len(made) / len(lengths) for at, row in enumerate(epoch_order(np.ones(len(lengths)), 0, 0))]
    assert max(map(abs, late)) < 12


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_comes_once_an_epoch_on_any_number_of_processes(world):
    made = examples(*(50 + 7 * i % 90 for i in range(60)))
    seen = [source for rank in range(world) for rows, _ in steps([len(e) for e in made], 3, batch_tokens=600, epochs=2)
            for batch in pack([made[row] for row in rows], 200)[rank::world] for source in batch.sources]
    assert sorted(seen) == sorted(2 * [e.source for e in made])


def test_a_million_rows_are_counted_and_resumed_in_seconds():
    lengths = np.full(1_000_000, 700)
    began = time.perf_counter()
    counted = sum(1 for _ in steps(lengths, 0, batch_tokens=16_896, epochs=1))
    assert counted == -(-1_000_000 // 24)
    assert next(steps(lengths, 0, batch_tokens=16_896, start=24 * (counted - 1)))[1] == 1_000_000
    assert next(steps(lengths, 0, batch_rows=32, start=10**12))[1] == 10**12 + 32
    assert time.perf_counter() - began < 20


# Ranks


def loads_of(assignment):
    """The tokens that each rank computes."""
    return [sum(group.computed_tokens for group in groups) for groups in assignment]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
def test_ranks_get_equal_work_and_every_row_is_computed_by_one_alone(ranks, generator):
    sizes = torch.randint(50, 900, (150,), generator=generator).tolist()
    made = examples(*sizes)
    assignment = assign_to_ranks(made, ranks)
    assert sorted(example.source for groups in assignment for _, group in groups for example in group) == sorted(example.source for example in made)
    load = loads_of(assignment)
    assert sum(load) == sum(map(len, made)) and max(load) <= (1.02 if ranks < 64 else 1.1) * sum(load) / ranks


def test_a_prefix_that_all_rows_share_is_computed_once_a_rank(generator):
    made = [Example(np.r_[np.arange(1000), np.full(100 + i, i + 5)].astype(np.int32), np.r_[np.zeros(1050, bool), np.ones(50 + i, bool)], f"r:{i}")
            for i in range(40)]
    whole = sum(loads_of(assign_to_ranks(made, 1)))
    load = loads_of(assign_to_ranks(made, 4))
    assert max(load) - min(load) < 300 and sum(load) < whole + 3 * 1100 and len(load) == 4


def test_fewer_rows_than_ranks_leave_some_without_work():
    assert sorted(loads_of(assign_to_ranks(examples(100, 60), 5))) == [0, 0, 0, 60, 100]
