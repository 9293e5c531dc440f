"""Read and write safetensors files, atomically."""
from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.atomic import atomic_file


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors, by name, completely or not at all.  Raises OSError naming the file."""
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(on_cpu, temporary, metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)                       # safetensors lets only the owner read it


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name.  Raises FileNotFoundError, ValueError or OSError naming the file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right folder?") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None
