"""dataset/prefix_sharing.py: which rows share a prefix, and how long it is."""
import numpy as np

from data import pack
from dataset.examples import Example
from dataset.prefix_sharing import group_by_prefix


def test_the_groups_save_as_many_tokens_as_neighbours_can():
    """Two pairs that share much are worth more than four rows that share little."""
    rng = np.random.default_rng(0)
    stem, left, right = (rng.integers(3, 100, n) for n in (40, 300, 300))
    made = [Example(np.concatenate((stem, branch, rng.integers(100, 200, 9))).astype(np.int32), np.arange(349) > 346, f"f:{i}")
            for i, branch in enumerate((left, right, left, right))]
    assert sorted(length for length, _ in group_by_prefix(made)) == [340, 340]


def test_a_prefix_ends_before_the_position_that_predicts_a_token_with_loss():
    ids = np.arange(3, 103, dtype=np.int32)
    made = [Example(ids, np.arange(100) >= first, f"f:{first}") for first in (60, 80, 95)]
    [(prefix, group)] = group_by_prefix(made)
    assert prefix == 59 and len(group) == 3
    [batch] = pack(made, 1000)
    assert batch.loss_tokens == 40 + 20 + 5 and (batch.loss_rows >= prefix).all()
