"""What many measurements come to."""

import statistics
from collections.abc import Callable, Sequence

from tests.bench.live import Delays

REPEATS = 3


def percentiles(milliseconds: Sequence[float]) -> Delays:
    """Return what is typical of some delays."""
    ordered = sorted(milliseconds)
    return Delays(ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])


def medians_in_turn(*runs: Callable[[], float], repeats: int = REPEATS) -> list[float]:
    """Return the medians of runs that are made in turn, so that what else the machine does hits them all."""
    found = [[run() for run in runs] for _ in range(repeats)]
    return [statistics.median(values) for values in zip(*found, strict=True)]
