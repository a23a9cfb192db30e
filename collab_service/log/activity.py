"""When sessions were active: noted with every append, written at most once a second.

An UPDATE of the session's row with every append would leave a dead row version and index entries each time, and slow
down with every old snapshot. So the row's time lags by a second or two; readers show the later of it and the last
event's time. The append transactions write it, which hold the row's lock anyway; a task writes what remains when
nothing more is appended. (When the task wrote all of it, its locks met those of the appends: with 1,000 sessions busy
at once that cost a quarter of the appends.)
"""

import asyncio
import math
from collections.abc import Collection, Mapping
from contextlib import suppress

import structlog

from collab_service.model.errors import CollabError, LockTimeout
from collab_service.storage.database import Database
from collab_service.storage.repository import sessions

_log = structlog.get_logger(__name__)

_INTERVAL = 1.0
"""Seconds."""
_AT_ONCE = 1_000
"""Sessions in a transaction."""
_LOCK_WAIT = 0.1
_WAITED_FOR = 10
"""Sessions whose rows are waited for in a flush, each for so long at most."""


class ActivityWriter:
    """Remembers the newest event's time of each session and writes it down from time to time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._newest: dict[int, int] = {}
        """Of each session whose row says less, its newest event's time in microseconds."""
        self._since: dict[int, float] = {}
        """Of the same sessions, when the first event came that is newer than the row says, on the loop's clock."""
        self._flushing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._waited = -math.inf
        """When the last flush began that waited for rows which others hold."""

    def due(self, times: Mapping[int, int]) -> dict[int, int]:
        """Return, of sessions with the time of their newest event, those whose time is to be written with it."""
        before = self._loop.time() - _INTERVAL
        since = self._since
        return {
            session_id: time for session_id, time in times.items() if session_id in since and since[session_id] < before
        }

    def note(self, times: Mapping[int, int], written: Collection[int]) -> None:
        """Remember when the newest events were stored, and in which sessions that is written already."""
        self._newest |= times
        now = self._loop.time()
        for session_id in times:
            self._since.setdefault(session_id, now)
        for session_id in written:
            del self._newest[session_id], self._since[session_id]

    async def run(self) -> None:
        """Write what no append has written, every second, for ever. What cannot be written now is kept."""
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                await self._flush(self._loop.time() - 2 * _INTERVAL)
            except CollabError as error:
                _log.debug("activity could not be written", cause=repr(error))

    async def flush(self) -> None:
        """Write what was noted until now.

        Raises:
            StorageUnavailable: The database cannot do it now; nothing is forgotten.
        """
        await self._flush(math.inf)

    async def _flush(self, before: float) -> None:
        asked = self._loop.time()
        async with self._flushing:
            began = self._loop.time()
            since = {session_id: then for session_id, then in self._since.items() if then <= before}
            left = {session_id: self._newest.pop(session_id) for session_id in since}
            for session_id in since:
                del self._since[session_id]
            try:
                ids = list(left)
                for start in range(0, len(ids), _AT_ONCE):
                    times = {session_id: left[session_id] for session_id in ids[start : start + _AT_ONCE]}
                    async with self._database.transaction() as connection:
                        held = await sessions.record_activity(connection, times, wait=False)
                    for session_id in times.keys() - held:
                        del left[session_id]
                # What is left is held by others: one by one, so that one that is stuck holds up no other, and those
                # that were waited for in vain come last the next time. Where several flushes were asked for meanwhile,
                # the first of them has waited for all.
                waited_for = [] if self._waited > asked else list(left)[:_WAITED_FOR]
                if waited_for:
                    self._waited = began
                for session_id in waited_for:
                    left[session_id] = left.pop(session_id)
                    await self._wait_and_write(session_id, left)
            finally:
                for session_id, time in left.items():
                    self._newest.setdefault(session_id, time)
                    self._since[session_id] = since[session_id]

    async def _wait_and_write(self, session_id: int, left: dict[int, int]) -> None:
        with suppress(LockTimeout):
            async with self._database.transaction() as connection:
                await sessions.set_lock_timeout(connection, _LOCK_WAIT)
                await sessions.record_activity(connection, {session_id: left[session_id]})
            del left[session_id]
