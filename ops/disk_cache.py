"""What is worth keeping from one start to the next: the folder for it, and timings by device and version."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ops.triton_utils import triton


def cache_folder() -> Path:
    return Path(os.environ.get("NANO_FUNCTIONGEMMA_CACHE") or Path.home() / ".cache/nano-functiongemma")


def remembered(name: str, device: torch.device, key: Sequence, make: Callable[[], dict]) -> dict:
    """A JSON object that depends on the device, the versions and `key`: from `cache_folder`, or made and kept
    there."""
    made_for = json.dumps([torch.cuda.get_device_name(device), torch.__version__, triton.__version__, *key])
    folder = cache_folder()
    file = folder / f"{name}-{hashlib.sha256(made_for.encode()).hexdigest()[:16]}.json"
    try:
        kept = json.loads(file.read_text())
        if kept["for"] == made_for:
            return kept["value"]
    except (OSError, ValueError, KeyError, TypeError):
        pass                            # missing or damaged: made anew
    value = make()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"for": made_for, "value": value}, indent=1))
        temporary.rename(file)
    except OSError:
        pass                            # a folder that cannot be written only costs time at the next start
    return value
