"""dataset/token_dataset.py: rows of several files as one sequence, with their sources' weights."""
import json

import pytest
from sample_rows import row

from dataset.rows import read_sources
from dataset.sampler import query_hash, split_held_out
from dataset.token_cache import read_tokens
from tokenizer import Tokenizer


@pytest.fixture
def read(demo):
    def read(*sources):
        return read_tokens(sources, demo / "model", Tokenizer.load(demo / "model"), None, 100, False)
    return read


@pytest.fixture
def files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(row(query=f"{name} {i}?")) + "\n" for i in range(100)))
    return tmp_path / "a", tmp_path / "b"


def test_rows_have_their_sources_weight_and_the_held_out_ones_are_the_same(read, files):
    a, b = files
    plain, weighted = read(str(a), str(b)), read(f"{a}*2", f"{b}*0.5")
    assert plain.weights.tolist() == [1] * 200
    assert [(weighted.source(i).partition(":")[0], weighted.weights[i]) for i in range(200)] == [("a", 2)] * 100 + [("b", 0.5)] * 100
    for parts in zip(plain.split(0.1), weighted.split(0.1), strict=True):
        one, other = ([part.source(i) for i in range(len(part))] for part in parts)
        assert one == other
    assert 0 < len(plain.split(0.1)[1]) < 50 and plain.split(0.1)[0].select([0]).weights.tolist() == [1]


def test_rows_are_held_out_alike_whether_they_are_read_as_tokens_or_as_conversations(read, files):
    sources = [str(file) for file in files]
    rows = list(read_sources(sources))
    train, held_out = split_held_out([query_hash(row.query) for row in rows], 0.1)
    tokens = read(*sources).split(0.1)
    for part, indices in zip(tokens, (train, held_out), strict=True):
        assert [part.source(i) for i in range(len(part))] == [rows[i].source for i in indices]
    assert [tokens[1].conversation(i) for i in range(len(tokens[1]))] == [rows[i] for i in held_out]
