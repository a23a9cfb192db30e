"""When to try again, and how long to wait before."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses between attempts: doubled each time, up to a bound, and jittered so that callers do not come in step.

    (The full-jitter scheme halved: from half of the pause to all of it. See
    https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/)
    """

    first_pause: float = 0.05
    """Seconds before the second attempt."""
    longest_pause: float = 5.0
    """Seconds that a pause never exceeds, unless the service asks for more."""
    attempts: int | None = None
    """Attempts at most; 1 never tries again, None tries for as long as the call's timeout lasts."""


SHORTEST_ATTEMPT = 0.1
"""Seconds: with less than that before the end of its timeout a call does not try again. It would only replace what is
known of the trouble by the news that time is up."""


class Backoff:
    """The pauses of one call."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        """Begin anew: something has worked."""
        self._pause = min(self._policy.first_pause, self._policy.longest_pause)
        self._attempts = 1

    def next(self, at_least: float | None) -> float | None:
        """Return the seconds to wait before the next attempt; None when there shall be none.

        Args:
            at_least: What the service asked for, if it did.
        """
        if self._policy.attempts is not None and self._attempts >= self._policy.attempts:
            return None
        self._attempts += 1
        pause = max(self._pause * random.uniform(0.5, 1), (at_least or 0) * random.uniform(1, 1.25))
        self._pause = min(2 * self._pause, self._policy.longest_pause)
        return pause
