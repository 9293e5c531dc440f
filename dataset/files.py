"""Files of rows: JSONL or one JSON array, gzipped or not, on this machine or on the Hugging Face Hub.

Files are read in chunks, arrays too, and no row may be longer than `MAX_ROW_BYTES`: memory is bounded
whatever a file holds (docs/hostile.md). A raw row is the pair (place, JSON text): the place is its line,
"12", or in an array the line and the number of the row, "12 (row 7)".
"""
from __future__ import annotations

import codecs
import gzip
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dataset.errors import MAX_ROW_BYTES, RowError
from storage import hub

RawRow = tuple[str, bytes]

ROW_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")      # as datasets on the Hub name their files
READ_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"


def read_system_text(flag: str) -> str:
    """The text that `--system` gives: the flag itself, or the contents of FILE where the flag is @FILE."""
    if not flag.startswith("@"):
        return flag
    path = flag[1:]
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        message = f"{path}: no such file; --system takes a text, or @FILE for a file that holds it"
        raise FileNotFoundError(message) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save the file as UTF-8") from None


# ------------------------------------------------------------------------------------------------------------
# Sources: what `--data` names


def parse_weight(source: str) -> tuple[str, float]:
    """Split one `--data` source into its name and its weight.  Raises ValueError for a weight that is none.

    >>> parse_weight("rows.jsonl*0.5")
    ('rows.jsonl', 0.5)
    """
    match = re.fullmatch(r"(.+)\*([\d.]*)", source)
    if not match:
        return source, 1.0
    name, weight = match.groups()
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or not 0 < float(weight) <= 1000:
        expected = f"a weight is a number above 0, 1000 at most, as in {name}*2 or {name}*0.5"
        raise ValueError(f"--data {source}: {expected}")
    return name, float(weight)


def fetch(source: str) -> list[Path]:
    """The files behind one `--data` source: a local path, or rows on the Hugging Face Hub (storage/hub.py).
    """
    if not source:
        raise ValueError("--data names an empty source; look for a comma too many")
    if not hub.parse(source):
        return [Path(source)]
    pinned = hub.pin(source, "dataset")
    files = select_row_files(hub.parse(source), hub.list_files(pinned, "dataset"))
    return hub.fetch(pinned, "dataset", files)


def select_row_files(name: hub.Name, files: list[str]) -> list[str]:
    """Those files of a dataset on the Hub that hold the rows asked for.

    Raises FileNotFoundError or ValueError, saying what there is instead.
    """
    visible = [file for file in files if not file.startswith(".")]
    rows = [file for file in visible if file.endswith(ROW_FILES) and file != "dataset_infos.json"]
    if name.part in rows:
        return [name.part]
    if not rows or name.part in files:
        raise FileNotFoundError(_conversion_advice(name, name.part or ", ".join(visible)))

    splits = [split for split in SPLITS if any(_belongs_to_split(file, split) for file in rows)]
    if name.part is None:
        if len(splits) > 1:
            advice = f"name one, as --data {name.repo}:{splits[0]}"
            raise ValueError(f"{name.repo} has the splits {', '.join(splits)}; {advice}")
        return rows
    selected = [file for file in rows if _belongs_to_split(file, name.part)]
    if not selected:
        found = f"the splits {', '.join(splits)} and " if splits else ""
        found += f"the files {', '.join(rows):.600}"
        raise FileNotFoundError(f"{name.repo} has no split or file {name.part!r}; there are {found}")
    return selected


def _belongs_to_split(file: str, split: str) -> bool:
    stem = file.rpartition("/")[2].partition(".")[0]
    return split == stem or split in re.split(r"[^A-Za-z0-9]+", file.rpartition(".json")[0])


def _conversion_advice(name: hub.Name, found: str) -> str:
    load = f"load_dataset('{name.repo}', split='train').to_json('rows.jsonl')"
    command = f"python -c \"from datasets import load_dataset; {load}\""
    return (f"{name.repo}: rows must be JSON or JSONL, and this is {found:.300}; "
            f"convert them, pip install datasets; {command}, and give --data rows.jsonl")


def named_files(paths: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """(path, name in error messages) of each file, and of each file of rows in a folder."""
    for path in map(Path, paths):
        for file in _files_at(path):
            name = str(file.relative_to(path)) if file != path else file.name
            yield file, name.encode("utf-8", "backslashreplace").decode()


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(ROW_FILES))
        if not files:
            raise FileNotFoundError(f"{path}: no .json, .jsonl or .gz file in this folder")
        return files
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return [path]


# ------------------------------------------------------------------------------------------------------------
# Raw rows


def raw_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a file, as (place, JSON text).

    Of a row longer than `MAX_ROW_BYTES` only as much is read as `parse_row` needs to reject it.
    Raises RowError for an array or a gzip file that is broken.
    """
    with path.open("rb") as file:
        gzipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    with gzip.open(path) if gzipped else path.open("rb", buffering=READ_BYTES) as file:
        try:
            yield from _rows_of_file(file, path.name)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RowError("broken gzip", f"{path.name}: {error}; fetch or compress the file again") from None


def _rows_of_file(file: BinaryIO, name: str) -> Iterator[RawRow]:
    first = True
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if first and (start := line.lstrip()).startswith(b"["):
            rest = iter(lambda: file.read(READ_BYTES), b"")
            yield from split_array(name, number, itertools.chain([start[1:]], rest))
            return
        line = line.rstrip(b"\r\n")
        if len(line) > MAX_ROW_BYTES or (line and not line.isspace()):
            first = False
            yield str(number), line


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of a line that is too long only the start."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)


# A bracket, a comma, or a string. The group matches only in a string that the chunk does not end: it holds a
# final backslash whose escaped character is in the next chunk, or nothing.
_JSON_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|(\\?)\Z)|[][{},]', re.DOTALL)


def split_array(name: str, line: int, chunks: Iterator[bytes]) -> Iterator[RawRow]:
    """The items of a JSON array, split at its commas; whether an item is valid is for `parse_row` to say.

    line: where the array begins; chunks: what follows its opening bracket
    Raises RowError for an array that does not end, or that ends before the file does.
    """
    depth, number = 1, 1
    item, item_line = bytearray(), line
    unread = b""

    def extend_item(piece: bytes) -> None:
        """Append to the item, up to what `parse_row` needs to see that it is too long."""
        nonlocal line, item_line
        if not item:
            stripped = piece.lstrip()
            line += piece.count(b"\n", 0, len(piece) - len(stripped))
            item_line, piece = line, stripped
        line += piece.count(b"\n")
        item.extend(piece[:MAX_ROW_BYTES + 1 - len(item)])

    for chunk in chunks:
        text, start = unread + chunk, len(unread)               # start: of the part that is in no item yet
        unread = b""
        for match in _JSON_MARK.finditer(text):
            mark = match[0][:1]
            if mark == b'"' and match[1] is not None:
                unread = b'"' + match[1]               # the next chunk is read as if the string began with it
            depth += (mark in b"[{") - (mark in b"]}")
            if depth > 1 or (depth == 1 and mark != b","):
                continue
            extend_item(text[start:match.start()])
            start = match.end()
            if depth == 0 and mark == b"}":
                message = f"{name}:{item_line}: row {number} closes more than it opens; fix the file"
                raise RowError("broken array", message)
            if item or mark == b"," or number > 1:
                yield f"{item_line} (row {number})", bytes(item)
            item.clear()
            number += 1
            if depth == 0:
                _check_nothing_follows(name, line, itertools.chain([text[start:]], chunks))
                return
        extend_item(text[start:])
    message = f"{name}:{item_line}: the file ends inside row {number} of the array; fetch or write it again"
    raise RowError("broken array", message)


def _check_nothing_follows(name: str, line: int, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        if rest := chunk.strip():
            message = f"{name}:{line}: {rest[:20]!r} after the array's end; fix the file"
            raise RowError("broken array", message)
