"""Ask a model: the calls that answer a query, or a session in the terminal.

    python generate.py --adapter runs/mine --tools tools.json "weather in Rome?"    # the calls, as JSON
    python generate.py --adapter runs/mine --tools tools.json       # a session: you play user and tools

In Python: `from generate import generate, stream`; see inference/decoding.py.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset.errors import RowError
from dataset.files import read_system_text
from dataset.tools import parse_tools
from inference.decoding import RecordedSteps, call_phrases, generate, stream
from inference.flags import add_machine_flags, add_model_flags
from storage.adapters import load_tuned, system_prompt_of
from storage.atomic import read_json
from storage.pretrained import load_tokenizer
from tokenizer import parse_calls, render_segments

__all__ = ["generate", "stream"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask a model; print the calls it makes, as JSON.")
    parser.add_argument("query", nargs="?", help="the question; without it a session begins, in which you "
                        "also answer for the tools")
    add = parser.add_argument_group("what to ask").add_argument
    add("--tools", default=None, metavar="FILE",
        help="JSON list of tools: xLAM's columns, JSON Schema, or OpenAI's envelope")
    add("--system", default=None, metavar="TEXT",
        help="what the model is told before the tools, or @FILE that holds it (default: with tools, what it "
             "was told in training)")
    add("--raw", action="store_true", help="print the model's text instead, control tokens and all")
    add = parser.add_argument_group("how to answer").add_argument
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="X",
        help="0 takes the likeliest token each time (default), 1 samples")
    add("--top-p", type=float, default=1.0, metavar="X",
        help="sample among the likeliest tokens whose probabilities add up to this (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    add_model_flags(parser)
    add_machine_flags(parser)
    args = parser.parse_args(argv)
    temperature_valid = args.temperature == 0 or 1e-3 <= args.temperature < math.inf
    if not temperature_valid or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("--temperature is 0, or at least 0.001; --top-p in (0, 1], --max-new-tokens at least 1")
    return args


def main(args: argparse.Namespace) -> int:
    tools = read_tools(args.tools) if args.tools else []
    model, folder = load_tuned(args.model, args.adapter, args.dtype, args.device)
    tokenizer = load_tokenizer(folder)
    recorded = RecordedSteps() if args.device == "cuda" else None

    def ask(messages: list[dict]) -> str:
        ids, _ = tokenizer.encode_segments(render_segments(messages, tools, add_generation_prompt=True))
        [answer] = generate(model, [ids], args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                            seed=args.seed, phrases=call_phrases(tokenizer), recorded=recorded)
        return tokenizer.decode(answer)

    if args.system is not None:
        system = read_system_text(args.system)
    else:
        system = system_prompt_of(args.model, args.adapter) if tools else ""
    messages = [{"role": "developer", "content": system}] if system else []
    if args.query is None:
        return session(ask, messages, args.raw)
    text = ask([*messages, {"role": "user", "content": args.query}])
    calls = parse_calls(text)
    if args.raw:
        print(text)
        return 0
    for fault in calls.unread:
        print(f"generate.py: {fault}", file=sys.stderr)
    if not calls or calls.unread:
        problem = "unreadable" if calls.unread else "no call"
        print(f"generate.py: {problem}; the model says: {without_stop_token(text)!r}", file=sys.stderr)
    # Beside something unreadable no call counts: it may be part of that.
    print(json.dumps([] if calls.unread else calls, ensure_ascii=False))
    return 1 if calls.unread else 0


def read_tools(file: str) -> list:
    """The tools in a JSON file, a list or a single one.  Raises ValueError that names the file."""
    try:
        tools = read_json(Path(file))
        return parse_tools([tools] if isinstance(tools, dict) else tools)
    except RowError as error:
        raise ValueError(f"{file}: {error}") from None


def without_stop_token(text: str) -> str:
    """An answer without the token that ends it."""
    for stop in ("<eos>", "<start_function_response>", "<end_of_turn>"):
        text = text.removesuffix(stop)
    return text.strip()


def session(ask: Callable[[list[dict]], str], messages: list[dict], raw: bool) -> int:
    """Answer questions from the terminal until it ends; the user pastes what each called tool returns."""
    print("Ask something; after a call, paste what the tool returns (JSON or text; an empty line: null). "
          "Ctrl-D ends.")
    try:
        while True:
            query = input("you> ").strip()
            if not query:
                continue
            messages.append({"role": "user", "content": query})
            while True:
                text = ask(messages)
                calls = parse_calls(text)
                for fault in calls.unread:
                    print(f"unreadable> {fault}")
                if calls.unread:
                    calls.clear()           # what else looks like a call may be part of the unreadable one
                if raw or not calls:
                    print(f"model> {text if raw else without_stop_token(text)}")
                if not calls:
                    messages.append({"role": "assistant", "content": without_stop_token(text)})
                    break
                tool_calls = [{"type": "function", "function": call} for call in calls]
                messages.append({"role": "assistant", "tool_calls": tool_calls})
                for call in calls:
                    print(f"call>  {json.dumps(call, ensure_ascii=False)}")
                messages.append({"role": "tool", "content": [ask_user_for_response(call) for call in calls]})
    except EOFError:
        print()
        return 0


def ask_user_for_response(call: dict) -> dict:
    """What the user pastes as a tool's response to a call."""
    text = input(f"{call['name']} returns> ").strip()
    return {"name": call["name"], "response": json_or_text(text)}


def json_or_text(text: str) -> Any:
    """The value if the text is JSON, None if it is empty, otherwise the text itself."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
