"""The pool's end: nothing that it has lent is left open, whoever had it."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from collab_service.model.errors import DatabaseUnreachable
from collab_service.storage.database import Database
from tests.log.logs import unseen
from tests.waiting import until


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The test's own database, through a pool."""
    database = Database(database_url, metrics=unseen().database.pool("calls"), pool_size=2)
    yield database
    await database.dispose()


@pytest.mark.parametrize("given_up", [False, True], ids=["somebody waits", "nobody waits"])
async def test_what_is_lent_is_back_when_the_pool_has_closed(
    database: Database, database_url: str, given_up: bool
) -> None:
    """A statement that runs is cut, also one that nobody waits for: the event loop's end would lose its connection."""

    async def sleep() -> None:
        async with database.driver_connection(autocommit=True) as connection:
            await connection.execute("SELECT pg_sleep(60)")

    async def sleeps() -> bool:
        cursor = await other.execute(
            "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        )
        return cursor.rowcount == 1

    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
        sleeping = asyncio.create_task(sleep())
        await until(sleeps, "the statement")
        if given_up:
            sleeping.cancel()
        await database.dispose()
        for _ in range(10):  # its connection is back, and there is nothing left to wait for
            await asyncio.sleep(0)
        assert sleeping.done()
        with pytest.raises(asyncio.CancelledError if given_up else DatabaseUnreachable):
            await sleeping


async def test_a_closed_pool_lends_nothing(database: Database) -> None:
    """What comes late fails, and opens no connection that nobody would close."""
    await database.dispose()
    with pytest.raises(DatabaseUnreachable):
        async with database.reading():
            pass
