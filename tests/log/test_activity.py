"""When sessions were active: what is remembered of it is written, and forgotten."""

from collab_service.log.service import LogService
from collab_service.model import NewEvent
from tests.log.logs import append, new_session
from tests.log.test_sequencer import holding


async def test_what_is_gone_is_forgotten_and_what_is_held_is_kept(service: LogService, database_url: str) -> None:
    """Sessions that are deleted, however many, leave nothing behind; one that somebody holds waits for its turn."""
    ids = [await new_session(service) for _ in range(30)]
    for session_id in ids:
        await append(service, session_id, NewEvent())
    for session_id in ids[2:]:
        await service.delete_session(session_id)
    async with holding(database_url, ids[0]):
        await service._activity.flush()
        assert list(service._activity._newest) == ids[:1]
    await service._activity.flush()
    assert not service._activity._newest
