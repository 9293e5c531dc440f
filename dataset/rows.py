"""Rows of every shape → conversations."""
from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.errors import MAX_NESTING, MAX_ROW_BYTES, TOO_DEEP, RowError, Skipped, placed
from dataset.files import _raw_rows, fetch, named_files, parse_weight
from dataset.tools import _JSON, Tool, _decoded, _kind, parse_tools
from tokenizer import Pairs, Segment, render_around_tools, render_segments, render_tool

# Google calls this sentence essential: FunctionGemma calls no function without it. The template does not add it.
DEVELOPER_TEXT = "You are a model that can do function calling with the following functions"


@dataclass(frozen=True)
class Conversation:
    """One row: `tools` in OpenAI's envelope, `messages` in OpenAI's format with arguments as dicts."""

    tools: list[Tool]
    messages: list[dict]
    source: str                 # "file:line"
    accepted: tuple[dict, ...] = ()     # {name: {parameter: [accepted, …]}} for each call, where the row gives several
    weight: float = 1.0                 # how often an epoch takes it

    @property
    def query(self) -> str:
        """What the user asks first."""
        return said(next((m for m in self.messages if m["role"] == "user"), {}))

    @property
    def calls(self) -> list[dict]:
        """The calls of the first assistant turn, [{"name", "arguments"}]."""
        return called(next(m for m in self.messages if m["role"] == "assistant"))

    def answers(self) -> list[Conversation]:
        """The conversation up to its first answer, and up to each later one that has calls."""
        ends = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return [replace(self, messages=self.messages[:i + 1], source=self.source if turn == 1 else f"{self.source}, turn {turn}")
                for turn, i in enumerate(ends, start=1) if turn == 1 or called(self.messages[i])]

    @property
    def hidden_parameters(self) -> bool:
        return any(tool.hides_parameters for tool in self.tools)

    @property
    def unknown_types(self) -> list[str]:
        return [word for tool in self.tools for word in tool.unknown_types]

    @functools.cached_property
    def around_tools(self) -> tuple[Pairs, Pairs]:
        """What `segments` has before and after the tools."""
        return render_around_tools(self.messages, bool(self.tools))

    def segments(self) -> list[Segment]:
        return render_segments(self.messages, self.tools)

    def prompt(self) -> list[Segment]:
        """What the model sees before its first turn."""
        before = next(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return render_segments(self.messages[:before], self.tools, add_generation_prompt=True)


def said(message: dict) -> str:
    """A message's text."""
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return " ".join(str(part.get("text", "")) for part in parts)


def called(message: dict) -> list[dict]:
    """A message's calls, [{"name", "arguments"}]."""
    return [call["function"] for call in message.get("tool_calls") or ()]


def read_rows(files: Sequence[str | Path], skipped: Skipped | None = None, system: str = DEVELOPER_TEXT) -> Iterator[Conversation]:
    """The conversations of each file (or of each .json, .jsonl and .gz file in a folder), in order.

    Raises RowError at the first bad row; with `skipped` it notes the row there, by cause, and goes on. system: the text
    that is put in front of rows that bring no developer or system message.
    """
    for path, name in named_files(files):
        for place, row in _raw_rows(path):
            source = f"{name}:{place}"
            try:
                yield parse_row(row, source, system)
            except RowError as error:
                if skipped is None:
                    raise placed(source, error.cause, str(error)) from None
                skipped.note(error.cause, f"{source}: {error}")


def read_sources(sources: Iterable[str], skipped: Skipped | None = None, system: str = DEVELOPER_TEXT) -> Iterator[Conversation]:
    """Every conversation of a list of `--data` sources, each with its source's weight."""
    for name, weight in [parse_weight(source) for source in sources]:
        for row in read_rows(fetch(name), skipped, system):
            yield row if weight == 1 else replace(row, weight=weight)


def parse_row(row: Any, source: str, system: str = DEVELOPER_TEXT) -> Conversation:
    """One row, as decoded JSON or as its text in a string or in UTF-8.  Raises RowError saying what is wrong with it."""
    try:
        return _parse_row(row, source, system)
    except RecursionError:
        raise RowError("nested too deeply", TOO_DEEP) from None


def _parse_row(row: Any, source: str, system: str) -> Conversation:
    if isinstance(row, bytes):
        if len(row) > MAX_ROW_BYTES:
            raise RowError("too long", f"the row is longer than {MAX_ROW_BYTES >> 20} MiB, many times what a model reads at once")
        try:
            row = row.decode()
        except UnicodeDecodeError as error:
            raise RowError("not UTF-8", f"the row's byte {error.start} is not UTF-8") from None
    row = _decoded(row, "the row")
    if not isinstance(row, dict):
        raise RowError("not an object", f"the row is {_kind(row)}, not an object with \"query\", \"tools\" and \"answers\"")
    if row.get("messages") is not None:
        return _parse_messages(row, source, system)
    row = _from_leaderboard(row)
    missing = [key for key in ("query", "tools", "answers") if key not in row]
    if missing:
        raise RowError("missing column", f"no column {', '.join(map(repr, missing))}; a row has \"query\", \"tools\" and "
                                         "\"answers\", or \"messages\" and \"tools\"")
    if not isinstance(row["query"], str) or not row["query"].strip():
        raise RowError("empty query", f"query is {row['query']!r:.60}; it must be a text")
    tools = parse_tools(row["tools"])
    several = row["answers"] is None and "ground_truth" in row
    accepted = _accepted(row["ground_truth"]) if several else ()
    turn = _answer([_first_accepted(call) for call in accepted] if several else row["answers"], tools)
    messages = [{"role": "developer", "content": system}, {"role": "user", "content": row["query"]}, turn]
    return _checked(Conversation(tools, messages, source, accepted))


def _answer(answers: Any, tools: list[dict]) -> dict:
    """The assistant's turn of a list of calls or its JSON text; of [], for silence; or of a text to say instead of calling."""
    if isinstance(answers, str):
        try:
            answers = _JSON.decode(answers)
        except ValueError as error:
            if answers.lstrip()[:1] in ("[", "{", ""):               # meant as calls
                raise RowError("not JSON", f"answers is not valid JSON ({error})") from None
    if isinstance(answers, str) and answers.strip():
        return {"role": "assistant", "content": answers, "tool_calls": []}
    if not isinstance(answers, list):
        kind = "an empty text" if isinstance(answers, str) else _kind(answers)
        raise RowError("bad answers", f"answers is {kind}, not a list of {{\"name\", \"arguments\"}}, nor a text to say; [] is for silence")
    functions = _by_name(tools)
    return {"role": "assistant", "content": None if answers else "",
            "tool_calls": [{"type": "function", "function": _call(answer, functions)} for answer in answers]}


def _from_leaderboard(row: dict) -> dict:
    """A row in the leaderboard's columns in xLAM's; any other row as it is."""
    if "answers" in row or not {"question", "ground_truth"} & row.keys():
        return row
    row = {"tools": row.get("function", row.get("tools")), "answers": None, **row}
    if isinstance(row["tools"], dict):
        row["tools"] = [row["tools"]]
    elif row["tools"] is None:
        raise RowError("missing column", "no column 'function'; a leaderboard's row has it beside \"question\" and \"ground_truth\"")
    if "query" not in row:
        turns = row.get("question")
        turn = turns[0] if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list) else turns
        if not (isinstance(turn, list) and len(turn) == 1 and isinstance(turn[0], dict) and turn[0].get("role") == "user"):
            raise RowError("bad question", "question must hold one message of the user, [[{\"role\": \"user\", \"content\": …}]]; "
                                           "bring several turns as \"messages\"")
        row["query"] = turn[0].get("content")
    if "ground_truth" not in row:
        raise RowError("missing column", "no column 'ground_truth' beside 'question'; put the leaderboard's answers into its rows")
    return row


def _accepted(value: Any) -> tuple[dict, ...]:
    def holds_choices(value: Any) -> bool:
        """Whether every object in a value maps its keys to lists of accepted values."""
        if isinstance(value, dict):
            return all(isinstance(values, list) and values and all(map(holds_choices, values)) for values in value.values())
        return not isinstance(value, list) or all(map(holds_choices, value))

    truth = _decoded(value, "ground_truth")
    for call in truth if isinstance(truth, list) else [None]:
        parameters = next(iter(call.values())) if isinstance(call, dict) and len(call) == 1 else None
        if not isinstance(parameters, dict) or not holds_choices(parameters):
            raise RowError("bad answers", f"ground_truth must be a list of {{name: {{parameter: [accepted, …]}}}}, not {call!r:.80}")
    return tuple(truth)


def _first_accepted(call: dict) -> dict:
    """One call out of those accepted: the first value of each parameter, without those that may be left out and come first."""
    def first(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: first(values[0]) for key, values in value.items() if values[0] != ""}
        return [first(item) for item in value] if isinstance(value, list) else value

    [(name, parameters)] = call.items()
    return {"name": name, "arguments": first(parameters)}


def _parse_messages(row: dict, source: str, system: str) -> Conversation:
    tools = parse_tools(row.get("tools") or [])
    messages = _decoded(row["messages"], "messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise RowError("bad messages", "messages must be a list of objects, each with a \"role\"")
    functions = _by_name(tools)
    names: dict[str, str] = {}              # tool_call_id → function name, for responses that give the id alone
    out: list[dict] = []
    if tools and (not messages or messages[0]["role"] not in ("system", "developer")):
        out.append({"role": "developer", "content": system})
    for message in messages:
        message = {"content": None, **message}
        calls = message.get("tool_calls") or []
        if message.get("function_call"):                    # OpenAI's form before tool_calls
            calls = [{"function": message.pop("function_call")}]
        if not isinstance(calls, list):
            raise RowError("bad messages", f"tool_calls is {_kind(calls)}, not a list")
        if calls:
            made = [_call(call.get("function", call) if isinstance(call, dict) else call, functions) for call in calls]
            names |= {call["id"]: f["name"] for call, f in zip(calls, made, strict=True) if isinstance(call.get("id"), str)}
            message["tool_calls"] = [{"type": "function", "function": function} for function in made]
        asked = message.get("tool_call_id")
        if message["role"] == "tool" and not message.get("name") and isinstance(asked, str) and asked in names:
            message["name"] = names[asked]
        out.append(message)
    if not any(message["role"] == "assistant" for message in out):
        raise RowError("nothing to train", "no assistant message: there is nothing to learn from this row")
    return _checked(Conversation(tools, out, source))


def _checked(conversation: Conversation) -> Conversation:
    """Render once, so that what the template refuses is found here, with the row's name."""
    def check(values: list) -> None:
        depth = 0
        while values := [child for value in values if isinstance(value, (dict, list))
                         for child in (value.values() if isinstance(value, dict) else value)]:
            depth += 1
            if depth == MAX_NESTING:
                raise RowError("nested too deeply", TOO_DEEP)

    try:
        for tool in conversation.tools:
            if tool.rendered is None:
                check([[tool]])
                texts = render_tool(tool)
                "".join(texts).encode()                                 # half a surrogate pair is no text
                tool.rendered = texts
        check([conversation.messages])
        "".join([text for part in conversation.around_tools for text, _ in part]).encode()
    except RowError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise RowError("not renderable", f"the template cannot render this row: {error}") from None
    return conversation


def _by_name(tools: list[dict]) -> dict[str, dict]:
    return {tool["function"]["name"]: tool["function"] for tool in tools}


def _call(answer: Any, functions: dict[str, dict]) -> dict:
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        raise RowError("bad call", f"a call is {answer!r:.80}, not {{\"name\": …, \"arguments\": {{…}}}}")
    name, arguments = answer["name"], _decoded(answer.get("arguments") or {}, f"the arguments of {answer['name']!r:.60}")
    if not isinstance(arguments, dict):
        raise RowError("bad arguments", f"the arguments of {name!r:.60} are {_kind(arguments)}, not an object")
    if name not in functions:
        listed = ", ".join(json.dumps(known)[1:-1][:60] for known in list(functions)[:8]) + (", …" if len(functions) > 8 else "")
        raise RowError("unknown function", f"call to {json.dumps(name):.80} is not one of its {len(functions)} tools ({listed})")
    return {"name": name, "arguments": arguments}
