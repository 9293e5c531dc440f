"""storage/adapters.py: adapters in PEFT's layout, from PEFT and from us."""
import json

import pytest
import torch

from lora import adapters
from storage.adapters import load_adapter, save_adapter
from storage.pretrained import load_model


def test_an_adapter_that_peft_saved_gives_the_same_logits(demo, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32),
                            LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = load_model(demo / "model", torch.float32)
    load_adapter(ours, tmp_path)
    ids = torch.randint(110, 1000, (1, 30))
    torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("change", [{"peft_type": "LOHA"}, {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}},
                                    {"target_modules": "all-linear"}, {"lora_alpha": None}, {"r": "16"}, {"r": 16.0},
                                    {"r": 0}, {"lora_dropout": None}, {"target_modules": [1]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_that_are_not_plain_lora_are_refused(demo, trained, tmp_path, change):
    save_adapter(trained[0], "base", tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | change))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_adapter(load_model(demo / "model"), tmp_path)


def test_an_adapter_for_another_model_is_refused(demo, trained, tmp_path):
    save_adapter(trained[0], "base", tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {"r": 5}))
    with pytest.raises(ValueError, match="made for another model"):
        load_adapter(load_model(demo / "model"), tmp_path)


def test_adapters_are_listed_in_the_models_order(trained):
    names = [name for name, _ in adapters(trained[0])]
    assert len(names) == 7 * 4 and names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "model.layers.3.mlp.down_proj"
