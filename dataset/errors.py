"""The error of a row, and the limits that a row must keep."""
from __future__ import annotations

from collections import Counter

# A longer row is an error: FunctionGemma's whole context, 32,768 tokens, is some 100 KB of text.
MAX_ROW_BYTES = 1 << 20


# Objects and lists in one another; a deeper row is an error, long before Python's own limit of nested calls.
MAX_NESTING = 100
TOO_DEEP = f"objects and lists stand more than {MAX_NESTING} deep in one another"


TOO_DEEP = f"objects and lists stand more than {MAX_NESTING} deep in one another"


class RowError(ValueError):
    """A row that cannot be trained on. `cause` is a short name to count by; the message says where, what and what to do."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def placed(source: str, cause: str, message: str) -> RowError:
    """The error of a row, with its place and the remedy."""
    return RowError(cause, f"{source}: {message}; fix the row or pass --skip-invalid")


class Skipped(Counter):
    """Rows left out, counted by cause; `first` says of each cause which row was the first, and what is wrong with it."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, str] = {}

    def note(self, cause: str, first: str) -> None:
        self[cause] += 1
        self.first.setdefault(cause, first)
