"""What export.py writes is loaded by the tools it is for, and says the same there."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import export
from dataset.rows import read_rows
from lora import LoRAConfig, adapters, wrap
from storage.adapters import load_adapter, load_tuned, save_adapter
from storage.pretrained import load_model
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(demo):
    return demo / "model"


def random_adapter(base, folder, **config):
    """Adapters with something in them, saved in `folder`; returns the wrapped model."""
    model = load_model(base, torch.float32)
    wrap(model, LoRAConfig(**config), torch.Generator().manual_seed(0))
    for _, adapter in adapters(model):
        torch.nn.init.normal_(adapter.lora_b, std=0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, str(base), folder)
    return model.eval()


def run(*args) -> int:
    return export.main(export.parse_args([str(arg) for arg in args]))


@pytest.fixture(scope="module")
def ids(demo, base):
    row = next(iter(read_rows([demo / "rows.jsonl"])))
    return torch.tensor([Tokenizer.load(base).encode_segments(row.segments())[0]])


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """(folder of the merged model, the wrapped model)"""
    folder = tmp_path_factory.mktemp("export")
    model = random_adapter(base, folder / "adapter", rank=4, alpha=8)
    assert run("--adapter", folder / "adapter", "--out", folder / "merged") == 0           # the base by the adapter's own word
    return folder / "merged", model


def test_transformers_loads_the_merged_folder_with_our_logits(exported, base, ids):
    transformers = pytest.importorskip("transformers")
    folder, wrapped = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours.logits(ids), atol=1e-4, rtol=1e-4)
        want, untuned = wrapped.logits(ids), load_model(base, torch.float32).logits(ids)
        assert (ours.logits(ids) - want).norm() < 0.02 * want.norm(), "merged, it says what the adapter said, up to bf16's rounding"
        assert (untuned - want).norm() > 0.1 * want.norm(), "the adapter must matter in this test"


def test_each_weight_is_summed_in_fp32_and_rounded_once(exported, base):
    folder, wrapped = exported
    written, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    for name, adapter in adapters(wrapped):
        exact = before[f"{name}.weight"].double() + 2.0 * adapter.lora_b.double() @ adapter.lora_a.double()
        got = written[f"{name}.weight"]
        assert got.dtype == torch.bfloat16 and not torch.equal(got, before[f"{name}.weight"])
        assert (got != exact.to(torch.bfloat16)).float().mean() < 1e-3          # but where fp32 falls on a tie


def test_the_head_stays_tied_and_the_names_are_the_published_ones(exported, base):
    folder, _ = exported
    written, before = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert list(written) == list(before) and "lm_head.weight" not in written
    assert torch.equal(written["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["torch_dtype"] == "bfloat16" and config["architectures"] == ["Gemma3ForCausalLM"]


def test_what_llama_cpp_s_converter_needs_is_there(exported, base):
    """It reads tokenizer.model, and takes no more pieces than the embedding has rows."""
    folder, _ = exported
    assert (folder / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    rows = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert config["vocab_size"] == rows and Tokenizer.load(folder).vocab_size <= rows
    for key in ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "rms_norm_eps", "sliding_window", "rope_theta", "max_position_embeddings"):
        assert config.get(key), key


def test_peft_loads_the_adapter_with_our_logits(base, ids, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    wrapped = random_adapter(base, tmp_path / "run" / "adapter", rank=4, alpha=8, rslora=True, targets=("q_proj", "v_proj", "down_proj"))
    assert run("--model", base, "--adapter", tmp_path / "run", "--out", tmp_path / "out", "--format", "peft") == 0
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, wrapped.logits(ids), atol=1e-3, rtol=1e-3)


def test_an_adapter_that_peft_saved_loads_into_ours(base, ids, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "gate_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(plain, config).eval()
    theirs.save_pretrained(tmp_path / "peft")
    ours = load_model(base, torch.float32)
    load_adapter(ours, tmp_path / "peft")
    with torch.no_grad():
        want = theirs(ids).logits
        torch.testing.assert_close(ours.logits(ids), want, atol=1e-3, rtol=1e-3)
        merged, _ = load_tuned(str(base), str(tmp_path / "peft"), "fp32")
        torch.testing.assert_close(merged.logits(ids), want, atol=1e-3, rtol=1e-3)


def test_a_model_trained_in_full_is_exported_by_its_run_s_folder(base, tmp_path):
    shutil.copytree(base, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")
    assert run("--model", tmp_path / "run", "--out", tmp_path / "out") == 0
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], tensor)


def test_what_is_there_is_never_overwritten_and_a_failure_leaves_nothing(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(ValueError, match="already exists; remove it, or choose another --out"):
        run("--model", base, "--out", tmp_path / "out")
    random_adapter(base, tmp_path / "adapter", rank=2)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run("--model", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


@pytest.mark.parametrize(("args", "message"), [
    ([], "name a model"),
    (["--adapter", "RUN"], "trained every parameter and holds no adapter"),
])
def test_errors_name_the_remedy(base, tmp_path, args, message):
    shutil.copytree(base, tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=message):
        run(*[str(tmp_path / "run") if arg == "RUN" else arg for arg in args], "--out", tmp_path / "out")
