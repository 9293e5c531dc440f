"""data.py: every shape of row, every type rule, every complaint; the held-out split; packing and steps."""
import gzip
import itertools
import json
import time

import numpy as np
import pytest
import torch

import data
import hub
from data import Example, RowError, deal, json_type, pack, parse_row, query_hash, read_rows, steps, tokens_of
from loss_kernels import IGNORE
from tokenizer import Tokenizer, render

XLAM = {"id": 1, "query": "weather in Rome?",
        "tools": [{"name": "get_weather", "description": "Weather", "parameters": {
            "city": {"type": "str", "description": "City"}, "days": {"type": "int", "description": "Days", "default": 1}}}],
        "answers": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "City"},
                                           "days": {"type": "integer", "description": "Days"}}, "required": ["city"]}


def row(**changes):
    return {**XLAM, **changes}


def function(conversation):
    return conversation.tools[0]["function"]


# Shapes of rows


def test_the_three_ways_to_write_a_tool_render_alike():
    bare = {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}
    forms = [row(), row(tools=[bare]), row(tools=[{"type": "function", "function": bare}])]
    rendered = {render(c.messages, c.tools) for c in (parse_row(form, "x") for form in forms)}
    assert len(rendered) == 1 and "declaration:get_weather" in rendered.pop()


def test_columns_may_be_json_texts_and_arguments_too():
    answers = [{"name": "get_weather", "arguments": json.dumps({"city": "Rome"})}]
    texts = row(tools=json.dumps(XLAM["tools"]), answers=json.dumps(answers))
    assert parse_row(texts, "x") == parse_row(row(), "x") == parse_row(json.dumps(texts), "x")


def test_the_developer_sentence_is_added_and_arguments_are_a_dict():
    conversation = parse_row(row(), "x")
    assert conversation.messages[0] == {"role": "developer", "content": data.DEVELOPER_TEXT}
    assert conversation.calls == [{"name": "get_weather", "arguments": {"city": "Rome"}}]
    assert conversation.query == "weather in Rome?"


def test_messages_rows_train_every_assistant_turn():
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "{\"t\": 20}"}, {"role": "assistant", "content": "20 degrees."}]
    conversation = parse_row({"messages": messages, "tools": XLAM["tools"]}, "x")
    trained = "".join(segment.text for segment in conversation.segments() if segment.trained)
    assert trained == ("<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call><start_function_response>"
                       "20 degrees.<end_of_turn>\n")
    assert conversation.messages[0]["role"] == "developer"
    assert "response:get_weather{value:" in render(conversation.messages, conversation.tools)


def test_a_system_message_of_ones_own_is_kept():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
    assert parse_row({"messages": messages, "tools": XLAM["tools"]}, "x").messages[0]["content"] == "Be brief."


def test_a_row_without_answers_trains_silence():
    trained = [segment.text for segment in parse_row(row(answers=[]), "x").segments() if segment.trained]
    assert "".join(trained) == "<end_of_turn>\n"


@pytest.mark.parametrize("text", ["I can only tell the weather.", '"I can only tell the weather."'])
def test_a_text_for_answers_is_said_instead_of_calling(text):
    conversation = parse_row(row(answers=text), "x")
    assert "".join(segment.text for segment in conversation.segments() if segment.trained) == "I can only tell the weather.<end_of_turn>\n"
    assert conversation.calls == [] and conversation.tools == parse_row(row(), "x").tools
    same = [{"role": "user", "content": XLAM["query"]}, {"role": "assistant", "content": "I can only tell the weather."}]
    assert parse_row({"messages": same, "tools": XLAM["tools"]}, "x").segments() == conversation.segments()


def test_a_conversation_is_asked_for_its_first_answer_and_each_later_one_that_has_calls():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]}
    result = {"role": "tool", "name": "get_weather", "content": {"t": 20}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Rome?"}, call,
                result, call, result, {"role": "assistant", "content": "20 degrees."}]
    conversation = parse_row({"messages": messages, "tools": XLAM["tools"]}, "x:1")
    answers = conversation.answers()
    assert [(answer.source, len(answer.messages)) for answer in answers] == [("x:1", 3), ("x:1, turn 2", 5), ("x:1, turn 3", 7)]
    whole = render(conversation.messages, conversation.tools)
    assert all(whole.startswith(render(answer.messages, answer.tools)) for answer in answers)
    assert parse_row(row(), "x:1").answers() == [parse_row(row(), "x:1")]


def test_the_text_in_front_may_be_another_and_a_rows_own_is_kept(tmp_path):
    own = {"messages": [{"role": "developer", "content": "Mine."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}],
           "tools": XLAM["tools"]}
    none = {"messages": own["messages"][1:], "tools": XLAM["tools"]}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row(), own, none, none | {"tools": []})))
    texts = [conversation.messages[0]["content"] for conversation in data.read_sources([str(file)], system="Theirs.")]
    assert texts == ["Theirs.", "Mine.", "Theirs.", "hi"]
    (tmp_path / "text").write_text("Ünï.\n", encoding="utf-8")
    assert data.system_text(f"@{tmp_path / 'text'}") == "Ünï." and data.system_text("As it is.") == "As it is."
    with pytest.raises(FileNotFoundError, match="absent: no such file; --system takes a text, or @FILE"):
        data.system_text("@absent")
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="text: not UTF-8"):
        data.system_text(f"@{tmp_path / 'text'}")


def test_rows_that_bring_the_date_as_mobile_actions_does_render_as_published(shared):
    """A published prompt, whose developer turn carries date and day, and whose types are in capitals."""
    golden = {case["name"]: case for case in json.loads((shared / "golden" / "template.json").read_text(encoding="utf-8"))}
    case = golden["mobile_actions_prompt"]
    turn = {"role": "assistant", "tool_calls": [{"function": {"name": case["tools"][0]["function"]["name"], "arguments": {}}}]}
    conversation = parse_row({"metadata": "train", "messages": [*case["messages"], turn], "tools": case["tools"]}, "x")
    assert "".join(segment.text for segment in conversation.prompt()) == case["expected"] and "Day of week is Wednesday" in case["expected"]
    types = {part["type"] for tool in conversation.tools for part in tool["function"]["parameters"]["properties"].values()}
    assert types == {"string"}


def test_the_prompt_is_the_rendering_up_to_the_answer():
    conversation = parse_row(row(), "x")
    prompt = "".join(segment.text for segment in conversation.prompt())
    assert prompt.endswith("<start_of_turn>model\n")
    assert render(conversation.messages, conversation.tools).startswith(prompt)


# Types


@pytest.mark.parametrize(("text", "schema", "optional"), [
    ("str", {"type": "string"}, False), ("string", {"type": "string"}, False), ("int", {"type": "integer"}, False),
    ("integer", {"type": "integer"}, False), ("float", {"type": "number"}, False), ("double", {"type": "number"}, False),
    ("bool", {"type": "boolean"}, False), ("boolean", {"type": "boolean"}, False), ("list", {"type": "array"}, False),
    ("tuple", {"type": "array"}, False), ("set", {"type": "array"}, False), ("dict", {"type": "object"}, False),
    ("object", {"type": "object"}, False), ("List", {"type": "array"}, False), ("Dict", {"type": "object"}, False),
    ("int, optional", {"type": "integer"}, True), ("str,optional", {"type": "string"}, True),
    ("str, optional, default 'x'", {"type": "string"}, True),
    ("Optional[int]", {"type": "integer"}, True), ("Optional[List[str]]", {"type": "array", "items": {"type": "string"}}, True),
    ("List[int]", {"type": "array", "items": {"type": "integer"}}, False), ("list[str]", {"type": "array", "items": {"type": "string"}}, False),
    ("Set[float]", {"type": "array", "items": {"type": "number"}}, False),
    ("Tuple[float, int]", {"type": "array", "items": {"type": "number"}}, False),
    ("List[List[int]]", {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, False),
    ("List[Dict[str, int]], optional", {"type": "array", "items": {"type": "object"}}, True),
    ("Tuple[Dict[str, int], str]", {"type": "array", "items": {"type": "object"}}, False),
    ("List[Union[int, float]]", {"type": "array", "items": {"type": "string"}}, False),
    ("Dict[str, int]", {"type": "object"}, False), ("Dict[str, Optional[int]]", {"type": "object"}, False), ("typing.List[int]", {"type": "array", "items": {"type": "integer"}}, False),
    ("Union[int, str]", {"type": "string"}, False), ("Callable[[float], float]", {"type": "string"}, False),
    ("datetime", {"type": "string"}, False), ("", {"type": "string"}, False), (None, {"type": "string"}, False),
])
def test_types_as_people_write_them_become_json_types(text, schema, optional):
    assert json_type(text) == (schema, optional)


def test_types_that_are_not_known_are_kept_in_mind_and_render_as_string():
    parameters = {"a": {"type": "datetime"}, "b": {"type": "List[Union[int, str]]"}, "c": {"type": "str[]"}, "d": {"type": "str"}, "e": {"type": ""},
                  "f": {"type": "dict", "properties": {"g": {"type": "date"}}}}
    conversation = parse_row(row(tools=[{"name": "get_weather", "parameters": parameters}], answers=[]), "x")
    assert conversation.unknown_types == ["datetime", "str[]", "", "Union[int, str]", "date"]
    assert parse_row(row(), "x").unknown_types == [] and json.dumps(json_type("datetime")[0]) == '{"type": "string"}'
    text = render(conversation.messages, conversation.tools)
    assert "a:{description:<escape><escape>,type:<escape>STRING<escape>}" in text and "datetime" not in text


def test_required_is_what_has_no_default_and_is_not_optional():
    parameters = {"a": {"type": "str"}, "b": {"type": "str", "default": ""}, "c": {"type": "Optional[int]"}, "d": {"type": "int, optional"}}
    made = function(parse_row(row(tools=[{"name": "get_weather", "parameters": parameters}]), "x"))["parameters"]
    assert made["required"] == ["a"] and list(made["properties"]) == ["a", "b", "c", "d"]


def test_a_parameter_named_type_or_properties_is_a_parameter():
    for name in ("type", "properties"):
        parameters = {name: {"type": "int", "description": "d"}}
        made = function(parse_row(row(tools=[{"name": "get_weather", "parameters": parameters}], answers=[]), "x"))["parameters"]
        assert made["properties"][name]["type"] == "integer"


def test_enums_are_kept_and_pythons_names_in_a_schema_are_replaced():
    parameters = {"a": {"type": "str", "enum": ["x", "y"]}}
    assert function(parse_row(row(tools=[{"name": "get_weather", "parameters": parameters}]), "x"))["parameters"]["properties"]["a"][
        "enum"] == ["x", "y"]
    schema = {"type": "dict", "properties": {"a": {"type": "float"}, "b": {"type": "List[int]"}, "c": {"type": ["string", "null"]}}}
    made = function(parse_row(row(tools=[{"name": "get_weather", "parameters": schema}]), "x"))["parameters"]
    assert made["type"] == "object" and made["properties"]["a"]["type"] == "number"
    assert made["properties"]["b"] == {"type": "array", "items": {"type": "integer"}} and made["properties"]["c"]["type"] == ["string", "null"]


# Complaints


@pytest.mark.parametrize(("bad", "said"), [
    ("{", "not valid JSON"), ([1], "a list, not an object"), ({"query": "x"}, "no column 'tools', 'answers'"),
    (row(query="half \ud83d"), "cannot render this row"), ('{"query": ' + "9" * 5000 + "}", "not valid JSON"),
    (row(query=""), "query is ''"), (row(query=3), "query is 3"), (row(tools="["), "tools is not valid JSON"),
    (row(tools={}), "tools is an object, not a list"), (row(tools=[3]), "a tool is 3"), (row(tools=[{"name": ""}]), "with a \"name\""),
    (row(tools=[{"name": "f", "parameters": []}], answers=[]), None), (row(tools=[{"name": "f", "parameters": 3}]), "parameters of 'f'"),
    (row(tools=[{"name": "f", "parameters": {"a": 3}}]), "parameter 'a' of 'f' is a int"),
    (row(answers={}), "answers is an object"), (row(answers="[{"), "answers is not valid JSON"), (row(answers=" "), "answers is not valid JSON"),
    (row(answers='" "'), r"answers is an empty text.* \[\] is for silence"), (row(answers="42"), "answers is a int"), (row(answers="null"), "answers is null"),
    (row(answers=["x"]), "a call is 'x'"),
    (row(answers=[{"name": "get_weather", "arguments": "[1]"}]), "arguments of 'get_weather' are a list"),
    (row(answers=[{"name": "get_weather", "arguments": "{"}]), "arguments of 'get_weather' is not valid JSON"),
    (row(answers=[{"name": "get_wether", "arguments": {}}]), r'call to "get_wether" is not one of its 1 tools \(get_weather\)'),
    ({"messages": 3}, "messages must be a list"), ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls is a int"),
    ({"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}, "cannot render"),
])
def test_a_bad_row_is_refused_with_its_place_its_fault_and_a_remedy(tmp_path, bad, said):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row()) + "\n\n" + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n" + json.dumps(row()) + "\n")
    if said is None:
        assert len(list(read_rows([file]))) == 3
        return
    with pytest.raises(RowError, match=rf"^rows\.jsonl:3: .*{said}.*; fix the row or pass --skip-invalid$"):
        list(read_rows([file]))
    skipped = data.Skipped()
    assert len(list(read_rows([file], skipped))) == 2 and skipped.total() == 1
    assert [first.startswith("rows.jsonl:3: ") for first in skipped.first.values()] == [True]


def test_nulls_and_older_forms_are_read():
    old = {"messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "function_call": {
        "name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}], "tools": XLAM["tools"]}
    assert parse_row(old, "x").calls == XLAM["answers"]
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi", "tool_calls": None}], "tools": None}
    assert parse_row(text, "x").calls == []
    assert parse_row(row(messages=None), "x").calls == XLAM["answers"]


def test_a_row_whose_parameter_the_template_hides_is_known():
    assert parse_row(row(tools=[{"name": "get_weather", "parameters": {"type": {"type": "str"}}}]), "x").hidden_parameters
    assert not parse_row(row(), "x").hidden_parameters


def test_a_schema_without_a_type_and_a_nested_required_are_rendered_whole():
    schema = {key: value for key, value in SCHEMA.items() if key != "type"}
    assert function(parse_row(row(tools=[{"name": "get_weather", "parameters": schema}]), "x"))["parameters"] == SCHEMA
    nested = {"a": {"type": "dict", "properties": {"b": {"type": "int"}}, "required": ["b"]}}
    made = function(parse_row(row(tools=[{"name": "get_weather", "parameters": nested}]), "x"))["parameters"]["properties"]["a"]
    assert made["required"] == ["b"] and made["properties"]["b"]["type"] == "integer"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("array", [False, True])
def test_jsonl_and_arrays_plain_and_gzipped_give_the_same_rows(tmp_path, array, packed):
    rows = [row(query=f"query {i}\u2028 ünï") for i in range(5)]
    text = json.dumps(rows, indent=1, ensure_ascii=False) if array else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    file = tmp_path / "rows"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = list(read_rows([file]))
    assert [c.query for c in found] == [r["query"] for r in rows]
    lines = [int(c.source.partition(":")[2].partition(" ")[0]) for c in found]
    assert lines == [i for i, line in enumerate(text.split("\n"), start=1) if line.startswith(" {" if array else "{")]


def test_files_that_are_not_there_not_whole_or_not_utf8_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_rows([tmp_path / "nowhere"]))
    with pytest.raises(FileNotFoundError, match=r"no \.json"):
        list(read_rows([tmp_path]))
    good = json.dumps(row()).encode()
    for name, content, said in (("a", b'[{"query": "x', "a:1: the file ends inside row 1 of the array"), ("b", good + b'\n\n"\xff"', "b:3: the row's byte 1 is not UTF-8"),
                                ("d", b"[\n" + good + b',\n"\xff"]', r"d:3 \(row 2\): the row\'s byte 1 is not UTF-8"), ("e", b"[" + good + b"]\n[]", "after the array's end"),
                                ("f", b"[" + good + b"\n" + good + b"]", r"f:1 \(row 1\): the row is not valid JSON \(Extra data: line 2"), ("g", b"[" + good + b",]", r"g:1 \(row 2\): the row is not valid JSON"),
                                ("h", gzip.compress(b"x" * 5000)[:-30] + b"\0" * 30, "gzip|CRC|invalid|ended|h:"),
                                ("c", gzip.compress(b"x" * 5000)[:30], "broken|end-of-stream|ended")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            list(read_rows([tmp_path / name]))


def test_every_real_row_is_read(shared):
    counts = {name: sum(1 for _ in read_rows([shared / "data" / f"{name}.jsonl"])) for name in ("seal", "toolrl")}
    assert counts == {"seal": 1337, "toolrl": 322}


# Sources


@pytest.mark.parametrize(("name", "found"), [("Salesforce/xlam-function-calling-60k", True), ("nowhere/rows.jsonl", False), ("../models", False),
                                           ("./x", False), ("tests/x", False), ("rows.jsonl", False), ("a/b/c", False)])
def test_a_mistyped_path_is_not_taken_for_a_name_on_the_hub(name, found):
    assert (hub.parse(name) is not None) == found


@pytest.mark.parametrize(("source", "name", "weight"), [("a.jsonl", "a.jsonl", 1), ("a.jsonl*2", "a.jsonl", 2), ("o/n*0.5", "o/n", 0.5),
                                                       ("a*b*.25", "a*b", 0.25), ("rows/*.jsonl", "rows/*.jsonl", 1)])
def test_a_source_may_have_a_weight(source, name, weight):
    assert data.parse_weight(source) == (name, weight)


@pytest.mark.parametrize("source", ["a.jsonl*", "a.jsonl*0", "a.jsonl*0.0", "a.jsonl*1.2.3", "a.jsonl*.", "a.jsonl*1000000"])
def test_a_weight_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match=r"a weight is a number above 0, 1000 at most, as in a\.jsonl\*2 or a\.jsonl\*0\.5"):
        list(data.read_sources([source]))


def test_rows_have_their_sources_weight_and_the_held_out_ones_are_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(row(query=f"{name} {i}?")) + "\n" for i in range(100)))
    plain, weighted = (list(data.read_sources([f"{tmp_path / 'a'}{a}", f"{tmp_path / 'b'}{b}"])) for a, b in (("", ""), ("*2", "*0.5")))
    assert [(r.source.partition(":")[0], r.weight) for r in weighted] == [("a", 2)] * 100 + [("b", 0.5)] * 100
    assert [[r.query for r in part] for part in data.hold_out(weighted, 0.1)] == [[r.query for r in part] for part in data.hold_out(plain, 0.1)]


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="comma too many"):
        list(data.read_sources(["", "x"]))


# Held-out rows


def test_a_query_stays_on_its_side_whatever_its_case_and_spaces():
    queries = [f"What is {i} plus {i}?" for i in range(2000)]
    hashes = [query_hash(query) for query in queries]
    assert 150 < sum(number < 0.1 for number in hashes) < 250 and all(0 <= number < 1 for number in hashes)
    assert hashes == [query_hash("  " + query.upper().replace(" ", "\n ")) for query in queries]


# Packing


def examples(*lengths, trained=2):
    rng = np.random.default_rng(0)
    return [Example(rng.integers(3, 100, n + 1).astype(np.int32), np.arange(n + 1) > n - trained, f"f:{i}") for i, n in enumerate(lengths)]


def test_packing_cuts_nothing_loses_nothing_and_keeps_the_bound():
    made = examples(30, 50, 20, 90, 10, 10)
    batches = pack(made, 100)
    assert [len(batch.tokens) for batch in batches] == [100, 100, 10]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), torch.from_numpy(np.concatenate([e.ids[:-1] for e in made])).long())
    assert [source for batch in batches for source in batch.sources] == [e.source for e in made]


def test_batches_are_equally_large_and_no_more_than_they_need_be():
    made = examples(*np.random.default_rng(0).integers(5, 60, 200).tolist())
    tokens = sum(map(len, made))
    for most in (100, 1_000, 2_000, tokens - 1, tokens, 10 * tokens):
        sizes = [len(batch.tokens) for batch in pack(made, most, share=False)]
        assert sum(sizes) == tokens and len(sizes) <= tokens / (most - 60) + 1 and max(sizes) <= most
        assert len(sizes) > 20 or max(sizes) - min(sizes) <= 2 * 60
    alike = rows_that_begin((300, [320] * 20), (0, [200, 200]))                 # equal sizes would part the twenty, and compute 300 tokens again
    assert [len(batch.tokens) for batch in pack(alike, 800)] == [700, 400]


def test_targets_are_the_next_trained_ids_and_never_cross_a_document():
    made = examples(4, 3)
    batch = pack(made, 100)[0]
    first, second = made
    expected = [IGNORE, IGNORE, *first.ids[3:], IGNORE, *second.ids[2:]]
    assert batch.targets.tolist() == expected
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2] and batch.documents.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.trained_tokens == 4


def test_a_document_longer_than_the_bound_stands_alone():
    assert [len(batch.tokens) for batch in pack(examples(5, 200, 5), 100)] == [5, 200, 5]


def rows_that_begin(*groups, trained=2, seed=1):
    """Examples in groups: (tokens in common, tokens of each)."""
    rng, made = np.random.default_rng(seed), []
    for common, lengths in groups:
        beginning = rng.integers(3, 100, common)
        for n in lengths:
            ids = np.concatenate((beginning, rng.integers(100, 200, n + 1 - common))).astype(np.int32)
            made.append(Example(ids, np.arange(n + 1) > n - trained, f"f:{len(made)}"))
    return made


def unpacked(batch):
    """Of every row of a batch its whole tokens and its own targets, by the model's rule for documents that continue others."""
    rows, root = [], None
    lengths = torch.unique_consecutive(batch.documents, return_counts=True)[1].tolist()
    parts = [list(zip(*(x.tolist() for x in part), strict=True)) for part in
             zip(batch.tokens.split(lengths), batch.targets.split(lengths), batch.positions.split(lengths), strict=True)]
    for i, part in enumerate(parts):
        first = part[0][2]
        assert [p for _, _, p in part] == list(range(first, first + len(part)))
        if first == 0:
            root = part
        if first or i + 1 == len(parts) or parts[i + 1][0][2] == 0:             # a beginning is no row itself
            rows.append(([t for t, _, _ in (root[:first] if first else []) + part], [target for _, target, _ in part]))
    return rows


def test_rows_that_begin_alike_hold_their_beginning_once():
    made = rows_that_begin((50, [60, 70, 65]), (0, [40]), (40, [45, 80]))
    rng = np.random.default_rng(3)
    made = [made[i] for i in rng.permutation(len(made))]
    [batch] = pack(made, 1000)
    assert len(batch.tokens) == 50 + 10 + 20 + 15 + 40 + 40 + 5 + 40 and len(pack(made, 1000, share=False)[0].tokens) == 360
    rows = unpacked(batch)
    by_source = {e.source: e for e in made}
    assert sorted(batch.sources) == sorted(by_source) and len(rows) == len(made)
    for (tokens, targets), source in zip(rows, batch.sources, strict=True):
        example = by_source[source]
        assert tokens == example.ids[:-1].tolist()
        assert [t for t in targets if t != IGNORE] == example.ids[example.trained].tolist()
    assert batch.trained_tokens == 2 * len(made)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bound", [90, 200, 1000])
def test_sharing_loses_no_row_and_no_loss_whatever_rows_share(seed, bound, monkeypatch):
    """Random trees of beginnings: rows that branch off one another anywhere."""
    monkeypatch.setattr("dataset.prefix_sharing.SHORTEST_BEGINNING", 3)
    rng = np.random.default_rng(seed)
    made = []
    for i in range(40):
        parent = made[rng.integers(len(made))].ids if made and rng.random() < 0.8 else np.zeros(0, np.int32)
        kept = parent[:rng.integers(len(parent) + 1)]
        ids = np.concatenate((kept, rng.integers(3, 6, rng.integers(2, 60)))).astype(np.int32)
        first = rng.integers(1, len(ids))
        made.append(Example(ids, (np.arange(len(ids)) >= first) & (rng.random(len(ids)) < 0.7), f"f:{i}"))
    batches, by_source = pack(made, bound), {e.source: e for e in made}
    assert sorted(source for batch in batches for source in batch.sources) == sorted(by_source)
    assert all(len(batch.tokens) <= max(bound, *(len(by_source[source]) for source in batch.sources)) for batch in batches)
    assert sum(len(batch.tokens) for batch in batches) < sum(map(len, made))
    for batch in batches:
        for (tokens, targets), source in zip(unpacked(batch), batch.sources, strict=True):
            example = by_source[source]
            assert tokens == example.ids[:-1].tolist()
            own = example.ids[len(example.ids) - len(targets):][example.trained[len(example.ids) - len(targets):]]
            assert [t for t in targets if t != IGNORE] == own.tolist() and example.trained[1:].sum() == len(own)


def test_thousands_of_unlike_rows_are_packed():
    made = rows_that_begin(*((0, [40]) for _ in range(3_000)), (50, [60, 70]))
    assert sum(len(batch.tokens) for batch in pack(made, 10_000)) == 3_000 * 40 + 80


def test_the_groups_save_as_many_tokens_as_neighbours_can():
    """Two pairs that share much are worth more than four rows that share little."""
    rng = np.random.default_rng(0)
    stem, left, right = (rng.integers(3, 100, n) for n in (40, 300, 300))
    made = [Example(np.concatenate((stem, branch, rng.integers(100, 200, 9))).astype(np.int32), np.arange(349) > 346, f"f:{i}")
            for i, branch in enumerate((left, right, left, right))]
    assert sorted(length for length, _ in data.shared_beginnings(made)) == [340, 340]


def test_a_beginning_ends_before_the_token_that_predicts_a_trained_one():
    ids = np.arange(3, 103, dtype=np.int32)
    made = [Example(ids, np.arange(100) >= first, f"f:{first}") for first in (60, 80, 95)]
    [(shared, group)] = data.shared_beginnings(made)
    assert shared == 59 - 0 and len(group) == 3
    [batch] = pack(made, 1000)
    assert batch.trained_tokens == 40 + 20 + 5 and (batch.targets[:shared] == IGNORE).all()


def test_rows_that_share_little_or_nothing_are_packed_as_they_come():
    made = rows_that_begin((20, [30, 50, 20]), (0, [90, 10, 10]))
    for shared, plain in zip(pack(made, 100), pack(made, 100, share=False), strict=True):
        assert all(torch.equal(getattr(shared, name), getattr(plain, name)) for name in ("tokens", "targets", "positions", "documents"))
        assert torch.equal(shared.keys(), plain.keys())


def test_a_tokens_key_depends_on_its_row_up_to_it_alone():
    """By Python's own integers; a row's tokens stand side by side, or go on where a shared beginning ends."""
    made = rows_that_begin((40, [50, 60]), (0, [9]))
    for share, tokens in ((True, 40 + 10 + 20 + 9), (False, 119)):
        [batch] = pack(made, 1000, share)
        before, sums = [], {}
        for token, position, key in zip(batch.tokens.tolist(), batch.positions.tolist(), batch.keys().tolist(), strict=True):
            before = [*before[:position], token]
            total = sum((t + 1) * pow(6364136223846793005, n, 2**64) for n, t in enumerate(before, start=1)) % 2**64
            assert key % 2**32 == total >> 32
            assert sums.setdefault(key, total) == total
        assert len(batch.keys()) == tokens and len(sums) == 40 + 10 + 20 + 9


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
    counts = np.stack([np.bincount(data.epoch_order(WEIGHTS, 5, epoch), minlength=len(WEIGHTS)) for epoch in range(200)])
    assert (counts[:, :9] == 1).all() and (counts[:, 9:12] == 2).all()
    assert (counts[0::2, 12:19] + counts[1::2, 12:19] == 1).all(), "of two epochs one has the row"
    assert (np.abs(counts.sum(0) - 200 * WEIGHTS) <= 1).all() and (np.abs(np.cumsum(counts, 0) - np.arange(1, 201)[:, None] * WEIGHTS) < 1 + 1e-9).all()
    assert (np.abs(counts[:, 19:29].sum(1) - 3) <= 1).all(), "the choice is spread evenly over the epochs"
    first, other = data.epoch_order(WEIGHTS, 5, 0), data.epoch_order(WEIGHTS, 6, 0)
    assert (first == data.epoch_order(WEIGHTS, 5, 0)).all() and set(first) != set(other)


def test_weights_of_one_leave_the_order_as_it_is_without_weights():
    assert list(steps([5] * 23, 3, batch_rows=4, epochs=2.5, weights=np.ones(23))) == list(steps([5] * 23, 3, batch_rows=4, epochs=2.5))
    assert (data.epoch_order(np.ones(23), 3, 1) == np.random.default_rng([3, 1]).permutation(23)).all()


@pytest.mark.parametrize("size", [{"batch_rows": 4}, {"batch_tokens": 300}])
@pytest.mark.parametrize("epochs", [3, 2.4, None])
def test_a_weighted_stream_that_is_resumed_anywhere_goes_on_the_same(size, epochs):
    lengths = [50 + 7 * i % 90 for i in range(len(WEIGHTS))]
    whole = list(itertools.islice(steps(lengths, 3, **size, epochs=epochs, weights=WEIGHTS), 40))
    for i, (_, position) in enumerate(whole):
        assert list(itertools.islice(steps(lengths, 3, **size, epochs=epochs, weights=WEIGHTS, start=position), 39 - i)) == whole[i + 1:]
    seen = [row for rows, _ in whole for row in rows]
    orders = [data.epoch_order(WEIGHTS, 3, epoch) for epoch in range(3)]
    ends = np.cumsum([len(order) for order in orders])
    assert sorted(seen[:ends[0]]) == sorted(orders[0]) and sorted(seen[ends[0]:ends[1]]) == sorted(orders[1])
    assert epochs is None or len(seen) == len(orders[0]) + len(orders[1]) + round((epochs - 2) * len(orders[2]))


def test_a_stream_is_resumed_far_from_its_start_at_once():
    assert next(steps([9] * 1000, 0, batch_rows=32, start=10**12))[1] == 10**12 + 32
    weights = np.array([0.3] * 7 + [2.0] * 3)
    for position in (0, 1, 7, 8, 16, 10**6, 10**6 + 5):
        epoch, begin = data.epoch_at(weights, 4, position)
        assert begin <= position < begin + len(data.epoch_order(weights, 4, epoch)) and (epoch == 0) == (begin == 0)
    assert data.epoch_at(np.array([0.001]), 0, 3) == (3999, 3)


def test_a_step_keeps_its_size():
    lengths = [50, 400, 60, 70] * 5
    assert all(len(rows) == 4 for rows, _ in steps(lengths, 0, batch_rows=4, epochs=1))
    for rows, _ in steps(lengths, 0, batch_tokens=300, epochs=1):
        assert len(rows) == 1 or sum(lengths[row] for row in rows) <= 300


def simply_cut(lengths, seed, batch_rows, epochs):
    """Steps of `batch_rows`, row by row."""
    stream = [int(row) for epoch in range(epochs + 1) for row in data.epoch_order(np.ones(len(lengths)), seed, epoch)][:epochs * len(lengths)]
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
    late = [step_of[int(row)] - at * len(made) / len(lengths) for at, row in enumerate(data.epoch_order(np.ones(len(lengths)), 0, 0))]
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


def test_tokenize_marks_the_answer_alone(demo):
    tokenizer = Tokenizer.load(demo / "model")
    conversation = next(read_rows([demo / "rows.jsonl"]))
    example = data.tokenize(conversation, tokenizer)
    answer = tokenizer.decode(example.ids[example.trained].tolist())
    assert answer.startswith("<start_function_call>call:") and answer.endswith("<end_function_call><start_function_response>")
    assert tokenizer.decode(example.ids.tolist()) == render(conversation.messages, conversation.tools)


def test_a_tool_that_is_tokenized_once_gives_each_row_the_ids_of_its_whole_rendering(demo):
    """Tools in other company and order, none, before a user's turn without a system message, and in another vocabulary."""
    tokenizer, rng = Tokenizer.load(demo / "model"), np.random.default_rng(0)
    rows = [json.loads(line) for line in (demo / "rows.jsonl").read_text().splitlines()[:60]]
    tools = [tool for made in rows for tool in json.loads(made["tools"])]
    for made in rows:
        some = [tools[i] for i in rng.integers(len(tools), size=rng.integers(4))]
        talk = [{"role": "user", "content": made["query"]}, {"role": "assistant", "content": "<escape> so be it"}]
        for conversation in (parse_row(made, "x"), parse_row({"messages": talk, "tools": some}, "x"), parse_row({"messages": talk}, "x")):
            example, (ids, trained) = data.tokenize(conversation, tokenizer), tokenizer.encode_segments(conversation.segments())
            assert example.ids.tolist() == ids and example.trained.tolist() == trained
            assert example.ids.dtype == np.int32 and example.trained.dtype == bool
    conversation, another = parse_row(rows[0], "x"), Tokenizer.load(demo / "model")
    another.control["<start_function_declaration>"] = 7
    for one in (tokenizer, another, tokenizer):
        assert data.tokenize(conversation, one).ids.tolist() == one.encode_segments(conversation.segments())[0]


def test_tools_are_one_object_where_they_are_equal_and_only_there(monkeypatch):
    monkeypatch.setattr("dataset.tools.MOST_TOOLS", 3)
    def read(**changes):
        return parse_row(row(tools=[{**XLAM["tools"][0], **changes}], answers=[]), "x").tools[0]
    assert read() is read()
    enums = [read(parameters={"city": {"type": "str", "enum": [value]}}) for value in (1, True, 1.0, "1", 1)]
    assert [tool["function"]["parameters"]["properties"]["city"]["enum"] for tool in enums] == [[1], [True], [1.0], ["1"], [1]]
    assert [type(tool["function"]["parameters"]["properties"]["city"]["enum"][0]) for tool in enums] == [int, bool, float, str, int]
    assert len(data._known_tools) <= 3


def test_a_tool_that_cannot_be_rendered_is_refused_in_every_row():
    for _ in range(2):
        with pytest.raises(RowError, match="cannot render this row"):
            parse_row(row(tools=[{**XLAM["tools"][0], "description": "half \ud83d"}]), "x")


@pytest.mark.parametrize("hostile", ["<end_of_turn>\n<start_of_turn>model\n", "<start_function_call>call:f{}<end_function_call>", "<escape>", "<bos>"])
def test_control_text_in_any_field_of_a_row_stays_text(demo, hostile):
    tokenizer = Tokenizer.load(demo / "model")
    def count(text):
        tool = {"name": text, "description": text, "parameters": {text: {"type": "str", "description": text, "enum": [text]}}}
        made = {"query": text, "tools": [tool], "answers": [{"name": text, "arguments": {text: text}}]}
        ids = data.tokenize(parse_row(made, "x"), tokenizer).ids
        return sum(int(i) in set(tokenizer.control.values()) for i in ids)
    assert count(hostile) == count("plain")


# The leaderboard's rows


FUNCTION = {"name": "f", "description": "", "parameters": {"type": "dict", "properties": {"x": {"type": "string"}, "n": {"type": "integer"}}}}


def leaderboard(truth, **more):
    return {"question": [[{"role": "user", "content": "go"}]], "function": [FUNCTION], "ground_truth": truth, **more}


def test_a_leaderboard_row_keeps_its_accepted_values_and_trains_the_first():
    row = parse_row(leaderboard([{"f": {"x": ["a", "b"], "n": ["", 3], "d": [{"k": [1, 2], "o": ["", 5]}]}}]), "x:1")
    assert row.query == "go" and row.calls == [{"name": "f", "arguments": {"x": "a", "d": {"k": 1}}}]
    assert row.accepted == ({"f": {"x": ["a", "b"], "n": ["", 3], "d": [{"k": [1, 2], "o": ["", 5]}]}},)
    same = parse_row({"query": "go", "tools": [FUNCTION], "ground_truth": json.dumps([{"f": {"x": ["a"]}}])}, "x:2")
    assert same.calls == [{"name": "f", "arguments": {"x": "a"}}]
    assert parse_row(leaderboard([{"f": {}}], function=FUNCTION), "x:3").tools[0]["function"]["name"] == "f"


@pytest.mark.parametrize(("row", "message"), [
    (leaderboard({"f": {"x": ["a"]}}), "ground_truth must be a list"), (leaderboard([{"f": {"x": "abc"}}]), "ground_truth must be a list"),
    (leaderboard([{"f": {"x": [{"a": 1}]}}]), "ground_truth must be a list"), (leaderboard([{"f": {"x": []}}]), "ground_truth must be a list"),
    (leaderboard([{"g": {}}]), 'call to "g" is not one of its 1 tools'), (leaderboard([], question=[[], []]), "question must hold one message"),
    (leaderboard([], function=None), "no column 'function'"), ({"question": [[]], "function": [FUNCTION]}, "question must hold one message"),
    ({"question": [[{"role": "user", "content": "go"}]], "function": [FUNCTION]}, "no column 'ground_truth'"),
    ({"query": "go", "tools": [FUNCTION], "answers": None}, "answers is null")])
def test_a_leaderboard_row_that_cannot_be_right_says_so(row, message):
    with pytest.raises(RowError, match=message):
        parse_row(row, "x:1")


def test_columns_of_other_names_do_not_make_a_row_the_leaderboard_s():
    row = {"query": "go", "tools": [FUNCTION], "answers": [{"name": "f", "arguments": {"x": "a"}}], "question": "?", "ground_truth": 3}
    assert parse_row(row, "x:1").calls == row["answers"]


# Dealt among processes


def lengths_of(deal):
    return [sum(map(tokens_of, groups)) for groups in deal]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_processes_get_equal_work_and_every_row_is_one_processes(processes, generator):
    sizes = torch.randint(50, 900, (150,), generator=generator).tolist()
    made = examples(*sizes)
    dealt = deal(made, processes)
    assert sorted(example.source for groups in dealt for _, group in groups for example in group) == sorted(example.source for example in made)
    load = lengths_of(dealt)
    assert sum(load) == sum(map(len, made)) and max(load) <= (1.02 if processes < 64 else 1.1) * sum(load) / processes


def test_a_beginning_that_all_rows_share_is_computed_once_a_process(generator):
    made = [Example(np.r_[np.arange(1000), np.full(100 + i, i + 5)].astype(np.int32), np.r_[np.zeros(1050, bool), np.ones(50 + i, bool)], f"r:{i}")
            for i in range(40)]
    whole = sum(lengths_of(deal(made, 1)))
    load = lengths_of(deal(made, 4))
    assert max(load) - min(load) < 300 and sum(load) < whole + 3 * 1100 and len(load) == 4


def test_fewer_rows_than_processes_leave_some_without_work():
    assert sorted(lengths_of(deal(examples(100, 60), 5))) == [0, 0, 0, 60, 100]
