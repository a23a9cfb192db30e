"""Reads a session's events page by page: the table is the buffer, and a reader is a cursor in it."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from collab_service.metrics import ReaderMetrics
from collab_service.model import Event
from collab_service.model.errors import DatabaseUnreachable, ServerSeqBeyondHead, SessionNotFound
from collab_service.storage.database import Database, DriverConnection
from collab_service.storage.repository import reading

PAGE_EVENTS = 500
PAGE_BYTES = 1024 * 1024
_SCAN = 10_000
"""Numbers that one statement looks through at most, however few of them are of the types asked for."""

_SHARED_PARTS = 8
"""Different filters by type for which a chunk keeps what they leave of it."""
_MUCH_ON_ITS_WAY = 32 * 1024 * 1024
"""Bytes of pages that readers have not taken yet, from which on there are only small ones: readers that have stalled
must not fill the memory."""
_SMALL_PAGE_BYTES = 32 * 1024
_MOST_ON_ITS_WAY = 64 * 1024 * 1024
"""Bytes of pages that readers have not taken yet, from which on nothing more is read; those who take nothing are ended
then."""
_READ_AHEAD = 3
"""Pages that a reader who keeps up has at once: one that is sent, and those that are read meanwhile."""

T = TypeVar("T")


class Chunk:
    """Events of a session in order, which many readers may share."""

    __slots__ = ("_of_types", "count", "encoded", "events", "size")

    def __init__(self, events: Sequence[Event], size: int | None = None) -> None:
        """Make a chunk; `size` saves measuring the events again where that was done."""
        self.events = events
        """Empty where there are only the bytes."""
        self.count = len(events)
        self.size = sum(map(event_size, events)) if size is None else size
        """Bytes of what the events say."""
        self.encoded: bytes | None = None
        """What the transport has made of the events, or PostgreSQL; kept so that it is made once for all readers."""
        self._of_types: dict[frozenset[str], Chunk] = {}

    @classmethod
    def of_bytes(cls, encoded: reading.EncodedEvents) -> "Chunk":
        """Return a chunk of which there are only the bytes."""
        chunk = cls((), len(encoded.data))
        chunk.count = encoded.count
        chunk.encoded = encoded.data
        return chunk

    def of_types(self, types: frozenset[str]) -> "Chunk":
        """Return the part with the given types; the same object for readers who ask for the same."""
        if not types:
            return self
        part = self._of_types.get(types)
        if part is None:
            part = Chunk([event for event in self.events if event.content.type in types])
            if len(self._of_types) < _SHARED_PARTS:
                self._of_types[types] = part
        return part


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a session's log, as one message brings it."""

    chunks: Sequence[Chunk]
    through: int
    """Every event up to this number that was asked for has been delivered with this page."""
    head: int
    """The session's last number as far as is known; always the end of an append."""
    count: int = field(init=False)
    """How many events there are."""
    size: int = field(init=False)
    """Bytes of what the events say."""

    def __post_init__(self) -> None:
        """Count once, for all readers that get the same page."""
        object.__setattr__(self, "count", sum(chunk.count for chunk in self.chunks))
        object.__setattr__(self, "size", sum(chunk.size for chunk in self.chunks))

    @property
    def events(self) -> list[Event]:
        """The events, where there are more than their bytes."""
        return [event for chunk in self.chunks for event in chunk.events]


def event_size(event: Event) -> int:
    """Return the bytes of what an event says, which is most of what it takes in a message."""
    content = event.content
    size = 0
    for part in (content.payload, content.actor_id, content.type, content.hash, content.idempotency_key):
        if part is not None:
            size += len(part) if isinstance(part, bytes) or part.isascii() else len(part.encode())
    return size + len(content.signature)


class Reader:
    """Reads events from the table. So many reads at once; further ones wait for their turn, however many they are."""

    def __init__(self, database: Database, *, metrics: ReaderMetrics, at_once: int) -> None:
        self._database = database
        self._metrics = metrics
        self._turns = asyncio.Semaphore(at_once)
        self._page_turns = asyncio.Semaphore(at_once)
        self._at_once = at_once
        self._reading = 0
        self._on_its_way = 0
        self._has_room = asyncio.Event()
        self._has_room.set()

    @contextmanager
    def sending(self, size: int) -> Iterator[None]:
        """Count so many bytes as being on their way to a reader, for the length of the block."""
        self._now_on_its_way(size)
        try:
            yield
        finally:
            self._now_on_its_way(-size)

    @property
    def is_full(self) -> bool:
        """Whether so much is on its way to readers that nothing more is read."""
        return not self._has_room.is_set()

    async def room_for(self, page: Page) -> None:
        """Wait until a page may be sent. Small ones always may: what people write does not wait for those who stall."""
        if page.size > _SMALL_PAGE_BYTES:
            while self.is_full:  # all who wait are woken at once, and the first of them may fill it again
                await self._has_room.wait()

    def _now_on_its_way(self, more: int) -> None:
        self._on_its_way += more
        if self._on_its_way < _MOST_ON_ITS_WAY:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def heads(self, session_ids: Sequence[int]) -> dict[int, int]:
        """Return the last numbers of those of these sessions that exist."""
        return await self._read(lambda connection: reading.read_heads(connection, session_ids))

    async def head(self, session_id: int, *, since: int = 0) -> int:
        """Return the session's last number.

        Raises:
            SessionNotFound: There is no such session (any more).
            ServerSeqBeyondHead: The session has not reached `since`.
        """
        head = (await self.heads([session_id])).get(session_id)
        if head is None:
            raise SessionNotFound(session_id=session_id)
        if since > head:
            raise ServerSeqBeyondHead(since, head)
        return head

    async def page(
        self,
        session_id: int,
        *,
        since: int,
        head: int,
        types: Collection[str] = (),
        count: int = PAGE_EVENTS,
        encoded: bool = False,
    ) -> Page:
        """Return the first events after `since`, up to `head`, at most `count` of them, in one short transaction.

        With `encoded` there are only their bytes, of which PostgreSQL makes a message.

        Raises:
            SessionNotFound: There is no such session (any more).
            ServerSeqBeyondHead: Its log ends before `head`, as an older database's does after a fail-over or a restore.
        """
        asked = time.perf_counter()
        through = min(since + _SCAN, head)

        def bounds() -> reading.PageBounds:
            # When it is its turn: by then, much may be on its way.
            max_bytes = PAGE_BYTES if self._on_its_way < _MUCH_ON_ITS_WAY else _SMALL_PAGE_BYTES
            return reading.PageBounds(session_id, since, through, types, min(count, PAGE_EVENTS), max_bytes)

        if encoded:
            found = await self._read_page(lambda connection: reading.read_encoded_page(connection, bounds()))
            chunk = None if found is None else Chunk.of_bytes(found)
            last = 0 if found is None else found.last_server_seq
        else:
            events = await self._read_page(lambda connection: reading.read_page(connection, bounds()))
            # Nobody else has a page from the table, so a rough size will do: characters of the payloads.
            chunk = Chunk(events, sum(len(event.content.payload) for event in events)) if events else None
            last = events[-1].server_seq if events else 0
        self._metrics.page(time.perf_counter() - asked, 0 if chunk is None else chunk.count)
        if chunk is not None:
            return Page((chunk,), last, head)  # more may follow below `through`: the page may have been full
        await self.head(session_id, since=through)
        return Page((), through, head)

    async def to_head(
        self, session_id: int, *, since: int, limit: int, types: Collection[str], encoded: bool = False
    ) -> AsyncGenerator[Page, None]:
        """Yield the events after `since` up to the head as it is now, at least one page.

        A slow reader holds nothing in the database between the pages.

        Args:
            session_id: The session.
            since: Read what comes after this number.
            limit: End after so many events; 0 means all.
            types: Only events of these types; none means all.
            encoded: Read no more of them than their bytes.

        Raises:
            SessionNotFound: There is no such session (any more).
            ServerSeqBeyondHead: The session has not reached `since`.
        """
        head = await self.head(session_id, since=since)
        if since == head:
            yield Page((), head, head)
        left = limit or head
        reads: deque[asyncio.Task[Page]] = deque()
        try:
            while since < head and left:
                # Pages that begin where this one ends, if it is full, are read while it is sent.
                for expected in range(len(reads), 1 if types else self._pages_at_once()):
                    start, count = since + expected * PAGE_EVENTS, left - expected * PAGE_EVENTS
                    if start < head and count > 0:
                        read = self.page(session_id, since=start, head=head, types=types, count=count, encoded=encoded)
                        reads.append(asyncio.create_task(read, name="read"))
                page = await reads.popleft()
                if page.through != since + PAGE_EVENTS:
                    _give_up_all(reads)
                left -= page.count
                since = page.through
                with self.sending(page.size * (1 + len(reads))):
                    held = [page]
                    del page  # its bytes may be on their way for long; nobody needs the events meanwhile
                    yield held.pop()
        finally:
            _give_up_all(reads)

    def _pages_at_once(self) -> int:
        """Return how many pages one reader may have at once: more than one while there is plenty of everything."""
        return _READ_AHEAD if self._reading < self._at_once and self._on_its_way < _MUCH_ON_ITS_WAY // 4 else 1

    async def _read_page(self, statement: Callable[[DriverConnection], Awaitable[T]]) -> T:
        async with self._page_turns:
            await self._has_room.wait()
            return await self._read(statement)

    async def _read(self, statement: Callable[[DriverConnection], Awaitable[T]]) -> T:
        async with self._turns:
            self._reading += 1
            try:
                for attempt in (1, 2):  # a pooled connection may have died in its sleep; reading again harms nobody
                    try:
                        async with self._database.driver_connection(autocommit=True) as connection:
                            return await statement(connection)
                    except DatabaseUnreachable:
                        if attempt == 2:
                            raise
            finally:
                self._reading -= 1
        raise AssertionError("unreachable")


def _give_up_all(reads: deque[asyncio.Task[Page]]) -> None:
    """Cancel reads whose results nobody wants, without waiting for the driver to be done with them."""
    while reads:
        give_up(reads.pop())


def give_up(task: asyncio.Task[Any]) -> None:
    """Cancel a read whose result nobody wants, without waiting for the driver to be done with it."""
    task.cancel()
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
