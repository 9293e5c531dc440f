"""FunctionGemma's conversation format: `render` writes it, `parse_calls` reads the calls in an answer.

A tool, a question and its answer become

    <bos><start_of_turn>developer
    You are …<start_function_declaration>declaration:f{…}<end_function_declaration><end_of_turn>
    <start_of_turn>user
    weather in Rome?<end_of_turn>
    <start_of_turn>model
    <start_function_call>call:f{city:<escape>Rome<escape>}<end_function_call><start_function_response>

Only what the model has to produce carries loss, here the last line. `render_segments` decides what that is,
and nothing else does. Control tokens are `Control` strings, which only this file makes: a user who types
"<end_of_turn>" gets ordinary text, because `Tokenizer.encode_segments` gives a control token's id to a
`Control` alone.

Source: the chat template published with google/functiongemma-270m-it. `render` gives the same output,
oddities included: a parameter called "type" is left out of its declaration, for one.
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import repeat
from typing import Any, NamedTuple


class Control(str):
    """The name of a control token, written by the template.  Text from a row is never a `Control`."""

    __slots__ = ()


class Segment(NamedTuple):
    """A piece of a rendered conversation.  carries_loss: whether the model must produce it."""

    text: str
    carries_loss: bool


Pairs = list[tuple[str, bool]]          # many segments, as plain tuples because these are faster to make

BOS = Control("<bos>")
TURN, END_TURN = Control("<start_of_turn>"), Control("<end_of_turn>")
DECLARATION, END_DECLARATION = Control("<start_function_declaration>"), Control("<end_function_declaration>")
CALL, END_CALL = Control("<start_function_call>"), Control("<end_function_call>")
RESPONSE, END_RESPONSE = Control("<start_function_response>"), Control("<end_function_response>")
ESCAPE = Control("<escape>")

# Google calls this sentence essential: without it FunctionGemma calls nothing. The template does not add it.
DEVELOPER_TEXT = "You are a model that can do function calling with the following functions"

# Inside a declaration these keys belong to the schema itself, so the template skips parameters of that name.
SCHEMA_KEYS = frozenset(("description", "type", "properties", "required", "nullable"))


def render(messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
    """The conversation as the official template renders it.  Arguments as for `render_segments`."""
    return "".join(segment.text for segment in render_segments(messages, tools, add_generation_prompt))


def render_segments(messages: list[dict], tools: list[dict] | None = None,
                    add_generation_prompt: bool = False) -> list[Segment]:
    """The rendered conversation in segments, each with or without loss; their texts joined are `render`'s.

    What the model writes in an assistant turn carries loss: calls up to and including
    <start_function_response>, text up to and including "<end_of_turn>\\n". The "<start_of_turn>model\\n"
    before it and the responses of tools do not.

    messages: [{"role", "content", "tool_calls"?, "name"?}] as in OpenAI's API, with arguments as dicts
    tools: OpenAI's {"type": "function", "function": {name, description, parameters}}, or only the function
    Raises ValueError for messages that the official template refuses, or whose shape it cannot render.
    """
    before, after = render_around_tools(messages, bool(tools), add_generation_prompt)
    declared = ((text, False) for tool in tools or () for text in render_tool(tool))
    return [Segment(*pair) for pair in (*before, *declared, *after)]


def render_tool(tool: dict) -> list[str]:
    """The texts of a tool's declaration.  None carries loss, and nothing else in the conversation matters."""
    return [text for text in (DECLARATION, *_declaration(tool), END_DECLARATION) if text]


def render_around_tools(messages: list[dict], tools: bool,
                        add_generation_prompt: bool = False) -> tuple[Pairs, Pairs]:
    """The segments before the tools' declarations, and those after them.  tools: whether there are any"""
    parts: Pairs = []                # all segments so far, in order

    def emit(texts: list[str], carries_loss: bool = False) -> None:
        parts.extend(zip(texts, repeat(carries_loss)))

    system = messages[0] if messages and messages[0].get("role") in ("system", "developer") else None
    before = [BOS]
    if tools or system:
        before += [TURN, "developer\n", *_content(system or {})]
        emit([END_TURN, "\n"])

    previous = None             # the role of the message before, with "tool" for a response
    awaits_response = False     # the last message has calls of the model, and no response came yet
    for i, message in enumerate(messages[1:] if system else messages, start=1 if system else 0):
        role = "model" if message.get("role") == "assistant" else message.get("role")
        if not isinstance(role, str):
            raise ValueError(f"message {i}: role is {role!r}; give it a string such as \"user\" or \"assistant\"")
        if role == "tool":
            for response in _responses(message, i):
                emit([RESPONSE], awaits_response)   # the model itself writes the first one after its calls
                emit([*response, END_RESPONSE])
                awaits_response = False
        else:
            by_model = role == "model"
            if previous != "tool":
                emit([TURN, role + "\n"])
            emit(_content(message, i), by_model)
            calls = message.get("tool_calls") or ()
            for call in calls:
                emit([CALL, *_call(call, i), END_CALL], by_model)
            awaits_response = bool(calls) and by_model
            if calls and i == len(messages) - 1:
                emit([RESPONSE], by_model)
            elif not calls:
                emit([END_TURN, "\n"], by_model)
        previous = role
    if add_generation_prompt and previous != "tool":
        emit([TURN, "model\n"])
    return [(text, False) for text in before if text], [pair for pair in parts if pair[0]]


def _content(message: dict, i: int = 0) -> list[str]:
    """A message's text, stripped; OpenAI's list of text parts is stripped part by part."""
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content.strip()]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return ["".join(str(part.get("text", "")).strip() for part in content if part.get("type") == "text")]
    raise ValueError(f"message {i}: content is {type(content).__name__}; give it a string or a list of text parts")


def _call(call: dict, i: int) -> list[str]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"message {i}: tool call {call!r} has no function name")
    arguments = function.get("arguments")
    out = [f"call:{function['name']}{{"]
    if isinstance(arguments, dict):
        _items(out, arguments, escape_keys=False)
    elif isinstance(arguments, str):        # the template prints a JSON string unchanged: never train on it
        out.append(" " * 20 + arguments)
    return [*out, "}"]


def _responses(message: dict, i: int) -> Iterable[list[str]]:
    """One list of parts for each response in a tool message."""
    content = message.get("content")
    for item in content if isinstance(content, list) else [content]:
        name, value = message.get("name"), item
        if isinstance(item, dict) and "name" in item and "response" in item:
            name, value = item["name"], item["response"]
        if name is None:
            raise ValueError(f"message {i}: a tool response needs the name of its function; "
                             "add \"name\" to the message, or give content as {\"name\", \"response\"}")
        out = [f"response:{str(name).strip()}{{"]
        _items(out, value if isinstance(value, dict) else {"value": value}, escape_keys=False)
        yield [*out, "}"]


def _declaration(tool: dict) -> list[str]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise ValueError(f"a tool needs a \"name\", as {{\"function\": {{\"name\": …}}}}; got {tool!r:.200}")
    out = [f"declaration:{function['name']}{{description:", *_escaped(function.get("description", ""))]
    if parameters := function.get("parameters"):
        if not isinstance(parameters, dict):
            raise ValueError(f"tool {function['name']!r}: parameters is {type(parameters).__name__}, not an object")
        out.append(",parameters:{")
        if parameters.get("properties"):
            out.append("properties:{")
            _properties(out, parameters["properties"])
            out.append("},")
        if parameters.get("required"):
            _required(out, parameters["required"])
            out.append(",")
        if parameters.get("type"):
            out += ["type:", *_escaped(str(parameters["type"]).upper()), "}"]      # no type, no closing brace
    return [*out, "}"]


def _properties(out: list[str], properties: dict) -> None:
    comma = ""
    for key, schema in _sorted(properties):
        if key in SCHEMA_KEYS:
            continue
        schema = schema if isinstance(schema, dict) else {}
        kind = str(schema.get("type", "")).upper()
        out += [f"{comma}{key}:{{description:", *_escaped(schema.get("description", ""))]
        if kind == "STRING" and schema.get("enum"):
            out.append(",enum:")
            _argument(out, schema["enum"])
        elif kind == "OBJECT":
            nested = schema.get("properties")
            out.append(",properties:{")
            _properties(out, nested if isinstance(nested, dict) else schema)
            out.append("}")
            if schema.get("required"):
                out.append(",")
                _required(out, schema["required"])
        elif kind == "ARRAY" and isinstance(schema.get("items"), dict) and schema["items"]:
            _array_items(out, schema["items"])
        out += [",type:", *_escaped(kind), "}"]
        comma = ","


def _array_items(out: list[str], items: dict) -> None:
    out.append(",items:{")
    comma = ""
    for key, value in _sorted(items):
        if value is None:
            continue
        out.append(comma)
        comma = ","
        if key == "properties":
            out.append("properties:{")
            if isinstance(value, dict):
                _properties(out, value)
            out.append("}")
        elif key == "required":
            _required(out, value)
        elif key == "type":
            out.append("type:")
            _argument(out, value.upper() if isinstance(value, str) else [str(kind).upper() for kind in value])
        else:
            out.append(f"{key}:")
            _argument(out, value)
    out.append("}")


def _required(out: list[str], names: list) -> None:
    out.append("required:[")
    for i, name in enumerate(names):
        out += [",", *_escaped(name)] if i else _escaped(name)
    out.append("]")


def _argument(out: list[str], value: Any, escape_keys: bool = True) -> None:
    """Any JSON value: strings between <escape>s, true/false, {} and [], the rest as Python prints it."""
    if isinstance(value, str):
        out += _escaped(value)
    elif isinstance(value, bool):
        out.append("true" if value else "false")
    elif isinstance(value, dict):
        out.append("{")
        _items(out, value, escape_keys)
        out.append("}")
    elif isinstance(value, (list, tuple)):
        out.append("[")
        for i, item in enumerate(value):
            if i:
                out.append(",")
            _argument(out, item, escape_keys)
        out.append("]")
    else:
        out.append(str(value))


def _items(out: list[str], mapping: dict, escape_keys: bool) -> None:
    for i, (key, value) in enumerate(_sorted(mapping)):
        if i:
            out.append(",")
        out += [*_escaped(key), ":"] if escape_keys else [f"{key}:"]
        _argument(out, value, escape_keys)


def _escaped(value: Any) -> list[str]:
    return [ESCAPE, str(value), ESCAPE]


def _sorted(mapping: dict) -> list[tuple[Any, Any]]:
    return sorted(mapping.items(), key=lambda item: str(item[0]).lower())


# ---------------------------------------------------------------------------------------------------------------------
# The inverse


class Calls(list):
    """A list of {"name", "arguments"}.  unread: a sentence for each call in the text that cannot be read."""

    unread: list[str]


class _Unreadable(Exception):
    pass


def parse_calls(text: str) -> Calls:
    """The calls in a model's answer, [{"name": str, "arguments": dict}]: the inverse of `render`.

    Any JSON value comes back as it was, except what the format cannot tell apart: the order of an object's
    keys (they are written sorted); a string that holds the text "<escape>"; a key that holds ":", "<escape>"
    or "<start_function_call>", or begins with "}"; a function name that holds "{" or a control token's name;
    integers of more digits than Python prints. docs/format.md lists what becomes of each.

    Never raises, whatever a model wrote. A call that cannot be read is left out, and `unread` says why.

    >>> parse_calls("<start_function_call>call:f{city:<escape>Rome<escape>,days:3}<end_function_call>")
    [{'name': 'f', 'arguments': {'city': 'Rome', 'days': 3}}]
    """
    calls, at = Calls(), 0
    calls.unread = []
    while (start := text.find(CALL, at)) >= 0:
        at = start + len(CALL)
        try:
            if not text.startswith("call:", at):
                raise _Unreadable(f"expected \"call:\" at character {at}")
            brace = text.find("{", at)
            if brace < 0:
                raise _Unreadable(f"no \"{{\" after the name at character {at}")
            name = text[at + len("call:"):brace]
            if not name or ("<" in name and any(token in name for token in (CALL, END_CALL, ESCAPE, END_TURN))):
                raise _Unreadable(f"no function name at character {at + len('call:')}")
            arguments, end = _read_object(text, brace)
            if not text.startswith(END_CALL, end):
                raise _Unreadable(f"expected {END_CALL} at character {end}, found {text[end:end + 20]!r}")
            calls.append({"name": name, "arguments": arguments})
            at = end + len(END_CALL)
        except _Unreadable as error:
            calls.unread.append(f"call at character {start}: {error}")
        except RecursionError:
            calls.unread.append(f"call at character {start}: nested too deeply to read")
    return calls


def _read_value(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and the position after it."""
    if text.startswith(ESCAPE, at):
        start = at + len(ESCAPE)
        end = text.find(ESCAPE, start)
        if end < 0:
            raise _Unreadable(f"the string at character {at} has no closing {ESCAPE}")
        return text[start:end], end + len(ESCAPE)
    if text.startswith("{", at):
        return _read_object(text, at)
    if text.startswith("[", at):
        values, at = [], at + 1
        if text.startswith("]", at):
            return values, at + 1
        while True:
            value, at = _read_value(text, at)
            values.append(value)
            if text.startswith("]", at):
                return values, at + 1
            at = _read_comma(text, at)
    return _read_literal(text, at)


def _read_object(text: str, at: int) -> tuple[dict, int]:
    values, at = {}, at + 1
    if text.startswith("}", at):
        return values, at + 1
    while True:
        if text.startswith(ESCAPE, at):                     # keys are escaped in declarations; accept it here as well
            key, at = _read_value(text, at)
            if not text.startswith(":", at):
                raise _Unreadable(f"expected \":\" at character {at}")
        else:
            colon = text.find(":", at)
            if colon < 0:
                raise _Unreadable(f"no \":\" after the key at character {at}")
            key, at = text[at:colon], colon
            if CALL in key or ESCAPE in key:    # it runs into the next call; no text is read more than twice
                raise _Unreadable(f"a key may not hold {CALL} or {ESCAPE}; one begins at character {at - len(key)}")
        values[key], at = _read_value(text, at + 1)
        if text.startswith("}", at):
            return values, at + 1
        at = _read_comma(text, at)


def _read_comma(text: str, at: int) -> int:
    if not text.startswith(",", at):
        raise _Unreadable(f"expected \",\" or a closing bracket at character {at}, found {text[at:at + 20]!r}")
    return at + 1


_LITERAL = re.compile(r"[^,}\]<]*")
_INTEGER = re.compile(r"-?[0-9]{1,4300}")
_FLOAT = re.compile(r"-?([0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|inf|nan)")
_CONSTANTS = {"true": True, "false": False, "None": None, "null": None}


def _read_literal(text: str, at: int) -> tuple[Any, int]:
    match = _LITERAL.match(text, at)
    word, end = match.group(), match.end()
    if word in _CONSTANTS:
        return _CONSTANTS[word], end
    if _INTEGER.fullmatch(word):
        return int(word), end
    if _FLOAT.fullmatch(word):
        return float(word), end
    raise _Unreadable(f"{word[:40]!r} at character {at} is neither a number, true, false, None nor a string "
                      f"between {ESCAPE}s")
