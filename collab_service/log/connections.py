"""The connections that appends are written on: one for the task that writes, more while sessions are waited for."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import psycopg

from collab_service.storage.database import Database
from collab_service.storage.driver_errors import driver_errors
from collab_service.storage.pipeline import PipelineConnection
from collab_service.storage.repository import appending


class AppendConnections:
    """Lends connections and keeps them for the next time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._idle: list[PipelineConnection] = []

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[PipelineConnection]:
        """Lend a connection, opened when none is idle. After an error, whatever it has begun is rolled back.

        Errors of the driver come out as `StorageUnavailable` and its kinds.
        """
        with driver_errors():
            connection = self._idle.pop() if self._idle else None
            if connection is None or not connection.usable:
                connection = await PipelineConnection.open(self._database)
                try:
                    await connection.run(appending.SET_UP_CONNECTION)
                except BaseException:
                    connection.close()
                    raise
            try:
                yield connection
            except psycopg.errors.ReadOnlySqlTransaction:
                connection.close()  # another server may take writes
                raise
            except BaseException:
                # The error to tell is the one that happened, not one of cleaning up after it.
                with suppress(psycopg.Error):
                    await connection.run(appending.ROLLBACK)
                raise
            finally:
                if connection.usable:
                    self._idle.append(connection)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
