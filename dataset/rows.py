"""Every shape of row → `Conversation`. A row that cannot be right is rejected here, with file:line.

A row has one of three shapes:
    xLAM         {"query": …, "tools": […], "answers": [{"name", "arguments"}]}; either list may be JSON text
                 "answers" may also be [], for silence, or a text that the model says instead of calling
    messages     {"messages": […], "tools": […]}, OpenAI's chat format; every assistant turn carries loss
    leaderboard  {"question", "function", "ground_truth": [{name: {parameter: [accepted, …]}}]}, of one turn
                 "ground_truth" may also replace "answers" in xLAM's columns
                 training takes the first accepted value of each parameter

Nothing is cut or guessed.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.errors import MAX_NESTING, MAX_ROW_BYTES, BadRow, NestingError, RowError, SkippedRows
from dataset.files import RawRow, fetch, named_files, parse_weight, raw_rows
from dataset.tools import Tool, decode_column, decode_json, json_type_name, parse_tools
from tokenizer import DEVELOPER_TEXT, Pairs, Segment, render_around_tools, render_segments, render_tool

MAX_LISTED_TOOLS = 8            # in the error of a call to an unknown function


@dataclass(frozen=True)
class Conversation:
    """One row.

    tools: in OpenAI's envelope; messages: in OpenAI's format, with arguments as dicts; source: "file:line"
    accepted: {name: {parameter: [accepted, …]}} for each call, where the row gives several accepted values
    """

    tools: list[Tool]
    messages: list[dict]
    source: str
    accepted: tuple[dict, ...] = ()

    @property
    def query(self) -> str:
        """The first message of the user."""
        return message_text(next((m for m in self.messages if m["role"] == "user"), {}))

    @property
    def calls(self) -> list[dict]:
        """The calls of the first assistant turn, [{"name", "arguments"}]."""
        return message_calls(self.messages[self.first_answer])

    @property
    def first_answer(self) -> int:
        """The index of the first assistant turn in `messages`."""
        return next(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    def answers(self) -> list[Conversation]:
        """The conversation up to its first assistant turn, and up to each later one that has calls."""
        ends = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        answers = []
        for turn, end in enumerate(ends, start=1):
            if turn == 1 or message_calls(self.messages[end]):
                source = self.source if turn == 1 else f"{self.source}, turn {turn}"
                answers.append(replace(self, messages=self.messages[:end + 1], source=source))
        return answers

    @property
    def hidden_parameters(self) -> bool:
        """Whether the official template leaves a parameter of one of the tools out."""
        return any(tool.hides_parameters for tool in self.tools)

    @property
    def unknown_types(self) -> list[str]:
        """The types of all tools that became string, as the row writes them."""
        return [word for tool in self.tools for word in tool.unknown_types]

    @functools.cached_property
    def segments_around_tools(self) -> tuple[Pairs, Pairs]:
        """The segments before the tools' declarations, and those after them."""
        return render_around_tools(self.messages, bool(self.tools))

    def segments(self) -> list[Segment]:
        """The rendered conversation."""
        return render_segments(self.messages, self.tools)

    def prompt(self) -> list[Segment]:
        """The rendered conversation up to the first assistant turn."""
        return render_segments(self.messages[:self.first_answer], self.tools, add_generation_prompt=True)


def message_text(message: dict) -> str:
    """The text of a message; the parts of OpenAI's list of parts with spaces between them."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return " ".join(str(part.get("text", "")) for part in parts)


def message_calls(message: dict) -> list[dict]:
    """The calls of a message, [{"name", "arguments"}]."""
    return [call["function"] for call in message.get("tool_calls") or ()]


# ------------------------------------------------------------------------------------------------------------
# Rows out of files


def read_sources(sources: Iterable[str], skipped: SkippedRows | None = None,
                 system: str = DEVELOPER_TEXT) -> Iterator[Conversation]:
    """The conversations of a list of `--data` sources, in order.  Arguments and errors as for `read_rows`."""
    for name, _ in [parse_weight(source) for source in sources]:
        yield from read_rows(fetch(name), skipped, system)


def read_rows(files: Sequence[str | Path], skipped: SkippedRows | None = None,
              system: str = DEVELOPER_TEXT) -> Iterator[Conversation]:
    """The conversations of each file, or of each .json, .jsonl and .gz file in a folder, in order.

    skipped: counts the bad rows; without it the first one raises RowError
    system: the developer message of rows that have neither a developer nor a system message of their own
    """
    for path, name in named_files(files):
        for row in parse_rows(raw_rows(path), system, f"{name}:"):
            if isinstance(row, Conversation):
                yield row
            elif skipped is None:
                raise row.error()
            else:
                skipped.add(row.cause, f"{row.source}: {row.message}")


def parse_rows(rows: Iterable[RawRow], system: str, file: str = "") -> Iterator[Conversation | BadRow]:
    """Each raw row as a conversation, or what is wrong with it.

    file: what stands before the place of a row in its source
    """
    for place, row in rows:
        source = file + place
        try:
            parsed = parse_row(row, source, system)
        except RowError as error:
            parsed = BadRow(source, error.cause, str(error))
        yield parsed


def parse_row(row: Any, source: str, system: str = DEVELOPER_TEXT) -> Conversation:
    """One row, as decoded JSON or as JSON text (str, or bytes in UTF-8).  Raises RowError."""
    try:
        row = _decode_row(row)
        parse = _parse_messages if row.get("messages") is not None else _parse_columns
        return _check_rendering(parse(row, source, system))
    except RecursionError:
        raise NestingError from None


def _decode_row(row: Any) -> dict:
    if isinstance(row, bytes):
        if len(row) > MAX_ROW_BYTES:
            limit = f"{MAX_ROW_BYTES >> 20} MiB"
            message = f"the row is longer than {limit}, many times what a model reads at once"
            raise RowError("too long", message)
        try:
            row = row.decode()
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"the row's byte {error.start} is not UTF-8") from None
    row = decode_column(row, "the row")
    if not isinstance(row, dict):
        expected = "an object with \"query\", \"tools\" and \"answers\""
        raise RowError("not an object", f"the row is {json_type_name(row)}, not {expected}")
    return row


# ------------------------------------------------------------------------------------------------------------
# xLAM's columns and the leaderboard's


def _parse_columns(row: dict, source: str, system: str) -> Conversation:
    row = _leaderboard_to_xlam(row)
    missing = [key for key in ("query", "tools", "answers") if key not in row]
    if missing:
        expected = "a row has \"query\", \"tools\" and \"answers\", or \"messages\" and \"tools\""
        raise RowError("missing column", f"no column {', '.join(map(repr, missing))}; {expected}")
    query = row["query"]
    if not isinstance(query, str) or not query.strip():
        raise RowError("empty query", f"query is {query!r:.60}; it must be a text")
    tools = parse_tools(row["tools"])
    if row["answers"] is None and "ground_truth" in row:
        accepted = _parse_ground_truth(row["ground_truth"])
        answers: Any = [_first_accepted_call(call) for call in accepted]
    else:
        accepted, answers = (), row["answers"]
    messages = [{"role": "developer", "content": system}, {"role": "user", "content": query},
                _assistant_message(answers, tools)]
    return Conversation(tools, messages, source, accepted)


def _assistant_message(answers: Any, tools: list[Tool]) -> dict:
    """The assistant turn of a list of calls or its JSON text, of [] for silence, or of a text to say."""
    if isinstance(answers, str):
        try:
            answers = decode_json(answers)
        except ValueError as error:
            if answers.lstrip()[:1] in ("[", "{", ""):                  # meant as calls
                raise RowError("not JSON", f"answers is not valid JSON ({error})") from None
    if isinstance(answers, str) and answers.strip():
        return {"role": "assistant", "content": answers, "tool_calls": []}
    if not isinstance(answers, list):
        found = "an empty text" if isinstance(answers, str) else json_type_name(answers)
        expected = "not a list of {\"name\", \"arguments\"}, nor a text to say; [] is for silence"
        raise RowError("bad answers", f"answers is {found}, {expected}")
    functions = _functions_by_name(tools)
    calls = [{"type": "function", "function": _parse_call(answer, functions)} for answer in answers]
    return {"role": "assistant", "content": None if calls else "", "tool_calls": calls}


def _leaderboard_to_xlam(row: dict) -> dict:
    """A row of the leaderboard in xLAM's columns; any other row as it is."""
    if "answers" in row or not {"question", "ground_truth"} & row.keys():
        return row
    row = {"tools": row.get("function", row.get("tools")), "answers": None, **row}
    if isinstance(row["tools"], dict):
        row["tools"] = [row["tools"]]
    elif row["tools"] is None:
        expected = "a leaderboard's row has it beside \"question\" and \"ground_truth\""
        raise RowError("missing column", f"no column 'function'; {expected}")
    if "query" not in row:
        row["query"] = _leaderboard_query(row.get("question"))
    if "ground_truth" not in row:
        advice = "put the leaderboard's answers into its rows"
        raise RowError("missing column", f"no column 'ground_truth' beside 'question'; {advice}")
    return row


def _leaderboard_query(question: Any) -> Any:
    """The content of the one message in [[message]] or [message]."""
    nested = isinstance(question, list) and len(question) == 1 and isinstance(question[0], list)
    turn = question[0] if nested else question
    one_message = isinstance(turn, list) and len(turn) == 1 and isinstance(turn[0], dict)
    if not one_message or turn[0].get("role") != "user":
        expected = "[[{\"role\": \"user\", \"content\": …}]]; provide several turns as \"messages\""
        raise RowError("bad question", f"question must hold one message of the user, {expected}")
    return turn[0].get("content")


def _parse_ground_truth(value: Any) -> tuple[dict, ...]:
    """[{name: {parameter: [accepted, …]}}], or its JSON text, as a tuple."""
    calls = decode_column(value, "ground_truth")
    for call in calls if isinstance(calls, list) else [None]:
        parameters = next(iter(call.values())) if isinstance(call, dict) and len(call) == 1 else None
        if not isinstance(parameters, dict) or not _lists_accepted_values(parameters):
            expected = "a list of {name: {parameter: [accepted, …]}}"
            raise RowError("bad answers", f"ground_truth must be {expected}, not {call!r:.80}")
    return tuple(calls)


def _lists_accepted_values(value: Any) -> bool:
    """Whether every object in a value maps its keys to lists of accepted values."""
    if isinstance(value, dict):
        return all(isinstance(accepted, list) and accepted and all(map(_lists_accepted_values, accepted))
                   for accepted in value.values())
    return not isinstance(value, list) or all(map(_lists_accepted_values, value))


def _first_accepted_call(call: dict) -> dict:
    """{name: {parameter: [accepted, …]}} → {"name", "arguments"}, with the first accepted values.

    A parameter whose first accepted value is "" is left out.
    """
    def first(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: first(accepted[0]) for key, accepted in value.items() if accepted[0] != ""}
        return [first(item) for item in value] if isinstance(value, list) else value

    [(name, parameters)] = call.items()
    return {"name": name, "arguments": first(parameters)}


# ------------------------------------------------------------------------------------------------------------
# OpenAI's messages


def _parse_messages(row: dict, source: str, system: str) -> Conversation:
    tools = parse_tools(row.get("tools") or [])
    messages = decode_column(row["messages"], "messages")
    if not isinstance(messages, list) or not all(map(_has_role, messages)):
        raise RowError("bad messages", "messages must be a list of objects, each with a \"role\"")
    functions = _functions_by_name(tools)
    called: dict[str, str] = {}             # {tool_call_id: function}, for responses that name the id alone
    parsed = [_parse_message(message, functions, called) for message in messages]
    if not any(message["role"] == "assistant" for message in parsed):
        raise RowError("nothing to train", "no assistant message: there is nothing to learn from this row")
    if tools and messages[0]["role"] not in ("system", "developer"):
        parsed.insert(0, {"role": "developer", "content": system})
    return Conversation(tools, parsed, source)


def _has_role(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _parse_message(message: dict, functions: dict[str, dict], called: dict[str, str]) -> dict:
    """A message with its calls checked and their arguments as dicts; notes the calls' ids in `called`."""
    message = {"content": None, **message}
    calls = message.get("tool_calls") or []
    if message.get("function_call"):                                    # OpenAI's form before tool_calls
        calls = [{"function": message.pop("function_call")}]
    if not isinstance(calls, list):
        raise RowError("bad messages", f"tool_calls is {json_type_name(calls)}, not a list")
    if calls:
        parsed = [_parse_call(call.get("function", call) if isinstance(call, dict) else call, functions)
                  for call in calls]
        for call, function in zip(calls, parsed, strict=True):
            if isinstance(call.get("id"), str):
                called[call["id"]] = function["name"]
        message["tool_calls"] = [{"type": "function", "function": function} for function in parsed]
    if message["role"] == "tool" and not message.get("name"):
        call_id = message.get("tool_call_id")
        if isinstance(call_id, str) and call_id in called:
            message["name"] = called[call_id]
    return message


# ------------------------------------------------------------------------------------------------------------
# Calls, and what the template can render


def _functions_by_name(tools: list[Tool]) -> dict[str, dict]:
    return {tool["function"]["name"]: tool["function"] for tool in tools}


def _parse_call(call: Any, functions: dict[str, dict]) -> dict:
    """{"name", "arguments"} with the arguments as a dict.  functions: those that the row declares, by name"""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError("bad call", f"a call is {call!r:.80}, not {{\"name\": …, \"arguments\": {{…}}}}")
    name = call["name"]
    arguments = decode_column(call.get("arguments") or {}, f"the arguments of {name!r:.60}")
    if not isinstance(arguments, dict):
        found = json_type_name(arguments)
        raise RowError("bad arguments", f"the arguments of {name!r:.60} are {found}, not an object")
    if name not in functions:
        listed = [json.dumps(known)[1:-1][:60] for known in list(functions)[:MAX_LISTED_TOOLS]]
        known = ", ".join(listed) + (", …" if len(functions) > MAX_LISTED_TOOLS else "")
        message = f"call to {json.dumps(name):.80} is not one of its {len(functions)} tools ({known})"
        raise RowError("unknown function", message)
    return {"name": name, "arguments": arguments}


def _check_rendering(conversation: Conversation) -> Conversation:
    """Render once, so that what the template rejects is found here, with the row's place."""
    try:
        for tool in conversation.tools:
            if tool.declaration_texts is None:
                _check_nesting([tool])
                texts = render_tool(tool)
                "".join(texts).encode()                                 # half a surrogate pair is not text
                tool.declaration_texts = texts
        _check_nesting(conversation.messages)
        around = [text for part in conversation.segments_around_tools for text, _ in part]
        "".join(around).encode()
    except RowError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise RowError("not renderable", f"the template cannot render this row: {error}") from None
    return conversation


def _check_nesting(value: Any) -> None:
    """Raise NestingError for a value that is too deep, one level of it at a time."""
    level, depth = [value], 0
    while level := _children(level):
        depth += 1
        if depth == MAX_NESTING:
            raise NestingError


def _children(values: list) -> list:
    """What the objects and lists among the values hold."""
    children: list = []
    for value in values:
        if isinstance(value, dict):
            children += value.values()
        elif isinstance(value, list):
            children += value
    return children
