"""Rows, files, models and tokenizers that somebody made to hurt: a clear error or a right result, in bounded memory and time.

tests/hostile_inputs.py holds the inputs one by one; here are random ones, and the check of docs/hostile.md.
"""
import json
import math
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hostile_inputs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.errors import MAX_ROW_BYTES, RowError, SkippedRows
from dataset.files import split_array
from dataset.rows import parse_row, read_rows
from model import GemmaConfig
from storage.pretrained import config_from_dict, load_model
from tokenizer import Tokenizer
from tokenizer.model_file import control_names

ROOT = Path(__file__).resolve().parent.parent
fuzz = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.slow
def test_every_hostile_input_gives_what_docs_hostile_md_says_within_its_time_and_memory():
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "hostile_inputs.py"), "--json"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "CRASH" not in found["page"] and found["mebibytes"] < hostile_inputs.MEBIBYTES
    assert found["page"] == (ROOT / "docs" / "hostile.md").read_text(encoding="utf-8"), "python tests/hostile_inputs.py writes it anew"


# Text in a row is never a control token


CONTROL = [name for name in control_names() if name.startswith("<")]
SYNTAX = ["{", "}", "[", "]", ",", ":", "call:", "declaration:", "response:", "\n", " ", "<", ">", "<end_of", "_turn>", "▁", "model\n", "é", "😀", "\x00", "\u202e", "x"]
hostile_text = st.lists(st.sampled_from(CONTROL + SYNTAX * 3), min_size=1, max_size=6).map("".join)


class Texts:
    """Texts for a row's fields: all different, and harmless unless drawn from `hostile`."""

    def __init__(self, hostile):
        self.hostile, self.count = hostile, 0

    def __call__(self) -> str:
        self.count += 1
        return f"{self.hostile[self.count % len(self.hostile)] if self.hostile else 'x'}{self.count}"


def xlam_row(text, shape):
    names = [text() for _ in range(shape.randint(1, 3))]
    tools = [{"name": name, "description": text(), "parameters": {text(): {
        "type": shape.choice(["str", "int", "List[str]", "Dict[str, int], optional"]), "description": text(), "enum": [text(), text()], "default": text()}
        for _ in range(shape.randint(0, 3))}} for name in names]
    answers = [{"name": shape.choice(names), "arguments": {text(): value(text, shape) for _ in range(shape.randint(0, 3))}} for _ in range(shape.randint(0, 3))]
    return {"query": text(), "tools": shape.choice([tools, json.dumps(tools)]), "answers": shape.choice([answers, json.dumps(answers)])}


def value(text, shape, depth=0):
    kind = shape.randint(0, 5 if depth < 3 else 3)
    if kind == 4:
        return [value(text, shape, depth + 1) for _ in range(shape.randint(0, 3))]
    if kind == 5:
        return {text(): value(text, shape, depth + 1) for _ in range(shape.randint(0, 3))}
    return [text(), shape.choice([1, -2.5, True]), None, text()][kind]


def schema(text, shape, depth=0):
    kind = shape.choice(["string", "object", "array", text()] if depth < 2 else ["string", text()])
    made = {"type": kind, "description": text(), "enum": [text()], text(): text()}
    if kind == "object":
        made |= {"properties": {text(): schema(text, shape, depth + 1) for _ in range(2)}, "required": [text()]}
    if kind == "array":
        made["items"] = {"type": "object", "properties": {text(): schema(text, shape, depth + 1)}, "required": [text()], text(): value(text, shape)}
    return made


def chat_row(text, shape):
    name = text()
    tool = {"type": "function", "function": {"name": name, "description": text(), "parameters": {
        "type": "object", "properties": {text(): schema(text, shape) for _ in range(2)}, "required": [text()]}}}
    call = {"function": {"name": name, "arguments": shape.choice([json.dumps, dict])({text(): value(text, shape)})}, "id": "1"}
    result = shape.choice([text(), {text(): value(text, shape)}, [{"name": text(), "response": {text(): text()}}]])
    return {"tools": [tool], "messages": [
        {"role": shape.choice(["system", "developer"]), "content": text()}, {"role": shape.choice(["user", text()]), "content": [{"type": "text", "text": text()}]},
        {"role": "assistant", "content": shape.choice([None, text()]), "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": result},
        {"role": "assistant", "content": text()}]}


def leaderboard_row(text, shape):
    name, parameter = text(), text()
    return {"question": [[{"role": "user", "content": text()}]], "function": {"name": name, "description": text(), "parameters": {
        "type": "dict", "properties": {parameter: schema(text, shape)}, "required": [parameter]}}, "ground_truth": [{name: {parameter: [text(), text()]}}]}


def controls(tokenizer, row):
    """How often each control token is among the ids of a row."""
    ids, _ = tokenizer.encode_segments(parse_row(row, "x").segments())
    named = {i: name for name, i in tokenizer.control.items()}
    return Counter(named[i] for i in ids if i in named)


@pytest.mark.parametrize("make", [xlam_row, chat_row, leaderboard_row])
@pytest.mark.parametrize("vocabulary", ["demo", "real"])
def test_text_in_any_field_makes_no_control_token_beyond_the_templates_own(request, make, vocabulary):
    tokenizer = Tokenizer.load(request.getfixturevalue("demo") / "model" if vocabulary == "demo" else request.getfixturevalue("real_model"))

    @fuzz
    @given(st.lists(hostile_text, min_size=1, max_size=8), st.integers(0, 10**9))
    def check(texts, seed):
        hostile, harmless = Texts(texts), Texts(None)
        row, plain = make(hostile, random.Random(seed)), make(harmless, random.Random(seed))
        assert hostile.count == harmless.count
        assert controls(tokenizer, row) == controls(tokenizer, plain) == controls(tokenizer, json.dumps(row))

    check()


def test_the_check_above_would_see_an_injected_token(demo):
    tokenizer = Tokenizer.load(demo / "model")
    text = "".join(segment.text for segment in parse_row(hostile_inputs.GOOD, "x").segments())
    forged = text.replace("q", "q<end_of_turn>", 1)
    count = tokenizer.control["<end_of_turn>"]
    assert tokenizer.encode(forged, control=True).count(count) == 1 + tokenizer.encode(text, control=True).count(count) > tokenizer.encode(forged).count(count) == 0


# Random rows and files


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=12)
COLUMNS = ["query", "tools", "answers", "messages", "question", "function", "ground_truth", "role", "content", "tool_calls", "function_call", "name", "parameters", "arguments",
           "properties", "items", "type", "enum", "required", "default", "id", "tool_call_id"]
row_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["f", "user", "assistant", "tool", "system", "object", "List[str]"]),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=5), max_leaves=25)


@settings(fuzz, max_examples=500)
@given(st.one_of(json_values, row_like, st.dictionaries(st.sampled_from(COLUMNS[:7]), row_like, min_size=3)))
def test_any_json_is_a_row_or_is_refused_as_one(row):
    for form in (row, json.dumps(row)):
        try:
            parse_row(form, "x").segments()
        except RowError as error:
            assert error.cause and str(error)


@settings(fuzz, max_examples=400)
@given(st.integers(0, 10**9))
def test_a_good_row_with_one_part_replaced_by_something_else_is_a_row_or_is_refused_as_one(seed):
    chance = random.Random(seed)
    row = chance.choice([xlam_row, chat_row, leaderboard_row])(Texts(None), chance)
    part = row
    while True:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = chance.choice(keys)
        if not isinstance(part[key], dict | list) or not part[key] or chance.random() < 0.3:
            break
        part = part[key]
    part[key] = chance.choice([None, 3, 2.5, True, "", "x", "[", "[]", "{}", [], {}, [[]], [None], [3], {"x": 3}, {"name": 3}, [{}], [{"name": "x1"}], 10**400, "\ud83d"])
    try:
        parse_row(row, "x").segments()
    except RowError as error:
        assert error.cause and str(error)


@fuzz
@given(st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=3)), max_size=5), st.booleans(), st.booleans())
def test_a_file_with_some_bytes_changed_is_read_or_refused_with_its_place(tmp_path_factory, changes, array, cut):
    rows = [hostile_inputs.GOOD] * 10
    content = bytearray((json.dumps(rows, indent=1) if array else "\n".join(map(json.dumps, rows))).encode())
    for at, new in changes:
        content[at % len(content):at % len(content) + len(new)] = new
    path = tmp_path_factory.mktemp("fuzz") / "rows"
    path.write_bytes(content[:len(content) - 50 * cut])
    try:
        list(read_rows([path]))
    except RowError as error:
        assert str(error).startswith("rows:")
    skipped = SkippedRows()
    try:
        assert len(list(read_rows([path], skipped))) + skipped.total >= 1
    except RowError as error:
        assert error.cause in ("broken array", "broken gzip")


@settings(fuzz, max_examples=400)
@given(st.lists(json_values, min_size=1, max_size=5), st.sampled_from([None, 0, 2]), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_an_array_is_cut_into_its_items_with_their_lines_whatever_pieces_it_is_read_in(values, indent, sizes, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    pieces, at = [], 1
    while at < len(text):
        pieces.append(text[at:at + sizes[len(pieces) % len(sizes)]])
        at += len(pieces[-1])
    found = list(split_array("x", 7, iter(pieces)))
    assert [json.dumps(json.loads(item)) for _, item in found] == [json.dumps(value) for value in values]
    at = 1
    for place, item in found:
        at = text.index(item, at)
        assert int(place.partition(" ")[0]) == 7 + text.count(b"\n", 0, at)
        at += len(item)


@pytest.mark.parametrize(("before", "after"), [(b"", b"\n"), (b"", b"\r\n"), (b"", b""), (b"[", b"]"), (b"[\n ", b",1]")])
def test_a_row_of_just_the_largest_size_is_read_and_one_of_a_byte_more_is_refused(tmp_path, before, after):
    for beyond in (0, 1):
        row = json.dumps({**hostile_inputs.GOOD, "id": "ID"}).encode()
        row = row.replace(b"ID", b"x" * (MAX_ROW_BYTES + beyond - len(row) + 2))
        (tmp_path / "rows").write_bytes(before + row + after)
        skipped = SkippedRows()
        assert len(row) == MAX_ROW_BYTES + beyond and len(list(read_rows([tmp_path / "rows"], skipped))) == 1 - beyond
        assert skipped.get("too long", {"rows": 0})["rows"] == beyond


def test_the_last_of_two_equal_keys_counts():
    assert parse_row(json.dumps(hostile_inputs.GOOD)[:-1] + ', "query": "the last one"}', "x").query == "the last one"


# Random models


SIZES = st.one_of(st.integers(-2, 9), st.integers(), st.floats(), st.text(max_size=2), st.none(), st.booleans(), st.lists(st.integers(), max_size=2), st.just({}))
KEYS = [*GemmaConfig.__dataclass_fields__, "rope_parameters", "rope_scaling", "sliding_window_pattern", "text_config", "tie_word_embeddings", "hidden_activation"]


@settings(fuzz, max_examples=500)
@given(st.dictionaries(st.sampled_from(KEYS), SIZES, min_size=1, max_size=3))
def test_any_config_is_a_model_that_can_be_built_or_a_value_error(change):
    try:
        config = config_from_dict({"model_type": "gemma3_text", **change})
    except ValueError as error:
        assert str(error)
        return
    assert len(config.layer_types) == config.num_hidden_layers <= 1000 and config.head_dim % 2 == 0
    assert all(0 < number < math.inf for number in (config.rope_theta, config.rope_factor, config.rms_norm_eps, config.query_pre_attn_scalar))


def test_safetensors_with_changed_bytes_in_the_header_are_refused_or_read(demo, tmp_path):
    whole = bytearray((demo / "model" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((demo / "model" / "config.json").read_bytes())
    length, chance, loaded = struct.unpack("<Q", whole[:8])[0], random.Random(0), 0
    for _ in range(150):
        bad = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            bad[chance.randrange(length + 8)] = chance.choice(b'0123456789[]{},:"F\xff') if chance.random() < 0.7 else chance.randrange(256)
        (tmp_path / "model.safetensors").write_bytes(bad)
        try:
            load_model(tmp_path)
            loaded += 1
        except ValueError as error:
            assert str(tmp_path) in str(error)
    assert loaded < 50
