"""Tools and their types."""
from __future__ import annotations

import functools
import hashlib
import json
import marshal
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataset.errors import TOO_DEEP, RowError
from tokenizer import Tokenizer
from tokenizer.chat import SCHEMA_KEYS

# Tools that are remembered, some 10 KB each; xLAM's 60,000 rows have 3,605 different ones.
MOST_TOOLS = 8192
LONGEST_TOOLS = 1 << 14         # characters of a row's tools that are remembered as a whole


LONGEST_TOOLS = 1 << 14         # characters of a row's tools that are remembered as a whole


class Tool(dict):
    """A tool in OpenAI's envelope. Rows with the same tool share one object: what is found out once holds for all of them."""

    rendered: Sequence[str] | None = None                               # its declaration, which the template took, until it is encoded
    encoded: tuple[Tokenizer, np.ndarray] | None = None                 # its declaration's ids, and whose they are

    @functools.cached_property
    def hides_parameters(self) -> bool:
        """Whether a parameter's name is one that the official template leaves out of the declaration ("type", for one)."""
        return not SCHEMA_KEYS.isdisjoint(self["function"]["parameters"].get("properties") or ())

    @functools.cached_property
    def unknown_types(self) -> list[str]:
        """The types that became string because none is known for them, as the row writes them."""
        schemas = [self["function"]["parameters"]]
        for schema in schemas:                                # grows by what it holds
            parts = schema["properties"].values() if isinstance(schema.get("properties"), dict) else ()
            schemas += [part for part in (*parts, schema.get("items")) if isinstance(part, dict)]
        return [schema["type"].word for schema in schemas if isinstance(schema.get("type"), UnknownType)]

    @functools.cached_property
    def digest(self) -> str:
        """Equal for tools that say the same, whatever the order of their keys."""
        return hashlib.blake2b(json.dumps(self, sort_keys=True).encode(), digest_size=16).hexdigest()


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.40} is beyond the numbers that a computer holds")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_no_constant)


def _decoded(value: Any, what: str) -> Any:
    """`value`, or what it says if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return _JSON.decode(value)
    except ValueError as error:
        raise RowError("not JSON", f"{what} is not valid JSON ({error})") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


_known_tools: dict[bytes, Tool] = {}        # {what was read: the tool}


def parse_tools(value: Any) -> list[Tool]:
    """Tools in any of the accepted forms, or their JSON text → OpenAI's envelope.  Raises RowError."""
    return list(_tools_in(value) if isinstance(value, str) and len(value) <= LONGEST_TOOLS else _parse_tools(value))


def _parse_tools(value: Any) -> list[Tool]:
    try:
        tools = _decoded(value, "tools")
        if not isinstance(tools, list):
            raise RowError("bad tools", f"tools is {_kind(tools)}, not a list")
        return [_known_tool(tool) for tool in tools]
    except RecursionError:
        raise RowError("nested too deeply", TOO_DEEP) from None


_tools_in = functools.lru_cache(1024)(_parse_tools)


def _known_tool(tool: Any) -> Tool:
    """A tool, the same object as when it was read before; all are forgotten when there are too many."""
    try:
        key = marshal.dumps(tool, 2)                                    # version 2: equal values, equal bytes
    except ValueError:                                                  # nested too deeply, or not out of JSON
        return Tool(type="function", function=_function(tool))
    if key not in _known_tools:
        made = Tool(type="function", function=_function(tool))
        if len(_known_tools) >= MOST_TOOLS:
            _known_tools.clear()
        _known_tools[key] = made
    return _known_tools[key]


def _function(tool: Any) -> dict:
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("bad tool", f"a tool is {tool!r:.80}, not an object with a \"name\"")
    parameters = _decoded(function.get("parameters") or {}, f"the parameters of {function['name']!r:.60}")
    if not isinstance(parameters, dict):
        raise RowError("bad tool", f"the parameters of {function['name']!r:.60} are {_kind(parameters)}, not an object")
    made = {"name": function["name"], "description": function.get("description") or ""}
    if _is_json_schema(parameters):
        made["parameters"] = _with_json_types({"type": "object", **parameters})
    else:
        properties, required = {}, []
        for name, parameter in parameters.items():
            if not isinstance(parameter, dict):
                raise RowError("bad tool", f"parameter {name!r:.60} of {made['name']!r:.60} is {_kind(parameter)}, not an object")
            schema, optional = json_type(parameter.get("type", "string"))
            extra = {key: parameter[key] for key in ("enum", "items", "properties", "required") if parameter.get(key)}
            properties[name] = {**schema, "description": parameter.get("description") or "", **_with_json_types(extra)}
            if not optional and "default" not in parameter:
                required.append(name)
        made["parameters"] = {"type": "object", "properties": properties, "required": required}
    return made


def _is_json_schema(parameters: dict) -> bool:
    """xLAM maps parameter names to objects; a JSON Schema has a type in words, or properties that are parameters."""
    return isinstance(parameters.get("type"), (str, list)) or (
        isinstance(parameters.get("properties"), dict) and "type" not in parameters
        and all(isinstance(value, dict) for value in parameters["properties"].values()))


class UnknownType(str):
    """"string", in place of a type that no JSON type is known for; `word` is how the row calls it."""

    word: str

    def __new__(cls, word: str) -> UnknownType:
        made = super().__new__(cls, "string")
        made.word = word
        return made


JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
_TYPE_OF = {"str": "string", "string": "string", "int": "integer", "integer": "integer",
            "float": "number", "number": "number", "double": "number", "bool": "boolean", "boolean": "boolean",
            "list": "array", "array": "array", "tuple": "array", "set": "array", "dict": "object", "object": "object"}


_TYPE_OF = {"str": "string", "string": "string", "int": "integer", "integer": "integer",
            "float": "number", "number": "number", "double": "number", "bool": "boolean", "boolean": "boolean",
            "list": "array", "array": "array", "tuple": "array", "set": "array", "dict": "object", "object": "object"}


def json_type(text: Any) -> tuple[dict, bool]:
    """A type as people write it → (JSON Schema, whether it is optional).

    >>> json_type("int, optional"), json_type("Optional[List[str]]")
    (({'type': 'integer'}, True), ({'type': 'array', 'items': {'type': 'string'}}, True))

    Union[…] and whatever is unknown become string, as an UnknownType.
    """
    text = whole = text.strip() if isinstance(text, str) and len(text) <= 1000 else ""      # what follows takes the square of its length
    bare = re.sub(r"\s*,\s*optional\b[^\[\]]*$", "", text, flags=re.IGNORECASE)
    optional, text = bare != text, bare.removeprefix("typing.")
    outer, bracket, inner = text.partition("[")
    outer, inner = outer.strip().lower(), inner.rstrip().removesuffix("]")
    if bracket and outer == "optional":
        return json_type(inner)[0], True
    kind = _TYPE_OF.get(outer)
    if bracket and kind == "array":
        first = _first_argument(inner)
        return {"type": "array", "items": json_type(first)[0]} if first else {"type": "array"}, optional
    return {"type": kind if kind and (not bracket or kind == "object") else UnknownType(whole)}, optional


def _first_argument(text: str) -> str:
    """The text before the first comma that is not inside brackets: "Dict[str, int], …" → "Dict[str, int]"."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            return text[:i].strip()
    return text.strip()


def _with_json_types(schema: Any) -> Any:
    """A JSON Schema with Python's type names, if it has any, replaced by JSON's; the rest as it was."""
    if isinstance(schema, list):
        return [_with_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            made.update({"type": value.lower()} if value.lower() in JSON_TYPES else json_type(value)[0])
        elif key == "properties" and isinstance(value, dict):
            made[key] = {name: _with_json_types(property_) for name, property_ in value.items()}
        elif key == "items":
            made[key] = _with_json_types(value)
        else:
            made[key] = value
    return made
