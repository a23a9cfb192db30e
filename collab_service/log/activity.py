"""When sessions were active: noted with every append, written once a second.

An UPDATE of the session's row with every append would leave a dead row version and index entries each time, and slow
down with every old snapshot. So the row's time lags by up to a second; readers show the later of it and the last
event's time.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import structlog

from collab_service.model import Event
from collab_service.model.errors import CollabError, LockTimeout
from collab_service.storage.database import Database
from collab_service.storage.repository import sessions

_log = structlog.get_logger(__name__)

_INTERVAL = 1.0
_AT_ONCE = 1_000
"""Sessions in a transaction."""
_LOCK_WAIT = 0.1
_WAITED_FOR = 10
"""Sessions whose rows are waited for in a flush, each for so long at most."""


class ActivityWriter:
    """Remembers the newest event's time of each session and writes it down from time to time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._times: dict[int, int] = {}
        self._flushing = asyncio.Lock()

    def note(self, events: Sequence[Event]) -> None:
        """Remember that these events were stored."""
        for event in events:
            self._times[event.session_id] = event.created_at

    async def run(self) -> None:
        """Write every second, for ever. What cannot be written now is kept for the next time."""
        while True:
            await asyncio.sleep(_INTERVAL)
            try:
                await self.flush()
            except CollabError as error:
                _log.debug("activity could not be written", cause=repr(error))

    async def flush(self) -> None:
        """Write what was noted until now.

        Raises:
            StorageUnavailable: The database cannot do it now; nothing is forgotten.
        """
        async with self._flushing:
            times, self._times = self._times, {}
            ids = list(times)
            try:
                for start in range(0, len(ids), _AT_ONCE):
                    some = {session_id: times[session_id] for session_id in ids[start : start + _AT_ONCE]}
                    async with self._database.transaction() as connection:
                        written = await sessions.record_activity(connection, some, wait=False)
                    for session_id in written:
                        del times[session_id]
                # What is left is gone or held by others: one by one, so that one that is stuck holds up no other.
                for session_id in list(times)[:_WAITED_FOR]:
                    await self._wait_and_write(session_id, times)
            finally:
                for session_id, at in times.items():
                    self._times.setdefault(session_id, at)

    async def _wait_and_write(self, session_id: int, times: dict[int, int]) -> None:
        with suppress(LockTimeout):
            async with self._database.transaction() as connection:
                await sessions.set_lock_timeout(connection, _LOCK_WAIT)
                await sessions.record_activity(connection, {session_id: times[session_id]})
            del times[session_id]
