"""benchmarks/correctness.py: every case runs and is right under the interpreter, and what is wrong is called so."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import INTERPRETED, ROOT, load

pytestmark = INTERPRETED
PROGRAM = ROOT / "benchmarks" / "correctness.py"


@pytest.fixture(scope="module")
def bench():
    return load(PROGRAM, "bench_correctness")


@pytest.fixture
def case(bench):
    [make] = [make for name, make in bench.cases() if name == "norm + residual"]
    return make(bench.Draw(torch.device("cpu"), torch.float16), bench.TINY)


@pytest.mark.slow
def test_every_kernel_is_as_accurate_as_its_definition(bench, tmp_path):
    made = subprocess.run([sys.executable, PROGRAM, "--device", "cpu", "--tiny", "--out", tmp_path],
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    result = json.loads((tmp_path / "cpu_correctness.json").read_text())
    names = [name for name, _ in bench.cases()]
    assert list(result["cases"]) == names and f"{len(names)} cases, 0 not right" in made.stdout
    assert all(0 < made["ratio"] <= 2 for made in result["cases"].values())
    for name, tensors in (("LoRA qkv", 7), ("LoRA MLP", 7), ("attention, local, shared prefix", 3), ("cross-entropy, trained head", 2)):
        assert len([key for key in result["cases"][name]["errors"] if key.startswith("d ")]) == tensors, name


@pytest.mark.parametrize(("broken", "where"), [
    (lambda y, x: y * 1.01, "output 0"), (lambda y, x: torch.empty_like(y) + 0 * x, "output 0"), (lambda y, x: y.detach() + 0 * x, "d x"),
    (lambda y, x: y + (x - x.detach()) / 9, "d x")], ids=["scaled", "unwritten", "without gradient", "another gradient"])
def test_a_kernel_that_is_wrong_is_called_so(broken, where, bench, case):
    assert "wrong" not in bench.compare(case)
    wrong = replace(case, kernel=lambda x, weight, residual: broken(case.kernel(x, weight, residual) + 0 * residual, x) + 0 * residual)
    assert where in bench.compare(wrong)["wrong"]


def test_a_sum_in_fp32_may_be_made_in_another_order_and_no_more(bench):
    x = torch.randn(50, dtype=torch.float64).float()
    for off, right in ((1e-6, True), (1e-4, False)):
        case = bench.Case(lambda x, off=off: x * (1 + off), lambda x: x * 1, {"x": x}, ["x"])
        assert ("wrong" not in bench.compare(case)) == right


def test_the_cases_after_a_lost_context_run_in_a_new_process(bench, tmp_path):
    """Two cases end the context; the program goes on after each."""
    program = f"""
import sys; sys.argv[0] = {str(tmp_path / "again.py")!r}
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import argparse, correctness
ended = []
def check(name, *_):
    print(name, flush=True)
    ended.append(name in ("b", "d"))
    return {{"failed": "illegal address"}} if ended[-1] else {{"ratio": 1.0}}
correctness.cases = lambda: [(name, None) for name in "abcde"]
correctness.check, correctness.context_is_lost = check, lambda device: ended[-1]
sys.exit(correctness.main(argparse.Namespace(device="cpu", tiny=True, only="", go_on="--go-on" in sys.argv, out={str(tmp_path)!r}, save=False)))
"""
    (tmp_path / "again.py").write_text(program)
    made = subprocess.run([sys.executable, tmp_path / "again.py"], capture_output=True, text=True)
    assert made.returncode == 1 and made.stdout.split() == [*"abcde", *"5 cases, 2 not right: b; d".split()], made.stderr
    assert list(json.loads((tmp_path / "cpu_correctness.json").read_text())["cases"]) == list("abcde")
