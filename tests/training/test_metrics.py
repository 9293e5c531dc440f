"""training/metrics.py: the arithmetic that is counted, and the profile."""
import itertools
import json
import re

import pytest
import torch
from test_train import FULL, run

from data import pack
from dataset.examples import tokenize
from dataset.rows import read_rows
from lora import LoRAConfig, wrap
from storage.pretrained import load_model
from tokenizer import Tokenizer
from training.loss import loss_sum
from training.metrics import flops


@pytest.mark.parametrize("mode", [FULL, ("--lora-rank", 16)], ids=["full", "lora"])
def test_the_arithmetic_that_is_counted_is_what_pytorch_counts(demo, mode):
    """Beside attention, whose tiles compute what the mask then hides."""
    from torch.utils.flop_counter import FlopCounterMode
    tokenizer, model = Tokenizer.load(demo / "model"), load_model(demo / "model", torch.float32).train().requires_grad_()
    if mode != FULL:
        wrap(model, LoRAConfig(16))
    rows = [tokenize(row, tokenizer) for row in itertools.islice(read_rows([demo / "rows.jsonl"]), 6)]
    batch = pack(rows, 10_000)[0]
    with FlopCounterMode(display=False) as counted:
        loss_sum(model, batch).backward()
    seen = sum(int((batch.positions + 1).clamp(max=window or 10_000).sum()) for window in model.config.windows)
    ours = flops(model, batch)
    assert 0.8 < ours / counted.get_total_flops() < 1.1
    assert 12 * model.config.heads[0] * model.config.heads[2] * seen < 0.4 * ours       # attention's share does not hide the rest


def test_a_profile_writes_a_trace_and_prints_what_took_longest(demo, tmp_path, capsys):
    run(demo, tmp_path / "run", *FULL, "--steps", 6, "--profile", 2)
    said = capsys.readouterr().out
    assert len(re.findall(r"^ +\d+\.\d% +[\d.]+ ms a step +\d+ calls  \S", said, flags=re.MULTILINE)) == 10
    assert any("mm" in event.get("name", "") for event in json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"])
