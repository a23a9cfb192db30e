"""What the driver raises becomes our own error, shown with errors that a real server gives; and how sessions begin.

Nothing here is a made-up exception. The one error that PostgreSQL was asked to pretend is the full disk, since filling
one takes a file system of its own.
"""

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection

from collab_service.log.connections import AppendConnections
from collab_service.model.errors import (
    CollabError,
    DatabaseUnreachable,
    DiskFull,
    LockTimeout,
    Overloaded,
    ReadOnlyServer,
    StorageUnavailable,
    TooManyConnections,
    TransactionConflict,
)
from collab_service.storage import schema
from collab_service.storage.database import Database, Pulse, libpq_url, url_problem
from collab_service.storage.driver_errors import cause_of
from collab_service.storage.embedded import Cluster
from collab_service.storage.pipeline import Command, Statement
from collab_service.storage.repository import sessions
from tests.log.logs import unseen
from tests.waiting import until

LIMITED_PASSWORD = "not-the-owner's"


@asynccontextmanager
async def database_of(url: str, pool_size: int = 4) -> AsyncIterator[Database]:
    """Open a database's pool and close it at the end."""
    database = Database(url, metrics=unseen().database.pool("calls"), pool_size=pool_size)
    yield database
    await database.dispose()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's own database, through the service's pool."""
    async with database_of(database_url) as database:
        yield database


@pytest.fixture
def name(database_url: str) -> str:
    """The name of the test's own database."""
    return str(psycopg.conninfo.conninfo_to_dict(database_url)["dbname"])


@pytest.fixture
def role(cluster: Cluster) -> Iterator[str]:
    """A role that may only log in."""
    role = f"role_{uuid.uuid4().hex[:8]}"
    administer(cluster.url, "CREATE ROLE {} LOGIN PASSWORD {}", sql.Identifier(role), sql.Literal(LIMITED_PASSWORD))
    yield role
    administer(cluster.url, "DROP ROLE {}", sql.Identifier(role))


def administer(url: str, statement: str, *parts: sql.Composable) -> None:
    """Run a statement that takes no parameters."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*parts))


def url_as(url: str, role: str) -> str:
    """Return a database's URL for another role."""
    return f"postgresql://{role}:{quote(LIMITED_PASSWORD)}@" + url.partition("@")[2]


async def new_session(database: Database, room: str | None = None) -> int:
    """Insert a session."""
    async with database.transaction() as connection:
        session_id = await sessions.create_session(connection, language_id=None, owner_id=None, room=room, now=1)
        assert session_id is not None
        return session_id


async def touch(connection: AsyncConnection, session_id: int) -> None:
    """Write to a session's row, for which its lock is needed."""
    await connection.execute(
        text("UPDATE collab_sessions SET language_id = coalesce(language_id, 0) + 1 WHERE id = :id"),
        {"id": session_id},
    )


def assert_told(error: CollabError, kind: type[CollabError], cause: type[BaseException] | None = None) -> None:
    """Assert that an error is exactly this one, has a sentence of its own, and keeps what the driver said."""
    assert type(error) is kind
    assert error.__cause__ is not None
    original = getattr(error.__cause__, "orig", error.__cause__)
    if cause is not None:
        assert isinstance(original, cause), original
    assert str(original) not in str(error)


def closed_port() -> int:
    """Return a port on which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@pytest.mark.parametrize("where", ["closed port", "missing socket", "no such database", "wrong password"])
async def test_unreachable(where: str, directory: Path, cluster: Cluster) -> None:
    """Nobody listens, or it does not let us in: the database is unreachable, for a pool, a pulse and a migration."""
    url = {
        "closed port": f"postgresql://collab@127.0.0.1:{closed_port()}/postgres",
        "missing socket": f"postgresql://collab@/postgres?host={directory}",
        "no such database": cluster.url.replace("/postgres?", "/nowhere?"),
        "wrong password": cluster.url.replace("@/", "x@/"),
    }[where]
    async with database_of(url) as database:
        with pytest.raises(StorageUnavailable) as caught:
            async with database.transaction():
                pass
        assert_told(caught.value, DatabaseUnreachable, psycopg.OperationalError)
        with pytest.raises(DatabaseUnreachable):
            await Pulse(database).beat()
    for use in (schema.migrate, schema.schema_state):
        with pytest.raises(StorageUnavailable) as caught:
            use(url)
        assert_told(caught.value, DatabaseUnreachable, psycopg.OperationalError)


async def test_too_many_connections(database_url: str, name: str, role: str, cluster: Cluster) -> None:
    """A limit of the role or of the database that is reached is told as such, and passes when one goes."""
    administer(cluster.url, "ALTER ROLE {} CONNECTION LIMIT 1", sql.Identifier(role))
    async with database_of(url_as(database_url, role)) as database:
        async with database.transaction():
            with pytest.raises(StorageUnavailable) as caught:
                async with database.transaction():
                    pass
        assert_told(caught.value, TooManyConnections, psycopg.OperationalError)
        async with database.transaction():
            pass


async def test_too_many_connections_to_the_database(database_url: str, name: str, role: str, cluster: Cluster) -> None:
    """The database's own limit is told the same way, also for the pulse."""
    administer(cluster.url, "ALTER DATABASE {} CONNECTION LIMIT 0", sql.Identifier(name))
    async with database_of(url_as(database_url, role)) as database:
        with pytest.raises(StorageUnavailable) as caught:
            await Pulse(database).beat()
        assert_told(caught.value, TooManyConnections)


async def test_serialization_failure(database: Database) -> None:
    """A transaction that the server breaks off for another one is a conflict, after which trying again helps."""
    session_id = await new_session(database)
    with pytest.raises(StorageUnavailable) as caught:
        async with database.transaction() as late:
            await late.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
            await late.execute(text("SELECT count(*) FROM collab_sessions"))
            async with database.transaction() as early:
                await touch(early, session_id)
            await touch(late, session_id)
    assert_told(caught.value, TransactionConflict, psycopg.errors.SerializationFailure)
    assert caught.value.retry_after == TransactionConflict.retry_after


async def test_deadlock(database: Database) -> None:
    """Of two transactions that wait for each other one goes on, and the other is told that it lost."""
    first, second = await new_session(database), await new_session(database)
    both_hold = asyncio.Barrier(2)

    async def cross(mine: int, theirs: int) -> None:
        async with database.transaction() as connection:
            await connection.execute(text("SET LOCAL deadlock_timeout = '20ms'"))
            await touch(connection, mine)
            await both_hold.wait()
            await touch(connection, theirs)

    outcomes = await asyncio.gather(cross(first, second), cross(second, first), return_exceptions=True)
    (lost,) = [outcome for outcome in outcomes if outcome is not None]
    assert isinstance(lost, TransactionConflict)
    assert_told(lost, TransactionConflict, psycopg.errors.DeadlockDetected)


async def test_read_only_server(database_url: str, name: str, cluster: Cluster) -> None:
    """A server that takes no writes is told as such: by a write, by the pulse, and by a migration."""
    administer(cluster.url, "ALTER DATABASE {} SET default_transaction_read_only = on", sql.Identifier(name))
    async with database_of(database_url) as database:
        with pytest.raises(StorageUnavailable) as caught:
            await new_session(database)
        assert_told(caught.value, ReadOnlyServer, psycopg.errors.ReadOnlySqlTransaction)
        with pytest.raises(ReadOnlyServer):
            await Pulse(database).beat()
        async with database.transaction() as connection:  # reading works
            assert await sessions.get_session(connection, 1) is None
    with pytest.raises(ReadOnlyServer):
        schema.migrate(database_url, target="base")


async def test_the_pulse_is_felt_again(database_url: str, name: str, cluster: Cluster) -> None:
    """When the server takes writes again, or the connection was cut, the next beat says so by itself."""
    async with database_of(database_url) as database:
        pulse = Pulse(database)
        await pulse.beat()
        administer(cluster.url, "ALTER DATABASE {} SET default_transaction_read_only = on", sql.Identifier(name))
        disconnect_all(cluster.url, name)
        with pytest.raises(DatabaseUnreachable):
            await pulse.beat()
        with pytest.raises(ReadOnlyServer):
            await pulse.beat()
        administer(cluster.url, "ALTER DATABASE {} RESET default_transaction_read_only", sql.Identifier(name))
        await pulse.beat()
        await pulse.close()


async def test_lock_timeout(database: Database) -> None:
    """A row that somebody else holds for too long is told, not waited for without end."""
    session_id = await new_session(database)
    async with database.transaction() as holder:
        await touch(holder, session_id)
        with pytest.raises(StorageUnavailable) as caught:
            async with database.transaction() as connection:
                await sessions.set_lock_timeout(connection, 0.02)
                await sessions.touch_session(connection, session_id, 2)
    assert_told(caught.value, LockTimeout, psycopg.errors.LockNotAvailable)


async def test_statement_timeout(database: Database) -> None:
    """A statement that takes too long is told."""
    with pytest.raises(StorageUnavailable) as caught:
        async with database.transaction() as connection:
            await connection.execute(text("SET LOCAL statement_timeout = '20ms'"))
            await connection.execute(text("SELECT pg_sleep(60)"))
    assert_told(caught.value, LockTimeout, psycopg.errors.QueryCanceled)


@pytest.mark.parametrize("lend", ["transaction", "driver_connection"])
async def test_terminated_backend(database: Database, database_url: str, name: str, lend: str) -> None:
    """A connection that the server ends in a transaction is told, and the pool lends a working one afterwards."""
    with pytest.raises(StorageUnavailable) as caught:
        async with getattr(database, lend)() as connection:
            statement = "SELECT 1"
            await connection.execute(text(statement) if lend == "transaction" else statement)
            disconnect_all(database_url, name)
            await connection.execute(text(statement) if lend == "transaction" else statement)
    assert_told(caught.value, DatabaseUnreachable, psycopg.OperationalError)
    await new_session(database)


async def test_a_connection_that_was_cut_in_the_pool_is_not_lent(
    database: Database, database_url: str, name: str
) -> None:
    """After a restart of the database nobody gets an error for a connection that died while nobody used it."""
    async with database.transaction(), database.transaction(), database.transaction():
        pass
    disconnect_all(database_url, name)

    async def are_gone() -> bool:
        return count_connections(database_url, name) == 0

    await until(are_gone, "the end of the connections")
    for _ in range(4):
        await new_session(database)


async def test_idle_in_transaction(database: Database) -> None:
    """A transaction that the server ended because nothing came is a lost connection."""
    with pytest.raises(StorageUnavailable) as caught:
        async with database.driver_connection() as connection:
            await connection.execute("SET idle_in_transaction_session_timeout = '20ms'")

            async def is_cut() -> bool:
                return count_connections(database._conninfo, connection.info.dbname) == 0

            await until(is_cut, "the end of the idle transaction")
            await connection.execute("SELECT 1")
    assert_told(caught.value, DatabaseUnreachable, psycopg.errors.IdleInTransactionSessionTimeout)


@pytest.mark.parametrize(
    ("sqlstate", "kind"),
    [
        ("53100", DiskFull),
        ("53200", StorageUnavailable),  # out of memory
        ("58030", StorageUnavailable),  # I/O error
        ("57P03", DatabaseUnreachable),  # starting up or shutting down
    ],
)
async def test_what_cannot_be_provoked_here(database: Database, sqlstate: str, kind: type[CollabError]) -> None:
    """A full disk and a broken one are told.

    The server is asked to raise these, by PL/pgSQL: filling a disk for real needs a file system of its own, which only
    root can mount. What reaches the driver is the same error message with the same SQLSTATE.
    """
    with pytest.raises(StorageUnavailable) as caught:
        async with database.transaction() as connection:
            await connection.execute(text(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$"))
    assert_told(caught.value, kind)


async def test_exhausted_pool(database_url: str) -> None:
    """When every connection is busy for too long, the caller is told to come back, and nothing piles up."""
    async with database_of(database_url, pool_size=1) as database:
        pool = database._engine.pool
        assert pool._timeout == 10  # type: ignore[attr-defined]
        pool._timeout = 0.05  # type: ignore[attr-defined]  # what it does is the same after 50 ms
        async with database.transaction():
            started = time.monotonic()
            with pytest.raises(Overloaded) as caught:
                async with database.transaction():
                    pass
            assert time.monotonic() - started < 5
        assert_told(caught.value, Overloaded)
        assert caught.value.retry_after is not None
        async with database.transaction():
            pass


async def test_a_unique_violation_is_not_the_databases_state(database: Database) -> None:
    """A constraint that our own code breaks is a fault of ours, and never told as the database's trouble."""
    insert = text("INSERT INTO collab_sessions (room, created_at, last_active) VALUES ('r', now(), now())")
    with pytest.raises(IntegrityError) as caught:
        async with database.transaction() as connection:
            await connection.execute(insert)
            await connection.execute(insert)
    assert isinstance(caught.value.orig, psycopg.errors.UniqueViolation)
    with pytest.raises(psycopg.errors.UniqueViolation):
        async with database.driver_connection() as connection:
            await connection.execute("SELECT 1")
            for _ in range(2):
                await connection.execute(insert.text)


async def test_errors_do_not_repeat_what_people_wrote(database: Database) -> None:
    """The driver's errors go to the log, where what somebody called their room does not belong."""
    with pytest.raises(DBAPIError) as caught:
        async with database.transaction() as connection:
            await connection.execute(text("SELECT :room FROM nowhere"), {"room": "sEcret"})
    assert "nowhere" in str(caught.value)
    assert "sEcret" not in str(caught.value)


async def test_a_role_without_privileges(database_url: str, role: str) -> None:
    """A role that may not read or write our tables is the database's state; its own words are kept for the operator."""
    async with database_of(url_as(database_url, role)) as database:
        with pytest.raises(StorageUnavailable) as caught:
            await new_session(database)
    assert_told(caught.value, StorageUnavailable, psycopg.errors.InsufficientPrivilege)
    assert cause_of(caught.value) == "permission denied for table collab_sessions"


async def test_a_wrong_statement_is_not_the_databases_state(database: Database) -> None:
    """A mistake in a statement is a fault of ours as well."""
    with pytest.raises(ProgrammingError):
        async with database.transaction() as connection:
            await connection.execute(text("SELECT nothing FROM nowhere"))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://collab:secret@db.internal:5432/collab",
        "postgres://collab@db.internal/collab",
        "postgresql+psycopg://collab@db.internal/collab",
        "postgresql://collab@one:5432,two:5433/collab?target_session_attrs=read-write",
        "postgresql://collab@/collab?host=%2Frun%2Fpostgresql&sslmode=verify-full",
        "postgresql://[::1]:5432/collab",
        "host=db.internal dbname=collab",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    """Everything that libpq takes is a database URL, and so is SQLAlchemy's form of it."""
    assert url_problem(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "mysql://collab:sEcret@db.internal/collab",
        "db.internal:5432/sEcret",
        "postgresql://collab:sEcret@db.internal/collab?no_such_option=1",
        "postgresql://[::1/sEcret",
        "postgresql://collab:sEcret%zz@db.internal/collab",
        "sEcret",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    """What is no PostgreSQL URL is told with what one looks like, and without repeating it: it may hold a password."""
    problem = url_problem(url)
    assert problem is not None
    assert "postgresql://user:password@host:5432/database" in problem
    assert "sEcret" not in problem


def test_libpq_url() -> None:
    """SQLAlchemy's driver suffix goes, and everything else stays, byte for byte."""
    rest = "us%40er:p%2Bw@one,two:5433/db?host=%2Ftmp&application_name=postgres://"
    for prefix in ("postgresql+psycopg://", "postgres://", "postgresql://"):
        assert libpq_url(prefix + rest) == "postgresql://" + rest
    assert libpq_url("host=one dbname=postgres") == "host=one dbname=postgres"


@pytest.mark.parametrize("of", ["DATABASE", "ROLE"])
@pytest.mark.parametrize(
    ("default", "used"),
    [("off", "on"), ("local", "on"), ("on", "on"), ("remote_write", "remote_write"), ("remote_apply", "remote_apply")],
)
async def test_commits_are_flushed_whatever_the_default(
    database_url: str, name: str, role: str, cluster: Cluster, of: str, default: str, used: str
) -> None:
    """An acknowledgement promises a flush: weaker defaults are lifted to `on`, stronger ones stay."""
    owner = sql.Identifier(name if of == "DATABASE" else role)
    administer(cluster.url, f"ALTER {of} {{}} SET synchronous_commit = {default}", owner)
    assert await setting(url_as(database_url, role), "synchronous_commit") == used


async def test_sessions_are_set_up_whatever_the_defaults(database_url: str, name: str, cluster: Cluster) -> None:
    """Appending relies on READ COMMITTED, and times on UTC; statements and idle transactions have an end."""
    for wrong in (
        "default_transaction_isolation = 'repeatable read'",
        "timezone = 'Asia/Tokyo'",
        "statement_timeout = 0",
        "lock_timeout = 0",
        "idle_in_transaction_session_timeout = 0",
    ):
        administer(cluster.url, f"ALTER DATABASE {{}} SET {wrong}", sql.Identifier(name))
    found = {what: await setting(database_url, what) for what in (
        "transaction_isolation", "TimeZone", "statement_timeout", "lock_timeout",
        "idle_in_transaction_session_timeout", "application_name",
    )}  # fmt: skip
    assert found == {
        "transaction_isolation": "read committed",
        "TimeZone": "UTC",
        "statement_timeout": "30s",
        "lock_timeout": "10s",
        "idle_in_transaction_session_timeout": "30s",
        "application_name": "collab-service",
    }


async def test_connections_of_appends(database: Database) -> None:
    """Everybody's appends wait for the statement before them, so it has less time than others."""
    connections = AppendConnections(database)
    show = [Command(Statement(what, b"SHOW " + what)) for what in (b"statement_timeout", b"lock_timeout")]
    async with connections.lend() as connection:
        found = [result.get_value(0, 0) for result in await connection.run(*show)]
    connections.close()
    assert found == [b"15s", b"10s"]


async def setting(url: str, what: str) -> str:
    """Return a setting as a transaction of ours sees it; the pool's and the driver's connection see the same."""
    async with database_of(url) as database:
        async with database.transaction() as connection:
            value: str = (await connection.execute(text("SELECT current_setting(:what)"), {"what": what})).scalar_one()
        async with database.driver_connection() as driver:
            row = await (await driver.execute("SELECT current_setting(%s)", (what,))).fetchone()
            assert row == (value,)
        return value


def disconnect_all(url: str, name: str) -> None:
    """End every connection of ours to a database, as an administrator or a restart does."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = %s AND application_name = 'collab-service' AND pid <> pg_backend_pid()",
            (name,),
        )


def count_connections(url: str, name: str) -> int:
    """Return how many connections of ours a database has."""
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'collab-service'", (name,)
        ).fetchone()
    assert row is not None
    return int(row[0])
