"""benchmarks/step.py runs from end to end on a CPU; rungs and peers take the same step, and one that does not is called wrong."""
import argparse
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, load

PROGRAM = ROOT / "benchmarks" / "step.py"
FLAGS = ["--device", "cpu", "--tiny", "--tokens", "300", "--steps", "2"]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield load(PROGRAM, "bench_step")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.slow
def test_the_ladder_and_the_peers_run_and_agree(tmp_path):
    subprocess.run([sys.executable, PROGRAM, *FLAGS, "--out", tmp_path], check=True, capture_output=True)
    made = json.loads((tmp_path / "cpu_step.json").read_text())
    rungs = [rung for name, rung in made["ladder"].items() if name != "every parameter"]
    assert len(rungs) == 6 and not any("failed" in rung or "wrong" in rung for rung in made["ladder"].values())
    for rung in rungs:
        assert rung["losses"] == pytest.approx(rungs[0]["losses"], rel=1e-3) and rung["tokens_per_second"] > 0
    assert len(made["peers"]) == 3 and not any("failed" in peer or "wrong" in peer for peer in made["peers"].values())
    for name, peer in made["peers"].items():
        same = made["ladder"]["every parameter"] if name == "full" else rungs[0]
        assert peer["losses"] == pytest.approx(same["losses"], rel=1e-3)
        assert peer["grad_norms"] == pytest.approx(same["grad_norms"], rel=5e-2) and min(peer["grad_norms"]) > 0
        assert peer["tflops"] * peer["seconds"] == pytest.approx(same["tflops"] * same["seconds"])      # the same operations count


def test_a_peer_whose_rows_attend_to_each_other_is_called_wrong(bench, monkeypatch):
    def one_step(step, steps, device):
        loss, norm = step(0)
        return {"losses": [loss.item()], "grad_norms": [norm.item()], "seconds": 1.0, "peak_gib": 1.0}

    monkeypatch.setattr(bench, "timed", one_step)
    args = argparse.Namespace(device="cpu", steps=1)
    right = bench.SMALL_PEERS["packed"]
    assert "wrong" not in bench.peer(bench.TINY, args, 1_200, right)
    made = bench.peer(bench.TINY, args, 1_200, replace(right, use_cache=True))
    assert "losses of tokens" in made["wrong"]
    assert f"WRONG: {made['wrong']}" in bench.line(made)


def test_the_tokens_losses_decide_even_where_the_mean_is_right(bench):
    cpu = torch.device("cpu")
    exact, error = bench.first_losses(bench.TINY, cpu, 300)
    mean = exact.mean().item()
    assert 0 < error < 0.05 and len(exact) == sum(row.loss_tokens for row in bench.rows(300, 500, 0))
    assert bench.fault(bench.TINY, cpu, 300, mean, exact + error) == {}
    for loss, tokens in ((mean + 4 * error, exact), (float("nan"), exact), (mean, exact.roll(1)), (mean, exact[1:])):
        assert "bf16 explains" in bench.fault(bench.TINY, cpu, 300, loss, tokens)["wrong"]
    assert bench.fault(bench.TINY, cpu, 300, mean + 4 * error)["wrong"].startswith("loss")


def test_a_second_call_measures_what_the_first_did_not(bench, tmp_path, monkeypatch):
    def row(name):
        measured.append(name)
        if name == "peer" and not failed:
            failed.append(name)
            raise RuntimeError("out of memory")
        return {"seconds": 1.0, "tokens_per_second": 1.0, "mfu": None, "peak_gib": 1.0, "losses": [1.0]}

    failed = []
    monkeypatch.setattr(bench, "peer", lambda *_: row("peer"))
    monkeypatch.setattr(bench, "ours", lambda *_: row("ours"))
    monkeypatch.setattr(bench, "SMALL_PEERS", {"first": None, "second": None})
    args = argparse.Namespace(device="cpu", steps=1, tokens=300, tiny=True, parts="peers", few_peers=False, go_on=True,
                              out=str(tmp_path), save=False)
    for parts, tokens, expected in (("peers", 300, ["peer"] * 2), ("peers", 300, ["peer"]), ("ladder", 300, ["ours"] * 7),
                                    ("ladder,peers", 300, []), ("peers", 200, ["peer"] * 2)):       # other sizes: anew
        measured = []
        bench.main(argparse.Namespace(**vars(args) | {"parts": parts, "tokens": tokens}))
        assert measured == expected, parts
    assert json.loads((tmp_path / "cpu_step.json").read_text())["ladder"] == {}
