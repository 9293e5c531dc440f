"""Statistics of a data set: what is in its rows, as one dict for JSON, and in words.

    python train.py --model MODEL --data rows.jsonl --survey      # on the console and as a page; no training

Most of it comes from what the token cache stores of each row (`token_dataset.ROW`), so that a million rows
take seconds. What needs whole rows (samples, shared prefixes) looks at `SAMPLED_ROWS` of them.
"""
from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from dataset.examples import Example, text_runs
from dataset.rows import Conversation, message_calls, message_text
from dataset.sampler import query_hash, steps
from dataset.token_dataset import TokenDataset
from tokenizer import Tokenizer
from tokenizer.chat import SCHEMA_KEYS

SAMPLED_ROWS = 2_048
STEP_ROWS = 32           # rows of a step, among which prefixes are shared
MICRO_TOKENS = 16_896    # of a full micro-batch
MAX_BINS = 16            # of the histogram of tokens

# (examples, rows of a step, tokens of a micro-batch) → the fraction of tokens that need not be computed
SharedFraction = Callable[[Sequence[Example], int, int], float]


# ------------------------------------------------------------------------------------------------------------
# One row


def row_stats(row: Conversation, example: Example, place: str) -> tuple:
    """The `token_dataset.ROW` of a row."""
    first = row.first_answer
    prompt = [*sorted(tool.digest for tool in row.tools), _sorted_json(row.messages[:first])]
    after = row.messages[first:]
    calls = [message_calls(message) for message in after if message["role"] == "assistant"]
    if len(after) == 1 and calls[0]:
        answer = sorted(map(_sorted_json, calls[0]))                    # parallel calls have no order
    else:
        answer = [_sorted_json(message) for message in after]
    has_text = not any(calls) and any(message_text(message).strip() for message in after)
    is_silent = not any(calls) and not has_text
    return (len(example.ids), np.count_nonzero(example.loss_mask),
            _hash(prompt), _hash([*prompt, "answer", *answer]),
            len(row.tools), sum(map(len, calls)), len(calls),
            has_text, is_silent, row.hidden_parameters, bool(row.unknown_types),
            query_hash(row.query), place.encode())


_sorted_json = json.JSONEncoder(sort_keys=True).encode


def _hash(texts: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(texts).encode(), digest_size=8).digest())


# ------------------------------------------------------------------------------------------------------------
# All rows


def statistics(dataset: TokenDataset, tokenizer: Tokenizer, max_tokens: int,
               shared_fraction: SharedFraction) -> dict:
    """All that there is to say about the rows, for JSON (data.json of a run).

    max_tokens: longer rows are dropped; shared_fraction: `data.shared_prefix_fraction`
    Skipped rows and unknown types are those of the whole files.
    """
    tokens = dataset.column("tokens")
    kept, long = np.flatnonzero(tokens <= max_tokens), np.flatnonzero(tokens > max_tokens)
    dropped = dict(dataset.skipped)
    if len(long):
        dropped = {f"longer than {max_tokens:,} tokens": _count(dataset, long), **dropped}
    total = len(kept) + sum(entry["rows"] for entry in dropped.values())
    found = {"rows": total, "kept": len(kept), "dropped": dropped}
    if not len(kept):
        return found

    sampled = random.Random(0).sample(range(len(dataset)), min(len(dataset), SAMPLED_ROWS))
    sample = [dataset[i] for i in sorted(sampled) if tokens[i] <= max_tokens]
    return (found | _token_statistics(dataset, kept) | _content_statistics(dataset, kept)
            | _repetitions(dataset, kept) | _packing(dataset, kept)
            | {"shared_prefixes": {"step_rows": STEP_ROWS, "sampled": len(sample),
                                   "shared": shared_fraction(sample, STEP_ROWS, MICRO_TOKENS)},
               "samples": _samples(sample, tokenizer)})


def _count(dataset: TokenDataset, rows: np.ndarray, like: np.ndarray | None = None) -> dict:
    """How many rows, and the first of them.  like: the earlier rows that these resemble"""
    if not len(rows):
        return {"rows": 0, "first": None}
    first = dataset.source(rows[0])
    return {"rows": len(rows), "first": first if like is None else f"{first}, as {dataset.source(like[0])}"}


def _token_statistics(dataset: TokenDataset, kept: np.ndarray) -> dict:
    lengths = np.asarray(dataset.lengths)[kept]
    longest = np.argsort(-lengths, kind="stable")[:5]
    return {
        "tokens": int(lengths.sum()),
        "trained_tokens": int(dataset.column("loss_tokens")[kept].sum()),
        "tokens_a_row": {"least": int(lengths.min()), "median": float(np.median(lengths)),
                         "of 95 %": float(np.quantile(lengths, 0.95)), "most": int(lengths.max())},
        "histogram": histogram(lengths),
        "longest": [[dataset.source(kept[i]), int(lengths[i])] for i in longest]}


def _content_statistics(dataset: TokenDataset, kept: np.ndarray) -> dict:
    found: dict = {}
    for name in ("tools", "calls", "answers"):
        values, rows = np.unique(dataset.column(name)[kept], return_counts=True)
        found[f"{name}_a_row"] = list(zip(values.tolist(), rows.tolist(), strict=True))
    for name in ("text", "silent", "hidden_parameters", "unknown_types"):
        found[name] = _count(dataset, kept[dataset.column(name)[kept]])
    types = dataset.unknown_types
    return found | {"types": types.most_common(20), "different_types": len(types)}


def _repetitions(dataset: TokenDataset, kept: np.ndarray) -> dict:
    """Rows that repeat an earlier row; and rows with an earlier row's prompt and another answer."""
    repeated, earlier = find_repeated(dataset.column("row_hash")[kept])
    unique = np.delete(kept, repeated)
    conflicting, answered = find_repeated(dataset.column("prompt_hash")[unique])
    return {"duplicates": _count(dataset, kept[repeated], kept[earlier]),
            "conflicts": _count(dataset, unique[conflicting], unique[answered])}


def find_repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices of hashes that occur earlier, ascending; and where each of these occurs first."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[which] != np.arange(len(hashes)))
    return repeated, first[which][repeated]


def _packing(dataset: TokenDataset, kept: np.ndarray) -> dict:
    """How full micro-batches of `MICRO_TOKENS` tokens get."""
    lengths = np.asarray(dataset.lengths)[kept].tolist()
    plan = steps(lengths, 0, batch_tokens=MICRO_TOKENS, epochs=1)
    filled = [sum(lengths[row] for row in rows) for rows, _ in plan]
    capacity = sum(max(MICRO_TOKENS, tokens) for tokens in filled)
    return {"packing": {"pass_tokens": MICRO_TOKENS, "passes": len(filled), "full": sum(filled) / capacity}}


def _samples(sample: list[Example], tokenizer: Tokenizer) -> list[dict]:
    """The first, the middle and the last of the sampled rows, as text."""
    chosen = sorted({0, len(sample) // 2, len(sample) - 1}) if sample else []
    return [{"source": sample[i].source, "tokens": len(sample[i]), "runs": text_runs(sample[i], tokenizer)}
            for i in chosen]


def histogram(lengths: np.ndarray) -> dict:
    """Rows by their tokens, in at most `MAX_BINS` bins with round borders.

    Bin i begins at "from" + i · "width".
    """
    low, high = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < MAX_BINS)
    start = low // width * width
    return {"from": start, "width": width, "rows": np.bincount((lengths - start) // width).tolist()}


# ------------------------------------------------------------------------------------------------------------
# In words

REMARKS = {
    "duplicates": "are the same as an earlier row",
    "conflicts": "have the prompt of an earlier row and another answer",
    "text": "are answered by a text, without a call",
    "silent": "want silence, neither a call nor a text",
    "hidden_parameters": f"have a parameter named {', '.join(sorted(SCHEMA_KEYS))}, "
                         "which the official template leaves undeclared",
    "unknown_types": "have an unknown type, which becomes string"}


def _remarks(found: dict) -> list[tuple[str, dict]]:
    return [(remark, found[key]) for key, remark in REMARKS.items() if found[key]["rows"]]


def _shared_prefixes(found: dict) -> dict:
    return found["shared_prefixes"] if "shared_prefixes" in found else found["beginnings"]  # in older runs


def headlines(found: dict) -> list[str]:
    """What is worth a line before training, besides the counts of rows and tokens."""
    lines = [f"{entry['rows']:,} rows {remark}; the first: {entry['first']}"
             for remark, entry in _remarks(found)]
    (longest, tokens), prefixes = found["longest"][0], _shared_prefixes(found)
    steps_of, shared = prefixes["step_rows"], prefixes["shared"]
    return [*lines, f"longest row {longest}, {tokens:,} tokens; "
                    f"rows in steps of {steps_of} share {shared:.0%} of their tokens as prefixes"]


def describe(found: dict) -> list[tuple[str, str]]:
    """All statistics but the histogram and the samples: (what, in words)."""
    lines = [("rows to train on", f"{found['kept']:,}; {found['rows'] - found['kept']:,} dropped")]
    for cause, entry in found["dropped"].items():
        lines.append((f"dropped: {cause}", f"{entry['rows']:,}; the first: {entry['first']}"))
    if not found["kept"]:
        return lines

    tokens, packing, prefixes = found["tokens_a_row"], found["packing"], _shared_prefixes(found)
    carry_loss = found["trained_tokens"] / found["tokens"]
    lines.append(("tokens", f"{found['tokens']:,}, {carry_loss:.1%} of them carry loss"))
    lines.append(("tokens a row", f"{tokens['least']:,} to {tokens['most']:,}, half of the rows at most "
                                  f"{tokens['median']:,.0f}, 95% at most {tokens['of 95 %']:,.0f}"))
    for name in ("tools", "calls", "answers"):
        lines.append((f"{name} a row", _describe_counts(found[f"{name}_a_row"])))
    for remark, entry in _remarks(found):
        lines.append((f"rows that {remark}", f"{entry['rows']:,}; the first: {entry['first']}"))
    if found["types"]:
        types = ", ".join(f"{word or '(empty)'} ({count:,})" for word, count in found["types"])
        more = ", …" if found["different_types"] > len(found["types"]) else ""
        lines.append(("types that become string", types + more))
    lines.append(("longest rows", ", ".join(f"{source} ({tokens:,})" for source, tokens in found["longest"])))
    lines.append((f"micro-batches of {packing['pass_tokens']:,} tokens",
                  f"{packing['passes']:,}, {packing['full']:.1%} full"))
    lines.append(("shared prefixes", f"{prefixes['shared']:.1%} of the tokens in steps of "
                                     f"{prefixes['step_rows']} rows ({prefixes['sampled']:,} rows sampled)"))
    return lines


def _describe_counts(counts: list) -> str:
    """[(number, rows that have it), …] in words: the mean, and the six most common numbers."""
    total = sum(rows for _, rows in counts)
    common = sorted(sorted(counts, key=lambda entry: -entry[1])[:6])
    others = total - sum(rows for _, rows in common)
    listed = [f"{rows:,} with {number}" for number, rows in common]
    if others:
        listed.append(f"{others:,} with other numbers")
    mean = sum(number * rows for number, rows in counts) / total
    return f"{mean:.1f} on average; rows: {', '.join(listed)}"


def console(found: dict) -> str:
    """All statistics for a terminal; in the samples the tokens that carry loss are green."""
    lines = []
    for what, value in describe(found):
        lines.append(f"{what:<34} {value}" if len(what) <= 34 else f"{what}\n{'':<34} {value}")
    if found["kept"]:
        start, width, counts = (found["histogram"][key] for key in ("from", "width", "rows"))
        lines += ["", f"{'tokens from':>12} {'rows':>10}"]
        for i, rows in enumerate(counts):
            lines.append(f"{start + i * width:>12,} {rows:>10,} {'█' * math.ceil(50 * rows / max(counts))}")
        for sample in found["samples"]:
            lines.append(f"\n{sample['source']}, {sample['tokens']:,} tokens\n{color_runs(sample['runs'])}")
    return "\n".join(lines)


def color_runs(runs: list[tuple[str, bool]]) -> str:
    """The text of a row for a terminal, what carries loss in green (ANSI).  runs: as from `text_runs`"""
    return "".join(f"\033[32m{text}\033[0m" if carries_loss else text for text, carries_loss in runs)
