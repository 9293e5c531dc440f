"""What is in the rows: one pass over them, and a plain dict of figures.

    python train.py --model MODEL --data rows.jsonl --survey      # on the console and as a page, without training

What a row has to say is a SEEN, 48 bytes beside its tokens in the cache, so that a million rows are surveyed in seconds. What
needs whole rows (samples, shared beginnings) looks at SAMPLED of them, drawn evenly.
"""
from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

import data
from data import Conversation, Example
from tokenizer import Tokenizer
from tokenizer.chat import SCHEMA_KEYS

# asked, whole: hashes of what the model is told before its first answer, and of the whole row; the next three are counts.
SEEN = np.dtype([("tokens", "<i8"), ("trained", "<i8"), ("asked", "<u8"), ("whole", "<u8"), ("tools", "<i4"), ("calls", "<i4"),
                 ("answers", "<i4"), ("text", "?"), ("silent", "?"), ("hidden_parameters", "?"), ("unknown_types", "?")])
SAMPLED = 2_048          # rows
STEP_ROWS = 32           # rows of a step, which share beginnings
PASS_TOKENS = 16_896     # of a full forward pass
BINS = 16                # of the tokens' histogram, at most


def seen(row: Conversation, example: Example) -> tuple:
    """The SEEN of a row."""
    first = next(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
    before, after = [*sorted(tool.digest for tool in row.tools), dump(row.messages[:first])], row.messages[first:]
    calls = [data.called(message) for message in after if message["role"] == "assistant"]
    answer = sorted(map(dump, calls[0])) if len(after) == 1 and calls[0] else map(dump, after)         # parallel calls have no order
    text = not any(calls) and any(data.said(message).strip() for message in after)
    return (len(example.ids), np.count_nonzero(example.trained), hash_of(before), hash_of([*before, "answer", *answer]), len(row.tools),
            sum(map(len, calls)), len(calls), text, not any(calls) and not text, row.hidden_parameters, bool(row.unknown_types))


def figures(rows: np.ndarray, source: Callable[[int], str], sample: Sequence[Example], types: Counter[str], tokenizer: Tokenizer,
            max_tokens: int, skipped: dict[str, dict]) -> dict:
    """All that there is to say about rows, for JSON.

    rows: a SEEN each; source: says a row's place; sample: SAMPLED of them; types: how often each unknown one stands in them;
    max_tokens: longer rows are dropped; skipped: those that could not be read, {cause: {"rows", "first"}}.
    """
    def of(which: np.ndarray, like: np.ndarray | None = None) -> dict:
        """How many rows, and the first of them; like: the earlier ones that these repeat in some way."""
        first = source(which[0]) + (f", as {source(like[0])}" if like is not None else "") if len(which) else None
        return {"rows": len(which), "first": first}

    kept, long = np.flatnonzero(rows["tokens"] <= max_tokens), np.flatnonzero(rows["tokens"] > max_tokens)
    dropped = ({f"longer than {max_tokens:,} tokens": of(long)} if len(long) else {}) | skipped
    found = {"rows": len(kept) + sum(entry["rows"] for entry in dropped.values()), "kept": len(kept), "dropped": dropped}
    if not len(kept):
        return found

    lengths = rows["tokens"][kept] - 1                     # as everywhere: the last id is only ever a target
    again, earlier = repeated(rows["whole"][kept])
    once = np.delete(kept, again)
    other, answered = repeated(rows["asked"][once])                         # asked once more, and not answered alike
    counts = {name: np.unique(rows[name][kept], return_counts=True) for name in ("tools", "calls", "answers")}
    plain = lengths.tolist()
    steps = [sum(plain[row] for row in step) for step, _ in data.steps(plain, 0, batch_tokens=PASS_TOKENS, epochs=1)]
    sample = [example for example in sample if len(example.ids) <= max_tokens]
    return found | {
        "tokens": int(lengths.sum()), "trained_tokens": int(rows["trained"][kept].sum()),
        "tokens_a_row": {"least": int(lengths.min()), "median": float(np.median(lengths)), "of 95 %": float(np.quantile(lengths, 0.95)),
                         "most": int(lengths.max())},
        "histogram": histogram(lengths),
        **{f"{name}_a_row": list(zip(*map(np.ndarray.tolist, both), strict=True)) for name, both in counts.items()},
        **{name: of(kept[rows[name][kept]]) for name in ("text", "silent", "hidden_parameters", "unknown_types")},
        "types": types.most_common(20), "different_types": len(types),
        "duplicates": of(kept[again], kept[earlier]), "conflicts": of(once[other], once[answered]),
        "longest": [[source(kept[i]), plain[i]] for i in np.argsort(-lengths, kind="stable")[:5]],
        "packing": {"pass_tokens": PASS_TOKENS, "passes": len(steps), "full": sum(steps) / sum(max(PASS_TOKENS, n) for n in steps)},
        "beginnings": {"step_rows": STEP_ROWS, "sampled": len(sample), "shared": shared_beginnings(sample)},
        "samples": [{"source": example.source, "tokens": len(example), "runs": data.runs(example, tokenizer)}
                    for example in [sample[i] for i in sorted({0, len(sample) // 2, len(sample) - 1}) if sample]]}


def shared_beginnings(sample: Sequence[Example]) -> float:
    """The share of tokens that a step need not compute because rows begin alike."""
    computed, lengths = 0, [len(example) for example in sample]
    for rows, _ in data.steps(lengths, 0, batch_rows=STEP_ROWS, epochs=1) if sample else ():
        computed += sum(len(batch.tokens) for batch in data.pack([sample[row] for row in rows], PASS_TOKENS))
    return 1 - computed / sum(lengths) if sample else 0.0


dump = json.JSONEncoder(sort_keys=True).encode


def hash_of(texts: list[str]) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(texts).encode(), digest_size=8).digest())


def repeated(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a hash stands that stood earlier, ascending; and where each of these stood first."""
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(hashes)))
    return again, first[which][again]


def histogram(lengths: np.ndarray) -> dict:
    """Rows by their tokens, in BINS bins at most, whose borders are round numbers: the i-th begins at "from" + i · "width"."""
    low, high = int(lengths.min()), int(lengths.max())
    widths = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < BINS)
    start = low // width * width
    return {"from": start, "width": width, "rows": np.bincount((lengths - start) // width).tolist()}


# ---------------------------------------------------------------------------------------------------------------------
# In words

REMARKS = {"duplicates": "say just what an earlier row says", "conflicts": "ask what an earlier row asks and are answered otherwise",
           "text": "are answered by a text, without a call", "silent": "want silence, neither a call nor a text",
           "hidden_parameters": f"have a parameter named {', '.join(sorted(SCHEMA_KEYS))}, which the official template leaves undeclared",
           "unknown_types": "have a type that is not known and becomes string"}


def headlines(found: dict) -> list[str]:
    """What is worth a line before training, besides the counts of rows and tokens."""
    lines = [f"{found[key]['rows']:,} rows {what}; the first: {found[key]['first']}" for key, what in REMARKS.items() if found[key]["rows"]]
    (longest, tokens), beginnings = found["longest"][0], found["beginnings"]
    return [*lines, f"longest row {longest}, {tokens:,} tokens; rows in steps of {beginnings['step_rows']} share {beginnings['shared']:.0%}"
                    " of their tokens as beginnings"]


def described(found: dict) -> list[tuple[str, str]]:
    """Every figure but the histogram and the samples: (what, in words)."""
    lines = [("rows to train on", f"{found['kept']:,}; {found['rows'] - found['kept']:,} dropped")]
    lines += [(f"dropped: {cause}", f"{entry['rows']:,}; the first: {entry['first']}") for cause, entry in found["dropped"].items()]
    if not found["kept"]:
        return lines
    a_row, packing, beginnings = found["tokens_a_row"], found["packing"], found["beginnings"]
    words = ", ".join(f"{word or '(empty)'} ({count:,})" for word, count in found["types"])
    remarks = [(what, found[key]) for key, what in REMARKS.items() if found[key]["rows"]]
    lines += [("tokens", f"{found['tokens']:,}, {found['trained_tokens'] / found['tokens']:.1%} of them trained"),
              ("tokens a row", f"{a_row['least']:,} to {a_row['most']:,}, half of the rows at most {a_row['median']:,.0f}, "
                               f"95% at most {a_row['of 95 %']:,.0f}"),
              *((f"{name} a row", spread(found[f"{name}_a_row"])) for name in ("tools", "calls", "answers")),
              *((f"rows that {what}", f"{entry['rows']:,}; the first: {entry['first']}") for what, entry in remarks),
              *([("types that become string", words + (", …" if found["different_types"] > len(found["types"]) else ""))] if words else []),
              ("longest rows", ", ".join(f"{source} ({tokens:,})" for source, tokens in found["longest"])),
              (f"forward passes of {packing['pass_tokens']:,} tokens", f"{packing['passes']:,}, {packing['full']:.1%} full"),
              ("shared beginnings", f"{beginnings['shared']:.1%} of the tokens in steps of {beginnings['step_rows']} rows "
                                    f"({beginnings['sampled']:,} rows looked at)")]
    return lines


def spread(counts: list) -> str:
    """[(how many, in so many rows), …] in words: the mean, and the commonest."""
    total = sum(rows for _, rows in counts)
    common = sorted(sorted(counts, key=lambda entry: -entry[1])[:6])
    rest = total - sum(rows for _, rows in common)
    listed = ", ".join(f"{rows:,} with {count}" for count, rows in common) + (f", {rest:,} with other numbers" if rest else "")
    return f"{sum(count * rows for count, rows in counts) / total:.1f} on average; rows: {listed}"


def console(found: dict) -> str:
    """The whole survey for a terminal, trained tokens of the samples in green."""
    lines = [f"{what:<34} {value}" if len(what) <= 34 else f"{what}\n{'':<34} {value}" for what, value in described(found)]
    if found["kept"]:
        start, width, counts = (found["histogram"][key] for key in ("from", "width", "rows"))
        lines += ["", f"{'tokens from':>12} {'rows':>10}"]
        lines += [f"{start + i * width:>12,} {rows:>10,} {'█' * math.ceil(50 * rows / max(counts))}" for i, rows in enumerate(counts)]
        lines += [f"\n{sample['source']}, {sample['tokens']:,} tokens\n{colored(sample['runs'])}" for sample in found["samples"]]
    return "\n".join(lines)


def colored(runs: list[tuple[str, bool]]) -> str:
    """Text in runs, the trained ones in green (ANSI)."""
    return "".join(f"\033[32m{text}\033[0m" if trained else text for text, trained in runs)
