"""Requests that are being received, and the end of those that are long in coming.

No task that waits for a request may be cancelled: grpc would keep for ever what comes afterwards. So it is the call
that is ended, from outside, and with the call the wait.
"""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import takewhile
from typing import Any, Generic, Self, TypeVar

import grpc
import structlog
from msgspec import Struct

from collab_service.rpc.sockets import close_connections

_log = structlog.get_logger(__name__)

_Request = TypeVar("_Request")
Context = grpc.aio.ServicerContext[Any, Any]


class CallEnded(Exception):
    """The call was ended while its request was being received."""


End = Callable[[], Coroutine[Any, Any, None]]
"""Ends a call; what it raises is raised to whoever waits for the request."""


class _Read(Struct, eq=False):
    """A request that is being received."""

    since: float
    """When that began, by the loop's clock."""
    context: Context
    end: End
    is_busy: Callable[[], bool]
    size: float
    """Bytes that it is expected to have."""
    ending: "asyncio.Task[None] | None" = None
    ending_since: float = 0.0
    peer: str = ""
    """The client, once the call is being ended."""


class Reads:
    """Requests that are being received for some kind of calls."""

    def __init__(self) -> None:
        self._coming: dict[_Read, None] = {}
        """In the order in which they have begun."""
        self.size = 0.0
        """Bytes that they are expected to have."""
        self._ending: set[_Read] = set()
        """Those whose calls are being ended."""
        self._loop = asyncio.get_running_loop()

    def __len__(self) -> int:
        return len(self._coming)

    async def read(
        self, context: Context, end: End, is_busy: Callable[[], bool] = bool, *, size: float = 0.0
    ) -> bytes | None:
        """Return the next request of a call; None when there is none.

        Args:
            context: The call's.
            end: Ends the call, when the request is long in coming.
            is_busy: Tells whether the service has still to do something before the call can end; false by default.
            size: Bytes that it is expected to have.

        Raises:
            CallEnded: It was ended, and `end` raised nothing.
        """
        read = _Read(self._loop.time(), context, end, is_busy, size)
        self._coming[read] = None
        self.size += size
        try:
            request = await context.read()
            if read.ending is not None:
                del request
                await read.ending
                raise CallEnded
        finally:
            self._forget(read)
            self._ending.discard(read)
        return None if request is grpc.aio.EOF else bytes(request)

    def size_begun(self, before: float) -> float:
        """Return the bytes that those are expected to have which began before a time on the loop's clock."""
        return sum(read.size for read in takewhile(lambda read: read.since <= before, self._coming))

    def end_longest(self, before: float) -> bool:
        """End the call that has waited longest for a request, if that began before a time on the loop's clock."""
        read = next(iter(self._coming), None)
        if read is None or read.since > before:
            return False
        self._forget(read)
        self._ending.add(read)
        read.ending_since = self._loop.time()
        read.peer = read.context.peer()
        read.ending = asyncio.create_task(read.end(), name="end")
        read.ending.add_done_callback(lambda ending: ending.cancelled() or ending.exception())  # or told to who waits
        return True

    def _forget(self, read: _Read) -> None:
        """Take note that a request is received no longer."""
        if read in self._coming:
            del self._coming[read]
            self.size -= read.size

    def end_slow(self, seconds: float) -> int:
        """End the calls that have waited for a request for more than so many seconds, and return how many.

        Where they are still there after as many seconds more, their connections are closed: a status waits behind
        messages that a client does not take.
        """
        before, count = self._loop.time() - seconds, 0
        stuck = {read.peer for read in self._ending if read.ending_since < before and not read.is_busy()}
        for peer in close_connections(stuck):
            _log.warning("a client does not let its calls end, its connection is closed", peer=peer)
        while self.end_longest(before):
            count += 1
        return count


class Requests(Generic[_Request]):
    """The requests of a call that may bring many, as they come."""

    def __init__(self, reads: Reads, context: Context, decode: Callable[[bytes], _Request], end: End) -> None:
        """Prepare; nothing is read yet.

        Args:
            reads: Where it is seen what is being received.
            context: The call's.
            decode: Makes a request of its bytes; may raise our errors.
            end: Ends the call, when a request is long in coming.
        """
        self.end = end
        """The same; may be replaced by whoever knows better how to end."""
        self.is_busy: Callable[[], bool] = bool
        """Whether the service has still to do something before the call can end; may be replaced."""
        self.is_waiting = False
        """Whether one is being received: whoever waits for it must not be cancelled."""
        self._reads = reads
        self._context = context
        self._decode = decode

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _Request:
        self.is_waiting = True
        try:
            data = await self._reads.read(self._context, self.end, self.is_busy)
        finally:
            self.is_waiting = False
        if data is None:
            raise StopAsyncIteration
        return self._decode(data)
