"""Adapters in PEFT's layout (adapter_config.json and adapter_model.safetensors), and models with their adapter merged."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lora import LoRAConfig, adapters, merge, wrap
from model import Gemma3
from storage import hub
from storage.atomic import read_object, write_json
from storage.pretrained import ADAPTER_CONFIG, DTYPES, SYSTEM, check_device, choose_dtype, fetch_model, load_model
from storage.tensors import read_tensors, write_tensors
from tokenizer.chat import DEVELOPER_TEXT

ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, base: str, folder: Path) -> None:
    """Write the adapters of a wrapped model as PEFT does: adapter_config.json and adapter_model.safetensors (fp32)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = next(adapter.config for _, adapter in adapters(model))
    named = hub.parse(base)
    revision = named.revision if named else None
    base = named.repo if named else str(Path(base).resolve()) if Path(base).is_dir() else base      # a folder is found from anywhere
    write_json(folder / ADAPTER_CONFIG, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "target_modules": list(config.targets),
        "use_rslora": config.rslora, "bias": "none", "fan_in_fan_out": False, "inference_mode": True})
    tensors = {}
    for name, adapter in adapters(model):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = adapter.lora_a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = adapter.lora_b
    write_tensors(folder / ADAPTER, tensors)


def adapter_folder(folder: str | Path) -> Path:
    """The adapter's folder behind `--adapter`: itself, or in a run's folder.  Raises ValueError for a run without one."""
    folder = Path(folder)
    if not (folder / ADAPTER_CONFIG).exists():
        if (folder / "adapter" / ADAPTER_CONFIG).exists():
            return folder / "adapter"
        if (folder / "model" / "config.json").exists():
            raise ValueError(f"{folder} trained every parameter and holds no adapter: give --model {folder} and no --adapter")
    return folder


def load_adapter(model: Gemma3, folder: str | Path) -> None:
    """Wrap `model` in the adapters of a folder that `save_adapter` or PEFT wrote, or of a run, in place."""
    folder = adapter_folder(folder)
    stored = read_object(folder / ADAPTER_CONFIG)
    for key, plain in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("use_dora", (False, None)), ("fan_in_fan_out", (False, None)),
                       ("alpha_pattern", ({}, None)), ("rank_pattern", ({}, None)), ("modules_to_save", ([], None)),
                       ("layers_to_transform", ([], None))):
        if stored.get(key, plain[0]) not in plain:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {key} is {stored[key]!r}; only plain LoRA is supported ({plain[0]!r})")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("lora_dropout", (int, float)), ("target_modules", (list,))):
        if type(stored.get(key, 0.0 if key == "lora_dropout" else None)) not in kinds:
            raise ValueError(f"{folder / ADAPTER_CONFIG}: {key} is {stored.get(key)!r:.60}; plain LoRA has r as an integer, lora_alpha "
                             "and lora_dropout as numbers, target_modules as a list")
    tensors = read_tensors(folder / ADAPTER)
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.ndim}
    if ranks != {stored["r"]}:                              # before memory is asked for
        raise ValueError(f"{folder / ADAPTER_CONFIG}: r is {stored['r']}, and its tensors have rank {sorted(ranks)}; the adapter is "
                         "damaged, or made for another model")
    try:
        wrap(model, LoRAConfig(stored["r"], stored["lora_alpha"], stored.get("lora_dropout", 0.0),
                               tuple(map(str, stored["target_modules"])), bool(stored.get("use_rslora"))))
    except ValueError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    for name, adapter in adapters(model):
        for part, parameter in (("lora_A", adapter.lora_a), ("lora_B", adapter.lora_b)):
            key = f"{_PREFIX}{name}.{part}.weight"
            if key not in tensors or tensors[key].shape != parameter.shape:
                raise ValueError(f"{folder / ADAPTER}: {key} is missing or not of shape {tuple(parameter.shape)}; "
                                 "the adapter was made for another model")
            parameter.data.copy_(tensors.pop(key))
    if tensors:
        raise ValueError(f"{folder / ADAPTER}: {next(iter(tensors))} has no place in this model")


def base_of(model: str | None, adapter: str | None) -> str:
    """The base that `--model` names, or else the one that the adapter's config does."""
    if model:
        return model
    if not adapter:
        raise ValueError("name a model: --model FOLDER, --adapter RUN, or both")
    config = adapter_folder(adapter) / ADAPTER_CONFIG
    stored = read_object(config)
    base, revision = stored.get("base_model_name_or_path"), stored.get("revision")
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise ValueError(f"{config} names no base; name a model: --model FOLDER, --adapter RUN, or both")
    if base.startswith("/") and not Path(base).is_dir():
        raise FileNotFoundError(f"{base}: no such folder, though {config} names it as the base; give the base with --model")
    return f"{base}@{revision}" if revision and hub.parse(base) else base


def system_of(model: str | None, adapter: str | None) -> str:
    """What the model that `--model` and `--adapter` name was told before its tools in training, as far as it is known."""
    path = (adapter_folder(adapter) if adapter else fetch_model(base_of(model, None))) / SYSTEM
    return path.read_text(encoding="utf-8") if path.exists() else DEVELOPER_TEXT


def load_tuned(model: str | None, adapter: str | None, dtype: str = "auto",
               device: str | torch.device = "cpu") -> tuple[Gemma3, Path]:
    """What `--model` and `--adapter` name, merged into one model, and the folder with its tokenizer.  dtype: as for `choose_dtype`."""
    check_device(str(device))
    folder = fetch_model(base_of(model, adapter))
    made = load_model(folder, DTYPES[choose_dtype(dtype, str(device))], device)
    if adapter:
        load_adapter(made, adapter)
        merge(made)
    return made, folder
