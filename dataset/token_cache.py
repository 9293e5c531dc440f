"""Files of rows → `TokenDataset`: tokenized once by all cores, and from then on mapped from the disk.

    JSONL, JSON, .gz ── every core ──▶ CACHE/KEY/ ──▶ TokenDataset

A folder CACHE/KEY holds all rows of one file, whatever a run drops or holds out:
    ids.bin         uint32 for each token of each row: its id, and in the highest bit whether it carries loss
    rows.bin        a `token_dataset.ROW` for each row
    held_out.jsonl  the rows with the lowest query hashes as they were read: those that a run evaluates on
    summary.json    what was counted and skipped, and the sizes and checksums of the other files

KEY is a hash of the file's content, of the tokenizer's files and of the source of `dataset` and `tokenizer`,
so that a folder is never out of date. It appears whole or not at all, and a damaged one is built again. When
a folder is built, those that were not used for `DAYS_KEPT` days are removed. All of them may be removed at
any time (`rm -r CACHE`).
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
from typing import NamedTuple

import numpy as np

from dataset.errors import BadRow, RowError, SkippedRows
from dataset.examples import tokenize
from dataset.files import RawRow, fetch, named_files, parse_weight, raw_rows
from dataset.rows import parse_rows
from dataset.stats import row_stats
from dataset.token_dataset import LOSS_BIT, ROW, TokenDataset, TokenFile
from storage.atomic import atomic_file, atomic_folder, flush_to_disk, read_json, sha256_of, write_json
from tokenizer import DEVELOPER_TEXT, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SOURCE_FILES = sorted([*ROOT.glob("dataset/*.py"), *ROOT.glob("tokenizer/*.py")])
USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
DEFAULT_CACHE = USER_CACHE / "nano-functiongemma" / "tokens"

DAYS_KEPT = 30
CHUNK_ROWS = 128                                # rows that a process tokenizes at a time
MIN_PROCESS_BYTES = 1 << 19                     # a smaller part of a file is not worth another process
MIN_HELD_OUT_ROWS = 1024                        # kept for evaluation at least: asking for more rebuilds
SETTLED_NANOSECONDS = 2e9                       # a file that is younger may change without a new time stamp
PR_SET_PDEATHSIG = 1                            # of prctl(2): a signal for when the parent process ends


def read_tokens(sources: Iterable[str], model_folder: Path, tokenizer: Tokenizer, cache: Path | None,
                held_out: int, skip_invalid: bool, system: str = DEVELOPER_TEXT) -> TokenDataset:
    """All rows of a list of `--data` sources, from the cache or, the first time, into it.

    cache: None tokenizes anew, in the system's folder for temporary files
    held_out: so many rows with the lowest query hashes are kept as conversations
    Raises RowError at the first bad row, in the order of the files, unless `skip_invalid`.
    """
    files = []
    inputs = (*SOURCE_FILES, model_folder / "tokenizer.model", model_folder / "tokenizer_config.json")
    # Python's version is part of the key because its tables of letters, which casefold() uses, change.
    made_by = _hash(sys.version, *map(_hash_file, inputs), system)
    for source, weight in [parse_weight(source) for source in sources]:
        for path, name in named_files(fetch(source)):
            build = functools.partial(_build, path, name, tokenizer, held_out, skip_invalid, system)
            if cache:
                file = _read_cached(path, name, weight, made_by, cache, held_out, build)
            else:
                with tempfile.TemporaryDirectory() as folder:      # a mapped file stays until nothing maps it
                    build(Path(folder))
                    file = TokenFile(Path(folder), name, weight)
            if file.summary["first_bad"] and not skip_invalid:
                raise _name_file(BadRow(*file.summary["first_bad"]), name).error()
            files.append(file)
    return TokenDataset(files)


def _name_file(bad: BadRow, name: str) -> BadRow:
    """A bad row whose source is its place alone, with the name of its file before it."""
    return bad._replace(source=f"{name}:{bad.source}")


# ------------------------------------------------------------------------------------------------------------
# The cache


def _read_cached(path: Path, name: str, weight: float, made_by: str, cache: Path, held_out: int,
                 build: Callable[[Path], None]) -> TokenFile:
    """The tokens of a file, from its folder in the cache, which is built first unless it is whole."""
    try:
        (cache / "seen").mkdir(parents=True, exist_ok=True)
        before = _identity(path)
        folder = cache / _hash(_content_hash(path, cache), made_by)
        with folder.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            is_whole = _is_whole(folder, held_out)
            if not is_whole:
                fcntl.flock(lock, fcntl.LOCK_EX)                    # one process builds, the others wait here
                is_whole = _is_whole(folder, held_out)
            if not is_whole:
                for leftover in [folder, *cache.glob(f".{folder.name}.*.tmp")]:
                    shutil.rmtree(leftover, ignore_errors=True)
                with atomic_folder(folder) as temporary:
                    build(temporary)
                    if _identity(path) != before:
                        raise ValueError(f"{path}: the file changed while it was read; "
                                         "start again when it is complete")
                _remove_old(cache)
            for used in (folder, lock.name):
                os.utime(used)
            return TokenFile(folder, name, weight)
    except OSError as error:
        if error.errno is None or not str(error.filename or cache).startswith(str(cache)):
            raise
        advice = "name another folder with --data-cache, or none with --data-cache ''"
        raise OSError(f"{cache}: {error.strerror}; {advice}") from None


def _is_whole(folder: Path, held_out: int) -> bool:
    """Whether a folder is there, undamaged, and with enough rows for evaluation."""
    try:
        summary = read_json(folder / "summary.json")
        return (summary.pop("checksum") == _summary_checksum(summary)
                and all(_file_checksum(folder / name) == stored
                        for name, stored in summary["checksums"].items())
                and summary["held_out"] >= min(held_out, summary["rows"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _summary_checksum(summary: dict) -> int:
    return zlib.crc32(json.dumps(summary).encode())


def _file_checksum(path: Path) -> list[int]:
    """[bytes, CRC-32]"""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
        return [file.tell(), checksum]


def _content_hash(path: Path, cache: Path) -> str:
    """A hash of a file's bytes, computed again only if the file may have changed.

    Whoever writes to a file or replaces it changes its inode or its times, and nobody can set the time of
    change back. Only a write within the clock's tick of the hashing could leave the times alike: a file that
    is younger than two seconds is hashed again the next time.
    """
    *_, modified, changed = identity = _identity(path)
    stored = cache / "seen" / _hash(*map(str, identity))
    if stored.exists():
        os.utime(stored)
        return stored.read_text()
    is_settled = time.time_ns() - max(modified, changed) > SETTLED_NANOSECONDS
    content_hash = _hash_file(path)
    if is_settled and _identity(path) == identity:
        with atomic_file(stored) as temporary:
            temporary.write_text(content_hash)
    return content_hash


def _identity(path: Path) -> tuple[str, int, int, int, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()


def _hash_file(path: Path) -> str:
    return sha256_of(path) if path.exists() else ""                 # tokenizer_config.json may be missing


def _remove_old(cache: Path) -> None:
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in [*cache.iterdir(), *(cache / "seen").iterdir()]:
        with contextlib.suppress(FileNotFoundError):                # another process removes them too
            if path.stat().st_mtime < oldest and path.name != "seen":
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ------------------------------------------------------------------------------------------------------------
# Building a folder


class Chunk(NamedTuple):
    """Some consecutive rows of a file.  error: what was wrong with the file after the last of them"""

    rows: list[RawRow]
    error: Exception | None = None


class TokenizedChunk(NamedTuple):
    """The good rows of a chunk as the cache stores them, and its bad rows."""

    ids: np.ndarray                 # (tokens) uint32, with `LOSS_BIT`
    rows: np.ndarray                # (good rows) ROW
    bad: dict[int, BadRow]          # {index in the chunk: what is wrong}
    unknown_types: Counter[str]


def _build(path: Path, name: str, tokenizer: Tokenizer, held_out: int, skip_invalid: bool, system: str,
           folder: Path) -> None:
    """Tokenize one file into `folder`; at any time only a few chunks of its rows are in memory."""
    first_bad: BadRow | None = None
    skipped, types = SkippedRows(), Counter()
    rows = tokens = 0
    held_out = max(held_out, MIN_HELD_OUT_ROWS)
    lowest: list[tuple[float, int, bytes]] = []                     # (query hash, number of the row, the row)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processes = min(cores, path.stat().st_size // MIN_PROCESS_BYTES)
    tokenized = _tokenize_chunks(_chunks(path), tokenizer, system, processes)
    with ((folder / "ids.bin").open("wb") as ids_file, (folder / "rows.bin").open("wb") as rows_file,
          contextlib.closing(tokenized)):
        for chunk, made in tokenized:
            for bad in made.bad.values():
                first_bad = first_bad or bad
                if not skip_invalid:
                    raise _name_file(bad, name).error()
                skipped.add(bad.cause, f"{bad.source}: {bad.message}")
            if chunk.error:
                raise chunk.error
            good = [row for i, (_, row) in enumerate(chunk.rows) if i not in made.bad]
            # A row of an array may have several lines. Inside strings JSON has no line breaks.
            good = [row.replace(b"\n", b" ") for row in good]
            candidates = zip(made.rows["query_hash"].tolist(), count(rows), good, strict=False)
            lowest = sorted([*lowest, *candidates])[:held_out]
            ids_file.write(made.ids)
            rows_file.write(made.rows)
            rows, tokens = rows + len(made.rows), tokens + len(made.ids)
            types.update(made.unknown_types)
    (folder / "held_out.jsonl").write_bytes(b"\n".join(row for _, _, row in lowest))
    files = ("ids.bin", "rows.bin", "held_out.jsonl")
    for file in files:
        flush_to_disk(folder / file)
    summary = {"file": name, "rows": rows, "tokens": tokens, "types": types, "skipped": skipped,
               "first_bad": first_bad, "system": system, "held_out": len(lowest),
               "checksums": {file: _file_checksum(folder / file) for file in files}}
    write_json(folder / "summary.json", summary | {"checksum": _summary_checksum(summary)})


def _chunks(path: Path) -> Iterator[Chunk]:
    rows, error = [], None
    try:
        for row in raw_rows(path):
            rows.append(row)
            if len(rows) == CHUNK_ROWS:
                yield Chunk(rows)
                rows = []
    except (RowError, OSError) as raised:
        error = raised
    yield Chunk(rows, error)


def _tokenize_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, system: str,
                     processes: int) -> Iterator[tuple[Chunk, TokenizedChunk]]:
    """Tokenize chunks by so many processes, in order; few chunks wait in memory at any time.

    The processes are forked, so that all share one tokenizer. They touch neither a GPU nor another rank,
    whose threads are not forked with them, and end with this process, even if it is killed.
    """
    if processes < 2:
        for chunk in chunks:
            yield chunk, _tokenize_chunk(chunk.rows, system, tokenizer)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, fork, _start_worker, (tokenizer, os.getpid()))
    waiting: deque = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_tokenize_chunk, chunk.rows, system)))
            if len(waiting) > 2 * processes:
                oldest, future = waiting.popleft()
                yield oldest, future.result()
        for chunk, future in waiting:
            yield chunk, future.result()
    except BrokenProcessPool:
        message = ("a process that tokenizes rows was killed, most likely for want of memory; "
                   "start again on fewer cores, such as taskset -c 0-3 python train.py …")
        raise ChildProcessError(message) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None                          # of a process that tokenizes


def _start_worker(tokenizer: Tokenizer, parent: int) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    gc.freeze()                                                # forked memory is neither collected nor copied
    signal.signal(signal.SIGINT, signal.SIG_IGN)                   # Ctrl-C reaches all; the parent handles it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:                                      # it ended before the line above
        os._exit(1)


def _tokenize_chunk(raw: list[RawRow], system: str, tokenizer: Tokenizer | None = None) -> TokenizedChunk:
    """Parse and tokenize raw rows.  tokenizer: None in a worker process, which has its own"""
    ids, masks, rows, bad, types = [np.empty(0, np.int32)], [np.empty(0, bool)], [], {}, Counter()
    for i, row in enumerate(parse_rows(raw, system)):
        if isinstance(row, BadRow):
            bad[i] = row
            continue
        example = tokenize(row, tokenizer or _worker_tokenizer)
        ids.append(example.ids)
        masks.append(example.loss_mask)
        rows.append(row_stats(row, example, row.source))
        types.update(word[:60] for word in row.unknown_types)
    stored = np.concatenate(ids).view(np.uint32) | np.concatenate(masks) * LOSS_BIT
    return TokenizedChunk(stored, np.array(rows, ROW), bad, types)
