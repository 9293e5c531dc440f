"""checkpoint.py: whole or not at all, whatever happens while it writes; adapters of other tools."""
import json
import os
import subprocess
import sys

import pytest
import torch

import checkpoint
from checkpoint import (
    RunFolder,
    find_checkpoints,
    find_last,
    load_adapter,
    load_model,
    load_run,
    save_adapter,
    snapshot,
    whole_file,
    whole_folder,
)
from gradients import Summed
from lora import LoRAConfig, adapters, flat_adapters, wrap


@pytest.fixture
def trained(demo):
    """A wrapped model and its optimizer after one step."""
    model = load_model(demo / "model", torch.float32)
    wrap(model, LoRAConfig(rank=2), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    model(torch.tensor([2, 105, 107]), torch.arange(3), torch.zeros(3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, trained, state, keep=2):
    """One checkpoint, written to its end."""
    run = RunFolder(folder, keep)
    run.save(step, *snapshot(*trained), state)
    run.close()
    return find_checkpoints(folder)[-1]


def test_a_file_keeps_its_old_content_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with whole_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "a" / "folder") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path / "a") == []


def test_a_process_killed_while_saving_leaves_no_checkpoint_and_no_obstacle(demo, trained, tmp_path):
    """Killed after the first of three files, twice with leftovers in the way; then the save goes through."""
    program = ("import os, sys; sys.path.insert(0, {root!r}); from pathlib import Path; import checkpoint\n"
               "with checkpoint.whole_folder(Path({path!r})) as temporary:\n"
               "    (temporary / 'trained.safetensors').write_text('x'); os.kill(os.getpid(), 9)")
    path = tmp_path / "checkpoints" / "step-000003"
    root = os.path.dirname(checkpoint.__file__)
    done = subprocess.run([sys.executable, "-c", program.format(root=root, path=str(path))])
    assert done.returncode == -9 and find_checkpoints(tmp_path) == []
    assert len(os.listdir(tmp_path / "checkpoints")) == 1
    checkpoint.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == []
    path.mkdir()                                                     # what a kill during the removal of an old one leaves
    (path / "trained.safetensors").write_text("x")
    assert find_checkpoints(tmp_path) == []
    save(tmp_path, 3, trained, {"position": 1})
    assert find_checkpoints(tmp_path) == [path]


def test_a_run_is_put_back_exactly_and_the_newest_checkpoints_are_kept(demo, trained, tmp_path):
    model, optimizer = trained
    for step in (3, 999_999, 1_000_000):
        save(tmp_path, step, trained, {"position": 7, "best_loss": 0.5})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    other = load_model(demo / "model", torch.float32)
    wrap(other, LoRAConfig(rank=2), torch.Generator().manual_seed(1))
    fresh = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1, fused=True)
    assert load_run(find_checkpoints(tmp_path)[-1], other, fresh) == {"step": 1_000_000, "position": 7, "best_loss": 0.5}
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        if mine.requires_grad:
            assert all(torch.equal(optimizer.state[mine][key], fresh.state[theirs][key]) for key in ("exp_avg", "exp_avg_sq"))


def test_adapters_trained_as_one_are_saved_and_put_back_adapter_by_adapter(demo, trained, tmp_path):
    """An optimizer of each adapter, as runs had before, and one of all as one have the same checkpoints."""
    path = save(tmp_path, 4, trained, {})
    other = load_model(demo / "model", torch.float32)
    wrap(other, LoRAConfig(rank=2), torch.Generator().manual_seed(1))
    gradients = Summed(other, 1)
    as_one = torch.optim.AdamW(gradients.parameters, lr=0.1, fused=True)
    assert load_run(path, other, as_one) == {"step": 4}
    state = as_one.state[flat_adapters(other).masters]
    assert state["step"] == 4 and all(state[key].any() for key in ("exp_avg", "exp_avg_sq"))
    again = save(tmp_path / "again", 4, (other, as_one), {})
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (path / name).read_bytes()
    model, optimizer = trained
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    stored = checkpoint._read_tensors(path / "optimizer.safetensors")
    assert set(stored) == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in wanted}
    for each in optimizer.state.values():
        each["step"].fill_(4)
    model.zero_grad()
    for one, of_it in ((model, optimizer), (other, as_one)):                        # and they go on alike
        one(torch.tensor([2, 105, 107]), torch.arange(3), torch.zeros(3)).square().sum().backward()
        of_it.step()
    for name in wanted:
        assert torch.equal(model.get_parameter(name), other.get_parameter(name)), name


def test_a_checkpoint_of_other_flags_or_a_cut_one_is_refused(demo, trained, tmp_path):
    path = save(tmp_path, 1, trained, {})
    other = load_model(demo / "model", torch.float32)
    wrap(other, LoRAConfig(rank=3))
    with pytest.raises(ValueError, match="other flags"):
        load_run(path, other, torch.optim.AdamW([p for p in other.parameters() if p.requires_grad]))
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"optimizer\.safetensors: not a whole safetensors file"):
        load_run(path, *trained)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(file.read_bytes()[:-2]), lambda file: file.unlink()],
                         ids=["a-flipped-bit", "cut-short", "gone"])
@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, tmp_path, damage, name):
    said = []
    save(tmp_path, 1, trained, {"position": 1})
    newest = save(tmp_path, 2, trained, {"position": 2})
    assert find_last(tmp_path, said.append) == newest and not said
    damage(newest / name)
    assert find_last(tmp_path, said.append) == tmp_path / "checkpoints/step-000001"
    if (newest / "state.json").exists():
        assert len(said) == 1 and "step-000002 is damaged: " in said[0] and name in said[0]
    damage(find_checkpoints(tmp_path)[0] / name)
    if (newest / "state.json").exists():
        with pytest.raises(ValueError, match="none of its 2 checkpoints is whole; start anew"):
            find_last(tmp_path, said.append)


def test_a_state_that_was_changed_into_another_sound_one_is_damaged(trained, tmp_path):
    path = save(tmp_path, 12, trained, {"position": 96}) / "state.json"
    path.write_text(path.read_text().replace('"position": 96', '"position": 97'))
    with pytest.raises(ValueError, match=r"step-000012 is damaged: state\.json changed after it was written"):
        checkpoint.verify(path.parent)


def test_an_old_checkpoint_that_a_kill_left_half_removed_is_none(trained, tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, trained, {})
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **_: (path / "trained.safetensors").unlink(missing_ok=True))
    save(tmp_path, 3, trained, {})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "checkpoints")) == 3                  # and what is left of it goes with the next start
    RunFolder(tmp_path).close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000003"]


def test_a_failed_save_is_known_before_the_next_one(trained, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.check()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run.save(1, *snapshot(*trained), {})
    with pytest.raises(OSError, match=r"step-000001.*trained\.safetensors: could not be written .*No space left.*no checkpoint is before it"):
        while run.writing:
            run.check()
    run.close()


def test_what_is_saved_is_what_stood_there_when_it_was_asked_for(trained, tmp_path):
    model, optimizer = trained
    run = RunFolder(tmp_path)
    before = {name: tensor.detach().clone() for name, tensor in snapshot(model, optimizer)[0].items()}
    run.save(1, *snapshot(model, optimizer), {})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()                               # the training goes on while the file is written
    run.close()
    stored = checkpoint._read_tensors(find_checkpoints(tmp_path)[0] / "trained.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_a_folder_that_cannot_be_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run: cannot be written to \(Not a directory\); mend that, or choose another --out"):
        RunFolder(tmp_path / "file" / "run")


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    first = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=rf"is being written by another run \(process {os.getpid()} on .*\); wait for it"):
        RunFolder(tmp_path)
    first.close()
    RunFolder(tmp_path).close()


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_leaves_the_one_before(trained, tmp_path, monkeypatch):
    """A full disk, as safetensors reports it, and a folder that is gone."""
    path = save(tmp_path, 1, trained, {})
    run = RunFolder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run.save(2, *snapshot(*trained), {})
        with pytest.raises(OSError, match=r"step-000002.*could not be written .*No space left.*make room or mend the folder; --resume goes on from step-000001"):
            run.wait()
    assert find_checkpoints(tmp_path) == [path] and os.listdir(path.parent) == ["step-000001"]
    run.close()


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


def test_a_model_that_is_not_there_is_named_before_anything_is_read():
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        checkpoint.fetch_model("nowhere")


def test_adapters_are_listed_in_the_models_order(trained):
    names = [name for name, _ in adapters(trained[0])]
    assert len(names) == 7 * 4 and names[0] == "model.layers.0.self_attn.q_proj" and names[-1] == "model.layers.3.mlp.down_proj"
