"""report/charts.py: lines stay true to their points, ticks are round numbers that enclose the values."""
import math

import pytest

from report.charts import MAX_POINTS, Line, downsample, line_chart, linear_ticks, log_ticks, running_mean


def test_the_running_mean_is_flatter_and_keeps_gaps_and_the_start():
    points = [(x, None if x == 7 else 5.0 + (-1) ** x) for x in range(600)]
    means = running_mean(points)
    assert [x for x, _ in means] == list(range(600)) and means[7][1] is None and means[0][1] == 6.0
    assert all(abs(y - 5) < 0.1 for _, y in means[20:])


def test_downsampling_keeps_the_lowest_and_the_highest_and_long_gaps():
    points = [(x, None if 500 <= x < 900 else math.sin(x)) for x in range(2_000)]
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS and set(kept) <= set(points) and kept == sorted(kept, key=lambda point: point[0])
    assert max(y for _, y in kept if y is not None) == max(y for _, y in points if y is not None)
    assert min(y for _, y in kept if y is not None) == min(y for _, y in points if y is not None)
    assert any(y is None for _, y in kept)
    assert downsample(points[:MAX_POINTS]) == points[:MAX_POINTS]


@pytest.mark.parametrize(("low", "high", "ticks"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (0, 7.3, [0, 2, 4, 6, 8]),
    (-3, 5, [-4, -2, 0, 2, 4, 6]),
    (0, 100, [0, 20, 40, 60, 80, 100]),
])
def test_linear_ticks_are_round_and_enclose_the_values(low, high, ticks):
    assert linear_ticks(low, high, 5) == pytest.approx(ticks)


def test_ticks_of_steps_are_whole_numbers():
    assert linear_ticks(0, 3, 5, min_distance=1) == [0, 1, 2, 3]


def test_log_ticks_are_powers_of_ten_with_more_between_them_if_they_are_few():
    assert log_ticks(0.5, 2_000) == [1, 10, 100, 1_000]
    assert log_ticks(0.5, 20) == [0.5, 1, 2, 5, 10, 20]


def test_a_chart_of_lines_without_values_is_empty():
    assert line_chart("Loss", "", [Line("a", "first", [(1, None)]), Line("b", "first", [])]) == ""
