"""benchmarks/step.py runs from end to end on a CPU, and each rung of its ladder and each peer reaches the same losses."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_ladder_and_the_peers_run_and_agree(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), "--device", "cpu", "--tiny", "--tokens", "300", "--steps", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = json.loads((tmp_path / "cpu_step.json").read_text())
    rungs = [rung for name, rung in made["ladder"].items() if name != "every parameter"]
    assert len(rungs) == 6 and not any("failed" in rung for rung in made["ladder"].values())
    for rung in rungs:
        assert rung["losses"] == pytest.approx(rungs[0]["losses"], rel=1e-3) and rung["tokens_per_second"] > 0
    assert len(made["peers"]) == 3 and not any("failed" in peer for peer in made["peers"].values())
    for name, peer in made["peers"].items():
        same = made["ladder"]["every parameter"] if name == "full" else rungs[0]
        assert peer["losses"] == pytest.approx(same["losses"], rel=1e-3)
        assert peer["grad_norms"] == pytest.approx(same["grad_norms"], rel=5e-2) and min(peer["grad_norms"]) > 0
