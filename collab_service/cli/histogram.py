"""A histogram of times in bounded memory, whatever their number, that adds up over processes.

Its buckets are those of HdrHistogram (http://hdrhistogram.org): 128 of equal width from each power of two to the next,
so that none is wider than 1/128 of the times in it. Below 256 each time has a bucket of its own.
"""

import math
from dataclasses import dataclass, field

_BITS = 8
"""Leading binary digits that a bucket tells apart."""


@dataclass(slots=True)
class Histogram:
    """How often which time was seen. Times are integers from 0 on, in any unit; here nanoseconds."""

    buckets: dict[int, int] = field(default_factory=dict)
    """How many times fell into each bucket; those with none are left out. Fewer than 7,500 for times of 64 bits."""
    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    def add(self, time: int) -> None:
        """Count a time."""
        shift = time.bit_length() - _BITS
        bucket = time if shift <= 0 else (shift << (_BITS - 1)) + (time >> shift)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        if time > self.most:
            self.most = time
        if time < self.least or not self.count:
            self.least = time
        self.count += 1
        self.total += time

    def merge(self, other: "Histogram") -> None:
        """Count all that another has counted."""
        if not other.count:
            return
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count
        self.least = min(self.least, other.least) if self.count else other.least
        self.most = max(self.most, other.most)
        self.count += other.count
        self.total += other.total

    @property
    def mean(self) -> float:
        """The mean, exactly; 0 when nothing was counted."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, percent: float) -> float:
        """Return the least time that so many percent of the times do not exceed, within 0.4 %.

        Args:
            percent: From 0 to 100; 0 is the shortest time and 100 the longest, both exact. 0 when nothing was counted.
        """
        rank = max(1, math.ceil(self.count * percent / 100))
        if rank == 1:
            return self.least
        if rank >= self.count:
            return self.most
        passed = 0
        for bucket in sorted(self.buckets):
            passed += self.buckets[bucket]
            if passed >= rank:
                return min(max(_middle(bucket), self.least), self.most)
        raise AssertionError("the buckets hold less than was counted")


def _middle(bucket: int) -> float:
    """Return the time in the middle of a bucket."""
    shift = max(0, (bucket >> (_BITS - 1)) - 1)
    first = (bucket - (shift << (_BITS - 1))) << shift
    return first + ((1 << shift) - 1) / 2
