"""benchmarks/tables.py: a GPU's tables say what was measured, and nothing where nothing was."""
import json

import pytest
from conftest import ROOT, load

ABOUT = {"device": "A Card", "versions": {"torch": "2.0", "numpy": "1"}, "commit": "abc", "tiny": False}
PEAKS = {"peak_tflops": 800.0, "peak_gb_a_second": 3000.0}


def row(tokens_per_second, **more):
    return {"tokens_per_second": tokens_per_second, "seconds": 16_896 / tokens_per_second, "mfu": 0.25, "peak_gib": 5.04} | more


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The module, whose GPU results are in a temporary folder."""
    module = load(ROOT / "benchmarks" / "tables.py", "bench_tables")
    monkeypatch.setattr(module, "GPU_RESULTS", tmp_path)
    return module


@pytest.fixture
def results(tmp_path):
    def write(**found):
        for name, result in found.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(ABOUT | result))
    return write


def lines(tables):
    return tables.tables()["gpu"].splitlines()


def test_without_results_it_says_so_and_names_the_command(tables):
    assert lines(tables) == [tables.NO_GPU] and "`make gpu`" in tables.NO_GPU


def test_a_dry_run_and_a_cpu_give_no_figures(tables, results, tmp_path):
    step = {"tokens": 16_896, "ladder": {"a": row(1e5)}, "peers": {}, "sizes": {}}
    results(summary={"tiny": True}, step=step)
    assert lines(tables) == [tables.NO_GPU]
    results(summary={"tiny": False}, step=step | {"device": "CPU (2 threads)"})
    assert lines(tables) == [tables.NO_GPU]
    results(step=step)
    assert lines(tables)[2].startswith("| a | 100.0k")


def test_a_step_s_rows_have_speed_share_of_the_floor_and_our_lead(tables, results):
    results(floors={"step_floor_ms": 16.896, "step_kernels_ms": 30.0, "kernels": {}, **PEAKS}, step={
        "tokens": 16_896, "sizes": {"1024": row(5e4), "4096": {"failed": "out of memory"}},
        "ladder": {"PyTorch": row(1e5), "+ norms": row(4e5), "+ loss": row(9e5, wrong="loss 1 nats from fp32"),
                   "every parameter": row(2e5)},
        "peers": {"theirs": row(5e4), "faster, but wrong": row(8e5, wrong="losses of tokens"), "gone": {"failed": "ImportError: x"},
                  "every parameter: theirs": row(1e5, mfu=None)}})
    made = lines(tables)
    assert made[2:11] == [
        "| PyTorch | 100.0k | 169.0 | 25% | 5.0 | 10% |  |", "| + norms | 400.0k | 42.2 | 25% | 5.0 | 40% |  |",
        "| + loss | wrong | | | | | |", "| every parameter | 200.0k | 84.5 | 25% | 5.0 |  |  |",
        "| theirs | 50.0k | 337.9 | 25% | 5.0 |  | 8.0 × |", "| faster, but wrong | wrong | | | | | |", "| gone | failed | | | | | |",
        "| every parameter: theirs | 100.0k | 169.0 |  | 5.0 |  | 2.0 × |", ""]
    assert "A Card, torch 2.0, commit abc; `python benchmarks/step.py --save`" in made[11]
    assert "| 1,024 | 50.0k | 337.9 | 25% | 5.0 |" in made and not any("4,096" in line for line in made)


def test_kernels_stand_by_the_time_they_take_of_a_step(tables, results):
    kernels = {"small": {"count": 10, "ms": 0.01, "floor_ms": 0.005}, "large": {"count": 2.1, "ms": 1.0, "floor_ms": 0.8},
               "none": {"count": 1, "floor_ms": 1.0, "failed": "x"}}
    results(floors={"kernels": kernels, "step_floor_ms": 2.73, "step_kernels_ms": 2.2, **PEAKS})
    assert lines(tables)[2:4] == ["| large | 2 | 1000 | 800 | 80% |", "| small | 10 | 10 | 5 | 50% |"]
    assert "floor 2.7 ms, by 800 TFLOP/s and 3000 GB/s measured; A Card" in lines(tables)[5]
