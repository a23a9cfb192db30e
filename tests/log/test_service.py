"""What calls do to each other, and what they answer when something goes wrong half-way."""

import asyncio

import psycopg
import pytest

from collab_service.log.reading import Chunk, Page
from collab_service.model import NewEvent
from collab_service.model.errors import CommitOutcomeUnknown, ServerSeqBeyondHead
from tests.log.conftest import StartService
from tests.log.logs import append, new_session, read_checked
from tests.waiting import until

_MIB = 1024 * 1024
_MOST_ON_ITS_WAY = 64 * _MIB


async def test_a_warning_about_something_else(start_service: StartService, database_url: str) -> None:
    """Leaves no doubt: PostgreSQL also warns of databases that lack a vacuum, with every transaction."""
    service = start_service()
    session_id = await new_session(service)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(
            "CREATE FUNCTION warn() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE WARNING 'database must be vacuumed'; RETURN NULL; END $$"
        )
        await connection.execute(
            "CREATE TRIGGER warn AFTER INSERT ON collab_events FOR EACH STATEMENT EXECUTE FUNCTION warn()"
        )
    stored = [(await append(service, session_id, NewEvent())).events[0] for _ in range(4)]
    assert await read_checked(service, session_id) == stored


async def test_calls_that_wait_for_a_locked_session(start_service: StartService, database_url: str) -> None:
    """Keep nobody else out, however many they are; when it is free, they go on."""
    service = start_service(database_pool_size=4)
    locked, other = await new_session(service), await new_session(service)
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("SELECT FROM collab_sessions WHERE id = %s FOR UPDATE", [locked])
        touches = [asyncio.create_task(service.touch_session(locked)) for _ in range(12)]

        async def waits() -> bool:
            cursor = await connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
            row = await cursor.fetchone()
            return row is not None and row[0] >= 2

        await until(waits, "two who wait")
        async with asyncio.timeout(5):
            for _ in range(3):
                assert (await service.get_session(other)).id == other
        await connection.rollback()
    assert {session.id for session in await asyncio.gather(*touches)} == {locked}


async def test_a_user_who_is_removed_half_way(start_service: StartService, database_url: str) -> None:
    """Whatever goes wrong after some sessions have been released, nobody is told that nothing was done."""
    service = start_service()
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        cursor = await connection.execute(
            "WITH made AS (INSERT INTO collab_sessions (owner_id, created_at, last_active)"
            " SELECT 'ada', now(), now() FROM generate_series(1, 1500) RETURNING id) SELECT max(id) FROM made"
        )
        (last,) = await cursor.fetchone() or (0,)
        await connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'what nobody has thought of'; END $$"
        )
        await connection.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON collab_sessions FOR EACH ROW"
            f" WHEN (OLD.id = {last}) EXECUTE FUNCTION refuse()"
        )
        with pytest.raises(CommitOutcomeUnknown):
            await service.remove_user("ada")
        cursor = await connection.execute("SELECT count(*) FROM collab_sessions WHERE owner_id = 'ada'")
        assert await cursor.fetchone() == (500,)
        await connection.execute("DROP TRIGGER refuse ON collab_sessions")
    assert await service.remove_user("ada") == 500


async def test_a_log_that_ends_before_its_head(start_service: StartService) -> None:
    """A database that took over, and lacks what the one before had, has delivered nothing up to that one's head."""
    reader = start_service()._reader
    service = start_service()
    session_id = await new_session(service)
    await append(service, session_id, *[NewEvent() for _ in range(3)])
    with pytest.raises(ServerSeqBeyondHead):
        await reader.page(session_id, since=3, head=5)
    with pytest.raises(ServerSeqBeyondHead):
        await reader.page(session_id, since=0, head=5, types=["none"])
    assert (await reader.page(session_id, since=0, head=3, types=["none"])).through == 3


async def test_the_room_for_what_is_on_its_way(start_service: StartService) -> None:
    """When there is room again, it is for as many large pages as fit, and not for all that have waited for it."""
    reader = start_service()._reader
    page = Page((Chunk((), _MIB),), 1, 1)
    taken = asyncio.Event()
    most = sent = 0

    async def send() -> None:
        nonlocal most, sent
        await reader.room_for(page)
        with reader.sending(page.size):
            sent += 1
            most = max(most, sent)
            await taken.wait()
            sent -= 1

    with reader.sending(_MOST_ON_ITS_WAY):
        tasks = [asyncio.create_task(send()) for _ in range(200)]
        await asyncio.sleep(0)
        assert most == 0
    for _ in range(10):
        await asyncio.sleep(0)
    assert most == _MOST_ON_ITS_WAY // _MIB
    taken.set()
    await asyncio.gather(*tasks)
