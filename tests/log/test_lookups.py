"""Whatever is looked for is found by index, also on tables that were empty when PostgreSQL last looked at them."""

import psycopg

from collab_service.model import NewEvent
from tests.log.conftest import StartService
from tests.log.logs import append
from tests.waiting import until

_ROUNDS = 12
"""From the sixth time on PostgreSQL may keep a statement's plan."""


async def test_no_table_is_scanned(database_url: str, start_service: StartService) -> None:
    """A plan is kept until the table is looked at again, a minute or more; a scan takes longer with every event."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("VACUUM (ANALYZE) collab_sessions, collab_events")
        await connection.execute("SELECT pg_stat_reset()")
        services = [start_service(), start_service()]
        service = services[0]
        rooms = [f"room-{n}" for n in range(_ROUNDS)]
        created = [await service.create_session(language_id=7, owner_id="ada", room=room) for room in rooms]
        ids = [session.id for session, _ in created]
        for n in range(_ROUNDS):
            for each in services:  # in turn, so that heads are read; and again, so that they are known
                for key in (f"{each is service}-{n}", None):
                    await append(each, ids[0], NewEvent(type="edit", idempotency_key=key))
            await service.get_session(ids[n])
            await service.get_session_by_room(rooms[n])
            await service.touch_session(ids[n])
            for owner, language in (("ada", None), (None, 7), (None, None)):
                _, place = await service.list_sessions(owner_id=owner, language_id=language, after=None, count=2)
                await service.list_sessions(owner_id=owner, language_id=language, after=place, count=2)
            for encoded in (False, True):
                for types in ((), ("edit",)):
                    read = service.read(ids[0], since=0, limit=0, types=types, encoded=encoded)
                    assert sum([page.count async for page in read]) == 4 * (n + 1)
        await service.remove_user("ada")
        for session_id in ids:
            await service.delete_session(session_id)
        for each in services:
            await each.stop(5)

        async def is_alone() -> bool:
            found = await connection.execute(
                "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
            return found.rowcount == 0

        await until(is_alone, "the end of the services' connections, which count with their end")
        found = await connection.execute(
            "SELECT relname, seq_scan, idx_scan > 50 FROM pg_stat_user_tables WHERE relname LIKE 'collab%' ORDER BY 1"
        )
        assert await found.fetchall() == [("collab_events", 0, True), ("collab_sessions", 0, True)]
