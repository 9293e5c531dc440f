"""The error of a bad row, the limits of a row, and the count of rows that were skipped."""
from __future__ import annotations

from typing import NamedTuple

# A longer row is an error. FunctionGemma's whole context, 32,768 tokens, is about 100 KB of text.
MAX_ROW_BYTES = 1 << 20

# Objects and lists inside one another. A deeper row is an error, long before Python's own recursion limit.
MAX_NESTING = 100


class RowError(ValueError):
    """A row that cannot be trained on.  cause: a short name to count by."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class NestingError(RowError):
    """A row whose objects and lists are nested more than `MAX_NESTING` deep."""

    def __init__(self) -> None:
        super().__init__("nested too deeply", f"objects and lists are nested more than {MAX_NESTING} deep")


class BadRow(NamedTuple):
    """What is wrong with a row.  source: "file:line", or the line alone where the file has no name yet."""

    source: str
    cause: str
    message: str

    def error(self) -> RowError:
        """The error that stops a run: where, what, and the remedy."""
        return RowError(self.cause, f"{self.source}: {self.message}; fix the row or pass --skip-invalid")


class SkippedRows(dict[str, dict]):
    """The bad rows that were left out: {cause: {"rows": how many, "first": the first one and its fault}}."""

    def add(self, cause: str, first: str, rows: int = 1) -> None:
        """Count `rows` more of a cause.  first: the first of them, as "file:line: what is wrong"."""
        entry = self.setdefault(cause, {"rows": 0, "first": first})
        entry["rows"] += rows

    @property
    def total(self) -> int:
        return sum(entry["rows"] for entry in self.values())

    def lines(self) -> list[str]:
        """A line for each cause, for the console."""
        return [f"{entry['rows']} rows skipped: {cause}; the first: {entry['first']}"
                for cause, entry in self.items()]
