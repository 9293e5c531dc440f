"""ops/graph_capture.py: the sizes that graphs are recorded for."""
from ops.graph_capture import size_for


def test_sizes_are_few_and_little_larger():
    for steps in (2, 8):
        sizes = [size_for(count, steps) for count in range(1, 40_000)]
        assert all(count <= size < max(count + 64, count * (1 + 1 / steps)) for count, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes) and len(set(sizes)) < 10 * (steps + 1)
