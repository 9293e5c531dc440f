"""A run's folder: one program at a time writes it, checkpoints appear whole or not at all, and a run resumes from the last sound one."""
from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradients import like, whole
from model import Gemma3
from storage.atomic import read_json, remove_leftovers, sha256_of, whole_folder, write_json
from storage.tensors import read_tensors, write_tensors

TRAINED, MOMENTS = "trained.safetensors", "optimizer.safetensors"
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")


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
            raise OSError(f"{folder}: cannot be written to ({error.strerror}); fix that, or choose another --out") from None
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
                    write_tensors(temporary / name, tensors)
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


def moments(parameter: Tensor, step: int = 0, *kept: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter after so many steps: the first and second moments that are given, or zeros."""
    kept = kept or (torch.zeros_like(parameter), torch.zeros_like(parameter))
    return {"step": torch.tensor(float(step), device=parameter.device), **dict(zip(MOMENT_NAMES, kept, strict=True))}


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained, and the optimizer's moments, by name.  Where they are sharded, all processes must ask."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept = {f"{key}.{name}": whole(optimizer.state[p][key]) for name, p in trained.items() for key in MOMENT_NAMES if p in optimizer.state}
    return {name: whole(p) for name, p in trained.items()}, kept


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
        raise ValueError(f"{folder}: none of its {len(found)} checkpoints is whole; start over with --overwrite, or with another --out")
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
    tensors, kept = read_tensors(path / TRAINED), read_tensors(path / MOMENTS)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise ValueError(f"{path}: no {name} of shape {tuple(parameter.shape)}; the run had other flags")
        parameter.copy_(like(parameter, tensors.pop(name)))
        optimizer.state[parameter] = moments(parameter, state["step"], *(like(parameter, kept[f"{key}.{name}"]) for key in MOMENT_NAMES))
    if tensors:
        raise ValueError(f"{path}: {next(iter(tensors))} has no place in this run; it had other flags")
    return state


def decoding_copy(model: Gemma3) -> Gemma3:
    """A model without adapters, its fp32 masters rounded to what it computes in once and not at every token; of shards the whole."""
    with torch.device("meta"):
        copy = Gemma3(model.config, model.compute_dtype)
    copy.load_state_dict({name: whole(tensor.detach()).to(model.compute_dtype) for name, tensor in model.state_dict().items()}, assign=True)
    return copy.eval()


def launch() -> str:
    """The torchrun that started this process: the id it was given or made, or else its number."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return given if given != "none" else f"process {os.getppid()} on {platform.node()}"


def restarted(out: Path, restarts: int) -> bool:
    """Whether torchrun began the run in this folder and starts its processes anew because one of them died."""
    return restarts > 0 and (out / "config.json").exists() and read_json(out / "config.json").get("launch") == launch()


def same_for_all(step: int, rows: str, device: torch.device) -> int:
    """The step that rank 0 begins at.  Raises ValueError in a process that has other rows than rank 0."""
    mine = int(rows[-15:], 16)
    shared = torch.tensor([step, mine], device=device)
    dist.broadcast(shared, 0)
    step, first = shared.tolist()
    if first != mine:
        raise ValueError(f"this process has other training rows ({rows}) than rank 0; give all of them the same --data files")
    return step


def check_same_run(out: Path, flags: dict) -> None:
    """Refuse to resume with flags or rows under which the losses would differ."""
    stored = read_json(out / "config.json")
    changed = [f"--{key.replace('_', '-')} {stored.get(key)} → {value}" for key, value in flags.items()
               if key not in ("asked", "rows") and stored.get(key, value) != value]
    if changed:
        raise ValueError(f"{out} was made with other flags: {', '.join(changed)}; resume with the same ones, or choose another --out")
    if stored.get("rows") != flags["rows"]:
        raise ValueError(f"{out} was made with other training rows ({stored.get('rows')}) than --data holds now ({flags['rows']}); "
                         "bring those files back, or choose another --out")
