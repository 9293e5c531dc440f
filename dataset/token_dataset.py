"""Rows in a token cache as a sequence of examples, each read from the disk when it is asked for."""
from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from checkpoint import read_json
from dataset import stats
from dataset.examples import Example
from dataset.rows import Conversation, parse_row
from tokenizer import Tokenizer

TRAINED = np.uint32(1 << 31)                    # beside an id, which has 18 bits
ROW = np.dtype([*stats.SEEN.descr, ("hash", "<f8"), ("place", "S32")])


class TokenFile:
    """One folder: the examples of one file of rows.  name: of that file, as errors call it; weight: of its rows."""

    def __init__(self, folder: Path, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.summary = read_json(folder / "summary.json")
        self.rows = _mapped(folder / "rows.bin", ROW)
        self.ids = _mapped(folder / "ids.bin", np.uint32)
        self.ends = np.cumsum(self.rows["tokens"])
        lines = (folder / "held_out.jsonl").read_bytes().split(b"\n")
        self.held_out = dict(zip(np.argsort(self.rows["hash"], kind="stable").tolist(), lines, strict=False))     # {row: its JSON}

    def example(self, row: int) -> Example:
        stop = int(self.ends[row])
        stored = self.ids[stop - int(self.rows["tokens"][row]):stop]
        return Example((stored & ~TRAINED).view(np.int32), stored >= TRAINED, self.source(row))

    def conversation(self, row: int) -> Conversation:
        """Of one of the rows with the lowest hashes."""
        return parse_row(self.held_out[row], self.source(row), self.summary["system"])

    def source(self, row: int) -> str:
        return f"{self.name}:{self.rows['place'][row].decode()}"


class Tokens(Sequence[Example]):
    """Rows out of token files as a sequence of examples, each read from the disk when it is asked for.

    rows: numbers of rows, counted through all the files. lengths: what `len` gives for each example; hashes: of its query.
    """

    def __init__(self, files: list[TokenFile], rows: np.ndarray | None = None) -> None:
        self.files = files
        self.starts = list(accumulate((len(file.rows) for file in files), initial=0))
        self.rows = np.arange(self.starts[-1]) if rows is None else rows
        self.lengths = array("q", (self.column("tokens") - 1).tobytes())            # gives plain ints
        self.hashes = self.column("hash")
        self.weights = np.repeat([file.weight for file in files], [len(file.rows) for file in files])[self.rows]

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([np.empty(0, ROW[name]), *(file.rows[name] for file in self.files)])[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        file, row = self._at(i)
        return file.example(row)

    def conversation(self, i: int) -> Conversation:
        file, row = self._at(i)
        return file.conversation(row)

    def source(self, i: int) -> str:
        file, row = self._at(i)
        return file.source(row)

    def figures(self, tokenizer: Tokenizer, max_tokens: int) -> dict:
        """The survey of these rows; types and skipped rows are those of the whole files."""
        seen = np.empty(len(self), stats.SEEN)
        for name in stats.SEEN.names:
            seen[name] = self.column(name)
        drawn = random.Random(0).sample(range(len(self)), min(len(self), stats.SAMPLED))
        types = sum((Counter(file.summary["types"]) for file in self.files), Counter())
        return stats.figures(seen, self.source, [self[i] for i in sorted(drawn)], types, tokenizer, max_tokens, self.skipped)

    def _at(self, i: int) -> tuple[TokenFile, int]:
        number = int(self.rows[i])
        file = bisect_right(self.starts, number) - 1
        return self.files[file], number - self.starts[file]

    def take(self, which: np.ndarray) -> Tokens:
        """The examples of these indices, or those where a mask is true."""
        return Tokens(self.files, self.rows[which])

    def hold_out(self, fraction: float) -> tuple[Tokens, Tokens]:
        """The same split, in the same orders, as `data.hold_out`."""
        by_hash = np.argsort(self.hashes, kind="stable")
        return self.take(self.hashes >= fraction), self.take(by_hash[self.hashes[by_hash] < fraction])

    @property
    def trained_tokens(self) -> int:
        return int(self.column("trained").sum())

    @property
    def skipped(self) -> dict[str, dict]:
        """Bad rows of the files: {cause: {"rows": how many, "first": the first, and what is wrong with it}}."""
        found: dict[str, dict] = {}
        for file in self.files:
            for cause, entry in file.summary["skipped"].items():
                first = f"{file.name}:{entry['place']}: {entry['message']}"
                found.setdefault(cause, {"rows": 0, "first": first})["rows"] += entry["rows"]
        return found


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.empty(0, dtype)      # no bytes cannot be mapped
