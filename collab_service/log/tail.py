"""The newest events of one followed session, kept in memory for those who follow it."""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from collab_service.log.reading import PAGE_BYTES, PAGE_EVENTS, Chunk, Page, event_size
from collab_service.metrics import FollowMetrics
from collab_service.model import Event
from collab_service.storage.times import now_micros

_EVENT_BYTES = 512
"""What an event weighs in memory besides what it says, roughly."""
_TOGETHER = 32
"""Followers that have their turn together: so few that everything else is not kept waiting, and so many that what comes
with each turn costs next to nothing for each of them."""
_REST = 2.5
"""Between turns, how many times as long as it took to hand the messages over: sending them takes about as long again,
and what is left is for everything else."""
_LONGEST_REST = 0.1
"""Seconds of that: if it took so long, it was something else that did."""
_FOR_TURNS = 4
"""How many times as much memory as otherwise may be used for what followers are yet to have in their turn."""


@dataclass(frozen=True, slots=True)
class _Handed:
    """A chunk that was handed out."""

    chunk: Chunk
    end: int
    """The number of its last event."""
    at: float
    """When, on the loop's clock."""

    @property
    def weight(self) -> int:
        """What it takes of the memory: the events, and their encoding."""
        return 2 * self.chunk.size + _EVENT_BYTES * len(self.chunk.events)


class Tail:
    """A stretch of the log up to its end, `(start, end]`, without gaps; and the followers who wait there.

    What is committed arrives in order (`feed`), and those who wait for it get it in turns, a few at a time, those who
    have waited longest first. With each turn all that has come since the one before becomes a chunk, which is encoded
    once for everybody. The next turn begins when delivering has left some time for everything else: at once with few
    followers, and with many the later the slower the machine.
    """

    def __init__(self, session_id: int, max_bytes: int, metrics: FollowMetrics) -> None:
        """Prepare; nothing is known yet.

        Args:
            session_id: The session.
            max_bytes: How much memory to use, roughly. What came last is kept whatever its size, and up to four times
                as much of what followers are yet to have in their turn.
            metrics: Where the deliveries are seen.
        """
        self.session_id = session_id
        self.max_bytes = max_bytes
        self._metrics = metrics
        self.followers = 0
        self.known = False
        """Whether the session's head has been looked up, or an event has come."""
        self.head = 0
        """The highest number that is known to be committed. Always the end of an append."""
        self.failing_since: float | None = None
        """Since when what other processes wrote could not be read."""
        self._start = 0
        self._end = 0
        self._handed: list[_Handed] = []
        self._weight = 0
        self._coming: list[Event] = []
        """What the next turn will hand out."""
        self._waiting: dict[asyncio.Future[None], int] = {}
        """Those who have got everything that was handed out, each with the number that they are at."""
        self._due: OrderedDict[asyncio.Future[None], int] = OrderedDict()
        """Those who have not, in the order in which they get it."""
        self._loop = asyncio.get_running_loop()
        self._next_turn = 0.0
        self._delivering = False
        """Whether some of those whose turn it is have not taken it yet."""
        self._began_to = 0.0
        """When the first of them took it, by `time.perf_counter`."""
        self._timer: asyncio.TimerHandle | None = None
        self._page: tuple[int, Page] | None = None
        """What was found last, and the number that it comes after: those who have their turn together are mostly at the
        same number."""
        self._ended: Exception | None = None
        self.ending: asyncio.Future[None] = self._loop.create_future()
        """Done when following has come to an end; `check` tells why."""

    @property
    def handed_out(self) -> int:
        """The number up to which events were handed out."""
        return self._end

    @property
    def reached(self) -> int:
        """The number up to which events have come."""
        return self._coming[-1].server_seq if self._coming else self._end

    @property
    def is_behind(self) -> bool:
        """Whether there are committed events that have not come, because another process wrote them."""
        return self.reached < self.head

    def learn(self, head: int) -> None:
        """Take note that everything up to `head` is committed."""
        if not self.known:
            self.known = True
            self._start = self._end = head
        self.head = max(self.head, head)

    def feed(self, events: Sequence[Event], head: int) -> None:
        """Take events that are committed; what has come before is left out, and all of them where they leave a gap.

        Args:
            events: At least one, in order. They are neighbours, but where commits were in doubt: what was found then
                and those whose callers had left stand between one another.
            head: A number up to which everything is committed, at the end of an append.
        """
        first, last = events[0].server_seq, events[-1].server_seq
        self.learn(first - 1)
        self.head = max(self.head, head)
        are_neighbours = last - first + 1 == len(events)
        if are_neighbours and first <= self.reached + 1 <= last:
            self._coming.extend(events[self.reached + 1 - first :])
            self._begin_turn()

    def after(self, position: int) -> Page | None:
        """Return what has been handed out after `position`, as much as one message holds; None when it is gone."""
        if position < self._start:
            return None
        if self._page is None or self._page[0] != position or self._page[1].head != self.head:
            chunks = self._chunks_after(position)
            self._page = position, Page(chunks, chunks[-1].events[-1].server_seq if chunks else position, self.head)
        return self._page[1]

    def _chunks_after(self, position: int) -> list[Chunk]:
        found: list[Chunk] = []
        count = size = 0
        for index in range(bisect_right(self._handed, position, key=_end), len(self._handed)):
            chunk = self._handed[index].chunk
            if (known := position + 1 - chunk.events[0].server_seq) > 0:
                chunk = Chunk(chunk.events[known:])
            count += len(chunk.events)
            size += chunk.size
            if found and (count > PAGE_EVENTS or size > PAGE_BYTES):
                break
            found.append(chunk)
        return found

    async def turn(self, position: int, seconds: float) -> None:
        """Wait for something after `position` and for one's turn to get it, but not longer than `seconds`.

        Nor is there a wait once the end has come, or for what is gone from here and has to be read from the table.
        """
        if self._ended is not None or position < self._start:
            return
        waiting = self._loop.create_future()
        if position < self._end:
            self._due[waiting] = position
            self._begin_turn()
        else:
            self._waiting[waiting] = position
        timer = self._loop.call_later(seconds, _wake, waiting)
        try:
            await waiting
        finally:
            timer.cancel()
            self._waiting.pop(waiting, None)
            self._due.pop(waiting, None)

    def end(self, error: Exception) -> None:
        """Tell everybody who follows that it is over."""
        if self._ended is None:
            self._ended = error
            self.ending.set_result(None)
        self._wake_all()

    def check(self) -> None:
        """Raise the reason when following has come to an end."""
        if self._ended is not None:
            # It is raised to many; what one of them makes of it is nothing to the next.
            raise self._ended.with_traceback(None)

    def close(self) -> None:
        """Let go: nobody follows any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def forget(self, before: float, max_bytes: int) -> None:
        """Let go of what was handed out before a time, on the loop's clock, and keep to another size from now on."""
        self.max_bytes = max_bytes
        count = 0
        while count < len(self._handed) and self._handed[count].at < before and self._is_had(count):
            count += 1
        self._forget(count)
        self._keep_to_size(self._loop.time())

    def _begin_turn(self) -> None:
        """Let those who are due have their turn, at once or when the time has come."""
        if self._delivering or self._timer is not None:
            return
        if self._loop.time() >= self._next_turn:
            self._take_turn()
        else:
            self._timer = self._loop.call_at(self._next_turn, self._take_turn)

    def _take_turn(self) -> None:
        self.close()
        if self._coming:
            self._hand_out()
        if not self._due:
            return
        oldest = self._first_after(next(iter(self._due.values())))
        self._delivering = True
        # Callbacks are called in order: between these two, those whose turn it is hand their messages over to be sent.
        self._loop.call_soon(self._deliver)
        for _ in range(min(_TOGETHER, len(self._due))):
            waiting, _ = self._due.popitem(last=False)
            _wake(waiting)
        self._loop.call_soon(self._delivered, oldest.created_at)

    def _deliver(self) -> None:
        self._began_to = perf_counter()

    def _delivered(self, created_at: int) -> None:
        self._delivering = False
        self._next_turn = self._loop.time() + min(_REST * (perf_counter() - self._began_to), _LONGEST_REST)
        self._metrics.delivered(max(now_micros() - created_at, 0) / 1_000_000)
        if self._coming or self._due:
            self._begin_turn()

    def _hand_out(self) -> None:
        now = self._loop.time()
        events, self._coming = self._coming, []
        for chunk in _chunks_of(events):
            handed = _Handed(chunk, chunk.events[-1].server_seq, now)
            self._handed.append(handed)
            self._weight += handed.weight
        self._end = events[-1].server_seq
        self._page = None
        # Who has read the table may be further than the tail, for a moment.
        due = {waiting: position for waiting, position in self._waiting.items() if position < self._end}
        self._due.update(due)
        for waiting in due:
            del self._waiting[waiting]
        self._keep_to_size(now)

    def _first_after(self, position: int) -> Event:
        """Return the oldest event after a position that is still there."""
        events = self._handed[bisect_right(self._handed, position, key=_end)].chunk.events
        return events[max(position + 1 - events[0].server_seq, 0)]

    def _keep_to_size(self, now: float) -> None:
        count, weight = 0, self._weight
        while weight > self.max_bytes and self._handed[count].at < now:
            is_too_much = weight > _FOR_TURNS * self.max_bytes and count + 1 < len(self._handed)
            if not is_too_much and not self._is_had(count):
                break
            weight -= self._handed[count].weight
            count += 1
        self._forget(count)

    def _is_had(self, index: int) -> bool:
        """Tell whether those who wait for their turn have a chunk already; who came late to it reads the table."""
        return not self._due or self._handed[index].end <= next(iter(self._due.values()))

    def _forget(self, count: int) -> None:
        if count:
            self._weight -= sum(handed.weight for handed in self._handed[:count])
            self._start = self._handed[count - 1].end
            del self._handed[:count]
            self._page = None

    def _wake_all(self) -> None:
        for waiting in (*self._waiting, *self._due):
            _wake(waiting)
        self._waiting.clear()
        self._due.clear()


def _end(handed: _Handed) -> int:
    return handed.end


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def _chunks_of(events: Sequence[Event]) -> list[Chunk]:
    """Divide events so that each part fits into a message."""
    chunks: list[Chunk] = []
    part: list[Event] = []
    size = 0
    for event in events:
        more = event_size(event)
        if part and (len(part) == PAGE_EVENTS or size + more > PAGE_BYTES):
            chunks.append(Chunk(part, size))
            part, size = [], 0
        part.append(event)
        size += more
    chunks.append(Chunk(part, size))
    return chunks
