"""Files of rows: JSONL, JSON arrays, gzip; `--data` sources and their weights."""
from __future__ import annotations

import codecs
import gzip
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import hub
from dataset.errors import MAX_ROW_BYTES, RowError

ROW_FILES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")         # as datasets on the Hub call their files and folders


SPLITS = ("train", "validation", "valid", "val", "dev", "test")         # as datasets on the Hub call their files and folders


def system_text(given: str) -> str:
    """What `--system` names: the text itself, or behind an @ the file that holds it."""
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise FileNotFoundError(f"{given[1:]}: no such file; --system takes a text, or @FILE for one that holds it") from None
    except UnicodeDecodeError:
        raise ValueError(f"{given[1:]}: not UTF-8; save the file as UTF-8") from None


def named_files(files: Iterable[str | Path]) -> Iterator[tuple[Path, str]]:
    """(path, the name that errors call it by) of each file, and of each file of rows in a folder."""
    for file in files:
        for path in _files_of(Path(file)):
            name = str(path.relative_to(file)) if path != Path(file) else path.name
            yield path, name.encode("utf-8", "backslashreplace").decode()


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith(ROW_FILES))
        if not found:
            raise FileNotFoundError(f"{path}: no .json, .jsonl or .gz file in this folder")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return [path]


def _raw_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, JSON) of every row in a file; of a row that is too long its beginning, which `parse_row` refuses."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if packed else path.open("rb", buffering=1 << 20) as file:
        try:
            is_first = True
            for number, line in enumerate(_lines(file), start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if is_first and (begin := line.lstrip()).startswith(b"["):
                    yield from _array_rows(path.name, number, itertools.chain([begin[1:]], iter(lambda: file.read(1 << 20), b"")))
                    return
                line = line.rstrip(b"\r\n")
                if len(line) > MAX_ROW_BYTES or (line and not line.isspace()):
                    is_first = False
                    yield str(number), line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise RowError("broken gzip", f"{path.name}: {error}; fetch or compress the file again") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, of one that is too long its beginning."""
    while line := file.readline(MAX_ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_ROW_BYTES)


# A bracket, a comma, or a string; of a string that goes on after the text, the group: half of an escape, or nothing.
_JSON_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|(\\?)\Z)|[][{},]', re.DOTALL)


def _array_rows(name: str, line: int, chunks: Iterator[bytes]) -> Iterator[tuple[str, bytes]]:
    """The items of a JSON array, cut apart at its commas, with the line each begins on; `parse_row` judges what they are.

    line: of the array's beginning; chunks: what follows its opening bracket.  Raises RowError for an array that does not end.
    """
    depth, number, begins, item, unread = 1, 1, line, bytearray(), b""

    def take(piece: bytes) -> None:
        """Add to the item, as much as `parse_row` needs to see that it is too long."""
        nonlocal line, begins
        if not item:
            own = piece.lstrip()
            line += piece.count(b"\n", 0, len(piece) - len(own))
            begins, piece = line, own
        line += piece.count(b"\n")
        item.extend(piece[:MAX_ROW_BYTES + 1 - len(item)])

    for chunk in chunks:
        text, start = unread + chunk, len(unread)               # start: of what is not taken yet
        unread = b""
        for mark in _JSON_MARK.finditer(text):
            what = mark[0][:1]
            if what == b'"' and mark[1] is not None:
                unread = b'"' + mark[1]                         # the next chunk is read as if the string began with it
            depth += (what in b"[{") - (what in b"]}")
            if depth > 1 or (depth == 1 and what != b","):
                continue
            take(text[start:mark.start()])
            start = mark.end()
            if depth == 0 and what == b"}":
                raise RowError("broken array", f"{name}:{begins}: row {number} closes more than it opens; mend the file")
            if item or what == b"," or number > 1:
                yield f"{begins} (row {number})", bytes(item)
            item.clear()
            number += 1
            if depth == 0:
                for rest in itertools.chain([text[start:]], chunks):
                    if rest.strip():
                        raise RowError("broken array", f"{name}:{line}: {rest.strip()[:20]!r} after the array's end; mend the file")
                return
        take(text[start:])
    raise RowError("broken array", f"{name}:{begins}: the file ends inside row {number} of the array; fetch or write it again")


def fetch(source: str) -> list[Path]:
    """The files behind one `--data` source: a local path, or rows on the Hugging Face Hub (hub.py)."""
    if not source:
        raise ValueError("--data names an empty source; look for a comma too many")
    if not hub.parse(source):
        return [Path(source)]
    pinned = hub.pin(source, "dataset")
    return hub.fetch(pinned, "dataset", files_with_rows(hub.parse(source), hub.list_files(pinned, "dataset")))


def files_with_rows(name: hub.Name, files: list[str]) -> list[str]:
    """Those files of a dataset that hold the rows asked for.  Raises FileNotFoundError or ValueError saying what there is instead."""
    def is_of(split: str, file: str) -> bool:
        stem = file.rpartition("/")[2].partition(".")[0]
        return split == stem or split in re.split(r"[^A-Za-z0-9]+", file.rpartition(".json")[0])

    rows = [file for file in files if file.endswith(ROW_FILES) and not file.startswith(".") and file != "dataset_infos.json"]
    if name.part in rows:
        return [name.part]
    if not rows or name.part in files:
        others = name.part or ", ".join(file for file in files if not file.startswith("."))
        convert = f"from datasets import load_dataset; load_dataset('{name.repo}', split='train').to_json('rows.jsonl')"
        raise FileNotFoundError(f"{name.repo}: rows must be JSON or JSONL, and this is {others:.300}; convert them, pip install datasets; "
                                f"python -c \"{convert}\", and give --data rows.jsonl")
    splits = {split: of_it for split in SPLITS if (of_it := [file for file in rows if is_of(split, file)])}
    if name.part is None and len(splits) > 1:
        raise ValueError(f"{name.repo} has the splits {', '.join(splits)}; name one, as --data {name.repo}:{next(iter(splits))}")
    chosen = rows if name.part is None else [file for file in rows if is_of(name.part, file)]
    if not chosen:
        there = f"the splits {', '.join(splits)} and " if splits else ""
        raise FileNotFoundError(f"{name.repo} has no split or file {name.part!r}; there are {there}the files {', '.join(rows):.600}")
    return chosen


def parse_weight(source: str) -> tuple[str, float]:
    """One `--data` source → (its name, its weight): "rows.jsonl*0.5" → ("rows.jsonl", 0.5).  Raises ValueError."""
    found = re.fullmatch(r"(.+)\*([\d.]*)", source)
    if not found:
        return source, 1.0
    name, weight = found.groups()
    if not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or not 0 < float(weight) <= 1000:
        raise ValueError(f"--data {source}: a weight is a number above 0, 1000 at most, as in {name}*2 or {name}*0.5")
    return name, float(weight)
