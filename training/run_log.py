"""A run's log: config.json, log.jsonl with a record a step, the console's line of it, and the run's result in words."""
from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from storage.atomic import read_json, whole_file, write_json
from training.host import device_name
from training.run_folder import launch


def open_log(out: Path, step: int, flags: dict, device: torch.device, more: dict):
    """out/config.json and out/log.jsonl, cut back to the records up to `step`; the first line says what ran on what."""
    lines = []
    if step:
        earlier = (out / "log.jsonl").read_text(encoding="utf-8", errors="replace") if (out / "log.jsonl").exists() else ""
        for line in earlier.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue                                  # the line that a kill tore
            if record.get("step", 0) <= step:
                lines.append(line)
    else:
        for folder in ("checkpoints", "adapter", "model", "calls"):
            shutil.rmtree(out / folder, ignore_errors=True)
        (out / "report.html").unlink(missing_ok=True)
    write_json(out / "config.json", flags | {"launch": launch()})
    try:
        git = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    lines.append(json.dumps({"flags": flags, "commit": commit.strip() or None, "python": platform.python_version(),
                             "torch": torch.__version__, "device": device_name(device), **more, "resumed_at": step or None}))
    with whole_file(out / "log.jsonl") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return (out / "log.jsonl").open("ab", buffering=0)


def write(log, record: dict) -> None:
    if not log:
        return
    line = json.dumps(record).encode() + b"\n"
    try:
        if log.write(line) < len(line):
            raise OSError("only a part of the line found room")
    except OSError as error:
        raise OSError(f"{log.name}: could not be written ({error}); make room, then go on with --resume") from None


def console_line(record: dict, total: int, seconds_left: float) -> str:
    speed = record["tokens_per_second"]
    minutes, seconds = divmod(round(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
    return (f"step {record['step']:5d}/{total} | loss {record['loss']:.4f} | grad {record['grad_norm']:.2f} | lr {record['lr']:.1e} | "
            f"{f'{speed / 1e3:.1f}k' if speed >= 1e4 else f'{speed:.0f}'} tok/s | {record['peak_gib']:.1f} GiB | {left} left")


def before_and_after(out: Path, table: Callable[[dict], str]) -> str:
    """The first and the last evaluation of a run side by side, and three of its answers."""
    files = sorted((out / "calls").glob("step-*.json"))
    before, after = read_json(files[0]), read_json(files[-1])
    earlier = {answer["source"]: answer["text"] for answer in before["answers"]}
    samples = [f"  query   {a['query']!r}\n  wanted  {json.dumps(a['expected'], ensure_ascii=False)}\n"
               f"  before  {earlier.get(a['source'], '')[:200]!r}\n  after   {a['text'][:200]!r}" for a in after["answers"][:3]]
    return "\n\n".join([*samples, table({"before": before, "after": after})])
