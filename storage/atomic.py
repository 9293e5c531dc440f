"""Write a file or a folder completely or not at all, and read and write JSON.

New content goes to a temporary name, is flushed to the disk, and is then renamed. A process that is killed on
the way leaves the old content and a `.NAME.PID.tmp`, which `remove_leftovers` deletes.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the block ends without an error.

    Raises OSError, naming `path`, if it cannot be written.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.rename(path)
        flush_to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written ({error}); make room or fix the folder") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `path` if the block ends without an error.

    `path` must not exist.

    The files inside are to be written with `atomic_file`, which flushes them.
    """
    temporary = temporary_path(path)
    shutil.rmtree(temporary, ignore_errors=True)             # left by a killed process with the same PID
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
        flush_to_disk(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """Where this process prepares, or puts aside, what `path` names."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed processes left in a folder and in its subfolders."""
    for leftover in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_json(path: Path, value: dict) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file.  Raises FileNotFoundError or ValueError, naming the file and the remedy."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right folder?") from None
    except (ValueError, RecursionError) as error:
        remedy = "fix the file, or fetch or write it again"
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from None


def read_json_object(path: Path) -> dict:
    """As `read_json`, for a file that must hold a JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; fix the file, or fetch or write it again")
    return value
