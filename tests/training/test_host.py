"""training/host.py: the memory settings that a CPU run starts with, and signals to stop."""
import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from test_train import flags

from training import host
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
        assert "--steps 0 stops here" in process.stdout.read() and process.wait() == 0
    assert all(setting in seen for setting in wanted)


def test_the_first_signal_is_noted_and_those_within_three_seconds_are_the_same(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    with host.StopSignal() as stop:
        assert not stop.received
        signal.raise_signal(signal.SIGTERM)
        now[0] += 2.9
        signal.raise_signal(signal.SIGINT)
        assert stop.received and stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_after_three_seconds_gets_the_handler_from_before(monkeypatch):
    now, received = [100.0], []
    monkeypatch.setattr(host.time, "monotonic", lambda: now[0])
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with host.StopSignal():
            signal.raise_signal(signal.SIGTERM)
            assert received == []
            now[0] += 3.1
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
