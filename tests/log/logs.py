"""Writing and reading logs in the tests."""

from itertools import pairwise

import psycopg

from collab_service.log.decide import Appended, AppendRequest
from collab_service.log.service import LogService
from collab_service.metrics import Metrics, ServiceMetrics
from collab_service.model import Event, NewEvent
from collab_service.model.chain import chain_start, first_broken_link

STOP = 7
"""An advisory lock."""


def unseen() -> ServiceMetrics:
    """Return metrics that nobody looks at."""
    return ServiceMetrics(Metrics())


async def new_session(service: LogService) -> int:
    """Create a session and return its id."""
    session, _ = await service.create_session(language_id=None, owner_id=None, room=None)
    return session.id


async def session_with_known_head(service: LogService) -> int:
    """Create a session with two events, so that the service knows its head and appends in one round trip."""
    session_id = await new_session(service)
    for _ in range(2):
        await append(service, session_id, NewEvent(type="before"))
    return session_id


async def stop_inserts(connection: psycopg.AsyncConnection, condition: str = "true") -> None:
    """Make inserts of events wait, where a condition on the row holds, until this connection unlocks `STOP`."""
    await connection.execute(f"SELECT pg_advisory_lock({STOP})".encode())
    await connection.execute(
        "CREATE FUNCTION stop() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock({STOP}); RETURN NEW; END $$".encode()
    )
    await connection.execute(
        "CREATE TRIGGER stop BEFORE INSERT ON collab_events FOR EACH ROW"
        f" WHEN ({condition}) EXECUTE FUNCTION stop()".encode()
    )


async def let_inserts_go(connection: psycopg.AsyncConnection) -> None:
    """Let what `stop_inserts` has stopped go on."""
    await connection.execute(f"SELECT pg_advisory_unlock({STOP})".encode())


async def append(service: LogService, session_id: int, *events: NewEvent, expected: int | None = None) -> Appended:
    """Append a batch."""
    return await service.append(AppendRequest(session_id, events, 2 * len(events), expected))


async def read_all(service: LogService, session_id: int) -> list[Event]:
    """Read a session from the beginning."""
    return [event async for page in service.read(session_id, since=0, limit=0, types=()) for event in page.events]


async def read_checked(service: LogService, session_id: int) -> list[Event]:
    """Read a session from the beginning and check what always holds: numbers, times and the chain."""
    events = await read_all(service, session_id)
    assert [event.server_seq for event in events] == list(range(1, len(events) + 1))
    assert all(earlier.created_at <= later.created_at for earlier, later in pairwise(events))
    assert first_broken_link(chain_start(session_id), events) is None
    assert len({event.id for event in events}) == len(events)
    return events
