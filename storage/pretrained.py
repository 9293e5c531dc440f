"""Models in the published layout: config.json, model*.safetensors and the tokenizer's files.

Files are safetensors and JSON: nothing is unpickled, and no code from a model's folder is ever run.
"""
from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from model import Gemma3, GemmaConfig
from ops.backend import choose_backends
from ops.onednn import multiplies_bf16
from storage import hub
from storage.atomic import atomic_file, read_json_object, write_json
from storage.tensors import read_tensors, write_tensors
from tokenizer import Tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"          # lists the files of weights in several files
ADAPTER_CONFIG = "adapter_config.json"          # in an adapter's folder (storage/adapters.py)
SYSTEM_PROMPT = "system.txt"                    # beside the weights: what the model was told before its tools
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)
MODEL_FILES = ("config.json", INDEX, SYSTEM_PROMPT, *TOKENIZER_FILES)

# Sizes that a published config.json may leave out (the 4B and larger do), and what they are then.
DEFAULTS = {
    "vocab_size": 262_208, "hidden_size": 2_304, "intermediate_size": 9_216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4_096,
}
# Settings with only one supported value.
SUPPORTED = {
    "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None, "final_logit_softcapping": None,
    "attention_bias": False, "use_bidirectional_attention": False, "tie_word_embeddings": True,
}
MAX_LAYERS = 1_000
MAX_SIZE = 1 << 20               # of any other size in a config.json; Gemma's vocabulary is a quarter of it


def check_device(name: str) -> None:
    """Raises ValueError for a `--device` that this machine does not have."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a "
                         "CUDA build of torch")


def choose_dtype(name: str, device: str) -> str:
    """The key in DTYPES for a `--dtype`.

    "auto" is bf16, or fp32 on a device that has no instructions for bf16 products.
    """
    if name != "auto":
        return name
    return "bf16" if multiplies_bf16(torch.device(device)) else "fp32"


def fetch_model(name: str) -> Path:
    """The folder of a `--model`: a local one, a run's, or that of a name on the Hub, which is downloaded.

    Raises FileNotFoundError or ValueError for what is not a model, and OSError if the Hub cannot be reached.
    """
    if named := hub.parse(name):
        return _fetch_from_hub(name, named)
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: no such folder; give a model's folder, or its name on the Hub as "
                                "owner/name")
    if (folder / "adapter" / ADAPTER_CONFIG).exists() or (folder / ADAPTER_CONFIG).exists():
        raise ValueError(f"{folder} holds an adapter: give it as --adapter {folder}, and as --model the base "
                         "or nothing")
    of_run = folder / "model"
    return of_run if (of_run / "config.json").exists() else folder


def _fetch_from_hub(name: str, named: hub.Name) -> Path:
    if named.part:
        raise ValueError(f"{name}: a model is named owner/name or owner/name@revision, with no "
                         f":{named.part}")
    pinned = hub.pin(name, "model")
    files = hub.list_files(pinned, "model")
    weights = [file for file in files if re.fullmatch(r"model[^/]*\.safetensors", file)]
    if "config.json" not in files or not weights:
        remedy = "name a model that has them"
        if ADAPTER_CONFIG in files:
            remedy = "it is an adapter: name its base"
        raise FileNotFoundError(f"{named.repo} holds no config.json and model*.safetensors, only "
                                f"{', '.join(files):.300}; {remedy}")
    needed = [file for file in files if file in MODEL_FILES or file in weights]
    return hub.fetch(pinned, "model", needed)[0].parent


def config_from_dict(stored: dict) -> GemmaConfig:
    """The model that the contents of a published config.json describe.

    Raises ValueError for a model that is not Gemma 3 text, and for a size or a setting that is not
    implemented.
    """
    stored = stored.get("text_config", stored)              # the larger models nest it beside a vision part
    model_type = stored.get("model_type") if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or model_type != "gemma3_text":
        raise ValueError(f"model_type is {model_type!r:.60}; only \"gemma3_text\" is supported")
    for key, supported in SUPPORTED.items():
        if stored.get(key, supported) not in (supported, supported or None):
            raise ValueError(f"{key} is {stored[key]!r:.60}; only {supported!r} is supported")
    given = {key: stored[key] for key in GemmaConfig.__dataclass_fields__ if stored.get(key) is not None}
    values = DEFAULTS | given | _rope_values(stored)
    _check_numbers(values)
    values["layer_types"] = _layer_types(stored, values.get("layer_types"), values["num_hidden_layers"])
    config = GemmaConfig(**values)
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(f"layer_types names {len(config.layer_types)} layers, num_hidden_layers is "
                         f"{config.num_hidden_layers}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}; rotary embedding needs an even one")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{config.num_attention_heads} query heads do not divide among "
                         f"{config.num_key_value_heads} kv heads")
    return config


def _rope_values(stored: dict) -> dict[str, Any]:
    """GemmaConfig's values for RoPE, from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    rope = stored.get("rope_parameters") or {}              # transformers 5: one entry for each type of layer
    scaling = (isinstance(rope, dict) and rope.get("full_attention")) or stored.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError("rope_parameters or rope_scaling is not an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"rope_type is {rope_type!r:.60}; only \"default\" and \"linear\" are supported")
    values = {"rope_factor": scaling.get("factor", 1.0)}
    if rope:
        layer_types = {"rope_theta": "full_attention", "rope_local_base_freq": "sliding_attention"}
        for key, layer_type in layer_types.items():
            parameters = rope.get(layer_type)
            values[key] = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return values


def _check_numbers(values: dict[str, Any]) -> None:
    """Raises ValueError for a size that is not a positive integer, and for a number not above 0."""
    for key, value in values.items():
        default = GemmaConfig.__dataclass_fields__[key].default
        largest = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
        if isinstance(default, int) and not (type(value) is int and 1 <= value <= largest):
            raise ValueError(f"{key} is {value!r:.60}; expected an integer from 1 to {largest}")
        if isinstance(default, float) and not (type(value) in (int, float) and 0 < value <= 1e30):
            raise ValueError(f"{key} is {value!r:.60}; expected a number above 0 and up to 1e30")


def _layer_types(stored: dict, named: Any, layers: int) -> tuple[str, ...]:
    """The type of each layer, as named, or by the pattern's period; empty where config.json has neither."""
    period = stored.get("sliding_window_pattern", stored.get("_sliding_window_pattern"))
    if named is None and period:
        if type(period) is not int or period < 1:
            raise ValueError(f"sliding_window_pattern is {period!r:.60}; expected an integer from 1")
        named = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    types = [] if named is None else named
    known = ("sliding_attention", "full_attention")
    if not isinstance(types, list) or any(name not in known for name in types):
        raise ValueError(f"layer_types is {types!r:.80}; expected a list of sliding_attention and "
                         "full_attention")
    return tuple(types)


def load_config(folder: Path) -> GemmaConfig:
    """The config of a model's folder.  Raises FileNotFoundError or ValueError naming config.json."""
    path = folder / "config.json"
    stored = read_json_object(path)
    try:
        return config_from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; fix the file, or fetch it again") from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder.

    Raises ValueError if it has more pieces than the model has embeddings.
    """
    tokenizer = Tokenizer.load(folder)
    embeddings = load_config(folder).vocab_size
    if tokenizer.vocab_size > embeddings:
        raise ValueError(f"{folder / 'tokenizer.model'} has {tokenizer.vocab_size} pieces, and the model's "
                         f"vocab_size is {embeddings}; they do not belong together: fetch both again")
    return tokenizer


def load_model(folder: str | Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu",
               master_dtype: torch.dtype | None = None, compiled: bool = False) -> Gemma3:
    """The model in a folder of the published layout (config.json and model*.safetensors), in eval mode.

    dtype: what it computes in. master_dtype: what its parameters are kept in, `dtype` by default; full
    fine-tuning wants fp32 masters with bf16 compute. compiled: as for
    `choose_backends`. Raises FileNotFoundError or ValueError naming the file.
    """
    folder = Path(folder)
    config = load_config(folder)
    weights = {}
    for file in _weight_files(folder):
        for name, tensor in read_tensors(file).items():
            name = _parameter_name(name)
            if name is None:
                continue
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: {name} is {tensor.dtype}; weights are floating-point numbers; "
                                 "fetch the model again")
            weights[name] = tensor.to(device=device, dtype=master_dtype or dtype)
    with torch.device("meta"):
        model = Gemma3(config, dtype, choose_backends(torch.device(device), dtype, config, compiled))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        problem = str(error)[:600]
        raise ValueError(f"{folder}: weights and config.json do not belong together: {problem}") from None
    return model.eval()


def _weight_files(folder: Path) -> list[Path]:
    """All model*.safetensors of a folder.

    Raises FileNotFoundError if there is none, or if one that the index lists is missing.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder / WEIGHTS}: no such file; a model's folder holds config.json and "
                                f"{WEIGHTS}")
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        weight_map = read_json_object(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX}: no \"weight_map\" in it; fetch it again")
        missing = set(map(str, weight_map.values())) - {file.name for file in files}
        if missing:
            raise FileNotFoundError(f"{folder / min(missing)}: no such file, though {INDEX} names it; fetch "
                                    "the model again")
    return files


def _parameter_name(stored: str) -> str | None:
    """The parameter that a stored tensor is for.

    None for the vision part, and for the head, which is a copy of the tied embedding.
    """
    name = stored.replace("model.language_model.", "model.").removeprefix("language_model.")
    if name == "lm_head.weight" or "vision_tower" in name or "multi_modal" in name:
        return None
    return name


def save_model(model: Gemma3, base: Path, folder: Path) -> None:
    """Write a model to `folder` in the published layout.

    The weights are in bf16; config and tokenizer files are copied from the base model's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if base.resolve() != folder.resolve():
        for name in TOKENIZER_FILES:
            if (base / name).exists():
                with atomic_file(folder / name) as temporary:
                    shutil.copyfile(base / name, temporary)
    config = read_json_object(base / "config.json")
    config = config.get("text_config", config)              # the larger models nest it beside a vision part
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    config |= {"architectures": ["Gemma3ForCausalLM"], "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    write_json(folder / "config.json", config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    write_tensors(folder / WEIGHTS, weights)


def save_system_prompt(folder: Path, text: str) -> None:
    """Write what a model was told before its tools in training, so that it can be asked the same way."""
    with atomic_file(folder / SYSTEM_PROMPT) as temporary:
        temporary.write_text(text, encoding="utf-8")
