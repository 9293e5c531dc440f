"""The functions of ops/cpu/kernels.cpp, for bf16 on CPUs with AVX512-BF16; compiled at the first start, in some seconds.

Whoever calls one asks `takes` first, and computes by PyTorch where that says no. Shapes as in the files that call them.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ops.disk_cache import cache_folder

FLAGS = "-O3 -std=c++17 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -fopenmp -shared -fPIC -w"


@functools.cache
def library() -> ctypes.CDLL | None:
    return compiled(Path(__file__).with_name("kernels.cpp"))


def compiled(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, compiled once and kept in `cache_folder`.

    None on a CPU without AVX512-BF16, or one with AMX, by which oneDNN's products are faster; or, with a warning, where there is no
    g++ (or $CXX) or it fails.
    """
    def has(feature: str) -> bool:
        return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()

    if not has("avx512_bf16") or has("amx_tile"):
        return None
    compiler = os.environ.get("CXX", "g++")
    key = hashlib.sha256(json.dumps([compiler, FLAGS, source.read_text(encoding="utf-8")]).encode()).hexdigest()
    try:
        library = cache_folder() / f"{source.stem}-{key[:16]}.so"
        if not _is_ours_alone(library):
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:                         # others may be at it, too
                made = Path(folder) / library.name
                subprocess.run([compiler, *FLAGS.split(), "-o", str(made), str(source)], check=True, capture_output=True, text=True,
                               errors="replace")
                made.chmod(0o700)
                with made.open("rb") as file:
                    os.fsync(file.fileno())
                made.rename(library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"{source.name} is left out, and a step takes a quarter longer; it needs g++, or $CXX. {why.strip()[:300]}",
                      stacklevel=2)
        return None


def _is_ours_alone(file: Path) -> bool:
    """Whether it is there, and nobody else can have written it: its code will run."""
    return file.exists() and file.stat().st_uid == os.getuid() and not file.stat().st_mode & 0o022


def takes(*operands: Tensor) -> bool:
    """Whether there are such functions, and for these operands: bf16 on a CPU, a row's numbers side by side."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1 for x in operands) and library() is not None


def call(name: str, *operands: Tensor | ctypes.Structure | bool | int | float | None) -> int:
    """Tensors and structures go by their addresses, integers as int64_t, fractions as float.  Returns an int64_t, if the function does."""
    def plain(x):
        if isinstance(x, Tensor):
            return ctypes.c_void_p(x.data_ptr())
        if isinstance(x, ctypes.Structure):
            return ctypes.byref(x)
        return x if x is None else {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}[type(x)](x)

    function = getattr(library(), name)
    function.restype = ctypes.c_int64
    return function(*map(plain, operands))


def multiplies_to_fp32(x: Tensor, outputs: int) -> bool:
    """Whether `weight_gradient` takes x (M, I) and a dY (M, outputs) like it."""
    return x.dim() == 2 and x.shape[1] % 16 == outputs % 16 == 0 and takes(x)


def weight_gradient(dy: Tensor, x: Tensor, into: Tensor | None = None, add: bool = False) -> Tensor:
    """dYᵀ X (O, I) in fp32, of dY (M, O) and X (M, I); written `into`, or with `add` added to it."""
    into = dy.new_empty(dy.shape[1], x.shape[1], dtype=torch.float32) if into is None else into
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    call("weight_gradient", dy, x.contiguous(), into, dy.stride(0), *dy.shape, x.shape[1], add)
    return into
