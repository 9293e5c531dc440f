"""Compiles kernels.cpp, for bf16 on CPUs with AVX512-BF16, and calls its functions.

It is compiled at the first start, in some seconds. Shapes as in the files that call them.
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

FLAGS = ("-O3 -std=c++17 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -fopenmp -shared "
         "-fPIC -w")


def _has(feature: str) -> bool:
    return getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels.cpp; None where they are not available, as `compiled`."""
    return compiled(Path(__file__).with_name("kernels.cpp"))


def is_preferred() -> bool:
    """Whether the C++ is available and faster than PyTorch: on CPUs with AMX oneDNN's products are."""
    return not _has("amx_tile") and library() is not None


def compiled(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file, compiled once and kept in `cache_folder`.

    None on a CPU without AVX512-BF16; or, with a warning, where there is no g++ (or $CXX) or it fails.
    """
    if not _has("avx512_bf16"):
        return None
    compiler = os.environ.get("CXX", "g++")
    built_from = json.dumps([compiler, FLAGS, source.read_text(encoding="utf-8")])
    key = hashlib.sha256(built_from.encode()).hexdigest()
    try:
        library = cache_folder() / f"{source.stem}-{key[:16]}.so"
        if not _is_only_ours(library):
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        why = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"{source.name} is left out, and a step takes a quarter longer; it needs g++, or $CXX. "
                      f"{why.strip()[:300]}", stacklevel=2)
        return None


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Write the library whole or not at all: other processes may be compiling it, too."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        temporary = Path(folder) / library.name
        subprocess.run([compiler, *FLAGS.split(), "-o", str(temporary), str(source)], check=True,
                       capture_output=True, text=True, errors="replace")
        temporary.chmod(0o700)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(library)


def _is_only_ours(file: Path) -> bool:
    """Whether it exists and nobody else can have written it: its code will run."""
    return file.exists() and file.stat().st_uid == os.getuid() and not file.stat().st_mode & 0o022


def check(takes: str, shapes_fit: bool, *operands: Tensor) -> None:
    """Raises ValueError where a function of the library cannot take these operands; takes: what it takes, in
    words.

    Each operand must be bf16 on a CPU, the numbers of its last axis next to each other.
    """
    for x in operands:
        if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.stride(-1) != 1:
            shapes_fit = False
    if not shapes_fit:
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}, strides {x.stride()}, on {x.device}" for x in operands)
        raise ValueError(f'backend "cpp" takes bf16 on a CPU, {takes}; got {got}')
    if library() is None:
        raise ValueError('backend "cpp" needs a CPU with AVX512-BF16, and g++ or $CXX; use backend "torch"')


def call(name: str, *operands: Tensor | ctypes.Structure | bool | int | float | None) -> int:
    """Call a function of the library; returns an int64_t, if the function does.

    Tensors and structures go by their addresses, integers as int64_t, fractions as float.
    """
    ctypes_of = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_float}

    def plain(x):
        if isinstance(x, Tensor):
            return ctypes.c_void_p(x.data_ptr())
        if isinstance(x, ctypes.Structure):
            return ctypes.byref(x)
        return x if x is None else ctypes_of[type(x)](x)

    function = getattr(library(), name)
    function.restype = ctypes.c_int64
    return function(*map(plain, operands))
