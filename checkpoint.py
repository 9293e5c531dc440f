"""Load a base model; save and resume a run; write adapters and models that other tools read.

Everything on disk is safetensors and JSON: no pickle, and no code from a model's folder is ever run. Whatever is
written appears whole or not at all: it is written under a temporary name, flushed to the disk and then renamed.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hub
from data import DEVELOPER_TEXT
from gradients import like, whole
from lora import LoRAConfig, adapters, flat_adapters, merge, wrap
from model import Gemma3, GemmaConfig
from tokenizer import Tokenizer
from triton_support import multiplies_bf16

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS, ADAPTER, ADAPTER_CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
TRAINED, MOMENTS = "trained.safetensors", "optimizer.safetensors"
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
SYSTEM = "system.txt"            # beside the weights: what the model was told before its tools
TOKENIZER_FILES = ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
INDEX = "model.safetensors.index.json"              # of weights in several files
MODEL_FILES = ("config.json", INDEX, SYSTEM, *TOKENIZER_FILES)


# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it takes `path`'s name only when the block has ended well.  Raises OSError naming `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        flush(temporary)
        temporary.rename(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written ({error}); make room or mend the folder") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder that does not exist yet, filled by way of `whole_file`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)             # left by a killed process of the same number
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(path)
        flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half written in a run's folder."""
    for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def sha256_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right folder?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); mend the file, or fetch or write it again") from None


def read_object(path: Path) -> dict:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; mend the file, or fetch or write it again")
    return value


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole_file(path) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary,
                  metadata={"format": "pt"})
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)                       # safetensors makes it the owner's alone


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} the right folder?") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); fetch or write it again") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error})") from None


def check_device(name: str) -> None:
    """Raises ValueError for a `--device` that is not here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build of torch")


def choose_dtype(name: str, device: str) -> str:
    """What to compute in, by `--dtype`: "auto" is bf16, or fp32 on a device that cannot multiply bf16."""
    return name if name != "auto" else "bf16" if multiplies_bf16(torch.device(device)) else "fp32"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


# ---------------------------------------------------------------------------------------------------------------------
# Base models


def fetch_model(name: str) -> Path:
    """The folder behind `--model`: a local one, or a model's on the Hugging Face Hub (hub.py)."""
    if found := hub.parse(name):
        if found.part:
            raise ValueError(f"{name}: a model is named owner/name or owner/name@revision, with no :{found.part}")
        pinned = hub.pin(name, "model")
        files = hub.list_files(pinned, "model")
        needed = [file for file in files if file in MODEL_FILES or re.fullmatch(r"model[^/]*\.safetensors", file)]
        if "config.json" not in needed or not any(file.endswith(".safetensors") for file in needed):
            raise FileNotFoundError(f"{found.repo} holds no config.json and model*.safetensors, only {', '.join(files):.300}; "
                                    + ("it is an adapter: name its base" if ADAPTER_CONFIG in files else "name a model that has them"))
        return hub.fetch(pinned, "model", needed)[0].parent
    if not Path(name).is_dir():
        raise FileNotFoundError(f"{name}: no such folder; give a model's folder, or its name on the Hub as owner/name")
    folder = Path(name)
    if (folder / "adapter" / ADAPTER_CONFIG).exists() or (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter: give it as --adapter {folder}, and as --model the base or nothing")
    return folder / "model" if (folder / "model" / "config.json").exists() else folder           # a run's folder was given


def load_config(folder: Path) -> GemmaConfig:
    stored = read_object(folder / "config.json")
    try:
        return GemmaConfig.from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; mend the file, or fetch it again") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder.  Raises ValueError for one with ids that the model has no embedding of."""
    tokenizer, rows = Tokenizer.load(folder), load_config(folder).vocab_size
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{folder / 'tokenizer.model'} has {tokenizer.vocab_size} pieces, and the model's vocab_size is {rows}; they do "
                         "not belong together: fetch both again")
    return tokenizer


def load_model(folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu",
               master_dtype: torch.dtype | None = None) -> Gemma3:
    """The model in a folder of the published layout (config.json and model*.safetensors).

    dtype: what it computes in. master_dtype: what its parameters are kept in, `dtype` by default; fp32 masters with
    bf16 compute are what full fine-tuning wants. Raises FileNotFoundError or ValueError naming the file.
    """
    folder = Path(folder)
    config = load_config(folder)
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; a model's folder holds config.json and {WEIGHTS}")
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        index = read_object(folder / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{folder / INDEX}: no \"weight_map\" in it; fetch it again")
        if missing := set(map(str, index["weight_map"].values())) - {file.name for file in files}:
            raise FileNotFoundError(f"{folder / min(missing)}: no such file, though {INDEX} names it; fetch the model again")
    weights = {}
    for file in files:
        for name, tensor in _read_tensors(file).items():
            name = name.replace("model.language_model.", "model.").removeprefix("language_model.")     # beside a vision part
            if name != "lm_head.weight" and "vision_tower" not in name and "multi_modal" not in name:   # lm_head: a tied copy
                if not tensor.is_floating_point():
                    raise ValueError(f"{file}: {name} is {tensor.dtype}; weights are floating-point numbers; fetch the model again")
                weights[name] = tensor.to(device=device, dtype=master_dtype or dtype)
    with torch.device("meta"):
        model = Gemma3(config, compute_dtype=dtype)
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and config.json do not belong together: {str(error)[:600]}") from None
    return model.eval()


def decoding_copy(model: Gemma3) -> Gemma3:
    """A model without adapters, its fp32 masters rounded to what it computes in once and not at every token; of shards the whole."""
    with torch.device("meta"):
        copy = Gemma3(model.config, model.compute_dtype)
    copy.load_state_dict({name: whole(tensor.detach()).to(model.compute_dtype) for name, tensor in model.state_dict().items()}, assign=True)
    return copy.eval()


def save_model(model: Gemma3, base: Path, folder: Path) -> None:
    """Write `folder` in the published layout: the weights in bf16, and the base's config and tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (base / name).exists() and base.resolve() != folder.resolve():
            with whole_file(folder / name) as temporary:
                shutil.copyfile(base / name, temporary)
    config = read_object(base / "config.json")
    config = config.get("text_config", config)                  # the larger models nest it beside a vision part, which is not written
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"architectures": ["Gemma3ForCausalLM"], "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    write_json(folder / "config.json", config)
    _write_tensors(folder / WEIGHTS, {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})


# ---------------------------------------------------------------------------------------------------------------------
# Adapters, in PEFT's layout

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
    _write_tensors(folder / ADAPTER, tensors)


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
    tensors = _read_tensors(folder / ADAPTER)
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
            with torch.no_grad():
                parameter.copy_(tensors.pop(key))
    if tensors:
        raise ValueError(f"{folder / ADAPTER}: {next(iter(tensors))} has no place in this model")


def save_system(folder: Path, text: str) -> None:
    """Write down what a model was told before its tools in training, beside its weights: it is to be asked the same way."""
    with whole_file(folder / SYSTEM) as temporary:
        temporary.write_text(text, encoding="utf-8")


def system_of(model: str | None, adapter: str | None) -> str:
    """What the model that `--model` and `--adapter` name was told before its tools in training, as far as it is known."""
    path = (adapter_folder(adapter) if adapter else fetch_model(base_of(model, None))) / SYSTEM
    return path.read_text(encoding="utf-8") if path.exists() else DEVELOPER_TEXT


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


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class RunFolder:
    """A run's folder, held by one program at a time, and its checkpoints, written in a thread of their own.

    Each checkpoint is a folder checkpoints/step-NNNNNN: what is trained and the optimizer's moments as safetensors, and
    state.json with the sizes and SHA-256 of both. The newest `keep` stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Raises ValueError where another program holds the folder, OSError where it cannot be written."""
        self.folder, self.keep = folder, keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("a+")
        except OSError as error:
            raise OSError(f"{folder}: cannot be written to ({error.strerror}); mend that, or choose another --out") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)               # the system lets go of it when this process ends
        except BlockingIOError:
            self.lock.seek(0)
            raise ValueError(f"{folder} is being written by another run (process {self.lock.read().strip() or 'unknown'}); wait for it, "
                             "stop it, or choose another --out") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {platform.node()}")
        self.lock.flush()
        remove_leftovers(folder)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None

    def save(self, step: int, trained: dict[str, Tensor], moments: dict[str, Tensor], state: dict) -> None:
        """Copy what `snapshot` gave and return; the writing goes on beside the training.  Raises what the last one met."""
        self.wait()
        tensors = [{name: tensor.detach().to("cpu", copy=True) for name, tensor in some.items()} for some in (trained, moments)]
        self.writing = self.thread.submit(self._write, step, *tensors, state)

    def wait(self) -> None:
        """Until the last checkpoint is on the disk.  Raises OSError, naming the file and what is left, if it is not."""
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def check(self) -> None:
        """Raises what the writing has met by now."""
        if self.writing and self.writing.done():
            self.wait()

    def close(self) -> None:
        """Finish what is being written and let go of the folder."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.lock.close()

    def _write(self, step: int, trained: dict[str, Tensor], moments: dict[str, Tensor], state: dict) -> None:
        path = checkpoint_folder(self.folder, step)
        _remove(path)
        try:
            with whole_folder(path) as temporary:
                for name, tensors in ((TRAINED, trained), (MOMENTS, moments)):
                    _write_tensors(temporary / name, tensors)
                state = {"step": step, **state, "files": {name: _fingerprint(temporary / name) for name in (TRAINED, MOMENTS)}}
                write_json(temporary / "state.json", state | {"sha256": _hash(state)})
        except OSError as error:
            left = find_checkpoints(self.folder)[-1:]
            raise OSError(f"{error}; " + (f"--resume goes on from {left[0].name}" if left else "no checkpoint is before it")) from None
        for older in find_checkpoints(self.folder)[:-self.keep]:
            _remove(older)


def _remove(path: Path) -> None:
    """Remove a checkpoint's folder; one that a kill leaves half removed is no checkpoint any more."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.{os.getpid()}.tmp")), ignore_errors=True)


def _hash(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _fingerprint(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def moments(parameter: Tensor, step: int = 0) -> dict[str, Tensor]:
    """AdamW's state of a parameter after so many steps, the first and second moments being zeros."""
    zeros = {key: torch.zeros_like(parameter) for key in MOMENT_NAMES}
    return {"step": torch.tensor(float(step), device=parameter.device), **zeros}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained, and the optimizer's moments, by name.  Where they are sharded, all processes must ask."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = _moments_of_each(model, optimizer)
    kept = {f"{key}.{name}": whole(found[p][key])
            for name, p in trained.items() for key in MOMENT_NAMES if p in found}
    return {name: whole(p) for name, p in trained.items()}, kept


def _moments_of_each(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's state of each of the model's parameters.

    Where the optimizer has all adapters as one, these are their parts of its moments.
    """
    flat = flat_adapters(model)
    if flat is None or flat.masters not in optimizer.state:
        return optimizer.state
    found: dict[Tensor, dict[str, Tensor]] = {}
    for key in MOMENT_NAMES:
        for parameter, part in flat.of_each(optimizer.state[flat.masters][key]):
            found.setdefault(parameter, {})[key] = part
    return found


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = (path for path in (folder / "checkpoints").glob("step-*") if (path / "state.json").exists())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_last(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest undamaged checkpoint, or None where a run has none yet.

    A damaged one is left where it is and said so. Raises ValueError where all are damaged.
    """
    found = find_checkpoints(folder)
    for path in reversed(found):
        try:
            verify(path)
        except ValueError as error:
            say(f"resume {error}")
            continue
        return path
    if found:
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints is whole; start anew with --overwrite, or with another --out")
    return None


def verify(path: Path) -> None:
    """Raises ValueError for a checkpoint whose files are not those that were written."""
    try:
        state = read_json(path / "state.json")
        if state.pop("sha256", None) == _hash(state):
            wrong = [name for name, print_ in state["files"].items() if _fingerprint(path / name) != print_]
        else:
            wrong = ["state.json"]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if wrong:
        raise ValueError(f"{path} is damaged: {' and '.join(wrong)} changed after it was written")


@torch.no_grad()
def load_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Put a checkpoint back into model and optimizer, in place; returns its state: `step`, and what `save` was given."""
    state = {key: value for key, value in read_json(path / "state.json").items() if key not in ("files", "sha256")}
    tensors, kept = _read_tensors(path / TRAINED), _read_tensors(path / MOMENTS)
    for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        optimizer.state[parameter] = moments(parameter, state["step"])
    found = _moments_of_each(model, optimizer)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise ValueError(f"{path}: no {name} of shape {tuple(parameter.shape)}; the run had other flags")
        parameter.copy_(like(parameter, tensors.pop(name)))
        for key in MOMENT_NAMES:
            found[parameter][key].copy_(like(parameter, kept[f"{key}.{name}"]))
    if tensors:
        raise ValueError(f"{path}: {next(iter(tensors))} has no place in this run; it had other flags")
    return state
