"""All that there is to learn from a GPU that is lent for minutes, in one call, the most telling first.

    make gpu                                        # nine minutes; JSON in benchmarks/results/gpu
    make gpu PYTHON=python3 FLAGS="--out DIR"       # by another interpreter; nothing is installed
    make gpu FLAGS="--out DIR --continue"           # another call: what the one that wrote DIR did not finish
    make gpu FLAGS="--tiny --out DIR"               # on a CPU, with small shapes: does every part run?

Each part is a program of its own, with its own limit, so that one that crashes or hangs harms no other. What
it measures it writes to DIR at once; what it prints goes to DIR/log. DIR/summary.json has each part's begin,
end, exit code and last lines, and the table that ends the call shows them. `python benchmarks/tables.py` then
writes the README's tables. Where git is not at hand, $COMMIT names the code that is measured.
"""
from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clock import conditions  # noqa: E402
from tables import GPU_RESULTS  # noqa: E402

LEAST_SECONDS = 10      # a part that would have less is left for another call
SHOWN_LINES = 5         # of a part's output, in the table at the end


@dataclass(frozen=True)
class Part:
    """A program of this checkout.  tiny: its arguments with --tiny; None where it needs a GPU."""

    name: str
    limit: float                                # seconds
    program: str
    arguments: tuple[str, ...] = ()
    tiny: tuple[str, ...] | None = ("--tiny",)
    results: bool = True                        # it takes --out
    under: tuple[str, ...] = ()                 # a program that runs it, with its flags


FULL_SIZE = ("--rows", "16896", "--compile-rows", "none", "--milliseconds", "20")
WITH_XDIST = ("-n", "12", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
FEW_PROMPTS = ("--prompts", "3", "--repeats", "1")
GPU_TESTS = ("pytest", "-m", "gpu", "-p", "no:cacheprovider", "--tb=short", *WITH_XDIST)
SMALL_STEP = ("--tiny", "--tokens", "300", "--steps", "2")
PARTS = (
    Part("ceilings", 40, "benchmarks/clock.py", tiny=()),
    Part("correctness", 120, "benchmarks/correctness.py"),
    Part("training", 80, "benchmarks/train_on_gpu.py"),
    Part("ladder", 150, "benchmarks/step.py", ("--parts", "ladder", "--continue"), SMALL_STEP),
    Part("floors", 80, "benchmarks/floors.py", tiny=("--tiny", "--milliseconds", "0")),
    Part("profile", 40, "benchmarks/profile_step.py", tiny=("--tiny", "--tokens", "300")),
    Part("lora", 75, "benchmarks/lora.py", FULL_SIZE, ("--tiny", "--rows", "20", "--rank", "4")),
    Part("attention", 40, "benchmarks/attention.py", ("--without", "flex")),
    Part("peers", 150, "benchmarks/step.py", ("--parts", "peers", "--few-peers", "--continue"), SMALL_STEP),
    Part("sizes", 90, "benchmarks/step.py", ("--parts", "sizes", "--continue"), SMALL_STEP),
    Part("decode", 90, "benchmarks/decode.py", FEW_PROMPTS, ("--tiny", "--tokens", "8")),
    Part("memory accesses", 150, "benchmarks/correctness.py", ("--tiny",), None, False,
         ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99")),
    Part("tests", 240, "-m", GPU_TESTS, None, False),
)


def command(part: Part, out: Path, tiny: bool) -> list[str]:
    program = part.program if part.program.startswith("-") else str(ROOT / part.program)
    to = ("--out", str(out)) if part.results else ()
    return [*part.under, sys.executable, program, *part.arguments, *to, *(part.tiny or () if tiny else ())]


def obstacle(part: Part, tiny: bool) -> str:
    """Why a part cannot run here; "" where it can."""
    if tiny and part.tiny is None:
        return "it needs a CUDA device"
    return f"{part.under[0]} is not installed" if part.under and not shutil.which(part.under[0]) else ""


def environment(folder: str, tiny: bool, part: Part) -> dict[str, str]:
    """Of a part. All keep what they compile, and what they chose by timing, in one folder for this call."""
    made = os.environ | {
        "TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "NANO_FUNCTIONGEMMA_CACHE": f"{folder}/cache", "OMP_NUM_THREADS": "1" if tiny else "4",
        "PYTHONUNBUFFERED": "1", "GLIBC_TUNABLES": "", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        made["TRITON_INTERPRET"] = "1"
    if part.under:                              # each tensor is an allocation of its own, with borders
        made["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return made


def run(part: Part, out: Path, tiny: bool, seconds: float, folder: str) -> dict:
    """Run a part for at most so many seconds.

    Returns its status ("ok", "failed" or "timed out"), exit code and last lines.
    """
    said = out / "log" / f"{part.name.replace(' ', '_')}.txt"
    with said.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command(part, out, tiny), cwd=ROOT, env=environment(folder, tiny, part), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = "failed" if process.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            stop_group(process)
    lines = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"status": status, "exit": process.returncode, "last_lines": [line[:300] for line in lines[-20:]]}


def stop_group(process: subprocess.Popen) -> None:
    """End a process and all that it started: politely first, where it still runs itself."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Summary:
    """OUT/summary.json, whole at every moment: conditions, and what became of each part."""

    def __init__(self, out: Path, about: dict, go_on: bool) -> None:
        self.file = out / "summary.json"
        earlier = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        same = all(earlier.get(key) == about[key] for key in ("device", "versions", "tiny"))
        if earlier and not (go_on and same):
            whose = "another device or other versions" if go_on else "an earlier call"
            print(f"{out}: results of {whose} are removed")
            for file in out.glob("*.json"):
                file.unlink()
        self.about, self.parts = about, earlier.get("parts", {}) if go_on and same else {}
        (out / "log").mkdir(parents=True, exist_ok=True)

    def add(self, name: str, made: dict) -> None:
        self.parts[name] = made
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.about | {"parts": self.parts}, indent=2) + "\n", encoding="utf-8")
        part.replace(self.file)

    def is_ok(self, name: str) -> bool:
        return self.parts.get(name, {}).get("status") == "ok"

    def table(self) -> Iterator[str]:
        for name, made in self.parts.items():
            when = made.get("why", "")
            if "began" in made:
                when = f"{made['began']:4.0f} to {made['ended']:4.0f} s, exit {made['exit']}"
            yield f"{name:16} {made['status']:11} {when}"
            yield from (f"    {line[:150]}" for line in made.get("last_lines", [])[-SHOWN_LINES:])


def run_all(parts: Sequence[Part], summary: Summary, out: Path, tiny: bool, seconds: float) -> None:
    """The parts that are not finished yet, those first that have not begun, until the time is over."""
    began, on_cpu = time.monotonic(), not torch.cuda.is_available()
    left = [part for part in parts if not summary.is_ok(part.name)]
    left.sort(key=lambda part: "exit" in summary.parts.get(part.name, {}))
    with tempfile.TemporaryDirectory(prefix="nano-functiongemma-") as folder:
        for part in left:
            now = time.monotonic() - began
            if why := obstacle(part, tiny):
                summary.add(part.name, {"status": "left out", "why": why})
            elif seconds - now < LEAST_SECONDS:
                summary.parts.setdefault(part.name, {"status": "not reached"})
                summary.add(part.name, summary.parts[part.name])
            else:
                print(f"=== {now:4.0f} s: {part.name}", flush=True)
                limit = seconds - now if on_cpu else min(part.limit, seconds - now)     # those are a GPU's
                made = run(part, out, tiny, limit, folder)
                made |= {"limit": limit, "began": now, "ended": time.monotonic() - began}
                summary.add(part.name, made | {"commit": summary.about["commit"]})


def main(args: argparse.Namespace, parts: Sequence[Part] = PARTS) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("gpu.py: no CUDA device here; --tiny --out DIR shows on a CPU whether everything runs")
    if args.tiny and not args.out:
        sys.exit("gpu.py: --tiny measures nothing of worth; give it a folder of its own by --out DIR")
    names = args.parts.split(",") if args.parts else [part.name for part in parts]
    if unknown := set(names) - {part.name for part in parts}:
        known = ", ".join(part.name for part in parts)
        sys.exit(f"gpu.py: no part is called {', '.join(sorted(unknown))}; there are {known}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))      # `run` ends the part
    out = Path(args.out or GPU_RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary(out, conditions(device) | {"tiny": args.tiny}, args.go_on)
    chosen = [part for part in parts if part.name in names]
    run_all(chosen, summary, out, args.tiny, args.seconds)
    print("\n".join(summary.table()))
    states = {part.name: summary.parts[part.name]["status"] for part in chosen}
    unfinished = [name for name, status in states.items() if status not in ("ok", "left out")]
    print(f"not finished: {', '.join(unfinished) or 'nothing'}; results in {out}")
    return 1 if unfinished else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="the call ends after so long")
    parser.add_argument("--out", help="folder of the results, instead of benchmarks/results/gpu")
    parser.add_argument("--continue", dest="go_on", action="store_true", help="what an earlier call left")
    parser.add_argument("--parts", help=f"these alone, of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too")
    sys.exit(main(parser.parse_args()))
