"""Rows → conversations → token ids → packed batches.

    dict ──read_rows──▶ Conversation ──tokenize──▶ Example(ids, trained) ──pack──▶ Batch(tokens, targets, positions, documents)

Rows come as JSONL or as a JSON array, gzipped or not, in one of three shapes:
    xLAM         {"query": …, "tools": […] or its JSON string, "answers": [{"name", "arguments"}] or its JSON string}; [] is for
                 silence, and "answers" may also be a text, which the model says instead of calling
    messages     {"messages": […], "tools": […]}   OpenAI's chat format; every assistant turn is trained
    leaderboard  {"question", "function", "ground_truth": [{name: {parameter: [accepted, …]}}]}, one turn; "ground_truth"
                 may also stand for "answers" in xLAM's columns. Training takes the first accepted value of each
A tool is xLAM's {name, description, parameters: {p: {type, description, default?}}}, the same with a JSON Schema as its
parameters, or OpenAI's envelope {"type": "function", "function": …}.

A row that cannot be right is an error that names file:line and the remedy; nothing is cut or guessed silently. Files are read
piece by piece, arrays too, and no row may be longer than 1 MiB: whatever a file holds, memory is bounded (docs/hostile.md).
"""
from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import heapq
import itertools
import json
import marshal
import math
import re
import sys
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from loss_kernels import IGNORE
from storage import hub
from tokenizer import Pairs, Segment, Tokenizer, render_around_tools, render_segments, render_tool
from tokenizer.chat import DEVELOPER_TEXT, SCHEMA_KEYS
from triton_support import sent


def system_text(given: str) -> str:
    """What `--system` names: the text itself, or behind an @ the file that holds it."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"{given[1:]}: no such file; --system takes a text, or @FILE for one that holds it") from None
    except UnicodeDecodeError:
        raise ValueError(f"{given[1:]}: not UTF-8; save the file as UTF-8") from None


# Rows share a beginning of so many tokens at least; fewer are not worth a document of its own.
SHORTEST_BEGINNING = 32

# Tokens of each document that fills up a batch. For Gemma 3 270M attention's blocks have 16 to 64 tokens: all
# but the last are full.
FILLING_TOKENS = 64

# A longer row is an error: FunctionGemma's whole context, 32,768 tokens, is some 100 KB of text.
MAX_ROW_BYTES = 1 << 20

# Objects and lists in one another; a deeper row is an error, long before Python's own limit of nested calls.
MAX_NESTING = 100
TOO_DEEP = f"objects and lists stand more than {MAX_NESTING} deep in one another"

ROW_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")         # as datasets on the Hub call their files and folders

# So many rows may wait for a step of --batch-tokens with room for them; on real rows 32 leave 0.5 % of the tokens empty.
MOST_WAITING = 32

# Tools that are remembered, some 10 KB each; xLAM's 60,000 rows have 3,605 different ones.
MOST_TOOLS = 8192
LONGEST_TOOLS = 1 << 14         # characters of a row's tools that are remembered as a whole

# At most so many processes share out rows among themselves; larger teams save few tokens more and take longer (docs/scaling.md).
TEAM = 16


class RowError(ValueError):
    """A row that cannot be trained on. `cause` is a short name to count by; the message says where, what and what to do."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def placed(source: str, cause: str, message: str) -> RowError:
    """The error of a row, with its place and the remedy."""
    return RowError(cause, f"{source}: {message}; fix the row or pass --skip-invalid")


class Skipped(Counter):
    """Rows left out, counted by cause; `first` says of each cause which row was the first, and what is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, cause: str, first: str) -> None:
        self[cause] += 1
        self.first.setdefault(cause, first)


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


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


def named_files(files: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """(path, the name that errors call it by) of each file, and of each file of rows in a folder."""
    for file in files:
        for path in _files_of(Path(file)):
            name = str(path.relative_to(file)) if path != Path(file) else path.name
            yield path, name.encode("utf-8", "backslashreplace").decode()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(ROW_FILES))
        if not found:
            raise FileNotFoundError(f"{path}: no .json, .jsonl or .gz file in this folder")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return [path]


def _raw_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, JSON) of every row in a file; of a row that is too long its beginning, which `parse_row` refuses."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb", buffering=1 << 20) as file:
        try:
            is_first = True
            for number, line in enumerate(_lines(file), start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if is_first and (begin := line.lstrip()).startswith(b"["):
                    yield from _array_rows(path.name, number, itertools.chain([begin[1:]], iter(lambda: file.read(1 << 20), b"")))
                    return
                line = line.rstrip(b"\r\n")
                if len(line) > MAX_ROW_BYTES or (line and not line.isspace()):
                    is_first = False
                    yield str(number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RowError("broken gzip", f"{path.name}: {error}; fetch or compress the file again") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, of one that is too long its beginning."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)


# A bracket, a comma, or a string; of a string that goes on after the text, the group: half of an escape, or nothing.
_JSON_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|(\\?)\Z)|[][{},]', re.DOTALL)


def _array_rows(name: str, line: int, chunks: Iterator[bytes]) -> Iterator[tuple[str, bytes]]:
    """The items of a JSON array, cut apart at its commas, with the line each begins on; `parse_row` judges what they are.

    line: of the array's beginning; chunks: what follows its opening bracket.  Raises RowError for an array that does not end.
    """
    depth, number, begins, item, unread = 1, 1, line, bytearray(), b""

    def take(piece: bytes) -> None:
        """Add to the item, as much as `parse_row` needs to see that it is too long."""
        nonlocal line, begins
        if not item:
            own = piece.lstrip()
            line += piece.count(b"\n", 0, len(piece) - len(own))
            begins, piece = line, own
        line += piece.count(b"\n")
        item.extend(piece[:MAX_ROW_BYTES + 1 - len(item)])

    for chunk in chunks:
        text, start = unread + chunk, len(unread)               # start: of what is not taken yet
        unread = b""
        for mark in _JSON_MARK.finditer(text):
            what = mark[0][:1]
            if what == b'"' and mark[1] is not None:
                unread = b'"' + mark[1]                         # the next chunk is read as if the string began with it
            depth += (what in b"[{") - (what in b"]}")
            if depth > 1 or (depth == 1 and what != b","):
                continue
            take(text[start:mark.start()])
            start = mark.end()
            if depth == 0 and what == b"}":
                raise RowError("broken array", f"{name}:{begins}: row {number} closes more than it opens; mend the file")
            if item or what == b"," or number > 1:
                yield f"{begins} (row {number})", bytes(item)
            item.clear()
            number += 1
            if depth == 0:
                for rest in itertools.chain([text[start:]], chunks):
                    if rest.strip():
                        raise RowError("broken array", f"{name}:{line}: {rest.strip()[:20]!r} after the array's end; mend the file")
                return
        take(text[start:])
    raise RowError("broken array", f"{name}:{begins}: the file ends inside row {number} of the array; fetch or write it again")


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


# ---------------------------------------------------------------------------------------------------------------------
# Tools and their types


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


# ---------------------------------------------------------------------------------------------------------------------
# Examples, and the held-out split


@dataclass(frozen=True)
class Example:
    """One tokenized row: ids (n) int32, trained (n) bool."""

    ids: np.ndarray
    trained: np.ndarray
    source: str

    def __len__(self) -> int:
        """Positions that the model computes: the last id is only ever a target."""
        return len(self.ids) - 1

    @property
    def trained_tokens(self) -> int:
        return int(self.trained[1:].sum())


def tokenize(conversation: Conversation, tokenizer: Tokenizer) -> Example:
    """The ids of `conversation.segments()`, each tool's found but once: it stands between control tokens, so no piece crosses."""
    (before, _), (after, trained) = map(tokenizer.encode_segments, conversation.around_tools)
    declared = [_encoded(tool, tokenizer) for tool in conversation.tools]
    ids = np.concatenate([np.array(before, np.int32), *declared, np.array(after, np.int32)])
    return Example(ids, np.concatenate([np.zeros(len(ids) - len(after), bool), np.array(trained, bool)]), conversation.source)


def _encoded(tool: Tool, tokenizer: Tokenizer) -> np.ndarray:
    if tool.encoded is None or tool.encoded[0] is not tokenizer:
        texts = tool.rendered or render_tool(tool)
        tool.encoded = tokenizer, np.array(tokenizer.encode_segments(zip(texts, itertools.repeat(False)))[0], np.int32)
        tool.rendered = ()
    return tool.encoded[1]


def runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The row's text, parted where it turns from trained to not trained or back: (text, trained)."""
    borders = [0, *(np.flatnonzero(np.diff(example.trained)) + 1).tolist(), len(example.ids)]
    return [(tokenizer.decode(example.ids[start:stop].tolist()), bool(example.trained[start]))
            for start, stop in itertools.pairwise(borders)]


def query_hash(query: str) -> float:
    """A number in [0, 1) that depends on the query's words alone, not on case or spaces.

    Queries with a hash below some fraction are held out: a row stays on its side whatever rows are added, and the same
    question never stands on both sides.
    """
    words = " ".join(query.casefold().split())
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:6], "big") / 2**48


def hold_out(rows: Iterable[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """(the rows to train on, in their order; those whose query's hash is below `fraction`, by that hash).

    In the hash's order the first few held-out rows are a fair share of every source.
    """
    hashed = [(query_hash(row.query), row) for row in rows]
    kept_apart = sorted((pair for pair in hashed if pair[0] < fraction), key=lambda pair: pair[0])
    return [row for number, row in hashed if number >= fraction], [row for _, row in kept_apart]


# ---------------------------------------------------------------------------------------------------------------------
# Steps and batches


# Of a batch's parts: (example, its tokens from, to).
Parts = list[tuple[Example, int, int]]


@dataclass(frozen=True)
class Batch:
    """Whole documents side by side. Each is (T): tokens, targets (`IGNORE` where no loss), positions, documents.

    A beginning that several rows share is there once, as a document of its own; each row then continues it, as a document
    whose positions go on from there (`Gemma3.forward`).
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    documents: Tensor
    trained_tokens: int
    parts: Parts

    def keys(self) -> Tensor:
        """(T) int32, of each token a hash of its row up to it, the same wherever the row stands: LoRA's dropout draws by it."""
        return torch.from_numpy(np.concatenate([prefix_keys(example.ids)[start:stop] for example, start, stop in self.parts]))

    @property
    def sources(self) -> list[str]:
        """Of each row."""
        return [example.source for example, _, stop in self.parts if stop == len(example)]

    def filled(self, tokens: int) -> Batch:
        """The batch, and after it documents without loss that make it as large as that; itself if it is.

        They are short: the longer a document, the longer its last tokens take in attention.
        """
        idle = tokens - len(self.tokens)
        document = Example(np.zeros(FILLING_TOKENS + 1, np.int32), np.zeros(FILLING_TOKENS + 1, bool), "")
        ends = [min(FILLING_TOKENS, idle - start) for start in range(0, idle, FILLING_TOKENS)]
        return _batch([*self.parts, *((document, 0, end) for end in ends)]) if idle else self

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(tokens, positions, documents, rows, targets): the rows that carry loss (M), and their targets (M).

        Positions and documents stay on the CPU, where borders are read; nothing waits for the device.
        """
        rows = (self.targets != IGNORE).nonzero().squeeze(1)
        tokens, rows, targets = (sent(tensor, device) for tensor in (self.tokens, rows, self.targets[rows]))
        return tokens, self.positions, self.documents, rows, targets


def side_by_side(lengths: Sequence[int], firsts: Sequence[int] | int = 0) -> tuple[Tensor, Tensor]:
    """positions and documents, (Σ lengths) each, of documents one after another.  firsts: the position each begins with"""
    starts = np.cumsum(lengths) - lengths
    documents = np.repeat(np.arange(len(lengths)), lengths)
    return torch.from_numpy(np.arange(len(documents)) - np.repeat(starts - firsts, lengths)), torch.from_numpy(documents)


def team_of(rank: int, processes: int) -> tuple[int, int, int]:
    """(number of teams, this process's team, its members): of up to `TEAM` processes, every one whose rank leaves the same remainder."""
    teams = -(-processes // TEAM)
    return teams, rank % teams, len(range(rank % teams, processes, teams))


def team_rows(rows: Sequence[int], lengths: Sequence[int], places: np.ndarray, rank: int, processes: int) -> list[int]:
    """Of a step's rows those that this process's team computes, for `deal` to share out among its members.

    To look for shared beginnings among all rows of a thousand processes would take longer than to train on them. So the rows
    are put in lexicographic order, where those that begin alike are neighbours (`places`: of each row there), cut into as many
    pieces as there are processes, equal in tokens, and the pieces dealt to the teams in turn.
    """
    teams, team, _ = team_of(rank, processes)
    if teams == 1:
        return list(rows)
    ordered = np.array(rows)[np.argsort(places[rows], kind="stable")]
    tokens = np.array([lengths[row] for row in ordered])
    piece = (tokens.cumsum() - tokens / 2) / tokens.sum() * processes            # that the row's middle falls into
    return ordered[piece.astype(int) % teams == team].tolist()


# Rows, and how many tokens they begin with alike; those tokens are computed once where the rows stay together.
Group = tuple[int, list[Example]]


def deal(examples: Sequence[Example], processes: int, share: bool = True) -> list[list[Group]]:
    """The groups of rows that each of so many processes computes, so that the most that one has to compute is little.

    share: whether a beginning that rows have in common is computed once. A group that is large beside a process's share of the
    tokens is cut, and its beginning computed in each piece; of several sizes of pieces the one with the best deal is taken.
    """
    groups = shared_beginnings(examples) if share else [(0, [example]) for example in examples]
    if processes == 1:
        return [groups]
    whole, deals = sum(map(tokens_of, groups)), []
    for finer in (1, 2, 4, sys.maxsize):
        cut = [piece for group in groups for piece in _cut(group, math.ceil(finer * processes * tokens_of(group) / whole))]
        shares: list[list[Group]] = [[] for _ in range(processes)]
        load = [(0, process) for process in range(processes)]
        for piece in sorted(cut, key=tokens_of, reverse=True):              # the largest first, each to whoever has least
            tokens, process = heapq.heappop(load)
            shares[process].append(piece)
            heapq.heappush(load, (tokens + tokens_of(piece), process))
        deals.append((max(load)[0], shares))
    return min(deals, key=lambda deal: deal[0])[1]


def tokens_of(group: Group) -> int:
    """Tokens to compute for a group."""
    shared, examples = group
    return shared + sum(len(example) - shared for example in examples)


def _cut(group: Group, pieces: int) -> list[Group]:
    """The group in about so many pieces of about equally many tokens of their own."""
    shared, examples = group
    own = np.array([len(example) - shared for example in examples])
    place = (np.cumsum(own) - own / 2) / own.sum() * min(pieces, len(examples))
    cut = [[examples[i] for i in rows] for _, rows in itertools.groupby(range(len(examples)), lambda i: int(place[i]))]
    return [(shared if len(piece) > 1 else 0, piece) for piece in cut]


def pack(examples: Sequence[Example], max_tokens: int, share: bool = True) -> list[Batch]:
    """Put the examples into few batches of at most `max_tokens` tokens, in their order, rows that begin alike together.

    No example is cut: one that is longer than `max_tokens` gets a batch of its own. share: compute a beginning that rows of
    a batch have in common once; losses and gradients are the same.
    """
    return pack_groups(deal(examples, 1, share)[0], max_tokens)


def pack_groups(groups: Sequence[Group], max_tokens: int) -> list[Batch]:
    """As `pack`, of groups that were found before.

    The batches are about equally large, as the largest one decides how much memory a step takes: 4,700 tokens in passes of at
    most 4,096 are 2 × 2,350.
    """
    def size(batches: list[Parts]) -> tuple[int, int]:
        """What must not grow: passes, and tokens to compute (a beginning is computed in each batch that needs it)."""
        return len(batches), sum(stop - start for parts in batches for _, start, stop in parts)

    batches = _filled(groups, max_tokens)
    passes, tokens = size(batches)
    if passes > 1:
        limits = range(-(-tokens // passes), max_tokens)
        first = bisect_left(limits, True, key=lambda limit: size(_filled(groups, limit)) <= (passes, tokens))
        batches = _filled(groups, limits[first]) if first < len(limits) else batches
    return [_batch(parts) for parts in batches]


def _filled(groups: Iterable[Group], max_tokens: int) -> list[Parts]:
    """The groups one after another in batches of at most so many tokens, each as full as it gets."""
    batches: list[Parts] = []
    room = 0
    for shared, group in groups:
        whole = tokens_of((shared, group))
        begun = False
        for example in group:
            own = len(example) - shared
            if not batches or own + (0 if begun else shared) > room or (not begun and room < whole <= max_tokens):
                batches.append([])
                room, begun = max_tokens, False
            if shared and not begun:
                batches[-1].append((example, 0, shared))
                room, begun = room - shared, True
            batches[-1].append((example, shared, len(example)))
            room -= own
    return batches


def _batch(parts: Parts) -> Batch:
    """The parts side by side; one that does not begin at 0 continues the last that does."""
    def ids(ahead: int) -> np.ndarray:
        return np.concatenate([example.ids[start + ahead:stop + ahead] for example, start, stop in parts], dtype=np.int64)

    trained = np.concatenate([example.trained[start + 1:stop + 1] for example, start, stop in parts])
    targets = np.where(trained, ids(1), IGNORE)
    positions, documents = side_by_side([stop - start for _, start, stop in parts], [start for _, start, _ in parts])
    return Batch(torch.from_numpy(ids(0)), torch.from_numpy(targets), positions, documents, np.count_nonzero(trained), parts)


# A token without loss: what a process computes that has to go along with others and has no batch left.
IDLE = _batch([(Example(np.zeros(2, np.int32), np.zeros(2, bool), ""), 0, 1)])


def prefix_keys(ids: np.ndarray) -> np.ndarray:
    """Of each id a hash of all up to it, (n) int32: the upper half of Σ (id + 1) c^position in 64 bits."""
    powers = _powers(1 << len(ids).bit_length())[:len(ids)]
    return (np.cumsum((ids.astype(np.uint64) + 1) * powers) >> 32).astype(np.uint32).view(np.int32)


@functools.lru_cache
def _powers(most: int) -> np.ndarray:
    return np.cumprod(np.full(most, 6364136223846793005, np.uint64))


def shared_beginnings(examples: Sequence[Example]) -> list[Group]:
    """(tokens that a group's examples begin with alike, the group), so that few tokens are left to compute.

    A beginning ends before the token that predicts its row's first trained one, so that every loss is its own row's. A row
    that shares too little stands alone, with 0. Groups and rows keep the order of the examples.
    """
    order = lexicographic(examples)
    common = [_begin_alike(examples[a], examples[b]) for a, b in itertools.pairwise(order)]

    # Of the first rows in order: tokens saved at best, and where the last group begins and how much it shares.
    best = [(0, 0, 0)]
    for last in range(len(order)):
        choice, least = (best[last][0], last, 0), sys.maxsize
        for first in range(last - 1, -1, -1):
            least = min(least, common[first])
            if not least:
                break
            choice = max(choice, (best[first][0] + least * (last - first), first, least))
        best.append(choice)
    groups, stop = [], len(order)
    while stop:
        _, first, length = best[stop]
        groups.append((length, sorted(order[first:stop])))
        stop = first
    return [(length, [examples[i] for i in rows]) for length, rows in sorted(groups, key=lambda group: group[1][0])]


def lexicographic(examples: Sequence[Example]) -> list[int]:
    """The examples' indices in order of their ids, in which those that begin alike are neighbours."""
    keys = [example.ids.astype(">u4").tobytes() for example in examples]
    return sorted(range(len(examples)), key=keys.__getitem__)


def _begin_alike(a: Example, b: Example) -> int:
    """How many tokens two rows may share, 0 for too few."""
    most = min(*(int(example.trained.argmax()) - 1 if example.trained.any() else len(example) - 1 for example in (a, b)))
    differ = a.ids[:most] != b.ids[:most] if most > 0 else np.array([True])
    alike = int(differ.argmax()) if differ.any() else most
    return alike if alike >= SHORTEST_BEGINNING else 0


def epoch_order(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The rows of an epoch, shuffled, by the seed and the epoch alone: a row of weight w is there w times.

    Of a fraction every row gets its share over the epochs: with 0.5 half of the rows come in one, the other half in the next.
    """
    times = times_taken(weights, seed, epoch + 1) - times_taken(weights, seed, epoch)
    return np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(weights)), times))


def times_taken(weights: np.ndarray, seed: int, epochs: int) -> np.ndarray:
    """How often each row was there in the first epochs; rows of one weight reach a whole number in turn, evenly spread."""
    turns, rng = np.empty(len(weights)), np.random.default_rng([seed, 0, 1])
    for weight in np.unique(weights):
        same = np.flatnonzero(weights == weight)
        turns[same] = rng.permutation(len(same)) / len(same)
    return np.floor(weights * epochs + turns).astype(np.int64)


def epoch_at(weights: np.ndarray, seed: int, position: int) -> tuple[int, int]:
    """The epoch that a position in the stream of epochs is in, and the position where that epoch begins."""
    epoch = max(0, int(position / weights.sum()) - 1)               # never too late: epochs take no more than their weights
    begin, end = (int(times_taken(weights, seed, epochs).sum()) for epochs in (epoch, epoch + 1))
    while end <= position:
        epoch, begin, end = epoch + 1, end, int(times_taken(weights, seed, epoch + 2).sum())
    return epoch, begin


def epoch_orders(weights: np.ndarray, seed: int, epochs: float | None, first: int) -> Iterator[list[int]]:
    """The rows of each epoch from the `first` on: of `epochs` epochs, the last of which may be a part of one, or without end."""
    for epoch in itertools.count(first) if epochs is None else range(first, math.ceil(epochs)):
        order = epoch_order(weights, seed, epoch).tolist()
        yield order if epochs is None else order[:round(min(1.0, epochs - epoch) * len(order))]


def steps(lengths: Sequence[int], seed: int, *, batch_rows: int | None = None, batch_tokens: int | None = None,
          epochs: float | None = None, weights: np.ndarray | None = None, start: int = 0) -> Iterator[tuple[list[int], int]]:
    """Cut the endless stream of shuffled epochs into optimizer steps.

    lengths: tokens of each row; weights: how often an epoch takes each, once by default. A step is `batch_rows` rows, or as
    many as fit into `batch_tokens` tokens (`filled_steps`). `start` is the position to go on from: the rows consumed so far,
    as yielded. The stream ends after `epochs` epochs, or never. Yields (row indices of the step, rows consumed after it).
    """
    weights = np.ones(len(lengths)) if weights is None else weights
    epoch, position = epoch_at(weights, seed, start)
    orders = epoch_orders(weights, seed, epochs, epoch)
    if batch_rows:
        stream = itertools.islice(itertools.chain.from_iterable(orders), start - position, None)
        cut, position = iter(lambda: list(itertools.islice(stream, batch_rows)), []), start
    else:                                                           # what a step holds depends on those before it in the epoch
        sizes = np.asarray(lengths).tolist()
        cut = itertools.chain.from_iterable(filled_steps(order, sizes, batch_tokens) for order in orders)
    for rows in cut:
        position += len(rows)
        if position > start:
            yield rows, position


def filled_steps(rows: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut rows into steps of at most `batch_tokens` tokens, or of one row that is longer; the last is as full as it comes.

    A row that does not fit waits for the next step, and is first in line there. A step ends when `MOST_WAITING` rows wait.
    """
    stream, waiting = iter(rows), []
    while True:
        step, room, passed = [], batch_tokens, []
        for row in itertools.chain(waiting, stream):
            if lengths[row] <= room or not step:
                step.append(row)
                room -= lengths[row]
                continue
            passed.append(row)
            if len(passed) == MOST_WAITING:
                break
        if not step:
            return
        yield step
        waiting = passed


def fetch(source: str) -> list[Path]:
    """The files behind one `--data` source: a local path, or rows on the Hugging Face Hub (hub.py)."""
    if not source:
        raise ValueError("--data names an empty source; look for a comma too many")
    if not hub.parse(source):
        return [Path(source)]
    pinned = hub.pin(source, "dataset")
    return hub.fetch(pinned, "dataset", files_with_rows(hub.parse(source), hub.list_files(pinned, "dataset")))


def files_with_rows(name: hub.Name, files: list[str]) -> list[str]:
    """Those files of a dataset that hold the rows asked for.  Raises FileNotFoundError or ValueError saying what there is instead."""
    def is_of(split: str, file: str) -> bool:
        stem = file.rpartition("/")[2].partition(".")[0]
        return split == stem or split in re.split(r"[^A-Za-z0-9]+", file.rpartition(".json")[0])

    rows = [file for file in files if file.endswith(ROW_FILES) and not file.startswith(".") and file != "dataset_infos.json"]
    if name.part in rows:
        return [name.part]
    if not rows or name.part in files:
        others = name.part or ", ".join(file for file in files if not file.startswith("."))
        convert = f"from datasets import load_dataset; load_dataset('{name.repo}', split='train').to_json('rows.jsonl')"
        raise FileNotFoundError(f"{name.repo}: rows must be JSON or JSONL, and this is {others:.300}; convert them, pip install datasets; "
                                f"python -c \"{convert}\", and give --data rows.jsonl")
    splits = {split: of_it for split in SPLITS if (of_it := [file for file in rows if is_of(split, file)])}
    if name.part is None and len(splits) > 1:
        raise ValueError(f"{name.repo} has the splits {', '.join(splits)}; name one, as --data {name.repo}:{next(iter(splits))}")
    chosen = rows if name.part is None else [file for file in rows if is_of(name.part, file)]
    if not chosen:
        there = f"the splits {', '.join(splits)} and " if splits else ""
        raise FileNotFoundError(f"{name.repo} has no split or file {name.part!r}; there are {there}the files {', '.join(rows):.600}")
    return chosen


def parse_weight(source: str) -> tuple[str, float]:
    """One `--data` source → (its name, its weight): "rows.jsonl*0.5" → ("rows.jsonl", 0.5).  Raises ValueError."""
    found = re.fullmatch(r"(.+)\*([\d.]*)", source)
    if not found:
        return source, 1.0
    name, weight = found.groups()
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or not 0 < float(weight) <= 1000:
        raise ValueError(f"--data {source}: a weight is a number above 0, 1000 at most, as in {name}*2 or {name}*0.5")
    return name, float(weight)


def read_sources(sources: Iterable[str], skipped: Skipped | None = None, system: str = DEVELOPER_TEXT) -> Iterator[Conversation]:
    """Every conversation of a list of `--data` sources, each with its source's weight."""
    for name, weight in [parse_weight(source) for source in sources]:
        for row in read_rows(fetch(name), skipped, system):
            yield row if weight == 1 else replace(row, weight=weight)
