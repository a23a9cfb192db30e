"""How much may be on its way into this process at once.

Appends that wait are bounded by the sequencer's queue. But a call gets there only once its request has been received
and decoded, and under a multiple of the load that can be carried, the memory and the time would go into that: 4,000
callers with 1 MB each took 12 GB, and of 140 appends a second left 14. So a call is refused before its request is
received: when those in progress hold too many bytes of requests, or too many requests are being received.
"""

import asyncio

from collab_service.model.errors import InvalidArgument, Overloaded, Violation
from collab_service.rpc.reads import Context, End, Reads

_REQUESTS = 1_024
"""Requests that may be received at once, however small they usually are."""
_PATIENCE = 10
"""Times what receiving a request has taken of late, after which one that has not come gives up its place to another."""
_SHORTEST_PATIENCE, _LONGEST_PATIENCE = 0.25, 5.0
"""Seconds. Where requests are small, whoever begins calls and sends nothing, to keep others out, has to begin 4,096 of
them in a second: as many as keep this process busy anyway."""
_CANCELLATION = 0.1
"""Seconds. Where a call was given up, grpc says first that there is no request, and then cancels its task."""


class Kind:
    """What the requests of one method are like: how large one is going to be is not known before it has come."""

    __slots__ = ("usual_size",)

    def __init__(self) -> None:
        self.usual_size = 1.0
        """Bytes of a request of late."""


class Admission:
    """Receives the requests of calls that bring one, as far as there is room for them."""

    def __init__(self, *, held: int, received: int) -> None:
        """Receive up to two bounds.

        Args:
            held: Bytes of requests that calls in progress may hold.
            received: Bytes of requests that may be received at once.
        """
        self.reads = Reads()
        """What is being received."""
        self._max_held = held
        self._max_received = received
        self._held = 0
        self._usual_time = 0.0
        """Seconds that a request of late has taken to come."""
        self._loop = asyncio.get_running_loop()

    async def receive(self, context: Context, kind: Kind, end: End) -> bytes:
        """Return a call's request; its bytes count as held until `release`.

        Args:
            context: The call's.
            kind: That of the call's method.
            end: Ends the call, when the request is long in coming.

        Raises:
            InvalidArgument: There is no request.
            Overloaded: There is no room for it.
            CallEnded: It was long in coming, and `end` raised nothing.
        """
        begun = self._loop.time()
        expected = kind.usual_size
        if self._held >= self._max_held or not (self._has_room(expected) or self._makes_room(expected, begun)):
            raise Overloaded("too much is on its way into this server")
        request = await self.reads.read(context, end, size=expected)
        if request is None:
            await asyncio.sleep(_CANCELLATION)
            raise InvalidArgument([Violation("request", "must be sent")])
        size = len(request)
        self._held += size
        kind.usual_size += (size - kind.usual_size) / 16
        self._usual_time += (self._loop.time() - begun - self._usual_time) / 16
        return request

    def release(self, size: int) -> None:
        """Take note that a request of so many bytes is held no longer."""
        self._held -= size

    def _has_room(self, size: float) -> bool:
        count = len(self.reads)
        return count == 0 or (count < _REQUESTS and self.reads.size + size <= self._max_received)

    def _makes_room(self, size: float, now: float) -> bool:
        patience = min(max(_PATIENCE * self._usual_time, _SHORTEST_PATIENCE), _LONGEST_PATIENCE)
        slow = now - patience
        kept = self.reads.size - self.reads.size_begun(slow)
        if kept >= 1 and kept + size > self._max_received:
            return False  # whoever would be ended for it
        while not self._has_room(size):
            if not self.reads.end_longest(slow):
                return False
        return True
