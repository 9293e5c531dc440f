"""benchmarks/attention.py: it runs from end to end where there is no GPU, and does not time what is wrong."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import INTERPRETED, ROOT, load

PROGRAM = ROOT / "benchmarks" / "attention.py"


@pytest.fixture(scope="module")
def bench():
    return load(PROGRAM, "bench_attention")


@pytest.fixture
def case(bench, generator):
    """Documents and, with q, k, v and dO, the exact O and gradients."""
    case = bench.Case([9, 30, 1, 17], 8, (4, 1, 16), torch.float32, torch.device("cpu"))
    given = [torch.randn(57, n, 16, generator=generator) for n in (4, 1, 1, 4)]
    exact = bench.gradients(bench.ours_by_pytorch(case).run, given[:3], given[3])
    return case, given, exact


@pytest.mark.slow
@INTERPRETED
def test_every_way_that_can_run_here_is_right_and_timed(bench, tmp_path, monkeypatch):
    subprocess.run([sys.executable, PROGRAM, "--device", "cpu", "--tiny", "--out", tmp_path], env=os.environ | {"TRITON_INTERPRET": "1"},
                   check=True, capture_output=True)
    result = json.loads((tmp_path / "cpu_attention.json").read_text())
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from tables import attention_table
    table = attention_table(result).splitlines()
    assert table[0] == "| forward + backward, ms | window 8 | window full |" and "| varlen | failed | failed |" in table
    assert result["windows"].keys() == {"8", "full"} and result["versions"]["torch"] == torch.__version__
    for ways in result["windows"].values():
        assert ways.keys() == bench.WAYS.keys()
        for way, made in ways.items():
            assert "CPU" in made["failed"] if way in ("varlen", "flex") else all(made[phase]["ms"] > 0 for phase in bench.PHASES), (way, made)


@pytest.mark.parametrize("window", [8, None])
def test_flex_attention_whose_gradients_want_a_gpu_has_the_right_mask(window, bench, case, generator):
    case, (q, k, v, _) = bench.Case(case[0].lengths, window, *list(vars(case[0]).values())[2:]), case[1]
    way, exact = bench.flex(case), bench.ours_by_pytorch(case).run(q, k, v)
    torch.testing.assert_close(way.back(way.run(*(way.layout(x) for x in (q, k, v)))), exact)


def test_a_way_that_is_wrong_is_not_timed(bench, case):
    case, given, exact = case
    clock, right = bench.Clock(case.device, 0), bench.padded(case)
    assert case.pairs == sum(min(i + 1, 8) for length in case.lengths for i in range(length))
    assert bench.measure(right, given, exact, case, clock).keys() >= set(bench.PHASES)
    for wrong in (lambda q, k, v: right.run(q, k, v) * 1.1, lambda q, k, v: right.run(q, k, v.detach() + (v - v.detach()) / 2),
                  lambda q, k, v: right.run(q, k, v) + torch.nan):
        assert bench.measure(bench.Way(wrong, right.layout, right.back), given, exact, case, clock).keys() == {"wrong"}
