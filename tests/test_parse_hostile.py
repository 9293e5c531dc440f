"""What a model, a user or a broken connection may hand to `parse_calls`: never an exception, never a wrong shape, never slow.

Times are CPU time of this process, so a busy machine does not fail them.
"""
import json
import math
import random
import re
import time

import pytest

from dataset.errors import RowError
from dataset.rows import parse_row
from tokenizer import chat, parse_calls, render, render_segments
from tokenizer.model_file import control_names

CALL, END_CALL, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"
GRAMMAR = (CALL, CALL + "call:", CALL + "call:f{", CALL + "call:f{a:", "call:", "f", "a:", ",a:", "{", "}", "[", "]", ",", ":", ESCAPE, ESCAPE + "x" + ESCAPE,
           "}" + END_CALL, END_CALL, "true", "false", "None", "null", "inf", "-nan", "1", "-", "-0.0", "1e20", "1e999", "9" * 4301, "007", ".", " ", "\n")
UNICODE = ("é", "e\u0301", "中", "😀", "\u202e", "\x00", "\u2028", "\ud83d", "\udc00", "\ufeff", "١", "＜", "\U0010ffff")
CONTROL = tuple(control_names())
PIECES = GRAMMAR + UNICODE + CONTROL
WEIGHTS = [1] * len(GRAMMAR) + [0.3] * len(UNICODE) + [0.05] * len(CONTROL)
NOT_FINITE = re.compile(r"inf|nan|[0-9][eE]\+?[0-9]{3}|[0-9]{309}")


def answer(*calls):
    """What the model says to make these calls: (name, arguments) each."""
    functions = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return render([{"role": "assistant", "tool_calls": functions}]).removeprefix("<bos><start_of_turn>model\n")


def exactly(value):
    """With types and the sign of zero told apart."""
    return json.dumps(value, sort_keys=True)


def check_shape(found, text):
    assert isinstance(found, list) and all(type(reason) is str for reason in found.unread)
    for call in found:
        assert set(call) == {"name", "arguments"} and type(call["name"]) is str and call["name"] and type(call["arguments"]) is dict
    try:
        assert json.loads(json.dumps(found, allow_nan=False)) == found
    except ValueError:
        assert NOT_FINITE.search(text), text
        json.dumps(found)


def values_read(text, monkeypatch):
    """How many values `parse_calls` looks at."""
    count, read = [0], chat._read_value

    def counted(text, at):
        count[0] += 1
        return read(text, at)

    monkeypatch.setattr(chat, "_read_value", counted)
    check_shape(parse_calls(text), text)
    monkeypatch.undo()
    return count[0]


# Random text


def random_text(chance):
    kind = chance.random()
    if kind < 0.005:
        opening = chance.choice(("[", "{a:", "{a:["))
        return CALL + "call:f{a:" + opening * chance.choice((50, 300, 5000)) + chance.choice(("", "1", "]" * 300, "}" * 300))
    if kind < 0.15:
        return "".join(chr(chance.randrange(0x110000)) for _ in range(chance.randrange(12))) + chance.choice(GRAMMAR)
    pieces = chance.choices(PIECES, WEIGHTS, k=chance.randrange(1, 16))
    return f"{CALL}call:f{{a:{''.join(pieces[:chance.randrange(1, 5)])}}}{END_CALL}" if kind < 0.6 else "".join(pieces)


def test_100000_random_texts_are_read_or_named_within_15_seconds():
    chance = random.Random(0)
    texts = [random_text(chance) for _ in range(100_000)]
    start = time.process_time()
    found = [parse_calls(text) for text in texts]
    assert time.process_time() - start < 15
    for calls, text in zip(found, texts, strict=True):
        check_shape(calls, text)
        assert calls or calls.unread or CALL not in text
    assert sum(map(bool, found)) > 5000 and sum(bool(calls.unread) for calls in found) > 5000       # both are well tried


def random_value(chance, text, depth=0):
    kind = chance.randrange(9 if depth < 3 else 7)
    if kind < 2:
        return text()
    if kind < 7:
        return chance.choice((None, True, False, 0, -1, 2**70, -0.0, 1e20, 1e308, 5e-324, 0.1))
    if kind == 7:
        return [random_value(chance, text, depth + 1) for _ in range(chance.randrange(4))]
    return {key: random_value(chance, text, depth + 1) for key in {text() for _ in range(chance.randrange(4))} if readable_key(key)}


def readable_key(key):
    return ":" not in key and ESCAPE not in key and CALL not in key and not key.startswith("}")


def test_random_calls_made_of_the_grammars_own_pieces_come_back_exactly():
    """All that docs/format.md does not list as lost; keys with a call's opening token are left out as well."""
    chance = random.Random(1)

    def text():
        return "".join(chance.choices(PIECES, k=chance.randrange(5))).replace(ESCAPE, "<esc")

    for _ in range(10_000):
        calls = []
        for _ in range(chance.randrange(1, 4)):
            name = text().replace("{", "").replace("<", "") or "f"
            calls.append((name, {key: random_value(chance, text) for key in {text() for _ in range(3)} if readable_key(key)}))
        found = parse_calls(answer(*calls))
        assert found.unread == [] and exactly(found) == exactly([{"name": name, "arguments": arguments} for name, arguments in calls])


# Cut and changed answers


THREE = (("get_weather", {"city": "Rome", "days": 3, "at": [41.9, -12.5], "strict": True}),
         ("send mail", {"to": {"name": "José", "cc": [None, "a, b: {c}"]}, "body": "Hi\n[…] 😀"}),
         ("stop", {"why": "it's late"}))


def test_an_answer_cut_anywhere_gives_the_calls_that_are_whole_and_names_the_one_that_is_not():
    text = answer(*THREE)
    for end in range(len(text) + 1):
        cut = text[:end]
        found, whole = parse_calls(cut), cut.count(END_CALL)
        assert found == [{"name": name, "arguments": arguments} for name, arguments in THREE[:whole]]
        assert len(found.unread) == cut.count(CALL) - whole


def test_an_answer_whose_beginning_is_missing_gives_the_calls_that_are_whole():
    text = answer(*THREE)
    for start in range(len(text) + 1):
        found = parse_calls(text[start:])
        whole = text[start:].count(CALL)
        assert found.unread == [] and [call["name"] for call in found] == [name for name, _ in THREE[3 - whole:]]


def test_one_wrong_character_in_a_call_never_touches_the_calls_around_it():
    before, text, after = (answer(call).removesuffix("<start_function_response>") for call in THREE)
    first, last = parse_calls(before)[0], parse_calls(after)[0]
    for at in range(len(text)):
        changed = {text[:at] + text[at + 1:]}
        for new in ("<", "{", "}", "[", ",", ":", "1", "x", " ", "\ud83d", ESCAPE, END_CALL):
            changed |= {text[:at] + new + text[at + 1:], text[:at] + new + text[at:]}
        for wrong in changed:
            found = parse_calls(before + wrong + after)
            check_shape(found, wrong)
            assert found[0] == first and found[-1] == last
            assert len(found) + len(found.unread) == 2 + (CALL in wrong), wrong       # read or named, unless no call is left to see


# Names, numbers, depth


@pytest.mark.parametrize("name", [
    "get weather", " f ", "a.b.c", "a/b-c", 'say "hi"', "it's", "`f`", "名前", "Zürich", "e\u0301", "😀", "\u202ef", "f\n", "\x00", "\ud83d", "a}b", "a:b", "a,b",
    "[f]", "call:f", "<b>", "a<b", "<escape", "start_function_call>", "<start_of_turn>", "<end_function_response>", "None", "1", "f" * 10_000])
def test_a_name_of_any_characters_comes_back(name):
    found = parse_calls(answer((name, {"a": 1}), (name, {})))
    assert found == [{"name": name, "arguments": {"a": 1}}, {"name": name, "arguments": {}}] and found.unread == []


@pytest.mark.parametrize("number", [1e20, -0.0, 1e308, -1.7976931348623157e308, 5e-324, 0.1 + 0.2, 2**70, -(2**70), 2**53 + 1, 10**4299])
def test_a_number_keeps_its_type_and_value_inside_lists_and_objects(number):
    arguments = {"a": [number, [number]], "b": {"c": number}}
    assert exactly(parse_calls(answer(("f", arguments)))[0]["arguments"]) == exactly(arguments)


def nested(kind, depth):
    value = 1
    for level in range(depth):
        value = [value] if kind == "lists" or (kind == "both" and level % 2) else {"a": value}
    return value


@pytest.mark.parametrize("kind", ["lists", "objects", "both"])
def test_values_nested_50_deep_come_back(kind):
    arguments = {"a": nested(kind, 50)}
    assert parse_calls(answer(("f", arguments))) == [{"name": "f", "arguments": arguments}]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a:", "}"), ("{a:[", "]}")])
def test_values_nested_10000_deep_are_named_and_the_next_call_is_read(opening, closing):
    found = parse_calls(f"{CALL}call:deep{{a:{opening * 10_000}1{closing * 10_000}}}{END_CALL}{answer(('f', {'a': 1}))}")
    assert found == [{"name": "f", "arguments": {"a": 1}}]
    assert len(found.unread) == 1 and "nested too deeply" in found.unread[0]


@pytest.mark.parametrize("kind", ["lists", "objects"])
def test_a_row_nested_10000_deep_is_refused_as_a_row(kind):
    row = {"query": "q", "tools": [{"name": "f"}], "answers": [{"name": "f", "arguments": {"a": nested(kind, 10_000)}}]}
    with pytest.raises(RowError, match="more than 100 deep"):
        parse_row(row, "x")


# Rows without tools


@pytest.mark.parametrize("tools", [[], "[]"])
def test_a_row_without_tools_declares_none_and_trains_silence(tools):
    row = parse_row({"query": "hi", "tools": tools, "answers": []}, "x")
    rendered = render(row.messages, row.tools)
    assert "declaration" not in rendered and rendered.startswith("<bos><start_of_turn>developer\n")
    assert "".join(text for text, carries_loss in row.segments() if carries_loss) == "<end_of_turn>\n"


@pytest.mark.parametrize("tools", [{}, {"tools": None}, {"tools": []}, {"tools": "[]"}])
def test_messages_without_tools_get_no_developer_turn(tools):
    row = parse_row({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], **tools}, "x")
    assert render(row.messages, row.tools) == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"
    assert render_segments(row.messages, None) == render_segments(row.messages, [])


def test_a_call_in_a_row_without_tools_is_refused():
    call = {"name": "f", "arguments": {}}
    for row in ({"query": "hi", "tools": [], "answers": [call]},
                {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": call}]}]}):
        with pytest.raises(RowError, match='call to "f" is not one of its 0 tools'):
            parse_row(row, "x")


# Time


@pytest.mark.parametrize("unit", [
    CALL + "call:f{", "[", "{a:", "{", ":", ESCAPE, CALL, CALL + "call:", CALL + "call:f{a:[", CALL + "call:f{a:{", CALL + "call:f{a:" + ESCAPE,
    CALL + "call:f{a:1}", "1", "<", "a:1,", "," + ESCAPE])
def test_100_kilobytes_of_one_piece_are_read_within_a_second(unit):
    for beginning in ("", CALL + "call:f{a:", CALL + "call:f{a:" + ESCAPE):
        for ending in ("", "{", ":", ESCAPE, END_CALL):
            text = beginning + (unit * (100_000 // len(unit) + 1))[:100_000] + ending
            start = time.process_time()
            found = parse_calls(text)
            assert time.process_time() - start < 1, (beginning, ending)
            check_shape(found, text)


@pytest.mark.parametrize("unit", [
    CALL + "call:f{", CALL + "call:f{a:[", CALL + "call:f{a:" + ESCAPE, CALL + "call:f{a:" + ESCAPE + ",a:" + ESCAPE + ",a:",
    CALL + "call:1,b{:1,", CALL + "call:1,b:{",
    CALL + "call:f{1]" + ESCAPE + ",:" + ESCAPE + "1"])
def test_twice_the_text_is_at_most_twice_the_work(unit, monkeypatch):
    assert values_read(unit * 200, monkeypatch) < 2.2 * values_read(unit * 100, monkeypatch) + 10


def test_a_number_of_100000_digits_is_no_work():
    start = time.process_time()
    found = parse_calls(f"{CALL}call:f{{a:{'9' * 100_000},b:-{'9' * 100_000}}}{END_CALL}")
    assert time.process_time() - start < 1 and found[0]["arguments"] == {"a": math.inf, "b": -math.inf}
