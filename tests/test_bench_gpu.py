"""make gpu: limits, what a second call does, and a dry run of every part on a CPU."""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import INTERPRETED, ROOT, load

NOTHING = {"device": "a card", "versions": {}, "commit": "abc"}


@pytest.fixture(scope="module")
def bench():
    return load(ROOT / "benchmarks" / "gpu.py", "bench_gpu")


@pytest.fixture
def part(bench, tmp_path):
    """A part that is a few lines of Python; it adds its name to the file `ran`."""
    def make(name, code="", limit=30.0, **more):
        program = tmp_path / f"{name}.py"
        program.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n{code}\n")
        return bench.Part(name, limit, str(program), **{"tiny": (), "results": False, **more})
    return make


@pytest.fixture
def call(bench, tmp_path, monkeypatch):
    """(parts, flags) → exit code, statuses and the parts that ran."""
    monkeypatch.setattr(bench, "LEAST_SECONDS", 0.1)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)         # so that limits hold
    monkeypatch.setattr(bench, "conditions", lambda device: dict(NOTHING))

    def run(*parts, seconds=60.0, go_on=False, names=None):
        (tmp_path / "ran").unlink(missing_ok=True)
        args = argparse.Namespace(seconds=seconds, out=str(tmp_path / "out"), go_on=go_on, parts=names, tiny=True)
        code = bench.main(args, parts)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        ran = (tmp_path / "ran").read_text().split() if (tmp_path / "ran").exists() else []
        return code, {name: made["status"] for name, made in summary["parts"].items()}, ran
    return run


def is_dead(process):
    """Gone, or waiting for its parent to notice, within five seconds."""
    for _ in range(50):
        try:
            os.kill(process, 0)
            state = (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_part_that_fails_or_hangs_harms_no_other(call, part, tmp_path, capsys):
    child = "import subprocess, sys, time\n" \
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n" \
            f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n" \
            "print('so far', flush=True); time.sleep(60)"
    began = time.monotonic()
    code, statuses, ran = call(part("crashes", "import os; print('last words', flush=True); os.abort()"),
                               part("hangs", child, limit=4.0), part("works", "print('a figure')"))
    assert (code, ran) == (1, ["crashes", "hangs", "works"])
    assert statuses == {"crashes": "failed", "hangs": "timed out", "works": "ok"}
    assert time.monotonic() - began < 40
    assert is_dead(int((tmp_path / "child").read_text()))       # the process that the hanging part started
    said = capsys.readouterr().out
    assert all(words in said for words in ("last words", "so far", "a figure", "not finished: crashes, hangs;"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["parts"]["crashes"]["exit"] == -6 and summary["device"] == "a card"
    assert summary["parts"]["works"] == summary["parts"]["works"] | {"exit": 0, "last_lines": ["a figure"], "commit": "abc"}
    assert summary["parts"]["hangs"]["began"] < summary["parts"]["hangs"]["ended"]


def test_a_call_that_is_ended_ends_its_part(tmp_path):
    program = f"""
import sys, time; sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import argparse, gpu
gpu.conditions = lambda device: {NOTHING!r}
gpu.torch.cuda.is_available = lambda: True
args = argparse.Namespace(seconds=60.0, out={str(tmp_path / "out")!r}, go_on=False, parts=None, tiny=True)
gpu.main(args, [gpu.Part("waits", 60, "-c", ({f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"!r},),
                         (), False)])
"""
    call = subprocess.Popen([sys.executable, "-c", program])
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert call.poll() is None
        time.sleep(0.1)
    call.terminate()
    assert call.wait() == 143 and is_dead(int((tmp_path / "child").read_text()))


def test_no_part_begins_after_the_deadline_and_each_ends_with_it(call, part):
    code, statuses, ran = call(part("long", "import time; time.sleep(30)"), part("late"), seconds=3.0)
    assert (code, ran) == (1, ["long"]) and statuses == {"long": "timed out", "late": "not reached"}


def test_another_call_goes_on_with_what_is_left_and_those_first_that_have_not_begun(call, part, tmp_path):
    fails = part("fails", f"import os; assert os.path.exists({str(tmp_path / 'mended')!r})")
    slow = part("slow", f"import os, time; time.sleep(0 if os.path.exists({str(tmp_path / 'mended')!r}) else 60)")
    parts = part("done"), fails, slow, part("late")
    assert call(*parts, seconds=6.0)[1] == {"done": "ok", "fails": "failed", "slow": "timed out", "late": "not reached"}
    (tmp_path / "mended").touch()
    code, statuses, ran = call(*parts, go_on=True)
    assert (code, ran) == (0, ["late", "fails", "slow"]) and set(statuses.values()) == {"ok"}
    assert call(*parts, go_on=True) == (0, statuses, [])
    (tmp_path / "out" / "step.json").touch()
    assert call(*parts)[2] == ["done", "fails", "slow", "late"]                 # anew, and without what was there
    assert not (tmp_path / "out" / "step.json").exists()


def test_results_of_another_device_are_not_gone_on_with(call, part, tmp_path, monkeypatch, bench):
    call(part("one"))
    monkeypatch.setattr(bench, "conditions", lambda device: NOTHING | {"device": "another card"})
    assert call(part("one"), go_on=True)[2] == ["one"]


def test_what_cannot_run_here_is_left_out_and_said(call, part, capsys):
    code, statuses, ran = call(part("sanitized", under=("no-such-program",)), part("gpu", tiny=None), part("works"))
    assert (code, ran, statuses) == (0, ["works"], {"sanitized": "left out", "gpu": "left out", "works": "ok"})
    said = capsys.readouterr().out
    assert "no-such-program is not installed" in said and "it needs a CUDA device" in said


@pytest.mark.parametrize(("flags", "message"), [
    (["--tiny"], "give it a folder of its own"), (["--tiny", "--out", "{}", "--parts", "ceilings,dreams"], "no part is called dreams")])
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path):
    made = subprocess.run([sys.executable, ROOT / "benchmarks/gpu.py", *(flag.format(tmp_path) for flag in flags)],
                          capture_output=True, text=True)
    assert made.returncode == 1 and message in made.stderr


def test_gpu_and_gpu_tests_install_nothing():
    for target in ("gpu", "test-gpu"):
        said = subprocess.run(["make", "-n", "PYTHON=python3", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "python3 " in said and "pip" not in said and "venv" not in said, said


@pytest.mark.slow
@INTERPRETED
def test_every_part_runs_on_a_cpu(tmp_path):
    """The parts that other tests do not run from end to end."""
    parts = "ceilings,training,floors,profile,decode,memory accesses,tests"
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"FLAGS=--tiny --out {tmp_path} --parts '{parts}'"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(name, part["status"]) for name, part in summary["parts"].items()] == [
        *((name, "ok") for name in parts.split(",")[:5]), ("memory accesses", "left out"), ("tests", "left out")]
    found = {name: json.loads((tmp_path / f"cpu_{name}.json").read_text()) for name in ("ceilings", "training", "floors", "profile")}
    assert found["ceilings"]["peak_tflops"] > 0 and found["ceilings"]["peak_gb_a_second"] > 0
    assert len(found["training"]["runs"]) == 4 and all(len(run["loss"]) == 3 for run in found["training"]["runs"].values())
    assert all(run["largest_difference"] == [0, 0] for run in found["training"]["runs"].values())
    kernels = found["floors"]["kernels"]
    assert len(kernels) == 23 and not any("failed" in row for row in kernels.values())
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in kernels.values())
    assert found["profile"]["launches"] > 100 and found["profile"]["gpu_ms"] > 0
    assert json.loads((tmp_path / "cpu_decode.json").read_text())["weights"] == "random"
