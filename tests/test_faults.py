"""Real runs, really disturbed: a part of what `make faults` tries with tests/faults.py, which asserts that losses and weights are the same."""
import pytest
from faults import Bench, error_in_a_rank, killed_in_a_save, other_world, restarts, uneven


@pytest.fixture(scope="module")
def bench(demo, tmp_path_factory):
    bench = Bench(demo, tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


def test_a_run_killed_with_half_a_checkpoint_written_goes_on_from_the_one_before_to_the_same_losses_and_weights(bench):
    [result] = killed_in_a_save(bench)
    assert result["losses"] == 0 and result["recomputed"] <= 2


def test_a_rank_that_a_signal_stops_twice_stops_all_once_and_one_process_goes_on(bench):
    [result] = other_world(bench, [("LoRA", 2, "LoRA", 1)])
    assert result["losses"] < 1e-5 and result["recomputed"] == 0


def test_torchrun_starts_a_killed_rank_0_anew_from_the_last_checkpoint(bench):
    [result] = restarts(bench, [(0, 6)])
    assert result["losses"] == 0 and result["recomputed"] <= 3


def test_an_error_in_one_rank_names_it_and_ends_the_others(bench):
    [result] = error_in_a_rank(bench, [(1, "KeyError")])
    assert "rank 1: Traceback" in result["message"]


def test_rows_of_very_unequal_length_and_a_process_without_any_give_the_losses_of_one_process(bench):
    [result] = uneven(bench, [("LoRA", 2, 1)])
    assert result["losses"] < 1e-5
