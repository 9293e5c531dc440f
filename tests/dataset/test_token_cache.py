"""dataset/token_cache.py: the same examples as row by row, by any number of processes; made once, whole, and again when anything changed."""
import errno
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, torchrun

import train
from dataset import token_cache
from dataset.errors import RowError, SkippedRows
from dataset.examples import tokenize
from dataset.rows import read_rows
from dataset.sampler import query_hash, split_held_out
from tokenizer import DEVELOPER_TEXT, Tokenizer
from training.load_data import load_datasets
from training.run import Run


@pytest.fixture(scope="module")
def tokenizer(demo):
    return Tokenizer.load(demo / "model")


@pytest.fixture
def many(monkeypatch):
    """Three processes, whatever a file's size and the machine's cores, with few rows at a time."""
    monkeypatch.setattr(token_cache, "MIN_PROCESS_BYTES", 1)
    monkeypatch.setattr(token_cache, "CHUNK_ROWS", 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)


@pytest.fixture
def read(demo, tokenizer, tmp_path):
    def read(*files, cache=tmp_path / "tokens", held_out=20, skip_invalid=False):
        return token_cache.read_tokens(map(str, files), demo / "model", tokenizer, cache, held_out, skip_invalid)
    return read


@pytest.fixture
def builds(monkeypatch):
    """The files that are tokenized, in order."""
    names, build = [], token_cache._build
    monkeypatch.setattr(token_cache, "_build", lambda path, *rest: (names.append(path.name), build(path, *rest)))
    return names


def same(a, b):
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.loss_mask, b.loss_mask) and (a.ids.dtype, a.loss_mask.dtype, a.source) == (
        b.ids.dtype, b.loss_mask.dtype, b.source)


def split(rows, fraction):
    """The conversations to train on, and the held-out ones, by the same split as `TokenDataset`."""
    parts = split_held_out([query_hash(row.query) for row in rows], fraction)
    return [[rows[i] for i in part] for part in parts]


def folders(cache):
    return sorted(path.parent for path in cache.glob("*/summary.json"))


# The same as row by row


@pytest.mark.parametrize("shape", ["jsonl", "json", "indented.json", "jsonl.gz"])
def test_several_processes_give_each_row_the_ids_of_one(demo, tokenizer, read, many, tmp_path, shape):
    lines = (demo / "rows.jsonl").read_text().splitlines()[:100]
    text = "\n\n".join(lines) if shape.startswith("jsonl") else "[" + ",\n".join(lines) + "]"
    if shape == "indented.json":
        text = json.dumps(json.loads(text), indent=1)
    file = tmp_path / f"rows.{shape}"
    file.write_bytes(gzip.compress(text.encode()) if shape.endswith("gz") else text.encode())
    rows = list(read_rows([file]))
    expected = [tokenize(row, tokenizer) for row in rows]
    got = read(file)
    assert len(got) == len(expected) == 100 and all(map(same, got, expected))
    assert list(got.lengths) == list(map(len, expected)) and all(type(n) is int for n in got.lengths)
    assert got.loss_tokens == sum(int(example.loss_mask.sum()) for example in expected)
    held_out = got.split(1.0)[1]
    assert [held_out.conversation(i) for i in range(100)] == split(rows, 1.0)[1]


def test_the_split_its_orders_and_the_conversations_are_those_of_rows_read_one_by_one(demo, tokenizer, read, many, tmp_path, monkeypatch):
    """Over several files, with queries that come twice, and with no more rows kept for evaluation than are asked for."""
    monkeypatch.setattr(token_cache, "MIN_HELD_OUT_ROWS", 2)
    lines = (demo / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows").mkdir()
    for name, part in (("a", lines[:300]), ("b", lines[250:350]), ("c", lines[340:])):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("".join(part))
    rows = list(read_rows([tmp_path / "rows"]))
    for fraction in (0.0, 0.05, 1.0):
        expected = split(rows, fraction)
        got = read(tmp_path / "rows").split(fraction)
        assert [len(part) for part in got] == [len(part) for part in expected]
        assert all(same(example, tokenize(row, tokenizer)) for mine, his in zip(got, expected, strict=True)
                   for example, row in zip(mine, his, strict=True))
        assert [got[1].conversation(i) for i in range(min(20, len(got[1])))] == expected[1][:20]


def test_training_is_told_the_same_about_its_rows(demo, tokenizer, tmp_path, capsys):
    """What the log says, worked out here row by row."""
    bad = tmp_path / "bad.jsonl"
    hidden = {"query": "x", "answers": [], "tools": [{"name": "f", "parameters": {"type": {"type": "str"}}}]}
    bad.write_text((demo / "rows.jsonl").read_text() + json.dumps(hidden) + '\n{"query": "x"}\n[]\n{"query": "y"}\n')
    skipped = SkippedRows()
    rows = list(read_rows([bad], skipped))
    kept, held_out = split(rows, 0.1)
    expected = [f"data   {len(kept)} rows to train on, {len(held_out)} held out, of which 7 are evaluated",
                *(f"data   {entry['rows']} rows skipped: {cause}; the first: {entry['first']}" for cause, entry in skipped.items())]
    for name, part in (("training", kept), ("held-out", held_out[:7])):
        examples = [tokenize(row, tokenizer) for row in part]
        short = [example for example in examples if len(example.ids) <= 190]
        tokens, trained = sum(map(len, short)), sum(int(example.loss_mask.sum()) for example in short)
        first = next(example.source for example in examples if len(example.ids) > 190)
        expected += [f"data   {len(examples) - len(short)} {name} rows dropped: longer than 190 tokens (--max-tokens); the first: {first}",
                     f"data   {name}: {tokens:,} tokens, {tokens / len(short):.0f} per row, {trained / tokens:.1%} of them carry loss"]
    args = train.parse_args(["--model", str(demo / "model"), "--data", str(bad), "--data-cache", str(tmp_path / "tokens"), "--skip-invalid",
                             "--max-tokens", "190", "--eval-fraction", "0.1", "--eval-rows", "7", "--eval-calls", "3"])
    load_datasets(Run(args, 0, 1, torch.device("cpu")), demo / "model", tokenizer)
    said = capsys.readouterr().out.splitlines()
    assert said[:len(expected)] == expected


# Bad rows


@pytest.mark.parametrize("processes", ["one", "many"])
def test_the_first_bad_row_of_a_file_is_the_error_that_reading_row_by_row_gives(demo, read, tmp_path, processes, request):
    if processes == "many":
        request.getfixturevalue("many")
    lines = (demo / "rows.jsonl").read_text().splitlines()
    whole = gzip.compress("\n".join(lines).encode())
    for name, content in (("two.jsonl", "\n".join([*lines[:50], '{"query": "x"}', *lines, "[]"]).encode()),
                          ("torn.gz", gzip.compress("\n".join([*lines[:9], "{", *lines]).encode())[:-2000]), ("end.gz", whole[:-2000]),
                          ("array.json", ("[" + ",".join(lines[:99]) + ", {").encode()), ("nothing.jsonl", b"{")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RowError) as expected:
            list(read_rows([tmp_path / name]))
        with pytest.raises(RowError) as got:
            read(tmp_path / name)
        assert (str(got.value), got.value.cause) == (str(expected.value), expected.value.cause)
    assert not folders(tmp_path / "tokens") and not list((tmp_path / "tokens").glob(".*"))
    assert not multiprocessing.active_children()


def test_skipped_rows_are_counted_once_and_for_all_and_still_refused_without_the_flag(demo, read, builds, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "x"}\n' + (demo / "rows.jsonl").read_text() + "[]\n[]\n")
    skipped = SkippedRows()
    rows = list(read_rows([bad], skipped))
    for _ in range(2):
        got = read(bad, skip_invalid=True)
        assert len(got) == len(rows) and list(got.skipped) == list(skipped)
        assert got.skipped == skipped and skipped.total == 3
        with pytest.raises(RowError) as error:
            read(bad)
        assert str(error.value).startswith("bad.jsonl:1: no column 'tools', 'answers'; ") and str(error.value).endswith("--skip-invalid")
    assert builds == ["bad.jsonl"]


def test_a_file_without_a_row_gives_none(read, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for _ in range(2):
        assert len(read(tmp_path / "empty.jsonl")) == 0


# Made once


def test_a_second_start_tokenizes_nothing_and_another_name_for_the_file_tells_its_rows_apart(demo, read, builds, tmp_path):
    first = read(demo / "rows.jsonl")
    (tmp_path / "copy.jsonl").write_bytes((demo / "rows.jsonl").read_bytes())
    again = read(tmp_path / "copy.jsonl")
    assert builds == ["rows.jsonl"] and again[5].source == "copy.jsonl:6" and np.array_equal(first[5].ids, again[5].ids)


def test_a_file_that_changed_is_tokenized_again_even_if_its_size_and_time_are_set_back(demo, read, builds, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    content = (demo / "rows.jsonl").read_bytes()
    file.write_bytes(content)
    before = file.stat()
    for later in (0, 10):                            # just written; and long ago, so that its hash is trusted for as long as its times stay
        monkeypatch.setattr(time, "time_ns", lambda later=later: int(before.st_ctime_ns + later * 1e9))
        old = read(file)[0].ids
        at = content.index(b'"query": "') + len(b'"query": "')
        content = content[:at] + (b"Q" if later else b"Z") + content[at + 1:]
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
        assert not np.array_equal(read(file)[0].ids, old)
    assert len(builds) == 3


def test_a_file_at_rest_is_not_even_hashed(demo, read, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: (demo / "rows.jsonl").stat().st_ctime_ns + int(3e9))
    read(demo / "rows.jsonl")
    hash_file = token_cache._hash_file
    monkeypatch.setattr(token_cache, "_hash_file", lambda path: pytest.fail() if path == demo / "rows.jsonl" else hash_file(path))
    assert len(read(demo / "rows.jsonl")) == 600


@pytest.mark.parametrize("file", ["ids.bin", "rows.bin", "held_out.jsonl", "summary.json"])
@pytest.mark.parametrize("harm", ["torn", "flipped", "gone"])
def test_a_damaged_folder_is_made_again_to_the_same_bytes(demo, read, builds, tmp_path, file, harm):
    read(demo / "rows.jsonl")
    [folder] = folders(tmp_path / "tokens")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = whole[file]
    middle = content.index(b'"tokens": ') + len('"tokens": ') if file == "summary.json" else len(content) // 2
    if harm == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[:-5] if harm == "torn" else content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1:])
    assert len(read(demo / "rows.jsonl")) == 600 and builds == ["rows.jsonl"] * 2
    assert {path.name: path.read_bytes() for path in folders(tmp_path / "tokens")[0].iterdir()} == whole


def test_more_held_out_rows_than_are_kept_are_had_by_making_the_folder_again(demo, read, builds, monkeypatch):
    monkeypatch.setattr(token_cache, "MIN_HELD_OUT_ROWS", 4)
    for wanted in (4, 3, 50, 700, 700):
        _, held_out = read(demo / "rows.jsonl", held_out=wanted).split(1.0)
        assert len({held_out.conversation(i).source for i in range(min(wanted, 600))}) == min(wanted, 600)
    assert len(builds) == 3


def test_of_processes_that_start_at_once_one_builds_and_all_read(demo, read, tmp_path, monkeypatch):
    build = token_cache._build

    def slow(*arguments):
        with (tmp_path / "builds").open("a") as file:
            file.write("built\n")
        time.sleep(0.5)
        build(*arguments)

    monkeypatch.setattr(token_cache, "_build", slow)
    processes = [multiprocessing.get_context("fork").Process(target=lambda: sys.exit(len(read(demo / "rows.jsonl")) != 600)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4 and (tmp_path / "builds").read_text() == "built\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_build_that_is_broken_off_leaves_no_process_no_lock_and_no_folder(demo, read, tmp_path, number):
    (tmp_path / "large.jsonl").write_bytes((demo / "rows.jsonl").read_bytes() * 32)
    code = ("import signal, sys; from dataset import token_cache; from pathlib import Path; from tokenizer import Tokenizer; model = Path(sys.argv[1]); "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "                # which a shell's background job ignores
            "token_cache.read_tokens([sys.argv[2]], model, Tokenizer.load(model), Path(sys.argv[3]), 9, False)")
    process = subprocess.Popen([sys.executable, "-c", code, str(demo / "model"), str(tmp_path / "large.jsonl"), str(tmp_path / "tokens")], cwd=ROOT,
                               stderr=subprocess.PIPE, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any(path.stat().st_size for path in (tmp_path / "tokens").glob(".*.tmp/ids.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children.read_text().split()
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)       # Ctrl-C reaches all
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == -number and errors.count(b"Traceback") == (number == signal.SIGINT), errors
    cores = len(os.sched_getaffinity(0))
    assert len(workers) == (cores if cores > 1 else 0)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2] for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    assert not folders(tmp_path / "tokens")
    assert len(read(tmp_path / "large.jsonl")) == 19_200 and not list((tmp_path / "tokens").glob(".*.tmp"))


def test_ranks_that_start_at_once_on_rows_worth_several_processes_train_and_build_once(demo, tmp_path):
    """With the start in large pages, which replaces the process, and torch.distributed's threads after the fork."""
    (tmp_path / "large.jsonl").write_bytes((demo / "rows.jsonl").read_bytes() * 4)
    assert (tmp_path / "large.jsonl").stat().st_size > 2 * token_cache.MIN_PROCESS_BYTES
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    done = torchrun(2, "train.py", "--model", demo / "model", "--data", tmp_path / "large.jsonl", "--data-cache", tmp_path / "tokens",
                    "--out", tmp_path / "run", "--device", "cpu", "--steps", 1, "--eval-rows", 3, "--eval-calls", 0, env=environment)
    assert done.returncode == 0, done.stderr
    assert "step     1/1 | loss" in done.stdout and len(folders(tmp_path / "tokens")) == 1
    assert not list((tmp_path / "tokens").glob(".*.tmp"))


@pytest.mark.parametrize("when", ["before it is read", "after"])
def test_a_file_that_grows_while_it_is_read_is_refused(demo, read, tmp_path, monkeypatch, when):
    file = tmp_path / "rows.jsonl"
    file.write_bytes((demo / "rows.jsonl").read_bytes())
    rows = token_cache.raw_rows

    def growing(path):
        if when == "after":
            yield from rows(path)
        with file.open("ab") as more:
            more.write(b"\n")
        if when != "after":
            yield from rows(path)

    monkeypatch.setattr(token_cache, "raw_rows", growing)
    with pytest.raises(ValueError, match=r"rows\.jsonl: the file changed while it was read; start again when it is complete"):
        read(file)
    assert not folders(tmp_path / "tokens")


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(demo, read, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/tokens: .*; name another folder with --data-cache, or none with --data-cache ''"):
        read(demo / "rows.jsonl", cache=tmp_path / "file" / "tokens")


def test_a_full_disk_is_named_with_the_remedy_and_leaves_nothing(demo, read, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_file_checksum", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="tokens: No space left on device; name another folder"):
        read(demo / "rows.jsonl")
    assert not folders(tmp_path / "tokens") and not list((tmp_path / "tokens").glob(".*"))


def test_a_worker_that_is_killed_is_an_error_with_a_remedy(demo, read, many, monkeypatch):
    monkeypatch.setattr("dataset.rows.parse_row", lambda row, source, system: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="was killed, most likely for want of memory; start again on fewer cores"):
        read(demo / "rows.jsonl")


def test_without_a_cache_nothing_is_left_behind(demo, read, builds, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for _ in range(2):
        rows = read(demo / "rows.jsonl", cache=None)
        assert len(rows) == 600 and len(rows[599]) == rows.lengths[599] and rows.split(1.0)[1].conversation(0).query
    assert builds == ["rows.jsonl"] * 2 and not list((tmp_path / "temporary").iterdir())


def test_folders_that_nothing_asks_for_go_when_the_next_is_made(demo, read, tmp_path):
    for number, name in enumerate(("old", "used", "new")):
        (tmp_path / f"{name}.jsonl").write_text("\n" * number + (demo / "rows.jsonl").read_text())
    for name in ("old", "used"):
        read(tmp_path / f"{name}.jsonl")
    long_ago = time.time() - (token_cache.DAYS_KEPT + 1) * 24 * 3600
    for path in [*(tmp_path / "tokens").iterdir(), *(tmp_path / "tokens" / "seen").iterdir()]:
        os.utime(path, (long_ago, long_ago))
    read(tmp_path / "used.jsonl")
    read(tmp_path / "new.jsonl")
    assert sorted(json.loads((folder / "summary.json").read_text())["file"] for folder in folders(tmp_path / "tokens")) == [
        "new.jsonl", "used.jsonl"]


def test_few_rows_are_read_ahead_of_those_that_are_written(demo, tokenizer, tmp_path, many):
    taken = []

    def chunks():
        for number in range(50):
            taken.append(number)
            yield token_cache.Chunk([])

    made = token_cache._tokenize_chunks(chunks(), tokenizer, DEVELOPER_TEXT, 3)
    next(made)
    assert len(taken) <= 8
    assert len(list(made)) == 49 and len(taken) == 50
