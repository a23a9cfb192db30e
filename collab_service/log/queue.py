"""Appends that wait to be written: bounded, and fair by session."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from collab_service.log.decide import AppendRequest
from collab_service.model import Event, QueueLimits
from collab_service.model.errors import Overloaded


@dataclass(frozen=True, slots=True)
class Appended:
    """The answer to an append."""

    events: list[Event]
    replayed: bool


@dataclass(eq=False, slots=True)
class Pending:
    """A request with its caller."""

    request: AppendRequest
    digests: list[bytes]
    size: int
    """Bytes of payloads, and a little for each event."""
    answer: asyncio.Future[Appended]


@dataclass(eq=False, slots=True)
class _Line:
    """The requests of one session, in order; a dict, so that one whose caller leaves is out at once."""

    pending: OrderedDict[Pending, None] = field(default_factory=OrderedDict)
    size: int = 0


class AppendQueue:
    """Requests by session, in order within a session, taken in turns among sessions.

    A session that somebody else has locked is put on hold: its requests are taken apart from the others'.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._ready: OrderedDict[int, _Line] = OrderedDict()
        self._held: dict[int, _Line] = {}
        self._requests = 0
        self._ready_requests = 0
        self._size = 0
        self._wanted = 1
        self._enough = asyncio.Event()

    def __len__(self) -> int:
        return self._requests

    @property
    def ready(self) -> int:
        """The number of requests that `take` could take."""
        return self._ready_requests

    def put(self, pending: Pending) -> None:
        """Add a request at the end of its session's line.

        Raises:
            Overloaded: There is no room. Nothing was added.
        """
        limits = self._limits
        if self._requests >= limits.requests or (self._size and self._size + pending.size > limits.bytes):
            raise Overloaded("too many appends are waiting on this server")
        line = self._line(pending.request.session_id)
        if line is not None and (
            len(line.pending) >= limits.session_requests or line.size + pending.size > limits.session_bytes
        ):
            raise Overloaded("too many appends are waiting for this session")
        self._add(pending)

    def put_back(self, taken: list[Pending]) -> None:
        """Return requests to the front of their lines, in their order; there is always room for them."""
        for pending in reversed(taken):
            self._add(pending).pending.move_to_end(pending, last=False)

    def remove(self, pending: Pending) -> None:
        """Take one request out, as when its caller has left; nothing happens when it is not waiting any more."""
        session_id = pending.request.session_id
        line = self._line(session_id)
        if line is None or pending not in line.pending:
            return
        del line.pending[pending]
        self._count(line, pending, -1)
        if not line.pending:
            self._ready.pop(session_id, None)

    def hold(self, session_id: int) -> None:
        """Keep a session's requests from `take`, until `release`."""
        line = self._held[session_id] = self._ready.pop(session_id, None) or _Line()
        self._ready_requests -= len(line.pending)

    def release(self, session_id: int) -> None:
        """End a session's hold."""
        line = self._held.pop(session_id)
        if line.pending:
            self._ready[session_id] = line
            self._ready_requests += len(line.pending)
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
        turn = list(islice(self._ready, sessions))
        while turn:
            served = []
            for session_id in turn:
                pending = self._first(session_id)
                if pending is None:
                    continue
                events -= len(pending.request.events)
                size -= pending.size
                if taken and (events < 0 or size < 0):
                    return taken
                self.remove(pending)
                taken.append(pending)
                if session_id in self._ready:
                    self._ready.move_to_end(session_id)  # behind those that still wait for their turn
                    served.append(session_id)
            turn = served
        return taken

    def take_held(self, session_id: int, *, events: int, size: int) -> list[Pending]:
        """Take requests of one session on hold, as `take` does."""
        taken: list[Pending] = []
        while (pending := self._first(session_id)) is not None:
            events -= len(pending.request.events)
            size -= pending.size
            if taken and (events < 0 or size < 0):
                break
            self.remove(pending)
            taken.append(pending)
        return taken

    def take_all(self) -> list[Pending]:
        """Take everything, whatever is on hold included."""
        everything = [p for lines in (self._ready, self._held) for line in lines.values() for p in line.pending]
        for pending in everything:
            self.remove(pending)
        return everything

    async def wait_for(self, requests: int) -> None:
        """Wait until so many requests are ready."""
        self._wanted = requests
        while self._ready_requests < requests:
            self._enough.clear()
            await self._enough.wait()

    def _wake(self) -> None:
        if self._ready_requests >= self._wanted:
            self._enough.set()

    def _line(self, session_id: int) -> _Line | None:
        return self._ready.get(session_id) or self._held.get(session_id)

    def _first(self, session_id: int) -> Pending | None:
        while (line := self._line(session_id)) is not None and line.pending:
            pending = next(iter(line.pending))
            if not pending.answer.done():
                return pending
            self.remove(pending)
        return None

    def _add(self, pending: Pending) -> _Line:
        session_id = pending.request.session_id
        line = self._line(session_id)
        if line is None:
            line = self._ready[session_id] = _Line()
        line.pending[pending] = None
        self._count(line, pending, 1)
        self._wake()
        return line

    def _count(self, line: _Line, pending: Pending, sign: int) -> None:
        line.size += sign * pending.size
        self._size += sign * pending.size
        self._requests += sign
        if pending.request.session_id not in self._held:
            self._ready_requests += sign
