"""A run's folder: its lock, its checkpoints, and what decides whether and where a run is resumed.

One program at a time writes a run's folder. A checkpoint appears completely or not at all, with checksums of
its files; a damaged one is skipped for the one before it. Under torchrun rank 0 alone decides where a run
begins.
"""
from __future__ import annotations

import contextlib
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

from lora import flat_adapters
from storage.atomic import atomic_folder, read_json, remove_leftovers, sha256_of, temporary_path, write_json
from storage.tensors import read_tensors, write_tensors
from training.distributed import full_tensor, shard_like
from training.host import launch_id
from training.run import Run

STATE, TRAINED, MOMENTS = "state.json", "trained.safetensors", "optimizer.safetensors"
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")        # AdamW's first and second moment
Tensors = dict[str, Tensor]                     # by name


class RunFolder:
    """A run's folder, locked for this program, and its checkpoints, written by a thread during training.

    A checkpoint is a folder checkpoints/step-NNNNNN: the trained parameters and the optimizer's moments as
    safetensors, and state.json with the sizes and SHA-256 of both. The newest `keep` checkpoints are kept.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Raises ValueError if another program has locked the folder, OSError if it cannot be written."""
        self.folder, self.keep = folder, keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = (folder / ".lock").open("a+")
        except OSError as error:
            problem = f"cannot be written to ({error.strerror})"
            raise OSError(f"{folder}: {problem}; fix that, or choose another --out") from None
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)       # released when this process ends
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip() or "unknown"
            raise ValueError(f"{folder} is being written by another run (process {holder}); wait for it, "
                             "stop it, or choose another --out") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()} on {platform.node()}")
        self.lock.flush()
        remove_leftovers(folder)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None

    def save(self, step: int, trained: Tensors, moments: Tensors, state: dict) -> None:
        """Copy what `snapshot` returned, start to write it as the checkpoint of a step, and return.

        Waits for the checkpoint before this one, and raises its error if it failed.
        """
        self.wait()
        trained, moments = (_copied_to_cpu(tensors) for tensors in (trained, moments))
        self.writing = self.thread.submit(self._write, step, trained, moments, state)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises OSError naming the file, and the checkpoint to resume from.
        """
        if self.writing:
            writing, self.writing = self.writing, None
            writing.result()

    def check(self) -> None:
        """Raise the error of the last checkpoint if it has failed by now; does not wait."""
        if self.writing and self.writing.done():
            self.wait()

    def close(self) -> None:
        """Finish the last checkpoint and release the folder."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.lock.close()

    def _write(self, step: int, trained: Tensors, moments: Tensors, state: dict) -> None:
        path = checkpoint_folder(self.folder, step)
        _remove_checkpoint(path)
        try:
            with atomic_folder(path) as temporary:
                write_tensors(temporary / TRAINED, trained)
                write_tensors(temporary / MOMENTS, moments)
                files = {name: _size_and_hash(temporary / name) for name in (TRAINED, MOMENTS)}
                state = {"step": step, **state, "files": files}
                write_json(temporary / STATE, state | {"sha256": _hash_of_state(state)})
        except OSError as error:
            last = find_checkpoints(self.folder)[-1:]
            remedy = f"--resume continues from {last[0].name}" if last else "there is no earlier checkpoint"
            raise OSError(f"{error}; {remedy}") from None
        for older in find_checkpoints(self.folder)[:-self.keep]:
            _remove_checkpoint(older)


def _copied_to_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _remove_checkpoint(path: Path) -> None:
    """Rename a checkpoint's folder, then remove it, so that a half removed one is no checkpoint."""
    if path.exists():
        shutil.rmtree(path.rename(temporary_path(path)), ignore_errors=True)


def _hash_of_state(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _size_and_hash(file: Path) -> dict:
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


# ------------------------------------------------------------------------------------------------------------
# What is in a checkpoint


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """The trained parameters, by name, and AdamW's moments, by "exp_avg.NAME" and "exp_avg_sq.NAME".

    Under FSDP all processes must call it, as it gathers the shards.
    """
    trained, moments = {}, {}
    stored = _moments_by_parameter(model, optimizer)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        trained[name] = full_tensor(parameter)
        if parameter in stored:
            for key in MOMENT_NAMES:
                moments[f"{key}.{name}"] = full_tensor(stored[parameter][key])
    return trained, moments


def _moments_by_parameter(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensors]:
    """AdamW's moments of each of the model's parameters.

    If the optimizer updates all adapters as one flat parameter, these are views of its moments.
    """
    flat = flat_adapters(model)
    if flat is None or flat.masters not in optimizer.state:
        return optimizer.state
    found: dict[Tensor, Tensors] = {}
    for key in MOMENT_NAMES:
        for parameter, moment in flat.of_each(optimizer.state[flat.masters][key]):
            found.setdefault(parameter, {})[key] = moment
    return found


def adamw_state(parameter: Tensor, step: int = 0) -> Tensors:
    """AdamW's state of a parameter after `step` steps, with moments of zero."""
    moments = {key: torch.zeros_like(parameter) for key in MOMENT_NAMES}
    return {"step": torch.tensor(float(step), device=parameter.device)} | moments


@torch.no_grad()
def load_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load a checkpoint into model and optimizer, in place; returns its state.

    The state is `step`, and what `RunFolder.save` was given.

    Raises ValueError for a checkpoint of a run with other flags.
    """
    state = read_json(path / STATE)
    state = {key: value for key, value in state.items() if key not in ("files", "sha256")}
    tensors, stored_moments = read_tensors(path / TRAINED), read_tensors(path / MOMENTS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = adamw_state(parameter, state["step"])
    moments = _moments_by_parameter(model, optimizer)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise ValueError(f"{path}: no {name} of shape {tuple(parameter.shape)}; the run had other flags")
        parameter.copy_(shard_like(parameter, tensors.pop(name)))
        for key in MOMENT_NAMES:
            moments[parameter][key].copy_(shard_like(parameter, stored_moments[f"{key}.{name}"]))
    if tensors:
        raise ValueError(f"{path}: {next(iter(tensors))} has no place in this run; it had other flags")
    return state


# ------------------------------------------------------------------------------------------------------------
# Which checkpoint, if any, to resume from


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:06d}"


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run's folder, oldest first."""
    found = (path for path in (folder / "checkpoints").glob("step-*") if (path / STATE).exists())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_last(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest undamaged checkpoint; None if the run has none yet.

    A damaged one is reported and left where it is. Raises ValueError if all are damaged.
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
        raise ValueError(f"{folder}: all of its {len(found)} checkpoints are damaged; start over with "
                         "--overwrite, or with another --out")
    return None


def verify(path: Path) -> None:
    """Raises ValueError for a checkpoint whose files are not as they were written."""
    try:
        state = read_json(path / STATE)
        if state.pop("sha256", None) == _hash_of_state(state):
            files = state["files"].items()
            changed = [name for name, expected in files if _size_and_hash(path / name) != expected]
        else:
            changed = [STATE]
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if changed:
        raise ValueError(f"{path} is damaged: {' and '.join(changed)} changed after it was written")


def open_run(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, flags: dict, restarts: int,
             stack: contextlib.ExitStack) -> RunFolder | None:
    """Lock the run's folder, and if the run is resumed, load its last checkpoint into `run`, model and
    optimizer.

    Returns rank 0's folder, which `stack` closes; None on other ranks, and with `--steps 0`, which writes
    nothing. A run resumes with `--resume`, and by itself when torchrun restarts its processes because one of
    them died.

    flags: those that decide the losses. restarts: how often torchrun has restarted the processes.

    Raises ValueError if the folder holds another run, or an earlier one that neither `--resume` nor
    `--overwrite` asks for.
    """
    args, out = run.args, run.out
    folder, step = None, 0
    if run.rank == 0:
        if args.steps != 0:
            folder = RunFolder(out, args.keep)
            stack.callback(folder.close)
        resume = args.resume or restarted_by_torchrun(out, restarts)
        holds_run = find_checkpoints(out) or (out / "log.jsonl").exists()
        if folder and holds_run and not (resume or args.overwrite):
            raise ValueError(f"{out} holds an earlier run; pass --resume to continue it, --overwrite to "
                             f"lose it, or "
                             "another --out")
        last = find_last(out, run.say) if resume else None
        step = int(last.name.removeprefix("step-")) if last else 0
    if run.world_size > 1:
        step = broadcast_start(step, flags["rows"], run.device)
    if step:
        last = checkpoint_folder(out, step)
        if not last.exists():
            raise FileNotFoundError(f"{last} exists only where rank 0 runs: --out must be a folder that all "
                                    f"machines see")
        check_same_run(out, flags)
        state = load_run(last, model, optimizer)
        run.step, run.position, run.best_loss = state["step"], state["position"], state["best_loss"]
        run.say(f"resume {out} at step {run.step}")
    return folder


def restarted_by_torchrun(out: Path, restarts: int) -> bool:
    """Whether this torchrun began the run in `out`, and has restarted it because a process died."""
    config = out / "config.json"
    return restarts > 0 and config.exists() and read_json(config).get("launch") == launch_id()


def broadcast_start(step: int, rows: str, device: torch.device) -> int:
    """The step that rank 0 starts from.

    Raises ValueError in a process whose training rows differ from rank 0's.

    rows: the training rows' fingerprint, which ends in 15 hexadecimal digits.
    """
    own = int(rows[-15:], 16)
    shared = torch.tensor([step, own], device=device)
    dist.broadcast(shared, 0)
    step, of_rank_0 = shared.tolist()
    if of_rank_0 != own:
        raise ValueError(f"this process has other training rows ({rows}) than rank 0; give all of them the "
                         "same --data files")
    return step


def check_same_run(out: Path, flags: dict) -> None:
    """Raises ValueError if the run in `out` had flags or training rows with which the losses would differ."""
    stored = read_json(out / "config.json")
    changed = []
    for key, value in flags.items():
        if key not in ("asked", "rows") and stored.get(key, value) != value:
            changed.append(f"--{key.replace('_', '-')} {stored.get(key)} → {value}")
    if changed:
        raise ValueError(f"{out} was made with other flags: {', '.join(changed)}; resume with the same ones, "
                         "or choose another --out")
    if stored.get("rows") != flags["rows"]:
        raise ValueError(f"{out} was made with other training rows ({stored.get('rows')}) than --data holds "
                         f"now ({flags['rows']}); provide the same files, or choose another --out")
