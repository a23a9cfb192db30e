"""Removes the rows of deleted sessions, in bounded steps, so that nobody notices.

Deleting a session is a mark, set in a short transaction; what is left to do stands in the database. So it is done
whatever crashes: by this process, or by any other that finds the mark.
"""

import asyncio

import structlog

from collab_service.model.errors import CollabError
from collab_service.storage.database import Database
from collab_service.storage.repository import sessions

_log = structlog.get_logger(__name__)

_STEP = 5_000
"""Events in a transaction."""
_PAUSE = 0.02
"""Seconds between the steps, which others have for themselves."""
_LOOK = 30.0
"""Seconds between looks for what another process has left behind."""


class Remover:
    """Finds deleted sessions and removes their rows."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._wake = asyncio.Event()
        self._wake.set()

    def wake(self) -> None:
        """Tell that a session was deleted."""
        self._wake.set()

    async def run(self) -> None:
        """Remove what there is, and look again when woken or after a while, for ever."""
        while True:
            self._wake.clear()
            try:
                await self._remove_all()
            except CollabError as error:
                _log.warning("deleted sessions could not be removed, tried again later", cause=repr(error))
            try:
                async with asyncio.timeout(_LOOK):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _remove_all(self) -> None:
        more = await self._step()
        while more:
            await asyncio.sleep(_PAUSE)
            more = await self._step()

    async def _step(self) -> bool:
        """Remove some events of one deleted session, or its row when none is left; False when nothing is to do."""
        async with self._database.transaction() as connection:
            found = await sessions.find_deleted(connection)
            if found is None:
                return False
            session_id, first, last = found
            if last:
                await sessions.remove_events(connection, session_id, first, min(first + _STEP - 1, last))
            else:
                await sessions.remove_session(connection, session_id)
                _log.info("a deleted session was removed", session_id=session_id)
        return True
