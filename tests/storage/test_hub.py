"""storage/hub.py with the real client against a small hub on loopback: what is fetched, from where, and what is said when it fails.

The client reads HF_ENDPOINT and HF_HOME when it is imported, so it runs in processes of its own.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub, Repo
from safetensors.torch import load_file, save_file

from dataset.files import select_row_files
from storage import hub
from storage.pretrained import load_model

ROOT = Path(__file__).resolve().parents[2]
XLAM = "Salesforce/xlam-function-calling-60k"
ROWS = [{"id": i, "query": f"weather in city {i}?", "answers": json.dumps([{"name": "get_weather", "arguments": {"city": f"city {i}"}}]),
         "tools": json.dumps([{"name": "get_weather", "description": "Weather", "parameters": {"city": {"type": "str", "description": "City"}}}])}
        for i in range(40)]
JSONL = "\n".join(map(json.dumps, ROWS)).encode()
PROGRAM = """
import json, os, sys
from pathlib import Path
import train
from dataset import files
from dataset.rows import read_sources
from storage.pretrained import fetch_model
from storage import hub         # and torch, once for all cases
WHAT = {"model": lambda source: [str(fetch_model(source))], "files": lambda source: [str(path) for path in files.fetch(source)],
        "rows": lambda source: [row.query for row in read_sources([source])], "pin": lambda source: hub.pin(source, "model"),
        "train": lambda flags: train.main(train.parse_args(flags))}

def disk_is_full(url, file, **_):
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")

for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitpid(child, 0)[1], flush=True)
        continue
    os.environ.update(job["env"])           # the client reads it now, as this process imports it
    said = os.open(job["folder"] + "/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    from huggingface_hub import file_download
    found = []
    for kind, source, token, *full in job["cases"]:
        os.environ["HF_TOKEN"] = token
        file_download.http_get = disk_is_full if full else file_download.http_get
        try:
            found.append([None, WHAT[kind](source)])
        except Exception as error:
            found.append([type(error).__name__, str(error)])
    Path(job["folder"], "found").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def parent():
    """A process with everything imported but the client; it forks one for each `ask`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def ask(parent, server, tmp_path):
    """ask(*cases, variables of the environment) -> ([exception's name or None, what came or the message] for each case, all that was printed)."""
    def run(*cases, **env):
        env = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), **env}
        print(json.dumps({"cases": cases, "env": env, "folder": str(tmp_path)}), file=parent.stdin, flush=True)
        assert parent.stdout.readline() == "0\n", (tmp_path / "said").read_text()
        return json.loads((tmp_path / "found").read_text()), (tmp_path / "said").read_text()
    return run


@pytest.fixture(scope="module")
def demo_files(demo):
    return {path.name: path.read_bytes() for path in (demo / "model").iterdir()}


@pytest.fixture
def server(demo_files):
    """A hub with one repository for each thing that can happen."""
    model = {**demo_files, "README.md": b"#", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "original/config.json": b"{}"}
    made = Hub({
        "models/o/m": Repo(model), "models/o/old": Repo({}, moved="o/m"), "models/o/gated": Repo(model, needs="licence"),
        "models/o/private": Repo(model, needs="membership"), "models/o/busy": Repo(model, status=429), "models/o/down": Repo(model, status=503),
        "models/o/broken": Repo({"config.json": b"{}", "model.safetensors": bytes(range(256)) * 100_000}, breaks=1),
        "models/o/adapter": Repo({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}),
        f"datasets/{XLAM}": Repo({".gitattributes": b"", "README.md": b"#", "xlam_function_calling_60k.json": json.dumps(ROWS).encode()}, needs="licence"),
        "datasets/o/splits": Repo({"dataset_infos.json": b"{}", "data/train-00000-of-00002.jsonl": JSONL, "data/train-00001-of-00002.jsonl": JSONL + b"\n",
                                   "data/test-00000-of-00001.jsonl": JSONL + b"\n\n", "extra/odd[1].json": b"[]", "notes.csv": b""}),
        "datasets/o/parquet": Repo({"data/train-00000-of-00001.parquet": b"PAR1", "README.md": b"#"})})
    yield made
    made.close()


def test_of_a_model_only_what_is_needed_is_fetched_once_and_then_read_with_no_network(server, ask, demo_files, tmp_path):
    commit = server.repos["models/o/m"].commit
    [[error, [folder]], [_, pinned]], said = ask(("model", "o/m", ""), ("pin", "o/m@main", ""))
    assert error is None and Path(folder).name == commit and pinned == f"o/m@{commit}" and "Fetching" in said
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(demo_files)
    assert load_model(folder).config.vocab_size == load_model(folder).head.shape[0]
    before = len(server.log)
    cases = [("model", "o/m", ""), ("model", f"o/m@{commit}", ""), ("model", "o/gated", "")]
    [*found, [_, missing]], said = ask(*cases, HF_HUB_OFFLINE="1", RANK="1")
    assert found == [[None, [folder]]] * 2 and len(server.log) == before and f"commit {commit} is taken from the cache" in said and "Fetching" not in said
    assert "o/gated is not, or not completely, in" in missing and "HF_HUB_OFFLINE=1 forbids" in missing
    server.close()
    [*found, [kind, missing]], _ = ask(*cases)
    assert found == [[None, [folder]]] * 2 and kind == "ConnectionError" and "does not answer" in missing and "run it again" in missing


@pytest.mark.parametrize("needed", ["hf_stranger", "hf_member", ""])
def test_every_refusal_says_what_to_do_and_never_shows_the_token(server, ask, needed):
    page = server.endpoint
    cases = {
        "": [("o/gated", "PermissionError", f"is gated: accept its licence at {page}/o/gated; then set HF_TOKEN to a token from {page}/settings/tokens"),
             ("o/private", "FileNotFoundError", f"there is none at {page}/o/private, or it is private; check the spelling; if it is private, set HF_TOKEN"),
             ("o/none", "FileNotFoundError", "there is none"), ("o/m@nope", "FileNotFoundError", f"has no revision 'nope'; {page}/o/m/tree/main lists"),
             ("o/busy", "ConnectionError", "too many requests"), ("o/down", "ConnectionError", "does not answer or broke off"),
             ("o/m:train", "ValueError", "with no :train"), ("o/adapter", "FileNotFoundError", "it is an adapter: name its base")],
        "hf_stranger": [("o/gated", "PermissionError", "your token's account has not"), ("o/private", "FileNotFoundError", "your token may not read it")],
        "hf_member": [("o/gated", None, ""), ("o/private", None, "")]}[needed]
    found, _ = ask(*[("model", source, needed) for source, _, _ in cases])
    for (source, kind, text), (error, message) in zip(cases, found, strict=True):
        assert error == kind and (kind is None or (text in message and source.partition("@")[0].partition(":")[0] in message)), message
        assert not needed or needed not in str(message)


def test_a_wrong_token_is_named_as_such_and_never_shown(server, ask, tmp_path):
    found, said = ask(("model", "o/m", "hf_secret"), ("model", "o/m", "hf_se cret"), ("model", "o/m", "hf_secrét"), HF_DEBUG="0")
    assert [error for error, _ in found] == ["PermissionError"] * 3
    assert "does not accept your token" in found[0][1] and all("a character that no token has" in message for _, message in found[1:])
    assert "cret" not in str(found) + said and "crét" not in str(found) + said


def test_a_renamed_model_is_followed_and_that_is_said(server, ask, tmp_path):
    [[error, [folder]]], said = ask(("model", "o/old", ""))
    assert error is None and (Path(folder) / "config.json").exists() and "model o/old is called o/m now" in said


def test_a_transfer_that_breaks_goes_on_where_it_broke(server, ask, tmp_path):
    [[error, [folder]]], _ = ask(("model", "o/broken", ""))
    assert error is None and (Path(folder) / "model.safetensors").read_bytes() == bytes(range(256)) * 100_000
    begun = [int(where.removeprefix("bytes=").removesuffix("-")) for method, path, where in server.log if method == "GET" and where]
    assert len(begun) == 1 and 1_000_000 < begun[0] < 12_800_000 and server.transfers[f"/o/broken/resolve/{server.repos['models/o/broken'].commit}/model.safetensors"] == 2


def test_a_full_disk_is_named_and_nothing_half_written_is_taken_for_whole(server, ask, tmp_path):
    found, _ = ask(("model", "o/m", "", "disk is full"))
    assert found[0][0] == "OSError" and "the disk is full" in found[0][1] and f"GiB are free at {tmp_path / 'home' / 'hub'}" in found[0][1] and "HF_HOME" in found[0][1]
    found, _ = ask(("model", "o/m", ""))
    assert found[0][0] is None and load_model(found[0][1][0])


def test_weights_in_several_files_are_all_fetched_and_a_missing_one_is_named(server, ask, demo_files, demo, tmp_path):
    weights = load_file(demo / "model" / "model.safetensors")
    names, shards = sorted(weights), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = {name: content for name, content in demo_files.items() if name != "model.safetensors"}
    for shard, own in zip(shards, (names[::2], names[1::2]), strict=True):
        save_file({name: weights[name] for name in own}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
    index = {"metadata": {}, "weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    server.repos["models/o/shards"] = Repo({**files, "model.safetensors.index.json": json.dumps(index).encode()})
    [[error, [folder]]], _ = ask(("model", "o/shards", ""))
    assert error is None and (load_model(folder).head == load_model(demo / "model").head).all()
    (Path(folder) / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shards[1]}: no such file, though model\.safetensors\.index\.json names it"):
        load_model(folder)


def test_of_a_dataset_the_files_of_the_split_or_the_file_asked_for_are_fetched(server, ask, tmp_path):
    train = ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    wanted = {"o/splits:train": train, "o/splits@main:test": ["data/test-00000-of-00001.jsonl"], "o/splits:extra/odd[1].json": ["extra/odd[1].json"],
              "o/splits:train-00001-of-00002": train[1:], "o/splits:extra": ["extra/odd[1].json"]}
    found, _ = ask(*[("files", source, "") for source in wanted])
    commit = server.repos["datasets/o/splits"].commit
    assert [[file.partition(f"/{commit}/")[2] for file in files] for _, files in found] == list(wanted.values())
    fetched = {path.partition(f"/{commit}/")[2] for method, path, _ in server.log if method == "GET" and "/resolve/" in path}
    assert fetched == {file for files in wanted.values() for file in files}
    found, _ = ask(*[("files", f"o/{source}", "") for source in ("splits", "splits:nope", "splits:notes.csv", "parquet", "parquet:train", "none")])
    for (_, message), text in zip(found, ("o/splits has the splits train, test; name one, as --data o/splits:train",
                                          "o/splits has no split or file 'nope'; there are the splits train, test and the files data/test-00000", "this is notes.csv",
                                          "rows must be JSON or JSONL, and this is README.md, data/train-00000-of-00001.parquet; convert them, pip install datasets; python -c "
                                          "\"from datasets import load_dataset; load_dataset('o/parquet', split='train').to_json('rows.jsonl')\"",
                                          "this is train", f"dataset o/none: there is none at {server.endpoint}/datasets/o/none"), strict=True):
        assert text in message, message


def test_xlam_as_it_is_published_is_read_row_by_row_once_its_licence_is_accepted(server, ask, tmp_path):
    [[kind, message], [error, queries]], _ = ask(("rows", XLAM, ""), ("rows", XLAM, "hf_member"))
    assert kind == "PermissionError" and f"accept its licence at {server.endpoint}/datasets/{XLAM}" in message
    assert error is None and queries == [row["query"] for row in ROWS]


def test_a_run_records_its_commits_and_a_resumed_one_keeps_them_when_the_branch_has_moved_on(server, ask, tmp_path):
    def train(*more, **env):
        flags = ["--model", "o/m", "--data", "o/splits:train", "--eval-data", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "run"), "--device", "cpu",
                 "--dtype", "fp32", "--batch-rows", "4", "--steps", "2", "--eval-calls", "0", *more]
        [[error, found]], said = ask(("train", flags, ""), **env)
        return found if error else said

    (tmp_path / "own.jsonl").write_bytes(JSONL.splitlines()[0])
    model, rows = server.repos["models/o/m"], server.repos["datasets/o/splits"]
    pinned = {"model": f"o/m@{model.commit}", "data": f"o/splits@{rows.commit}:train", "eval_data": str(tmp_path / "own.jsonl")}
    assert "done   2 steps" in train()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {key: config[key] for key in pinned} == pinned and json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["flags"]["model"] == pinned["model"]
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("o/m", model.commit)

    model.replace({**model.files, "model.safetensors": b"something else"})
    rows.replace({"data/train.jsonl": JSONL})
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert "at step 2" in train("--resume", **env)
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert {key: config[key] for key in pinned} == pinned
    assert not any(commit in path for commit in (model.commit, rows.commit) for _, path, _ in server.log)
    assert "not a whole safetensors file" in train("--resume", "--model", "o/m@main")       # asked for anew: main has moved, and holds no model


@pytest.mark.parametrize(("source", "parts"), [
    ("a/b", ("a/b", None, None)), ("a/b@v1.0", ("a/b", "v1.0", None)), ("a/b:train", ("a/b", None, "train")), ("a/b@refs/pr/4:x/y.json", ("a/b", "refs/pr/4", "x/y.json")),
    ("a/b.jsonl", None), ("./a/b", None), ("a/b/c", None), ("tests/x", None), ("a", None), ("", None), ("a/b@", None), ("/a/b", None), ("a b/c", None)])
def test_a_name_on_the_hub_has_four_forms_and_a_path_is_none_of_them(source, parts):
    assert hub.parse(source) == (parts and hub.Name(*parts))


def test_files_with_rows_are_chosen_by_split_file_and_folder():
    files = ["README.md", "a/train.jsonl.gz", "a/validation.json", "b/TRAIN.json", "training.json"]
    assert select_row_files(hub.Name("o/x", None, "train"), files) == ["a/train.jsonl.gz"]
    assert select_row_files(hub.Name("o/x", None, "b"), files) == ["b/TRAIN.json"]
    assert select_row_files(hub.Name("o/x", None, None), files[3:]) == files[3:]
