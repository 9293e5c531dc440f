"""What is in the rows: one pass over them, and a plain dict of figures.

    python train.py --model MODEL --data rows.jsonl --survey      # on the console and as a page, without training

Of a row stay its place, its length and two hashes, some 100 bytes, so that a million rows can be surveyed as they are read.
What needs whole rows (samples, shared beginnings) looks at SAMPLED of them, drawn evenly.
"""
from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections import Counter
from typing import Any

import numpy as np

import data
from data import Conversation, Example, Skipped
from tokenizer import Tokenizer

SAMPLED = 2_048          # rows
STEP_ROWS = 32           # rows of a step, which share beginnings
PASS_TOKENS = 16_896     # of a full forward pass
BINS = 16                # of the tokens' histogram, at most


class Survey:
    """Takes rows one by one; `figures` says what they were."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.noted = Skipped()                                              # rows of a kind worth a look
        self.lengths, self.asked, self.whole = array("I"), array("Q"), array("Q")       # of each row kept: tokens, two hashes
        self.sources: list[str] = []
        self.trained_tokens = 0
        self.counts: dict[str, Counter] = {"tools": Counter(), "calls": Counter(), "answers": Counter()}      # so many in a row → rows
        self.types: Counter[str] = Counter()
        self.sample: list[Example] = []
        self.draw = random.Random(0)

    def add(self, row: Conversation, example: Example) -> None:
        if len(example.ids) > self.max_tokens:
            self.noted.note("too long", f"{row.source}: {len(example.ids):,} tokens")
            return
        first = next(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        before, after = [*sorted(map(dump, row.tools)), *map(dump, row.messages[:first])], row.messages[first:]
        calls = [data.called(message) for message in after if message["role"] == "assistant"]
        alone = len(after) == 1 and calls[0]                                # parallel calls have no order
        self.asked.append(hash_of(before))
        self.whole.append(hash_of([*before, "answer", *(sorted(map(dump, calls[0])) if alone else map(dump, after))]))
        self.lengths.append(len(example))
        self.sources.append(row.source)
        self.trained_tokens += int(example.trained.sum())
        for name, count in (("tools", len(row.tools)), ("calls", sum(map(len, calls))), ("answers", len(calls))):
            self.counts[name][count] += 1
        if not any(calls):
            self.noted.note("text" if any(data.said(message).strip() for message in after) else "silent", row.source)
        if row.hidden_parameters:
            self.noted.note("hidden parameters", row.source)
        if words := row.unknown_types:
            self.types.update(word[:60] for word in words)
            self.noted.note("unknown types", f"{row.source}: {words[0][:60]!r}")
        if len(self.sample) < SAMPLED:
            self.sample.append(example)
        elif (place := self.draw.randrange(len(self.lengths))) < SAMPLED:
            self.sample[place] = example

    def figures(self, tokenizer: Tokenizer, skipped: Skipped | None = None) -> dict:
        """All that was found, for JSON. skipped: the rows that could not be read."""
        def noted(kind: str) -> dict:
            return {"rows": self.noted[kind], "first": self.noted.first.get(kind)}

        lengths, whole, asked = np.array(self.lengths), np.array(self.whole), np.array(self.asked)
        again, earlier = repeated(whole)
        once = np.delete(np.arange(len(whole)), again)
        other, answered = repeated(asked[once])                             # asked once more, and not answered alike
        dropped = {f"longer than {self.max_tokens:,} tokens": noted("too long")} if self.noted["too long"] else {}
        dropped |= {cause: {"rows": rows, "first": skipped.first[cause]} for cause, rows in (skipped or {}).items()}
        found = {"rows": len(lengths) + sum(entry["rows"] for entry in dropped.values()), "kept": len(lengths), "dropped": dropped}
        if not len(lengths):
            return found
        steps = [sum(self.lengths[row] for row in rows) for rows, _ in data.steps(self.lengths, 0, batch_tokens=PASS_TOKENS, epochs=1)]
        return found | {
            "tokens": int(lengths.sum()), "trained_tokens": self.trained_tokens,
            "tokens_a_row": {"least": int(lengths.min()), "median": float(np.median(lengths)), "of 95 %": float(np.quantile(lengths, 0.95)),
                             "most": int(lengths.max())},
            "histogram": histogram(lengths),
            **{f"{name}_a_row": sorted(counts.items()) for name, counts in self.counts.items()},
            "text": noted("text"), "silent": noted("silent"), "hidden_parameters": noted("hidden parameters"),
            "unknown_types": noted("unknown types") | {"words": self.types.most_common(20), "different": len(self.types)},
            "duplicates": self.pairs(again, earlier), "conflicts": self.pairs(once[other], once[answered]),
            "longest": [[self.sources[i], self.lengths[i]] for i in np.argsort(-lengths.astype(np.int64), kind="stable")[:5]],
            "packing": {"pass_tokens": PASS_TOKENS, "passes": len(steps), "full": sum(steps) / sum(max(PASS_TOKENS, n) for n in steps)},
            "beginnings": self.beginnings(),
            "samples": [{"source": example.source, "tokens": len(example), "runs": data.runs(example, tokenizer)}
                        for example in [self.sample[i] for i in sorted({0, len(self.sample) // 2, len(self.sample) - 1})]]}

    def pairs(self, later: np.ndarray, earlier: np.ndarray) -> dict:
        """How many rows are like an earlier one in some way, and the first two that are."""
        return {"rows": len(later), "first": f"{self.sources[later[0]]}, as {self.sources[earlier[0]]}" if len(later) else None}

    def beginnings(self) -> dict:
        """The share of tokens that a step need not compute because rows before begin alike."""
        computed, lengths = 0, [len(example) for example in self.sample]
        for rows, _ in data.steps(lengths, 0, batch_rows=STEP_ROWS, epochs=1):
            computed += sum(len(batch.tokens) for batch in data.pack([self.sample[row] for row in rows], PASS_TOKENS))
        return {"step_rows": STEP_ROWS, "sampled": len(lengths), "shared": 1 - computed / sum(lengths)}


def dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


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
           "hidden_parameters": "have a parameter that the official template leaves undeclared",
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
    words = ", ".join(f"{word or '(empty)'} ({count:,})" for word, count in found["unknown_types"]["words"])
    remarks = [(what, found[key]) for key, what in REMARKS.items() if found[key]["rows"]]
    lines += [("tokens", f"{found['tokens']:,}, {found['trained_tokens'] / found['tokens']:.1%} of them trained"),
              ("tokens a row", f"{a_row['least']:,} to {a_row['most']:,}, half of the rows at most {a_row['median']:,.0f}, "
                               f"95 % at most {a_row['of 95 %']:,.0f}"),
              *((f"{name} a row", spread(found[f"{name}_a_row"])) for name in ("tools", "calls", "answers")),
              *((f"rows that {what}", f"{entry['rows']:,}; the first: {entry['first']}") for what, entry in remarks),
              *([("types that become string", words + (", …" if found["unknown_types"]["different"] > 20 else ""))] if words else []),
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
    listed = [*(f"{count} in {rows:,}" for count, rows in common), *([f"others in {rest:,}"] if rest else [])]
    return f"{sum(count * rows for count, rows in counts) / total:.1f} on average; {', '.join(listed)}"


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
