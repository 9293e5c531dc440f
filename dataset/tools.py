"""Tools as people write them → OpenAI's envelope with a JSON Schema, and Python's type names → JSON's.

A tool is xLAM's {name, description, parameters: {p: {type, description, default?}}}, the same with a JSON
Schema as its parameters, or OpenAI's envelope {"type": "function", "function": …}.
"""
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

from dataset.errors import NestingError, RowError
from tokenizer import Tokenizer
from tokenizer.chat import SCHEMA_KEYS

# Different tools that are kept, about 10 KB each; xLAM's 60,000 rows have 3,605.
MAX_CACHED_TOOLS = 8192
# Lists of tools, as JSON text, whose parsed form is kept, and the characters of the longest.
MAX_CACHED_LISTS = 1024
MAX_CACHED_CHARACTERS = 1 << 14
# Parsing a type takes time that grows with the square of its length.
MAX_TYPE_CHARACTERS = 1000
# What a parameter in xLAM's form may have of a JSON Schema.
NESTED_KEYS = ("enum", "items", "properties", "required")


class Tool(dict):
    """A tool in OpenAI's envelope.

    Rows with the same tool share one object, so that what is computed from a tool is computed once.
    """

    declaration_texts: Sequence[str] | None = None                      # its rendering, until it is tokenized
    declaration_ids: tuple[Tokenizer, np.ndarray] | None = None         # a tokenizer, and its ids (n) int32

    @functools.cached_property
    def hides_parameters(self) -> bool:
        """Whether the template leaves a parameter out of the declaration for its name, such as "type"."""
        return not SCHEMA_KEYS.isdisjoint(self["function"]["parameters"].get("properties") or ())

    @functools.cached_property
    def unknown_types(self) -> list[str]:
        """The types that became string because no JSON type is known for them, as the row writes them."""
        schemas = [self["function"]["parameters"]]
        for schema in schemas:                                     # the list grows by the schemas inside each
            properties = schema.get("properties")
            nested = properties.values() if isinstance(properties, dict) else ()
            schemas += [child for child in (*nested, schema.get("items")) if isinstance(child, dict)]
        types = [schema.get("type") for schema in schemas]
        return [found.original for found in types if isinstance(found, UnknownType)]

    @functools.cached_property
    def digest(self) -> str:
        """A hash that is equal for tools that say the same, whatever the order of their keys."""
        text = json.dumps(self, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# JSON


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.40} is too large for a floating-point number")
    return number


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# Decode JSON text.  Raises ValueError, also for NaN and for numbers that become infinite.
decode_json = json.JSONDecoder(parse_float=_finite_float, parse_constant=_reject_constant).decode


def decode_column(value: Any, name: str) -> Any:
    """A column of a row, which may be JSON text or decoded already.  name: of the column, for the error."""
    if not isinstance(value, str):
        return value
    try:
        return decode_json(value)
    except ValueError as error:
        raise RowError("not JSON", f"{name} is not valid JSON ({error})") from None


def json_type_name(value: Any) -> str:
    """The JSON type of a value with its article, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer",
             float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


# ------------------------------------------------------------------------------------------------------------
# Tools


def parse_tools(value: Any) -> list[Tool]:
    """Tools in any of the accepted forms, or their JSON text → OpenAI's envelope.  Raises RowError."""
    cacheable = isinstance(value, str) and len(value) <= MAX_CACHED_CHARACTERS
    return list(_parse_tools_cached(value) if cacheable else _parse_tools(value))


def _parse_tools(value: Any) -> list[Tool]:
    try:
        tools = decode_column(value, "tools")
        if not isinstance(tools, list):
            raise RowError("bad tools", f"tools is {json_type_name(tools)}, not a list")
        return [_cached_tool(tool) for tool in tools]
    except RecursionError:
        raise NestingError from None


_parse_tools_cached = functools.lru_cache(MAX_CACHED_LISTS)(_parse_tools)
_tool_cache: dict[bytes, Tool] = {}         # {the tool as a row writes it: the tool}


def _cached_tool(tool: Any) -> Tool:
    """A tool, the same object as when it was read before; a cache that is full is emptied."""
    try:
        key = marshal.dumps(tool, 2)                                # version 2: equal values give equal bytes
    except ValueError:                                                  # nested too deeply, or not JSON
        return Tool(type="function", function=_parse_function(tool))
    if key not in _tool_cache:
        parsed = Tool(type="function", function=_parse_function(tool))
        if len(_tool_cache) >= MAX_CACHED_TOOLS:
            _tool_cache.clear()
        _tool_cache[key] = parsed
    return _tool_cache[key]


def _parse_function(tool: Any) -> dict:
    """{"name", "description", "parameters"} of a tool, its parameters as a JSON Schema."""
    function = tool.get("function", tool) if isinstance(tool, dict) else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("bad tool", f"a tool is {tool!r:.80}, not an object with a \"name\"")
    name = function["name"]
    parameters = decode_column(function.get("parameters") or {}, f"the parameters of {name!r:.60}")
    if not isinstance(parameters, dict):
        message = f"the parameters of {name!r:.60} are {json_type_name(parameters)}, not an object"
        raise RowError("bad tool", message)
    if _is_json_schema(parameters):
        schema = convert_types({"type": "object", **parameters})
    else:
        schema = _schema_of_xlam(name, parameters)
    return {"name": name, "description": function.get("description") or "", "parameters": schema}


def _is_json_schema(parameters: dict) -> bool:
    """Whether parameters are a JSON Schema, and not xLAM's object of parameters.

    A schema has a type in words, or properties that are parameters; xLAM may have a parameter named "type".
    """
    if isinstance(parameters.get("type"), (str, list)):
        return True
    properties = parameters.get("properties")
    return ("type" not in parameters and isinstance(properties, dict)
            and all(isinstance(value, dict) for value in properties.values()))


def _schema_of_xlam(function: str, parameters: dict) -> dict:
    """xLAM's {parameter: {type, description, default?}} → JSON Schema.

    Required is what has no default and no optional type.
    """
    properties, required = {}, []
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            found = json_type_name(parameter)
            message = f"parameter {name!r:.60} of {function!r:.60} is {found}, not an object"
            raise RowError("bad tool", message)
        schema, optional = json_type(parameter.get("type", "string"))
        nested = {key: parameter[key] for key in NESTED_KEYS if parameter.get(key)}
        description = parameter.get("description") or ""
        properties[name] = {**schema, "description": description, **convert_types(nested)}
        if not optional and "default" not in parameter:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


# ------------------------------------------------------------------------------------------------------------
# Types


class UnknownType(str):
    """"string", in place of a type for which no JSON type is known.

    original: the type as the row writes it
    """

    original: str

    def __new__(cls, original: str) -> UnknownType:
        made = super().__new__(cls, "string")
        made.original = original
        return made


JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
_JSON_TYPE_OF = {"str": "string", "string": "string", "int": "integer", "integer": "integer",
                 "float": "number", "number": "number", "double": "number",
                 "bool": "boolean", "boolean": "boolean",
                 "list": "array", "array": "array", "tuple": "array", "set": "array",
                 "dict": "object", "object": "object"}


def json_type(text: Any) -> tuple[dict, bool]:
    """A type as people write it → (JSON Schema, whether it is optional).

    >>> json_type("int, optional"), json_type("Optional[List[str]]")
    (({'type': 'integer'}, True), ({'type': 'array', 'items': {'type': 'string'}}, True))

    Union[…] and unknown types become string, as an UnknownType.
    """
    original = text.strip() if isinstance(text, str) and len(text) <= MAX_TYPE_CHARACTERS else ""
    without_optional = re.sub(r"\s*,\s*optional\b[^\[\]]*$", "", original, flags=re.IGNORECASE)
    optional = without_optional != original
    outer, bracket, inner = without_optional.removeprefix("typing.").partition("[")
    outer, inner = outer.strip().lower(), inner.rstrip().removesuffix("]")
    if bracket and outer == "optional":
        return json_type(inner)[0], True
    found = _JSON_TYPE_OF.get(outer)
    if bracket and found == "array":
        first = _first_type_argument(inner)
        return {"type": "array", "items": json_type(first)[0]} if first else {"type": "array"}, optional
    known = found and (not bracket or found == "object")
    return {"type": found if known else UnknownType(original)}, optional


def _first_type_argument(text: str) -> str:
    """The text before the first comma that is not inside brackets: "Dict[str, int], …" → "Dict[str, int]"."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            return text[:i].strip()
    return text.strip()


def convert_types(schema: Any) -> Any:
    """A JSON Schema with Python's type names, if it has any, replaced by JSON's; the rest stays as it is."""
    if isinstance(schema, list):
        return [convert_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    converted = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            known = value.lower() in JSON_TYPES
            converted.update({"type": value.lower()} if known else json_type(value)[0])
        elif key == "properties" and isinstance(value, dict):
            converted[key] = {name: convert_types(child) for name, child in value.items()}
        elif key == "items":
            converted[key] = convert_types(value)
        else:
            converted[key] = value
    return converted
