"""Follows a session: reads up to the head, then waits there for what comes, for as long as it takes.

A follower is a cursor: it is at a number, and all it does is to move on to the next. Where it takes the events from
does not matter, since they are the same everywhere: from the tail in memory that all followers of the session share
when they are there, else from the table. So the hand-over from catching up to following needs no care, and a follower
that is too slow for the tail reads on from the table and holds nobody up.
"""

import asyncio
from collections.abc import AsyncGenerator

from collab_service.log.reading import Chunk, Page, Reader, give_up
from collab_service.log.tail import Tail
from collab_service.log.tails import PATIENCE, Tails
from collab_service.model.errors import Overloaded, StorageUnavailable
from collab_service.model.limits import MAX_INT64

HEARTBEAT = 10.0
"""Seconds of silence after which the bookmark is sent."""
_BOOKMARKS = 1.0
"""Seconds after which a new bookmark is sent although no event is, where a filter lets little through; and until the
first message, where reading takes long."""
_PAUSE = 0.5
"""Seconds between attempts to read while the database is away."""


async def follow(
    reader: Reader,
    tails: Tails,
    session_id: int,
    *,
    since: int,
    limit: int,
    types: frozenset[str],
    encoded: bool = False,
) -> AsyncGenerator[Page, None]:
    """Yield the events after `since`, then those that come; the first page at once, and one at least every 10 s.

    Use `contextlib.aclosing`, so that leaving it half-way ends the following.

    Args:
        reader: Reads from the table.
        tails: The tails of this process.
        session_id: The session.
        since: Read what comes after this number.
        limit: End after so many events; 0 means never.
        types: Only events of these types; none means all.
        encoded: Read no more of them from the table than their bytes.

    Raises:
        SessionNotFound: There is no such session (any more).
        ServerSeqBeyondHead: The session has not reached `since`.
        TooManyFollowers: This process has as many followers as it accepts.
        ShuttingDown: The process is stopping.
        StorageUnavailable: The database was away when the follow began, or has been for half a minute since.
    """
    with tails.join(session_id) as tail:
        follower = _Follower(reader, tails, tail, since, limit or MAX_INT64, types, encoded=encoded)
        try:
            while (page := await follower.next()) is not None:
                await reader.room_for(page)
                with reader.sending(page.size):
                    held = [page]
                    del page  # its bytes may be on their way for long; nobody needs the events meanwhile
                    yield held.pop()
        finally:
            follower.close()


class _Follower:
    """A cursor in a session's log."""

    def __init__(
        self,
        reader: Reader,
        tails: Tails,
        tail: Tail,
        position: int,
        limit: int,
        types: frozenset[str],
        *,
        encoded: bool,
    ) -> None:
        self._reader = reader
        self._tails = tails
        self._tail = tail
        self._position = position
        self._left = limit
        self._types = types
        self._encoded = encoded
        self._loop = asyncio.get_running_loop()
        self._told: int | None = None
        """The last bookmark that was sent."""
        self._told_at = self._loop.time()
        self._failing_since: float | None = None
        self._read: asyncio.Task[Page] | None = None
        """A read of the table that is under way. It goes on while heartbeats are sent."""
        self._goes_on = False
        """Whether more was there than the last message could hold: then the next one does not wait for its turn."""

    async def next(self) -> Page | None:
        """Wait for the next page and return it; None when the limit is reached."""
        if self._told is None:
            await self._begin()
        while self._left:
            page = await self._page()
            if page is not None:
                self._position = page.through
                self._left -= page.count
            is_first_at_the_head = self._told is None and page is None and self._read is None
            if (page is not None and page.chunks) or is_first_at_the_head or self._silence_left() <= 0:
                self._told, self._told_at = self._position, self._loop.time()
                return page or Page((), self._position, self._tail.head)
        return None

    def close(self) -> None:
        """Give up what is under way."""
        if self._read is not None:
            give_up(self._read)

    async def _begin(self) -> None:
        """Find the head. The tail is there already, so nothing can slip in between."""
        looking = asyncio.create_task(self._reader.head(self._tail.session_id, since=self._position), name="head")
        try:
            await asyncio.wait((looking, self._tail.ending), return_when=asyncio.FIRST_COMPLETED)
            self._tail.check()
            self._tails.learn(self._tail, await looking)
        finally:
            give_up(looking)

    def _silence_left(self) -> float:
        """Return the seconds until the bookmark has to be sent."""
        due = HEARTBEAT if self._position == self._told else _BOOKMARKS
        return self._told_at + due - self._loop.time()

    async def _page(self) -> Page | None:
        """Return what comes after the position; None when there is nothing before the bookmark has to be sent."""
        if self._told is not None and not self._goes_on:
            await self._tail.turn(self._position, self._silence_left())
        self._tail.check()
        page = self._tail.after(self._position)
        if page is None:
            return await self._page_from_table()
        self._failing_since = None
        self._goes_on = page.through < self._tail.handed_out
        return self._what_is_asked_for(page) if page.chunks else None

    def _what_is_asked_for(self, page: Page) -> Page:
        if self._types:
            chunks = [part for chunk in page.chunks if (part := chunk.of_types(self._types)).events]
            page = Page(chunks, page.through, page.head)
        if page.count >= self._left:
            events = page.events[: self._left]
            page = Page([Chunk(events)], events[-1].server_seq, page.head)
        return page

    async def _page_from_table(self) -> Page | None:
        if self._read is None:
            self._read = asyncio.create_task(self._read_table(), name="read")
        # Not cancelled when it takes longer: the driver would wait for the server even then.
        await asyncio.wait(
            (self._read, self._tail.ending), timeout=self._silence_left(), return_when=asyncio.FIRST_COMPLETED
        )
        if not self._read.done():
            return None
        read, self._read = self._read, None
        try:
            page = read.result()
        except (StorageUnavailable, Overloaded):
            # A follow that has begun outlives a restart of the database.
            now = self._loop.time()
            self._failing_since = self._failing_since or now
            if self._told is None or now - self._failing_since > PATIENCE:
                raise
            await asyncio.sleep(_PAUSE)
            return None
        self._failing_since = None
        return page

    async def _read_table(self) -> Page:
        return await self._reader.page(
            self._tail.session_id,
            since=self._position,
            head=self._tail.head,
            types=self._types,
            count=self._left,
            encoded=self._encoded,
        )
