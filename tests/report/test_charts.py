"""report/charts.py: lines stay true to their points."""
from report.charts import running_mean


def test_the_running_mean_is_flatter_and_keeps_gaps_and_the_start():
    points = [(x, None if x == 7 else 5.0 + (-1) ** x) for x in range(600)]
    means = running_mean(points)
    assert [x for x, _ in means] == list(range(600)) and means[7][1] is None and means[0][1] == 6.0
    assert all(abs(y - 5) < 0.1 for _, y in means[20:])
