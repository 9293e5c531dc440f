"""Rows and examples that several tests build on."""
import numpy as np

from dataset.examples import Example

XLAM = {"id": 1, "query": "weather in Rome?",
        "tools": [{"name": "get_weather", "description": "Weather", "parameters": {
            "city": {"type": "str", "description": "City"}, "days": {"type": "int", "description": "Days", "default": 1}}}],
        "answers": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "City"},
                                           "days": {"type": "integer", "description": "Days"}}, "required": ["city"]}


def row(**changes):
    return {**XLAM, **changes}


def examples(*lengths, loss_tokens=2):
    rng = np.random.default_rng(0)
    return [Example(rng.integers(3, 100, n + 1).astype(np.int32), np.arange(n + 1) > n - loss_tokens, f"f:{i}") for i, n in enumerate(lengths)]


def rows_with_prefixes(*groups, loss_tokens=2, seed=1):
    """Examples in groups that share a prefix: (tokens of the prefix, tokens of each)."""
    rng, made = np.random.default_rng(seed), []
    for common, lengths in groups:
        prefix = rng.integers(3, 100, common)
        for n in lengths:
            ids = np.concatenate((prefix, rng.integers(100, 200, n + 1 - common))).astype(np.int32)
            made.append(Example(ids, np.arange(n + 1) > n - loss_tokens, f"f:{len(made)}"))
    return made

# The tools of evaluation's tests: one with a parameter of every type, and one without any.
BOOKING_TOOLS = [{"type": "function", "function": {"name": "book", "description": "", "parameters": {
    "type": "object", "required": ["city"],
    "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}, "price": {"type": "number"}, "pets": {"type": "boolean"},
                   "tags": {"type": "array", "items": {"type": "string"}}, "area": {"type": "array", "items": {"type": "number"}},
                   "guest": {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "number"}}}}}}},
         {"type": "function", "function": {"name": "cancel", "description": "", "parameters": {"type": "object", "properties": {}}}}]


def call(name="book", /, **arguments):
    return {"name": name, "arguments": arguments}
