"""dataset/tools.py: every way to write a tool, every type rule; equal tools are one object."""
import json

import pytest
from sample_rows import SCHEMA, XLAM, row

from dataset import tools
from dataset.errors import RowError
from dataset.rows import parse_row
from dataset.tools import json_type
from tokenizer import render


def function(conversation):
    return conversation.tools[0]["function"]


def test_the_three_ways_to_write_a_tool_render_alike():
    bare = {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}
    forms = [row(), row(tools=[bare]), row(tools=[{"type": "function", "function": bare}])]
    rendered = {render(c.messages, c.tools) for c in (parse_row(form, "x") for form in forms)}
    assert len(rendered) == 1 and "declaration:get_weather" in rendered.pop()


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


def test_a_row_whose_parameter_the_template_hides_is_known():
    assert parse_row(row(tools=[{"name": "get_weather", "parameters": {"type": {"type": "str"}}}]), "x").hidden_parameters
    assert not parse_row(row(), "x").hidden_parameters


def test_a_schema_without_a_type_and_a_nested_required_are_rendered_whole():
    schema = {key: value for key, value in SCHEMA.items() if key != "type"}
    assert function(parse_row(row(tools=[{"name": "get_weather", "parameters": schema}]), "x"))["parameters"] == SCHEMA
    nested = {"a": {"type": "dict", "properties": {"b": {"type": "int"}}, "required": ["b"]}}
    made = function(parse_row(row(tools=[{"name": "get_weather", "parameters": nested}]), "x"))["parameters"]["properties"]["a"]
    assert made["required"] == ["b"] and made["properties"]["b"]["type"] == "integer"


# One object


def test_tools_are_one_object_where_they_are_equal_and_only_there(monkeypatch):
    monkeypatch.setattr("dataset.tools.MAX_CACHED_TOOLS", 3)
    def read(**changes):
        return parse_row(row(tools=[{**XLAM["tools"][0], **changes}], answers=[]), "x").tools[0]
    assert read() is read()
    enums = [read(parameters={"city": {"type": "str", "enum": [value]}}) for value in (1, True, 1.0, "1", 1)]
    assert [tool["function"]["parameters"]["properties"]["city"]["enum"] for tool in enums] == [[1], [True], [1.0], ["1"], [1]]
    assert [type(tool["function"]["parameters"]["properties"]["city"]["enum"][0]) for tool in enums] == [int, bool, float, str, int]
    assert len(tools._tool_cache) <= 3


def test_a_tool_that_cannot_be_rendered_is_refused_in_every_row():
    for _ in range(2):
        with pytest.raises(RowError, match="cannot render this row"):
            parse_row(row(tools=[{**XLAM["tools"][0], "description": "half \ud83d"}]), "x")
