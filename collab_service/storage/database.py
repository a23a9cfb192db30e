"""The connection to PostgreSQL: one engine, its pool, and how its sessions are set up."""

import select
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import QueuePool

from collab_service.metrics import PoolMetrics
from collab_service.model.errors import CommitOutcomeUnknown, DatabaseUnreachable, ReadOnlyServer
from collab_service.storage.binary import load_times_as_micros
from collab_service.storage.driver_errors import driver_errors

DriverConnection = psycopg.AsyncConnection[tuple[Any, ...]]

_LIVENESS: dict[str, Any] = {
    "connect_timeout": 5,  # seconds
    # A server that vanishes without a word (its machine has died) is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}

# What the service relies on, whatever the server's or the role's defaults are. An acknowledgement promises a flush, so
# `off` and `local` become `on`; stronger settings (`remote_apply`) stay. Appending reads the head in a statement after
# the one that took the lock and needs a new snapshot there, so the isolation level must be READ COMMITTED.
_SET_UP_SESSION = """
SELECT set_config('TimeZone', 'UTC', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('statement_timeout', '60s', false),
       set_config('idle_in_transaction_session_timeout', '30s', false),
       set_config('synchronous_commit',
                  CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
                       ELSE current_setting('synchronous_commit') END, false)
"""


def libpq_url(url: str) -> str:
    """Return a database URL as libpq wants it: SQLAlchemy's driver suffix is dropped, all else stays.

    Everything that libpq takes works, several hosts and `target_session_attrs` included
    (https://www.postgresql.org/docs/18/libpq-connect.html#LIBPQ-CONNSTRING).
    """
    for prefix in ("postgresql+psycopg://", "postgres://"):
        if url.startswith(prefix):
            return "postgresql://" + url.removeprefix(prefix)
    return url


def url_problem(url: str) -> str | None:
    """Return what keeps `url` from being a PostgreSQL connection string, or None. Never repeats the URL."""
    try:
        ports = str(psycopg.conninfo.conninfo_to_dict(libpq_url(url)).get("port") or "")
    except psycopg.ProgrammingError:
        ports = "none"
    if not all(port.isdecimal() for port in ports.split(",") if port):
        return "is not a PostgreSQL URL; it looks like postgresql://user:password@host:5432/database"
    return None


class Database:
    """A pool of connections to one PostgreSQL database.

    Errors of the driver come out as `StorageUnavailable` and its kinds, an exhausted pool as `Overloaded`.
    """

    def __init__(self, url: str, *, metrics: PoolMetrics, pool_size: int = 10) -> None:
        """Prepare; connects when first used.

        Args:
            url: Anything that libpq takes, and SQLAlchemy's `postgresql+psycopg://`.
            metrics: Where the pool is seen.
            pool_size: Connections at most.
        """
        self._url = libpq_url(url)
        self._metrics = metrics
        self._engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=self.connect,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=10,
            hide_parameters=True,  # what people wrote does not belong into logs, where the driver's errors go
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_hung_up)
        event.listen(self._engine.sync_engine, "checkin", self._close_if_late)
        pool = self._engine.sync_engine.pool
        assert isinstance(pool, QueuePool)
        metrics.watch(pool_size, pool.checkedout)
        self._disposed = False

    async def connect(self) -> DriverConnection:
        """Open a connection outside the pool; the caller closes it."""
        connection = await psycopg.AsyncConnection.connect(
            self._url, autocommit=True, application_name="collab-service", client_encoding="UTF8", **_LIVENESS
        )
        try:
            await connection.execute(_SET_UP_SESSION)
            await connection.set_autocommit(False)
        except BaseException:
            await connection.close()
            raise
        load_times_as_micros(connection)
        return connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that is rolled back at its end."""
        with driver_errors():
            asked = time.perf_counter()
            async with self._engine.connect() as connection:
                self._metrics.waited(time.perf_counter() - asked)
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction; commits at the end, rolls back when the block raises.

        Raises:
            CommitOutcomeUnknown: The connection was lost during the commit.
        """
        async with self.reading() as connection:
            yield connection
            try:
                await connection.commit()
            except DBAPIError as error:
                if isinstance(error.orig, psycopg.Error) and error.orig.diag.severity_nonlocalized == "ERROR":
                    raise  # the server said that it failed
                raise CommitOutcomeUnknown from error

    @asynccontextmanager
    async def driver_connection(self, *, autocommit: bool = False) -> AsyncIterator[DriverConnection]:
        """Lend a pooled psycopg connection, for the statements where SQLAlchemy's own cost counts.

        What was not committed is rolled back; a broken connection does not go back to the pool.

        Args:
            autocommit: Each statement is a transaction, which saves single reads two round trips.
        """
        with driver_errors():
            asked = time.perf_counter()
            async with self._engine.connect() as connection:
                self._metrics.waited(time.perf_counter() - asked)
                driver: DriverConnection = (await connection.get_raw_connection()).driver_connection  # type: ignore[assignment]
                try:
                    if autocommit:
                        await driver.set_autocommit(True)
                    yield driver
                finally:
                    if driver.broken or driver.closed:
                        await connection.invalidate()
                    elif autocommit:
                        await driver.set_autocommit(False)

    async def dispose(self) -> None:
        """Close the pool; connections that are still lent are closed when they come back."""
        self._disposed = True
        await self._engine.dispose()

    def _close_if_late(self, adapted: Any, record: Any) -> None:
        # The pool it goes back to is gone, and would leave it open until it is collected as garbage.
        if self._disposed and adapted is not None:
            adapted.driver_connection.pgconn.finish()


class Pulse:
    """A connection of its own that tells whether the database is there and takes writes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: DriverConnection | None = None

    async def beat(self) -> None:
        """Ask the database once.

        Raises:
            DatabaseUnreachable: It does not answer.
            ReadOnlyServer: It is a standby or set to read only.
        """
        try:
            with driver_errors():
                if self._connection is None:
                    self._connection = await self._database.connect()
                    await self._connection.set_autocommit(True)
                cursor = await self._connection.execute(
                    "SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean"
                )
                row = await cursor.fetchone()
        except BaseException:
            await self.close()
            raise
        if row is None:
            raise DatabaseUnreachable
        if row[0]:
            await self.close()
            raise ReadOnlyServer

    async def close(self) -> None:
        """Close the connection; the next beat opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def _refuse_hung_up(adapted: Any, _record: Any, _proxy: Any) -> None:
    """Keep a connection that the server has closed from being lent: an idle one is readable only then."""
    driver = adapted.driver_connection
    if driver.closed:
        raise DisconnectionError
    poll = select.poll()
    poll.register(driver.fileno(), select.POLLIN)
    if poll.poll(0):
        raise DisconnectionError
