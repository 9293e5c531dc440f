"""dataset/rows.py: every shape of row, and every complaint."""
import json

import pytest
from sample_rows import XLAM, row

from dataset.errors import RowError, SkippedRows
from dataset.files import read_system_text
from dataset.rows import parse_row, read_rows, read_sources
from tokenizer import DEVELOPER_TEXT, render

# Shapes of rows


def test_columns_may_be_json_texts_and_arguments_too():
    answers = [{"name": "get_weather", "arguments": json.dumps({"city": "Rome"})}]
    texts = row(tools=json.dumps(XLAM["tools"]), answers=json.dumps(answers))
    assert parse_row(texts, "x") == parse_row(row(), "x") == parse_row(json.dumps(texts), "x")


def test_the_developer_sentence_is_added_and_arguments_are_a_dict():
    conversation = parse_row(row(), "x")
    assert conversation.messages[0] == {"role": "developer", "content": DEVELOPER_TEXT}
    assert conversation.calls == [{"name": "get_weather", "arguments": {"city": "Rome"}}]
    assert conversation.query == "weather in Rome?"


def test_messages_rows_train_every_assistant_turn():
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "{\"t\": 20}"}, {"role": "assistant", "content": "20 degrees."}]
    conversation = parse_row({"messages": messages, "tools": XLAM["tools"]}, "x")
    with_loss = "".join(segment.text for segment in conversation.segments() if segment.carries_loss)
    assert with_loss == ("<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call><start_function_response>"
                       "20 degrees.<end_of_turn>\n")
    assert conversation.messages[0]["role"] == "developer"
    assert "response:get_weather{value:" in render(conversation.messages, conversation.tools)


def test_a_system_message_of_ones_own_is_kept():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}]
    assert parse_row({"messages": messages, "tools": XLAM["tools"]}, "x").messages[0]["content"] == "Be brief."


def test_a_row_without_answers_trains_silence():
    with_loss = [segment.text for segment in parse_row(row(answers=[]), "x").segments() if segment.carries_loss]
    assert "".join(with_loss) == "<end_of_turn>\n"


@pytest.mark.parametrize("text", ["I can only tell the weather.", '"I can only tell the weather."'])
def test_a_text_for_answers_is_said_instead_of_calling(text):
    conversation = parse_row(row(answers=text), "x")
    assert "".join(segment.text for segment in conversation.segments() if segment.carries_loss) == "I can only tell the weather.<end_of_turn>\n"
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
    texts = [conversation.messages[0]["content"] for conversation in read_sources([str(file)], system="Theirs.")]
    assert texts == ["Theirs.", "Mine.", "Theirs.", "hi"]
    (tmp_path / "text").write_text("Ünï.\n", encoding="utf-8")
    assert read_system_text(f"@{tmp_path / 'text'}") == "Ünï." and read_system_text("As it is.") == "As it is."
    with pytest.raises(FileNotFoundError, match="absent: no such file; --system takes a text, or @FILE"):
        read_system_text("@absent")
    (tmp_path / "text").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="text: not UTF-8"):
        read_system_text(f"@{tmp_path / 'text'}")


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


def test_nulls_and_older_forms_are_read():
    old = {"messages": [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": None, "function_call": {
        "name": "get_weather", "arguments": "{\"city\": \"Rome\"}"}}], "tools": XLAM["tools"]}
    assert parse_row(old, "x").calls == XLAM["answers"]
    text = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi", "tool_calls": None}], "tools": None}
    assert parse_row(text, "x").calls == []
    assert parse_row(row(messages=None), "x").calls == XLAM["answers"]


# Complaints


@pytest.mark.parametrize(("bad", "said"), [
    ("{", "not valid JSON"), ([1], "a list, not an object"), ({"query": "x"}, "no column 'tools', 'answers'"),
    (row(query="half \ud83d"), "cannot render this row"), ('{"query": ' + "9" * 5000 + "}", "not valid JSON"),
    (row(query=""), "query is ''"), (row(query=3), "query is 3"), (row(tools="["), "tools is not valid JSON"),
    (row(tools={}), "tools is an object, not a list"), (row(tools=[3]), "a tool is 3"), (row(tools=[{"name": ""}]), "with a \"name\""),
    (row(tools=[{"name": "f", "parameters": []}], answers=[]), None), (row(tools=[{"name": "f", "parameters": 3}]), "parameters of 'f'"),
    (row(tools=[{"name": "f", "parameters": {"a": 3}}]), "parameter 'a' of 'f' is an integer"),
    (row(answers={}), "answers is an object"), (row(answers="[{"), "answers is not valid JSON"), (row(answers=" "), "answers is not valid JSON"),
    (row(answers='" "'), r"answers is an empty text.* \[\] is for silence"), (row(answers="42"), "answers is an integer"), (row(answers="null"), "answers is null"),
    (row(answers=["x"]), "a call is 'x'"),
    (row(answers=[{"name": "get_weather", "arguments": "[1]"}]), "arguments of 'get_weather' are a list"),
    (row(answers=[{"name": "get_weather", "arguments": "{"}]), "arguments of 'get_weather' is not valid JSON"),
    (row(answers=[{"name": "get_wether", "arguments": {}}]), r'call to "get_wether" is not one of its 1 tools \(get_weather\)'),
    ({"messages": 3}, "messages must be a list"), ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls is an integer"),
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
    skipped = SkippedRows()
    assert len(list(read_rows([file], skipped))) == 2 and skipped.total == 1
    assert [first.startswith("rows.jsonl:3: ") for first in (entry["first"] for entry in skipped.values())] == [True]


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
