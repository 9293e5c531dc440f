"""Real runs, really disturbed: one of each kind of fault that `make faults` tries with tests/faults.py, which asserts that losses and
weights are the same. All are started together, two at a time, as each has processes of its own and most wait a lot."""
from concurrent.futures import ThreadPoolExecutor

import faults
import pytest

# What of each kind is tried here; the others of its kind differ in place and mode.
TRIED = {
    faults.killed_in_a_save: {},
    faults.killed_in_a_removal: {},
    faults.damaged_checkpoint: {"which": [("state.json", faults.halve)], "and_all": False},
    faults.other_world: {"which": [("LoRA", 2, "LoRA", 1)]},
    faults.restarts: {"which": [(0, 6)]},
    faults.error_in_a_rank: {"which": [(1, "KeyError")]},
    faults.other_data: {"which": ["less"]},
    faults.uneven: {"which": [("LoRA", 2, 1)]},
}


@pytest.fixture(scope="module")
def tried(demo, tmp_path_factory):
    """What came of each of them, as a future."""
    folder = tmp_path_factory.mktemp("faults")
    shared = faults.Bench(demo, folder / "whole")
    benches = [shared, *(faults.Bench(demo, folder / fault.__name__, shared) for fault in TRIED)]
    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(lambda fault=fault, bench=bench: list(fault(bench, **TRIED[fault])))
               for fault, bench in zip(TRIED, benches[1:], strict=True)}
        for bench in benches:
            bench.close()


def result(tried, fault):
    [made] = tried[fault].result()
    return made


def test_a_run_killed_with_half_a_checkpoint_written_goes_on_from_the_one_before_to_the_same_losses_and_weights(tried):
    made = result(tried, faults.killed_in_a_save)
    assert made["losses"] == 0 and made["recomputed"] <= 2


def test_a_run_killed_while_an_old_checkpoint_was_being_removed_goes_on_from_the_newest(tried):
    assert result(tried, faults.killed_in_a_removal)["losses"] == 0


def test_a_damaged_checkpoint_gives_way_to_the_one_before_to_the_same_losses_and_weights(tried):
    made = result(tried, faults.damaged_checkpoint)
    assert made["losses"] == 0 and "step-000005 is damaged" in made["message"]


def test_a_rank_that_a_signal_stops_twice_stops_all_once_and_one_process_goes_on(tried):
    made = result(tried, faults.other_world)
    assert made["losses"] < 1e-5 and made["recomputed"] == 0


def test_torchrun_starts_a_killed_rank_0_anew_from_the_last_checkpoint(tried):
    made = result(tried, faults.restarts)
    assert made["losses"] == 0 and made["recomputed"] <= 3


def test_an_error_in_one_rank_names_it_and_ends_the_others(tried):
    assert "rank 1: Traceback" in result(tried, faults.error_in_a_rank)["message"]


def test_a_rank_that_reads_other_rows_than_rank_0_says_so_and_ends(tried):
    assert "rank 1: this process has other training rows (570 of" in result(tried, faults.other_data)["message"]


def test_rows_of_very_unequal_length_and_a_process_without_any_give_the_losses_of_one_process(tried):
    assert result(tried, faults.uneven)["losses"] < 1e-5


@pytest.mark.parametrize(("fault", "message"), [("sys.exit(0)", "the injected fault never took effect"),
                                                ('patch(train, "read_sources_of_old", lambda read: read)', "no attribute 'read_sources_of_old'")],
                         ids=["unreached", "renamed"])
def test_a_fault_that_took_no_effect_is_an_error(demo, tmp_path, fault, message):
    bench = faults.Bench(demo, tmp_path)
    with pytest.raises(AssertionError, match=message):
        bench.start("run", fault=fault).end()
