"""Tensors in safetensors files, written whole or not at all."""
from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from storage.atomic import whole_file


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole_file(path) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary,
                  metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)                       # safetensors makes it the owner's alone


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right folder?") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None
