"""training/host.py: the memory settings that a CPU run starts with."""
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from test_train import flags

from training.host import PRIMITIVE_CACHES


def test_on_a_cpu_the_program_starts_again_with_memory_it_keeps(demo, tmp_path):
    """Once, in the same process, with the same flags."""
    command = [sys.executable, str(ROOT / "train.py"), *flags(demo, tmp_path / "run", "--steps", 0)]
    environment = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", *PRIMITIVE_CACHES)}
    environment["LRU_CACHE_CAPACITY"] = "77"                                          # the user's own is left
    wanted = {"glibc.malloc.hugetlb=1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY=256", "LRU_CACHE_CAPACITY=77"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        seen = ""
        while process.poll() is None and "glibc.malloc.hugetlb=1" not in seen:
            seen = Path(f"/proc/{process.pid}/environ").read_text() if sys.platform == "linux" else str(wanted)
        assert "ready" in process.stdout.read() and process.wait() == 0
    assert all(setting in seen for setting in wanted)
