"""When sessions were active: what is remembered of it is written, and forgotten."""

from collab_service.log.activity import ActivityWriter
from collab_service.log.service import LogService
from tests.log.logs import new_session
from tests.log.test_sequencer import holding


async def test_what_is_gone_is_forgotten_and_what_is_held_is_kept(service: LogService, database_url: str) -> None:
    """Sessions that are deleted, however many, leave nothing behind; one that somebody holds waits for its turn."""
    ids = [await new_session(service) for _ in range(30)]
    for session_id in ids[2:]:
        await service.delete_session(session_id)
    # One of the test's own: the service's writes by itself whenever it likes.
    activity = ActivityWriter(service._database)
    activity.note(dict.fromkeys(ids, 4_000_000_000_000_000), written=())
    async with holding(database_url, ids[0]):
        await activity.flush()
        assert list(activity._newest) == ids[:1]
    await activity.flush()
    assert not activity._newest
    sessions = [await service.get_session(session_id) for session_id in ids[:2]]
    assert {session.last_active for session in sessions} == {4_000_000_000_000_000}
