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

A row that cannot be right is an error that names file:line and the remedy; nothing is cut or guessed silently.
"""
from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loss_kernels import IGNORE
from tokenizer import Segment, Tokenizer, render_segments
from tokenizer.chat import SCHEMA_KEYS

# Google calls this sentence essential: FunctionGemma calls no function without it. The template does not add it.
DEVELOPER_TEXT = "You are a model that can do function calling with the following functions"


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


class RowError(ValueError):
    """A row that cannot be trained on. `cause` is a short name to count by; the message says where, what and what to do."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class Skipped(Counter):
    """Rows left out, counted by cause; `first` says of each cause which row was the first, and what is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, cause: str, first: str) -> None:
        self[cause] += 1
        self.first.setdefault(cause, first)


@dataclass(frozen=True)
class Conversation:
    """One row: `tools` in OpenAI's envelope, `messages` in OpenAI's format with arguments as dicts."""

    tools: list[dict]
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
        """Whether a parameter's name is one that the official template leaves out of its declaration ("type", for one)."""
        return any(SCHEMA_KEYS & set(tool["function"]["parameters"].get("properties") or ()) for tool in self.tools)

    @property
    def unknown_types(self) -> list[str]:
        """The types that became string because none is known for them, as the row writes them."""
        schemas = [tool["function"]["parameters"] for tool in self.tools]
        for schema in schemas:                                # grows by what it holds
            parts = schema["properties"].values() if isinstance(schema.get("properties"), dict) else ()
            schemas += [part for part in (*parts, schema.get("items")) if isinstance(part, dict)]
        return [schema["type"].word for schema in schemas if isinstance(schema.get("type"), UnknownType)]

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
    for file in files:
        for path in _files_of(Path(file)):
            name = (str(path.relative_to(file)) if path != Path(file) else path.name).encode("utf-8", "backslashreplace").decode()
            for place, row in _raw_rows(path):
                source = f"{name}:{place}"
                try:
                    yield parse_row(row, source, system)
                except RowError as error:
                    if skipped is None:
                        raise RowError(error.cause, f"{source}: {error}; fix the row or pass --skip-invalid") from None
                    skipped.note(error.cause, f"{source}: {error}")


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith((".json", ".jsonl", ".json.gz", ".jsonl.gz")))
        if not found:
            raise FileNotFoundError(f"{path}: no .json, .jsonl or .gz file in this folder")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return [path]


def _raw_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row in a file: bytes of JSON for a line of JSONL, decoded JSON for an item of an array."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb") as file:
        try:
            array_begins = True
            for number, line in enumerate(file, start=1):
                line = line.strip(b"\xef\xbb\xbf \t\r\n") if array_begins else line.strip()
                if array_begins and line.startswith(b"["):
                    yield from _array_rows(path, b"\n" * (number - 1) + line + b"\n" + file.read())
                    return
                if line:
                    array_begins = False
                    yield str(number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RowError("broken gzip", f"{path.name}: {error}; fetch or compress the file again") from None


def _array_rows(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """The items of a JSON array, with the line each begins on."""
    def broken(at: int, why: object) -> RowError:
        return RowError("not JSON", f"{path.name}:{text.count(chr(10), 0, at) + 1}: {why}; a broken array cannot be skipped over: mend it")

    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RowError("not UTF-8", f"{path.name}:{line}: not UTF-8; save the file as UTF-8") from None
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = space.match(text).end() + 1, 1, 0
    for number in itertools.count(1):
        at = space.match(text, at).end()
        if number > 1 and text.startswith(",", at):
            at = space.match(text, at + 1).end()
        elif text.startswith("]", at):
            if rest := text[at + 1:].strip():
                raise broken(at + 1, f"{rest[:20]!r} after the array's end")
            return
        elif number > 1:
            raise broken(at, f"expected a comma or the array's end, found {text[at:at + 20]!r}")
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise broken(at, f"row {number} is not valid JSON ({error})") from None
        yield f"{line} (row {number})", row


def parse_row(row: Any, source: str, system: str = DEVELOPER_TEXT) -> Conversation:
    """One row, as decoded JSON or as its text in a string or in UTF-8.  Raises RowError saying what is wrong with it."""
    if isinstance(row, bytes):
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
            answers = json.loads(answers)
        except (ValueError, RecursionError) as error:
            if answers.lstrip()[:1] in ("[", "{", ""):               # meant as calls
                raise RowError("not JSON", f"answers is not valid JSON ({error})") from None
    if isinstance(answers, str) and answers.strip():
        return {"role": "assistant", "content": answers, "tool_calls": []}
    if not isinstance(answers, list):
        kind = "an empty text" if isinstance(answers, str) else _kind(answers)
        raise RowError("bad answers", f"answers is {kind}, not a list of {{\"name\", \"arguments\"}}, nor a text to say; [] is for silence")
    return {"role": "assistant", "content": None if answers else "",
            "tool_calls": [{"type": "function", "function": _call(answer, tools)} for answer in answers]}


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
            functions = [_call(call.get("function", call) if isinstance(call, dict) else call, tools) for call in calls]
            names |= {call["id"]: f["name"] for call, f in zip(calls, functions, strict=True) if isinstance(call.get("id"), str)}
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        if message["role"] == "tool" and not message.get("name") and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]
        out.append(message)
    if not any(message["role"] == "assistant" for message in out):
        raise RowError("nothing to train", "no assistant message: there is nothing to learn from this row")
    return _checked(Conversation(tools, out, source))


def _checked(conversation: Conversation) -> Conversation:
    """Render once, so that what the template refuses is found here, with the row's name."""
    try:
        "".join(segment.text for segment in conversation.segments()).encode()        # half a surrogate pair is no text
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RowError("not renderable", f"the template cannot render this row: {error}") from None
    return conversation


def _call(answer: Any, tools: list[dict]) -> dict:
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        raise RowError("bad call", f"a call is {answer!r:.80}, not {{\"name\": …, \"arguments\": {{…}}}}")
    name, arguments = answer["name"], _decoded(answer.get("arguments") or {}, f"the arguments of {answer['name']!r:.60}")
    if not isinstance(arguments, dict):
        raise RowError("bad arguments", f"the arguments of {name!r:.60} are {_kind(arguments)}, not an object")
    known = [tool["function"]["name"] for tool in tools]
    if name not in known:
        listed = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
        raise RowError("unknown function", f"call to \"{name:.80}\" is not one of its {len(known)} tools ({listed})")
    return {"name": name, "arguments": arguments}


def _decoded(value: Any, what: str) -> Any:
    """`value`, or what it says if it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("not JSON", f"{what} is not valid JSON ({error})") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# Tools and their types


def parse_tools(value: Any) -> list[dict]:
    """Tools in any of the accepted forms, or their JSON text → OpenAI's envelope.  Raises RowError."""
    tools = _decoded(value, "tools")
    if not isinstance(tools, list):
        raise RowError("bad tools", f"tools is {_kind(tools)}, not a list")
    try:
        return [{"type": "function", "function": _function(tool)} for tool in tools]
    except RecursionError:
        raise RowError("bad tool", "a tool's parameters are nested too deeply to read") from None


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
    text = whole = text.strip() if isinstance(text, str) else ""
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


def tokenize(conversation: Conversation, tokenizer: Tokenizer) -> Example:
    ids, trained = tokenizer.encode_segments(conversation.segments())
    return Example(np.array(ids, np.int32), np.array(trained, bool), conversation.source)


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
    sources: tuple[str, ...]

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens, targets) on the device; positions and documents stay on the CPU, where borders are read."""
        return self.tokens.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), self.positions, self.documents


def side_by_side(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """positions and documents, (Σ lengths) each, of documents of these lengths one after another."""
    return torch.cat([torch.arange(n) for n in lengths]), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def pack(examples: Sequence[Example], max_tokens: int, share: bool = True) -> list[Batch]:
    """Put the examples into few batches of at most `max_tokens` tokens, in their order, rows that begin alike together.

    No example is cut: one that is longer than `max_tokens` gets a batch of its own. share: compute a beginning that rows of
    a batch have in common once; losses and gradients are the same.
    """
    batches: list[list[tuple[Example, int, int]]] = []           # of each batch: (example, its tokens from, to)
    room = 0
    for shared, group in shared_beginnings(examples) if share else ((0, [example]) for example in examples):
        whole = shared + sum(len(example) - shared for example in group)
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
    return [_batch(parts) for parts in batches]


def _batch(parts: Sequence[tuple[Example, int, int]]) -> Batch:
    """The parts side by side, each an example's tokens from, to; one that does not begin at 0 continues the last that does."""
    def ids(ahead: int) -> Tensor:
        whole = np.concatenate([example.ids[start + ahead:stop + ahead] for example, start, stop in parts])
        return torch.from_numpy(whole.astype(np.int64))

    trained = torch.from_numpy(np.concatenate([example.trained[start + 1:stop + 1] for example, start, stop in parts]))
    positions, documents = side_by_side([stop - start for _, start, stop in parts])
    firsts = torch.tensor([start for _, start, _ in parts])
    return Batch(ids(0), torch.where(trained, ids(1), IGNORE), positions + firsts[documents], documents, int(trained.sum()),
                 tuple(example.source for example, _, stop in parts if stop == len(example)))


def shared_beginnings(examples: Sequence[Example]) -> list[tuple[int, list[Example]]]:
    """(tokens that a group's examples begin with alike, the group), so that few tokens are left to compute.

    A beginning ends before the token that predicts its row's first trained one, so that every loss is its own row's. A row
    that shares too little stands alone, with 0. Groups and rows keep the order of the examples.
    """
    keys = [example.ids.astype(">u4").tobytes() for example in examples]        # in lexicographic order like rows are neighbours
    order = sorted(range(len(examples)), key=keys.__getitem__)
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
    many as fit into `batch_tokens` tokens (one at least). `start` is the position to go on from: the rows consumed so far,
    as yielded. The stream ends after `epochs` epochs, or never. Yields (row indices of the step, rows consumed after it).
    """
    weights = np.ones(len(lengths)) if weights is None else weights
    epoch, begin = epoch_at(weights, seed, start)
    position, rows, tokens = start, [], 0
    for row in itertools.islice(itertools.chain.from_iterable(epoch_orders(weights, seed, epochs, epoch)), start - begin, None):
        if rows and (len(rows) == batch_rows if batch_rows else tokens + lengths[row] > batch_tokens):
            yield rows, position
            rows, tokens = [], 0
        rows.append(row)
        tokens += lengths[row]
        position += 1
    if rows:
        yield rows, position


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be "owner/name" on the Hugging Face Hub: it is no local path and does not look like one."""
    owner, _, rest = name.partition("/")
    return (not Path(name).exists() and not Path(owner).exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None
            and not rest.endswith((".json", ".jsonl", ".gz")))


def fetch(source: str) -> list[Path]:
    """The files behind one `--data` source: a local path, or a dataset's name on the Hugging Face Hub."""
    if not source:
        raise ValueError("--data names an empty source; look for a comma too many")
    if not is_hub_name(source):
        return [Path(source)]
    from huggingface_hub import snapshot_download
    folder = snapshot_download(source, repo_type="dataset", allow_patterns=["*.json", "*.jsonl", "*.gz"])
    return _files_of(Path(folder))


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
