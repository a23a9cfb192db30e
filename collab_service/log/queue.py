"""Appends that wait to be written: bounded, and fair by session."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from itertools import islice

from msgspec import Struct

from collab_service.log.decide import AppendRequest, Attempt, Decision
from collab_service.log.room import Room, Share
from collab_service.model import QueueLimits
from collab_service.model.errors import CommitOutcomeUnknown, Overloaded


class Succession(Struct, eq=False):
    """Requests of one caller that are carried out in the order in which they came.

    Once one of them could not be carried out through no fault of its own, none of those behind it may be.
    """

    fault: Exception | None = None
    """Why one was not carried out."""


class Pending(Struct, eq=False):
    """A request with its caller."""

    request: AppendRequest
    digests: list[bytes]
    size: int
    """Bytes of payloads, and a little for each event."""
    answer: "asyncio.Future[Decision]"
    since: float = 0.0
    """When it came, by `time.perf_counter`."""
    succession: Succession | None = None
    """The requests that it has to come behind of, if it is one of several."""
    attempts: tuple[Attempt, ...] = ()
    """Those to store it that may have succeeded, or may yet."""
    is_alone: bool = False
    """Whether it is to be taken alone, since a transaction that it shared has failed."""
    line: "_Line | None" = None
    """Where it has room, until that is given up."""
    is_waiting: bool = False
    """Whether it is in that line, and not taken."""

    @property
    def is_wanted(self) -> bool:
        """Whether it is still to be carried out."""
        return not (self.answer.done() or (self.succession is not None and self.succession.fault))

    def fail(self, error: Exception) -> Exception | None:
        """Answer that it was not carried out, and return with what; None when it has an answer, or nobody waits.

        Those behind it in its succession will not be carried out either.
        """
        if self.answer.done():
            return None
        if self.attempts:
            error = CommitOutcomeUnknown()
        self.answer.set_exception(error)
        if self.succession is not None:
            self.succession.fault = error
        return error


class Arrivals:
    """How many events are ready to be taken together, and a place to wait for more."""

    def __init__(self) -> None:
        self.ready = 0
        self._wanted = 1
        self._enough = asyncio.Event()

    def add(self, events: int) -> None:
        """Take note of events that have come, or (when negative) are gone."""
        self.ready += events
        if self.ready >= self._wanted:
            self._enough.set()

    async def wait_for(self, events: int) -> None:
        """Wait until so many events are ready. One task may wait at a time."""
        self._wanted = events
        while self.ready < events:
            self._enough.clear()
            await self._enough.wait()


class _Line:
    """The requests of one session, in order. With many sessions, one is made for nearly every request."""

    __slots__ = ("arrivals", "events", "pending", "requests", "room", "session_id", "size")

    def __init__(self, session_id: int, arrivals: Arrivals) -> None:
        self.session_id = session_id
        self.pending: deque[Pending] = deque()
        self.events = 0
        self.requests = 0
        """Requests that have room here: those that wait, and those that were taken and may come back."""
        self.size = 0
        """Bytes of those."""
        self.room = Room()
        self.arrivals = arrivals
        """Where its events are counted: with those of all lines, or apart while it is on hold."""


class AppendQueue:
    """Requests by session, in order within a session, taken in turns among sessions.

    A session that somebody else has locked is put on hold: its requests are taken apart from the others', and all such
    sessions together may fill only half of the room, so that however many are stuck, there is some for the rest.
    What was taken may have to come back, so it keeps its room until it is answered.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._limits = limits
        self._lines: dict[int, _Line] = {}
        """Of all sessions of which something has room, or which are on hold."""
        self._ready: OrderedDict[int, _Line] = OrderedDict()
        """Those of them from which to take next, in turn."""
        self._held: dict[int, _Line] = {}
        self._waiting = 0
        self._all = Share(limits.requests, limits.bytes)
        self._of_held = Share((limits.requests + 1) // 2, limits.bytes // 2)
        """What of that the lines on hold may have."""
        self.arrivals = Arrivals()
        """Of all that is not on hold."""

    def __len__(self) -> int:
        return self._waiting

    @property
    def size(self) -> int:
        """Bytes of what waits, or was taken and may come back."""
        return self._all.size

    @property
    def held_sessions(self) -> int:
        """Sessions on hold."""
        return len(self._held)

    def put(self, pending: Pending) -> None:
        """Add a request at the end of its session's line.

        Raises:
            Overloaded: There is no room. Nothing was added.
        """
        self.check_room(pending.request.session_id, pending.size)
        self._append(pending)

    def check_room(self, session_id: int, size: int) -> None:
        """Raise `Overloaded` if there is no room for a request of so many bytes."""
        room = self._full(session_id, size)
        if room is self._all.room:
            raise Overloaded("too many appends are waiting on this server")
        if room is self._of_held.room:
            raise Overloaded("too many appends are waiting for sessions that are locked")
        if room is not None:
            raise Overloaded("too many appends are waiting for this session")

    async def put_when_there_is_room(self, pending: Pending) -> None:
        """Add a request at the end of its session's line, as soon as there is room."""
        waited_in: Room | None = None
        while (room := self._full(pending.request.session_id, pending.size)) is not None:
            if waited_in is not None and waited_in is not room:
                waited_in.wake()  # there may be room for another
            waited_in = room
            await room.wait()
        self._append(pending)
        if waited_in is not None:
            waited_in.wake()  # there may be room for the next one, too

    def put_back(self, taken: list[Pending]) -> None:
        """Return requests to the front of their lines, in their order; there is always room for them."""
        for pending in reversed(taken):
            line = self._line(pending.request.session_id)
            line.pending.appendleft(pending)
            self._enter(line, pending)

    def remove(self, pending: Pending) -> bool:
        """Take out a request, as when its caller has left; False when it is not waiting (any more)."""
        line = pending.line
        if line is None or not pending.is_waiting:
            return False
        line.pending.remove(pending)
        self._leave(line, pending)
        if not line.pending:
            self._ready.pop(line.session_id, None)
        self._give_room_up(pending)
        return True

    def hold(self, session_id: int) -> Arrivals:
        """Keep the requests of a session, which is not on hold yet, from `take`, until `release`; count them apart."""
        self._ready.pop(session_id, None)
        line = self._held[session_id] = self._line(session_id)
        self._of_held.add(line.requests, line.size)
        self._count_at(line, Arrivals())
        return line.arrivals

    def release(self, session_id: int) -> None:
        """End a session's hold."""
        line = self._held.pop(session_id)
        self._of_held.add(-line.requests, -line.size)
        self._of_held.room.wake_all()
        self._count_at(line, self.arrivals)
        if line.pending:
            self._ready[session_id] = line
        self._drop_if_unused(line)

    def take(self, *, events: int, size: int, sessions: int) -> list[Pending]:
        """Take the requests of the next transaction: of each session one in turn, until one of the bounds is met.

        The first request is taken whatever its size, and one that is to be alone by itself. Those that nobody waits for
        any more are dropped.

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
                if taken and (events < 0 or size < 0 or pending.is_alone):
                    return taken
                line.pending.popleft()
                self._leave(line, pending)
                if line.pending:
                    self._ready.move_to_end(session_id)  # behind those that still wait for their turn
                else:
                    del self._ready[session_id]
                self._add_if_wanted(pending, taken)
                if pending.is_alone:
                    return taken
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
            if taken and (events < 0 or size < 0 or pending.is_alone):
                break
            line.pending.popleft()
            self._leave(line, pending)
            self._add_if_wanted(pending, taken)
            if pending.is_alone:
                break
        return taken

    def settle(self, taken: Iterable[Pending]) -> None:
        """Give up the room of those requests that have their answer and are not back."""
        for pending in taken:
            if pending.answer.done() and not pending.is_waiting:
                self._give_room_up(pending)

    def take_all(self) -> list[Pending]:
        """Take everything, whatever is on hold included."""
        everything = []
        self._ready.clear()
        for line in list(self._lines.values()):
            while line.pending:
                pending = line.pending.popleft()
                self._leave(line, pending)
                self._give_room_up(pending)
                everything.append(pending)
        return everything

    def _full(self, session_id: int, size: int) -> Room | None:
        """Return where there is no room for a request: in a share, or in its session's line; None when there is.

        No session may take more of a share than it leaves to the others, so that none can fill one.
        """
        if self._all.is_full(size):
            return self._all.room
        share = self._all
        if session_id in self._held:
            share = self._of_held
            if share.is_full(size):
                return share.room
        line = self._lines.get(session_id)
        if (
            line is not None
            and line.requests
            and (
                line.requests >= min(self._limits.session_requests, share.max_requests - share.requests)
                or line.size + size > min(self._limits.session_bytes, share.max_size - share.size)
            )
        ):
            return line.room
        return None

    def _append(self, pending: Pending) -> None:
        line = self._line(pending.request.session_id)
        line.pending.append(pending)
        self._enter(line, pending)

    def _line(self, session_id: int) -> _Line:
        line = self._lines.get(session_id)
        if line is None:
            line = self._lines[session_id] = _Line(session_id, self.arrivals)
        return line

    def _enter(self, line: _Line, pending: Pending) -> None:
        self._waiting += 1
        pending.is_waiting = True
        if pending.line is None:
            pending.line = line
            self._take_room(line, 1, pending.size)
        if line.session_id not in self._held and line.session_id not in self._ready:
            self._ready[line.session_id] = line
        events = len(pending.request.events)
        line.events += events
        line.arrivals.add(events)

    def _leave(self, line: _Line, pending: Pending) -> None:
        self._waiting -= 1
        pending.is_waiting = False
        events = len(pending.request.events)
        line.events -= events
        line.arrivals.add(-events)

    def _give_room_up(self, pending: Pending) -> None:
        line, pending.line = pending.line, None
        if line is not None:
            self._take_room(line, -1, -pending.size)
            line.room.wake()
            self._of_held.room.wake()
            self._all.room.wake()
            self._drop_if_unused(line)

    def _take_room(self, line: _Line, requests: int, size: int) -> None:
        line.requests += requests
        line.size += size
        self._all.add(requests, size)
        if line.session_id in self._held:
            self._of_held.add(requests, size)

    def _drop_if_unused(self, line: _Line) -> None:
        if not line.requests and line.session_id not in self._held:
            del self._lines[line.session_id]
            line.room.wake_all()

    def _add_if_wanted(self, pending: Pending, taken: list[Pending]) -> None:
        if not add_if_wanted(pending, taken):
            self._give_room_up(pending)

    def _count_at(self, line: _Line, arrivals: Arrivals) -> None:
        line.arrivals.add(-line.events)
        line.arrivals = arrivals
        arrivals.add(line.events)


def add_if_wanted(pending: Pending, to: list[Pending]) -> bool:
    """Add a request to others, unless nobody waits for it; one behind a fault in its succession is told that fault."""
    if pending.is_wanted:
        to.append(pending)
        return True
    if pending.succession is not None and pending.succession.fault is not None:
        pending.fail(pending.succession.fault)
    return False
