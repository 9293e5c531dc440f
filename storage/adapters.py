"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora import LoRAConfig, adapters, merge, wrap
from model import Gemma3
from storage import hub
from storage.atomic import read_json_object, write_json
from storage.pretrained import (
    ADAPTER_CONFIG,
    DTYPES,
    SYSTEM_PROMPT,
    check_device,
    choose_dtype,
    fetch_model,
    load_model,
)
from storage.tensors import read_tensors, write_tensors
from tokenizer.chat import DEVELOPER_TEXT

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."                    # of every tensor's name in ADAPTER

# The values of adapter_config.json that plain LoRA has; the first is meant where the key is absent.
PLAIN_LORA = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
}
TYPES = {"r": (int,), "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": (list,)}


def save_adapter(model: nn.Module, base: str, folder: Path) -> None:
    """Write the adapters of a wrapped model, in fp32, as PEFT does.

    base: the `--model` that they were trained on. A local folder is written as an absolute path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = next(adapter.config for _, adapter in adapters(model))
    revision = None
    if named := hub.parse(base):
        base, revision = named.repo, named.revision
    elif Path(base).is_dir():
        base = str(Path(base).resolve())
    write_json(folder / ADAPTER_CONFIG, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    })
    tensors = {}
    for name, adapter in adapters(model):
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.lora_b
    write_tensors(folder / ADAPTER, tensors)


def adapter_folder(folder: str | Path) -> Path:
    """The adapter's folder of an `--adapter`: itself, or inside a run's folder.

    Raises ValueError for the folder of a run with `--full`.
    """
    folder = Path(folder)
    if (folder / ADAPTER_CONFIG).exists():
        return folder
    if (folder / "adapter" / ADAPTER_CONFIG).exists():
        return folder / "adapter"
    if (folder / "model" / "config.json").exists():
        raise ValueError(f"{folder} trained every parameter and holds no adapter: give --model {folder} and "
                         "no --adapter")
    return folder


def load_adapter(model: Gemma3, folder: str | Path) -> None:
    """Wrap `model`, in place, in an adapter that `save_adapter` or PEFT wrote.

    folder: the adapter's, or a run's.

    Raises FileNotFoundError or ValueError naming the file, for an adapter that is not plain LoRA or not of
    this model.
    """
    folder = adapter_folder(folder)
    config_file, file = folder / ADAPTER_CONFIG, folder / ADAPTER
    stored = read_json_object(config_file)
    _check_plain_lora(config_file, stored)
    tensors = read_tensors(file)
    lora_a = [tensor for name, tensor in tensors.items() if name.endswith(".lora_A.weight")]
    ranks = {len(tensor) for tensor in lora_a if tensor.ndim}
    if ranks != {stored["r"]}:                              # before memory for the adapters is allocated
        raise ValueError(f"{config_file}: r is {stored['r']}, and its tensors have rank {sorted(ranks)}; the "
                         "adapter is damaged, or made for another model")
    targets = tuple(map(str, stored["target_modules"]))
    dropout, rslora = stored.get("lora_dropout", 0.0), bool(stored.get("use_rslora"))
    try:
        wrap(model, LoRAConfig(stored["r"], stored["lora_alpha"], dropout, targets, rslora))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None
    for name, adapter in adapters(model):
        for part, parameter in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
            key = f"{PREFIX}{name}.{part}.weight"
            if key not in tensors or tensors[key].shape != parameter.shape:
                raise ValueError(f"{file}: {key} is missing or not of shape {tuple(parameter.shape)}; "
                                 "the adapter was made for another model")
            with torch.no_grad():               # so that the rounded copy of all adapters is made anew
                parameter.copy_(tensors.pop(key))
    if tensors:
        raise ValueError(f"{file}: {next(iter(tensors))} has no place in this model")


def _check_plain_lora(file: Path, stored: dict[str, Any]) -> None:
    """Raises ValueError for an adapter_config.json of another method, or with a value of another type."""
    for key, supported in PLAIN_LORA.items():
        if stored.get(key, supported[0]) not in supported:
            raise ValueError(f"{file}: {key} is {stored[key]!r}; only plain LoRA is supported "
                             f"({supported[0]!r})")
    with_default = {"lora_dropout": 0.0} | stored
    for key, types in TYPES.items():
        if type(with_default.get(key)) not in types:
            raise ValueError(f"{file}: {key} is {stored.get(key)!r:.60}; plain LoRA has r as an integer, "
                             "lora_alpha and lora_dropout as numbers, target_modules as a list")


def base_of(model: str | None, adapter: str | None) -> str:
    """The base model: the one that `--model` names, or else the one in the adapter's config.

    Raises ValueError if neither names one, FileNotFoundError if the config names a folder that does not
    exist.
    """
    if model:
        return model
    if not adapter:
        raise ValueError("name a model: --model FOLDER, --adapter RUN, or both")
    config_file = adapter_folder(adapter) / ADAPTER_CONFIG
    stored = read_json_object(config_file)
    base, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise ValueError(f"{config_file} names no base; name a model: --model FOLDER, --adapter RUN, or both")
    if base.startswith("/") and not Path(base).is_dir():
        raise FileNotFoundError(f"{base}: no such folder, though {config_file} names it as the base; give "
                                "the base with --model")
    return f"{base}@{revision}" if revision and hub.parse(base) else base


def system_prompt_of(model: str | None, adapter: str | None) -> str:
    """What the model of `--model` and `--adapter` was told before its tools in training.

    Google's sentence if that is not known.
    """
    folder = adapter_folder(adapter) if adapter else fetch_model(base_of(model, None))
    path = folder / SYSTEM_PROMPT
    return path.read_text(encoding="utf-8") if path.exists() else DEVELOPER_TEXT


def load_tuned(model: str | None, adapter: str | None, dtype: str = "auto",
               device: str | torch.device = "cpu") -> tuple[Gemma3, Path]:
    """The model of `--model` with its `--adapter` merged into it, and the folder with its tokenizer.

    dtype: as for `choose_dtype`. Raises as `check_device`, `fetch_model`, `load_model` and `load_adapter` do.
    """
    check_device(str(device))
    folder = fetch_model(base_of(model, adapter))
    tuned = load_model(folder, DTYPES[choose_dtype(dtype, str(device))], device)
    if adapter:
        load_adapter(tuned, adapter)
        merge(tuned)
    return tuned, folder
