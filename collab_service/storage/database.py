"""The connection to PostgreSQL: one engine, its pool, and how its sessions are set up."""

import asyncio
import os
import select
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from sqlalchemy import ExceptionContext, event
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import QueuePool

from collab_service.metrics import PoolMetrics
from collab_service.model.errors import CommitOutcomeUnknown, DatabaseUnreachable, ReadOnlyServer
from collab_service.storage.binary import load_times_as_micros
from collab_service.storage.driver_errors import driver_errors, is_of_standby

DriverConnection = psycopg.AsyncConnection[tuple[Any, ...]]

_SET_UP_SECONDS = 5.0
"""For the first statement on a connection."""
_COME_BACK_SECONDS = 1.0
"""For connections that are still lent, and cut, when the pool closes."""

# What the URL says itself counts more.
_LIVENESS: dict[str, Any] = {
    "connect_timeout": 5,  # seconds, for each host of the URL
    # A server that vanishes without a word (its machine has died) is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,  # milliseconds
}

# What the service relies on, whatever the server's or the role's defaults are. An acknowledgement promises a flush, so
# `off` and `local` become `on`; stronger settings (`remote_apply`) stay. Appending reads the head in a statement after
# the one that took the lock and needs a new snapshot there, so the isolation level must be READ COMMITTED.
# Everything is looked up by index. Plans are kept, and where the tables were empty when they were last looked at, they
# would have been scans, for as long as it takes until they are looked at again.
_SET_UP_SESSION = """
SELECT set_config('TimeZone', 'UTC', false),
       set_config('default_transaction_isolation', 'read committed', false),
       set_config('statement_timeout', '30s', false),
       set_config('lock_timeout', '10s', false),
       set_config('idle_in_transaction_session_timeout', '30s', false),
       set_config('enable_seqscan', 'off', false),
       set_config('enable_bitmapscan', 'off', false),
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
    """Return what keeps `url` from being a PostgreSQL connection string, or None. Never repeats the URL.

    libpq looks at most values of parameters only when it connects; see `driver_errors.is_wrong_url`.
    """
    try:
        parameters = psycopg.conninfo.conninfo_to_dict(libpq_url(url))
        ports = str(parameters.get("port") or "")
    except psycopg.ProgrammingError:
        ports = "none"
    if not all(port.isdecimal() for port in ports.split(",") if port):
        return "is not a PostgreSQL URL; it looks like postgresql://user:password@host:5432/database"
    try:
        psycopg.conninfo.timeout_from_conninfo(parameters)
    except psycopg.ProgrammingError:
        return "has a connect_timeout that is no number of seconds"
    return None


async def reach(url: str) -> None:
    """Connect once; can be cancelled at any time.

    Raises:
        StorageUnavailable: The database cannot be reached.
    """
    with driver_errors():
        connection = await psycopg.AsyncConnection.connect(_conninfo(url))
        await connection.close()


def place_of(url: str) -> str:
    """Return where a URL's database is, for people: its hosts, ports and name, never a password."""
    parts = psycopg.conninfo.conninfo_to_dict(libpq_url(url))
    kept = {name: parts[name] for name in ("host", "port", "dbname", "user", "service") if parts.get(name)}
    return psycopg.conninfo.make_conninfo("", **kept)


def _conninfo(url: str) -> str:
    return psycopg.conninfo.make_conninfo("", **{**_LIVENESS, **psycopg.conninfo.conninfo_to_dict(libpq_url(url))})


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
        self._conninfo = _conninfo(url)
        self._metrics = metrics
        self._disposed = False
        self._came_back = asyncio.Event()
        self._opened: WeakKeyDictionary[DriverConnection, float] = WeakKeyDictionary()
        self._engine = create_async_engine(
            "postgresql+psycopg://",
            async_creator=self.connect,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=10,
            hide_parameters=True,  # what people wrote does not belong into logs, where the driver's errors go
        )
        event.listen(self._engine.sync_engine, "checkout", _refuse_hung_up)
        event.listen(self._engine.sync_engine, "checkin", self._take_back)
        event.listen(self._engine.sync_engine, "handle_error", _leave_read_only_server)
        pool = self._engine.sync_engine.pool
        assert isinstance(pool, QueuePool)
        metrics.watch(pool_size, pool.checkedout)
        self._pool = pool

    async def connect(self) -> DriverConnection:
        """Open a connection outside the pool; the caller closes it."""
        connection = await psycopg.AsyncConnection.connect(
            self._conninfo, autocommit=True, application_name="collab-service", client_encoding="UTF8"
        )
        self._opened[connection] = time.monotonic()
        try:
            with _hung_up_after(_SET_UP_SECONDS, connection):
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
            if self._disposed:
                raise DatabaseUnreachable
            asked = time.perf_counter()
            async with self._engine.connect() as connection:
                self._metrics.waited(time.perf_counter() - asked)
                yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction; commits at the end, rolls back when the block raises.

        Raises:
            CommitOutcomeUnknown: The connection was lost during the commit, or a standby was no longer waited for.
        """
        async with self.reading() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert isinstance(driver, psycopg.AsyncConnection)
            yield connection
            is_doubtful = False

            def note(notice: psycopg.errors.Diagnostic) -> None:
                nonlocal is_doubtful
                is_doubtful |= is_of_standby(notice)

            driver.add_notice_handler(note)
            try:
                await connection.commit()
            except DBAPIError as error:
                if isinstance(error.orig, psycopg.Error) and error.orig.diag.severity_nonlocalized == "ERROR":
                    raise  # the server said that it failed
                raise CommitOutcomeUnknown from error
            finally:
                driver.remove_notice_handler(note)
            if is_doubtful:
                raise CommitOutcomeUnknown

    @asynccontextmanager
    async def driver_connection(self, *, autocommit: bool = False) -> AsyncIterator[DriverConnection]:
        """Lend a pooled psycopg connection, for the statements where SQLAlchemy's own cost counts.

        What was not committed is rolled back; a broken connection does not go back to the pool.

        Args:
            autocommit: Each statement is a transaction, which saves single reads two round trips.
        """
        async with self.reading() as connection:
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

    def hang_up(self, *, opened_before: float) -> None:
        """Cut the connections, lent or not, that were opened before a moment of `time.monotonic`.

        Whoever waits on one is told that it is lost, and a new one is opened when it is needed.
        """
        for connection, opened in list(self._opened.items()):
            if opened < opened_before:
                _hang_up(connection)

    async def dispose(self) -> None:
        """Close the pool, and lend nothing from now on. Connections that are still lent are cut.

        Waits a moment until they are back: what nobody waits for any more, like a read that was given up, would take
        its connection along when the event loop ends.
        """
        self._disposed = True
        if self._pool.checkedout():
            self.hang_up(opened_before=time.monotonic())
        with suppress(TimeoutError):
            async with asyncio.timeout(_COME_BACK_SECONDS):
                while self._pool.checkedout():
                    self._came_back.clear()
                    await self._came_back.wait()
        await self._engine.dispose()

    def _take_back(self, adapted: Any, record: Any) -> None:
        self._came_back.set()
        # A pool that has been closed would leave it open until it is collected as garbage.
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

    def give_up(self) -> None:
        """Cut the connection, so that a beat that waits for an answer on it ends."""
        if self._connection is not None:
            _hang_up(self._connection)

    def leave(self, *, opened_before: float) -> None:
        """Cut all connections to the database from before a moment of `time.monotonic`."""
        self._database.hang_up(opened_before=opened_before)

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


def _leave_read_only_server(context: ExceptionContext) -> None:
    """Have the pool give up its connections when one shows that the server takes no writes any more."""
    if isinstance(context.original_exception, psycopg.errors.ReadOnlySqlTransaction):
        context.is_disconnect = True


@contextmanager
def _hung_up_after(seconds: float, connection: DriverConnection) -> Iterator[None]:
    timer = asyncio.get_running_loop().call_later(seconds, _hang_up, connection)
    try:
        yield
    finally:
        timer.cancel()


def _hang_up(connection: DriverConnection) -> None:
    """Cut a connection for good, whatever it is doing.

    Whoever waits on it sees its end. Closing it would wake nobody, and who is cancelled waits for the server again: the
    driver asks it to cancel the statement.
    """
    with (
        suppress(psycopg.OperationalError, OSError),  # it is closed, or lost already
        socket.socket(fileno=os.dup(connection.pgconn.socket)) as same,
    ):
        same.shutdown(socket.SHUT_RDWR)
