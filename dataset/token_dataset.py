"""`TokenDataset`: tokenized rows as a sequence of examples, each read from the disk when it is asked for."""
from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from dataset.errors import SkippedRows
from dataset.examples import Example
from dataset.rows import Conversation, parse_row
from dataset.sampler import split_held_out
from storage.atomic import read_json

# The highest bit of a stored id, which itself has 18 bits: whether the token carries loss.
LOSS_BIT = np.uint32(1 << 31)

# What is stored of each row beside its ids. loss_tokens: how many of its tokens carry loss; prompt_hash,
# row_hash: of what the model reads before its first answer, and of the whole row; answers: assistant turns;
# text: it answers without a call;
# silent: neither a call nor a text; place: in its file.
ROW = np.dtype([("tokens", "<i8"), ("loss_tokens", "<i8"), ("prompt_hash", "<u8"), ("row_hash", "<u8"),
                ("tools", "<i4"), ("calls", "<i4"), ("answers", "<i4"), ("text", "?"), ("silent", "?"),
                ("hidden_parameters", "?"), ("unknown_types", "?"), ("query_hash", "<f8"), ("place", "S32")])


class TokenFile:
    """The examples of one file of rows, in a folder of the token cache (dataset/token_cache.py).

    name: of the file, as errors call it; weight: how often an epoch takes each of its rows
    """

    def __init__(self, folder: Path, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.summary = read_json(folder / "summary.json")
        self.rows = _map_file(folder / "rows.bin", ROW)
        self.ids = _map_file(folder / "ids.bin", np.uint32)
        self.ends = np.cumsum(self.rows["tokens"])
        lowest_hashes = np.argsort(self.rows["query_hash"], kind="stable").tolist()
        lines = (folder / "held_out.jsonl").read_bytes().split(b"\n")
        self.held_out = dict(zip(lowest_hashes, lines, strict=False))                  # {row: its JSON}

    def example(self, row: int) -> Example:
        stop = int(self.ends[row])
        stored = self.ids[stop - int(self.rows["tokens"][row]):stop]
        return Example((stored & ~LOSS_BIT).view(np.int32), stored >= LOSS_BIT, self.source(row))

    def conversation(self, row: int) -> Conversation:
        """The conversation of one of the rows with the lowest hashes."""
        return parse_row(self.held_out[row], self.source(row), self.summary["system"])

    def source(self, row: int) -> str:
        """"file:line" of a row."""
        return f"{self.name}:{self.rows['place'][row].decode()}"


class TokenDataset(Sequence[Example]):
    """Rows of several token files.

    rows: their numbers, counted through all files; all of them by default
    lengths: positions that the model computes of each row; hashes: `query_hash` of each; weights: of each
    """

    def __init__(self, files: list[TokenFile], rows: np.ndarray | None = None) -> None:
        self.files = files
        self.starts = list(accumulate((len(file.rows) for file in files), initial=0))
        self.rows = np.arange(self.starts[-1]) if rows is None else rows
        self.lengths = array("q", (self.column("tokens") - 1).tobytes())              # an array of plain ints
        self.hashes = self.column("query_hash")
        weights = np.repeat([file.weight for file in files], [len(file.rows) for file in files])
        self.weights = weights[self.rows]

    def column(self, name: str) -> np.ndarray:
        """One field of `ROW` of each row."""
        columns = [np.empty(0, ROW[name]), *(file.rows[name] for file in self.files)]
        return np.concatenate(columns)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        file, row = self._locate(i)
        return file.example(row)

    def conversation(self, i: int) -> Conversation:
        """The conversation of one of the held-out rows, those with the lowest hashes in their file."""
        file, row = self._locate(i)
        return file.conversation(row)

    def source(self, i: int) -> str:
        """"file:line" of a row."""
        file, row = self._locate(i)
        return file.source(row)

    def _locate(self, i: int) -> tuple[TokenFile, int]:
        number = int(self.rows[i])
        file = bisect_right(self.starts, number) - 1
        return self.files[file], number - self.starts[file]

    def select(self, which: np.ndarray | slice) -> TokenDataset:
        """The rows of these indices, or those where a mask is true."""
        return TokenDataset(self.files, self.rows[which])

    def split(self, fraction: float) -> tuple[TokenDataset, TokenDataset]:
        """(the rows to train on, the held-out rows), as `split_held_out` divides them."""
        train, held_out = split_held_out(self.hashes, fraction)
        return self.select(train), self.select(held_out)

    @property
    def loss_tokens(self) -> int:
        """Tokens that carry loss, of all rows."""
        return int(self.column("loss_tokens").sum())

    @property
    def skipped(self) -> SkippedRows:
        """The bad rows of the files, whichever of the other rows are selected."""
        skipped = SkippedRows()
        for file in self.files:
            for cause, entry in file.summary["skipped"].items():
                skipped.add(cause, f"{file.name}:{entry['first']}", entry["rows"])
        return skipped

    @property
    def unknown_types(self) -> Counter[str]:
        """The types that became string, of all rows of the files, and how often each of them occurs."""
        return sum((Counter(file.summary["types"]) for file in self.files), Counter())


def _map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.stat().st_size:                                     # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "r"))
