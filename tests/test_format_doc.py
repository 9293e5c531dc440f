"""docs/format.md says what the code does: its examples are rendered and read back, its tables and lists checked."""
import ast
import json
import math
import re
from itertools import groupby
from pathlib import Path

import pytest

from dataset.errors import RowError
from dataset.rows import parse_row
from dataset.tools import json_type
from tokenizer import DEVELOPER_TEXT, Tokenizer, parse_calls, render, render_segments
from tokenizer.chat import SCHEMA_KEYS
from tokenizer.model_file import control_names, train_model_file

DOC = (Path(__file__).resolve().parent.parent / "docs" / "format.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", DOC, re.DOTALL | re.MULTILINE)
RENDERED = [text for kind, text in BLOCKS if kind == "text"]
DATA = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
CODE = next(text for kind, text in BLOCKS if kind == "python")
MESSAGES, TOOLS = ({node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(CODE).body}[name] for name in ("messages", "tools"))
CALLS, TURNS, ROW, FORMS = DATA
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", DOC, re.DOTALL | re.MULTILINE))


def marked(messages, tools=None):
    """The rendered text, with « before and » after what carries loss."""
    runs = groupby(render_segments(messages, tools), key=lambda segment: segment.carries_loss)
    texts = ((carries_loss, "".join(segment.text for segment in run)) for carries_loss, run in runs)
    return "".join(f"«{text}»" if carries_loss else text for carries_loss, text in texts)


def table(section, header):
    """The cells of the rows of the table with this header line."""
    lines = SECTIONS[section].split(f"{header}\n")[1].split("\n")[1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[:lines.index("")]]


def code(cell):
    """What stands between a cell's backticks."""
    return re.findall(r"`([^`]+)`", cell)


def answer(name, arguments):
    return render([{"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}]).split("model\n", 1)[1]


def declaration(parameters):
    rendered = render([{"role": "user", "content": "q"}], [{"name": "f", "parameters": parameters}])
    return rendered.split("<start_function_declaration>")[1].split("<end_function_declaration>")[0]


# The examples


def test_the_worked_example_is_what_render_prints_and_its_marks_are_what_carries_loss():
    assert marked(MESSAGES, TOOLS) == RENDERED[0]
    assert render(MESSAGES, TOOLS) == re.sub("[«»]", "", RENDERED[0])


def test_the_prompts_are_everything_before_the_marks():
    first, last = map(int, re.findall(r"messages\[:(\d)\]", DOC))
    assert render(MESSAGES[:first], TOOLS, add_generation_prompt=True) == RENDERED[0].partition("«")[0]
    assert render(MESSAGES[:last], TOOLS, add_generation_prompt=True) == re.sub("[«»]", "", RENDERED[0].rpartition("«")[0])


def test_the_worked_examples_answer_is_read_as_the_documented_calls():
    found = parse_calls(RENDERED[0][RENDERED[0].index("«") + 1:RENDERED[0].index("»")])
    assert found == CALLS and found.unread == []
    assert found == [call["function"] for call in MESSAGES[2]["tool_calls"]]


def test_the_developer_sentence_is_the_one_that_rows_get():
    assert MESSAGES[0] == {"role": "developer", "content": DEVELOPER_TEXT}


def test_the_example_of_several_turns_is_what_render_prints():
    assert marked(TURNS["messages"]) == RENDERED[1]


def test_the_xlam_row_becomes_the_text_under_it():
    row = parse_row(ROW, "format.md:1")
    assert marked(row.messages, row.tools) == RENDERED[2]
    assert parse_calls(RENDERED[2][RENDERED[2].index("«"):]) == ROW["answers"]


def test_the_xlam_row_may_be_json_texts():
    texts = {"query": ROW["query"], "tools": json.dumps([{**ROW["tools"][0], "parameters": json.dumps(ROW["tools"][0]["parameters"])}]),
             "answers": json.dumps([{**ROW["answers"][0], "arguments": json.dumps(ROW["answers"][0]["arguments"])}])}
    assert parse_row(texts, "x") == parse_row(ROW, "x")


def test_without_answers_the_end_of_the_turn_alone_carries_loss():
    row = parse_row({**ROW, "answers": []}, "x")
    assert marked(row.messages, row.tools).partition("«")[2] == "<end_of_turn>\n»"
    assert "With `\"answers\": []` the model is to stay silent: the text that carries loss is `<end_of_turn>\\n`." in SECTIONS["xLAM rows"]


def test_a_text_for_answers_carries_loss_as_documented():
    row = parse_row({**ROW, "answers": "I only add."}, "x")
    assert marked(row.messages, row.tools).partition("«")[2] == "I only add.<end_of_turn>\n»"
    for broken in ("[", "{"):
        with pytest.raises(RowError, match="not valid JSON"):
            parse_row({**ROW, "answers": broken + "x"}, "x")


def test_the_date_is_said_as_in_the_published_prompt(shared):
    golden = {case["name"]: case for case in json.loads((shared / "golden" / "template.json").read_text(encoding="utf-8"))}
    [block] = [text for kind, text in BLOCKS if text.startswith("Current date")]
    assert golden["mobile_actions_prompt"]["messages"][0] == {"role": "developer", "content": block + "\n"}


def test_the_three_forms_of_a_tool_give_one_declaration():
    rows = [parse_row({"query": "q", "tools": [form], "answers": []}, "x") for form in FORMS]
    assert len(FORMS) == 3 and len({render(row.messages, row.tools) for row in rows}) == 1


def test_several_results_may_stand_in_one_message():
    one = {"role": "tool", "content": [{"name": message["name"], "response": message["content"]} for message in MESSAGES[3:5]]}
    assert render([*MESSAGES[:3], one, MESSAGES[5]], TOOLS) == render(MESSAGES, TOOLS)


# Tables and lists


def test_control_tokens_have_the_documented_ids(tmp_path):
    train_model_file(["the weather in Rome is 12 degrees"] * 40, tmp_path, 400)
    tokenizer = Tokenizer.load(tmp_path)
    rows = table("Control tokens", "| id | token | where it stands |")
    ids = {name: int(i) for numbers, names, _ in rows for i, name in zip(numbers.split(", "), code(names), strict=True)}
    assert {name: tokenizer.control[name] for name in ids} == ids
    assert set(re.findall(r"<(?:\w+_function_\w+|\w+_of_turn|eos|bos|escape)>", DOC)) == set(ids)
    encoded, _ = tokenizer.encode_segments(render_segments(MESSAGES, TOOLS))
    assert set(ids.values()) - {1} <= set(encoded) and encoded.count(ids["<bos>"]) == 1 and tokenizer.encode("\n") == [107]


def test_every_control_token_named_is_one_of_the_published():
    named = set(re.findall(r"<(?:start|end|image)_\w+>|<(?:bos|eos|escape)>", DOC))
    assert named <= {*control_names(), "<image_soft_token>", "<end_of_image>"}


def test_decoding_stops_at_the_documented_ids():
    from inference.decoding import STOP_IDS
    line = next(line for line in SECTIONS["Control tokens"].split("\n") if line.startswith("Decoding stops at"))
    assert {int(i) for i in re.findall(r"\bat (\d+)", line)} == set(STOP_IDS)


@pytest.mark.parametrize(("value", "written"), [[code(cell)[0] for cell in row] for row in table("Values", "| JSON | written |")])
def test_values_are_written_as_documented_and_come_back(value, written):
    answered = answer("f", {"x": json.loads(value)})
    assert answered == f"<start_function_call>call:f{{x:{written}}}<end_function_call><start_function_response>"
    assert json.dumps(parse_calls(answered)[0]["arguments"]["x"], sort_keys=True) == json.dumps(json.loads(value), sort_keys=True)


def test_types_become_what_the_document_says():
    header, cells = "| string | integer | number | boolean | array | object |", []
    cells = table("xLAM rows", header)[0]
    for kind, spellings in zip(header.strip("| ").split(" | "), map(code, cells), strict=True):
        for text in (kind, *spellings):
            assert json_type(text) == json_type(text.upper()) == ({"type": kind}, False), text
    integers = {"type": "array", "items": {"type": "integer"}}
    for text, expected in {"Optional[int]": ({"type": "integer"}, True), "int, optional": ({"type": "integer"}, True),
                           "List[int]": (integers, False), "Set[int]": (integers, False), "Tuple[int, str]": (integers, False),
                           "Dict[str, int]": ({"type": "object"}, False), "Union[int, str]": ({"type": "string"}, False),
                           "datetime": ({"type": "string"}, False)}.items():
        assert f"`{text}`" in SECTIONS["xLAM rows"] and json_type(text) == expected, text


def losses():
    return [(*ast.literal_eval(code(given)[0]), ast.literal_eval(code(back)[0]) if back.startswith("`") else None)
            for given, back in table("What is lost on the way back", "| name and arguments | come back as |")]


@pytest.mark.parametrize(("name", "arguments", "back"), losses())
def test_what_is_lost_comes_back_as_documented(name, arguments, back):
    found = parse_calls(answer(name, arguments))
    if back is None:
        assert found == [] and len(found.unread) == 1
    else:
        assert found == [{"name": back[0], "arguments": back[1]}] and found.unread == []
        assert list(found[0]["arguments"]) == list(back[1])


# Statements in words


def test_a_name_with_one_of_four_control_tokens_is_unread_and_with_another_is_not():
    row = next(line for line in DOC.split("\n") if line.startswith("| `\"\", {}` |"))
    tokens = [token for token in code(row) if token.startswith("<")]
    assert len(tokens) == 4
    for token in {*tokens, "<start_function_response>", "<start_of_turn>", "<bos>", "<end_function_response>"}:
        found = parse_calls(answer(f"f{token}", {}))
        assert bool(found.unread) == (not found) == (token in tokens), token


def test_a_key_may_begin_with_a_brace_unless_it_is_the_first():
    assert parse_calls(answer("f", {"a": 1, "}": 2})) == [{"name": "f", "arguments": {"a": 1, "}": 2}}]


def test_arguments_that_are_none_come_back_empty():
    assert parse_calls(answer("f", None)) == [{"name": "f", "arguments": {}}]


def test_infinity_and_nan_come_back():
    found = parse_calls(answer("f", {"a": math.inf, "b": -math.inf, "c": math.nan}))[0]["arguments"]
    assert json.dumps(found) == '{"a": Infinity, "b": -Infinity, "c": NaN}'


def test_an_integer_of_more_than_4300_digits_is_refused_by_render_and_infinity_in_an_answer():
    assert parse_calls(answer("f", {"a": 10**4299}))[0]["arguments"] == {"a": 10**4299}
    with pytest.raises(ValueError, match="4300 digits"):
        answer("f", {"a": 10**4300})
    assert parse_calls("<start_function_call>call:f{a:" + "9" * 4301 + "}<end_function_call>")[0]["arguments"] == {"a": math.inf}


def test_values_too_deep_for_the_stack_are_an_error_in_render_and_unread_in_an_answer():
    value = []
    for _ in range(2000):
        value = [value]
    with pytest.raises(RecursionError):
        answer("f", {"a": value})
    found = parse_calls("<start_function_call>call:f{a:" + "[" * 2000 + "]" * 2000 + "}<end_function_call>")
    assert found == [] and len(found.unread) == 1


def test_text_around_the_calls_is_not_returned():
    found = parse_calls("Let me see. " + answer("f", {}) + " Done.")
    assert found == [{"name": "f", "arguments": {}}] and found.unread == []


def test_a_call_inside_a_string_is_returned_only_where_the_call_around_it_is_unreadable():
    around = answer("send", {"text": answer("delete", {})})
    assert [call["name"] for call in parse_calls(around)] == ["send"]
    cut = parse_calls(around[:-len("<escape>}<end_function_call><start_function_response>")])
    assert [call["name"] for call in cut] == ["delete"] and len(cut.unread) == 1


def test_a_call_that_a_user_typed_is_read_out_of_a_whole_conversation():
    assert parse_calls(render([{"role": "user", "content": answer("f", {})}])) == [{"name": "f", "arguments": {}}]


def test_what_else_is_read_and_what_is_not():
    call = "<start_function_call>call:f{{a:{}}}<end_function_call>"
    read = {text: parse_calls(call.format(text))[0]["arguments"]["a"] for text in ("null", "007", "1E5")}
    assert read == {"null": None, "007": 7, "1E5": 1e5}
    assert parse_calls("<start_function_call>call:f{<escape>a:b<escape>:1,c:1,c:2}<end_function_call>")[0]["arguments"] == {"a:b": 1, "c": 2}
    for text in ("True", "+1", ".5", " 1"):
        assert parse_calls(call.format(text)) == [] and f"`{text}`" in SECTIONS["What is lost on the way back"], text


def test_arguments_as_a_json_string_are_printed_after_20_spaces():
    assert answer("f", '{"a": 1}').startswith("<start_function_call>call:f{" + " " * 20 + '{"a": 1}}')


def test_parameters_with_the_listed_names_are_left_out_at_every_depth_but_stay_required():
    listed = code(DOC.split("**Parameters named** ")[1].split(":")[0])
    assert set(listed) == SCHEMA_KEYS
    properties = {name: {"type": "string"} for name in (*listed, "kept")}
    assert declaration({"type": "object", "properties": properties, "required": ["type"]}) == (
        "declaration:f{description:<escape><escape>,parameters:{properties:{kept:{description:<escape><escape>,type:<escape>STRING<escape>}},"
        "required:[<escape>type<escape>],type:<escape>OBJECT<escape>}}")
    nested = declaration({"type": "object", "properties": {"a": {"type": "object", "properties": properties}}})
    assert "properties:{a:{description:<escape><escape>,properties:{kept:" in nested and "nullable" not in nested


def test_words_of_a_schema_are_written_inside_items_alone():
    words = {"default": 3, "format": "int32", "minimum": 1, "enum": [1]}
    outside = declaration({"type": "object", "properties": {"a": {"type": "integer", **words}, "b": {"anyOf": [{"type": "string"}]}}})
    assert not any(word in outside for word in (*words, "anyOf")) and "b:{description:<escape><escape>,type:<escape><escape>}" in outside
    inside = declaration({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer", **words, "x": {"k": 1}}}}})
    assert "items:{default:3,enum:[1],format:<escape>int32<escape>,minimum:1,type:<escape>INTEGER<escape>,x:{<escape>k<escape>:1}}" in inside
    listed = declaration({"type": "object", "properties": {"a": {"type": ["string", "null"]}}})
    assert "type:<escape>['STRING', 'NULL']<escape>" in listed


def test_an_object_without_properties_declares_its_other_words():
    assert "properties:{default:{description:" in declaration({"type": "object", "properties": {"a": {"type": "object", "default": {}}}})


def test_parameters_without_a_type_lose_a_brace_unless_data_py_adds_it():
    parameters = {"properties": {"a": {"type": "string"}}}
    written = declaration(parameters)
    assert written.count("{") == written.count("}") + 1
    row = parse_row({"query": "q", "tools": [{"name": "f", "parameters": parameters}], "answers": []}, "x")
    written = declaration(row.tools[0]["function"]["parameters"])
    assert written.count("{") == written.count("}")


def test_roles_out_of_order_render_as_documented():
    call, result, user = MESSAGES[2], MESSAGES[3], {"role": "user", "content": "and?"}
    assert render([call, result, user]).endswith("<end_function_response>and?<end_of_turn>\n")
    assert render([call, user]).endswith("<end_function_call><start_of_turn>user\nand?<end_of_turn>\n")
    assert render([user, {"role": "system", "content": "s"}]).endswith("<start_of_turn>system\ns<end_of_turn>\n")


def test_text_and_result_names_are_stripped_and_arguments_are_not():
    rendered = render([{"role": "user", "content": " q\n"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {" a ": " x "}}}]},
                       {"role": "tool", "name": " f ", "content": " y "}])
    assert "user\nq<end_of_turn>" in rendered and "call:f{ a :<escape> x <escape>}" in rendered and "response:f{value:<escape> y <escape>}" in rendered
