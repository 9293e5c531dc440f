"""Rows → conversations → token ids → packed batches.

    dict ──read_rows──▶ Conversation ──tokenize──▶ Example(ids, trained) ──pack──▶ Batch(tokens, targets, positions, documents)

Rows come as JSONL or as a JSON array, gzipped or not, in one of three shapes:
    xLAM         {"query": …, "tools": […] or its JSON string, "answers": [{"name", "arguments"}] or its JSON string}
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
import heapq
import itertools
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

# Rows share a beginning of so many tokens at least; fewer are not worth a document of its own.
SHORTEST_BEGINNING = 32

# At most so many processes share out rows among themselves; larger teams save few tokens more and take longer (docs/scaling.md).
TEAM = 16


class RowError(ValueError):
    """A row that cannot be trained on. `cause` is a short name to count by; the message says where, what and what to do."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True)
class Conversation:
    """One row: `tools` in OpenAI's envelope, `messages` in OpenAI's format with arguments as dicts."""

    tools: list[dict]
    messages: list[dict]
    source: str                 # "file:line"
    accepted: tuple[dict, ...] = ()     # {name: {parameter: [accepted, …]}} for each call, where the row gives several

    @property
    def query(self) -> str:
        """What the user asks first."""
        content = next((m["content"] for m in self.messages if m["role"] == "user"), "")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        return " ".join(str(part.get("text", "")) for part in parts)

    @property
    def calls(self) -> list[dict]:
        """The calls of the first assistant turn, [{"name", "arguments"}]."""
        first = next(m for m in self.messages if m["role"] == "assistant")
        return [call["function"] for call in first.get("tool_calls") or ()]

    @property
    def hidden_parameters(self) -> bool:
        """Whether a parameter's name is one that the official template leaves out of its declaration ("type", for one)."""
        return any(SCHEMA_KEYS & set(tool["function"]["parameters"].get("properties") or ()) for tool in self.tools)

    def segments(self) -> list[Segment]:
        return render_segments(self.messages, self.tools)

    def prompt(self) -> list[Segment]:
        """What the model sees before its first turn."""
        before = next(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return render_segments(self.messages[:before], self.tools, add_generation_prompt=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(files: Sequence[str | Path], skipped: Counter | None = None) -> Iterator[Conversation]:
    """The conversations of each file (or of each .json, .jsonl and .gz file in a folder), in order.

    Raises RowError at the first bad row; with `skipped` it counts the row there, by cause, and goes on.
    """
    for file in files:
        for path in _files_of(Path(file)):
            name = (str(path.relative_to(file)) if path != Path(file) else path.name).encode("utf-8", "backslashreplace").decode()
            for place, row in _raw_rows(path):
                source = f"{name}:{place}"
                try:
                    yield parse_row(row, source)
                except RowError as error:
                    if skipped is None:
                        raise RowError(error.cause, f"{source}: {error}; fix the row or pass --skip-invalid") from None
                    skipped[error.cause] += 1


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


def parse_row(row: Any, source: str) -> Conversation:
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
        return _parse_messages(row, source)
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
    answers = [_first_accepted(call) for call in accepted] if several else _decoded(row["answers"], "answers")
    if not isinstance(answers, list):
        raise RowError("bad answers", f"answers is {_kind(answers)}, not a list of {{\"name\", \"arguments\"}}")
    turn = {"role": "assistant", "content": None if answers else "",        # no call: the model is to stay silent
            "tool_calls": [{"type": "function", "function": _call(answer, tools)} for answer in answers]}
    messages = [{"role": "developer", "content": DEVELOPER_TEXT}, {"role": "user", "content": row["query"]}, turn]
    return _checked(Conversation(tools, messages, source, accepted))


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


def _parse_messages(row: dict, source: str) -> Conversation:
    tools = parse_tools(row.get("tools") or [])
    messages = _decoded(row["messages"], "messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise RowError("bad messages", "messages must be a list of objects, each with a \"role\"")
    names: dict[str, str] = {}              # tool_call_id → function name, for responses that give the id alone
    out: list[dict] = []
    if tools and (not messages or messages[0]["role"] not in ("system", "developer")):
        out.append({"role": "developer", "content": DEVELOPER_TEXT})
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


JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")
_TYPE_OF = {"str": "string", "string": "string", "int": "integer", "integer": "integer",
            "float": "number", "number": "number", "double": "number", "bool": "boolean", "boolean": "boolean",
            "list": "array", "array": "array", "tuple": "array", "set": "array", "dict": "object", "object": "object"}


def json_type(text: Any) -> tuple[dict, bool]:
    """A type as people write it → (JSON Schema, whether it is optional).

    >>> json_type("int, optional"), json_type("Optional[List[str]]")
    (({'type': 'integer'}, True), ({'type': 'array', 'items': {'type': 'string'}}, True))

    Union[…] and whatever is unknown become string.
    """
    text = text.strip() if isinstance(text, str) else ""
    bare = re.sub(r"\s*,\s*optional\b[^\[\]]*$", "", text, flags=re.IGNORECASE)
    optional, text = bare != text, bare.removeprefix("typing.")
    outer, bracket, inner = text.partition("[")
    outer, inner = outer.strip().lower(), inner.rstrip().removesuffix("]")
    if bracket and outer == "optional":
        return json_type(inner)[0], True
    kind = _TYPE_OF.get(outer, "string")
    if bracket and kind == "array":
        first = _first_argument(inner)
        return {"type": "array", "items": json_type(first)[0]} if first else {"type": "array"}, optional
    return {"type": kind if not bracket or kind == "object" else "string"}, optional


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
            made.update({"type": value} if value.lower() in JSON_TYPES else json_type(value)[0])
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
    ids, trained = tokenizer.encode_segments(conversation.segments())
    return Example(np.array(ids, np.int32), np.array(trained, bool), conversation.source)


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

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(tokens, positions, documents, rows, targets): the rows that carry loss (M), and their targets (M).

        Positions and documents stay on the CPU, where borders are read; nothing waits for the device.
        """
        rows = (self.targets != IGNORE).nonzero().squeeze(1)
        tokens, rows, targets = ((tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
                                 for tensor in (self.tokens, rows, self.targets[rows]))
        return tokens, self.positions, self.documents, rows, targets


# A token without loss: what a process computes that has to go along with others and has no batch left.
IDLE = Batch(*(torch.full((1,), value) for value in (0, IGNORE, 0, 0)), 0, ())


def side_by_side(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """positions and documents, (Σ lengths) each, of documents of these lengths one after another."""
    return torch.cat([torch.arange(n) for n in lengths]), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


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
    for pieces in (1, 2, 4, sys.maxsize):
        cut = [piece for group in groups for piece in _cut(group, whole / processes / pieces)]
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


def _cut(group: Group, most: float) -> Iterator[Group]:
    """The group in pieces of at most so many tokens, as far as a piece can be so small."""
    shared, examples = group
    first, tokens = 0, shared
    for i, example in enumerate(examples):
        tokens += len(example) - shared
        if i > first and tokens > most:
            yield (shared if i > first + 1 else 0), examples[first:i]
            first, tokens = i, len(example)
    yield (shared if len(examples) > first + 1 else 0), examples[first:]


def pack(examples: Sequence[Example], max_tokens: int, share: bool = True) -> list[Batch]:
    """Put the examples into few batches of at most `max_tokens` tokens, in their order, rows that begin alike together.

    No example is cut: one that is longer than `max_tokens` gets a batch of its own. share: compute a beginning that rows of
    a batch have in common once; losses and gradients are the same.
    """
    return pack_groups(deal(examples, 1, share)[0], max_tokens)


def pack_groups(groups: Iterable[Group], max_tokens: int) -> list[Batch]:
    """As `pack`, of groups that were found before."""
    batches: list[list[tuple[Example, int, int]]] = []           # of each batch: (example, its tokens from, to)
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


def ahead(items: Iterator) -> Iterator:
    """The same items, the next one always made in a thread of its own while one is in use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's rows: a permutation that depends on the seed and the epoch alone."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps(lengths: Sequence[int], seed: int, *, batch_rows: int | None = None, batch_tokens: int | None = None,
          epochs: float | None = None, start: int = 0) -> Iterator[tuple[list[int], int]]:
    """Cut the endless stream of shuffled epochs into optimizer steps.

    lengths: tokens of each row. A step is `batch_rows` rows, or as many as fit into `batch_tokens` tokens (one at
    least). `start` is the position to go on from: the rows consumed so far, as yielded. Every row comes exactly once an
    epoch; the stream ends after `epochs` of them, or never. Yields (row indices of the step, rows consumed after it).
    """
    end = None if epochs is None else round(epochs * len(lengths))
    position, ordered = start, None
    while end is None or position < end:
        rows: list[int] = []
        tokens = 0
        while end is None or position < end:
            epoch, offset = divmod(position, len(lengths))
            if epoch != ordered:
                order, ordered = epoch_order(len(lengths), seed, epoch), epoch
            row = int(order[offset])
            tokens += lengths[row]
            if rows and (len(rows) == batch_rows if batch_rows else tokens > batch_tokens):
                break
            rows.append(row)
            position += 1
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


def read_sources(sources: Iterable[str], skipped: Counter | None = None) -> list[Conversation]:
    """Every conversation of a list of `--data` sources."""
    return [row for source in sources for row in read_rows(fetch(source), skipped)]
