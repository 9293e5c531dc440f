"""Many processes: rows dealt in teams, what nodes agree on before they go on, and what docs/scaling.md computes."""
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run

import train
from data import pack
from dataset.examples import Example, tokenize
from dataset.prefix_sharing import group_by_prefix, lexicographic_order
from dataset.rows import read_rows
from dataset.sampler import MAX_GROUP_RANKS, assign_to_ranks, rank_group, rank_group_rows
from lora import LoRAConfig, wrap
from model import Gemma3, GemmaConfig
from tokenizer import Tokenizer
from training import distributed
from training.metrics import flops

ROOT = Path(__file__).resolve().parents[2]
DOC = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def examples(demo):
    tokenizer = Tokenizer.load(demo / "model")
    return [tokenize(row, tokenizer) for row in read_rows([demo / "rows.jsonl"])]


# Groups of ranks


def shares(examples, rows, processes):
    """Of each process the groups that it computes of these rows, found as `data.StepLoader` finds them."""
    lengths, order = [len(example) for example in examples], np.argsort(lexicographic_order(examples))
    made = []
    for rank in range(processes):
        group = rank_group(rank, processes)
        own = rank_group_rows(rows, lengths, order, rank, processes)
        made.append(assign_to_ranks([examples[row] for row in own], group.size)[group.position])
    return made


@pytest.mark.parametrize("processes", [1, 2, 16, 17, 37, 64])
def test_every_row_is_computed_by_one_process_alone(examples, processes):
    rows = list(range(300)) + [7, 8]                               # a step across two epochs has some rows twice
    seen = Counter(example.source for share in shares(examples, rows, processes) for _, group in share for example in group)
    assert seen == Counter(examples[row].source for row in rows)


def test_more_processes_than_rows_leave_some_without_work(examples):
    made = shares(examples, [3, 5, 9], 40)
    assert sorted(example.source for share in made for _, group in share for example in group) == sorted(examples[i].source for i in (3, 5, 9))


@pytest.mark.parametrize("processes", [17, 48, 100])
def test_all_groups_of_ranks_are_filled_and_none_is_larger_than_allowed(processes):
    groups = [rank_group(rank, processes) for rank in range(processes)]
    sizes = Counter(group.number for group in groups)
    assert len(sizes) == groups[0].groups and max(sizes.values()) <= MAX_GROUP_RANKS
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert all(group.size == sizes[group.number] for group in groups)
    assert sorted((group.number, group.position) for group in groups) == [(n, i) for n in sorted(sizes) for i in range(sizes[n])]


def test_groups_of_ranks_divide_the_work_evenly_and_keep_rows_that_share_a_prefix_together(examples):
    rows = list(range(len(examples)))
    loads = [sum(group.computed_tokens for group in share) for share in shares(examples, rows, 32)]
    assert max(loads) < 1.15 * sum(loads) / 32
    together, apart = sum(group.computed_tokens for group in group_by_prefix(examples)), sum(map(len, examples))
    assert together <= sum(loads) < together + 0.5 * (apart - together)


# What nodes agree on


def start(demo, out, rank, port, *more, restarts=0):
    """One of two processes of train.py, as torchrun starts it."""
    flags = ["--model", demo / "model", "--data", demo / "rows.jsonl", "--out", out, "--device", "cpu", "--dtype", "fp32", "--batch-rows", 4,
             "--eval-rows", 0, "--eval-every", 0, "--eval-calls", 0, "--save-every", 1, "--lora-rank", 4, "--steps", 3, *more]
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
           "TORCHELASTIC_RESTART_COUNT": str(restarts), "TORCHELASTIC_RUN_ID": "one", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def two_steps(demo, tmp_path_factory):
    """A run of three steps that was stopped after its second: its last checkpoint is gone."""
    out = tmp_path_factory.mktemp("run") / "run"
    flags = ["--model", demo / "model", "--data", demo / "rows.jsonl", "--out", out, "--device", "cpu", "--dtype", "fp32", "--batch-rows", 4,
             "--eval-rows", 0, "--eval-every", 0, "--eval-calls", 0, "--save-every", 1, "--lora-rank", 4, "--steps", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RUN_ID", "one")
        assert train.main(train.parse_args(list(map(str, flags)))) == 0
    shutil.rmtree(out / "checkpoints" / "step-000003")
    return out


def test_nodes_that_count_their_restarts_differently_all_go_on(demo, two_steps, tmp_path):
    out, port = tmp_path / "run", free_port()
    shutil.copytree(two_steps, out)
    processes = [start(demo, out, rank, port, restarts=rank) for rank in (0, 1)]
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "at step 2" in said[0][0]
    losses = [[json.loads(line).get("loss") for line in (path / "log.jsonl").read_text().splitlines()] for path in (out, two_steps)]
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=1e-4)


def test_a_node_that_sees_another_folder_says_so(demo, two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    port = free_port()
    processes = [start(demo, out, rank, port, "--resume") for rank, out in enumerate((tmp_path / "run", tmp_path / "elsewhere"))]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert re.search(r"rank 1: .*elsewhere/checkpoints/step-000002 exists only where rank 0 runs: --out must be a folder that all", said[1])


def test_each_start_under_one_torchrun_has_keys_of_its_own(monkeypatch):
    """One store, as torchrun keeps it; what the first start left in it the second does not see."""
    store, seen = torch.distributed.HashStore(), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, store, **_: seen.append(store))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        distributed.init_distributed("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")                                    # a second machine, which may have counted otherwise
    distributed.init_distributed("cpu")
    seen[0].set("address of rank 1", "gone")
    assert [start.check(["address of rank 1"]) for start in seen] == [True, False, True]


# The benchmark, and the document


@pytest.mark.slow
def test_the_benchmark_measures_every_way(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/scaling.py"), "--device", "cpu", "--tiny", "--tokens", "1000", "--steps", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    made = json.loads((tmp_path / "cpu_scaling.json").read_text())["measured"]
    assert len(made) == 2 + 4 * 2 and all(one["seconds"] > 0 and one["largest_over_mean"] >= 1 for one in made)
    by = {(one["way"], one["processes"], one["scaling"]): one for one in made}
    assert by["full", 2, "weak"]["tokens"] > 1.3 * by["full", 2, "strong"]["tokens"] and by["full", 1, "strong"]["bytes"] == 0
    config = GemmaConfig(vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)
    numbers = sum(p.numel() for p in Gemma3(config).parameters())
    assert by["full", 2, "strong"]["bytes"] == 4 * (numbers + 3)             # an all-reduce of two sends what it has once


def test_the_document_shows_what_its_code_prints():
    code, shown = re.search(r"```python\n(.*?)\n```\n+```\n(.*?)\n```", DOC, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names := {})                                         # the document's own code
    assert printed.getvalue().strip() == shown.strip()
    for way, full in (("lora", False), ("full", True)):
        with torch.device("meta"):
            model = Gemma3(GemmaConfig(), torch.bfloat16)
        if not full:
            wrap(model, LoRAConfig())
        rows = [Example(np.arange(401, dtype=np.int32) + 1000 * i, np.arange(401) > 360, "") for i in range(42)]
        batch = pack(rows, 16_896)[0]
        assert flops(model, batch) / len(batch.tokens) == pytest.approx(names["FLOPS"][way], rel=0.01)
        assert 4 * sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(names["BYTES"][way], rel=0.01)


def test_every_flag_the_document_names_exists(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    text = capsys.readouterr().out + torch.distributed.run.get_args_parser().format_help()
    scheduler = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--requeue", "--signal", "--kill-on-bad-exit", "--save"}
    for flag in set(re.findall(r"--[a-z][a-z-]+", DOC)) - scheduler:
        assert flag in text, flag
