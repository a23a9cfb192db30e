"""Appends that wait to be written: bounded, and fair by session."""

import asyncio
import math
from collections import OrderedDict, deque
from itertools import islice

from msgspec import Struct

from collab_service.log.decide import AppendRequest, Decision
from collab_service.model import QueueLimits
from collab_service.model.errors import Overloaded


class Pending(Struct, eq=False):
    """A request with its caller."""

    request: AppendRequest
    digests: list[bytes]
    size: int
    """Bytes of payloads, and a little for each event."""
    answer: "asyncio.Future[Decision]"
    give_up_at: float = math.inf
    """On the loop's clock: until when to wait for the session's row, once somebody else was found to hold it."""


class _Line(Struct, eq=False):
    """The requests of one session, in order."""

    pending: deque[Pending]
    size: int = 0
    held: bool = False


class AppendQueue:
    """Requests by session, in order within a session, taken in turns among sessions.

    A session that somebody else has locked is put on hold: its requests are taken apart from the others'.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._ready: OrderedDict[int, _Line] = OrderedDict()
        self._held: dict[int, _Line] = {}
        self._requests = 0
        self._size = 0
        self.ready = 0
        """The number of requests that `take` could take."""
        self._wanted = 1
        self._enough = asyncio.Event()

    def __len__(self) -> int:
        return self._requests

    def put(self, pending: Pending) -> None:
        """Add a request at the end of its session's line.

        Raises:
            Overloaded: There is no room. Nothing was added.
        """
        limits = self._limits
        if self._requests >= limits.requests or (self._size and self._size + pending.size > limits.bytes):
            raise Overloaded("too many appends are waiting on this server")
        line = self._line(pending.request.session_id)
        if line.pending and (
            len(line.pending) >= limits.session_requests or line.size + pending.size > limits.session_bytes
        ):
            raise Overloaded("too many appends are waiting for this session")
        line.pending.append(pending)
        self._count(line, pending.size, 1)

    def put_back(self, taken: list[Pending]) -> None:
        """Return requests to the front of their lines, in their order; there is always room for them."""
        for pending in reversed(taken):
            line = self._line(pending.request.session_id)
            line.pending.appendleft(pending)
            self._count(line, pending.size, 1)

    def remove(self, pending: Pending) -> bool:
        """Take out a request, as when its caller has left; False when it is not waiting (any more)."""
        session_id = pending.request.session_id
        line = self._ready.get(session_id) or self._held.get(session_id)
        if line is None or pending not in line.pending:
            return False
        line.pending.remove(pending)
        self._count(line, -pending.size, -1)
        if not line.pending:
            self._ready.pop(session_id, None)
        return True

    def is_held(self, session_id: int) -> bool:
        """Tell whether a session is on hold."""
        return session_id in self._held

    def hold(self, session_id: int) -> None:
        """Keep the requests of a session, which is not on hold yet, from `take`, until `release`."""
        line = self._ready.pop(session_id, None) or _Line(deque())
        self.ready -= len(line.pending)
        line.held = True
        self._held[session_id] = line

    def release(self, session_id: int) -> None:
        """End a session's hold."""
        line = self._held.pop(session_id)
        if line.pending:
            line.held = False
            self._ready[session_id] = line
            self.ready += len(line.pending)
            self._wake()

    def take(self, *, events: int, size: int, sessions: int) -> list[Pending]:
        """Take the requests of the next transaction: of each session one in turn, until one of the bounds is met.

        The first request is taken whatever its size. Those that nobody waits for any more are dropped.

        Args:
            events: Events at most.
            size: Bytes at most.
            sessions: Sessions at most.
        """
        taken: list[Pending] = []
        lines = list(islice(self._ready.items(), sessions))
        while lines:
            for session_id, line in lines:
                pending = line.pending[0]
                events -= len(pending.request.events)
                size -= pending.size
                if taken and (events < 0 or size < 0):
                    return taken
                line.pending.popleft()
                self._count(line, -pending.size, -1)
                if line.pending:
                    self._ready.move_to_end(session_id)  # behind those that still wait for their turn
                else:
                    del self._ready[session_id]
                if not pending.answer.done():
                    taken.append(pending)
            lines = [(session_id, line) for session_id, line in lines if line.pending]
        return taken

    def take_held(self, session_id: int, *, events: int, size: int) -> list[Pending]:
        """Take requests of one session on hold, as `take` does."""
        taken: list[Pending] = []
        line = self._held[session_id]
        while line.pending:
            pending = line.pending[0]
            events -= len(pending.request.events)
            size -= pending.size
            if taken and (events < 0 or size < 0):
                break
            line.pending.popleft()
            self._count(line, -pending.size, -1)
            if not pending.answer.done():
                taken.append(pending)
        return taken

    def take_all(self) -> list[Pending]:
        """Take everything, whatever is on hold included."""
        lines = [*self._ready.values(), *self._held.values()]
        everything = [pending for line in lines for pending in line.pending]
        for line in lines:
            line.pending.clear()
        self._ready.clear()
        self._requests = self._size = self.ready = 0
        return everything

    async def wait_for(self, requests: int) -> None:
        """Wait until so many requests are ready."""
        self._wanted = requests
        while self.ready < requests:
            self._enough.clear()
            await self._enough.wait()

    def _wake(self) -> None:
        if self.ready >= self._wanted:
            self._enough.set()

    def _line(self, session_id: int) -> _Line:
        line = self._ready.get(session_id) or self._held.get(session_id)
        if line is None:
            line = self._ready[session_id] = _Line(deque())
        return line

    def _count(self, line: _Line, size: int, requests: int) -> None:
        line.size += size
        self._size += size
        self._requests += requests
        if not line.held:
            self.ready += requests
            self._wake()
