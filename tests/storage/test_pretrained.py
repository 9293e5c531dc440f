"""storage/pretrained.py: every published config and folder loads, and what does not fit is refused with its place."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.pretrained import config_from_dict, fetch_model, load_model

PUBLISHED = dict(model_type="gemma3_text", vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, hidden_activation="gelu_pytorch_tanh")


def test_layers_follow_the_published_pattern_where_they_are_not_named():
    assert config_from_dict(PUBLISHED).layer_types == ("sliding_attention",) * 5 + ("full_attention",)
    assert config_from_dict({**PUBLISHED, "sliding_window_pattern": 3}).layer_types[2::3] == ("full_attention",) * 2


def test_larger_models_nest_their_config_and_stretch_their_global_rope():
    nested = {"model_type": "gemma3", "text_config": {**PUBLISHED, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}
    assert config_from_dict(nested).rope_factor == 8.0
    new = {**PUBLISHED, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                                            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}}
    config = config_from_dict(new)
    assert (config.rope_factor, config.rope_theta, config.rope_local_base_freq) == (8.0, 2e6, 3e4)


def test_every_published_variant_of_the_config_gives_transformers_logits(tmp_path):
    """Two kv heads, linear rope scaling, another window and pattern, against transformers on random weights."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig
    torch.manual_seed(0)
    config = Gemma3TextConfig(**{k: v for k, v in PUBLISHED.items() if k != "model_type"}, layer_types=["sliding_attention", "full_attention"] * 3,
                              rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                                               "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, torch.float32)
    ids = torch.randint(97, (2, 50))
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("change", "said"), [
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"), ({"use_bidirectional_attention": True}, "use_bidirectional"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"), ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
    ({"num_key_value_heads": 3}, "do not divide"), ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
])
def test_a_config_that_is_not_implemented_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        config_from_dict({**PUBLISHED, **change})


def test_weights_that_do_not_fit_are_refused(demo, tmp_path):
    config = json.loads((demo / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(tmp_path)
    weights = load_file(demo / "model" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_model(tmp_path)


def test_masters_in_full_precision_compute_in_bf16(demo):
    model = load_model(demo / "model", torch.bfloat16, master_dtype=torch.float32)
    assert model.head.dtype == torch.float32 and model.logits(torch.tensor([[2, 105]])).dtype == torch.bfloat16


def test_a_model_that_is_not_there_is_named_before_anything_is_read():
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        fetch_model("nowhere")
