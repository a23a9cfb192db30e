"""Whatever is looked for is found by index, whatever PostgreSQL knows of the tables."""

from collections.abc import Sequence

import psycopg
import pytest

from collab_service.log.service import LogService
from collab_service.model import NewEvent
from tests.log.conftest import StartService
from tests.log.logs import append
from tests.waiting import until

_ROUNDS = 12
"""From the sixth time on PostgreSQL may keep a statement's plan."""


@pytest.fixture(params=["new", "empty"])
def tables(request: pytest.FixtureRequest, database_url: str) -> str:
    """The database, of which PostgreSQL knows nothing yet, or that it is empty, as after all sessions were deleted."""
    if request.param == "empty":
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("VACUUM (ANALYZE) collab_sessions, collab_events")
    return database_url


async def scans_after(services: Sequence[LogService], url: str) -> tuple[dict[str, int], dict[str, int]]:
    """Stop services, whose connections count with their end; return the scans of each table, and of each index."""
    for service in services:
        await service.stop(5)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:

        async def is_alone() -> bool:
            found = await connection.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
            return found.rowcount == 0

        await until(is_alone, "the end of the services' connections")
        tables = await connection.execute(
            "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname LIKE 'collab%'"
        )
        indexes = await connection.execute("SELECT indexrelname, idx_scan FROM pg_stat_user_indexes")
        return dict(await tables.fetchall()), dict(await indexes.fetchall())


async def new_sessions(service: LogService) -> list[int]:
    """Create sessions with rooms, all of one owner and language."""
    created = [await service.create_session(language_id=7, owner_id="ada", room=f"room-{n}") for n in range(_ROUNDS)]
    return [session.id for session, _ in created]


async def test_by_number(tables: str, start_service: StartService) -> None:
    """Sessions and events are found by their numbers, and no other index is read for it.

    A plan is kept until the table is looked at again, a minute or more, and what reads all of a table or an index takes
    longer with every row.
    """
    services = [start_service(), start_service()]
    service = services[0]
    ids = await new_sessions(service)
    for n in range(_ROUNDS):
        for each in services:  # in turn, so that heads are read; and again, so that they are known
            for key in (f"{each is service}-{n}", None):
                await append(each, ids[0], NewEvent(type="edit", idempotency_key=key))
        await service.get_session(ids[n])
        await service.get_session_by_room(f"room-{n}")
        await service.touch_session(ids[n])
        for encoded in (False, True):
            for types in ((), ("edit",)):
                read = service.read(ids[0], since=0, limit=0, types=types, encoded=encoded)
                assert sum([page.count async for page in read]) == 4 * (n + 1)
    for session_id in ids:
        await service.delete_session(session_id)
    scans, by_index = await scans_after(services, tables)
    assert scans == {"collab_events": 0, "collab_sessions": 0}
    assert min(by_index["collab_events_pkey"], by_index["collab_sessions_pkey"]) > 50
    others = ("last_active", "language", "owner")
    assert [by_index[f"collab_sessions_{other}_idx"] for other in others] == [0, 0, 0]


async def test_lists(tables: str, start_service: StartService) -> None:
    """Lists of sessions, and an owner's sessions, are found by index as well."""
    service = start_service()
    await new_sessions(service)
    for _ in range(_ROUNDS):
        for owner, language in (("ada", None), (None, 7), (None, None)):
            page, place = await service.list_sessions(owner_id=owner, language_id=language, after=None, count=2)
            more, _ = await service.list_sessions(owner_id=owner, language_id=language, after=place, count=2)
            assert (len(page), len(more)) == (2, 2)
    assert await service.remove_user("ada") == _ROUNDS
    scans, _ = await scans_after([service], tables)
    assert scans["collab_sessions"] == 0
