"""training/run_log.py: a log that cannot be written says so."""
from pathlib import Path

import pytest

from training import run_log
from training.run_log import DivergenceCheck


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_with_the_log():
    with Path("/dev/full").open("ab", buffering=0) as log, pytest.raises(OSError, match=r"/dev/full: could not be written .*No space left.*make room"):
        run_log.write_record(log, {"step": 1})


def test_a_loss_that_rises_and_stays_high_is_reported_once():
    check = DivergenceCheck(steps=3)
    assert check.warning(5.0, 0.1) is None
    for loss in (9.0, 5.5, 9.0, 9.0):                           # one good step begins the count anew
        assert check.warning(loss, 0.1) is None
    assert "above 8.50 for 3 steps, and began at 5.00; a learning rate of 1.0e-01" in check.warning(8.5, 0.1)
    assert check.warning(9.0, 0.1) is None


def test_a_loss_a_little_above_its_first_value_is_no_reason_to_warn():
    check = DivergenceCheck(steps=3)
    assert all(check.warning(loss, 0.1) is None for loss in (0.3, 1.2, 1.1, 1.3, 1.29))
