"""Models in the published layout: config.json, model*.safetensors and the tokenizer's files; found, loaded and written.

Everything on disk is safetensors and JSON: no pickle, and no code from a model's folder is ever run.
"""
from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch

from model import Gemma3, GemmaConfig
from storage import hub
from storage.atomic import read_object, whole_file, write_json
from storage.tensors import read_tensors, write_tensors
from tokenizer import Tokenizer
from triton_support import multiplies_bf16

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"        # INDEX: of weights in several files
ADAPTER_CONFIG = "adapter_config.json"                                      # marks an adapter's folder (storage/adapters.py)
SYSTEM = "system.txt"            # beside the weights: what the model was told before its tools
TOKENIZER_FILES = ("generation_config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
MODEL_FILES = ("config.json", INDEX, SYSTEM, *TOKENIZER_FILES)

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
    """Raises ValueError for a `--device` that is not here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build of torch")


def choose_dtype(name: str, device: str) -> str:
    """What to compute in, by `--dtype`: "auto" is bf16, or fp32 on a device that cannot multiply bf16."""
    return name if name != "auto" else "bf16" if multiplies_bf16(torch.device(device)) else "fp32"


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


def config_from_dict(stored: dict) -> GemmaConfig:
    """The model that the contents of a published config.json describe.

    Raises ValueError for a model that is not Gemma 3 text, and for a size or a setting that is not implemented.
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
        raise ValueError(f"layer_types names {len(config.layer_types)} layers, num_hidden_layers is {config.num_hidden_layers}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}; rotary embedding needs an even one")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{config.num_attention_heads} query heads do not divide among {config.num_key_value_heads} kv heads")
    return config


def _rope_values(stored: dict) -> dict[str, Any]:
    """The rotary embedding's values for GemmaConfig, from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    rope = stored.get("rope_parameters") or {}              # transformers 5: one entry for each type of layer
    scaling = (isinstance(rope, dict) and rope.get("full_attention")) or stored.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError("rope_parameters or rope_scaling is not an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"rope_type is {rope_type!r:.60}; only \"default\" and \"linear\" are supported")
    values = {"rope_factor": scaling.get("factor", 1.0)}
    if rope:
        for key, layer_type in (("rope_theta", "full_attention"), ("rope_local_base_freq", "sliding_attention")):
            parameters = rope.get(layer_type)
            values[key] = parameters.get("rope_theta") if isinstance(parameters, dict) else None
    return values


def _check_numbers(values: dict[str, Any]) -> None:
    """Raises ValueError for a size that is not a positive integer, or a number that is not positive and finite."""
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
    if not isinstance(types, list) or any(name not in ("sliding_attention", "full_attention") for name in types):
        raise ValueError(f"layer_types is {types!r:.80}; expected a list of sliding_attention and full_attention")
    return tuple(types)


def load_config(folder: Path) -> GemmaConfig:
    stored = read_object(folder / "config.json")
    try:
        return config_from_dict(stored)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}; fix the file, or fetch it again") from None


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
        for name, tensor in read_tensors(file).items():
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
    write_tensors(folder / WEIGHTS, {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()})


def save_system(folder: Path, text: str) -> None:
    """Write down what a model was told before its tools in training, beside its weights: it is to be asked the same way."""
    with whole_file(folder / SYSTEM) as temporary:
        temporary.write_text(text, encoding="utf-8")
