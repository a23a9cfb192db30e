"""The histogram of `collab bench`: right within its promise, additive, and bounded."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_service.cli.histogram import Histogram

_times = st.lists(st.integers(0, 2**20) | st.integers(0, 2**63), min_size=1, max_size=200)


def histogram_of(times: list[int]) -> Histogram:
    """Return a histogram of these times."""
    histogram = Histogram()
    for time in times:
        histogram.add(time)
    return histogram


@given(_times, st.floats(0, 100))
def test_percentiles_are_those_of_the_sorted_list(times: list[int], percent: float) -> None:
    """A percentile is the value at its rank in the sorted list, within 0.4 %; both ends and the mean are exact."""
    histogram = histogram_of(times)
    rank = max(1, math.ceil(len(times) * percent / 100))
    assert histogram.percentile(percent) == pytest.approx(sorted(times)[rank - 1], rel=0.004, abs=0)
    assert histogram.percentile(0) == histogram.least == min(times)
    assert histogram.percentile(100) == histogram.most == max(times)
    assert histogram.count == len(times)
    assert histogram.mean == sum(times) / len(times)


@given(st.lists(_times | st.just([]), max_size=5))
def test_what_several_have_counted_adds_up(parts: list[list[int]]) -> None:
    """Merging is the same as counting everything in one place, in any order, with nothing at all as well."""
    together = Histogram()
    for part in parts:
        together.merge(histogram_of(part))
    assert together == histogram_of([time for part in reversed(parts) for time in part])


def test_memory_is_bounded() -> None:
    """However many different times there are, there are fewer than 7,500 buckets."""
    histogram = histogram_of(list(range(2_000)))
    numbers = random.Random(1)
    for _ in range(50_000):
        histogram.add(numbers.getrandbits(numbers.randint(1, 64)))
    assert len(histogram.buckets) < 7_500


def test_nothing_was_counted() -> None:
    """Without a time all figures are 0."""
    assert (Histogram().mean, Histogram().percentile(50), Histogram().percentile(100)) == (0, 0, 0)
