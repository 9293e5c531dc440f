"""training/run_folder.py: checkpoints whole or not at all, whatever happens while they are written, and who may resume a run."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from dataset import token_cache
from lora import LoRAConfig, flat_adapters, wrap
from storage import tensors
from storage.atomic import remove_leftovers, write_json
from storage.pretrained import load_model
from storage.tensors import read_tensors
from tokenizer import Tokenizer
from training import run_folder
from training.distributed import AllReduceGradients
from training.load_data import fingerprint
from training.run_folder import RunFolder, find_checkpoints, find_last, load_run, snapshot, verify


def save(folder, step, trained, state, keep=2):
    """One checkpoint, written to its end."""
    run = RunFolder(folder, keep)
    run.save(step, *snapshot(*trained), state)
    run.close()
    return find_checkpoints(folder)[-1]


def test_a_process_killed_while_saving_leaves_no_checkpoint_and_no_obstacle(demo, trained, tmp_path):
    """Killed after the first of three files, twice with leftovers in the way; then the save goes through."""
    program = ("import os, sys; sys.path.insert(0, {root!r}); from pathlib import Path; from storage.atomic import atomic_folder\n"
               "with atomic_folder(Path({path!r})) as temporary:\n"
               "    (temporary / 'trained.safetensors').write_text('x'); os.kill(os.getpid(), 9)")
    path = tmp_path / "checkpoints" / "step-000003"
    done = subprocess.run([sys.executable, "-c", program.format(root=str(ROOT), path=str(path))])
    assert done.returncode == -9 and find_checkpoints(tmp_path) == []
    assert len(os.listdir(tmp_path / "checkpoints")) == 1
    remove_leftovers(tmp_path)
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
    gradients = AllReduceGradients(other, 1)
    as_one = torch.optim.AdamW(gradients.parameters, lr=0.1, fused=True)
    assert load_run(path, other, as_one) == {"step": 4}
    state = as_one.state[flat_adapters(other).masters]
    assert state["step"] == 4 and all(state[key].any() for key in ("exp_avg", "exp_avg_sq"))
    again = save(tmp_path / "again", 4, (other, as_one), {})
    for name in ("trained.safetensors", "optimizer.safetensors"):
        assert (again / name).read_bytes() == (path / name).read_bytes()
    model, optimizer = trained
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    stored = read_tensors(path / "optimizer.safetensors")
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
        with pytest.raises(ValueError, match="all of its 2 checkpoints are damaged; start over"):
            find_last(tmp_path, said.append)


def test_a_state_that_was_changed_into_another_sound_one_is_damaged(trained, tmp_path):
    path = save(tmp_path, 12, trained, {"position": 96}) / "state.json"
    path.write_text(path.read_text().replace('"position": 96', '"position": 97'))
    with pytest.raises(ValueError, match=r"step-000012 is damaged: state\.json changed after it was written"):
        verify(path.parent)


def test_an_old_checkpoint_that_a_kill_left_half_removed_is_none(trained, tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, trained, {})
    monkeypatch.setattr(run_folder.shutil, "rmtree", lambda path, **_: (path / "trained.safetensors").unlink(missing_ok=True))
    save(tmp_path, 3, trained, {})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "checkpoints")) == 3                  # and what is left of it goes with the next start
    RunFolder(tmp_path).close()
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000002", "step-000003"]


def test_a_failed_save_is_known_before_the_next_one(trained, tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    run.check()
    monkeypatch.setattr(tensors, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    run.save(1, *snapshot(*trained), {})
    with pytest.raises(OSError, match=r"step-000001.*trained\.safetensors: could not be written .*No space left.*there is no earlier checkpoint"):
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
    stored = read_tensors(find_checkpoints(tmp_path)[0] / "trained.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())


def test_a_folder_that_cannot_be_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/run: cannot be written to \(Not a directory\); fix that, or choose another --out"):
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
        patch.setattr(tensors, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run.save(2, *snapshot(*trained), {})
        with pytest.raises(OSError, match=r"step-000002.*could not be written .*No space left.*make room or fix the folder; --resume continues from step-000001"):
            run.wait()
    assert find_checkpoints(tmp_path) == [path] and os.listdir(path.parent) == ["step-000001"]
    run.close()


def test_a_process_that_reads_other_rows_than_rank_0_is_refused(demo, tmp_path, monkeypatch):
    everything = token_cache.read_tokens([str(demo / "rows.jsonl")], demo / "model", Tokenizer.load(demo / "model"), tmp_path, 0, False)
    rows, fewer, turned = (fingerprint(everything.select(np.array(which))) for which in ([0, 1], [0], [1, 0]))
    monkeypatch.setattr(run_folder.dist, "broadcast", lambda tensor, source: tensor.copy_(torch.tensor([7, int(rows[-15:], 16)])))
    assert run_folder.broadcast_start(0, rows, torch.device("cpu")) == 7
    for other in (fewer, turned):
        with pytest.raises(ValueError, match=r"other training rows \([12] of \d+ tokens, SHA-256 \w+\) than rank 0; give all of them the same"):
            run_folder.broadcast_start(0, other, torch.device("cpu"))


def test_only_the_torchrun_that_began_a_run_goes_on_with_it_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    write_json(tmp_path / "config.json", {"launch": run_folder.launch_id()})
    assert not run_folder.restarted_by_torchrun(tmp_path, 0)                                         # its first start
    assert run_folder.restarted_by_torchrun(tmp_path, 1) and not run_folder.restarted_by_torchrun(tmp_path / "new", 1)
    for other in ("another", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", other)
        assert not run_folder.restarted_by_torchrun(tmp_path, 1)
