"""training/run_log.py: a log that cannot be written says so."""
from pathlib import Path

import pytest

from training import run_log


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_with_the_log():
    with Path("/dev/full").open("ab", buffering=0) as log, pytest.raises(OSError, match=r"/dev/full: could not be written .*No space left.*make room"):
        run_log.write_record(log, {"step": 1})
