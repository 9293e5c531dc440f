"""Faults made to happen to real runs of train.py on the demo model, and what came of each.

    python tests/faults.py                      # all of them, some minutes; prints a table
    python tests/faults.py --only killed --save # those with "killed" in their name; writes benchmarks/results/faults.json

Every run is a process of its own, or torchrun with several, on the CPU in fp32. A fault comes from outside (a signal, a damaged
file, a full disk) or from a few lines injected into the run (`PROGRAM`). Losses and final weights are then compared with those of
a run that nothing disturbed. A fault that never took effect is an error, not a pass. tests/test_faults.py runs a part of them.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from training.run_folder import TRAINED, find_checkpoints  # noqa: E402

MODES = {"LoRA": ("--lora-rank", "4"), "dropout": ("--lora-rank", "4", "--lora-dropout", "0.1"), "full": ("--full",),
         "shards": ("--full", "--shard")}
STEPS = 12

# The program of a run with an injected fault: train.py, after the lines of `fault`. Those call
#   `patch` to replace what train.py calls; a name that does not exist is an error, so an injection cannot miss what was renamed;
#   `at_step` to act in every process when it has the gradients of its first, second, ... step, and has told the others whether it
#     was to stop after that one;
#   `mark` at the moment the fault takes effect: `Run.end` refuses a run whose fault did not;
#   `held` to wait for `Run.go`.
PROGRAM = """import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import train
from storage import tensors
from training import load_data, run_folder
from dataset import token_cache
RANK, LIFE, passed = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), 0

def mark():
    Path({mark!r}).touch()

def held():
    while not Path({mark!r} + ".go").exists():
        time.sleep(0.05)

def patch(owner, name, wrap):
    setattr(owner, name, wrap(getattr(owner, name)))

def at_step(fault):
    def wrap(all_reduce):
        def all_reduce_with_fault(self, extra):
            global passed
            passed += 1
            fault(passed)
            return all_reduce(self, extra)
        return all_reduce_with_fault
    for gradients in (train.AllReduceGradients, train.FSDPGradients):
        patch(gradients, "all_reduce", wrap)

{fault}
train.cli()
"""


def when(condition: str, act: str) -> str:
    """A fault for `PROGRAM`: the act, at the step and in the process that the condition names."""
    return f"@at_step\ndef fault(step):\n    if {condition}:\n        mark()\n        {act}\n"


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
STOP = "[(time.sleep(0.01), os.kill(os.getpid(), signal.SIGTERM)) for _ in range(2)]"        # heard twice, as from a scheduler and torchrun

# The process dies with half of a file written, the second of the three of step 6's checkpoint.
KILL_IN_SAVE = """
def half(save_file):
    def save_half(tensors, path, **more):
        save_file(tensors, path, **more)
        if "step-000006" in str(path) and "optimizer" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            mark()
            os.kill(os.getpid(), signal.SIGKILL)
    return save_half
patch(tensors, "save_file", half)
"""


class Run:
    """One start of train.py, as a process or under torchrun."""

    def __init__(self, bench: Bench, out: Path, flags: tuple, processes: int = 1, restarts: int = 0, fault: str = "") -> None:
        self.folder, self.out, self.processes, self.fault = bench.folder, out, processes, fault
        self.mark = Path(tempfile.mktemp(prefix="mark-", dir=bench.folder))
        program = ROOT / "train.py"
        if fault:
            program = self.mark.with_suffix(".py")
            program.write_text(PROGRAM.format(root=str(ROOT), mark=str(self.mark), fault=fault))
        start = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
                                           "--max-restarts", str(restarts)]
        self.files = [self.mark.with_suffix(end) for end in (".out", ".err")]
        with self.files[0].open("w") as said, self.files[1].open("w") as errors:
            self.process = subprocess.Popen([sys.executable, *start, str(program), "--out", str(out), *map(str, flags)], stdout=said,
                                            stderr=errors, env=bench.environment, start_new_session=True)
        bench.runs.append(self)

    def go(self) -> None:
        """On with what the fault holds back."""
        Path(f"{self.mark}.go").touch()

    def said(self) -> str:
        return self.files[0].read_text()

    def errors(self) -> str:
        return self.files[1].read_text()

    def message(self) -> str:
        """train.py's own lines on stderr, and what it said of a stop."""
        own = [line for line in self.errors().splitlines() if line.startswith("train.py: ")]
        said = re.findall(r"^(?:stopped|resume .*damaged).*$", self.said(), re.MULTILINE)
        return " / ".join(own + said).replace(f"{self.folder}/", "")

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait for it; False where the run ends before."""
        while not condition():
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def step(self, number: int) -> bool:
        return self.until(lambda: re.search(rf"^step +{number}/\d+ \| loss", self.said(), re.MULTILINE))

    def end(self, seconds: float = 300) -> int:
        """The exit code.  Raises AssertionError where a fault was injected and did not take effect."""
        code = self.process.wait(seconds)
        self.check_injection()
        return code

    def check_injection(self) -> None:
        assert not self.fault or self.mark.exists(), f"the injected fault never took effect: {self.errors()[-600:]}"

    def seconds(self, began: float | None = None) -> float:
        """From `began`, or else from the injected fault, until no process of train.py is left; torchrun itself may take longer."""
        if began is None:
            self.until(self.mark.exists)
            self.check_injection()
            began = self.mark.stat().st_mtime
        self.until(lambda: self.processes > 1 and not self.workers())
        return time.time() - began

    def workers(self) -> dict[int, int]:
        """{rank: number} of the processes under a torchrun."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                if path.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(self.process.pid):
                    environment = path.joinpath("environ").read_bytes().split(b"\0")
                    found |= {int(entry[5:]): int(path.name) for entry in environment if entry.startswith(b"RANK=")}
        return found

    def kill(self) -> None:
        for pid in [*self.workers().values(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


class Bench:
    """The demo's folder and a place for runs."""

    def __init__(self, demo: Path, folder: Path, whole: Bench | None = None) -> None:
        """whole: the bench that makes the undisturbed runs, once for several."""
        self.demo, self.folder, self.runs, self.wholes = demo, folder, [], whole or self
        self.made, self.making = {}, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": ""}
        self.environment.pop("TRITON_INTERPRET", None)

    def flags(self, mode: str = "LoRA", *more, data: Path | None = None) -> tuple:
        return ("--model", self.demo / "model", "--data", data or self.demo / "rows.jsonl", "--device", "cpu", "--dtype", "fp32", "--batch-rows",
                "4", "--eval-rows", "6", "--eval-every", "3", "--eval-calls", "0", "--save-every", "2", "--lr", "3e-3", "--steps", STEPS,
                *MODES[mode], *more)

    def start(self, name: str, mode: str = "LoRA", *more, data: Path | None = None, **how) -> Run:
        return Run(self, self.folder / name, self.flags(mode, *more, data=data), **how)

    def whole(self, mode: str = "LoRA", processes: int = 1, *more, data: Path | None = None) -> Path:
        """The folder of a run that nothing disturbed."""
        bench, key = self.wholes, (mode, processes, *more, data and data.name)
        with bench.making:
            if key not in bench.made:
                bench.made[key] = bench.start(f"whole-{len(bench.made)}", mode, *more, data=data, processes=processes)
        assert bench.made[key].end() == 0, bench.made[key].errors()
        return bench.made[key].out

    def stopped(self, name: str, mode: str = "LoRA", *more, step: int = 5, **how) -> Run:
        """A run that was stopped by SIGTERM to its last process after a step, and saved."""
        run = self.start(name, mode, *more, fault=when(f"RANK == {how.get('processes', 1) - 1} and step == {step - 1}", STOP), **how)
        assert run.end() != 0 and run.said().count(f"stopped by SIGTERM after step {step};") == 1, run.errors()
        return run

    def finish(self, run: Run, mode: str = "LoRA", *more, **how) -> Run:
        """The run, gone on with to its end."""
        last = self.start(str(run.out), mode, "--resume", *more, **how)
        assert last.end() == 0, last.errors()
        assert not list(run.out.rglob("*.tmp")), "leftovers of a killed run"
        return last

    def close(self) -> None:
        for run in self.runs:
            run.kill()


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """Of steps 1, 2, …, each of which the log must have once."""
    found = [record for record in records(out) if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1)), "the log lacks steps, or has some twice"
    return [record["loss"] for record in found]


def difference(out: Path, whole: Path) -> float:
    """Largest relative difference of a step's or a held-out loss from the undisturbed run's; 0 only where the weights are equal too."""
    held_out = [[r["eval_loss"] for r in records(folder) if "eval_loss" in r] for folder in (out, whole)]
    pairs = [*zip(losses(out), losses(whole), strict=True), *zip(*held_out, strict=True)]
    weights = [load_file(find_checkpoints(folder)[-1] / TRAINED) for folder in (out, whole)]
    assert weights[0].keys() == weights[1].keys()
    worst = max(abs(a - b) / b for a, b in pairs)
    if worst == 0:
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "the same losses, but other weights"
    return worst


def resumed_at(out: Path) -> int:
    return [record["resumed_at"] for record in records(out) if "flags" in record][-1] or 0


def logged(out: Path) -> int:
    """The last step in the log, whose last line may be torn."""
    found = re.findall(r'^\{"step": (\d+), "loss".*\}$', (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else "", re.MULTILINE)
    return int(found[-1]) if found else 0


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"}


# ---------------------------------------------------------------------------------------------------------------------
# The faults. Each is a function of a bench that asserts what must hold and yields what came of it.

FAULTS: dict[str, Callable[..., Iterator[dict]]] = {}


def fault(name: str):
    def add(function):
        FAULTS[name] = function
        return function
    return add


def random_kill(bench: Bench, name: str, mode: str, chance: random.Random) -> tuple[Run, str]:
    """A run, started or gone on with and killed: at any time after its start, after some steps, or as soon as a save has begun."""
    way = chance.choice(("at any time", "after some steps", "after some steps", "in a save", "in a save"))
    run = bench.start(name, mode, "--resume")
    folder, before = run.out / "checkpoints", set(run.out.rglob("*.tmp"))
    if way == "at any time":
        time.sleep(chance.uniform(0, 8))
    elif way == "after some steps":
        run.until(lambda: "resume" in run.said() or "step " in run.said())
        first = re.search(r"^resume .* at step (\d+)", run.said(), re.MULTILINE)
        run.step(int(first[1] if first else 0) + chance.randint(1, 4))
        time.sleep(chance.uniform(0, 0.1))
    else:
        run.until(lambda: set(folder.glob("*.tmp")) - before)
        time.sleep(chance.uniform(0, 0.015))
    run.kill()
    return run, way + (", a save torn" if set(folder.glob("*.tmp")) - before else "")


def random_kills(bench: Bench, mode: str, kills: int, seed: int = 0) -> Iterator[dict]:
    """Four kills a run, which then goes on to its end. A kill that came after the run's end is not counted: the run starts anew."""
    chance = random.Random(f"{mode} {seed}")
    for number in range(kills):
        if number % 4 == 0:
            name = f"killed-{mode}-{number}"
        for _ in range(4):
            run, way = random_kill(bench, name, mode, chance)
            if run.end() == -signal.SIGKILL:
                break
            shutil.rmtree(run.out)
        assert run.end() == -signal.SIGKILL, f"four runs ended before they were killed: {run.errors()}"
        saved = [int(path.name[5:]) for path in find_checkpoints(run.out)]
        yield {"how": way, "recomputed": max(0, logged(run.out) - max(saved, default=0)), "exit": run.end()}
        if number % 4 == 3 or number == kills - 1:
            last = bench.finish(run, mode)
            yield {"how": "gone on with to its end", "losses": difference(run.out, bench.whole(mode)), "exit": last.end()}


for mode in ("LoRA", "dropout", "full"):
    fault(f"killed by -9 at random, {mode}")(partial(random_kills, mode=mode, kills=8))


@fault("killed by -9 with half a checkpoint written")
def killed_in_a_save(bench: Bench) -> Iterator[dict]:
    run = bench.start("half", fault=KILL_IN_SAVE)
    code = run.end()
    assert code == -signal.SIGKILL and list((run.out / "checkpoints").glob(".step-000006*.tmp"))
    assert [path.name for path in find_checkpoints(run.out)] == ["step-000002", "step-000004"]
    reached = logged(run.out)
    bench.finish(run)
    assert resumed_at(run.out) == 4
    yield {"losses": difference(run.out, bench.whole()), "recomputed": reached - 4, "exit": code, "seconds": 0.0}


@fault("killed by -9 while an old checkpoint was being removed")
def killed_in_a_removal(bench: Bench) -> Iterator[dict]:
    run = bench.start("removal", fault="""
def half(rmtree):
    def remove_half(path, **more):
        if "step-000002" in str(path) and path.exists():
            os.unlink(path / "trained.safetensors")
            mark()
            os.kill(os.getpid(), signal.SIGKILL)
        rmtree(path, **more)
    return remove_half
patch(run_folder.shutil, "rmtree", half)
""")
    code, reached = run.end(), logged(run.out)
    assert code == -signal.SIGKILL and [path.name for path in find_checkpoints(run.out)] == ["step-000004", "step-000006"]
    bench.finish(run)
    assert resumed_at(run.out) == 6
    yield {"losses": difference(run.out, bench.whole()), "recomputed": reached - 6, "exit": code, "seconds": 0.0}


@fault("a signal to one process")
def signals(bench: Bench, which: tuple = (signal.SIGTERM, signal.SIGINT)) -> Iterator[dict]:
    for number in which:
        run = bench.start(number.name, "full")
        assert run.step(3)
        run.process.send_signal(number)
        seconds, code = run.seconds(began=time.time()), run.end()
        assert code == 128 + number and f"stopped by {number.name}" in run.message() and "Traceback" not in run.errors()
        reached = logged(run.out)
        bench.finish(run, "full")
        assert resumed_at(run.out) == reached
        yield {"how": number.name, "losses": difference(run.out, bench.whole("full")), "recomputed": 0, "exit": code, "seconds": seconds,
               "message": run.message()}


@fault("a second signal four seconds later")
def impatient(bench: Bench) -> Iterator[dict]:
    """It leaves at once, without saving."""
    run = bench.start("impatient", fault=when("step == 6", "[(os.kill(os.getpid(), signal.SIGTERM), time.sleep(4)) for _ in range(2)]"))
    code = run.end()
    assert code == -signal.SIGTERM and find_checkpoints(run.out)[-1].name == "step-000004", (code, run.errors())
    bench.finish(run)
    yield {"losses": difference(run.out, bench.whole()), "recomputed": 1, "exit": code}


@fault("SIGTERM to one rank of two")
def signal_to_a_rank(bench: Bench, ranks: tuple = (0, 1)) -> Iterator[dict]:
    for rank in ranks:
        run = bench.start(f"rank-{rank}", fault=when(f"RANK == {rank} and step == 4", STOP), processes=2)
        seconds, code = run.seconds(), run.end()
        assert code and run.message().count("stopped by SIGTERM after step 5") == 1, run.errors()
        assert run.errors().count("exitcode: 143") >= 1
        bench.finish(run, processes=2)
        assert resumed_at(run.out) == 5
        yield {"how": f"rank {rank}", "losses": difference(run.out, bench.whole("LoRA", 2)), "recomputed": 0, "exit": code, "seconds": seconds,
               "message": run.message()}


@fault("a signal to torchrun")
def signal_to_torchrun(bench: Bench) -> Iterator[dict]:
    """As Ctrl-C does; and as a scheduler does, which tells torchrun and all its processes, who then hear it twice."""
    for number, everyone in ((signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True)):
        run = bench.start(f"torchrun-{number.name}-{everyone}", fault=when("True", "time.sleep(0.3)"), processes=2)
        assert run.step(3)
        for pid in [*(run.workers().values() if everyone else ()), run.process.pid]:
            os.kill(pid, number)
        seconds, code = run.seconds(began=time.time()), run.end()
        assert code and run.message().count("stopped by ") == 1, run.errors()
        reached = logged(run.out)
        bench.finish(run, processes=2)
        assert resumed_at(run.out) == reached
        yield {"how": number.name + (" to its processes too" if everyone else ""), "losses": difference(run.out, bench.whole("LoRA", 2)),
               "recomputed": 0, "exit": code, "seconds": seconds, "message": run.message()}


@fault("torchrun --max-restarts 3, a rank killed by -9")
def restarts(bench: Bench, which: tuple = ((0, 6), (1, 6), (1, 1), (0, 1))) -> Iterator[dict]:
    for rank, step in which:
        run = bench.start(f"restart-{rank}-{step}", fault=when(f"LIFE == 0 and RANK == {rank} and step == {step}", KILL), processes=2, restarts=3)
        code = run.end()
        assert code == 0, run.errors()
        first = resumed_at(run.out)
        assert first in ((0,) if step == 1 else (2, 4))
        yield {"how": f"rank {rank} in step {step}", "losses": difference(run.out, bench.whole("LoRA", 2)), "recomputed": step - 1 - first,
               "exit": code, "message": run.message()}


@fault("torchrun --max-restarts 3 on a folder that holds an earlier run")
def restarts_beside_an_earlier_run(bench: Bench) -> Iterator[dict]:
    """A restart goes on with what this torchrun began, never with what was there before."""
    folder = bench.folder / "earlier"
    shutil.copytree(bench.whole("LoRA", 2), folder)
    before = bytes_of(folder)
    refused = bench.start("earlier", processes=2, restarts=1)
    code = refused.end()
    assert code and "holds an earlier run" in refused.message() and bytes_of(folder) == before
    yield {"how": "unasked: refused in every life", "losses": 0.0, "exit": code, "message": refused.message().split(" / ")[0]}
    died = f"if LIFE == 0 and RANK == 1:\n    mark()\n    {KILL}"
    run = bench.start("earlier", "LoRA", "--overwrite", "--seed", "0", fault=died, processes=2, restarts=3)
    assert run.end() == 0 and resumed_at(folder) == 0, run.errors()
    yield {"how": "--overwrite, a rank killed at its start", "losses": difference(folder, bench.whole("LoRA", 2)), "recomputed": 0, "exit": 0}


@fault("torchrun itself killed by -9")
def torchrun_killed(bench: Bench) -> Iterator[dict]:
    run = bench.start("orphans", fault=when("step == 4", "held()"), processes=2)
    assert run.step(3)
    workers = run.workers()
    run.process.kill()
    second = bench.start("orphans", "LoRA", "--resume", processes=2)
    code = second.end()
    assert code == 1 and "is being written by another run (process" in second.message(), second.errors()
    run.check_injection()
    run.go()
    while any(Path(f"/proc/{pid}").exists() for pid in workers.values()):
        time.sleep(0.05)
    reached = logged(run.out)
    bench.finish(run, processes=2)
    yield {"how": f"a second start is refused while its processes live; they reach step {reached}",
           "losses": difference(run.out, bench.whole("LoRA", 2)), "recomputed": reached - resumed_at(run.out), "exit": code,
           "message": second.message()}


@fault("resumed on another number of processes")
def other_world(bench: Bench, which: tuple = (("LoRA", 2, "LoRA", 1), ("LoRA", 1, "LoRA", 2), ("LoRA", 2, "LoRA", 4), ("full", 2, "full", 1),
                                              ("full", 1, "full", 2), ("full", 2, "full", 4), ("shards", 2, "full", 1), ("full", 1, "shards", 2),
                                              ("shards", 2, "shards", 4), ("shards", 4, "full", 2))) -> Iterator[dict]:
    for before, first, after, then in which:
        run = bench.stopped(f"world-{before}-{first}-{after}-{then}", before, processes=first)
        bench.finish(run, after, processes=then)
        off = difference(run.out, bench.whole("LoRA" if after == "LoRA" else "full"))
        assert resumed_at(run.out) == 5 and off < 1e-5
        yield {"how": f"{before} {first} → {after} {then}", "losses": off, "recomputed": 0, "exit": 0}


@contextmanager
def disk(bench: Bench, megabytes: int) -> Iterator[Path | None]:
    """A folder on a disk of that size; None where this machine lets us mount none."""
    folder = bench.folder / f"disk-{megabytes}"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


NO_ROOM = """
def full(save_file):
    def save_or_fail(tensors, path, **more):
        if "step-000006" in str(path):
            mark()
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **more)
    return save_or_fail
patch(tensors, "save_file", full)
"""


@fault("a full disk")
def full_disk(bench: Bench, which: tuple = ("checkpoint", "log")) -> Iterator[dict]:
    """Checkpoints of 9 MB: two are kept and the third finds no room; or whatever is left is filled at step 5, and the log finds none."""
    for what in which:
        with disk(bench, 21 if what == "checkpoint" else 61) as folder:
            fill = when("step == 5", f"Path({str(folder)!r}, 'filler').open('wb', buffering=0).write(bytes(70_000_000))")
            hook = NO_ROOM if folder is None else fill if what == "log" else ""
            name = str(folder / "run") if folder else "no-room"
            run = bench.start(name, "full", fault=hook)
            seconds, code = run.seconds() if hook else None, run.end()
            assert code == 1 and "No space left on device" in run.message() and str(run.out) in run.errors(), run.errors()
            assert len(run.message()) < 600 and "Traceback" not in run.errors() and find_checkpoints(run.out)
            reached = logged(run.out)
            if folder:
                (folder / "filler").unlink(missing_ok=True)
                remount(folder, "size=100m")
            bench.finish(run, "full")
            how = f"tmpfs, {'too small for a third checkpoint' if what == 'checkpoint' else 'full after step 4'}" if folder else "made by a hook"
            yield {"how": how, "losses": difference(run.out, bench.whole("full")), "recomputed": reached - resumed_at(run.out), "exit": code,
                   "seconds": seconds, "message": run.message()}
            if folder is None:
                break


@fault("a folder that cannot be written")
def read_only(bench: Bench) -> Iterator[dict]:
    with disk(bench, 40) as folder:
        out = (folder or bench.folder) / "closed"
        run = bench.stopped(str(out))
        if folder:
            remount(folder, "ro")
        elif os.geteuid():
            out.chmod(0o555)
        else:
            return
        before = bytes_of(out)
        refused = bench.start(str(out), "LoRA", "--resume")
        code = refused.end()
        assert code == 1 and str(out) in refused.errors() and "Traceback" not in refused.errors() and bytes_of(out) == before
        if folder:
            remount(folder, "rw")
        else:
            out.chmod(0o755)
        bench.finish(run)
        yield {"how": "a read-only tmpfs" if folder else "chmod 555", "losses": difference(out, bench.whole()), "recomputed": 0, "exit": code,
               "message": refused.message()}


def flip(path: Path, where: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@fault("a damaged checkpoint")
def damaged_checkpoint(bench: Bench, which: tuple = tuple((name, damage) for name in ("trained.safetensors", "optimizer.safetensors", "state.json")
                                                          for damage in (flip, halve)), and_all: bool = True) -> Iterator[dict]:
    """One file of the newest checkpoint; and_all: then one of each."""
    made = bench.stopped("damaged")
    for name, damage in which:
        copy = bench.folder / f"damaged-{name}-{damage.__name__}"
        shutil.copytree(made.out, copy)
        damage(find_checkpoints(copy)[-1] / name)
        run = bench.start(copy.name, "LoRA", "--resume")
        assert run.end() == 0 and resumed_at(copy) == 4 and "step-000005 is damaged" in run.message(), run.errors()
        yield {"how": f"{name}, {'a bit flipped' if damage is flip else 'cut in half'}", "losses": difference(copy, bench.whole()), "recomputed": 1,
               "exit": 0, "message": run.message()}
    if not and_all:
        return
    for path in find_checkpoints(made.out):
        flip(path / "state.json")
    run = bench.start("damaged", "LoRA", "--resume")
    assert run.end() == 1 and "all of its 2 checkpoints are damaged" in run.message(), run.errors()
    yield {"how": "all of them: refused", "exit": 1, "message": run.message().split(" / ")[-1]}


@fault("a damaged file beside the checkpoints")
def damaged_file(bench: Bench) -> Iterator[dict]:
    """A torn log loses no step; the adapter is written anew; flags that cannot be read are said so."""
    def tear(out: Path) -> None:
        with (out / "log.jsonl").open("ab") as log:
            log.write(b'{"step": 6, "loss": 3.2')

    def letter(out: Path) -> None:
        content = (out / "log.jsonl").read_bytes()
        (out / "log.jsonl").write_bytes(content.replace(b'"torch": "', b'"torch": "\xff', 1))

    made = bench.stopped("beside")
    for how, damage, lost in (("log.jsonl, its last line torn", tear, 0), ("log.jsonl, a byte that is no text", letter, 0),
                              ("adapter_model.safetensors, cut", lambda out: halve(out / "adapter" / "adapter_model.safetensors"), 0),
                              ("adapter_model.safetensors, gone", lambda out: (out / "adapter" / "adapter_model.safetensors").unlink(), 0)):
        copy = bench.folder / f"beside-{how.replace(' ', '-')}"
        shutil.copytree(made.out, copy)
        sound = bytes_of(copy)
        damage(copy)
        assert bytes_of(copy) != sound, f"{how}: nothing was damaged"
        run = bench.start(copy.name, "LoRA", "--resume")
        assert run.end() == 0, run.errors()
        assert (copy / "adapter/adapter_model.safetensors").read_bytes() == (bench.whole() / "adapter/adapter_model.safetensors").read_bytes()
        yield {"how": how, "losses": difference(copy, bench.whole()), "recomputed": lost, "exit": 0}
    halve(made.out / "config.json")
    run = bench.start("beside", "LoRA", "--resume")
    assert run.end() == 1 and "config.json: not valid JSON" in run.message() and "Traceback" not in run.errors(), run.errors()
    yield {"how": "config.json, cut: refused", "exit": 1, "message": run.message()}


@fault("two runs on one folder")
def two_runs(bench: Bench, which: tuple = (1, 2)) -> Iterator[dict]:
    for processes in which:
        run = bench.start(f"one-{processes}", fault=when("step == 3", "held()"), processes=processes)
        assert run.step(2)
        second = bench.start(run.out.name, "LoRA", "--resume", processes=processes)
        code = second.end()
        assert code == 1 and "is being written by another run (process" in second.message(), second.errors()
        run.go()
        assert run.end() == 0
        yield {"how": f"{processes} {'process' if processes == 1 else 'processes'} each", "losses": difference(run.out, bench.whole("LoRA", processes)),
               "exit": code, "message": second.message().split(" / ")[0]}


@fault("--keep 3")
def keep(bench: Bench) -> Iterator[dict]:
    run = bench.stopped("keep", "LoRA", "--keep", "3", step=9)
    kept = [path.name for path in find_checkpoints(run.out)]
    assert kept == ["step-000006", "step-000008", "step-000009"] == sorted(path.name for path in (run.out / "checkpoints").iterdir())
    bench.finish(run, "LoRA", "--keep", "1")
    assert [path.name for path in (run.out / "checkpoints").iterdir()] == ["step-000012"]
    yield {"how": f"{', '.join(kept)}; then --keep 1", "losses": difference(run.out, bench.whole()), "recomputed": 0, "exit": 0}


def uneven_rows(bench: Bench) -> Path:
    """23 rows: one has the demo's tools six times more under other names and is as long as all the others."""
    path = bench.folder / "uneven.jsonl"
    if not path.exists():
        rows = [json.loads(line) for line in (bench.demo / "rows.jsonl").read_text().splitlines()[:23]]
        decoded = [row["tools"] if isinstance(row["tools"], list) else json.loads(row["tools"]) for row in rows]
        every = {tool["name"]: tool for tools in decoded for tool in tools}
        more = [{**tool, "name": f"{name}_{i}"} for i in range(6) for name, tool in every.items()]
        rows[7] |= {"tools": decoded[7] + more}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@fault("uneven work")
def uneven(bench: Bench, which: tuple = (("LoRA", 2, 1), ("LoRA", 4, 5), ("full", 2, 5), ("shards", 2, 1), ("shards", 2, 5))) -> Iterator[dict]:
    """One row as long as all others; a row a step for several processes; a last step with a row alone."""
    for mode, processes, rows in which:
        more = ("--steps", "100", "--batch-rows", rows, "--epochs", "1" if rows == 1 else "2", "--eval-fraction", "0", "--micro-tokens", "300",
                "--max-tokens", "20000")
        whole = bench.whole("full" if mode == "shards" else mode, 1, *more, data=uneven_rows(bench))
        run = bench.start(f"uneven-{mode}-{processes}-{rows}", mode, *more, data=uneven_rows(bench), processes=processes)
        assert run.end() == 0, run.errors()
        tokens = [record["tokens"] for record in records(run.out) if "loss" in record]
        off = difference(run.out, whole)
        assert max(tokens) > 10 * min(tokens) and off < 1e-5
        yield {"how": f"{mode}, {processes} processes, {rows} {'row' if rows == 1 else 'rows'} a step", "losses": off, "exit": 0}


@fault("a slow rank")
def slow(bench: Bench) -> Iterator[dict]:
    for rank in (0, 1):
        run = bench.start(f"slow-{rank}", fault=when(f"RANK == {rank}", "time.sleep(0.3)"), processes=2)
        assert run.end() == 0, run.errors()
        yield {"how": f"rank {rank}, 0.3 s a step", "losses": difference(run.out, bench.whole("LoRA", 2)), "exit": 0}


@fault("an error in one rank")
def error_in_a_rank(bench: Bench, which: tuple = ((1, "ValueError"), (1, "KeyError"), (0, "ValueError"), (0, "RuntimeError"))) -> Iterator[dict]:
    """Foreseen kinds are a line; others come with their traceback. All processes end."""
    for rank, kind in which:
        run = bench.start(f"error-{rank}-{kind}", fault=when(f"RANK == {rank} and step == 4", f"raise {kind}('of this rank alone')"), processes=2)
        seconds, code = run.seconds(), run.end()
        assert code == 1 and f"train.py: rank {rank}: " in run.errors() and "of this rank alone" in run.errors(), run.errors()
        assert seconds < 60, f"{seconds:.0f} s to stop"
        assert find_checkpoints(run.out)[-1].name == "step-000002", os.listdir(run.out / "checkpoints")
        yield {"how": f"{kind} in rank {rank}", "exit": code, "seconds": seconds, "message": run.message()}


@fault("an error that all ranks meet")
def error_in_all(bench: Bench) -> Iterator[dict]:
    bad = bench.folder / "bad.jsonl"
    bad.write_text((bench.demo / "rows.jsonl").read_text() + '{"query": "x"}\n')
    run = bench.start("bad", data=bad, processes=2)
    code = run.end()
    assert code == 1 and run.errors().count("bad.jsonl:601") == 1 and not run.out.exists(), run.errors()
    yield {"how": "a bad row: said once", "exit": code, "message": run.message()}


# The last process reads another file than the one that --data names.
READ_OTHER_ROWS = """
def other(read_source):
    def read_others(args, sources, *more):
        mark()
        return read_source(args, {path!r}, *more)
    return read_others
if RANK == 1:
    patch(load_data, "read_source", other)
"""


@fault("other data")
def other_data(bench: Bench, which: tuple = ("changed", "less")) -> Iterator[dict]:
    """Two rows of equal length change places between a stop and --resume; one process reads a row less than the others."""
    lines = (bench.demo / "rows.jsonl").read_text().splitlines()
    path = bench.folder / "changing.jsonl"
    path.write_text("\n".join(lines))
    if "changed" in which:
        run = bench.stopped("changed", data=path)
        path.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
        refused = bench.start("changed", "LoRA", "--resume", data=path)
        assert refused.end() == 1 and "was made with other training rows" in refused.message(), refused.errors()
        path.write_text("\n".join(lines))
        bench.finish(run, data=path)
        losses(run.out)
        yield {"how": "two rows changed places before --resume: refused", "recomputed": 0, "exit": 1, "message": refused.message()}
    if "less" in which:
        path.write_text("\n".join(lines[1:]))
        run = bench.start("less", fault=READ_OTHER_ROWS.format(path=str(path)), processes=2)
        assert run.end() == 1, run.errors()
        [said] = [part for part in run.message().split(" / ") if "rank 1: this process has other training rows" in part]
        yield {"how": "a row less in one rank: refused", "exit": 1, "message": said}


# ---------------------------------------------------------------------------------------------------------------------


# The same sums in another order: another number of processes than the undisturbed run.
ANOTHER_ORDER = ("resumed on another number of processes", "uneven work")


def attempt(name: str, bench: Bench) -> list[dict]:
    """What came of one kind of fault; an assertion that failed is a result too."""
    made, began = [], time.perf_counter()
    try:
        for result in FAULTS[name](bench):
            assert result.get("losses", 0) <= (1e-5 if name in ANOTHER_ORDER else 0), result
            made.append({"fault": name, **result})
            print(line(made[-1]), flush=True)
        assert made, "it cannot be made to happen on this machine"
    except Exception as error:                                               # whatever it is, the other faults are still tried
        made.append({"fault": name, "failed": f"{type(error).__name__}: {error}"[:300] + f" … {bench.runs[-1].errors()[:1500] if bench.runs else ''}"})
        print(f"FAILED {name}: {made[-1]['failed']}", flush=True)
    finally:
        bench.close()
    print(f"       {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return made


def line(result: dict) -> str:
    return "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" if key not in ("fault", "how") else str(value)
                     for key, value in result.items() if value is not None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--only", default="", help="faults whose name holds this text")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried beside each other")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/faults.json")
    args = parser.parse_args()
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    from examples.demo import write_demo
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(place)
        write_demo(folder / "demo", rows=600)
        shared = Bench(folder / "demo", folder / "whole")
        names = [name for name in FAULTS if args.only in name]
        benches = [Bench(folder / "demo", folder / str(i), shared) for i in range(len(names))]
        results = [result | {"commit": commit} for made in pool.map(attempt, names, benches) for result in made]
    failed = [result for result in results if "failed" in result]
    if args.save:
        path = ROOT / "benchmarks/results/faults.json"
        earlier = json.loads(path.read_text())["results"] if path.exists() else []
        results = [result for result in earlier if result["fault"] not in names] + results
        results.sort(key=lambda result: list(FAULTS).index(result["fault"]))
        path.write_text(json.dumps({"machine": f"CPU ({os.cpu_count()} cores), {platform.machine()}", "load": os.getloadavg()[2],
                                    "torch": torch.__version__, "results": results}, indent=2, ensure_ascii=False) + "\n")
    print(f"{len(results)} tried, {len(failed)} failed")
    sys.exit(bool(failed))
