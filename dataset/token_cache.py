"""Rows → token ids by all cores, once; from then on the ids are mapped from the disk.

    JSONL, JSON, .gz ──every core──▶ CACHE/KEY/{ids.bin, rows.bin, held_out.jsonl, summary.json} ──▶ Tokens, a sequence of Examples

A folder holds one file of rows, all of them, whatever a run drops or holds out:
    ids.bin         uint32 for each token of each row, in order: its id, and in the highest bit whether it is trained
    rows.bin        a ROW for each row
    held_out.jsonl  the rows with the lowest hashes as they were read: those that a run evaluates on
    summary.json    what was counted and skipped, and the other files' sizes and checksums

KEY is a hash of the file's content, of the tokenizer's files and of the source that makes ids out of rows, so that a folder
never goes out of date. It appears whole or not at all; a damaged one is made again, one that nothing has asked for in
`DAYS_KEPT` days goes when the next is made, and all of them may be removed at any time (`rm -r CACHE`).
"""
from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import flush, read_json, sha256_of, whole_file, whole_folder, write_json
from dataset import stats
from dataset.errors import RowError, placed
from dataset.examples import tokenize
from dataset.files import _raw_rows, fetch, named_files, parse_weight
from dataset.rows import DEVELOPER_TEXT, parse_row
from dataset.sampler import query_hash
from dataset.token_dataset import ROW, TRAINED, TokenFile, Tokens
from tokenizer import Tokenizer

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nano-functiongemma" / "tokens"
DAYS_KEPT = 30
SOURCE = sorted(path for package in ("dataset", "tokenizer") for path in (Path(__file__).parent.parent / package).glob("*.py"))

CHUNK_ROWS = 128                                # handed to a process at once
BYTES_A_PROCESS = 1 << 19                       # fewer are not worth another process
LEAST_HELD_OUT = 1024                           # rows kept for evaluation at least, lest more of them need a new folder


def read_sources(sources: Iterable[str], model_folder: Path, tokenizer: Tokenizer, cache: Path | None, held_out: int,
                 skip_invalid: bool, system: str = DEVELOPER_TEXT) -> Tokens:
    """The tokens of every row of a list of `--data` sources, out of the cache or, the first time, into it.

    held_out: so many conversations with the lowest hashes can be had. Raises RowError at the first bad row, in the order of
    the files, unless `skip_invalid`. cache: None makes them anew, in the system's folder for temporary files.
    """
    files = []
    inputs = (*SOURCE, model_folder / "tokenizer.model", model_folder / "tokenizer_config.json")
    made_by = _hash(sys.version, *map(_hash_of, inputs), system)        # which letters are alike differs between Pythons
    for source, weight in [parse_weight(source) for source in sources]:
        for path, name in named_files(fetch(source)):
            build = functools.partial(_build, path, name, tokenizer, held_out, skip_invalid, system)
            if cache:
                files.append(_cached(path, name, weight, made_by, cache, held_out, build))
            else:
                with tempfile.TemporaryDirectory() as folder:           # what is mapped stays until nobody maps it
                    build(Path(folder))
                    files.append(TokenFile(Path(folder), name, weight))
            bad = files[-1].summary["first_bad"]
            if bad and not skip_invalid:
                raise placed(f"{name}:{bad['place']}", bad["cause"], bad["message"])
    return Tokens(files)


def _cached(path: Path, name: str, weight: float, made_by: str, cache: Path, held_out: int, build: Callable[[Path], None]) -> TokenFile:
    """The tokens of a file, out of its folder in the cache, which is built first unless it is there and whole."""
    try:
        (cache / "seen").mkdir(parents=True, exist_ok=True)
        before = _identity(path)
        folder = cache / _hash(_content(path, cache), made_by)
        with folder.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if not (whole := _is_whole(folder, held_out)):
                fcntl.flock(lock, fcntl.LOCK_EX)                    # one process builds, the others wait here
                whole = _is_whole(folder, held_out)
            if not whole:
                for left in [folder, *cache.glob(f".{folder.name}.*.tmp")]:
                    shutil.rmtree(left, ignore_errors=True)
                with whole_folder(folder) as temporary:
                    build(temporary)
                    if _identity(path) != before:
                        raise ValueError(f"{path}: the file changed while it was read; start again when it is complete")
                _remove_old(cache)
            for used in (folder, lock.name):
                os.utime(used)
            return TokenFile(folder, name, weight)
    except OSError as error:
        if error.errno is None or not str(error.filename or cache).startswith(str(cache)):
            raise
        raise OSError(f"{cache}: {error.strerror}; name another folder with --data-cache, or none with --data-cache ''") from None


def _is_whole(folder: Path, held_out: int) -> bool:
    """Whether a folder is there, undamaged, and with enough rows for evaluation."""
    try:
        summary = read_json(folder / "summary.json")
        return (summary.pop("checksum") == _summary_checksum(summary)
                and all(_checksum(folder / name) == stored for name, stored in summary["checksums"].items())
                and summary["held_out"] >= min(held_out, summary["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _summary_checksum(summary: dict) -> int:
    return zlib.crc32(json.dumps(summary).encode())


def _checksum(path: Path) -> list[int]:
    """[bytes, CRC-32]"""
    check = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            check = zlib.crc32(block, check)
        return [file.tell(), check]


def _content(path: Path, cache: Path) -> str:
    """A hash of a file's bytes, taken anew only if the file may have changed.

    Whoever writes to a file or puts another in its place changes its inode or moves its times on, of which nobody can set back
    the second. Only a write within the clock's tick of the hashing could leave the times alike: a file that is younger than
    two seconds is hashed again the next time.
    """
    *_, written, changed = identity = _identity(path)
    seen = cache / "seen" / _hash(*map(str, identity))
    if seen.exists():
        os.utime(seen)
        return seen.read_text()
    settled = time.time_ns() - max(written, changed) > 2e9
    content = _hash_of(path)
    if settled and _identity(path) == identity:
        with whole_file(seen) as temporary:
            temporary.write_text(content)
    return content


def _identity(path: Path) -> tuple[str, int, int, int, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def _hash_of(path: Path) -> str:
    if not path.exists():                                           # tokenizer_config.json may be missing
        return ""
    return sha256_of(path)


def _remove_old(cache: Path) -> None:
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in [*cache.iterdir(), *(cache / "seen").iterdir()]:
        with contextlib.suppress(FileNotFoundError):                # another process removes them too
            if path.stat().st_mtime < oldest and path.name != "seen":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _build(path: Path, name: str, tokenizer: Tokenizer, held_out: int, skip_invalid: bool, system: str, folder: Path) -> None:
    """Tokenize one file into `folder`; at any time only a few chunks of its rows are in memory."""
    held_out = max(held_out, LEAST_HELD_OUT)
    lowest: list[tuple[float, int, Any]] = []                       # (hash, number, row) of those that may be evaluated on
    summary: dict[str, Any] = {"file": name, "rows": 0, "tokens": 0, "types": Counter(), "skipped": {}, "first_bad": None, "system": system}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    made = _in_order(_chunks(path), tokenizer, system, min(cores, path.stat().st_size // BYTES_A_PROCESS))
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "rows.bin").open("wb") as rows_file, contextlib.closing(made):
        for raw, error, (ids, rows, bad, types) in made:
            for fault in bad.values():
                summary["first_bad"] = summary["first_bad"] or fault
                if not skip_invalid:
                    raise placed(f"{name}:{fault['place']}", fault["cause"], fault["message"])
                summary["skipped"].setdefault(fault["cause"], {"rows": 0, **fault})["rows"] += 1
            if error:
                raise error
            good = [row for i, (_, row) in enumerate(raw) if i not in bad]
            lowest = sorted([*lowest, *zip(rows["hash"].tolist(), count(summary["rows"]), good, strict=False)])[:held_out]
            ids_file.write(ids)
            rows_file.write(rows)
            summary["rows"] += len(rows)
            summary["tokens"] += len(ids)
            summary["types"].update(types)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for _, _, row in lowest]
    (folder / "held_out.jsonl").write_bytes(b"\n".join(lines))
    for file in ("ids.bin", "rows.bin", "held_out.jsonl"):
        flush(folder / file)
    checksums = {file: _checksum(folder / file) for file in ("ids.bin", "rows.bin", "held_out.jsonl")}
    summary |= {"held_out": len(lowest), "checksums": checksums}
    write_json(folder / "summary.json", summary | {"checksum": _summary_checksum(summary)})


def _chunks(path: Path) -> Iterator[tuple[list[tuple[str, Any]], Exception | None]]:
    """The rows of a file, some at a time, and what was wrong with the file after the last of them."""
    chunk, error = [], None
    try:
        for row in _raw_rows(path):
            chunk.append(row)
            if len(chunk) == CHUNK_ROWS:
                yield chunk, None
                chunk = []
    except (RowError, OSError) as raised:
        error = raised
    yield chunk, error


def _in_order(chunks: Iterable, tokenizer: Tokenizer, system: str, processes: int) -> Iterator[tuple]:
    """(rows, error, what `_tokenize` makes of the rows) of every chunk in order; few of them wait in memory at any time.

    The processes are forked, so that all share one tokenizer. They touch neither a GPU nor another rank, whose threads are not
    forked with them, and end with this one, even if it is killed.
    """
    if processes < 2:
        for rows, error in chunks:
            yield rows, error, _tokenize(rows, system, tokenizer)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin_worker, (tokenizer, os.getpid()))
    waiting: deque = deque()
    try:
        for rows, error in chunks:
            waiting.append((rows, error, pool.submit(_tokenize, rows, system)))
            if len(waiting) > 2 * processes:
                rows, error, made = waiting.popleft()
                yield rows, error, made.result()
        for rows, error, made in waiting:
            yield rows, error, made.result()
    except BrokenProcessPool:
        raise ChildProcessError("a process that tokenizes rows was killed, most likely for want of memory; start again on fewer cores, "
                                "such as taskset -c 0-3 python train.py …") from None
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer | None = None                                 # of a process that tokenizes


def _begin_worker(tokenizer: Tokenizer, parent: int) -> None:
    global _tokenizer
    _tokenizer = tokenizer
    gc.freeze()                                                     # what was forked is neither searched for garbage nor copied
    signal.signal(signal.SIGINT, signal.SIG_IGN)                    # Ctrl-C goes to all; the parent says what it means
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                  # PR_SET_PDEATHSIG: end when the parent does
    if os.getppid() != parent:
        os._exit(1)


def _tokenize(rows: list[tuple[str, Any]], system: str, tokenizer: Tokenizer | None = None) -> tuple[np.ndarray, np.ndarray, dict, Counter]:
    """ids with the trained bit (n), ROW (rows), {index: what is wrong} of the bad rows, unknown types and how often each stands there."""
    ids, trained, records, bad, types = [np.empty(0, np.int32)], [np.empty(0, bool)], [], {}, Counter()
    for i, (place, row) in enumerate(rows):
        try:
            conversation = parse_row(row, place, system)
        except RowError as error:
            bad[i] = {"place": place, "cause": error.cause, "message": str(error)}
            continue
        example = tokenize(conversation, tokenizer or _tokenizer)
        ids.append(example.ids)
        trained.append(example.trained)
        records.append((*stats.seen(conversation, example), query_hash(conversation.query), place.encode()))
        types.update(word[:60] for word in conversation.unknown_types)
    return np.concatenate(ids).view(np.uint32) | np.concatenate(trained) * TRAINED, np.array(records, ROW), bad, types
