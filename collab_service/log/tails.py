"""The tails of all sessions that are followed through this process, kept up with what every process writes.

What this process writes is fed to them directly. What others write is read from the table, once for all who follow:

* when another process notifies (a hint; see `notifications`),
* when a number comes that does not continue the tail,
* when the listener has been away, and every two seconds in any case, whatever was missed.

So a notification that is lost makes an event late, and nothing can make it missing.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import structlog

from collab_service.log.reading import Reader
from collab_service.log.tail import Tail
from collab_service.metrics import FollowMetrics
from collab_service.model import Event
from collab_service.model.errors import (
    CollabError,
    DatabaseUnreachable,
    Overloaded,
    ServerSeqBeyondHead,
    SessionNotFound,
    StorageUnavailable,
    TooManyFollowers,
)
from collab_service.storage.driver_errors import cause_of

_log = structlog.get_logger(__name__)

POLL = 2.0
"""Seconds between looks at all followed sessions."""
PATIENCE = 30.0
"""Seconds that the database may be away before follows end with its error."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between attempts to read while the database is away."""
_REST_PER_EVENT, _LONGEST_REST = 0.0003, 0.02
"""Seconds between two looks: for each event that the last one found, and at most."""
_SESSIONS = 1_000
"""Sessions to look at in one statement."""
_ALL_TAILS_BYTES = 64 * 1024 * 1024
_TAIL_BYTES = 1024 * 1024
"""What tails may keep in memory: all of them, and one. It may be four times as much if followers are yet to have it in
their turn, and more if it came at once."""


class Tails:
    """One tail for each session that is followed; nothing for those that are not."""

    def __init__(self, reader: Reader, *, metrics: FollowMetrics, max_followers: int) -> None:
        """Prepare; `run` keeps the tails up.

        Args:
            reader: Reads for the tails, and for nobody else who might keep it busy.
            metrics: Where it is seen who follows.
            max_followers: How many may follow at once, all sessions together.
        """
        self._reader = reader
        self._metrics = metrics
        self._max_followers = max_followers
        self._followers = 0
        self._tails: dict[int, Tail] = {}
        self._to_look_at: set[int] = set()
        self._wake = asyncio.Event()
        self._found = 0
        """Events that the last look has found."""
        self._closing: CollabError | None = None
        self._loop = asyncio.get_running_loop()
        metrics.watch(lambda: self._followers, lambda: len(self._tails))

    @contextmanager
    def join(self, session_id: int) -> Iterator[Tail]:
        """Follow a session for the length of the block.

        Raises:
            TooManyFollowers: There are as many as there may be.
        """
        if self._closing is not None:
            raise self._closing.with_traceback(None)
        if self._followers >= self._max_followers:
            raise TooManyFollowers
        tail = self._tails.get(session_id)
        if tail is None or tail.ending.done():
            tail = self._tails[session_id] = Tail(session_id, self._bytes_for(len(self._tails) + 1), self._metrics)
        self._followers += 1
        tail.followers += 1
        try:
            yield tail
        finally:
            self._followers -= 1
            tail.followers -= 1
            if not tail.followers:
                tail.close()
                if self._tails.get(session_id) is tail:
                    del self._tails[session_id]

    def learn(self, tail: Tail, head: int) -> None:
        """Take note that a session's events up to `head` are committed."""
        tail.learn(head)
        self._look_if_behind(tail)

    def feed(self, session_id: int, events: Sequence[Event]) -> None:
        """Take events that this process has committed: all that one transaction wrote into the session."""
        tail = self._tails.get(session_id)
        if tail is not None:
            tail.feed(events, events[-1].server_seq)
            self._look_if_behind(tail)

    def look_at(self, session_ids: Sequence[int]) -> None:
        """Look for what is new in those of these sessions that are followed, soon."""
        for session_id in session_ids:
            if session_id in self._tails:
                self._to_look_at.add(session_id)
                self._wake.set()

    def look_at_all(self) -> None:
        """Look for what is new in all sessions that are followed, soon."""
        self._to_look_at.update(self._tails)
        self._wake.set()

    def close(self, error: CollabError) -> None:
        """End all follows, also those that come from now on, with `error`."""
        self._closing = error
        self._end_all(error)

    async def run(self) -> None:
        """Keep the tails up, for ever."""
        failing_since: float | None = None
        pause = _FIRST_PAUSE
        next_poll = self._loop.time() + POLL
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_poll):
                    await self._wake.wait()
            if self._loop.time() >= next_poll:  # also when there is so much to do that nothing is waited for
                next_poll = self._loop.time() + POLL
                self._forget_old()
                self.look_at_all()
            looking, self._to_look_at = self._to_look_at, set()
            self._wake.clear()
            self._found = 0
            try:
                await self._look_for_so_long(looking)
            except (StorageUnavailable, Overloaded) as error:
                self._to_look_at |= looking
                now = self._loop.time()
                if failing_since is None:
                    failing_since = now
                    _log.warning("followed sessions cannot be read, trying on", cause=cause_of(error))
                elif now - failing_since > PATIENCE:
                    self._end_all(error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                self._wake.set()
            else:
                if failing_since is not None:
                    _log.info("followed sessions can be read again")
                failing_since, pause = None, _FIRST_PAUSE
                # While others write a lot, fewer looks that find more leave the time to write as much.
                await asyncio.sleep(min(_REST_PER_EVENT * self._found, _LONGEST_REST))

    def _look_if_behind(self, tail: Tail) -> None:
        if tail.is_behind:
            self.look_at([tail.session_id])

    def _end_all(self, error: CollabError) -> None:
        for tail in self._tails.values():
            tail.end(error)

    def _bytes_for(self, tails: int) -> int:
        return min(_TAIL_BYTES, _ALL_TAILS_BYTES // max(tails, 1))

    def _forget_old(self) -> None:
        """Keep no events for those who are far behind; they read from the table."""
        before, size = self._loop.time() - POLL, self._bytes_for(len(self._tails))
        for tail in self._tails.values():
            tail.forget(before, size)

    async def _look_for_so_long(self, session_ids: set[int]) -> None:
        """Look, and end all follows when that takes too long: a database that hangs is as good as away."""
        looking = asyncio.create_task(self._look(session_ids), name="look")
        try:
            # Not cancelled when it takes longer: the driver would wait for the server even then.
            await asyncio.wait((looking,), timeout=PATIENCE)
            if not looking.done():
                _log.error("followed sessions cannot be read, the database does not answer")
                self._end_all(DatabaseUnreachable("the database does not answer"))
            await looking
        finally:
            looking.cancel()

    async def _look(self, session_ids: set[int]) -> None:
        """Find out how far sessions have come, and read the next page of each whose tail has not."""
        tails = [tail for id_ in session_ids if (tail := self._tails.get(id_)) is not None]
        for start in range(0, len(tails), _SESSIONS):
            some = tails[start : start + _SESSIONS]
            # What has been learned before the statement began is committed and seen by it.
            learned = [tail.head for tail in some]
            heads = await self._reader.heads([tail.session_id for tail in some])
            behind = []
            for tail, before in zip(some, learned, strict=True):
                head = heads.get(tail.session_id)
                if head is None:
                    tail.end(SessionNotFound(session_id=tail.session_id))
                elif head < before:
                    # The database has lost events, as after the restore of a backup. Numbers will be given again, so
                    # nobody who has seen them can go on.
                    _log.error("a session has fewer events than before", session_id=tail.session_id, head=head)
                    tail.end(ServerSeqBeyondHead(before, head))
                else:
                    tail.learn(head)
                    if tail.is_behind:
                        behind.append(tail)
            await asyncio.gather(*map(self._read_on, behind))

    async def _read_on(self, tail: Tail) -> None:
        """Read the next page of what others wrote. What is wrong with one session is no other's trouble."""
        head = tail.head
        try:
            page = await self._reader.page(tail.session_id, since=tail.reached, head=head)
        except (StorageUnavailable, Overloaded) as error:
            now = self._loop.time()  # looked at again with the next poll
            tail.failing_since = tail.failing_since or now
            if now - tail.failing_since > PATIENCE:
                tail.end(error)
        except Exception as error:
            tail.end(error)
        else:
            tail.failing_since = None
            if page.chunks:
                self._found += page.count
                tail.feed(page.chunks[0].events, head)
            self._look_if_behind(tail)
