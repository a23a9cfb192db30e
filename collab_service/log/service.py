"""What can be done with sessions and their logs: the use cases, one method each."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from operator import attrgetter

from sqlalchemy.ext.asyncio import AsyncConnection

from collab_service.config import Config
from collab_service.log.activity import ActivityWriter
from collab_service.log.background import BackgroundTasks
from collab_service.log.decide import Appended, AppendRequest
from collab_service.log.follow import follow
from collab_service.log.notifications import Notifications
from collab_service.log.queue import Pending, Succession
from collab_service.log.reading import Page, Reader
from collab_service.log.removal import Remover
from collab_service.log.sequencer import Sequencer
from collab_service.log.tails import Tails
from collab_service.metrics import ServiceMetrics
from collab_service.model import Event, ListPosition, Session
from collab_service.model.errors import (
    CollabError,
    CommitOutcomeUnknown,
    Overloaded,
    SessionNotFound,
    ShuttingDown,
)
from collab_service.storage.database import Database, Pulse
from collab_service.storage.repository import sessions
from collab_service.storage.times import now_micros

_RELEASE_STEP = 1_000
"""Sessions that one transaction takes an owner off."""
_CHANGES_TURN = 10.0
"""Seconds to wait for a turn to change sessions."""
_TAIL_READS = 2
"""Reads at once for the tails, on connections of their own: whatever keeps the others busy, followers are served."""
_LAST_NOTIFICATION = 1.0
"""Seconds for it when the process stops."""


class LogService:
    """Sessions and their logs, on one database."""

    def __init__(
        self, config: Config, database_url: str, *, metrics: ServiceMetrics, on_death: Callable[[], None]
    ) -> None:
        """Prepare; `start` makes it work.

        Args:
            config: The settings.
            database_url: The database; its schema must be there.
            metrics: Where it is seen how it fares.
            on_death: Called when a background task died, after which the process has to go.
        """
        self._database = Database(
            database_url, metrics=metrics.database.pool("calls"), pool_size=config.database_pool_size
        )
        self._changes = asyncio.Semaphore(max(config.database_pool_size // 2, 1))
        """Calls at once that may wait for rows of sessions."""
        self._activity = ActivityWriter(self._database)
        self._remover = Remover(self._database)
        self._reader = Reader(
            self._database, metrics=metrics.reads.of("calls"), at_once=max(config.database_pool_size // 2, 1)
        )
        self._tails_database = Database(database_url, metrics=metrics.database.pool("tails"), pool_size=_TAIL_READS)
        self._tails = Tails(
            Reader(self._tails_database, metrics=metrics.reads.of("tails"), at_once=_TAIL_READS),
            metrics=metrics.follows,
            max_followers=config.max_followers,
        )
        self._notifications: Notifications | None = None
        if config.notify:
            self._notifications = Notifications(
                self._database,
                metrics=metrics.follows,
                on_change=self._tails.look_at,
                on_listening=self._tails.look_at_all,
            )
        self._tasks = BackgroundTasks(on_death)
        self._sequencer = Sequencer(
            self._database,
            config.queue,
            activity=self._activity,
            metrics=metrics.appends,
            tasks=BackgroundTasks(on_death),
            on_stored=self._stored,
        )

    def start(self) -> None:
        """Begin to work."""
        self._sequencer.start()
        self._tasks.spawn(self._activity.run(), "activity")
        self._tasks.spawn(self._remover.run(), "removal")
        self._tasks.spawn(self._tails.run(), "tails")
        if self._notifications is not None:
            self._tasks.spawn(self._notifications.listen(), "listen")
            self._tasks.spawn(self._notifications.send(), "notify")

    @property
    def readers_hold_too_much(self) -> bool:
        """Whether so much is on its way to readers that nothing more is read."""
        return self._reader.is_full

    def stop_following(self) -> None:
        """End all follows, also those that come from now on, with `ShuttingDown`."""
        self._tails.close(ShuttingDown())

    async def stop(self, grace: float) -> None:
        """Write what waits, for `grace` seconds at most, and let go of the database."""
        self.stop_following()
        await self._sequencer.stop(grace)
        if self._notifications is not None:
            await self._notifications.all_sent(_LAST_NOTIFICATION)
        await self._tasks.cancel()
        with suppress(CollabError):  # only a listing's order would have used it
            await self._activity.flush()
        await self._database.dispose()
        await self._tails_database.dispose()

    def pulse(self) -> Pulse:
        """Return something to feel the database's pulse with."""
        return Pulse(self._database)

    async def create_session(
        self, *, language_id: int | None, owner_id: str | None, room: str | None
    ) -> tuple[Session, bool]:
        """Create a session, or return the one that has the room; True when it is new."""
        while True:
            async with self._database.transaction() as connection:
                session_id = await sessions.create_session(
                    connection, language_id=language_id, owner_id=owner_id, room=room, now=now_micros()
                )
                if session_id is not None:
                    return _found(await sessions.get_session(connection, session_id), session_id=session_id), True
            # In a transaction of its own, which sees what the winner of a race has committed. A session that is
            # deleted in between has left the room free.
            async with self._database.reading() as connection:
                if room is not None and (session := await sessions.get_session_by_room(connection, room)) is not None:
                    return session, False

    async def get_session(self, session_id: int) -> Session:
        """Return a session by its id; raises `SessionNotFound`."""
        async with self._database.reading() as connection:
            return _found(await sessions.get_session(connection, session_id), session_id=session_id)

    async def get_session_by_room(self, room: str) -> Session:
        """Return a session by its room; raises `SessionNotFound`."""
        async with self._database.reading() as connection:
            return _found(await sessions.get_session_by_room(connection, room), room=room)

    async def list_sessions(
        self, *, language_id: int | None, owner_id: str | None, after: ListPosition | None, count: int
    ) -> tuple[list[Session], ListPosition | None]:
        """Return the next sessions, the most recently active first, and the place to go on at, if there are more.

        Args:
            language_id: Only sessions with this language.
            owner_id: Only sessions of this owner.
            after: The place that the page before returned; None for the first page.
            count: How many at most.
        """
        if after is None:
            with suppress(CollabError):  # it is written later, then; and a list writes nothing that may be in doubt
                await self._activity.flush()  # so that the order is that of what was appended a moment ago
        async with self._database.reading() as connection:
            found = await sessions.list_sessions(
                connection, language_id=language_id, owner_id=owner_id, after=after, count=count + 1
            )
        page = found[:count]
        return [session for session, _ in page], page[-1][1] if found != page else None

    async def touch_session(self, session_id: int) -> Session:
        """Move a session's activity to now; raises `SessionNotFound`."""
        async with self._changing_sessions() as connection:
            await sessions.touch_session(connection, session_id, now_micros())
            return _found(await sessions.get_session(connection, session_id), session_id=session_id)

    async def delete_session(self, session_id: int) -> None:
        """Delete a session; its rows are removed later, in steps; raises `SessionNotFound`."""
        async with self._changing_sessions() as connection:
            if not await sessions.mark_deleted(connection, session_id, now_micros()):
                raise SessionNotFound(session_id=session_id)
        self._remover.wake()
        self._tails.look_at([session_id])
        self._tell_others(session_id)

    async def remove_user(self, user_id: str) -> int:
        """Take a user off the sessions they own, in steps, and return how many those were.

        Raises:
            CommitOutcomeUnknown: It failed after some steps had been taken.
        """
        released, last = 0, 0
        while True:
            try:
                async with self._changing_sessions() as connection:
                    ids = await sessions.release_sessions(connection, user_id, after=last, count=_RELEASE_STEP)
            except Exception as error:  # whatever it is: some are released, and the caller must not be told of none
                if not released:
                    raise
                raise CommitOutcomeUnknown from error
            released += len(ids)
            if len(ids) < _RELEASE_STEP:
                return released
            last = ids[-1]

    @asynccontextmanager
    async def _changing_sessions(self) -> AsyncGenerator[AsyncConnection, None]:
        """Open a transaction that may wait for rows which others hold; all such leave connections free for the rest.

        Raises:
            Overloaded: Others wait, and have not come to an end in time.
        """
        try:
            async with asyncio.timeout(_CHANGES_TURN):
                await self._changes.acquire()
        except TimeoutError:
            raise Overloaded("too many calls wait for sessions that are locked") from None
        try:
            async with self._database.transaction() as connection:
                yield connection
        finally:
            self._changes.release()

    def append(self, request: AppendRequest) -> Awaitable[Appended]:
        """Append events to a session, all or nothing; see `Sequencer.append`."""
        return self._sequencer.append(request)

    def submit(self, request: AppendRequest, succession: Succession) -> Awaitable[Pending]:
        """Let an append wait to be written, as soon as there is room for it; see `Sequencer.submit`."""
        return self._sequencer.submit(request, succession)

    def check_room(self, session_id: int, size: int) -> None:
        """Raise `Overloaded` if there is no room for an append; see `Sequencer.check_room`."""
        self._sequencer.check_room(session_id, size)

    def withdraw(self, pending: Pending) -> None:
        """Give up on an append; see `Sequencer.withdraw`."""
        self._sequencer.withdraw(pending)

    def read(
        self, session_id: int, *, since: int, limit: int, types: Sequence[str], encoded: bool = False
    ) -> AsyncGenerator[Page, None]:
        """Read a session's events up to the head as it is now; see `Reader.to_head`."""
        return self._reader.to_head(session_id, since=since, limit=limit, types=types, encoded=encoded)

    def follow(
        self, session_id: int, *, since: int, limit: int, types: Sequence[str], encoded: bool = False
    ) -> AsyncGenerator[Page, None]:
        """Read a session's events, then those that come; see `follow`."""
        if self._notifications is not None:
            self._notifications.want_to_hear()
        return follow(
            self._reader, self._tails, session_id, since=since, limit=limit, types=frozenset(types), encoded=encoded
        )

    def _stored(self, events: Sequence[Event]) -> None:
        """Take note of what a transaction of this process has committed, before anybody is answered."""
        for session_id, stored in groupby(events, key=attrgetter("session_id")):
            fresh = list(stored)
            self._tails.feed(session_id, fresh)
            self._tell_others(session_id, len(fresh))

    def _tell_others(self, session_id: int, events: int = 0) -> None:
        if self._notifications is not None:
            self._notifications.tell(session_id, events)


def _found(session: Session | None, *, session_id: int | None = None, room: str | None = None) -> Session:
    if session is None:
        raise SessionNotFound(session_id=session_id, room=room)
    return session
