"""benchmarks/lora.py: it runs from end to end where there is no GPU, and does not time what is wrong."""
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import INTERPRETED, ROOT, load

from ops.triton_utils import triton

CPU = torch.device("cpu")
PROGRAM = ROOT / "benchmarks" / "lora.py"


@pytest.fixture(scope="module")
def bench():
    return load(PROGRAM, "bench_lora")


@pytest.mark.slow
@pytest.mark.skipif(triton is None, reason="no Triton for this platform")
@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_every_way_that_can_run_here_is_right_and_timed(interpreted, bench, tmp_path):
    subprocess.run([sys.executable, PROGRAM, "--device", "cpu", "--tiny", "--rows", "20", "--rank", "4", "--out", tmp_path],
                   env=os.environ | {"TRITON_INTERPRET": interpreted}, check=True, capture_output=True)
    result = json.loads((tmp_path / "cpu_lora.json").read_text())
    cannot = () if interpreted == "1" else bench.BY_KERNEL
    assert result["rows"].keys() == {"20"} and result["rows"]["20"].keys() == bench.GROUPS.keys()
    for ways in result["rows"]["20"].values():
        assert ways.keys() == bench.WAYS.keys() - {"unfused, bf16, compiled"}
        for way, made in ways.items():
            assert "do not run" in made["failed"] if way in cannot else all(made[phase]["ms"] > 0 for phase in bench.PHASES), (way, made)


def test_a_way_that_is_wrong_is_not_timed(bench):
    group, clock = bench.TINY["qkv"], bench.Clock(CPU, 0)
    given = bench.operands(group, 32, 4, torch.float32, CPU)
    exact = bench.reference(group, *given, adapted=True)

    def keys(linear):
        return bench.measure(partial(bench.each, linear=linear), False, torch.float32, group, *given, exact, clock, (1.0, 1.0)).keys()

    assert keys(bench.unfused) >= set(bench.PHASES)
    last = torch.arange(32)[:, None] == 31
    assert keys(lambda *of: bench.unfused(*of) * 1.1) == {"wrong"}
    assert keys(lambda *of: torch.where(last, float("nan"), bench.unfused(*of))) == {"wrong"}
    assert keys(lambda x, weight, a, b: bench.unfused(x, weight, a, b + (b.detach() - b) / 2)) == {"wrong"}          # half of dB


@pytest.mark.skipif(triton is None, reason="no Triton for this platform")
@INTERPRETED
@pytest.mark.parametrize("tile", range(4))
def test_the_kernel_we_compare_with_is_right_in_each_configuration(tile, bench, monkeypatch, generator):
    sizes = {name: size for name, size in bench.TILES[tile].items() if name.isupper()}
    monkeypatch.setattr(bench._shrink_expand_kernel, "configs", [triton.Config(sizes)])
    for M, K, N, R in ((70, 150, 600, 5), (128, 128, 512, 16)):
        x, a, b = (torch.randn(*shape, generator=generator) for shape in ((M, K), (R, K), (N, R)))
        for got, exact in zip(bench.shrink_expand(x, a.T, b.T), (bench.SCALE * x @ a.T @ b.T, bench.SCALE * x @ a.T), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-3)
        dy = torch.randn(M, N, generator=generator)
        torch.testing.assert_close(bench.shrink_expand(dy, b, a)[0], bench.SCALE * dy @ b @ a, rtol=1e-4, atol=1e-2)
