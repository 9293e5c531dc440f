"""A run's log: config.json, log.jsonl with one record a step, and what the console shows of them."""
from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import torch

from storage.atomic import atomic_file, read_json, write_json
from training.host import device_name, launch_id


def open_log(out: Path, step: int, flags: dict, device: torch.device, more: dict) -> FileIO:
    """Write out/config.json, and open out/log.jsonl to append records to.

    At step 0 the results of an earlier run in `out` are removed. Otherwise the log is cut back to the records
    up to `step`. Either way a header follows: flags, commit, versions, device and `more`.
    """
    lines = []
    if step:
        lines = _records_until(out / "log.jsonl", step)
    else:
        for folder in ("checkpoints", "adapter", "model", "calls"):
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / "report.html").unlink(missing_ok=True)
    write_json(out / "config.json", flags | {"launch": launch_id()})
    lines.append(json.dumps({
        "flags": flags,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
        **more,
        "resumed_at": step or None,
    }))
    with atomic_file(out / "log.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (out / "log.jsonl").open("ab", buffering=0)


def _records_until(log: Path, step: int) -> list[str]:
    """The log's lines up to a step, headers included."""
    if not log.exists():
        return []
    lines = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue                                  # cut short when the process was killed
        if record.get("step", 0) <= step:
            lines.append(line)
    return lines


def _commit() -> str | None:
    """This repository's commit, as `git describe` has it; None without git or a repository."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def write_record(log: FileIO | None, record: dict) -> None:
    """Append a record as a line.  Raises OSError naming the file.

    log: None in a process other than rank 0, which writes nothing.
    """
    if not log:
        return
    line = json.dumps(record).encode() + b"\n"
    try:
        if log.write(line) < len(line):
            raise OSError("the disk had room for only a part of the line")
    except OSError as error:
        remedy = "make room, then continue with --resume"
        raise OSError(f"{log.name}: could not be written ({error}); {remedy}") from None


def console_line(record: dict, total: int, seconds_left: float) -> str:
    """A step's record in one line.  total: steps of the run."""
    speed = record["tokens_per_second"]
    tokens_per_second = f"{speed / 1e3:.1f}k" if speed >= 1e4 else f"{speed:.0f}"
    return (f"step {record['step']:5d}/{total} | loss {record['loss']:.4f} | grad {record['grad_norm']:.2f} "
            f"| lr {record['lr']:.1e} | {tokens_per_second} tok/s | {record['peak_gib']:.1f} GiB | "
            f"{duration(seconds_left)} left")


def duration(seconds: float) -> str:
    """As 12s, 3m20s or 1h05m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class DivergenceCheck:
    """Finds out when the loss has risen by a nat above its first value and stays there."""

    def __init__(self, steps: int = 20) -> None:
        """steps: how long the loss must stay high."""
        self.first: float | None = None
        self.recent: deque[float] = deque(maxlen=steps)
        self.reported = False

    def warning(self, loss: float, lr: float) -> str | None:
        """The warning, once; None while all is well.  loss: of the step, in nats per token"""
        if self.first is None:
            self.first = loss
        self.recent.append(loss)
        is_high = len(self.recent) == self.recent.maxlen and min(self.recent) > self.first + 1
        if self.reported or not is_high:
            return None
        self.reported = True
        return (f"warning: the loss has been above {min(self.recent):.2f} for {len(self.recent)} steps, and "
                f"began at "
                f"{self.first:.2f}; a learning rate of {lr:.1e} is probably too high, start over with a "
                f"lower --lr")


def before_and_after(out: Path, table: Callable[[dict[str, dict]], str]) -> str:
    """Three answers of a run's first and last evaluation, and a table of both.

    table: {name: evaluation} → text (`inference.scoring.results_table`).
    """
    files = sorted((out / "calls").glob("step-*.json"))
    before, after = read_json(files[0]), read_json(files[-1])
    earlier = {answer["source"]: answer["text"] for answer in before["answers"]}
    samples = []
    for answer in after["answers"][:3]:
        samples.append(f"  query   {answer['query']!r}\n"
                       f"  wanted  {json.dumps(answer['expected'], ensure_ascii=False)}\n"
                       f"  before  {earlier.get(answer['source'], '')[:200]!r}\n"
                       f"  after   {answer['text'][:200]!r}")
    return "\n\n".join([*samples, table({"before": before, "after": after})])
