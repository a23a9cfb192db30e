"""The last bound on memory: when the process takes too much, calls that wait for their clients are ended.

How much of a request has come grpc does not tell, so all that counts those on their way goes by what requests are like
of late. A client that knows it could have 1,000 calls with 8 MB each, less a byte, and keep 8 GB for as long as it
likes. What that does show in is the process as a whole.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from collab_service import memory

_log = structlog.get_logger(__name__)

_LOOK = 0.25
"""Seconds between two looks."""
_PATIENCE = 1.0
"""Seconds that a request gets to come in any case, and an answer to be taken. Most take a hundredth."""
_SHARE = 10
"""What giving back memory takes is at most one part in so many of the time."""


class Bounded(Protocol):
    """Calls that take memory until their clients go on."""

    def end_slow(self, seconds: float) -> int:
        """End those that have waited for their clients for more than so many seconds, and return how many."""


class MemoryBound:
    """Keeps the process's resident memory near a bound."""

    def __init__(self, most_bytes: int, bounded: "Sequence[Bounded]") -> None:
        """Prepare; `run` does it.

        Args:
            most_bytes: The bound.
            bounded: What is to be ended beyond it.
        """
        self._most_bytes = most_bytes
        self._bounded = bounded

    async def run(self) -> None:
        """Do it for ever, where the system tells how much memory it is."""
        loop = asyncio.get_running_loop()
        pause, ended = _LOOK, 0
        while memory.tells_resident_bytes():
            await asyncio.sleep(pause)
            pause = _LOOK
            if ended or memory.resident_bytes() > self._most_bytes:
                # Much of it may be free already, and glibc has kept it.
                started = loop.time()
                await asyncio.to_thread(memory.give_back)
                pause = max(pause, _SHARE * (loop.time() - started))
                ended = self._end_what_is_slow()

    def _end_what_is_slow(self) -> int:
        """Return how many were ended."""
        if (resident := memory.resident_bytes()) <= self._most_bytes:
            return 0
        ended = sum(each.end_slow(_PATIENCE) for each in self._bounded)
        if ended:
            _log.warning("too much memory is taken, calls that wait for their clients are ended", calls=ended,
                         resident_bytes=resident, max_memory_bytes=self._most_bytes)  # fmt: skip
        return ended
