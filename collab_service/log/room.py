"""Room for a bounded number of requests and bytes, and waiting for it."""

import asyncio
from collections import deque


class Room:
    """Callers who wait for room, the first one first."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] | tuple[()] = ()

    async def wait(self) -> None:
        """Wait to be woken."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting = self._waiting or deque()  # hardly ever does anybody wait, and most rooms are short-lived
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.wake()  # it was our turn, which is the next one's now
            raise

    def wake(self) -> None:
        """Wake the first one, who wakes the next when there is room for both."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def wake_all(self) -> None:
        """Wake everybody, as when nothing will be taken from here any more."""
        while self._waiting:
            self.wake()


class Share:
    """What lines have room for together."""

    __slots__ = ("max_requests", "max_size", "requests", "room", "size")

    def __init__(self, max_requests: int, max_size: int) -> None:
        self.max_requests = max_requests
        self.max_size = max_size
        self.requests = 0
        """Requests that have room: those that wait, and those that were taken and may come back."""
        self.size = 0
        """Bytes of those."""
        self.room = Room()

    def add(self, requests: int, size: int) -> None:
        """Take note of requests that have come, or (when negative) are gone."""
        self.requests += requests
        self.size += size

    def is_full(self, size: int) -> bool:
        """Tell whether there is no room for a request of so many bytes. There is for one of any size if it is alone."""
        return self.requests >= self.max_requests or (self.requests > 0 and self.size + size > self.max_size)
